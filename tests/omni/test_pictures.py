"""Picture files: what pixels a model gets of each kind, and what is refused, by which name."""

import io
import struct
import zlib

import numpy as np
import pytest
from media_files import picture, tone, write_audio, write_video
from PIL import Image

from maple_trl.data.benchmarks.media import UnusableMedium, write_still
from maple_trl.data.review.shelf import ClipShelf
from maple_trl.integrations.lmms_bridge import ROOT_FIELD, doc_to_visual
from maple_trl.omni.media.clips import ClipRequest
from maple_trl.omni.media.loader import MediaError, MediaLimits, MediaLoader


SIZE = (56, 84)  # height and width, whole patches of 28 pixels
EXACT = ("png", "bmp", "tiff", "ppm", "webp", "gif")


@pytest.fixture
def loader(tmp_path):
    with MediaLoader(tmp_path, MediaLimits(), workers=0) as loader:
        yield loader


def rgb():
    """A picture without symmetry, of few colours so that a palette holds it."""
    colours = np.random.default_rng(0).integers(0, 256, (16, 3), dtype=np.uint8)
    blocks = np.random.default_rng(1).integers(0, 16, (SIZE[0] // 14, SIZE[1] // 14)).repeat(14, 0).repeat(14, 1)
    return colours[blocks]


def reason(call):
    with pytest.raises(MediaError) as caught:
        call()
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize("suffix", [*EXACT, "jpg", "avif", "jp2"])
def test_each_format_gives_its_pixels(loader, tmp_path, suffix):
    options = {
        "webp": {"lossless": True},
        "jpg": {"quality": 100, "subsampling": 0},
        "avif": {"quality": 100, "subsampling": "4:4:4"},
    }
    Image.fromarray(rgb()).save(tmp_path / f"a.{suffix}", **options.get(suffix, {}))
    found = loader.image(f"a.{suffix}")
    off = np.abs(found.pixels.astype(int) - rgb())
    assert found.pixels.shape == (*SIZE, 3) and found.pixels.dtype == np.uint8 and not found.pixels.flags.writeable
    assert off.max() == 0 if suffix in (*EXACT, "jp2") else off.mean() < 2, off.max()
    assert not found.notes and loader.decodes["image", found.path] == 1
    assert loader.image(f"a.{suffix}") is found
    info = loader.probe_image(f"a.{suffix}")
    assert (info.height, info.width, info.duration) == (*SIZE, None)
    assert np.abs(found.pixels.astype(int) - rgb()[:, ::-1]).mean() > 10  # another picture is told apart


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright(loader, tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1)}
    turns |= {6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a)}
    upright = turns.get(orientation, lambda a: a)(rgb())
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(rgb()).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    found = loader.image(f"a.{suffix}").pixels
    assert found.shape == upright.shape and np.abs(found.astype(int) - upright).mean() < 2
    info = loader.probe_image(f"a.{suffix}")
    assert (info.height, info.width) == upright.shape[:2]


def test_what_shines_through_is_white(loader, tmp_path):
    alpha = np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint8)
    Image.fromarray(np.dstack([rgb(), alpha])).save(tmp_path / "rgba.png")
    share = alpha[..., None] / 255
    over = rgb() * share + 255 * (1 - share)
    assert np.abs(loader.image("rgba.png").pixels - over).max() <= 1
    assert np.abs(rgb() - over).max() > 100  # as plain RGB it would be another picture
    grey = rgb()[..., 0]
    Image.fromarray(np.dstack([grey, alpha])).save(tmp_path / "la.png")
    assert np.abs(loader.image("la.png").pixels - (grey[..., None] * share + 255 * (1 - share))).max() <= 1
    # A palette of which one colour shines through, and one colour of plain RGB that does.
    few = Image.fromarray(rgb()).convert("P", palette=Image.Palette.ADAPTIVE)
    gone = few.getpixel((0, 0))
    few.save(tmp_path / "p.png", transparency=gone)
    shown = loader.image("p.png").pixels
    assert (shown[np.asarray(few) == gone] == 255).all()
    kept = np.asarray(few) != gone
    assert (shown[kept] == np.asarray(few.convert("RGB"))[kept]).all()
    colour = tuple(map(int, rgb()[0, 0]))
    Image.fromarray(rgb()).save(tmp_path / "key.png", transparency=colour)
    shown = loader.image("key.png").pixels
    assert (shown[(rgb() == colour).all(-1)] == 255).all() and (shown != 255).any()


