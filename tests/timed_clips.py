"""
Clips that say when they are: every picture carries its number, and the sound beeps at each full second, with a pitch of its
own. So a test can tell what of a file reached a model, and when, without any decoder's word for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


SIDE = 64
BEEP = 0.1  # seconds
LOUD = 0.12


@dataclass(frozen=True)
class Timed:
    """
    A clip to write.

    Args:
        suffix, video_codec, audio_codec: container and codecs.
        fps, pictures: picture n is shown at `video_start + n / fps`.
        video_start, sound_start, sound_end: seconds of the file; below 0 is before its start.
        gaps: spans of the file's time whose sound was never recorded.
        reordered: whether pictures are stored out of order.
    """

    suffix: str = "mkv"
    video_codec: str = "libx264"
    audio_codec: str = "pcm_s16le"
    fps: int = 10
    pictures: int = 40
    video_start: float = 0.0
    sound_start: float = 0.0
    sound_end: float = 5.0
    gaps: tuple[tuple[float, float], ...] = ()
    reordered: bool = False

    @property
    def rate(self) -> int:
        known = {"libopus": 48000, "libmp3lame": 32000, "mp2": 32000, "ac3": 32000, "wmav2": 44100}
        return known.get(self.audio_codec, 16000)

    @property
    def recorded_until(self) -> float:
        """The end of the last sound that the file holds: a gap may reach to the end."""
        end = self.sound_end
        for begins, ends in sorted(self.gaps, key=lambda gap: gap[1], reverse=True):
            if begins < end <= ends:
                end = begins
        return end

    def recorded(self, start: float, end: float) -> float:
        """Seconds of sound that the file holds between two of its times."""
        seconds, begins = 0.0, max(start, self.sound_start)
        for gap, goes_on in [*sorted(self.gaps), (min(end, self.sound_end),) * 2]:
            seconds += max(0.0, min(gap, end, self.sound_end) - begins)
            begins = max(begins, goes_on)
        return seconds

    def shown_at(self, number: int) -> float:
        return self.video_start + number / self.fps


def picture_of(number: int) -> np.ndarray:
    """Eight blocks, black or white: the bits of the number."""
    bits = np.array([(number >> bit) & 1 for bit in range(8)], dtype=np.uint8).reshape(2, 4) * 200 + 25
    return np.repeat(bits.repeat(SIDE // 2, 0).repeat(SIDE // 4, 1)[..., None], 3, axis=-1)


def number_of(picture: np.ndarray) -> int:
    """The number that a decoded picture carries."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 4
    inner = [
        picture[
            row * height + height // 4 : (row + 1) * height - height // 4,
            column * width + width // 4 : (column + 1) * width - width // 4,
        ].mean()
        for row in range(2)
        for column in range(4)
    ]
    return sum(1 << bit for bit, value in enumerate(inner) if value > 125)


def pitch(second: int) -> float:
    return 600.0 + 200.0 * second


def sound_at(times: np.ndarray) -> np.ndarray:
    """The sound at times of the file, float64."""
    second = np.floor(times + 1e-9)
    beeps = times - second < BEEP
    return np.where(beeps, 0.5 * np.sin(2 * np.pi * (600.0 + 200.0 * second) * times), 0.0)


def write(path: Path, clip: Timed, **options: str) -> Path:
    """Writes a clip. Sound is left out packet by packet, as a stream that lost some has it."""
    if clip.suffix in ("mkv", "webm"):
        options |= {"avoid_negative_ts": "disabled"}
    with av.open(str(path), "w", options=options) as out:
        fast = {"preset": "ultrafast"} if clip.video_codec == "libx264" else {}
        video = out.add_stream(clip.video_codec, rate=clip.fps, options=fast)
        video.width = video.height = SIDE
        video.pix_fmt, video.codec_context.gop_size = "yuv420p", 8
        # AVI counts pictures, and would be filled with as many empty ones as there are milliseconds; MPEG knows few rates.
        ticks = clip.fps if clip.suffix == "avi" or clip.video_codec == "mpeg2video" else 1000
        video.codec_context.time_base = Fraction(1, ticks)
        video.codec_context.max_b_frames = 2 if clip.reordered else 0
        audio = out.add_stream(clip.audio_codec, rate=clip.rate, layout="mono")
        audio.codec_context.bit_rate = 64000
        packets = [*video_packets(video, clip), *audio_packets(audio, clip)]
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            out.mux(packet)
    return path


def video_packets(stream, clip: Timed) -> list:
    packets = []
    for number in range(clip.pictures):
        frame = av.VideoFrame.from_ndarray(picture_of(number), format="rgb24")
        frame.time_base = stream.codec_context.time_base
        frame.pts = round(clip.shown_at(number) / frame.time_base)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def audio_packets(stream, clip: Timed) -> list:
    packets, rate = [], clip.rate
    first, last = round(clip.sound_start * rate), round(clip.sound_end * rate)
    convert = av.AudioResampler(format=stream.codec_context.format or "s16", layout="mono", rate=rate)
    for start in range(first, last, 800):
        wave = sound_at(np.arange(start, min(start + 800, last)) / rate)
        frame = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        for piece in convert.resample(frame):
            packets += stream.encode(piece)
    packets += stream.encode(None)
    return [packet for packet in packets if not any(a <= packet.pts * packet.time_base < b for a, b in clip.gaps)]


def beeps_in(waveform: np.ndarray, rate: int) -> list[tuple[int, float]]:
    """The beeps of a waveform: which second each is of, by its pitch, and when it begins."""
    loud = np.flatnonzero(np.abs(waveform) > LOUD)
    if not len(loud):
        return []
    found = []
    for run in np.split(loud, np.flatnonzero(np.diff(loud) > 0.05 * rate) + 1):
        piece = waveform[run[0] : run[-1] + 1]
        spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), n=rate))
        found.append((round((int(spectrum.argmax()) - 600) / 200), run[0] / rate))
    return found


def overlaps(start: float, end: float, spans: Iterable[tuple[float, float]]) -> bool:
    return any(a < end and start < b for a, b in spans)
