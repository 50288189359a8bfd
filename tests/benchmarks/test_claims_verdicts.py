"""Verdicts on claims: intervals against other arithmetic, what follows from them, and how often they are right."""

import math
from dataclasses import dataclass

import claim_sets  # noqa: F401 - where the modules of claims are
import numpy as np
import pytest
import simulate
import verdicts
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from verdicts import (
    CANT_TELL,
    CONTRARY,
    DOES_NOT,
    EXCLUDED,
    HOLDS,
    REVERSED,
    SMALLER,
    Estimate,
    Finding,
    Sample,
    decide,
    estimate,
    judge,
    judge_claim,
    nuance,
    widened,
)


@dataclass(frozen=True)
class Asked:
    expects: str = "above"
    effect: str = "difference"
    least: float = 0.1


@dataclass(frozen=True)
class Rules:
    looks: tuple[int, ...] = (5, 10)
    level: float = 0.0294
    evaluation: float = 1 / 3


values = st.lists(st.floats(0.1, 10), min_size=5, max_size=10)
effects = st.sampled_from(["difference", "ratio"])


def interval(low, high, value=None):
    return Estimate((low + high) / 2 if value is None else value, low, high, 5, 0.1, math.nan, 4)


# Intervals


@given(values, st.integers(0, 2**32 - 1))
def test_an_interval_over_seeds_alone_is_that_of_a_paired_t_test(of, seed):
    against = np.random.default_rng(seed).uniform(0.1, 10, len(of))
    found = estimate(Sample(of), Sample(against), "difference", 0.05)
    other = stats.ttest_rel(of, against).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((other.low, other.high), nan_ok=True)
    ratio = estimate(Sample(of), Sample(against), "ratio", 0.05)
    other = stats.ttest_rel(np.log(of), np.log(against)).confidence_interval(0.95)
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(other.low), math.exp(other.high)))


@given(values, effects, st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_the_interval_of_one_of_several_is_taken_at_its_share_of_the_level(of, effect, times, seed):
    against = Sample(np.random.default_rng(seed).uniform(0.1, 10, len(of)))
    found, single = (estimate(Sample(of), against, effect, level) for level in (0.0294, 0.0294 / times))
    wider = widened(found, effect, 0.0294, times)
    assert (wider.low, wider.value, wider.high) == pytest.approx((single.low, single.value, single.high), rel=1e-6)


@given(values, effects, st.randoms())
def test_an_interval_knows_neither_order_nor_direction(values, effect, draw):
    of, against = values, [draw.uniform(0.1, 10) for _ in values]
    there, back = (estimate(Sample(a), Sample(b), effect, 0.05) for a, b in ((of, against), (against, of)))
    turned = (1 / there.high, 1 / there.low) if effect == "ratio" else (-there.high, -there.low)
    assert (back.low, back.high) == pytest.approx(turned)
    order = draw.sample(range(len(of)), len(of))
    mixed = estimate(Sample([of[i] for i in order]), Sample([against[i] for i in order]), effect, 0.05)
    assert (mixed.low, mixed.high) == pytest.approx((there.low, there.high))
    wider = estimate(Sample(of), Sample(against), effect, 0.01)
    assert wider.low <= there.low <= there.value <= there.high <= wider.high


def means_and_left_out(scores_SQ):
    total, asked = scores_SQ.sum(axis=1, keepdims=True), scores_SQ.shape[1]
    return Sample(list(total[:, 0] / asked), list((total - scores_SQ) / (asked - 1)))


def test_the_part_of_questions_is_that_of_crossed_random_effects():
    draw = np.random.default_rng(3)
    seeds, asked = 6, 40
    scores = draw.normal(size=(seeds, asked)) + draw.normal(size=asked) + draw.normal(size=(seeds, 1))
    found = estimate(means_and_left_out(scores), means_and_left_out(np.zeros_like(scores)), "difference", 0.05)
    # Two-way analysis of variance without replication (Searle, Casella and McCulloch, 1992, chapter 4).
    rows, columns = scores.mean(axis=1), scores.mean(axis=0)
    left = scores - rows[:, None] - columns + scores.mean()
    of_seeds, of_questions = asked * rows.var(ddof=1), seeds * columns.var(ddof=1)
    of_rest = (left**2).sum() / ((seeds - 1) * (asked - 1))
    parts = of_seeds / (seeds * asked), (of_questions - of_rest) / (seeds * asked)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (seeds - 1) + parts[1] ** 2 / (asked - 1))
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    assert (found.high - found.low) / 2 == pytest.approx(reach)
    assert found.evaluation == pytest.approx(math.sqrt(of_questions / (seeds * asked)))


