"""Conversations as ShareGPT, LLaVA and chat servers write them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from maple_trl.data.benchmarks.base import FieldError
from maple_trl.data.benchmarks.options import described


_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "system": "system",
}
KINDS = ("video", "audio", "image")
_MARK = re.compile(r"<(video|audio|image)>")
_MARKS = re.compile(r"(\s*<(video|audio|image)>\s*)+")


def without_marks(text: str) -> str:
    """Strip a text of the marks `<video>`, `<audio>` and `<image>` before and behind it, where media go anyway."""
    begin = _MARKS.match(text)
    text = text[begin.end() :] if begin else text
    end = next((match for match in _MARKS.finditer(text) if match.end() == len(text)), None)
    return text[: end.start()] if end else text


def with_places(turns: Sequence[Mapping[str, str]], media: Mapping[str, Sequence[Any]]) -> list[dict[str, str]]:
    """
    Return turns in which every medium stands where the programs that write such conversations put it.

    A mark keeps its place. Media of a kind without any mark stand before the first of several questions, as in ms-swift, and `<image>` is
    the clip of a record that has one and no picture, as in LLaVA-NeXT. Marks that say no more than where media go anyway are left out: those
    at the beginning of the last question, one of a kind, in the order of media without a place.

    Args:
        turns: of [`read_turns`], one of the user among them.
        media: the files of the record, by the names of its fields: `images`, `video` and `audio`.
    """
    # In the order in which media without a place lead a row's last message of the user.
    files = {"image": len(media["images"]), "video": len(media["video"]), "audio": len(media["audio"])}
    if files["video"] and not files["image"]:
        turns = [{**turn, "content": turn["content"].replace("<image>", "<video>")} for turn in turns]
    placed = [dict(turn) for turn in turns]
    asking = [turn for turn in placed if turn["role"] == "user"]
    marks = Counter(kind for turn in placed for kind in _MARK.findall(turn["content"]))
    if len(asking) > 1:
        unplaced = "".join(f"<{kind}>" * number for kind, number in files.items() if not marks[kind])
        asking[0]["content"] = unplaced + asking[0]["content"]
    last = asking[-1]
    begin = _MARKS.match(last["content"])
    leading = [] if begin is None else _MARK.findall(begin.group())
    usual = leading == [kind for kind in files if kind in leading]
    if begin is not None and usual and all(marks[kind] == files[kind] == 1 for kind in leading):
        last["content"] = last["content"][begin.end() :]
    return placed


def read_turns(value: Any, name: str) -> list[dict[str, str]]:
    """
    Read a conversation as messages with role and content.

    Args:
        value: `[{"from": "human", "value": …}]`, or `[{"role": "user", "content": …}]` with texts or blocks of text.
        name: the field.

    Raises:
        FieldError: for anything else.
    """
    if not isinstance(value, list | tuple) or not value:
        raise FieldError(name, f"must be a list of turns, but is {described(value)}")
    return [_turn(turn, f"{name}[{number}]") for number, turn in enumerate(value)]


def _turn(turn: Any, name: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise FieldError(
            name, f"must be an object with 'from' and 'value' or 'role' and 'content', but is {described(turn)}"
        )
    said_by, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = _ROLES.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        raise FieldError(name, f"must be of one of {', '.join(_ROLES)}, but is of {described(said_by)}")
    if isinstance(text, list):  # blocks, as chat servers take them
        text = "".join(_block_text(block, name) for block in text)
    if not isinstance(text, str) or not text.strip():
        raise FieldError(name, f"must have a text, but has {described(text)}")
    return {"role": role, "content": text}


def _block_text(block: Any, name: str) -> str:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text":
        return str(block.get("text") or "")
    if kind not in KINDS:
        known = ", ".join(("text", *KINDS))
        raise FieldError(
            name, f"must have blocks of the types {known}, with files of the media root, but has {described(block)}"
        )
    return f"<{kind}>"


def block_files(turns: Any, kind: str) -> tuple[Any, ...]:
    """Return what the blocks of a kind name, in order, of turns that [`read_turns`] takes: `{"type": "image", "image": …}`, or `path`."""
    found: list[Any] = []
    for turn in turns if isinstance(turns, list | tuple) else ():
        content = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
        for block in content if isinstance(content, list) else ():
            if isinstance(block, Mapping) and block.get("type") == kind:
                found += [file for name in (kind, "path") if (file := block.get(name))][:1]
    return tuple(found)
