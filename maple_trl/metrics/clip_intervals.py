"""
Intervals over clips: questions about one clip share its fate, so that the clip is what is left out and counted.

Every clip is left out once (the delete-one jackknife; Efron and Tibshirani, 1993, chapter 11). A percentile bootstrap over
clips is too narrow with a few dozen of them, and where clips hold very different numbers of questions; Student's t with
as many degrees of freedom as the clips are worth is not (see tests/metrics/test_clip_intervals.py for the coverage of both).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClipSums:
    """
    Questions summed up by clip and stratum.

    Attributes:
        scores_GK: sums of scores, of shape (clips, strata).
        counts_GK: numbers of questions, likewise.
        strata: their names, K of them.
    """

    scores_GK: NDArray[np.float64]
    counts_GK: NDArray[np.float64]
    strata: tuple[Hashable, ...]

    @property
    def clips(self) -> int:
        """Number of clips."""
        return len(self.counts_GK)

    @property
    def counts_K(self) -> NDArray[np.float64]:
        """Number of questions of each stratum."""
        return np.asarray(self.counts_GK.sum(axis=0))

    @property
    def means_K(self) -> NDArray[np.float64]:
        """Mean score of each stratum."""
        return np.asarray(self.scores_GK.sum(axis=0) / self.counts_K)

    def macro_weights(self) -> NDArray[np.float64]:
        """Return how much each clip counts in the plain mean over strata, of shape (clips,)."""
        return np.asarray((self.counts_GK / self.counts_K).sum(axis=1))

    def left_out(self) -> NDArray[np.float64]:
        """
        Return the means of the strata without each clip in turn, of shape (clips, strata).

        Each is drawn towards the mean by `sqrt((g - 1) / g)`, where g clips hold the stratum: the sum of squared
        deviations of anything computed from a row then is the jackknife's variance, also where a stratum has clips of its
        own. A stratum with one clip says nothing about its spread and stays as it is.
        """
        held_K = (self.counts_GK > 0).sum(axis=0)
        rest_GK = self.counts_K - self.counts_GK
        with np.errstate(divide="ignore", invalid="ignore"):
            without_GK = (self.scores_GK.sum(axis=0) - self.scores_GK) / rest_GK
        moved_GK = np.where((self.counts_GK > 0) & (rest_GK > 0), without_GK - self.means_K, 0.0)
        drawn_K: NDArray[np.float64] = np.sqrt((held_K - 1) / held_K)
        return self.means_K + moved_GK * drawn_K


def sum_by_clip(
    scores: NDArray[np.float64], clusters: Sequence[Hashable | None], strata: Sequence[Hashable] | None = None
) -> ClipSums:
    """
    Sum up questions by clip and stratum.

    Args:
        scores: of shape (N,).
        clusters: the clip of each question; one without (`None` or empty) is a clip of its own.
        strata: the stratum of each question, e.g. its tag.

    Raises:
        ValueError: for lists of different lengths.
    """
    clusters = clusters.tolist() if isinstance(clusters, np.ndarray) else clusters
    strata = [""] * len(scores) if strata is None else list(strata)
    for name, values in (("clusters", clusters), ("strata", strata)):
        if len(values) != len(scores):
            raise ValueError(f"There are {len(scores)} scores, but {len(values)} {name}")
    places = {name: i for i, name in enumerate(sorted(dict.fromkeys(strata), key=str))}
    names: dict[Hashable, int] = {}
    # A question without a clip is named by its row, which no clip can be.
    codes = [names.setdefault((row,) if is_unnamed(clip) else clip, len(names)) for row, clip in enumerate(clusters)]
    shape = (len(names), len(places))
    cells = np.ravel_multi_index((codes, [places[name] for name in strata]), shape)
    sums, counts = (
        np.bincount(cells, weights, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
        for weights in (scores, None)
    )
    return ClipSums(sums, counts, tuple(places))


def is_unnamed(clip: Hashable | None) -> bool:
    """Return whether a question has no clip: None, empty or NaN."""
    return clip is None or clip == "" or clip != clip


def clip_interval(
    value: float,
    left_out_G: NDArray[np.float64],
    weights_G: NDArray[np.float64],
    confidence: float,
    share: bool = False,
) -> tuple[float, float]:
    """
    Compute the interval of a value from what it is without each clip.

    Args:
        value: over all clips.
        left_out_G: computed from the rows of [`ClipSums.left_out`].
        weights_G: how much each clip counts in the value, e.g. its questions. Student's t has as many degrees of freedom as
            clips of equal weight would have that are worth as much, `(sum w)^2 / sum w^2 - 1` (Kish).
        confidence: strictly between 0 and 1.
        share: the value is a share. The interval then is computed on its log-odds, and lies in (0, 1).

    Returns:
        Its ends; NaN twice with one clip, or where a value is not finite.
    """
    from scipy.special import expit, logit, stdtrit

    error = clip_error(value, left_out_G)
    if not math.isfinite(error):
        return math.nan, math.nan
    freedom = max(1.0, weights_G.sum() ** 2 / (weights_G**2).sum() - 1)
    reach = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    if not share:
        return value - reach, value + reach
    if not 0 < value < 1:
        return value, value  # all scores are equal
    low, high = (float(expit(logit(value) + side * reach / (value * (1 - value)))) for side in (-1, 1))
    return low, high


def clip_error(value: float, left_out_G: NDArray[np.float64]) -> float:
    """Return the standard error of a value from what it is without each clip; NaN with one clip."""
    return math.nan if len(left_out_G) < 2 else math.sqrt(((left_out_G - value) ** 2).sum())


def standard_error(scores: Sequence[float], clusters: Sequence[Hashable | None] | None = None) -> float:
    """
    Return the standard error of a mean over questions.

    Args:
        scores: of shape (N,), one per question.
        clusters: the clip of each question; without, the deviation over questions divided by `sqrt(N)`.

    Returns:
        NaN with a single question or clip.
    """
    sums = sum_by_clip(np.asarray(scores, np.float64), [None] * len(scores) if clusters is None else clusters)
    return clip_error(float(sums.means_K[0]), sums.left_out()[:, 0])
