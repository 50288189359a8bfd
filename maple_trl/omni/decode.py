"""
One media file to arrays, with PyAV (FFmpeg).

FFmpeg guesses a file's format from its content, and some formats (HLS playlists, concat scripts) name other files and
URLs, which it then reads. Only containers that carry their own data are accepted here, whatever the file's name.
"""

import errno
import os
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from urllib.parse import urlsplit

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from maple_trl.omni.clips import AudioClip, MediaInfo, Source, VideoClip
from maple_trl.omni.containers import declared_bytes
from maple_trl.omni.formats import FORMATS, Format, accepted, format_of, found_in
from maple_trl.omni.sampling import MediaLimits, even_count, fit_size, sample_times


MAX_SOURCE_PIXELS = 1 << 26  # 8192 x 8192: a header can claim any size, and the decoder allocates it
MIN_AUDIO_SECONDS = 0.02
END_SLACK = 0.1  # seconds by which a header without byte counts may overstate the length: a few codec frames


_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


class _Deadline:
    def __init__(self, source: Source, seconds: float):
        self.source, self.seconds, self.end = source, seconds, time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise self.source.error("decode-timeout", f"not decoded within {self.seconds:g} s")


@contextmanager
def _opened(source: Source, limits: MediaLimits) -> Iterator["av.container.InputContainer"]:
    """An open container of an accepted format, complete as far as its header tells; FFmpeg's errors as ours."""
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
    """The main stream of a kind, or `None`. Cover art is a picture, not a video."""
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
    An open container and its main video, which can be decoded within bounds.

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
    """What is special about the file as a whole. The content decides how it is read, not the name."""
    extension = os.path.splitext(urlsplit(source.path).path if source.is_url else source.path)[1][1:].lower()
    return ["extension-mismatch"] if extension and extension not in _format(container).suffixes else []


def _header_seconds(source: Source, container, limits: MediaLimits) -> float | None:
    """Length in the header; raises where that alone is too much."""
    guessed = container.duration is None or not _format(container).says_length
    seconds = None if guessed else container.duration / 1e6
    if seconds is not None and seconds > limits.max_seconds and limits.overlong == "quarantine":
        raise source.error("too-long", f"{seconds:.2f} s; the limit is {limits.max_seconds:g} s")
    return seconds


def _zero(container) -> float:
    """Start of the file in seconds: the earliest track. Negative starts are decoder priming, which is not played."""
    tracks = [track for kind in ("video", "audio") if (track := _track(container, kind)) is not None]
    starts = [track.start_time * track.time_base for track in tracks if track.start_time is not None]
    return max(0.0, float(min(starts, default=0)))


def _declared_end(source: Source, container, stream) -> float | None:
    """
    Where the stream's header says it ends, in seconds; `None` where the header has no such claim of its own. Finds files
    of full size whose end is empty, as an interrupted download leaves them.
    """
    for name, value in stream.metadata.items():  # Matroska: a tag such as 00:00:02.500000000
        if name.upper().startswith("DURATION") and (match := _CLOCK.match(value)):
            hours, minutes, seconds = match.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if stream.duration is None or not _format(container).says_length:
        return None
    if container.format.name == "mp3" and (source.is_url or declared_bytes(source.path) is None):
        return None  # without a Xing header FFmpeg guesses, wrongly for variable bit rates
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base)


def probe(source: Source, limits: MediaLimits) -> MediaInfo:
    """Header only. Raises as decoding would for what a header shows: `not-media`, `truncated`, `too-long`, ..."""
    with _opened(source, limits) as container:
        seconds = _header_seconds(source, container, limits)
        video, audio = (_track(container, kind) for kind in ("video", "audio"))
        codec = video.codec_context if video is not None else None
        width, height = (codec.width, codec.height) if codec is not None else (None, None)
        end = _declared_end(source, container, video) if video is not None else None
        pictures = None if end is None else end - float((video.start_time or 0) * video.time_base)
        name = container.format.name
        return MediaInfo(source.path, video is not None, audio is not None, seconds, width, height, name, pictures)


@dataclass(frozen=True)
class Timeline:
    """What the packets tell without decoding: when pictures are shown (in ticks, sorted), and which are key frames."""

    pts: np.ndarray
    keys: list[int]
    end: int
    tick: Fraction

    @property
    def longest_gap(self) -> float:
        """Seconds. A last picture that is held may be stored without its length; it counts as no longer than this."""
        return float(np.diff(self.pts).max() * self.tick) if len(self.pts) > 1 else float("inf")

    @property
    def variable(self) -> bool:
        """Whether the frame rate varies by more than 5 % and by more than millisecond time stamps explain."""
        gaps = np.diff(self.pts) * float(self.tick)
        return len(gaps) > 1 and bool(np.max(np.abs(gaps - np.median(gaps))) > max(0.0015, 0.05 * np.median(gaps)))


