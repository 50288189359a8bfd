"""The command `maple-trl report`: its options, and what it prints."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maple_trl.cli.base import Command
from maple_trl.cli.failures import WRONG
from maple_trl.jobs.errors import SetupError


# Nothing heavier than the standard library up here: the help of every command passes through this module.


@dataclass
class ReportArguments:
    """What a report is made of, and where it goes."""

    output: str | None = field(
        default=None, metadata={"metavar": "FILE", "help": "the HTML file (report.html in the first RUN)"}
    )
    json: str | None = field(default=None, metadata={"metavar": "FILE", "help": "write the same data as JSON"})
    media_root: str | None = field(
        default=None, metadata={"help": "folder below which the clips lie, where it has moved since the run"}
    )
    watch: bool = field(
        default=False, metadata={"help": "write the page anew as the runs go, until they end or Ctrl-C is pressed"}
    )
    interval: float = field(default=30.0, metadata={"help": "seconds between two looks of --watch, at least"})
    max_rollouts: int = field(default=100_000, metadata={"help": "completions of a run in the report"})
    thumbnails: int = field(
        default=200, metadata={"help": "pictures and videos of a run with a small copy in the page"}
    )
    embeddings: str | None = field(
        default=None,
        metadata={"help": "how near completions are is told by the mean hidden states of this model, not by wording"},
    )
    projection: Literal["pca", "tsne"] = field(
        default="pca",
        metadata={"help": "how completions are placed: pca, or tsne with points numbered by clip (scikit-learn)"},
    )
    seed: int = field(default=0, metadata={"help": "of the t-SNE"})
    length_bins: list[int] = field(
        default_factory=list,
        metadata={"help": "where bins of completion lengths begin, in tokens (about as many completions in each)"},
    )

    def __post_init__(self):
        for name, least in (("max_rollouts", 1), ("thumbnails", 0), ("seed", 0), ("interval", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {getattr(self, name)}")
        if any(bound < 0 for bound in self.length_bins):
            raise ValueError(f"--length-bins are numbers of tokens, 0 or more, got {self.length_bins}")


def run(arguments: ReportArguments, named: argparse.Namespace) -> int:
    """Write the report, and say where it is."""
    runs = named.runs
    output = _output(arguments, named)
    for option, file, name in (("--output", output, "report.html"), ("--json", arguments.json, "report.json")):
        if file is not None and Path(file).is_dir():
            raise SetupError(f"{option}: {file} is a folder; name a file in it, as {Path(file, name)}")
        if file is not None and Path(file).is_file() and Path(file).suffix.lower() not in (Path(name).suffix, ".htm"):
            raise SetupError(f"{option}: {file} is there already and no report; name a file such as {name}")
    from maple_trl.reports import watch_report, write_report

    chosen = ("media_root", "max_rollouts", "thumbnails", "embeddings", "projection", "seed", "length_bins")
    options = {"json_path": arguments.json} | {name: getattr(arguments, name) for name in chosen}
    if arguments.watch:
        watch_report(runs, output, arguments.interval, lambda text: print(text, flush=True), **options)
    else:
        write_report(runs, output, **options)
        print(f"report: {output}")
    if arguments.json:
        print(f"data: {arguments.json}")
    return 0


def _output(arguments: ReportArguments, named: argparse.Namespace) -> Path:
    return Path(arguments.output or Path(named.runs[0], "report.html"))


COMMAND = Command(
    name="report",
    help="write one HTML file on a run or an evaluation, or on several of them",
    run=run,
    description="""\
Writes a report on one run, or on up to eight to compare, as one HTML file: what went wrong, curves by tag, rewards, weights
and curriculum, disparity, replay, accuracies, a viewer of completions, and the configuration.""",
    examples=(
        "maple-trl report runs/demo",
        "maple-trl report runs/long --watch",
        "maple-trl report runs/mupo runs/mapo --output compared.html",
        "maple-trl report runs/eval_before runs/eval_after runs/eval_longer --json compared.json",
        "maple-trl report runs/plain runs/crw --projection tsne",
    ),
    notes="""\
RUN is the output folder of a training job or of `maple-trl eval`, finished or still going: the report shows what is
there, and says what is not. Open the file in a browser; it needs no network. Clips and subtitles are links to files
beside it. With --watch the page is written anew as the run goes, and the open page follows; that ends with the run, or with
Ctrl+C.""",
    statuses={WRONG: "a folder holds no run, the file cannot be written, or described wrongly"},
    options={"options": ReportArguments},
    arguments={
        "RUN": {
            "dest": "runs",
            "nargs": "+",
            "help": "output folder of a training job or an evaluation; one or up to eight",
        }
    },
    errors=dict.fromkeys(("maple_trl.reports.folders:ReportError", "builtins:ImportError", "builtins:OSError"), WRONG),
    writes=lambda arguments, named: str(_output(arguments, named).parent),
    stopped="nothing was written",
)
