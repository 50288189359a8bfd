"""What is watched of runs whose answers are captions: how far they are from each other, by what was fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tasks import captions, prepared

from maple_trl.metrics.intervals import UndefinedMetricError
from maple_trl.metrics.spread import clip_spread, embedding_spread


SAMPLES = 1
"""Captions of each of the seven inputs of a held-out clip."""
BINS = 20


class Captions:
    """Captions of all held-out clips after training, each from the signals of its row's tag, whatever the run trains with."""

    ASKS = True
    VERSION = 1

    def __init__(self, trainer: Any, measure: Callable, cost: Any):
        self._trainer = trainer

    def result(self) -> dict[str, Any]:
        rows = list(captions.held_out(prepared("captions")))
        texts = ask(self._trainer, rows, SAMPLES)
        asked = [row for row in rows for _ in range(SAMPLES)]
        return {
            "axes": axes_by_tag(texts, asked),
            "contrast": contrast(self._trainer.state.log_history),
            **spread(texts, [row["clip"] for row in asked], [row["tag"] for row in asked]),
        }


def axes_by_tag(texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the mean of each axis of the judge (missing, errors, fusion) by tag."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for text, row in zip(texts, rows, strict=True):
        found.setdefault(row["tag"], []).append(captions.axes(text, row["reference"]))
    return {tag: np.mean(values, axis=0).tolist() for tag, values in found.items()}


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


INSTRUMENTS: dict[str, type] = {"captions": Captions}
"""By the names that runs ask for them by."""
