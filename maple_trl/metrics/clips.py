"""Which clip a question is about: questions about one clip are right or wrong together."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from maple_trl.modalities import IMAGE_COLUMNS, SUBTITLE_SUFFIXES


CLIP_COLUMNS = ("clip", "clip_id", "video_id", "videoID", "video_name", "youtube_id")
"""Columns that name a question's clip; the first that a row fills is taken."""

_MEDIA = {"video": ("video",), "image": IMAGE_COLUMNS, "audio": ("audio",)}


def clips_of(rows: Iterable[Mapping[str, Any]]) -> list[str | None]:
    """Return [`clip_of`] each row."""
    return [clip_of(row) for row in rows]


def clip_of(row: Mapping[str, Any]) -> str | None:
    """
    Name the clip that a row asks about.

    It is what the first filled column of `CLIP_COLUMNS` says, else the first video, else the first picture, else the first
    audio (in columns of that name or as a block of the prompt), else the subtitle where that is a file.

    Parts of one file are one clip. `None` where a row names none of these: such a question stands alone.
    """
    for column in CLIP_COLUMNS:
        if isinstance(row.get(column), str | int) and str(row[column]).strip():
            return str(row[column]).strip()
    for kind, columns in _MEDIA.items():
        cells = [cell for column in columns for cell in _listed(row.get(column))]
        for medium in (*cells, *_blocks(row.get("prompt"), kind)):
            name = _file(medium)
            if name:
                return name
    subtitle = _file(row.get("subtitle"))
    is_file = subtitle is not None and "\n" not in subtitle and subtitle.lower().endswith(SUBTITLE_SUFFIXES)
    return subtitle if is_file else None


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _blocks(prompt: Any, kind: str) -> list[Any]:
    """Return what the prompt's blocks of a kind name: `{"type": "video", "video": …}`, also with `path` or `url`."""
    found = []
    for message in prompt if isinstance(prompt, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for block in content if isinstance(content, list) else ():
            if isinstance(block, Mapping) and block.get("type") == kind:
                found += [block[name] for name in (kind, "path", "url") if block.get(name)][:1]
    return found


def _file(medium: Any) -> str | None:
    """Return a file's name in one spelling; of a decoded column's cell its path."""
    if isinstance(medium, Mapping):
        medium = medium.get("path")
    if not isinstance(medium, str) or not medium.strip():
        return None
    name = medium.strip()
    return name if "://" in name else posixpath.normpath(name)
