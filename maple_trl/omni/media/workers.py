"""
Processes that decode media. A file that crashes FFmpeg, hangs it or has it eat memory ends one of them, and not the run.

They are plain programs that import NumPy and PyAV alone (a third of a second), started when they are first needed and shared
by all loaders of this process. They are no forks of it, which would copy locks that threads hold and GPU contexts; and no
`multiprocessing` children, which would run the user's script again. They end with this process, however it ends.
"""

import json
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from maple_trl.omni.host_memory import host_memory
from maple_trl.omni.media.decoder_process import blank_file, read_arrays, receive, send
from maple_trl.omni.media.tasks import Task, perform
from maple_trl.omni.media.wire import pack, unpack


logger = logging.getLogger(__name__)

WORKERS = 2
WORKER_BYTES = 4 << 30
LEAST_BYTES = 256 << 20
"""NumPy and FFmpeg take a part of it themselves."""

_START_SECONDS, _TORCH_SECONDS = 120.0, 600.0
_BEGIN_SECONDS = 10.0  # for a process that is alive to take a task
_GRACE = 1.0  # seconds after decode_timeout: the decoder's own check, between pictures, comes first
_LOOK = 0.5  # seconds between looks at whether the process lives
_TRIES = 3

# As `-m` would, but with the import path of this process, and without running what `site` would run.
_PROGRAM = (
    "import json, sys; settings = json.loads(sys.argv[1]); sys.path[:] = settings.pop('path'); "
    "from maple_trl.omni.media.decoder_process import main; main(**settings)"
)


class StartError(RuntimeError):
    """A decoder process could not be started."""


class _Gone(Exception):
    """A decoder process ended before it began with a task: the task's file is not to blame."""


