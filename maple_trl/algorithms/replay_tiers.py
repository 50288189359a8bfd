"""How difficult a prompt is, by its baseline among those of all prompts (AVATAR, arXiv 2508.03100, 4.1 and 4.4)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


TIERS = ("easy", "medium", "hard")
SHARES = {"easy": 0.25, "medium": 0.35, "hard": 0.40}
QUANTILES = (0.40, 0.75)


class Vcrs:
    """
    The video-context reference score: the mean of a prompt's latest on-policy rewards (AVATAR 4.4).

    It is the baseline of replayed completions, and it says how difficult a prompt is.

    Args:
        window (`int`, *optional*, defaults to `20`):
            How many rewards of a prompt count.

    Raises:
        ValueError: for a window below 1.
    """

    def __init__(self, window: int = 20):
        if window < 1:
            raise ValueError(f"The window must hold at least 1 reward, got {window}")
        self.window = window
        self._positions: dict[str, int] = {}
        self._rewards: list[array[float]] = []
        self._baselines = array("d")

    def observe(self, prompt: str, rewards: Iterable[float]) -> None:
        """
        Add rewards of fresh completions of a prompt, in the order in which they were generated.

        NaN, the reward that no function could give, is left out. A prompt with no other reward stays unseen.

        Args:
            prompt (`str`): key of the prompt.
            rewards (`Iterable[float]`): those that it was trained with.

        Raises:
            ValueError: for an infinite reward; nothing is changed then.
        """
        values = [value for value in map(float, rewards) if not math.isnan(value)]
        if any(map(math.isinf, values)):
            raise ValueError(f"A reward of prompt {prompt!r} is infinite")
        if not values:
            return
        position = self._positions.setdefault(prompt, len(self._rewards))
        if position == len(self._rewards):
            self._rewards.append(array("d"))
            self._baselines.append(0.0)
        latest = self._rewards[position]
        latest.extend(values)
        del latest[: -self.window]
        self._baselines[position] = math.fsum(latest) / len(latest)

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def nbytes(self) -> int:
        """Memory that the rewards take, about."""
        return len(self) * (300 + 8 * self.window)

    def baseline(self, prompt: str) -> float | None:
        """Return the mean of the prompt's latest rewards, `None` while it has none."""
        position = self._positions.get(prompt)
        return None if position is None else self._baselines[position]

    def baselines(self) -> np.ndarray:
        """Return a copy of the baselines of all prompts seen, float64 of shape (prompts,)."""
        return np.array(self._baselines)

    def metrics(self) -> dict[str, float]:
        """Return the number of prompts seen, the mean of their baselines, and quantiles of these."""
        metrics = {"vcrs/prompts": float(len(self._positions))}
        if self._positions:
            baselines = self.baselines()
            metrics["vcrs/mean"] = float(baselines.mean())
            for percent in (10, 25, 50, 75, 90):
                metrics[f"vcrs/p{percent}"] = float(np.quantile(baselines, percent / 100))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the latest rewards of each prompt, ready for JSON."""
        return {prompt: list(self._rewards[position]) for prompt, position in self._positions.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from a `state` that [`state_dict`] gave. When the window has shrunk, the oldest rewards are left out."""
        self._positions, self._rewards, self._baselines = {}, [], array("d")
        for prompt, rewards in state.items():
            self.observe(prompt, rewards)


def tier_thresholds(
    baselines_P: np.ndarray | Sequence[float], quantiles: tuple[float, float] = QUANTILES
) -> tuple[float, float]:
    """
    Return the highest baseline that is still Hard, and the highest that is still Medium.

    With P prompts, those are the baselines of rank ceil(0.40 P) and ceil(0.75 P) in ascending order. Prompts of equal
    baselines share a tier, the harder one of those that they straddle: a prompt is Hard when fewer than 40 % of the
    prompts are below it. So all are Hard while all are equal, such as at the start of a run that fails everywhere.

    Args:
        baselines_P (array of shape (P,)):
            Of all prompts, at least one.
        quantiles (`tuple[float, float]`, *optional*, defaults to `(0.40, 0.75)`):
            The share of prompts that are Hard, and that of those that are Hard or Medium.

    Raises:
        ValueError: when there is no baseline.
    """
    baselines_P = np.asarray(baselines_P, dtype=np.float64)
    if not len(baselines_P):
        raise ValueError("Tiers need the baseline of at least one prompt")
    # Without the small shift, rounding in 0.07 * 100 would make rank 8 of it.
    ranks = [math.ceil(quantile * len(baselines_P) - 1e-9) for quantile in quantiles]
    ordered = np.partition(baselines_P, [max(rank - 1, 0) for rank in ranks])
    hard, medium = (float(ordered[rank - 1]) if rank else -math.inf for rank in ranks)
    return hard, medium


def tier_of(baseline: float, thresholds: tuple[float, float]) -> str:
    """Return the tier of a prompt with this baseline; thresholds as [`tier_thresholds`] returns them."""
    hard, medium = thresholds
    return "hard" if baseline <= hard else "medium" if baseline <= medium else "easy"


def rounded_shares(shares: Mapping[str, float], capacity: int) -> dict[str, int]:
    """Round capacities by the largest-remainder method."""
    quotas = {tier: share * capacity for tier, share in shares.items()}
    # Rounding may leave a whole number a hair below itself.
    whole = {tier: math.floor(quota + 1e-9) for tier, quota in quotas.items()}
    by_remainder = sorted(TIERS, key=lambda tier: (quotas[tier] - whole[tier], TIERS.index(tier)), reverse=True)
    for tier in by_remainder[: capacity - sum(whole.values())]:
        whole[tier] += 1
    return whole
