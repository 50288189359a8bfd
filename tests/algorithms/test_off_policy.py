import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from maple_trl.algorithms.off_policy import (
    effective_share,
    policy_divergence,
    replay_advantages,
    replayed_slots,
    term_scales,
)


# Which completions are replayed


@st.composite
def rollouts(draw):
    """Wanted counts, the size of a group, and a number of ranks that shares the completions equally."""
    size = draw(st.integers(1, 9))
    wanted = draw(st.lists(st.integers(0, size), min_size=1, max_size=8))
    total = len(wanted) * size
    ranks = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    return wanted, size, ranks


def shares_of(slots, ranks):
    size = len(slots) // ranks
    return [sum(slots[i * size : (i + 1) * size]) for i in range(ranks)]


def counts_of(slots, size):
    return [sum(slots[i : i + size]) for i in range(0, len(slots), size)]


@given(rollout=rollouts())
def test_ranks_replay_equally_many_and_no_group_more_than_wanted(rollout):
    wanted, size, ranks = rollout
    slots = replayed_slots(wanted, size, ranks)
    assert len(slots) == len(wanted) * size and all(type(slot) is bool for slot in slots)
    shares = shares_of(slots, ranks)
    assert len(set(shares)) == 1
    assert all(count <= limit for count, limit in zip(counts_of(slots, size), wanted, strict=True))
    # As many as the rank has for which there are fewest, and places are taken of those that one rank alone would use.
    alone = replayed_slots(wanted, size)
    assert shares[0] == min(shares_of(alone, ranks))
    assert all(one for one, other in zip(alone, slots, strict=True) if other)


@given(rollout=rollouts())
def test_one_rank_gets_all_that_is_wanted(rollout):
    wanted, size, _ = rollout
    assert counts_of(replayed_slots(wanted, size), size) == wanted


@given(size=st.integers(1, 16), data=st.data())
def test_a_group_is_spread_evenly(size, data):
    """Any stretch of its places holds the share of it, give or take less than one."""
    count = data.draw(st.integers(0, size))
    slots = replayed_slots([count], size)
    for start in range(size):
        for end in range(start + 1, size + 1):
            assert abs(sum(slots[start:end]) - (end - start) * count / size) < 1


@given(groups=st.integers(1, 5), size=st.integers(1, 8), count=st.integers(0, 8))
def test_equal_groups_on_whole_ranks_lose_nothing(groups, size, count):
    assume(count <= size)
    slots = replayed_slots([count] * groups, size, groups)
    assert counts_of(slots, size) == [count] * groups


@pytest.mark.parametrize(
    ("wanted", "size", "ranks", "expected"),
    [
        ([2], 4, 1, "0101"),
        ([4], 8, 1, "01010101"),
        ([3], 4, 1, "0111"),
        ([4], 8, 2, "01010101"),  # each rank has half a group, and two of its replayed ones
        ([2, 0], 4, 1, "01010000"),
        ([2, 0], 4, 2, "00000000"),  # the second rank has nothing, so that the first one generates all
        ([3, 1], 4, 2, "01000001"),
        ([1], 2, 2, "00"),
        ([], 4, 1, ""),
        ([], 4, 3, ""),
    ],
)
def test_worked_places(wanted, size, ranks, expected):
    assert replayed_slots(wanted, size, ranks) == [slot == "1" for slot in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], 3, 4), "2 groups of 3 cannot be shared by 4 ranks equally"),
        (([4], 3), r"A group of 3 cannot hold \[4\] replayed completions"),
        (([-1, 1], 3), r"A group of 3 cannot hold \[-1, 1\] replayed completions"),
    ],
)
def test_places_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        replayed_slots(*arguments)


# Advantages


rewards = st.lists(st.tuples(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32)), max_size=9)


def naive_advantages(pairs, limit, eps):
    past = [reward for reward, _ in pairs]
    same = not past or max(past) - min(past) <= 1e-6
    found = []
    for reward, baseline in pairs:
        value = reward - baseline
        if not same:
            value /= stdev(past) + eps
        found.append(value if limit is None else min(max(value, -limit), limit))
    return found


def two_lists(pairs):
    return [torch.tensor(values, dtype=torch.float64) for values in ([r for r, _ in pairs], [b for _, b in pairs])]


@given(pairs=rewards, limit=st.none() | st.floats(0.1, 5), eps=st.sampled_from([1e-4, 0.1]))
def test_replayed_advantages_equal_the_formula(pairs, limit, eps):
    found = replay_advantages(*two_lists(pairs), limit=limit, eps=eps)
    assert found.dtype == torch.float32 and found.shape == (len(pairs),)
    expected = torch.tensor(naive_advantages(pairs, limit, eps), dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_worked_advantages():
    """sd_off of 1, 0, 1, 0 is sqrt(1/3)."""
    found = replay_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.5, 0.5, 1.0, 0.0]), eps=0.0)
    torch.testing.assert_close(found, torch.tensor([0.5, -0.5, 0.0, 0.0]) * math.sqrt(3))


@pytest.mark.parametrize("reward", [0.0, 1.0, 1 / 3])
@pytest.mark.parametrize("count", [1, 4])
def test_equal_rewards_keep_their_distance_to_the_baseline(reward, count):
    baselines = torch.linspace(0, 1, count)
    found = replay_advantages(torch.full((count,), reward), baselines, limit=5.0)
    torch.testing.assert_close(found, reward - baselines)


def test_nearly_equal_rewards_are_limited():
    past, baselines = torch.tensor([1.0, 1.0 - 1e-5]), torch.zeros(2)
    assert replay_advantages(past, baselines, limit=5.0).tolist() == [5.0, 5.0]
    assert replay_advantages(past, baselines).min() > 1000
    assert replay_advantages(past, torch.full((2,), 2.0), limit=5.0).tolist() == [-5.0, -5.0]


