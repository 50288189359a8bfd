"""
Small files that claim to be huge, or become so: each is refused by name or decoded, within the bounds that `docs/safety.md` states.

Measured where it happens: the peak memory of the decoder process, and what this process keeps.
"""

import io
import re
import struct
import time
import wave
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import media_files as files
import psutil
import pytest
from PIL import Image, PngImagePlugin

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.media.workers import DecoderPool, decoder_pool
from maple_trl.reports.media import MediaTable, thumbnail


SECONDS, BYTES = 60.0, 1 << 30
"""Of a clip, and of the decoder process, which they end."""

OWN_BYTES = 200 << 20
"""By which this process grows at most: a decoded clip is some MiB."""

OVERHEAD = 96 << 20
"""Of a decoder process: what is shared with others (libraries, files in memory) is not limited."""

BOMBS = {}
_WORKERS = 1


def bomb(name, *reasons):
    """Registers what writes a file of this name; `None` among the reasons where it may be decoded as well."""

    def register(write):
        BOMBS[name] = write, set(reasons)
        return write

    return register


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, colour, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def zeros(count, level=9):
    """Zeros, compressed a thousandfold, made piece by piece."""
    packer = zlib.compressobj(level)
    piece = bytes(1 << 20)
    return b"".join(packer.compress(piece) for _ in range(count >> 20)) + packer.flush()


# Pictures


@bomb("claims.png", "frame-too-large")
def _(path):
    path.write_bytes(png(100_000, 100_000, 2, chunk(b"IDAT", zlib.compress(bytes(1000)))))


@bomb("largest.png", None)
def _(path):
    """As large as is decoded, of 260 KiB."""
    path.write_bytes(png(8192, 8192, 2, chunk(b"IDAT", zeros(8192 * (8192 * 3 + 1) + (1 << 20)))))


@bomb("text.png", "unreadable", None)
def _(path):
    path.write_bytes(
        png(8, 8, 2, chunk(b"zTXt", b"a\0\0" + zeros(96 << 20)), chunk(b"IDAT", zlib.compress(bytes(200))))
    )


@bomb("profile.png", "unreadable", None)
def _(path):
    path.write_bytes(
        png(8, 8, 2, chunk(b"iCCP", b"a\0\0" + zeros(96 << 20)), chunk(b"IDAT", zlib.compress(bytes(200))))
    )


