"""The log of a review: a file that lines are only ever added to, by any number of processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from maple_trl.data.review.entries import Entry, read_entry
from maple_trl.data.review.replay import Replay
from maple_trl.data.review.rows import ReviewError
from maple_trl.files import flush


LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class DamagedLine:
    """A line of a log that is no entry, and does not count."""

    number: int
    size: int
    why: str
    torn: bool

    def __str__(self) -> str:
        what = "was not written to its end" if self.torn else "is no entry"
        return f"line {self.number} ({self.size} bytes) {what}, and does not count: {self.why}"


class ReviewLog:
    """
    A log on the disk, and what it says by now.

    A line is on the disk before [`append`] returns. Whoever writes holds a lock, and has read what others wrote before. A
    line that a killed process or a full disk left without its end is never removed: the next one begins on a new line.

    Args:
        path (`str` or `os.PathLike`): the file, one JSON object a line; made when the first line is written.

    Attributes:
        replay (`Replay`): the decisions.
        damaged (`list[DamagedLine]`): lines that do not count.

    Raises:
        ReviewError: when `path` is a folder or lies in none.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if self.path.is_dir():
            raise ReviewError(f"{self.path} is a folder; a log is a file, such as {self.path / 'review.log'}")
        if not self.path.parent.is_dir():
            raise ReviewError(f"there is no folder {self.path.parent} for the log {self.path.name}")
        # One object, which the thread that holds it may take again.
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=LOCK_SECONDS)
        self._threads = threading.RLock()
        self._begin()
        with self.held():
            pass

    def _begin(self) -> None:
        self.replay = Replay()
        self.damaged: list[DamagedLine] = []
        self._offset = self._number = 0
        self._inode: int | None = None
        self._unfinished = False  # the last line that was read has no end

    @contextmanager
    def held(self) -> Iterator[Replay]:
        """
        Hold the log alone, with all in it that anyone has written.

        Raises:
            ReviewError: when another process holds it for too long.
        """
        with self._threads:
            try:
                with self._lock:
                    self._read_on()
                    yield self.replay
            except Timeout as error:
                raise ReviewError(
                    f"another process has held {self._lock.lock_file} for {LOCK_SECONDS:.0f} s; nothing was written"
                ) from error

    def append(self, make: Callable[[Replay], Entry | None]) -> Entry | None:
        """
        Write the entry that is made from what the log says; nothing where there is none to make.

        Raises:
            OSError: when it cannot be written; it does not count then, even where a part of it was.
        """
        with self.held() as replay:
            entry = make(replay)
            if entry is not None:
                self._write(entry.line())
                self._read_on()
            return entry

    def _write(self, line: bytes) -> None:
        new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:  # its name, too, must outlive a power cut
            flush(self.path.parent)

    def _read_on(self) -> None:
        """Read what has been added; nobody writes meanwhile."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            if self._offset:
                self._begin()
                raise ReviewError(f"the log {self.path} has been removed during the review") from None
            return
        if self._inode not in (None, status.st_ino) or status.st_size < self._offset:
            self._begin()  # another file, or a shorter one: what it says is what counts
        self._inode = status.st_ino
        if status.st_size == self._offset:
            return
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        if self._unfinished and data.startswith(b"\n"):
            data = data[1:]
        *lines, rest = data.split(b"\n")
        self._unfinished = bool(rest)
        for line in lines:
            self._take(line, whole=True)
        if rest:
            self._take(rest, whole=False)

    def _take(self, line: bytes, whole: bool) -> None:
        self._number += 1
        if not line.strip():
            return
        try:
            self.replay.apply(read_entry(line))
        except ValueError as error:
            torn = not whole or not line.rstrip().endswith(b"}")
            self.damaged.append(DamagedLine(self._number, len(line), str(error), torn))
