"""What a page shows, which travels with it: a server that is started anew, or a second one, goes on from there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from maple_trl.data.review.desk import SHOWS, ReviewDesk, Shown
from maple_trl.data.review.rows import prompt_text, shown_options
from maple_trl.data.review.shelf import ClipShelf
from maple_trl.modalities import ModalityTag


if TYPE_CHECKING:
    from jinja2 import Environment

ASSETS = resources.files("maple_trl") / "assets" / "review"
REASONS = ("wrong answer", "question unclear", "answerable without the clip", "clip broken", "not fit to show")
"""Reasons for a rejection that the page offers; any other can be written."""


@dataclass(frozen=True)
class View:
    """
    What a page shows, as the page sends it with every action.

    Attributes:
        row: id of the row.
        digest: of the row as it was shown.
        look: the tag as which it is looked at.
        looked: the tags as which it was looked at, besides its own.
        revealed: whether the right answer is shown.
        answer: the reviewer's own answer, given before that.
        turn: grows with each answer of the server.
        seconds: since the row was shown, as the page has counted.
        pick: the letter, tag or reason that was clicked.
    """

    row: str = ""
    digest: str = ""
    look: str = ""
    looked: tuple[str, ...] = ()
    revealed: bool = False
    answer: str | None = None
    turn: int = 0
    seconds: float | None = None
    pick: str | None = None

    @classmethod
    def read(cls, text: str | None) -> View:
        """Read what a page has sent; what is no view begins anew."""
        try:
            values = json.loads(text or "{}")
            known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
            known["looked"] = tuple(map(str, known.get("looked") or ()))[: len(ModalityTag)]
            view = cls(**known)
            seconds = None if view.seconds is None else min(max(float(view.seconds), 0.0), 86_400.0)
            texts = {name: str(getattr(view, name) or "")[:4096] for name in ("row", "digest", "look")}
            answer = None if view.answer is None else str(view.answer)[:1]
            pick = None if view.pick is None else str(view.pick)[:500]
            return dataclasses.replace(
                view,
                **texts,
                seconds=seconds,
                answer=answer,
                pick=pick,
                turn=int(view.turn),
                revealed=bool(view.revealed),
            )
        except (ValueError, TypeError, AttributeError):
            return cls()

    def text(self) -> str:
        """Return the view as the page keeps it."""
        values = dataclasses.asdict(self)
        del values["seconds"], values["pick"]
        return json.dumps(values)

    @property
    def shown(self) -> Shown:
        """How the row was shown, for the log."""
        return Shown(self.digest, self.answer, self.revealed, self.looked, self.seconds)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    load = FunctionLoader(lambda name: (ASSETS / name).read_text(encoding="utf-8"))
    return Environment(loader=load, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(name: str, **values: Any) -> str:
    """Return a part of the page; every value is text, and never markup."""
    return _templates().get_template(name).render(**values)


def player_html(desk: ReviewDesk, shelf: ClipShelf, view: View, index: int) -> str:
    """Return what the tag that a row is looked at as gives: clip, sound, picture, subtitle."""
    row = desk.data.row(index)
    signals = shelf.signals(row, view.look)
    source = f"/media/{index}/{view.look}/"
    return render(
        "player.html.j2",
        tags=list(map(str, ModalityTag)),
        look=view.look,
        own=desk.data.tags[index],
        signals=signals,
        source=source,
        version=view.digest,
    )


def card_html(desk: ReviewDesk, view: View, index: int, reviewer: str) -> str:
    """Return question, options, tags, decisions and origin of a row."""
    original, row = desk.data.row(index), desk.row(index, reviewer)
    standing = desk.standing(index)
    own = standing.get(reviewer)
    given = shown_options(row)
    options = list(zip([*ascii_uppercase, *map(str, range(27, len(given) + 1))], given, strict=False))
    answer = str(row.get("answer") or "").strip()
    references = {name: row.get(f"reference{name and '_' + name}") for name in ("", "v", "a", "s")}
    facts = {
        name: original.get(name) for name in ("clip", "source", "split", "question_type", "required_tag", "stratum")
    }
    prompt = prompt_text(row)
    return render(
        "card.html.j2",
        view=view,
        place=index + 1,
        rows=len(desk.data),
        tag=original["tag"],
        new_tag=row["tag"],
        question=row.get("question") or prompt or "",
        options=options,
        answer=answer,
        open_answer=bool(answer) and not options,
        references={name: text for name, text in references.items() if text},
        facts={name: value for name, value in facts.items() if value and value != row["tag"]},
        prompt=prompt,
        provenance=original.get("provenance") or [],
        own=own,
        stale=desk.stale(index).get(reviewer) if own is None else None,
        # Nobody sees what others decided before they have decided themselves.
        others={name: entry for name, entry in standing.items() if name != reviewer} if own else {},
        disagreed=own is not None and desk.disagreed(index),
    )


def bar_html(
    desk: ReviewDesk,
    view: View,
    reviewer: str,
    chosen: tuple[str, str],
    message: str,
    wrong: bool,
    turn: int | None = None,
) -> str:
    """
    Return progress, and what the last action did.

    Args:
        chosen: tag and kind of the rows that are gone through.
        turn: of this answer, where nothing else is painted and the view stays as it was.
    """
    tag, show = chosen
    counts, turn = desk.progress(reviewer, tag), view.turn if turn is None else turn
    return render("bar.html.j2", view=view, turn=turn, counts=counts, tag=tag, show=show, message=message, wrong=wrong)


def shows() -> list[tuple[str, str]]:
    """Return the choices of rows to go through, with what the page calls them."""
    names = {
        "all": "all rows",
        "stale": "changed since my decision",
        "changed": "changed by me",
        "rejected": "rejected by me",
    }
    names |= {"reviewed": "decided by me"}
    return [(names.get(show, show), show) for show in SHOWS]


def edited_fields(row: Mapping[str, Any], values: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the fields of the form as an edit takes them: one option a line; those that the row has not got are left out."""
    given: dict[str, Any] = {name: value for name, value in values.items() if name in row}
    if "options" in given:
        given["options"] = str(given["options"] or "").split("\n")
    if "prompt" in given and prompt_text(dict(row)) is None:
        del given["prompt"]
    return given
