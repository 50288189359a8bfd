import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.algorithms.weights import HISTORIES, AdaptiveTagWeights
from maple_trl.modalities import ModalityTag


steps = st.lists(
    st.dictionaries(st.sampled_from(list(ModalityTag)), st.floats(0, 30), min_size=1, max_size=7), max_size=8
)


def naive_weights(steps, window, history, eps=1e-4):
    """Equation 4 over plain lists that only grow."""
    seen, weights = [], {}
    for step in steps:
        for tag in ModalityTag:
            if tag in step:
                seen.append((tag, step[tag]))
        for tag, difficulty in step.items():
            values = [d for t, d in seen if history == "pooled" or t == tag][-window:]
            if len(values) < 2:
                weights[tag] = 0.5
                continue
            mean = sum(values) / len(values)
            std = math.sqrt(sum((d - mean) ** 2 for d in values) / (len(values) - 1))
            z = (difficulty - mean) / (std + eps)
            weights[tag] = (1 + math.tanh(z / 2)) / 2
    return weights


@pytest.mark.parametrize("history", HISTORIES)
@given(steps=steps, window=st.integers(1, 12))
def test_equals_the_formula(history, steps, window):
    weights = AdaptiveTagWeights(window, history)
    for step in steps:
        weights.observe(step)
    expected = naive_weights(steps, window, history)
    for tag in ModalityTag:
        assert weights.weight(tag) == pytest.approx(expected.get(tag, 0.5), abs=1e-9)
    assert weights.metrics() == {f"tag/{t}/weight": weights.weight(t) for t in ModalityTag if t in expected}


def test_worked_numbers():
    weights = AdaptiveTagWeights(window=10)
    assert weights.weight("VS") == 0.5
    weights.observe({"V": 1.0})
    assert weights.weight("V") == 0.5
    weights.observe({"sv": 3.0})
    # H = (1, 3): mean 2, unbiased deviation sqrt(2), and the newest value is already in it.
    assert weights.weight("VS") == pytest.approx(1 / (1 + math.exp(-1 / (math.sqrt(2) + 1e-4))))
    assert weights.weight("V") == 0.5


def test_all_difficulties_of_a_step_enter_before_any_weight():
    weights = AdaptiveTagWeights(window=10)
    weights.observe({"V": 1.0, "A": 2.0, "S": 3.0})
    assert weights.weight("V") == pytest.approx(1 / (1 + math.exp(1 / 1.0001)))
    assert weights.weight("A") == pytest.approx(0.5)
    assert weights.weight("V") + weights.weight("S") == pytest.approx(1)


def test_histories_differ():
    pooled, per_tag = AdaptiveTagWeights(10, "pooled"), AdaptiveTagWeights(10, "per_tag")
    for step in ({"V": 1.0}, {"A": 9.0}, {"V": 2.0}):
        pooled.observe(step)
        per_tag.observe(step)
    assert pooled.weight("V") < 0.5 < per_tag.weight("V")
    assert pooled.weight("A") > 0.5 == per_tag.weight("A")


@given(steps=steps)
def test_a_harder_tag_of_a_step_weighs_more(steps):
    weights = AdaptiveTagWeights(window=100)
    for step in steps:
        weights.observe(step)
        for a, b in zip(step, list(step)[1:], strict=False):
            assert (weights.weight(a) - weights.weight(b)) * (step[a] - step[b]) >= 0
            assert 0 < weights.weight(a) < 1


def test_a_window_shorter_than_a_step_cannot_overflow():
    weights = AdaptiveTagWeights(window=2)
    weights.observe({"V": 0.0, "A": 30.0, "S": 30.0, "VA": 30.0})
    assert weights.weight("V") == 0 and weights.weight("S") == 0.5


@pytest.mark.parametrize("history", HISTORIES)
@given(before=steps, after=steps, window=st.integers(1, 6))
@pytest.mark.matrix(cases=1)
def test_a_saved_state_goes_on_alike(history, before, after, window):
    original, restored = (AdaptiveTagWeights(window, history) for _ in range(2))
    for step in before:
        original.observe(step)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.metrics() == original.metrics()
    for step in after:
        original.observe(step)
        restored.observe(step)
        assert restored.metrics() == original.metrics()


def test_forgetting_the_state_is_noticed():
    original, fresh = AdaptiveTagWeights(10), AdaptiveTagWeights(10)
    original.observe({"V": 1.0})
    original.observe({"A": 5.0})
    fresh.observe({"A": 5.0})
    assert original.weight("A") != fresh.weight("A")


def test_a_state_is_a_copy():
    weights = AdaptiveTagWeights(10)
    weights.observe({"V": 1.0})
    state = weights.state_dict()
    text = json.dumps(state)
    weights.observe({"V": 2.0, "A": 3.0})
    assert json.dumps(state) == text


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="at least 1 difficulty, got 0"):
        AdaptiveTagWeights(0)
    with pytest.raises(ValueError, match="Unknown weight history 'tag'; choose one of pooled, per_tag"):
        AdaptiveTagWeights(5, "tag")
    weights = AdaptiveTagWeights(5)
    with pytest.raises(ValueError, match="'pooled' history of difficulties, but weight_history is 'per_tag'"):
        AdaptiveTagWeights(5, "per_tag").load_state_dict(weights.state_dict())
    for bad in ({"V": 1.0, "X": 2.0}, {"V": 1.0, "A": math.inf}):
        with pytest.raises(ValueError, match="'X' is not a modality tag|tag A must be finite"):
            weights.observe(bad)
    assert weights.state_dict() == AdaptiveTagWeights(5).state_dict()
