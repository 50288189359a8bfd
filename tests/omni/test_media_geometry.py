"""Pictures as a player shows them: turned, mirrored, and with pixels that are not square."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maple_trl.omni.media import decode
from maple_trl.omni.media.clips import ClipRequest, Source
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.media.tasks import one_picture


COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}
ROOMY = MediaLimits(num_frames=2, min_pixels=784, max_pixels=10**6)


def four_corners(height: int, width: int) -> np.ndarray:
    """Red, green, blue and white corners, read as lines of a page."""
    picture = np.full((height, width, 3), 90, np.uint8)
    rows, columns = (
        (slice(None, height // 3), slice(-(height // 3), None)),
        (slice(None, width // 3), slice(-(width // 3), None)),
    )
    for name, (row, column) in zip("RGBW", [(r, c) for r in rows for c in columns], strict=True):
        picture[row, column] = COLOURS[name]
    return picture


def corners(picture: np.ndarray) -> str:
    height, width = picture.shape[0] // 6, picture.shape[1] // 6
    points = [picture[y, x].astype(int) for y in (height, -height) for x in (width, -width)]
    return "".join(min(COLOURS, key=lambda name: np.abs(point - COLOURS[name]).sum()) for point in points)


def write(path: Path, size=(112, 168), degrees=0, hflip=False, vflip=False, pixel_aspect=None) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=5, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if degrees or hflip or vflip:
            stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
        for index in range(2):
            frame = av.VideoFrame.from_ndarray(four_corners(*size), format="rgb24")
            frame.pts = index
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def shown(path: Path) -> np.ndarray:
    with MediaLoader(path.parent, ROOMY, backend="pyav", workers=0) as loader:
        return loader.video(path).frames[0]


def expected(size, degrees: int, hflip: bool, vflip: bool) -> np.ndarray:
    """The picture turned counterclockwise by `degrees`, then mirrored: by NumPy alone."""
    picture = np.rot90(four_corners(*size), degrees // 90)
    picture = picture[:, ::-1] if hflip else picture
    return picture[::-1] if vflip else picture


@given(
    st.sampled_from(["mp4", "mov", "mkv"]),
    st.sampled_from([0, 90, 180, 270]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(112, 168), (168, 112), (112, 112)]),
    st.sampled_from([None, Fraction(2, 1), Fraction(1, 2)]),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_pictures_are_turned_and_mirrored_as_the_file_says(
    tmp_path_factory, suffix, degrees, hflip, vflip, size, pixel_aspect
):
    folder = tmp_path_factory.mktemp("geometry")
    picture = shown(write(folder / f"a.{suffix}", size, degrees, hflip, vflip, pixel_aspect))
    right = expected(size, degrees, hflip, vflip)
    assert corners(picture) == corners(right)
    # The pixel aspect is that of the stored picture, before it is turned.
    stored = (size[0], size[1] * (pixel_aspect or 1))
    assert picture.shape[:2] == (stored if degrees % 180 == 0 else stored[::-1])
    if pixel_aspect is None:
        assert np.abs(picture.astype(int) - right).mean() < 8


MATRICES = {  # of a track header: (a, b, c, d), and what a player shows of RGBW
    "none": ((1, 0, 0, 1), "RGBW"),
    "mirrored": ((-1, 0, 0, 1), "GRWB"),
    "upside down, mirrored": ((1, 0, 0, -1), "BWRG"),
    "half a turn": ((-1, 0, 0, -1), "WBGR"),
    "a quarter clockwise": ((0, 1, -1, 0), "BRWG"),
    "a quarter counterclockwise": ((0, -1, 1, 0), "GWRB"),
    "transposed": ((0, 1, 1, 0), "RBGW"),
    "transposed the other way": ((0, -1, -1, 0), "WGBR"),
}


def with_matrix(path: Path, target: Path, numbers) -> Path:
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16  # of a track header of version 0
    a, b, c, d = (number << 16 for number in numbers)
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data[:at] + matrix + data[at + 36 :])
    return target


@pytest.mark.parametrize(("matrix", "right"), MATRICES.values(), ids=MATRICES)
def test_the_matrix_of_a_track_header(tmp_path, matrix, right):
    path = with_matrix(write(tmp_path / "base.mp4"), tmp_path / "a.mp4", matrix)
    assert corners(shown(path)) == right
    # The pictures of reports are upright as well.
    assert corners(one_picture(Source(str(path), str(path)), MediaLimits(), 120)) == right


def test_a_flip_that_is_lost_is_found(tmp_path, monkeypatch):
    """Planted fault: the rotation of a matrix alone, as FFmpeg's own function reads it off a mirrored one."""
    path = with_matrix(write(tmp_path / "base.mp4"), tmp_path / "a.mp4", MATRICES["mirrored"][0])
    with av.open(str(path)) as container:
        rotation = next(container.decode(video=0)).rotation
    monkeypatch.setattr(decode, "upright", lambda picture, matrix: np.rot90(picture, round(rotation / 90) % 4))
    assert corners(shown(path)) == "WBGR" != MATRICES["mirrored"][1]


