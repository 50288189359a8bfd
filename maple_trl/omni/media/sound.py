"""The sound of a media file, or of a segment or parts of it, each sample at its time."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import av
import numpy as np

from maple_trl.omni.media.clips import SEGMENT_SHORTENED, SOUND_SPREAD, TRIMMED, AudioClip, ClipRequest, Source
from maple_trl.omni.media.opening import (
    END_SLACK,
    STAMP_RETURN,
    Deadline,
    can_seek,
    check_decodable,
    declared_end_of,
    file_notes,
    file_start,
    header_seconds,
    is_overlong,
    main_track,
    may_be_overlong,
    opened,
    segment_words,
    skip_others,
    too_long,
)
from maple_trl.omni.media.sampling import MediaLimits


MIN_AUDIO_SECONDS = 0.02
# Seconds. Sound is moved where its time stamps say so by more; less is rounding, or the jitter of a live recorder.
STAMP_JITTER = 0.01
PREROLL = 1.0  # seconds of sound decoded ahead of a segment: codecs need some frames to settle
PART_SECONDS = 10.0  # of each part of a sound that is spread: some sentences


CANCELLED = 1e-3  # of the channels' mean power, 30 dB below: one channel of 24 alone leaves 42 times as much


def _channels(frame: "av.AudioFrame") -> np.ndarray:
    """Return packed samples, shape (n, channels): PyAV counts the planes of 8 and more channels wrongly."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels)


@dataclass
class Sound:
    """
    Mono samples, each at its place in time: silence where the file has none, and nothing from before `origin`.

    Attributes:
        at (`int`): place of the next sample, counted from the origin; `None` before the first.
        filled (`int`): samples that are complete.
        recorded (`int`): rate of the frames; `None` before the first.
        power (`float`): sum of the squares of what was heard, as mean of the channels.
        power_left (`float`): the same of their mean, which is all that is kept.
    """

    source: Source
    rate: int
    origin: float
    at: int | None = None
    filled: int = 0
    recorded: int | None = None
    power: float = 0.0
    power_left: float = 0.0
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
        if self.power_left < CANCELLED * self.power:  # channels in opposite phase
            self._note("channels-cancel")

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
            channels = _channels(piece)
            mono = channels.mean(axis=1, dtype=np.float32)
            self.power += float(np.square(channels).mean(axis=1, dtype=np.float32).sum(dtype=np.float64))
            self.power_left += float(np.square(mono).sum(dtype=np.float64))
            self._put(mono)

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
    with opened(source, limits) as container:
        stream = main_track(container, "audio")
        if stream is None:
            return None
        check_decodable(source, stream)
        # Decoding hours of sound to refuse it would take long, and the header alone is no proof.
        header, whole = header_seconds(container), None
        if may_be_overlong(header, limits, request) and is_overlong(source, limits, "audio", request):
            raise too_long(source, limits)
        spread = limits.overlong == "spread" and header is not None and _asked(request, header) > limits.max_seconds
        if not spread:
            waveform, notes = _heard(source, container, stream, limits, sampling_rate, request)
    most = round(limits.max_seconds * sampling_rate)
    if spread or (limits.overlong == "spread" and len(waveform) > most):
        waveform, notes, whole = _spread(source, limits, sampling_rate, request)
    if len(waveform) > most:
        if limits.overlong == "quarantine":
            raise too_long(source, limits)
        waveform = waveform[:most]
        notes.append(TRIMMED)
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


def _sound_end(source: Source, limits: MediaLimits, deadline: Deadline) -> float:
    """Return where the sound ends by its packets, in seconds of the file; nothing is decoded."""
    with opened(source, limits) as container:
        stream = main_track(container, "audio")
        skip_others(container, stream)
        ticks = 0
        try:
            for packet in container.demux(stream):
                deadline.check()
                if packet.pts is not None:
                    ticks = max(ticks, packet.pts + (packet.duration or 0))
        except av.error.InvalidDataError:  # a tag behind the sound; damage within it is met by its part
            pass
        end, declared = float(ticks * stream.time_base), declared_end_of(source, container, stream)
        if declared is not None and end < declared - PREROLL:
            raise source.error("truncated", f"sound up to {end:.2f} s of {declared:.2f} s")
        return end - file_start(container)


def _spread(
    source: Source, limits: MediaLimits, rate: int, request: ClipRequest
) -> tuple[np.ndarray, list[str], float | None]:
    """
    Decode parts of a long sound, evenly from its beginning to its end, `max_seconds` together.

    Returns:
        the parts, joined; what is special; and how long all of it is. `None` where its header overstates that, and it was
        read whole.
    """
    deadline = Deadline(source, limits.decode_timeout)
    whole = _asked(request, _sound_end(source, limits, deadline))
    if whole <= limits.max_seconds:
        with opened(source, limits) as container:
            return (*_heard(source, container, main_track(container, "audio"), limits, rate, request), None)
    start, count = request.start or 0.0, max(1, int(limits.max_seconds // PART_SECONDS))
    seconds = limits.max_seconds / count
    pieces, notes = [], {}
    for begin in np.linspace(start, start + whole - seconds, count):
        deadline.check()
        part = ClipRequest(start=float(begin), end=float(begin) + seconds)
        with opened(source, limits) as container:
            piece, told = _heard(source, container, main_track(container, "audio"), limits, rate, part)
        pieces.append(piece)
        notes |= dict.fromkeys(note for note in told if note != SEGMENT_SHORTENED)
    most = round(limits.max_seconds * rate)  # the length of each part is rounded, of which all may go up
    return np.concatenate(pieces)[:most], [*notes, SOUND_SPREAD], whole


def _heard(
    source: Source, container, stream, limits: MediaLimits, rate: int, request: ClipRequest
) -> tuple[np.ndarray, list[str]]:
    """Decode the sound of a file or segment, up to a second more than is allowed, and note what is special."""
    deadline, start, zero = Deadline(source, limits.decode_timeout), request.start or 0.0, file_start(container)
    declared_end = declared_end_of(source, container, stream)
    sound = Sound(source, rate, zero + start)
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
    waveform, notes = sound.waveform()[:asked], file_notes(source, container) + sound.notes
    if ended and declared_end is not None:  # without the padding of the last codec frame
        padding = len(waveform) - round((declared_end - zero - start) * rate)
        if 0 < padding <= END_SLACK * rate:
            waveform = waveform[: len(waveform) - padding]
    if not request.whole and not len(waveform):
        detail = f"{segment_words(request)} was asked for and its sound ends at {max(0.0, end - zero):.2f} s"
        raise source.error("segment-outside", detail)
    if ended and asked is not None and len(waveform) < asked - END_SLACK * rate:
        notes.append(SEGMENT_SHORTENED)
    return waveform, notes


def _packets_from(container, stream, start: float) -> Iterator["av.Packet"]:
    """Yield the stream's packets from before `start` (in its seconds) on; all, where it can't be searched."""
    if can_seek(container, start):
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
