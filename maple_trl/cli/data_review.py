"""The command `maple-trl data review`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.cli.base import Command
from maple_trl.cli.failures import FAILED, INTERRUPTED, WRONG
from maple_trl.jobs.errors import SetupError


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.data.review.desk import ReviewDesk

BUILTIN = "builtin:seven-tags"
TOKEN_VARIABLE = "MAPLE_TRL_REVIEW_TOKEN"


@dataclass
class ReviewArguments:
    """What is reviewed, by whom, where, and what becomes of it."""

    media_root: str | None = field(default=None, metadata={"help": "folder of the media (that of the set)"})
    log: str | None = field(default=None, metadata={"help": "file of decisions (DATASET.review.log beside the set)"})
    reviewer: str | None = field(default=None, metadata={"help": "name the page begins with (the user's)"})
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; others than this need a token"})
    port: int = field(default=7861, metadata={"help": "port of the page; 0 for a free one"})
    token: str | None = field(
        default=None,
        metadata={"help": f"token to open the page; others see it in the list of processes (or ${TOKEN_VARIABLE})"},
    )
    token_file: str | None = field(default=None, metadata={"help": "file with the token"})
    cache_mb: int = field(default=1024, metadata={"help": "most that copies of clips take on the disk while it runs"})
    export: str | None = field(default=None, metadata={"help": "write the reviewed set: a .parquet file, or a folder"})
    rule: str = field(
        default="agree",
        metadata={"help": "what counts of several decisions", "choices": ["agree", "majority", "last"]},
    )
    min_reviewers: int = field(default=1, metadata={"help": "reviewers without whom a row is undecided"})
    undecided: str = field(
        default="drop",
        metadata={"help": "what becomes of undecided rows in --export", "choices": ["drop", "keep", "refuse"]},
    )
    summary: bool = field(default=False, metadata={"help": "only say what was decided so far"})
    json: bool = field(default=False, metadata={"help": "print the summary as JSON"})

    def __post_init__(self):
        for name, least in (("port", 0), ("cache_mb", 1), ("min_reviewers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be {least} or more, got {getattr(self, name)}")
        if self.port > 65_535:
            raise ValueError(f"--port must be at most 65535, got {self.port}")
        if self.token and self.token_file:
            raise ValueError("give --token or --token_file, not both")


def run(arguments: ReviewArguments, named: argparse.Namespace) -> int:
    """Serve the page, or write what was decided."""
    try:
        desk = _desk(named.dataset, arguments)
        for line in desk.log.damaged:
            print(f"{desk.log.path}: {line}", file=sys.stderr)
        if arguments.export or arguments.summary:
            return _finish(desk, arguments)
        return _serve(desk, arguments)
    except ImportError as error:
        if error.name not in ("gradio", "uvicorn", "jinja2"):
            raise
        raise SetupError("the page needs Gradio: pip install 'maple-trl[review]'") from error


def _desk(name: str, arguments: ReviewArguments) -> ReviewDesk:
    from maple_trl.data.review.desk import ReviewDesk
    from maple_trl.data.review.log import ReviewLog
    from maple_trl.data.review.rows import ReviewSet

    log = arguments.log
    if name == BUILTIN:
        from maple_trl.data import default_folder, load_seven_tags

        load_seven_tags()
        name, log = str(default_folder() / "train.parquet"), log or "seven-tags.review.log"
    data = ReviewSet(name)
    path = data.path.resolve()
    return ReviewDesk(
        data, ReviewLog(log or path.with_name(f"{path.stem if path.is_file() else path.name}.review.log"))
    )


def _serve(desk: ReviewDesk, arguments: ReviewArguments) -> int:
    import getpass

    from maple_trl.data.review.desk import reviewer_name
    from maple_trl.data.review.server import serve

    reviewer = reviewer_name(arguments.reviewer or getpass.getuser())
    token = _token(arguments)

    def ready(address: str) -> None:
        print(f"{len(desk.data):,} rows of {desk.data.path}; decisions go to {desk.log.path}")
        print(f"{address} ({'asks for the token; ' if token else ''}Ctrl+C ends it)", flush=True)

    root = arguments.media_root or desk.data.folder
    serve(desk, root, reviewer, arguments.host, arguments.port, token, arguments.cache_mb << 20, ready)
    return 0


def _token(arguments: ReviewArguments) -> str | None:
    if arguments.token_file:
        try:
            return Path(arguments.token_file).read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeError) as error:
            raise SetupError(f"--token_file {arguments.token_file}: {getattr(error, 'strerror', error)}") from error
    return arguments.token or os.environ.get(TOKEN_VARIABLE) or None


def _finish(desk: ReviewDesk, arguments: ReviewArguments) -> int:
    """Write the reviewed set, where that is asked for, and say what was decided."""
    from maple_trl.data.review.export import export_rows
    from maple_trl.data.review.summary import summarize

    with desk.log.held():
        summary = summarize(desk, arguments.rule, arguments.min_reviewers)
        if arguments.export:
            summary["export"] = export_rows(
                desk, arguments.export, arguments.rule, arguments.min_reviewers, arguments.undecided
            )
    if arguments.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        _print_summary(summary)
    return 0


def _print_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    tags = Table(title="Decisions by proposed tag", title_justify="left")
    for name in ("tag", "rows", "accepted", "retagged", "edited", "rejected", "tags changed"):
        tags.add_column(name, justify="left" if name == "tag" else "right")
    for tag, counts in summary["by_tag"].items():
        numbers = [str(counts[name]) for name in ("rows", "accepted", "retagged", "edited", "rejected")]
        tags.add_row(tag, *numbers, _share(counts["tags_changed"]))
    people = Table(title="Reviewers", title_justify="left")
    for name in ("reviewer", "decided", "accepted", "retagged", "edited", "rejected", "s a row", "answered right"):
        people.add_column(name, justify="left" if name == "reviewer" else "right")
    for name, counts in summary["reviewers"].items():
        numbers = [str(counts[key]) for key in ("decided", "accepted", "retagged", "edited", "rejected")]
        seconds = "-" if counts["seconds"] is None else f"{counts['seconds']:.1f}"
        right = f"{_share(counts['answered_right'])} of {counts['answered']}" if counts["answered"] else "-"
        people.add_row(name, *numbers, seconds, right)
    pairs = Table(title="Agreement (share, Cohen's kappa)", title_justify="left")
    for name in ("reviewers", "rows", "decision", "kappa", "kept by both", "tag", "kappa"):
        pairs.add_column(name, justify="left" if name == "reviewers" else "right")
    for pair in summary["agreement"]:
        kappas = ["-" if pair[key] is None else f"{pair[key]:.3f}" for key in ("decision_kappa", "tag_kappa")]
        row = [" and ".join(pair["reviewers"]), str(pair["rows"]), _share(pair["decision_agreed"]), kappas[0]]
        pairs.add_row(*row, str(pair["kept"]), _share(pair["tag_agreed"]), kappas[1])
    for table in (tags, people, pairs):
        if table.row_count:
            console.print(table)
    words = [f"{summary[name]:,} {name}" for name in ("rows", "decided", "disagreed", "undecided")]
    print(f"{', '.join(words)} (rule {summary['rule']}, at least {summary['min_reviewers']} reviewer(s) a row)")
    log = summary["log"]
    print(
        f"log: {log['undone']} undone, {len(log['damaged'])} damaged lines, {log['stale']} decisions on rows that changed "
        f"since, {log['unknown']} on rows that are not in the set"
    )
    if "export" in summary:
        made = summary["export"]
        left = ", ".join(
            f"{made[name]:,} {name.replace('_', ' ')}" for name in made if name not in ("files", "written")
        )
        print(f"{made['written']:,} rows written to {', '.join(made['files'])} ({left})")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


COMMAND = Command(
    name="data review",
    help="open a page to review rows on, or write what was decided",
    run=run,
    description="""\
Opens a page on this machine on which people look at the rows of a tagged set as their tags give them, and accept, retag,
edit or reject them. With --export, writes the reviewed set and says how far the reviewers agree.""",
    examples=(
        "maple-trl data review builtin:seven-tags",
        "maple-trl data review rows.parquet --media_root clips --reviewer ann",
        "maple-trl data review rows.parquet --host 0.0.0.0 --token_file token.txt",
        "maple-trl data review rows.parquet --export reviewed.parquet --rule majority --min_reviewers 2",
        "maple-trl data review rows.parquet --summary",
    ),
    notes="""\
DATASET is a .parquet, .json or .jsonl file, or a folder of such files. The page is served until Ctrl+C or SIGTERM.""",
    statuses={
        FAILED: "the review could not be served or written",
        INTERRUPTED: "interrupted before the page was served; Ctrl+C ends the page itself with 0",
    },
    options={"options": ReviewArguments},
    arguments={"DATASET": {"help": f"the rows: a file, a folder, or {BUILTIN}"}},
    errors={"maple_trl.data.review.rows:ReviewError": WRONG, "builtins:FileNotFoundError": WRONG},
)
