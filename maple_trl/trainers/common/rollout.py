"""
What the ranks generate together, on its way from rows to a loss.

1. `row_order` says which rows a rollout takes; each has as many *places* as its group has completions.
2. They are encoded, and TRL generates and scores their completions: a [`Round`]. What its private calls do not pass on
   stands in a [`RolloutInFlight`] meanwhile.
3. The rounds of a rollout, one or several, become one [`Rollout`]: scores, rewards, tags and lengths of all ranks.
4. `assign` makes an [`Assignment`] of it: advantages, and what is trained on.
5. The rows that are kept become the micro-batches of the optimizer steps, each a
   [`~maple_trl.trainers.common.batch.Batch`], and the weights of the loss are folded into their advantages.
6. Each micro-batch passes through the model; a [`PassInFlight`] takes down what that shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from maple_trl.algorithms import compared_groups, informative_groups, solved_groups
from maple_trl.modalities import ModalityTag
from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.trainers.common.batch import Batch
from maple_trl.trainers.common.tag_metrics import TAGS, UNTAGGED, Totals, totals_by_tag


@dataclass(frozen=True)
class Rollout:
    """
    Completions for some prompts, over all ranks, those of a prompt in places next to each other.

    Attributes:
        rows (`list[int]`): rows of the data set, one per prompt; empty where that is not known.
        group_size (`int`): places of a prompt.
        scores (`Tensor` of shape (N, reward functions)):
            NaN where a function does not apply; all NaN for an unscorable completion, and for a place that holds no
            fresh completion.
        rewards (`Tensor` of shape (N,)): their weighted sum, NaN where all scores are.
        tags (`Tensor` of shape (N,)): as numbers.
        lengths, media_tokens, prompt_tokens (`Tensor` of shape (N,)): tokens of the completion, of the media in its prompt,
            and of the whole prompt.
        fresh (`Tensor` of shape (N,)): bool, whether a place holds a completion that was generated for it.
        stratum: the tag of all of them, or another value of the schedule's; `None` without a schedule.
        wanted (`int`): prompts of the first round, which is how many are to be trained on; further rounds refill it.
    """

    rows: list[int]
    group_size: int
    scores: Tensor
    rewards: Tensor
    tags: Tensor
    lengths: Tensor
    media_tokens: Tensor
    prompt_tokens: Tensor
    fresh: Tensor
    stratum: str | None = None
    wanted: int = 0

    @classmethod
    def joined(cls, rounds: Sequence[Rollout]) -> Rollout:
        """Join several rounds, one after the other."""
        names = [f.name for f in fields(rounds[0]) if isinstance(getattr(rounds[0], f.name), Tensor)]
        columns = {name: torch.cat([getattr(r, name) for r in rounds]) for name in names}
        rows, wanted = [row for r in rounds for row in r.rows], rounds[0].prompts
        return replace(rounds[0], rows=rows, wanted=wanted, **columns)

    @property
    def prompts(self) -> int:
        """How many there are."""
        return len(self.tags) // self.group_size

    @property
    def groups(self) -> Tensor:
        """Number of each place's prompt; shape (N,)."""
        return torch.arange(len(self.tags), device=self.tags.device) // self.group_size

    @property
    def counted_tags(self) -> Tensor:
        """The tag that each completion counts for in the loss, `UNTAGGED` for one that does not count; shape (N,)."""
        return self.tags.masked_fill(self.rewards.isnan(), UNTAGGED)

    @property
    def informative(self) -> Tensor:
        """Whether each prompt's fresh completions were rewarded differently; shape (prompts,), bool."""
        return informative_groups(self.rewards.view(-1, self.group_size))

    @property
    def compared(self) -> Tensor:
        """Whether two completions of each prompt could be scored, or it has but one; shape (prompts,), bool."""
        return self._compared(self.rewards)

    def told_informative(self) -> list[bool | None]:
        """Tell whether each prompt is informative; `None` where too few completions could be scored to tell."""
        return _where(self.compared, self.informative)

    def told_solved(self, task: int) -> list[bool | None]:
        """Tell whether each prompt's completions all solved the task of a reward function; `None` where unknown."""
        scores = self.scores[:, task]
        return _where(self._compared(scores), solved_groups(scores.view(-1, self.group_size)))

    def _compared(self, values: Tensor) -> Tensor:
        return compared_groups(values.view(-1, self.group_size)) | (self.group_size == 1)

    @property
    def prompt_tags(self) -> list[ModalityTag]:
        """Tag of each prompt."""
        return [TAGS[i] for i in self.tags[:: self.group_size].tolist()]

    def totals(self, task: int | None = None, assigned: Assignment | None = None) -> Totals:
        """
        Return sums and counts of what is logged of the fresh completions, per tag and over all.

        Args:
            task: the reward function whose mean is the accuracy.
            assigned: its advantages, and the rewards of what is trained on, are logged where it is given.
        """
        absent = ~self.fresh
        values = {
            "reward": self.rewards,
            "completion_length": self.lengths.float().masked_fill(absent, torch.nan),
            "media_tokens": self.media_tokens.float().masked_fill(absent, torch.nan),
            "prompt_tokens": self.prompt_tokens.float().masked_fill(absent, torch.nan),
        }
        if task is not None:
            values["accuracy"] = self.scores[:, task]
        if assigned is not None:
            scored = assigned.advantages.masked_fill(self.rewards.isnan(), torch.nan)
            values |= {"advantage_mean": scored, "advantage_square": scored.square()}
            values["reward_kept"] = self.rewards.masked_fill(~assigned.kept, torch.nan)
        alike = (~self.informative).float().masked_fill(~self.compared, torch.nan)
        totals = dict(totals_by_tag("zero_variance", alike, self.tags[:: self.group_size]))
        for name, value in values.items():
            totals |= totals_by_tag(name, value, self.tags)
        return totals


