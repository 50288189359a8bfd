"""Writes the media files that the tests read: real encoders and containers (PyAV), and real damage."""

import functools
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from datasets import Dataset

from maple_trl.data.synthetic import write_seven_tags


@functools.cache
def _small_set(seed: int) -> tuple[tempfile.TemporaryDirectory, Dataset]:
    folder = tempfile.TemporaryDirectory(prefix="seven-tags-")
    return folder, write_seven_tags(folder.name, 4, seed=seed, splits=("train",), clips_per_pair=1)["train"]


def copy_small_set(folder: Path, seed: int = 0) -> Dataset:
    """Four rows of each tag and their clips, which are encoded once for all tests; returns the rows."""
    written, rows = _small_set(seed)
    shutil.copytree(written.name, folder, dirs_exist_ok=True)
    return rows


def picture(index: int, height: int, width: int) -> np.ndarray:
    """RGB picture number `index`: a brightness of its own, and a corner that shows which way is up."""
    frame = np.full((height, width, 3), (index * 37) % 200 + 20, dtype=np.uint8)
    frame[: height // 3, : width // 3] = (250, 20, 20)
    return frame


def tone(seconds: float, rate: int, frequencies: tuple[float, ...] = (440.0,)) -> np.ndarray:
    """One sine per channel, amplitude 0.5; float32 (channels, samples)."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * f * time) for f in frequencies]).astype(np.float32)


def _add_audio(container, wave: np.ndarray, rate: int, codec: str):
    layout = {1: "mono", 2: "stereo"}[len(wave)]
    stream = container.add_stream(codec, rate=rate, layout=layout)

    def packets():
        size = 1024
        for start in range(0, wave.shape[1], size):
            piece = np.ascontiguousarray(wave[:, start : start + size])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            yield from stream.encode(frame)
        yield from stream.encode(None)

    return packets


def write_audio(path: Path, wave: np.ndarray, rate: int = 16000, codec: str = "pcm_s16le", **options) -> Path:
    """An audio file of float32 (channels, samples)."""
    with av.open(str(path), "w", **options) as container:
        packets = _add_audio(container, wave, rate, codec)
        for packet in packets():
            container.mux(packet)
    return path


def write_video(
    path: Path,
    frames: int = 24,
    fps: int = 24,
    size: tuple[int, int] = (48, 64),
    codec: str = "libx264",
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
    audio: np.ndarray | None = None,
    audio_rate: int = 16000,
    audio_codec: str = "aac",
    gop: int = 12,
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    codec_options: dict[str, str] | None = None,
    **options,
) -> Path:
    """A video of `frames` numbered pictures of `size` (height, width), at `fps` or at the given `pts`."""
    height, width = size
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=fps, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = time_base or Fraction(1, fps)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        packets = None if audio is None else _add_audio(container, audio, audio_rate, audio_codec)
        if not frames:  # a header without pictures
            container.start_encoding()
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, height, width), format="rgb24")
            frame.pts = pts[index] if pts else index
            frame.time_base = time_base or Fraction(1, fps)
            for packet in stream.encode(frame):
                container.mux(packet)
        if frames:
            for packet in stream.encode(None):
                container.mux(packet)
        for packet in packets() if packets else ():
            container.mux(packet)
    return path


def cut(path: Path, target: Path, part: float) -> Path:
    """The first `part` of a file's bytes."""
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * part)])
    return target


def all_pictures(path: Path) -> list[tuple[float, np.ndarray]]:
    """Independent reference: every picture of a file, decoded from the start, with its time stamp in seconds."""
    with av.open(str(path)) as container:
        return [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]
