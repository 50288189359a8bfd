"""Completions of one clip under its several tags, as a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from maple_trl.metrics.intervals import UndefinedMetricError
from maple_trl.metrics.spread import ClipSpread, clip_spread
from maple_trl.reports.embeddings import Embedder, Sample, vectors_of
from maple_trl.reports.folders import RunData
from maple_trl.reports.rollouts import Rollouts, clip_names
from maple_trl.reports.sections import Section, missing, no_rollouts
from maple_trl.reports.series import TAGS, rounded


T = TypeVar("T")

CLIPS = 100
"""Clips whose distances are counted, at most."""
PER_TAG = 4
"""Completions of a clip's tag that are compared, at most."""
BINS = 40
DRAWN_CLIPS = 8
"""Clips that a t-SNE shows, at most: more numbers could not be read."""


def lines_by_clip(run: RunData, rollouts: Rollouts | None) -> dict[str, dict[str, list[int]]]:
    """
    Return the lines of each clip by tag, of clips with two tags or more.

    Of a training run they are those of the newest step at which the tag of the clip was sampled; of an evaluation those
    of all accesses, and the tag is what was fed.
    """
    if rollouts is None or not len(rollouts):
        return {}
    tags = rollouts.get("fed" if run.kind == "evaluation" and "fed" in rollouts.columns else "tag")
    found: dict[str, dict[str, list[int]]] = {}
    columns = zip(clip_names(rollouts), tags, rollouts.get("replayed"), strict=True)
    for line, (clip, tag, replayed) in enumerate(columns):
        if clip and tag in TAGS and not replayed:
            found.setdefault(clip, {}).setdefault(tag, []).append(line)
    steps = rollouts.get("step")
    for own in found.values():
        for tag, lines in own.items():
            newest = max((steps[line] for line in lines if steps[line] is not None), default=None)
            own[tag] = [line for line in lines if steps[line] == newest]
    return {clip: own for clip, own in found.items() if len(own) > 1}


def sample_by_clip(rollouts: Rollouts | None, groups: dict[str, dict[str, list[int]]], per_tag: int) -> Sample:
    """Take the first completions of each tag of each clip."""
    picked = [(line, clip, tag) for clip, own in groups.items() for tag in own for line in own[tag][:per_tag]]
    texts = [] if rollouts is None else rollouts.get("completion")
    return Sample([tag for _, _, tag in picked], [clip for _, clip, _ in picked], [texts[i] or "" for i, *_ in picked])


def evenly(items: Sequence[T], most: int) -> list[T]:
    """Take at most so many, evenly."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).astype(int))] if items else []


def distance_sections(
    runs: Sequence[RunData], rollouts: Sequence[Rollouts | None], embedder: Embedder
) -> list[Section]:
    """
    Return, of each run, the histogram of cosine distances between completions of one clip under different tags.

    The bins are the same for all runs (MAPLE, arXiv 2602.11596, Fig. 6), and so are the vectors that the projection is
    made of. `dispersion` and `separation` are those of [`~maple_trl.metrics.spread.clip_spread`].
    """
    samples = []
    for run, found in zip(runs, rollouts, strict=True):
        groups = lines_by_clip(run, found)
        samples.append(sample_by_clip(found, {clip: groups[clip] for clip in evenly(list(groups), CLIPS)}, PER_TAG))
    samples, method, why = vectors_of(runs, samples, embedder)
    if why:
        return [missing(why) for _ in runs]
    spreads = [_spread(sample) for sample in samples]
    largest = max((float(s.distances.max()) for s in spreads if isinstance(s, ClipSpread)), default=0.0)
    edges = np.linspace(0, max(np.ceil(largest * 20) / 20, 0.05), BINS + 1)
    return [_section(*parts, edges, method) for parts in zip(runs, rollouts, samples, spreads, strict=True)]


def _spread(sample: Sample) -> ClipSpread | str:
    if not len(sample.tags):
        return "no clip"
    try:
        return clip_spread(*sample.with_directions())
    except UndefinedMetricError as error:
        return str(error)


def _section(
    run: RunData,
    rollouts: Rollouts | None,
    sample: Sample,
    spread: ClipSpread | str,
    edges: NDArray[np.float64],
    method: str,
) -> Section:
    if isinstance(spread, str):
        if (rollouts is None or not len(rollouts)) and not len(sample.tags):
            return no_rollouts(run)
        return missing(
            "No clip has completions of two tags: rows of one clip with several tags (or an evaluation with several "
            "--access) are needed; a column `clip` says which rows share one."
        )
    counts = np.histogram(spread.distances, bins=edges)[0]
    found: dict[str, Any] = {
        "method": method,
        "edges": rounded(edges),
        "share": rounded(counts / counts.sum()),
        "pairs": len(spread.distances),
        "clips": spread.clips,
        "mean": float(spread.distances.mean()),
        "median": float(np.median(spread.distances)),
        "dispersion": spread.dispersion,
    }
    return found | {"separation": None if np.isnan(spread.separation) else spread.separation}
