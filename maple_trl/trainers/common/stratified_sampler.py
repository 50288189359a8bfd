"""The rows of a schedule, as often as TRL's data loader asks for them."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from maple_trl.algorithms import StratifiedSchedule


class StratifiedSampler(Sampler[int]):
    """
    Yields the rows of a schedule as TRL's sampler yields its own: each prompt of a rollout once per completion, and the
    rollout once per micro-batch and iteration. Each pass over it is the schedule's next epoch.

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
