"""A line of the log of a review: who decided what about which row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


ACTIONS = ("accept", "retag", "edit", "reject", "undo")

_TEXTS = ("id", "time", "reviewer", "row", "digest", "action")


@dataclass(frozen=True)
class Entry:
    """
    One action of a reviewer.

    Attributes:
        id: its own name, which an undo names.
        time: in UTC, as ISO 8601.
        reviewer: who did it.
        row: id of the row.
        digest: of the row as it was seen ([`~maple_trl.data.review.rows.row_digest`]).
        action: one of `ACTIONS`.
        before, after: the reviewer's decision on the row (`decision`), and every field that it changes, with its value.
        reason: why a row is rejected.
        answer: the reviewer's own answer, given before the right one was shown.
        revealed: whether the right answer was shown before the action.
        looked: the tags as which the row was looked at, besides its own.
        seconds: since the row was shown.
        undoes: id of the action that an undo takes back.
    """

    id: str
    time: str
    reviewer: str
    row: str
    digest: str
    action: str
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    answer: str | None = None
    revealed: bool = False
    looked: tuple[str, ...] = ()
    seconds: float | None = None
    undoes: str | None = None

    @property
    def decision(self) -> str:
        """`accepted`, `retagged`, `edited`, `retagged, edited` or `rejected`."""
        return str(self.after["decision"])

    @property
    def rejected(self) -> bool:
        """Whether the row is not to be kept."""
        return self.decision == "rejected"

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that the reviewer gave another value, all in all."""
        return {name: value for name, value in self.after.items() if name != "decision"}

    def line(self) -> bytes:
        """Return the entry as one line of JSON."""
        values = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value is not None and value is not False and value != ()
        }
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def read_entry(line: bytes) -> Entry:
    """
    Read a line.

    Raises:
        ValueError: when it is no whole entry; the message says what is wrong.
    """
    try:
        values = json.loads(line)
    except ValueError as error:  # also of text that is no UTF-8
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    for name in _TEXTS:
        if not isinstance(values.get(name), str):
            raise ValueError(f"no field {name}")
    if values["action"] not in ACTIONS:
        raise ValueError(f"action {values['action']!r}, which is none of {', '.join(ACTIONS)}")
    if values["action"] == "undo" and not isinstance(values.get("undoes"), str):
        raise ValueError("an undo that does not say of what")
    after = values.get("after")
    if values["action"] != "undo" and not (isinstance(after, dict) and isinstance(after.get("decision"), str)):
        raise ValueError("no decision in after")
    known = {item.name for item in dataclasses.fields(Entry)}
    values["looked"] = tuple(values.get("looked") or ())
    return Entry(**{name: value for name, value in values.items() if name in known})
