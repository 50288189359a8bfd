"""Differences between tags: the modality gap and the disparity of every two tags."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maple_trl.metrics.accuracy import parse_keys, parse_tags, tag_accuracies
from maple_trl.metrics.clip_intervals import ClipSums, clip_interval, sum_by_clip
from maple_trl.metrics.intervals import (
    Estimate,
    UndefinedMetricError,
    check_confidence,
    named,
    percentile_interval,
    resampled_means,
)
from maple_trl.modalities import ModalityTag


WEIGHTINGS = ("sample", "tag")
_NAMES = ("uni_bi", "uni_tri", "bi_tri", "mean")


@dataclass(frozen=True)
class ModalityGap:
    """
    Relative differences between the accuracies of the tags with one, two and three modalities, as fractions.

    Attributes:
        uni_bi: `|B - U| / U`.
        uni_tri: `|T - U| / U`.
        bi_tri: `|T - B| / B`.
        mean: the mean of the three.
        uni: U, the accuracy over V, A and S, in the unit that was given.
        bi: B, over VA, VS and AS.
        tri: T, of VAS.
    """

    uni_bi: float
    uni_tri: float
    bi_tri: float
    mean: float
    uni: float
    bi: float
    tri: float


def modality_gap(
    accuracy: Mapping[str, float], counts: Mapping[str, int] | None = None, weighting: str = "sample"
) -> ModalityGap:
    """
    Compute the modality gap (MAPLE, arXiv 2602.11596, C.1).

    The paper's formulas average the tags of a family plainly; the columns of its Table 1 follow when each tag counts
    by its questions. Both are here.

    Args:
        accuracy: of each of the seven tags, in any spelling. The gap is relative, so that fractions and percents give
            the same. A key `all` is left out.
        counts: questions of each tag; needed for the weighting `"sample"`.
        weighting: `"sample"` or `"tag"`.

    Raises:
        UndefinedMetricError: when a tag is missing or has no question, or when U or B is 0; the message names the
            tags.
        ValueError: for the weighting `"sample"` without counts, an unknown weighting or tag, or an accuracy that is
            negative or not finite.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    values = _complete(accuracy, "an accuracy")
    for tag, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"The accuracy of {tag} must be a finite number of 0 or more, got {value}")
    families = _families({tag: np.asarray(value) for tag, value in values.items()}, _weights(counts, weighting))
    zero = [name for name in ("uni", "bi") if not families[name] > 0]
    if zero:
        tags = [str(tag) for tag in ModalityTag if tag.arity == zero[0]]
        raise UndefinedMetricError(
            f"The modality gap is undefined: it divides by the accuracy of {', '.join(tags)}, which is 0"
        )
    return ModalityGap(
        **{name: float(value) for name, value in _gaps(families).items()},
        **{name: float(value) for name, value in families.items()},
    )


