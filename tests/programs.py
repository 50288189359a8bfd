"""
Python programs in processes of their own that need not import torch, transformers and TRL anew.

Those imports cost more than most of what tests then run. A server process of multiprocessing makes them once and is
copied for each program; it has run nothing else, so that copies may train, which a copy of the test's own process may not.
A worker of pytest-xdist makes them anyhow: there the server is a copy of the worker, made before it runs its first test.
"""

import atexit
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any
from unittest import mock


IMPORTED = [
    "aiohttp.web",
    "av",
    "cachetools",
    "datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "openai.resources.chat",
    "peft",
    "pyarrow.parquet",
    "scipy.io.wavfile",
    "slipcover",
    "sqlite3",
    "torch",
    "transformers",
    "trl.rewards",
    "trl.trainer.grpo_trainer",
    "trl.trainer.sft_trainer",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni",
    "transformers.models.qwen2_5_omni.processing_qwen2_5_omni",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "transformers.models.qwen2_vl.video_processing_qwen2_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.whisper.feature_extraction_whisper",
]
# The package itself, where the process that is copied measures which of its lines are run.
OWN = [
    "maple_trl.reports",
    "maple_trl.train",
    "maple_trl.trainers.avatar.trainer",
    "maple_trl.trainers.mapo.trainer",
    "maple_trl.trainers.omni_sft.trainer",
]
ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds; a program takes some, this only ends one that hangs
ON_CPU = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
_PR_SET_PDEATHSIG = 1

_context = multiprocessing.get_context("forkserver")


def serve_copies() -> None:
    """Makes a copy of this process the server; before anything is trained here."""
    for name in IMPORTED + OWN:
        with suppress(ImportError):  # of an extra
            importlib.import_module(name)
    forkserver.set_forkserver_preload([])
    with mock.patch.object(util, "spawnv_passfds", _copy):
        forkserver.ensure_running()


def _copy(path: bytes, arguments: list[str], passed: list[int]) -> int:
    """Starts what multiprocessing would start with a new interpreter, which keeps only the files that are passed to it."""
    if process := os.fork():
        return process
    try:
        opened = [0, 1, 2, *sorted(passed), os.sysconf("SC_OPEN_MAX")]
        for before, after in zip(opened, opened[1:], strict=False):
            os.closerange(before + 1, after)
        sys.stdout = sys.stderr = sys.__stderr__
        exec(arguments[-1], {})
    finally:
        os._exit(0)


def _ensure_server() -> None:
    _context.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()


def _measure_coverage(environment: Mapping[str, str]) -> None:
    """Adds the lines of the package that this program runs to those of the suite, if the suite measures them."""
    finders = [finder for finder in sys.meta_path if type(finder).__name__ == "SlipcoverMetaPathFinder"]
    if not finders:
        return
    measured = finders[0].sci
    measured.signal_child_process()  # what the process that was copied has run is told by that one

    def tell() -> None:
        os.chdir(ROOT)  # files are told by their paths from here
        # Named as those of pytest's workers, which are added up.
        file = Path(environment["SLIPCOVER_COVERAGE_DIR"], f"coverage-gw-{os.getpid()}.json")
        file.write_text(json.dumps(measured.get_coverage()))

    atexit.register(tell)


def _become(arguments: list[str], environment: dict[str, str], folder: str, output: str, errors: str | None) -> None:
    """Does in this copy of the server what `python *arguments` does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.freeze()  # as in conftest.py
    os.setsid()
    _measure_coverage(environment)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "HF_ENDPOINT" in environment:  # which was read when the client was imported
        importlib.reload(importlib.import_module("huggingface_hub.constants"))
        importlib.import_module("huggingface_hub.hf_api").api.endpoint = environment["HF_ENDPOINT"]
    for number, name, path in ((1, "stdout", output), (2, "stderr", errors or output)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
        stream = open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    try:
        _interpret(arguments)
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()


def _interpret(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, "")
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


class Program:
    """
    A started program.

    Args:
        arguments: as after `python`: a script, `-m module` or `-c code`, and what follows.
        output: the file to which its output is appended, and its errors where `errors` names no other.
        variables: what its environment has beyond this process's and `ON_CPU`.
        folder: where it starts; this process's folder by default.
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike],
        output: str | os.PathLike,
        errors: str | os.PathLike | None = None,
        variables: Mapping[str, str] | None = None,
        folder: str | os.PathLike | None = None,
    ):
        _ensure_server()
        environment = os.environ | ON_CPU | dict(variables or {})
        given = (list(map(str, arguments)), environment, str(folder or os.getcwd()), os.path.abspath(output))
        self.process = _context.Process(target=_become, args=(*given, errors and os.path.abspath(errors)))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """Its exit status, or the negative number of the signal that ended it; `None` while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float = LIMIT) -> int:
        """Waits until it ends by itself; its exit status. One that does not is ended."""
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired("program", timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int:
        """SIGKILL for the program and all that it started; returns the exit status."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.join()
        return self.poll()


