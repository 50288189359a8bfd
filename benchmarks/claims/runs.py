"""One training run of a claim: what decides it, where its result lies, and what carries it out."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from devices import on_gpu
from instruments import INSTRUMENTS, INSTRUMENTS_VERSION
from tasks import digest, load_task

import maple_trl
from maple_trl.files import read_json, write_atomically
from maple_trl.jobs.config_files import config_files
from maple_trl.jobs.option_parser import option_keys
from maple_trl.jobs.options import make_parser, trainer_of
from maple_trl.jobs.stages import load_plan


HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes"
RESULTS = HERE / "results"
FIXED = {
    "evaluate_before_after": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_eval_batch_size": 448,
}
"""Options that all runs have, with the device of their task: a run logs every step, and is measured as [`worker`] does."""
SERIES = 12
"""Points that are kept of what a run logs: means over as many stretches of it."""
KEPT = (
    "loss",
    "grad_norm",
    "entropy",
    "kl",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "clip_ratio/region_mean",
    "completions/mean_length",
    "rewards/*/mean",
    "tag/*/weight",
    "tag/*/kl",
    "tag/*/reward",
    "tag/all/dropped",
    "tag/all/kept",
    "tag/all/clip_fraction",
    "tag/all/entropy",
    "tag/all/seconds",
    "tag/all/zero_variance",
    "replay/*",
    "hint/*",
)
"""What is kept of the log, by name; with one more, `INSTRUMENTS_VERSION` rises, for the results of earlier runs lack it."""

QUICK_STEPS, QUICK_QUESTIONS = 4, 1
"""Steps, and questions of each tag, of a run that only shows that it can be carried out."""


@dataclass(frozen=True)
class RecipeJob:
    """
    A job of a recipe: the recipe itself, or a stage of a plan.

    Attributes:
        stage: its name; empty where the recipe is no plan.
        options: those of its files, and what a plan puts over them.
        known: names of the options that a stage's trainer knows.
    """

    stage: str
    options: Mapping[str, Any]
    known: frozenset[str] = frozenset()


@functools.cache
def recipe_jobs(recipe: str) -> tuple[RecipeJob, ...]:
    """Read the jobs of a file of `recipes`."""
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise ValueError(f"no recipe {recipe!r} in {RECIPES.name}/")
    plan = load_plan(["--config", str(path)])
    if plan is None:
        return (RecipeJob("", _merged(str(path))),)
    jobs = []
    for stage in plan.stages:
        known = frozenset(option_keys(make_parser(trainer_of(stage.file), declared=True)))
        jobs.append(RecipeJob(stage.name, _merged(stage.file) | stage.common, known))
    return tuple(jobs)


def _merged(file: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for _, config in config_files(file):
        merged |= config
    return merged


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
        quick: whether it is a few steps and questions only, and no evidence.
    """

    task: str
    recipe: str
    seed: int
    options: Mapping[str, Any]
    instruments: Sequence[str] = ()
    trained: bool = True
    quick: bool = False

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
        jobs = recipe_jobs(self.recipe)
        if not jobs[0].stage:
            return self._job(jobs[0], self.options)
        own = dict(self.options)
        by_stage = own.pop("stages", {})
        unknown = sorted(set(by_stage) - {job.stage for job in jobs})
        if unknown:
            raise ValueError(f"recipe {self.recipe} has no stage {unknown[0]!r}")
        told = []
        for job in jobs:
            shared = {name: value for name, value in own.items() if name in job.known}
            told.append([job.stage, self._job(job, shared | by_stage.get(job.stage, {}))])
        nowhere = sorted(set(own) - {name for _, options in told for name in options})
        if nowhere:
            raise ValueError(f"no stage of recipe {self.recipe} has an option {nowhere[0]!r}")
        return {"stages": told}

    def _job(self, job: RecipeJob, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of one job: the recipe's, the task's over them, the run's own over both."""
        trainer, task = own.get("trainer", job.options.get("trainer", "omni_grpo")), load_task(self.task)
        fixed = FIXED | {"seed": self.seed, "use_cpu": not on_gpu(task)}
        merged = dict(job.options) | task.options(trainer) | dict(own) | fixed
        if self.quick:
            merged["max_steps"] = QUICK_STEPS
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
            "instruments": {name: getattr(INSTRUMENTS[name], "VERSION", 1) for name in sorted(self.instruments)},
            "instruments_version": INSTRUMENTS_VERSION,
            "trained": self.trained,
            "config": self.config(),
        } | ({"quick": True} if self.quick else {})

    def key(self) -> str:
        """Return the name of the run's result."""
        told = json.dumps(self.identity(), sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def file(self, results: Path = RESULTS, start: str = "") -> Path:
        """
        Return where the run's result lies, or would.

        Args:
            start: of a run that was carried out once more, what tells the start that it began from; see [`tasks.start_of`].
        """
        return results / self.task / f"{self.key()}{f'-{start}' * bool(start)}.json"


@functools.cache
def source() -> str:
    """Return what the source of this package and of these benchmarks comes to."""
    return digest(file for top in (Path(maple_trl.__file__).parent, HERE) for file in top.rglob("*.py"))


def is_kept(name: str) -> bool:
    """Tell whether a result has a series of the log."""
    return any(fnmatch(name, kept) for kept in KEPT)


def questions_file(file: Path, told: Mapping[str, Any]) -> Path:
    """Return where the questions lie, in their order, whose scores the result in a file holds."""
    return file.with_name(f"questions-{told['task_version']}{'-quick' * bool(told.get('quick'))}.json")


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """Write JSON so that a stop at any moment leaves none or the whole."""
    write_atomically(file, json.dumps(result, separators=(",", ":"), sort_keys=True) + "\n")


class DamagedResultError(Exception):
    """A file of results that is not as it was written; the message says which, and what to do."""


def read_result(file: Path) -> dict[str, Any] | None:
    """
    Read a run's result; `None` where it was not run.

    Raises:
        DamagedResultError: where the file is no JSON object.
    """
    try:
        told = read_json(file)
    except ValueError as error:
        raise DamagedResultError(
            f"{file} is damaged ({error}): restore it, or delete it to have it made anew"
        ) from error
    if told is not None and not isinstance(told, dict):
        raise DamagedResultError(
            f"{file} is damaged (it holds no object): restore it, or delete it to have it made anew"
        )
    return told
