"""Frame times and frame sizes: properties that must hold for any clip."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import build_processor
from transformers.video_utils import VideoMetadata

from maple_trl.omni.media.sampling import (
    ROUNDED_STAMPS,
    MediaLimits,
    even_count,
    fit_size,
    frame_count,
    sample_indices,
)


sides = st.integers(1, 5000)
pictures = st.integers(1, 3000)
PROCESSORS = {name: build_processor(name) for name in ("qwen2_5_vl", "qwen3_vl")}


def reference(name: str, total: int, rate: float, **sampling) -> list[int]:
    """What the video processor of a Qwen model takes of a clip of `total` pictures."""
    video = PROCESSORS[name].video_processor
    return list(video.sample_frames(VideoMetadata(total_num_frames=total, fps=rate), **sampling))


@given(pictures, st.integers(1, 64))
def test_a_number_of_frames_reaches_from_the_first_picture_to_the_last(total, count):
    """As `qwen-vl-utils` and the processor of Qwen3-VL do it; vLLM takes fewer from a clip that has fewer."""
    chosen = sample_indices(MediaLimits(num_frames=count), total, total / 24)
    taken = min(count, total)
    assert chosen.tolist() == reference("qwen3_vl", total, 24.0, num_frames=taken)
    single = torch.linspace(0, total - 1, taken).round().long()  # in single precision a tie can fall to the other side
    assert np.abs(chosen - single.numpy()).max() <= 1 and (chosen != single.numpy()).sum() <= taken // 2
    assert chosen[0] == 0 and (taken == 1 or chosen[-1] == total - 1)
    assert len(set(chosen)) == taken and (np.diff(chosen) > 0).all()


def test_middles_of_parts_would_differ():
    """Negative control: the middles of equal parts are other pictures than the reference takes."""
    middles = ((np.arange(8) + 0.5) * 240 / 8).astype(int).tolist()
    assert middles != reference("qwen3_vl", 240, 24.0, num_frames=8) == [0, 34, 68, 102, 137, 171, 205, 239]


@given(pictures, st.sampled_from([10.0, 24.0, 24000 / 1001, 25.0, 30.0, 60.0]), st.floats(0.1, 30))
def test_a_rate_gives_as_many_frames_as_the_reference(total, rate, fps):
    assume(total > 1)
    wanted = total / rate * fps
    assume(abs(wanted - round(wanted)) > 2 * ROUNDED_STAMPS * fps)  # rounded time stamps tip no count nearby
    limits = MediaLimits(num_frames=None, fps=fps, max_frames=64)
    chosen = sample_indices(limits, total, total / rate)
    if total >= 4:
        taken = len(reference("qwen2_5_vl", total, rate, fps=fps, min_frames=4, max_frames=64))
        assert len(chosen) == taken - taken % 2  # its `arange` of floats can give one more than its even number
    assert chosen[0] == 0 and chosen[-1] == total - 1 and len(chosen) % 2 == 0 and len(chosen) <= 64


@given(st.one_of(st.none(), st.floats(0.1, 30)), st.integers(1, 64), pictures, st.floats(0.01, 3600))
def test_max_frames_holds(fps, max_frames, total, duration):
    limits = MediaLimits(num_frames=None if fps else max_frames, fps=fps, max_frames=max_frames)
    assert 1 <= len(sample_indices(limits, total, duration)) == frame_count(limits, total, duration) <= max_frames


@pytest.mark.parametrize(("total", "duration"), [(0, 1.0), (5, 0.0), (5, -1.0), (5, float("nan"))])
def test_an_empty_clip_is_refused(total, duration):
    with pytest.raises(ValueError, match="positive"):
        sample_indices(MediaLimits(), total, duration)


@given(st.lists(st.integers(), min_size=1, max_size=9))
def test_even_count_repeats_only_the_last(items):
    even = even_count(items)
    assert len(even) % 2 == 0 and even[: len(items)] == items and set(even[len(items) :]) <= {items[-1]}


@given(sides, sides, st.sampled_from([14, 28, 32]), st.integers(1, 64), st.integers(4, 40))
def test_fit_size_holds_the_budget_and_the_aspect_ratio(height, width, multiple, low, factor):
    least, most = low * multiple**2, low * factor * multiple**2
    try:
        h, w = fit_size(height, width, multiple, least, most)
    except ValueError:
        # Only a thin picture is refused: its short side cannot fall below one multiple.
        assert max(height, width) / min(height, width) > 4 or least > most / 8
        return
    assert h % multiple == 0 and w % multiple == 0 and least <= h * w <= most
    # Some scale s brings both sides to within one multiple of (s * height, s * width), unless a side was lifted to one
    # multiple.
    assume(min(h, w) > multiple)
    lower = max((h - multiple) / height, (w - multiple) / width)
    upper = min((h + multiple) / height, (w + multiple) / width)
    assert lower <= upper


@given(sides, sides)
def test_fit_size_is_symmetric_and_stable(height, width):
    assume(max(height, width) <= 100 * min(height, width))
    size = fit_size(height, width, 28, 4 * 784, 128 * 784)
    assert size == fit_size(width, height, 28, 4 * 784, 128 * 784)[::-1]
    assert size == fit_size(*size, 28, 4 * 784, 128 * 784)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((56, 56), (56, 56)), ((360, 640), (224, 420)), ((20, 20), (56, 56)), ((10, 900), (28, 896)), ((224, 420),) * 2],
)
def test_fit_size_examples(size, expected):
    assert fit_size(*size, 28, 4 * 28 * 28, 128 * 28 * 28) == expected


def test_without_the_budget_the_size_would_be_over_it():
    # Negative control of the property above: mere rounding to multiples breaks it.
    rounded = [round(side / 28) * 28 for side in (1080, 1920)]
    assert math.prod(rounded) > 128 * 784 >= math.prod(fit_size(1080, 1920, 28, 4 * 784, 128 * 784))


@pytest.mark.parametrize(
    ("size", "budget", "message"),
    [
        ((1, 1000), (784, 7840), "aspect ratio"),
        ((0, 10), (784, 7840), "size 0x10"),
        ((100, 100), (784 * 5, 784 * 5), "no size"),
        ((100, 100), (1, 700), "no size"),
    ],
)
def test_fit_size_refuses(size, budget, message):
    with pytest.raises(ValueError, match=message):
        fit_size(*size, 28, *budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 1.0}, "exactly one"),
        ({"num_frames": None}, "exactly one"),
        ({"num_frames": 65}, r"\[1, max_frames=64\]"),
        ({"num_frames": None, "fps": 0.0}, "fps must be positive"),
        ({"max_seconds": float("inf")}, "max_seconds"),
        ({"min_pixels": 10, "max_pixels": 5}, "above max_pixels"),
        ({"overlong": "drop"}, "overlong"),
    ],
)
def test_contradicting_limits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MediaLimits(**options)
