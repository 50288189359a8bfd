"""
Tasks that runs train on. A task is a module of this folder with the attributes of [`Task`].

What a task writes (clips, tables, the cold-started model) is made once, by seed, and kept in a cache; nothing of it is committed.
A change of anything that it writes raises its `VERSION`, and its runs are other runs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import supervised
from devices import made_on
from filelock import FileLock

from maple_trl.files import write_atomically


class Task(Protocol):
    """
    What a module of this folder has.

    Attributes:
        VERSION: raised with every change of its data, its rewards, its model or what is asked of it.
        ACCESSES: what the trained policy is asked with, beside what it was trained with: `required`, `all`.
        QUESTIONS, SAMPLES: questions of each tag at the end of a run, and answers to each.

    One that trains a model reads the steps of that from its `COLD_STEPS`, of which a quick run makes few. One that needs what a
    machine may lack says what in `NEEDS`, and in `is_there()` whether this machine has it. One whose runs are carried out on a GPU
    has `DEVICE = CUDA`, and one that is of other modules than its own names them in `MADE_OF`.
    """

    VERSION: int
    ACCESSES: Sequence[str]
    QUESTIONS: int
    SAMPLES: int

    def prepare(self, folder: Path) -> None:
        """Make in a folder all that the task needs: data and the model that runs begin with."""

    def options(self, trainer: str) -> Mapping[str, Any]:
        """Return the job options of a run, paths relative to `folder(name)` written as `{folder}/...`."""

    def held_out(self, folder: Path) -> Any:
        """Return the questions that no run has trained on."""

    def score(self, **columns: Any) -> list[float | None]:
        """Grade answers for the evaluation: without the noise and the scale that training has."""


QUICK_STEPS = 4
WHOLE = "whole"
"""A file of a prepared folder, written last: by what it was made, and what came of it."""
_cache: Path | None = None


def use_folders(tasks: Path | None = None, cache: Path | None = None) -> None:
    """Look for tasks in a further folder, and keep what tasks make in another than the user's cache."""
    global _cache
    if tasks is not None and str(tasks) not in __path__:
        __path__.append(str(tasks))
    _cache = cache or _cache


def cache_folder() -> Path:
    """Return where tasks keep what they make: `$XDG_CACHE_HOME/maple_trl/claims`, by default below `~/.cache`."""
    if _cache is not None:
        return _cache
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maple_trl" / "claims"


def load_task(name: str) -> Task:
    """Return the module of a task."""
    try:
        return importlib.import_module(f"tasks.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"tasks.{name}":
            raise
        known = sorted(file.stem for folder in __path__ for file in Path(folder).glob("[a-z]*.py"))
        raise ValueError(f"no task {name!r}; there are {', '.join(known)}") from None


PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy")
"""Libraries whose versions change numbers."""
_quick = False


def versions() -> dict[str, str]:
    """Return the installed versions of [`PACKAGES`], and Python's."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def made_with(task: Task) -> dict[str, str]:
    """Return what else than the source changes a task's numbers: the libraries' versions, and a GPU."""
    return versions() | made_on(task)


def digest(files: Iterable[Path]) -> str:
    """Return what the content of files, in the order of their paths, comes to."""
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:12]


def start_of(folder: Path) -> str:
    """Return what tells the tables and the model of a prepared folder from those of another."""
    return json.loads((folder / WHOLE).read_text(encoding="utf-8"))["start"]


def _made_by(task: Any) -> dict[str, Any]:
    modules = (task, supervised, *getattr(task, "MADE_OF", ()))
    return {"source": digest(Path(module.__file__) for module in modules), "versions": made_with(task)}


def _is_whole(folder: Path, made_by: Mapping[str, Any]) -> bool:
    try:
        told = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(told, dict) and told.get("made_by") == made_by


def prepared(name: str, quick: bool | None = None) -> Path:
    """
    Return the folder of a task's data and model, which is made where it is absent, and where the task's module, those of its
    `MADE_OF`, [`supervised`], the libraries or its GPU have changed since; with any other module that it is of, it raises its `VERSION`.

    Args:
        quick: whether its model is of `QUICK_STEPS` steps, where the task has `COLD_STEPS`, the steps that it is trained for;
            as the run said that was told last, where it is not told (instruments do not).
    """
    global _quick
    _quick = _quick if quick is None else quick
    quick, task = _quick, load_task(name)
    folder = cache_folder() / f"{name}-{task.VERSION}{'-quick' * quick}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        made_by = _made_by(task)
        if not _is_whole(folder, made_by):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            steps = getattr(task, "COLD_STEPS", None)
            if quick and steps is not None:
                task.COLD_STEPS = QUICK_STEPS
            try:
                task.prepare(folder)
            finally:
                if steps is not None:
                    task.COLD_STEPS = steps
            start = digest([*folder.rglob("*.parquet"), *folder.rglob("*.safetensors")])
            write_atomically(folder / WHOLE, json.dumps({"made_by": made_by, "start": start}))
    return folder