def test_another_decoder_is_not_asked_for_pictures_that_are_stored_turned(tmp_path):
    """torchcodec turns pictures, by its version, and mirrors none."""
    asked = []

    def picker(path, seconds, stream):
        asked.append((path, stream))
        return [av.VideoFrame.from_ndarray(four_corners(112, 168), format="rgb24") for _ in seconds]

    plain = write(tmp_path / "plain.mp4")
    turned = write(tmp_path / "turned.mp4", degrees=90, hflip=True)
    for path, right in ((plain, "RGBW"), (turned, corners(expected((112, 168), 90, True, False)))):
        clip = decode.decode_video(Source(str(path), str(path)), ROOMY, 28, 784, 10**6, ClipRequest(), picker=picker)
        assert corners(clip.frames[0]) == right
    assert asked == [(str(plain), 0)]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError])
def test_a_clip_on_which_another_decoder_fails_is_decoded_as_without_it(error, tmp_path):
    """Such as one whose pictures change their size, or whose end it places too early."""

    def picker(path, seconds, stream):
        raise error("Expected pre-allocated tensor of another shape")

    path = write(tmp_path / "a.mp4")
    asked = Source(str(path), str(path)), ROOMY, 28, 784, 10**6, ClipRequest()
    one, other = decode.decode_video(*asked), decode.decode_video(*asked, picker=picker)
    assert np.array_equal(one.frames, other.frames) and np.array_equal(one.timestamps, other.timestamps)
    assert set(other.notes) - set(one.notes) == {"torchcodec-failed"}


def test_another_decoder_is_told_which_stream_is_decoded(tmp_path):
    """Sound stands first in the file, so that the video's number is not 0; its own choice may be cover art."""
    path, told = tmp_path / "a.mkv", []
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=16000, layout="mono")
        video = out.add_stream("libx264", rate=4, options={"crf": "0"})
        video.width, video.height, video.pix_fmt = 168, 112, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
        silence.sample_rate, silence.pts = 16000, 0
        out.mux([*sound.encode(silence), *sound.encode()])
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(four_corners(112, 168), format="rgb24")
            frame.pts = i
            out.mux(video.encode(frame))
        out.mux(video.encode())

    def picker(path, seconds, stream):
        told.append(stream)
        return [av.VideoFrame.from_ndarray(four_corners(112, 168), format="rgb24") for _ in seconds]

    decode.decode_video(Source(str(path), str(path)), ROOMY, 28, 784, 10**6, ClipRequest(), picker=picker)
    assert told == [1]


@pytest.mark.parametrize("degrees", [0, 90])
def test_a_size_that_a_row_asks_for_is_that_of_the_upright_picture(tmp_path, degrees):
    path = write(tmp_path / "a.mp4", degrees=degrees)
    with MediaLoader(tmp_path, ROOMY, backend="pyav", workers=0) as loader:
        frames = loader.video(path, request=ClipRequest(resized_height=56, resized_width=140)).frames
    assert frames.shape[1:3] == (56, 140) and corners(frames[0]) == corners(
        expected((112, 168), degrees, False, False)
    )
