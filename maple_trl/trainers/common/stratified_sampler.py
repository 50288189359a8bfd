"""One tag a rollout, for trainers that leave the order of rows to a sampler."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from maple_trl.algorithms import StratifiedSchedule


class StratifiedSampler(Sampler[int]):
    """
    Yields the rows of a schedule as TRL's sampler yields its own: each prompt of a rollout once per completion, and the
    rollout once per micro-batch and iteration. Each pass over it is the schedule's next epoch.

    Args:
        schedule: one whose batches do not depend on rewards, since data loaders draw ahead.
        copies: completions of a prompt.
        repeats: how often the loader is asked for a rollout.
    """

    def __init__(self, schedule: StratifiedSchedule, copies: int, repeats: int):
        self.schedule = schedule
        self.copies = copies
        self.repeats = repeats

    def __len__(self) -> int:
        return self.schedule.batches_per_epoch * self.schedule.batch_size * self.copies * self.repeats

    def __iter__(self) -> Iterator[int]:
        # All at once: a pass that is broken off counts as an epoch too.
        batches = [self.schedule.next_batch().rows for _ in range(self.schedule.batches_per_epoch)]
        for rows in batches:
            for _ in range(self.repeats):
                for row in rows:
                    yield from [row] * self.copies
