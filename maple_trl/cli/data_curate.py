"""The command `maple-trl data curate`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from maple_trl.cli.base import Command
from maple_trl.cli.failures import FAILED, WRONG
from maple_trl.cli.servers import DRY_RUN


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.data.curation import CurationConfig, CurationSummary


@dataclass
class CurateArguments:
    """What of a curation is run, and where."""

    engine: str = field(default="local", metadata={"choices": ["local", "ray"], "help": "where stages run"})
    only: list[str] = field(default_factory=list, metadata={"metavar": "STAGE", "help": "run these stages alone"})
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN})
    json: bool = field(default=False, metadata={"help": "print the summary as JSON"})


def run(arguments: CurateArguments, named: argparse.Namespace) -> int:
    """Curate, and print what became of the clips and at what cost."""
    from maple_trl.data.curation import curate, read_config

    config = read_config(named.config)
    progress = _Progress(quiet=arguments.json)
    summary = curate(config, arguments.engine, arguments.only, arguments.dry_run, progress)
    if arguments.json:
        print(json.dumps(summary.as_dict(config), indent=2))
    else:
        _print_summary(summary, config, arguments.dry_run)
    return 0


def _output(arguments: CurateArguments, named: argparse.Namespace) -> str:
    from maple_trl.data.curation import read_config

    return read_config(named.config).output


class _Progress:
    """A line on the standard error output for the beginning of a stage, its end, and now and then between."""

    def __init__(self, quiet: bool):
        self._quiet, self._last = quiet, 0.0

    def __call__(self, stage: str, done: int, rows: int) -> None:
        now = time.monotonic()
        if not self._quiet and (done == rows or now - self._last > 5):
            self._last = now
            print(f"{stage}: {done:,} of {rows:,}", file=sys.stderr, flush=True)


def _print_summary(summary: CurationSummary, config: CurationConfig, dry_run: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    stages = Table(title="Stages" + (", as far as can be told beforehand" if dry_run else ""), title_justify="left")
    for name in ("stage", "in", "to do" if dry_run else "done now", "out", "dropped, and notes"):
        stages.add_column(name, justify="left" if name in ("stage", "dropped, and notes") else "right")
    for account in summary.accounts:
        told = [f"{reason} {number:,}" for reason, number in account.dropped.most_common()]
        told += [f"({note} {number:,})" for note, number in account.notes.most_common()]
        numbers = [f"{number:,}" for number in (account.rows_in, account.asked, account.rows_out)]
        stages.add_row(account.stage, *numbers, ", ".join(told))
    console.print(stages)
    costs = Table(title="To come, at most" if dry_run else "Spent, over all runs", title_justify="left")
    for name in ("stage", "server", "calls", "prompt tokens", "answer tokens", "cost"):
        costs.add_column(name, justify="left" if name in ("stage", "server") else "right")
    for entry in summary.spent:
        numbers = [f"{entry[name]:,}" for name in ("calls", "prompt_tokens", "completion_tokens")]
        costs.add_row(entry["stage"], entry["server"], *numbers, f"{entry['cost']:.4f}")
    totals = [
        f"{sum(entry[name] for entry in summary.spent):,}" for name in ("calls", "prompt_tokens", "completion_tokens")
    ]
    costs.add_row("all", "", *totals, f"{sum(entry['cost'] for entry in summary.spent):.4f}")
    console.print(costs)
    for kind, splits in (summary.written or {}).items():
        for split, tags in splits.items():
            told = ", ".join(f"{tag} {number:,}" for tag, number in tags.items())
            console.print(f"{kind}, {split}: {told or 'none'}", highlight=False, soft_wrap=True)
    if summary.written is not None:
        told = f"written to {config.output}; train with dataset_name: {config.output}/questions and media_root: {config.output}"
        console.print(told, highlight=False, soft_wrap=True)


COMMAND = Command(
    name="data curate",
    help="make questions and captions with tags of clips",
    run=run,
    description="""\
Makes questions and captions with modality tags of a folder of clips. Models behind OpenAI-compatible endpoints describe each
signal alone, write from a tag's signals, and vote on whether a question needs all of them. docs/curation.md tells how, and
what stands in the file.""",
    examples=(
        "maple-trl data curate --config curation.yaml --dry_run",
        "maple-trl data curate --config curation.yaml",
        "maple-trl data curate --config curation.yaml --only collect split annotate",
        "maple-trl data curate --config curation.yaml --engine ray",
    ),
    notes="A run that was stopped goes on where it was when the same command is given again, and pays for no answer twice.",
    statuses={FAILED: "servers failed"},
    options={"options": CurateArguments},
    config="YAML file that describes the curation (required)",
    errors={
        "maple_trl.data.curation.errors:CurationError": WRONG,
        "maple_trl.data.curation.errors:UnfinishedError": FAILED,
    },
    writes=_output,
    stopped="the same command goes on from here",
    again="the same command goes on from here",
)
