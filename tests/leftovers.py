"""What a suite has started ends with it, however it ends: also where `make test` is stopped or killed."""

import os
import signal
import uuid

import psutil


MARK = "MAPLE_TRL_TEST_RUN"


def watch() -> None:
    """
    Marks this process's environment, which all that it starts inherits, and starts a guard that ends what carries the
    mark once this process is gone.
    """
    mark = os.environ[MARK] = uuid.uuid4().hex
    reading, writing = os.pipe()
    if os.fork():
        os.close(reading)
        os.set_inheritable(writing, False)
        return
    try:
        os.setsid()  # signals to the terminal's group do not reach it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.close(writing)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):  # who reads this process's output must not wait for the guard
            os.dup2(nothing, standard)
        os.read(reading, 1)  # returns when the other end is closed: nobody writes
        while marked := _carrying(mark):
            for process in marked:
                process.kill()
            psutil.wait_procs(marked, timeout=5)
    finally:
        os._exit(0)


def _carrying(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        except psutil.Error:
            continue
    return found
