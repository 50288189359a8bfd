"""Media of a benchmark's questions: found below one folder, or written there."""

from __future__ import annotations

import hashlib
import io
import os
from codecs import BOM_UTF8
from pathlib import Path

import av
import numpy as np
from PIL import Image

from maple_trl.data.benchmarks.base import Medium
from maple_trl.omni.media.pictures import upright_rgb


WRITTEN = "extracted"
"""Folder below the media root for files that were inside a table, and for clips made of pictures."""

_STILL_FRAMES = 2  # of one second each: encoders read frames in pairs
_LONGEST_SIDE = 2048  # pixels


class UnusableMedium(Exception):
    """
    A medium that cannot be used; its text is the reason.

    Args:
        missing: whether it is because its file is not there.
    """

    def __init__(self, reason: str, missing: bool = False):
        super().__init__(reason)
        self.missing = missing


def existing(root: Path, medium: Medium) -> str | None:
    """Return the first of a medium's paths at which there is a file, and of a plain text one that says something."""
    return next((path for path in medium.paths if (root / path).is_file() and not _is_blank(root / path)), None)


def _is_blank(path: Path) -> bool:
    return path.suffix.lower() == ".txt" and not path.read_bytes().removeprefix(BOM_UTF8).strip()


def locate(root: Path, medium: Medium, write: bool, as_clips: bool = False) -> str:
    """
    Return the path of a medium below the root.

    Args:
        root: the media root.
        medium: what is looked for.
        write: write what the table holds, and pictures as clips, below `root / WRITTEN`; what is there is not written
            again.
        as_clips: make a clip of a picture.

    Raises:
        UnusableMedium: with the reason.
    """
    found = existing(root, medium)
    if medium.content is None and found is None:
        raise UnusableMedium(f"no file {medium.paths[0]}", missing=True)
    becomes_clip = medium.still and as_clips
    if medium.content is None and not becomes_clip:
        return found
    if not write:
        held = "it is to become a clip" if becomes_clip else "the table holds the file itself"
        raise UnusableMedium(f"{held}; write_media=True puts a readable copy below {WRITTEN}/")
    content = medium.content if medium.content is not None else (root / found).read_bytes()
    digest = hashlib.blake2b(content, digest_size=10).hexdigest()
    suffix = ".mp4" if becomes_clip else Path(medium.paths[0]).suffix if medium.paths else ".bin"
    path = f"{WRITTEN}/{digest}{suffix}"
    if not (root / path).is_file():
        (root / WRITTEN).mkdir(exist_ok=True)
        scratch = root / WRITTEN / f".{digest}-{os.getpid()}{suffix}"
        try:
            if becomes_clip:
                write_still(scratch, content)
            else:
                scratch.write_bytes(content)
            os.replace(scratch, root / path)
        finally:
            scratch.unlink(missing_ok=True)
    return path


def write_still(path: Path, content: bytes) -> None:
    """
    Write a picture file as a clip, see [`write_picture`].

    Raises:
        UnusableMedium: when it is no picture.
    """
    try:
        write_picture(path, Image.open(io.BytesIO(content)))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UnusableMedium(f"the picture cannot be read: {error}") from error


def write_picture(path: Path, picture: Image.Image) -> None:
    """
    Write a picture as a clip that shows it for two seconds (H.264, without loss but for its colours' subsampling).

    Pictures of more than 2048 pixels in width or height are made smaller, and sides are cut to even numbers.

    Raises:
        ValueError: for a picture of less than 2 pixels in width or height, or with samples of 32 bits.
    """
    picture, _ = upright_rgb(picture)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    pixels = np.asarray(picture)
    pixels = np.ascontiguousarray(pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2])
    if not pixels.size:
        raise ValueError(f"{picture.width} x {picture.height} pixels are no clip")
    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": "0", "bf": "0", "threads": "1"})
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = "yuv420p"
        for index in range(_STILL_FRAMES):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
