"""Which stored completions are replayed: by tier in proportion to the shares, and within a tier as `replay_draw` says."""

import math
import random
from collections import Counter
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_replay import experience, marks, observed

from maple_trl.algorithms import StratifiedReplayBuffer
from maple_trl.algorithms.replay_draws import DRAWS, differs, draw_positions, side


advantages = st.lists(st.sampled_from([-0.9, -0.5, 0.0, 0.1, 0.5, 1.0]), max_size=12)
kinds = st.sampled_from(DRAWS)


def drawn(kind, values, count, seed=0, differing=None, surplus=0):
    differing = [False] * len(values) if differing is None else differing
    return draw_positions(kind, values, differing, count, random.Random(seed), surplus)


def lean(values, positions):
    return sum(side(values[i]) for i in positions)


# Within a tier


@given(kinds, advantages, st.integers(0, 15), st.integers(0, 99), st.data())
def test_as_many_as_asked_for_none_twice_and_the_same_for_a_seed(kind, values, count, seed, data):
    differing = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    surplus = data.draw(st.integers(-2, 2))
    found = drawn(kind, values, count, seed, differing, surplus)
    assert len(found) == len(set(found)) == min(count, len(values)) and set(found) <= set(range(len(values)))
    assert found == drawn(kind, values, count, seed, differing, surplus)


@given(st.lists(st.sampled_from([-0.9, -0.2, 0.0, 0.1, 1.0]), max_size=8), st.integers(0, 8), st.integers(0, 99))
def test_balanced_is_as_balanced_as_any_choice_can_be(values, count, seed):
    found = drawn("balanced", values, count, seed)
    choices = list(combinations(range(len(values)), len(found)))
    best = min(abs(lean(values, choice)) for choice in choices)
    assert abs(lean(values, found)) == best
    # Of the choices that are as balanced it is one with the most of both sides.
    most = max(sum(side(values[i]) != 0 for i in choice) for choice in choices if abs(lean(values, choice)) == best)
    assert sum(side(values[i]) != 0 for i in found) in (most, most - 1)


@given(advantages, st.integers(1, 8), st.integers(-1, 1), st.integers(0, 99))
def test_balanced_makes_up_for_what_others_drew(values, count, surplus, seed):
    found = drawn("balanced", values, count, seed, surplus=surplus)
    left = [i for i in range(len(values)) if i not in found]
    total = surplus + lean(values, found)
    both = {side(values[i]) for i in range(len(values))} >= {1, -1}
    if both and count % 2 and len(values) >= count and len({side(values[i]) for i in left} & {1, -1}) == 2:
        assert abs(total) <= 1 and (total == 0 or surplus == 0)


def test_a_uniform_draw_is_not_balanced():
    """The negative control of both tests above."""
    values = [1.0] + [-0.1] * 7
    assert {lean(values, drawn("balanced", values, 2, seed)) for seed in range(50)} == {0}
    assert {lean(values, drawn("uniform", values, 2, seed)) for seed in range(50)} == {0, -2}


@given(advantages, st.integers(0, 12), st.integers(0, 99), st.data())
def test_diverse_takes_those_that_differ_first(values, count, seed, data):
    differing = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    found = drawn("diverse", values, count, seed, differing)
    assert sum(differing[i] for i in found) == min(len(found), sum(differing))


def test_priority_draws_in_proportion_to_the_advantage():
    values, n = [0.1, -0.2, 0.3, 0.4, 0.0], 4000
    counts = Counter(drawn("priority", values, 1, seed)[0] for seed in range(n))
    assert [counts[i] / n for i in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.0], abs=0.03)
    pairs = Counter(frozenset(drawn("priority", values, 2, seed)) for seed in range(n))
    for one, two in combinations(range(4), 2):  # without replacement: the second by the weights that are left
        a, b = abs(values[one]), abs(values[two])
        assert pairs[frozenset((one, two))] / n == pytest.approx(a * b / (1 - a) + b * a / (1 - b), abs=0.03)
    # One at its baseline comes when no other is left.
    assert all(4 not in drawn("priority", values, 4, seed) for seed in range(50))
    assert sorted(drawn("priority", values, 5)) == list(range(5))