@bomb("frames.png", None)
def _(path):
    """Of 2 000 000 000 pictures, as its header says."""
    whole = io.BytesIO()
    Image.new("RGB", (64, 64)).save(whole, "PNG", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")])
    data = whole.getvalue()
    at = data.index(b"acTL")
    path.write_bytes(data[: at - 4] + chunk(b"acTL", struct.pack(">II", 2_000_000_000, 0)) + data[at + 16 :])


@bomb("screen.gif", "frame-too-large", "unreadable", "truncated")
def _(path):
    path.write_bytes(
        b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\0\0\0"
        + b","
        + struct.pack("<HHHH", 0, 0, 1, 1)
        + b"\0\2\2D\1\0;"
    )


@bomb("canvas.webp", "frame-too-large", "unreadable", "truncated", "not-media")
def _(path):
    whole = io.BytesIO()
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    images[0].save(whole, "WEBP", save_all=True, append_images=images[1:])
    data = bytearray(whole.getvalue())
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = b"\xff\xff\x00" * 2  # 65536 x 65536
    path.write_bytes(data)


# Videos


@bomb("claims.ivf", "frame-too-large", "unreadable")
def _(path):
    head = b"DKIF" + struct.pack("<HH4sHHIIII", 0, 32, b"VP80", 65535, 65535, 25, 1, 1, 0)
    path.write_bytes(head + struct.pack("<IQ", 10, 0) + b"\x10\x02\x00\x9d\x01\x2a\xff\x3f\xff\x3f")


@bomb("claims.avi", "frame-too-large", "unreadable", None)  # whose pictures say themselves how large they are
def _(path):
    files.write_video(path, codec="mpeg4")
    data = bytearray(path.read_bytes())
    at = data.index(b"strf") + 8 + 4
    data[at : at + 8] = struct.pack("<II", 100_000, 100_000)
    path.write_bytes(data)


@bomb("frames.mp4", "unreadable", "truncated", "decoder-memory", "decode-timeout", "no-frames")
def _(path):
    """Of 2 000 000 000 pictures of one size, as its tables say."""
    files.write_video(path)
    data = bytearray(path.read_bytes())
    for table, form in ((b"stsz", ">III"), (b"stts", ">III")):
        at = data.index(table) + 4
        values = (0, 16, 2_000_000_000) if table == b"stsz" else (0, 1, 2_000_000_000)
        data[at : at + 12] = struct.pack(form, *values)
    path.write_bytes(data)


@bomb("lasting.mp4", "too-long")
def _(path):
    """Two pictures, a day apart."""
    files.write_video(path, frames=2, fps=1, pts=[0, 86_400], time_base=Fraction(1, 1))


@bomb("lasting.mkv", "too-long")
def _(path):
    """Two pictures, and a million seconds between them."""
    files.write_video(path, frames=2, fps=1, pts=[0, 10**6], time_base=Fraction(1, 1))


@bomb("fast.mp4", None)
def _(path):
    """A million pictures a second."""
    files.write_video(path, frames=300, fps=1000, pts=list(range(300)), time_base=Fraction(1, 1_000_000))


@bomb("thin.mp4", "bad-aspect-ratio")
def _(path):
    """A line, which would be a million lines high where it is made as wide as a thumbnail."""
    files.write_video(path, frames=2, size=(8000, 2))


def test_a_thumbnail_of_a_line_is_none(tmp_path):
    files.write_video(tmp_path / "thin.mp4", frames=2, size=(8000, 2))
    files.write_video(tmp_path / "plain.mp4", frames=2)
    assert thumbnail(tmp_path / "thin.mp4") is None and thumbnail(tmp_path / "plain.mp4")


@pytest.mark.parametrize(
    "name", ["a\0b.mp4", "loop.mp4", "x" * 5000, "../out.mp4", "/etc/passwd", "file:///etc/passwd"]
)
def test_a_report_shows_no_medium_that_is_none_of_the_run(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    files.write_video(tmp_path / "out.mp4", frames=2)
    table = MediaTable(root, tmp_path, 9)
    (entry,) = [table.entries[table.add("video", name)]]
    assert entry["why"] and not {"href", "thumb"} & set(entry)


# Sounds


@bomb("claims.wav", "truncated")
def _(path):
    files.write_audio(path, files.tone(0.5, 16000))
    data = bytearray(path.read_bytes())
    at = data.index(b"data")
    data[4:8], data[at + 4 : at + 8] = struct.pack("<I", 0xFFFFFFF0), struct.pack("<I", 0xFFFFFFB0)
    path.write_bytes(data)


@bomb("hours.wav", "too-long")
def _(path):
    """Ten hours of silence, in a file with a hole."""
    seconds, rate = 36_000, 8000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 1, rate, 0, "NONE", ""))
        file.writeframes(b"")
    data = bytearray(path.read_bytes())
    data[4:8], data[40:44] = struct.pack("<I", 36 + seconds * rate), struct.pack("<I", seconds * rate)
    path.write_bytes(data)
    with open(path, "r+b") as file:
        file.truncate(44 + seconds * rate)


@bomb("channels.wav", "unreadable", "truncated", "audio-too-short", "decoder-memory", None)
def _(path):
    """65 535 channels of 4 294 967 295 samples a second."""
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 65535, 0xFFFFFFFF, 0xFFFFFFFF, 65534, 16)
    body = b"WAVE" + head + b"data" + struct.pack("<I", 1 << 18) + bytes(1 << 18)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


# Subtitles


@bomb("endless.srt", "bad-subtitle")
def _(path):
    """64 GiB, all of it a hole."""
    with open(path, "wb") as file:
        file.truncate(64 << 30)


