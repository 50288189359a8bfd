"""The command `maple-trl parity`: its options, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.cli.base import Command
from maple_trl.cli.failures import FAILED, WRONG
from maple_trl.jobs.errors import SetupError


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.rollout.parity import Compared

_WIDTH = 120  # of the table


@dataclass
class ParityArguments:
    """What is compared."""

    model_name_or_path: str | None = field(
        default=None, metadata={"aliases": ["--model"], "help": "the model (required)"}
    )
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16"})
    base_url: str | None = field(
        default=None,
        metadata={"help": "a server that `maple-trl vllm-serve` has started; without it, an engine in this process"},
    )
    video: str | None = field(default=None, metadata={"help": "a clip with sound (one is made)"})
    max_completion_length: int = field(default=12, metadata={"help": "tokens that are sampled of each prompt"})
    json: str | None = field(default=None, metadata={"metavar": "FILE", "help": "write the table as JSON"})

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.max_completion_length < 1:
            raise ValueError(f"--max_completion_length must be 1 or more, got {self.max_completion_length}")


def run(options: ParityArguments) -> int:
    """Compare, and print a table of what differs."""
    if options.video is not None and not Path(options.video).is_file():
        raise SetupError(f"--video: there is no file {options.video}")
    from maple_trl.rollout.parity import compare

    results = compare(
        options.model_name_or_path,
        options.dtype,
        options.base_url,
        options.max_completion_length,
        options.video,
    )
    print_table(options.model_name_or_path, results)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return FAILED if any(result.applies and result.problem for result in results) else 0


def print_table(model: str, results: Sequence[Compared]) -> None:
    """Print what was compared, a kind of prompt per row, and the verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: trainer against engine", title_justify="left")
    for name in ("prompt", "tokens", "image", "video", "audio", "ids", "features", "log-probs", "updated", "verdict"):
        table.add_column(name, justify="left" if name in ("prompt", "verdict") else "right")
    for result in results:
        if not result.applies:
            table.add_row(result.kind, *["-"] * 9)
            continue
        counts = (result.tokens, result.image_tokens, result.video_tokens, result.audio_tokens)
        numbers = map(_plain, (result.features, result.logps, result.logps_after))
        ids = "same" if result.same_ids else "-"
        table.add_row(result.kind, *map(str, counts), ids, *numbers, result.problem or "same")
    console = Console()
    if not console.is_terminal:  # a file has room for all digits
        console.width = max(console.width, _WIDTH)
    console.print(table)
    for result in results:
        if not result.applies:
            console.print(f"{result.kind}: {result.problem}", highlight=False, markup=False)


def _plain(value: Any) -> str:
    return "-" if value is None else f"{value:.1e}"


COMMAND = Command(
    name="parity",
    help="compare what vLLM computes with what the trainer does",
    run=run,
    description="""\
Compares what vLLM computes with what the trainer does, for each kind of prompt: tokens, features of the towers, and
log-probabilities of sampled tokens, before and after all weights have changed.""",
    examples=(
        "maple-trl parity --model_name_or_path builtin:tiny-omni",
        "maple-trl parity --model_name_or_path Qwen/Qwen2.5-Omni-3B --dtype bfloat16 --video clip.mp4 --json parity.json",
        "maple-trl parity --model_name_or_path builtin:tiny-omni --base_url http://127.0.0.1:8000",
    ),
    statuses={FAILED: "something differs", WRONG: "it cannot be found out, or described wrongly"},
    options={"options": ParityArguments},
    required=("model_name_or_path",),
    errors=dict.fromkeys(
        ("maple_trl.rollout.engine:EngineError", "builtins:ImportError", "builtins:OSError", "builtins:ValueError"),
        WRONG,
    ),
)
