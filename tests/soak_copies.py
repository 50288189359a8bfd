"""
The soak, as a program whose ranks are copies of one process that has imported everything, for a suite that starts many.

    python tests/soak_copies.py --quick --seed 1        # the options of benchmarks/soak.py
"""

import ctypes
import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path


HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent / "benchmarks"
sys.path[:0] = [str(HERE), str(BENCHMARKS)]

import programs  # noqa: E402


GRACE = 30.0  # seconds that the others have to end by themselves when one has failed, as torchrun gives them
_CLONE_NEWNS = 0x00020000


class Copies:
    """The ranks of a started run: what `subprocess.Popen` gives of a torchrun that starts them."""

    def __init__(self, arguments, log, variables):
        self.ranks = programs.Ranks(2, arguments, log, variables)
        self.pid, self.returncode, self._end = self.ranks.pid, None, None

    def poll(self):
        if self.returncode is None:
            statuses = [program.poll() for program in self.ranks.programs]
            if self._end is None and any(statuses):
                self._end = time.monotonic() + GRACE
                self._tell_others(signal.SIGTERM)
            elif self._end is not None and time.monotonic() > self._end:
                self._tell_others(signal.SIGKILL)
            if None not in statuses:
                self.returncode = int(any(statuses))
                for program in self.ranks.programs:
                    program.process.close()
                del self.ranks.store
        return self.returncode

    def _tell_others(self, number):
        for program in self.ranks.programs:
            if program.poll() is None:
                program.send_signal(number)

    def wait(self):
        while self.poll() is None:
            time.sleep(0.02)
        return self.returncode


def serve_copies():
    """Makes a copy of this process, which may be one itself, the server; returns its process id."""
    # Taken by whoever made the server that this process is a copy of, and never given back here.
    vars(forkserver._forkserver).update(_lock=threading.Lock(), _forkserver_pid=None)
    programs.serve_copies()
    return forkserver._forkserver._forkserver_pid


def use_copies():
    """Has the legs of the soak start their ranks as copies of this process, which has run nothing yet."""
    import _soak_run
    import psutil
    import soak

    class CopiedLeg(_soak_run.Leg):
        def launch(self):
            return Copies([__file__, "rank", *self.command[-2:]], self.log_path, self.variables)

        def tree(self):
            found = []
            for program in self.process.ranks.programs if self.process.returncode is None else ():
                try:
                    rank = psutil.Process(program.pid)
                    found += [rank, *rank.children(recursive=True)]
                except psutil.Error:
                    continue
            return found

        def ranks(self):
            found = [rank.pid for rank in self.tree() if rank.ppid() == server.pid and rank.status() != "zombie"]
            return sorted(found) if len(found) == _soak_run.PROCESSES else []

    server = psutil.Process(serve_copies())
    Copies(["-c", ""], os.devnull, {}).wait()  # the first start opens files that stay
    soak.Leg = CopiedLeg
    # What the environment of a copy is called by is that of the server.
    soak.marked_processes = lambda: sorted({*_soak_run.marked_processes(), *(one.pid for one in server.children())})


def enter_own_mounts():
    """As `unshare --mount`, without a new interpreter; where that is not allowed, the soak does what it can."""
    import soak

    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        os.environ[soak._APART] = "1"


def be_rank():
    """What `python -m maple_trl.cli …` does, in a copy."""
    # What an interpreter of its own does by itself.
    multiprocessing.set_start_method(None, force=True)
    runpy.run_path(str(BENCHMARKS / "_soak_site" / "sitecustomize.py"))
    faulthandler.enable()
    sys.argv = ["maple_trl.cli", "train", *sys.argv[2:]]
    runpy.run_module("maple_trl.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        be_rank()
    import soak

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if soak._APART not in os.environ:
        enter_own_mounts()
    mounts = soak.with_own_mounts()
    soak.with_own_mounts = lambda: mounts
    use_copies()
    sys.exit(soak.main())
