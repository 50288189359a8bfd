"""Finds out what a folder holds, and reads it: a training run or an evaluation, finished or still going."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maple_trl.evaluation.eval_results import evaluation_results
from maple_trl.reports.rollout_files import ROLLOUTS, read_rollouts


_MARKS = ("metrics.jsonl", "trainer_state.json", "summary.json", "rollouts", "result.json", "evaluation.json")


class ReportError(ValueError):
    """A report that cannot be made; the message says of which folder, and what is missing."""


@dataclass
class RunData:
    """
    What a folder holds.

    Attributes:
        folder: as it was named.
        name: shown in the report.
        kind: `"training"` or `"evaluation"`.
        finished: whether the run came to its end; `None` where its files do not tell.
        updated: when the newest of its files was written.
        log: entries of a trainer's log, in order.
        log_source: the file that they are from.
        summary: what a training job wrote at its end.
        result: what an evaluation found.
        table: completions, a line each; `None` where there are none.
        media_root: the folder below which their media lie, where it is known.
        notes: what could not be read.
    """

    folder: Path
    name: str
    kind: str
    finished: bool | None
    updated: str
    log: list[dict[str, Any]] = field(default_factory=list)
    log_source: str | None = None
    summary: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    table: pa.Table | None = None
    media_root: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def accesses(self) -> list[str]:
        """What the questions of an evaluation were asked under, in the order in which they were asked for."""
        return list((self.result or {}).get("accesses", {}))


def read_run(folder: str | os.PathLike) -> RunData:
    """
    Reads a folder.

    Raises:
        ReportError: when it is none, or holds neither a run nor an evaluation; runs in folders below it are named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"there is no folder {folder}")
    if (folder / "evaluation.json").is_file() or (folder / "result.json").is_file():
        run = _read_evaluation(folder)
    else:
        run = _read_training(folder)
    if not run.log and run.table is None and run.summary is None and run.result is None:
        raise ReportError(f"{folder} holds no run: {_what_instead(folder)}")
    return run


def _what_instead(folder: Path) -> str:
    below = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and any((path / m).exists() for m in _MARKS)
    )
    text = "neither metrics.jsonl, a checkpoint with trainer_state.json, rollouts, nor evaluation.json"
    return f"{text}. Folders in it that do: {', '.join(below)}" if below else text


def _name(folder: Path) -> str:
    return folder.name or folder.resolve().name or str(folder)


def _updated(paths: list[Path]) -> str:
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds") if times else "unknown"


# Training


def _read_training(folder: Path) -> RunData:
    notes: list[str] = []
    log, source = _read_log(folder, notes)
    summary = _read_json(folder / "summary.json", notes)
    table, media_root, broken = read_rollouts(folder / ROLLOUTS)
    if broken:
        notes.append(f"{len(broken)} files of {ROLLOUTS} cannot be read and are left out: {', '.join(broken[:3])}")
    finished = any("train_runtime" in entry for entry in log[-2:]) if log else None
    parts = [folder / "summary.json", folder / ROLLOUTS, *([folder / source] if source else [])]
    run = RunData(folder, _name(folder), "training", finished, _updated(parts))
    run.log, run.log_source, run.notes = log, source, notes
    # A run that goes on in the folder of a finished one has not written its own yet.
    run.summary = summary if finished is not False else None
    run.table, run.media_root = table, media_root
    return run


def _read_log(folder: Path, notes: list[str]) -> tuple[list[dict[str, Any]], str | None]:
    """The log that goes furthest: `metrics.jsonl`, or that of a newer checkpoint."""
    path = folder / "metrics.jsonl"
    log = _read_lines(path, notes) if path.is_file() else []
    source = path.name if log else None
    checkpoints = sorted(
        (int(match[1]), other)
        for other in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", other.name)) and (other / "trainer_state.json").is_file()
    )
    states = [folder / "trainer_state.json", *(other / "trainer_state.json" for _, other in reversed(checkpoints))]
    for state in states:
        newer = not log or (state.is_file() and state.stat().st_mtime > path.stat().st_mtime + 1)
        if not state.is_file() or not newer:
            continue
        found = (_read_json(state, notes) or {}).get("log_history") or []
        if found and (not log or _last_step(found) > _last_step(log)):
            return found, str(state.relative_to(folder))
        break
    return log, source


def _last_step(log: list[dict[str, Any]]) -> int:
    return max((entry["step"] for entry in log if isinstance(entry.get("step"), int)), default=-1)


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Entries of a file of JSON lines. The last line may be half there: a run that is going on, or was killed."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if number < len(lines):
                notes.append(f"{path.name}, line {number} is no JSON and is left out")
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def _read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({error}) and is left out")
        return None
    return found if isinstance(found, dict) else None


# Evaluation


def _read_evaluation(folder: Path) -> RunData:
    notes: list[str] = []
    result, run_facts = (_read_json(folder / name, notes) for name in ("result.json", "run.json"))
    finished = result is not None and (folder / "rows.parquet").is_file()
    table = None
    if (folder / "rows.parquet").is_file():
        table = pq.ParquetFile(folder / "rows.parquet").read()
    else:
        batches = [pq.ParquetFile(path).read() for path in sorted((folder / "batches").glob("*.parquet"))]
        table = pa.concat_tables(batches) if batches else None
    identity = _read_json(folder / "evaluation.json", notes)
    if not finished and table is not None and identity is not None:
        result = {**identity, **results_so_far(table, identity)}
        notes.append("The evaluation is not finished: its numbers are of the questions that were answered so far.")
    parts = [folder / name for name in ("result.json", "rows.parquet", "batches", "evaluation.json")]
    run = RunData(folder, _name(folder), "evaluation", finished, _updated(parts))
    run.result, run.table, run.notes = result, table, notes
    run.summary = run_facts
    return run


def results_so_far(table: pa.Table, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The results of an evaluation that is still going on."""
    asking = identity["asking"]
    return evaluation_results(table, asking["access"], asking["samples"])