def test_questions_widen_an_interval_only_where_they_differ():
    same = np.full((5, 40), 0.25)
    of = Sample([0.5, 0.6, 0.55, 0.52, 0.58], list(same))
    against = Sample([0.4, 0.45, 0.5, 0.42, 0.4], list(same))
    alone = estimate(Sample(of.value), Sample(against.value), "difference", 0.05)
    both = estimate(of, against, "difference", 0.05)
    assert (both.low, both.high) == (alone.low, alone.high) and both.evaluation == 0
    assert math.isnan(alone.evaluation)


@pytest.mark.parametrize("effect", ["difference", "ratio"])
def test_questions_count_also_where_one_variant_answers_all_alike(effect):
    draw = np.random.default_rng(1)
    mixed = means_and_left_out(draw.integers(0, 2, 60) + draw.normal(0, 0.01, (5, 60)))
    perfect = Sample([1.0] * 5)  # as evidence has it where no question moves a value
    for pair in ((mixed, perfect), (perfect, mixed)):
        found = estimate(*pair, effect, 0.05)
        assert found == estimate(*(Sample(one.value, one.without or [[1.0] * 60] * 5) for one in pair), effect, 0.05)
        assert found.evaluation > 0.05
        alone = estimate(*(Sample(one.value) for one in pair), effect, 0.05)
        assert found.high - found.low > 5 * (alone.high - alone.low)


def crossed(draw, seeds, asked, answers, between=0.02):
    """Two variants' binary answers to the same questions, which one variant finds harder than the other; by groups."""
    hardness, taste = draw.normal(0.55, 0.2, asked), draw.normal(0, 0.3, asked)
    member, arms = np.arange(asked) % 32 == np.arange(32)[:, None], []
    for sign in (1, -1):
        chance = hardness + sign * (0.03 + taste / 2) + draw.normal(0, between, (seeds, 1))
        scores = draw.binomial(answers, np.clip(chance, 0, 1)) / answers
        left = [scores[:, ~own].mean(axis=1) for own in member]
        arms.append(Sample(list(scores.mean(axis=1)), np.transpose(left).tolist()))
    return arms


@pytest.mark.parametrize("effect", ["difference", "ratio"])
def test_intervals_hold_the_truth_as_often_as_they_say(effect):
    """Answers are drawn one by one, by other arithmetic than that of `simulate`."""
    draw = np.random.default_rng(2)
    means = [one.value[0] for one in crossed(draw, 1, 400_000, 9, between=0)]
    truth = means[0] / means[1] if effect == "ratio" else means[0] - means[1]
    found = [estimate(*crossed(draw, 5, 192, 3), effect, 0.05) for _ in range(300)]
    share = sum(one.low <= truth <= one.high for one in found) / len(found)
    assert abs(share - 0.95) < 3 * math.sqrt(0.95 * 0.05 / len(found))


def test_a_ratio_to_nothing_is_undefined():
    found = judge(Sample([1.0] * 5), Sample([1.0, 1, 1, 0, 1]), Asked(effect="ratio"), Rules())
    assert found.verdict == CANT_TELL and "ratio takes values above 0, got 0" in found.reason


# Verdicts


