"""Texts on their way to a judge and back: foreign text made harmless, what earns nothing by rule, grades read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from maple_trl.chat.structured import NoObjectError, after_thoughts, matching_objects
from maple_trl.metrics.answers import words
from maple_trl.rewards.answers import extract_answer


# "<" before anything but white space opens what a chat template may take for a control token, in every family; so do
# words in capitals in square brackets.
_OPENING = re.compile(r"<(?=\S)|\[(?=/?[A-Z_]{3,}\])")
_ANSWER = re.compile(r"<answer>.*?(?:</answer>|\Z)", re.DOTALL)
# No minus sign between name and number: what is below the scale is not on it.
_GRADE = re.compile(
    r"\W*([A-Za-z][A-Za-z_ /-]{0,40}?)[\s*`\"']*[:=][\s*`\"']*([01](?:\.[0-9]+)?)(?: ?/ ?1(?:\.0)?)?[\s*`\"'.,;]*"
)

ECHO_WORDS = 6
ECHO_SHARE = 0.5
_PLAIN_CHARACTERS = 20_000


def harmless(text: str, limit: int | None = None) -> str:
    """
    Change foreign text so that it may stand in a prompt.

    A space after each `<`, so that no control token of a chat template (`<|im_end|>`, `</s>`) and no mark of a fence
    can stand in it; likewise for `[INST]`. Half characters, which UTF-8 cannot hold, become `?`.

    Args:
        text (`str`):
            The text.
        limit (`int`, *optional*):
            Characters after which it is cut, with a note that says so.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}\n[cut: {len(text) - limit} more characters]"
    return _OPENING.sub(lambda match: match[0] + " ", text)


def says_nothing(text: str) -> bool:
    """Return whether there is no letter and no digit in a text: empty, white space, a bare `:`."""
    return not any(map(str.isalnum, text))


def echoes(text: str, original: str) -> bool:
    """
    Return whether a text is mostly a copy of another one: at least half of its runs of six words stand there too.

    Case and punctuation do not matter. A text of fewer words is no copy. In scripts without spaces between words each character
    is one (see [`~maple_trl.metrics.answers.words`]).
    """
    runs = _runs(text)
    if not runs:
        return False
    known = set(_runs(original))
    return sum(run in known for run in runs) >= ECHO_SHARE * len(runs)


def _runs(text: str) -> list[tuple[str, ...]]:
    found = words(text)
    return [tuple(found[i : i + ECHO_WORDS]) for i in range(len(found) - ECHO_WORDS + 1)]


def caption_text(text: str) -> str:
    """
    Return the caption in a completion: its one answer where it has the tags, else what stands after its thoughts.

    Empty when thoughts were begun and not ended.
    """
    answer = extract_answer(text)
    if answer is not None:
        return answer
    return (after_thoughts(text) or "").strip()


def think_block(text: str) -> str | None:
    """
    Return the one block of thoughts of a completion, without any answer in it.

    `None` where there is none or several, or it is not closed. Where the prompt ends with `<think>`, it begins with
    the completion.
    """
    if text.count("</think>") != 1 or text.count("<think>") > 1:
        return None
    before = text.partition("</think>")[0]
    if "<think>" in text and "<think>" not in before:
        return None
    return _ANSWER.sub("", before.rpartition("<think>")[2]).strip()


def as_text(value: Any) -> str:
    """Return a cell of a data set as text: strings as they are, lists of strings as lines, other values as JSON."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return "\n".join(item.strip() for item in value).strip()
    return json.dumps(value, ensure_ascii=False, default=str) if value not in ([], {}) else ""


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a prompt's user messages."""
    if isinstance(prompt, str):
        return prompt.strip()
    texts = []
    for message in prompt:
        content = message.get("content") or ""
        if message.get("role") != "user":
            continue
        blocks = [{"text": content}] if isinstance(content, str) else content
        texts += [block["text"] for block in blocks if block.get("type", "text") == "text" and block.get("text")]
    return "\n".join(texts).strip()


def verdict_schema(axes: Sequence[str], scale: Sequence[float] | None) -> dict[str, Any]:
    """Return the JSON schema of a verdict: every axis once, with a grade of the scale, or in [0, 1] without one."""
    grades = {"minimum": 0, "maximum": 1} if scale is None else {"enum": list(scale)}
    return {
        "type": "object",
        "properties": {axis: {"type": "number", **grades} for axis in axes},
        "required": list(axes),
        "additionalProperties": False,
    }


def read_verdict(text: str, axes: Sequence[str], scale: Sequence[float] | None, cut: bool = False) -> dict[str, float]:
    """
    Read the grades in a judge's message: a JSON object, or lines where there is none (see [`read_plain_grades`]).

    Several objects must agree. A judge may quote a verdict that the judged text holds, before its own or behind it. A
    message that was `cut` at the token limit has a verdict only where it ends with an object: lines have no end that could
    be seen, and `0` may be what is left of `0.6`.

    Raises:
        NoObjectError: when there are no grades of the scale, or several that differ.
    """
    try:
        found = matching_objects(text, verdict_schema(axes, scale), cut)
    except NoObjectError:
        grades = None if cut else read_plain_grades(text, axes, scale)
        if grades is None:
            raise
        return grades
    if any(verdict != found[0] for verdict in found):
        raise NoObjectError("several verdicts that differ")
    return {axis: float(found[0][axis]) for axis in axes}


def read_plain_grades(text: str, axes: Sequence[str], scale: Sequence[float] | None) -> dict[str, float] | None:
    """
    Read the grades in an answer of lines such as `missing: 0.8` or `**Visual objects** = 1.0`.

    `None` unless every axis has one line, or several with the same grade, and every grade is of the scale: what is off
    the scale is an invalid answer, not a number to be moved. `None` also for thoughts that were begun and not ended.
    """
    found: dict[str, set[float]] = {axis: set() for axis in axes}
    for line in (after_thoughts(text) or "")[-_PLAIN_CHARACTERS:].splitlines():
        match = _GRADE.fullmatch(line[:200].strip())
        if match is None:
            continue
        name = "_".join(re.split(r"[\s_/-]+", match[1].lower()))
        axis = next((axis for axis in axes if name == axis or name.startswith(f"{axis}_")), None)
        if axis is not None:
            found[axis].add(float(match[2]))
    on_scale = (lambda grade: 0 <= grade <= 1) if scale is None else set(scale).__contains__
    if any(len(grades) != 1 or not all(map(on_scale, grades)) for grades in found.values()):
        return None
    return {axis: grades.pop() for axis, grades in found.items()}
