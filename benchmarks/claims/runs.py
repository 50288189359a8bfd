"""One training run of a claim: what decides it, where its result lies, and what carries it out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instruments import INSTRUMENTS, INSTRUMENTS_VERSION
from tasks import Task, load_task

from maple_trl.jobs.options import config_files


HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes"
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Run:
    """
    A run, by all that decides its numbers.

    Attributes:
        task: a module of `tasks`; its version counts too.
        recipe: a file of `recipes`, without `.yaml`, that a row of a paper's table is.
        options: what is put over the recipe and the task's own settings.
        seed: of the order of prompts, of sampling, and of the noise of rewards.
        instruments: what is watched beside the log, by name.
        trained: whether it is trained at all; the policy that runs begin with is measured otherwise.
    """

    task: str
    recipe: str
    seed: int
    options: Mapping[str, Any]
    instruments: Sequence[str] = ()
    trained: bool = True

    def __post_init__(self) -> None:
        unknown = sorted(set(self.instruments) - set(INSTRUMENTS))
        if unknown:
            raise ValueError(f"no instrument {unknown[0]!r}; there are {', '.join(INSTRUMENTS)}")

    def config(self) -> dict[str, Any]:
        """Return the options of the job: the recipe's, the task's over them, the run's over both."""
        path = RECIPES / f"{self.recipe}.yaml"
        if not path.is_file():
            raise ValueError(f"no recipe {self.recipe!r} in {RECIPES.name}/")
        merged: dict[str, Any] = {}
        for _, config in config_files(str(path)):
            merged |= config
        task = load_task(self.task)
        trainer = merged.get("trainer", "omni_grpo")
        merged |= task.options(trainer) | dict(self.options) | {"seed": self.seed}
        merged.pop("output_dir", None)
        return merged

    def identity(self) -> dict[str, Any]:
        """Return all that decides the run's numbers, as JSON holds it."""
        task = load_task(self.task)
        return {
            "task": self.task,
            "task_version": task.VERSION,
            "instruments": sorted(self.instruments),
            "instruments_version": INSTRUMENTS_VERSION,
            "trained": self.trained,
            "config": self.config(),
        }

    def key(self) -> str:
        """Return the name of the run's result."""
        told = json.dumps(self.identity(), sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def file(self, results: Path = RESULTS) -> Path:
        """Return where the run's result lies, or would."""
        return results / self.task / f"{self.key()}.json"


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """Write a run's result so that a stop at any moment leaves none or the whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".partial")
    scratch.write_text(json.dumps(result, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
    os.replace(scratch, file)


def read_result(file: Path) -> dict[str, Any] | None:
    """Read a run's result; `None` where it was not run."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def task_of(run: Run) -> Task:
    """Return the run's task."""
    return load_task(run.task)
