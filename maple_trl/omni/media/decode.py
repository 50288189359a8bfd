"""
One media file to arrays, with PyAV (FFmpeg).

FFmpeg guesses a file's format from its content, and some formats (HLS playlists, concat scripts) name other files and
URLs, which it then reads. Only containers that carry their own data are accepted here, whatever the file's name.
"""

import errno
import math
import os
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from urllib.parse import urlsplit

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.clips import AudioClip, ClipRequest, MediaInfo, Source, VideoClip
from maple_trl.omni.media.containers import declared_bytes
from maple_trl.omni.media.formats import FORMATS, Format, accepted, format_of, found_in
from maple_trl.omni.media.sampling import MediaLimits, even_count, fit_size, sample_indices


MAX_SOURCE_PIXELS = 1 << 26  # 8192 x 8192: a header can claim any size, and the decoder allocates it
MIN_AUDIO_SECONDS = 0.02
END_SLACK = 0.1  # seconds by which a header without byte counts may overstate the length: a few codec frames
# Seconds. Sound is moved where its time stamps say so by more; less is rounding, or the jitter of a live recorder.
STAMP_JITTER = 0.01
STAMP_RETURN = 1.0  # seconds: what goes back in time by more has been put together wrongly
# Containers that say when pictures are decoded and not when they are shown: one after the other, in the same rhythm.
IN_ORDER = {"avi"}
# Containers whose clock begins anywhere, and starts again at 0 after 26.5 hours: FFmpeg calls what stands before that negative.
FREE_CLOCK = {"mpegts", "mpeg"}
SEEKABLE = {
    "mov",
    "matroska",
}  # containers with an index by time, in which a segment is found without reading up to it
SEEK_AFTER = 30.0  # seconds from the start; less is read as it is
PREROLL = 1.0  # seconds of sound decoded ahead of a segment: codecs need some frames to settle
PICTURE_SLACK = 0.0005  # seconds: half of a time stamp in milliseconds
PART_SECONDS = 10.0  # of each part of a sound that is spread: some sentences


_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


class _Deadline:
    def __init__(self, source: Source, seconds: float):
        self.source, self.seconds, self.end = source, seconds, time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise self.source.error("decode-timeout", f"not decoded within {self.seconds:g} s")


@contextmanager
def _opened(source: Source, limits: MediaLimits) -> Iterator["av.container.InputContainer"]:
    """Open a container of an accepted format, complete as far as its header tells; FFmpeg's errors become ours."""
    protocols = "http,https,tcp,tls" if source.is_url else "file"
    timeout = limits.decode_timeout
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": protocols}
    try:
        with av.open(source.path, container_options=options, metadata_errors="replace", timeout=timeout) as container:
            if not source.is_url and (declared := declared_bytes(source.path)):
                size = os.path.getsize(source.path)
                if size < declared:
                    raise source.error("truncated", f"has {size} bytes of the {declared} that its header declares")
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


def _track(container, kind: str):
    """Return the main stream of a kind, or `None`; cover art is a picture, not a video."""
    streams = [s for s in getattr(container.streams, kind) if not s.disposition & av.stream.Disposition.attached_pic]
    best = container.streams.best(kind)
    return best if best in streams else next(iter(streams), None)


def _decodable(source: Source, stream) -> None:
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
    with _opened(source, limits) as container:
        stream = _track(container, "video")
        if stream is None:
            raise source.error("no-video-track", "the file has no video track")
        _decodable(source, stream)
        if stream.codec_context.width * stream.codec_context.height > MAX_SOURCE_PIXELS:
            size = f"{stream.codec_context.width}x{stream.codec_context.height}"
            raise source.error("frame-too-large", f"{size}; at most {MAX_SOURCE_PIXELS} pixels are decoded")
        yield container, stream


def _format(container) -> Format:
    return FORMATS[container.format.name.split(",")[0]]


def _file_notes(source: Source, container) -> list[str]:
    """Note what is special about the file as a whole; the content decides how it is read, not the name."""
    extension = os.path.splitext(urlsplit(source.path).path if source.is_url else source.path)[1][1:].lower()
    return ["extension-mismatch"] if extension and extension not in _format(container).suffixes else []


