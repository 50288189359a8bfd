"""Prompts made of a row's columns: one text for all rows, or one for each choice of signals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter, ascii_uppercase
from typing import Any, Protocol

from maple_trl.modalities import Modality, ModalityTag
from maple_trl.omni.content import SUBTITLE_MARK
from maple_trl.omni.errors import RowError
from maple_trl.omni.options import bare_options, plain_options


DEFAULT = "default"
"""Key of the text for rows whose signals have none of their own."""

SUBTITLE, OPTIONS = "subtitle", "options"


class Asking(Protocol):
    """
    What makes the text of a prompt.

    Attributes:
        answer_format: what reads the answers that it asks for, one of
            [`~maple_trl.rewards.answers.ANSWER_FORMATS`]; `None` where it says nothing of their form.
        described: all that decides its texts, as JSON values.
    """

    @property
    def answer_format(self) -> str | None:
        """What reads the answers."""
        ...

    @property
    def described(self) -> dict[str, Any]:
        """All that decides its texts."""
        ...

    def render(self, row: Mapping[str, Any], fed: ModalityTag | None) -> str:
        """Return the text for a row that is fed these signals; raise [`RowError`] for a column that is not there."""
        ...


@dataclass(frozen=True)
class PromptTemplate:
    """
    Texts with names of columns in braces.

    `{options}` are the options as lines with letters. `{subtitle}` is the place of the subtitle: its text stands there
    alone, and is shortened there where a prompt is too long. Braces that are meant as such are doubled.

    Args:
        texts (`Mapping[str, str]`): by tag, for rows that are fed its signals, and under `default` for all others.
        name, version: of a set that comes with the package. A changed text is a changed version.
        answer_format: see [`Asking`].

    Raises:
        ValueError: for a key that is no tag, a tag that is given twice, and braces that hold no name of a column.
    """

    texts: Mapping[str, str]
    name: str | None = None
    version: int | None = None
    answer_format: str | None = None

    def __post_init__(self):
        if not self.texts:
            raise ValueError("a mapping of tags to texts is empty; give at least a text under 'default'")
        texts: dict[str, str] = {}
        for key, text in self.texts.items():
            tag = _checked_key(key)
            if tag in texts:
                raise ValueError(f"tag {tag} is given twice")
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"the text of {key!r} must be a text that is not blank, got {text!r}")
            _check_fields(text)
            if SUBTITLE in fields_of(text) and tag != DEFAULT and Modality.SUBTITLE not in ModalityTag(tag).modalities:
                raise ValueError(f"the text of {tag} names {{subtitle}}, and rows that are fed {tag} have none")
            texts[tag] = text
        object.__setattr__(self, "texts", texts)

    @property
    def described(self) -> dict[str, Any]:
        """All that decides its texts, as JSON values."""
        whole = json.dumps(dict(self.texts), sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
        return {"name": self.name, "version": self.version, "digest": digest}

    def render(self, row: Mapping[str, Any], fed: ModalityTag | None) -> str:
        """
        Return the text for a row.

        Args:
            row: its columns.
            fed: the signals that it is fed; `None` for none.

        Raises:
            RowError: for a column that is missing or empty, and where there is no text for these signals.
        """
        text = self.texts.get(DEFAULT if fed is None else fed.value, self.texts.get(DEFAULT))
        said = "text alone" if fed is None else fed.value
        if text is None:
            raise RowError(
                f"prompt_template has no text for rows that are fed {said}, nor one under 'default'; it has "
                f"{', '.join(self.texts)}"
            )
        values = {name: _value(row, name, said, fed) for name in fields_of(text)}
        return text.format_map(values)  # one pass: a question may itself hold braces


def fields_of(text: str) -> list[str]:
    """Return the names that stand in braces, each once."""
    return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(text) if name is not None))


def option_lines(options: Sequence[str], line: str = "{letter}. {text}") -> list[str]:
    """
    Return options with their letters; those that have them already are left as they are.

    Raises:
        RowError: for more options than letters.
    """
    if len(options) > len(ascii_uppercase):
        raise RowError(f"column 'options' holds {len(options)} texts, and there are {len(ascii_uppercase)} letters")
    if bare_options(options) != list(options):
        return list(options)
    return [line.format(letter=letter, text=text) for letter, text in zip(ascii_uppercase, options, strict=False)]


def _checked_key(key: Any) -> str:
    if key == DEFAULT:
        return DEFAULT
    try:
        return ModalityTag.parse(key).value
    except ValueError as error:
        raise ValueError(f"{key!r} is neither a tag ({', '.join(ModalityTag)}) nor 'default'") from error


def _check_fields(text: str) -> None:
    try:
        parts = [(name, form, conversion) for _, name, form, conversion in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"{text!r:.120}: {error}; braces that are meant as such are doubled") from error
    for name, form, conversion in parts:
        if not name.isidentifier() or form or conversion:
            raise ValueError(
                f"{text!r:.120}: what stands in braces must be the name of a column, as {{question}}; braces that are meant "
                "as such are doubled"
            )
        if name == "prompt":
            raise ValueError(f"{text!r:.120}: {{prompt}} is what the template makes; name the columns it is made of")
    if sum(name == SUBTITLE for name, *_ in parts) > 1:
        raise ValueError(f"{text!r:.120}: {{subtitle}} stands there twice; a prompt holds a subtitle once")


def _value(row: Mapping[str, Any], name: str, said: str, fed: ModalityTag | None) -> str:
    if name == SUBTITLE:
        if fed is None or Modality.SUBTITLE not in fed.modalities:
            raise RowError(
                f"prompt_template names {{subtitle}} for a row that is fed {said}, which has none; give texts by tag, with "
                "{subtitle} in those of S, VS, AS and VAS"
            )
        return SUBTITLE_MARK
    if name not in row:
        raise RowError(
            f"prompt_template names {{{name}}}, and there is no column {name!r}; there are {', '.join(row)}"
        )
    value = row[name]
    if name == OPTIONS and isinstance(value, list | tuple):
        texts = plain_options(value)
        if not texts or not all(isinstance(option, str) for option in texts):
            raise RowError(f"prompt_template names {{options}}, and column 'options' is {value!r:.100}, not texts")
        return "\n".join(option_lines(texts))
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # of tables: NaN
        raise RowError(f"prompt_template names {{{name}}}, and column {name!r} is empty in this row")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(
            f"prompt_template names {{{name}}}, and column {name!r} holds {type(value).__name__}; it must be a text or a "
            "number"
        )
    return str(value)