@pytest.mark.parametrize("kind", ["uniform", "diverse", "balanced"])
def test_what_is_alike_is_equally_likely(kind):
    values, n = [0.5, 0.5, 0.5, -0.5, -0.5, -0.5], 3000
    counts = Counter(i for seed in range(n) for i in drawn(kind, values, 2, seed))
    assert [counts[i] / n for i in range(6)] == pytest.approx([1 / 3] * 6, abs=0.03)


def test_an_odd_one_of_a_balanced_draw_is_of_either_side():
    values = [1.0, 1.0, -1.0, -1.0]
    found = Counter(lean(values, drawn("balanced", values, 3, seed)) for seed in range(2000))
    assert found.keys() == {1, -1} and found[1] / 2000 == pytest.approx(0.5, abs=0.04)


def test_an_unknown_draw_is_refused():
    with pytest.raises(ValueError, match="must be one of uniform, diverse, balanced, priority, got 'best'"):
        drawn("best", [0.0], 1)


@pytest.mark.parametrize(
    ("reward", "known", "expected"),
    [(1.0, [], True), (1.0, [1.0, 0.0], True), (1.0, [1.0, 1.0], False), (0.0, [1.0, 1.0], True), (0.5, [0.5], False)],
)
def test_what_differs(reward, known, expected):
    assert differs(reward, known) is expected


# By tier


BASELINES = {"easy": 0.9, "medium": 0.5, "hard": 0.1, "hard too": 0.1}


def filled(each=40, seed=0, **options):
    """As many experiences in each tier; the tier of each, by its mark."""
    vcrs = observed(BASELINES)
    buffer = StratifiedReplayBuffer(10_000, seed=seed, **options)
    tiers = {}
    for prompt in BASELINES:
        tier = buffer.tier(prompt, vcrs)
        count = each // 2 if tier == "hard" else each
        numbers = range(len(tiers), len(tiers) + count)
        buffer.add([experience(prompt, float(i % 4 == 0), mark=i) for i in numbers], vcrs)
        tiers |= dict.fromkeys(numbers, tier)
    return buffer, vcrs, tiers


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("shares", [None, {"easy": 0.1, "medium": 0.2, "hard": 0.7}])
def test_tiers_are_drawn_in_proportion_to_their_shares(draw, shares):
    buffer, vcrs, tiers = filled(shares=shares)
    counts, n = Counter(), 250
    for step in range(n):
        found = marks(buffer.sample_batch(16, step, draw=draw, baselines=vcrs))
        assert len(set(found)) == 16
        counts.update(tiers[mark] for mark in found)
    total = sum(counts.values())
    frequencies = {tier: counts[tier] / total for tier in buffer.shares}
    # Four standard deviations of a share of 4000 draws.
    assert frequencies == pytest.approx(buffer.shares, abs=4 * math.sqrt(0.25 / total))
    metrics = buffer.metrics()
    assert sum(metrics[f"replay/drawn/{tier}"] for tier in buffer.shares) == pytest.approx(1)
    last = Counter(tiers[mark] for mark in found)
    assert all(metrics[f"replay/drawn/{tier}"] == last[tier] / 16 for tier in buffer.shares)


def test_what_is_stored_does_not_steer_the_tiers():
    """The negative control: a draw of any experience would give the tiers what they hold, here a third each."""
    buffer, vcrs, tiers = filled(each=200)
    found = [tiers[m] for step in range(100) for m in marks(buffer.sample_batch(16, step, baselines=vcrs))]
    held = buffer.sizes()
    assert held["easy"] == held["hard"] and found.count("hard") > 1.4 * found.count("easy")


