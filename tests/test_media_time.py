"""What is fed is what the file says, at the time it says: clips that carry their own time, through the real decoders."""

from functools import cache
from pathlib import Path

import av
import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from timed_clips import BEEP, Timed, beeps_in, number_of, overlaps, write
from tiny_models import build_tiny

from maple_trl.omni.clips import ClipRequest
from maple_trl.omni.decode import FORMATS
from maple_trl.omni.families import family_for
from maple_trl.omni.media import MediaLimits, MediaLoader


PICTURE_TOLERANCE = 0.0025  # seconds: time stamps in milliseconds
SOUND_TOLERANCE = 0.02
EDGE = 0.06  # seconds around a cut in which a codec may ring

WITH_START = [  # containers that keep when a track begins
    ("mkv", "pcm_s16le"),
    ("mkv", "aac"),
    ("mkv", "libopus"),
    ("mkv", "libmp3lame"),
    ("mkv", "flac"),
    ("mp4", "aac"),
    ("mp4", "libmp3lame"),
    ("mov", "aac"),
]
OTHERS = [
    ("ts", "aac", "mpegts"),
    ("ts", "libmp3lame", "mpegts"),
    ("avi", "pcm_s16le", "avi"),
    ("avi", "libmp3lame", "avi"),
]
WITHOUT_START = [(suffix, codec) for suffix, codec, name in OTHERS if name in FORMATS]


@st.composite
def clips(draw) -> Timed:
    suffix, codec = draw(st.sampled_from(WITH_START + WITHOUT_START))
    keeps_start = (suffix, codec) in WITH_START
    fps = draw(st.sampled_from([5, 8, 10, 12]))
    length = draw(st.integers(3, 5))
    starts = st.sampled_from([-0.75, -0.3, 0.0, 0.0, 0.25, 1.1]) if keeps_start else st.just(0.0)
    video_start, sound_start = draw(starts), draw(starts)
    if video_start < 0:  # FFmpeg moves an mp4 that is cut within a picture by the part that is left of it
        video_start = -draw(st.integers(1, fps)) / fps
    gaps = ()
    if keeps_start or suffix == "ts":
        gaps = tuple(
            (a, a + span)
            for a, span in draw(st.lists(st.tuples(st.floats(0.2, 4.0), st.floats(0.05, 1.5)), max_size=2))
        )
    return Timed(
        suffix=suffix,
        audio_codec=codec,
        fps=fps,
        pictures=fps * length,
        video_start=video_start,
        sound_start=sound_start,
        sound_end=length + draw(st.sampled_from([-0.5, 0.0, 0.8])),
        gaps=gaps,
        reordered=draw(st.booleans()),
    )


samplings = st.one_of(
    st.builds(lambda n: MediaLimits(num_frames=n, max_pixels=56 * 56), st.integers(1, 12)),
    st.builds(
        lambda f: MediaLimits(num_frames=None, fps=f, max_pixels=56 * 56), st.sampled_from([0.5, 1.0, 2.0, 4.0])
    ),
)
segments = st.one_of(st.just((None, None)), st.tuples(st.floats(0, 2.5), st.one_of(st.none(), st.floats(0.5, 2.0))))


@cache
def omni_family():
    return family_for(*build_tiny("qwen2_5_omni"))


def file_times(path: Path, clip: Timed) -> tuple[float, float]:
    """By how much the container moved all times, and where FFmpeg says that the file starts."""
    with av.open(str(path)) as container:
        start = max(0.0, min(float(s.start_time * s.time_base) for s in container.streams))
        if (clip.suffix, clip.audio_codec) in WITH_START:
            return 0.0, start
        first = min(p.pts * p.time_base for p in container.demux(video=0) if p.pts is not None)
        return float(first) - clip.video_start, start


def check(folder: Path, clip: Timed, limits: MediaLimits, request: ClipRequest) -> None:
    """All that is claimed of one clip: pictures, sound, and positions of tokens agree with what the file says."""
    path = write(folder / f"clip.{clip.suffix}", clip)
    moved, zero = file_times(path, clip)
    origin = moved - zero - (request.start or 0)  # from the file's nominal time to the time that is fed
    length = float("inf") if request.end is None else request.end - (request.start or 0)

    times = [clip.shown_at(n) + origin for n in range(clip.pictures)]
    shown = [n for n, time in enumerate(times) if -PICTURE_TOLERANCE / 2 <= time <= length + PICTURE_TOLERANCE / 2]
    present = [(max(0.0, clip.sound_start + origin), min(length, clip.sound_end + origin))]
    cuts = [(a + origin - EDGE, b + origin + EDGE) for a, b in clip.gaps] + [
        (edge - EDGE, edge + EDGE) for edge in present[0]
    ]
    assume(len(shown) >= 1 and present[0][1] - present[0][0] > 0.2)
    edges = [abs(time) for time in times] + [abs(time - length) for time in times]
    assume(not any(0.0001 < edge < 2 * PICTURE_TOLERANCE for edge in edges))  # a rounded stamp may fall to either side

    with MediaLoader(folder, limits, backend="pyav", workers=0) as loader:
        video = loader.video(path, request=request)
        sound = loader.audio(path, request=request)
        assert loader.frame_count(path, request=request) == len(video.frames)

    numbers = [number_of(frame) for frame in video.frames]
    np.testing.assert_allclose(video.timestamps, [max(0.0, times[n]) for n in numbers], atol=PICTURE_TOLERANCE)
    taken = len(set(numbers))
    assert numbers[:taken] == [shown[i] for i in np.linspace(0, len(shown) - 1, taken).round().astype(int)]
    if limits.num_frames is not None:
        assert taken == min(limits.num_frames, len(shown))

    found = beeps_in(sound.waveform, sound.sampling_rate)
    whole = [k for k in range(-1, 9) if present[0][0] - 1e-6 <= k + origin and k + origin + BEEP <= present[0][1]]
    clear = [k for k in whole if not overlaps(k + origin, k + origin + BEEP, cuts)]
    for second, at in found:
        if second in clear:
            assert abs(at - (second + origin)) <= SOUND_TOLERANCE, (
                f"beep {second} at {at:.3f} s of {second + origin:.3f} s"
            )
    assert set(clear) <= {second for second, _ in found}
    assert abs(len(sound.waveform) / sound.sampling_rate - present[0][1]) < 0.15 or clip.gaps

    family = omni_family()
    with MediaLoader(folder, limits, backend="pyav", workers=0) as loader:
        fed = loader.video(path, multiple=family.frame_multiple, request=request)
    text = family.processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)
    prompt = family.encode("key", text, [fed], [sound], interleaved=True)
    seen, heard = (prompt.position_ids[0, prompt.input_ids == family.placeholder_ids[k]] for k in ("video", "audio"))
    per_second = family.config.position_id_per_seconds
    placed = (seen.view(len(fed.frames) // 2, -1)[:, 0] - heard[0]).numpy() / per_second
    np.testing.assert_allclose(
        placed, [max(0.0, times[n]) for n in numbers[::2]], atol=1 / per_second + PICTURE_TOLERANCE
    )


@given(clips(), samplings, segments)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_what_is_fed_is_what_the_file_says_when_it_says(tmp_path_factory, clip, limits, segment):
    start, length = segment
    request = ClipRequest(start=start, end=None if length is None else (start or 0) + length)
    check(tmp_path_factory.mktemp("timed"), clip, limits, request)
