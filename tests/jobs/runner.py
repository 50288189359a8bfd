"""Starts `train_job.py` from a test, alone or under a launcher, and reads what it wrote."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from filelock import FileLock
from media_files import copy_small_set
from programs import LIMIT, Program, Ranks, write_stand_in
from safetensors.torch import load_file
from tiny_models import save_tiny


JOB = Path(__file__).with_name("train_job.py")
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills; the workers of pytest-xdist share it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tmp_path_factory.mktemp(name)
        make(folder)
        return folder
    folder = tmp_path_factory.getbasetemp().parent / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    assert (folder / "made").exists(), f"{folder} was not made: another worker shows why"
    return folder


def write_inputs(folder: Path) -> list[dict]:
    """A tiny model and real clips; returns the rows, four of each tag."""
    save_tiny("qwen2_5_omni", folder / "model")
    return copy_small_set(folder / "media").to_list()


class Job:
    """
    A started job.

    Args:
        launcher: on how many processes, or the arguments of a launcher that starts them.
        distributed: whether a single process is one of a distributed program, as `torchrun --nproc_per_node 1` starts it.
        variables: of its environment.
    """

    def __init__(
        self,
        launcher: int | list[str],
        folder: Path,
        out: str,
        rows: list[dict],
        runs: list[dict],
        distributed: bool = False,
        variables: Mapping[str, str] | None = None,
    ):
        variables = dict(variables or {})
        self.out = folder / out
        self.out.mkdir()
        plan = {"rows": rows, "model": str(folder / "model"), "media_root": str(folder / "media")}
        plan_file = folder / f"{out}.json"
        plan_file.write_text(json.dumps({**plan, "out": str(self.out), "runs": runs}))
        self.log = folder / f"{out}.log"
        if isinstance(launcher, list):
            variables["PYTHON_EXEC"] = str(write_stand_in(folder))
            self.process = Program([*launcher, JOB, plan_file], self.log, variables=variables)
        else:
            self.process = Ranks(launcher, [JOB, plan_file], self.log, variables, distributed=distributed)

    def kill(self) -> int:
        """SIGKILL for the job and all that it started; returns the exit status."""
        return self.process.kill()

    def wait(self) -> Path:
        """Until it ends by itself; the folder of its results."""
        status = self.process.wait()
        assert status == 0, self.log.read_text()[-6000:]
        return self.out

    def wait_for(self, name: str) -> None:
        """Until the job has written this file."""
        end = time.monotonic() + LIMIT
        while not (self.out / name).exists():
            running = self.process.poll() is None
            if not running or time.monotonic() > end:
                raise AssertionError(f"{name} was not written (running: {running})\n{self.log.read_text()[-6000:]}")
            time.sleep(0.05)


def facts(out: Path, name: str, rank: int = 0) -> dict:
    return json.loads((out / f"{name}-{rank}.json").read_text())


def weights(out: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    """The trained weights after a run."""
    saved = load_file(out / f"{name}-{rank}.safetensors")
    return {key: value for key, value in saved.items() if not key.startswith("before.")}


def changes(out: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    """What a run added to each weight."""
    saved = load_file(out / f"{name}-{rank}.safetensors")
    return {key: value - saved[f"before.{key}"] for key, value in saved.items() if not key.startswith("before.")}
