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

from maple_trl.jobs.options import config_files, make_parser, option_keys, trainer_of
from maple_trl.jobs.stages import load_plan


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
        options: what is put over the recipe and the task's own settings; where the recipe is a plan of stages, over each of
            them whose trainer knows the option, and under `stages` by a stage's name over that one.
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
        """
        Return the options of the job: the recipe's, the task's over them, the run's over both.

        Of a plan it is `stages`, a list of each one's name and options: the jobs that follow one another, each from the model
        of the one before.
        """
        path = RECIPES / f"{self.recipe}.yaml"
        if not path.is_file():
            raise ValueError(f"no recipe {self.recipe!r} in {RECIPES.name}/")
        plan = load_plan(["--config", str(path)])
        if plan is None:
            return self._job(str(path), {}, self.options)
        own = dict(self.options)
        by_stage = own.pop("stages", {})
        unknown = sorted(set(by_stage) - {stage.name for stage in plan.stages})
        if unknown:
            raise ValueError(f"recipe {self.recipe} has no stage {unknown[0]!r}")
        jobs = []
        for stage in plan.stages:
            known = option_keys(make_parser(trainer_of(stage.file), declared=True))
            shared = {name: value for name, value in own.items() if name in known}
            jobs.append([stage.name, self._job(stage.file, stage.common, shared | by_stage.get(stage.name, {}))])
        nowhere = sorted(set(own) - {name for _, job in jobs for name in job})
        if nowhere:
            raise ValueError(f"no stage of recipe {self.recipe} has an option {nowhere[0]!r}")
        return {"stages": jobs}

    def _job(self, file: str, above: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of one job: those of a file, what a plan puts over it, the task's, and the run's own."""
        merged: dict[str, Any] = {}
        for _, config in config_files(file):
            merged |= config
        merged |= above
        task = load_task(self.task)
        merged |= dict(task.options(merged.get("trainer", "omni_grpo"))) | dict(own) | {"seed": self.seed}
        merged.pop("output_dir", None)
        return merged

    def jobs(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the names and options of the jobs that the run is; one that is no stage has no name."""
        config = self.config()
        return [(name, job) for name, job in config["stages"]] if "stages" in config else [("", config)]

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
