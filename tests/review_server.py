"""A served review page in a process of its own."""

import http.client
import re
import signal
import socket
import time
from importlib.util import find_spec
from pathlib import Path

import programs
import pytest


# Looked for and not imported: that takes seconds, and the page runs in another process.
needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="no Gradio for the page (pip install 'maple-trl[review]')"
)


class Served:
    """
    `maple-trl data review` at work.

    Args:
        folder: for its output and its cache.
        words: the set, and further options.
        port: 0 for a free one.
    """

    def __init__(self, folder: Path, *words, port: int = 0, home: Path | None = None):
        self.output = folder / f"output-{time.monotonic_ns()}"
        self.cache = home or folder / "cache"
        command = ["-m", "maple_trl.cli", "data", "review", *map(str, words), "--port", str(port)]
        self.output.touch()
        self.program = programs.Program(command, self.output, variables={"XDG_CACHE_HOME": str(self.cache)})
        end = time.monotonic() + 240
        while (found := re.search(r"http://[^/]+:(\d+)/", self.output.read_text())) is None:
            assert self.program.poll() is None and time.monotonic() < end, self.output.read_text()
            time.sleep(0.05)
        self.url, self.port = found[0], int(found[1])

    def kill(self):
        assert self.program.kill() == -signal.SIGKILL

    def stop(self) -> int:
        if self.program.poll() is None:
            self.program.send_signal(signal.SIGINT)
        return self.program.wait(60)

    def ask(self, path: str, method: str = "GET", body=None, **headers) -> tuple[int, dict, bytes]:
        """One request whose path goes out as it stands; status, headers and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host="host" in headers, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if body is not None:
                connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def ask_raw(self, request: bytes) -> bytes:
        """What comes back for bytes that no client would send."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))
