"""Runs in processes of their own, a few side by side, which a stop at any moment leaves done or undone."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from evidence import Evidence, Wanted


PYTHON = os.environ.get("PYTHON_EXEC") or sys.executable
"""As launchers of PyTorch know it."""
WORKER = Path(__file__).with_name("worker.py")
LONGEST = 3600.0
"""Seconds after which a run is taken to hang."""
GRACE = 15.0
"""Seconds that a process has to end when it is asked to."""
TOLD_LINES = 15


class Stopped(KeyboardInterrupt):
    """A signal asks the runner to stop."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Outcome:
    """
    What became of runs.

    Attributes:
        done: those with a result, by whomever.
        failed: the last lines of output of those that failed.
        left: those that the time did not reach.
    """

    done: list[Wanted] = field(default_factory=list)
    failed: dict[Wanted, str] = field(default_factory=dict)
    left: list[Wanted] = field(default_factory=list)


@dataclass
class _Active:
    runs: dict[Wanted, int]  # with the file that locks each
    process: subprocess.Popen
    output: Path
    began: float


def lock(file: Path) -> int | None:
    """Lock the run of a result for this process and those it starts; `None` where another has it."""
    folder = file.parent.parent / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / f"{file.parent.name}-{file.stem}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


class Runner:
    """
    Carries out runs, each once.

    Args:
        options: what each worker is told beside its runs.
        workers: how many processes run side by side.
        batch: runs of one process, one after the other; more than one shares memory, and is for runs that are no evidence.
        ends: when no further run begins, by `time.monotonic()`.
        cuts: whether those that are under way then are ended, too.
        say: is told what has become of each run.
    """

    def __init__(
        self,
        evidence: Evidence,
        options: Sequence[str] = (),
        workers: int = 2,
        batch: int = 1,
        ends: float = float("inf"),
        cuts: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.evidence, self.options = evidence, list(options)
        self.workers, self.batch, self.ends, self.cuts, self.say = workers, batch, ends, cuts, say
        self._active: list[_Active] = []

    def go(self, wanted: Sequence[Wanted]) -> Outcome:
        """Carry out runs in their order; a failed one does not stop the others."""
        self.outcome = Outcome()
        self._total = len(wanted)
        queue = deque(one for one in wanted if not self._is_there(one))
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tempfile.TemporaryDirectory(prefix="claims-runs-") as folder:
                while queue or self._active:
                    if time.monotonic() >= self.ends:
                        self._leave(queue)
                    started = len(self._active) < self.workers and bool(queue) and self._start(queue, Path(folder))
                    self._look(queue)
                    if not started:
                        time.sleep(0.1)
        finally:
            for number in before:
                signal.signal(number, signal.SIG_IGN)  # what ends here ends in peace
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.outcome

    def _leave(self, queue: deque[Wanted]) -> None:
        """Begin nothing more, and end what is under way where that is wanted."""
        self.outcome.left += queue
        queue.clear()
        if self.cuts and self._active:
            under_way = [one for active in self._active for one in active.runs]
            self._end_all()
            self.outcome.left += [one for one in under_way if not self._is_there(one)]

    def _stop(self, number: int, frame: object) -> None:
        raise Stopped(number)

    def _is_there(self, one: Wanted) -> bool:
        there = self.evidence.there(one.variant, one.seed, one.start)
        if there:
            self.outcome.done.append(one)
        return there

    def _start(self, queue: deque[Wanted], folder: Path) -> bool:
        """Start a process for the next runs that nobody else carries out; those that somebody does come last."""
        runs: dict[Wanted, int] = {}
        for _ in range(len(queue)):
            if len(runs) == self.batch:
                break
            one = queue.popleft()
            handle = lock(self.evidence.run(one.variant, one.seed, one.start)[1])
            if handle is None:
                queue.append(one)
            elif self._is_there(one):  # another has just written it
                os.close(handle)
            else:
                runs[one] = handle
        if not runs:
            return False
        files: list[str] = []
        for one in runs:
            run, result = self.evidence.run(one.variant, one.seed, one.start)
            described = folder / f"{result.stem}.json"
            described.write_text(json.dumps(asdict(run), default=str), encoding="utf-8")
            files += [str(described), str(result)]
        output = folder / f"{Path(files[0]).stem}.out"
        with open(output, "wb") as stream:
            process = subprocess.Popen(
                [PYTHON, str(WORKER), "--tied", str(os.getpid()), *self.options, *files],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=list(runs.values()),
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"},
            )
        self._active.append(_Active(runs, process, output, time.monotonic()))
        return True

    def _look(self, queue: deque[Wanted]) -> None:
        for active in list(self._active):
            status = active.process.poll()
            if status is None and time.monotonic() - active.began > LONGEST * len(active.runs):
                self._end(active)
                self._close(active, queue, f"it took more than {LONGEST / 60:.0f} minutes")
            elif status is not None:
                self._close(active, queue, f"exit status {status}" if status >= 0 else f"signal {-status}")

    def _close(self, active: _Active, queue: deque[Wanted], how: str) -> None:
        """Note what has become of a process's runs; those that it has not come to are tried again."""
        self._active.remove(active)
        said = active.output.read_text(encoding="utf-8", errors="replace")
        minutes = (time.monotonic() - active.began) / 60 / len(active.runs)
        for one, handle in active.runs.items():
            key = self.evidence.run(one.variant, one.seed, one.start)[1].stem
            _, begun, own = said.partition(f"== {key}\n")
            if self._is_there(one):
                self._tell(one, f"{minutes:.1f} min")
            elif begun or len(active.runs) == 1 or key in Path(active.output).stem:
                lines = (own.split("\n== ")[0] if begun else said).strip().splitlines()
                self.outcome.failed[one] = "\n".join([*lines[-TOLD_LINES:], f"({how})"])
                self._tell(one, "FAILED")
            else:
                queue.append(one)
            os.close(handle)
        active.output.unlink()

    def _tell(self, one: Wanted, what: str) -> None:
        gone = len(self.outcome.done) + len(self.outcome.failed)
        self.say(f"[{gone}/{self._total}] {one.variant}, seed {one.seed}{', once more' * bool(one.start)}: {what}")

    def _end_all(self) -> None:
        for active in self._active:
            _signal(active.process, signal.SIGTERM)
        for active in self._active:
            self._end(active)
            for handle in active.runs.values():
                os.close(handle)
        self._active.clear()

    def _end(self, active: _Active) -> None:
        _signal(active.process, signal.SIGTERM)
        try:
            active.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            _signal(active.process, signal.SIGKILL)
            active.process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and what it started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, number)
