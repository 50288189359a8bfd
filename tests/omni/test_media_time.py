"""What is fed is what the file says, at the time it says: clips that carry their own time, through the real decoders."""

import re
import struct
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import media_files as files
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from timed_clips import BEEP, Timed, beeps_in, number_of, overlaps, sound_at, write
from tiny_models import build_tiny

from maple_trl.omni.families import OmniFamily, family_for
from maple_trl.omni.media import decode, opening
from maple_trl.omni.media import sound as sound_module
from maple_trl.omni.media.clips import ClipRequest, PromptMedia
from maple_trl.omni.media.formats import FORMATS
from maple_trl.omni.media.loader import MediaError, MediaLimits, MediaLoader


PICTURE_TOLERANCE = 0.0025  # seconds: time stamps in milliseconds
SOUND_TOLERANCE = 0.02
EDGE = 0.06  # seconds around a cut in which a codec may ring
SETTLED = 0.15  # seconds after a gap: frames of mp3 hold data of earlier ones, which are lost

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
OTHERS = [("ts", "aac", "mpegts"), ("ts", "libmp3lame", "mpegts"), ("avi", "pcm_s16le", "avi")]
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
        if clip.suffix == "avi" or (clip.suffix, clip.audio_codec) in WITH_START:
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
    cuts = [(a + origin - EDGE, b + origin + SETTLED) for a, b in clip.gaps] + [
        (edge - EDGE, edge + EDGE) for edge in present[0]
    ]
    assume(len(shown) >= 1 and min(length, clip.recorded_until + origin) - present[0][0] > 0.2)
    assume(clip.recorded(-origin, length - origin) > 0.2)  # two gaps may leave less than an encoder takes
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
    cut_off = any(k + origin < present[0][0] < k + origin + BEEP + EDGE for k in range(-1, 9))
    for second, at in found:
        # What is left of a beep that the segment's start cuts has no clear pitch.
        if cut_off and at < present[0][0] + EDGE:
            continue
        # Where frames are decoded without the one before, what is left of that may sound like any beep.
        if second in clear and not any(b + origin <= at <= b + origin + SETTLED for _, b in clip.gaps):
            assert abs(at - (second + origin)) <= SOUND_TOLERANCE, (
                f"beep {second} at {at:.3f} s of {second + origin:.3f} s"
            )
    assert set(clear) <= {second for second, _ in found}
    assert abs(len(sound.waveform) / sound.sampling_rate - present[0][1]) < 0.15 or clip.gaps

    family = omni_family()
    with MediaLoader(folder, limits, backend="pyav", workers=0) as loader:
        fed = loader.video(path, multiple=family.frame_multiple, request=request)
    text = family.processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)
    prompt = family.encode("key", text, PromptMedia(videos=[fed], audios=[sound]), interleaved=True)
    seen, heard = (prompt.position_ids[0, prompt.input_ids == family.placeholder_ids[k]] for k in ("video", "audio"))
    per_second = family.config.position_id_per_seconds
    placed = (seen.view(len(fed.frames) // 2, -1)[:, 0] - heard[0]).numpy() / per_second
    np.testing.assert_allclose(
        placed, [max(0.0, times[n]) for n in numbers[::2]], atol=1 / per_second + PICTURE_TOLERANCE
    )


@pytest.mark.slow
@given(clips(), samplings, segments)
@example(
    Timed(
        "ts", "libx264", "aac", fps=8, sound_end=5.8, gaps=((3.9666514440670197, 4.500613618662497),), reordered=True
    ),
    MediaLimits(num_frames=5, max_pixels=56 * 56),
    (None, None),
)
@example(
    Timed(
        "mkv", "libx264", "libopus", pictures=30, video_start=0.25, sound_end=2.5, gaps=((1.1, 1.2565520884942274),)
    ),
    MediaLimits(num_frames=None, fps=0.5, max_pixels=56 * 56),
    (1.1, None),
)
@example(
    Timed(
        "mkv",
        "libx264",
        "aac",
        fps=12,
        pictures=36,
        video_start=1.1,
        sound_start=1.1,
        sound_end=2.5,
        gaps=((0.36, 1.6094488554953843), (1.2494488554953844, 2.498897710990769)),
    ),
    MediaLimits(num_frames=3, max_pixels=56 * 56),
    (None, None),
)
@settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a clip is small as it is
)
def test_what_is_fed_is_what_the_file_says_when_it_says(tmp_path_factory, clip, limits, segment):
    start, length = segment
    request = ClipRequest(start=start, end=None if length is None else (start or 0) + length)
    check(tmp_path_factory.mktemp("timed"), clip, limits, request)


PLAIN = [
    ("flv", "libx264", "aac"),
    ("wmv", "wmv2", "wmav2"),
    ("mpg", "mpeg2video", "mp2"),
    ("ts", "mpeg2video", "mp2"),
    ("nut", "libx264", "aac"),
    ("3gp", "libx264", "aac"),
    ("webm", "libvpx", "libopus"),
]


@pytest.mark.parametrize(("suffix", "video_codec", "audio_codec"), PLAIN, ids=lambda value: value)
def test_pictures_and_sound_go_together_in_every_container(tmp_path, suffix, video_codec, audio_codec):
    """The picture of each full second is shown when its beep is heard."""
    clip = Timed(suffix, video_codec, audio_codec, fps=25, pictures=100, sound_end=4.2, reordered=suffix != "wmv")
    path = write(tmp_path / f"clip.{suffix}", clip)
    with MediaLoader(tmp_path, MediaLimits(num_frames=100, max_frames=100), backend="pyav", workers=0) as loader:
        video, sound = loader.video(path), loader.audio(path)
    shown = {number_of(frame): time for frame, time in zip(video.frames, video.timestamps, strict=True)}
    assert sorted(shown) == list(range(100))
    beeps = dict(beeps_in(sound.waveform, sound.sampling_rate))
    for second in (1, 2, 3):  # the first may be within what the encoder needs to settle
        assert abs(beeps[second] - shown[25 * second]) <= SOUND_TOLERANCE
    np.testing.assert_allclose(np.diff(video.timestamps), 1 / 25, atol=0.0015)


# Planted faults: each must be found by the check above


WITH_A_GAP = Timed(gaps=((1.2, 2.4),))


def whole_picture_check(folder: Path, clip: Timed = WITH_A_GAP, **request) -> None:
    check(folder, clip, MediaLimits(num_frames=8, max_pixels=56 * 56), ClipRequest(**request))


@pytest.mark.parametrize("request_", [{}, {"start": 0.55, "end": 3.5}], ids=["whole", "segment"])
def test_no_fault_no_finding(tmp_path, request_):
    whole_picture_check(tmp_path, **request_)


def test_an_offset_of_half_a_picture_is_found(tmp_path, monkeypatch):
    start = decode.file_start
    monkeypatch.setattr(decode, "file_start", lambda container: start(container) + 0.05)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        whole_picture_check(tmp_path)


def test_sound_that_is_late_by_half_a_picture_is_found(tmp_path, monkeypatch):
    move = sound_module.Sound._move
    monkeypatch.setattr(sound_module.Sound, "_move", lambda self, place: move(self, place + round(0.05 * self.rate)))
    with pytest.raises(AssertionError, match="beep"):
        whole_picture_check(tmp_path)


def test_a_gap_that_is_not_filled_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sound_module, "STAMP_JITTER", 1e9)
    with pytest.raises(AssertionError, match=r"beep 3 at 1.8"):
        whole_picture_check(tmp_path)


