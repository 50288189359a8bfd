"""Metrics over questions: pass@k, accuracies per tag, fusion gain, training efficiency."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maple_trl.metrics.clip_intervals import clip_interval, sum_by_clip
from maple_trl.metrics.intervals import (
    TIE,
    Estimate,
    UndefinedMetricError,
    bootstrap_mean,
    checked_scores,
    named,
    percentile_interval,
    resampled_means,
)
from maple_trl.modalities import ModalityTag


Value = TypeVar("Value")


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> float | NDArray[np.float64]:
    """
    Estimate without bias the probability that at least one of k samples is right.

    From n samples of which c are right, it is `1 - C(n - c, k) / C(n, k)` (Chen et al., arXiv 2107.03374, eq. 1).

    For `k = 1` this is `c / n`. MAPLE (arXiv 2602.11596) reports pass@1 from 5 samples per question.

    Args:
        n: samples per question: an integer or an array of shape (N,).
        c: right ones among them: an integer or an array of shape (N,).
        k: 1 or more, and no more than any n.

    Returns:
        A float for two integers, else an array of shape (N,).

    Raises:
        UndefinedMetricError: without a question, or where `k > n`: a question with fewer samples has no unbiased
            estimate. The message names the first such question.
        ValueError: for counts that are not integers or not `0 <= c <= n`, with the question; or for `k < 1`.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k must be an integer of 1 or more, got {k!r}")
    samples, right = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if not samples.size:
        raise UndefinedMetricError("pass@k of no question is undefined")
    for name, counts in (("n", samples), ("c", right)):
        if counts.dtype.kind not in "iu" or counts.ndim > 1:
            raise ValueError(
                f"{name} must be an integer or one integer per question, got {counts.dtype} of shape {counts.shape}"
            )
    bad = np.flatnonzero((right < 0) | (right > samples))
    if len(bad):
        row = bad[0]
        raise ValueError(
            f"Question {row} has c={right.flat[row]} right of n={samples.flat[row]} samples; c must be between 0 and n"
        )
    bad = np.flatnonzero(samples < k)
    if len(bad):
        raise UndefinedMetricError(
            f"pass@{k} needs {k} samples per question; question {bad[0]} has n={samples.flat[bad[0]]} "
            f"({len(bad)} of {samples.size} questions have too few)"
        )
    wrong = samples.astype(np.int64) - right.astype(np.int64)
    all_wrong = np.ones(samples.shape)
    for i in range(k):
        all_wrong *= np.maximum(wrong - i, 0) / (samples - i)
    return float(1 - all_wrong) if samples.ndim == 0 else 1 - all_wrong


def pass_at_k_interval(
    n: ArrayLike,
    c: ArrayLike,
    k: int,
    strata: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable | None] | None = None,
) -> Estimate:
    """
    Average pass@k over questions, with its interval: [`pass_at_k`] of each question, then [`bootstrap_mean`].

    Args:
        n: samples per question, of shape (N,), or one integer for all.
        c: right ones, of shape (N,).
        k: as in [`pass_at_k`].
        strata, confidence, resamples, seed, clusters: as in [`bootstrap_mean`].
    """
    return bootstrap_mean(np.atleast_1d(pass_at_k(n, c, k)), strata, confidence, resamples, seed, clusters)