def write_stand_in(folder: str | os.PathLike) -> Path:
    """
    Writes what a launcher can start in the place of an interpreter, for its programs to be copied from the server as well
    (torchrun and what builds on it take its name from `PYTHON_EXEC`).
    """
    _ensure_server()
    # Newer versions of Python also have a key.
    named = {name: vars(forkserver._forkserver).get(name) for name in ("_forkserver_address", "_forkserver_authkey")}
    path = Path(folder, "python")
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"if __name__ == '__main__':\n    import programs\n    programs.stand_in({named!r})\n"
    )
    path.chmod(0o755)
    return path


def write_launchers(folder: str | os.PathLike) -> Path:
    """Writes what a shell finds as `maple-trl`, and as launchers that start copies of the server; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    copy = write_stand_in(folder)
    for name, command in {
        "maple-trl": f"{sys.executable} -m maple_trl.cli",
        "accelerate": f"{copy} -m accelerate.commands.accelerate_cli",
        "torchrun": f"{copy} -m torch.distributed.run",
    }.items():
        write_tool(folder / name, f'exec {command} "$@"')
    return folder


def write_tool(path: Path, command: str) -> None:
    """Writes a command of a shell as a program."""
    path.write_text(f"#!/bin/bash\n{command}\n")
    path.chmod(0o755)


def stand_in(server: Mapping[str, Any]) -> None:
    """Has a server of another process start the program that this process was told to be, and ends as that does."""
    vars(forkserver._forkserver).update(server, _forkserver_alive_fd=os.open(os.devnull, os.O_WRONLY))
    output = os.readlink("/proc/self/fd/1")
    with (
        mock.patch.object(forkserver.ForkServer, "ensure_running"),
        mock.patch.object(forkserver, "ensure_running"),
    ):
        told = {name: os.environ[name] for name in ON_CPU}  # which the launcher may have set otherwise
        program = Program([word for word in sys.argv[1:] if word != "-u"], output, variables=told)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 - program.kill()))
    status = program.wait()
    sys.exit(status if status >= 0 else 128 - status)


class Ranks:
    """
    The processes of one distributed program, as torchrun starts them: when one fails, the others are ended. A single one
    is a plain program, unless it is said to be `distributed`.
    """

    def __init__(
        self,
        processes: int,
        arguments,
        output,
        variables: Mapping[str, str] | None = None,
        folder=None,
        distributed: bool = False,
    ):
        variables = dict(variables or {})
        if processes == 1 and not distributed:
            self.programs = [Program(arguments, output, None, variables, folder)]
            return
        import torch.distributed as dist  # not in what stands in for an interpreter

        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
        }
        self.programs = [
            Program(arguments, output, None, variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, folder)
            for rank in range(processes)
        ]

    @property
    def pid(self) -> int:
        return self.programs[0].pid

    def poll(self) -> int | None:
        """`None` while all run or the others are still to end; else the first failure's status, or 0."""
        statuses = [program.poll() for program in self.programs]
        failed = [status for status in statuses if status]
        return failed[0] if failed else None if None in statuses else 0

    def wait(self, timeout: float = LIMIT) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        status = self.poll()
        if status != 0:
            self.kill()
        if status is None:
            raise subprocess.TimeoutExpired("ranks", timeout)
        return status

    def send_signal(self, number: int) -> None:
        for program in self.programs:
            program.send_signal(number)

    def kill(self) -> int:
        return [program.kill() for program in self.programs][0]


def run(
    arguments: Sequence[str | os.PathLike],
    variables: Mapping[str, str] | None = None,
    folder: str | os.PathLike | None = None,
    timeout: float = LIMIT,
) -> subprocess.CompletedProcess:
    """Runs a program to its end; its exit status, output and errors, as `subprocess.run(…, text=True)` gives them."""
    with tempfile.TemporaryDirectory() as files:
        output, errors = Path(files, "output"), Path(files, "errors")
        output.touch()
        errors.touch()
        status = Program(arguments, output, errors, variables, folder).wait(timeout)
        return subprocess.CompletedProcess(list(arguments), status, output.read_text(), errors.read_text())
