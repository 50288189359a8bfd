"""The command `maple-trl data difficulty`: its options, and what it prints."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from maple_trl.cli.base import Command
from maple_trl.cli.eval import EVALUATION_ERRORS
from maple_trl.cli.failures import FAILED, WRONG


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.jobs.difficulty import DifficultyArguments, DifficultyOptions, DifficultySummary
    from maple_trl.jobs.eval_job import EvalMedia


def run(arguments: DifficultyArguments, options: DifficultyOptions, media: EvalMedia) -> int:
    """Keep the rows that a model solves sometimes, and print how many by tag."""
    from maple_trl.jobs.difficulty import filter_by_difficulty, forecast_difficulty

    if arguments.dry_run:
        from maple_trl.cli.dry_run import tell

        return tell(forecast_difficulty(arguments, options, media), arguments.json)
    summary = filter_by_difficulty(arguments, options, media)
    if summary is None:  # the first process tells
        return 0
    if arguments.json:
        print(json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False))
    else:
        _print_summary(summary, arguments.output_dir)
    if not summary.total:
        print(f"maple-trl data difficulty: none of {summary.rows} rows is kept", file=sys.stderr)
    return 0 if summary.total else FAILED


def _print_summary(summary: DifficultySummary, output: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from maple_trl.modalities import ModalityTag

    found = {"kept": summary.kept, **summary.dropped}
    tags = [str(tag) for tag in (*ModalityTag, "") if any(str(tag) in counts for counts in found.values())]
    table = Table(title="Rows by tag", title_justify="left")
    for name in ("", *(tag or "no tag" for tag in tags), "all"):
        table.add_column(name, justify="right" if name else "left")
    for reason, counts in found.items():
        table.add_row(reason, *(str(counts.get(tag, 0)) for tag in tags), str(sum(counts.values())))
    console = Console()
    console.print(table)
    console.print(f"written to {output}; media_root: {summary.media_root}", highlight=False, soft_wrap=True)


_SERVED = "maple-trl data difficulty --model_name_or_path NAME --server http://127.0.0.1:8000/v1 --dataset_name rows"
COMMAND = Command(
    name="data difficulty",
    help="keep the rows that a model solves sometimes",
    run=run,
    description="""\
Keeps the rows that a model solves sometimes: it answers each several times, and those with an accuracy above --keep_above
and at most --keep_at_most are written, with the columns `accuracy` and `samples`.""",
    examples=(
        "maple-trl data difficulty --model_name_or_path NAME --dataset_name rows --output_dir filtered",
        f"{_SERVED} --output_dir filtered --samples 8 --keep_at_most 0.75",
        "maple-trl data difficulty --config difficulty.yaml --keep_above 0.1",
    ),
    notes="""\
Written into OUTPUT: SPLIT-00000-of-00001.parquet … (the rows that are kept), dropped-SPLIT-….parquet (the others, with
reason and accuracy), difficulty-SPLIT.json (counts by tag and reason), and evaluation, a folder of `maple-trl eval`.

A run that was stopped goes on when the same command is given again: with --server no answer is asked for twice, and a
model in this process repeats the batch that was not finished. Other bounds ask nothing anew.""",
    statuses={FAILED: "no row is kept, or the scoring function or the server failed"},
    options={
        "options": "maple_trl.jobs.difficulty:DifficultyArguments",
        "asking": "maple_trl.jobs.difficulty:DifficultyOptions",
        "media, as in a training job": "maple_trl.jobs.eval_job:EvalMedia",
    },
    required=("model_name_or_path", "dataset_name", "output_dir"),
    errors={**EVALUATION_ERRORS, "maple_trl.data.shards:ShardError": WRONG},
    writes=lambda arguments, *_: arguments.output_dir,
    stopped="the same command goes on from what is answered",
    again="the same command goes on from what is answered",
    several=True,
)