def _header_seconds(container) -> float | None:
    """
    Return the length in the header, a hint and no more; `None` where it says nothing and FFmpeg guesses.

    It may count from 0 rather than from the first picture, include a caption that stays up, or be wrong.
    """
    guessed = container.duration is None or not _format(container).says_length
    return None if guessed else container.duration / 1e6


def _maybe_overlong(header: float | None, limits: MediaLimits, request: ClipRequest) -> bool:
    """Return whether a header's length is reason enough to look at the packets before anything is decoded."""
    if header is None or limits.overlong != "quarantine" or request.end is not None:
        return False
    return header - (request.start or 0) > limits.max_seconds


def _overlong(source: Source, limits: MediaLimits, kind: str, request: ClipRequest) -> bool:
    """Return whether the packets of a kind's main track last longer than allowed, reading no more than that takes."""
    with _opened(source, limits) as container:
        stream = _track(container, kind)
        if stream is None:
            return False
        _only(container, stream)
        deadline, zero, first = _Deadline(source, limits.decode_timeout), _zero(container), None
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


def _only(container, stream) -> None:
    """Let the container skip the packets of the other streams."""
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all


def _zero(container) -> float:
    """
    Return the start of the file in seconds: the earliest track.

    What stands before 0 is not played: the priming of a decoder, or the part before a cut.
    """
    tracks = [track for kind in ("video", "audio") if (track := _track(container, kind)) is not None]
    starts = [track.start_time * track.time_base for track in tracks if track.start_time is not None]
    first = float(min(starts, default=0))
    return first if _format(container).demuxer in FREE_CLOCK else max(0.0, first)


def _declared_end(source: Source, container, stream) -> float | None:
    """
    Return where the stream's header says it ends, in seconds; `None` where it has no such claim of its own.

    This finds files of full size whose end is empty, as an interrupted download leaves them.
    """
    for name, value in stream.metadata.items():  # Matroska: a tag such as 00:00:02.500000000
        if name.upper().startswith("DURATION") and (match := _CLOCK.match(value)):
            hours, minutes, seconds = match.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if stream.duration is None or not _format(container).says_length:
        return None
    if _format(container).demuxer == "mov" and not stream.frames:
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
    with _opened(source, limits) as container:
        seconds = _header_seconds(container)
        video, audio = (_track(container, kind) for kind in ("video", "audio"))
        codec = video.codec_context if video is not None else None
        width, height = (codec.width, codec.height) if codec is not None else (None, None)
        name = container.format.name
    if _maybe_overlong(seconds, limits, request):
        kinds = [kind for kind, track in (("video", video), ("audio", audio)) if track is not None]
        if kinds and all(_overlong(source, limits, kind, request) for kind in kinds):
            raise _too_long(source, limits)
    return MediaInfo(source.path, video is not None, audio is not None, seconds, width, height, name)


def _too_long(source: Source, limits: MediaLimits) -> Exception:
    return source.error("too-long", f"over {limits.max_seconds:g} s, which is the limit")


@dataclass(frozen=True)
class Timeline:
    """
    What the packets tell without decoding: when pictures are shown (in ticks, sorted), and which are key frames.

    `complete` unless reading stopped where what follows is not used. `in_order`: the k-th picture that the decoder
    gives is shown at the k-th time, and its own time stamp is a guess. `sought`: it begins at a key frame within the
    file. `damaged`: pictures that are not whole, or are made from one that is not.
    """

    pts: np.ndarray
    keys: list[int]
    end: int
    tick: Fraction
    complete: bool
    in_order: bool
    sought: bool = False
    damaged: frozenset[int] = frozenset()

    @property
    def longest_gap(self) -> float:
        """Longest time between pictures, in seconds; a last one without a stored length counts as no longer."""
        return float(np.diff(self.pts).max() * self.tick) if len(self.pts) > 1 else float("inf")

    @property
    def variable(self) -> bool:
        """Whether the frame rate varies by more than 5 % and by more than millisecond time stamps explain."""
        gaps = np.diff(self.pts) * float(self.tick)
        return len(gaps) > 1 and bool(np.max(np.abs(gaps - np.median(gaps))) > max(0.0015, 0.05 * np.median(gaps)))


