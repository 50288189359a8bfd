"""The command `maple-trl data validate`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from maple_trl.cli.base import Command
from maple_trl.cli.failures import FAILED, WRONG


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.data.validation import ValidationReport


@dataclass
class ValidateArguments:
    """What `maple-trl data validate` looks for, and how it tells."""

    media_root: str | None = field(
        default=None, metadata={"help": "folder of the media, in which their files must be (only paths are checked)"}
    )
    shown: int = field(default=5, metadata={"help": "problems of each kind that are shown"})
    json: bool = field(default=False, metadata={"help": "print counts and problems as JSON"})

    def __post_init__(self) -> None:
        if self.shown < 0:
            raise ValueError(f"--shown must be 0 or more, got {self.shown}")


def run(arguments: ValidateArguments, named: argparse.Namespace) -> int:
    """Check tables, and print what is wrong in them."""
    from maple_trl.cli.counting import Counting
    from maple_trl.data.validation import validate_tables

    with Counting("rows checked", quiet=arguments.json) as counting:
        report = validate_tables(named.tables, arguments.media_root, arguments.shown, counting.update)
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        print_report(report)
    return FAILED if report.counts else 0


def print_report(
    report: ValidationReport, passed_over: str = "not read, as it is none of the tables that training takes"
) -> None:
    """Print the number of problems of each kind, and the first of each; `passed_over` says what is said of other tables."""
    from rich.console import Console
    from rich.table import Table

    from maple_trl.data.validation import KINDS

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{report.rows:,} rows in {report.files} table{'s' if report.files != 1 else ''}")
    for path in report.passed_over:
        console.print(f"{passed_over}: {path}", markup=False)
    if not report.counts:
        console.print("no problem found")
        return
    table = Table(show_header=False, box=None)
    for kind, meaning in KINDS.items():
        if report.counts[kind]:
            table.add_row(f"{report.counts[kind]:,}", kind, meaning)
    console.print(table)
    for kind in KINDS:
        problems = report.shown.get(kind, [])
        for problem in problems:
            console.print(f"{kind}: {problem}", markup=False)
        if problems and report.counts[kind] > len(problems):
            console.print(f"{kind}: … {report.counts[kind] - len(problems):,} more")


COMMAND = Command(
    name="data validate",
    help="check tables of rows",
    run=run,
    description="""\
Checks tables of questions and captions, row by row: types, tags, ids, options and answers, references, splits, media and
provenance. All problems are counted by kind, and the first of each shown with file, row and field.""",
    examples=(
        "maple-trl data validate data/rows",
        "maple-trl data validate train.parquet test.parquet --media_root data/clips",
        "maple-trl data validate data/rows --json",
    ),
    notes="""\
TABLE is a .parquet, .jsonl, .json or .csv file, or a folder of shards or of such files. Tables are read in batches; of all
rows together only digests of their ids and clips are kept, about 200 bytes a row.""",
    statuses={FAILED: "there is a problem", WRONG: "a table that cannot be read, or described wrongly"},
    options={"options": ValidateArguments},
    arguments={"TABLE": {"dest": "tables", "nargs": "+", "help": "a table, or a folder of tables"}},
    errors={"maple_trl.data.record_files:TableError": WRONG},
)
