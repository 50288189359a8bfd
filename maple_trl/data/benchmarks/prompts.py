"""How a benchmark's question becomes a prompt: templates with a version and a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from maple_trl.omni.templates import option_lines


ANSWER_KINDS = ("option", "options", "yes_no", "number", "text")
"""What a solution is: one letter, several letters (`"A,C"`, in order), Yes or No, a number, or any text."""


@dataclass(frozen=True)
class PromptStyle:
    """
    A form of prompt. A changed text is a changed `version`: numbers of two versions are not comparable.

    Attributes:
        name: as it is asked for.
        version: counts up with every change of a text below.
        layout: of the message; holds `{question}`, `{options}` (with its line break, empty without options) and
            `{instruction}`.
        option_line: of one option; holds `{letter}` and `{text}`.
        instructions: the form of the answer, for each of `ANSWER_KINDS`.
        answer_format: what reads such an answer, one of [`~maple_trl.rewards.answers.ANSWER_FORMATS`].
    """

    name: str
    version: int
    layout: str
    option_line: str
    instructions: Mapping[str, str]
    answer_format: str = "tags"

    @property
    def canonical(self) -> str:
        """All that decides a prompt, as JSON with sorted keys."""
        return json.dumps(
            {
                "name": self.name,
                "version": self.version,
                "layout": self.layout,
                "option_line": self.option_line,
                "instructions": dict(self.instructions),
            },
            sort_keys=True,
        )

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of `canonical`."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:16]

    def render(self, question: str, options: Sequence[str], kind: str) -> str:
        """
        Return the text of a question.

        Args:
            question: its text.
            options: texts without letters, at most 26; empty for an open question.
            kind: one of `ANSWER_KINDS`.
        """
        lines = option_lines(options, self.option_line)
        # One pass over the layout: a question may itself hold braces.
        parts = {"question": question, "options": "".join(f"{line}\n" for line in lines)}
        return self.layout.format(**parts, instruction=self.instructions[kind])


def _instructions(before: str, form: str) -> Mapping[str, str]:
    return MappingProxyType(
        {
            "option": f"{before} with the letter of the one right option, in this form: {form.format('LETTER')}",
            "options": (
                f"{before} with the letters of all right options in alphabetical order, joined by commas without "
                f"spaces, in this form: {form.format('LETTERS')}"
            ),
            "yes_no": f"{before} with Yes or No, in this form: {form.format('Yes or No')}",
            "number": f"{before} with one number in digits, in this form: {form.format('NUMBER')}",
            "text": f"{before} briefly, in this form: {form.format('ANSWER')}",
        }
    )


_LAYOUT = "{question}\n{options}{instruction}"

PROMPT_STYLES: Mapping[str, PromptStyle] = MappingProxyType(
    {
        style.name: style
        for style in (
            PromptStyle(
                name="think",
                version=1,
                layout=_LAYOUT,
                option_line="{letter}. {text}",
                instructions=_instructions(
                    "Think about it first, then answer", "<think>your thoughts</think><answer>{}</answer>"
                ),
            ),
            PromptStyle(
                name="answer",
                version=1,
                layout=_LAYOUT,
                option_line="{letter}. {text}",
                instructions=_instructions("Answer", "<answer>{}</answer>"),
            ),
            PromptStyle(
                name="brackets",
                version=1,
                layout=_LAYOUT,
                option_line="{letter}. {text}",
                instructions=_instructions("Answer", "[{}]"),
                answer_format="brackets",
            ),
        )
    }
)
"""
`think` asks for thoughts and an answer, `answer` for the answer alone: `accuracy_reward` reads both. `brackets` asks for an
answer that ends in `[B]`, as MAPLE's prompts do: for `accuracy_reward` with `answer_format="brackets"`.
"""


def prompt_style(style: str | PromptStyle) -> PromptStyle:
    """
    Return a style by its name.

    Raises:
        ValueError: for a name that there is not.
    """
    if isinstance(style, PromptStyle):
        return style
    if style not in PROMPT_STYLES:
        raise ValueError(f"there is no prompt style {style!r}; the styles are {', '.join(PROMPT_STYLES)}")
    return PROMPT_STYLES[style]
