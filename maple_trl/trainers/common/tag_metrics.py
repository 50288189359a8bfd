"""Means per tag, over all ranks and over all rows between two log entries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from maple_trl.modalities import ModalityTag


TAGS = list(ModalityTag)
UNTAGGED = len(TAGS)
"""The number of rows without a tag, which count among `all` alone."""

Totals = Mapping[str, tuple[float, float]]
"""Sum and number of the values behind each metric."""


@cache
def tag_number(tag: str | None) -> int:
    """Return the number by which tensors hold a tag."""
    return TAGS.index(ModalityTag.parse(tag)) if tag else UNTAGGED


def totals_by_tag(name: str, values_N: Tensor, tags_N: Tensor) -> Totals:
    """
    Sum up values as `tag/<TAG>/<name>` for each tag that has one, and as `tag/all/<name>`.

    Args:
        values_N (`Tensor` of shape (N,)): NaN values are left out.
        tags_N (`Tensor` of shape (N,)): tags as numbers.
    """
    sums = TagSums([name], values_N.device)
    counted = ~values_N.isnan()
    sums.add(tags_N[counted], {name: values_N[counted]}, torch.ones_like(values_N[counted]))
    return sums.totals()


class TagSums:
    """
    Sums of quantities and of the tokens (or rows) that they were measured on, per tag.

    Args:
        names: quantities, the same on every rank.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        self._sums = torch.zeros(len(self.names) + 1, UNTAGGED + 1, dtype=torch.float64, device=device)

    def add(self, tags_N: Tensor, sums_N: Mapping[str, Tensor], counts_N: Tensor) -> None:
        """
        Add rows to the sums of their tags.

        Args:
            tags_N (`Tensor` of shape (N,)): tags as numbers.
            sums_N: for each name, the sum over a row's tokens, shape (N,).
            counts_N (`Tensor` of shape (N,)): each row's tokens.
        """
        rows = torch.stack([*(sums_N[name] for name in self.names), counts_N]).detach().to(self._sums)
        self._sums.index_add_(1, tags_N.to(self._sums.device), rows)

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up the sums of all ranks; a collective call."""
        self._sums = reduce(self._sums)

    def tags(self) -> list[ModalityTag]:
        """List the tags of the rows that were added."""
        return [tag for tag, count in zip(TAGS, self._sums[-1].tolist(), strict=False) if count]

    def totals(self) -> Totals:
        """Return `tag/<TAG>/<name>` for each tag that was added, and `tag/all/<name>`."""
        *sums, counts = self._sums.tolist()
        found = {}
        for name, sum_M in zip(self.names, sums, strict=True):
            for whose, total, count in zip(("all", *TAGS), (sum(sum_M), *sum_M), (sum(counts), *counts), strict=False):
                if count:
                    found[f"tag/{whose}/{name}"] = (total, count)
        return found


class RunningMeans:
    """Means over everything that was added since they were last taken: each row or token weighs the same."""

    def __init__(self):
        self._totals: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def add(self, totals: Totals) -> None:
        """Add sums and numbers of values."""
        for name, (total, count) in totals.items():
            before, rows = self._totals[name]
            self._totals[name] = (before + total, rows + count)

    def take(self) -> dict[str, float]:
        """Return the means, and begin anew; `…_square` beside a `…_mean` gives the standard deviation as `…_std`."""
        means = {name: total / count for name, (total, count) in self._totals.items()}
        self._totals.clear()
        for name in [name for name in means if name.endswith("_square")]:
            stem = name.removesuffix("_square")
            if f"{stem}_mean" in means:  # else it is what someone calls a reward or a metric
                means[f"{stem}_std"] = max(means.pop(name) - means[f"{stem}_mean"] ** 2, 0.0) ** 0.5
        return means