def _timeline(source: Source, container, stream, last: Callable[[float], float], deadline: _Deadline) -> Timeline:
    """
    Read the packets (some milliseconds for a clip): the one way to know all times whatever the container.

    `last` gives, for the time of the first packet, the time up to which pictures can matter, in the stream's seconds.
    """
    _only(container, stream)
    in_order = container.format.name in IN_ORDER
    shown: dict[int, bool] = {}
    damaged, lost = set(), False
    end, latest, stop, complete = 0, None, None, True
    for packet in container.demux(stream):
        deadline.check()
        # A transport stream may have lost a packet, or been joined from pieces, which looks alike: what follows is there.
        if packet.is_corrupt and _format(container).demuxer != "mpegts":
            raise source.error("truncated", "a picture's data end early")
        pts = packet.dts if in_order else packet.pts
        if pts is None or packet.is_discard:
            continue
        decoding = float((pts if packet.dts is None else packet.dts) * stream.time_base)
        if packet.dts is not None:
            latest = decoding if latest is None else max(latest, decoding)
            if decoding < latest - STAMP_RETURN:
                back = f"at {latest:.2f} s the time of the pictures goes back by {latest - decoding:.2f} s"
                raise source.error("unreadable", back)
        stop = last(decoding) if stop is None else stop
        if decoding > stop + 1:  # 1 s: pictures are stored out of order
            complete = False
            break
        shown[pts] = packet.is_keyframe
        lost = packet.is_corrupt or (lost and not packet.is_keyframe)
        if lost:
            damaged.add(pts)
        end = max(end, pts + (packet.duration or 0))
    if not shown:
        missing = stream.frames
        raise source.error("truncated" if missing else "no-frames", f"{missing} pictures declared, none there")
    pts = np.array(sorted(shown), dtype=np.int64)
    if end <= pts[-1]:  # the last picture has no length of its own: the usual one
        usual = np.median(np.diff(pts)) if len(pts) > 1 else 1 / ((stream.guessed_rate or 25) * stream.time_base)
        end = int(pts[-1] + max(1, round(float(usual))))
    keys = sorted(tick for tick, key in shown.items() if key)
    return Timeline(pts, keys, end, stream.time_base, complete, in_order, damaged=frozenset(damaged))


class _SeekMissed(Exception):
    """Seeking did not lead to where reading from the start would."""


@dataclass(frozen=True)
class _Choice:
    """Which pictures are taken: their ticks, their times from the start of the file or segment, and what is special."""

    line: Timeline
    ticks: list[int]
    seconds: list[float]
    duration: float
    notes: list[str]

    @property
    def fps(self) -> float:
        """Mean rate of what is taken."""
        if len(self.seconds) == 1:
            return 1 / self.duration
        return (len(self.seconds) - 1) / (self.seconds[-1] - self.seconds[0])


def _chosen(
    source: Source, limits: MediaLimits, request: ClipRequest, deadline: _Deadline
) -> tuple[_Choice, Fraction | None]:
    """Choose what is taken of a file's video; return that and the aspect of its stored pixels."""
    for seek in (True, False):
        with opened_video(source, limits) as (container, stream):
            try:
                choice = _choose(source, container, stream, limits, request, deadline, seek)
                return choice, stream.sample_aspect_ratio
            except _SeekMissed:
                continue
    raise AssertionError("without seeking, nothing is missed")


def _seeks(container, start: float) -> bool:
    return start > SEEK_AFTER and _format(container).demuxer in SEEKABLE


def _line_from(
    source: Source, container, stream, start: float, last: Callable[[float], float], deadline: _Deadline
) -> Timeline:
    """
    Read the timeline from the key frame before `start` (in the stream's seconds) on.

    Raises:
        _SeekMissed: if the container's index does not lead there.
    """
    try:
        container.seek(int(start / stream.time_base), stream=stream)
        line = _timeline(source, container, stream, last, deadline)
    except (MediaError, av.FFmpegError) as error:
        raise _SeekMissed from error
    if not line.keys or line.keys[0] * line.tick > start:
        raise _SeekMissed
    return replace(line, sought=True)


