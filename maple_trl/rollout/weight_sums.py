"""Proof that an engine has the weights that are trained: sums that survive how it splits, fuses and orders them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


WeightSums = dict[str, list[float]]
"""The sum of the weights and that of their squares, of each part of a model."""

_PARTS = (("audio", r"audio_tower"), ("video", r"visual"), ("head", r"lm_head"), ("language model", ""))


class WeightSummer:
    """Adds up weights by the part of the model that they belong to, as they are passed on."""

    def __init__(self) -> None:
        self.sums: WeightSums = {}

    @torch.no_grad()
    def add(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
        """Add a weight, rounded to what the engine holds."""
        part = next(part for part, pattern in _PARTS if re.search(pattern, name))
        exact = value.detach().to(dtype or value.dtype).double()
        total, squares = self.sums.get(part, [0.0, 0.0])
        self.sums[part] = [total + float(exact.sum()), squares + float(exact.square().sum())]


def sum_weights(weights: Iterable[tuple[str, Tensor]]) -> WeightSums:
    """Add up weights by the part of the model that they belong to."""
    summer = WeightSummer()
    for name, value in weights:
        summer.add(name, value)
    return summer.sums


def compare_sums(trained: Mapping[str, list[float]], found: Mapping[str, list[float]]) -> list[str]:
    """Name the parts whose weights differ between a trainer and its engine."""
    different = []
    for part, (total, squares) in trained.items():
        there = found.get(part, [math.nan, math.nan])
        # What the order of a sum can change, and by far less than a step of training does.
        close = 1e-9 * math.sqrt(squares or 1.0)
        if not (abs(there[0] - total) <= close + 1e-12 * abs(total) and math.isclose(there[1], squares, rel_tol=1e-9)):
            different.append(part)
    return different
