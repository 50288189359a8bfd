"""Every container that is read, sound of any number of channels, and what stays refused: real files, written here."""

import itertools
import struct
from pathlib import Path

import av
import media_files as files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.data.benchmarks.base import CLIP_SUFFIXES
from maple_trl.omni.media.containers import declared_bytes
from maple_trl.omni.media.formats import FORMATS, TABLE, VIDEO_SUFFIXES, accepted, format_of, markdown_table
from maple_trl.omni.media.loader import MediaError, MediaLoader


SECONDS, FRAMES, RATE = 2, 48, 24

# Name -> demuxer and how the file is written. Sound is written apart where a container has none.
VIDEOS = {
    "a.mp4": ("mov", {}),
    "a.mov": ("mov", {}),
    "a.m4v": ("mov", {"format": "mp4"}),
    "a.3gp": ("mov", {"codec": "mpeg4"}),
    "a.mkv": ("matroska", {}),
    "a.webm": ("matroska", {"codec": "libvpx", "audio_codec": "libopus", "codec_options": {"cpu-used": "8"}}),
    "a.avi": ("avi", {"codec": "mpeg4", "audio_codec": "libmp3lame", "codec_options": {"bf": "2"}}),
    "h264.avi": ("avi", {"audio_codec": "pcm_s16le"}),
    "a.ts": ("mpegts", {}),
    "a.mts": ("mpegts", {"format": "mpegts", "codec": "mpeg2video", "audio_codec": "ac3"}),
    "a.m2ts": ("mpegts", {"format": "mpegts", "options": {"mpegts_m2ts_mode": "1"}}),
    "a.mpg": ("mpeg", {"codec": "mpeg1video", "audio_codec": "mp2"}),
    "a.vob": ("mpeg", {"format": "vob", "codec": "mpeg2video", "audio_codec": "ac3"}),
    "a.wmv": ("asf", {"format": "asf", "codec": "wmv2", "audio_codec": "libmp3lame"}),
    "a.asf": ("asf", {"codec": "mpeg4", "audio_codec": "libmp3lame"}),
    "a.flv": ("flv", {"codec": "flv", "audio_codec": "libmp3lame", "audio_rate": 44100}),
    "h264.flv": ("flv", {}),
    "a.mxf": ("mxf", {"codec": "mpeg2video", "audio_codec": "pcm_s16le", "fps": 25}),
    "a.nut": ("nut", {}),
    "a.ivf": ("ivf", {"codec": "libvpx", "audio": None, "codec_options": {"cpu-used": "8"}}),
    "a.gif": ("gif", {"codec": "gif", "audio": None}),
    "a.m2v": ("mpegvideo", {"format": "mpeg2video", "codec": "mpeg2video", "audio": None}),
}
# Name -> demuxer, codec, format, rate, and how many seconds its length may be off: whole codec frames, and delays.
SOUNDS = {
    "a.wav": ("wav", "pcm_s16le", None, 48000, 0),
    "a.w64": ("w64", "pcm_s16le", None, 48000, 0),
    "rf64.wav": ("wav", "pcm_s24le", None, 48000, 0),
    "a.mp3": ("mp3", "libmp3lame", None, 48000, 0.05),
    "a.mp2": ("mp3", "mp2", None, 48000, 0.05),
    "a.flac": ("flac", "flac", None, 48000, 0),
    "a.m4a": ("mov", "aac", "ipod", 48000, 0.05),
    "a.mka": ("matroska", "libopus", None, 48000, 0.05),
    "a.ogg": ("ogg", "libopus", "ogg", 48000, 0.05),
    "a.opus": ("ogg", "libopus", "ogg", 48000, 0.05),
    "a.aac": ("aac", "aac", "adts", 48000, 0.08),
    "a.aiff": ("aiff", "pcm_s16be", None, 48000, 0),
    "a.amr": ("amr", "libopencore_amrnb", None, 8000, 0.05),
    "a.wma": ("asf", "wmav2", "asf", 44100, 0.1),
    "a.caf": ("caf", "pcm_s16le", None, 48000, 0),
    "a.au": ("au", "pcm_s16be", None, 48000, 0),
    "a.ac3": ("ac3", "ac3", None, 48000, 0.05),
    "a.eac3": ("eac3", "eac3", None, 48000, 0.05),
    "a.wv": ("wv", "wavpack", None, 48000, 0),
    "a.tta": ("tta", "tta", None, 48000, 0),
    "a.voc": ("voc", "pcm_s16le", None, 48000, 0.02),
}


