"""The command `maple-trl data hints`: its options, and what it prints."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from maple_trl.cli.base import Command
from maple_trl.cli.failures import FAILED, WRONG
from maple_trl.cli.servers import ServerArguments, chat_options, of_class


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.data.hints import HintSummary


@dataclass
class HintArguments(ServerArguments):
    """What `maple-trl data hints` reads, asks and writes."""

    dataset_name: str | None = field(
        default=None,
        metadata={"aliases": ["--input"], "help": ".parquet, .json or .jsonl, or builtin:seven-tags (required)"},
    )
    output: str | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "the same table with the column; may be the input (required)"},
    )
    columns: list[str] = field(default_factory=list, metadata={"help": "further columns for the teacher"})
    frames: int = field(
        default=0,
        metadata={"help": "pictures of the video for the teacher; above 0 it is shown the row's own pictures too"},
    )
    media_root: str | None = field(
        default=None, metadata={"help": "folder of videos and subtitles (that of the input)"}
    )
    limit: int | None = field(default=None, metadata={"help": "ask for the first N rows only"})
    only_missing: bool = field(default=False, metadata={"help": "ask only for rows that have no hint yet"})
    max_tries: int = field(default=3, metadata={"help": "hints asked for, a row"})
    max_words: int = field(default=60, metadata={"help": "longest hint"})
    chunk: int = field(default=64, metadata={"help": "rows asked and noted together"})
    json: bool = field(default=False, metadata={"help": "print the summary as JSON"})


def run(arguments: HintArguments) -> int:
    """Have hints written, and print how many were and at what cost."""
    from maple_trl.chat import ChatClient
    from maple_trl.cli.counting import Counting
    from maple_trl.data.hints import HintOptions, build_hints

    chat = chat_options(arguments, f"{arguments.output}.cache.sqlite")
    options = HintOptions(**of_class(HintOptions, arguments))
    with ChatClient(chat) as client, Counting("hints", quiet=arguments.json) as progress:
        source = _input_file(arguments.dataset_name)
        summary = build_hints(source, arguments.output, client, options, progress.update)
    return _report(summary, arguments)


def _input_file(name: str) -> str:
    if name != "builtin:seven-tags":
        return name
    from maple_trl.data import default_folder

    return str(default_folder() / "train.parquet")


def _report(summary: HintSummary, arguments: HintArguments) -> int:
    too_many = not arguments.dry_run and summary.failed_share > arguments.max_failures
    if arguments.json:
        counts = {name: value for name, value in vars(summary).items() if name != "usage"}
        counts |= {"failed_share": summary.failed_share, "usage": summary.usage.as_dict()}
        print(json.dumps(counts, indent=2))
    else:
        _print_summary(summary, arguments)
    if summary.stopped:
        print(f"maple-trl data hints: stopped, no output written: {summary.stopped}", file=sys.stderr)
        return 1
    if too_many:
        share = f"{summary.failed_share:.1%} of the rows failed, more than --max-failures {arguments.max_failures:g}"
        print(f"maple-trl data hints: {share}; run again to ask for them once more", file=sys.stderr)
    return int(too_many)


def _print_summary(summary: HintSummary, arguments: HintArguments) -> None:
    from rich.console import Console
    from rich.table import Table

    usage, table = summary.usage, Table(title="Hints", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("number", justify="right")
    lines = [("rows", summary.rows), ("had a hint", summary.kept), ("without a solution", summary.skipped)]
    lines += [("asked for", summary.asked), ("known from an earlier run", summary.resumed), ("hinted", summary.hinted)]
    lines += [(f"refused: {reason}", number) for reason, number in summary.refused.most_common()]
    lines += [(f"failed: {reason}", number) for reason, number in summary.failed.most_common() if reason != "dry-run"]
    if arguments.dry_run:
        lines += [("requests to send at least", usage.failed["dry-run"]), ("tokens, about", usage.estimated_tokens)]
    lines += [("calls", usage.sent), ("of these retries", usage.retries), ("answered from the cache", usage.cached)]
    lines += [("prompt tokens", usage.prompt_tokens), ("answer tokens", usage.completion_tokens)]
    for name, number in lines:
        table.add_row(name, f"{number:,}")
    table.add_row("cost", f"{usage.cost:.4f}")
    console = Console()
    console.print(table)
    if not arguments.dry_run and not summary.stopped:
        console.print(f"written to {arguments.output}", highlight=False, soft_wrap=True)


COMMAND = Command(
    name="data hints",
    help="let a teacher model write a hint for each row",
    run=run,
    description="""\
Adds a column `hint`: a teacher behind an OpenAI-compatible endpoint sees prompt, answer and, where asked, captions and
frames, and says where to look. Hints that give the answer away are refused. Rows that are not asked, or fail, keep the hint that
they had.""",
    examples=(
        "maple-trl data hints --dataset_name train.parquet --output hinted.parquet --model NAME --dry_run",
        "maple-trl data hints --dataset_name train.parquet --output hinted.parquet --model NAME "
        "--base_url http://127.0.0.1:8000/v1",
        "maple-trl data hints --dataset_name train.jsonl --output hinted.jsonl --model NAME --columns captions --frames 4 "
        "--limit 20",
    ),
    notes="A run that was stopped goes on where it was when the same command is given again.",
    statuses={FAILED: "more rows failed than --max_failures allows"},
    options={"options": HintArguments},
    required=("dataset_name", "output", "model"),
    errors={"builtins:ValueError": WRONG},
    writes=lambda arguments: str(Path(arguments.output).parent),
    stopped="the same command goes on from here",
)
