"""The command `maple-trl data qa-plus`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from maple_trl.cli.base import Command
from maple_trl.cli.failures import WRONG
from maple_trl.cli.servers import DRY_RUN
from maple_trl.jobs.errors import SetupError


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.data.qa_plus import QAPlusSummary


@dataclass
class QAPlusArguments:
    """What is made of which rows."""

    split: str | None = field(default=None, metadata={"help": "of the source (train; with --evaluation test)"})
    exact: int | None = field(
        default=None, metadata={"help": "rows fed what they require (one of each question that allows it)"}
    )
    superset: int | None = field(default=None, metadata={"help": "rows fed more (likewise)"})
    deficit: int | None = field(default=None, metadata={"help": "rows that lack a required signal (likewise)"})
    evaluation: bool = field(default=False, metadata={"help": "every question with all seven inputs instead"})
    none_share: float = field(
        default=0.25, metadata={"help": "share of exact and of superset rows in which an option is replaced"}
    )
    replace: str = field(
        default="right",
        metadata={
            "choices": ["right", "wrong"],
            "help": "the option that is replaced there: the right one (5.4.1) or a wrong one (B.2)",
        },
    )
    prompt_style: str = field(
        default="keep",
        metadata={
            "help": "form of the prompts: keep (as they are, but for the options; none where there is no column prompt), think, "
            "answer, brackets"
        },
    )
    seed: int = field(default=0, metadata={"help": "of all draws"})
    shard_rows: int = field(default=50_000, metadata={"help": "rows of a file"})
    media_root: str | None = field(default=None, metadata={"help": "folder of the media (that of the source)"})
    check_files: bool = field(
        default=True, metadata={"help": "a signal whose file is not there is none that the row has"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the split where OUTPUT holds it"})
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN})
    json: bool = field(default=False, metadata={"help": "print the summary as JSON"})


def run(arguments: QAPlusArguments, places: argparse.Namespace) -> int:
    """Make the questions, and print how many of each kind."""
    from maple_trl.data.qa_plus import QAPlusOptions, build_qa_plus
    from maple_trl.jobs.data import load_datasets
    from maple_trl.jobs.options import OmniScriptArguments

    options = QAPlusOptions(**{f.name: getattr(arguments, f.name) for f in fields(QAPlusOptions)})
    split = arguments.split or ("test" if options.evaluation else "train")
    named = OmniScriptArguments(dataset_name=places.source, dataset_train_split=split, dataset_test_split=split)
    given = arguments.media_root
    if given is not None and not Path(given).is_dir():
        raise SetupError(f"media_root: there is no folder {given}")
    if arguments.dry_run:
        from maple_trl.cli.dry_run import tell
        from maple_trl.jobs.data_forecasts import forecast_qa_plus

        return tell(
            forecast_qa_plus(places.source, places.output, split, options, arguments.overwrite), arguments.json
        )
    # Whole: '.' is the folder of the rows to it.
    splits, root = load_datasets(named, "." if given is None else str(Path(given).resolve()))
    local = places.source.startswith("builtin:") or Path(places.source).exists()
    looked_at = root if arguments.check_files and (local or arguments.media_root) else None
    summary = build_qa_plus(splits[split], places.output, split, options, looked_at, arguments.overwrite)
    if arguments.json:
        print(json.dumps(asdict(summary) | {"media_root": root}, indent=2, ensure_ascii=False))
    else:
        _print_summary(summary, places.output, root)
    return 0


def _print_summary(summary: QAPlusSummary, output: str, root: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from maple_trl.modalities import STRATA, ModalityTag

    console = Console()
    table = Table(title="Rows by stratum and input", title_justify="left")
    for name in ("stratum", *map(str, ModalityTag), "all", "replaced"):
        table.add_column(name, justify="left" if name == "stratum" else "right")
    for stratum in STRATA:
        by_tag = summary.rows[stratum]
        counts = [by_tag.get(str(tag), 0) for tag in ModalityTag]
        table.add_row(stratum, *(f"{n:,}" for n in (*counts, sum(counts), summary.replaced[stratum])))
    console.print(table)
    lines = [f"{summary.total:,} rows of {summary.questions:,} questions, of {summary.read:,} rows that were read"]
    for reason, found in summary.left_out.items():
        lines.append(f"left out: {found['count']:,} {reason} ({', '.join(map(str, found['ids']))}, …)")
    for stratum, counts in summary.not_made.items():
        lines += [f"without {stratum}: {count:,} {reason}" for reason, count in counts.items()]
    lines.append(f"written to {output}; media_root: {root}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


COMMAND = Command(
    name="data qa-plus",
    help="ask questions with more signals too, and with fewer",
    run=run,
    description="""\
Makes questions that are also asked with more signals than they require, and with fewer: MAPLE-QA+ (arXiv 2602.11596, 5.4.1
and B.2). Where a required signal is missing, the right option becomes one that says that the question cannot be answered.""",
    examples=(
        "maple-trl data qa-plus builtin:seven-tags qa_plus --prompt_style answer",
        "maple-trl data qa-plus rows qa_plus --exact 47893 --superset 31635 --deficit 23737",
        "maple-trl data qa-plus rows qa_plus --evaluation --dry_run",
    ),
    notes="""\
SOURCE is builtin:seven-tags, a .parquet/.jsonl/.json file, a folder with one per split, or a Hub id; the rows have the
columns of maple_trl/data/schema.py. OUTPUT is a folder: SPLIT-00000-of-00001.parquet …, qa_plus-SPLIT.json with the
counts, and left_out-SPLIT.jsonl, which names the rows of which nothing was made. Paths of media stay as they are: train
and evaluate with the source's media_root, which is printed.""",
    statuses={WRONG: "described wrongly, or fewer rows can be made than asked for"},
    options={"options": QAPlusArguments},
    arguments={"SOURCE": {"help": "the questions"}, "OUTPUT": {"help": "folder of the rows"}},
    errors={"builtins:ValueError": WRONG},
    writes=lambda arguments, places: places.output,
    stopped="nothing was replaced",
)
