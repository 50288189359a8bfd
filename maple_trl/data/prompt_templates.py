"""Templates of prompts that come with the package, and how an option names one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from maple_trl.data.benchmarks.prompts import ANSWER_KINDS, PROMPT_STYLES, PromptStyle
from maple_trl.messages import did_you_mean
from maple_trl.modalities import Modality, ModalityTag
from maple_trl.omni.errors import RowError
from maple_trl.omni.options import plain_options
from maple_trl.omni.templates import Asking, PromptTemplate


# MAPLE, B.4: subtitles, question, options, and the final option in square brackets. Own words.
_QUESTION = (
    "{question}\n\n{options}\n\nChoose the one right option, and end your answer with its letter in square brackets."
)
_WITH_SUBTITLES = "Subtitles: {subtitle}\n\n" + _QUESTION

# MAPLE, B.5: a base, a text for the tag, an end. Own words.
_BASE = (
    "A video tells something in up to three ways: by its pictures, by its sound and by its subtitles. Sound is speech as "
    "well as everything else that can be heard; whoever describes it describes both."
)
_FORM = "Write the heading '### Video Description', and the sentence below it."
_END = (
    "Let it be one natural sentence in which everything you were given fits together, and do not mention by which way you "
    "learned of it."
)
_TASKS = {
    ModalityTag.V: "You are given the pictures of a video without its sound. Say in one sentence what happens in it.",
    ModalityTag.A: (
        "You are given the sound of a video. Say in one sentence what happens in it, with what is spoken and what is heard "
        "in the background."
    ),
    ModalityTag.S: (
        "You are given the subtitles of a video. Say in one sentence what happens in it, by nothing but them."
    ),
    ModalityTag.VA: (
        "You are given a video with its sound. Say in one sentence what happens in it, by what is seen and by what is heard: "
        "speech and background sounds."
    ),
    ModalityTag.VS: (
        "You are given the pictures of a video and its subtitles. Say in one sentence what happens in it, by both, and guess "
        "nothing about its sound."
    ),
    ModalityTag.AS: (
        "You are given the sound of a video and its subtitles. Say in one sentence what happens in it, by what is heard and "
        "by the subtitles."
    ),
    ModalityTag.VAS: (
        "You are given a video with its sound and its subtitles. Say in one sentence what happens in it, by what is seen, by "
        "what is heard (speech and background sounds) and by the subtitles."
    ),
}


def _caption(tag: ModalityTag) -> str:
    parts = [_BASE, f"{_TASKS[tag]} {_FORM}"]
    if Modality.SUBTITLE in tag.modalities:
        parts.append("Subtitles: {subtitle}")
    return "\n\n".join([*parts, _END])


@dataclass(frozen=True)
class StyledTemplate:
    """A [`PromptStyle`] of benchmarks, for rows with `question` and, unless it is open, `options`."""

    style: PromptStyle

    @property
    def answer_format(self) -> str:
        """What reads the answers that it asks for."""
        return self.style.answer_format

    @property
    def described(self) -> dict[str, Any]:
        """All that decides its texts, as JSON values."""
        return {"name": self.style.name, "version": self.style.version, "digest": self.style.digest}

    def render(self, row: Mapping[str, Any], fed: ModalityTag | None) -> str:
        """Return the text for a row; see [`PromptTemplate.render`]."""
        question, options = row.get("question"), row.get("options") or []
        if not isinstance(question, str) or not question.strip():
            raise RowError(
                f"prompt_template {self.style.name} needs a text in column 'question', got {question!r:.60}"
            )
        if isinstance(options, list | tuple):
            options = plain_options(options)
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise RowError(f"prompt_template {self.style.name} needs texts in column 'options', got {options!r:.60}")
        kind = row.get("answer_kind")  # a column of benchmarks
        if kind not in ANSWER_KINDS:
            kind = "option" if options else "text"
        return self.style.render(question, options, kind)


PROMPT_TEMPLATES: Mapping[str, Asking] = MappingProxyType(
    {
        "maple-qa": PromptTemplate(
            {tag.value: _WITH_SUBTITLES if Modality.SUBTITLE in tag.modalities else _QUESTION for tag in ModalityTag},
            name="maple-qa",
            version=1,
            answer_format="brackets",
        ),
        "maple-caption": PromptTemplate(
            {tag.value: _caption(tag) for tag in ModalityTag}, name="maple-caption", version=1
        ),
        **{name: StyledTemplate(style) for name, style in PROMPT_STYLES.items()},
    }
)
"""
`maple-qa` and `maple-caption` ask as MAPLE does (arXiv 2602.11596, B.4 and B.5), in own words; `think`, `answer` and `brackets`
are the styles of benchmarks, without a place for the subtitle, which leads the question.
"""


def read_template(value: str | Mapping[str, str]) -> Asking:
    """
    Read what an option says of prompts.

    Args:
        value: a name in `PROMPT_TEMPLATES`, a text, or texts by tag (see [`PromptTemplate`]).

    Raises:
        ValueError: when it is none of these.
    """
    if isinstance(value, Mapping):
        return PromptTemplate(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a text, texts by tag, or one of {', '.join(PROMPT_TEMPLATES)}; got {value!r}")
    if value in PROMPT_TEMPLATES:
        return PROMPT_TEMPLATES[value]
    if "{" not in value and len(value.split()) == 1:
        raise ValueError(
            f"there is no set of templates {value!r}, and as a text it names no column; there are "
            f"{', '.join(PROMPT_TEMPLATES)}{did_you_mean(value, PROMPT_TEMPLATES)}"
        )
    return PromptTemplate({"default": value})


def texts_of(value: Any) -> Any:
    """Return texts by tag that stand as JSON, as on a command line, as a mapping, `null` as `None`; all else as it is."""
    if value == "null":
        return None
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            found = json.loads(value)
        except ValueError:
            return value  # a text that begins with a column
        return found if isinstance(found, dict) else value
    return value