def _choose(
    source: Source,
    container,
    stream,
    limits: MediaLimits,
    request: ClipRequest,
    deadline: _Deadline,
    seek: bool,
) -> _Choice:
    """Find the pictures of the whole clip or segment that `limits` samples, with the errors of [`decode_video`]."""
    notes, zero, declared_end = (
        _file_notes(source, container),
        _zero(container),
        _declared_end(source, container, stream),
    )
    limits, start, stop = request.limits(limits), request.start or 0.0, request.end

    def last(first: float) -> float:
        if stop is None and limits.overlong == "spread":
            return math.inf
        return zero + stop if stop is not None else max(first, zero + start) + limits.max_seconds

    if seek and _seeks(container, start):
        line = _line_from(source, container, stream, zero + start, last, deadline)
    else:
        line = _timeline(source, container, stream, last, deadline)
    seconds = line.pts * float(line.tick) - zero
    end = float(line.end * line.tick) - zero
    if (
        not line.complete and stop is None
    ):  # until the next picture, which was met beyond the limit, the last one is shown
        end = max(end, max(start, float(seconds[0])) + limits.max_seconds + 1)
    if line.complete and declared_end is not None and (stop is None or stop > end):
        if end < declared_end - zero - max(END_SLACK, line.longest_gap):
            raise source.error("truncated", f"pictures up to {end:.2f} s of {declared_end - zero:.2f} s")
    if not request.whole:
        asked = f"{_segment(request)} was asked for"
        if start >= end:
            raise source.error("segment-outside", f"{asked} and its pictures end at {end:.2f} s")
        if stop is not None and stop < seconds[0] - PICTURE_SLACK:
            raise source.error("segment-outside", f"{asked} and its first picture is shown at {seconds[0]:.2f} s")
        if stop is not None and stop > end + max(END_SLACK, line.longest_gap if len(line.pts) > 1 else 0):
            notes.append("segment-shortened")
    inside = seconds >= start - PICTURE_SLACK
    if stop is not None:
        inside &= seconds <= stop + PICTURE_SLACK
        end = min(end, stop)
    taken = np.flatnonzero(inside)
    if not len(taken):  # one picture is on screen all the time
        if not len(before := np.flatnonzero(seconds < start)):
            raise source.error("no-frames", "no picture is shown after the start of the file")
        taken = before[-1:]
    first = max(start, float(seconds[taken[0]]))
    duration = max(end - first, float(line.tick))
    if duration > limits.max_seconds + PICTURE_SLACK and limits.overlong != "spread":
        if limits.overlong == "quarantine":
            raise _too_long(source, limits)
        duration = limits.max_seconds
        taken = taken[seconds[taken] < first + duration - PICTURE_SLACK]
        notes.append("trimmed")
    notes += ["variable-frame-rate"] if line.variable else []
    chosen = taken[sample_indices(limits, len(taken), duration)]
    if damaged := [float(seconds[i]) for i in chosen if int(line.pts[i]) in line.damaged]:
        raise source.error("unreadable", f"the picture at {damaged[0]:.2f} s is damaged: the stream has lost data")
    times = [max(0.0, float(seconds[i]) - start) for i in chosen]
    return _Choice(line, [int(tick) for tick in line.pts[chosen]], times, duration, notes)


def _segment(request: ClipRequest) -> str:
    end = "the end" if request.end is None else f"{request.end:g} s"
    return f"the segment from {request.start or 0:g} s to {end}"


def count_frames(source: Source, limits: MediaLimits, request: ClipRequest) -> int:
    """Count the frames that [`decode_video`] gives for the same arguments by its packets, decoding nothing."""
    choice, _ = _chosen(source, limits, request, _Deadline(source, limits.decode_timeout))
    return len(even_count(choice.ticks))


def _pick(
    source: Source, limits: MediaLimits, line: Timeline, wanted: list[int], deadline: _Deadline, seek: bool
) -> Iterator["av.VideoFrame"]:
    """Yield the frame shown at each tick of `wanted` (ascending), seeking where a key frame lies between two."""
    with _opened(source, limits) as container:
        stream = _track(container, "video")
        stream.codec_context.thread_count = 1  # the loader's threads work on different clips instead
        _only(container, stream)
        frames, shown, ahead = container.decode(stream), None, None
        if line.in_order:
            frames, seek = _stamped(frames, line.pts), False
        sought = False
        for target in wanted:
            before = bisect_right(line.keys, target)
            key = line.keys[before - 1] if before else None
            begin = -math.inf if line.sought else int(line.pts[0])
            position = max((f.pts for f in (shown, ahead) if f is not None), default=begin)
            if seek and key is not None and key > position:
                container.seek(key, stream=stream)
                frames, shown, ahead, sought = container.decode(stream), None, None, True
            while (shown is None or shown.pts != target) and (ahead is None or ahead.pts <= target):
                if ahead is not None:
                    shown, ahead = ahead, None
                    continue
                deadline.check()
                frame = next(frames, None)
                if frame is None:
                    break
                if frame.pts is not None:
                    shown, ahead = (frame, None) if frame.pts <= target else (shown, frame)
            if sought and (shown is None or shown.pts != target or shown.is_corrupt):
                raise _SeekMissed
            picture = shown or ahead
            if picture is None:
                raise source.error("no-frames", "no picture could be decoded")
            if picture.is_corrupt:
                raise source.error("unreadable", f"the picture at {float(target * line.tick):.2f} s is damaged")
            yield picture


