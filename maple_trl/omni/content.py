"""What a row's messages hold: texts, and between them the places of media."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from maple_trl.omni.errors import RowError
from maple_trl.omni.media.clips import ClipRequest


if TYPE_CHECKING:
    from maple_trl.omni.media.subtitles import Part


MARK = re.compile(r"<(video|audio|subtitle|image)>")
"""A place in a text, as LLaMA-Factory, ms-swift, EasyR1 and verl write it."""

SUBTITLE_MARK = "<subtitle>"
"""The place of the subtitle, in its own words: nothing is put around it there."""

SUBTITLE_BLOCK = {"type": "subtitle"}

SEGMENT_KEYS = {
    "video": {
        "video_start": "start",
        "video_end": "end",
        "fps": "fps",
        "nframes": "num_frames",
        "min_pixels": "min_pixels",
        "max_pixels": "max_pixels",
        "resized_height": "resized_height",
        "resized_width": "resized_width",
    },
    "audio": {"audio_start": "start", "audio_end": "end"},
    "image": {
        "min_pixels": "min_pixels",
        "max_pixels": "max_pixels",
        "resized_height": "resized_height",
        "resized_width": "resized_width",
    },
}
"""Keys of a content block, as qwen-vl-utils calls them, and the fields of [`ClipRequest`] that they set."""

_FILE_KEYS = {kind: (kind, "path") for kind in SEGMENT_KEYS}
_URL_BLOCKS = ("image_url", "video_url", "audio_url")
_URL_ADVICE = """. Name the file below the media root: {{"type": "{kind}", "{kind}": "path"}}"""
_QUOTING = "text that only quotes a mark writes it otherwise, as &lt;{kind}&gt;"


@dataclass(frozen=True)
class MediaFile:
    """A file that a row names, and what it wants of it: the whole, unless it says otherwise."""

    path: str
    request: ClipRequest = ClipRequest()


@dataclass
class Content:
    """
    A row's messages, and what they say of media.

    Attributes:
        messages: the conversation; every place of a medium is a block `{"type": "image"}`, `{"type": "video"}`,
            `{"type": "audio"}` or `{"type": "subtitle"}`. A plain text prompt is a string.
        files: by kind, the files of the blocks that name one, in order.
        places: by kind, the places for files that the row's columns name: marks in texts, and blocks without a file.
    """

    messages: tuple[dict[str, Any], ...] | str
    files: dict[str, list[MediaFile]] = field(default_factory=lambda: {kind: [] for kind in SEGMENT_KEYS})
    places: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*SEGMENT_KEYS, "subtitle"), 0))


def read_content(prompt: Any) -> Content:
    """
    Read field `prompt`.

    Raises:
        RowError: when it is no prompt, or a content block says something that is not known here.
    """
    if isinstance(prompt, str) and prompt:
        content = Content(prompt)
        for mark in MARK.findall(prompt):
            content.places[mark] += 1
        return content
    if not isinstance(prompt, list) or not prompt:
        raise RowError("field 'prompt' must be a text or a non-empty list of messages with 'role' and 'content'")
    content = Content(())
    content.messages = tuple(_message(message, content) for message in prompt)
    return content


def _message(message: Any, content: Content) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RowError(f"field 'prompt' holds {message!r}, which is not a message with 'role' and 'content'")
    said = message.get("content")
    if said is None and message["role"] in ("user", "system"):  # of a table, a message with another key has no content
        raise RowError(
            f"field 'prompt' has a message of the {message['role']} without 'content': {dict(message)!r:.200}"
        )
    rest = {name: value for name, value in message.items() if name != "content" and value is not None}
    blocks = [{"type": "text", "text": said}] if isinstance(said, str) else said or []
    if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
        raise RowError(f"field 'prompt' has a message whose content is {said!r}; a text or a list of blocks")
    return {**rest, "content": [part for block in blocks for part in _parts(block, content)]}


def _parts(block: Mapping[str, Any], content: Content) -> Iterator[dict[str, Any]]:
    """Split a block into bare blocks: a text at its marks."""
    # A table fills in what a row lacks.
    kind = block.get("type")
    said = "text" if kind == "text" else None
    block = {name: value for name, value in block.items() if value is not None and (value != "" or name == said)}
    if kind == "text" and isinstance(block.get("text"), str):
        _check_keys(block, "text", ("text",))
        yield from _split_text(block["text"], content)
    elif kind in SEGMENT_KEYS:
        file = _media_file(block, kind)
        if file is None:
            content.places[kind] += 1
        else:
            content.files[kind].append(file)
        yield {"type": kind}
    else:
        raise RowError(
            f"field 'prompt' holds the content block {block!r:.300}; known are text (key 'text'), image, video and audio"
            + (_URL_ADVICE.format(kind=kind.removesuffix("_url")) if kind in _URL_BLOCKS else "")
        )


def _split_text(text: str, content: Content) -> Iterator[dict[str, Any]]:
    end = 0
    for mark in MARK.findall(text):
        content.places[mark] += 1
        start = text.index(f"<{mark}>", end)
        if text[end:start]:
            yield {"type": "text", "text": text[end:start]}
        yield {"type": mark}
        end = start + len(mark) + 2
    if text[end:] or not end:
        yield {"type": "text", "text": text[end:]}


def _media_file(block: Mapping[str, Any], kind: str) -> MediaFile | None:
    """Return the file of a media block; `None` where it names none and is a place for one that a column names."""
    keys = SEGMENT_KEYS[kind]
    _check_keys(block, kind, (*_FILE_KEYS[kind], *keys))
    named = [block[name] for name in _FILE_KEYS[kind] if name in block]
    settings = {name: value for name, value in block.items() if name in keys}
    if not named and not settings:
        return None
    file = path_of(named[0]) if named else None
    if len(named) > 1 or not isinstance(file, str) or not file:
        raise RowError(
            f"a '{kind}' block of field 'prompt' holds no path (key '{kind}' or 'path'): {dict(block)!r:.200}"
        )
    if not settings:
        return MediaFile(file)
    try:
        return MediaFile(file, ClipRequest(**{keys[name]: value for name, value in settings.items()}))
    except ValueError as error:
        raise RowError(
            f"a '{kind}' block of field 'prompt' has {_listed(settings)}: {in_block_words(str(error), kind)}"
        ) from error


def path_of(value: Any) -> Any:
    """Return the path in a cell of `datasets.Image`, `Video` or `Audio` that is not decoded."""
    if isinstance(value, Mapping) and set(value) <= {"path", "bytes"} and value.get("bytes") is None:
        return value.get("path")
    return value


def subtitle_parts(videos: Sequence[MediaFile], audios: Sequence[MediaFile]) -> tuple[Part, ...]:
    """
    Return the parts of a row's clips whose subtitles belong to it; none where that is all that its subtitle says.

    They are those of its videos, or where it has none, of its sounds: whether or not it is fed them, so that a row reads
    the same whatever its tag. Beside a whole clip, parts of others limit nothing.
    """
    requests = [file.request for file in videos or audios]
    whole = any(request.whole for request in requests)
    return () if whole else tuple(dict.fromkeys(request.part for request in requests))


def row_parts(row: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return [`subtitle_parts`] of a row that may lack columns, or be no prompt: then nothing limits its subtitle."""
    try:
        files = read_content(row.get("prompt")).files
    except RowError:
        return ()
    whole = {kind: [MediaFile("")] if row.get(kind) else [] for kind in ("video", "audio")}
    return subtitle_parts(*(files[kind] + whole[kind] for kind in ("video", "audio")))