def test_other_colours_become_rgb(loader, tmp_path):
    grey = rgb()[..., 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    assert (loader.image("l.png").pixels == grey[..., None]).all()
    Image.fromarray(grey > 128).save(tmp_path / "bits.png")
    assert (loader.image("bits.png").pixels == (grey > 128)[..., None] * 255).all()
    wide = np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE) * 13
    for name in ("wide.png", "wide.tiff"):
        Image.fromarray(wide).save(tmp_path / name)
        assert (loader.image(name).pixels == (wide >> 8)[..., None]).all()
    Image.fromarray(rgb()).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(loader.image("cmyk.jpg").pixels.astype(int) - rgb()).mean() < 4
    Image.fromarray(wide.astype(np.float32)).save(tmp_path / "float.tiff")
    assert reason(lambda: loader.image("float.tiff")) == (
        "unreadable",
        "its samples have 32 bits (mode F) of no known range",
    )


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_several_pictures_the_first_is_taken_and_told(loader, tmp_path, suffix):
    frames = [Image.fromarray(rgb()), Image.fromarray(rgb()[::-1].copy())]
    options = {"webp": {"lossless": True}}.get(suffix, {})
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    found = loader.image(f"a.{suffix}")
    assert (found.pixels == rgb()).all() and found.notes == ("first-picture",)
    assert loader.notes == {"first-picture": 1}


def test_sizes_follow_the_limits_and_the_row(tmp_path):
    Image.fromarray(picture(3, 300, 500)).save(tmp_path / "a.png")
    stored = Image.open(tmp_path / "a.png")
    with MediaLoader(tmp_path, MediaLimits(max_pixels=64 * 784), workers=0) as loader:
        shown = loader.image("a.png").pixels
        assert shown.shape == (168, 280, 3)  # 6 x 10 patches
        reference = np.asarray(stored.resize((280, 168), Image.Resampling.BICUBIC))
        assert (shown == reference).all()
        assert loader.image("a.png", max_pixels=10 * 784).pixels.shape[:2] == (56, 112)
        assert loader.image("a.png", multiple=32).pixels.shape[:2] == (160, 288)
        size = ClipRequest(resized_height=90, resized_width=50)
        assert loader.image("a.png", request=size).pixels.shape[:2] == (84, 56)
        assert loader.image("a.png", request=ClipRequest(max_pixels=4 * 784)).pixels.shape[:2] == (28, 56)
        with pytest.raises(ValueError, match="max_pixels=100 is less than one patch"):
            loader.image("a.png", max_pixels=100)
        Image.new("RGB", (8000, 20)).save(tmp_path / "line.png")
        assert reason(lambda: loader.image("line.png"))[0] == "bad-aspect-ratio"
        Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
        assert (loader.image("dot.png").pixels == [255, 0, 0]).all()


def png_header(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8193, 8192), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_a_header_that_claims_too_much_is_refused_before_it_is_decoded(loader, tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    for call in (loader.image, loader.probe_image):
        why, detail = reason(lambda call=call: call("bomb.png"))
        assert why == "frame-too-large" and detail.endswith("; at most 67108864 pixels are decoded")
    (tmp_path / "small.png").write_bytes(png_header(56, 56))  # whose data end early
    assert reason(lambda: loader.image("small.png"))[0] in ("truncated", "unreadable")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff", "avif", "jp2"])
def test_a_file_that_was_cut_off_is_named(loader, tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    for part in (0.3, 0.9, 0.99):
        (tmp_path / f"cut.{suffix}").write_bytes(data[: int(len(data) * part)])
        found = reason(lambda: loader.image(f"cut.{suffix}"))
        assert found[0] in ("truncated", "unreadable") or (
            suffix == "avif" and "(AVIF), but its header is damaged or cut off" in found[1]
        )
        assert found[0] == "truncated" or suffix not in ("jpg", "gif", "webp", "bmp", "tiff")
    loader.image(f"whole.{suffix}")


def test_damaged_data_end_in_a_verdict_whatever_they_are(loader, tmp_path):
    rng = np.random.default_rng(0)
    seen = set()
    for suffix in ("jpg", "png", "webp", "gif", "tiff", "jp2", "bmp"):
        stream = io.BytesIO()
        Image.fromarray(rgb()).save(stream, {"jpg": "JPEG", "jp2": "JPEG2000"}.get(suffix, suffix))
        for attempt in range(20):
            data = bytearray(stream.getvalue())
            for at in rng.integers(0, len(data), 6):
                data[at] = rng.integers(0, 256)
            (tmp_path / f"{attempt}.{suffix}").write_bytes(data)
            try:
                seen.add(loader.image(f"{attempt}.{suffix}").pixels.dtype.name)
            except MediaError as error:
                seen.add(error.reason)
    assert {"uint8", "unreadable"} <= seen


def test_what_is_no_picture_is_named(loader, tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"<!DOCTYPE html><title>404</title>")
    why, detail = reason(lambda: loader.image("page.jpg"))
    assert why == "not-media" and "a web page" in detail and "JPEG" in detail
    (tmp_path / "lower.jpg").write_bytes(b"\xef\xbb\xbf\n  <!doctype html><title>404</title>")
    assert "a web page" in reason(lambda: loader.image("lower.jpg"))[1]
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert reason(lambda: loader.image("script.png"))[0] == "not-media"  # Pillow would run Ghostscript for it
    (tmp_path / "head.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(99))
    why, detail = reason(lambda: loader.image("head.jpg"))
    assert why in ("not-media", "unreadable", "truncated")
    (tmp_path / "none.png").write_bytes(b"")
    assert reason(lambda: loader.image("none.png"))[0] == "empty-file"
    (tmp_path / "folder.png").mkdir()
    assert reason(lambda: loader.image("folder.png")) == ("not-found", "not a regular file")
    assert reason(lambda: loader.image("gone.png"))[0] == "not-found"
    assert reason(lambda: loader.image("../out.png"))[0] == "outside-media-root"
    assert reason(lambda: loader.image("https://x.org/a.png"))[0] == "network-not-allowed"
    with MediaLoader(tmp_path, allow_network=True, workers=0) as online:
        why, detail = reason(lambda: online.image("https://x.org/a.png"))
        assert why == "network-not-allowed" and "pictures are read from the media root only" in detail


def test_a_clip_and_a_picture_in_each_others_place_are_told_apart(loader, tmp_path):
    write_video(tmp_path / "a.mp4")
    write_audio(tmp_path / "a.wav", tone(0.5, 16000))
    Image.fromarray(rgb()).save(tmp_path / "a.png")
    assert reason(lambda: loader.image("a.mp4"))[1].endswith("no picture: name it in field 'video'")
    assert reason(lambda: loader.image("a.wav"))[1].endswith("no picture: name it in field 'audio'")
    why, detail = reason(lambda: loader.video("a.png"))
    assert why == "not-media" and "a picture (PNG), which field 'image' takes" in detail


def test_what_a_camera_wrote_beside_the_picture_costs_no_row(loader, tmp_path):
    Image.fromarray(rgb()).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40, quality=95)
    assert loader.image("a.jpg").pixels.shape == (*SIZE, 3) and loader.probe_image("a.jpg").width == SIZE[1]


def test_a_decoder_process_gives_the_same_and_the_same_errors(tmp_path):
    Image.fromarray(picture(1, 200, 300)).save(tmp_path / "a.jpg")
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    with MediaLoader(tmp_path, workers=0) as here, MediaLoader(tmp_path, workers=1) as there:
        assert (here.image("a.jpg").pixels == there.image("a.jpg").pixels).all()
        assert reason(lambda: there.image("bomb.png")) == reason(lambda: here.image("bomb.png"))
        assert there.probe_image("a.jpg") == here.probe_image("a.jpg")


def test_a_photograph_with_an_embedded_one_is_one_picture(loader, tmp_path):
    """MPO: what phones write for depth and brightness beside the picture."""
    frames = [Image.fromarray(rgb()), Image.fromarray(rgb()[::-1].copy())]
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:], quality=100, subsampling=0)
    found = loader.image("a.mpo")
    assert not found.notes and np.abs(found.pixels.astype(int) - rgb()).mean() < 2