@given(st.sampled_from(DRAWS), st.integers(0, 24), st.integers(0, 50), st.sets(st.sampled_from(list(BASELINES))))
def test_batches_have_no_one_twice_and_only_whom_they_may(draw, count, seed, excluded):
    buffer, vcrs, _ = filled(each=8, seed=seed)
    allowed = [e for p in BASELINES if p not in excluded for e in buffer.stored(p) if int(e.completion_ids[0]) % 3]

    def where(e):
        return bool(int(e.completion_ids[0]) % 3)

    options = {"exclude": excluded, "draw": draw, "baselines": vcrs, "where": where}
    assert buffer.elsewhere(excluded, 0, where) == len(allowed)
    found = marks(buffer.sample_batch(count, 0, **options))
    assert len(found) == len(set(found)) == min(count, len(allowed)) and set(found) <= set(marks(allowed))
    again, vcrs, _ = filled(each=8, seed=seed)
    assert found == marks(again.sample_batch(count, 0, **options | {"baselines": vcrs}))


@given(st.integers(1, 24), st.integers(0, 50))
def test_a_balanced_batch_is_balanced_over_its_tiers(count, seed):
    buffer, vcrs, _ = filled(each=120, seed=seed)
    found = buffer.sample_batch(count, 0, draw="balanced", baselines=vcrs)
    sides = [side(e.reward - vcrs.baseline(e.prompt)) for e in found]
    assert abs(sum(sides)) <= count % 2


def test_diverse_knows_the_fresh_rewards_of_visited_prompts():
    """Of a visited prompt those that differ from its equal fresh rewards, of others those that are off their baseline."""
    vcrs = observed({"a": 1.0, "b": 0.0})
    buffer = StratifiedReplayBuffer(100, {"easy": 0, "medium": 0, "hard": 1}, quantiles=(1.0, 1.0))
    added = [("a", 1.0), ("a", 1.0), ("a", 0.0), ("b", 0.0), ("b", 0.0), ("b", 1.0)]
    buffer.add([experience(prompt, reward, mark=i) for i, (prompt, reward) in enumerate(added)], vcrs)
    for step in range(20):
        assert set(marks(buffer.sample_batch(2, step, draw="diverse", baselines=vcrs))) == {2, 5}
        options = {"draw": "diverse", "baselines": vcrs, "fresh_rewards": {"a": [0.0, math.nan, 0.0]}}
        assert set(marks(buffer.sample_batch(3, step, **options))) == {0, 1, 5}


@pytest.mark.parametrize("draw", ["balanced", "priority"])
def test_a_draw_by_advantage_needs_baselines(draw):
    buffer, vcrs, _ = filled()
    for sample in (lambda: buffer.sample_batch(2, 0, draw=draw), lambda: buffer.sample("easy", 2, [], 0, draw=draw)):
        with pytest.raises(ValueError, match=f"The draw '{draw}' needs the baselines"):
            sample()
    found = buffer.sample("hard", 4, [0.0], 0, draw=draw, baselines=vcrs)
    assert {e.prompt for e in found} == {"hard"}
    if draw == "balanced":
        assert sorted(e.reward for e in found) == [0.0, 0.0, 1.0, 1.0]


# Saved and loaded


@pytest.mark.parametrize("draw", DRAWS)
def test_a_loaded_buffer_draws_as_the_saved_one_would(draw, tmp_path):
    buffer, vcrs, _ = filled(seed=3)

    def batches(each):
        return [marks(each.sample_batch(6, step, draw=draw, baselines=vcrs)) for step in range(5, 9)]

    before = batches(buffer)
    buffer.save(tmp_path)
    restored = StratifiedReplayBuffer(10_000, seed=3)
    restored.load(tmp_path)
    assert restored.metrics() == buffer.metrics()
    after = batches(buffer)
    assert batches(restored) == after != before
    other = StratifiedReplayBuffer(10_000, seed=4)
    other.load(tmp_path)
    assert batches(other) != after


def test_the_order_of_the_draws_is_that_of_the_run():
    """Other numbers of draws before give other draws: a resumed run must know how many there were."""
    seen = set()
    for steps in permutations(range(3), 1):
        buffer, vcrs, _ = filled()
        for step in range(*steps):
            buffer.sample_batch(6, step, draw="balanced", baselines=vcrs)
        seen.add(tuple(marks(buffer.sample_batch(6, 9, draw="balanced", baselines=vcrs))))
    assert len(seen) == 3
