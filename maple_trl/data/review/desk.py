"""What a reviewer does with a set: decide, take back, look for the next row. The page and its tests stand on it."""

from __future__ import annotations

import datetime
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maple_trl.data.review.edits import changed, checked_edit, checked_tag, fields
from maple_trl.data.review.entries import Entry
from maple_trl.data.review.log import ReviewLog
from maple_trl.data.review.replay import Replay
from maple_trl.data.review.rows import ReviewError, ReviewSet


UNDECIDED = "undecided"
SHOWS = ("all", "unreviewed", "reviewed", "changed", "rejected", "disagreement", "stale")
"""Which rows are gone through: all, those that the reviewer has not decided on, has, has changed or rejected, those on
which reviewers disagree, and those that have changed since the reviewer decided."""


@dataclass(frozen=True)
class Shown:
    """
    How a row was before its reviewer when they acted; what goes into the log besides the action.

    Attributes:
        digest: of the row.
        answer: the reviewer's own answer, given before the right one was shown.
        revealed: whether the right answer was shown before the action.
        looked: the tags as which the row was looked at, besides its own.
        seconds: time from the row's being shown to the action.
    """

    digest: str
    answer: str | None = None
    revealed: bool = False
    looked: tuple[str, ...] = ()
    seconds: float | None = None


def reviewer_name(text: str) -> str:
    """
    Return a reviewer's name in its one spelling.

    Raises:
        ReviewError: for a name that is empty, longer than 64 characters, or holds control characters.
    """
    name = " ".join(unicodedata.normalize("NFC", text).split())
    if not name or len(name) > 64 or not name.isprintable():
        raise ReviewError(f"a reviewer's name has 1 to 64 printable characters, got {text!r}")
    return name


def decision_name(changes: Mapping[str, Any]) -> str:
    """Return what it is called to keep a row with changes."""
    parts = ["retagged"] * ("tag" in changes) + ["edited"] * bool(set(changes) - {"tag"})
    return ", ".join(parts) or "accepted"


