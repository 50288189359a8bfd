"""
A media file, opened with PyAV (FFmpeg): its main tracks, its clock, and its length.

FFmpeg guesses a file's format from its content, and some formats (HLS playlists, concat scripts) name other files and
URLs, which it then reads. Only containers that carry their own data are accepted here, whatever the file's name.
"""

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import av

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.clips import ClipRequest, MediaInfo, Source
from maple_trl.omni.media.containers import check_whole, declared_bytes
from maple_trl.omni.media.formats import FORMATS, Format, accepted, format_of, found_in
from maple_trl.omni.media.sampling import MediaLimits


MAX_SOURCE_PIXELS = 1 << 26  # 8192 x 8192: a header can claim any size, and the decoder allocates it
END_SLACK = 0.1  # seconds by which a header without byte counts may overstate the length: a few codec frames
STAMP_RETURN = 1.0  # seconds: what goes back in time by more has been put together wrongly
# Containers whose clock begins anywhere, and starts again at 0 after 26.5 hours: FFmpeg calls what stands before that negative.
FREE_CLOCK = {"mpegts", "mpeg"}
SEEKABLE = {"mov", "matroska"}  # with an index by time, in which a segment is found without reading up to it
SEEK_AFTER = 30.0  # seconds from the start; less is read as it is

_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


class Deadline:
    """The time by which a file has to be decoded, `seconds` from now."""

    def __init__(self, source: Source, seconds: float):
        self.source, self.seconds, self.end = source, seconds, time.monotonic() + seconds

    def check(self) -> None:
        """Raise [`MediaError`] once it has passed."""
        if time.monotonic() > self.end:
            raise self.source.error("decode-timeout", f"not decoded within {self.seconds:g} s")


@contextmanager
def opened(source: Source, limits: MediaLimits) -> Iterator["av.container.InputContainer"]:
    """Open a container of an accepted format, complete as far as its header tells; FFmpeg's errors become ours."""
    protocols = "http,https,tcp,tls" if source.is_url else "file"
    timeout = limits.decode_timeout
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": protocols}
    try:
        with av.open(source.path, container_options=options, metadata_errors="replace", timeout=timeout) as container:
            if not source.is_url:
                check_whole(source)
            yield container
    except (av.error.ExitError, av.error.TimeoutError) as error:
        raise source.error("decode-timeout", f"no data within {timeout:g} s: {error}") from error
    except (av.error.HTTPClientError, av.error.ConnectionRefusedError) as error:
        raise source.error("not-found", str(error)) from error
    except av.FFmpegError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(str(error)) from error
        entry = None if source.is_url else format_of(source.path)
        if source.is_url or entry is not None:
            found = "" if entry is None else f"begins as {entry.title}, but "
            raise source.error("unreadable", f"{found}FFmpeg: {error.strerror}") from error
        detail = f"the content is {found_in(source.path)} (FFmpeg: {error.strerror}); read are {accepted()}"
        raise source.error("not-media", detail) from error


def main_track(container, kind: str):
    """Return the main stream of a kind, or `None`; cover art is a picture, not a video."""
    streams = [s for s in getattr(container.streams, kind) if not s.disposition & av.stream.Disposition.attached_pic]
    best = container.streams.best(kind)
    return best if best in streams else next(iter(streams), None)


def check_decodable(source: Source, stream) -> None:
    """Raise [`MediaError`] where FFmpeg has no decoder for a track."""
    if stream.codec_context is None:
        raise source.error("unreadable", f"FFmpeg has no decoder for the {stream.type} track")


@contextmanager
def opened_video(
    source: Source, limits: MediaLimits
) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """
    Open a container and its main video, which can be decoded within bounds.

    Raises:
        MediaError: `no-video-track`, `unreadable`, `frame-too-large`, `truncated`, `decode-timeout`, `not-media`,
            `not-found`.
    """
    with opened(source, limits) as container:
        stream = main_track(container, "video")
        if stream is None:
            raise source.error("no-video-track", "the file has no video track")
        check_decodable(source, stream)
        if stream.codec_context.width * stream.codec_context.height > MAX_SOURCE_PIXELS:
            size = f"{stream.codec_context.width}x{stream.codec_context.height}"
            raise source.error("frame-too-large", f"{size}; at most {MAX_SOURCE_PIXELS} pixels are decoded")
        yield container, stream


def format_of_container(container) -> Format:
    """Return what is known of an opened container's format."""
    return FORMATS[container.format.name.split(",")[0]]


def file_notes(source: Source, container) -> list[str]:
    """Note what is special about the file as a whole; the content decides how it is read, not the name."""
    extension = os.path.splitext(urlsplit(source.path).path if source.is_url else source.path)[1][1:].lower()
    return ["extension-mismatch"] if extension and extension not in format_of_container(container).suffixes else []


