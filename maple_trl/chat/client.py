"""The client: batches of requests in, results out, from any thread and from inside or outside an event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from maple_trl.chat.engine import ChatEngine
from maple_trl.chat.messages import ChatRequest
from maple_trl.chat.options import ChatOptions, read_key
from maple_trl.chat.results import ChatResult, ChatUsage


class ChatClient:
    """
    A client of an OpenAI-compatible endpoint.

    Requests run in an event loop of the client's own, in a background thread that starts with the first batch. All
    batches share its connections, rates and the limit of open calls, from whichever thread they come.

    Args:
        options (`ChatOptions`):
            Settings. The key is read here, once, and kept where nothing shows it.

    Raises:
        ChatSetupError: when the key cannot be read, or there is none and the server is not a named one.

    Example:
    ```python
    >>> from maple_trl.chat import ChatClient, ChatOptions, ChatRequest

    >>> options = ChatOptions(model="tiny", base_url="http://127.0.0.1:8000/v1", cache_file="answers.sqlite")
    >>> with ChatClient(options) as client:
    ...     (result,) = client.complete_many([ChatRequest([{"role": "user", "content": "Which colour is grass?"}])])
    >>> result.text if result.ok else result.reason
    'Green.'
    ```
    """

    def __init__(self, options: ChatOptions):
        self.options = options
        self._key = read_key(options)
        self._usage = ChatUsage()
        self._lock = threading.Lock()
        self._thread: _LoopThread | None = None
        self._engine: ChatEngine | None = None

    @property
    def usage(self) -> ChatUsage:
        """Counters as of now; a copy."""
        return self._usage.copy()

    def complete_many(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """
        Answer a batch and wait for it.

        Inside an event loop this holds that loop up; there, await [`~ChatClient.acomplete_many`].

        Args:
            requests (`Sequence[ChatRequest]`):
                N requests.

        Returns:
            `list[ChatResult]`: N results in the order of the requests. A failed request has a `reason`.

        Raises:
            ChatSetupError: when a package of the extra `judge` is missing.
        """
        future = self._submit(requests)
        try:
            return future.result()
        except BaseException:  # interrupted while waiting: nothing goes on being sent
            future.cancel()
            raise

    async def acomplete_many(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer a batch of `requests` as [`~ChatClient.complete_many`] does, for code inside an event loop, whichever it is."""
        return await asyncio.wrap_future(self._submit(requests))

    def _submit(self, requests: Sequence[ChatRequest]) -> Future:
        requests = list(requests)
        with self._lock:
            # Threads do not survive a fork: a child process starts its own.
            if self._thread is None or self._thread.process != os.getpid():
                self._thread, self._engine = _LoopThread(), None
            if self._engine is None:
                self._engine = self._thread.submit(self._make_engine()).result()
            return self._thread.submit(self._engine.batch(requests))

    async def _make_engine(self) -> ChatEngine:
        return ChatEngine(self.options, self._key, self._usage)

    def close(self) -> None:
        """
        Close connections, cache and thread; a later batch opens them again.

        Whoever still waits for a batch gets `CancelledError`.
        """
        with self._lock:
            thread, engine = self._thread, self._engine
            self._thread = self._engine = None
        if thread is not None and thread.process == os.getpid():
            thread.submit(_end(engine)).result()
            thread.stop()

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ChatClient(model={self.options.model!r}, base_url={self.options.base_url!r})"


async def _end(engine: ChatEngine | None) -> None:
    under_way = asyncio.all_tasks() - {asyncio.current_task()}
    for task in under_way:
        task.cancel()
    await asyncio.gather(*under_way, return_exceptions=True)
    if engine is not None:
        await engine.close()


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self):
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="maple-chat", daemon=True)
        self._thread.start()

    def submit(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
