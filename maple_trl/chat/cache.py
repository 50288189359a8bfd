"""Answers kept on disk: an SQLite file of JSON texts, bounded in size."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random


logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL, used REAL NOT NULL);
CREATE INDEX IF NOT EXISTS answers_used ON answers (used);
"""
_FRESH = 3600.0  # an entry's time of use is written anew when it is older than this: reading stays reading
_PAUSE = 60.0  # seconds without reads or writes after one that failed: a lock waited for each time holds up a batch


class ChatCache:
    """
    A map from digests to JSON objects in an SQLite file, for one thread; several processes may share the file.

    Every `put` is a transaction: a process that is killed loses none that returned. Nothing is ever unpickled, so a
    file from elsewhere can do no more than give wrong answers. The file belongs on a local disk, as SQLite's write-ahead
    log does not work across machines.

    Args:
        path (`str` or `os.PathLike`):
            The file; a damaged one is moved aside to `PATH.damaged`.
        max_bytes (`int`, *optional*, defaults to 1 GiB):
            Size of what it holds; the entries not used for longest go first, a tenth at a time.
        lock_timeout (`float`, *optional*, defaults to 5):
            Seconds that a read or write waits for another process that has locked the file.

    Attributes:
        errors (`int`): reads and writes that failed (disk full, file locked); reads or writes are
            then left out for a minute.
    """

    def __init__(self, path: str | os.PathLike, max_bytes: int = 1 << 30, lock_timeout: float = 5.0):
        self.path, self.max_bytes, self.lock_timeout, self.errors = Path(path), max_bytes, lock_timeout, 0
        self._paused = {"read": 0.0, "write": 0.0}  # until when
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = self._open()
        except sqlite3.OperationalError:  # no permission, a folder: nothing is damaged
            raise
        except sqlite3.DatabaseError as error:
            aside = self.path.with_name(self.path.name + ".damaged")
            logger.warning("%s is damaged (%s); moved to %s, starting anew", self.path, error, aside)
            os.replace(self.path, aside)
            for suffix in ("-wal", "-shm"):  # they belong to the damaged file
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        """Connect, again where several processes change a new file's journal at once: SQLite lets one, and does not wait then."""
        again = Retrying(
            retry=retry_if_exception(_is_locked),
            stop=stop_after_delay(self.lock_timeout),
            wait=wait_random(0.01, 0.05),
            reraise=True,
        )
        return again(self._connect)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=self.lock_timeout, isolation_level=None)
        try:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_SCHEMA)
        except sqlite3.DatabaseError:
            connection.close()
            raise
        return connection

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the object under `key`; `None` when there is none, or none that can be read."""
        if self._pauses("read"):
            return None
        try:
            row = self._connection.execute("SELECT value, used FROM answers WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
            value = json.loads(row[0])
            if time.time() - row[1] > _FRESH and not self._pauses("write"):
                self._connection.execute("UPDATE answers SET used = ? WHERE key = ?", (time.time(), key))
        except (sqlite3.Error, ValueError, TypeError, RecursionError) as error:
            self._count(error, "read")
            return None
        return value if isinstance(value, dict) else None

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep an object; a failure is counted, not raised."""
        if self._pauses("write"):
            return
        try:
            self._connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, json.dumps(value), time.time())
            )
            if self.nbytes > self.max_bytes:
                self._shrink()
        except (sqlite3.Error, ValueError) as error:
            self._count(error, "write")

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        pages, free, size = (self._pragma(name) for name in ("page_count", "freelist_count", "page_size"))
        return (pages - free) * size

    def _shrink(self) -> None:
        while self.nbytes > self.max_bytes * 0.9 and len(self) > 0:
            number = max(1, len(self) // 10)
            oldest = "SELECT key FROM answers ORDER BY used LIMIT ?"
            self._connection.execute(f"DELETE FROM answers WHERE key IN ({oldest})", (number,))
        self._connection.execute("PRAGMA incremental_vacuum").fetchall()

    def _pragma(self, name: str) -> int:
        return self._connection.execute(f"PRAGMA {name}").fetchone()[0]

    def _pauses(self, what: str) -> bool:
        return time.monotonic() < self._paused[what]

    def _count(self, error: Exception, what: str) -> None:
        if not self.errors:
            logger.warning("the answer cache %s fails (%s); going on without it", self.path, error)
        self.errors += 1
        if isinstance(error, sqlite3.Error):  # and not an entry that cannot be read, which says nothing about others
            self._paused[what] = time.monotonic() + _PAUSE

    def __len__(self) -> int:
        return self._connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _is_locked(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