def _timeline(source: Source, container, stream, limits: MediaLimits, deadline: _Deadline) -> Timeline:
    """Reads the packets (some milliseconds for a clip): the one way to know all times whatever the container."""
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    shown: dict[int, bool] = {}
    end, first = 0, None
    for packet in container.demux(stream):
        deadline.check()
        if packet.is_corrupt:
            raise source.error("truncated", "a picture's data end early")
        if packet.pts is None or packet.is_discard:
            continue
        decoding = packet.pts if packet.dts is None else packet.dts
        first = decoding if first is None else first
        if (decoding - first) * stream.time_base > limits.max_seconds + 1:  # 1 s: pictures are stored out of order
            break  # the rest is not used
        shown[packet.pts] = packet.is_keyframe
        end = max(end, packet.pts + (packet.duration or 0))
    if not shown:
        missing = stream.frames
        raise source.error("truncated" if missing else "no-frames", f"{missing} pictures declared, none there")
    pts = np.array(sorted(shown), dtype=np.int64)
    if end <= pts[-1]:  # the last picture has no length of its own: the usual one
        usual = np.median(np.diff(pts)) if len(pts) > 1 else 1 / ((stream.guessed_rate or 25) * stream.time_base)
        end = int(pts[-1] + max(1, round(float(usual))))
    return Timeline(pts, sorted(p for p, key in shown.items() if key), end, stream.time_base)


class _SeekMissed(Exception):
    """Seeking did not lead to the frame that decoding from the start would show."""


def _pick(
    source: Source, limits: MediaLimits, line: Timeline, wanted: list[int], deadline: _Deadline, seek: bool
) -> Iterator["av.VideoFrame"]:
    """The frame shown at each tick of `wanted` (ascending). Seeks where a key frame lies between two of them."""
    with _opened(source, limits) as container:
        stream = _track(container, "video")
        stream.codec_context.thread_count = 1  # the loader's threads work on different clips instead
        for other in container.streams:
            if other is not stream:
                other.discard = av.stream.Discard.all
        frames, shown, ahead = container.decode(stream), None, None
        sought = False
        for target in wanted:
            before = bisect_right(line.keys, target)
            key = line.keys[before - 1] if before else None
            position = max((f.pts for f in (shown, ahead) if f is not None), default=int(line.pts[0]))
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


class _Resizer:
    """Frames to RGB of the budgeted size, upright. The size follows from the first frame and holds for the clip."""

    def __init__(self, source: Source, multiple: int, min_pixels: int, max_pixels: int, pixel_aspect: Fraction | None):
        self.source, self.budget, self.pixel_aspect = source, (multiple, min_pixels, max_pixels), pixel_aspect or 1
        self.size: tuple[int, int] | None = None  # (height, width) of the upright result
        self.resized = False
        self.reformatter = VideoReformatter()

    def __call__(self, frame: "av.VideoFrame") -> np.ndarray:
        turns = round(frame.rotation / 90) % 4
        if self.size is None:
            height, width = frame.height, frame.width * self.pixel_aspect
            stored = (height, width) if turns % 2 == 0 else (width, height)
            try:
                self.size = fit_size(*map(float, stored), *self.budget)
            except ValueError as error:
                raise self.source.error("bad-aspect-ratio", str(error)) from error
            self.resized = self.size != stored
        height, width = self.size if turns % 2 == 0 else self.size[::-1]
        rgb = self.reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="BICUBIC")
        return np.rot90(rgb.to_ndarray(), turns)