@bomb("entities.ttml", "bad-subtitle")
def _(path):
    names = "".join(f"<!ENTITY e{i} '{f'&e{i - 1};' * 10}'>" for i in range(1, 12))
    path.write_text(
        f"<?xml version='1.0'?><!DOCTYPE tt [<!ENTITY e0 'x'>{names}]><tt><body><p begin='0s'>&e11;</p></body></tt>"
    )


@bomb("zipped.srt", "bad-subtitle")
def _(path):
    data = zeros(8 << 20)
    for _ in range(3):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.srt", data)
        data = packed.getvalue()
    path.write_bytes(data)


@bomb("dense.ass", "bad-subtitle", None)
def _(path):
    """Half a MiB of overrides in one line."""
    head = (
        "[Script Info]\n\n[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
    )
    path.write_text(head + "Dialogue: 0,0:00:00.00,0:00:02.00,Default,,0,0,0,," + "{\\i1}a" * 90_000 + "{\\" * 5000)


@pytest.fixture(scope="module")
def pool() -> DecoderPool:
    return decoder_pool(_WORKERS, BYTES, "pyav")


def peak(pool) -> int:
    """The most memory that a decoder process has had."""
    status = [Path(f"/proc/{pid}/status") for pid in pool.pids]
    return max(
        (int(re.search(r"VmHWM:\s+(\d+)", path.read_text())[1]) << 10 for path in status if path.exists()), default=0
    )


@pytest.mark.parametrize("overlong", ["quarantine", "trim", "spread"])
@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.matrix(cases=9)
def test_what_claims_or_becomes_too_much_is_refused_within_bounds(tmp_path, pool, name, overlong):
    write, reasons = BOMBS[name]
    if overlong != "quarantine" and not reasons & {"too-long"}:
        pytest.skip("is not refused for its length")
    write(tmp_path / name)
    size = (tmp_path / name).stat().st_blocks * 512
    assert size < 2 << 20, "a bomb is small"
    # All packets of ten hours are read to find where they end, and again for each part: that may be given up.
    seconds, reasons = (5.0, {*reasons, "decode-timeout"}) if overlong == "spread" else (SECONDS, reasons)
    limits = MediaLimits(decode_timeout=seconds, max_seconds=60.0, overlong=overlong)
    loader = MediaLoader(tmp_path, limits, backend="pyav", workers=_WORKERS, worker_bytes=BYTES)
    kinds = {"png": "image", "gif": "image", "webp": "image", "wav": "audio"}
    kind = kinds.get(name.rpartition(".")[2], "subtitle" if "bad-subtitle" in reasons else "video")
    pool.close()  # so that the peak is that of this file
    before, own, started = psutil.Process().memory_info().rss, time.process_time(), time.monotonic()
    try:
        found = getattr(loader, kind)(name)
    except MediaError as error:
        assert error.reason in reasons - ({"too-long"} if overlong != "quarantine" else set()), str(error)
    else:
        assert None in reasons or overlong != "quarantine"
        assert kind != "audio" or found.duration <= 61
    # A process is ended a second after its time is over; starting one takes a moment on a machine that is busy.
    assert time.monotonic() - started < SECONDS + 30
    assert time.process_time() - own < 5
    assert psutil.Process().memory_info().rss - before < OWN_BYTES
    assert peak(pool) < BYTES + OVERHEAD


@pytest.mark.long
def test_what_is_measured_would_see_more(tmp_path, pool):
    """The control: a decoder process that is allowed more takes more, and this shows."""
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b")
    Image.new("RGBA", (8000, 8000)).save(tmp_path / "a.png", pnginfo=text, compress_level=1)
    roomy = decoder_pool(_WORKERS, 4 << 30, "pyav")
    MediaLoader(tmp_path, backend="pyav", workers=_WORKERS, worker_bytes=4 << 30).image("a.png")
    assert peak(roomy) > BYTES + OVERHEAD
    roomy.close()
    small = MediaLoader(tmp_path, backend="pyav", workers=_WORKERS, worker_bytes=BYTES)
    with pytest.raises(MediaError) as caught:
        small.image("a.png")
    assert caught.value.reason == "decoder-memory"