# Copies of pictures, for a benchmark's clips, for other models and for a page


def write_unusual(path):
    """A picture that is black where it is seen through, or one of 16 bits of a dark gray."""
    if path.stem == "clear":
        Image.fromarray(np.dstack([rgb() // 8, np.tile([0, 255], (SIZE[0], SIZE[1] // 2))]).astype(np.uint8)).save(
            path
        )
    else:
        Image.fromarray(np.full(SIZE, 40 << 8, dtype=np.uint16)).save(path)


@pytest.mark.parametrize("name", ["clear.png", "deep.png"])
def test_copies_show_the_picture_that_is_fed(loader, tmp_path, name):
    write_unusual(tmp_path / name)
    fed = loader.image(name).pixels.astype(int)
    write_still(tmp_path / "still.mp4", (tmp_path / name).read_bytes())
    asked = [{"role": "user", "content": "?"}]
    (handed,) = doc_to_visual({ROOT_FIELD: str(tmp_path), "prompt": asked, "image": name, "tag": "V"})
    with Image.open(ClipShelf(tmp_path, tmp_path / "copies").image({"image": name})) as copy:
        shown = np.asarray(copy)
    for pixels in (loader.video("still.mp4").frames[0], np.asarray(handed), shown):
        assert pixels.shape == fed.shape and np.abs(pixels - fed).mean() < 6
    assert fed.mean() < 200 and abs(fed - (255 if name == "deep.png" else 0)).mean() > 50  # another one is told apart


@pytest.mark.parametrize("suffix", ["avif", "jp2", "ppm", "tiff"])
def test_each_format_that_is_fed_can_be_reviewed(tmp_path, suffix):
    Image.fromarray(rgb()).save(tmp_path / f"a.{suffix}")
    with Image.open(ClipShelf(tmp_path, tmp_path / "copies").image({"image": f"a.{suffix}"})) as copy:
        assert np.abs(np.asarray(copy).astype(int) - rgb()).mean() < 12


def test_pictures_that_are_not_fed_are_not_copied(loader, tmp_path):
    Image.fromarray(np.zeros(SIZE, dtype=np.float32)).save(tmp_path / "a.tiff")
    assert reason(lambda: loader.image("a.tiff"))[0] == "unreadable"
    assert reason(lambda: ClipShelf(tmp_path, tmp_path / "copies").image({"image": "a.tiff"}))[0] == "unreadable"
    with pytest.raises(UnusableMedium, match="32 bits"):
        write_still(tmp_path / "a.mp4", (tmp_path / "a.tiff").read_bytes())
