"""A sampler that tells what comes next, so that its media can be decoded meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from torch.utils.data import Sampler


class LookaheadSampler(Sampler[int]):
    """
    Yields exactly what another sampler yields, and knows the indices around the last one.

    Args:
        sampler: yields the indices of all ranks, chunk by chunk: chunk c goes to rank c mod `num_processes`.
        chunk: indices that one rank takes at a time.
        ahead: how many indices to know in advance.
        behind: how many to remember. Data loaders draw batches before they are used; those are still to come.
    """

    def __init__(
        self, sampler: Sampler[int], chunk: int, ahead: int, behind: int = 0, rank: int = 0, num_processes: int = 1
    ):
        self.sampler = sampler
        self.chunk = chunk
        self.ahead = ahead
        self.rank = rank
        self.num_processes = num_processes
        self._drawn: deque[tuple[int, int]] = deque(maxlen=behind)
        self._next: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        source = enumerate(self.sampler)
        self._next = coming = deque(islice(source, self.ahead))
        self._drawn.clear()
        while coming:
            drawn = coming.popleft()
            coming.extend(islice(source, 1))
            self._drawn.append(drawn)
            yield drawn[1]

    def upcoming(self) -> list[int]:
        """The distinct indices among those around the last one that belong to this rank, in order."""
        around = (*self._drawn, *self._next)
        return list(dict.fromkeys(i for p, i in around if p // self.chunk % self.num_processes == self.rank))