class _Decoder:
    """A decoder process and our end of its socket."""

    def __init__(self, memory: int, backend: str):
        if not (hasattr(socket, "send_fds") and hasattr(select, "poll")):
            raise StartError("this system cannot hand files from a process to another")
        root = str(Path(__file__).resolve().parents[3])
        try:
            here = os.getcwd()
        except OSError:  # the folder that the run works in was deleted
            here = os.sep
        path = [os.path.join(here, entry) for entry in sys.path if isinstance(entry, str)]
        path += [] if root in path else [root]
        settings = {"path": path, "parent": os.getpid(), "memory": memory, "backend": backend}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.memory, self.fit, self._log = memory, False, blank_file()
        self._connection, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _PROGRAM, json.dumps(settings)],
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    stderr=self._log,
                    env={**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""},
                    start_new_session=True,  # the keys of a terminal are for the run
                )
        except (OSError, ValueError) as error:
            self._connection.close()
            os.close(self._log)
            raise StartError(f"{type(error).__name__}: {error}") from error
        try:
            seconds = _TORCH_SECONDS if backend == "torchcodec" else _START_SECONDS
            if self._receive(time.monotonic() + seconds) is None:
                raise StartError(f"it {self._end_of_process()}")
            self.fit = True
        except TimeoutError:
            raise StartError(f"not ready within {seconds:g} s") from None
        finally:
            if not self.fit:
                self.end()

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, task: Task) -> Any:
        """
        Return the outcome of a task; afterwards, `fit` says whether the process can be asked again.

        Raises:
            MediaError: that of the decoder, or `decoder-crashed`, `decoder-memory`, `decode-timeout`.
            _Gone: if the process had ended before, or does not react.
        """
        self.fit = False
        self._begin(task)
        seconds = task.limits.decode_timeout
        descriptors: list[int] = []
        try:
            try:
                reply = self._receive(time.monotonic() + seconds + _GRACE, descriptors)
            except TimeoutError:
                detail = f"not decoded within {seconds:g} s; its decoder process was ended"
                raise task.source.error("decode-timeout", detail) from None
            if reply is None:
                raise task.source.error("decoder-crashed", f"the process that decoded it {self._end_of_process()}")
            places = reply.get("arrays") or ()
            # While it is handed over it is there twice.
            with host_memory().reserved("decoding", 2 * sum(map(_size, places))):
                arrays = read_arrays(descriptors[0], places) if places else ()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if "memory" in reply:
            detail = (
                f"needs more than the {self.memory >> 20} MiB that a decoder process may have (media_worker_bytes)"
            )
            raise task.source.error("decoder-memory", detail)
        self.fit = True
        if "error" in reply:
            raise task.source.error(*reply["error"])
        if "failure" in reply:
            raise RuntimeError(f"a decoder process failed at {task.source.name}:\n{reply['failure']}")
        return unpack(reply["value"], arrays)

    def _begin(self, task: Task) -> None:
        request = {"task": pack(task, [])}
        try:
            self._connection.settimeout(_BEGIN_SECONDS)
            send(self._connection, request)
            if self._receive(time.monotonic() + _BEGIN_SECONDS) is None:
                raise _Gone
        except (ConnectionError, TimeoutError) as error:
            raise _Gone from error

    def _receive(self, deadline: float, descriptors: list[int] | None = None) -> dict[str, Any] | None:
        """Receive the next message; `None` when the process has ended. Raises TimeoutError after the deadline."""
        poller = select.poll()
        poller.register(self._connection, select.POLLIN)
        while True:
            ended = self.process.poll() is not None  # asked first: what it sent before it ended is read
            if poller.poll(1000 * min(_LOOK, max(0.0, deadline - time.monotonic()))):
                break
            if ended:  # somebody else holds the other end of the socket open
                return None
            if time.monotonic() >= deadline:
                raise TimeoutError
        self._connection.settimeout(_BEGIN_SECONDS)  # a message that has begun is there, or the process hangs
        try:
            return receive(self._connection, descriptors)
        except ConnectionError:
            return None

    def _end_of_process(self) -> str:
        """Say how the process ended, with the last that it wrote."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        if code is not None and code < 0:
            try:
                how = f"was ended by {signal.Signals(-code).name}"
            except ValueError:
                how = f"was ended by signal {-code}"
            how += " (as systems do where memory runs out)" if -code == signal.SIGKILL else ""
        else:
            how = "closed its connection" if code is None else f"ended with status {code}"
        size = os.fstat(self._log).st_size
        said = os.pread(self._log, 2000, max(0, size - 2000)).decode(errors="replace").strip()
        return how + (f": {said.splitlines()[-1]}" if said else "")

    def end(self) -> None:
        """End the process, if it still runs."""
        self.fit = False
        self.process.kill()
        self.forget()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it waits for a disk or network that does not answer
            pass

    def forget(self) -> None:
        """Close what this process holds of it."""
        self._connection.close()
        if self._log is not None:
            os.close(self._log)
            self._log = None


def _size(place: dict[str, Any]) -> int:
    return np.dtype(place["dtype"]).itemsize * math.prod(place["shape"])


class DecoderPool:
    """
    Up to `count` decoder processes. Thread-safe: as many threads are served at a time, the others wait in turn.

    Args:
        count (`int`): most processes.
        memory (`int`): bytes that one may have.
        backend (`"pyav"` or `"torchcodec"`): what decodes pictures.
    """

    def __init__(self, count: int, memory: int = WORKER_BYTES, backend: str = "pyav"):
        self._memory, self._backend = memory, backend
        self._lock = threading.Lock()
        self._idle: list[_Decoder | None] = [None] * count  # None: a process not started yet; the last is taken first
        self._waiting: deque[Future] = deque()
        self._alive: set[_Decoder] = set()
        self._works: bool | None = None
        # The kernel ends them with the thread that started them: it has to be one that stays.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="maple-decoders")

    @property
    def pids(self) -> list[int]:
        """Processes that run."""
        with self._lock:
            return [decoder.pid for decoder in self._alive]

    def run(self, task: Task) -> Any:
        """
        Let a process do the task; where none can be started, say so once and do it here.

        Raises:
            MediaError: that of the decoder, or `decoder-crashed`, `decoder-memory`, `decode-timeout`.
        """
        if self._works is False:
            return perform(task)
        decoder = self._take()
        try:
            for _ in range(_TRIES):
                decoder = decoder or self._start()
                try:
                    return decoder.ask(task)
                except _Gone:
                    decoder = self._drop(decoder)
            raise StartError("decoder processes end as soon as they have started")
        except StartError as error:
            self._say(error)
        finally:
            if decoder is not None and not decoder.fit:
                decoder = self._drop(decoder)
            self._give(decoder)
        return perform(task)

    def _say(self, error: StartError) -> None:
        with self._lock:
            if self._works is None:
                self._works = False  # none ever ran: none will
            elif self._works is False:
                return
        logger.warning(
            "No decoder process can be started (%s). Media are decoded in this process, where a file that crashes the "
            "decoder ends the run. media_workers=0 decodes here without this message.",
            error,
        )

    def _start(self) -> _Decoder:
        try:
            decoder = self._starter.submit(_Decoder, self._memory, self._backend).result()
        except RuntimeError as error:  # also: this process is ending, and starts no threads any more
            raise error if isinstance(error, StartError) else StartError(str(error)) from error
        with self._lock:
            self._works = True
            self._alive.add(decoder)
        return decoder

    def _drop(self, decoder: _Decoder) -> None:
        with self._lock:
            self._alive.discard(decoder)
        decoder.end()

    def _take(self) -> _Decoder | None:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            waiter: Future = Future()
            self._waiting.append(waiter)
        try:
            return waiter.result()
        except BaseException:  # interrupted
            with self._lock:
                handed_over = waiter not in self._waiting
                if not handed_over:
                    self._waiting.remove(waiter)
            if handed_over:
                self._give(waiter.result())
            raise

    def _give(self, decoder: _Decoder | None) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set_result(decoder)
            else:
                self._idle.append(decoder)

    def close(self) -> None:
        """End the processes; whoever asks afterwards gets new ones."""
        with self._lock:
            idle = [decoder for decoder in self._idle if decoder is not None]
            self._idle = [None] * len(self._idle)
            self._alive.difference_update(idle)
        for decoder in idle:
            decoder.end()

    def forget(self) -> None:
        """Let go, in a fork, of what belongs to the process that was forked."""
        for decoder in self._alive:
            decoder.forget()
            decoder.process.returncode = 0  # not ours to wait for


_pools: dict[tuple[int, int, str], DecoderPool] = {}
_pools_lock = threading.Lock()


def decoder_pool(count: int, memory: int = WORKER_BYTES, backend: str = "pyav") -> DecoderPool:
    """Return the pool of this process with these settings; all loaders share it."""
    key = (count, memory, backend)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = DecoderPool(*key)
        return _pools[key]


def close_decoders() -> None:
    """End all idle decoder processes of this process now, rather than when they have been idle for long."""
    with _pools_lock:
        pools = list(_pools.values())
    for pool in pools:
        pool.close()


def _after_fork() -> None:
    global _pools_lock
    for pool in _pools.values():
        pool.forget()
    _pools.clear()
    _pools_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
