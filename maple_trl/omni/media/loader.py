"""Media of a data set, decoded once: paths under one root in, arrays out of a bounded cache."""

import logging
import os
import re
import stat
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import cachetools

from maple_trl.omni.embedded import stored_path
from maple_trl.omni.errors import MediaError
from maple_trl.omni.host_memory import host_memory
from maple_trl.omni.media.clips import NO_AUDIO, NO_CUE, AudioClip, ClipRequest, MediaInfo, Picture, Source, VideoClip
from maple_trl.omni.media.sampling import MediaLimits, fit_size
from maple_trl.omni.media.subtitles import Part, Subtitle, read_subtitle, subtitle_bytes
from maple_trl.omni.media.tasks import Task, perform
from maple_trl.omni.media.workers import LEAST_BYTES, WORKER_BYTES, WORKERS, decoder_pool


logger = logging.getLogger(__name__)

__all__ = ["AudioClip", "ClipRequest", "MediaError", "MediaInfo", "MediaLimits", "MediaLoader", "Picture", "VideoClip"]

WHOLE = ClipRequest()
_COSTLY = ("decode-timeout", "decoder-crashed", "decoder-memory")
_QUEUED = 1024  # calls that wait for a background thread
_REMEMBERED = 100_000  # files of which something is noted: those of an endless stream are not

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*://")


def torchcodec_problem() -> str | None:
    """Return why torchcodec cannot be used here, or `None`; often the FFmpeg libraries that it needs are missing."""
    try:
        import torchcodec.decoders  # noqa: F401
    except Exception as error:  # it raises RuntimeError, OSError or ImportError, depending on what is missing
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
    return None


def _cost(key: Any, value: Any) -> int:
    """Return the bytes of a cache entry; counts and `None` (no audio track) are small but not free."""
    return getattr(value, "nbytes", None) or 64


