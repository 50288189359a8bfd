"""The command `maple-trl vllm-serve`: its options, and what it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from maple_trl.cli.base import Command
from maple_trl.cli.failures import WRONG


# Nothing heavier than the standard library up here: the help of every command passes through this module.


@dataclass
class ServeArguments:
    """What is served, and where."""

    model_name_or_path: str | None = field(
        default=None, metadata={"aliases": ["--model"], "help": "the model that is trained (required)"}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; there is no password"})
    port: int = field(default=8000, metadata={"help": "port to listen on"})
    dtype: str = field(
        default="auto", metadata={"help": "what the engine computes in; auto: bfloat16 with CUDA, else float32"}
    )
    max_model_length: int | None = field(
        default=None, metadata={"help": "tokens of prompt and completion (as many as the model takes)"}
    )

    def __post_init__(self):
        if not 0 < self.port < 65536:
            raise ValueError(f"--port must be a port, got {self.port}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")
        if self.max_model_length is not None and self.max_model_length < 1:
            raise ValueError(f"--max_model_length must be 1 or more, got {self.max_model_length}")


class ServeCommand(Command):
    """Passes what stands behind `--` on as it is."""

    def read(self, words: Sequence[str]) -> tuple[Any, ...]:
        """Read what stands before `--`; return it with what stands behind."""
        words = list(words)
        end = words.index("--") if "--" in words else len(words)
        return (*super().read(words[:end]), words[end + 1 :])


def run(options: ServeArguments, further: Sequence[str]) -> int:
    """Start the server; return its exit status."""
    from maple_trl.rollout.server import serve

    where = options.host, options.port, options.max_model_length
    return serve(options.model_name_or_path, options.dtype, *where, further)


COMMAND = ServeCommand(
    name="vllm-serve",
    help="start a vLLM server that samples completions for a training job",
    run=run,
    description="""\
Starts vLLM's server for rollouts of a training job with use_vllm: true and vllm_mode: server. It takes prompts that the
trainer has encoded, media and all, and the weights that are trained.""",
    examples=(
        "maple-trl vllm-serve --model_name_or_path Qwen/Qwen2.5-Omni-3B --port 8000",
        "maple-trl vllm-serve --model_name_or_path builtin:tiny-omni --max_model_length 2048 -- --max-num-seqs 32",
    ),
    notes="What stands behind -- goes to `vllm serve` as it is. Once the server runs, the exit status is its own.",
    statuses={WRONG: "it cannot be started, or described wrongly"},
    options={"options": ServeArguments},
    required=("model_name_or_path",),
    errors=dict.fromkeys(("builtins:ImportError", "builtins:OSError", "builtins:ValueError"), WRONG),
)
