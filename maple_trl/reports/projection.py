"""Completions of all runs as points of a plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maple_trl.files import as_json
from maple_trl.metrics.intervals import UndefinedMetricError
from maple_trl.metrics.spread import embedding_spread
from maple_trl.reports.clip_groups import DRAWN_CLIPS, evenly, lines_by_clip, sample_by_clip
from maple_trl.reports.embeddings import Embedder, Sample, vectors_of
from maple_trl.reports.folders import RunData
from maple_trl.reports.rollouts import Rollouts, clip_names
from maple_trl.reports.sections import lines_by_phase, lines_by_tag, missing
from maple_trl.reports.series import rounded


PROJECTIONS = ("pca", "tsne")
PER_TAG = 150
"""Completions of a tag that are drawn, at most."""
_FEWEST = {"pca": 3, "tsne": 4}  # points


def project(
    runs: Sequence[RunData],
    rollouts: Sequence[Rollouts | None],
    embedder: Embedder,
    kind: str = "pca",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    Return completions of all runs in one plane, so that points can be compared.

    Args:
        embedder: what describes them; see [`~maple_trl.reports.embeddings.vectors_of`].
        kind: `"pca"`: the first two principal components. `"tsne"`: t-SNE by cosine distance (MAPLE, arXiv 2602.11596,
            Fig. 16), of at most 8 clips with several tags, a completion of each tag, numbered by clip; where there are
            no such clips, of the same completions as `"pca"`.
        seed: of the t-SNE.

    Returns:
        for each run `x`, `y`, `tag`, `text` and `clip` (a number, see `clips`) of the points, `method`, `explained`
        (shares of the variance; `None` of a t-SNE) and the mean cosine distances of
        [`~maple_trl.metrics.spread.embedding_spread`]; `{"missing": why}` where nothing is there.

    Raises:
        ImportError: for a t-SNE without scikit-learn, naming the extra that brings it.
    """
    samples, told = _samples(runs, rollouts, by_clip=kind == "tsne")
    samples, method, why = vectors_of(runs, samples, embedder)
    if why:
        return [missing(why) for _ in runs]
    if not method.startswith("vectors of"):
        method = f"{method}. {told}"
    elif kind == "tsne":
        samples = _of_few_clips(samples)
    counts = [len(sample.tags) for sample in samples]
    if sum(counts) < _FEWEST[kind]:
        few = {3: "three", 4: "four"}[_FEWEST[kind]]
        return [missing(f"There are fewer than {few} completions with a tag to draw.") for _ in runs]
    vectors = np.concatenate([sample.vectors for sample in samples if len(sample.tags)])
    explained: NDArray[np.float64] | None = None
    if kind == "pca":
        points, explained = principal_components(vectors)
    elif len(np.unique(vectors, axis=0)) < 3:
        return [missing("A t-SNE needs three completions that differ.") for _ in runs]
    else:
        points = neighbour_map(vectors, seed)
    names = list(dict.fromkeys(clip for sample in samples for clip in sample.clips if clip)) if kind == "tsne" else []
    parts = np.split(points, np.cumsum(counts)[:-1])
    shared = {"kind": kind, "method": method, "clips": names}
    shared |= {"explained": None if explained is None else rounded(explained, 3)}
    return [
        _section(sample, part, names) | shared if len(part) else _NONE
        for sample, part in zip(samples, parts, strict=True)
    ]


_NONE = missing("The run has no completion with a tag.")


def _section(sample: Sample, points: NDArray[np.float64], clips: list[str]) -> dict[str, Any]:
    return {
        "x": rounded(points[:, 0], 4),
        "y": rounded(points[:, 1], 4),
        "tag": sample.tags,
        "text": [text[:160] for text in sample.texts],
        "clip": [clips.index(clip) + 1 if clip in clips else None for clip in sample.clips],
        "spread": _spread(sample),
    }


