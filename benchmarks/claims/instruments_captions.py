"""What is watched of runs whose answers are captions: what the policy says of a clip under each of the seven inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tasks import captions, prepared

from maple_trl.metrics.clip_intervals import standard_error
from maple_trl.metrics.intervals import UndefinedMetricError
from maple_trl.metrics.spread import clip_spread, embedding_spread
from maple_trl.modalities import ModalityTag


SAMPLES = 4
"""Captions of each input of a held-out clip."""
PARTS = 36
"""What scores are kept in parts of: the judge knows no smaller one."""
BINS = 20
TAGS = [tag.value for tag in ModalityTag]


class Captions:
    """Captions of all held-out clips after training, each from the signals of its row's tag, whatever the run trains with."""

    def __init__(self, trainer: Any, measure: Callable, cost: Any):
        self._trainer = trainer

    def result(self) -> dict[str, Any]:
        rows = sorted(captions.held_out(prepared("captions")), key=lambda row: (row["clip"], TAGS.index(row["tag"])))
        found = summary(rows, ask(self._trainer, rows, SAMPLES), SAMPLES)
        return found | {"contrast": contrast(self._trainer.state.log_history)}


def contrast(log: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return means over training of what contrastive weighting logs of all tags; nothing of a run without it."""
    found: dict[str, list[float]] = {}
    for entry in log:
        for name, value in entry.items():
            if name.startswith("tag/all/") and name.endswith(("_crw/similarity", "_crw/bonus_share")):
                found.setdefault(name.rsplit("/", 1)[1], []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def ask(trainer: Any, rows: Sequence[dict[str, Any]], samples: int) -> list[str]:
    """Return captions of rows, each from the signals of its tag, several times in a row; the run's randomness is left as it was."""
    import torch

    builder = trainer.prompt_builder
    usual = builder.modality_access
    builder.modality_access = "required"
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return trainer.generate_completions([dict(row) for row in rows for _ in range(samples)])
    finally:
        builder.modality_access = usual


def summary(rows: Sequence[dict[str, Any]], texts: Sequence[str], samples: int) -> dict[str, Any]:
    """
    Return what captions of whole clips come to.

    Args:
        rows: clip after clip, seven rows each in canonical order of the tags.
        texts: `samples` captions of each row.

    Returns:
        `judge` by tag and over all (`errors`: standard errors over clips), `axes` by tag; `scores`, of each clip and tag those
        of its captions, in parts of `PARTS`; and what [`spread`] tells.
    """
    if [row["tag"] for row in rows] != TAGS * (len(rows) // len(TAGS)) or len(texts) != samples * len(rows):
        raise ValueError(
            "captions of whole clips are needed: seven rows of each in canonical order, and all their texts"
        )
    references = [row["reference"] for row in rows for _ in range(samples)]
    found = np.array([captions.axes(*pair) for pair in zip(texts, references, strict=True)])
    axes = found.reshape(-1, len(TAGS), samples, 3)
    scores = axes.mean(axis=3)
    means = scores.mean(axis=2)
    clips = list(range(len(means)))
    return {
        "clips": len(clips),
        "samples": samples,
        "judge": {tag: float(means[:, i].mean()) for i, tag in enumerate(TAGS)} | {"all": float(means.mean())},
        "errors": {tag: standard_error(means[:, i].tolist(), clips) for i, tag in enumerate(TAGS)}
        | {"all": standard_error(means.mean(axis=1).tolist(), clips)},
        "axes": {tag: axes[:, i].mean(axis=(0, 1)).tolist() for i, tag in enumerate(TAGS)},
        "scores": np.rint(scores * PARTS).astype(int).tolist(),
        **spread(
            texts,
            [row["clip"] for row in rows for _ in range(samples)],
            [row["tag"] for row in rows for _ in range(samples)],
        ),
    }


def spread(texts: Sequence[str], clips: Sequence[str], tags: Sequence[str]) -> dict[str, Any]:
    """
    Return how far captions are from each other: cosine distances of the words that they hold.

    Args:
        texts, clips, tags: of each caption. Those without a word have no direction and are left out (`silent`).

    Returns:
        `dispersion` within tags and `separation` between tags ([`embedding_spread`]); `clip_dispersion`, of one clip's captions
        under different inputs, `clip_separation` of two clips' ([`clip_spread`]), and `distances`, the histogram of the first
        over [0, 1]; all `None` where hardly a caption holds a word.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    vectors = HashingVectorizer(n_features=4096, token_pattern=r"\w+", alternate_sign=False, binary=True).transform(
        texts
    )
    kept = np.flatnonzero(vectors.getnnz(axis=1))
    own = vectors[kept].toarray()
    names = ("dispersion", "separation", "clip_dispersion", "clip_separation", "distances")
    silent = len(texts) - len(kept)
    try:
        by_tag = embedding_spread(own, [tags[i] for i in kept])
        by_clip = clip_spread(own, [clips[i] for i in kept], [tags[i] for i in kept])
    except UndefinedMetricError:
        return {"silent": silent, **dict.fromkeys(names)}
    counts = np.histogram(by_clip.distances, bins=BINS, range=(0, 1))[0]
    values = (by_tag.dispersion, by_tag.separation, by_clip.dispersion, by_clip.separation)
    known = [None if np.isnan(value) else float(value) for value in values]
    return {"silent": silent, **dict(zip(names, [*known, (counts / counts.sum()).round(5).tolist()], strict=True))}
