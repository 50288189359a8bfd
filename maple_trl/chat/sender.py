"""One request until it has an answer or a name for its failure: slots, rates, retries, structured output."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maple_trl.chat.calls import UNSUPPORTED_STATUSES, CallFailure, Reply, call, make_openai
from maple_trl.chat.limits import RateLimits
from maple_trl.chat.messages import ChatRequest, estimate_tokens, request_body
from maple_trl.chat.options import ApiKey, ChatOptions
from maple_trl.chat.refusals import describe_refusal, left_out, without_refused
from maple_trl.chat.results import ChatResult, ChatUsage
from maple_trl.chat.structured import NoObjectError


if TYPE_CHECKING:
    from tenacity import RetryCallState


logger = logging.getLogger(__name__)

DETAIL_CHARACTERS = 500


@dataclass
class _Spent:
    """Calls and tokens of one request, over all its attempts."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@functools.cache  # several clients of a process may ask one model
def _warn_once(message: str) -> None:
    logger.warning(message)


class ChatSender:
    """
    Sends requests. Belongs to one event loop.

    Args:
        options (`ChatOptions`): the settings.
        key (`ApiKey`): the key.
        usage (`ChatUsage`): counters, which it adds to.

    Raises:
        ChatSetupError: when a package of the extra is missing.
    """

    def __init__(self, options: ChatOptions, key: ApiKey, usage: ChatUsage):
        self._options, self._key, self._usage = options, key, usage
        self._openai = make_openai(options, key.reveal())
        self._slots = asyncio.Semaphore(options.concurrency)
        self._limits = RateLimits(options.requests_per_minute, options.tokens_per_minute)
        self._refused: set[str] = set()
        # `None` until a request with a schema has shown whether the server takes the field.
        self._takes_schema: bool | None = {"auto": None, "always": True, "never": False}[options.structured]

    async def close(self) -> None:
        """Close connections."""
        await self._openai.close()

    async def send(self, request: ChatRequest) -> ChatResult:
        """Return the result of one request, after as many attempts as the options allow."""
        import tenacity

        spent = _Spent()
        jitter = tenacity.wait_random_exponential(
            multiplier=self._options.retry_wait, max=self._options.retry_wait_max
        )
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(self._worth_retrying),
            stop=self._is_last,
            wait=lambda state: jitter(state) + (state.outcome.exception().retry_after or 0.0),
            reraise=True,
        )
        reason, detail, data = None, "", None
        try:
            reply, data = await retrying(self._attempt, request, spent)
        except CallFailure as failure:
            reply, reason, detail = (
                failure.reply or Reply(),
                failure.reason,
                self._key.redact(failure.detail)[:DETAIL_CHARACTERS],
            )
            if failure.retry_after is not None:
                detail += f" (the server asks to wait {failure.retry_after:g} s)"
        return ChatResult(
            text=None if reply.text is None else self._key.redact(reply.text),
            data=data,
            reason=reason,
            detail=detail,
            attempts=spent.calls,
            prompt_tokens=spent.prompt_tokens,
            completion_tokens=spent.completion_tokens,
            last_prompt_tokens=reply.prompt_tokens,
            last_completion_tokens=reply.completion_tokens,
            finish_reason=self._key.redact(reply.finish_reason or "") or None,
            left_out=reply.left_out,
        )

    # Retries

    def _worth_retrying(self, error: BaseException) -> bool:
        if not isinstance(error, CallFailure) or not error.retryable:
            return False
        return (error.retry_after or 0.0) <= self._options.retry_after_max

    def _is_last(self, state: RetryCallState) -> bool:
        invalid = state.outcome.exception().reason == "invalid-json"
        limit = min(self._options.invalid_attempts, self._options.max_attempts) if invalid else None
        return state.attempt_number >= (limit or self._options.max_attempts)

    # An attempt

    async def _attempt(self, request: ChatRequest, spent: _Spent) -> tuple[Reply, Any]:
        """Get one answer, and the object in it where one was asked for."""
        async with self._slots:
            reply = await self._exchange(request, spent)
        try:
            return reply, request.read(self._key.redact(reply.text), reply.finish_reason)
        except NoObjectError as error:
            reason = "truncated" if reply.finish_reason == "length" else "invalid-json"
            self._usage.faults[reason] += 1
            raise CallFailure(reason, str(error), reply=reply) from None

    async def _exchange(self, request: ChatRequest, spent: _Spent) -> Reply:
        """
        Send the request in the form that the server takes.

        While it is not known whether it takes a schema, a request that is turned down is sent once more without it:
        servers word that refusal in too many ways to recognise it.
        """
        if request.json_schema is None or self._takes_schema is False:
            return await self._post(request, False, spent)
        try:
            reply = await self._post(request, True, spent)
        except CallFailure as failure:
            if self._takes_schema or failure.status not in UNSUPPORTED_STATUSES:
                raise
            reply = await self._post(request, False, spent)
            if self._takes_schema is None:  # no other request has shown meanwhile that it does
                self._takes_schema = False
        else:
            self._takes_schema = True
        return reply

    async def _post(self, request: ChatRequest, structured: bool, spent: _Spent) -> Reply:
        """
        Send the request with the fields that the model takes.

        A field that it refuses by name is left out, or sent under its newer name, and the request is sent again at once;
        once one has been accepted so, others are sent so as well.
        """
        asked = request_body(request, self._options, structured)
        refused = set(self._refused)
        while True:
            body = without_refused(asked, refused)
            try:
                reply = await self._send(body, spent)
            except CallFailure as failure:
                if failure.field in body:
                    refused.add(failure.field)
                    continue
                if failure.reply is not None:  # not usable, but the request was accepted
                    self._learn(asked, refused)
                    failure.reply = dataclasses.replace(failure.reply, left_out=left_out(asked, refused))
                raise
            else:
                self._learn(asked, refused)
                return dataclasses.replace(reply, left_out=left_out(asked, refused))

    def _learn(self, body: Mapping[str, Any], refused: Set[str]) -> None:
        for field in sorted(refused - self._refused):
            place = self._options.base_url or "the API"
            _warn_once(f"{self._options.model} at {place}: {describe_refusal(field, body[field])}")
        self._refused |= refused

    async def _send(self, body: Mapping[str, Any], spent: _Spent) -> Reply:
        await self._limits.acquire(estimate_tokens(body))
        self._usage.sent += 1
        self._usage.retries += spent.calls > 0
        spent.calls += 1
        try:
            reply = await call(self._openai, body, self._options.timeout)
        except CallFailure as failure:
            self._usage.faults[failure.reason] += 1
            if failure.reply is not None:
                self._meter(failure.reply, spent)
            raise
        self._meter(reply, spent)
        return reply

    def _meter(self, reply: Reply, spent: _Spent) -> None:
        if reply.prompt_tokens is None and reply.completion_tokens is None:
            self._usage.unmetered += 1
            return
        prompt, completion = reply.prompt_tokens or 0, reply.completion_tokens or 0
        spent.prompt_tokens += prompt
        spent.completion_tokens += completion
        self._usage.prompt_tokens += prompt
        self._usage.completion_tokens += completion
        options = self._options
        self._usage.cost += (prompt * options.prompt_price + completion * options.completion_price) / 1e6
