"""What becomes of a request, and what a client has spent."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal


REASONS: dict[str, str] = {
    # the way to the server
    "connection": "no connection, or one that broke before the answer was complete",
    "timeout": "no complete answer within the time of one call",
    "batch-timeout": "the time of the whole batch was over before this request had its answer",
    # what the server said
    "rate-limited": "too many requests (429), also after waiting as long as asked",
    "quota": "the account has no credit left (429, insufficient_quota)",
    "server-error": "the server failed (5xx), answered with an error object, or gave up in the middle of an answer",
    "unauthorized": "the key is missing, wrong, or not allowed to do this (401, 403)",
    "not-found": "no such model or path (404)",
    "bad-request": "the request itself was not accepted, or cannot be sent",
    "content-filter": "a content filter stopped the request or the answer",
    # what the model said
    "refused": "the model refused to answer (the message's refusal field)",
    "truncated": "the answer ended at the token limit before it was usable",
    "empty": "the answer has no text",
    "invalid-response": "the body is no chat completion",
    "invalid-json": "the answer holds no JSON object that matches the schema",
    # this side
    "dry-run": "not sent: the client only counts",
    "internal": "a fault of this package; the detail says which",
}
"""Why a request has no usable answer: the closed list of [`ChatResult.reason`]."""


@dataclass(frozen=True)
class ChatResult:
    """
    What became of one request.

    Attributes:
        text (`str` or `None`): what the model wrote. Also set where an answer is not usable, if there was text in it.
        data (`Any`): the object read out of the text, for a request with a `json_schema`.
        reason (`str` or `None`): a key of [`REASONS`]; `None` when the answer is usable.
        detail (`str`): what the server or the parser said. Holds no key.
        source (`str`): `"server"`, `"cache"`, `"shared"` (an identical request of the batch was sent), or `"none"`.
        attempts (`int`): HTTP calls made for it.
        prompt_tokens (`int`): of the prompt, as the server counted them, over all attempts.
        completion_tokens (`int`): of the answer, likewise.
        last_prompt_tokens (`int` or `None`): of the prompt of the last answer alone; `None` where the server did not count
            them, or nothing was sent.
        last_completion_tokens (`int` or `None`): of the last answer alone, likewise.
        finish_reason (`str` or `None`): the server's, of the last answer; `"length"` under whatever name it has for one that
            was cut at a limit of tokens.
        left_out (`tuple[str, ...]`): fields of the request that the model does not take, and that the answer was given
            without (see [`~maple_trl.chat.ChatOptions`], `sampling`).

    Raises:
        KeyError: for a reason that is not among [`REASONS`].
    """

    text: str | None = None
    data: Any = None
    reason: str | None = None
    detail: str = ""
    source: Literal["server", "cache", "shared", "none"] = "server"
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    last_prompt_tokens: int | None = None
    last_completion_tokens: int | None = None
    finish_reason: str | None = None
    left_out: tuple[str, ...] = ()

    def __post_init__(self):
        if self.reason is not None and self.reason not in REASONS:
            raise KeyError(f"{self.reason!r} is not a documented reason; known: {sorted(REASONS)}")

    @property
    def ok(self) -> bool:
        """Whether the answer is usable."""
        return self.reason is None


@dataclass
class ChatUsage:
    """
    Counters of a client, over its whole life.

    `requests == succeeded + sum(failed.values())` once no batch is under way, with `dry-run` among `failed`.

    Attributes:
        requests (`int`): requests that came in.
        sent (`int`): HTTP calls, retries among them.
        retries (`int`): calls beyond the first of a request.
        cached (`int`): requests answered from the cache.
        shared (`int`): requests answered by an identical request of their batch.
        succeeded (`int`): requests with a usable answer.
        failed (`Counter`): reason -> requests without one.
        faults (`Counter`): reason -> calls that went wrong, whether or not a later one of the request went well.
        prompt_tokens (`int`): of prompts, as the server counted them.
        completion_tokens (`int`): of answers, likewise.
        unmetered (`int`): answers without token counts; `cost` does not hold them.
        estimated_tokens (`int`): estimate for the requests of a dry run, prompt and longest answer together.
        cost (`float`): in the currency of the prices in [`ChatOptions`].
        cache_errors (`int`): reads and writes of the cache that failed.
    """

    requests: int = 0
    sent: int = 0
    retries: int = 0
    cached: int = 0
    shared: int = 0
    succeeded: int = 0
    failed: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0
    estimated_tokens: int = 0
    cost: float = 0.0
    cache_errors: int = 0

    def copy(self) -> ChatUsage:
        """Return the counters as of now."""
        return dataclasses.replace(self, failed=Counter(self.failed), faults=Counter(self.faults))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            f.name: dict(value) if isinstance(value := getattr(self, f.name), Counter) else value
            for f in dataclasses.fields(self)
        }