def decode_video(
    source: Source,
    limits: MediaLimits,
    multiple: int,
    min_pixels: int,
    max_pixels: int,
    picker: Callable | None = None,
) -> VideoClip:
    """
    Samples the frames of a file's video.

    Args:
        source (`Source`): the file.
        limits (`MediaLimits`): sampling and limits.
        multiple (`int`): both sides become multiples of it.
        min_pixels, max_pixels (`int`): area of a frame.
        picker (`Callable`, *optional*): another decoder, called as `picker(path, seconds)`.

    Raises:
        MediaError: `no-video-track`, `no-frames`, `truncated`, `unreadable`, `too-long`, `frame-too-large`,
            `bad-aspect-ratio`, `decode-timeout`, `not-media`, `not-found`.
    """
    deadline = _Deadline(source, limits.decode_timeout)
    with opened_video(source, limits) as (container, stream):
        _header_seconds(source, container, limits)
        notes, zero, declared_end = (
            _file_notes(source, container),
            _zero(container),
            _declared_end(source, container, stream),
        )
        resize = _Resizer(source, multiple, min_pixels, max_pixels, stream.sample_aspect_ratio)
        line = _timeline(source, container, stream, limits, deadline)
    start, duration = int(line.pts[0]), float((line.end - int(line.pts[0])) * line.tick)
    if duration > limits.max_seconds:
        if limits.overlong == "quarantine":
            raise source.error("too-long", f"over {duration:.2f} s; the limit is {limits.max_seconds:g} s")
        duration = limits.max_seconds
        notes.append("trimmed")
    elif declared_end is not None and line.end * line.tick < declared_end - max(END_SLACK, line.longest_gap):
        raise source.error("truncated", f"pictures up to {float(line.end * line.tick):.2f} s of {declared_end:.2f} s")
    notes += ["variable-frame-rate"] if line.variable else []
    times, fps = sample_times(limits, duration)
    chosen = np.searchsorted(line.pts, start + times / float(line.tick) + 1e-6, side="right") - 1
    wanted = [int(tick) for tick in line.pts[chosen]]
    if picker is not None:
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
    timestamps = np.array(even_count([tick * float(line.tick) - zero for tick in wanted]))
    stacked.flags.writeable = timestamps.flags.writeable = False  # shared by all users of the cache
    return VideoClip(stacked, timestamps, fps, duration, source.path, tuple(notes))


def _mono(frame: "av.AudioFrame") -> np.ndarray:
    """Mean of the channels, however many. Of packed samples: PyAV counts the planes of 8 and more channels wrongly."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).mean(axis=1, dtype=np.float32)


def decode_audio(source: Source, limits: MediaLimits, sampling_rate: int) -> AudioClip | None:
    """
    The file's audio, mono (mean of the channels) at `sampling_rate`; `None` if the file has no audio track.

    Raises:
        MediaError: `audio-too-short`, `non-finite-audio`, `truncated`, `unreadable`, `too-long`, `decode-timeout`,
            `not-media`, `not-found`.
    """
    deadline = _Deadline(source, limits.decode_timeout)
    with _opened(source, limits) as container:
        stream = _track(container, "audio")
        _header_seconds(source, container, limits)
        if stream is None:
            return None
        _decodable(source, stream)
        notes, zero, declared_end = (
            _file_notes(source, container),
            _zero(container),
            _declared_end(source, container, stream),
        )
        resampler = av.AudioResampler(format="flt", rate=sampling_rate)
        most, count, end = round(limits.max_seconds * sampling_rate), 0, 0.0
        pieces: list[np.ndarray] = []
        for frame in container.decode(stream):
            deadline.check()
            if not pieces and frame.time is not None:  # a track that starts after the video keeps its place in time
                count = max(0, round((frame.time - zero) * sampling_rate))
                pieces.append(np.zeros(count, dtype=np.float32))
            end = (end if frame.time is None else frame.time) + frame.samples / frame.sample_rate
            try:
                resampled = resampler.resample(frame)
            except ValueError as error:
                raise source.error("unreadable", f"the sound changes its format midway: {error}") from error
            for piece in resampled:
                pieces.append(_mono(piece))
                count += piece.samples
            if count > most + sampling_rate:
                break
        else:
            if declared_end is not None and end < declared_end - END_SLACK:
                raise source.error("truncated", f"sound up to {end:.2f} s of {declared_end:.2f} s")
            if pieces:
                pieces += [_mono(piece) for piece in resampler.resample(None)]
    waveform = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32)
    if declared_end is not None:  # without the padding of the last codec frame
        waveform = waveform[: max(0, round((declared_end - zero) * sampling_rate))]
    if len(waveform) > most:
        if limits.overlong == "quarantine":
            raise source.error("too-long", f"over {limits.max_seconds:g} s, which is the limit")
        waveform = waveform[:most]
        notes.append("trimmed")
    duration = len(waveform) / sampling_rate
    if duration <= MIN_AUDIO_SECONDS:
        raise source.error("audio-too-short", f"{duration:.4f} s; an encoder needs more than {MIN_AUDIO_SECONDS} s")
    if not np.isfinite(waveform).all():
        raise source.error("non-finite-audio", f"{int((~np.isfinite(waveform)).sum())} samples are NaN or infinite")
    waveform = waveform.copy()  # a view would keep, in the cache, what was cut off
    waveform.flags.writeable = False
    return AudioClip(waveform, sampling_rate, duration, source.path, tuple(notes))
