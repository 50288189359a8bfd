"""A folder for as long as a process runs; what a killed one left is removed by the next."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from maple_trl.files import user_cache


def review_cache() -> Path:
    """Return the folder in the user's cache in which each review keeps copies of clips while it runs."""
    return user_cache() / "review"


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that only the user may read; it is removed at the end, with those of processes that are gone."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in [path for path in parent.iterdir() if path.is_dir()]:
        _remove_left(left)
    name = f"{os.getpid()}-{secrets.token_hex(4)}"
    lock = FileLock(parent / f"{name}.lock")
    with lock:  # before the folder is there, so that nobody takes it for one that was left
        folder = parent / name
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)


def _remove_left(folder: Path) -> None:
    lock = FileLock(folder.with_name(f"{folder.name}.lock"), timeout=0)
    try:
        with lock:
            shutil.rmtree(folder, ignore_errors=True)
    except Timeout:  # its process is running
        return
    Path(lock.lock_file).unlink(missing_ok=True)
