"""Clips longer than is read at once: pictures over their whole length, sound in parts that are spread over it."""

import struct
import tracemalloc
from fractions import Fraction

import av
import media_files
import numpy as np
import pytest
from timed_clips import SIDE, Timed, number_of, picture_of, write

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media import decode
from maple_trl.omni.media.clips import ClipRequest, Source
from maple_trl.omni.media.loader import MediaLimits, MediaLoader


MINUTES, RATE = 20, 8000
SECONDS = 60 * MINUTES


def minute_tone(start, count):
    """A tone of its own for each minute: 400 Hz, 500 Hz, …"""
    times = (start + np.arange(count)) / RATE
    return (16000 * np.sin(2 * np.pi * (400 + 100 * np.floor(times / 60)) * times)).astype(np.int16)


def minute_of(waveform, rate):
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return round((spectrum.argmax() * rate / len(waveform) - 400) / 100)


def write_long(path):
    """Twenty minutes: a numbered picture each second, and a tone that says the minute."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=1, options={"preset": "ultrafast", "threads": "1"})
        video.width = video.height = SIDE
        video.pix_fmt, video.codec_context.gop_size = "yuv420p", 8
        audio = out.add_stream("pcm_mulaw", rate=RATE, layout="mono")  # quick to encode
        for second in range(SECONDS):
            frame = av.VideoFrame.from_ndarray(picture_of(second % 256), format="rgb24")
            frame.pts, frame.time_base = second, Fraction(1)
            out.mux(video.encode(frame))
            sound = av.AudioFrame.from_ndarray(minute_tone(second * RATE, RATE)[None], format="s16", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = RATE, second * RATE, Fraction(1, RATE)
            out.mux(audio.encode(sound))
        out.mux([*video.encode(None), *audio.encode(None)])
    return path


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return write_long(tmp_path_factory.mktemp("long") / "long.mov")


def loader(path, overlong="spread", **limits):
    return MediaLoader(path.parent, MediaLimits(overlong=overlong, **limits), workers=0, backend="pyav")


@pytest.mark.slow
def test_pictures_span_the_whole_clip(long):
    chosen = np.linspace(0, SECONDS - 1, 32).round().astype(int)
    clip = loader(long, num_frames=32, max_seconds=300).video(long.name)
    assert [number_of(frame) for frame in clip.frames] == [second % 256 for second in chosen]
    np.testing.assert_allclose(clip.timestamps, chosen)
    assert clip.duration == pytest.approx(SECONDS) and "trimmed" not in clip.notes
    # By rate, with a limit: as many as it allows, over the whole as well.
    clip = loader(long, num_frames=None, fps=1.0, max_frames=16, max_seconds=300).video(long.name)
    assert len(clip.frames) == 16 and clip.timestamps[-1] == SECONDS - 1
    # Negative controls: what was done with such a clip before.
    assert loader(long, "trim", num_frames=32, max_seconds=300).video(long.name).timestamps[-1] < 300
    for kind in ("video", "audio"):
        with pytest.raises(MediaError, match="over 300 s, which is the limit"):
            getattr(loader(long, "quarantine", max_seconds=300), kind)(long.name)


class Counting:
    """In place of a deadline: counts how often a frame was asked for."""

    count = 0

    def check(self):
        self.count += 1


@pytest.mark.slow
def test_most_of_a_long_clip_is_not_decoded(long):
    source, limits = Source(long.name, str(long)), MediaLimits(num_frames=32, overlong="spread")
    choice, _ = decode._chosen(source, limits, ClipRequest(), Counting())
    asked = {}
    for seek in (True, False):
        asked[seek] = Counting()
        assert len(list(decode._pick(source, limits, choice.line, choice.ticks, asked[seek], seek))) == 32
    assert asked[True].count < SECONDS / 3 < SECONDS <= asked[False].count + 1


@pytest.mark.slow
def test_sound_is_heard_in_parts_over_the_whole_clip(long):
    clip = loader(long, max_seconds=60).audio(long.name, sampling_rate=RATE)
    assert clip.duration == 60 and clip.source_seconds == pytest.approx(SECONDS, abs=0.3)
    assert clip.notes == ("sound-spread",)
    starts = np.linspace(0, clip.source_seconds - 10, 6)
    parts = clip.waveform.reshape(6, -1)
    # The middle of a part, that of the sound from which it must come.
    assert [minute_of(part[4 * RATE : 6 * RATE], RATE) for part in parts] == [int((s + 5) // 60) for s in starts]
    assert starts[0] == 0 and starts[-1] + 10 == clip.source_seconds
    # Of a segment, over the segment; and of one that is short enough, all.
    segment = loader(long, max_seconds=60).audio(long.name, sampling_rate=RATE, request=ClipRequest(300, 900))
    assert segment.source_seconds == 600 and minute_of(segment.waveform[:RATE], RATE) == 5
    assert minute_of(segment.waveform[-RATE:], RATE) == 14
    short = loader(long, max_seconds=60).audio(long.name, sampling_rate=RATE, request=ClipRequest(300, 340))
    assert short.source_seconds is None and short.duration == 40 and short.notes == ()
    # Negative control: its beginning, of which all is the first minute.
    trimmed = loader(long, "trim", max_seconds=60).audio(long.name, sampling_rate=RATE)
    assert {minute_of(part, RATE) for part in trimmed.waveform.reshape(6, -1)} == {0}


@pytest.mark.slow
def test_memory_follows_what_is_fed(long):
    peaks = {}
    for seconds, request in ((60, ClipRequest()), (400, ClipRequest(0, 400))):
        tracemalloc.start()
        loader(long, max_seconds=seconds).audio(long.name, sampling_rate=RATE, request=request)
        peaks[seconds] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[60] < 4 * RATE * SECONDS / 8 < 4 * RATE * 400 <= peaks[400]


def test_a_sound_without_a_length_in_its_header(tmp_path):
    wave = np.concatenate([media_files.tone(10, 16000, (frequency,)) for frequency in (400.0, 500.0, 600.0)], axis=1)
    data = bytearray(media_files.write_audio(tmp_path / "a.wav", wave).read_bytes())
    at = data.index(b"data")
    data[4:8] = data[at + 4 : at + 8] = struct.pack("<I", 0xFFFFFFFF)
    path = tmp_path / "pipe.wav"
    path.write_bytes(data)
    clip = loader(path, max_seconds=4).audio(path.name)
    assert (clip.duration, clip.source_seconds, clip.notes) == (4, 30, ("sound-spread",))
    clip = loader(path, max_seconds=20).audio(path.name)  # two parts of ten seconds: the first and the last tone
    assert [minute_of(part, 16000) for part in clip.waveform.reshape(2, -1)] == [0, 2]
    assert loader(path, max_seconds=30).audio(path.name).source_seconds is None


@pytest.mark.parametrize("seconds", [20, 31, 35])
def test_parts_whose_lengths_are_rounded_are_not_trimmed(tmp_path, seconds):
    """Three parts of 35 s have 186666.7 samples each: rounded one by one, a sample more than 35 s."""
    path = media_files.write_audio(tmp_path / "a.wav", media_files.tone(40, 16000))
    clip = loader(path, max_seconds=seconds).audio(path.name)
    assert clip.notes == ("sound-spread",) and clip.source_seconds == 40
    assert seconds * 16000 - 1 <= len(clip.waveform) <= seconds * 16000


@pytest.mark.parametrize(
    "name, codec", [("a.flac", "flac"), ("a.mp3", "libmp3lame"), ("a.ogg", "libopus"), ("a.m4a", "aac")]
)
def test_parts_of_other_containers(tmp_path, name, codec):
    """With an index and without one, and with a codec's padding."""
    wave = np.concatenate([media_files.tone(10, 16000, (frequency,)) for frequency in (400.0, 500.0, 600.0)], axis=1)
    path = media_files.write_audio(tmp_path / name, wave, codec=codec)
    clip = loader(path, max_seconds=20).audio(path.name)
    assert clip.duration == pytest.approx(20, abs=0.1) and clip.source_seconds == pytest.approx(30, abs=0.1)
    parts = np.split(clip.waveform, [160_000])
    assert [minute_of(part[32_000:96_000], 16000) for part in parts] == [0, 2] and "sound-spread" in clip.notes


def test_a_header_that_claims_more_than_there_is(tmp_path):
    data = bytearray(write(tmp_path / "short.mkv", Timed(sound_end=4.0)).read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # the element Duration
    data[at : at + 8] = struct.pack(">d", 7200 * 1000)
    (tmp_path / "much.mkv").write_bytes(data)
    clip = loader(tmp_path / "much.mkv", max_seconds=5).audio("much.mkv")
    assert clip.duration == pytest.approx(4.0, abs=0.01) and clip.source_seconds is None and clip.notes == ()


def test_a_long_sound_that_ends_early(tmp_path):
    """Its header has another length than its packets: cut off, and not a shorter sound."""
    path = write(tmp_path / "clip.mkv", Timed(sound_end=12.0, pictures=120))
    data = path.read_bytes()
    tags = [at for at in range(len(data)) if data.startswith(b"00:00:12.0", at)]
    assert tags
    (tmp_path / "less.mkv").write_bytes(data.replace(b"00:00:12.0", b"00:00:32.0"))
    with pytest.raises(MediaError) as caught:
        loader(tmp_path / "less.mkv", max_seconds=5).audio("less.mkv")
    assert caught.value.reason == "truncated"
