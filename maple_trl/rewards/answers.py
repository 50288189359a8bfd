"""Reading an answer out of a completion, and grading it. Plain strings in, plain numbers out."""

from __future__ import annotations

import math
import re
from typing import Any


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK_TAG = re.compile(r"</?think>")
# Written out without re.IGNORECASE and without \d on purpose: with Unicode case folding the Kelvin sign would match K
# and the long s would match S, and \d takes digits of every script.
_OPTION = re.compile(
    r"(?:([A-Za-z])[.):]?|\(([A-Za-z])\)[.:]?)|(?:([A-Za-z])[.):]|\(([A-Za-z])\)[.:]?)\s.*", re.DOTALL
)
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """
    The text that the model wrote, for both forms in which TRL hands over a completion.

    Args:
        completion (`str` or `list[dict]`):
            Plain text, or the messages of a conversational completion. Of the messages only the assistant's count
            (what a tool returned is not the model's answer); content may be text, a list of content blocks, or `None`.

    Returns:
        `str`: the assistant's texts, joined by newlines.
    """
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        if message.get("role", "assistant") != "assistant":
            continue
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(block.get("text") or "" for block in content if block.get("type", "text") == "text")
        texts.append(content)
    return "\n".join(texts)


def extract_answer(text: str) -> str | None:
    """
    The content of the one `<answer>…</answer>` of a completion, stripped.

    `None` when there is no answer, when there are several (hedging is not answering), when a tag is left open, or when
    the answer stands inside a think block. A completion whose `<think>` stood in the prompt is read correctly: it
    starts inside the block, and its answer counts when it comes after `</think>`.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    match = _ANSWER.search(text)
    if match is None or _THINK_TAG.search(match[1]):
        return None
    before = _THINK_TAG.findall(text[: match.start()])
    after = _THINK_TAG.findall(text[match.end() :])
    inside_think = (before and before[-1] == "<think>") or (after and after[0] == "</think>")
    return None if inside_think else match[1].strip()


def option_letter(text: str) -> str | None:
    """
    The upper-case option letter that an answer names: `B`, `b`, `B.`, `(B)`, `B)`, `B:` alone or followed by the
    option's text (`B. a red square`). `None` for anything else; `A cat` names no option, for nothing parts the letter
    from the text.
    """
    match = _OPTION.fullmatch(text.strip())
    return next(group for group in match.groups() if group).upper() if match else None


def number(text: str) -> float | None:
    """The finite number that a text consists of (`12`, `-3.5`, `1e3`, `1,200`), or `None`."""
    text = text.strip()
    if not _NUMBER.fullmatch(text) or not any("0" <= char <= "9" for char in text.lower().split("e")[0]):
        return None
    value = float(text.replace(",", ""))
    return value if math.isfinite(value) else None


def grade_answer(answer: str | None, solution: Any) -> float | None:
    """
    Grades one extracted answer against the row's solution.

    Args:
        answer (`str`, *optional*):
            What [`extract_answer`] returned.
        solution (`Any`):
            The row's solution: an option (`"B"`, `"(B)"`, `"B. text"`), a number or its text, or any other text; an
            `<answer>` wrapper around it is taken off.

    Returns:
        `float` or `None`: in `[0, 1]`; 1 for the right option (case does not matter), `max(0, 1 - |y' - y| / |y|)` for
        a number `y != 0`, exact equality for `y = 0`, equality up to case and white space for other text. `None` when
        there is no solution (`None`, NaN or blank): the row can't be graded.
    """
    if solution is None or (isinstance(solution, float) and math.isnan(solution)):
        return None
    expected = str(solution).strip()
    wrapped = extract_answer(expected)
    expected = expected if wrapped is None else wrapped
    if not expected:
        return None
    if answer is None:
        return 0.0
    letter = option_letter(expected)
    if letter is not None:
        return float(option_letter(answer) == letter)
    truth = number(expected)
    if truth is not None:
        value = number(answer)
        if value is None:
            return 0.0
        return float(value == 0.0) if truth == 0.0 else max(0.0, 1.0 - abs(value - truth) / abs(truth))
    return float(answer.casefold().split() == expected.casefold().split())
