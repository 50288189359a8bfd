"""A sampler that only keeps time, for trainers that choose a rollout's rows themselves."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler


class RolloutClock(Sampler[int]):
    """
    Makes a data loader tick as often as TRL's sampler would, for the rollouts of one epoch.

    Data loaders draw rows before they are used, so a sampler would have to name the rows of a rollout before the rewards
    of the one before are known. Here the trainer takes them from its schedule when the rollout begins, and the loader's
    rows (always the first) are not read.

    Args:
        rollouts: rollouts of an epoch.
        completions: completions of a rollout, over all ranks.
        repeats: how often the loader is asked for a rollout: once per micro-batch and iteration.
    """

    def __init__(self, rollouts: int, completions: int, repeats: int):
        self.length = rollouts * completions * repeats

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter([0] * self.length)
