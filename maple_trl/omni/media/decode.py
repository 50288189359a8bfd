"""The pictures of a media file's video: which ones are taken, by the times in its packets, and their pixels."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.clips import SEGMENT_SHORTENED, TORCHCODEC_FAILED, TRIMMED, ClipRequest, Source, VideoClip
from maple_trl.omni.media.opening import (
    END_SLACK,
    STAMP_RETURN,
    Deadline,
    can_seek,
    declared_end_of,
    file_notes,
    file_start,
    format_of_container,
    main_track,
    opened,
    opened_video,
    segment_words,
    skip_others,
    too_long,
)
from maple_trl.omni.media.sampling import MediaLimits, even_count, fit_size, sample_indices


# Containers that say when pictures are decoded and not when they are shown: one after the other, in the same rhythm.
IN_ORDER = {"avi"}
PICTURE_SLACK = 0.0005  # seconds: half of a time stamp in milliseconds


@dataclass(frozen=True)
class Timeline:
    """
    What the packets tell without decoding: when pictures are shown (in ticks, sorted), and which are key frames.

    `until`: all pictures shown up to then (in seconds) are in it; infinite unless reading stopped where what follows
    is not used. `in_order`: the k-th picture that the decoder gives is shown at the k-th time, and its own time stamp
    is a guess. `sought`: it begins at a key frame within the file. `damaged`: pictures that are not whole, or are made
    from one that is not.
    """

    pts: np.ndarray
    keys: list[int]
    end: int
    tick: Fraction
    until: float
    in_order: bool
    sought: bool = False
    damaged: frozenset[int] = frozenset()

    @property
    def complete(self) -> bool:
        """Whether reading went on to the end of the file."""
        return self.until == math.inf

    @property
    def longest_gap(self) -> float:
        """Longest time between pictures, in seconds; a last one without a stored length counts as no longer."""
        return float(np.diff(self.pts).max() * self.tick) if len(self.pts) > 1 else float("inf")

    @property
    def variable(self) -> bool:
        """Whether the frame rate varies by more than 5 % and by more than millisecond time stamps explain."""
        seconds = self.pts * float(self.tick)
        gaps = np.diff(seconds[seconds <= self.until])  # beyond, pictures are missing that are stored after later ones
        return len(gaps) > 1 and bool(np.max(np.abs(gaps - np.median(gaps))) > max(0.0015, 0.05 * np.median(gaps)))


def _timeline(source: Source, container, stream, last: Callable[[float], float], deadline: Deadline) -> Timeline:
    """
    Read the packets (some milliseconds for a clip): the one way to know all times whatever the container.

    `last` gives, for the time of the first packet, the time up to which pictures can matter, in the stream's seconds.
    """
    skip_others(container, stream)
    in_order = container.format.name in IN_ORDER
    shown: dict[int, bool] = {}
    damaged, lost = set(), False
    end, latest, stop, until = 0, None, None, math.inf
    for packet in container.demux(stream):
        deadline.check()
        # A transport stream may have lost a packet, or been joined from pieces, which looks alike: what follows is there.
        if packet.is_corrupt and format_of_container(container).demuxer != "mpegts":
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
            until = stop
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
    return Timeline(pts, keys, end, stream.time_base, until, in_order, damaged=frozenset(damaged))


class _SeekMissed(Exception):
    """Seeking did not lead to where reading from the start would."""


@dataclass(frozen=True)
class _Choice:
    """
    Which pictures are taken.

    It holds their ticks, their times from the start of the file or segment, what is special, and the number of their stream.
    """

    line: Timeline
    ticks: list[int]
    seconds: list[float]
    duration: float
    notes: list[str]
    stream: int

    @property
    def fps(self) -> float:
        """Mean rate of what is taken."""
        if len(self.seconds) == 1:
            return 1 / self.duration
        return (len(self.seconds) - 1) / (self.seconds[-1] - self.seconds[0])


def _chosen(
    source: Source, limits: MediaLimits, request: ClipRequest, deadline: Deadline
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


def _line_from(
    source: Source, container, stream, start: float, last: Callable[[float], float], deadline: Deadline
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
    deadline: Deadline,
    seek: bool,
) -> _Choice:
    """Find the pictures of the whole clip or segment that `limits` samples, with the errors of [`decode_video`]."""
    notes, zero, declared_end = (
        file_notes(source, container),
        file_start(container),
        declared_end_of(source, container, stream),
    )
    limits, start, stop = request.limits(limits), request.start or 0.0, request.end

    def last(first: float) -> float:
        if stop is None and limits.overlong == "spread":
            return math.inf
        return zero + stop if stop is not None else max(first, zero + start) + limits.max_seconds

    if seek and can_seek(container, start):
        line = _line_from(source, container, stream, zero + start, last, deadline)
    else:
        line = _timeline(source, container, stream, last, deadline)
    seconds = line.pts * float(line.tick) - zero
    end = float(line.end * line.tick) - zero
    if not line.complete:  # until the next picture, which was met beyond the limit, the last one is shown
        end = max(end, max(start, float(seconds[0])) + limits.max_seconds + 1 if stop is None else stop)
    if line.complete and declared_end is not None and (stop is None or stop > end):
        if end < declared_end - zero - max(END_SLACK, line.longest_gap):
            raise source.error("truncated", f"pictures up to {end:.2f} s of {declared_end - zero:.2f} s")
    if not request.whole:
        asked = f"{segment_words(request)} was asked for"
        if start >= end:
            raise source.error("segment-outside", f"{asked} and its pictures end at {end:.2f} s")
        if stop is not None and stop < seconds[0] - PICTURE_SLACK:
            raise source.error("segment-outside", f"{asked} and its first picture is shown at {seconds[0]:.2f} s")
        if stop is not None and stop > end + max(END_SLACK, line.longest_gap if len(line.pts) > 1 else 0):
            notes.append(SEGMENT_SHORTENED)
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
            raise too_long(source, limits)
        duration = limits.max_seconds
        taken = taken[seconds[taken] < first + duration - PICTURE_SLACK]
        notes.append(TRIMMED)
    notes += ["variable-frame-rate"] if line.variable else []
    chosen = taken[sample_indices(limits, len(taken), duration)]
    if damaged := [float(seconds[i]) for i in chosen if int(line.pts[i]) in line.damaged]:
        raise source.error("unreadable", f"the picture at {damaged[0]:.2f} s is damaged: the stream has lost data")
    times = [max(0.0, float(seconds[i]) - start) for i in chosen]
    return _Choice(line, [int(tick) for tick in line.pts[chosen]], times, duration, notes, stream.index)


def count_frames(source: Source, limits: MediaLimits, request: ClipRequest) -> int:
    """Count the frames that [`decode_video`] gives for the same arguments by its packets, decoding nothing."""
    choice, _ = _chosen(source, limits, request, Deadline(source, limits.decode_timeout))
    return len(even_count(choice.ticks))


def _pick(
    source: Source, limits: MediaLimits, line: Timeline, wanted: list[int], deadline: Deadline, seek: bool
) -> Iterator["av.VideoFrame"]:
    """Yield the frame shown at each tick of `wanted` (ascending), seeking where a key frame lies between two."""
    with opened(source, limits) as container:
        stream = main_track(container, "video")
        stream.codec_context.thread_count = 1  # the loader's threads work on different clips instead
        skip_others(container, stream)
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
        picker (`Callable`, *optional*): another decoder, called as `picker(path, seconds, stream)`, with the number of the
            stream in the file. Where it fails, PyAV decodes, with a note.

    Raises:
        MediaError: `no-video-track`, `no-frames`, `truncated`, `unreadable`, `too-long`, `segment-outside`,
            `frame-too-large`, `bad-aspect-ratio`, `decode-timeout`, `not-media`, `not-found`.
    """
    deadline = Deadline(source, limits.decode_timeout)
    choice, pixel_aspect = _chosen(source, limits, request, deadline)
    resize = _Resizer(source, multiple, min_pixels, max_pixels, pixel_aspect, request)
    line, wanted, notes = choice.line, choice.ticks, choice.notes
    pictures = None
    # torchcodec turns pictures, in some versions, and mirrors none: what is not upright as stored is left to PyAV.
    if picker is not None and not line.in_order and _stored_upright(source, limits):
        try:  # half a tick later: the float must not fall before the picture
            seconds = [float((tick + Fraction(1, 2)) * line.tick) for tick in wanted]
            pictures = picker(source.path, seconds, choice.stream)
        except (RuntimeError, ValueError, IndexError):
            # PyAV may read it: which rows there are is not the decoder's choice.
            notes.append(TORCHCODEC_FAILED)
    if pictures is not None:
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
