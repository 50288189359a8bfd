"""Agreement between two reviewers beyond chance: Cohen's kappa (J. Cohen, 1960)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def cohen_kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float | None:
    """
    Compute Cohen's kappa of two judges over the same items, `(p - e) / (1 - e)`.

    `p` is the share of items on which they agree, `e` the share on which they would by chance, were each to give its own
    labels at random.

    Args:
        one, other: the label that each judge gives to each item, in the same order.

    Returns:
        `float` in [-1, 1]; `None` where it is not defined: without items, or where both give one and the same label.
    """
    if len(one) != len(other):
        raise ValueError(f"the judges have {len(one)} and {len(other)} items")
    items = len(one)
    counts, others = Counter(one), Counter(other)
    by_chance = sum(counts[label] * others[label] for label in counts)  # of items², exact
    if by_chance == items * items:
        return None
    agreed = sum(a == b for a, b in zip(one, other, strict=True))
    return (agreed * items - by_chance) / (items * items - by_chance)
