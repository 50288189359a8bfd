"""Frame times and frame sizes: properties that must hold for any clip."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from maple_trl.omni.sampling import MediaLimits, even_count, fit_size, rate_times, sample_times, uniform_times


durations = st.floats(0.01, 3600)
sides = st.integers(1, 5000)


@given(st.integers(1, 200), durations)
def test_uniform_times_are_the_middles_of_equal_parts(count, duration):
    times = uniform_times(count, duration)
    edges = np.linspace(0, duration, count + 1)
    np.testing.assert_allclose(times, (edges[:-1] + edges[1:]) / 2, rtol=1e-9)
    # Symmetric: the clip played backwards is looked at in the same places.
    np.testing.assert_allclose(times, duration - times[::-1], rtol=1e-6, atol=1e-9 * duration)


@given(st.floats(0.1, 60), st.floats(0.01, 60))
def test_rate_times_keep_the_rate_and_stay_inside(fps, duration):
    times = rate_times(fps, duration)
    assert times[0] == 0 and (len(times) == 1 or times[-1] < duration)
    assert times[-1] + 1 / fps >= duration * (1 - 1e-6)  # and none is left out at the end
    np.testing.assert_allclose(np.diff(times), 1 / fps, rtol=1e-6)


@pytest.mark.parametrize(("fps", "duration", "count"), [(10, 0.3, 3), (1, 3.0, 3), (2, 0.1, 1), (29.97, 1.001, 30)])
def test_rate_times_count(fps, duration, count):
    assert len(rate_times(fps, duration)) == count


@given(st.one_of(st.none(), st.floats(0.1, 30)), st.integers(1, 64), durations)
def test_sample_times_respect_max_frames(fps, max_frames, duration):
    limits = MediaLimits(num_frames=None if fps else max_frames, fps=fps, max_frames=max_frames)
    times, rate = sample_times(limits, duration)
    assert 1 <= len(times) <= max_frames
    assert (times >= 0).all() and (times < duration).all() and (np.diff(times) > 0).all()
    if fps and duration * fps <= max_frames:
        assert rate == fps
    elif fps is None:
        assert rate == pytest.approx(len(times) / duration)
    if len(times) > 1:
        assert rate == pytest.approx(1 / np.diff(times).mean(), rel=1e-6)


def test_over_max_frames_sampling_becomes_uniform():
    times, rate = sample_times(MediaLimits(num_frames=None, fps=30, max_frames=4), 2.0)
    np.testing.assert_allclose(times, [0.25, 0.75, 1.25, 1.75])
    assert rate == 2.0


@pytest.mark.parametrize("duration", [0.0, -1.0, float("nan")])
def test_sample_times_refuse_an_empty_clip(duration):
    with pytest.raises(ValueError, match="positive"):
        sample_times(MediaLimits(), duration)


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