def _where(known: Tensor, values: Tensor) -> list[bool | None]:
    return [value if told else None for value, told in zip(values.tolist(), known.tolist(), strict=True)]


@dataclass
class Round:
    """
    Outcome of one call of TRL's rollout.

    Attributes:
        batch ([`Batch`]): this rank's completions.
        rollout ([`Rollout`]): those of all ranks.
        places (`list[int]`): the place in the rollout of each row of the batch.
    """

    batch: Batch
    rollout: Rollout
    places: list[int]


@dataclass(frozen=True)
class Assignment:
    """
    Advantages of a rollout's completions, and which of them are trained on.

    Attributes:
        advantages (`Tensor` of shape (N,)): of the completion in each place.
        kept (`Tensor` of shape (N,)): bool, whether it is trained on.
    """

    advantages: Tensor
    kept: Tensor


@dataclass
class InFlight:
    """
    Prompts that running methods of TRL work on, and do not pass on themselves.

    Attributes:
        prompts: of their rows, in order; `None` for a text-only model.
    """

    prompts: list[EncodedPrompt] | None = None


@dataclass
class UpdatesInFlight(InFlight):
    """
    A rollout that becomes micro-batches.

    Attributes:
        rounds: those that have been generated.
        rollout: all of them as one.
        chunks: the micro-batches, where they are not those that TRL would cut.
    """

    rounds: list[Round] = field(default_factory=list)
    rollout: Rollout | None = None
    chunks: list[Batch] | None = None

    def placed(self) -> Iterator[tuple[Round, slice]]:
        """Yield each round with its places in the rollout."""
        start = 0
        for r in self.rounds:
            end = start + len(r.rollout.tags)
            yield r, slice(start, end)
            start = end


@dataclass
class RolloutInFlight(InFlight):
    """
    A round while TRL generates and scores it.

    Attributes:
        rows: this rank's, one per fresh completion.
        group_size: places of a prompt.
        fresh (`Tensor` of shape (N,)): bool, which places are generated, over all ranks; `None`: all.
        place_tags (`Tensor` of shape (N,)): tags of all places, where some are not generated.
        applies (`Tensor` of shape (fresh, reward functions)): which functions are known to apply, from a prompt's other completions.
        given, unscorable: scores as the functions gave them, shape (fresh, reward functions), and which completions they
            leave unscorable.
        rollout: once it is scored.
        scores: those of `_calculate_rewards`, where they are known before TRL asks.
        kept: which of this rank's rows pass through the model; `None`: all.
        prompt_tokens: of this rank's rows, of a text-only model.
        failed: this rank's rows that the engine gave no completion for, and why.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    group_size: int = 1
    fresh: Tensor | None = None
    place_tags: Tensor | None = None
    applies: Tensor | None = None
    given: Tensor | None = None
    unscorable: Tensor | None = None
    rollout: Rollout | None = None
    scores: Tensor | None = None
    kept: list[int] | None = None
    prompt_tokens: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)

    def groups(self, scores: Tensor) -> Tensor:
        """Return the number of each fresh completion's prompt, shape (fresh,)."""
        places = torch.arange(len(scores)) if self.fresh is None else self.fresh.nonzero().flatten()
        return (places // self.group_size).to(scores.device)

    def scored(self, scores: Tensor, rewards: Tensor, tags: Tensor, *tokens: Tensor) -> Rollout:
        """
        Make a rollout of what is known of the fresh completions, each in its place.

        Args:
            tokens: of completions, of media and of prompts; each of shape (fresh,).
        """
        if self.fresh is None:
            fresh = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
            return Rollout([], self.group_size, scores, rewards, tags, *tokens, fresh)
        fresh = self.fresh.to(scores.device)

        def placed(values: Tensor, filler: float) -> Tensor:
            return values.new_full((len(fresh), *values.shape[1:]), filler).masked_scatter(
                fresh.view(-1, *[1] * (values.dim() - 1)), values
            )

        columns = (placed(scores, torch.nan), placed(rewards, torch.nan), self.place_tags.to(tags))
        return Rollout([], self.group_size, *columns, *(placed(counts, 0) for counts in tokens), fresh)


@dataclass
class PassInFlight(InFlight):
    """
    A training pass.

    Attributes:
        inputs ([`Batch`]): what TRL's loss reads; what is filled in here holds for this pass alone.
        logps, entropies (`Tensor` of shape (N, T)): of the pass, once it has been made.
    """

    inputs: Batch = field(default_factory=Batch)
    logps: Tensor | None = None
    entropies: Tensor | None = None
