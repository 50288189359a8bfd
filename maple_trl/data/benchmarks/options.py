"""Options and answers in the forms in which benchmarks publish them."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from maple_trl.omni.options import bare_options, is_no_option, plain_options


class FormError(ValueError):
    """A value that is not in its published form; the message says what it is and what it must be."""


_ANSWER_TAG = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)


def read_options(value: Any, at_least: int = 2) -> list[str]:
    """
    Read the texts of a question's options, in the order of their letters and without them.

    Args:
        value: a list of texts or numbers (`"red"`, or `"A. red"`, `"(A) red"`, `"A: red"` where every one has its letter, in
            order; what pads it at its end is no option), a mapping from letters to texts (a `None` is an option that is
            not there; letters must follow each other from A), or either of them written as JSON or as a Python literal.
        at_least: fewest options.

    Raises:
        FormError: for anything else.
    """
    given = value
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(value, Mapping):
        letters = sorted(str(letter) for letter, text in value.items() if not is_no_option(text))
        if letters != list(ascii_uppercase[: len(letters)]):
            raise FormError(f"must have the letters A, B, C, … without gaps, but has {', '.join(letters) or 'none'}")
        value = [value[letter] for letter in letters]
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = plain_options(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not at_least <= len(value) <= 26:
        raise FormError(f"must be a list of {at_least} to 26 options, but is {described(given)}")
    for letter, text in zip(ascii_uppercase, value, strict=False):
        if not isinstance(text, str) or not text.strip():
            raise FormError(f"must have a text as option {letter}, but has {text!r}")
    texts = [text.strip() for text in value]
    told = bare_options(texts)
    if told != texts:
        return told
    bare = [text for text in texts if re.fullmatch(r"\(?[A-Z][.):]+", text)]
    if bare:
        raise FormError(f"must have a text behind the letter of each option, but has {bare[0]!r}")
    return texts


def read_letter(value: Any, options: Sequence[str]) -> str:
    """
    Read the letter of the right option, given as `B`, `B.`, `(B)` or `<answer>B</answer>`.

    Raises:
        FormError: when it is not the letter of one of the options.
    """
    text = unwrapped(value)
    letters = ascii_uppercase[: len(options)]
    match = re.fullmatch(r"\(?([A-Z])[.):]*", text) if isinstance(text, str) else None
    if match is None or match[1] not in letters:
        raise FormError(f"must be the letter of an option ({', '.join(letters)}), but is {described(value)}")
    return match[1]


def read_letters(value: Any, options: Sequence[str]) -> str:
    """
    Read the letters of all right options (`A,C`, in order), given as `C, A`, `A,C` or inside `<answer>…</answer>`.

    Raises:
        FormError: when one of them is not the letter of an option, or is given twice.
    """
    text = unwrapped(value)
    letters = [part.strip() for part in text.split(",")] if isinstance(text, str) else []
    if not letters or set(letters) - set(ascii_uppercase[: len(options)]) or len(set(letters)) < len(letters):
        raise FormError(
            f"must be letters of options ({', '.join(ascii_uppercase[: len(options)])}) joined by commas, but is "
            f"{described(value)}"
        )
    return ",".join(sorted(letters))


def read_option_text(value: Any, options: Sequence[str]) -> str:
    """
    Return the letter of the one option whose text is given.

    Raises:
        FormError: when no option has this text, or several have.
    """
    wanted = value.strip() if isinstance(value, str) else value
    places = [place for place, text in enumerate(options) if text == wanted]
    if len(places) != 1:
        fault = "no option has" if not places else f"{len(places)} options have"
        raise FormError(f"must be the text of one option, but {fault} the text {described(value)}")
    return ascii_uppercase[places[0]]


def read_option_index(value: Any, options: Sequence[str]) -> str:
    """
    Return the letter of the option whose number, from 0, is given.

    Raises:
        FormError: when there is no such option.
    """
    if isinstance(value, float) and value.is_integer():  # of a column with an empty cell
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(options):
        raise FormError(f"must be the number of an option from 0 to {len(options) - 1}, but is {described(value)}")
    return ascii_uppercase[value]


def read_number(value: Any) -> str:
    """
    Read a count, as digits.

    Raises:
        FormError: when it is no whole number of 0 or more.
    """
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}", text):
        raise FormError(f"must be a whole number of 0 or more, but is {described(value)}")
    return str(int(text))


def unwrapped(value: Any) -> Any:
    """Strip a text of white space and `<answer>` around it; anything else stays as it is."""
    if not isinstance(value, str):
        return value
    match = _ANSWER_TAG.fullmatch(value)
    return (match[1] if match else value).strip()


def shuffled(options: Sequence[str], solution: str, seed: int, name: str) -> tuple[list[str], str]:
    """
    Shuffle options, and return them with the letters that the right ones then have.

    Args:
        options: texts without letters.
        solution: the right letter, or several joined by commas.
        seed, name: decide the order; `name` is the question's id, so that it does not depend on the other questions.
    """
    digest = hashlib.sha256(json.dumps([seed, name]).encode()).digest()
    order = list(range(len(options)))
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    moved = {ascii_uppercase[old]: ascii_uppercase[new] for new, old in enumerate(order)}
    return [options[old] for old in order], ",".join(sorted(moved[letter] for letter in solution.split(",")))


def described(value: Any) -> str:
    """Return a value as errors show it: short, and of a container its size alone."""
    if isinstance(value, str) and len(value) > 60:
        return repr(value[:57] + "…")
    if isinstance(value, str | int | float | bool) or value is None:
        return repr(value)
    return f"{type(value).__name__} of {len(value)} items" if hasattr(value, "__len__") else type(value).__name__


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text
