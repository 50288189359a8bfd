"""The spread of a run's gradients: moments of gradient vectors and a small sample of their coordinates."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maple_trl.modalities import ModalityTag


@dataclass
class _Sums:
    """Sums over observations g with weights w, the newest of weight 1: of w, w^2, w g and w |g|^2."""

    weight: float
    squared_weight: float
    vector: Tensor
    squared_norm: float

    def metrics(self, name: str) -> dict[str, float]:
        mean = self.vector / self.weight
        spread = self.squared_norm / self.weight - float(mean.square().sum())
        variance = spread / (1 - self.squared_weight / self.weight**2)
        return {
            # Rounding can leave equal vectors with a spread just below 0.
            f"tag/{name}/grad_variance": max(variance, 0.0),
            f"tag/{name}/grad_mean_norm": float(mean.norm()),
        }


class GradientMoments:
    """
    Variance of gradient vectors over recent steps, per tag and over all steps.

    An observation that is k observations old has weight `(1 - 1 / window)^k`. With S the sum of the weights and S2 that
    of their squares, the variance is `(sum w |g|^2 / S - |sum w g / S|^2) / (1 - S2 / S^2)`: the unbiased estimate of
    `E |g - E g|^2`, the trace of the covariance. MAPLE 5.2 compares trainers by it.

    Args:
        window: more than 1; observations of about this many steps count. `math.inf` weighs all alike.

    Raises:
        ValueError: for a window of 1 or less.
    """

    def __init__(self, window: float):
        if not window > 1:
            raise ValueError(f"The window must be more than 1 step, got {window}")
        self._decay = 1 - 1 / window
        self._sums: dict[str, _Sums] = {}

    def observe(self, vector: Tensor, tag: ModalityTag | str | None = None) -> None:
        """
        Add the gradient of one step.

        Args:
            vector: shape (K,), the same K at each call. One with a value that is not finite is passed over, since it
                would stay in the sums for good.
            tag: the tag of the step's samples, `None` when they are of several.

        Raises:
            ValueError: when K differs from the earlier calls.
        """
        names = ["all"] if tag is None else ["all", str(ModalityTag.parse(tag))]
        vector = vector.detach().to("cpu", torch.float64)
        if "all" in self._sums and self._sums["all"].vector.shape != vector.shape:
            raise ValueError(
                f"Expected a gradient of shape {tuple(self._sums['all'].vector.shape)} as before, "
                f"got {tuple(vector.shape)}"
            )
        if not vector.isfinite().all():
            return
        squared_norm = float(vector.square().sum())
        for name in names:
            old = self._sums.get(name) or _Sums(0.0, 0.0, torch.zeros_like(vector), 0.0)
            self._sums[name] = _Sums(
                weight=self._decay * old.weight + 1,
                squared_weight=self._decay**2 * old.squared_weight + 1,
                vector=self._decay * old.vector + vector,
                squared_norm=self._decay * old.squared_norm + squared_norm,
            )

    def metrics(self) -> dict[str, float]:
        """
        Return variance and mean of the gradients of each tag, and of `all`, with at least two observations.

        `tag/V/grad_variance` has the unit of a squared gradient norm, `tag/V/grad_mean_norm` is the norm of the mean
        gradient.
        """
        metrics: dict[str, float] = {}
        for name in ("all", *ModalityTag):
            # The first observation leaves a sum of weights of exactly 1, every further one a larger sum.
            if name in self._sums and self._sums[name].weight > 1:
                metrics |= self._sums[name].metrics(str(name))
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums as float64 tensors: `V.vector` of shape (K,) and `V.scalars` of shape (3,), and so on."""
        state = {}
        for name, sums in self._sums.items():
            scalars = [sums.weight, sums.squared_weight, sums.squared_norm]
            state[f"{name}.scalars"] = torch.tensor(scalars, dtype=torch.float64)
            state[f"{name}.vector"] = sums.vector.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state` of [`state_dict`], tensors of shape (K,) and (3,)."""
        self._sums = {}
        for name in ("all", *map(str, ModalityTag)):
            if f"{name}.scalars" in state:
                weight, squared_weight, squared_norm = state[f"{name}.scalars"].tolist()
                vector = state[f"{name}.vector"].to("cpu", torch.float64, copy=True)
                self._sums[name] = _Sums(weight, squared_weight, vector, squared_norm)


class GradientSample:
    """
    Reads a fixed random choice of the coordinates of a gradient.

    [`GradientMoments`] of such samples give the variance that MAPLE 5.2 compares trainers by, without a copy of a whole
    gradient.

    The choice depends on the seed and on the names, order and sizes of the parameters only, so ranks agree on it.
    Values are multiplied by `sqrt(total / count)`, `total` being the number of coordinates chosen from: the squared
    norm of the sample is then an unbiased estimate of that of the whole gradient.

    Args:
        parameters: names and tensors of any shape, e.g. `model.named_parameters()`; those that take no gradient are left
            out. Each must be whole on this process, so this is not for sharded parameters (FSDP, ZeRO-3).
        count: how many coordinates to read; all of them when there are fewer.
        seed: what the choice is drawn by.
        pattern: a regular expression that the names read must contain a match of.

    Raises:
        ValueError: when `count` is below 1 or no parameter is left to read.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]], count: int, seed: int = 0, pattern: str | None = None
    ):
        if count < 1:
            raise ValueError(f"At least 1 coordinate must be read, got {count}")
        trainable = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        chosen = [(name, p) for name, p in trainable if pattern is None or re.search(pattern, name)]
        self.total = sum(parameter.numel() for _, parameter in chosen)
        if not self.total:
            if pattern is None or not trainable:
                raise ValueError("There is no trainable parameter to read a gradient from")
            raise ValueError(
                f"Pattern {pattern!r} matches none of the {len(trainable)} trainable parameters, "
                f"such as {trainable[0][0]!r}"
            )
        self.count = min(count, self.total)
        # A range is sampled without being written out, so this is cheap for billions of coordinates.
        positions = torch.tensor(sorted(random.Random(seed).sample(range(self.total), self.count)))
        self._parts: list[tuple[Tensor, Tensor]] = []
        start = 0
        for _, parameter in chosen:
            first, last = torch.searchsorted(positions, torch.tensor([start, start + parameter.numel()])).tolist()
            if last > first:
                self._parts.append((parameter, (positions[first:last] - start).to(parameter.device)))
            start += parameter.numel()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """
        Read the scaled values of the parameters' current `.grad`, 0 where it is `None`.

        Returns:
            float32 copy of shape (count,) on the device of the first parameter read.
        """
        values = []
        for parameter, index in self._parts:
            if parameter.grad is None:
                values.append(torch.zeros(len(index), device=parameter.device))
            else:
                values.append(parameter.grad.reshape(-1)[index].float())
        device = values[0].device
        return torch.cat([value.to(device) for value in values]) * math.sqrt(self.total / self.count)
