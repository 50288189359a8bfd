"""Pictures, clips and subtitles of completions as a page can show them: links beside it, and small pictures in it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from PIL import Image

from maple_trl.omni.embedded import stored_path
from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.clips import Source
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.media.sampling import MediaLimits
from maple_trl.omni.media.subtitles import is_subtitle_file
from maple_trl.omni.media.tasks import Task
from maple_trl.omni.media.workers import WORKERS, decoder_pool


MEDIA = ("image", "video", "audio", "subtitle")
"""Columns that name what a completion was shown."""

_WIDTH = 160
_SHOWN = 800  # characters of a subtitle


class MediaTable:
    """
    The media of a report, each once.

    Only files below the media root are linked to, and nothing from a network.

    Args:
        media_root: the folder below which they lie; `None` where it is not known.
        page: folder of the page, which links are relative to.
        thumbnails: pictures of at most so many pictures and videos are put into the page.
    """

    def __init__(self, media_root: str | os.PathLike | None, page: Path, thumbnails: int):
        self.root = None if media_root is None else Path(media_root).resolve()
        self.page = page.resolve()
        self.thumbnails = thumbnails
        self.entries: list[dict[str, Any]] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def add(self, kind: str, name: str) -> int:
        """Return the number of a medium's entry; a subtitle is a file or the text itself."""
        if (kind, name) not in self._numbers:
            self._numbers[kind, name] = len(self.entries)
            self.entries.append(self._entry(kind, name))
        return self._numbers[kind, name]

    def _entry(self, kind: str, name: str) -> dict[str, Any]:
        if kind == "subtitle" and not is_subtitle_file(name):
            return {"kind": kind, "name": "subtitle text", "text": name[:_SHOWN]}
        stored = stored_path(name)
        if stored is not None:
            entry = {"kind": kind, "name": name.partition("/")[2] or name, "why": "inside the table of the data set"}
            return entry | self._thumb(kind, stored)
        entry = {"kind": kind, "name": name}
        path, why = self._find(name)
        if path is None:
            return entry | {"why": why}
        entry["href"] = quote(os.path.relpath(path, self.page).replace(os.sep, "/"))
        if kind == "subtitle":
            with open(path, encoding="utf-8", errors="replace") as file:
                entry["text"] = file.read(_SHOWN)
        return entry | self._thumb(kind, path)

    def _thumb(self, kind: str, path: str | os.PathLike) -> dict[str, str]:
        if kind not in ("image", "video") or self.thumbnails <= 0:
            return {}
        self.thumbnails -= 1
        picture = thumbnail(path, kind)
        return {} if picture is None else {"thumb": "data:image/jpeg;base64," + base64.b64encode(picture).decode()}

    def _find(self, name: str) -> tuple[Path | None, str | None]:
        if urlsplit(name).scheme in ("http", "https", "ftp", "s3", "hf"):
            return None, "a network address, which a report does not open"
        if self.root is None:
            return None, "its folder is not known; name it with --media-root"
        try:
            path = (self.root / name).resolve()
            found = path.is_file()
        except (OSError, ValueError, RuntimeError):  # null bytes, thousands of letters, links in a circle
            return None, "not found at the time of the report"
        if not path.is_relative_to(self.root):
            return None, "outside of the media root"
        return (path, None) if found else (None, "not found at the time of the report")


def thumbnail(path: str | os.PathLike, kind: str = "video") -> bytes | None:
    """Return a small picture of an image or a video as JPEG; `None` where it cannot be decoded, or training would not read it."""
    path = os.path.realpath(path)
    try:
        if kind == "image":
            with MediaLoader(os.path.dirname(path), MediaLimits(min_pixels=1), backend="pyav") as loader:
                pixels = loader.image(os.path.basename(path), multiple=1, max_pixels=_WIDTH * _WIDTH).pixels
        else:
            pixels = decoder_pool(WORKERS).run(Task("picture", Source(path, path), options=(_WIDTH,)))
    except (MediaError, OSError):
        return None
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


def media_of(table: MediaTable, columns: dict[str, list], line: int) -> list[int]:
    """Return the numbers of the media of a line."""
    found = []
    for kind in MEDIA:
        names: str | Sequence[str] | None = columns[kind][line] if kind in columns else None
        names = [names] if isinstance(names, str) else names or []
        found += [table.add(kind, name) for name in names]
    return found