def test_pictures_of_another_time_are_found(tmp_path, monkeypatch):
    """Right time stamps on wrong pictures: the one before is fed."""
    pick = decode._pick
    monkeypatch.setattr(
        decode,
        "_pick",
        lambda source, limits, line, wanted, deadline, seek: pick(
            source, limits, line, [max(int(line.pts[0]), tick - 100) for tick in wanted], deadline, seek
        ),
    )
    with pytest.raises(AssertionError):
        whole_picture_check(tmp_path)


def test_tokens_placed_evenly_are_found(tmp_path, monkeypatch):
    """Pictures that begin late beside sound, tokens that do not."""
    patch_seconds = OmniFamily.patch_seconds
    monkeypatch.setattr(OmniFamily, "patch_seconds", lambda self, clip: patch_seconds(self, clip) - clip.timestamps[0])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        whole_picture_check(tmp_path, Timed(video_start=1.1))


@pytest.mark.parametrize("codec", ["libmp3lame", "ac3", "pcm_s16le"])
def test_pictures_of_avi_are_shown_in_the_order_of_decoding(tmp_path, codec):
    """AVI has no times at which pictures are shown; what FFmpeg guesses for reordered ones is out of order."""
    clip = Timed(suffix="avi", audio_codec=codec, reordered=True)
    path = write(tmp_path / "clip.avi", clip)
    with av.open(str(path)) as container:
        guessed = [frame.pts for frame in container.decode(video=0)]
        assert guessed != sorted(guessed)  # negative control
    with MediaLoader(tmp_path, backend="pyav", workers=0) as loader:
        video, sound = loader.video(path), loader.audio(path)
    assert [number_of(frame) for frame in video.frames] == [0, 6, 11, 17, 22, 28, 33, 39]
    np.testing.assert_allclose(video.timestamps, np.array([0, 6, 11, 17, 22, 28, 33, 39]) / 10, atol=1e-6)
    assert [second for second, _ in beeps_in(sound.waveform, 16000)] == [0, 1, 2, 3, 4]


