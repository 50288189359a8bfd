"""One HTTP call: what comes back, or by which name it failed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from maple_trl.chat.options import ChatOptions, ChatSetupError
from maple_trl.chat.refusals import refused_field


if TYPE_CHECKING:
    from openai import AsyncOpenAI

# Reasons after which the same request may well succeed.
_RETRYABLE = frozenset({"connection", "timeout", "rate-limited", "server-error", "invalid-response", "invalid-json"})
_RETRYABLE |= {"empty"}
_FILTER_CODES = ("content_filter", "content_policy_violation")
# What servers call the end of an answer, beside OpenAI's names: Anthropic, Google, Mistral, DeepSeek, Zhipu, OpenRouter, vLLM
# and SGLang have some of their own, and those in between pass them on.
_CUT = ("length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded")
_FILTERED = (
    "content_filter",
    "refusal",
    "safety",
    "recitation",
    "blocklist",
    "prohibited_content",
    "spii",
    "sensitive",
)
_BROKEN_OFF = ("error", "abort", "network_error", "insufficient_system_resource")
# OpenAI answers so where a model has thought up to the limit, instead of with an empty text.
_OUT_OF_TOKENS = "max_tokens or model output limit was reached"
# A status with which servers turn down a field that they do not know.
UNSUPPORTED_STATUSES = (400, 422, 501)


@dataclass(frozen=True)
class Reply:
    """
    A usable answer, or the part of one that a [`CallFailure`] carries; token counts are `None` where not given.

    `left_out` are fields of the request that it was given without.
    """

    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    left_out: tuple[str, ...] = ()


class CallFailure(Exception):
    """
    A call without a usable answer.

    Args:
        reason (`str`): a key of `REASONS`.
        detail (`str`): what was found, uncut: a key that was cut in two would not be found in it.
        retry_after (`float`, *optional*): seconds that the server asks to wait.
        status (`int`, *optional*): HTTP status.
        reply (`Reply`, *optional*): what did come, for answers that are not usable.
        field (`str`, *optional*): the field of the body that the model does not take, where that is why.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        retry_after: float | None = None,
        status: int | None = None,
        reply: Reply | None = None,
        field: str | None = None,
    ):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.reply, self.field = reason, detail, reply, field
        self.retry_after, self.status = retry_after, status

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later."""
        return self.reason in _RETRYABLE


def make_openai(options: ChatOptions, key: str) -> AsyncOpenAI:
    """
    Make the `openai` client, without its own retries: they would multiply with ours and wait in ways nobody counts.

    Raises:
        ChatSetupError: when a package of the extra is missing.
    """
    try:
        import aiolimiter  # noqa: F401
        import jsonschema  # noqa: F401
        import tenacity  # noqa: F401
        from openai import AsyncOpenAI
    except ImportError as error:
        raise ChatSetupError(f'{error}; the extra brings it: pip install "maple-trl[judge]"') from error
    # Servers that ask for no key get a word in its place: the openai package sends nothing without one.
    return AsyncOpenAI(api_key=key or "none", base_url=options.base_url, timeout=options.timeout, max_retries=0)


async def call(client: AsyncOpenAI, body: Mapping[str, Any], timeout: float) -> Reply:
    """
    Send one request and read its answer.

    Args:
        body (`Mapping`): the JSON body.
        timeout (`float`): seconds until the whole answer must be there, however slowly it drips.

    Raises:
        CallFailure: when there is no usable answer.
    """
    import openai

    fields = {name: value for name, value in body.items() if name not in ("model", "messages")}
    try:
        async with asyncio.timeout(timeout):
            raw = await client.chat.completions.with_raw_response.create(
                model=body["model"], messages=body["messages"], extra_body=fields
            )
            content = raw.http_response.content
    except (TimeoutError, openai.APITimeoutError):
        raise CallFailure("timeout", f"no complete answer within {timeout:g} s") from None
    except openai.APIStatusError as error:
        raise _status_failure(error) from None
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        raise CallFailure("connection", f"{type(cause).__name__}: {cause}") from None
    except openai.OpenAIError as error:
        raise CallFailure("invalid-response", f"{type(error).__name__}: {error}") from None
    except (TypeError, ValueError) as error:  # text that UTF-8 cannot hold, for one
        raise CallFailure("bad-request", f"cannot be sent: {type(error).__name__}: {error}") from None
    return read_reply(content)


def _status_failure(error: Any) -> CallFailure:
    """Return the failure that an HTTP status stands for (`error` is an `openai.APIStatusError`)."""
    status, code = error.status_code, error.code or ""
    detail = f"HTTP {status}: {error.message.removeprefix(f'Error code: {status} - ')}"
    if status == 400 and _OUT_OF_TOKENS in detail:
        return CallFailure("truncated", detail, reply=Reply(finish_reason="length"))
    if status in (401, 403):
        reason = "unauthorized"
    elif status == 404:
        reason = "not-found"
    elif status == 429:
        reason = "quota" if code == "insufficient_quota" else "rate-limited"
    elif status == 408:
        reason = "timeout"
    elif status in (409, 425) or status >= 500:
        reason = "server-error"
    else:
        reason = "content-filter" if code in _FILTER_CODES else "bad-request"
    field = refused_field(detail, code, error.param) if status in UNSUPPORTED_STATUSES else None
    wait = retry_after(error.response.headers)
    return CallFailure(reason, detail, retry_after=wait, status=status, field=field)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """
    Return the seconds that a server asks to wait; `None` where it asks nothing that can be understood.

    Read are `retry-after-ms`, and `Retry-After` in seconds or as a date (RFC 9110, 10.2.3).
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = (headers.get(name) or "").strip()
        try:
            seconds = float(text) / unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def read_reply(content: bytes) -> Reply:
    """
    Read the body of a successful call.

    Raises:
        CallFailure: when it is no chat completion, or one without usable text.
    """
    try:
        body = json.loads(content)
        error = body.get("error")  # some servers report errors with status 200
        if error and not body.get("choices"):
            raise _error_failure(error)
        choice, usage = body["choices"][0], body.get("usage")
        usage = usage if isinstance(usage, Mapping) else {}
        error = error or choice.get("error")  # in the middle of an answer, whose first part is there
        message = choice.get("message") or {} if error else choice["message"]
        text, refusal = _text(message.get("content")), message.get("refusal")
        finish_reason = choice.get("finish_reason")
        finish_reason = str(finish_reason) if finish_reason else None
        prompt_tokens, completion_tokens = (_count(usage.get(f"{part}_tokens")) for part in ("prompt", "completion"))
    except CallFailure:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        text = content.decode("utf-8", "replace")
        raise CallFailure("invalid-response", f"{type(error).__name__}: {error}; the body: {text}") from None
    reply = Reply(text, finish_reason, prompt_tokens, completion_tokens)
    if error:
        raise _error_failure(error, reply)
    if refusal:
        raise CallFailure("refused", str(refusal), reply=reply)
    try:
        reply = dataclasses.replace(reply, finish_reason=read_finish(finish_reason))
    except CallFailure as failure:
        failure.reply = reply
        raise
    if not text or not text.strip():
        reason = "truncated" if reply.finish_reason == "length" else "empty"
        raise CallFailure(reason, f"no text; finish_reason {finish_reason!r}", reply=reply)
    return reply


def read_finish(finish_reason: str | None) -> str | None:
    """
    Return why an answer ended: `"length"` for every name of a limit, any other name as it is.

    Raises:
        CallFailure: for a name that says that the answer is not whole, for another reason than its length.
    """
    # Some write behind a colon what was filtered.
    name = (finish_reason or "").partition(":")[0].strip().lower()
    if name in _CUT:
        return "length"
    if name in _FILTERED:
        raise CallFailure("content-filter", f"the answer was stopped; finish_reason {finish_reason!r}")
    if name in _BROKEN_OFF:
        raise CallFailure("server-error", f"the answer broke off; finish_reason {finish_reason!r}")
    return finish_reason


def _error_failure(error: Any, reply: Reply | None = None) -> CallFailure:
    """Return the failure that an error object in the body of a successful call stands for."""
    filtered = isinstance(error, Mapping) and error.get("code") in _FILTER_CODES
    detail = f"error object in a successful response: {json.dumps(error)}"
    return CallFailure("content-filter" if filtered else "server-error", detail, reply=reply)


def _text(content: Any) -> str | None:
    """Return the text of a message: a string, or the texts of a list of parts."""
    if content is None or isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type", "text") == "text")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
