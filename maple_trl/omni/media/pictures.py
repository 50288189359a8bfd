"""One picture file to an array, with Pillow."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.clips import ClipRequest, MediaInfo, Picture, Source
from maple_trl.omni.media.containers import check_whole
from maple_trl.omni.media.formats import format_of, found_in
from maple_trl.omni.media.opening import MAX_SOURCE_PIXELS
from maple_trl.omni.media.sampling import MediaLimits, fit_size


FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is read, of what Pillow reads: none of them runs another program or names other files."""

_SEVERAL = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")  # what else an MPO file holds is another form of its picture
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
_STILLS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIF")
"""Brands of MP4 files that hold pictures."""

_ORIENTATION = 0x0112
_ASIDE = (5, 6, 7, 8)  # orientations that exchange width and height


@contextmanager
def opened_picture(source: Source) -> Iterator[Image.Image]:
    """Open a picture of an accepted format and a size that is decoded; Pillow's errors become ours."""
    Image.init()
    limit = f"at most {MAX_SOURCE_PIXELS} pixels are decoded"
    try:
        picture = Image.open(source.path, formats=[name for name in FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\d+ pixels", str(error))
        raise source.error("frame-too-large", f"{found[0] if found else error}; {limit}") from error
    except UnidentifiedImageError as error:
        raise source.error("not-media", _what_it_is(source.path)) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers of headers raise whatever damaged ones lead them to
        check_whole(source)
        raise _damaged(source, "Pillow", error) from error
    with picture:
        if picture.width * picture.height > MAX_SOURCE_PIXELS:
            raise source.error("frame-too-large", f"{picture.width}x{picture.height}; {limit}")
        yield picture


def _damaged(source: Source, where: str, error: Exception) -> MediaError:
    """Return what is wrong with a picture that Pillow fails on."""
    reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
    return source.error(reason, f"{where}: {type(error).__name__}: {error}")


def _what_it_is(path: str) -> str:
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:] in _STILLS:
        kind = _STILLS[head[8:]]
        if kind in Image.OPEN:
            return f"the content is a picture ({kind}), but its header is damaged or cut off"
        return f"the content is a picture ({kind}) that Pillow cannot read here: convert it to JPEG or PNG"
    container = format_of(path)
    if container is not None and container.demuxer != "gif":
        kind = "video" if container.video else "audio"
        return f"the content is {container.title} and no picture: name it in field '{kind}'"
    found = found_in(path).removesuffix(", which field 'image' takes")
    damaged = ", but its header is damaged" if found.startswith("a picture") or container else ""
    return f"the content is {found}{damaged}; pictures are read of the formats {', '.join(FORMATS)}"


def image_header(source: Source, limits: MediaLimits) -> MediaInfo:
    """
    Read what the header of a picture says.

    Raises:
        MediaError: `not-media`, `truncated`, `frame-too-large`, `unreadable`.
    """
    with opened_picture(source) as picture:
        if picture.format in ("GIF", "WEBP"):
            check_whole(source)
        try:
            # Of a TIFF, Pillow gives the upright size.
            aside = picture.format != "TIFF" and picture.getexif().get(_ORIENTATION) in _ASIDE
        except Exception:  # what a camera wrote beside the picture may be of any kind
            aside = False
        width, height = picture.size[::-1] if aside else picture.size
        return MediaInfo(source.path, True, False, None, width, height, str(picture.format).lower())


def decode_image(
    source: Source,
    limits: MediaLimits,
    multiple: int,
    min_pixels: int,
    max_pixels: int,
    request: ClipRequest,
) -> Picture:
    """
    Decode a picture, upright, and resize it.

    Args:
        source (`Source`): the file.
        limits (`MediaLimits`): of videos; none of them is a picture's.
        multiple (`int`): both sides become multiples of it.
        min_pixels, max_pixels (`int`): area.
        request (`ClipRequest`): the size that is wanted, if one is.

    Raises:
        MediaError: `not-media`, `truncated`, `unreadable`, `frame-too-large`, `bad-aspect-ratio`.
    """
    with opened_picture(source) as picture:
        if picture.format in ("GIF", "WEBP"):
            check_whole(source)
        notes = ["first-picture"] if picture.format in _SEVERAL and getattr(picture, "is_animated", False) else []
        _load(source, picture)
        try:
            rgb, turnable = upright_rgb(picture)
        except ValueError as error:
            raise source.error("unreadable", str(error)) from error
        notes += [] if turnable else ["bad-exif"]
    asked = rgb.size[::-1] if request.resized_height is None else (request.resized_height, request.resized_width)
    try:
        height, width = fit_size(*map(float, asked), multiple, min_pixels, max_pixels)
    except ValueError as error:
        raise source.error("bad-aspect-ratio", str(error)) from error
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(rgb)
    pixels.flags.writeable = False
    return Picture(pixels, source.path, tuple(notes))


def _load(source: Source, picture: Image.Image) -> None:
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever damaged data lead them to
        raise _damaged(source, f"begins as {picture.format}, but Pillow", error) from error


def upright_rgb(picture: Image.Image) -> tuple[Image.Image, bool]:
    """
    Return a picture as a model is fed it but for its size, and whether what it says of its orientation could be read.

    It is turned upright, in 8-bit RGB: what shines through is white, and of 16 bits the upper 8 are kept.

    Raises:
        ValueError: for samples of 32 bits, whose range is not known. Of a picture that is not loaded yet, what Pillow
            raises for damaged data.
    """
    picture.load()
    try:
        upright, turnable = ImageOps.exif_transpose(picture), True
    except Exception:  # what a camera wrote beside the picture may be of any kind
        upright, turnable = picture, False
    return _rgb(upright, picture.format), turnable


def _rgb(picture: Image.Image, form: str | None) -> Image.Image:
    if picture.mode in _WIDE or (picture.mode == "I" and form == "PNG"):
        wide = np.asarray(picture).astype(np.int32)
        return Image.fromarray((wide.clip(0, 0xFFFF) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"its samples have 32 bits (mode {picture.mode}) of no known range")
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return picture.convert("RGB")
