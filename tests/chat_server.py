"""A chat endpoint on loopback that does what a test tells it to, and counts what really arrives."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web


Action = Callable[["web.Request", dict], Awaitable[web.StreamResponse]]


def completion(
    text: str | None, finish_reason: str = "stop", prompt_tokens: int = 10, completion_tokens: int = 5, **message
):
    """The body of a chat completion."""
    return {
        "id": "c-1",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted",
        "choices": [
            {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


THINKING_REFUSES = ("max_tokens", "temperature", "top_p")


# What a call can be answered with


def say(text: str | None, delay: float = 0.0, **fields) -> Action:
    """A good answer."""

    async def act(request, body):
        await asyncio.sleep(delay)
        return web.json_response(completion(text, **fields))

    return act


def status(number: int, message: str = "scripted", headers: dict[str, str] | None = None, **error) -> Action:
    """An error answer."""

    async def act(request, body):
        return web.json_response({"error": {"message": message, **error}}, status=number, headers=headers)

    return act


def raw(content: bytes, content_type: str = "application/json") -> Action:
    """Any bytes with status 200."""

    async def act(request, body):
        return web.Response(body=content, content_type=content_type)

    return act


def broken_off(text: str | None, error: Any, inside: bool = True) -> Action:
    """An answer with status 200 that a server gave up: what there is of it, and an error in the choice or beside it."""
    body = completion(text, "error")
    (body["choices"][0] if inside else body)["error"] = error
    return raw(json.dumps(body).encode())


def hang_up() -> Action:
    """Closes the connection without a word."""

    async def act(request, body):
        request.transport.abort()
        await asyncio.sleep(0)
        return web.Response()

    return act


def half() -> Action:
    """Promises a whole body, sends the first half, and closes."""

    async def act(request, body):
        content = json.dumps(completion("never complete")).encode()
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Content-Length": str(len(content))}
        )
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
        request.transport.close()
        return response

    return act


def drip(seconds: float, text: str = "too late") -> Action:
    """A good answer, a byte at a time, spread over `seconds`: no single read takes long."""

    async def act(request, body):
        content = json.dumps(completion(text)).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for index in range(len(content)):
            await response.write(content[index : index + 1])
            await asyncio.sleep(seconds / len(content))
        return response

    return act


@dataclass
class Call:
    """A call that arrived: when, what, and under which headers."""

    at: float
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def text(self) -> str:
        """All text of its messages."""
        parts = []
        for message in self.body["messages"]:
            content = message["content"]
            parts += [content] if isinstance(content, str) else [block.get("text", "") for block in content]
        return "\n".join(parts)


def thinking_model(answer: Callable[[int, dict], Action], refused: Sequence[str] = THINKING_REFUSES):
    """As OpenAI's models that reason do: refuses the older name of the limit, and sampling, one field an answer."""

    def choose(number, body):
        for name in refused:
            if name == "max_tokens" and name in body:
                told = f"Unsupported parameter: '{name}' is not supported with this model. Use 'max_completion_tokens' instead."
                return status(400, told, type="invalid_request_error", param=name, code="unsupported_parameter")
            if body.get(name, 1) != 1:
                told = f"Unsupported value: '{name}' does not support {body[name]} with this model. Only the default (1) value is supported."
                return status(400, told, type="invalid_request_error", param=name, code="unsupported_value")
        return answer(number, body)

    return choose


class ChatServer:
    """
    Serves `POST /v1/chat/completions` from a thread of its own.

    Args:
        choose (`Callable[[int, dict], Action]`):
            Number of the call (from 0) and its body -> what it is answered with.

    Attributes:
        calls (`list[Call]`): what arrived, in order.
        open_now, most_open (`int`): calls being answered, and the most there ever were at once.
        seen (`Counter`): text of the last message -> how often it arrived.
    """

    def __init__(self, choose: Callable[[int, dict], Action]):
        self.choose = choose
        self.calls: list[Call] = []
        self.open_now = self.most_open = 0
        self.seen: Counter = Counter()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.calls)
        self.calls.append(Call(time.monotonic(), body, dict(request.headers)))
        self.seen[json.dumps(body["messages"][-1]["content"])] += 1
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            return await self.choose(number, body)(request, body)
        finally:
            self.open_now -= 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ChatServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    async def _start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._handle)
        # A client that has given up is not answered any more: what is open here is open there.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def __exit__(self, *_) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def in_turn(*actions: Action) -> Callable[[int, dict], Action]:
    """The actions one after another; the last one again and again."""
    return lambda number, body: actions[min(number, len(actions) - 1)]
