"""The rows of a schedule, as often as TRL's data loader asks for them, and what comes next of any order of rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from torch.utils.data import Sampler

from maple_trl.algorithms import StratifiedSchedule


class StratifiedSampler(Sampler[int]):
    """
    Yields the rows of a schedule as TRL's sampler yields its own.

    Each prompt of a rollout comes once per completion, and the rollout once per micro-batch and iteration. Each pass
    over the sampler is the schedule's next epoch.

    Args:
        schedule: of the prompts of each rollout.
        copies: completions of a prompt.
        repeats: how often the loader is asked for a rollout.
        ahead: whether rows are drawn before they are used, as data loaders do. Where they depend on the rewards of the
            rollout before, that is too early: the trainer then takes them from the schedule itself when a rollout begins,
            and the sampler only keeps time, with the first row again and again, which is not read.
    """

    def __init__(self, schedule: StratifiedSchedule, copies: int, repeats: int, ahead: bool = True):
        self.schedule = schedule
        self.copies = copies
        self.repeats = repeats
        self.ahead = ahead

    def __len__(self) -> int:
        return self.schedule.batches_per_epoch * self.schedule.batch_size * self.copies * self.repeats

    def __iter__(self) -> Iterator[int]:
        if not self.ahead:
            yield from [0] * len(self)
            return
        # All at once: a pass that is broken off counts as an epoch too.
        batches = [self.schedule.next_batch().rows for _ in range(self.schedule.batches_per_epoch)]
        for rows in batches:
            for _ in range(self.repeats):
                for row in rows:
                    yield from [row] * self.copies


class LookaheadSampler(Sampler[int]):
    """
    Yields exactly what another sampler yields, and knows the indices around the last one.

    The media of these can be decoded meanwhile.

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
        """Return this rank's distinct indices among those around the last one, in order."""
        around = (*self._drawn, *self._next)
        return list(dict.fromkeys(i for p, i in around if p // self.chunk % self.num_processes == self.rank))
