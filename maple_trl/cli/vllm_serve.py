"""The command `maple-trl vllm-serve`: its options, and what it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from maple_trl.cli.failures import asks_for_help, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

_DESCRIPTION = """\
Starts vLLM's server for rollouts of a training job with use_vllm: true and vllm_mode: server. It takes prompts that the
trainer has encoded, media and all, and the weights that are trained."""

_EXAMPLES = """\
examples:
  maple-trl vllm-serve --model_name_or_path Qwen/Qwen2.5-Omni-3B --port 8000
  maple-trl vllm-serve --model_name_or_path builtin:tiny-omni --max_model_length 2048 -- --max-num-seqs 32

What stands behind -- goes to `vllm serve` as it is.
Every option may be a key of a YAML file (--config FILE); the command line wins.

Exit status: the server's; 2 when it cannot be started.
"""


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


def run_vllm_serve(words: Sequence[str]) -> int:
    """Run the command; the exit status is as the help says."""
    from maple_trl.jobs.errors import SetupError
    from maple_trl.jobs.options import OptionParser, read_options

    words = list(words)
    further = words[words.index("--") + 1 :] if "--" in words else []
    own = words[: words.index("--")] if "--" in words else words
    parser = OptionParser([ServeArguments], prog="maple-trl vllm-serve", description=_DESCRIPTION, epilog=_EXAMPLES)
    if asks_for_help(own):
        parser.print_help()
        return 0
    try:
        options, *_ = read_options(parser, own)
        if options.model_name_or_path is None:
            raise SetupError("name a model: --model_name_or_path")
    except SetupError as error:
        return refuse("vllm-serve", error)
    try:
        from maple_trl.rollout.server import serve

        where = options.host, options.port, options.max_model_length
        return serve(options.model_name_or_path, options.dtype, *where, further)
    except (ImportError, OSError, ValueError) as error:
        return refuse("vllm-serve", error)
