"""The commands `maple-trl data …`: their options, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from maple_trl.cli.failures import fail, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.chat import ChatOptions
    from maple_trl.data.hints import HintOptions, HintSummary

_HINTS_EXAMPLES = """\
examples:
  maple-trl data hints --input train.parquet --output hinted.parquet --model NAME --dry-run
  maple-trl data hints --input train.parquet --output hinted.parquet --model NAME --base-url http://127.0.0.1:8000/v1
  maple-trl data hints --input train.jsonl --output hinted.jsonl --model NAME --columns captions --frames 4 --limit 20

A run that was stopped goes on where it was when the same command is given again.
Exit status: 0; 1 when more rows failed than --max-failures allows; 2 for a wrong description; 130 when interrupted.
"""


def add_data_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the group `data` to the parser of `maple-trl`."""
    data = commands.add_parser("data", help="prepare data: hints for hard rows", allow_abbrev=False)
    data.set_defaults(data_parser=data)
    group = data.add_subparsers(dest="data_command", metavar="COMMAND", title="commands")
    hints = group.add_parser(
        "hints",
        help="let a teacher model write a hint for each row",
        description="Adds a column `hint`: a teacher behind an OpenAI-compatible endpoint sees prompt, answer and, where "
        "asked, captions and frames, and says where to look. Hints that give the answer away are refused.",
        epilog=_HINTS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    files = hints.add_argument_group("rows")
    files.add_argument(
        "--input", required=True, metavar="FILE", help=".parquet, .json or .jsonl, or builtin:seven-tags"
    )
    files.add_argument(
        "--output", required=True, metavar="FILE", help="the same table with the column; may be the input"
    )
    files.add_argument("--columns", nargs="+", default=[], metavar="NAME", help="further columns for the teacher")
    files.add_argument("--frames", type=int, default=0, metavar="N", help="pictures of the video for the teacher (0)")
    files.add_argument("--media-root", metavar="FOLDER", help="folder of videos and subtitles (that of the input)")
    files.add_argument("--limit", type=int, metavar="N", help="ask for the first N rows only")
    files.add_argument("--only-missing", action="store_true", help="keep the hints that the input already has")
    files.add_argument("--max-tries", type=int, default=3, metavar="N", help="hints asked for, a row (3)")
    files.add_argument("--max-words", type=int, default=60, metavar="N", help="longest hint (60)")
    files.add_argument("--chunk", type=int, default=64, metavar="N", help="rows asked and noted together (64)")
    files.add_argument("--max-failures", type=float, default=0.2, metavar="SHARE", help="failed rows allowed (0.2)")
    server = hints.add_argument_group("teacher")
    server.add_argument("--model", required=True, metavar="NAME", help="the model's name, as the server knows it")
    server.add_argument("--base-url", metavar="URL", help="root of the API, as http://127.0.0.1:8000/v1")
    server.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable (OPENAI_API_KEY)")
    server.add_argument("--api-key-file", metavar="FILE", help="file with the key, instead of the variable")
    server.add_argument("--concurrency", type=int, default=16, metavar="N", help="calls open at once (16)")
    server.add_argument("--requests-per-minute", type=float, metavar="N", help="rate that is kept")
    server.add_argument("--tokens-per-minute", type=float, metavar="N", help="rate that is kept")
    server.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds of one call (120)")
    server.add_argument("--max-attempts", type=int, default=5, metavar="N", help="calls a request, with retries (5)")
    server.add_argument(
        "--retry-wait", type=float, default=1.0, metavar="S", help="seconds before the first retry (1)"
    )
    server.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="tokens of an answer; 0: no limit (1024)"
    )
    server.add_argument("--temperature", type=float, metavar="T", help="sampling temperature (the server's)")
    server.add_argument(
        "--sampling", type=json.loads, default={}, metavar="JSON", help="further fields of the request"
    )
    server.add_argument("--cache", metavar="FILE", help="file that keeps answers (OUTPUT.cache.sqlite)")
    server.add_argument("--no-cache", action="store_true", help="keep no answers")
    server.add_argument("--prompt-price", type=float, default=0.0, metavar="P", help="price of 1e6 prompt tokens")
    server.add_argument("--completion-price", type=float, default=0.0, metavar="P", help="price of 1e6 answer tokens")
    hints.add_argument("--dry-run", action="store_true", help="send and write nothing; count")
    hints.add_argument("--json", action="store_true", help="print the summary as JSON")


def run_data(arguments: argparse.Namespace) -> int:
    """Runs a command of the group; the exit status is as the help says."""
    if arguments.data_command is None:
        arguments.data_parser.print_help()
        return 0
    from maple_trl.chat import ChatClient, ChatSetupError
    from maple_trl.data.hints import HintError, build_hints

    try:
        chat, options = _chat_options(arguments), _hint_options(arguments)
        with ChatClient(chat) as client, _Progress(quiet=arguments.json) as progress:
            summary = build_hints(_input_file(arguments.input), arguments.output, client, options, progress.update)
    except (HintError, ChatSetupError, ValueError) as error:
        return refuse("data hints", error, 2, str(Path(arguments.output).parent))
    except KeyboardInterrupt:
        return refuse("data hints", "stopped; the same command goes on from here", 130)
    except Exception as error:
        return fail("data hints", error, str(Path(arguments.output).parent))
    return _report(summary, arguments)


def _input_file(name: str) -> str:
    if name != "builtin:seven-tags":
        return name
    from maple_trl.data import default_folder

    return str(default_folder() / "train.parquet")


def _chat_options(arguments: argparse.Namespace) -> ChatOptions:
    from maple_trl.chat import ChatOptions

    if not isinstance(arguments.sampling, dict):
        raise ValueError(f"--sampling must be a JSON object, got {type(arguments.sampling).__name__}")
    sampling = {"max_tokens": arguments.max_tokens} if arguments.max_tokens else {}
    sampling |= {} if arguments.temperature is None else {"temperature": arguments.temperature}
    names = "model base_url api_key_env api_key_file concurrency requests_per_minute tokens_per_minute timeout"
    names += " max_attempts retry_wait prompt_price completion_price dry_run"
    return ChatOptions(
        **{name: getattr(arguments, name) for name in names.split()},
        sampling=sampling | arguments.sampling,
        cache_file=None if arguments.no_cache else arguments.cache or f"{arguments.output}.cache.sqlite",
    )


def _hint_options(arguments: argparse.Namespace) -> HintOptions:
    from maple_trl.data.hints import HintOptions

    if not 0 <= arguments.max_failures <= 1:
        raise ValueError(f"--max-failures is a share in [0, 1], got {arguments.max_failures}")
    names = ("columns", "frames", "media_root", "limit", "only_missing", "max_tries", "max_words", "chunk")
    return HintOptions(**{name: getattr(arguments, name) for name in names})


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


def _report(summary: HintSummary, arguments: argparse.Namespace) -> int:
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


def _print_summary(summary: HintSummary, arguments: argparse.Namespace) -> None:
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