class ReviewDesk:
    """
    A set and the log of its review.

    Attributes:
        data (`ReviewSet`), log (`ReviewLog`): what is reviewed, and what was decided.
    """

    def __init__(self, data: ReviewSet, log: ReviewLog):
        self.data, self.log = data, log

    # What was decided

    def standing(self, index: int, replay: Replay | None = None) -> dict[str, Entry]:
        """Return each reviewer's decision on the row at `index` (as a `replay` has it), but for those made before it changed."""
        decisions = (replay or self.log.replay).decisions(self.data.ids[index])
        if not decisions:
            return {}
        digest = self.data.digest(index)
        return {reviewer: entry for reviewer, entry in decisions.items() if entry.digest == digest}

    def stale(self, index: int) -> dict[str, Entry]:
        """Return the decisions that were made before the row at `index` changed."""
        decisions = self.log.replay.decisions(self.data.ids[index])
        return {name: entry for name, entry in decisions.items() if entry.digest != self.data.digest(index)}

    def row(self, index: int, reviewer: str) -> dict[str, Any]:
        """Return the row at `index` with what a `reviewer` has changed in it."""
        entry = self.standing(index).get(reviewer)
        return changed(self.data.row(index), entry.changes) if entry else self.data.row(index)

    # What is decided

    def decide(
        self,
        index: int,
        reviewer: str,
        action: str,
        shown: Shown,
        tag: str | None = None,
        edit: Mapping[str, Any] | None = None,
        reason: str | None = None,
    ) -> Entry:
        """
        Write an action down.

        `accept` keeps the row as the reviewer sees it, with what they changed before; `retag` and `edit` add to that.

        Args:
            index: of the row.
            reviewer: who acts.
            action: `accept`, `retag` (with `tag`), `edit` (with `edit`, see
                [`~maple_trl.data.review.edits.checked_edit`]) or `reject` (with `reason`).
            shown: how the row was shown.
            tag: the new tag, for `retag`.
            edit: new values by field, for `edit`.
            reason: why, for `reject`.

        Raises:
            ReviewError: when the row is not the one that was shown, the change cannot be made, or a reason is missing.
        """
        row = self.data.row(index)
        if shown.digest != self.data.digest(index):
            raise ReviewError(f"row {row['id']} has changed since it was shown; nothing was written. Look at it again")
        reason = " ".join((reason or "").split()) or None
        if action == "reject" and not reason:
            raise ReviewError("say why the row is rejected; nothing was written")

        def make(replay: Replay) -> Entry:
            entry = self.standing(index, replay).get(reviewer)
            changes = dict(entry.changes) if entry else {}
            if action == "retag":
                changes["tag"] = checked_tag(row, tag or "")
            elif action == "edit":
                changes |= checked_edit(changed(row, changes), edit or {})
            elif action not in ("accept", "reject"):
                raise ReviewError(f"there is no action {action!r}")
            original = fields(row)
            changes = {name: value for name, value in changes.items() if value != original[name]}
            before = entry.changes if entry else {}
            touched = {name: before.get(name, original[name]) for name in {**before, **changes}}
            now = "rejected" if action == "reject" else decision_name(changes)
            return self._entry(
                reviewer,
                row["id"],
                action,
                shown,
                before={"decision": entry.decision if entry else UNDECIDED, **touched},
                after={"decision": now, **changes},
                reason=reason if action == "reject" else None,
            )

        written = self.log.append(make)
        assert written is not None
        return written

    def undo(self, reviewer: str) -> Entry | None:
        """Take back a reviewer's last action on a row of the set; `None` where there is none."""

        def make(replay: Replay) -> Entry | None:
            last = replay.last(reviewer, lambda entry: self.data.index_of(entry.row) is not None)
            if last is None:
                return None
            digest = self.data.digest(self.data.index_of(last.row) or 0)
            shown = Shown(digest=digest)
            return self._entry(reviewer, last.row, "undo", shown, before=last.after, after=last.before, undoes=last.id)

        return self.log.append(make)

    def _entry(self, reviewer: str, row: str, action: str, shown: Shown, **values: Any) -> Entry:
        return Entry(
            id=secrets.token_hex(8),
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            reviewer=reviewer,
            row=row,
            digest=shown.digest,
            action=action,
            answer=shown.answer,
            revealed=shown.revealed,
            looked=shown.looked,
            seconds=None if shown.seconds is None else round(shown.seconds, 1),
            **values,
        )

    # Which row comes next

    def fits(self, index: int, reviewer: str, tag: str = "all", show: str = "all") -> bool:
        """
        Return whether a row is among those that are gone through.

        Args:
            index: of the row.
            reviewer: who goes through them.
            tag: the proposed tag of the rows, or `"all"`.
            show: one of `SHOWS`.
        """
        if tag not in ("all", self.data.tags[index]):
            return False
        if show == "all":
            return True
        own = self.standing(index).get(reviewer)
        if show == "unreviewed":
            return own is None
        if show == "stale":
            return own is None and reviewer in self.stale(index)
        if show == "disagreement":
            return own is not None and self.disagreed(index)
        if own is None:
            return False
        return show == "reviewed" or own.rejected == (show == "rejected") and own.decision != "accepted"

    def disagreed(self, index: int) -> bool:
        """Return whether two reviewers decided differently on the row at `index`."""
        return len({outcome(entry) for entry in self.standing(index).values()}) > 1

    def following(self, index: int, step: int, reviewer: str, tag: str = "all", show: str = "all") -> int | None:
        """
        Return the next row that fits; `None` where there is none.

        Args:
            index: of the row from which to go on.
            step: 1 for onwards, -1 for backwards.
            reviewer: who goes through them.
            tag: as in [`~ReviewDesk.fits`].
            show: as in [`~ReviewDesk.fits`].
        """
        places = range(index + step, len(self.data) if step > 0 else -1, step)
        return next((place for place in places if self.fits(place, reviewer, tag, show)), None)

    def first(self, reviewer: str, tag: str = "all", show: str = "all") -> int | None:
        """
        Return the first row that fits; where all are shown, the first on which the reviewer has not decided.

        Args:
            reviewer: who goes through them.
            tag: as in [`~ReviewDesk.fits`].
            show: as in [`~ReviewDesk.fits`].
        """
        found = self.following(-1, 1, reviewer, tag, "unreviewed" if show == "all" else show)
        return self.following(-1, 1, reviewer, tag, show) if found is None else found

    def progress(self, reviewer: str, tag: str = "all") -> dict[str, int]:
        """Count a reviewer's decisions among the rows of a tag, and `rows`, `disagreement` and `stale`."""
        counts = dict.fromkeys(("rows", "decided", "disagreement", "stale"), 0)
        counts["rows"] = len(self.data) if tag == "all" else self.data.tags.count(tag)
        for row in self.log.replay.rows:
            index = self.data.index_of(row)
            if index is None or tag not in ("all", self.data.tags[index]):
                continue
            own = self.standing(index).get(reviewer)
            counts["decided"] += own is not None
            counts["stale"] += own is None and reviewer in self.stale(index)
            counts["disagreement"] += own is not None and self.disagreed(index)
        return counts


def outcome(entry: Entry) -> str:
    """Return a text that two decisions share exactly when they have the same result."""
    return "rejected" if entry.rejected else repr(sorted(entry.changes.items()))
