"""Copies of clips that hold exactly the tracks that are asked for, in forms that browsers play."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.formats import FORMATS, accepted, format_of, found_in


_PLAYED = {"video": {"h264", "av1", "vp9"}, "audio": {"aac", "mp3", "opus", "flac"}}  # by browsers, within mp4
_AAC_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_PIXELS = ("yuv420p", "yuvj420p")
_EXACT = ("mov", "matroska")  # containers whose packets have times that another container can take over
_OPTIONS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}


def write_copy(target: Path, video: Path | None, audio: Path | None) -> None:
    """
    Write an mp4 file with the pictures of one file and the sound of one (the same, or another), and nothing else.

    Tracks that a browser plays are taken over as they are; others are encoded as H.264 and AAC.

    Raises:
        MediaError: when a file has not got the track, or is no medium that training would read.
    """
    scratch = target.with_name(f".{target.name}.part")
    try:
        with ExitStack() as stack:
            wanted = [(kind, path) for kind, path in (("video", video), ("audio", audio)) if path is not None]
            try:
                opened = [(kind, path, stack.enter_context(_opened(path))) for kind, path in wanted]
                options = {"movflags": "+faststart"}
                output = stack.enter_context(av.open(str(scratch), "w", format="mp4", options=options))
                tracks = [_Track(kind, path, container, output) for kind, path, container in opened]
                for _, packet in heapq.merge(*(track.packets() for track in tracks), key=lambda pair: pair[0]):
                    output.mux(packet)
            except av.FFmpegError as error:
                names = " and ".join(path.name for _, path in wanted)
                raise MediaError("unreadable", names, f"FFmpeg: {error.strerror or error}") from error
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def kinds_of(path: Path) -> frozenset[str]:
    """Return which of `video` and `audio` a file has tracks of."""
    with _opened(path) as container:
        return frozenset(kind for kind in ("video", "audio") if _streams(container, kind))


def _streams(container: Any, kind: str) -> list[Any]:
    """Return the tracks of a kind; cover art is none."""
    streams = getattr(container.streams, kind)
    return [stream for stream in streams if not stream.disposition & av.stream.Disposition.attached_pic]


def _opened(path: Path) -> Any:
    """Open a container of those that training reads; playlists and scripts, which name other files, are none of them."""
    try:
        return av.open(str(path), container_options=_OPTIONS, metadata_errors="replace")
    except av.FFmpegError as error:
        if format_of(str(path)) is None:
            detail = f"the content is {found_in(str(path))} (FFmpeg: {error.strerror}); read are {accepted()}"
            raise MediaError("not-media", path.name, detail) from error
        raise MediaError("unreadable", path.name, f"FFmpeg: {error.strerror}") from error


class _Track:
    """One track on its way into the copy."""

    def __init__(self, kind: str, path: Path, container: Any, output: Any):
        self._container, self._kind = container, kind
        streams = _streams(container, kind)
        if not streams:
            raise MediaError(
                "no-video-track" if kind == "video" else "unreadable", path.name, f"it has no {kind} track"
            )
        best = container.streams.best(kind)
        self._stream = best if best in streams else streams[0]
        codec = self._stream.codec_context
        self._copied = (
            codec.name.removeprefix("lib").removesuffix("-vp9").removesuffix("float") in _PLAYED[kind]
            and container.format.name.split(",")[0] in _EXACT
            and (kind == "audio" or codec.pix_fmt in _PIXELS)
        )
        self._output = output
        self._made = output.add_stream_from_template(self._stream) if self._copied else self._encoder()

    def _encoder(self) -> Any:
        if self._kind == "audio":
            codec = self._stream.codec_context
            layout = "mono" if codec.channels == 1 else "stereo"
            rate = codec.sample_rate if codec.sample_rate in _AAC_RATES else 48_000
            return self._output.add_stream("aac", rate=rate, layout=layout)
        options = {"crf": "18", "preset": "veryfast", "bf": "0"}
        made = self._output.add_stream("libx264", rate=self._stream.average_rate or Fraction(25), options=options)
        made.pix_fmt = "yuv420p"
        made.time_base = Fraction(1, 90_000)
        return made

    def packets(self) -> Iterator[tuple[float, Any]]:
        """Give the packets with their times, in order."""
        found: Iterable[Any] = self._taken() if self._copied else self._encoded()
        for packet in found:
            if packet.dts is not None:
                yield float(packet.dts * packet.time_base), packet

    def _taken(self) -> Iterator[Any]:
        for packet in self._container.demux(self._stream):
            packet.stream = self._made
            yield packet

    def _encoded(self) -> Iterator[Any]:
        first = True
        for frame in self._container.decode(self._stream):
            if self._kind == "video":
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
                pixels = np.ascontiguousarray(pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2])
                if first:
                    self._made.height, self._made.width = pixels.shape[:2]
                turned = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                turned.pts, turned.time_base, first = frame.pts, frame.time_base, False
                frame = turned
            yield from self._made.encode(frame)
        yield from self._made.encode(None)
