"""What decoding gives, and what it is given."""

from dataclasses import dataclass

import numpy as np

from maple_trl.omni.errors import MediaError


@dataclass(frozen=True, eq=False)
class VideoClip:
    """
    Sampled frames.

    Attributes:
        frames (`np.ndarray`): uint8 (T, H, W, 3), read-only; T even (the last frame is repeated if needed).
        timestamps (`np.ndarray`): float64 (T,), seconds from the start of the file.
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
    def nbytes(self) -> int:
        return self.frames.nbytes + self.timestamps.nbytes


@dataclass(frozen=True, eq=False)
class AudioClip:
    """Mono waveform, float32 (n,), read-only, at `sampling_rate`; sample 0 is the start of the file."""

    waveform: np.ndarray
    sampling_rate: int
    duration: float
    path: str
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.waveform.nbytes


@dataclass(frozen=True)
class MediaInfo:
    """
    What the header says. `duration` (of the file) and `video_seconds` (of its pictures) are `None` where the header does
    not tell, as in live recordings.
    """

    path: str
    has_video: bool
    has_audio: bool
    duration: float | None
    width: int | None
    height: int | None
    format: str
    video_seconds: float | None = None


@dataclass(frozen=True)
class Source:
    """A medium: its `name` in the row, for errors, and the resolved path or URL with what identifies its content."""

    name: str
    path: str
    identity: tuple = ()

    @property
    def is_url(self) -> bool:
        return "://" in self.path

    def error(self, reason: str, detail: str = "") -> MediaError:
        return MediaError(reason, self.name, detail)