def _stamped(frames: Iterator["av.VideoFrame"], pts: np.ndarray) -> Iterator["av.VideoFrame"]:
    """Yield decoded frames with the times at which they are shown, one after the other."""
    for frame, tick in zip(frames, pts.tolist(), strict=False):
        frame.pts = tick
        yield frame


def upright(picture: np.ndarray, matrix: Sequence[int] | None) -> np.ndarray:
    """
    Turn a stored picture (H, W, C) by quarters and mirror it, as a player and FFmpeg's display matrix do.

    The matrix maps a point (x, y) to (a x + c y, b x + d y), with (a, b, _, c, d, ...) its numbers.
    """
    if matrix is None:
        return picture
    a, b, _, c, d = matrix[:5]
    if _turns_aside(matrix):
        picture, across, down = picture.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    return picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def _turns_aside(matrix: Sequence[int] | None) -> bool:
    """Return whether a display matrix exchanges width and height."""
    return matrix is not None and abs(matrix[1]) + abs(matrix[3]) > abs(matrix[0]) + abs(matrix[4])


def display_matrix(frame: "av.VideoFrame") -> tuple[int, ...] | None:
    """Return the nine numbers of the frame's display matrix, from container or frame; `None` without one."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    return None if data is None else tuple(np.frombuffer(data, dtype=np.int32).tolist())


def _stored_upright(source: Source, limits: MediaLimits) -> bool:
    with opened_video(source, limits) as (container, stream):
        frame = next(container.decode(stream), None)
        return frame is not None and display_matrix(frame) is None


class _Resizer:
    """Frames to RGB of the budgeted size, upright. The size follows from the first frame and holds for the clip."""

    def __init__(
        self,
        source: Source,
        multiple: int,
        min_pixels: int,
        max_pixels: int,
        pixel_aspect: Fraction | None,
        request: ClipRequest,
    ):
        self.source, self.budget, self.pixel_aspect = source, (multiple, min_pixels, max_pixels), pixel_aspect or 1
        self.asked = None if request.resized_height is None else (request.resized_height, request.resized_width)
        self.size: tuple[int, int] | None = None  # (height, width) of the upright result
        self.resized = False
        self.reformatter = VideoReformatter()

    def __call__(self, frame: "av.VideoFrame") -> np.ndarray:
        matrix = display_matrix(frame)
        aside = _turns_aside(matrix)
        if self.size is None:
            height, width = frame.height, frame.width * self.pixel_aspect
            stored = (width, height) if aside else (height, width)
            try:
                self.size = fit_size(*map(float, self.asked or stored), *self.budget)
            except ValueError as error:
                raise self.source.error("bad-aspect-ratio", str(error)) from error
            self.resized = self.size != stored
        height, width = self.size[::-1] if aside else self.size
        rgb = self.reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="BICUBIC")
        return upright(rgb.to_ndarray(), matrix)


def decode_video(
    source: Source,
    limits: MediaLimits,
    multiple: int,
    min_pixels: int,
    max_pixels: int,
    request: ClipRequest,
    picker: Callable | None = None,
) -> VideoClip:
    """
    Sample the frames of a file's video.

    Args:
        source (`Source`): the file.
        limits (`MediaLimits`): sampling and limits.
        multiple (`int`): both sides become multiples of it.
        min_pixels, max_pixels (`int`): area of a frame.
        request (`ClipRequest`): segment and sampling that differ from the whole clip.
        picker (`Callable`, *optional*): another decoder, called as `picker(path, seconds)`.

    Raises:
        MediaError: `no-video-track`, `no-frames`, `truncated`, `unreadable`, `too-long`, `segment-outside`,
            `frame-too-large`, `bad-aspect-ratio`, `decode-timeout`, `not-media`, `not-found`.
    """
    deadline = _Deadline(source, limits.decode_timeout)
    choice, pixel_aspect = _chosen(source, limits, request, deadline)
    resize = _Resizer(source, multiple, min_pixels, max_pixels, pixel_aspect, request)
    line, wanted, notes = choice.line, choice.ticks, choice.notes
    # torchcodec turns pictures, in some versions, and mirrors none: what is not upright as stored is left to PyAV.
    if picker is not None and not line.in_order and _stored_upright(source, limits):
        try:  # half a tick later: the float must not fall before the picture
            pictures = picker(source.path, [float((tick + Fraction(1, 2)) * line.tick) for tick in wanted])
        except (RuntimeError, ValueError, IndexError) as error:
            raise source.error("unreadable", f"torchcodec: {error}") from error
        frames = [resize(picture) for picture in pictures]
    else:
        try:
            frames = [resize(frame) for frame in _pick(source, limits, line, wanted, deadline, seek=True)]
        except _SeekMissed:
            frames = [resize(frame) for frame in _pick(source, limits, line, wanted, deadline, seek=False)]
    notes += ["resized"] if resize.resized else []
    stacked = np.stack(even_count(frames))
    timestamps = np.array(even_count(choice.seconds))
    stacked.flags.writeable = timestamps.flags.writeable = False  # shared by all users of the cache
    return VideoClip(stacked, timestamps, choice.fps, choice.duration, source.path, tuple(notes))


def _mono(frame: "av.AudioFrame") -> np.ndarray:
    """Average the channels of packed samples: PyAV counts the planes of 8 and more channels wrongly."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).mean(axis=1, dtype=np.float32)


