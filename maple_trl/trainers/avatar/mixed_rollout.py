"""A rollout some of whose completions are replayed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maple_trl.trainers.common.rollout import Rollout


@dataclass(frozen=True)
class MixedRollout(Rollout):
    """
    A rollout with fresh and replayed completions, each in a place of a group. A place that is neither is empty.

    Attributes:
        replayed (`Tensor` of shape (N,)): bool, whether a place holds a replayed completion.
        past, baselines (`Tensor` of shape (N,)): its reward, and the baseline of its own prompt; NaN elsewhere.
        past_tags (`Tensor` of shape (N,)):
            The tag of its own row as a number, `UNTAGGED` where its media have gone.
        own (`Tensor` of shape (N,)): bool, whether it is of the prompt of its group.
        hinted (`Tensor` of shape (prompts,)): bool, whether fresh completions were shown a hint.
    """

    replayed: Tensor | None = None
    past: Tensor | None = None
    baselines: Tensor | None = None
    past_tags: Tensor | None = None
    own: Tensor | None = None
    hinted: Tensor | None = None

    @property
    def counted_tags(self) -> Tensor:
        return torch.where(self.replayed, self.past_tags, super().counted_tags)

    @property
    def replayed_groups(self) -> Tensor:
        """Number of each replayed completion's group; those of other prompts are each a group of their own."""
        groups, own = self.groups[self.replayed], self.own[self.replayed]
        strangers = len(self.hinted) + torch.arange(len(groups), device=groups.device)
        return torch.where(own, groups, strangers)

    def filled(self, wanted: int) -> float:
        """
        The share of the replayed completions asked for that there were, from 0 to 1.

        Args:
            wanted: replayed completions that each group is to have.
        """
        return int(self.replayed.sum()) / ((self.wanted or len(self.hinted)) * wanted)
