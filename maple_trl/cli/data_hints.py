"""The commands `maple-trl data …`: their options, and what they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.cli.failures import asks_for_help, fail, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.chat import ChatOptions
    from maple_trl.data.hints import HintSummary

_HINTS_DESCRIPTION = """\
Adds a column `hint`: a teacher behind an OpenAI-compatible endpoint sees prompt, answer and, where asked, captions and
frames, and says where to look. Hints that give the answer away are refused."""

_HINTS_EXAMPLES = """\
examples:
  maple-trl data hints --dataset_name train.parquet --output hinted.parquet --model NAME --dry_run
  maple-trl data hints --dataset_name train.parquet --output hinted.parquet --model NAME --base_url http://127.0.0.1:8000/v1
  maple-trl data hints --dataset_name train.jsonl --output hinted.jsonl --model NAME --columns captions --frames 4 --limit 20

Every option may be a key of a YAML file (--config FILE); the command line wins.

A run that was stopped goes on where it was when the same command is given again.
Exit status: 0; 1 when more rows failed than --max_failures allows; 2 for a wrong description; 130 when interrupted.
"""


@dataclass
class HintArguments:
    """What `maple-trl data hints` reads, asks and writes."""

    dataset_name: str | None = field(
        default=None,
        metadata={"aliases": ["--input"], "help": ".parquet, .json or .jsonl, or builtin:seven-tags (required)"},
    )
    output: str | None = field(
        default=None, metadata={"help": "the same table with the column; may be the input (required)"}
    )
    columns: list[str] = field(default_factory=list, metadata={"help": "further columns for the teacher"})
    frames: int = field(default=0, metadata={"help": "pictures of the video for the teacher"})
    media_root: str | None = field(
        default=None, metadata={"help": "folder of videos and subtitles (that of the input)"}
    )
    limit: int | None = field(default=None, metadata={"help": "ask for the first N rows only"})
    only_missing: bool = field(default=False, metadata={"help": "keep the hints that the input already has"})
    max_tries: int = field(default=3, metadata={"help": "hints asked for, a row"})
    max_words: int = field(default=60, metadata={"help": "longest hint"})
    chunk: int = field(default=64, metadata={"help": "rows asked and noted together"})
    max_failures: float = field(default=0.2, metadata={"help": "failed rows allowed"})
    model: str | None = field(
        default=None,
        metadata={"aliases": ["--model_name_or_path"], "help": "the model's name, as the server knows it (required)"},
    )
    base_url: str | None = field(default=None, metadata={"help": "root of the API, as http://127.0.0.1:8000/v1"})
    api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "variable with the key"})
    api_key_file: str | None = field(default=None, metadata={"help": "file with the key, instead of the variable"})
    concurrency: int = field(default=16, metadata={"help": "calls open at once"})
    requests_per_minute: float | None = field(default=None, metadata={"help": "rate that is kept"})
    tokens_per_minute: float | None = field(default=None, metadata={"help": "rate that is kept"})
    timeout: float = field(default=120.0, metadata={"help": "seconds of one call"})
    max_attempts: int = field(default=5, metadata={"help": "calls a request, with retries"})
    retry_wait: float = field(default=1.0, metadata={"help": "seconds before the first retry"})
    max_tokens: int = field(default=1024, metadata={"help": "tokens of an answer; 0: no limit"})
    temperature: float | None = field(default=None, metadata={"help": "sampling temperature (the server's)"})
    sampling: dict[str, Any] = field(default_factory=dict, metadata={"help": "further fields of the request"})
    cache: str | None = field(default=None, metadata={"help": "file that keeps answers (OUTPUT.cache.sqlite)"})
    no_cache: bool = field(default=False, metadata={"help": "keep no answers"})
    prompt_price: float = field(default=0.0, metadata={"help": "price of 1e6 prompt tokens"})
    completion_price: float = field(default=0.0, metadata={"help": "price of 1e6 answer tokens"})
    dry_run: bool = field(default=False, metadata={"help": "send and write nothing; count"})
    json: bool = field(default=False, metadata={"help": "print the summary as JSON"})

    def __post_init__(self):
        if not 0 <= self.max_failures <= 1:
            raise ValueError(f"--max-failures is a share in [0, 1], got {self.max_failures}")


def run_hints(words: Sequence[str]) -> int:
    """Run `maple-trl data hints`; the exit status is as the help says."""
    from maple_trl.jobs.errors import SetupError
    from maple_trl.jobs.options import OptionParser, read_options

    parser = OptionParser(
        [HintArguments], prog="maple-trl data hints", description=_HINTS_DESCRIPTION, epilog=_HINTS_EXAMPLES
    )
    if asks_for_help(words):
        parser.print_help()
        return 0
    try:
        (arguments,) = read_options(parser, words, required=("dataset_name", "output", "model"))
    except SetupError as error:
        return refuse("data hints", error)
    from maple_trl.chat import ChatClient, ChatSetupError
    from maple_trl.data.hints import HintError, HintOptions, build_hints

    folder = str(Path(arguments.output).parent)
    try:
        chat, options = _chat_options(arguments), HintOptions(**_of_class(HintOptions, arguments))
        with ChatClient(chat) as client, _Progress(quiet=arguments.json) as progress:
            source = _input_file(arguments.dataset_name)
            summary = build_hints(source, arguments.output, client, options, progress.update)
    except (HintError, ChatSetupError, ValueError) as error:
        return refuse("data hints", error, 2, folder)
    except KeyboardInterrupt:
        return refuse("data hints", "stopped; the same command goes on from here", 130)
    except Exception as error:
        return fail("data hints", error, folder)
    return _report(summary, arguments)


def _of_class(options: type, arguments: HintArguments) -> dict[str, Any]:
    """Pick the arguments that a class takes, by name."""
    return {field.name: getattr(arguments, field.name) for field in fields(options) if hasattr(arguments, field.name)}


def _input_file(name: str) -> str:
    if name != "builtin:seven-tags":
        return name
    from maple_trl.data import default_folder

    return str(default_folder() / "train.parquet")


def _chat_options(arguments: HintArguments) -> ChatOptions:
    from maple_trl.chat import ChatOptions

    sampling = {"max_tokens": arguments.max_tokens} if arguments.max_tokens else {}
    sampling |= {} if arguments.temperature is None else {"temperature": arguments.temperature}
    given = _of_class(ChatOptions, arguments) | {"sampling": sampling | arguments.sampling}
    cache_file = None if arguments.no_cache else arguments.cache or f"{arguments.output}.cache.sqlite"
    return ChatOptions(**given, cache_file=cache_file)


class _Progress:
    """A bar on the standard error output, where that is a screen."""

    def __init__(self, quiet: bool):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, disable=quiet or not console.is_terminal, transient=True)
        self._task = self._bar.add_task("hints", total=None)

    def update(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()


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
