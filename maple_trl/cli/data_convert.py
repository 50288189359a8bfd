"""The command `maple-trl data convert`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from maple_trl.cli.base import Command
from maple_trl.cli.failures import WRONG
from maple_trl.cli.servers import DRY_RUN


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.data.converters import ConversionSummary


@dataclass
class ConvertArguments:
    """How `maple-trl data convert` makes rows."""

    media_root: str | None = field(default=None, metadata={"help": "folder of the media (that of the table)"})
    tags: list[str] = field(
        default_factory=list,
        metadata={
            "aliases": ["--tag"],
            "help": "give every question once in each of these tags (what its authors feed)",
        },
    )
    prompt_style: str = field(default="think", metadata={"help": "form of the prompt: think, answer or brackets"})
    split: str | None = field(default=None, metadata={"help": "split of all rows (what the set says, or train)"})
    shard_rows: int = field(default=50_000, metadata={"help": "most rows of a file"})
    skip_malformed: bool = field(
        default=False, metadata={"help": "count and name records that are not as published, and go on"}
    )
    pictures: str = field(
        default="keep",
        metadata={"help": "rows with pictures: keep, clips (a picture becomes one of two seconds), or leave_out"},
    )
    missing_media: str = field(
        default="keep", metadata={"help": "rows that name a file that is not there: keep or leave_out"}
    )
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN})
    json: bool = field(default=False, metadata={"help": "print the summary as JSON"})


def run(arguments: ConvertArguments, named: argparse.Namespace) -> int:
    """Convert a set, and print what became of its records."""
    from maple_trl.cli.counting import Counting
    from maple_trl.data.converters import ConvertOptions, convert

    given = asdict(arguments)
    quiet = given.pop("json")
    del given["dry_run"]
    options = ConvertOptions(**{**given, "tags": tuple(arguments.tags)})
    if arguments.dry_run:
        from maple_trl.cli.dry_run import tell
        from maple_trl.jobs.data_forecasts import forecast_conversion

        return tell(forecast_conversion(named.name, named.source, named.output, options), arguments.json)
    with Counting("records read", quiet=quiet) as counting:
        summary = convert(named.name, named.source, named.output, options, counting.update)
    if arguments.json:
        print(json.dumps(summary.as_dict(), indent=2, ensure_ascii=False))
    else:
        print_summary(summary, named.output)
    return 0


def print_summary(summary: ConversionSummary, output: str) -> None:
    """Print what became of the records."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Conversion", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("number", justify="right")
    lines = [("records", summary.records), *((f"rows of split {name}", count) for name, count in summary.rows.items())]
    lines += [(f"rows of tag {tag}", count) for tag, count in sorted(summary.tags.items())]
    lines += [(f"left out: {reason}", count) for reason, count in summary.left_out.most_common()]
    lines += [("malformed", summary.malformed)] if summary.malformed else []
    lines += [("rows with pictures", summary.pictures)] if summary.pictures else []
    lines += [("rows that name a file that is not there", summary.missing)] if summary.missing else []
    for name, number in lines:
        table.add_row(name, f"{number:,}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for path in summary.passed_over:
        console.print(f"not read beside {summary.files[0]}: {path}; convert it by itself", markup=False)
    for told in summary.named:
        console.print(f"malformed: {told}", markup=False)
    if summary.malformed > len(summary.named):
        console.print(f"malformed: … {summary.malformed - len(summary.named):,} more")
    console.print(f"written to {output}; train with dataset_name: {output} and media_root: {summary.media_root}")


COMMAND = Command(
    name="data convert",
    help="make rows of a published set",
    run=run,
    description="""\
Makes rows of one form of a published set, in Parquet shards: OUTPUT/train-00000-of-00003.parquet. A training job reads the
folder by dataset_name: OUTPUT, with media_root as this command prints it.""",
    examples=(
        "maple-trl data convert daily-omni data/daily_omni data/rows --tags V VA VAS",
        "maple-trl data convert video-r1 Video-R1-260k.json data/rows --pictures leave_out",
        "maple-trl data convert avqa data/avqa data/rows --skip_malformed --dry_run",
    ),
    notes="""\
SOURCE is the folder of a local copy, or one of its tables. The folder OUTPUT appears whole or not at all, and the same records
give the same bytes. docs/data.md says what each converter reads, and which of that is a guess.""",
    statuses={WRONG: "a set that cannot be converted, or described wrongly"},
    options={"options": ConvertArguments},
    arguments={
        "NAME": {
            "help": "set: daily-omni, humanomni, video-r1, video-r1-cot, tpo, avqa, ave, ave-intervals, avsbench, "
            "avsbench-boxes, avatar-rl, vast or sharegpt"
        },
        "SOURCE": {"help": "folder or table of the set"},
        "OUTPUT": {"help": "folder for the shards, which must not hold anything"},
    },
    errors={"maple_trl.data.converters.convert:ConversionError": WRONG, "builtins:ValueError": WRONG},
    writes=lambda arguments, named: named.output,
    stopped="nothing was written",
)