# Sound


def write_sound(
    path: Path, stamps: list[int], wave: np.ndarray, codec: str = "pcm_s16le", size: int = 800, options=None
) -> Path:
    """A file whose k-th piece of sound (of `size` samples at 16 kHz) has the k-th stamp, in samples."""
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"} | (options or {})) as out:
        stream = out.add_stream(codec, rate=16000, layout="mono")
        pieces = wave[: len(stamps) * size].reshape(-1, size)
        for piece, stamp in zip((pieces * 32767).astype(np.int16), stamps, strict=True):
            frame = av.AudioFrame.from_ndarray(piece[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, stamp, Fraction(1, 16000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def heard(path: Path, **limits):
    with MediaLoader(path.parent, MediaLimits(**limits), backend="pyav", workers=0) as loader:
        return loader.audio(path)


WAVE = sound_at(np.arange(5 * 16000) / 16000)
STAMPS = np.arange(0, 5 * 16000, 800)


def test_jitter_of_time_stamps_changes_nothing(tmp_path):
    """Rounded to milliseconds, or a live recorder's: no silence is put in, and nothing is cut off."""
    straight = heard(write_sound(tmp_path / "straight.mkv", STAMPS.tolist(), WAVE))
    shaken = STAMPS + np.random.default_rng(0).integers(-100, 100, len(STAMPS)) * (STAMPS > 0)  # up to 6 ms
    jittered = heard(write_sound(tmp_path / "jitter.mkv", shaken.tolist(), WAVE))
    assert straight.notes == jittered.notes == () and straight.duration == 5.0
    np.testing.assert_array_equal(straight.waveform, jittered.waveform)


@pytest.mark.parametrize("codec", ["libmp3lame", "aac", "libopus", "flac", "pcm_s16le"])
def test_no_codec_has_gaps_of_its_own(tmp_path, codec):
    """Priming and frames whose length is no whole number of milliseconds are no gaps."""
    clip = Timed(audio_codec=codec, sound_end=5.0)
    sound = heard(write(tmp_path / "clip.mkv", clip))
    assert "gap-in-sound" not in sound.notes and "overlapping-sound" not in sound.notes
    assert [second for second, _ in beeps_in(sound.waveform, 16000)][:5] == [0, 1, 2, 3, 4]


def test_a_slow_clock_does_not_drift(tmp_path):
    """A recorder whose clock runs 1 % slow: what is heard at 4 s by the stamps is at 4 s, not 40 ms off."""
    slow = np.round(STAMPS * 1.01).astype(int)
    sound = heard(write_sound(tmp_path / "slow.mkv", slow.tolist(), WAVE))
    at = dict(beeps_in(sound.waveform, 16000))
    for second in range(1, 5):
        assert abs(at[second] - 1.01 * second) < 0.02
    assert "gap-in-sound" in sound.notes


def test_several_gaps_are_silent_and_what_follows_stays(tmp_path):
    stamps = [stamp for stamp in STAMPS.tolist() if not (16000 <= stamp < 30400 or 52800 <= stamp < 60000)]
    wave = np.concatenate([WAVE[stamp : stamp + 800] for stamp in stamps])
    sound = heard(write_sound(tmp_path / "gaps.mkv", stamps, wave))
    expected = WAVE.copy()
    expected[16000:30400] = expected[52800:60000] = 0
    np.testing.assert_allclose(sound.waveform, expected, atol=1e-4)
    assert sound.notes == ("gap-in-sound",)


def test_overlapping_sound_keeps_its_place(tmp_path):
    """A piece that begins 0.25 s before the end of the one before it stands there; what is heard already stays."""
    stamps = np.arange(0, 5 * 16000, 8000)
    stamps[5:] -= 4000
    sound = heard(write_sound(tmp_path / "overlap.mkv", stamps.tolist(), WAVE, size=8000))
    assert sound.duration == pytest.approx(4.75) and sound.notes == ("overlapping-sound",)
    assert dict(beeps_in(sound.waveform, 16000))[3] == pytest.approx(2.75, abs=0.001)
    np.testing.assert_allclose(sound.waveform[:40000], WAVE[:40000], atol=1e-4)


def test_sound_whose_time_starts_again_is_refused(tmp_path):
    """Two recordings put together without care: the stamps of the second start at 0 again."""
    path = tmp_path / "glued.mkv"
    write_sound(path, STAMPS.tolist(), WAVE, options={"cluster_time_limit": "1000"})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"\xe7\x82") + 2  # the time of the last cluster, in milliseconds
    assert 3000 < int.from_bytes(data[at : at + 2]) < 5000
    data[at : at + 2] = b"\0\0"
    path.write_bytes(data)
    with pytest.raises(MediaError, match="the time of the sound goes back by [34]") as caught:
        heard(path)
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(
    ("suffix", "flags"), [("mkv", ""), ("mp4", ""), ("mp4", "frag_keyframe+empty_moov+delay_moov")], ids=str
)
def test_sound_from_before_the_start_is_left_out(tmp_path, suffix, flags):
    """The same cut, which begins 0.5 s before the file's start, in Matroska and as an edit list of mp4, whole or in fragments."""
    clip = Timed(suffix=suffix, audio_codec="aac", sound_start=-0.5)
    sound = heard(write(tmp_path / f"clip.{suffix}", clip, **({"movflags": flags} if flags else {})))
    assert sound.duration == pytest.approx(5.0, abs=0.07)
    for second, at in beeps_in(sound.waveform, 16000):
        assert at == pytest.approx(second, abs=0.005)


@pytest.mark.parametrize("shape", [("ts", "libx264", "aac"), ("mpg", "mpeg2video", "mp2")], ids=lambda shape: shape[0])
def test_a_clock_that_starts_again_cuts_nothing(tmp_path, shape):
    """The clock of MPEG streams has 33 bits, and comes back to 0 after 26.5 hours: here after 2 s of the clip."""
    clip = Timed(*shape, fps=25, pictures=100, sound_end=4.0)
    path = write(tmp_path / f"clip.{shape[0]}", clip, output_ts_offset=str(2**33 / 90000 - 2.01))
    with MediaLoader(tmp_path, MediaLimits(num_frames=5), backend="pyav", workers=0) as loader:
        video, sound = loader.video(path), loader.audio(path)
        assert loader.audio(path, request=ClipRequest(start=2.9)).duration == pytest.approx(
            sound.duration - 2.9, abs=0.01
        )
    assert [number_of(frame) for frame in video.frames[:5]] == [0, 25, 50, 74, 99]
    beeps = dict(beeps_in(sound.waveform, 16000))
    for second in (1, 2, 3):
        assert beeps[second] == pytest.approx(video.timestamps[0] + second, abs=SOUND_TOLERANCE)


def test_pictures_whose_time_starts_again_are_refused(tmp_path):
    """Two recordings, one behind the other, whose times are the same: not half of the pictures of both."""
    path = write(tmp_path / "one.mpg", Timed("mpg", "mpeg2video", "mp2", fps=25, pictures=50, sound_end=2.0))
    (tmp_path / "glued.mpg").write_bytes(2 * path.read_bytes())
    with MediaLoader(tmp_path, backend="pyav", workers=0) as loader:
        assert loader.video("one.mpg").duration == 2.0
        with pytest.raises(MediaError, match="the time of the pictures goes back by 1.9") as caught:
            loader.video("glued.mpg")
    assert caught.value.reason == "unreadable"


def test_a_transport_stream_that_lost_a_packet_is_read_where_it_is_whole(tmp_path):
    path = write(tmp_path / "whole.ts", Timed("ts", audio_codec="aac"))
    packets = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 188)
    of_pictures = (packets[:, 1] & 0x1F == 1) & (packets[:, 2] == 0)  # the identifier of the first track is 0x100
    begins = np.flatnonzero(of_pictures & (packets[:, 1] & 0x40 > 0))
    assert len(begins) == of_pictures.sum() - 3  # but for the first, a picture is a packet
    (tmp_path / "lost.ts").write_bytes(np.delete(packets, begins[20], axis=0).tobytes())

    def pictures(name, **sampling):
        with MediaLoader(tmp_path, MediaLimits(**sampling), backend="pyav", workers=0) as loader:
            return loader.video(name).frames

    np.testing.assert_array_equal(
        pictures("lost.ts", num_frames=4), pictures("whole.ts", num_frames=4)
    )  # 0, 13, 26, 39
    for count in (3, 40):  # up to the key picture, 24, those after 20 are made from it
        with pytest.raises(MediaError, match="is damaged: the stream has lost data") as caught:
            pictures("lost.ts", num_frames=count)
        assert caught.value.reason == "unreadable"


# Segments


@pytest.mark.parametrize("request_", [{"start": 2.0}, {"start": 2.5, "end": 9}])
def test_a_segment_outside_of_the_clip(tmp_path, request_):
    path = write(tmp_path / "clip.mkv", Timed(pictures=20, sound_end=2.0))
    with MediaLoader(tmp_path, backend="pyav", workers=0) as loader:
        for call, words in ((loader.video, "its pictures end at 2.00 s"), (loader.audio, "its sound ends at 2.00 s")):
            with pytest.raises(MediaError, match=words) as caught:
                call(path, request=ClipRequest(**request_))
            assert caught.value.reason == "segment-outside" and "the segment from 2" in caught.value.detail
        late = write(tmp_path / "late.mkv", Timed(video_start=1.5))
        with pytest.raises(MediaError, match="from 0 s to 1 s was asked for and its first picture is shown at 1.50 s"):
            loader.video(late, request=ClipRequest(end=1.0))
        assert loader.audio(late, request=ClipRequest(end=1.0)).duration == 1.0


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "pcm_s16le"), ("mp4", "libmp3lame")])
def test_a_segment_whose_sound_was_lost_up_to_its_end_has_pictures_and_no_sound(tmp_path, suffix, codec):
    """Sound that ends early, for two gaps that reach one into the other: what a row asks to hear is not made up."""
    clip = Timed(suffix, audio_codec=codec, gaps=((2.9, 5.1), (1.4, 3.0)))
    assert clip.recorded_until == 1.4
    path, request = write(tmp_path / f"clip.{suffix}", clip), ClipRequest(start=1.65, end=3.0)
    with MediaLoader(tmp_path, MediaLimits(num_frames=4), backend="pyav", workers=0) as loader:
        assert [number_of(frame) for frame in loader.video(path, request=request).frames] == [17, 21, 26, 30]
        with pytest.raises(MediaError, match=r"its sound ends at 1\.4") as caught:
            loader.audio(path, request=request)
        assert caught.value.reason == "segment-outside"