# A part of these is never taken for a whole.
WITH_LENGTH = ("mov", "matroska", "avi", "asf", "gif", "wav", "w64", "aiff", "caf", "au", "wv", "flac")


def write_sound(path, codec, wave, rate, form=None, layout="mono", **options):
    """float32 (channels, samples), by way of packed samples: PyAV miscounts the planes of 8 and more channels."""
    with av.open(str(path), "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 12200 if "amr" in codec else 48000 * len(wave) + 80000
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.T).reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate = rate
        context = stream.codec_context
        cut = av.AudioResampler(format=context.format, layout=layout, frame_size=context.frame_size or 1024)
        for piece in cut.resample(frame) + cut.resample(None):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path


def write_gif(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8"
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(files.picture(index, 48, 64), format="rgb24").reformat(format="rgb8")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("containers")
    for name, (_, options) in VIDEOS.items():
        if name == "a.gif":
            write_gif(root / name)
            continue
        rate = options.get("audio_rate", 48000)
        sound = files.tone(SECONDS, rate)
        files.write_video(root / name, **({"frames": FRAMES, "audio": sound, "audio_rate": rate} | options))
    for name, (_, codec, form, rate, _) in SOUNDS.items():
        options = {"rf64": "always"} if name == "rf64.wav" else {}
        write_sound(root / name, codec, files.tone(SECONDS, rate), rate, form, **options)
    return root


@pytest.fixture(scope="module")
def loader(folder):
    return MediaLoader(folder, backend="pyav")


def outcome(call):
    try:
        return call()
    except MediaError as error:
        return error.reason


def amplitude(wave, frequency=440.0, rate=16000):
    """Of a sine, in the middle of a sound."""
    middle = wave[len(wave) // 4 : -len(wave) // 4]
    turns = np.exp(-2j * np.pi * frequency * np.arange(len(middle)) / rate)
    return 2 * abs(np.mean(middle * turns))


# What is read


@pytest.mark.matrix(cases=5)
@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_of_every_container(folder, loader, name):
    demuxer, options = VIDEOS[name]
    info = loader.probe(name)
    assert info.format.split(",")[0] == demuxer and info.has_video and (info.width, info.height) == (64, 48)
    clip = loader.video(name)
    seconds = FRAMES / options.get("fps", RATE)
    assert clip.duration == pytest.approx(seconds, abs=0.05) and "extension-mismatch" not in clip.notes
    # Independent reference: all pictures decoded from the start, taken evenly by number.
    shown = [image for _, image in files.all_pictures(folder / name)]
    levels = [frame[-10:, -10:].mean() for frame in clip.frames]
    chosen = np.linspace(0, len(shown) - 1, 8).round().astype(int)
    assert levels == pytest.approx([shown[i][-10:, -10:].mean() for i in chosen], abs=12)
    if "audio" not in options:
        sound = loader.audio(name)
        assert info.has_audio and sound.duration == pytest.approx(SECONDS, abs=0.1)
        assert amplitude(sound.waveform) == pytest.approx(0.5, abs=0.05)
    else:
        assert loader.audio(name) is None


@pytest.mark.parametrize("name", SOUNDS)
def test_a_sound_of_every_container(folder, loader, name):
    demuxer, *_, slack = SOUNDS[name]
    info = loader.probe(name)
    assert info.format.split(",")[0] == demuxer and info.has_audio and not info.has_video
    sound = loader.audio(name)
    assert sound.duration == pytest.approx(SECONDS, abs=slack + 1e-4) and not sound.notes
    assert amplitude(sound.waveform) == pytest.approx(0.5, abs=0.1 if name == "a.amr" else 0.05)
    assert amplitude(sound.waveform, 880) < 0.05  # negative control
    assert outcome(lambda: loader.video(name)) == "no-video-track"


@pytest.mark.parametrize("name", [*VIDEOS, *SOUNDS])
def test_the_content_decides_whatever_the_name(folder, tmp_path, name):
    demuxer = (VIDEOS | SOUNDS)[name][0]
    (tmp_path / "x.bin").write_bytes((folder / name).read_bytes())
    loader = MediaLoader(tmp_path, backend="pyav")
    assert loader.probe("x.bin").format.split(",")[0] == demuxer
    clip = loader.video("x.bin") if name in VIDEOS else loader.audio("x.bin")
    assert "extension-mismatch" in clip.notes
    if name not in ("a.m4v", "a.mp2", "a.mp3", "a.aac", "a.eac3"):  # several share their first bytes, or have none
        assert format_of(str(folder / name)) is FORMATS[demuxer]


@pytest.mark.parametrize("name", [*VIDEOS, *SOUNDS])
@pytest.mark.matrix(cases=29)
def test_a_cut_file_is_refused_or_shorter_and_never_claims_its_whole_length(folder, tmp_path, loader, name):
    """Where the container has no length, what is left is a whole, shorter clip: MPEG streams are cut so on purpose."""
    demuxer = (VIDEOS | SOUNDS)[name][0]
    info, size = loader.probe(name), (folder / name).stat().st_size
    assert (declared_bytes(str(folder / name)) or 0) <= size
    cut = MediaLoader(tmp_path, backend="pyav")
    for part in (0.35, 0.7, 0.97):
        files.cut(folder / name, tmp_path / name, part)
        for kind in ("video", "audio"):
            if not getattr(info, f"has_{kind}"):
                continue
            result = outcome(lambda kind=kind: getattr(cut, kind)(name))
            if demuxer in WITH_LENGTH:
                assert result in ("truncated", "unreadable")
            elif not isinstance(result, str):  # sound may be stored after the pictures, which are then whole
                assert result.duration <= getattr(loader, kind)(name).duration + 0.05
            else:
                assert result in ("truncated", "unreadable", "not-media")


# Any number of channels


def riff(samples: np.ndarray, rate: int, kind: str) -> bytes:
    """A WAV file of (n, channels), with nothing said of where the channels' speakers stand."""
    code, width = {"u1": (1, 1), "<i2": (1, 2), "<i4": (1, 4), "<f4": (3, 4), "<f8": (3, 8)}[kind]
    channels, data = samples.shape[1], np.ascontiguousarray(samples.astype(kind)).tobytes()
    head = struct.pack("<HHIIHH", code, channels, rate, rate * channels * width, channels * width, 8 * width)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


SCALES = {
    "u1": (127.0, 128.0),
    "<i2": (32767.0, 0.0),
    "<i4": (2147483000.0, 0.0),
    "<f4": (1.0, 0.0),
    "<f8": (1.0, 0.0),
}


@given(
    channels=st.integers(1, 64),
    kind=st.sampled_from(sorted(SCALES)),
    rate=st.sampled_from([8000, 16000, 44100, 48000]),
    seed=st.integers(0, 99),
    workers=st.sampled_from([0, 1]),
)
def test_any_number_of_channels_becomes_their_mean(tmp_path_factory, channels, kind, rate, seed, workers):
    loudness = np.random.default_rng(seed).uniform(-1, 1, channels)  # of each channel; some stand against others
    wave = np.sin(2 * np.pi * 440 * np.arange(rate // 4) / rate)[:, None] * loudness
    scale, zero = SCALES[kind]
    path = tmp_path_factory.getbasetemp() / "channels.wav"
    path.write_bytes(riff(wave * scale + zero, rate, kind))
    sound = MediaLoader(path.parent, backend="pyav", workers=workers).audio(path.name)
    tolerance = 0.02 if kind == "u1" else 0.002
    assert amplitude(sound.waveform) == pytest.approx(abs(loudness.mean()), abs=tolerance)
    assert sound.duration == pytest.approx(0.25, abs=1e-3)


LAYOUTS = [
    ("m4a", "aac", "7.1"),
    ("m4a", "alac", "7.1(wide)"),
    ("mp4", "aac", "5.1"),
    ("mov", "pcm_s16le", "20C"),
    ("ts", "aac", "7.1"),
    ("mka", "pcm_f32le", "33C"),
    ("mka", "libopus", "7.1"),
    ("mka", "eac3", "5.1"),
    ("flac", "flac", "7.1"),
    ("flac", "flac", "6.1"),
    ("ogg", "libopus", "7.1"),
    ("wv", "wavpack", "hexadecagonal"),
    ("wv", "wavpack", "24C"),
    ("tta", "tta", "12C"),
    ("caf", "pcm_s16le", "22.2"),
    ("au", "pcm_s16be", "9C"),
    ("aiff", "pcm_s16be", "12C"),
    ("w64", "pcm_s16le", "64C"),
    ("wav", "pcm_f32le", "7.1.4"),
    ("wav", "pcm_s16le", "octagonal"),
]


# In this process and in another by turns: what is decoded does not depend on where.
@pytest.mark.parametrize(
    ("suffix", "codec", "layout", "workers"), [(*layout, number % 2) for number, layout in enumerate(LAYOUTS)]
)
def test_any_layout_of_any_container_becomes_mono(tmp_path, suffix, codec, layout, workers):
    count = av.AudioLayout(layout).nb_channels
    wave = np.repeat(files.tone(1, 48000), count, axis=0)
    wave[: count // 2] *= 0.5  # the louder half weighs as much as the other
    name = f"a.{suffix}"
    write_sound(tmp_path / name, codec, wave, 48000, layout=layout)
    sound = MediaLoader(tmp_path, backend="pyav", workers=workers).audio(name)
    expected = 0.5 - 0.25 * (count // 2) / count
    lossy = codec in ("aac", "libopus", "eac3")  # which leave out much of the low channel, and of equal ones
    assert amplitude(sound.waveform) == pytest.approx(expected, rel=0.35 if lossy else 0.005)


@pytest.mark.parametrize(("suffix", "form", "padding"), [("ac3", None, 0.03), ("aac", "adts", 0.07)])
def test_a_layout_that_changes_midway(tmp_path, suffix, form, padding):
    """As in broadcasts, and where files were joined: all of it is heard, each part as the mean of its own channels."""
    parts = []
    for number, layout in enumerate(("stereo", "5.1", "mono")):
        wave = np.repeat(files.tone(1, 48000) * (number + 1) / 4, av.AudioLayout(layout).nb_channels, axis=0)
        path = write_sound(tmp_path / f"{layout}.{suffix}", suffix, wave, 48000, form, layout)
        parts.append(path.read_bytes())
    (tmp_path / f"all.{suffix}").write_bytes(b"".join(parts))
    sound = MediaLoader(tmp_path, backend="pyav", workers=0).audio(f"all.{suffix}")
    assert sound.duration == pytest.approx(3, abs=3 * padding) and sound.notes == ()
    for number in range(3):
        middle = sound.waveform[int((number + 0.25) * 16000) : int((number + 0.75) * 16000)]
        assert amplitude(middle) == pytest.approx((number + 1) / 8, rel=0.35)  # the low channel loses most of it


@pytest.mark.parametrize("name", ["a.wav", "rf64.wav", "a.aiff", "h264.avi"])
def test_a_size_that_counts_its_own_header_cuts_nothing(folder, tmp_path, name):
    """A common slip of writers: the size of the whole file, where that of what follows is due."""
    data = bytearray((folder / name).read_bytes())
    size = len(data)
    place, form = {"rf64.wav": (20, "<Q"), "a.aiff": (4, ">I")}.get(name, (4, "<I"))
    assert abs(struct.unpack_from(form, data, place)[0] + 8 - size) <= 1
    struct.pack_into(form, data, place, size)
    (tmp_path / name).write_bytes(data)
    loader = MediaLoader(tmp_path, backend="pyav", workers=0)
    assert loader.audio(name).duration == pytest.approx(SECONDS, abs=0.001)
    (tmp_path / name).write_bytes(data[:-3000])
    assert outcome(lambda: loader.audio(name)) == "truncated"


def test_a_tag_behind_the_sound_is_no_sound(tmp_path):
    """As most files of WavPack have; what is broken within is refused as before."""
    data = write_sound(tmp_path / "a.wv", "wavpack", files.tone(4, 48000), 48000).read_bytes()
    loader = MediaLoader(tmp_path, backend="pyav", workers=0)
    for name, tag in {
        "id3": b"TAG" + bytes(125),
        "ape": b"APETAGEX" + struct.pack("<4I", 2000, 32, 0, 0) + bytes(8),
    }.items():
        (tmp_path / f"{name}.wv").write_bytes(data + tag)
        np.testing.assert_array_equal(loader.audio(f"{name}.wv").waveform, loader.audio("a.wv").waveform)
        (tmp_path / f"{name}.wv").write_bytes(data[: data.rindex(b"wvpk")] + tag)
        assert outcome(lambda name=name: loader.audio(f"{name}.wv")) in ("unreadable", "truncated")


# What stays refused


SECRET = "root:x:0:0:a line that no clip may show\n"


def scripts(secret: Path) -> dict[str, str]:
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\n"
    return {
        "concat": f"ffconcat version 1.0\nfile '{secret}'\n",
        "concat-safe": f"ffconcat version 1.0\nfile {secret.name}\nduration 2\n",
        "hls": f"{head}{secret}\n#EXT-X-ENDLIST\n",
        "m3u": f"#EXTM3U\n{secret}\n",
        "dash": f'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="1" bandwidth="1"><BaseURL>{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>',
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "pls": f"[playlist]\nFile1={secret}\n",
        "srt": "1\n00:00:00,000 --> 00:00:02,000\nwords\n",
        "vtt": "WEBVTT\n\n00:00.000 --> 00:02.000\nwords\n",
        "ass": "[Script Info]\nScriptType: v4.00+\n\n[Events]\nDialogue: 0,0:00:00.00,0:00:02.00,,,0,0,0,,words\n",
        "lrc": "[00:01.00]words\n",
        "ffmetadata": ";FFMETADATA1\ntitle=x\n",
        "vobsub": "# VobSub index file, v7 (do not modify this line!)\nsize: 720x576\n",
        "passwd": SECRET * 20,
    }


@pytest.mark.parametrize("suffix", ["txt", "m3u8", "mp4", "avi", "ts", "ogg", "gif", "aac", "mpg"])
def test_scripts_playlists_and_text_are_refused_under_every_name(tmp_path, suffix):
    secret = files.write_video(tmp_path / "secret.ts", format="mpegts")
    root = tmp_path / "root"
    root.mkdir()
    loader = MediaLoader(root, backend="pyav")
    for name, text in scripts(secret).items():
        (root / f"{name}.{suffix}").write_text(text)
        for kind in ("video", "audio", "probe"):
            with pytest.raises(MediaError) as caught:
                getattr(loader, kind)(f"{name}.{suffix}")
            assert caught.value.reason == "not-media" and "AVI (.avi)" in caught.value.detail
            assert "line that no clip" not in str(caught.value)
    # Negative control: FFmpeg by itself follows the first.
    with av.open(str(root / f"concat.{suffix}"), options={"safe": "0"}) as container:
        assert next(container.decode(video=0)).width == 64


def test_a_pattern_of_picture_names_is_no_clip(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (64, 48), (90 * i, 0, 0)).save(tmp_path / f"img{i}.png")
    loader = MediaLoader(tmp_path, backend="pyav")
    assert outcome(lambda: loader.video("img%d.png")) == "not-found"
    assert outcome(lambda: loader.video("img1.png")) == "not-media"
    (tmp_path / "img%d.png").write_bytes((tmp_path / "img0.png").read_bytes())
    assert outcome(lambda: loader.video("img%d.png")) == "not-media"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"#EXTM3U\n", "a playlist (HLS)"),
        (b"ffconcat version 1.0\n", "a concat script"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture (PNG)"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "a picture (JPEG)"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(99), "a picture (WebP)"),
        (b"PK\3\4" + bytes(99), "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><title>404</title>", "a web page"),
        (b"plain words\n" * 9, "is text"),
        (bytes(5000), "zeros"),
    ],
)
def test_an_error_names_what_was_found_and_what_is_read(tmp_path, data, words):
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(MediaError) as caught:
        MediaLoader(tmp_path, backend="pyav").audio("a.mp4")
    assert caught.value.reason == "not-media" and words in caught.value.detail and accepted() in caught.value.detail


def test_a_broken_file_of_an_accepted_container_is_no_other_thing(folder, tmp_path):
    loader = MediaLoader(tmp_path, backend="pyav")
    for name, (demuxer, *_) in (VIDEOS | SOUNDS).items():
        if demuxer in ("mpegts", "mpeg", "mpegvideo", "mp3", "aac", "ac3", "eac3"):
            continue  # nothing is left of these without their packets
        data = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(data[:32] + np.random.default_rng(0).bytes(600))
        reasons = {outcome(lambda kind=kind, name=name: getattr(loader, kind)(name)) for kind in ("video", "audio")}
        reasons = {reason for reason in reasons if isinstance(reason, str)}
        assert reasons <= {"unreadable", "truncated", "no-video-track", "no-frames", "audio-too-short"}, (
            name,
            reasons,
        )


# The table


def test_one_table_says_what_is_read():
    assert len(FORMATS) == len(TABLE)
    suffixes = list(itertools.chain.from_iterable(entry.suffixes for entry in TABLE))
    assert len(suffixes) == len(set(suffixes))
    available = {name for known in av.formats_available for name in known.split(",")}
    assert set(FORMATS) <= available
    written = {demuxer for demuxer, *_ in (VIDEOS | SOUNDS).values()}
    assert set(FORMATS) - written == {"dv", "dts", "ape"}  # no encoder for these here
    assert set(VIDEO_SUFFIXES) <= set(CLIP_SUFFIXES) and CLIP_SUFFIXES[0] == ".mp4" and ".avi" in CLIP_SUFFIXES
    follows = {
        "hls",
        "concat",
        "dash",
        "image2",
        "image2pipe",
        "sdp",
        "rtsp",
        "lavfi",
        "webm_dash_manifest",
        "srt",
        "vobsub",
    }
    assert not follows & set(FORMATS)


def test_the_page_shows_the_table():
    text = (Path(__file__).parents[2] / "docs" / "media.md").read_text(encoding="utf-8")
    assert markdown_table() in text, "run: python scripts/container_table.py"
