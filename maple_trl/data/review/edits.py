"""What a reviewer may change in a row, and what follows from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from maple_trl.data.review.rows import ReviewError, prompt_text, shown_options
from maple_trl.modalities import ModalityTag
from maple_trl.omni.options import bare_options


EDITABLE = ("question", "options", "answer", "reference", "reference_v", "reference_a", "reference_s", "prompt")


_DERIVED = ("completion", "hint")
"""Columns that were made for a question or caption as it was: what is learnt of it, and what leads to its answer."""

_MADE_FOR = ("question", "options", "answer", "reference")


class EditError(ReviewError):
    """A change that would leave a row that cannot be used."""


def fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row says in each field that can be changed, its prompt as text."""
    return {name: row.get(name) for name in ("tag", *EDITABLE)} | {
        "options": shown_options(row) or None,
        "prompt": prompt_text(dict(row)),
    }


def changed(row: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return a row with changes, and with what follows from them.

    `solution`, `required_tag` and `prompt` repeat a changed field, and so does a `completion` that is the old answer or caption and no
    more. Any other `completion`, and the `hint`, were made for the question as it was and become `None` with it.
    """
    new = dict(row) | {name: value for name, value in changes.items() if name != "prompt"}
    if "answer" in changes and "solution" in row:
        new["solution"] = changes["answer"]
    if "tag" in changes and row.get("required_tag") is not None:
        new["required_tag"] = changes["tag"]
    if "prompt" in changes:
        old = row.get("prompt")
        new["prompt"] = changes["prompt"] if isinstance(old, str) else [{**old[0], "content": changes["prompt"]}]
    if any(name in changes for name in _MADE_FOR):
        new |= dict.fromkeys((name for name in _DERIVED if name in row), None)
        said = row.get("completion")
        repeated = (name for name in ("answer", "reference") if name in changes and said == row.get(name))
        if said is not None and (name := next(repeated, None)) is not None:
            new["completion"] = changes[name]
    return new


def emptied(row: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Return the columns that changes leave without a value, since what they held was made for the row as it was."""
    new = changed(row, changes)
    return [name for name in _DERIVED if row.get(name) is not None and new[name] is None]


def checked_tag(row: Mapping[str, Any], tag: str) -> str:
    """
    Return the tag that a row is given.

    Raises:
        EditError: for a row that is fed other signals than its question needs: it was made of another row.
    """
    try:
        parsed = ModalityTag.parse(tag).value
    except ValueError as error:
        raise EditError(str(error)) from error
    needed = row.get("required_tag")
    if needed is not None and needed != row["tag"]:
        raise EditError(
            f"the row is fed {row['tag']} and needs {needed}: it was made of a row of tag {needed}, and takes its tag; review "
            "the set before such rows are made of it"
        )
    return parsed


def checked_edit(row: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the fields that an edit changes, with their new values.

    The prompt follows a changed question and changed options, where it holds them word for word and is not changed itself.

    Args:
        row: as the reviewer sees it.
        given: the new values by field (of `EDITABLE`); what is not named stays.

    Raises:
        EditError: when the row would have no question, too few or equal options, no right answer, or a prompt that no
            longer fits; and for a field that the row has not got.
    """
    old = fields(row)
    new = dict(old)
    for name, value in given.items():
        if name not in EDITABLE:
            raise EditError(f"{name} cannot be edited; what can is {', '.join(EDITABLE)}")
        new[name] = _tidied(name, value)
        if name == "options" and not all(old[name] or []):
            if new[name] != [text for text in old[name] if text]:
                raise EditError("an option is missing in between, and letters would be of other texts; reject the row")
            new[name] = old[name]
        if new[name] != old[name] and name not in row:
            raise EditError(f"the set has no column {name}")
    if new["question"] is not None or old["question"] is not None:
        _check_question(new)
    for name in ("question", "reference", "reference_v", "reference_a", "reference_s", "prompt"):
        if old[name] and not new[name]:
            raise EditError(f"{name} must not be empty; reject the row if there is nothing to say")
    if new["prompt"] == old["prompt"] and old["prompt"] is not None:
        new["prompt"] = _following(old, new)
    elif (
        old["prompt"] is None
        and row.get("prompt")
        and (new["question"], new["options"])
        != (
            old["question"],
            old["options"],
        )
    ):
        raise EditError("the row's prompt is more than one message of the user, and cannot follow; reject the row")
    return {name: new[name] for name in EDITABLE if new[name] != old[name]}


def _tidied(name: str, value: Any) -> Any:
    if name == "options":
        found = [" ".join(str(text).split()) for text in value or []]
        return bare_options([text for text in found if text]) or None
    text = str(value or "").strip()
    return text or None


def _check_question(new: dict[str, Any]) -> None:
    if not new["question"]:
        raise EditError("a question needs a text")
    if not new["answer"]:
        raise EditError("a question needs a right answer")
    options = new["options"]
    if not options:
        return
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise EditError(f"{len(options)} options; a question has 2 to 26, one a line, or none where it is open")
    if len({text.casefold() for text in options}) < len(options):
        raise EditError("two options are the same")
    letters = ascii_uppercase[: len(options)]
    given = [letter.strip() for letter in new["answer"].upper().split(",")]
    new["answer"] = ",".join(given)
    if set(given) - set(letters) or len(set(given)) < len(given):
        raise EditError(
            f"the right answer is {new['answer']!r}; it is one of the letters {', '.join(letters)}, or several of them joined "
            "by commas"
        )


def _following(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the prompt with the new question and options in the place of the old ones."""
    prompt = str(old["prompt"])
    by_hand = "word for word, and once, so that it cannot follow; change the prompt too"
    if new["options"] != old["options"]:
        prompt = _with_options(prompt, old["options"] or [], new["options"] or [], by_hand)
    if new["question"] != old["question"] and old["question"]:
        if prompt.count(old["question"]) != 1:
            raise EditError(f"the prompt does not hold the question {by_hand}")
        prompt = prompt.replace(old["question"], new["question"])
    return prompt


def _with_options(prompt: str, old: Sequence[str], new: Sequence[str], by_hand: str) -> str:
    """Replace the lines of the options; a prompt that lists none stays as it is."""
    lines = prompt.split("\n")
    for start in range(len(lines) - len(old) + 1):
        marks = [_mark(*pair) for pair in zip(lines[start:], old, ascii_uppercase, strict=False)]
        if old and len(marks) == len(old) and None not in marks:
            before, after = marks[0] or ("", "")
            made = [f"{before}{letter}{after}{text}" for text, letter in zip(new, ascii_uppercase, strict=False)]
            return "\n".join([*lines[:start], *made, *lines[start + len(old) :]])
    if any(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", prompt) for text in old):
        raise EditError(f"the prompt does not list the options {by_hand}")
    return prompt


def _mark(line: str, text: str, letter: str) -> tuple[str, str] | None:
    """Return what stands around the letter of an option's line, such as `("(", ") ")`; `None` of another line."""
    if not line.rstrip().endswith(text):
        return None
    head = line.rstrip()[: -len(text)]
    before, found, after = head.partition(letter)
    return (before, after) if found and not re.search(r"\w", before + after) else None
