"""Requests and tokens per minute."""

from __future__ import annotations

import asyncio


class RateLimits:
    """
    Holds calls back until they fit the rates. Belongs to one event loop.

    Args:
        requests_per_minute, tokens_per_minute (`float`, *optional*):
            The rates; `None` for no limit.
    """

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None):
        self._requests = _Bucket(requests_per_minute) if requests_per_minute else None
        self._tokens = _Bucket(tokens_per_minute) if tokens_per_minute else None

    async def acquire(self, tokens: int) -> None:
        """Wait until one call that may take `tokens` fits."""
        if self._requests is not None:
            await self._requests.take(1)
        if self._tokens is not None:
            await self._tokens.take(tokens)


class _Bucket:
    """A rate without bursts beyond what one second (or one unit) holds, first come, first served."""

    def __init__(self, per_minute: float):
        from aiolimiter import AsyncLimiter

        # A bucket of a whole minute would let twice the rate through in its first minute.
        period = max(1.0, 60.0 / per_minute)
        self._limiter = AsyncLimiter(per_minute * period / 60.0, period)
        self._turn = asyncio.Lock()  # the limiter itself prefers small amounts, which would starve large ones

    async def take(self, amount: float) -> None:
        async with self._turn:
            while amount > 0:  # a call may take more than the bucket ever holds
                part = min(amount, self._limiter.max_rate)
                await self._limiter.acquire(part)
                amount -= part
