"""Whether two runs differ: paired tests over the same questions."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maple_trl.metrics.clip_intervals import sum_by_clip
from maple_trl.metrics.intervals import CHUNK, TIE, bootstrap_mean, checked_scores, mean_over_clips, named


TESTS = ("auto", "mcnemar", "permutation")
# All 2^m assignments of signs are enumerated up to this m.
_ENUMERATED = 14


@dataclass(frozen=True)
class PairedComparison:
    """
    Two runs on the same questions.

    Attributes:
        difference: mean score of the second run minus that of the first.
        low: lower end of the interval of the difference; NaN with a single question, or a single clip.
        high: upper end, likewise.
        p_value: two-sided.
        test: `"mcnemar"` or `"permutation"`.
        exact: whether the p-value is exact, or estimated from random signs.
        better: questions on which the second run scores more.
        worse: questions on which it scores less.
        count: all questions.
        clips: number of clips that they are about; None where none is named, and questions count as independent.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    exact: bool
    better: int
    worse: int
    count: int
    clips: int | None = None


def compare_runs(
    first: ArrayLike,
    second: ArrayLike,
    strata: Sequence[Hashable] | None = None,
    test: str = "auto",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    clusters: Sequence[Hashable | None] | None = None,
) -> PairedComparison:
    """
    Compare two runs question by question.

    The null hypothesis: on each question, it is chance which run got which of the two scores. One answer per question,
    right or wrong, is tested by McNemar's test in its exact binomial form ([`mcnemar_exact`]). Fractions (a share of
    right samples, a judge's score) are tested by flipping the signs of the differences: all assignments of signs where
    at most 14 questions differ, otherwise `resamples` random ones, counting the observed one among them, so that the
    p-value is never below `1 / (resamples + 1)`. On right-or-wrong scores both tests are the same.

    Where clips are known (`clusters`) and some hold several questions, the clip takes the question's place: the signs of
    all of a clip's differences are flipped together, whatever the scores. With fewer than six clips that differ, no
    p-value is below 0.05.

    The interval ([`bootstrap_mean`]) is about the size of the difference and is not the test turned around.

    Several comparisons at once (tags, checkpoints) need a correction that this does not make.

    Args:
        first: scores of shape (N,).
        second: scores of shape (N,) of the same questions in the same order; see [`align_runs`].
        strata: the stratum of each question for the interval, e.g. its tag.
        test: `"auto"` (McNemar's where all scores are 0 or 1 and no clip has two questions), `"mcnemar"` or
            `"permutation"`.
        confidence, resamples, seed, clusters: as in [`bootstrap_mean`].

    Raises:
        UndefinedMetricError: without a question.
        ValueError: for runs of different lengths, a score that is not finite (with its row), an unknown test, or
            McNemar's test of scores that are not 0 or 1, or of questions that share clips.
    """
    if test not in TESTS:
        raise ValueError(f"test must be one of {', '.join(TESTS)}, got {test!r}")
    before, after = checked_scores(first, "first run"), checked_scores(second, "second run")
    if len(before) != len(after):
        raise ValueError(
            f"The runs must hold the same questions; the first has {len(before)}, the second {len(after)}"
        )
    fractions = np.flatnonzero(~(np.isin(before, (0, 1)) & np.isin(after, (0, 1))))
    if test == "mcnemar" and len(fractions):
        row = fractions[0]
        raise ValueError(
            f"McNemar's test needs scores of 0 or 1; row {row} has {before[row]} and {after[row]}. "
            'Use test="permutation"'
        )
    differences = after - before
    differences[np.abs(differences) < TIE] = 0
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    clips = clusters if named(clusters, len(differences)) else None
    units = differences if clips is None else sum_by_clip(differences, clips).scores_GK[:, 0]
    if test == "mcnemar" and len(units) < len(differences):
        raise ValueError(
            f"McNemar's test takes questions as independent, but {len(differences)} questions share {len(units)} clips. "
            'Use test="permutation"'
        )
    if test == "mcnemar" or (test == "auto" and not len(fractions) and len(units) == len(differences)):
        chosen, exact, p_value = "mcnemar", True, mcnemar_exact(worse, better)
    else:
        chosen = "permutation"
        p_value, exact = _sign_flip(np.where(np.abs(units) < TIE, 0, units), resamples, seed)
    if clips is not None:
        interval = mean_over_clips(differences, clips, strata, confidence)
    else:
        interval = bootstrap_mean(differences, strata, confidence, resamples, seed)
    return PairedComparison(
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        p_value=p_value,
        test=chosen,
        exact=exact,
        better=better,
        worse=worse,
        count=len(differences),
        clips=interval.clips,
    )


def mcnemar_exact(first_only: int, second_only: int) -> float:
    """
    Return the two-sided p-value of McNemar's test (Psychometrika 12, 1947).

    It is twice the smaller tail of Binomial(m, 1/2), at most 1, where m questions are right in one run only.

    Args:
        first_only: questions that only the first run got right.
        second_only: questions that only the second run got right.

    Returns:
        1 when no question tells the runs apart.

    Raises:
        ValueError: for a negative number.
    """
    from scipy.special import bdtr

    if first_only < 0 or second_only < 0:
        raise ValueError(f"Numbers of questions are 0 or more, got {first_only} and {second_only}")
    return min(1.0, 2 * float(bdtr(min(first_only, second_only), first_only + second_only, 0.5)))


def align_runs(
    first: Mapping[str, float], second: Mapping[str, float]
) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """
    Bring the scores of two runs into one order.

    Args:
        first: score by the question's name.
        second: likewise.

    Returns:
        The names in the order of the first run, and both runs' scores, each of shape (N,).

    Raises:
        ValueError: when a run lacks a question of the other; the message names some.
    """
    for lacking, here, there in (("second", first, second), ("first", second, first)):
        missing = [str(name) for name in here if name not in there]
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"The runs must hold the same questions; the {lacking} run lacks {len(missing)}: {some}. "
                "Compare the questions that both have, and say how many were left out"
            )
    names = list(first)
    return names, np.array([first[name] for name in names], float), np.array([second[name] for name in names], float)


def _sign_flip(differences: NDArray[np.float64], resamples: int, seed: int) -> tuple[float, bool]:
    """Return the p-value of the sum of the differences when signs are even chances, and whether it is exact."""
    sizes = np.sort(np.abs(differences[differences != 0]))
    observed = abs(differences.sum())
    # Sums of the same numbers in another order: rounding must not turn a tie into less.
    threshold = observed - TIE * max(1.0, sizes.sum())
    if len(sizes) <= _ENUMERATED:
        bits = (np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes))) & 1
        return float((np.abs((2 * bits - 1) @ sizes) >= threshold).mean()), True
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK // len(sizes))
    extreme = 0
    for start in range(0, resamples, chunk):
        bits = rng.integers(2, size=(min(chunk, resamples - start), len(sizes)), dtype=np.int8)
        extreme += int((np.abs(2 * (bits.astype(np.float64) @ sizes) - sizes.sum()) >= threshold).sum())
    return (extreme + 1) / (resamples + 1), False