def header_seconds(container) -> float | None:
    """
    Return the length in the header, a hint and no more; `None` where it says nothing and FFmpeg guesses.

    It may count from 0 rather than from the first picture, include a caption that stays up, or be wrong.
    """
    guessed = container.duration is None or not format_of_container(container).says_length
    return None if guessed else container.duration / 1e6


def may_be_overlong(header: float | None, limits: MediaLimits, request: ClipRequest) -> bool:
    """Return whether a header's length is reason enough to look at the packets before anything is decoded."""
    if header is None or limits.overlong != "quarantine" or request.end is not None:
        return False
    return header - (request.start or 0) > limits.max_seconds


def is_overlong(source: Source, limits: MediaLimits, kind: str, request: ClipRequest) -> bool:
    """Return whether the packets of a kind's main track last longer than allowed, reading no more than that takes."""
    with opened(source, limits) as container:
        stream = main_track(container, kind)
        if stream is None:
            return False
        skip_others(container, stream)
        deadline, zero, first = Deadline(source, limits.decode_timeout), file_start(container), None
        for packet in container.demux(stream):
            deadline.check()
            decoding = packet.pts if packet.dts is None else packet.dts
            if decoding is None or packet.is_discard:
                continue
            seconds = float(decoding * packet.time_base) - zero
            if seconds < (request.start or 0):
                continue
            first = seconds if first is None else first
            if seconds - first > limits.max_seconds + 1:  # 1 s: packets are stored out of order
                return True
    return False


def skip_others(container, stream) -> None:
    """Let the container skip the packets of the other streams."""
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all


def file_start(container) -> float:
    """
    Return the start of the file in seconds: the earliest track.

    What stands before 0 is not played: the priming of a decoder, or the part before a cut.
    """
    tracks = [track for kind in ("video", "audio") if (track := main_track(container, kind)) is not None]
    starts = [track.start_time * track.time_base for track in tracks if track.start_time is not None]
    first = float(min(starts, default=0))
    return first if format_of_container(container).demuxer in FREE_CLOCK else max(0.0, first)


def declared_end_of(source: Source, container, stream) -> float | None:
    """
    Return where the stream's header says it ends, in seconds; `None` where it has no such claim of its own.

    This finds files of full size whose end is empty, as an interrupted download leaves them.
    """
    for name, value in stream.metadata.items():  # Matroska: a tag such as 00:00:02.500000000
        if name.upper().startswith("DURATION") and (match := _CLOCK.match(value)):
            hours, minutes, seconds = match.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if stream.duration is None or not format_of_container(container).says_length:
        return None
    if format_of_container(container).demuxer == "mov" and not stream.frames:
        return None  # in fragments, whose lengths FFmpeg adds up, with what stands before the start
    # ASF gives the length of the file to each track. AVI counts the empty pieces by which it lets sound begin late.
    if container.format.name == "asf" or (container.format.name == "avi" and stream.type == "audio"):
        return None
    if container.format.name == "mp3" and (source.is_url or declared_bytes(source.path) is None):
        return None  # without a Xing header FFmpeg guesses, wrongly for variable bit rates
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base)


def probe(source: Source, limits: MediaLimits, request: ClipRequest) -> MediaInfo:
    """
    Read what the header says.

    Raises as decoding would for what it shows: `not-media`, `truncated`, ...; and `too-long`, where the packets bear
    out what the header says.
    """
    with opened(source, limits) as container:
        seconds = header_seconds(container)
        video, audio = (main_track(container, kind) for kind in ("video", "audio"))
        codec = video.codec_context if video is not None else None
        width, height = (codec.width, codec.height) if codec is not None else (None, None)
        name = container.format.name
    if may_be_overlong(seconds, limits, request):
        kinds = [kind for kind, track in (("video", video), ("audio", audio)) if track is not None]
        if kinds and all(is_overlong(source, limits, kind, request) for kind in kinds):
            raise too_long(source, limits)
    return MediaInfo(source.path, video is not None, audio is not None, seconds, width, height, name)


def too_long(source: Source, limits: MediaLimits) -> MediaError:
    """Return the error of a medium over the limit of its length."""
    return source.error("too-long", f"over {limits.max_seconds:g} s, which is the limit")


def can_seek(container, start: float) -> bool:
    """Return whether a container's index leads to `start` (in the stream's seconds) faster than reading up to it."""
    return start > SEEK_AFTER and format_of_container(container).demuxer in SEEKABLE


def segment_words(request: ClipRequest) -> str:
    """Name the segment that was asked for, for errors."""
    end = "the end" if request.end is None else f"{request.end:g} s"
    return f"the segment from {request.start or 0:g} s to {end}"
