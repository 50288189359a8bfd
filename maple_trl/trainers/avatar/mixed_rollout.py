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
        past, baselines (`Tensor` of shape (N,)):
            Reward of the replayed completion, and baseline of the prompt it was written for; NaN in other places.
        past_tags (`Tensor` of shape (N,)):
            Tag of the row it was written for, as a number; `UNTAGGED` where its media have gone, and in other places.
        own (`Tensor` of shape (N,)): bool, whether a place holds a replayed completion of its group's own prompt.
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
        """Tag that each completion counts for in the loss; of a replayed one that of its own row; shape (N,)."""
        return torch.where(self.replayed, self.past_tags, super().counted_tags)

    @property
    def replayed_groups(self) -> Tensor:
        """Group of each replayed completion, as a number; one of another prompt is its own group; shape (replayed,)."""
        groups, own = self.groups[self.replayed], self.own[self.replayed]
        strangers = len(self.hinted) + torch.arange(len(groups), device=groups.device)
        return torch.where(own, groups, strangers)

    def filled(self, wanted: int) -> float:
        """
        Return how many replayed completions there are, as a share of those that were asked for.

        Args:
            wanted: replayed completions that each group is to have.
        """
        return int(self.replayed.sum()) / (self.wanted * wanted)
