"""How a client talks to its server, and where its key comes from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit


# What the client writes into the body itself.
_OWN_FIELDS = ("model", "messages", "response_format", "stream", "n")
# Where people put keys that belong in the environment or a file of their own.
_SECRET_FIELDS = ("api_key", "authorization", "extra_headers", "extra_query", "extra_body")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
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
            Environment variable with the key, in capitals. May be unset for a server that asks for none.
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
            Further fields of the body, such as `{"temperature": 0, "max_tokens": 200}`. Where a model refuses `max_tokens`
            by name, `max_completion_tokens` is sent instead; a field of sampling that it refuses (`temperature`, `top_p`,
            penalties, `seed`, …) is left out. A warning says so once, and results name what was `left_out`.
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
    base_url: Annotated[str | None, "place"] = None
    api_key_env: Annotated[str, "place"] = "OPENAI_API_KEY"
    api_key_file: Annotated[str | os.PathLike | None, "place"] = None
    concurrency: Annotated[int, "speed"] = 16
    requests_per_minute: Annotated[float | None, "speed"] = None
    tokens_per_minute: Annotated[float | None, "speed"] = None
    timeout: Annotated[float, "speed"] = 60.0
    batch_timeout: Annotated[float | None, "speed"] = None
    max_attempts: Annotated[int, "speed"] = 5
    invalid_attempts: Annotated[int, "speed"] = 2
    retry_wait: Annotated[float, "speed"] = 1.0
    retry_wait_max: Annotated[float, "speed"] = 30.0
    retry_after_max: Annotated[float, "speed"] = 120.0
    structured: Annotated[str, "speed"] = "auto"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    cache_file: Annotated[str | os.PathLike | None, "place"] = None
    cache_bytes: Annotated[int, "speed"] = 1 << 30
    prompt_price: Annotated[float, "speed"] = 0.0
    completion_price: Annotated[float, "speed"] = 0.0
    dry_run: Annotated[bool, "speed"] = False

    def __post_init__(self):
        if not isinstance(self.model, str) or not self.model.strip():
            raise ValueError(f"model must name a model of the server, got {self.model!r}")
        for name in ("batch_timeout", "requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None:
                self._check_number(name, exclusive=True)
        self._check_number("timeout", exclusive=True)
        for name in ("retry_wait", "retry_wait_max", "retry_after_max", "prompt_price", "completion_price"):
            self._check_number(name, exclusive=False)
        for name, least in (("max_attempts", 1), ("invalid_attempts", 1), ("cache_bytes", 1 << 16)):
            value = getattr(self, name)
            if not _is_whole(value) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not _is_whole(self.concurrency) or not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise ValueError(f"concurrency must be in [1, {MAX_CONCURRENCY}], got {self.concurrency!r}")
        if not isinstance(self.dry_run, bool):
            raise ValueError(f"dry_run must be true or false, got {self.dry_run!r}")
        # What is refused is not shown: it may be the key itself.
        if not isinstance(self.api_key_env, str) or not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError(
                "api_key_env must be the name of an environment variable, in capitals, such as OPENAI_API_KEY; the key "
                "itself belongs into that variable, or alone into a file that api_key_file names"
            )
        for name in ("api_key_file", "cache_file"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (str, os.PathLike)) or not str(value).strip()):
                raise ValueError(f"{name} must be a path")
        if self.structured not in ("auto", "always", "never"):
            raise ValueError(f"structured must be 'auto', 'always' or 'never', got {self.structured!r}")
        check_sampling(self.sampling)
        if self.base_url is not None:
            self._check_url()

    def _check_number(self, name: str, exclusive: bool) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0 or (exclusive and value == 0):
            raise ValueError(f"{name} must be {'positive' if exclusive else 'at least 0'} and finite, got {value!r}")

    def _check_url(self) -> None:
        parts = urlsplit(self.base_url if isinstance(self.base_url, str) else "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url must look like http://HOST:PORT/v1")
        # The address is logged and shown; a secret in it would be, too.
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "base_url must hold no user name, password, query or fragment; keys come from api_key_env or api_key_file"
            )


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Raise ValueError for a field that the client itself sets, and for one that could hold a key."""
    if not isinstance(sampling, Mapping):
        raise ValueError(f"sampling must map fields to values, got {type(sampling).__name__}")
    for name in _OWN_FIELDS:
        if name in sampling:
            raise ValueError(f"sampling must not hold {name!r}, which the client sets itself")
    for name in sampling:
        if str(name).lower().replace("-", "_") in _SECRET_FIELDS:
            raise ValueError(f"sampling must not hold {name!r}; keys come from api_key_env or api_key_file")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class ApiKey:
    """A key that shows itself nowhere: not in `repr`, `str` or a copy on disk. `reveal()` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str):
        self._value = value

    def reveal(self) -> str:
        """Return the key itself."""
        return self._value

    def redact(self, text: str) -> str:
        """Return `text` without the key, should it hold it: servers quote what they were sent."""
        return text.replace(self._value, "[key]") if self._value else text

    def __repr__(self) -> str:
        return "ApiKey([key])" if self._value else "ApiKey(none)"

    __str__ = __repr__

    def __reduce__(self):
        raise TypeError("a key is not stored or sent to another process; each reads its own")


def read_key(options: ChatOptions) -> ApiKey:
    """
    Read the key of a client; it is empty where neither file nor variable gives any and the server may be a local one.

    Raises:
        ChatSetupError: naming file or variable, never the content.
    """
    if options.api_key_file is not None:
        place = f"api_key_file {os.fspath(options.api_key_file)}"
        try:
            value = Path(options.api_key_file).read_text(encoding="utf-8-sig").strip()
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
