"""What is done with one media file, here or in a decoder process. Imports FFmpeg, Pillow and NumPy, and no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.clips import Source
from maple_trl.omni.media.decode import count_frames, decode_video, display_matrix, upright
from maple_trl.omni.media.opening import opened_video, probe
from maple_trl.omni.media.pictures import decode_image, image_header
from maple_trl.omni.media.sampling import MAX_ASPECT_RATIO, MediaLimits
from maple_trl.omni.media.sound import decode_audio


@dataclass(frozen=True)
class Task:
    """
    One file to decode.

    Args:
        kind (`"image"`, `"video"`, `"audio"`, `"probe"`, `"image-header"`, `"frames"` or `"picture"`): what is asked of
            it.
        source (`Source`): the file.
        limits (`MediaLimits`): sampling and limits.
        options (`tuple`): further arguments of the function that does it.
        backend (`"pyav"` or `"torchcodec"`): what decodes pictures.
    """

    kind: str
    source: Source
    limits: MediaLimits = field(default_factory=MediaLimits)
    options: tuple = ()
    backend: str = "pyav"


def perform(task: Task) -> Any:
    """
    Decode one file.

    Raises:
        MediaError: for a file that cannot be used, whatever the decoder stumbled on.
        MemoryError: where there was not enough of it.
    """
    try:
        options = {"picker": torchcodec_pictures} if task.kind == "video" and task.backend == "torchcodec" else {}
        return _FUNCTIONS[task.kind](task.source, task.limits, *task.options, **options)
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # no damaged file may end a run because nobody thought of how it is damaged
        raise task.source.error("unreadable", f"{type(error).__name__}: {error}") from error


def one_picture(source: Source, limits: MediaLimits, width: int) -> np.ndarray:
    """Decode a picture from a third into a video, `width` pixels wide: uint8 (H, W, 3). Raises [`MediaError`]."""
    with opened_video(source, limits) as (container, stream):
        if stream.duration and stream.time_base and stream.duration * stream.time_base > 4:
            container.seek(int(stream.duration // 3), stream=stream)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise source.error("no-frames", "no picture could be decoded")
        if max(frame.height, frame.width) > MAX_ASPECT_RATIO * min(frame.height, frame.width):
            ratio = f"aspect ratio of {frame.height}x{frame.width} is over {MAX_ASPECT_RATIO:g} : 1"
            raise source.error("bad-aspect-ratio", ratio)
        picture = frame.to_ndarray(
            format="rgb24", width=width, height=max(1, round(frame.height * width / frame.width))
        )
        return np.ascontiguousarray(upright(picture, display_matrix(frame)))


def torchcodec_pictures(path: str, seconds: list[float], stream: int) -> list:
    """
    Decode the frames shown at `seconds` by torchcodec, as PyAV frames: choice of times and resize stay the same.

    Args:
        stream: the number of the video among the file's streams; torchcodec's own choice may be cover art.
    """
    import av
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, stream_index=stream, dimension_order="NHWC", num_ffmpeg_threads=1)
    batch = decoder.get_frames_played_at(seconds)
    return [av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in batch.data.numpy()]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "image": decode_image,
    "video": decode_video,
    "audio": decode_audio,
    "probe": probe,
    "image-header": image_header,
    "frames": count_frames,
    "picture": one_picture,
}
