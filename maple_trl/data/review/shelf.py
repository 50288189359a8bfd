"""What a tag gives of a row's media: copies with its signals alone, in a folder that does not grow beyond its bound."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maple_trl.modalities import IMAGE_COLUMNS
from maple_trl.omni.content import row_parts
from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.clips import Source
from maple_trl.omni.media.pictures import opened_picture, upright_rgb
from maple_trl.omni.media.subtitles import in_parts, is_subtitle_file, read_subtitle, subtitle_bytes, unread_file


_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*:")
_LARGEST_PICTURE = 2048  # pixels a side


@dataclass(frozen=True)
class Signals:
    """
    What there is to see, hear and read of a row under a tag; for each, what is wrong where it cannot be shown.

    Attributes:
        clip: `video`, `audio` or `None`: what plays.
        images: numbers of its pictures that are there.
        subtitle: its text.
        problems: what is missing or broken, as texts.
    """

    clip: str | None
    images: tuple[int, ...]
    subtitle: str | None
    problems: tuple[str, ...]


class ClipShelf:
    """
    Finds the media of rows below one folder, and keeps copies that hold a tag's signals and no others.

    A copy without the sound track cannot be made to sound, whatever a player offers; a muted player can. Nothing but copies
    is ever handed out.

    Args:
        root: the media root. Links are followed, and must end inside it.
        folder: where copies are kept.
        most_bytes: what they may take together; those that were not asked for longest go first. The one that is being
            looked at stays, whatever its size.

    Raises:
        FileNotFoundError: if `root` is no folder.
    """

    def __init__(self, root: str | os.PathLike[str], folder: Path, most_bytes: int = 1 << 30):
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise FileNotFoundError(f"media root {os.fspath(root)!r} is not a folder")
        self.folder, self.most_bytes = folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._sizes: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[Path, threading.Lock] = {}

    # Paths

    def resolve(self, name: str) -> Path:
        """
        Return the real path of a medium that a row names.

        Raises:
            MediaError: when it is an address, leads out of the media root, or is no regular file.
        """
        if _SCHEME.match(name):
            raise MediaError("network-not-allowed", name, "a URL; media are read from files under the media root")
        try:
            real = (self.root / name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:  # a null byte; links in a circle
            raise MediaError("not-found", name, f"no such file under {self.root}") from error
        if not real.is_relative_to(self.root):
            raise MediaError("outside-media-root", name, f"leads out of the media root {self.root}")
        if not real.is_file():
            raise MediaError("not-found", name, "not a regular file")
        return real

    # What a tag gives

    def signals(self, row: Mapping[str, Any], tag: str) -> Signals:
        """Say what a tag gives of a row; no file is decoded, but a subtitle read."""
        problems: list[str] = []

        def found(name: str | None) -> bool:
            try:
                return name is not None and bool(self.resolve(name))
            except MediaError as error:
                problems.append(str(error))
                return False

        subtitle = None
        if "S" in tag:
            try:
                subtitle = self.subtitle(row)
            except MediaError as error:
                problems.append(str(error))
            if subtitle is None and not problems:
                problems.append("no-signal: the row has no subtitle")
        pictures = pictures_of(row) if "V" in tag else []
        images = tuple(number for number, name in enumerate(pictures) if found(name))
        video, audio = self._sources(row, tag)
        names = {video, audio} - {None}
        there = sum(map(found, names)) == len(names)  # what is wrong with each is told
        try:
            audio = self._with_sound(audio) if there else None
        except MediaError as error:
            problems.append(str(error))
            there = False
        if "V" in tag and video is None and not pictures:
            problems.append("no-signal: the row has no video or image")
        if "A" in tag and audio is None and there:
            problems.append("no-audio-track: the row has no sound")
        clip = ("video" if video else "audio" if audio else None) if there else None
        return Signals(clip, images, subtitle, tuple(dict.fromkeys(problems)))

    @staticmethod
    def _sources(row: Mapping[str, Any], tag: str) -> tuple[str | None, str | None]:
        """Return the files of picture and of sound; without `audio` the sound is the video's track."""
        video = (row.get("video") or None) if "V" in tag else None
        audio = (row.get("audio") or row.get("video") or None) if "A" in tag else None
        return video, audio

    def _with_sound(self, audio: str | None) -> str | None:
        """Return the file of the sound; `None` where it is that of a video without a track of sound."""
        from maple_trl.data.review.copies import kinds_of

        return audio if audio is not None and "audio" in kinds_of(self.resolve(audio)) else None

    def subtitle(self, row: Mapping[str, Any]) -> str | None:
        """
        Return the text of a row's subtitle, as a model is fed it; `None` where it has none.

        Raises:
            MediaError: when it names a file that is none, or one that says nothing in the part of the clip.
        """
        text = row.get("subtitle") or None
        if text is None:
            return None
        if not is_subtitle_file(text.strip()):
            if reason := unread_file(text.strip(), str(self.root)):
                raise MediaError("bad-subtitle", text.strip(), f"{reason}, and is none that is read as a subtitle")
            return str(text)
        name, parts = text.strip(), row_parts(row)
        said = read_subtitle(subtitle_bytes(self.resolve(name)), name).text(parts)
        if not said:
            raise MediaError("no-signal", name, f"no cue is shown {in_parts(parts)}, the part of the clip")
        return said

    # Copies

    def clip(self, row: Mapping[str, Any], tag: str) -> Path:
        """
        Return a copy of a row's clip with the tracks that a tag gives.

        Raises:
            MediaError: when the row has none, or its files cannot be read.
        """
        from maple_trl.data.review.copies import write_copy

        video, audio = self._sources(row, tag)
        audio = self._with_sound(audio)
        if video is None and audio is None:
            raise MediaError("no-signal", None, f"the row has nothing to play for {tag}")
        paths = tuple(None if name is None else self.resolve(name) for name in (video, audio))
        kind = "video" if video else "audio"
        return self._kept((kind, *map(_identity, paths)), ".mp4", lambda target: write_copy(target, *paths))

    def image(self, row: Mapping[str, Any], number: int = 0) -> Path:
        """Return a copy of one of a row's pictures, upright and without what else its file says."""
        names = pictures_of(row)
        if number >= len(names):
            raise MediaError("no-signal", None, f"the row has {len(names) or 'no'} image(s)")
        path = self.resolve(names[number])

        def write(target: Path) -> None:
            try:
                with opened_picture(Source(names[number], str(path))) as picture:
                    picture.draft("RGB", (_LARGEST_PICTURE, _LARGEST_PICTURE))  # a large JPEG is read smaller
                    shown, _ = upright_rgb(picture)
                shown.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE))
                shown.save(target, "JPEG", quality=92)
            except MediaError:
                raise
            except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: a damaged PNG
                raise MediaError("unreadable", names[number], f"no picture that can be read: {error}") from error

        return self._kept(("image", _identity(path)), ".jpg", write)

    def _kept(self, key: tuple[Any, ...], suffix: str, write: Callable[[Path], None]) -> Path:
        """Return the copy of a key, made where it is not there."""
        path = self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}{suffix}"
        with self._lock:
            making = self._making.setdefault(path, threading.Lock())
        with making:
            if not path.is_file():
                write(path)
            with self._lock:
                self._sizes[path] = path.stat().st_size
                self._sizes.move_to_end(path)
                self._shrink()
        return path

    def _shrink(self) -> None:
        while len(self._sizes) > 1 and sum(self._sizes.values()) > self.most_bytes:
            oldest, _ = self._sizes.popitem(last=False)
            oldest.unlink(missing_ok=True)
            self._making.pop(oldest, None)


def pictures_of(row: Mapping[str, Any]) -> list[str]:
    """Return the pictures that a row names."""
    cells = (row.get(name) or [] for name in IMAGE_COLUMNS)
    return [name for cell in cells for name in ([cell] if isinstance(cell, str) else cell)]


def _identity(path: Path | None) -> tuple[str, int, int] | None:
    """Return what tells a file from another, and from itself once it has changed."""
    if path is None:
        return None
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size