def test_a_segment_that_goes_on_after_the_end_is_noted(tmp_path):
    path = write(tmp_path / "clip.mkv", Timed(pictures=20, sound_end=2.0))
    with MediaLoader(tmp_path, backend="pyav", workers=0) as loader:
        for call in (loader.video, loader.audio):
            clip = call(path, request=ClipRequest(start=1.0, end=3.0))
            assert "segment-shortened" in clip.notes and clip.duration == pytest.approx(1.0)
            assert "segment-shortened" not in call(path, request=ClipRequest(start=1.0, end=2.0)).notes
        assert loader.notes["segment-shortened"] == 1


# Milliseconds: two pictures are on screen for long, and the second can be sought.
HELD = [0, 1000, 2000, 3000, 4000, 5000, 30000, 31000, 60000, 61000]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("start", "end", "times"),
    [(0, 12, [0, 2, 3, 5]), (2, 12, [0, 1, 2, 3]), (4, 5.5, [0, 1]), (8, 12, [0, 0]), (40, 45, [0, 0])],
)
def test_a_segment_may_end_while_a_picture_is_held(tmp_path, suffix, start, end, times):
    """Whether the container says how long a picture is shown (mp4) or the next one does (Matroska), it is there."""
    path = files.write_video(
        tmp_path / f"held.{suffix}", 10, pts=HELD, time_base=Fraction(1, 1000), codec_options={"bf": "0"}
    )
    with av.open(str(path)) as container:
        longest = max(packet.duration * packet.time_base for packet in container.demux(video=0) if packet.duration)
    assert longest == 29 if suffix == "mp4" else longest < 1
    with MediaLoader(tmp_path, MediaLimits(num_frames=4), backend="pyav", workers=0) as loader:
        clip = loader.video(path, request=ClipRequest(start=start, end=end))
        assert (clip.timestamps.tolist(), clip.duration, clip.notes) == (times, end - start, ("resized",))
        shown = files.picture(sum(stamp <= 1000 * start for stamp in HELD) - 1, 48, 64)
        assert clip.frames[0, -1, -1].mean() == pytest.approx(shown[-1, -1].mean(), abs=4)
        # Negative control: nothing says that the last picture is held.
        with pytest.raises(MediaError, match="its pictures end at 6"):
            loader.video(path, request=ClipRequest(start=63, end=64))


