"""Finds out what a folder holds, and reads it: a training run or an evaluation, finished or still going."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maple_trl.evaluation.results import evaluation_results
from maple_trl.records.evaluations import LINES
from maple_trl.records.option_changes import CHANGES_FILE, read_changes, told
from maple_trl.records.rollouts import ROLLOUTS, is_table_of, read_rollouts


# Without these columns of `LINES` there is nothing to show, and these parts of an access' results are drawn.
_EXTRA = ("prompt", "video", "audio", "image", "image_tokens", "subtitle", "fed", "clip", "question", "benchmark")
_EXTRA += ("audio_seconds", "audio_source_seconds")
_COLUMNS = tuple(name for name in LINES.names if name not in _EXTRA)
_OF_AN_ACCESS = {"accuracy", "bounds", "pass_at_k", "modality_gap", "counts"}

_READ = ("metrics.jsonl", "trainer_state.json", "args.json", "summary.json", "quarantine.json", "critical_steps.json")
_READ += (CHANGES_FILE, "embeddings.parquet", "evaluation.json", "result.json", "rows.parquet", "run.json")
_TAIL = 1_000_000  # bytes at the end of a log that hold its last two entries
_MARKS = ("metrics.jsonl", "trainer_state.json", "summary.json", "rollouts", "result.json", "evaluation.json")


class ReportError(ValueError):
    """A report that cannot be made; the message says of which folder, and what is missing."""


class NoRunError(ReportError):
    """A folder that holds no run, or is not there: not yet, perhaps."""


@dataclass
class RunData:
    """
    Contents of the folder of a run or an evaluation.

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
        quarantine: the prompts of a training run that are in quarantine, with `reason` and `path`.
        not_finite: metrics that must be numbers and were not in some entries of the log: in how many, of how many.
        options: of a training job, by name; `None` where its folder does not say.
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
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    not_finite: dict[str, tuple[int, int]] = field(default_factory=dict)
    options: dict[str, Any] | None = None

    @property
    def quarantined(self) -> str | None:
        """Say how many prompts are in quarantine by reason, and name the first files; `None` where none are."""
        if not self.quarantine:
            return None
        reasons = Counter(entry["reason"] for entry in self.quarantine)
        files = list(dict.fromkeys(entry["path"] for entry in self.quarantine if entry["path"]))[:3]
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        first = f"; first {', '.join(files)}" if files else ""
        return f"{reasons.total()} prompts quarantined ({counts}{first})"

    @property
    def left_out(self) -> list[Mapping[str, Any]]:
        """What a run that has ended says that it left out, failed at or never fired."""
        notes = (self.summary or {}).get("left_out")
        return [note for note in notes if isinstance(note, Mapping)] if isinstance(notes, list) else []

    @property
    def accesses(self) -> list[str]:
        """What the questions of an evaluation were asked under, in the order in which they were asked for."""
        if self.result is not None:
            return list(self.result["accesses"])
        return [] if self.table is None else list(dict.fromkeys(self.table["access"].to_pylist()))