@dataclass
class _Sound:
    """
    Mono samples, each at its place in time: silence where the file has none, and nothing from before `origin`.

    Attributes:
        at (`int`): place of the next sample, counted from the origin; `None` before the first.
        filled (`int`): samples that are complete.
        recorded (`int`): rate of the frames; `None` before the first.
    """

    source: Source
    rate: int
    origin: float
    at: int | None = None
    filled: int = 0
    recorded: int | None = None
    pieces: list[np.ndarray] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self._restart()

    def _restart(self) -> None:
        self._resampler, self._kind = av.AudioResampler(format="flt", rate=self.rate), None

    def add(self, frame: "av.AudioFrame") -> None:
        """Take a decoded frame, at the time that its stamp says."""
        self.recorded = self.recorded or frame.sample_rate
        if frame.sample_rate != self.recorded:  # FFmpeg goes on counting in samples of the first
            rates = f"{self.recorded} to {frame.sample_rate}"
            raise self.source.error("unreadable", f"the sound changes its rate midway, from {rates} a second")
        if frame.time is not None:
            self._move(round((frame.time - self.origin) * self.rate))
        elif self.at is None:
            self.at = round(-self.origin * self.rate)
        self._take(frame)

    def finish(self) -> None:
        """Take what the resampler still holds."""
        if self.at is not None:
            self._take(None)

    def _move(self, place: int) -> None:
        """Go to where a frame says that it stands, if that is not where the one before ended."""
        if self.at is not None:
            off = (place - self.at) / self.rate
            if abs(off) <= STAMP_JITTER:
                return
            self._take(None)
            self._restart()
            if off < -STAMP_RETURN:
                where = self.origin + self.at / self.rate
                raise self.source.error(
                    "unreadable", f"at {where:.2f} s the time of the sound goes back by {-off:.2f} s"
                )
            if max(place, self.at) > 0:
                self._note("gap-in-sound" if off > 0 else "overlapping-sound")
        self.at = place

    def _take(self, frame: "av.AudioFrame | None") -> None:
        if frame is not None:
            kind = (frame.format.name, frame.layout.name, frame.layout.nb_channels)
            if self._kind not in (None, kind):  # as in broadcasts: stereo, then a film in 5.1
                self._take(None)
                self._restart()
            self._kind = kind
        for piece in self._resampler.resample(frame):
            self._put(_mono(piece))

    def _put(self, samples: np.ndarray) -> None:
        """Append what of `samples`, which stand at `at`, is not yet there."""
        start, self.at = self.at, self.at + len(samples)
        if self.at <= self.filled:
            return
        self.fill(start)
        self.pieces.append(samples[max(0, self.filled - start) :])
        self.filled = self.at

    def fill(self, length: int) -> None:
        """Append silence up to `length` samples."""
        if length > self.filled:
            self.pieces.append(np.zeros(length - self.filled, dtype=np.float32))
            self.filled = length

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def waveform(self) -> np.ndarray:
        """Return all samples from the origin on, float32 (n,)."""
        return np.concatenate(self.pieces) if self.pieces else np.zeros(0, dtype=np.float32)


