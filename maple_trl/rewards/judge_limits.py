"""How many failures of a judge are too many."""

from __future__ import annotations

from collections import deque


class JudgeUnavailableError(RuntimeError):
    """A judge fails for more completions than its limit allows; the message says how many, and why."""


class FailureWindow:
    """
    The share of requests that failed, over the latest batches that together have at least `min_requests` of them.

    A large batch is judged alone; of small ones, a single failure does not end a run.

    Args:
        min_requests (`int`): requests before there is any rate.
    """

    def __init__(self, min_requests: int):
        self.min_requests = min_requests
        self._batches: deque[tuple[int, int]] = deque()

    def add(self, requests: int, failures: int) -> None:
        """Note a batch, and forget those that are no longer needed."""
        if requests == 0:
            return
        self._batches.append((requests, failures))
        while self.requests - self._batches[0][0] >= self.min_requests:
            self._batches.popleft()

    @property
    def requests(self) -> int:
        """Number of requests in the window."""
        return sum(requests for requests, _ in self._batches)

    @property
    def failures(self) -> int:
        """Number of failed requests in the window."""
        return sum(failures for _, failures in self._batches)

    @property
    def rate(self) -> float | None:
        """`None` while there are too few requests for one."""
        return self.failures / self.requests if self.requests >= self.min_requests else None
