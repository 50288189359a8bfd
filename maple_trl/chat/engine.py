"""Batches: identical requests once, answers from the cache, a result for each request in order."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from maple_trl.chat.cache import ChatCache
from maple_trl.chat.calls import CallFailure, read_finish
from maple_trl.chat.messages import ChatRequest, estimate_tokens, request_body, request_key
from maple_trl.chat.options import ApiKey, ChatOptions, ChatSetupError
from maple_trl.chat.results import ChatResult, ChatUsage
from maple_trl.chat.sender import ChatSender
from maple_trl.chat.structured import NoObjectError


class ChatEngine:
    """
    Answers batches inside one event loop, in which it is made, used and closed.

    Args:
        options (`ChatOptions`): the settings.
        key (`ApiKey`): the key.
        usage (`ChatUsage`): counters, which it adds to.

    Raises:
        ChatSetupError: when a package of the extra is missing, or the cache cannot be opened.
    """

    def __init__(self, options: ChatOptions, key: ApiKey, usage: ChatUsage):
        self._options, self._key, self._usage = options, key, usage
        self._sender = None if options.dry_run else ChatSender(options, key, usage)
        self._cache = None
        try:
            if options.cache_file is not None and (not options.dry_run or Path(options.cache_file).exists()):
                self._cache = ChatCache(options.cache_file, options.cache_bytes)
        except (OSError, sqlite3.Error) as error:
            raise ChatSetupError(f"cache_file {options.cache_file}: cannot be opened: {error}") from error

    async def close(self) -> None:
        """Close connections and cache."""
        if self._sender is not None:
            await self._sender.close()
        if self._cache is not None:
            self._cache.close()

    async def batch(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Return one result per request, in order; requests with one key share the answer of the first."""
        results: list[ChatResult | None] = [None] * len(requests)
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            try:
                places.setdefault(request_key(request, self._options), []).append(place)
            except Exception as error:  # the messages are the caller's and can be anything
                detail = self._key.redact(f"the request is no JSON: {type(error).__name__}: {error}")
                results[place] = ChatResult(reason="bad-request", detail=detail, source="none")
        tasks = {key: asyncio.ensure_future(self._answer(key, requests[first])) for key, (first, *_) in places.items()}
        try:
            if tasks:
                await asyncio.wait(tasks.values(), timeout=self._options.batch_timeout)
        finally:  # the time is over, or the caller has gone
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        late = ChatResult(reason="batch-timeout", detail=f"over {self._options.batch_timeout} s", source="none")
        for key, (first, *others) in places.items():
            results[first] = late if tasks[key].cancelled() else tasks[key].result()
            for place in others:
                results[place] = _shared(results[first])
        self._count(results)
        return results

    async def _answer(self, key: str, request: ChatRequest) -> ChatResult:
        """Return the result of one request; whatever goes wrong has a name in it."""
        try:
            kept = self._from_cache(key, request)
            if kept is not None:
                return kept
            if self._sender is None:
                self._usage.estimated_tokens += estimate_tokens(request_body(request, self._options, structured=False))
                return ChatResult(reason="dry-run", source="none")
            result = await self._sender.send(request)
            if result.ok and self._cache is not None:
                kept = {"text": result.text, "finish_reason": result.finish_reason}
                self._cache.put(key, kept | ({"left_out": list(result.left_out)} if result.left_out else {}))
            return result
        except Exception as error:  # a fault here costs one result, not the batch
            detail = self._key.redact(f"{type(error).__name__}: {error}")
            return ChatResult(reason="internal", detail=detail, source="none")

    def _from_cache(self, key: str, request: ChatRequest) -> ChatResult | None:
        kept = None if self._cache is None else self._cache.get(key)
        if kept is None or not isinstance(kept.get("text"), str):
            return None
        try:
            finish_reason = read_finish(kept.get("finish_reason"))
            data = request.read(kept["text"], finish_reason)
            left_out = tuple(map(str, kept.get("left_out", ())))
        except (
            NoObjectError,
            CallFailure,
            TypeError,
        ):  # what an earlier version took for an answer, or no entry of ours
            return None
        return ChatResult(kept["text"], data, source="cache", finish_reason=finish_reason, left_out=left_out)

    def _count(self, results: Sequence[ChatResult]) -> None:
        usage = self._usage
        usage.requests += len(results)
        usage.succeeded += sum(result.ok for result in results)
        usage.failed.update(result.reason for result in results if not result.ok)
        usage.cached += sum(result.source == "cache" for result in results)
        usage.shared += sum(result.source == "shared" for result in results)
        if self._cache is not None:
            usage.cache_errors = self._cache.errors


def _shared(result: ChatResult) -> ChatResult:
    """Copy the result of an identical request: nothing was spent on it, and each may change its object."""
    source = result.source if result.source in ("cache", "none") else "shared"
    data = copy.deepcopy(result.data)
    return dataclasses.replace(result, data=data, source=source, attempts=0, prompt_tokens=0, completion_tokens=0)
