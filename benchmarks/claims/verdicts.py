"""What runs say about a measure, and its measures about a claim: intervals and verdicts, by arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit


HOLDS, DOES_NOT, CANT_TELL = "holds", "does not", "can't tell"
SMALLER, REVERSED, EXCLUDED, CONTRARY = "smaller", "reversed", "excluded", "contrary"
"""What an interval says beside the verdict on it; see [`nuance`]."""


class Asked(Protocol):
    """What of a measure decides a verdict; see [`register.Measure`]."""

    effect: str
    expects: str
    least: float


class Looks(Protocol):
    """What of the rules decides one; see [`register.Rules`]."""

    looks: tuple[int, ...]
    level: float
    evaluation: float


@dataclass(frozen=True)
class Sample:
    """
    A metric's values over seeds.

    Attributes:
        value: of each seed.
        without: the same with each group of questions left out, one row for each seed; none where no question stands
            behind it.
        censored: whether only a lower bound is known, of each seed.
    """

    value: Sequence[float]
    without: Sequence[Sequence[float]] = ()
    censored: Sequence[bool] = ()

    def first(self, seeds: int) -> Sample:
        """Return the sample of the first seeds alone."""
        return Sample(self.value[:seeds], self.without[:seeds], self.censored[:seeds])


@dataclass(frozen=True)
class Estimate:
    """
    An effect with its interval, in the measure's units (a ratio as a ratio).

    Attributes:
        seeds: how many pairs stand behind it.
        spread: standard deviation of the effects of single seeds (of their logarithms, for a ratio).
        evaluation: standard error that the questions leave in the effect, with the noise of single answers; NaN where
            no question stands behind it.
        freedom: degrees of freedom of Student's t that its interval is by.
    """

    value: float
    low: float
    high: float
    seeds: int
    spread: float
    evaluation: float
    freedom: float

    def holds(self, effect: float) -> bool:
        """Return whether an effect lies within the interval."""
        return self.low <= effect <= self.high


class UndefinedEffectError(ValueError):
    """Two values have no such effect, e.g. a ratio to 0."""


def estimate(of: Sample, against: Sample, effect: str, level: float) -> Estimate:
    """
    Estimate the effect of one variant beside another, paired by seed.

    With n seeds and Q groups of questions, the variance of the mean difference has a part from seeds and one from
    questions. The first is the variance over seeds / n. The jackknife over groups of the mean difference holds the second
    and the noise of answers / n; that of single seeds' differences holds the second and the noise: their difference is
    the noise, which the first part holds already. Degrees of freedom are Satterthwaite's.

    Args:
        effect: `difference` or `ratio`.
        level: two-sided, of the interval's complement.

    Raises:
        UndefinedEffectError: for a ratio of what is not above 0.
    """
    seeds = len(of.value)
    if seeds < 2 or len(against.value) != seeds:
        raise ValueError(f"an effect takes two seeds or more of both, got {seeds} and {len(against.value)}")
    effects_S = _effects(of.value, against.value, effect)
    value, spread = float(effects_S.mean()), float(effects_S.std(ddof=1))
    between = spread**2 / seeds
    questions, evaluation, groups = 0.0, math.nan, 0
    if len(of.without) or len(against.without):
        left_SQ = _effects(_left_out(of), _left_out(against), effect)
        groups = left_SQ.shape[1]
        together, alone = float(_jackknife(left_SQ.mean(axis=0))), float(_jackknife(left_SQ).mean())
        questions = max(0.0, together - max(0.0, alone - together) / (seeds - 1))
        evaluation = math.sqrt(together)
    error = math.sqrt(between + questions)
    freedom = _freedom([(between, seeds - 1), (questions, groups - 1)])
    reach = error * float(stdtrit(freedom, 1 - level / 2)) if error else 0.0
    shown = math.exp if effect == "ratio" else float
    return Estimate(shown(value), shown(value - reach), shown(value + reach), seeds, spread, evaluation, freedom)


def widened(found: Estimate, effect: str, level: float, times: int) -> Estimate:
    """
    Return an estimate with the interval of one among several that are looked at, by Bonferroni's correction.

    Args:
        effect: `difference` or `ratio`.
        level: two-sided, of the complement of the interval that it has.
        times: how many are looked at: the wider interval is taken at `level / times`.
    """
    if found.low == found.high:
        return found
    plain, shown = (math.log, math.exp) if effect == "ratio" else (float, float)
    by = float(stdtrit(found.freedom, 1 - level / times / 2) / stdtrit(found.freedom, 1 - level / 2))
    value, reach = plain(found.value), by * (plain(found.high) - plain(found.value))
    return replace(found, low=shown(value - reach), high=shown(value + reach))


def _effects(of: ArrayLike, against: ArrayLike, effect: str) -> NDArray[np.float64]:
    one, other = np.asarray(of, dtype=float), np.asarray(against, dtype=float)
    if effect == "difference":
        return one - other
    for values in (one, other):
        if not (values > 0).all():
            raise UndefinedEffectError(f"a ratio takes values above 0, got {values.min():.4g}")
    return np.log(one) - np.log(other)


def _left_out(sample: Sample) -> NDArray[np.float64]:
    """Return a sample's values without each group; of one that no question moves, its values, whatever is left out."""
    return np.asarray(sample.without if len(sample.without) else [[value] for value in sample.value], dtype=float)


