"""Keeping the rows of a data set that a model solves sometimes: its accuracy on each prompt, from several samples."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value

from maple_trl.data.shards import hold_split, replace_held_split, replace_split, shards_of
from maple_trl.evaluation.options import EvalOptions
from maple_trl.files import write_atomically
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.eval_job import EvalArguments, EvalJob, EvalMedia
from maple_trl.jobs.evaluate import load_questions, run_evaluation
from maple_trl.jobs.forecasts import Forecast, forecast_evaluation
from maple_trl.modalities import ModalityTag
from maple_trl.records.evaluations import EvalStore


DROPPED = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("tag", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
    + [("accuracy", pa.float64()), ("samples", pa.int64())]
)
"""Columns of `dropped-SPLIT.parquet`."""

_BATCH = 1024


@dataclass
class DifficultyArguments(EvalArguments):
    """Which rows are asked, of which model, and which of them are kept."""

    output_dir: str | None = field(
        default=None, metadata={"aliases": ["--output"], "help": "folder of the rows that are kept (required)"}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"aliases": ["--split"], "help": "of the data (train; a benchmark's first)"}
    )
    keep_above: float = field(default=0.0, metadata={"help": "keep rows whose accuracy is more than this"})
    keep_at_most: float = field(default=0.75, metadata={"help": "and at most this"})
    shard_rows: int = field(default=50_000, metadata={"help": "rows of a file"})
    # Of an evaluation alone.
    preset: str | None = field(init=False, default=None)
    max_errors: int = field(init=False, default=0)
    confidence: float = field(init=False, default=0.95)
    report: str | None = field(init=False, default=None)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.keep_above < self.keep_at_most <= 1:
            raise ValueError(
                "rows are kept with an accuracy above --keep_above and at most --keep_at_most, both in [0, 1], got "
                f"{self.keep_above:g} and {self.keep_at_most:g}"
            )
        if self.shard_rows < 1:
            raise ValueError(f"--shard_rows must be 1 or more, got {self.shard_rows}")


@dataclass(frozen=True)
class DifficultyOptions(EvalOptions):
    """How questions are asked: as in an evaluation, with as many samples as a group has in training."""

    samples: int = field(default=8, metadata={"aliases": ["--num_generations"], "help": "completions per question"})


def forecast_difficulty(arguments: DifficultyArguments, options: DifficultyOptions, media: EvalMedia) -> Forecast:
    """
    Say what [`filter_by_difficulty`] would do.

    Raises:
        SetupError: for what it would refuse before it loads anything.
    """
    folder = Path(arguments.output_dir or ".")
    split = arguments.dataset_test_split or "train"
    _check_folder(folder, split)
    found = forecast_evaluation(_job(arguments, options, media, folder), split)
    found.writes.append(f"{folder}: {split}-….parquet, dropped-{split}-….parquet, difficulty-{split}.json")
    return found


@dataclass(frozen=True)
class Measured:
    """
    What was found about a row.

    Attributes:
        row, name, tag: which.
        accuracy: mean score of the samples that have one; `None` without any.
        samples: how many these are.
        reason: why there is none, as the evaluation calls it.
        detail: likewise, in words.
    """

    row: int
    name: str
    tag: str
    accuracy: float | None
    samples: int
    reason: str | None = None
    detail: str | None = None


@dataclass
class DifficultySummary:
    """
    What became of the rows.

    Attributes:
        rows: how many were asked.
        kept: by tag.
        dropped: by reason and tag.
        files: the shards that were written.
        media_root: the folder to which the media paths of the rows are relative.
    """

    rows: int
    kept: dict[str, int]
    dropped: dict[str, dict[str, int]]
    files: list[str]
    media_root: str

    @property
    def total(self) -> int:
        """All rows that are kept."""
        return sum(self.kept.values())


def filter_by_difficulty(
    arguments: DifficultyArguments, options: DifficultyOptions, media: EvalMedia
) -> DifficultySummary | None:
    """
    Ask a model every row several times, and write those that it solves sometimes.

    The evaluation is kept in `OUTPUT/evaluation`, and the answers of a server one by one beside it: a run that was stopped
    goes on, and other bounds ask nothing anew. The rows have two columns more, `accuracy` and `samples`.

    Returns:
        `DifficultySummary` or `None`: `None` in all processes but the first.

    Raises:
        SetupError, EvaluationError: when it is described wrongly.
        ShardError: when another process is writing the rows, and where they cannot be written.
    """
    split = arguments.dataset_test_split or "train"
    folder = Path(arguments.output_dir or ".")
    job = _job(arguments, options, media, folder)
    _check_folder(folder, split)
    if run_evaluation(job) is None:
        return None
    questions = load_questions(job)
    assert questions.dataset is not None
    found = measure(EvalStore(job.output_dir or "").lines())
    kept: list[Measured] = []
    dropped: list[tuple[Measured, str]] = []
    for measured in found:
        reason = reason_to_drop(measured, arguments.keep_above, arguments.keep_at_most)
        kept += [measured] if reason is None else []
        dropped += [] if reason is None else [(measured, reason)]
    with hold_split(folder, split):  # rows, what was dropped and the counts are of one run
        files = _write_rows(questions.dataset, kept, folder, split, arguments.shard_rows)
        _write_dropped(dropped, folder, split, arguments.shard_rows)
        by_reason: dict[str, Counter[str]] = defaultdict(Counter)
        for measured, reason in dropped:
            by_reason[reason][measured.tag] += 1
        summary = DifficultySummary(
            rows=len(found),
            kept=_by_tag(Counter(measured.tag for measured in kept)),
            dropped={reason: _by_tag(counts) for reason, counts in sorted(by_reason.items())},
            files=[path.name for path in files],
            media_root=questions.media_root,
        )
        described = {"keep_above": arguments.keep_above, "keep_at_most": arguments.keep_at_most}
        described |= {"samples": options.samples, **dataclasses.asdict(summary)}
        write_atomically(
            folder / f"difficulty-{split}.json", json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        )
    return summary


def _check_folder(folder: Path, split: str) -> None:
    """Check that the rows of a split in a folder are those of an evaluation there."""
    if not (folder / "evaluation" / "evaluation.json").is_file() and (there := shards_of(folder, split)):
        raise SetupError(f"--output: {there[0]} is there already and is none of this command; name another folder")


def _job(arguments: DifficultyArguments, options: DifficultyOptions, media: EvalMedia, folder: Path) -> EvalJob:
    if len(options.access) != 1:
        raise SetupError(f"--access: rows are measured with one choice of signals, got {', '.join(options.access)}")
    names = {field.name for field in dataclasses.fields(EvalArguments)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if arguments.benchmark is None:
        given["dataset_test_split"] = arguments.dataset_test_split or "train"
    given |= {"output_dir": str(folder / "evaluation"), "answer_cache": str(folder / "answers.sqlite")}
    return EvalJob(**given, options=options, media=media)


def measure(lines: pa.Table) -> list[Measured]:
    """
    Compute the accuracy of each row of an evaluation with one access, in the order of rows.

    Args:
        lines: with the columns of [`~maple_trl.records.evaluations.LINES`].
    """
    scores: dict[int, list[float]] = defaultdict(list)
    first: dict[int, Mapping[str, Any]] = {}
    names = ["row", "id", "tag", "score", "reason", "detail", "status"]
    for batch in lines.select(names).to_batches(_BATCH):
        for line in batch.to_pylist():
            first.setdefault(line["row"], line)
            if line["score"] is not None:
                scores[line["row"]].append(line["score"])
    return [_measured(row, first[row], scores[row]) for row in sorted(first)]


def _measured(row: int, line: Mapping[str, Any], scores: list[float]) -> Measured:
    who = (row, line["id"], line["tag"] or "")
    if scores:
        return Measured(*who, math.fsum(scores) / len(scores), len(scores))
    kind = "unscorable" if line["status"] == "unscored" else f"quarantined: {line['reason']}"
    return Measured(*who, None, 0, kind, line["detail"])


def reason_to_drop(measured: Measured, above: float, at_most: float) -> str | None:
    """Return why a row is not kept, `None` for one whose accuracy is above one bound and at most the other."""
    accuracy = measured.accuracy
    if accuracy is None:
        return measured.reason
    if accuracy <= above:
        return "never solved" if accuracy == 0 else "too hard"
    if accuracy > at_most:
        return "always solved" if accuracy == 1 else "too easy"
    return None


def _write_rows(dataset: Dataset, kept: list[Measured], folder: Path, split: str, shard_rows: int) -> list[Path]:
    added = {"accuracy": Value("float64"), "samples": Value("int64")}
    rest = dataset.remove_columns([name for name in added if name in dataset.column_names])
    features = Features({**rest.features, **added})
    chosen = rest.select([measured.row for measured in kept])

    def tables() -> Iterator[pa.Table]:
        start = 0
        for table in chosen.with_format("arrow").iter(batch_size=_BATCH):
            part = kept[start : start + len(table)]
            columns = {name: table[name] for name in rest.column_names}
            columns |= {name: pa.array([getattr(measured, name) for measured in part]) for name in added}
            yield pa.table(columns).cast(features.arrow_schema)
            start += len(table)

    return replace_held_split(tables(), features.arrow_schema, folder, split, shard_rows)


def _write_dropped(dropped: list[tuple[Measured, str]], folder: Path, split: str, shard_rows: int) -> None:
    rows = [
        {"row": measured.row, "id": measured.name, "tag": measured.tag, "reason": reason}
        | {"detail": measured.detail, "accuracy": measured.accuracy, "samples": measured.samples}
        for measured, reason in dropped
    ]
    table = pa.Table.from_pylist(rows, DROPPED)
    replace_split([table], DROPPED, folder, f"dropped-{split}", shard_rows)


def _by_tag(counts: Mapping[str, int]) -> dict[str, int]:
    return {str(tag): counts[str(tag)] for tag in (*ModalityTag, "") if counts.get(str(tag))}
