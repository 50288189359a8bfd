"""How captions spread in the space of their embeddings: within a tag or a clip, and between them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maple_trl.metrics.accuracy import parse_tags
from maple_trl.metrics.intervals import UndefinedMetricError
from maple_trl.modalities import ModalityTag


@dataclass(frozen=True, eq=False)
class EmbeddingSpread:
    """
    Mean cosine distances, in [0, 2].

    Attributes:
        dispersion: within a tag, averaged over the tags with two captions or more; NaN without one.
        separation: between two tags, averaged over all pairs of tags; NaN with a single tag.
        distances: of shape (7, 7), in canonical order of the tags: the mean over all pairs of captions, one of each
            tag; on the diagonal over the pairs of two captions of that tag. NaN where there is no pair.
        counts: captions by tag.
    """

    dispersion: float
    separation: float
    distances: NDArray[np.float64]
    counts: dict[str, int]


def embedding_spread(embeddings: ArrayLike, tags: Sequence[str]) -> EmbeddingSpread:
    """
    Measure dispersion of captions within tags and separation between tags, by cosine distance of their embeddings.

    MAPLE (arXiv 2602.11596, 5.4.2) reports both without a formula; these are mean pairwise distances, with equal
    weight for every tag and every pair of tags. Numbers of different embedding models can't be compared.

    Args:
        embeddings: of shape (N, D), one row per caption, of any length other than 0.
        tags: the tag of each caption.

    Raises:
        UndefinedMetricError: without a caption, or for an embedding of length 0, with its row.
        ValueError: for another shape, a number that is not finite, or a caption without a tag, with its row.
    """
    units, names = _checked(embeddings, tags)
    counts = np.array([(names == tag.value).sum() for tag in ModalityTag])
    # The scalar product of two sums is the sum over all pairs, so that no N x N matrix is needed.
    sums = np.stack([units[names == tag.value].sum(axis=0) for tag in ModalityTag])
    cosines = sums @ sums.T
    pairs = np.outer(counts, counts).astype(np.float64)
    # On the diagonal a caption does not pair with itself, where the cosine is 1.
    cosines[np.diag_indices(7)] -= counts
    pairs[np.diag_indices(7)] -= counts
    distances = np.full((7, 7), math.nan)
    np.divide(cosines, pairs, out=distances, where=pairs > 0)
    distances = np.maximum(1 - distances, 0)
    return EmbeddingSpread(
        dispersion=_mean_of_known(np.diag(distances)),
        separation=_mean_of_known(distances[np.triu_indices(7, 1)]),
        distances=distances,
        counts={str(tag): int(count) for tag, count in zip(ModalityTag, counts, strict=True) if count},
    )


@dataclass(frozen=True, eq=False)
class ClipSpread:
    """
    Mean cosine distances, in [0, 2], where the captions of one clip are a group.

    Attributes:
        dispersion: between captions of one clip under different tags, averaged over the clips that have such.
        separation: between captions of two clips, averaged over all pairs of clips; NaN with a single clip.
        distances: of shape (pairs,): of each pair of captions of one clip under different tags, clip after clip.
        clips: how many have captions of two tags or more.
    """

    dispersion: float
    separation: float
    distances: NDArray[np.float64]
    clips: int


def clip_spread(embeddings: ArrayLike, clips: Sequence[Hashable], tags: Sequence[str]) -> ClipSpread:
    """
    Measure how far a clip's captions are from each other, and from those of other clips, by cosine distance.

    MAPLE (arXiv 2602.11596), Fig. 6, is a histogram of the distances within a group of one clip's tags: captions
    that stay the same whatever is fed are near each other. Each clip and each pair of clips weighs the same.

    Args:
        embeddings: of shape (N, D), one row per caption, of any length other than 0.
        clips: the clip of each caption.
        tags: the tag of each caption: what was fed.

    Raises:
        UndefinedMetricError: without a clip that has captions of two tags, or for an embedding of length 0, with its row.
        ValueError: as in [`embedding_spread`], or for another number of clips.
    """
    units, names = _checked(embeddings, tags)
    if len(clips) != len(units):
        raise ValueError(f"clips must name one for each of the {len(units)} captions, got {len(clips)}")
    order = {clip: i for i, clip in enumerate(dict.fromkeys(clips))}
    numbers = np.array([order[clip] for clip in clips])
    found, means = [], []
    for number in range(len(order)):
        own = numbers == number
        first, second = np.triu_indices(int(own.sum()), 1)
        between = names[own][first] != names[own][second]
        distances = np.maximum(1 - (units[own][first[between]] * units[own][second[between]]).sum(axis=1), 0)
        found.append(distances)
        means += [distances.mean()] if len(distances) else []
    if not means:
        raise UndefinedMetricError("No clip has captions of two tags or more")
    counts = np.bincount(numbers, minlength=len(order))
    sums = np.zeros((len(order), units.shape[1]))
    np.add.at(sums, numbers, units)
    apart = (
        1 - (sums @ sums.T)[np.triu_indices(len(order), 1)] / np.outer(counts, counts)[np.triu_indices(len(order), 1)]
    )
    separation = float(np.maximum(apart, 0).mean()) if len(apart) else math.nan
    return ClipSpread(float(np.mean(means)), separation, np.concatenate(found), len(means))


def _checked(embeddings: ArrayLike, tags: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Return embeddings scaled to length 1, and the names of their tags."""
    vectors = np.asarray(embeddings, dtype=np.float64)
    labels = parse_tags(tags)
    if not len(vectors):
        raise UndefinedMetricError("The spread of no caption is undefined")
    if vectors.ndim != 2 or len(vectors) != len(labels):
        raise ValueError(f"embeddings must have shape ({len(labels)}, D), a row for each tag, got {vectors.shape}")
    if "" in labels:
        raise ValueError(f"tags: row {labels.index('')} has no tag; every caption needs one")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ValueError(f"embeddings: row {bad[0]} holds a number that is not finite")
    lengths = np.linalg.norm(vectors, axis=1)
    if not lengths.all():
        row = np.flatnonzero(lengths == 0)[0]
        raise UndefinedMetricError(f"embeddings: row {row} has length 0; its direction is undefined")
    return vectors / lengths[:, None], np.array([str(label) for label in labels])


def _mean_of_known(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