def test_two_segments_of_a_clip_are_two_entries(tmp_path):
    path = write(tmp_path / "clip.mkv", Timed())
    with MediaLoader(tmp_path, backend="pyav", workers=0) as loader:
        first, second = (loader.video(path, request=ClipRequest(start=a, end=a + 1)) for a in (0, 1))
        assert number_of(first.frames[0]) == 0 and number_of(second.frames[0]) == 10
        assert loader.video(path, request=ClipRequest(start=1, end=2)) is second
        assert loader.audio(path, request=ClipRequest(start=1, end=2, fps=1)) is loader.audio(
            path, request=ClipRequest(start=1.0, end=2.0)
        )
        assert sum(loader.decodes.values()) == 3


def test_a_row_samples_and_sizes_as_it_wants(tmp_path):
    path = write(tmp_path / "clip.mkv", Timed())
    with MediaLoader(tmp_path, backend="pyav", workers=0) as loader:
        shape = lambda **request: loader.video(path, request=ClipRequest(**request)).frames.shape[:3]  # noqa: E731
        assert shape() == (8, 56, 56)
        assert shape(num_frames=3) == (4, 56, 56) and shape(fps=4) == (16, 56, 56)
        assert shape(max_pixels=28 * 28) == (8, 28, 28) and shape(min_pixels=112 * 112) == (8, 112, 112)
        assert shape(resized_height=28, resized_width=112) == (8, 28, 112)
        assert loader.video(path, max_pixels=784, request=ClipRequest(min_pixels=112 * 112)).frames.shape[1:3] == (
            28,
            28,
        )
        with pytest.raises(ValueError, match="max_frames=64"):
            shape(num_frames=65)