def test_other_baselines_and_scales_are_told_apart():
    """The negative control: the mean of the batch as baseline, and the biased deviation."""
    past, baselines = torch.tensor([1.0, 0.0, 0.25, 0.0]), torch.tensor([0.9, 0.1, 0.2, 0.3])
    found = replay_advantages(past, baselines)
    assert (found - (past - past.mean()) / (past.std() + 1e-4)).abs().max() > 0.1
    assert (found - (past - baselines) / (past.std(unbiased=False) + 1e-4)).abs().max() > 0.01


def test_wrong_advantages_are_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"one baseline per reward, got shapes \(2,\) and \(1,\)"):
        replay_advantages(torch.ones(2), one)
    with pytest.raises(ValueError, match=r"one baseline per reward, got shapes \(1, 1\) and \(1, 1\)"):
        replay_advantages(one[None], one[None])
    for bad in (math.nan, math.inf):
        for pair in ((one * bad, one), (one, one * bad)):
            with pytest.raises(ValueError, match="Rewards and baselines of replayed completions must be finite"):
                replay_advantages(*pair)
    for limit in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"The limit of an advantage must be positive, got {limit}"):
            replay_advantages(one, one, limit)


# Weights of the two terms


completions = st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), max_size=6)


def token_mean(rows):
    return fmean([value for row in rows for value in row])


def sample_mean(rows):
    return fmean(map(fmean, rows))


@pytest.mark.parametrize(
    ("mean", "count"),
    [(token_mean, lambda rows: sum(map(len, rows))), (sample_mean, len)],
    ids=["tokens", "samples"],
)
@given(fresh=completions, replayed=completions, filled=st.floats(0.01, 1), alpha=st.floats(0, 3))
def test_one_scaled_mean_is_the_sum_of_both_terms(mean, count, fresh, replayed, filled, alpha):
    assume(fresh or replayed)
    scales = term_scales(count(fresh), count(replayed), filled, alpha)
    mixed = [[scales[0] * v for v in row] for row in fresh] + [[scales[1] * v for v in row] for row in replayed]
    expected = mean(fresh) if fresh else 0.0
    expected += alpha * filled * mean(replayed) if replayed else 0.0
    assert mean(mixed) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_terms_that_there_are_none_of():
    assert term_scales(4, 0, 0.0, 1.0) == (1.0, 0.0)
    assert term_scales(0, 4, 1.0, 0.5) == (0.0, 0.5)
    assert term_scales(0, 0, 0.0, 1.0) == (0.0, 0.0)
    assert term_scales(4, 4, 1.0, 0.0) == (2.0, 0.0)


def test_a_single_replayed_completion_does_not_weigh_as_much_as_all_fresh_ones():
    assert term_scales(7, 1, 0.25, 1.0) == (8 / 7, 2.0)


# Ratios


@given(ratios=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_effective_share_equals_the_formula(ratios):
    share = effective_share(torch.tensor(ratios, dtype=torch.float64))
    assert share == pytest.approx(sum(ratios) ** 2 / (len(ratios) * sum(r * r for r in ratios)), rel=1e-9)
    assert 1 / len(ratios) - 1e-9 <= share <= 1 + 1e-9


def test_effective_share_at_its_ends():
    assert effective_share(torch.full((7,), 0.3)) == pytest.approx(1)
    assert effective_share(torch.tensor([1.0, 0, 0, 0])) == 0.25
    assert effective_share(torch.tensor([1e30, 1e30])) == pytest.approx(1)  # whose squares are no float32
    assert math.isnan(effective_share(torch.tensor([])))


distributions = st.lists(st.floats(0.05, 1), min_size=2, max_size=6).map(lambda v: [x / sum(v) for x in v])


@given(current=distributions, data=st.data())
def test_divergence_has_the_expectation_of_the_kl(current, data):
    """Exactly, by summing over all tokens that the behaviour policy may write."""
    size = len(current)
    weights = data.draw(st.lists(st.floats(0.05, 1), min_size=size, max_size=size))
    behaviour = [w / sum(weights) for w in weights]
    now, before = torch.tensor(current, dtype=torch.float64), torch.tensor(behaviour, dtype=torch.float64)
    values = policy_divergence(now.log() - before.log())
    assert values.min() >= -1e-12
    assert float((before * values).sum()) == pytest.approx(float((now * (now / before).log()).sum()), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_divergence_from_samples(seed):
    """Sampled, and told apart from the KL divergence the other way round."""
    generator = torch.Generator().manual_seed(seed)
    now, before = torch.rand(2, 5, generator=generator, dtype=torch.float64).add(0.05)
    now, before = now / now.sum(), before / before.sum()
    tokens = torch.multinomial(before, 200_000, replacement=True, generator=generator)
    values = policy_divergence((now / before).log()[tokens])
    exact = float((now * (now / before).log()).sum())
    deviation = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - exact) < 5 * deviation
    other = float((before * (before / now).log()).sum())
    assert abs(float(values.mean()) - other) > 5 * deviation


@given(log_ratio=st.floats(-200, 80))
def test_divergence_is_never_negative(log_ratio):
    """Not even where a ratio rounds to 0."""
    value = policy_divergence(torch.tensor([[log_ratio]], dtype=torch.float32))
    assert value.shape == (1, 1) and value.isfinite().all()
    assert float(value) >= -1e-6


def test_divergence_of_policies_that_agree_is_zero():
    assert policy_divergence(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    assert float(policy_divergence(torch.tensor(-math.inf))) == 1.0
