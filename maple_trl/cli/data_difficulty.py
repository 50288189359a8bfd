"""The command `maple-trl data difficulty`: its options, and what it prints."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maple_trl.cli.failures import asks_for_help, fail, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.jobs.difficulty import DifficultySummary

_DESCRIPTION = """\
Keeps the rows that a model solves sometimes: it answers each several times, and those with an accuracy above --keep_above
and at most --keep_at_most are written, with the columns `accuracy` and `samples`."""

_EXAMPLES = """\
examples:
  maple-trl data difficulty --model_name_or_path NAME --dataset_name rows --output_dir filtered
  maple-trl data difficulty --model_name_or_path NAME --server http://127.0.0.1:8000/v1 --dataset_name rows --output_dir filtered --samples 8 --keep_at_most 0.75
  maple-trl data difficulty --config difficulty.yaml --keep_above 0.1

Written into OUTPUT: SPLIT-00000-of-00001.parquet … (the rows that are kept), dropped-SPLIT-….parquet (the others, with
reason and accuracy), difficulty-SPLIT.json (counts by tag and reason), and evaluation, a folder of `maple-trl eval`.

A run that was stopped goes on when the same command is given again: with --server no answer is asked for twice, and a
model in this process repeats the batch that was not finished. Other bounds ask nothing anew.

Several processes: accelerate launch --num_processes N -m maple_trl.cli data difficulty ...

Exit status: 0; 1 when no row is kept, or the scoring function or the server failed; 2 for a wrong description; 130 when
interrupted.
"""

_PLACES = {
    "options": "maple_trl.jobs.difficulty:DifficultyArguments",
    "asking": "maple_trl.jobs.difficulty:DifficultyOptions",
    "media, as in a training job": "maple_trl.jobs.eval_job:EvalMedia",
}


def run_difficulty(words: Sequence[str]) -> int:
    """Run `maple-trl data difficulty`; the exit status is as the help says."""
    if asks_for_help(words):
        return _print_help()
    from maple_trl.evaluation.options import ScoringError, ServerError
    from maple_trl.jobs.errors import SetupError
    from maple_trl.jobs.options import OptionParser, read_options
    from maple_trl.records.evaluations import EvaluationError

    folder, again = None, "the same command goes on from what is answered"
    try:
        from maple_trl.jobs.difficulty import DifficultyArguments, DifficultyOptions, filter_by_difficulty
        from maple_trl.jobs.eval_job import EvalMedia

        parser = OptionParser([DifficultyArguments, DifficultyOptions, EvalMedia], prog="maple-trl data difficulty")
        required = ("model_name_or_path", "dataset_name", "output_dir")
        arguments, options, media = read_options(parser, words, required)
        folder = arguments.output_dir
        summary = filter_by_difficulty(arguments, options, media)
    except (ScoringError, ServerError) as error:
        return fail("data difficulty", error, folder, again)
    except (SetupError, EvaluationError) as error:
        return refuse("data difficulty", error, 2, folder)
    except KeyboardInterrupt:
        return refuse("data difficulty", f"stopped; {again}", 130)
    except Exception as error:
        return fail("data difficulty", error, folder, again if folder and Path(folder).is_dir() else "")
    if summary is None:  # the first process tells
        return 0
    if arguments.json:
        print(json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False))
    else:
        _print_summary(summary, arguments.output_dir)
    if not summary.total:
        print(f"maple-trl data difficulty: none of {summary.rows} rows is kept", file=sys.stderr)
    return int(not summary.total)


def _print_help() -> int:
    from maple_trl.jobs.declared import declared_class
    from maple_trl.jobs.options import OptionParser

    types = {title: declared_class(place) for title, place in _PLACES.items()}
    for title, kind in types.items():
        kind._argument_group_name = title
    OptionParser(
        types.values(), prog="maple-trl data difficulty", description=_DESCRIPTION, epilog=_EXAMPLES
    ).print_help()
    return 0


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