@pytest.mark.parametrize("asked", [{"max_pixels": 3136}, {"max_pixels": 4000}, {"min_pixels": 200_000}], ids=str)
def test_one_limit_of_a_row_leaves_room_for_the_shape_of_the_picture(tmp_path, asked):
    """The run's other limit (of 3136 to 100352 pixels) gives way: no picture of 9 : 16 has just so many."""
    path = files.write_video(tmp_path / "wide.mp4", frames=2, size=(180, 320))
    with MediaLoader(tmp_path, MediaLimits(num_frames=2), backend="pyav", workers=0) as loader:
        height, width = loader.video(path, request=ClipRequest(**asked)).frames.shape[1:3]
    assert asked.get("min_pixels", 0) <= height * width <= asked.get("max_pixels", 2 * 200_000)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"start": -1}, "start must be 0 or more, got -1"),
        ({"start": 2, "end": 2}, "end must be after start, got start=2, end=2"),
        ({"end": 0}, "end must be above 0"),
        ({"start": float("nan")}, "start must be a finite number"),
        ({"start": "1"}, "start must be a finite number, got '1'"),
        ({"fps": 0}, "fps must be above 0"),
        ({"fps": 1, "num_frames": 2}, "num_frames or fps, not both"),
        ({"num_frames": 2.5}, "num_frames must be a whole number"),
        ({"num_frames": True}, "num_frames must be a finite number"),
        ({"min_pixels": 5, "max_pixels": 4}, "min_pixels=5 is above max_pixels=4"),
        ({"resized_width": 5}, "resized_height and resized_width"),
    ],
)
def test_requests_that_make_no_sense(request_, message):
    with pytest.raises(ValueError, match=message):
        ClipRequest(**request_)
    assert ClipRequest(start=0, num_frames=8.0) == ClipRequest(start=0.0, num_frames=8)