def read_run(folder: str | os.PathLike) -> RunData:
    """
    Read a folder.

    Raises:
        NoRunError: when it is none, or holds neither a run nor an evaluation; runs in folders below it are named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NoRunError(f"{folder} is a file; name its folder" if folder.exists() else f"there is no folder {folder}")
    if _is_evaluation(folder):
        run = _read_evaluation(folder)
    else:
        run = _read_training(folder)
    if not run.log and run.table is None and run.summary is None and run.result is None:
        raise NoRunError(f"{folder} holds no run: {'; '.join([*run.notes, _what_instead(folder)])}")
    return run


def _what_instead(folder: Path) -> str:
    below = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and any((path / m).exists() for m in _MARKS)
    )
    text = "neither metrics.jsonl, a checkpoint with trainer_state.json, rollouts, nor evaluation.json"
    return f"{text}. Folders in it that do: {', '.join(below)}" if below else text


def _is_evaluation(folder: Path) -> bool:
    return (folder / "evaluation.json").is_file() or (folder / "result.json").is_file()


def _name(folder: Path) -> str:
    return folder.name or folder.resolve().name or str(folder)


def _updated(paths: list[Path]) -> str:
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds") if times else "unknown"


def has_ended(folder: str | os.PathLike) -> bool:
    """
    Return whether nothing more is to come in a folder: its evaluation is finished, or its training job has written its summary.

    Of a trainer without a job (no `args.json`) the last entry of the log is the end.
    """
    folder = Path(folder)
    if _is_evaluation(folder):
        return (folder / "result.json").is_file() and (folder / "rows.parquet").is_file()
    log = folder / "metrics.jsonl"
    if not log.is_file():
        return False
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - _TAIL, 0))
        ended = b'"train_runtime"' in b"\n".join(file.read().strip().split(b"\n")[-2:])
    return ended and ((folder / "summary.json").is_file() or not (folder / "args.json").is_file())


def signature(folder: str | os.PathLike) -> tuple:
    """Return what changes whenever a run or an evaluation has written something that a report shows."""
    folder = Path(folder)
    paths = [folder / name for name in _READ]
    for pattern in (f"{ROLLOUTS}/*.parquet", "batches/*.parquet", "checkpoint-*/trainer_state.json"):
        paths += sorted(folder.glob(pattern))
    found = []
    for path in paths:
        try:
            facts = path.stat()
        except OSError:
            continue
        found.append((path.name, facts.st_mtime_ns, facts.st_size))
    return tuple(found)


# Training


def _read_training(folder: Path) -> RunData:
    notes: list[str] = []
    log, source, not_finite = _read_log(folder, notes)
    summary = _read_json(folder / "summary.json", notes)
    if summary is not None and not all(_numbers(summary.get(name) or {}) for name in ("before", "after", "questions")):
        notes.append("summary.json is none of a training job and is left out")
        summary = None
    table, media_root, broken = read_rollouts(folder / ROLLOUTS)
    if broken:
        notes.append(f"{len(broken)} files of {ROLLOUTS} cannot be read and are left out: {', '.join(broken[:3])}")
    finished = any("train_runtime" in entry for entry in log[-2:]) if log else None
    parts = [folder / "summary.json", folder / ROLLOUTS, *([folder / source] if source else [])]
    run = RunData(folder, _name(folder), "training", finished, _updated(parts))
    run.log, run.log_source, run.notes, run.not_finite = log, source, notes, not_finite
    # A run that goes on in the folder of a finished one has not written its own yet.
    run.summary = summary if finished is not False else None
    run.table, run.media_root = table, media_root
    run.quarantine = _read_quarantine(folder / "quarantine.json", notes)
    run.options = _read_json(folder / "args.json", notes)
    for entry in read_changes(folder):
        notes.append(
            f"Options were changed at step {entry['step']}, and those shown are the last: {told(entry['options'])}."
        )
    return run


def _read_quarantine(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the prompts that are in quarantine."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return [{**entry, "reason": str(entry["reason"]), "path": entry["path"]} for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"{path.name} cannot be read ({error}) and is left out")
        return []


def _read_log(folder: Path, notes: list[str]) -> tuple[list[dict[str, Any]], str | None, dict[str, tuple[int, int]]]:
    """Read the log that goes furthest: `metrics.jsonl`, or that of a newer checkpoint; its file, and what was no number."""
    path = folder / "metrics.jsonl"
    written = _read_metrics(path, notes) if path.is_file() else []
    log = _log_entries(written)
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
        history = (_read_json(state, notes) or {}).get("log_history")
        found = _log_entries(history)
        if found and (not log or _last_step(found) > _last_step(log)):
            return found, str(state.relative_to(folder)), _not_finite(history)
        break
    return log, source, _not_finite(written)


def _not_finite(written: list[Any]) -> dict[str, tuple[int, int]]:
    """Count entries in which the loss or the gradient's norm is there and no finite number (`null` in `metrics.jsonl`)."""
    found = {}
    for name in ("loss", "grad_norm"):
        values = [entry[name] for entry in written if isinstance(entry, dict) and name in entry]
        odd = sum(value is None or (_number(value) and not math.isfinite(value)) for value in values)
        if odd:
            found[name] = (odd, len(values))
    return found