def _jackknife(left_out: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the jackknife's variance of what was computed without each of the groups, along the last axis."""
    groups = left_out.shape[-1]
    return (groups - 1) * left_out.var(axis=-1)


def _freedom(parts: Iterable[tuple[float, int]]) -> float:
    known = [(variance, freedom) for variance, freedom in parts if variance > 0]
    total = sum(variance for variance, _ in known)
    return total**2 / sum(variance**2 / freedom for variance, freedom in known) if known else math.inf


@dataclass(frozen=True)
class Finding:
    """
    What is found of a measure.

    Attributes:
        estimate: `None` where there are too few runs, or no value.
        nuance: what its interval says beside the verdict; see [`nuance`].
        reason: why it can't tell, where that is not its interval's width.
        wants_more: whether seeds of the next look would be run.
        censored: runs of which only a bound is known.
        blurred: whether the questions leave more error in it than the rules allow.
        withheld: whether it is not judged, because its runs can't be compared in what it is about.
    """

    verdict: str
    estimate: Estimate | None = None
    nuance: str = ""
    reason: str = ""
    wants_more: bool = False
    censored: int = 0
    blurred: bool = False
    withheld: bool = False


def no_effect(effect: str) -> float:
    """Return what a `difference` or a `ratio` is where nothing differs."""
    return 1.0 if effect == "ratio" else 0.0


def decide(found: Estimate, asked: Asked) -> str:
    """Return the verdict on an interval."""
    none = no_effect(asked.effect)
    low, high = none - asked.least, none + asked.least
    if asked.expects == "equal":
        holds, does_not = low < found.low and found.high < high, found.high < low or found.low > high
    elif asked.expects == "not below":  # no worse, by as much as would matter; better is as good
        holds, does_not = low < found.low, found.high < low
    elif asked.expects == "not above":
        holds, does_not = found.high < high, high < found.low
    elif asked.expects == "above":
        holds, does_not = found.low > none, found.high < high
    else:
        holds, does_not = found.high < none, found.low > low
    return HOLDS if holds else DOES_NOT if does_not else CANT_TELL


def nuance(found: Estimate, asked: Asked, verdict: str) -> str:
    """
    Return what an interval says beside the verdict on it; nothing of most.

    Returns:
        `SMALLER`: what holds is smaller than what would matter. `REVERSED`: there is an effect, the other way round than
        expected. `EXCLUDED`: there is none of the size that would matter, and perhaps a smaller one. `CONTRARY`: what is
        expected to be equal, or no worse, is not, by less than what would matter or by nobody knows how much.
    """
    none = no_effect(asked.effect)
    below, above = found.high < none, found.low > none
    if asked.expects in ("above", "below"):
        if verdict == DOES_NOT:
            return REVERSED if below or above else EXCLUDED
        farthest = found.high - none if asked.expects == "above" else none - found.low
        return SMALLER if verdict == HOLDS and farthest < asked.least else ""
    contrary = {"not below": below, "not above": above, "equal": below or above}[asked.expects]
    return CONTRARY if contrary and verdict != DOES_NOT else ""


def judge(of: Sample, against: Sample, asked: Asked, rules: Looks) -> Finding:
    """
    Look at a measure as often as the rules allow and its seeds suffice.

    A first look that decides is the last one, whatever further seeds there are.
    """
    finding = Finding(CANT_TELL, reason="too few runs")
    for look in rules.looks:
        if min(len(of.value), len(against.value)) < look:
            break
        finding = judge_once(of.first(look), against.first(look), asked, rules, more=look != rules.looks[-1])
        if not finding.wants_more:
            break
    return finding


def judge_once(of: Sample, against: Sample, asked: Asked, rules: Looks, more: bool = False) -> Finding:
    """Judge a measure from all seeds that are given; `more` where another look could follow."""
    bounds = _bounds(of, against)
    censored = sum(map(bool, of.censored)) + sum(map(bool, against.censored))
    try:
        found = estimate(of, against, asked.effect, rules.level)
    except UndefinedEffectError as error:
        return Finding(CANT_TELL, reason=str(error), censored=censored)
    verdict = decide(found, asked)
    blurred = found.evaluation > rules.evaluation * asked.least
    barred = {(HOLDS, "above"): {"upper"}, (DOES_NOT, "above"): {"lower"}}
    barred |= {(HOLDS, "below"): {"lower"}, (DOES_NOT, "below"): {"upper"}}
    against_it = bounds & (barred.get((verdict, asked.expects), {"upper", "lower"}) | {"unknown"})
    if verdict != CANT_TELL and against_it:
        reason = f"{censored} of {2 * len(of.value)} runs never got there, and the bounds they give do not decide it"
        return Finding(CANT_TELL, found, "", reason, more, censored, blurred)
    beside = "" if against_it else nuance(found, asked, verdict)
    return Finding(verdict, found, beside, "", more and verdict == CANT_TELL, censored, blurred)


def _bounds(of: Sample, against: Sample) -> set[str]:
    """Tell which bounds of effects censored values give: of one that never got there, the effect is larger than seen."""
    names = {(True, False): "lower", (False, True): "upper", (True, True): "unknown"}
    pairs = zip(of.censored, against.censored, strict=False)
    if len(of.censored) != len(against.censored):  # a number, or a metric that is never censored
        pairs = ((one, False) for one in of.censored) if of.censored else ((False, one) for one in against.censored)
    return {names[bool(a), bool(b)] for a, b in pairs if a or b}


@dataclass(frozen=True)
class ClaimVerdict:
    """
    What its measures say of a claim.

    Attributes:
        failed: controls that do not hold.
        open: controls that can't tell.
    """

    verdict: str
    failed: tuple[str, ...] = ()
    open: tuple[str, ...] = ()


def judge_claim(findings: Iterable[tuple[str, str, Finding]]) -> ClaimVerdict:
    """Judge a claim from its measures' names, roles and findings; controls are told apart and decide nothing."""
    findings = list(findings)
    verdicts = [found.verdict for _, role, found in findings if role == "claim"]
    controls = [(name, found.verdict) for name, role, found in findings if role == "control"]
    decided = DOES_NOT if DOES_NOT in verdicts else HOLDS if verdicts and set(verdicts) == {HOLDS} else CANT_TELL
    return ClaimVerdict(
        decided,
        tuple(name for name, verdict in controls if verdict == DOES_NOT),
        tuple(name for name, verdict in controls if verdict == CANT_TELL),
    )
