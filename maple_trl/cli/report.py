"""The command `maple-trl report`: its options, and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maple_trl.cli.failures import asks_for_help, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

_EXAMPLES = """\
examples:
  maple-trl report runs/demo
  maple-trl report runs/long --watch
  maple-trl report runs/mupo runs/mapo --output compared.html
  maple-trl report runs/eval_before runs/eval_after runs/eval_longer --json compared.json
  maple-trl report runs/plain runs/crw --projection tsne

RUN is the output folder of a training job or of `maple-trl eval`, finished or still going: the report shows what is
there, and says what is not. Open the file in a browser; it needs no network. Clips and subtitles are links to files
beside it. With --watch the page is written anew as the run goes, and the open page follows; that ends with the run, or with
Ctrl-C.

Every option may be a key of a YAML file (--config FILE); the command line wins.

Exit status: 0; 2 when a folder holds no run; 130 when interrupted.
"""


_DESCRIPTION = """\
Writes a report on one run, or on up to eight to compare, as one HTML file: what went wrong, curves by tag, rewards, weights
and curriculum, disparity, replay, accuracies, a viewer of completions, and the configuration."""


@dataclass
class ReportArguments:
    """What a report is made of, and where it goes."""

    output: str | None = field(default=None, metadata={"help": "the HTML file (report.html in the first RUN)"})
    json: str | None = field(default=None, metadata={"help": "write the same data as JSON"})
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


def run_report(words: Sequence[str]) -> int:
    """Run the command; the exit status is as the help says."""
    from maple_trl.jobs.errors import SetupError
    from maple_trl.jobs.options import OptionParser, read_options

    parser = OptionParser([ReportArguments], prog="maple-trl report", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folder of a training job or an evaluation; one or up to eight"
    )
    if asks_for_help(words):
        parser.print_help()
        return 0
    try:
        arguments, named = read_options(parser, words)
    except SetupError as error:
        return refuse("report", error)
    runs = named.runs
    output = Path(arguments.output or Path(runs[0], "report.html"))
    for option, file, name in (("--output", output, "report.html"), ("--json", arguments.json, "report.json")):
        if file is not None and Path(file).is_dir():
            return refuse("report", f"{option}: {file} is a folder; name a file in it, as {Path(file, name)}")
        if file is not None and Path(file).is_file() and Path(file).suffix.lower() not in (Path(name).suffix, ".htm"):
            return refuse("report", f"{option}: {file} is there already and no report; name a file such as {name}")
    chosen = ("media_root", "max_rollouts", "thumbnails", "embeddings", "projection", "seed", "length_bins")
    options = {"json_path": arguments.json} | {name: getattr(arguments, name) for name in chosen}
    try:
        from maple_trl.reports import ReportError, watch_report, write_report

        if arguments.watch:
            watch_report(runs, output, arguments.interval, lambda text: print(text, flush=True), **options)
        else:
            write_report(runs, output, **options)
    except (ReportError, ImportError, OSError) as error:
        return refuse("report", error, 2, str(output.parent))
    except KeyboardInterrupt:
        print("maple-trl report: stopped; nothing was written", file=sys.stderr)
        return 130
    if not arguments.watch:  # which has told already
        print(f"report: {output}")
    if arguments.json:
        print(f"data: {arguments.json}")
    return 0