def _last_step(log: list[dict[str, Any]]) -> int:
    return max((entry["step"] for entry in log), default=-1)


def _log_entries(log: Any) -> list[dict[str, Any]]:
    """Return the entries of a log that have a step, and their numbers."""
    found = [
        {name: value for name, value in entry.items() if _number(value) and math.isfinite(value)}
        for entry in (log if isinstance(log, list) else ())
        if isinstance(entry, dict)
    ]
    return [entry for entry in found if "step" in entry]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(values: Any) -> bool:
    return isinstance(values, Mapping) and all(map(_number, values.values()))


def _read_metrics(path: Path, notes: list[str]) -> list[Any]:
    """Read a file of JSON lines, of which the last may be half there: a run that is going on, or was killed."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    entries, odd = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entries.append(json.loads(line))
        except ValueError:
            odd += [number] if number < len(lines) else []
    if odd:
        which = f"line {odd[0]} is" if len(odd) == 1 else f"{len(odd)} lines, the first {odd[0]}, are"
        notes.append(f"{path.name}: {which} no JSON and left out")
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
    identity, result, facts = (
        _read_json(folder / name, notes) for name in ("evaluation.json", "result.json", "run.json")
    )
    if result is not None and not _is_result(result):
        notes.append("result.json is none of `maple-trl eval` and is left out")
        result = None
    table = _read_answers(folder, notes)
    finished = result is not None and (folder / "rows.parquet").is_file()
    if not finished and table is not None and identity is not None:
        try:
            result = {**identity, **results_so_far(table, identity)}
            notes.append("The evaluation is not finished: its numbers are of the questions that were answered so far.")
        except (KeyError, TypeError):
            notes.append("evaluation.json is none of `maple-trl eval` and is left out")
    parts = [folder / name for name in ("result.json", "rows.parquet", "batches", "evaluation.json")]
    run = RunData(folder, _name(folder), "evaluation", finished, _updated(parts))
    run.result, run.table, run.notes = result, table, notes
    run.summary, run.media_root = facts, (facts or {}).get("media_root")
    return run


def _is_result(result: Mapping[str, Any]) -> bool:
    accesses = result.get("accesses")
    return isinstance(accesses, Mapping) and all(
        isinstance(found, Mapping) and found.keys() >= _OF_AN_ACCESS for found in accesses.values()
    )


def _read_answers(folder: Path, notes: list[str]) -> pa.Table | None:
    """Read the table of a finished evaluation, or the batches of one that is going on."""
    whole = folder / "rows.parquet"
    batches = (
        [] if whole.is_file() else [_read_lines(path, notes) for path in sorted(folder.glob("batches/*.parquet"))]
    )
    if whole.is_file():  # an evaluation that has just ended has joined its batches, and removed them
        return _read_lines(whole, notes)
    batches = [batch for batch in batches if batch is not None]
    return pa.concat_tables(batches, promote_options="default") if batches else None


def _read_lines(path: Path, notes: list[str]) -> pa.Table | None:
    try:
        table = pq.ParquetFile(path).read()
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        notes.append(f"{path.name} cannot be read ({error}) and is left out")
        return None
    if not is_table_of(table, LINES, _COLUMNS):
        notes.append(f"{path.name} has other columns than `maple-trl eval` writes and is left out")
        return None
    return table


def results_so_far(table: pa.Table, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of an evaluation that is still going on."""
    asking = identity["asking"]
    return evaluation_results(table, asking["access"], asking["samples"])