@pytest.mark.parametrize(
    ("expects", "low", "high", "verdict", "beside"),
    [
        ("above", 0.01, 0.3, HOLDS, ""),
        ("above", 0.01, 0.09, HOLDS, SMALLER),
        ("above", -0.05, 0.09, DOES_NOT, EXCLUDED),
        ("above", -0.05, 0.11, CANT_TELL, ""),
        ("above", -0.5, -0.2, DOES_NOT, REVERSED),
        ("below", -0.3, -0.01, HOLDS, ""),
        ("below", -0.09, -0.01, HOLDS, SMALLER),
        ("below", -0.09, 0.05, DOES_NOT, EXCLUDED),
        ("below", 0.01, 0.05, DOES_NOT, REVERSED),
        ("below", -0.11, 0.05, CANT_TELL, ""),
        ("equal", -0.09, 0.09, HOLDS, ""),
        ("equal", 0.01, 0.09, HOLDS, CONTRARY),
        ("equal", -0.11, 0.09, CANT_TELL, ""),
        ("equal", -0.11, -0.09, CANT_TELL, CONTRARY),
        ("equal", 0.11, 0.2, DOES_NOT, ""),
        ("not below", -0.09, 0.05, HOLDS, ""),
        ("not below", -0.09, -0.01, HOLDS, CONTRARY),
        ("not below", 0.2, 0.5, HOLDS, ""),  # where what is expected to be equal does not
        ("not below", -0.11, 0.5, CANT_TELL, ""),
        ("not below", -0.11, -0.01, CANT_TELL, CONTRARY),
        ("not below", -0.3, -0.11, DOES_NOT, ""),
        ("not above", -0.5, 0.09, HOLDS, ""),
        ("not above", 0.01, 0.09, HOLDS, CONTRARY),
        ("not above", -0.5, 0.11, CANT_TELL, ""),
        ("not above", 0.11, 0.3, DOES_NOT, ""),
    ],
)
def test_a_verdict_follows_from_the_interval(expects, low, high, verdict, beside):
    for found, effect in ((interval(low, high), "difference"), (interval(1 + low, 1 + high), "ratio")):
        asked = Asked(expects, effect)
        assert decide(found, asked) == verdict and nuance(found, asked, verdict) == beside


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 0.9))
def test_a_wider_interval_never_tells_the_opposite(value, reach, more, least):
    opposite = {"above": "below", "not above": "not below", "equal": "equal"}
    opposite |= {other: one for one, other in opposite.items()}
    for expects in opposite:
        asked = Asked(expects, "difference", least)
        narrow = decide(interval(value - reach, value + reach), asked)
        wide = decide(interval(value - reach - more, value + reach + more), asked)
        assert wide in (narrow, CANT_TELL) or expects in ("above", "below") and (narrow, wide) == (HOLDS, DOES_NOT)
        turned = Asked(opposite[expects], "difference", least)
        assert decide(interval(-value - reach, -value + reach), turned) == narrow


@given(values, st.sampled_from(["above", "below", "equal", "not below", "not above"]), st.randoms())
def test_a_decided_look_is_the_last(of, expects, draw):
    of = (of * 2)[:10]
    against = [draw.uniform(0.1, 10) for _ in of]
    asked, rules = Asked(expects, "difference", 2.0), Rules()
    early = judge(Sample(of[:5]), Sample(against[:5]), asked, rules)
    late = judge(Sample(of), Sample(against), asked, rules)
    assert early.wants_more == (early.verdict == CANT_TELL)
    assert late == early if not early.wants_more else late.estimate.seeds == 10 and not late.wants_more
    few = judge(Sample(of[:4]), Sample(against[:4]), asked, rules)
    assert (few.verdict, few.estimate, few.reason) == (CANT_TELL, None, "too few runs")


