"""The options of commands that ask a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from maple_trl.chat import ChatOptions


DRY_RUN = "send and write nothing; say what would be read, asked and written"


@dataclass
class ServerArguments:
    """Where the model is, and how it is asked."""

    model: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model_name_or_path"],
            "metavar": "MODEL",
            "help": "the model's name, as the server knows it (required)",
        },
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
    cache: str | None = field(default=None, metadata={"help": "file that keeps answers (beside the output)"})
    no_cache: bool = field(default=False, metadata={"help": "keep no answers"})
    prompt_price: float = field(default=0.0, metadata={"help": "price of 1e6 prompt tokens"})
    completion_price: float = field(default=0.0, metadata={"help": "price of 1e6 answer tokens"})
    max_failures: float = field(default=0.2, metadata={"help": "failures allowed, as a share"})
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN})

    def __post_init__(self):
        if not 0 <= self.max_failures <= 1:
            raise ValueError(f"--max-failures is a share in [0, 1], got {self.max_failures}")


def chat_options(arguments: ServerArguments, cache_file: str | None) -> ChatOptions:
    """
    Return the options of the client.

    Args:
        cache_file: where answers are kept unless the arguments say otherwise; `None` for nowhere.
    """
    from maple_trl.chat import ChatOptions

    sampling = {"max_tokens": arguments.max_tokens} if arguments.max_tokens else {}
    sampling |= {} if arguments.temperature is None else {"temperature": arguments.temperature}
    given = of_class(ChatOptions, arguments) | {"sampling": sampling | arguments.sampling}
    kept = None if arguments.no_cache or cache_file is None else arguments.cache or cache_file
    return ChatOptions(**given, cache_file=kept)


def of_class(options: type, arguments: Any) -> dict[str, Any]:
    """Pick the arguments that a class takes, by name."""
    return {
        option.name: getattr(arguments, option.name) for option in fields(options) if hasattr(arguments, option.name)
    }
