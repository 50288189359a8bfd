"""Intervals for means over questions: over clips where clips are known, else bootstrapped over questions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maple_trl.metrics.clip_intervals import clip_interval, is_unnamed, sum_by_clip


TIE = 1e-9
"""Means of the same scores in another order differ by this little: they are equal."""
CHUNK = 2**22
"""Random numbers that a bootstrap or a permutation test holds at once: 32 MiB of indices."""


class UndefinedMetricError(ValueError):
    """The data leave a metric without a value: nothing to average, or a division by zero."""


@dataclass(frozen=True)
class Estimate:
    """
    A mean over questions and its interval.

    Attributes:
        value: the mean.
        low: lower end of the interval; NaN where the data say nothing about the spread (one question).
        high: upper end, likewise.
        count: number of questions.
        clips: number of clips that they are about, on which the interval rests; None where no clip is named, and the
            interval rests on the questions.
    """

    value: float
    low: float
    high: float
    count: int
    clips: int | None = None

    def as_columns(self, name: str) -> dict[str, float]:
        """Return the mean under a name and the ends of its interval under `NAME_low` and `NAME_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def checked_scores(scores: ArrayLike, name: str = "scores") -> NDArray[np.float64]:
    """
    Return scores as an array of shape (N,).

    Raises:
        UndefinedMetricError: when there is none.
        ValueError: when they are not one number per question, or one is not finite; the message names its row.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} must hold one number per question, got an array of shape {values.shape}")
    if not len(values):
        raise UndefinedMetricError(f"{name} are empty: there is no question to average over")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"{name}: row {bad[0]} is {values[bad[0]]} ({len(bad)} of {len(values)} rows are not finite); "
            "leave out the questions that could not be scored, and count them"
        )
    return values


def resampled_means(
    scores: ArrayLike, strata: Sequence[Hashable] | None = None, resamples: int = 2000, seed: int = 0
) -> dict[Hashable, NDArray[np.float64]]:
    """
    Draw means of each stratum over questions drawn from it with replacement, as many as it has.

    A stratum's means depend on the seed, its name and its scores, and neither on the order of the questions nor on the
    other strata: a run that was interrupted and resumed gives the same intervals.

    Args:
        scores: of shape (N,), one per question.
        strata: the stratum of each question, e.g. its tag; all are one stratum named `""` when None.
        resamples: how many means to draw, R.
        seed: 0 or more.

    Returns:
        An array of shape (R,) by stratum, in the order of their names.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}")
    groups = _by_stratum(checked_scores(scores), strata)
    return {name: _means(values, name, resamples, seed) for name, values in groups.items()}


def bootstrap_mean(
    scores: ArrayLike,
    strata: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable | None] | None = None,
) -> Estimate:
    """
    Compute the mean over questions with its interval.

    Where clips are known (`clusters`), the interval is over clips: every clip is left out once, and Student's t has as
    many degrees of freedom as the clips are worth (see [`clip_interval`]); for scores in [0, 1] it is computed on the
    log-odds of the mean. Nothing is drawn.

    Where no clip is named, the interval is a percentile bootstrap (Efron and Tibshirani, 1993, chapter 13). The unit that is
    resampled is the question, also where several samples stand behind its score; it is too narrow for a handful of
    questions.

    With strata, each keeps its share of the questions: the interval then is about a benchmark with these shares. Where all
    questions have the same score the interval has no width.

    Args:
        scores: of shape (N,), one per question.
        strata: the stratum of each question, e.g. its tag. One with a single question adds no spread; without any that
            has two, the interval is NaN.
        confidence: strictly between 0 and 1.
        resamples: how many means to draw.
        seed: 0 or more; the same seed gives the same interval.
        clusters: the clip of each question, None or `""` where it has none: such a question is a clip of its own. With a
            single clip the interval is NaN.

    Raises:
        UndefinedMetricError: without a question.
        ValueError: for a score that is not finite (with its row), strata or clusters of another length, or a confidence
            that is no share.
    """
    values = checked_scores(scores)
    if named(clusters, len(values)):
        return mean_over_clips(values, clusters, strata, confidence, bool(((values >= 0) & (values <= 1)).all()))
    groups = _by_stratum(values, strata)
    draws = resampled_means(scores, strata, resamples, seed)
    count = sum(map(len, groups.values()))
    means = np.asarray(sum(len(groups[name]) * draws[name] for name in groups) / count)
    low, high = percentile_interval(means, confidence)
    if all(len(values) == 1 for values in groups.values()):
        low = high = math.nan
    # The exact sum: the same whatever the order of the questions.
    return Estimate(math.fsum(np.concatenate(list(groups.values()))) / count, low, high, count)


def percentile_interval(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Return the central share `confidence` of the draws; NaN twice when one of them is NaN."""
    check_confidence(confidence)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def check_confidence(confidence: float) -> None:
    """Raise ValueError for a confidence that is no share."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be strictly between 0 and 1, e.g. 0.95, got {confidence}")


def named(clusters: Sequence[Hashable | None] | None, rows: int) -> TypeGuard[Sequence[Hashable | None]]:
    """
    Return whether clusters name a clip at all.

    Raises:
        ValueError: when there are more or fewer than rows.
    """
    if clusters is None:
        return False
    if len(clusters) != rows:
        raise ValueError(f"There are {rows} scores, but {len(clusters)} clusters")
    return not all(is_unnamed(clip) for clip in clusters)


def mean_over_clips(
    scores: NDArray[np.float64],
    clusters: Sequence[Hashable | None],
    strata: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    share: bool = False,
) -> Estimate:
    """
    Compute the mean over questions with its interval over clips; strata keep their shares.

    Args:
        share: the mean is a share, see [`clip_interval`].
    """
    check_confidence(confidence)
    sums = sum_by_clip(scores, clusters, strata)
    shares_K = sums.counts_K / len(scores)
    value = math.fsum(scores) / len(scores)
    low, high = clip_interval(value, sums.left_out() @ shares_K, sums.counts_GK.sum(axis=1), confidence, share)
    return Estimate(value, low, high, len(scores), sums.clips)


def _by_stratum(scores: NDArray[np.float64], strata: Sequence[Hashable] | None) -> dict[Hashable, NDArray[np.float64]]:
    if strata is None:
        return {"": scores}
    if len(strata) != len(scores):
        raise ValueError(f"There are {len(scores)} scores, but {len(strata)} strata")
    rows: dict[Hashable, list[int]] = {}
    for row, name in enumerate(strata):
        rows.setdefault(name, []).append(row)
    return {name: scores[rows[name]] for name in sorted(rows, key=str)}


def _means(values: NDArray[np.float64], name: Hashable, resamples: int, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng([seed, *str(name).encode()])
    values = np.sort(values)
    count = len(values)
    chunk = max(1, CHUNK // count)
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate([values[rng.integers(count, size=(size, count))].mean(axis=1) for size in sizes])
