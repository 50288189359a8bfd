"""What decoding gives, and what it is given."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real

import numpy as np

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.sampling import MediaLimits


# What was special about a clip, in its notes.
NO_AUDIO = "no-audio-track"
NO_CUE = "no-cue-in-part"
SEGMENT_SHORTENED = "segment-shortened"
SOUND_SPREAD = "sound-spread"
TORCHCODEC_FAILED = "torchcodec-failed"
TRIMMED = "trimmed"

MAX_RESIZED_PIXELS = 1 << 24  # 4096 x 4096: what a row can ask for by name


@dataclass(frozen=True)
class ClipRequest:
    """
    What a row wants of a clip, where that differs from the whole clip as the loader samples it.

    Args:
        start, end (`float`, *optional*):
            Segment, in seconds from the start of the file. Pictures and sound of a segment count their time from
            `start`. A segment that goes on after the clip's end stops there, with the note `"segment-shortened"`.
        num_frames (`int`, *optional*):
            How many frames, in place of the loader's sampling.
        fps (`float`, *optional*):
            Frames per second, in place of the loader's sampling; one of the two.
        min_pixels, max_pixels (`int`, *optional*):
            Area of a frame, in place of the loader's.
        resized_height, resized_width (`int`, *optional*):
            Size of a frame in pixels, up to the rounding to whole patches; both or none. Only `max_pixels` can make it smaller.

    Raises:
        ValueError: for a value that makes no sense, by name.
    """

    start: float | None = None
    end: float | None = None
    fps: float | None = None
    num_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    def __post_init__(self):
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            if value < 0 or (value == 0 and name != "start"):
                raise ValueError(f"{name} must be {'0 or more' if name == 'start' else 'above 0'}, got {value!r}")
            whole = name not in ("start", "end", "fps")
            if whole and value != int(value):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            object.__setattr__(self, name, int(value) if whole else float(value))  # 8.0 and 8 are one request
        if self.end is not None and self.end <= (self.start or 0):
            raise ValueError(f"end must be after start, got start={self.start or 0:g}, end={self.end:g}")
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(f"set num_frames or fps, not both, got num_frames={self.num_frames}, fps={self.fps:g}")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}")
        if (self.resized_height is None) != (self.resized_width is None):
            raise ValueError("set resized_height and resized_width, or none of them")

    @property
    def whole(self) -> bool:
        """Whether it asks for the clip from its start to its end."""
        return not self.start and self.end is None

    @property
    def part(self) -> tuple[float, float]:
        """From when to when the segment is, in seconds; infinite where it goes on to the clip's end."""
        return self.start or 0.0, math.inf if self.end is None else self.end

    def limits(self, limits: MediaLimits) -> MediaLimits:
        """
        Return the loader's limits with the sampling that this request wants.

        Raises `ValueError` over `max_frames`.
        """
        if self.num_frames is None and self.fps is None:
            return limits
        return replace(limits, num_frames=self.num_frames, fps=self.fps)

    def pixels(self, limits: MediaLimits) -> tuple[int, int]:
        """Return the least and most pixels of a frame, of which a row may name one or both, and `limits` say the rest."""
        least, most = self.min_pixels or limits.min_pixels, self.max_pixels or limits.max_pixels
        if self.resized_height is not None:
            least, most = self.min_pixels or 1, self.max_pixels or MAX_RESIZED_PIXELS
        elif self.max_pixels is None and self.min_pixels is not None:
            most = max(most, 2 * least)  # the run's gives way, and leaves room for any usual aspect ratio
        elif self.min_pixels is None and self.max_pixels is not None:
            least = min(least, most // 4)
        return least, most


@dataclass(frozen=True, eq=False)
class VideoClip:
    """
    Sampled frames.

    Attributes:
        frames (`np.ndarray`): uint8 (T, H, W, 3), read-only; T even (the last frame is repeated if needed).
        timestamps (`np.ndarray`): float64 (T,), seconds from the start of the file, or of the segment that was asked for.
        fps (`float`): rate of the sampled frames.
        duration (`float`): seconds that the samples stand for.
        path (`str`): resolved path.
        notes (`tuple[str, ...]`): what was special, such as `"variable-frame-rate"` or `"trimmed"`.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    fps: float
    duration: float
    path: str
    notes: tuple[str, ...] = ()

    @property
    def without_repeat(self) -> "VideoClip":
        """The same without its last frame, where that is the one before it again, as the loader gives an odd number."""
        if len(self.timestamps) < 2 or self.timestamps[-1] != self.timestamps[-2]:
            return self
        return replace(self, frames=self.frames[:-1], timestamps=self.timestamps[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the frames."""
        return self.frames.nbytes + self.timestamps.nbytes


@dataclass(frozen=True, eq=False)
class AudioClip:
    """
    Mono waveform; sample 0 is the start of the file or segment.

    With the note `"sound-spread"` it is parts of equal length, joined, whose first begins and whose last ends with the sound.

    Attributes:
        waveform (`np.ndarray`): float32 (n,), read-only.
        sampling_rate (`int`): samples per second.
        duration (`float`): seconds of the waveform.
        path (`str`): resolved path.
        notes (`tuple[str, ...]`): what was special, such as `"sound-spread"`.
        source_seconds (`float`): how long the sound is of which it is parts; `None` where it is all of it.
    """

    waveform: np.ndarray
    sampling_rate: int
    duration: float
    path: str
    notes: tuple[str, ...] = ()
    source_seconds: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the waveform."""
        return self.waveform.nbytes


@dataclass(frozen=True, eq=False)
class Picture:
    """
    An image.

    Attributes:
        pixels (`np.ndarray`): uint8 (H, W, 3), read-only.
        path (`str`): resolved path.
        notes (`tuple[str, ...]`): what was special, such as `"first-picture"` of several in the file.
    """

    pixels: np.ndarray
    path: str
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        return self.pixels.nbytes


@dataclass(frozen=True, eq=False)
class PromptMedia:
    """The decoded media of one prompt, by kind, each in the order in which they stand in it."""

    images: Sequence[Picture] = ()
    videos: Sequence[VideoClip] = ()
    audios: Sequence[AudioClip] = ()

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of which there are any, of `image`, `video` and `audio`."""
        given = {"image": self.images, "video": self.videos, "audio": self.audios}
        return frozenset(kind for kind, clips in given.items() if clips)


@dataclass(frozen=True)
class MediaInfo:
    """
    A file's header.

    Attributes:
        path (`str`): resolved path.
        has_video (`bool`): whether it has moving pictures.
        has_audio (`bool`): whether it has sound.
        duration (`float` or `None`): seconds of the file; `None` where the header does not tell, as in live recordings.
        width (`int` or `None`): of pictures, in pixels.
        height (`int` or `None`): of pictures, in pixels.
        format (`str`): the container's name.
    """

    path: str
    has_video: bool
    has_audio: bool
    duration: float | None
    width: int | None
    height: int | None
    format: str


@dataclass(frozen=True)
class Source:
    """A medium: its `name` in the row, for errors, and the resolved path or URL with what identifies its content."""

    name: str
    path: str
    identity: tuple = ()

    @property
    def is_url(self) -> bool:
        """Whether the medium lies on a network."""
        return "://" in self.path

    def error(self, reason: str, detail: str = "") -> MediaError:
        """Return an error about this medium."""
        return MediaError(reason, self.name, detail)