def test_a_segment_of_a_long_file_is_sought(tmp_path, monkeypatch):
    """What seeking finds is what reading from the start finds; and where there is no index, the start is read."""
    packets = []
    monkeypatch.setattr(opening.Deadline, "check", lambda self: packets.append(self))
    for name, options in {"a.mp4": {}, "a.mkv": {}, "live.mkv": {"live": "1"}}.items():
        clip = Timed(name[-3:], audio_codec="aac", pictures=200, sound_end=20.0, reordered=True, gaps=((16.2, 17.1),))
        path = write(tmp_path / name, clip, **options)
        for request in (ClipRequest(start=15.05, end=18.5), ClipRequest(start=16.5), ClipRequest(start=25.0)):
            found, read = [], []
            for after in (1.0, 1e9):
                monkeypatch.setattr(opening, "SEEK_AFTER", after)
                packets.clear()
                with MediaLoader(tmp_path, backend="pyav", workers=0) as loader:
                    if request.start > 20:
                        for call in (loader.video, loader.audio):
                            with pytest.raises(MediaError, match="ends? at (20|19.9)") as caught:
                                call(path, request=request)
                            assert caught.value.reason == "segment-outside"
                        continue
                    found.append((loader.video(path, request=request), loader.audio(path, request=request)))
                read.append(len(packets))
            if found:
                (video, sound), (straight_video, straight_sound) = found
                np.testing.assert_array_equal(video.frames, straight_video.frames)
                np.testing.assert_array_equal(video.timestamps, straight_video.timestamps)
                np.testing.assert_allclose(sound.waveform, straight_sound.waveform, atol=2e-3)
                assert name == "live.mkv" or read[0] < read[1] / 2


def test_a_clip_that_was_trimmed_without_coding_it_again(tmp_path):
    """As phones do it: an edit list plays 1.0 s to 3.5 s of what is stored."""
    data = bytearray(
        write(tmp_path / "a.mp4", Timed("mp4", audio_codec="aac", sound_end=6.0, pictures=60)).read_bytes()
    )
    for edit in re.finditer(b"elst", bytes(data)):
        at = edit.end() + 8  # after version, flags and number of entries
        scale = bytes(data).index(b"mdhd", at) + 16
        (per_second,) = struct.unpack(">I", data[scale : scale + 4])
        _, begin = struct.unpack(">Ii", data[at : at + 8])
        data[at : at + 8] = struct.pack(">Ii", 2500, begin + per_second)  # the length in milliseconds
    (tmp_path / "trimmed.mp4").write_bytes(data)
    with MediaLoader(tmp_path, backend="pyav", workers=0) as loader:
        video, sound = loader.video("trimmed.mp4"), loader.audio("trimmed.mp4")
    assert video.duration == sound.duration == 2.5
    assert [number_of(frame) for frame in video.frames] == [10, 13, 17, 20, 24, 27, 31, 34]
    np.testing.assert_allclose(video.timestamps, [0.0, 0.3, 0.7, 1.0, 1.4, 1.7, 2.1, 2.4], atol=0.002)
    assert [(k, round(at, 2)) for k, at in beeps_in(sound.waveform, 16000)] == [(1, 0.0), (2, 1.0), (3, 2.0)]