@dataclass(frozen=True)
class TagAccuracies:
    """
    Accuracies of one evaluation, as fractions.

    Attributes:
        per_tag: by tag with at least one scored question, in canonical order.
        sample_mean: the mean over all scored questions, with or without a tag.
        tag_mean: the plain mean over the tags in `per_tag`; None when no scored question has a tag.
        missing: tags without a scored question. `tag_mean` is comparable between evaluations only where it is the same.
        unscored: how many questions could not be scored and are in none of the means, by tag (`""` without a tag).
    """

    per_tag: dict[str, Estimate]
    sample_mean: Estimate
    tag_mean: Estimate | None
    missing: tuple[str, ...]
    unscored: dict[str, int]

    @property
    def accuracy(self) -> dict[str, float]:
        """Accuracy by tag, in [0, 1], as [`modality_gap`] takes it."""
        return {tag: estimate.value for tag, estimate in self.per_tag.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Scored questions by tag, as [`modality_gap`] takes them."""
        return {tag: estimate.count for tag, estimate in self.per_tag.items()}


def tag_accuracies(
    scores: Sequence[float | None] | NDArray[np.float64],
    tags: Sequence[str | None],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable | None] | None = None,
) -> TagAccuracies:
    """
    Compute accuracy per tag, over all questions (sample-weighted) and as the plain mean over tags, with intervals.

    The means over several tags are stratified by tag; a clip that has questions of several tags is left out of all of them
    at once. For pass@k give [`pass_at_k`] of each question as scores.

    Args:
        scores: of shape (N,), in [0, 1]: whether the answer is right, the share of right samples, or a judge's score.
            None or NaN for a question that could not be scored, e.g. since its media are broken: it is counted and
            left out.
        tags: the tag of each question in any spelling, None or `""` without one.
        confidence, resamples, seed, clusters: as in [`bootstrap_mean`].

    Raises:
        UndefinedMetricError: without a question, or when none could be scored.
        ValueError: for a score outside [0, 1] or an unknown tag, with its row, or for lists of different lengths.
    """
    values = np.asarray(scores, dtype=np.float64)
    labels = parse_tags(tags)
    if len(values) != len(labels):
        raise ValueError(f"There are {len(values)} scores, but {len(labels)} tags")
    known = ~np.isnan(values)
    if not known.any():
        raise UndefinedMetricError(f"None of {len(values)} questions has a score; an accuracy is undefined")
    bad = np.flatnonzero(known & ~((values >= 0) & (values <= 1)))
    if len(bad):
        raise ValueError(f"scores: row {bad[0]} is {values[bad[0]]}; a score must be a fraction in [0, 1]")
    scored = [label for label, is_known in zip(labels, known, strict=True) if is_known]
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    clips = _kept(clusters, known) if named(clusters, len(values)) else None
    per_tag = {
        str(tag): bootstrap_mean(
            values[known & mask],
            [tag] * int((known & mask).sum()),
            **options,
            clusters=None if clips is None else _kept(clips, mask[known]),
        )
        for tag, mask in _masks(labels).items()
        if (known & mask).any()
    }
    unscored = Counter(label for label, is_known in zip(labels, known, strict=True) if not is_known)
    return TagAccuracies(
        per_tag=per_tag,
        sample_mean=bootstrap_mean(values[known], scored, **options, clusters=clips),
        tag_mean=_tag_mean(per_tag, values[known], scored, options, clips),
        missing=tuple(str(tag) for tag in ModalityTag if tag not in per_tag),
        unscored={str(label): unscored[label] for label in ("", *ModalityTag) if label in unscored},
    )


def _tag_mean(
    per_tag: Mapping[str, Estimate],
    scores: NDArray[np.float64],
    tags: Sequence[str],
    options: Mapping[str, Any],
    clips: Sequence[Hashable | None] | None,
) -> Estimate | None:
    if not per_tag:
        return None
    value = sum(estimate.value for estimate in per_tag.values()) / len(per_tag)
    count = sum(estimate.count for estimate in per_tag.values())
    tagged = np.array([tag != "" for tag in tags])
    if clips is not None and named(_kept(clips, tagged), count):
        sums = sum_by_clip(scores[tagged], _kept(clips, tagged), _kept(tags, tagged))
        ends = clip_interval(value, sums.left_out().mean(axis=1), sums.macro_weights(), options["confidence"], True)
        return Estimate(value, *ends, count, sums.clips)
    draws = resampled_means(scores, tags, options["resamples"], options["seed"])
    low, high = percentile_interval(np.mean([draws[tag] for tag in per_tag], axis=0), options["confidence"])
    if all(estimate.count == 1 for estimate in per_tag.values()):
        low = high = math.nan
    return Estimate(value, low, high, count)


def _kept(values: Sequence[Any], mask: NDArray[np.bool_]) -> list[Any]:
    return [value for value, is_kept in zip(values, mask, strict=True) if is_kept]


def superset_scores(
    scores: ArrayLike, questions: Sequence[Hashable], tags: Sequence[str], inputs: Sequence[str]
) -> dict[Hashable, list[float]]:
    """
    Collect scores with the inputs that contain a question's tag, exactly or with more (MAPLE, arXiv 2602.11596, 3.3).

    The mean of a question's list is the first stage of MAPLE's two; the plain mean over tags of these means
    ([`tag_accuracies`]`.tag_mean`) is the second, `superset_macro`.

    Args:
        scores: of shape (N,), one per question and input.
        questions: the name of the question of each score.
        tags: the modalities that it requires, the same for all scores of a question.
        inputs: those that it was given. Several scores with one input count as their mean.

    Returns:
        By question one score for each such input; an empty list where there is none.

    Raises:
        ValueError: for a score that is not finite, an unknown tag or input, or two tags of one question, with the row.
    """
    values, required, given = checked_scores(scores), parse_tags(tags), parse_tags(inputs)
    found: dict[Hashable, dict[str, list[float]]] = {}
    tag_of: dict[Hashable, str] = {}
    for row, (value, name, tag, fed) in enumerate(zip(values, questions, required, given, strict=True)):
        if not tag or tag_of.setdefault(name, tag) != tag:
            raise ValueError(
                f"tags: row {row}: question {name!r} must have one tag, got '{tag_of.get(name, '')}' and '{tag}'"
            )
        by_input = found.setdefault(name, {})
        if set(fed) >= set(tag):
            by_input.setdefault(fed, []).append(float(value))
    return {name: [math.fsum(own) / len(own) for own in by_input.values()] for name, by_input in found.items()}


def fused_samples(scores: Mapping[str, ArrayLike]) -> NDArray[np.bool_]:
    """
    Mark the samples that do better with several modalities than with the best one (MAPLE, arXiv 2602.11596, C.3).

    That is `max(J(VA), J(VS), J(AS), J(VAS)) > max(J(V), J(A), J(S))`; scores that differ by less than 1e-9 are equal.

    Args:
        scores: for each of the seven tags, in any spelling, the scores, of shape (N,), of the same N samples when they
            are given these modalities.

    Returns:
        Of shape (N,).

    Raises:
        UndefinedMetricError: without a sample, or when a tag is missing; the message names it.
        ValueError: for a score that is not finite (with tag and row), or tags with different numbers of samples.
    """
    by_tag = parse_keys(scores, "scores")
    missing = [str(tag) for tag in ModalityTag if tag not in by_tag]
    if missing:
        raise UndefinedMetricError(f"The fusion gain needs scores under all seven tags; missing: {', '.join(missing)}")
    columns = {tag: checked_scores(by_tag[tag], f"scores of {tag}") for tag in ModalityTag}
    lengths = {str(tag): len(column) for tag, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The fusion gain needs the same samples under every tag, got as many as {lengths}")
    alone: NDArray[np.float64] = np.max([columns[tag] for tag in ModalityTag if tag.arity == "uni"], axis=0)
    together: NDArray[np.float64] = np.max([columns[tag] for tag in ModalityTag if tag.arity != "uni"], axis=0)
    return together > alone + TIE


def fusion_gain(scores: Mapping[str, ArrayLike]) -> float:
    """
    Return the share of samples that do better with several modalities than with the best (MAPLE, C.3).

    For its interval give [`fused_samples`] to [`bootstrap_mean`].

    Args:
        scores: arrays of shape (N,) by tag, as in [`fused_samples`], whose errors apply.
    """
    return float(fused_samples(scores).mean())


@dataclass(frozen=True)
class TrainingEfficiency:
    """
    Mean time of an optimizer step.

    Attributes:
        seconds_per_step: mean wall-clock time of an optimizer step.
        seconds_per_sample: the same divided by the batch size.
        steps: how many steps stand behind it.
    """

    seconds_per_step: float
    seconds_per_sample: float
    steps: int


def training_efficiency(step_seconds: Sequence[float], batch_size: int) -> TrainingEfficiency:
    """
    Measure the time of an optimizer step, normalized by the batch size (MAPLE, arXiv 2602.11596, 3.3).

    Args:
        step_seconds: the time of each optimizer step, in seconds. Leave out the steps that warm up or evaluate.
        batch_size: what a step processes, over all processes; runs are comparable when both count prompts, or both
            count completions.

    Raises:
        UndefinedMetricError: without a step.
        ValueError: for a time that is not positive and finite, with its row, or a batch size below 1.
    """
    seconds = checked_scores(step_seconds, "step_seconds")
    if (seconds <= 0).any():
        row = int(np.flatnonzero(seconds <= 0)[0])
        raise ValueError(f"step_seconds: row {row} is {seconds[row]}; a step takes more than 0 seconds")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    mean = float(seconds.mean())
    return TrainingEfficiency(mean, mean / batch_size, len(seconds))


def parse_tags(tags: Sequence[str | None]) -> list[str]:
    """
    Parse tags, `""` for None and `""`.

    Raises:
        ValueError: for an unknown tag, with its row.
    """
    known: dict[str | None, str] = {None: "", "": ""}
    for row, tag in enumerate(tags):
        if tag is not None and tag not in known:
            try:
                known[tag] = ModalityTag.parse(tag)
            except ValueError as error:
                raise ValueError(f"tags: row {row}: {error}") from None
    return [known[tag] for tag in tags]


def parse_keys(values: Mapping[str, Value], name: str) -> dict[ModalityTag, Value]:
    """
    Return values by tag, without the key `all` (the mean over all questions, as accuracies carry it).

    Raises:
        ValueError: for a key that is no tag, or two spellings of one tag.
    """
    by_tag: dict[ModalityTag, Value] = {}
    for key, value in values.items():
        if key == "all":
            continue
        tag = ModalityTag.parse(key)
        if tag in by_tag:
            raise ValueError(f"{name} hold the tag {tag} twice, in two spellings")
        by_tag[tag] = value
    return by_tag


def _masks(labels: Sequence[str]) -> dict[ModalityTag, NDArray[np.bool_]]:
    names = np.array([str(label) for label in labels])
    return {tag: names == tag.value for tag in ModalityTag}