def _samples(runs: Sequence[RunData], rollouts: Sequence[Rollouts | None], by_clip: bool) -> tuple[list[Sample], str]:
    """Return what is drawn of each run, and the sentences that say so."""
    if by_clip:
        groups = [lines_by_clip(run, found) for run, found in zip(runs, rollouts, strict=True)]
        names = _drawn_clips([{clip: len(own) for clip, own in found.items()} for found in groups])
        if any(names):
            picked = [{clip: found[clip] for clip in own} for found, own in zip(groups, names, strict=True)]
            samples = [sample_by_clip(found, own, 1) for found, own in zip(rollouts, picked, strict=True)]
            return samples, f"At most {DRAWN_CLIPS} clips, of each the newest completion of each tag"
    told = (
        f"At most {PER_TAG} completions a tag; of a training run, of the last fifth of the tag's steps; of an "
        "evaluation, of its first access"
    )
    if by_clip:
        told += ". No clip has completions of several tags, so that points have no numbers"
    return [_sample(run, found) for run, found in zip(runs, rollouts, strict=True)], told


def _drawn_clips(tags: Sequence[dict[str, int]]) -> list[list[str]]:
    """Choose the clips that all runs have, those with the most tags first; of runs that share none, each its own."""
    shared = [clip for clip in tags[0] if all(clip in other for other in tags)]
    pools = [shared or list(own) for own in tags]
    ranked = [
        sorted(pool, key=lambda clip: (-sum(other.get(clip, 0) for other in tags), clip))[:DRAWN_CLIPS]
        for pool in pools
    ]
    return [sorted(own) for own in ranked]


def _of_few_clips(samples: Sequence[Sample]) -> list[Sample]:
    """Keep one completion of each tag of a few clips, where the vectors of a file name clips with several tags."""
    tags = []
    for sample in samples:
        found: dict[str, set[str]] = {}
        for clip, tag in zip(sample.clips, sample.tags, strict=True):
            if clip:
                found.setdefault(clip, set()).add(tag)
        tags.append({clip: len(own) for clip, own in found.items() if len(own) > 1})
    if not any(tags):
        return list(samples)
    kept = []
    for sample, names in zip(samples, _drawn_clips(tags), strict=True):
        first: dict[tuple[str | None, str], int] = {}
        for i, form in enumerate(zip(sample.clips, sample.tags, strict=True)):
            if form[0] in names:
                first.setdefault(form, i)
        kept.append(sample.take(list(first.values())))
    return kept


def _sample(run: RunData, rollouts: Rollouts | None) -> Sample:
    """Return completions to draw: of the last fifth of a tag's steps, or of an evaluation's first access."""
    if rollouts is None or not len(rollouts):
        return Sample([], [], [])
    picked = []
    for lines in lines_by_tag(rollouts).values():
        *_, lines = lines_by_phase(run, rollouts, lines).values()
        picked += evenly(lines, PER_TAG)
    columns = (rollouts.get("tag"), clip_names(rollouts), [text or "" for text in rollouts.get("completion")])
    return Sample(*columns).take(picked)


def neighbour_map(vectors: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """
    Return a t-SNE of vectors by cosine distance, of shape (N, 2); the same for the same vectors and seed.

    Args:
        vectors: of shape (N, D), four or more.

    Raises:
        ImportError: without scikit-learn, naming the extra that brings it.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            f'--projection tsne needs scikit-learn ({error}): pip install "maple-trl[report]"'
        ) from error
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    found = TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=seed).fit_transform(vectors)
    return np.asarray(found, dtype=np.float64)


def principal_components(vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Return the two directions in which vectors vary most.

    Args:
        vectors: of shape (N, D).

    Returns:
        the coordinates, of shape (N, 2), and the share of the variance that each explains. Of each direction the sign
        is that which makes its largest component positive, so that the same vectors always give the same picture.
    """
    centred = vectors - vectors.mean(axis=0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    directions = directions[:, ::-1][:, :2]
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, np.arange(directions.shape[1])])
    points = np.zeros((len(vectors), 2))
    points[:, : directions.shape[1]] = centred @ directions
    total = values.clip(min=0).sum()
    explained = np.zeros(2)
    explained[: directions.shape[1]] = values[::-1][:2].clip(min=0) / total if total > 0 else 0
    return points, explained


def _spread(sample: Sample) -> dict[str, Any]:
    try:
        found = embedding_spread(sample.vectors, sample.tags)
    except UndefinedMetricError as error:
        return {"undefined": str(error)}
    return as_json({"dispersion": found.dispersion, "separation": found.separation})
