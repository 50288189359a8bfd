"""How a client talks to its server, and where its key comes from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


# What the client writes into the body itself.
_OWN_FIELDS = ("model", "messages", "response_format", "stream", "n")
MAX_CONCURRENCY = 1000  # connections that the HTTP client of the openai package keeps at most


class ChatSetupError(ValueError):
    """The client cannot work as it is set up: a key file that is not there, a package that is missing."""


@dataclass(frozen=True)
class ChatOptions:
    r"""
    Settings of a [`ChatClient`]. They hold no key, only where one is found.

    Args:
        model (`str`):
            The model's name, as the server knows it.
        base_url (`str`, *optional*):
            Root of the API, such as `http://127.0.0.1:8000/v1`; default is that of the `openai` package.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the key. May be unset for a server that asks for none.
        api_key_file (`str`, *optional*):
            File with nothing but the key; wins over the variable.
        concurrency (`int`, *optional*, defaults to 16):
            Most HTTP calls open at once, over all batches of the client.
        requests_per_minute, tokens_per_minute (`float`, *optional*):
            Rates that are kept; tokens are estimated before a call, `max_tokens` included.
        timeout (`float`, *optional*, defaults to 60):
            Seconds of one call, from the first byte sent to the last one received.
        batch_timeout (`float`, *optional*):
            Seconds of one batch; what is open then fails as `batch-timeout`.
        max_attempts (`int`, *optional*, defaults to 5):
            Calls per request.
        invalid_attempts (`int`, *optional*, defaults to 2):
            Calls per request as long as they end in `invalid-json`.
        retry_wait, retry_wait_max (`float`, *optional*, defaults to 1 and 30):
            Seconds before a retry: drawn between 0 and `retry_wait * 2**(retry - 1)`, at most `retry_wait_max`.
        retry_after_max (`float`, *optional*, defaults to 120):
            Longest `Retry-After` that is waited for; a longer one ends the request.
        structured (`"auto"`, `"always"` or `"never"`, *optional*, defaults to `"auto"`):
            Send a request's JSON schema as `response_format`. `"auto"` leaves it out from the moment the server does
            not take it. The schema also stands in the prompt, for servers that ignore the field.
        sampling (`Mapping`, *optional*):
            Further fields of the body, such as `{"temperature": 0, "max_tokens": 200}`.
        cache_file (`str`, *optional*):
            SQLite file that keeps usable answers; without one nothing is kept. It belongs on a local disk.
        cache_bytes (`int`, *optional*, defaults to 1 GiB):
            Size of that file; the answers not used for longest go first.
        prompt_price, completion_price (`float`, *optional*, defaults to 0):
            Price of a million tokens.
        dry_run (`bool`, *optional*, defaults to `False`):
            Send nothing, count what would be sent.

    Raises:
        ValueError: naming the field that is out of range, or a `base_url` with a password or query in it.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    api_key_file: str | os.PathLike | None = None
    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 60.0
    batch_timeout: float | None = None
    max_attempts: int = 5
    invalid_attempts: int = 2
    retry_wait: float = 1.0
    retry_wait_max: float = 30.0
    retry_after_max: float = 120.0
    structured: str = "auto"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    cache_file: str | os.PathLike | None = None
    cache_bytes: int = 1 << 30
    prompt_price: float = 0.0
    completion_price: float = 0.0
    dry_run: bool = False

    def __post_init__(self):
        if not isinstance(self.model, str) or not self.model.strip():
            raise ValueError(f"model must name a model of the server, got {self.model!r}")
        for name in ("timeout", "batch_timeout", "requests_per_minute", "tokens_per_minute"):
            self._check_number(name, exclusive=True)
        for name in ("retry_wait", "retry_wait_max", "retry_after_max", "prompt_price", "completion_price"):
            self._check_number(name, exclusive=False)
        for name, least in (("max_attempts", 1), ("invalid_attempts", 1), ("cache_bytes", 1 << 16)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not isinstance(self.concurrency, int) or not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise ValueError(f"concurrency must be in [1, {MAX_CONCURRENCY}], got {self.concurrency!r}")
        if self.structured not in ("auto", "always", "never"):
            raise ValueError(f"structured must be 'auto', 'always' or 'never', got {self.structured!r}")
        check_sampling(self.sampling)
        if self.base_url is not None:
            self._check_url()

    def _check_number(self, name: str, exclusive: bool) -> None:
        value = getattr(self, name)
        if value is not None and not (math.isfinite(value) and (value > 0 if exclusive else value >= 0)):
            raise ValueError(f"{name} must be {'positive' if exclusive else 'at least 0'} and finite, got {value!r}")

    def _check_url(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url must look like http://HOST:PORT/v1")
        # The address is logged and shown; a secret in it would be, too.
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "base_url must hold no user name, password, query or fragment; keys come from api_key_env or api_key_file"
            )


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """ValueError for a field that the client itself sets."""
    for name in _OWN_FIELDS:
        if name in sampling:
            raise ValueError(f"sampling must not hold {name!r}, which the client sets itself")


class ApiKey:
    """A key that shows itself nowhere: not in `repr`, `str` or a copy on disk. `reveal()` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str):
        self._value = value

    def reveal(self) -> str:
        return self._value

    def redact(self, text: str) -> str:
        """`text` without the key, should it hold it: servers quote what they were sent."""
        return text.replace(self._value, "[key]") if self._value else text

    def __repr__(self) -> str:
        return "ApiKey([key])" if self._value else "ApiKey(none)"

    __str__ = __repr__

    def __reduce__(self):
        raise TypeError("a key is not stored or sent to another process; each reads its own")


def read_key(options: ChatOptions) -> ApiKey:
    """
    The key of a client; an empty one where neither file nor variable gives any and the server may be a local one.

    Raises:
        ChatSetupError: naming file or variable, never the content.
    """
    if options.api_key_file is not None:
        place = f"api_key_file {os.fspath(options.api_key_file)}"
        try:
            value = Path(options.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise ChatSetupError(f"{place}: {reason}") from None
        if not value:
            raise ChatSetupError(f"{place} is empty; it must hold the key and nothing else")
    else:
        place = f"environment variable {options.api_key_env}"
        value = os.environ.get(options.api_key_env, "").strip()
        if not value and options.base_url is None and not options.dry_run:
            raise ChatSetupError(
                f"no key: set the {place}, name a file with api_key_file, or name a local server with base_url"
            )
    # Quotes and backslashes would be written otherwise where a server quotes the key, and be missed by `redact`.
    if not all("!" <= char <= "~" and char not in "\"'\\" for char in value):
        raise ChatSetupError(f"{place} is no key: it holds white space, quotes, or characters beyond ASCII")
    return ApiKey(value)
