"""
A decoder process: reads tasks from its standard input, a socket, and answers them there, one after another.

A message is four bytes of length and as much JSON. A task is answered by `begun` at once, so that the death of the process
is put down to a file only while it is decoded, and then by one of

- `value`, with a file descriptor of memory that holds the arrays, which `arrays` describes;
- `error`: reason and detail of a `MediaError`;
- `memory`: there was not enough of it. The process leaves afterwards, for what it still holds is unknown.
- `failure`: a traceback, for which this library is to blame and not the file.

It leaves, by itself, when the other end of the socket is closed, when nothing was asked of it for a while, or when it has
grown to more than half of what it may have.
"""

import ctypes
import json
import os
import signal
import socket
import struct
import sys
import tempfile
import traceback
from typing import Any

import numpy as np


IDLE_SECONDS = 120.0
_ALIGNMENT = 64
_PR_SET_PDEATHSIG = 1


def blank_file() -> int:
    """Open a nameless file in memory (on systems without such: in the temporary folder); return its descriptor."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("maple-trl", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def send(connection: socket.socket, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Send a message, with descriptors of open files."""
    data = json.dumps(message).encode()
    head = struct.pack("!I", len(data))
    if descriptors:
        socket.send_fds(connection, [head], descriptors)
        connection.sendall(data)
    else:
        connection.sendall(head + data)


def receive(connection: socket.socket, descriptors: list[int] | None = None) -> dict[str, Any] | None:
    """Receive the next message, or `None` where the other end is closed; descriptors that come are appended."""
    head = _exactly(connection, 4, descriptors)
    data = None if head is None else _exactly(connection, struct.unpack("!I", head)[0])
    return None if data is None else json.loads(data)


def _exactly(connection: socket.socket, size: int, descriptors: list[int] | None = None) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        if descriptors is None:
            piece = connection.recv(size - len(data))
        else:
            piece, found, *_ = socket.recv_fds(connection, size - len(data), 1)
            descriptors.extend(found)
        if not piece:
            return None
        data += piece
    return bytes(data)


def write_arrays(arrays: list[np.ndarray]) -> tuple[int, list[dict[str, Any]]]:
    """Write arrays into a file in memory; return it, and where each lies in it."""
    descriptor, places, end = blank_file(), [], 0
    for array in arrays:
        places.append({"dtype": array.dtype.str, "shape": array.shape, "offset": end})
        view = memoryview(array.reshape(-1)).cast("B") if array.size else memoryview(b"")
        written = 0
        while written < len(view):
            written += os.pwrite(descriptor, view[written:], end + written)
        end += -(-len(view) // _ALIGNMENT) * _ALIGNMENT
    return descriptor, places


def read_arrays(descriptor: int, places: list[dict[str, Any]]) -> list[np.ndarray]:
    """Read the arrays that [`write_arrays`] wrote, read-only, into memory of this process."""
    arrays = []
    for place in places:
        array = np.empty(place["shape"], np.dtype(place["dtype"]))
        view = memoryview(array.reshape(-1)).cast("B") if array.size else memoryview(b"")
        read = 0
        while read < len(view):
            count = os.preadv(descriptor, [view[read:]], place["offset"] + read)
            if not count:
                raise EOFError("the arrays of a decoder process end early")
            read += count
        array.flags.writeable = False
        arrays.append(array)
    return arrays


def _die_with(parent: int) -> None:
    """Let this process end with its parent: one that is killed leaves none behind, even one that hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)  # it ended before


def _limit_memory(size: int) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
    )  # crashes leave no files


def _data_bytes() -> int:
    """Return the private memory of this process, as the limit counts it; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _answer(connection: socket.socket, request: dict[str, Any]) -> bool:
    """Answer one task; return whether the process is fit for another."""
    from maple_trl.omni.errors import MediaError
    from maple_trl.omni.media.tasks import perform
    from maple_trl.omni.media.wire import pack, unpack

    try:
        arrays: list[np.ndarray] = []
        value = pack(perform(unpack(request["task"], ())), arrays)
        descriptor, places = write_arrays(arrays) if arrays else (None, [])
    except MediaError as error:
        send(connection, {"error": [error.reason, error.detail]})
    except MemoryError as error:
        send(connection, {"memory": str(error)})
        return False
    except Exception:
        send(connection, {"failure": traceback.format_exc()})
    else:
        try:
            send(connection, {"value": value, "arrays": places}, () if descriptor is None else (descriptor,))
        finally:
            if descriptor is not None:
                os.close(descriptor)
    return True


def main(parent: int, memory: int, backend: str) -> None:
    """Serve the socket that is the standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the run, which ends its decoders
    _die_with(parent)
    _limit_memory(memory)
    import maple_trl.omni.media.tasks  # noqa: F401  before it says that it is ready

    if backend == "torchcodec":
        import torchcodec.decoders  # noqa: F401
    connection = socket.socket(fileno=os.dup(0))
    try:
        send(connection, {"ready": os.getpid()})
        fit = True
        while fit and _data_bytes() < memory / 2:
            connection.settimeout(IDLE_SECONDS)
            request = receive(connection)
            connection.settimeout(None)
            if request is None:
                return
            send(connection, {"begun": True})
            fit = _answer(connection, request)
    except (TimeoutError, ConnectionError):  # idle for long, or nobody is there any more
        pass
