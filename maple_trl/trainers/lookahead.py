"""A sampler that tells what comes next, so that its media can be decoded meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from torch.utils.data import Sampler


class LookaheadSampler(Sampler[int]):
    """
    Yields exactly what another sampler yields, and knows the next `depth` indices.

    Args:
        sampler: yields the indices of all ranks, chunk by chunk: chunk c goes to rank c mod `num_processes`.
        chunk: indices that one rank takes at a time.
        depth: how many indices to look ahead.
    """

    def __init__(self, sampler: Sampler[int], chunk: int, depth: int, rank: int = 0, num_processes: int = 1):
        self.sampler = sampler
        self.chunk = chunk
        self.depth = depth
        self.rank = rank
        self.num_processes = num_processes
        self._ahead: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        source = enumerate(self.sampler)
        self._ahead = ahead = deque(islice(source, self.depth))
        while ahead:
            _, index = ahead.popleft()
            ahead.extend(islice(source, 1))
            yield index

    def upcoming(self) -> list[int]:
        """The distinct indices among the next ones that this rank will meet, in order."""
        own = (i for position, i in list(self._ahead) if position // self.chunk % self.num_processes == self.rank)
        return list(dict.fromkeys(own))
