"""What a row is to the QA+ builder: a question with options, its signals and its prompt, or the reason why it is none."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from maple_trl.data.benchmarks.options import FormError, described, read_letter
from maple_trl.data.benchmarks.prompts import PromptStyle
from maple_trl.data.none_answers import plain_option, says_none, speaks_of_others
from maple_trl.modalities import ModalityTag
from maple_trl.omni.media.subtitles import is_subtitle_file
from maple_trl.omni.options import bare_options, plain_options


COLUMNS = (
    *("id", "tag", "required_tag", "stratum", "question", "options", "answer", "solution", "prompt"),
    *(
        "reference",
        "reference_v",
        "reference_a",
        "reference_s",
        "video",
        "audio",
        "subtitle",
        "image",
        "images",
        "split",
    ),
)
"""The columns that are looked at."""

_HEADS = tuple(
    [form.format(letter) for letter in ascii_uppercase]
    for form in (
        "{}. ",
        "({}) ",
        "{}) ",
        "{}: ",
        "{} : ",
        "{}\u00a0: ",
        "{}\u202f: ",
        "{}.",
        "({})",
        "{})",
        "{}:",
        "{}、",
        "{}．",
        "{}：",
        "（{}）",
    )
)
"""What stands before an option in each form of its line, by letter."""


class NotAnItem(ValueError):
    """
    A row of which no question can be made.

    Attributes:
        reason: in a word or two, for counts.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Item:
    """
    A question with options.

    Attributes:
        name: its id.
        tag: the signals that it requires.
        right: the place of the right option.
        signals: those that the row has, as a text like a tag; may be empty.
        fixed: why its right option cannot be replaced, in a word or two; `None` where it can.
    """

    name: str
    tag: ModalityTag
    right: int
    signals: str
    fixed: str | None


class Files:
    """
    Says which files are there.

    Args:
        root: the media root, below which alone training reads; `None` takes every file for there.
    """

    def __init__(self, root: str | Path | None):
        self._root = None if root is None else os.path.realpath(root)
        self._is_there = lru_cache(1 << 16)(self._look)  # rows of one clip stand together

    def _look(self, path: str) -> bool:
        assert self._root is not None
        try:
            real = os.path.realpath(os.path.join(self._root, path))
            return os.path.commonpath([self._root, real]) == self._root and os.path.isfile(real)
        except (OSError, ValueError):  # too long a name, a zero byte
            return False

    def __call__(self, cell: Any) -> bool:
        """Return whether a cell names files, and all of them are there."""
        paths = [path for path in (cell if isinstance(cell, list) else [cell]) if path]
        if self._root is None:
            return bool(paths)
        return bool(paths) and all(isinstance(path, str) and self._is_there(path) for path in paths)


def read_item(row: Mapping[str, Any], style: PromptStyle | None, files: Files) -> Item:
    """
    Read a row.

    Args:
        row: with those of `COLUMNS` that there are.
        style: how its prompts will be written; `None` keeps the way in which they are.

    Raises:
        NotAnItem: for a row of which no question can be made.
    """
    name = row.get("id")
    if name is None or name == "":
        raise NotAnItem("no id", "field 'id' is empty, and what becomes of a row is drawn by its id")
    options = row.get("options")
    if isinstance(options, list):
        options = plain_options(options)
    if not options:
        references = [field for field in COLUMNS if field.startswith("reference") and row.get(field)]
        if references and not row.get("question"):
            raise NotAnItem("caption", f"it has field {references[0]!r} and no options")
        raise NotAnItem("open question", "field 'options' is empty")
    tag = _tag(row)
    right = _right(row, options)
    options = bare_options(options)
    has_prompt = "prompt" in row  # a table without the column is asked by templates
    if style is None:
        if has_prompt:
            find_options(row["prompt"], options)
    elif not isinstance(row.get("question"), str) or not row["question"].strip():
        raise NotAnItem("no question", "field 'question' is empty, from which the prompt is made anew")
    elif has_prompt and _asked(row["prompt"]) is None:
        raise NotAnItem("no prompt", "field 'prompt' has no message of the user that is a text")
    return Item(str(name), tag, right, _signals(row, files), _fixed(options, right))


