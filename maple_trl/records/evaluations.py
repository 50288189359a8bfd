"""
The folder of an evaluation: what was asked is kept batch by batch, so that a run that was stopped goes on.

Layout:

    evaluation.json      what decides the numbers; written first
    batches/00000.parquet …  finished batches, while the evaluation is going on
    rows.parquet         all lines, once every batch is done; see `LINES`
    result.json          accuracies and all that decides them; the same bytes for the same evaluation
    run.json             times, processes, threads, and the folder of the media
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maple_trl.files import differences, write_atomically, write_table
from maple_trl.records.run_folder import CRITICAL_STEPS_FILE, EMBEDDINGS_FILE, holds_evaluation, named, run_results


class EvaluationError(ValueError):
    """The evaluation is described wrongly, or cannot go on. The message says what would be right."""


LINES = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("tag", pa.string()),  # the signals that the question requires, whatever is fed
        ("solution", pa.string()),
        ("category", pa.string()),
        ("prompt", pa.string()),  # null, with the four below, where the row is no prompt under the access
        ("video", pa.list_(pa.string())),  # the files that are fed, as the row names them
        ("audio", pa.list_(pa.string())),
        ("image", pa.list_(pa.string())),
        ("subtitle", pa.string()),  # a file, or the text itself
        ("access", pa.string()),  # as it was asked for
        ("fed", pa.string()),  # the signals that were fed, as a tag
        ("clip", pa.string()),  # what shares its fate, see `maple_trl.metrics.clips`
        ("question", pa.string()),  # the same for rows that ask one question with several inputs
        ("benchmark", pa.string()),
        ("status", pa.string()),  # scored, unscored, error or lacking
        ("sample", pa.int64()),  # null where the question was not asked
        ("completion", pa.string()),
        ("answer", pa.string()),
        ("score", pa.float64()),
        ("reason", pa.string()),  # why there is no score
        ("detail", pa.string()),
        ("path", pa.string()),
        ("finish", pa.string()),  # end, or length where the completion was cut
        ("completion_tokens", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("image_tokens", pa.int64()),
        ("video_tokens", pa.int64()),
        ("audio_tokens", pa.int64()),
        ("subtitle_tokens", pa.int64()),
        ("audio_seconds", pa.float64()),  # that were fed
        ("audio_source_seconds", pa.float64()),  # of the sound that they are taken from: more where parts were fed
        ("notes", pa.list_(pa.string())),
        ("inputs", pa.string()),  # digest of the tokens, positions, pictures, frames and sound that the model read
        ("extra", pa.string()),  # what the scoring function noted, as JSON, e.g. a judge's grades or `measures`
    ]
)
"""Columns of `rows.parquet`: a line per sample, and one for each question that was not asked under an access."""

_SHOWN = 5  # differences between two evaluations that an error lists


@dataclass(frozen=True)
class Evaluation:
    """
    A finished evaluation.

    Attributes:
        lines: the table `rows.parquet`, with the columns of `LINES`.
        result: what `result.json` holds.
        run: what `run.json` holds.
    """

    lines: pa.Table
    result: dict[str, Any]
    run: dict[str, Any]


def load_evaluation(folder: str | os.PathLike[str]) -> Evaluation:
    """
    Read the folder of a finished evaluation, e.g. for a report.

    Raises:
        FileNotFoundError: when there is none, or it has not been finished.
        EvaluationError: for a file that is damaged.
    """
    folder = Path(folder)
    result, run = (_read_json(folder / name) for name in ("result.json", "run.json"))
    return Evaluation(_read_table(folder / "rows.parquet"), result, run)


class EvalStore:
    """
    Reads and writes the folder of an evaluation.

    A file appears whole or not at all, whenever the process is killed. Several processes may write batches; one of
    them begins and finishes.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.batches = self.folder / "batches"
        self.table = self.folder / "rows.parquet"

    @property
    def complete(self) -> bool:
        """Whether the evaluation is finished."""
        return self.table.is_file()

    def check(self) -> None:
        """
        Check that the folder is one for an evaluation.

        Raises:
            EvaluationError: when it holds a training run or a model, whose files `--overwrite` does not remove either.
        """
        results = run_results(self.folder)
        if results and not holds_evaluation(self.folder):
            raise EvaluationError(
                f"{self.folder} holds a training run or a model ({named(results)}); name another folder with --output"
            )

    def begin(self, identity: Mapping[str, Any], overwrite: bool = False) -> None:
        """
        Open the folder for an evaluation, a new one or the one that it holds.

        Args:
            identity: what decides the numbers, as JSON values.
            overwrite: remove the evaluation that is there.

        Raises:
            EvaluationError: when the folder holds another evaluation, naming what differs, or something else.
        """
        self.check()
        note = self.folder / "evaluation.json"
        if overwrite and note.is_file():
            shutil.rmtree(self.batches, ignore_errors=True)
            # The last two tell of the completions that are removed with it.
            for name in ("rows.parquet", "result.json", "run.json", CRITICAL_STEPS_FILE, EMBEDDINGS_FILE):
                (self.folder / name).unlink(missing_ok=True)
            note.unlink()
        if note.is_file():
            found = differences(_read_json(note), json.loads(json.dumps(identity)))
            if found:
                more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
                raise EvaluationError(
                    f"{self.folder} holds another evaluation: {'; '.join(found[:_SHOWN])}{more}. Name another folder "
                    "with --output, or replace it with --overwrite"
                )
        elif self.table.exists() or self.batches.exists() or (self.folder / "result.json").exists():
            raise EvaluationError(
                f"{self.folder} holds files of an evaluation but no evaluation.json; name another folder with --output"
            )
        for scratch in (*self.folder.glob(".*.partial"), *self.batches.glob(".*.partial")):
            scratch.unlink(missing_ok=True)  # of a process that was killed
        self.batches.mkdir(parents=True, exist_ok=True)
        if not note.is_file():
            write_atomically(note, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")

    def has(self, number: int) -> bool:
        """Return whether the batch of this `number` is done; one whose file is damaged is not."""
        try:
            return bool(pq.read_schema(self._batch(number)).equals(LINES))
        except (OSError, pa.ArrowInvalid):
            return False

    def write(self, number: int, lines: Iterable[Mapping[str, Any]]) -> None:
        """Keep the `lines` of the finished batch of this `number`."""
        write_table(pa.Table.from_pylist(list(lines), LINES), self._batch(number))

    def finish(self, batches: int, skipped: Iterable[Mapping[str, Any]]) -> None:
        """
        Join all batches into the one table, in the order of access, rows and samples.

        Args:
            batches: how many there are.
            skipped: lines of questions that were not asked, and are in no batch.

        Raises:
            EvaluationError: for a batch that is missing or cannot be read.
        """
        if self.complete:
            shutil.rmtree(self.batches, ignore_errors=True)
            return
        tables = [pa.Table.from_pylist(list(skipped), LINES)]
        for number in range(batches):
            try:
                tables.append(pq.read_table(self._batch(number), schema=LINES))
            except (OSError, pa.ArrowException) as error:
                raise EvaluationError(
                    f"{self._batch(number)} cannot be read ({error}); remove it and give the same command again"
                ) from error
        whole = pa.concat_tables(tables)
        write_table(whole.sort_by([(name, "ascending") for name in ("access", "row", "sample")]), self.table)
        shutil.rmtree(self.batches)

    def lines(self) -> pa.Table:
        """
        Return all lines of a finished evaluation.

        Raises:
            EvaluationError: when the table is damaged.
        """
        return _read_table(self.table)

    def _batch(self, number: int) -> Path:
        return self.batches / f"{number:05}.parquet"


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, schema=LINES)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise EvaluationError(f"{path} cannot be read ({error}): begin anew with --overwrite") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} cannot be read ({error}): begin anew with --overwrite") from error