def decode_audio(source: Source, limits: MediaLimits, sampling_rate: int, request: ClipRequest) -> AudioClip | None:
    """
    Decode the file's audio, mono (mean of the channels) at `sampling_rate`; `None` if it has no audio track.

    Raises:
        MediaError: `audio-too-short`, `non-finite-audio`, `truncated`, `unreadable`, `too-long`, `segment-outside`,
            `decode-timeout`, `not-media`, `not-found`.
    """
    with _opened(source, limits) as container:
        stream = _track(container, "audio")
        if stream is None:
            return None
        _decodable(source, stream)
        # Decoding hours of sound to refuse it would take long, and the header alone is no proof.
        header, whole = _header_seconds(container), None
        if _maybe_overlong(header, limits, request) and _overlong(source, limits, "audio", request):
            raise _too_long(source, limits)
        spread = limits.overlong == "spread" and header is not None and _asked(request, header) > limits.max_seconds
        if not spread:
            waveform, notes = _heard(source, container, stream, limits, sampling_rate, request)
    most = round(limits.max_seconds * sampling_rate)
    if spread or (limits.overlong == "spread" and len(waveform) > most):
        waveform, notes, whole = _spread(source, limits, sampling_rate, request)
    if len(waveform) > most:
        if limits.overlong == "quarantine":
            raise _too_long(source, limits)
        waveform = waveform[:most]
        notes.append("trimmed")
    duration = len(waveform) / sampling_rate
    if duration <= MIN_AUDIO_SECONDS:
        raise source.error("audio-too-short", f"{duration:.4f} s; an encoder needs more than {MIN_AUDIO_SECONDS} s")
    if not np.isfinite(waveform).all():
        raise source.error("non-finite-audio", f"{int((~np.isfinite(waveform)).sum())} samples are NaN or infinite")
    waveform = waveform.copy()  # a view would keep, in the cache, what was cut off
    waveform.flags.writeable = False
    return AudioClip(waveform, sampling_rate, duration, source.path, tuple(notes), whole)


def _asked(request: ClipRequest, end: float) -> float:
    """Return how many seconds a request asks for of a file that ends at `end`."""
    return min(end, request.end or math.inf) - (request.start or 0.0)


def _sound_end(source: Source, limits: MediaLimits, deadline: _Deadline) -> float:
    """Return where the sound ends by its packets, in seconds of the file; nothing is decoded."""
    with _opened(source, limits) as container:
        stream = _track(container, "audio")
        _only(container, stream)
        ticks = 0
        try:
            for packet in container.demux(stream):
                deadline.check()
                if packet.pts is not None:
                    ticks = max(ticks, packet.pts + (packet.duration or 0))
        except av.error.InvalidDataError:  # a tag behind the sound; damage within it is met by its part
            pass
        end, declared = float(ticks * stream.time_base), _declared_end(source, container, stream)
        if declared is not None and end < declared - PREROLL:
            raise source.error("truncated", f"sound up to {end:.2f} s of {declared:.2f} s")
        return end - _zero(container)


