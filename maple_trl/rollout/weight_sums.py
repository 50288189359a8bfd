"""Proof that an engine has the weights that are trained: sums that survive how it splits, fuses and orders them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


WeightSums = dict[str, list[float] | None]
"""
The sum of the weights and that of their squares, of the vectors and of the matrices of each part of a model; `None` where an
engine keeps them in a form of its own.
"""

_BLOCK = 1 << 24
_PARTS = (("audio tower", r"audio_tower"), ("video tower", r"visual"), ("head", r"lm_head"), ("language model", ""))


class WeightSummer:
    """Adds up weights by the part of the model that they belong to, as they are passed on."""

    def __init__(self) -> None:
        self.sums: WeightSums = {}

    @torch.no_grad()
    def add(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
        """Add a weight, rounded to what the engine holds."""
        part = next(part for part, pattern in _PARTS if re.search(pattern, name))
        if not value.numel():  # vLLM repacks the matrices of linear layers for a CPU
            self.sums[f"{part}, matrices"] = None
            return
        key = f"{part}, {'vectors' if value.dim() == 1 else 'matrices'}"
        before = self.sums.setdefault(key, [0.0, 0.0])
        if before is not None:
            added = torch.zeros(2, dtype=torch.float64, device=value.device)
            for block in value.detach().flatten().split(_BLOCK):  # in double precision, a large one would not fit
                exact = block.to(dtype or value.dtype).double()
                added += torch.stack([exact.sum(), exact.square().sum()])
            self.sums[key] = [one + other for one, other in zip(before, added.tolist(), strict=True)]


def sum_weights(weights: Iterable[tuple[str, Tensor]]) -> WeightSums:
    """Add up weights by the part of the model that they belong to."""
    summer = WeightSummer()
    for name, value in weights:
        summer.add(name, value)
    return summer.sums


def compare_sums(trained: Mapping[str, list[float] | None], found: Mapping[str, list[float] | None]) -> list[str]:
    """Name what differs between a trainer and its engine, of what the engine can tell."""
    different = []
    for key, sums in trained.items():
        there = found.get(key, [math.nan, math.nan])
        if sums is None or there is None:
            continue
        # What the order of a sum can change, and by far less than a step of training does.
        close = 1e-9 * math.sqrt(sums[1] or 1.0) + 1e-12 * abs(sums[0])
        if not (abs(there[0] - sums[0]) <= close and math.isclose(there[1], sums[1], rel_tol=1e-9)):
            different.append(key)
    return different
