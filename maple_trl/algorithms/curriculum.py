"""The order in which tags are trained (MAPLE, arXiv 2602.11596, Algorithm 2 and Fig. 13)."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from maple_trl import Registry
from maple_trl.algorithms.difficulty import values_by_tag
from maple_trl.modalities import ModalityTag


Tags = list[ModalityTag]
ByTag = Mapping[ModalityTag, float]
Order = Callable[[Tags, ByTag, ByTag, random.Random], Sequence[ModalityTag]]
CURRICULA: Registry[Order] = Registry("curriculum", "maple_trl.curricula")
"""
Pure functions `(tags, priorities, zero_shot, rng) -> tags` by name: the tags to order, in canonical order; the priorities of
those observed so far; accuracies before training where they are given (for `adaptive` alone they are measured); and a
generator in the same state on all ranks.
"""
register_curriculum = CURRICULA.register
FIXED_CURRICULA = ("none", "static")
"""Those that look at no priority. Batches of an epoch follow the order of every other one, from the first tag to the last."""


class TagCurriculum:
    """
    Orders tags. A tag's priority is the mean of its last `window` difficulties (s_M of MAPLE 4.2 and Algorithm 2).

    Args:
        strategy: one of `CURRICULA`; a further one is a function with [`register_curriculum`].
        window: how many difficulties of a tag count; the paper takes 5.
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
        self._ordered = CURRICULA.find(strategy)
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

        Args:
            difficulties: divergences in nats as [`tag_difficulty`] gives them, of the tags that the step trained.

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
            tags: those that have prompts left, in any spelling and order.
            rng: ranks that must agree pass generators of the same state.

        Raises:
            ValueError: when the strategy gives other tags than these.
        """
        given = {ModalityTag.parse(tag) for tag in tags}
        canonical = [tag for tag in ModalityTag if tag in given]
        order = self._ordered(list(canonical), self._priorities(), dict(self._zero_shot), rng)
        order = [ModalityTag.parse(tag) for tag in order]
        if sorted(order) != sorted(canonical):
            raise ValueError(f"The curriculum {self.strategy!r} must give each of {canonical} once, got {order}")
        return order

    def metrics(self) -> dict[str, float]:
        """Return the priorities of the tags observed so far, as `tag/V/priority`."""
        return {f"tag/{tag}/priority": priority for tag, priority in self._priorities().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return difficulties and zero-shot accuracies, ready for JSON."""
        return {
            "histories": {str(tag): list(values) for tag, values in self._histories.items()},
            "zero_shot": {str(tag): accuracy for tag, accuracy in self._zero_shot.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state` that [`state_dict`] gave; its zero-shot accuracies take the place of those given."""
        self._histories = {
            ModalityTag.parse(tag): deque(values, maxlen=self.window) for tag, values in state["histories"].items()
        }
        self._zero_shot = values_by_tag(state["zero_shot"])

    def _priorities(self) -> dict[ModalityTag, float]:
        return {tag: fmean(self._histories[tag]) for tag in ModalityTag if tag in self._histories}


@register_curriculum("none")
def shuffle_tags(tags: Tags, priorities: ByTag, zero_shot: ByTag, rng: random.Random) -> Tags:
    """Shuffle; the only one that draws from `rng`."""
    rng.shuffle(tags)
    return tags


@register_curriculum("static")
def keep_canonical(tags: Tags, priorities: ByTag, zero_shot: ByTag, rng: random.Random) -> Tags:
    """Keep the canonical order, so uni-modal, then bi-modal, then tri-modal tags."""
    return tags


@register_curriculum("adaptive")
def hardest_first(tags: Tags, priorities: ByTag, zero_shot: ByTag, rng: random.Random) -> Tags:
    """
    Put the tag of highest priority first.

    Tags without one yet come before all others, in ascending order of zero-shot accuracy, those of unknown accuracy first.
    Ties keep the canonical order.
    """

    def rank(tag: ModalityTag) -> tuple[bool, float]:
        return (True, -priorities[tag]) if tag in priorities else (False, zero_shot.get(tag, -math.inf))

    return sorted(tags, key=rank)
