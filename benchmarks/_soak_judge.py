"""
A judge of answers for the soak: a server of the OpenAI kind, in a process of its own, whose grade is a function of the request.

    python benchmarks/_soak_judge.py PORT LOG

`POST /fault` has it misbehave: `{"fault": "429", "count": 3}` for the next three requests. What it does wrong is appended to
LOG, a JSON object a line, so that a judge that was killed and started again has forgotten nothing that matters.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


FAULTS = ("429", "reset", "hang", "rubbish", "lost")
PATIENCE = 60.0  # seconds that a request hangs; its client gives up long before


def digest_of(messages: Any) -> str:
    """Return what a request asks, but for the schema that the client appends to its last message."""
    first = [message["content"] for message in messages]
    text = json.dumps([*first[:-1], first[-1].split("Check the candidate answer.")[0]], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def grade_of(digest: str) -> float:
    """Return a right or wrong, which nothing but the request decides."""
    return float(int(digest, 16) % 3 == 0)


class Faults:
    """What the next requests get instead of a grade. Thread-safe."""

    def __init__(self, log: Path):
        self.log, self.lock = log, threading.Lock()
        self.due: dict[str, int] = dict.fromkeys(FAULTS, 0)
        lines = map(json.loads, log.read_text(encoding="utf-8").splitlines()) if log.exists() else ()
        self.lost = {line["digest"] for line in lines if line["fault"] == "lost"}

    def order(self, fault: str, count: int) -> None:
        """Have the next requests meet a fault."""
        with self.lock:
            self.due[fault] += count

    def meet(self, digest: str) -> str | None:
        """
        Return the fault that this request meets.

        A request that is `lost` gets rubbish for good, at each attempt: it is a function of the request from then on.
        """
        with self.lock:
            if digest in self.lost:
                return "lost"
            fault = next((name for name in FAULTS if self.due[name]), None)
            if fault is not None:
                self.due[fault] -= 1
                if fault == "lost":
                    self.lost.add(digest)
                with open(self.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"fault": fault, "digest": digest}) + "\n")
            return fault


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/fault":
            self.faults.order(body["fault"], body["count"])
            return self._answer(200, {})
        digest = digest_of(body["messages"])
        fault = self.faults.meet(digest)
        if fault == "hang":
            time.sleep(PATIENCE)
        if fault in ("hang", "reset"):
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        if fault == "429":
            return self._answer(429, {"error": {"message": "too many requests"}}, {"Retry-After": "1"})
        text = "I would rather not say." if fault else json.dumps({"correct": grade_of(digest)})
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        known = {"id": "c-1", "object": "chat.completion", "created": 1, "model": "soak"}
        return self._answer(200, {**known, "choices": [choice], "usage": usage})

    def do_GET(self) -> None:
        self._answer(200, {"due": self.faults.due, "lost": sorted(self.faults.lost)})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone: they were killed."""


if __name__ == "__main__":
    Handler.faults = Faults(Path(sys.argv[2]))
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
