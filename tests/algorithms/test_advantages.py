import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.algorithms.advantages import SCOPES, group_advantages
from maple_trl.modalities import ModalityTag


rewards = st.one_of(st.sampled_from([0.0, 1.0, math.nan]), st.floats(-10, 10, width=32))
rows = st.lists(st.tuples(rewards, st.integers(-3, 4), st.sampled_from(list(ModalityTag))), min_size=1, max_size=24)


def naive(rows, scope, eps=1e-4):
    """The table of formulas, one row at a time."""

    def values(keep):
        return [r for r, q, m in rows if keep(q, m) and not math.isnan(r)]

    advantages = []
    for reward, prompt, tag in rows:
        of_prompt = values(lambda q, m, prompt=prompt: q == prompt)
        of_tag = values(lambda q, m, tag=tag: m == tag)
        of_batch = values(lambda q, m: True)
        baseline, scale = {
            "group": (of_prompt, of_prompt),
            "tag": (of_prompt, of_tag),
            "tag_whitened": (of_tag, of_tag),
            "batch": (of_batch, of_batch),
        }[scope]
        if math.isnan(reward):
            advantages.append(0.0)
        else:
            std = stdev(scale) if len(scale) > 1 else 0.0
            advantages.append((reward - fmean(baseline)) / (std + eps))
    return torch.tensor(advantages)


def built(rows, scope, **options):
    rewards, prompts, tags = zip(*rows, strict=True)
    return group_advantages(torch.tensor(rewards), prompts, tags, scope, **options)


@pytest.mark.parametrize("scope", SCOPES)
@given(rows=rows)
def test_equals_the_formula(scope, rows):
    result = built(rows, scope)
    assert result.dtype == torch.float32 and result.shape == (len(rows),)
    torch.testing.assert_close(result, naive(rows, scope), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
@given(data=st.data(), rows=rows)
def test_order_of_rows_does_not_matter(scope, data, rows):
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = built([rows[i] for i in order], scope)
    torch.testing.assert_close(shuffled, built(rows, scope)[torch.tensor(order)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
@given(rows=rows, prompt=st.integers(-3, 4))
@pytest.mark.matrix(cases=2)
def test_unscorable_completions_change_nothing(scope, rows, prompt):
    """A completion without reward is as good as absent, which a reward of 0 is not."""
    more = [*rows, (math.nan, prompt, ModalityTag.V)]
    assert torch.equal(built(more, scope)[:-1], built(rows, scope))
    assert built(more, scope)[-1] == 0


def test_scopes_differ():
    rows = [(0.0, 1, "V"), (1.0, 1, "V"), (0.0, 2, "V"), (0.0, 2, "V"), (1.0, 3, "AS"), (0.5, 3, "AS")]
    results = [built(rows, scope) for scope in SCOPES]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert not torch.allclose(first, second, atol=1e-2)
    # An unbiased standard deviation: sqrt(3 * (1/4)^2 + (3/4)^2) / sqrt(3) = 0.5.
    assert results[1][1].item() == pytest.approx(0.5 / 0.5001)
    assert results[2][1].item() == pytest.approx(0.75 / 0.5001)


@pytest.mark.parametrize("scope", SCOPES)
@given(reward=st.floats(-10, 10, width=32), count=st.integers(1, 9))
def test_equal_rewards_have_no_advantage(scope, reward, count):
    assert built([(reward, 7, "VA")] * count, scope).tolist() == [0.0] * count


def test_a_single_scorable_completion_has_no_spread():
    assert built([(3.0, 1, "V"), (math.nan, 1, "V")], "group").tolist() == [0.0, 0.0]
    # Alone in its prompt, it stands on its own baseline, not on that of its tag.
    assert built([(3.0, 1, "V"), (1.0, 2, "V")], "tag").tolist() == [0.0, 0.0]
    assert built([(3.0, 1, "V"), (1.0, 2, "V")], "tag_whitened")[0] > 0.7


@given(rows=rows)
def test_tags_in_any_form(rows):
    tags = list(ModalityTag)
    rewards, prompts, names = zip(*rows, strict=True)
    numbers = torch.tensor([tags.index(tag) for tag in names])
    lowered = [tag.value[::-1].lower() for tag in names]
    for form in (numbers, numbers.int(), lowered):
        result = group_advantages(torch.tensor(rewards), torch.tensor(prompts), form)
        assert torch.equal(result, built(rows, "tag"))


def test_rewards_of_other_types():
    expected = built([(0.0, 1, "V"), (1.0, 1, "V")], "tag")
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float64):
        assert torch.equal(group_advantages(torch.tensor([0, 1]).to(dtype), [1, 1], ["V", "V"]), expected)


def test_eps_is_added_to_the_deviation():
    result = built([(0.0, 1, "V"), (2.0, 1, "V")], "group", eps=1.0)
    assert result[1].item() == pytest.approx(1 / (math.sqrt(2) + 1))


def test_an_empty_batch():
    assert group_advantages(torch.zeros(0), [], []).shape == (0,)


def test_errors_name_what_is_wrong():
    two = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="Unknown advantage scope 'prompt'; choose one of group, tag, tag_whitened"):
        group_advantages(two, [0, 0], ["V", "V"], "prompt")
    with pytest.raises(ValueError, match=r"shape \(2,\), 1 prompts and 2 tags"):
        group_advantages(two, [0], ["V", "V"])
    with pytest.raises(ValueError, match="2 prompts and 3 tags"):
        group_advantages(two, [0, 0], ["V", "V", "V"])
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        group_advantages(two[:, None], [0, 0], ["V", "V"])
    with pytest.raises(ValueError, match="Reward 1 of the batch is infinite"):
        group_advantages(torch.tensor([math.nan, -math.inf]), [0, 0], ["V", "V"])
    with pytest.raises(ValueError, match="'X' is not a modality tag"):
        group_advantages(two, [0, 0], ["V", "X"])
    with pytest.raises(ValueError, match=r"integers from 0 to 6, got \[0, 7\]"):
        group_advantages(two, [0, 0], torch.tensor([0, 7]))
