"""Adaptive weights of tags in the loss (MAPLE, arXiv 2602.11596, eq. 4 and Algorithm 2)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from maple_trl.algorithms.difficulty import values_by_tag
from maple_trl.modalities import ModalityTag


HISTORIES = ("pooled", "per_tag")


class AdaptiveTagWeights:
    """
    Weighs a tag the more, the harder it is compared with the difficulties seen lately (MAPLE eq. 4).

    With D the difficulty of a tag and H the history, which already holds D:
    `w = sigmoid((D - mean(H)) / (std(H) + eps))`. The standard deviation is unbiased; w is 0.5 while H has fewer than
    two values.

    Args:
        window: how many difficulties a history holds; the paper takes the steps of an epoch.
        history: `"pooled"`, one history over all tags, or `"per_tag"`, one of each. The paper writes the latter but
            sizes the window for the former (E.2.2).
        eps: added to the standard deviation, in nats.

    Raises:
        ValueError: for a window below 1 or an unknown kind of history.
    """

    def __init__(self, window: int, history: str = "pooled", eps: float = 1e-4):
        if window < 1:
            raise ValueError(f"The window must hold at least 1 difficulty, got {window}")
        if history not in HISTORIES:
            raise ValueError(f"Unknown weight history {history!r}; choose one of {', '.join(HISTORIES)}")
        self.window = window
        self.history = history
        self.eps = eps
        self._histories: dict[str, deque[float]] = {}
        self._weights: dict[ModalityTag, float] = {}

    def observe(self, difficulties: Mapping[ModalityTag | str, float]) -> None:
        """
        Add the difficulties of one step to the history, then weigh their tags; other tags keep their weights.

        Args:
            difficulties: divergences in nats as [`tag_difficulty`] gives them, of the tags that the step trained.

        Raises:
            ValueError: for a bad tag or a difficulty that is not finite; nothing is changed then.
        """
        by_tag = values_by_tag(difficulties)
        for tag, difficulty in by_tag.items():
            self._histories.setdefault(self._key(tag), deque(maxlen=self.window)).append(difficulty)
        for tag, difficulty in by_tag.items():
            history = self._histories[self._key(tag)]
            if len(history) < 2:
                self._weights[tag] = 0.5
            else:
                self._weights[tag] = _sigmoid((difficulty - fmean(history)) / (stdev(history) + self.eps))

    def weight(self, tag: ModalityTag | str) -> float:
        """Return the weight of a tag, 0.5 for one never observed."""
        return self._weights.get(ModalityTag.parse(tag), 0.5)

    def metrics(self) -> dict[str, float]:
        """Return the weights of the tags observed so far, as `tag/V/weight`."""
        return {f"tag/{tag}/weight": self._weights[tag] for tag in ModalityTag if tag in self._weights}

    def state_dict(self) -> dict[str, Any]:
        """Return histories and weights, ready for JSON."""
        return {
            "history": self.history,
            "histories": {key: list(values) for key, values in self._histories.items()},
            "weights": {str(tag): weight for tag, weight in self._weights.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Continue from a `state` that [`state_dict`] gave. When the window has shrunk, the oldest difficulties are left out.

        Raises:
            ValueError: when the state is that of the other kind of history.
        """
        if state["history"] != self.history:
            raise ValueError(
                f"The state holds a {state['history']!r} history of difficulties, but weight_history is {self.history!r}"
            )
        self._histories = {key: deque(values, maxlen=self.window) for key, values in state["histories"].items()}
        self._weights = {ModalityTag.parse(tag): weight for tag, weight in state["weights"].items()}

    def _key(self, tag: ModalityTag) -> str:
        return "all" if self.history == "pooled" else str(tag)


def _sigmoid(z: float) -> float:
    # exp of a large positive number overflows, so only negative ones are raised.
    tail = math.exp(-abs(z))
    return 1 / (1 + tail) if z >= 0 else tail / (1 + tail)
