"""Which scores are missing, by the rule in words, and what is left of means without them."""

import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.algorithms import (
    compared_groups,
    group_advantages,
    left_alone,
    missing_scores,
    remaining_scale,
    row_coefficients,
    solved_groups,
    stratum_totals,
    term_scales,
)
from maple_trl.algorithms.advantages import SCOPES
from maple_trl.algorithms.aggregation import AGGREGATIONS


NAN = math.nan
TAGS = ("V", "VA", "VAS")
MAX_LENGTH = 6
score = st.sampled_from([0.0, 0.25, 1.0, -2.0, NAN, NAN])


@st.composite
def batches(draw):
    """Scores of each function for completions of some prompts in any order, weights, and lengths."""
    functions = draw(st.integers(1, 3))
    rows = draw(st.integers(1, 14))
    scores = draw(st.lists(st.lists(score, min_size=functions, max_size=functions), min_size=rows, max_size=rows))
    prompts = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    weights = draw(st.lists(st.sampled_from([0.0, 0.2, 0.8, 1.0]), min_size=functions, max_size=functions))
    lengths = draw(st.lists(st.integers(1, MAX_LENGTH), min_size=rows, max_size=rows))
    return scores, prompts, weights, lengths


def rewards_in_words(scores, prompts, weights):
    """The reward of each completion, `None` where it is unscorable; one prompt and function at a time."""
    rewards = []
    for row, prompt in zip(scores, prompts, strict=True):
        group = [other for other, q in zip(scores, prompts, strict=True) if q == prompt]
        if all(math.isnan(value) for value in row):
            rewards.append(None)
            continue
        weighted = [k for k, weight in enumerate(weights) if weight]
        applying = [k for k in weighted if not all(math.isnan(other[k]) for other in group)]
        if weighted and not applying:
            rewards.append(None)
        elif any(math.isnan(row[k]) for k in applying):
            rewards.append(None)
        else:
            rewards.append(sum(weights[k] * row[k] for k in applying))
    return rewards