# Length


def test_the_length_is_that_of_pictures_and_sound(tmp_path):
    """A clip of 4 s with old time stamps, at 400 s; and one with a caption that stays up for an hour."""
    late = write(tmp_path / "late.mkv", Timed(video_start=400.0, sound_start=400.0, sound_end=404.0))
    captioned = tmp_path / "captioned.mkv"
    (tmp_path / "words.srt").write_text("1\n00:00:03,000 --> 01:00:03,000\nthe end\n")
    write(tmp_path / "plain.mkv", Timed(sound_end=4.0))
    with (
        av.open(str(tmp_path / "plain.mkv")) as plain,
        av.open(str(tmp_path / "words.srt")) as words,
        av.open(str(captioned), "w") as out,
    ):
        packets = []
        for source in (plain, words):
            streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream.index]
                    packets.append(packet)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    with av.open(str(captioned)) as container:
        assert container.duration / 1e6 > 3600  # what the header says
    with MediaLoader(tmp_path, MediaLimits(max_seconds=10), backend="pyav", workers=0) as loader:
        for path in (late, captioned):
            assert loader.video(path).duration == loader.audio(path).duration == 4.0
            assert loader.video(path).timestamps[0] == 0.0 and loader.video(path).notes == ("resized",)
            assert loader.probe(path).has_video


def with_duration(path: Path, target: Path, seconds: float) -> Path:
    """The Matroska file with another length in its header: the element Duration (4489), a float of 8 bytes."""
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3
    data[at : at + 8] = struct.pack(">d", seconds * 1000)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("kind", ["video", "audio", "probe"])
def test_a_header_that_is_wrong_about_the_length(tmp_path, kind):
    short = write(tmp_path / "short.mkv", Timed(sound_end=4.0))
    long = write(tmp_path / "long.mkv", Timed(pictures=120, sound_end=12.0))
    with MediaLoader(tmp_path, MediaLimits(max_seconds=5), backend="pyav", workers=0) as loader:
        call = getattr(loader, kind)
        claims_much = call(with_duration(short, tmp_path / "much.mkv", 7200))
        assert kind == "probe" or claims_much.duration == pytest.approx(4.0, abs=0.01)
        if kind != "probe":  # which asks no further where the header names a length that is allowed
            with pytest.raises(MediaError, match="over 5 s, which is the limit"):
                call(with_duration(long, tmp_path / "little.mkv", 2))
        with pytest.raises(MediaError, match="over 5 s, which is the limit"):
            call(long)
        if kind != "probe":  # the segment counts, not the file
            assert call(long, request=ClipRequest(start=8.0, end=12.0)).duration == pytest.approx(4.0, abs=0.01)
        assert loader.probe(long, request=ClipRequest(start=8.0)).has_audio


def test_sound_after_a_too_short_length_is_kept(tmp_path):
    """Negative control of the padding that is cut: a length that is short by more than a codec's frames cuts nothing."""
    path = write(tmp_path / "clip.mkv", Timed(sound_end=4.0))
    data = path.read_bytes()
    tags = [at for at in range(len(data)) if data.startswith(b"00:00:04.0", at)]
    assert tags
    (tmp_path / "tags.mkv").write_bytes(data.replace(b"00:00:04.0", b"00:00:02.0"))
    with MediaLoader(tmp_path, backend="pyav", workers=0) as loader:
        assert loader.audio("tags.mkv").duration == 4.0 and loader.video("tags.mkv").duration == 4.0
