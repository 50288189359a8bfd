"""What a log says by now: each reviewer's decisions, with what was undone taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from maple_trl.data.review.entries import Entry


class Replay:
    """
    The decisions of a log, entry by entry; the same entries give the same decisions, in whichever process.

    A reviewer's decision on a row is what the last of the actions says that were not undone. Nobody changes another's.
    An entry that has come before, as in logs that were joined, counts once.
    """

    def __init__(self, entries: Iterable[Entry] = ()):
        self._decisions: dict[str, dict[str, list[Entry]]] = {}  # by row and reviewer
        self._actions: dict[str, dict[str, Entry]] = {}  # by reviewer and id, in order
        self._seen: set[str] = set()
        self.undone = 0
        for entry in entries:
            self.apply(entry)

    def apply(self, entry: Entry) -> None:
        """Take in the next entry."""
        if entry.id in self._seen:
            return
        self._seen.add(entry.id)
        actions = self._actions.setdefault(entry.reviewer, {})
        if entry.action != "undo":
            actions[entry.id] = entry
            self._decisions.setdefault(entry.row, {}).setdefault(entry.reviewer, []).append(entry)
            return
        taken = actions.pop(entry.undoes or "", None)
        if taken is not None:  # else it was undone already, by the same reviewer elsewhere
            self.undone += 1
            decisions = self._decisions[taken.row]
            decisions[entry.reviewer].remove(taken)
            if not decisions[entry.reviewer]:
                del decisions[entry.reviewer]

    @property
    def reviewers(self) -> list[str]:
        """Everyone who has done something, in the order of their first actions."""
        return list(self._actions)

    @property
    def rows(self) -> list[str]:
        """Ids of the rows on which somebody has decided."""
        return [row for row, decisions in self._decisions.items() if decisions]

    def decisions(self, row: str) -> dict[str, Entry]:
        """Return what each reviewer has decided on a row."""
        return {reviewer: entries[-1] for reviewer, entries in self._decisions.get(row, {}).items()}

    def last(self, reviewer: str, fits: Callable[[Entry], Any] = lambda entry: True) -> Entry | None:
        """Return a reviewer's last action that fits and was not undone."""
        return next((entry for entry in reversed(self._actions.get(reviewer, {}).values()) if fits(entry)), None)

    def actions(self, reviewer: str) -> list[Entry]:
        """Return a reviewer's actions that were not undone, in order."""
        return list(self._actions.get(reviewer, {}).values())
