"""What a row is fed, as columns of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from maple_trl.omni.prompt import PromptSpec


def fed_columns(spec: PromptSpec) -> dict[str, Any]:
    """
    Return what is fed, by column; a signal that is not fed is empty.

    `prompt` is plain text, `video`, `audio` and `image` the files as the row names them, `subtitle` a file or the text itself.
    """
    return {
        "prompt": prompt_text(spec.messages),
        "video": list(spec.videos),
        "audio": list(spec.audios),
        "image": list(spec.images),
        "subtitle": spec.subtitle,
    }


def sound_columns(prompt: Any) -> dict[str, float | None]:
    """Return the seconds of sound that a prompt holds, and of the sound that they are taken from."""
    fed, source = (None, None) if prompt.sound is None else (round(seconds, 3) for seconds in prompt.sound)
    return {"audio_seconds": fed, "audio_source_seconds": source}


def prompt_text(messages: str | Iterable[Mapping[str, Any]]) -> str:
    """Return a conversation as plain text; media stand as `[image]`, `[video]` and `[audio]`."""
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
    """Read a cell of a column of texts."""
    return None if value is None else str(value)