def rewards_of(scores, prompts, weights):
    """What the trainers make of scores."""
    scores, weights = torch.tensor(scores, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    missing = missing_scores(scores, weights, prompts)
    unscorable = missing.any(dim=1) | scores.isnan().all(dim=1)
    return (scores * weights).nansum(dim=1).masked_fill(unscorable, NAN)


@given(batches())
def test_rewards_are_those_of_the_rule_in_words(batch):
    scores, prompts, weights, _ = batch
    expected = [NAN if value is None else value for value in rewards_in_words(scores, prompts, weights)]
    assert rewards_of(scores, prompts, weights).tolist() == pytest.approx(expected, nan_ok=True)


def loss_in_words(rewards, prompts, tags, lengths, values, scope, aggregation):
    """The sum over tags of the mean of advantage x token value, over the completions that have a reward."""
    known = [i for i, reward in enumerate(rewards) if reward is not None]
    total = 0.0
    for tag in {tags[i] for i in known}:
        members = [i for i in known if tags[i] == tag]
        mean = 0.0
        for i in members:
            group = [rewards[j] for j in known if prompts[j] == prompts[i]]
            own = [rewards[j] for j in members]
            batch = [rewards[j] for j in known]
            centre = {"tag_whitened": own, "batch": batch}.get(scope, group)
            scale = {"group": group, "batch": batch}.get(scope, own)
            deviation = stdev(scale) if len(scale) > 1 else 0.0
            summed = (rewards[i] - fmean(centre)) / (deviation + 1e-4) * sum(values[i][: lengths[i]])
            if aggregation == "token":
                mean += summed / sum(lengths[j] for j in members)
            elif aggregation == "sample":
                mean += summed / lengths[i] / len(members)
            else:
                mean += summed / MAX_LENGTH / len(members)
        total += mean
    return total


def loss_of(rewards, prompts, tags, lengths, values, scope, aggregation):
    """The same by the functions under test: unscorable rows keep their places, without a token and in no stratum."""
    left_out = rewards.isnan()
    advantages = group_advantages(rewards, prompts, tags, scope)
    lengths = torch.tensor(lengths).masked_fill(left_out, 0)
    strata = torch.tensor([TAGS.index(tag) for tag in tags]).masked_fill(left_out, len(TAGS))
    totals = stratum_totals(lengths, strata, len(TAGS) + 1)
    scale = row_coefficients(lengths, strata, None, aggregation, MAX_LENGTH, totals)
    sums = torch.stack([torch.tensor(row[:count]).sum() for row, count in zip(values, lengths.tolist(), strict=True)])
    return float((advantages * scale * sums).sum())


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches(), aggregation=st.sampled_from(AGGREGATIONS), data=st.data())
@pytest.mark.matrix(cases=2)
def test_losses_are_over_what_can_be_scored(scope, batch, aggregation, data):
    scores, prompts, weights, lengths = batch
    tags = [TAGS[prompt % 3] for prompt in prompts]
    tokens = st.lists(st.floats(-2, 2, width=32), min_size=MAX_LENGTH, max_size=MAX_LENGTH)
    values = data.draw(st.lists(tokens, min_size=len(prompts), max_size=len(prompts)))
    shared = (prompts, tags, lengths, values, scope, aggregation)
    expected = loss_in_words(rewards_in_words(scores, prompts, weights), *shared)
    found = loss_of(rewards_of(scores, prompts, weights), *shared)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_the_measured_case():
    """Weights 0.2 and 0.8, all rewards 1, one failed judge call: nothing to learn, where None = 0 gave -1.5 and 0.5."""
    scores = [[1.0, NAN], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    rewards = rewards_of(scores, [0] * 4, [0.2, 0.8])
    assert group_advantages(rewards, [0] * 4, ["V"] * 4, "group").tolist() == [0.0] * 4
    old = (torch.tensor(scores, dtype=torch.float64) * torch.tensor([0.2, 0.8])).nansum(dim=1)
    assert group_advantages(old, [0] * 4, ["V"] * 4, "group").tolist() == pytest.approx([-1.5] + [0.5] * 3, abs=0.01)


def test_worked_scores():
    scores = torch.tensor([[1.0, NAN], [1.0, 0.5], [0.0, NAN], [1.0, NAN], [NAN, NAN], [NAN, NAN]])
    prompts = [0, 0, 1, 1, 2, 2]
    missing = missing_scores(scores, torch.tensor([0.2, 0.8]), prompts)
    # Of prompt 0 one judgement failed; for prompt 1 the second function does not apply; nothing applies to prompt 2.
    assert missing.tolist() == [[False, True], *[[False, False]] * 3, *[[True, True]] * 2]
    # A function that counts for nothing fails nothing.
    assert not missing_scores(scores[:4], torch.tensor([1.0, 0.0]), prompts[:4]).any()
    # Only what counts makes a completion unscorable, and what counts for nothing does not save one.
    assert missing_scores(scores[2:4], torch.tensor([0.0, 1.0]), [1, 1]).tolist() == [[False, True]] * 2
    # From elsewhere it is known that the second function applies to prompt 1.
    known = torch.tensor([[False, False]] * 2 + [[False, True]] * 2 + [[False, False]] * 2)
    assert missing_scores(scores, torch.tensor([0.2, 0.8]), prompts, known)[2:4].tolist() == [[False, True]] * 2


def test_prompts_may_stand_in_any_order():
    scores = torch.tensor([[NAN], [1.0], [NAN], [NAN]])
    assert missing_scores(scores, torch.ones(1), [7, -3, -3, 9]).flatten().tolist() == [True, False, True, True]


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"scores of shape \(2, 1\), 3 prompts and 1 weights"):
        missing_scores(torch.zeros(2, 1), torch.ones(1), [0, 0, 0])
    assert missing_scores(torch.zeros(0, 2), torch.ones(2), []).shape == (0, 2)


def test_groups_that_can_be_compared():
    groups = torch.tensor([[1.0, 1.0, NAN], [1.0, NAN, NAN], [NAN, NAN, NAN], [0.0, 1.0, 1.0]])
    assert compared_groups(groups).tolist() == [True, False, False, True]
    assert solved_groups(groups).tolist() == [True, True, False, False]


def test_completions_that_are_left_alone():
    unscorable = torch.tensor([False, True, True, False, False, False])
    prompts = torch.tensor([7, 7, 7, 2, 2, 9])
    assert left_alone(unscorable, prompts).tolist() == [True] + [False] * 5
    assert left_alone(torch.ones(0, dtype=torch.bool), torch.zeros(0, dtype=torch.long)).tolist() == []


def test_scales():
    assert remaining_scale(6, 8) == 8 / 6 and remaining_scale(0, 8) == 0
    # 4 fresh, 2 replayed and 2 that could not be scored: a mean over 8 becomes the two means.
    assert term_scales(4, 2, 1.0, 0.5, lost=2) == (8 / 4, 0.5 * 8 / 2)
    assert term_scales(0, 2, 1.0, 1.0, lost=6) == (0.0, 8 / 2)
