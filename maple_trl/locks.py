"""Files that one process at a time holds, so that no other writes where it does."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


# What file systems say that know no locks; there nobody is kept out.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class LockedError(RuntimeError):
    """A file that another process holds."""


def lock_file(path: Path) -> FileLock:
    """
    Hold a file, which is made where it is missing, until `release`; the end of the process releases it, too.

    It stays after that: only who has it open and locked holds it, so that a killed process leaves none locked.

    Raises:
        LockedError: when another process holds it.
        OSError: when there cannot be such a file.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LockedError(f"{path} is held by another process") from error
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return lock


@contextmanager
def held_file(path: Path) -> Iterator[None]:
    """
    Hold a file as [`lock_file`] does, and remove it afterwards.

    Raises:
        LockedError: when another process holds it.
        OSError: when there cannot be such a file.
    """
    lock = lock_file(path)
    try:
        yield
    finally:
        with suppress(OSError):  # of a system that does not remove open files: the next one takes it
            os.unlink(path)  # while it is held: who has opened it meanwhile finds it gone, and makes another
        lock.release()
