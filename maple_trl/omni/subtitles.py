"""Subtitle files (.srt, .vtt, Whisper JSON) to the plain text that goes into a prompt."""

import codecs
import html
import json
import re

import pysubs2

from maple_trl.omni.errors import MediaError


MAX_BYTES = 16 << 20  # hours of dense dialogue; anything above is not a subtitle

_EXPECTED = 'expected .srt, .vtt, or JSON as [{"start": s, "end": s, "text": "..."}] or {"segments": [...]}'

_TAG = re.compile(r"</?[a-zA-Z0-9][^<>]*>")


def _decode(data: bytes, name: str) -> str:
    """UTF-8 (with or without mark) or marked UTF-16: guessing a legacy code page gives wrong letters, silently."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise MediaError("bad-subtitle", name, f"not UTF-8 (convert the file to UTF-8): {error}") from error


def _parse(text: str) -> pysubs2.SSAFile:
    """The content decides the format, as it does for media."""
    start = text.lstrip()
    if start.startswith(("[", "{")):
        return pysubs2.load_from_whisper(json.loads(text))
    format_ = "vtt" if start.startswith("WEBVTT") else "srt"
    # pysubs2 takes "a < b > c" for a tag; `_TAG` is stricter.
    return pysubs2.SSAFile.from_string(text, format_=format_, keep_unknown_html_tags=True)


def subtitle_text(data: bytes, name: str) -> str:
    """
    The lines of a subtitle file in time order, one per text line, without tags, numbers and times. A line that repeats
    the one before it is dropped: rolling captions show every line twice.

    Args:
        data (`bytes`): the file.
        name (`str`): its path, for errors.

    Raises:
        MediaError: `bad-subtitle` if the encoding or the structure is wrong or no cue has text.
    """
    if len(data) > MAX_BYTES:
        raise MediaError("bad-subtitle", name, f"{len(data)} bytes; a subtitle file has at most {MAX_BYTES}")
    text = _decode(data, name)
    try:
        cues = sorted(_parse(text), key=lambda cue: cue.start)
    except (
        ValueError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        pysubs2.Pysubs2Error,
    ) as error:
        raise MediaError(
            "bad-subtitle", name, f"cannot be parsed: {_EXPECTED}; found {type(error).__name__}: {error}"
        ) from error
    lines: list[str] = []
    for cue in cues:
        for line in html.unescape(_TAG.sub("", cue.plaintext)).splitlines():
            line = " ".join(line.split())
            if line and lines[-1:] != [line]:
                lines.append(line)
    if not lines:
        raise MediaError("bad-subtitle", name, f"{_EXPECTED}; found no cue with text")
    return "\n".join(lines)
