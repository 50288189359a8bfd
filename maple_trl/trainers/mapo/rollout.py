"""What the ranks generated together, as far as it decides what is learned from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maple_trl.algorithms import compared_groups, informative_groups, solved_groups
from maple_trl.modalities import ModalityTag
from maple_trl.trainers.common.tag_metrics import TAGS, Totals, totals_by_tag


_PER_COMPLETION = ("scores", "rewards", "tags", "lengths", "media_tokens")


@dataclass(frozen=True)
class Rollout:
    """
    Completions for some prompts, over all ranks, those of a prompt next to each other.

    Attributes:
        rows (`list[int]`): rows of the data set, one per prompt.
        group_size (`int`): completions of a prompt.
        scores (`Tensor` of shape (N, reward functions)):
            NaN where a function does not apply; of an unscorable completion all are NaN.
        rewards (`Tensor` of shape (N,)): their weighted sum, NaN for an unscorable completion.
        tags, lengths, media_tokens (`Tensor` of shape (N,)): tag as a number; tokens of completion and of media.
    """

    rows: list[int]
    group_size: int
    scores: Tensor
    rewards: Tensor
    tags: Tensor
    lengths: Tensor
    media_tokens: Tensor

    @classmethod
    def joined(cls, rounds: Sequence[Rollout]) -> Rollout:
        """Several rounds, one after the other."""
        columns = {name: torch.cat([getattr(r, name) for r in rounds]) for name in _PER_COMPLETION}
        return replace(rounds[0], rows=[row for r in rounds for row in r.rows], **columns)

    @property
    def groups(self) -> Tensor:
        """Number of each completion's prompt; shape (N,)."""
        return torch.arange(len(self.tags), device=self.tags.device) // self.group_size

    @property
    def informative(self) -> Tensor:
        """Whether each prompt's completions were rewarded differently; shape (prompts,), bool."""
        return informative_groups(self.rewards.view(-1, self.group_size))

    @property
    def compared(self) -> Tensor:
        """Whether two completions of each prompt could be scored, or it has but one; shape (prompts,), bool."""
        return self._compared(self.rewards)

    def told_informative(self) -> list[bool | None]:
        """Whether each prompt is informative; `None` where too few completions could be scored to tell."""
        return _where(self.compared, self.informative)

    def told_solved(self, task: int) -> list[bool | None]:
        """Whether each prompt's completions all solved the task of a reward function; `None` where that is not known."""
        scores = self.scores[:, task]
        return _where(self._compared(scores), solved_groups(scores.view(-1, self.group_size)))

    def _compared(self, values: Tensor) -> Tensor:
        return compared_groups(values.view(-1, self.group_size)) | (self.group_size == 1)

    @property
    def prompt_tags(self) -> list[ModalityTag]:
        return [TAGS[i] for i in self.tags[:: self.group_size].tolist()]

    def totals(self, task: int | None = None, advantages: Tensor | None = None) -> Totals:
        """
        What is logged per tag and over all.

        Args:
            task: the reward function whose mean is the accuracy.
            advantages (`Tensor` of shape (N,)): logged where given.
        """
        values = {
            "reward": self.rewards,
            "completion_length": self.lengths.float(),
            "media_tokens": self.media_tokens.float(),
        }
        if task is not None:
            values["accuracy"] = self.scores[:, task]
        if advantages is not None:
            scored = advantages.masked_fill(self.rewards.isnan(), torch.nan)
            values |= {"advantage_mean": scored, "advantage_square": scored.square()}
        alike = (~self.informative).float().masked_fill(~self.compared, torch.nan)
        totals = dict(totals_by_tag("zero_variance", alike, self.tags[:: self.group_size]))
        for name, value in values.items():
            totals |= totals_by_tag(name, value, self.tags)
        return totals


def _where(known: Tensor, values: Tensor) -> list[bool | None]:
    return [value if told else None for value, told in zip(values.tolist(), known.tolist(), strict=True)]