class MediaLoader:
    """
    Reads the pictures, videos, audio tracks and subtitles of a data set, each once.

    Thread-safe: two threads that ask for one clip decode it once, and [`~MediaLoader.prefetch`] decodes in the
    background what the next batch needs. The arrays are shared and therefore read-only.

    Args:
        root (`str` or `os.PathLike`):
            The one folder that media may come from. Links are followed, and must end inside it.
        limits (`MediaLimits`, *optional*):
            Sampling and limits.
        cache_bytes (`int`, *optional*, defaults to 2 GiB):
            Size of the cache (least recently used goes first), which shares the [`~maple_trl.omni.host_memory.HostMemory`] of
            the process. A clip larger than that is decoded on each request.
        allow_network (`bool`, *optional*, defaults to `False`):
            Also take http and https URLs for video and audio.
        backend (`"auto"`, `"pyav"` or `"torchcodec"`, *optional*, defaults to `"auto"`):
            Decoder of video frames; audio is always PyAV's, and pictures are Pillow's. `"auto"` takes torchcodec where it works, and else PyAV,
            with the reason in `backend_note`.
        workers (`int`, *optional*, defaults to 2):
            Processes that decode, so that a file that crashes or hangs the decoder does not end this one; all loaders of
            this process share them. 0: decode in this process.
        worker_bytes (`int`, *optional*, defaults to 4 GiB):
            Memory that each of them may have. A file that needs more is refused as `decoder-memory`.

    Attributes:
        decodes (`Counter`): `(kind, resolved path)` -> how often it was really decoded, of the latest 100000.
        notes (`Counter`): note -> number of clips that have it.
        backend (`str`): what decodes.
        backend_note (`str` or `None`): why that is not torchcodec.

    Raises:
        FileNotFoundError: if `root` is no folder.
        ValueError: for an unknown backend, a negative number of workers, or less memory for one than 256 MiB.
        RuntimeError: if `backend="torchcodec"` and it does not work here.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        limits: MediaLimits | None = None,
        cache_bytes: int = 2 << 30,
        allow_network: bool = False,
        backend: Literal["auto", "pyav", "torchcodec"] = "auto",
        workers: int = WORKERS,
        worker_bytes: int = WORKER_BYTES,
    ):
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise FileNotFoundError(f"media root {os.fspath(root)!r} is not a folder")
        if backend not in ("auto", "pyav", "torchcodec"):
            raise ValueError(f"backend must be 'auto', 'pyav' or 'torchcodec', got {backend!r}")
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        if worker_bytes < LEAST_BYTES:
            raise ValueError(f"worker_bytes must be at least {LEAST_BYTES} (256 MiB), got {worker_bytes}")
        self.workers, self.worker_bytes = workers, worker_bytes
        self.limits, self.allow_network = limits or MediaLimits(), allow_network
        self.backend_note = torchcodec_problem() if backend != "pyav" else None
        if backend == "torchcodec" and self.backend_note:
            raise RuntimeError(
                f"backend='torchcodec' does not work here ({self.backend_note}). Install torchcodec and the FFmpeg "
                "libraries it needs, or use backend='pyav', which brings its own."
            )
        self.backend = "pyav" if backend == "pyav" or self.backend_note else "torchcodec"
        self.decodes: Counter = Counter()
        self.notes: Counter = Counter()
        self._identities: dict[str, tuple[int, int]] = {}
        self._changed: set[str] = set()
        self._costly: dict[tuple, tuple[str, str]] = {}
        self._noted: dict[tuple[str, str], None] = {}
        self._cache_bytes = cache_bytes
        self._begin()
        _loaders.add(self)

    def _begin(self) -> None:
        """Begin with an empty cache, and no threads."""
        self._lock = threading.RLock()
        self._pool: ThreadPoolExecutor | None = None
        self._queued: list[Future] = []
        # With a condition, cachetools lets one caller compute a missing entry while the others wait for it.
        self._load = cachetools.cached(
            host_memory().cache("media", self._cache_bytes, _cost),
            key=lambda kind, source, *options: (kind, source.path, source.identity, options),
            condition=threading.Condition(self._lock),
        )(self._decode)

    # Paths

    def resolve(self, path: str | os.PathLike) -> str:
        """
        Return the real, absolute path of a medium under the root (or the URL, where the network is allowed).

        Raises:
            MediaError: `outside-media-root`, `not-found` or `network-not-allowed`.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise MediaError("not-found", None, f"expected a path, got {type(path).__name__}")
        name = os.fspath(path)
        if (stored := stored_path(name)) is not None:
            if not os.path.isfile(stored):
                raise MediaError("not-found", name, f"bytes of a table that are not on this machine ({stored})")
            return stored
        if _SCHEME.match(name):
            if not self.allow_network:
                raise MediaError("network-not-allowed", name, "a URL; give a path under the media root")
            if not name.lower().startswith(("http://", "https://")):
                raise MediaError("network-not-allowed", name, "only http:// and https:// URLs are read")
            return name
        try:
            real = os.path.realpath(os.path.join(self.root, name))
            if os.path.commonpath([self.root, real]) != self.root:
                raise MediaError("outside-media-root", name, f"leads out of the media root {self.root}")
            mode = os.stat(real).st_mode
        except MediaError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise MediaError("not-found", name, f"no such file under {self.root} ({error})") from error
        if not stat.S_ISREG(mode):
            raise MediaError("not-found", name, "not a regular file")
        return real

    def _source(self, path: str | os.PathLike) -> Source:
        real = self.resolve(path)
        if _SCHEME.match(real):
            return Source(real, real)
        status = os.stat(real)
        self._compare(os.fspath(path), real, (status.st_mtime_ns, status.st_size))
        if not status.st_size:
            raise MediaError("empty-file", os.fspath(path), "0 bytes")
        return Source(os.fspath(path), real, (status.st_mtime_ns, status.st_size))

    def _compare(self, name: str, real: str, identity: tuple[int, int]) -> None:
        """Note a file that is no longer the one that was read before, and say so once."""
        with self._lock:
            if len(self._identities) >= _REMEMBERED and real not in self._identities:
                return
            if self._identities.setdefault(real, identity) == identity:
                return
            self._identities[real] = identity
            told = real in self._changed
            self._changed.add(real)
        if not told:
            logger.warning("%s was changed while it was in use: from now on it is read as it is now", name)

    def identity(self, path: str | os.PathLike) -> tuple[int, int] | None:
        """Return what tells the file at `path` from one that takes its place; `None` where it was not read yet."""
        return self._identities.get(self._resolved(path))

    def expect(self, path: str | os.PathLike, identity: tuple[int, int]) -> None:
        """
        Take a file for changed when it is not the one that another process has read.

        Args:
            path: the file, below the root.
            identity: what [`~MediaLoader.identity`] said of it there.
        """
        real = self._resolved(path)
        with self._lock:
            if real and len(self._identities) < _REMEMBERED:
                self._identities.setdefault(real, identity)

    def has_changed(self, path: str | os.PathLike) -> bool:
        """Return whether the file at `path` was changed since it was first read."""
        return bool(self._changed) and self._resolved(path) in self._changed

    def _resolved(self, path: str | os.PathLike) -> str:
        """Return the path of a medium; `""` for one that has gone."""
        try:
            return self.resolve(path)
        except MediaError:
            return ""

    # Media

    def probe(self, path: str | os.PathLike, *, request: ClipRequest = WHOLE) -> MediaInfo:
        """
        Read what the file's header says, without decoding.

        Args:
            path: the file, below the root.
            request: names the segment by which the length is judged.

        Raises:
            MediaError: for what a header already shows.
        """
        return self._perform("probe", self._source(path), request)

    def video(
        self,
        path: str | os.PathLike,
        *,
        multiple: int = 28,
        max_pixels: int | None = None,
        request: ClipRequest = WHOLE,
    ) -> VideoClip:
        """
        Decode the frames of a video, sampled and resized: the whole clip as the loader does it, or as `request` says.

        Args:
            path: the file, below the root.
            multiple: what the sides of a frame are multiples of, in pixels.
            max_pixels: most pixels of a frame; it can only lower the limit.
            request: segment, sampling and size.

        Raises:
            MediaError: for a file that cannot be used.
            ValueError: where `request` goes beyond the loader's limits, or no frame is as small as `max_pixels`.
        """
        request.limits(self.limits)
        return self._load("video", self._source(path), *self._area(multiple, max_pixels, request), request)

    def image(
        self,
        path: str | os.PathLike,
        *,
        multiple: int = 28,
        max_pixels: int | None = None,
        request: ClipRequest = WHOLE,
    ) -> Picture:
        """
        Decode a picture of the media root, upright, and resize it as frames are; of `request` it follows the size.

        What shines through is white. Of several pictures in a file, the first is taken, with the note `"first-picture"`.

        Args:
            path: the file, below the root.
            multiple: what the sides of the picture are multiples of, in pixels.
            max_pixels: most pixels of the picture; it can only lower the limit.
            request: its size.

        Raises:
            MediaError: for a file that cannot be used.
            ValueError: where no picture is as small as `max_pixels`.
        """
        return self._load("image", self._local(path, "pictures"), *self._area(multiple, max_pixels, request), request)

    def probe_image(self, path: str | os.PathLike) -> MediaInfo:
        """
        Read what the header of the picture at `path` says, without decoding.

        Raises:
            MediaError: for what a header already shows.
        """
        return self._perform("image-header", self._local(path, "pictures"))

    def check_image(self, path: str | os.PathLike, *, multiple: int = 28, request: ClipRequest = WHOLE) -> None:
        """
        Check by its header, without decoding, that a picture has a size within the limits.

        Args:
            path: the file, below the root.
            multiple: what the sides of the picture are multiples of, in pixels.
            request: its size.

        Raises:
            MediaError: for a file that cannot be used, or a picture too long and narrow for the limits.
        """
        area, info = self._area(multiple, None, request), self.probe_image(path)
        asked = (request.resized_height or info.height, request.resized_width or info.width)
        try:
            fit_size(*map(float, asked), *area)
        except ValueError as error:
            raise MediaError("bad-aspect-ratio", os.fspath(path), str(error)) from error

    def _area(self, multiple: int, max_pixels: int | None, request: ClipRequest) -> tuple[int, int, int]:
        """Return what sides are multiples of, and the least and most pixels of a frame or picture."""
        least, most = request.pixels(self.limits)
        if max_pixels is not None and max_pixels < most:
            most = max_pixels
            least = min(least, most // 4)  # room for any usual aspect ratio below the lowered limit
        if most < multiple**2:
            raise ValueError(f"max_pixels={most} is less than one patch of {multiple}x{multiple} pixels")
        return multiple, least, most

    def _local(self, path: str | os.PathLike, what: str) -> Source:
        source = self._source(path)
        if source.is_url:
            raise MediaError("network-not-allowed", source.name, f"{what} are read from the media root only")
        return source

    def frame_count(self, path: str | os.PathLike, *, request: ClipRequest = WHOLE) -> int:
        """
        Count the frames that [`~MediaLoader.video`] will give of the file at `path` for a `request`, without decoding any.

        Raises:
            MediaError: for a file that cannot be used.
        """
        return self._load("frames", self._source(path), request)

    def audio(
        self, path: str | os.PathLike, *, sampling_rate: int = 16000, request: ClipRequest = WHOLE
    ) -> AudioClip | None:
        """
        Decode the mono waveform of an audio file or of a video's track; `None` for a valid file without a track.

        That is counted under the note `"no-audio-track"`.

        Args:
            path: the file, below the root.
            sampling_rate: samples per second of what is returned.
            request: its segment.

        Raises:
            MediaError: for a file that cannot be used.
            ValueError: for a sampling rate that is not positive.
        """
        if sampling_rate <= 0:
            raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
        segment = ClipRequest(start=request.start, end=request.end)  # other sampling of pictures is the same sound
        return self._load("audio", self._source(path), sampling_rate, segment)

    def subtitle(self, path: str | os.PathLike, parts: Iterable[Part] = ()) -> str:
        """
        Read the plain text of a subtitle file: all of it, or what is shown during some parts of its clip.

        That nothing is shown there is counted under the note `"no-cue-in-part"`.

        Args:
            path: the file, below the root.
            parts: from when to when each is, in seconds; none: all.

        Raises:
            MediaError: for a file that cannot be used, or whose times are not known where parts are asked for.
        """
        source, parts = self._local(path, "subtitles"), tuple(parts)
        subtitle: Subtitle = self._load("subtitle", source)
        text = subtitle.text(parts)
        self._note(source, () if text else (NO_CUE,))
        return text

    def _decode(
        self, kind: str, source: Source, *options: Any
    ) -> Picture | VideoClip | AudioClip | Subtitle | int | None:
        if kind == "frames":
            return self._perform("frames", source, *options)
        if kind == "subtitle":
            with self._lock:
                self._count(kind, source)
            subtitle = read_subtitle(subtitle_bytes(source.path), source.name)
            self._note(source, subtitle.notes)
            return subtitle
        clip = self._perform(kind, source, *options)
        self._note(source, (NO_AUDIO,) if clip is None else clip.notes)
        return clip

    def _note(self, source: Source, notes: Iterable[str]) -> None:
        with self._lock:
            for note in notes:
                if (note, source.path) not in self._noted:  # once a clip, however often it is decoded
                    self._noted[note, source.path] = None
                    self.notes[note] += 1
            _forget_oldest(self._noted)

    def _count(self, kind: str, source: Source) -> None:
        self.decodes[kind, source.path] += 1
        _forget_oldest(self.decodes)

    def _perform(self, kind: str, source: Source, *options: Any) -> Any:
        key = (kind, source.path, source.identity, options)
        with self._lock:
            if key in self._costly:  # met in the background, perhaps: what hung or crashed once is not tried again
                raise source.error(*self._costly[key])
            if kind in ("image", "video", "audio"):
                self._count(kind, source)
        task = Task(kind, source, self.limits, options, self.backend)
        try:
            if not self.workers:
                return perform(task)
            return decoder_pool(self.workers, self.worker_bytes, self.backend).run(task)
        except MediaError as error:
            if error.reason in _COSTLY:
                with self._lock:
                    self._costly[key] = (error.reason, error.detail)
                    _forget_oldest(self._costly)
            raise

    # Background

    def prefetch(self, calls: Iterable[Callable[[], Any]]) -> None:
        """
        Run `calls` (each loads a clip) in background threads, which keep the decoder processes busy.

        Errors are dropped here: the foreground call for the same clip meets and reports them. Where calls come faster than
        they are done, the oldest of those that wait are dropped too.
        """
        with self._lock:
            if self._pool is None:
                workers = self.workers or min(4, os.cpu_count() or 1)
                self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="maple-media")
            waiting = [call for call in self._queued if not call.done()]
            self._queued = waiting + [self._pool.submit(call) for call in calls]
            for stale in self._queued[:-_QUEUED]:
                stale.cancel()

    def close(self) -> None:
        """Stop the background threads (calls not yet begun are dropped) and empty the cache."""
        with self._lock:
            pool, self._pool, self._queued = self._pool, None, []
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        self._load.cache_clear()
        self._costly.clear()

    def __enter__(self) -> "MediaLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _forget_oldest(noted: dict) -> None:
    while len(noted) > _REMEMBERED:
        del noted[next(iter(noted))]


_loaders: "weakref.WeakSet[MediaLoader]" = weakref.WeakSet()


def _after_fork() -> None:
    """Begin anew in a fork, where no thread would let go of a lock, or finish a clip that others wait for."""
    for loader in list(_loaders):
        loader._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
