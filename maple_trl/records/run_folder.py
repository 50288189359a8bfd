"""What a folder holds already: the results of a training run, or an evaluation. Results of two runs do not mix."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path


CRITICAL_STEPS_FILE, EMBEDDINGS_FILE = "critical_steps.json", "embeddings.parquet"
"""What tells of the completions of a run or an evaluation, and goes where those go."""

ZERO_SHOT_FILE = "zero_shot.json"
"""The accuracy of the untrained model by tag; a run that would measure the same reads it there."""

_FILES = (
    "summary.json",
    "metrics.jsonl",
    "trainer_state.json",
    CRITICAL_STEPS_FILE,
    EMBEDDINGS_FILE,
    ZERO_SHOT_FILE,
)
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
)
_SHOWN = 4  # results that an error names


def run_results(folder: str | os.PathLike[str]) -> list[str]:
    """List what a training run has left in a folder: checkpoints, weights, completions, log and summary."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((path.name for path in folder.iterdir() if _is_result(path)), key=_natural)


def _is_result(path: Path) -> bool:
    if path.is_dir():
        return bool(re.fullmatch(r"checkpoint-\d+", path.name)) or (path.name == "rollouts" and any(path.iterdir()))
    if path.name not in _FILES and not _WEIGHTS.fullmatch(path.name):
        return False
    # An empty log is that of a run that came to nothing. A link to what is gone is there: a model would be saved through it.
    return not path.exists() or path.stat().st_size > 0


def is_unfinished(result: str) -> bool:
    """Return whether a result, by its name, is one that a run leaves before it ends, and not what it is made for."""
    return result in ("metrics.jsonl", "rollouts", ZERO_SHOT_FILE) or bool(re.fullmatch(r"checkpoint-\d+", result))


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def named(results: list[str]) -> str:
    """Return the first results by name, and how many more there are."""
    more = f" and {len(results) - _SHOWN} more" if len(results) > _SHOWN else ""
    return ", ".join(results[:_SHOWN]) + more


def holds_evaluation(folder: str | os.PathLike[str]) -> bool:
    """Return whether `maple-trl eval` has written into a folder."""
    folder = Path(folder)
    return (folder / "evaluation.json").is_file() or (
        (folder / "result.json").is_file() and (folder / "rows.parquet").is_file()
    )


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder or lies below it, links resolved."""
    path, folder = Path(path).resolve(), Path(folder).resolve()
    return path == folder or folder in path.parents


def remove_results(folder: str | os.PathLike[str], keep: Collection[str] = ()) -> list[str]:
    """Remove what [`run_results`] names but for `keep`, and nothing else; return the names."""
    results = [name for name in run_results(folder) if name not in keep]
    for name in results:
        path = Path(folder, name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return results
