"""The command `maple-trl data convert`: its options, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from maple_trl.cli.failures import asks_for_help, fail, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.data.converters import ConversionSummary

_DESCRIPTION = """\
Makes rows of one form of a published set, in Parquet shards: OUTPUT/train-00000-of-00003.parquet. A training job reads the folder
by dataset_name: OUTPUT, with media_root as this command prints it."""

_EXAMPLES = """\
examples:
  maple-trl data convert daily-omni data/daily_omni data/rows --tags V VA VAS
  maple-trl data convert video-r1 Video-R1-260k.json data/rows --pictures leave_out
  maple-trl data convert avqa data/avqa data/rows --skip_malformed

SOURCE is the folder of a local copy, or one of its tables. The folder OUTPUT appears whole or not at all, and the same records
give the same bytes. docs/data.md says what each converter reads, and which of that is a guess.

Every option may be a key of a YAML file (--config FILE); the command line wins.
Exit status: 0; 2 for a set that cannot be converted; 130 when interrupted.
"""


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
    json: bool = field(default=False, metadata={"help": "print the summary as JSON"})


def run_convert(words: Sequence[str]) -> int:
    """Run the command; the exit status is as the help says."""
    from maple_trl.jobs.errors import SetupError
    from maple_trl.jobs.options import OptionParser, read_options

    parser = OptionParser(
        [ConvertArguments], prog="maple-trl data convert", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    if asks_for_help(words):
        from maple_trl.data.converters import CONVERTERS

        parser.epilog = f"sets: {', '.join(CONVERTERS)}\n\n{_EXAMPLES}"
    parser.add_argument("name", metavar="NAME", help="name of the set")
    parser.add_argument("source", metavar="SOURCE", help="folder or table of the set")
    parser.add_argument("output", metavar="OUTPUT", help="folder for the shards, which must not hold anything")
    if asks_for_help(words):
        parser.print_help()
        return 0
    try:
        arguments, named = read_options(parser, words)
    except SetupError as error:
        return refuse("data convert", error)
    from maple_trl.cli.counting import Counting
    from maple_trl.data.converters import ConversionError, ConvertOptions, convert
    from maple_trl.data.shards import ShardError

    given = asdict(arguments)
    quiet = given.pop("json")
    try:
        options = ConvertOptions(**{**given, "tags": tuple(arguments.tags)})
        with Counting("records read", quiet=quiet) as counting:
            summary = convert(named.name, named.source, named.output, options, counting.update)
    except (ConversionError, ShardError, ValueError) as error:
        return refuse("data convert", error, 2, named.output)
    except KeyboardInterrupt:
        return refuse("data convert", "stopped; nothing was written", 130)
    except Exception as error:
        return fail("data convert", error)
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
    for told in summary.named:
        console.print(f"malformed: {told}", markup=False)
    if summary.malformed > len(summary.named):
        console.print(f"malformed: … {summary.malformed - len(summary.named):,} more")
    console.print(f"written to {output}; train with dataset_name: {output} and media_root: {summary.media_root}")
