import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.algorithms.curriculum import CURRICULA, TagCurriculum
from maple_trl.modalities import ModalityTag


some_tags = st.lists(st.sampled_from(list(ModalityTag)), max_size=9)
# Few distinct values, so that ties are common.
steps = st.lists(
    st.dictionaries(st.sampled_from(list(ModalityTag)), st.sampled_from([0.0, 0.5, 1.0, 3.0]), max_size=7), max_size=8
)
accuracies = st.dictionaries(st.sampled_from(list(ModalityTag)), st.sampled_from([0.0, 0.2, 0.2, 1.0]))


def naive_adaptive_order(tags, steps, window, zero_shot):
    """Picks the next tag again and again, by the rules in words."""
    histories = {tag: [step[tag] for step in steps if tag in step][-window:] for tag in ModalityTag}
    left, order = [tag for tag in ModalityTag if tag in tags], []
    while left:
        unseen = [tag for tag in left if not histories[tag]]
        unknown = [tag for tag in unseen if tag not in zero_shot]
        best = left[0]
        if unknown:
            best = unknown[0]
        elif unseen:
            lowest = min(zero_shot[tag] for tag in unseen)
            best = next(tag for tag in unseen if zero_shot[tag] == lowest)
        else:
            highest = max(sum(histories[tag]) / len(histories[tag]) for tag in left)
            best = next(tag for tag in left if sum(histories[tag]) / len(histories[tag]) == highest)
        order.append(best)
        left.remove(best)
    return order


@given(tags=some_tags, steps=steps, window=st.integers(1, 6), zero_shot=accuracies)
def test_adaptive_order_follows_the_rules(tags, steps, window, zero_shot):
    curriculum = TagCurriculum("adaptive", window, zero_shot)
    for step in steps:
        curriculum.observe(step)
    assert curriculum.order(tags, random.Random(0)) == naive_adaptive_order(tags, steps, window, zero_shot)


@pytest.mark.parametrize("strategy", CURRICULA)
@given(tags=some_tags, steps=steps, seed=st.integers(0, 99))
def test_every_order_holds_each_tag_once(strategy, tags, steps, seed):
    curriculum = TagCurriculum(strategy)
    for step in steps:
        curriculum.observe(step)
    order = curriculum.order(tags, random.Random(seed))
    assert sorted(order) == sorted(set(tags))
    assert curriculum.order([tag.lower() for tag in reversed(tags)], random.Random(seed)) == order


def test_static_goes_from_one_to_three_modalities():
    curriculum = TagCurriculum("static", zero_shot={"VAS": 0.0, "V": 1.0})
    curriculum.observe({"VAS": 9.0, "V": 0.0})
    order = curriculum.order(reversed(ModalityTag), random.Random(0))
    assert order == list(ModalityTag)
    assert [tag.arity for tag in order] == ["uni"] * 3 + ["bi"] * 3 + ["tri"]


def test_none_is_a_seeded_shuffle_of_every_position():
    curriculum, rng = TagCurriculum("none"), random.Random(0)
    expected = list(ModalityTag)
    random.Random(5).shuffle(expected)
    assert curriculum.order(ModalityTag, random.Random(5)) == expected
    first = [curriculum.order(ModalityTag, rng)[0] for _ in range(700)]
    assert all(60 < first.count(tag) < 140 for tag in ModalityTag)


@pytest.mark.parametrize("strategy", ["static", "adaptive"])
def test_only_none_draws_random_numbers(strategy):
    rng = random.Random(0)
    TagCurriculum(strategy).order(ModalityTag, rng)
    assert rng.random() == random.Random(0).random()


def test_a_first_epoch_and_a_later_one():
    curriculum = TagCurriculum("adaptive", window=2, zero_shot={"V": 0.6, "A": 0.2, "VAS": 0.4})
    assert curriculum.order(["V", "A", "VAS"], random.Random(0)) == ["A", "VAS", "V"]
    assert curriculum.order(["V", "A", "VAS", "vs"], random.Random(0))[0] == "VS"
    for difficulty in (100.0, 1.0, 2.0):
        curriculum.observe({"V": difficulty, "A": 1.0})
    # V's 100 has left the window: (1 + 2) / 2.
    assert curriculum.priority("V") == 1.5 and curriculum.priority("A") == 1.0 and curriculum.priority("VAS") is None
    assert curriculum.order(["V", "A", "VAS"], random.Random(0)) == ["VAS", "V", "A"]
    assert curriculum.metrics() == {"tag/V/priority": 1.5, "tag/A/priority": 1.0}
    curriculum.observe({"VAS": 1.2})
    assert curriculum.order(["V", "A", "VAS"], random.Random(0)) == ["V", "VAS", "A"]


@given(before=steps, after=steps, window=st.integers(1, 6), zero_shot=accuracies)
def test_a_saved_state_goes_on_alike(before, after, window, zero_shot):
    """Also where the accuracies, measured before training, are known from the state alone."""
    original, restored = TagCurriculum("adaptive", window, zero_shot), TagCurriculum("adaptive", window)
    for step in before:
        original.observe(step)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    for step in ({}, *after):
        original.observe(step)
        restored.observe(step)
        assert restored.metrics() == original.metrics()
        assert restored.order(ModalityTag, random.Random(0)) == original.order(ModalityTag, random.Random(0))


def test_forgetting_the_state_is_noticed():
    original, fresh = TagCurriculum("adaptive"), TagCurriculum("adaptive")
    original.observe({"V": 1.0, "A": 2.0})
    assert original.order("VA", random.Random(0)) != fresh.order("VA", random.Random(0))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="Unknown curriculum 'random'; choose one of none, static, adaptive"):
        TagCurriculum("random")
    with pytest.raises(ValueError, match="at least 1 difficulty, got 0"):
        TagCurriculum(window=0)
    for accuracy in (-0.1, 45.0):
        with pytest.raises(ValueError, match=rf"accuracy of tag VS must be a fraction in \[0, 1\], got {accuracy}"):
            TagCurriculum("adaptive", zero_shot={"sv": accuracy})
    with pytest.raises(ValueError, match="'all' is not a modality tag"):
        TagCurriculum("adaptive", zero_shot={"all": 0.5})
    with pytest.raises(ValueError, match="tag A must be finite, got nan"):
        TagCurriculum().observe({"A": float("nan")})
    with pytest.raises(ValueError, match="'X' is not a modality tag"):
        TagCurriculum().order(["X"], random.Random(0))
