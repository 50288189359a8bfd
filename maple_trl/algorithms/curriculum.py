"""The order in which tags are trained (MAPLE, arXiv 2602.11596, Algorithm 2 and Fig. 13)."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from maple_trl.algorithms.difficulty import values_by_tag
from maple_trl.modalities import ModalityTag


CURRICULA = ("none", "static", "adaptive")


class TagCurriculum:
    """
    Orders tags.

    - `none`: at random.
    - `static`: canonical order, so uni-modal, then bi-modal, then tri-modal tags.
    - `adaptive`: the tag of highest priority first. A tag's priority is the mean of its last `window` difficulties.
      Tags without a difficulty yet come before all others, in ascending order of zero-shot accuracy, those of unknown
      accuracy first. Ties keep the canonical order.

    Args:
        strategy: one of `CURRICULA`.
        zero_shot: accuracy before training per tag, as fractions.

    Raises:
        ValueError: for an unknown strategy, a window below 1, a bad tag, or an accuracy that is not in [0, 1].
    """

    def __init__(
        self,
        strategy: str = "none",
        window: int = 5,
        zero_shot: Mapping[ModalityTag | str, float] | None = None,
    ):
        if strategy not in CURRICULA:
            raise ValueError(f"Unknown curriculum {strategy!r}; choose one of {', '.join(CURRICULA)}")
        if window < 1:
            raise ValueError(f"The window must hold at least 1 difficulty, got {window}")
        self.strategy = strategy
        self.window = window
        self._zero_shot = values_by_tag(zero_shot or {})
        for tag, accuracy in self._zero_shot.items():
            if not 0 <= accuracy <= 1:
                raise ValueError(f"The zero-shot accuracy of tag {tag} must be a fraction in [0, 1], got {accuracy}")
        self._histories: dict[ModalityTag, deque[float]] = {}

    def observe(self, difficulties: Mapping[ModalityTag | str, float]) -> None:
        """
        Add the difficulties of one step, per tag.

        Raises:
            ValueError: for a bad tag or a difficulty that is not finite; nothing is changed then.
        """
        for tag, difficulty in values_by_tag(difficulties).items():
            self._histories.setdefault(tag, deque(maxlen=self.window)).append(difficulty)

    def priority(self, tag: ModalityTag | str) -> float | None:
        """Return the mean of the tag's last difficulties, `None` for a tag never observed."""
        history = self._histories.get(ModalityTag.parse(tag))
        return fmean(history) if history else None

    def order(self, tags: Iterable[ModalityTag | str], rng: random.Random) -> list[ModalityTag]:
        """
        Return the given tags, each once, in the order to train them.

        Args:
            rng: drawn from by `none` only. Ranks that must agree pass generators of the same state.
        """
        given = {ModalityTag.parse(tag) for tag in tags}
        order = [tag for tag in ModalityTag if tag in given]
        if self.strategy == "none":
            rng.shuffle(order)
        elif self.strategy == "adaptive":
            order.sort(key=self._rank)
        return order

    def metrics(self) -> dict[str, float]:
        """Return the priorities of the tags observed so far, as `tag/V/priority`."""
        return {f"tag/{tag}/priority": value for tag in ModalityTag if (value := self.priority(tag)) is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return difficulties and zero-shot accuracies, ready for JSON."""
        return {
            "histories": {str(tag): list(values) for tag, values in self._histories.items()},
            "zero_shot": {str(tag): accuracy for tag, accuracy in self._zero_shot.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from [`state_dict`]; its zero-shot accuracies take the place of those given."""
        self._histories = {
            ModalityTag.parse(tag): deque(values, maxlen=self.window) for tag, values in state["histories"].items()
        }
        self._zero_shot = values_by_tag(state["zero_shot"])

    def _rank(self, tag: ModalityTag) -> tuple[bool, float]:
        priority = self.priority(tag)
        if priority is None:
            return False, self._zero_shot.get(tag, -math.inf)
        return True, -priority