def _check_keys(block: Mapping[str, Any], kind: str, known: tuple[str, ...]) -> None:
    unknown = [name for name in block if name not in ("type", *known)]
    if unknown:
        raise RowError(
            f"a '{kind}' block of field 'prompt' has the key {unknown[0]!r}, which is not read; its keys are "
            f"{', '.join(('type', *known))}"
        )


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def in_block_words(text: str, kind: str) -> str:
    """Reword an error about a [`ClipRequest`] in the words of a content block."""
    for key, name in SEGMENT_KEYS[kind].items():
        text = re.sub(rf"\b{name}\b", key, text)
    return text


def check_places(content: Content, columns: Mapping[str, int]) -> None:
    """
    Check that every place has its file, and every file its place.

    Args:
        columns: by kind, how many files the row's columns give. 0 places are right for any number: such media lead the
            last user message.

    Raises:
        RowError: with both numbers.
    """
    for kind, places in content.places.items():
        named = len(content.files.get(kind, ()))
        if places and named:
            raise RowError(
                f"field 'prompt' holds {places} <{kind}> mark(s) or '{kind}' block(s) without a file, and {named} '{kind}' "
                f"block(s) with one: which belongs where cannot be told. Keep one way; {_QUOTING.format(kind=kind)}"
            )
        if places and places != columns[kind]:
            raise RowError(
                f"field 'prompt' holds {places} <{kind}> mark(s) or '{kind}' block(s) without a file, but field '{kind}' "
                f"names {columns[kind]} file(s): give each its file; {_QUOTING.format(kind=kind)}"
            )


def place_blocks(
    messages: tuple[dict[str, Any], ...],
    own_place: dict[str, list[bool]],
    subtitle: str,
    subtitle_template: str = "{subtitle}",
) -> list[dict[str, Any]]:
    """
    Return messages as the chat template wants them.

    Markers keep the place that the author gave them; pictures, clips and a subtitle without a marker lead the last user
    message, in the order of `own_place`.

    Args:
        subtitle: its text, empty where there is none.
        subtitle_template: text around a subtitle that has no marker; holds `{subtitle}`.
        own_place: for each clip of a kind, in order, whether it has a block of its own. It has none when the row is
            not fed that signal, when its audio is interleaved with a video, or when the file has no audio track.
    """
    waiting = {kind: list(flags) for kind, flags in own_place.items()}
    placed = []
    has_place = False
    for message in messages:
        parts = []
        for block in message["content"]:
            flags = waiting.get(block["type"])
            if flags is None or (flags and flags.pop(0)):
                parts.append(block)
        if SUBTITLE_BLOCK in parts:
            has_place = True
            parts = _with_subtitle(parts, subtitle)
        placed.append({**message, "content": parts})
    lead = [{"type": kind} for kind, flags in waiting.items() for wanted in flags if wanted]
    if subtitle and not has_place:
        lead.append({"type": "text", "text": subtitle_template.replace("{subtitle}", subtitle)})
    if lead:
        last_user = max(i for i, message in enumerate(placed) if message["role"] == "user")
        placed[last_user]["content"] = lead + placed[last_user]["content"]
    return placed


def _with_subtitle(parts: list[dict[str, Any]], subtitle: str) -> list[dict[str, Any]]:
    """Return a message's blocks with the subtitle at its mark, as one text with those around it."""
    joined: list[dict[str, Any]] = []
    for part in parts:
        part = {"type": "text", "text": subtitle} if part == SUBTITLE_BLOCK else part
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            part = {"type": "text", "text": joined.pop()["text"] + part["text"]}
        joined.append(part)
    return [part for part in joined if part != {"type": "text", "text": ""}]


def with_tracks(messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Return messages in which the sound of every video stands behind its pictures."""
    return tuple(
        {
            **message,
            "content": [
                part
                for block in message["content"]
                for part in ([block, {"type": "audio"}] if block["type"] == "video" else [block])
            ],
        }
        for message in messages
    )