def _spread(
    source: Source, limits: MediaLimits, rate: int, request: ClipRequest
) -> tuple[np.ndarray, list[str], float | None]:
    """
    Decode parts of a long sound, evenly from its beginning to its end, `max_seconds` together.

    Returns:
        the parts, joined; what is special; and how long all of it is. `None` where its header overstates that, and it was
        read whole.
    """
    deadline = _Deadline(source, limits.decode_timeout)
    whole = _asked(request, _sound_end(source, limits, deadline))
    if whole <= limits.max_seconds:
        with _opened(source, limits) as container:
            return (*_heard(source, container, _track(container, "audio"), limits, rate, request), None)
    start, count = request.start or 0.0, max(1, int(limits.max_seconds // PART_SECONDS))
    seconds = limits.max_seconds / count
    pieces, notes = [], {}
    for begin in np.linspace(start, start + whole - seconds, count):
        deadline.check()
        part = ClipRequest(start=float(begin), end=float(begin) + seconds)
        with _opened(source, limits) as container:
            piece, told = _heard(source, container, _track(container, "audio"), limits, rate, part)
        pieces.append(piece)
        notes |= dict.fromkeys(note for note in told if note != "segment-shortened")
    return np.concatenate(pieces), [*notes, "sound-spread"], whole


def _heard(
    source: Source, container, stream, limits: MediaLimits, rate: int, request: ClipRequest
) -> tuple[np.ndarray, list[str]]:
    """Decode the sound of a file or segment, up to a second more than is allowed, and note what is special."""
    deadline, start, zero = _Deadline(source, limits.decode_timeout), request.start or 0.0, _zero(container)
    declared_end = _declared_end(source, container, stream)
    sound = _Sound(source, rate, zero + start)
    asked = None if request.end is None else round((request.end - start) * rate)
    wanted = min(round((limits.max_seconds + 1) * rate), asked or sys.maxsize)
    end, ended = 0.0, False
    for frame_end, frame in _frames_from(container, stream, zero + start, declared_end):
        deadline.check()
        end = frame_end
        if frame is None:
            continue
        if frame.time is not None and (frame.time - zero - start) * rate > wanted:
            sound.finish()
            sound.fill(wanted)  # a gap may be of any length
            break
        sound.add(frame)
        if sound.filled >= wanted:
            break
    else:
        ended = True
        slack = PREROLL if sound.at is None else END_SLACK  # the length of what is not decoded may be unknown
        if declared_end is not None and end < declared_end - slack:
            raise source.error("truncated", f"sound up to {end:.2f} s of {declared_end:.2f} s")
        sound.finish()
    waveform, notes = sound.waveform()[:asked], _file_notes(source, container) + sound.notes
    if ended and declared_end is not None:  # without the padding of the last codec frame
        padding = len(waveform) - round((declared_end - zero - start) * rate)
        if 0 < padding <= END_SLACK * rate:
            waveform = waveform[: len(waveform) - padding]
    if not request.whole and not len(waveform):
        detail = f"{_segment(request)} was asked for and its sound ends at {max(0.0, end - zero):.2f} s"
        raise source.error("segment-outside", detail)
    if ended and asked is not None and len(waveform) < asked - END_SLACK * rate:
        notes.append("segment-shortened")
    return waveform, notes


def _packets_from(container, stream, start: float) -> Iterator["av.Packet"]:
    """Yield the stream's packets from before `start` (in its seconds) on; all, where it can't be searched."""
    if _seeks(container, start):
        try:
            container.seek(int((start - PREROLL) / stream.time_base), stream=stream)
            first = next(container.demux(stream), None)
            if first is not None and first.pts is not None and first.pts * first.time_base <= start:
                yield first
            else:
                container.seek(stream.start_time or 0, stream=stream)
        except av.FFmpegError:  # no index: where reading stands is not changed
            pass
    yield from container.demux(stream)


def _frames_from(
    container, stream, start: float, declared_end: float | None
) -> Iterator[tuple[float, "av.AudioFrame | None"]]:
    """
    Yield decoded sound that may be heard at `start` (in the stream's seconds) or later, each frame with its end.

    What precedes is not decoded, and is `None`.
    """
    end, packets = 0.0, _packets_from(container, stream, start - PREROLL)
    while True:
        try:
            packet = next(packets, None)
        except av.error.InvalidDataError:
            if declared_end is None or end < declared_end - 1 / stream.rate:
                raise
            packet = None  # a tag behind the sound, which is no packet: most files of WavPack have one
        if packet is None:
            return
        if packet.pts is not None:
            packet_end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet_end < start - PREROLL:
                end = packet_end
                yield end, None
                continue
        for frame in packet.decode():
            end = (end if frame.time is None else frame.time) + frame.samples / frame.sample_rate
            yield end, frame
