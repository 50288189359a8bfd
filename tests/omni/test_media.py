"""Real files through real decoders: what comes out of good clips, and the named outcome of every bad one."""

import copy
import http.server
import os
import struct
import sys
import threading
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import media_files as files
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter

from maple_trl.omni.errors import REASONS
from maple_trl.omni.media import decode, opening
from maple_trl.omni.media.clips import ClipRequest
from maple_trl.omni.media.containers import declared_bytes
from maple_trl.omni.media.loader import MediaError, MediaLimits, MediaLoader


VFR = {"frames": 12, "pts": [0, 100, 110, 120, 500, 900, 950, 1300, 1310, 2000, 2040, 2900]}
REAL = Path(os.environ.get("MAPLE_TRL_DAILY_OMNI") or Path(__file__).parents[3] / "shared/data/daily_omni")
REAL_CLIPS = sorted(REAL.glob("Videos/*/*.mp4"))


def reason_of(call) -> str:
    with pytest.raises(MediaError) as caught:
        call()
    assert caught.value.reason in REASONS and caught.value.detail and caught.value.reason in str(caught.value)
    return caught.value.reason


def resize(images: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """The one resize, applied to reference pictures."""
    frames = [av.VideoFrame.from_ndarray(image, format="rgb24") for image in images]
    scaler = partial(VideoReformatter().reformat, width=width, height=height, interpolation="BICUBIC")
    return np.stack([scaler(frame, format="rgb24").to_ndarray() for frame in frames])


def assert_same_pictures(clip, images: list[np.ndarray]) -> None:
    """Equal up to the rounding of converting colours before rather than with the resize."""
    expected = resize(images, *clip.frames.shape[1:3]).astype(int)
    assert len(expected) == len(clip.frames)
    assert np.abs(clip.frames.astype(int).mean((1, 2)) - expected.mean((1, 2))).max() < 3
    assert np.abs(clip.frames.astype(int) - expected).mean() < 4


# Video


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {"frames": 48, "audio": files.tone(2, 16000)}),
        ("bframes.mp4", {"frames": 48, "codec_options": {"bf": "3"}, "gop": 6}),
        ("open.mkv", {"frames": 60, "codec_options": {"x264-params": "open-gop=1:bframes=3"}, "gop": 10}),
        ("intra.mp4", {"frames": 30, "gop": 1}),
        ("vp9.webm", {"frames": 30, "codec": "libvpx-vp9", "codec_options": {"cpu-used": "8"}}),
        (
            "hidden.webm",
            {"frames": 40, "codec": "libvpx", "codec_options": {"auto-alt-ref": "1", "lag-in-frames": "9"}},
        ),
        ("vfr.mp4", {**VFR, "time_base": Fraction(1, 1000), "gop": 3}),
        ("vfr.mkv", {**VFR, "time_base": Fraction(1, 1000), "gop": 3}),
        ("fragmented.mp4", {"frames": 48, "options": {"movflags": "empty_moov+frag_keyframe"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("count", [4, 11])
@pytest.mark.matrix(cases=9)
def test_frames_are_those_of_a_full_decode(tmp_path, name, options, count):
    """Evenly by number from the first picture to the last, as the Qwen models are fed, each with its own time."""
    path = files.write_video(tmp_path / name, **options)
    clip = MediaLoader(tmp_path, MediaLimits(num_frames=count)).video(name)
    pictures = files.all_pictures(path)
    times, images = zip(
        *(pictures[i] for i in torch.linspace(0, len(pictures) - 1, count).round().long()), strict=True
    )
    images, times = list(images), np.array(times) - pictures[0][0]
    assert_same_pictures(clip, images + images[-1:] * (count % 2))
    np.testing.assert_allclose(clip.timestamps[:count], times, atol=1e-6)
    assert clip.frames.dtype == np.uint8 and len(clip.frames) == len(clip.timestamps) == count + count % 2
    assert all(side % 28 == 0 for side in clip.frames.shape[1:3]) and clip.frames.shape[3] == 3
    assert clip.fps == pytest.approx((count - 1) / (times[-1] - times[0]))
    assert ("variable-frame-rate" in clip.notes) == name.startswith("vfr")


def test_seeking_changes_nothing(tmp_path, monkeypatch):
    path = files.write_video(tmp_path / "a.mp4", frames=96, gop=8, codec_options={"bf": "2"})
    sought = MediaLoader(tmp_path, backend="pyav").video("a.mp4")
    seeks = []

    def straight(source, limits, line, wanted, deadline, seek, inner=decode._pick):
        seeks.append(seek)
        if seek:
            raise decode._SeekMissed  # a container whose index leads nowhere
        return inner(source, limits, line, wanted, deadline, seek=False)

    monkeypatch.setattr(decode, "_pick", straight)
    again = MediaLoader(tmp_path, backend="pyav", workers=0).video(path)  # here, where `straight` is
    assert seeks == [True, False]
    np.testing.assert_array_equal(sought.frames, again.frames)


def test_pictures_of_a_variable_rate_keep_their_own_times(tmp_path):
    """Which pictures are taken goes by number, as in the harnesses; when they are shown is not evenly spaced."""
    files.write_video(tmp_path / "vfr.mp4", **VFR, time_base=Fraction(1, 1000))
    clip = MediaLoader(tmp_path, MediaLimits(num_frames=4)).video("vfr.mp4")
    shown = [int(frame[-10:, -10:].mean()) for frame in clip.frames]
    assert shown == pytest.approx([int(files.picture(i, 48, 64)[-1, -1, 0]) for i in (0, 4, 7, 11)], abs=4)
    np.testing.assert_allclose(clip.timestamps, [0.0, 0.5, 1.3, 2.9], atol=1e-6)
    evenly = np.linspace(0, 2.9, 4)
    assert np.abs(clip.timestamps - evenly).max() > 0.4  # negative control: evenly spaced times would be wrong


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_reading_that_stops_early_makes_no_rate_variable(tmp_path, name):
    """Of reordered pictures the last one read is shown after some that were not: no gap of the file's."""
    reordered = {"gop": 96, "codec_options": {"x264-params": "bframes=3:b-adapt=0:scenecut=0"}}
    for kind, pts in (("even", range(0, 384, 4)), ("uneven", [4 * n + n % 3 for n in range(96)])):
        path = files.write_video(tmp_path / f"{kind}-{name}", 96, pts=pts, time_base=Fraction(1, 96), **reordered)
        with av.open(str(path)) as container:
            stored = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
        assert stored != sorted(stored)
    trim = MediaLimits(max_seconds=1, overlong="trim")
    for limits, request in ((MediaLimits(), {}), (MediaLimits(), {"start": 1.0, "end": 2.0}), (trim, {})):
        loader = MediaLoader(tmp_path, limits, backend="pyav", workers=0)
        even, uneven = (loader.video(f"{kind}-{name}", request=ClipRequest(**request)) for kind in ("even", "uneven"))
        assert "variable-frame-rate" not in even.notes
        assert "variable-frame-rate" in uneven.notes


def test_sampling_by_rate_and_its_cap(tmp_path):
    """The rate says how many frames there are; as with a fixed number they reach from the first picture to the last."""
    files.write_video(tmp_path / "a.mp4", frames=48, fps=24)
    clip = MediaLoader(tmp_path, MediaLimits(num_frames=None, fps=4.0)).video("a.mp4")
    np.testing.assert_allclose(clip.timestamps, np.linspace(0, 47, 8).round() / 24)
    assert clip.fps == pytest.approx(7 / (47 / 24)) and clip.duration == 2
    capped = MediaLoader(tmp_path, MediaLimits(num_frames=None, fps=4.0, max_frames=3)).video("a.mp4")
    np.testing.assert_allclose(capped.timestamps, [0, 47 / 24])  # an even number, and no more than the cap
    few = MediaLoader(tmp_path, MediaLimits(num_frames=None, fps=0.5)).video("a.mp4")
    assert len(few.frames) == 4  # the least that shows a movement
    files.write_video(tmp_path / "a.mkv", frames=48, fps=24)  # 1.999 s by its rounded time stamps
    assert len(MediaLoader(tmp_path, MediaLimits(num_frames=None, fps=4.0)).video("a.mkv").frames) == 8


def test_size_budget_and_no_needless_resize(tmp_path):
    files.write_video(tmp_path / "small.mp4", size=(56, 56))
    files.write_video(tmp_path / "wide.mp4", size=(90, 160))
    loader = MediaLoader(tmp_path, MediaLimits(max_pixels=16 * 784))
    small, wide = loader.video("small.mp4"), loader.video("wide.mp4")
    assert small.frames.shape[1:3] == (56, 56) and "resized" not in small.notes
    assert wide.frames.shape[1:3] == (84, 140) and "resized" in wide.notes
    assert loader.video("wide.mp4", max_pixels=4 * 784).frames.shape[1:3] == (28, 56)
    assert loader.video("wide.mp4", max_pixels=10**9).frames.shape == wide.frames.shape
    assert loader.video("wide.mp4", multiple=32).frames.shape[1:3] == (64, 128)
    with pytest.raises(ValueError, match="less than one patch"):
        loader.video("wide.mp4", max_pixels=100)


@pytest.mark.parametrize(("degrees", "corner"), [(90, (-10, 10)), (180, (-10, -10)), (-90, (10, -10)), (0, (10, 10))])
def test_rotation_metadata_is_honoured(tmp_path, degrees, corner):
    """The red corner, top left as stored, goes where a player that turns by `degrees` counterclockwise shows it."""
    files.write_video(tmp_path / "a.mp4", size=(112, 56), rotation=degrees)
    clip = MediaLoader(tmp_path, MediaLimits(max_pixels=10**6)).video("a.mp4")
    assert clip.frames.shape[1:3] == ((56, 112) if degrees % 180 else (112, 56))
    red = clip.frames[0].astype(int)[..., 0] - clip.frames[0].astype(int)[..., 1]
    assert red[corner] > 150 and (red > 150).mean() < 0.2


def test_pixel_aspect_ratio_is_honoured(tmp_path):
    files.write_video(tmp_path / "a.mp4", size=(56, 56), pixel_aspect=Fraction(2, 1))
    assert MediaLoader(tmp_path).video("a.mp4").frames.shape[1:3] == (56, 112)


def test_one_picture(tmp_path):
    files.write_video(tmp_path / "a.mp4", frames=1)
    clip = MediaLoader(tmp_path, MediaLimits(num_frames=3)).video("a.mp4")
    assert len(clip.frames) == 2 and (clip.frames == clip.frames[0]).all() and clip.duration == pytest.approx(1 / 24)


# Audio


@pytest.mark.parametrize(
    ("name", "codec", "rate", "tolerance"),
    [
        ("a.wav", "pcm_s16le", 44100, 0),
        ("a.wav", "pcm_f32le", 16000, 0),
        ("a.flac", "flac", 48000, 0),
        ("a.mp3", "libmp3lame", 44100, 1152 / 44100),
        ("a.m4a", "aac", 44100, 0),
        ("a.mka", "libopus", 48000, 960 / 48000),
    ],
)
def test_audio_is_the_mean_of_the_channels_at_the_asked_rate(tmp_path, name, codec, rate, tolerance):
    wave = files.tone(1.5, rate, (440.0, 880.0))
    files.write_audio(tmp_path / name, wave, rate, codec)
    clip = MediaLoader(tmp_path).audio(name, sampling_rate=16000)
    assert clip.waveform.dtype == np.float32 and clip.waveform.ndim == 1 and clip.sampling_rate == 16000
    assert abs(clip.duration - 1.5) <= tolerance + 1 / 16000 and clip.duration == len(clip.waveform) / 16000
    # Independent reference: the same sum of sines, written at 16 kHz. In phase, so encoder priming is removed.
    expected = files.tone(1.5, 16000, (440.0, 880.0)).mean(axis=0)
    middle = slice(2000, 22000)
    error = {lag: np.abs(clip.waveform[middle] - np.roll(expected, lag)[middle]).mean() for lag in range(-40, 41)}
    assert min(error, key=error.get) == 0 and error[0] < (0.05 if tolerance or codec == "aac" else 0.001)
    assert error[12] > 4 * error[0]  # negative control: 12 samples off shows
    assert not clip.notes


def test_audio_track_of_a_video(tmp_path):
    files.write_video(tmp_path / "a.mp4", frames=48, audio=files.tone(2, 16000))
    clip = MediaLoader(tmp_path).audio("a.mp4", sampling_rate=8000)
    assert abs(len(clip.waveform) - 16000) <= 1024
    assert np.argmax(np.abs(np.fft.rfft(clip.waveform[:8000]))) == 440


def test_a_late_track_keeps_its_place_in_time(tmp_path):
    """Sound that starts after the picture is preceded by silence, or audio and video would drift apart."""
    source = files.write_audio(tmp_path / "a.m4a", files.tone(1, 16000), 16000, "aac")
    files.write_video(tmp_path / "v.mp4", frames=48)
    with (
        av.open(str(tmp_path / "late.mkv"), "w") as out,
        av.open(str(source)) as a,
        av.open(str(tmp_path / "v.mp4")) as v,
    ):
        streams = {s: out.add_stream_from_template(s.streams[0]) for s in (v, a)}
        for container, stream in streams.items():
            for packet in container.demux(container.streams[0]):
                if packet.dts is None:
                    continue
                if container is a:
                    packet.pts, packet.dts = packet.pts + 8000, packet.dts + 8000  # half a second
                packet.stream = stream
                out.mux(packet)
    clip = MediaLoader(tmp_path).audio("late.mkv")
    loud = np.flatnonzero(np.abs(clip.waveform) > 0.1)
    assert 0.4 < loud[0] / 16000 < 0.52 and clip.duration == pytest.approx(1.5, abs=0.1)


def test_no_audio_track_is_a_normal_counted_case(tmp_path):
    files.write_video(tmp_path / "mute.mp4")
    loader = MediaLoader(tmp_path)
    assert loader.audio("mute.mp4") is None and loader.audio("mute.mp4") is None
    assert loader.notes == {"no-audio-track": 1} and sum(loader.decodes.values()) == 1
    assert loader.probe("mute.mp4").has_audio is False


# Files that cannot be used


def test_content_decides_not_the_name(tmp_path):
    files.write_video(tmp_path / "clip.mp4", audio=files.tone(1, 16000)).rename(tmp_path / "clip.wav")
    files.write_audio(tmp_path / "b.wav", files.tone(1, 16000)).rename(tmp_path / "sound.mp4")
    loader = MediaLoader(tmp_path)
    assert "extension-mismatch" in loader.video("clip.wav").notes
    assert "extension-mismatch" in loader.audio("clip.wav").notes
    assert "extension-mismatch" in loader.audio("sound.mp4").notes
    assert loader.notes["extension-mismatch"] == 2  # files, not requests
    assert reason_of(lambda: loader.video("sound.mp4")) == "no-video-track"


@pytest.mark.parametrize(
    "data",
    [b"not a clip\n" * 500, np.random.default_rng(0).bytes(60_000), b"\x89PNG\r\n\x1a\n" + b"\0" * 99, b"\0" * 5000],
    ids=["text", "noise", "picture", "zeros"],
)
def test_what_is_no_media_file(tmp_path, data):
    (tmp_path / "a.mp4").write_bytes(data)
    loader = MediaLoader(tmp_path)
    for call in (loader.video, loader.audio, loader.probe):
        assert reason_of(lambda call=call: call("a.mp4")) == "not-media"


def test_empty_file(tmp_path):
    (tmp_path / "a.mp4").touch()
    for call in (MediaLoader(tmp_path).video, MediaLoader(tmp_path).audio, MediaLoader(tmp_path).probe):
        assert reason_of(lambda call=call: call("a.mp4")) == "empty-file"


@pytest.mark.parametrize("part", [0.4, 0.7, 0.98])
@pytest.mark.parametrize(
    "name", ["a.mp4", "faststart.mp4", "fragmented.mp4", "a.webm", "a.mkv", "a.wav", "a.mp3", "a.flac"]
)
@pytest.mark.matrix(cases=7)
def test_never_silently_half_a_clip(tmp_path, name, part):
    """The index of a plain mp4 is at its end, so that nothing is left without it; a cut flac frame does not decode."""
    sound = files.tone(4, 48000)
    flags = {"faststart.mp4": "faststart", "fragmented.mp4": "empty_moov+frag_keyframe"}.get(name)
    if name.endswith((".wav", ".mp3", ".flac")):
        codec = {"wav": "pcm_s16le", "mp3": "libmp3lame", "flac": "flac"}[name.split(".")[1]]
        whole = files.write_audio(tmp_path / name, sound, 48000, codec)
    else:
        video = {"codec": "libvpx", "audio_codec": "libopus"} if name == "a.webm" else {}
        options = {"options": {"movflags": flags}} if flags else {}
        whole = files.write_video(tmp_path / name, 96, audio=sound, audio_rate=48000, **video, **options)
    loader = MediaLoader(tmp_path)
    assert loader.audio(name).duration == pytest.approx(4, abs=0.1)  # the whole file is fine
    files.cut(whole, tmp_path / f"cut-{name}", part)
    expected = "unreadable" if name in ("a.mp4", "a.flac") else "truncated"
    assert reason_of(lambda: loader.audio(f"cut-{name}")) == expected
    if len(loader.probe(name).format) > 4:  # a video container
        assert reason_of(lambda: loader.video(f"cut-{name}")) == expected
        assert reason_of(lambda: loader.probe(f"cut-{name}")) == expected
    if name in ("a.webm", "a.mkv", "a.wav", "a.mp3"):
        # Negative control: FFmpeg by itself plays the part that is there and reports nothing.
        with av.open(str(tmp_path / f"cut-{name}")) as container:
            assert 0 < sum(frame.samples for frame in container.decode(audio=0)) / 48000 < 4


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.mp3"])
def test_full_size_with_an_empty_end(tmp_path, name):
    """What a download leaves that reserves the space first: all bytes are there, and the second half is zeros."""
    sound = files.tone(2, 48000)
    if name == "a.mp3":
        whole = files.write_audio(tmp_path / name, sound, 48000, "libmp3lame")
    else:
        video = {"codec": "libvpx", "audio_codec": "libopus"} if name == "a.webm" else {}
        options = {"options": {"movflags": "faststart"}} if name == "a.mp4" else {}
        whole = files.write_video(tmp_path / name, 48, audio=sound, audio_rate=48000, **video, **options)
    data = whole.read_bytes()
    (tmp_path / f"hole-{name}").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    loader = MediaLoader(tmp_path)
    for call in (loader.audio, loader.video)[: 1 if name == "a.mp3" else 2]:
        assert call(name).duration == pytest.approx(2, abs=0.1)
        assert reason_of(partial(call, f"hole-{name}")) in ("truncated", "unreadable")


def test_a_last_picture_that_is_held_is_not_taken_for_truncation(tmp_path):
    files.write_video(tmp_path / "a.mkv", frames=6, pts=[0, 100, 200, 300, 400, 2000], time_base=Fraction(1, 1000))
    assert "variable-frame-rate" in MediaLoader(tmp_path).video("a.mkv").notes


def test_sizes_that_a_container_leaves_open_are_not_taken_for_truncation(tmp_path):
    wav = files.write_audio(tmp_path / "a.wav", files.tone(1, 16000))
    data = bytearray(wav.read_bytes())
    data[4:8] = struct.pack("<I", 0xFFFFFFFF)  # what a recorder that writes to a pipe leaves
    (tmp_path / "pipe.wav").write_bytes(data)
    files.write_video(tmp_path / "live.mkv", options={"live": "1"})
    files.write_audio(tmp_path / "bare.mp3", files.tone(1, 16000), codec="libmp3lame", options={"write_xing": "0"})
    mp4 = files.write_video(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "tail.mp4").write_bytes(mp4 + b"\x7f\xff\xff\xffjunk of an editor")
    assert [declared_bytes(str(tmp_path / n)) for n in ("pipe.wav", "live.mkv", "bare.mp3")] == [None] * 3
    loader = MediaLoader(tmp_path)
    assert loader.audio("pipe.wav").duration == 1
    assert len(loader.video("live.mkv").frames) == len(loader.video("tail.mp4").frames) == 8
    assert loader.audio("bare.mp3").duration == pytest.approx(1, abs=0.1)


def test_missing_pictures(tmp_path):
    header = files.write_video(tmp_path / "a.mp4", options={"movflags": "empty_moov+frag_keyframe"}).read_bytes()
    (tmp_path / "none.mp4").write_bytes(header[: header.index(b"moof") - 4])
    moved = files.write_video(tmp_path / "b.mp4", options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "data-gone.mp4").write_bytes(moved[: moved.index(b"mdat") - 4])
    loader = MediaLoader(tmp_path)
    assert reason_of(lambda: loader.video("none.mp4")) == "no-frames"
    assert reason_of(lambda: loader.video("data-gone.mp4")) == "truncated"


def test_damaged_data_are_never_a_crash(tmp_path):
    """Random bytes changed: the clip either decodes or is refused by name. No other exception, no hang."""
    data = files.write_video(tmp_path / "a.mp4", audio=files.tone(1, 16000)).read_bytes()
    loader, outcomes = MediaLoader(tmp_path, MediaLimits(decode_timeout=5)), set()
    for seed in range(25):
        random, damaged = np.random.default_rng(seed), bytearray(data)
        for at in random.integers(0, len(data), 20):
            damaged[at] = random.integers(256)
        (tmp_path / f"{seed}.mp4").write_bytes(damaged)
        for call in (loader.video, loader.audio):
            try:
                call(f"{seed}.mp4")
            except MediaError as error:
                outcomes.add(error.reason)
    assert "unreadable" in outcomes and outcomes <= set(REASONS)


def test_audio_that_cannot_be_used(tmp_path):
    files.write_audio(tmp_path / "short.wav", files.tone(0.02, 16000))
    files.write_audio(tmp_path / "enough.wav", files.tone(0.021, 16000))
    for name, bad in (("nan.wav", np.nan), ("inf.wav", -np.inf)):
        wave = files.tone(1, 16000)
        wave[0, 7] = bad
        files.write_audio(tmp_path / name, wave, codec="pcm_f32le")
    bare = {"codec": "libmp3lame", "options": {"write_xing": "0", "id3v2_version": "0"}}
    first = files.write_audio(tmp_path / "1.mp3", files.tone(1, 44100), 44100, **bare).read_bytes()
    second = files.write_audio(tmp_path / "2.mp3", files.tone(1, 22050, (440, 880)), 22050, **bare).read_bytes()
    (tmp_path / "glued.mp3").write_bytes(first + second)
    loader = MediaLoader(tmp_path)
    assert reason_of(lambda: loader.audio("short.wav")) == "audio-too-short"
    assert len(loader.audio("enough.wav").waveform) == 336
    assert (
        reason_of(lambda: loader.audio("nan.wav")) == reason_of(lambda: loader.audio("inf.wav")) == "non-finite-audio"
    )
    assert reason_of(lambda: loader.audio("glued.mp3")) == "unreadable"
    with pytest.raises(ValueError, match="sampling_rate"):
        loader.audio("enough.wav", sampling_rate=0)


# Limits


@pytest.mark.parametrize("name", ["a.mp4", "live.mkv"])  # with and without the length in the header
@pytest.mark.matrix(cases=1)
def test_overlong_clips_are_refused_or_trimmed(tmp_path, name):
    live = {"options": {"live": "1"}} if name == "live.mkv" else {}
    path = files.write_video(tmp_path / name, frames=120, audio=files.tone(5, 16000), **live)
    strict = MediaLoader(tmp_path, MediaLimits(max_seconds=2))
    assert reason_of(lambda: strict.video(name)) == reason_of(lambda: strict.audio(name)) == "too-long"
    if name == "a.mp4":
        assert reason_of(lambda: strict.probe(name)) == "too-long"
    loader = MediaLoader(tmp_path, MediaLimits(max_seconds=2, overlong="trim"))
    video, audio = loader.video(name), loader.audio(name)
    assert "trimmed" in video.notes and "trimmed" in audio.notes and loader.notes["trimmed"] == 1
    assert video.duration == audio.duration == 2 and len(audio.waveform) == 32000
    chosen = np.linspace(0, 47, 8).round().astype(int)  # of the 48 pictures of the first two seconds
    assert_same_pictures(video, [files.all_pictures(path)[i][1] for i in chosen])
    np.testing.assert_allclose(video.timestamps, chosen / 24, atol=1e-3)
    assert loader.probe(name).duration == (None if live else pytest.approx(5, abs=0.1))


def test_overlong_audio_without_a_length_in_the_header(tmp_path):
    data = bytearray(files.write_audio(tmp_path / "a.wav", files.tone(5, 16000)).read_bytes())
    at = data.index(b"data")
    data[4:8] = data[at + 4 : at + 8] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "pipe.wav").write_bytes(data)
    strict, trim = (MediaLoader(tmp_path, MediaLimits(max_seconds=2, overlong=o)) for o in ("quarantine", "trim"))
    assert reason_of(lambda: strict.audio("pipe.wav")) == "too-long"
    assert trim.audio("pipe.wav").duration == 2


def test_decode_timeout(tmp_path):
    files.write_video(tmp_path / "a.mp4", audio=files.tone(1, 16000))
    loader = MediaLoader(tmp_path, MediaLimits(decode_timeout=1e-9))
    assert reason_of(lambda: loader.video("a.mp4")) == reason_of(lambda: loader.audio("a.mp4")) == "decode-timeout"


def test_pictures_of_absurd_size(tmp_path, monkeypatch):
    files.write_video(tmp_path / "thin.mp4", size=(2, 1000))
    files.write_video(tmp_path / "a.mp4")
    loader = MediaLoader(tmp_path, workers=0)  # here, where the limit is lowered
    assert reason_of(lambda: loader.video("thin.mp4")) == "bad-aspect-ratio"
    monkeypatch.setattr(opening, "MAX_SOURCE_PIXELS", 48 * 64 - 1)
    assert reason_of(lambda: loader.video("a.mp4")) == "frame-too-large"


# Where files may be


def test_the_media_root_holds(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "root2"
    for folder in (root / "sub", outside):
        folder.mkdir(parents=True)
    files.write_video(root / "sub" / "in.mp4")
    files.write_video(outside / "out.mp4")
    (root / "good").symlink_to(root / "sub")
    (root / "bad.mp4").symlink_to(outside / "out.mp4")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    os.mkfifo(root / "fifo.mp4")
    loader = MediaLoader(root)
    real = str(root / "sub" / "in.mp4")
    for path in ("sub/in.mp4", Path("good/in.mp4"), "../root/sub/in.mp4", real):
        assert loader.resolve(path) == real
    assert len(loader.video("good/in.mp4").frames) == 8
    for path in ("bad.mp4", "../root2/out.mp4", str(outside / "out.mp4"), "/etc/passwd", ".."):
        assert reason_of(lambda path=path: loader.resolve(path)) == "outside-media-root"
    for path in (
        "none.mp4",
        "sub",
        "fifo.mp4",
        "loop.mp4",
        "a\0b.mp4",
        None,
        3,
        "concat:sub/in.mp4",
        "data:video/mp4",
    ):
        assert reason_of(lambda path=path: loader.video(path)) == "not-found"
    for path in ("http://localhost/a.mp4", "https://localhost/a.mp4", "file:///etc/passwd", "rtmp://localhost/a"):
        assert reason_of(lambda path=path: loader.audio(path)) == "network-not-allowed"
    assert (
        reason_of(lambda: MediaLoader(root, allow_network=True).video("file:///etc/passwd")) == "network-not-allowed"
    )
    with pytest.raises(FileNotFoundError, match="not a folder"):
        MediaLoader(root / "nowhere")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine; yields its address and the list of what was asked of it."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()
        thread.join()


def test_scripts_that_pose_as_clips_read_nothing(tmp_path, server):
    """An HLS playlist or a concat script makes FFmpeg read other files. The controls show that it would."""
    address, asked = server
    root, secrets = tmp_path / "root", tmp_path / "secrets"
    root.mkdir(), secrets.mkdir()
    secret = files.write_video(secrets / "secret.ts", format="mpegts")
    (root / "link.ts").symlink_to(secret)
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\n"
    scripts = {
        "hls": f"{head}{secret}\n#EXT-X-ENDLIST\n",
        "hls-web": f"{head}{address}/secrets/secret.ts\n#EXT-X-ENDLIST\n",
        "concat": "ffconcat version 1.0\nfile 'link.ts'\n",
        "concat-web": f"ffconcat version 1.0\nfile '{address}/secrets/secret.ts'\n",
    }
    loaders = MediaLoader(root), MediaLoader(root, allow_network=True)
    for name, script in scripts.items():
        for extension in (".mp4", ".m3u8", ".mkv"):
            file = f"{name}{extension}"
            (root / file).write_text(script)
            for loader in loaders:
                for call in (loader.video, loader.audio, loader.probe):
                    assert reason_of(partial(call, file)) == "not-media"
            assert reason_of(partial(loaders[1].video, f"{address}/root/{file}")) == "unreadable"
    assert asked and not [path for path in asked if "secret" in path]
    # Without the whitelists, FFmpeg reads the file outside the root in both ways.
    for name in ("hls.m3u8", "concat.mp4"):
        with av.open(str(root / name)) as container:
            assert next(container.decode(video=0)).width == 64


def test_network_clips_when_allowed(tmp_path, server):
    address, asked = server
    files.write_video(tmp_path / "a.mp4", audio=files.tone(1, 16000))
    (tmp_path / "b.mp4").write_bytes(b"nothing" * 99)
    (tmp_path / "root").mkdir()
    loader, local = MediaLoader(tmp_path / "root", allow_network=True), MediaLoader(tmp_path)
    clip = loader.video(f"{address}/a.mp4?x=1")
    np.testing.assert_array_equal(clip.frames, local.video("a.mp4").frames)
    assert clip.notes == local.video("a.mp4").notes
    np.testing.assert_array_equal(loader.audio(f"{address}/a.mp4").waveform, local.audio("a.mp4").waveform)
    assert reason_of(lambda: loader.video(f"{address}/none.mp4")) == "not-found"
    assert reason_of(lambda: loader.video(f"{address}/b.mp4")) == "unreadable"
    before = len(asked)
    assert reason_of(lambda: local.video(f"{address}/a.mp4")) == "network-not-allowed" and len(asked) == before


# Cache and threads


def test_a_clip_is_decoded_once_and_shared(tmp_path):
    path = files.write_video(tmp_path / "a.mp4", audio=files.tone(1, 16000))
    (tmp_path / "same.mp4").symlink_to(path)
    loader = MediaLoader(tmp_path)
    clip = loader.video("a.mp4")
    assert loader.video("same.mp4") is clip and loader.audio("a.mp4") is loader.audio(path)
    assert loader.decodes == {("video", str(path)): 1, ("audio", str(path)): 1}
    for array in (clip.frames, clip.timestamps, loader.audio("a.mp4").waveform):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert loader.video("a.mp4", multiple=14) is not clip  # other parameters, other entry
    files.write_video(path, frames=30)  # and a file that changed is read again
    assert loader.video("a.mp4").duration != clip.duration and loader.notes["resized"] == 1


def test_threads_that_ask_for_one_clip_decode_it_once(tmp_path):
    files.write_video(tmp_path / "a.mp4", frames=96, audio=files.tone(1, 16000))
    loader, barrier, clips = MediaLoader(tmp_path), threading.Barrier(8), []

    def ask():
        barrier.wait()
        clips.append((loader.video("a.mp4"), loader.audio("a.mp4")))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clips) == 8 and len({id(clip) for pair in clips for clip in pair}) == 2
    assert set(loader.decodes.values()) == {1}


def test_cache_is_bounded_by_bytes(tmp_path):
    for name in "abc":
        files.write_video(tmp_path / f"{name}.mp4", size=(56, 56))
    size = MediaLoader(tmp_path).video("a.mp4").nbytes
    loader = MediaLoader(tmp_path, cache_bytes=2 * size)
    for name in ("a", "b", "a", "c", "a", "b"):  # c pushes out b, the least recently used
        loader.video(f"{name}.mp4")
    assert [loader.decodes["video", str(tmp_path / f"{name}.mp4")] for name in "abc"] == [1, 2, 1]
    small = MediaLoader(tmp_path, cache_bytes=size - 1)  # too small for any clip: works, without a cache
    assert small.video("a.mp4") is not small.video("a.mp4") and sum(small.decodes.values()) == 2


def test_prefetch_fills_the_cache_and_leaves_errors_to_the_foreground(tmp_path):
    for name in "ab":
        files.write_video(tmp_path / f"{name}.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"x" * 99)
    with MediaLoader(tmp_path) as loader:
        done = threading.Event()
        names = ("a.mp4", "broken.mp4", "b.mp4")
        loader.prefetch([*(partial(loader.video, name) for name in names), done.set])
        assert done.wait(30)
        clips = [loader.video("a.mp4"), loader.video("b.mp4")]  # waits where the decode is still under way
        assert len(clips) == 2 and all(n == 1 for (_, p), n in loader.decodes.items() if "broken" not in p)
        assert reason_of(lambda: loader.video("broken.mp4")) == "not-media"
    assert loader.video("a.mp4") is not clips[0]  # closed: the cache is empty, and loading still works
    loader.prefetch([partial(time.sleep, 0.05)] * 50)
    loader.close()  # drops what has not begun
    loader.close()


@pytest.mark.parametrize(
    "right, cancels", [(-1.0, True), (-0.999, True), (1.0, False), (0.0, False), (-0.5, False), (None, False)]
)
def test_channels_that_cancel_each_other_are_noted(tmp_path, right, cancels):
    """Their mean is what is fed; silence (`None`) is no such thing."""
    left = files.tone(1, 16000)[0] * (0 if right is None else 1)
    files.write_audio(tmp_path / "a.wav", np.stack([left, left * (right or 0.0)]))
    clip = MediaLoader(tmp_path).audio("a.wav")
    assert ("channels-cancel" in clip.notes) == cancels
    assert np.abs(clip.waveform).max() == pytest.approx(np.abs(left).max() * abs(1 + (right or 0)) / 2, abs=1e-3)


# Backends, errors, header


@pytest.fixture
def broken_torchcodec(tmp_path, monkeypatch):
    """torchcodec as it is often found: installed, and failing on import because FFmpeg's libraries are missing."""

    def loaded():
        return [name for name in sys.modules if name.split(".")[0] == "torchcodec"]

    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").touch()
    (tmp_path / "torchcodec" / "decoders.py").write_text("raise RuntimeError('Could not load libtorchcodec')\n")
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in loaded():
        del sys.modules[name]


def test_backend(tmp_path, broken_torchcodec):
    loader = MediaLoader(tmp_path, backend="pyav")
    assert loader.backend == "pyav" and loader.backend_note is None
    loader = MediaLoader(tmp_path)
    assert loader.backend == "pyav" and "Could not load libtorchcodec" in loader.backend_note
    with pytest.raises(RuntimeError, match="torchcodec.*Could not load.*pyav"):
        MediaLoader(tmp_path, backend="torchcodec")
    with pytest.raises(ValueError, match="backend"):
        MediaLoader(tmp_path, backend="opencv")


def test_torchcodec_shows_the_same_pictures(tmp_path):
    from maple_trl.omni.media.loader import torchcodec_problem

    if problem := torchcodec_problem():
        pytest.skip(f"torchcodec cannot be used here: {problem}")
    files.write_video(tmp_path / "a.mp4", **VFR, time_base=Fraction(1, 1000))
    ours, theirs = (MediaLoader(tmp_path, backend=b).video("a.mp4") for b in ("pyav", "torchcodec"))
    np.testing.assert_array_equal(ours.timestamps, theirs.timestamps)
    assert np.abs(ours.frames.astype(int) - theirs.frames).mean() < 4


def test_probe(tmp_path):
    files.write_video(tmp_path / "a.mp4", frames=48, audio=files.tone(2, 16000))
    files.write_audio(tmp_path / "a.mp3", files.tone(2, 16000), codec="libmp3lame")
    loader = MediaLoader(tmp_path)
    info = loader.probe("a.mp4")
    assert (info.has_video, info.has_audio, info.width, info.height) == (True, True, 64, 48)
    assert info.duration == pytest.approx(2, abs=0.1) and info.format.startswith("mov") and info.path.endswith("a.mp4")
    info = loader.probe("a.mp3")
    assert (info.has_video, info.has_audio, info.width, info.format) == (False, True, None, "mp3")
    assert not loader.decodes


def test_errors_are_documented_and_cross_processes():
    error = MediaError("too-long", "a.mp4", "301 s")
    again = copy.copy(error)  # the way that pickling takes, too
    assert (again.reason, again.path, again.detail, str(again)) == ("too-long", "a.mp4", "301 s", str(error))
    assert MediaError("no-signal", None, "").detail == REASONS["no-signal"]
    with pytest.raises(KeyError, match="documented"):
        MediaError("whatever", None, "")


# Real clips


@pytest.mark.skipif(not REAL_CLIPS, reason=f"no real clips under {REAL}; set MAPLE_TRL_DAILY_OMNI to the data set")
@pytest.mark.parametrize("path", REAL_CLIPS, ids=lambda path: path.parent.name)
@pytest.mark.matrix(cases=1)
def test_real_clips(path):
    loader = MediaLoader(REAL, MediaLimits(num_frames=6))
    clip, sound = loader.video(path), loader.audio(path)
    pictures = files.all_pictures(path)
    chosen = np.linspace(0, len(pictures) - 1, 6).round().astype(int)
    assert_same_pictures(clip, [pictures[i][1] for i in chosen])
    np.testing.assert_allclose(clip.timestamps, [pictures[i][0] for i in chosen], atol=0.05)
    assert clip.frames.shape == (6, 224, 420, 3) and set(clip.notes) == {"resized"}
    assert sound.duration == pytest.approx(clip.duration, abs=0.05) and sound.waveform.std() > 0.01
