"""What a row is fed, as columns of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from maple_trl.omni.prompt import PromptSpec


def fed_columns(spec: PromptSpec) -> dict[str, Any]:
    """
    `prompt` as plain text, the files `video` and `audio` as the row names them, and `subtitle`: a file, or the text
    itself. A signal that is not fed is empty.
    """
    return {
        "prompt": prompt_text(spec.messages),
        "video": list(spec.videos),
        "audio": list(spec.audios),
        "subtitle": spec.subtitle,
    }


def prompt_text(messages: str | Iterable[Mapping[str, Any]]) -> str:
    """A conversation as plain text; media stand as `[video]` and `[audio]`."""
    if isinstance(messages, str):
        return messages
    parts = []
    for message in messages:
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        said = [block["text"] if block["type"] == "text" else f"[{block['type']}]" for block in blocks]
        parts.append(f"{message['role']}: {' '.join(said)}")
    return "\n".join(parts)


def as_text(value: Any) -> str | None:
    """A cell of a column of texts."""
    return None if value is None else str(value)
