"""Which frames of a clip are taken, and how large they get. Pure arithmetic: no file, no decoder."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np


MAX_ASPECT_RATIO = 200.0  # beyond it a picture is a line; the Qwen vision processors refuse it as well


@dataclass(frozen=True)
class MediaLimits:
    """
    What is taken of a clip, and what is too much.

    Args:
        num_frames (`int` or `None`): sample this many frames uniformly over the clip. Exclusive with `fps`.
        fps (`float` or `None`): sample by rate instead; over `max_frames`, uniformly `max_frames`.
        max_frames (`int`): upper limit of sampled frames.
        min_pixels, max_pixels (`int`): area of one frame after the resize.
        max_seconds (`float`): longest clip.
        overlong (`"quarantine"` or `"trim"`): refuse a longer clip, or use its first `max_seconds`.
        decode_timeout (`float`): seconds per clip, checked between frames.

    Raises:
        ValueError: if `num_frames` and `fps` are both set or both `None`, or a limit contradicts another.
    """

    num_frames: int | None = 8
    fps: float | None = None
    max_frames: int = 64
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 128 * 28 * 28
    max_seconds: float = 300.0
    overlong: Literal["quarantine", "trim"] = "quarantine"
    decode_timeout: float = 60.0

    def __post_init__(self):
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError(
                f"set exactly one of num_frames and fps and make the other None, got num_frames={self.num_frames}, "
                f"fps={self.fps}"
            )
        if self.num_frames is not None and not 1 <= self.num_frames <= self.max_frames:
            raise ValueError(f"num_frames must be in [1, max_frames={self.max_frames}], got {self.num_frames}")
        for name in ("fps", "max_frames", "min_pixels", "max_seconds", "decode_timeout"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}")
        if self.overlong not in ("quarantine", "trim"):
            raise ValueError(f"overlong must be 'quarantine' or 'trim', got {self.overlong!r}")


def uniform_times(num_frames: int, duration: float) -> np.ndarray:
    """Middles of `num_frames` equal parts: t_i = (i + 0.5) * duration / n. Seconds, shape (n,), float64."""
    return (np.arange(num_frames) + 0.5) * (duration / num_frames)


def rate_times(fps: float, duration: float) -> np.ndarray:
    """t_i = i / fps inside [0, duration), at least one. Seconds, shape (n,), float64."""
    # The margin keeps a product such as 0.3 * 10 = 3.0000000000000004 from adding a frame at the very end.
    return np.arange(max(1, math.ceil(duration * fps - 1e-9))) / fps


def sample_times(limits: MediaLimits, duration: float) -> tuple[np.ndarray, float]:
    """
    Times at which `limits` looks at a clip of `duration` seconds.

    Returns:
        `tuple[np.ndarray, float]`: times in seconds, shape (n,), in [0, duration); their rate in frames per second.

    Raises:
        ValueError: if `duration` is not positive.
    """
    if not duration > 0:
        raise ValueError(f"duration must be positive, got {duration}")
    if limits.fps is not None and len(times := rate_times(limits.fps, duration)) <= limits.max_frames:
        return times, float(limits.fps)
    num_frames = limits.num_frames or limits.max_frames
    return uniform_times(num_frames, duration), num_frames / duration


def even_count(indices: list) -> list:
    """The list with its last item repeated if its length is odd: vision towers merge frames in pairs."""
    return indices + indices[-1:] if len(indices) % 2 else indices


def fit_size(height: float, width: float, multiple: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """
    The size nearest to (height, width) with both sides multiples of `multiple` and an area in
    [`min_pixels`, `max_pixels`]; the aspect ratio is kept up to the rounding of each side to one multiple.

    The same idea as `smart_resize` of the Qwen2-VL image processor, except that the budget always holds.

    Raises:
        ValueError: for an aspect ratio over 200 : 1, or when no size fits the budget.
    """
    if not (height > 0 and width > 0):
        raise ValueError(f"picture of size {height}x{width}")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"aspect ratio of {height:g}x{width:g} is over {MAX_ASPECT_RATIO:g} : 1")
    sides = [max(1, round(side / multiple)) for side in (height, width)]
    area, low, high = math.prod(sides), min_pixels / multiple**2, max_pixels / multiple**2
    if not low <= area <= high:
        goal, rounding = (high, math.floor) if area > high else (low, math.ceil)
        scale = math.sqrt(goal / (height * width))
        # 1e-9: a side that is a whole number of multiples must not fall to the next one by float error.
        nudge = 1e-9 if rounding is math.floor else -1e-9
        sides = [max(1, rounding(side * scale + nudge)) for side in (height, width)]
        if math.prod(sides) > high:  # a thin picture, whose short side was lifted to one multiple
            sides[sides.index(max(sides))] = math.floor(high / min(sides))
    if min(sides) < 1 or not low <= math.prod(sides) <= high:
        raise ValueError(
            f"{height:g}x{width:g} has no size in multiples of {multiple} from min_pixels={min_pixels} to "
            f"max_pixels={max_pixels}: lower min_pixels or raise max_pixels"
        )
    return sides[0] * multiple, sides[1] * multiple
