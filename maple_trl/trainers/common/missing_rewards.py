"""Completions that reward functions failed on, counted over a run."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence

from maple_trl.files import read_json, write_atomically
from maple_trl.trainers.common.tag_metrics import TAGS, UNTAGGED


logger = logging.getLogger(__name__)

STATE_FILE = "missing_rewards.json"


class MissingRewards:
    """
    Counts completions to which reward functions gave nothing although they apply.

    Args:
        speaks (`bool`): whether this process tells of it.

    Attributes:
        by_function (`Counter`): completions by `(name of the function, tag)`; the tag of a row without one is `""`.
        unscorable (`Counter`): completions left out of training for that, by tag.
    """

    def __init__(self, speaks: bool):
        self.speaks = speaks
        self.by_function: Counter[tuple[str, str]] = Counter()
        self.unscorable: Counter[str] = Counter()
        self._told: Counter[str] = Counter()

    def observe(self, name: str, tags: Sequence[int], step: int) -> None:
        """
        Count completions that a function failed on, and warn whenever their number has doubled.

        Args:
            tags: those of the completions, as numbers.
        """
        counts = Counter(map(_tag_name, tags))
        self.by_function.update({(name, tag): count for tag, count in counts.items()})
        total = sum(count for (other, _), count in self.by_function.items() if other == name)
        if not counts or total < 2 * self._told[name] or not self.speaks:
            return
        self._told[name] = total
        by_tag = ", ".join(f"{tag or 'untagged'} {count}" for tag, count in sorted(counts.items()))
        logger.warning(
            "The reward function %r gave no reward to %d completions of step %d (%s), %d so far: they are left out of training",
            name,
            len(tags),
            step,
            by_tag,
            total,
        )

    def leave_out(self, tags: Sequence[int]) -> None:
        """Count completions that are left out of training."""
        self.unscorable.update(map(_tag_name, tags))

    def save(self, folder: str) -> None:
        """Write the counts into a checkpoint."""
        state = {
            "missing": [[*key, count] for key, count in self.by_function.items()],
            "unscorable": list(self.unscorable.items()),
        }
        write_atomically(os.path.join(folder, STATE_FILE), json.dumps(state))

    def snapshot(self) -> Callable[[], None]:
        """Return what puts the counts back."""
        kept = self.by_function.copy(), self.unscorable.copy(), self._told.copy()

        def put_back() -> None:
            self.by_function, self.unscorable, self._told = kept

        return put_back

    def load(self, folder: str) -> None:
        """Continue from [`save`]; older checkpoints hold no counts."""
        state = read_json(os.path.join(folder, STATE_FILE))
        if state is None:
            return
        self.by_function = Counter({(name, tag): count for name, tag, count in state["missing"]})
        self.unscorable = Counter(dict(state["unscorable"]))
        for (name, _), count in self.by_function.items():
            self._told[name] += count


def _tag_name(number: int) -> str:
    return "" if number == UNTAGGED else TAGS[number].value