def _tag(row: Mapping[str, Any]) -> ModalityTag:
    try:
        tag = ModalityTag.parse(row.get("tag") or "")
        required = ModalityTag.parse(row.get("required_tag") or tag)
    except ValueError as error:
        raise NotAnItem("no tag", f"field 'tag': {error}") from None
    stratum = row.get("stratum") or None
    if stratum is not None and (required != tag or stratum != "exact"):
        raise NotAnItem("not exact", f"it requires {required}, is fed {tag} and its stratum is {stratum!r} already")
    return required


def _right(row: Mapping[str, Any], options: Sequence[Any]) -> int:
    if (
        not isinstance(options, list)
        or not 2 <= len(options) <= 26
        or not all(isinstance(text, str) and text.strip() for text in options)
    ):
        raise NotAnItem("bad options", "field 'options' must hold 2 to 26 texts")
    given = {name: row.get(name) for name in ("answer", "solution") if row.get(name) not in (None, "")}
    places = [_place(name, value, options) for name, value in (given or {"answer": None}).items()]
    if places[0] != places[-1]:  # rewards read the one, and the option of the other is replaced
        raise NotAnItem(
            "no answer",
            f"field 'solution' is {described(given['solution'])}, but must mean the same option as 'answer', "
            f"{described(given['answer'])}",
        )
    return places[0]


def _place(name: str, value: Any, options: Sequence[str]) -> int:
    """Return the place of the option whose letter a field says; a text would be wrong once its option is replaced."""
    if isinstance(value, str) and len(value) == 1 and value in ascii_uppercase[: len(options)]:
        return ascii_uppercase.index(value)
    try:
        return ascii_uppercase.index(read_letter(value, options))
    except FormError as error:
        raise NotAnItem("no answer", f"field {name!r} {error}") from None


def _signals(row: Mapping[str, Any], files: Files) -> str:
    video, subtitle = files(row.get("video")), row.get("subtitle")
    seen = video or files(row.get("image")) or files(row.get("images"))
    heard = files(row["audio"]) if row.get("audio") else video  # the video's track
    read = isinstance(subtitle, str) and bool(subtitle.strip())
    if read and is_subtitle_file(subtitle.strip()):
        read = files(subtitle.strip())
    return "V" * seen + "A" * heard + "S" * read


def _fixed(options: Sequence[str], right: int) -> str | None:
    forms = [plain_option(text) for text in options]
    if forms.count(forms[right]) > 1:
        return "answer twice"
    if any(map(says_none, forms)):
        return "has a none option"
    return "options speak of others" if any(map(speaks_of_others, forms)) else None


# Prompts


def find_options(prompt: Any, options: Sequence[str]) -> tuple[str, list[str]]:
    """
    Return the lines in which a prompt shows the options, and the heads of lines in their form.

    Raises:
        NotAnItem: where it does not show them all, once and in order, each on a line behind its letter.
    """
    text = _asked(prompt)
    if text is None:
        raise NotAnItem("no prompt", "field 'prompt' has no message of the user that is a text")
    for heads in _HEADS:
        lines = _lines(heads, options)
        if text.count(lines) == 1:
            return lines, heads
    raise NotAnItem(
        "prompt without options",
        "field 'prompt' does not show the options as lines 'A. text'; name a style in which prompts are written anew",
    )


def replace_options(prompt: Any, before: Sequence[str], after: Sequence[str]) -> Any:
    """Return a prompt with other options, and all else as it was."""
    lines, heads = find_options(prompt, before)
    return _with_text(prompt, str(_asked(prompt)).replace(lines, _lines(heads, after)))


def write_prompt(prompt: Any, question: str, options: Sequence[str], style: PromptStyle) -> Any:
    """Return a prompt whose last message of the user is written anew; the one message of a new prompt where there is none."""
    if prompt is None:
        prompt = [{"role": "user", "content": ""}]
    return _with_text(prompt, style.render(question, options, "option"))


def _lines(heads: Sequence[str], options: Sequence[str]) -> str:
    return "\n".join(map(operator.add, heads, options))


def _last_of_user(prompt: Any) -> int | None:
    if not isinstance(prompt, list):
        return None
    for place in range(len(prompt) - 1, -1, -1):
        if isinstance(prompt[place], Mapping) and prompt[place].get("role") == "user":
            return place
    return None


def _asked(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return prompt
    place = _last_of_user(prompt)
    content = None if place is None else prompt[place].get("content")
    return content if isinstance(content, str) else None


def _with_text(prompt: Any, text: str) -> Any:
    if isinstance(prompt, str):
        return text
    place = _last_of_user(prompt)
    return [{**message, "content": text} if i == place else message for i, message in enumerate(prompt)]
