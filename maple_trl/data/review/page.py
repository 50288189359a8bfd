"""The page, in Gradio: what stands where, and what each button does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from maple_trl.data.review.desk import SHOWS, ReviewDesk, reviewer_name
from maple_trl.data.review.edits import EDITABLE
from maple_trl.data.review.rows import ReviewError, prompt_text, shown_options
from maple_trl.data.review.shelf import ClipShelf
from maple_trl.data.review.view import (
    ASSETS,
    REASONS,
    View,
    bar_html,
    card_html,
    edited_fields,
    player_html,
    render,
    shows,
)
from maple_trl.modalities import ModalityTag


_FORM = ("question", "options", "answer", "reference", "prompt")
_STAMP = "(view, ...rest) => [window.mapleReview.stamp(), ...rest]"
_FROM_ADDRESS = "(view, ...rest) => window.mapleReview.fromAddress(view, ...rest)"


class ReviewPage:
    """
    The page on a desk. It keeps nothing of a session: what is shown travels with each action.

    Args:
        desk: the set and its log.
        shelf: the media.
        reviewer: the name that the page begins with.
    """

    def __init__(self, desk: ReviewDesk, shelf: ClipShelf, reviewer: str):
        self.desk, self.shelf, self.reviewer = desk, shelf, reviewer

    # What stands where

    def blocks(self) -> gr.Blocks:
        """Build the page."""
        with gr.Blocks(title=f"Review of {self.desk.data.path.name}", analytics_enabled=False) as blocks:
            self._build()
            self._connect(blocks)
        return blocks

    def _build(self) -> None:
        tags = [
            ("all tags", "all"),
            *((tag.value, tag.value) for tag in ModalityTag if tag.value in self.desk.data.tags),
        ]
        with gr.Row(elem_id="head", equal_height=True):
            self.bar = gr.HTML(elem_id="bar")
            self.name = gr.Textbox(
                self.reviewer, label="Reviewer", max_length=64, container=False, elem_id="reviewer", min_width=90
            )
            self.tag = gr.Dropdown(tags, value="all", label="Tag", container=False, elem_id="tag-filter", min_width=70)
            self.show = gr.Dropdown(
                shows(), value="all", label="Rows", container=False, elem_id="show-filter", min_width=120
            )
        with gr.Row(elem_id="main"):
            self.player = gr.HTML(elem_id="player")
            with gr.Column(elem_id="side", min_width=300):
                self.card = gr.HTML(elem_id="card-place")
                with gr.Column(visible=False, elem_id="edit-panel") as self.edit_panel:
                    self.form = {name: self._field(name) for name in _FORM}
                    with gr.Row():
                        self.save = gr.Button("Save [Ctrl+⏎]", variant="primary", size="sm", elem_id="do-save")
                        self.cancel_edit = gr.Button("Cancel [Esc]", size="sm", elem_id="do-cancel-edit")
                with gr.Column(visible=False, elem_id="reject-panel") as self.reject_panel:
                    self.reason = gr.Textbox(label="Why is the row rejected?", max_length=500, elem_id="reason")
                    gr.HTML(render("reasons.html.j2", reasons=REASONS))
                    with gr.Row():
                        self.reject_now = gr.Button("Reject [⏎]", variant="stop", size="sm", elem_id="do-reject-now")
                        self.cancel_reject = gr.Button("Cancel [Esc]", size="sm", elem_id="do-cancel-reject")
        with gr.Column(elem_id="actions"):
            with gr.Row(elem_id="tags"):
                self.retags = {
                    tag.value: gr.Button(f"[{key}] {tag}", size="sm", min_width=40, elem_id=f"do-tag-{tag}")
                    for key, tag in enumerate(ModalityTag, 1)
                }
            with gr.Row(elem_id="decisions"):
                self.buttons = {
                    name: gr.Button(text, size="sm", min_width=60, variant=variant, elem_id=f"do-{name}")
                    for name, text, variant in (
                        ("accept", "Accept [⏎]", "primary"),
                        ("edit", "Edit [E]", "secondary"),
                        ("reject", "Reject [X]", "stop"),
                        ("undo", "Undo [U]", "secondary"),
                        ("reveal", "Answer [R]", "secondary"),
                        ("previous", "Previous [←]", "secondary"),
                        ("next", "Next [→]", "secondary"),
                        ("unreviewed", "Undecided [N]", "secondary"),
                    )
                }
        self.hidden = {
            name: gr.Button(name, visible="hidden", elem_id=f"do-{name}") for name in ("answer", "look", "refresh")
        }
        self.view = gr.Textbox("", visible="hidden", elem_id="view")

    def _field(self, name: str) -> gr.Textbox:
        lines = {"options": 4, "prompt": 2, "question": 2, "reference": 3}.get(name, 1)
        label = {"options": "options, one a line", "prompt": "prompt (follows the question by itself)"}.get(name, name)
        return gr.Textbox(label=label, lines=lines, max_lines=max(lines, 6), elem_id=f"edit-{name}")

    # What each button does

    def _connect(self, blocks: gr.Blocks) -> None:
        given = [self.view, self.name, self.tag, self.show]
        panels = [self.edit_panel, self.reject_panel, self.reason, *self.form.values()]
        painted = [self.name, self.tag, self.show, self.bar, self.player, self.card, *panels]

        def on(trigger: Any, act: Callable[..., Any], js: str = _STAMP, more: list[Any] | None = None) -> None:
            trigger(
                partial(self._do, act),
                inputs=[*given, *(more or [])],
                outputs=painted,
                js=js,
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )

        on(blocks.load, self._open, js=_FROM_ADDRESS)
        on(self.name.submit, self._stay)
        on(self.name.blur, self._stay)
        on(self.tag.input, self._filter)
        on(self.show.input, self._filter)
        for tag, button in self.retags.items():
            on(button.click, partial(self._decide, "retag", tag=tag))
        for name, act in (
            ("accept", partial(self._decide, "accept")),
            ("edit", self._open_edit),
            ("reject", self._open_reject),
            ("undo", self._undo),
            ("reveal", self._reveal),
            ("previous", partial(self._go, step=-1)),
            ("next", partial(self._go, step=1)),
            ("unreviewed", partial(self._go, step=1, show="unreviewed")),
        ):
            on(self.buttons[name].click, act)
        on(self.hidden["answer"].click, self._answer)
        on(self.hidden["look"].click, self._look)
        on(self.hidden["refresh"].click, self._stay)
        on(self.save.click, self._edit, more=list(self.form.values()))
        on(self.reject_now.click, self._reject, more=[self.reason])
        on(self.reason.submit, self._reject, more=[self.reason])
        on(self.cancel_edit.click, self._stay)
        on(self.cancel_reject.click, self._stay)

    def _do(self, act: Callable[..., Any], text: str, name: str, tag: str, show: str, *more: Any) -> dict[Any, Any]:
        """Do what a button asks for, and paint what is there then; a refusal is shown, and changes nothing."""
        sent = View.read(text)
        state = _State(sent, tag if tag in list(ModalityTag) else "all", show if show in SHOWS else "all")
        try:
            with self.desk.log.held():
                return self._done(act, sent, state, name, more)
        except (ReviewError, OSError) as error:  # of the log itself
            name, chosen = state.reviewer or self.reviewer, (state.tag, state.show)
            said, turn = f"nothing was written: {error}", _next_turn(sent.turn)
            return {self.bar: bar_html(self.desk, sent, name, chosen, said, wrong=True, turn=turn)}

    def _done(
        self, act: Callable[..., Any], sent: View, state: _State, name: str, more: tuple[Any, ...]
    ) -> dict[Any, Any]:
        try:
            state.reviewer = reviewer_name(name or self.reviewer)
            self._place(state)
            if sent.row or act == self._open:  # else the page had shown no row yet
                act(state, *more)
        except ReviewError as error:
            state.message, state.wrong = str(error), True
            state.reviewer = state.reviewer or self.reviewer
            if state.index is None:
                self._place(state)
        return self._paint(sent, state, more)

    def _place(self, state: _State) -> None:
        state.index = self.desk.data.index_of(state.view.row)
        if state.index is None:
            gone = state.view.row
            found = self.desk.first(state.reviewer, state.tag, state.show)
            self._move(state, 0 if found is None else found)
            if gone:
                raise ReviewError(f"row {gone} is not in the set; nothing was written")

    def _move(self, state: _State, index: int) -> None:
        """Show another row, as its own tag gives it."""
        data = self.desk.data
        state.index = index
        state.view = View(row=data.ids[index], digest=data.digest(index), look=data.tags[index], turn=state.view.turn)

    def _paint(self, sent: View, state: _State, more: tuple[Any, ...]) -> dict[Any, Any]:
        assert state.index is not None
        digest = self.desk.data.digest(state.index)
        view = state.view = dataclasses.replace(state.view, digest=digest, turn=_next_turn(sent.turn))
        row = self.desk.row(state.index, state.reviewer)
        found = {
            self.name: state.reviewer,
            self.tag: state.tag,
            self.show: state.show,
            self.bar: bar_html(self.desk, view, state.reviewer, (state.tag, state.show), state.message, state.wrong),
            self.card: gr.update(
                value=card_html(self.desk, view, state.index, state.reviewer), visible=state.panel != "edit"
            ),
            self.edit_panel: gr.update(visible=state.panel == "edit"),
            self.reject_panel: gr.update(visible=state.panel == "reject"),
        }
        if (view.row, view.digest, view.look) != (sent.row, sent.digest, sent.look) or state.repaint:
            found[self.player] = player_html(self.desk, self.shelf, view, state.index)
        if state.panel == "reject" and not more:
            found[self.reason] = ""
        if state.panel == "edit" and not more:
            found |= {box: _form_value(row, name) for name, box in self.form.items()}
        return found

    # Going through the rows

    def _open(self, state: _State) -> None:
        state.repaint = True
        assert state.index is not None
        self._move(state, state.index)

    def _stay(self, state: _State) -> None:
        """Paint what is there."""

    def _filter(self, state: _State) -> None:
        assert state.index is not None
        if not self.desk.fits(state.index, state.reviewer, state.tag, state.show):
            found = self.desk.first(state.reviewer, state.tag, state.show)
            if found is None:
                raise ReviewError("no row fits; this one is shown all the same")
            self._move(state, found)

    def _go(self, state: _State, step: int, show: str | None = None) -> None:
        assert state.index is not None
        wanted = show or state.show
        found = self.desk.following(state.index, step, state.reviewer, state.tag, wanted)
        if found is None and show == "unreviewed":
            found = self.desk.following(-1, 1, state.reviewer, state.tag, wanted)
        if found is None or found == state.index:
            state.message = "there is no further row" if show is None else "every row is decided"
        else:
            self._move(state, found)

    # Looking

    def _reveal(self, state: _State) -> None:
        state.view = dataclasses.replace(state.view, revealed=not state.view.revealed)

    def _answer(self, state: _State) -> None:
        if state.view.revealed:
            raise ReviewError("the right answer has been shown; an answer would not be your own")
        state.view = dataclasses.replace(state.view, answer=(state.view.pick or "")[:1].upper() or None)

    def _look(self, state: _State) -> None:
        assert state.index is not None
        own = self.desk.data.tags[state.index]
        try:
            look = ModalityTag.parse(state.view.pick or own).value
        except ValueError as error:
            raise ReviewError(str(error)) from error
        looked = dict.fromkeys([*state.view.looked, *([look] if look != own else [])])
        state.view = dataclasses.replace(state.view, look=look, looked=tuple(looked))

    # Deciding

    def _decide(self, action: str, state: _State, **values: Any) -> None:
        assert state.index is not None
        entry = self.desk.decide(state.index, state.reviewer, action, state.view.shown, **values)
        tag = entry.changes.get("tag")
        moved = f" {self.desk.data.tags[state.index]} → {tag}" if tag and not entry.rejected else ""
        state.message = f"{entry.row}: {entry.decision}{moved}"
        if action != "edit":
            self._go(state, 1)

    def _undo(self, state: _State) -> None:
        entry = self.desk.undo(state.reviewer)
        if entry is None:
            raise ReviewError("there is nothing to undo")
        state.message = f"{entry.row}: undone, {entry.before['decision']} → {entry.after['decision']}"
        self._move(state, self.desk.data.index_of(entry.row) or 0)

    def _open_edit(self, state: _State) -> None:
        state.panel = "edit"
        state.view = dataclasses.replace(state.view, revealed=True)  # the form shows it

    def _edit(self, state: _State, *values: str) -> None:
        assert state.index is not None
        state.panel = "edit"  # it stays open where the edit is refused
        row = self.desk.row(state.index, state.reviewer)
        self._decide("edit", state, edit=edited_fields(row, dict(zip(_FORM, values, strict=True))))
        state.panel = None

    def _open_reject(self, state: _State) -> None:
        state.panel = "reject"

    def _reject(self, state: _State, reason: str) -> None:
        state.panel = "reject"
        self._decide("reject", state, reason=state.view.pick or reason)
        state.panel = None


@dataclasses.dataclass
class _State:
    """What an action works on."""

    view: View
    tag: str
    show: str
    reviewer: str = ""
    index: int | None = None
    panel: str | None = None
    message: str = ""
    wrong: bool = False
    repaint: bool = False


def _next_turn(turn: int) -> int:
    """Return what tells an answer from all others that a page has had, also one to the same view: milliseconds."""
    return max(turn + 1, time.time_ns() // 1_000_000)


def _form_value(row: dict[str, Any], name: str) -> Any:
    """Return a field's box of the form: with its value, or hidden where the set has no such column."""
    if name == "prompt":
        text = prompt_text(row)
    elif name == "options":
        text = "\n".join(shown_options(row))
    else:
        text = row.get(name)
    used = name in row and (name in ("question", "options", "answer") or text is not None)
    if row.get("question") is None and name in ("question", "options", "answer"):
        used = False
    return gr.update(value=text or "", visible=used)


def page_assets() -> dict[str, str]:
    """Return style and script of the page, for Gradio to put into it."""
    css = (ASSETS / "page.css").read_text(encoding="utf-8")
    script = (ASSETS / "keys.js").read_text(encoding="utf-8")
    return {"css": css, "head": f"<script>{script}</script>"}


assert set(_FORM) <= set(EDITABLE)