def modality_gap_intervals(
    scores: ArrayLike,
    tags: Sequence[str],
    weighting: str = "sample",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable | None] | None = None,
) -> dict[str, Estimate]:
    """
    Compute the modality gap of scored questions with intervals, stratified by tag.

    With clips, a clip is left out of all tags at once, and an interval ends at 0. Bootstrapped over questions, the interval
    around a gap near 0 lies too high, for a gap is an absolute difference.

    Args:
        scores: of shape (N,), in [0, 1]; None or NaN for a question that could not be scored, which is left out.
        tags: the tag of each question.
        weighting: as in [`modality_gap`], whose errors apply.
        confidence, resamples, seed, clusters: as in [`bootstrap_mean`].

    Returns:
        `uni_bi`, `uni_tri`, `bi_tri` and `mean`. An interval is NaN when the gap is undefined in one of the resamples or
        without one of the clips (an accuracy of 0), or no tag has two questions or clips.
    """
    values = np.asarray(scores, dtype=np.float64)
    measured = tag_accuracies(values, tags, confidence, resamples=1, seed=seed)
    gap = modality_gap(measured.accuracy, measured.counts, weighting)
    labels = parse_tags(tags)
    kept = [row for row in range(len(values)) if labels[row] and not math.isnan(values[row])]
    if named(clusters, len(values)):
        sums = sum_by_clip(values[kept], [clusters[row] for row in kept], [labels[row] for row in kept])
        return _gaps_over_clips(gap, sums, _weights(measured.counts, weighting), weighting, confidence)
    draws = resampled_means(values[kept], [labels[row] for row in kept], resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = _gaps(_families(draws, _weights(measured.counts, weighting)))
    no_spread = all(count == 1 for count in measured.counts.values())
    estimates = {}
    for name in _NAMES:
        undefined = no_spread or not np.isfinite(resampled[name]).all()
        low, high = (math.nan, math.nan) if undefined else percentile_interval(resampled[name], confidence)
        estimates[name] = Estimate(getattr(gap, name), low, high, len(kept))
    return estimates


def _gaps_over_clips(
    gap: ModalityGap, sums: ClipSums, weights: Mapping[ModalityTag, float], weighting: str, confidence: float
) -> dict[str, Estimate]:
    check_confidence(confidence)
    left_out = dict(zip(sums.strata, sums.left_out().T, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        without = _gaps(_families(left_out, weights))
    weights_G = sums.counts_GK.sum(axis=1) if weighting == "sample" else sums.macro_weights()
    no_spread = ((sums.counts_GK > 0).sum(axis=0) < 2).all()
    estimates = {}
    for name in _NAMES:
        value = getattr(gap, name)
        low, high = (math.nan, math.nan) if no_spread else clip_interval(value, without[name], weights_G, confidence)
        estimates[name] = Estimate(
            value, low if math.isnan(low) else max(0.0, low), high, int(sums.counts_K.sum()), sums.clips
        )
    return estimates


def tag_disparity(accuracy: Mapping[str, float]) -> NDArray[np.float64]:
    """
    Return `|accuracy of M - accuracy of M'|` for every two tags (MAPLE, arXiv 2602.11596, figures 4 and 5).

    Args:
        accuracy: by tag, in any spelling, as fractions or in percent; a key `all` is left out.

    Returns:
        Of shape (7, 7), symmetric, in canonical order of the tags and in the unit that was given. The row and column
        of a tag that is not in `accuracy` are NaN.

    Raises:
        UndefinedMetricError: when there is no tag.
        ValueError: for an unknown tag, or an accuracy that is not finite.
    """
    by_tag = parse_keys(accuracy, "accuracies")
    if not by_tag:
        raise UndefinedMetricError("The disparity of no tag is undefined")
    for tag, value in by_tag.items():
        if not math.isfinite(value):
            raise ValueError(f"The accuracy of {tag} must be a finite number, got {value}; leave a missing tag out")
    values = np.array([by_tag.get(tag, math.nan) for tag in ModalityTag], dtype=np.float64)
    return np.abs(values[:, None] - values[None, :])


def _complete(values: Mapping[str, float], what: str) -> dict[ModalityTag, float]:
    by_tag = parse_keys(values, "accuracies" if what == "an accuracy" else "counts")
    missing = [str(tag) for tag in ModalityTag if tag not in by_tag]
    if missing:
        raise UndefinedMetricError(f"The modality gap needs {what} of all seven tags; missing: {', '.join(missing)}")
    return by_tag


def _weights(counts: Mapping[str, int] | None, weighting: str) -> dict[ModalityTag, float]:
    if weighting == "tag":
        return dict.fromkeys(ModalityTag, 1.0)
    if counts is None:
        raise ValueError('weighting "sample" needs counts, the questions of each tag; "tag" goes without')
    weights = _complete(counts, "a count")
    for tag, count in weights.items():
        if count < 0 or not math.isfinite(count):
            raise ValueError(f"The count of {tag} must be a number of questions, got {count}")
    empty = [str(tag) for tag in ModalityTag if weights[tag] == 0]
    if empty:
        raise UndefinedMetricError(f"The modality gap needs questions of all seven tags; {', '.join(empty)} has none")
    return weights


def _families(
    means: Mapping[Hashable, NDArray[np.float64]], weights: Mapping[ModalityTag, float]
) -> dict[str, NDArray[np.float64]]:
    families = {}
    for name in ("uni", "bi", "tri"):
        tags = [tag for tag in ModalityTag if tag.arity == name]
        total = sum(weights[tag] for tag in tags)
        families[name] = np.asarray(sum(weights[tag] * means[tag] for tag in tags) / total)
    return families


def _gaps(families: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    uni, bi, tri = families["uni"], families["bi"], families["tri"]
    uni_bi, uni_tri, bi_tri = abs(bi - uni) / uni, abs(tri - uni) / uni, abs(tri - bi) / bi
    return dict(zip(_NAMES, [uni_bi, uni_tri, bi_tri, (uni_bi + uni_tri + bi_tri) / 3], strict=True))
