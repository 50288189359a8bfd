"""Splits by clip: no clip stands in two, and each stratum (a tag, say) has its share in both."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def clips_for_test(clips: Sequence[str], strata: Sequence[Hashable], share: float, seed: int = 0) -> frozenset[str]:
    """
    Choose the clips of the test split.

    Clips are taken one by one, each time the one that brings the strata nearest to their shares, until none does. The
    choice follows from rows and seed alone, and not from the order of the rows.

    Args:
        clips (`Sequence[str]`): clip of each row.
        strata (`Sequence[Hashable]`): stratum of each row.
        share (`float`): of each stratum's rows that the test split should have, in [0, 1].
        seed (`int`, *optional*, defaults to 0): decides between clips that serve equally well.

    Returns:
        `frozenset[str]`: at least one clip where there are two and `share` is not 0, and never all of them.
    """
    if len(clips) != len(strata):
        raise ValueError(f"each row has a clip and a stratum, got {len(clips)} clips and {len(strata)} strata")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    names = sorted(set(clips), key=lambda clip: _draw(seed, clip))
    if share == 0 or len(names) < 2:
        return frozenset()
    kinds = {stratum: number for number, stratum in enumerate(sorted(set(strata), key=repr))}
    places = {clip: number for number, clip in enumerate(names)}
    counts_CK = np.zeros((len(names), len(kinds)))
    for clip, stratum in zip(clips, strata, strict=True):
        counts_CK[places[clip], kinds[stratum]] += 1
    return frozenset(names[number] for number in _nearest(counts_CK, share))


def _nearest(counts_CK: np.ndarray, share: float) -> list[int]:
    """Return the numbers of clips whose rows come nearest to a share of each stratum, taken greedily."""
    total_K = counts_CK.sum(0)
    weight_K = 1 / np.maximum(total_K, 1)  # strata count alike, however large
    left_K, chosen = share * total_K, []
    free_C = np.ones(len(counts_CK), bool)
    while free_C.sum() > 1:
        far_C = (np.abs(left_K - counts_CK) * weight_K).sum(1)
        far_C[~free_C] = np.inf
        best = int(far_C.argmin())
        if chosen and far_C[best] >= (np.abs(left_K) * weight_K).sum() - 1e-12:
            break
        chosen.append(best)
        free_C[best] = False
        left_K = left_K - counts_CK[best]
    return chosen


def balanced(names: Sequence[str], strata: Sequence[Hashable], seed: int = 0) -> list[bool]:
    """
    Choose rows so that each stratum has as many as the smallest.

    Args:
        names (`Sequence[str]`): of the rows, each once.
        strata (`Sequence[Hashable]`): of the rows.
        seed (`int`, *optional*, defaults to 0): decides which rows stay.

    Returns:
        `list[bool]`: whether each row stays.
    """
    least = min(Counter(strata).values(), default=0)
    taken: Counter = Counter()
    kept = set()
    for name, stratum in sorted(zip(names, strata, strict=True), key=lambda pair: _draw(seed, pair[0])):
        taken[stratum] += 1
        if taken[stratum] <= least:
            kept.add(name)
    return [name in kept for name in names]


def _draw(seed: int, name: str) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest(), name
