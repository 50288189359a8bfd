"""Which frames of a clip are taken, and how large they get. Pure arithmetic: no file, no decoder."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np


MIN_FRAMES = 4  # of sampling by rate, so that a short clip is still seen to move
ROUNDED_STAMPS = 0.002  # seconds: a container that rounds times to milliseconds must not lose a frame by it
MAX_ASPECT_RATIO = 200.0  # beyond it a picture is a line; the Qwen vision processors refuse it as well


@dataclass(frozen=True)
class MediaLimits:
    """
    Sampling of a clip, and limits beyond which it is refused.

    Args:
        num_frames (`int` or `None`): take this many frames, evenly from the clip's first picture to its last; fewer if
            it has fewer. Exclusive with `fps`.
        fps (`float` or `None`): choose the number by this rate instead: even, at least 4 and at most `max_frames`.
        max_frames (`int`): upper limit of sampled frames.
        min_pixels, max_pixels (`int`): area of one frame after the resize.
        max_seconds (`float`): longest clip.
        overlong (`"quarantine"`, `"trim"` or `"spread"`): refuse a longer clip, use its first `max_seconds`, or take pictures
            over its whole length and `max_seconds` of its sound in parts that are spread over it.
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
    overlong: Literal["quarantine", "trim", "spread"] = "quarantine"
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
        if self.overlong not in ("quarantine", "trim", "spread"):
            raise ValueError(f"overlong must be 'quarantine', 'trim' or 'spread', got {self.overlong!r}")


def frame_count(limits: MediaLimits, pictures: int, duration: float) -> int:
    """Return how many of a clip's `pictures` in `duration` seconds are taken; by rate an even number, as Qwen does."""
    if limits.num_frames is not None:
        return min(limits.num_frames, pictures)
    wanted = (duration + ROUNDED_STAMPS) * limits.fps
    count = int(min(max(wanted, MIN_FRAMES), limits.max_frames, pictures))
    return count - count % 2 if count > 1 else 1


def sample_indices(limits: MediaLimits, pictures: int, duration: float) -> np.ndarray:
    """
    Choose which of a clip's `pictures` are taken: evenly spaced by number, from the first to the last.

    So do `qwen-vl-utils` and the video processors of the Qwen models.

    Returns:
        `np.ndarray`: ascending indices, int64 (n,); distinct, at most `pictures`.

    Raises:
        ValueError: if there is no picture, or `duration` is not positive.
    """
    if pictures < 1 or not duration > 0:
        raise ValueError(f"a clip has pictures and a positive duration, got {pictures} and {duration}")
    return np.linspace(0, pictures - 1, frame_count(limits, pictures, duration)).round().astype(np.int64)


def even_count(indices: list) -> list:
    """Repeat the list's last item if its length is odd: vision towers merge frames in pairs."""
    return indices + indices[-1:] if len(indices) % 2 else indices


def fit_size(height: float, width: float, multiple: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """
    Return the size nearest to (height, width) that fits the budget.

    Both sides are multiples of `multiple`, the area is in [`min_pixels`, `max_pixels`]; the aspect ratio is kept up to
    the rounding of each side to one multiple.

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