@pytest.mark.parametrize(
    ("of", "against", "expects", "verdict"),
    [
        ([], [], "below", HOLDS),
        ([], [2], "below", HOLDS),  # the old one took longer still
        ([2], [], "below", CANT_TELL),  # the new one took longer than is known
        ([2], [2], "below", CANT_TELL),
        ([2], [2], "above", CANT_TELL),
        ([2], [], "equal", CANT_TELL),
    ],
)
def test_a_bound_decides_only_in_its_direction(of, against, expects, verdict):
    one, other = [100.0, 110, 120, 105, 115], [400.0, 430, 500, 410, 440]
    if expects == "above":
        one, other = other, one
    marks = [[seed in own for seed in range(5)] for own in (of, against)]
    found = judge(Sample(one, (), marks[0]), Sample(other, (), marks[1]), Asked(expects, "ratio"), Rules())
    assert found.verdict == verdict and found.censored == len(of) + len(against)
    assert bool(found.reason) == (verdict == CANT_TELL)


def test_nothing_is_said_of_bounds_beside_a_verdict():
    reached, never = [100.0, 110, 120, 105, 115], [105.0, 125, 135, 112, 128]
    asked = Asked("equal", "ratio", 0.1)
    assert judge(Sample(reached), Sample(never), asked, Rules()).nuance == CONTRARY
    found = judge(Sample(reached), Sample(never, (), [True] * 5), asked, Rules())
    assert (found.verdict, found.nuance) == (CANT_TELL, "")


def test_an_evaluation_that_is_too_small_is_told():
    draw = np.random.default_rng(0)
    scores = draw.uniform(size=(5, 40))
    pair = means_and_left_out(scores), means_and_left_out(np.zeros_like(scores))
    assert judge(*pair, Asked(least=0.01), Rules()).blurred
    assert not judge(*pair, Asked(least=0.5), Rules()).blurred


verdict_lists = st.lists(
    st.tuples(st.sampled_from(["claim", "control"]), st.sampled_from([HOLDS, DOES_NOT, CANT_TELL])), min_size=1
)


@given(verdict_lists)
def test_a_claim_is_what_its_measures_are(told):
    found = judge_claim((str(number), role, Finding(verdict)) for number, (role, verdict) in enumerate(told))
    own = [verdict for role, verdict in told if role == "claim"]
    assert (found.verdict == DOES_NOT) == (DOES_NOT in own)
    assert (found.verdict == HOLDS) == (set(own) == {HOLDS})
    controls = [(str(number), verdict) for number, (role, verdict) in enumerate(told) if role == "control"]
    assert list(found.failed) == [name for name, verdict in controls if verdict == DOES_NOT]
    assert list(found.open) == [name for name, verdict in controls if verdict == CANT_TELL]


# How often they are right


def margin(share, claims):
    return 3 * math.sqrt(share * (1 - share) / claims)


def are_as_stated(rates):
    null, planted = simulate.STATED["null"], simulate.STATED["planted"]
    return rates.null <= null + margin(null, rates.claims), rates.planted >= planted - margin(planted, rates.claims)


@pytest.mark.slow
def test_effects_are_found_and_nulls_are_not_as_often_as_stated():
    rates = simulate.simulate(Rules(), simulate.Setting())
    assert rates.claims == 200 * simulate.CLAIMS
    assert are_as_stated(rates) == (True, True)
    assert 0 < rates.second_looks < 1


@pytest.mark.slow
def test_two_looks_without_correction_are_found_out():
    assert not are_as_stated(simulate.simulate(Rules(level=0.05), simulate.Setting()))[0]


@pytest.mark.slow
def test_three_seeds_and_the_normal_distribution_are_found_out(monkeypatch):
    monkeypatch.setattr(verdicts, "stdtrit", lambda freedom, share: stats.norm.ppf(share))
    rates = simulate.simulate(Rules(looks=(3,), level=0.05), simulate.Setting(), registers=100)
    assert are_as_stated(rates) == (False, False)


@pytest.mark.slow
def test_questions_that_are_taken_for_all_questions_are_found_out(monkeypatch):
    setting = simulate.Setting(questions=0.3)
    assert are_as_stated(simulate.simulate(Rules(), setting, registers=100))[0]
    monkeypatch.setattr(verdicts, "_jackknife", lambda left_out: np.zeros(left_out.shape[:-1]))
    assert not are_as_stated(simulate.simulate(Rules(), setting, registers=100))[0]
