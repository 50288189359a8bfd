"""Processes of their own that need not import everything anew."""

import os
import sys
import traceback
from collections.abc import Callable


def start(call: Callable[[], int]) -> int:
    """
    Calls a function in a copy of this process.

    Not for training: autograd refuses to run in a copy of a process in which it has run.

    Returns:
        its process id, for [`status_of`].
    """
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        status = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(process: int) -> int:
    """Waits for a process; its exit status, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
