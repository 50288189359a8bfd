"""What an AVATAR run remembers of its prompts and completions, and the groups that are mixed out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from maple_trl.algorithms import Experience, HintTrigger, StratifiedReplayBuffer, Vcrs, replayed_slots
from maple_trl.algorithms.replay_tiers import tier_of, tier_thresholds


REPLAY_SCOPES = ("tiers", "prompt", "buffer")
"""
Which completions a group replays: `tiers`, those of any prompts, by tier; `prompt`, those of its own prompt; `buffer`,
those of its own prompt, and by tier others in the places that these leave.
"""


@dataclass(frozen=True)
class Group:
    """
    A prompt of a rollout, the same on every rank.

    Attributes:
        key (`str`): that of its row, without a hint; see [`~maple_trl.trainers.common.hinted_rows.row_key`].
        row (`int`): its row of the data set, -1 where that is not known.
        tag (`int`): its tag as a number.
        has_hint (`bool`): whether it can be shown with a hint, on every rank that holds a part of the group.
    """

    key: str
    row: int
    tag: int
    has_hint: bool


@dataclass(frozen=True)
class ReplayPlan:
    """
    Which completions of a rollout are generated and which are replayed, over all ranks.

    Completions have places, counted over the rollout, and numbers, counted over the run.

    Attributes:
        groups (`list[Group]`): the prompts, in order.
        group_size (`int`): completions of each.
        hinted (`list[bool]`): whether each prompt is shown with its hint.
        replayed (`list[bool]`): whether the completion of each place is replayed.
        first_number (`int`): number of the completion of the first place.
        empty (`list[bool]`, *optional*): whether each place holds no completion; `None`: none is empty.
    """

    groups: list[Group]
    group_size: int
    hinted: list[bool]
    replayed: list[bool]
    first_number: int
    empty: list[bool] | None = None

    @property
    def fresh(self) -> list[bool]:
        """Whether the completion of each place is generated."""
        empty = self.empty or [False] * len(self.replayed)
        return [not (replayed or absent) for replayed, absent in zip(self.replayed, empty, strict=True)]

    def places(self, replayed: bool) -> list[int]:
        """Return the places of the replayed completions, or of the fresh ones."""
        return [place for place, flag in enumerate(self.replayed if replayed else self.fresh) if flag]

    def groups_of(self, places: Sequence[int]) -> Tensor:
        """Return the number of each place's group, shape (places,)."""
        return torch.tensor(places, dtype=torch.long) // self.group_size


@dataclass
class Pending:
    """A fresh completion whose tokens have not been trained on yet, so that their log-probabilities are not known."""

    key: str
    row: int
    reward: float
    step: int
    hinted: bool
    rewards: dict[str, float]


@dataclass
class PassRecord:
    """
    Findings of a rank's training passes, until [`ReplayMemory.write`] takes them.

    Attributes:
        completions: of each fresh completion its number, token ids, and their log-probabilities when they were generated.
        divergences: of each replayed completion its number, the sum of its tokens' KL, and how many these are.
    """

    completions: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    divergences: list[tuple[int, float, float]] = field(default_factory=list)

    def add_completion(self, number: int, ids_T: Tensor, logps_T: Tensor, tokens_T: Tensor) -> None:
        """
        Add a fresh completion.

        Args:
            tokens_T (`Tensor` of shape (T,)): bool, which tokens are its own.
        """
        self.completions.append((number, ids_T[tokens_T].cpu(), logps_T[tokens_T].float().cpu()))


class ReplayMemory:
    """
    The buffer, the baselines and the hints of a run. Every rank holds the same and is told the same.

    A prompt's completions of one rollout go through three steps: [`plan`] says which are generated, [`learn`] takes the
    rewards of those and hands out the replayed ones, and [`write`] stores the fresh ones once their log-probabilities
    are known.

    Args:
        buffer ([`StratifiedReplayBuffer`]), vcrs ([`Vcrs`]): experiences, and the prompts' baselines.
        replayed (`int`): replayed completions that a group is to have.
        hints ([`HintTrigger`], *optional*): without it no prompt is hinted.
        hint_below (`float`): a Hard prompt is stuck while its baseline is below this.
        retier (`bool`): whether stored experiences move along when their prompt changes its tier.
        scope (`str`): one of [`REPLAY_SCOPES`].
        draw (`str`): which of a tier, or of a prompt; one of [`~maple_trl.algorithms.replay_draws.DRAWS`].
        tag_of (`Callable`, *optional*): the tag of an experience as a number. With it, completions of other tags than
            those of the rollout are not replayed.
        min_size (`int`): nothing is replayed while fewer completions are stored.
    """

    def __init__(
        self,
        buffer: StratifiedReplayBuffer,
        vcrs: Vcrs,
        replayed: int,
        hints: HintTrigger | None = None,
        hint_below: float = 0.75,
        retier: bool = False,
        scope: str = "tiers",
        draw: str = "uniform",
        tag_of: Callable[[Experience], int] | None = None,
        min_size: int = 1,
    ):
        self.buffer = buffer
        self.vcrs = vcrs
        self.replayed = replayed
        self.hints = hints
        self.hint_below = hint_below
        self.retier = retier
        self.scope = scope
        self.draw = draw
        self.tag_of = tag_of
        self.min_size = min_size
        self.unstorable = 0
        self._next_number = 0
        self._pending: dict[int, Pending] = {}
        self._replaying: dict[int, str] = {}

    def may_hint(self, key: str) -> bool:
        """Return whether fresh or replayed completions may stand under a prompt with its hint at its next visit."""
        if self.hints is None:
            return False
        return self.hints.due(key) or any(experience.hinted for experience in self.buffer.stored(key))

    def scored_by(self, key: str, names: Sequence[str]) -> list[bool]:
        """Return whether each reward function has scored a stored completion of a prompt, and so applies to it."""
        stored = [experience.rewards or {} for experience in self.buffer.stored(key)]
        return [any(not math.isnan(rewards.get(name, math.nan)) for rewards in stored) for name in names]

    def plan(
        self, groups: Sequence[Group], group_size: int, step: int, ranks: int, empty: int | None = None
    ) -> ReplayPlan:
        """
        Decide which completions of a rollout are generated: as few as what is stored allows.

        Args:
            groups: the rollout's prompts over all ranks, in order.
            step: the current optimizer step.
            empty: where given, nothing is replayed, and so many places of each group stay empty.
        """
        hinted = [self.hints is not None and group.has_hint and self.hints.due(group.key) for group in groups]
        for group, shown in zip(groups, hinted, strict=True):
            if shown:
                self.hints.give(group.key)
        wanted = self._wanted(groups, step) if empty is None else [empty] * len(groups)
        slots = replayed_slots(wanted, group_size, ranks)
        replayed, left = (slots, None) if empty is None else ([False] * len(slots), slots)
        rollout = ReplayPlan(list(groups), group_size, hinted, replayed, self._next_number, left)
        self._next_number += len(slots)
        return rollout

    def _wanted(self, groups: Sequence[Group], step: int) -> list[int]:
        """Return how many completions each group can replay."""
        if len(self.buffer) < self.min_size:
            return [0] * len(groups)
        if self.scope == "tiers":  # spread evenly, since ranks wait for the one that has fewest
            most = self.replayed * len(groups)
            total = min(most, self.buffer.elsewhere((), step, self._fitting(groups)))
            return [total * (i + 1) // len(groups) - total * i // len(groups) for i in range(len(groups))]
        wanted = [
            min(self.replayed, self.buffer.available(group.key, step, hinted=group.has_hint)) for group in groups
        ]
        if self.scope == "buffer":
            left = self.buffer.elsewhere((group.key for group in groups), step)
            for i, count in enumerate(wanted):
                more = min(self.replayed - count, left)
                wanted[i] += more
                left -= more
        return wanted

    def _fitting(self, groups: Sequence[Group]) -> Callable[[Experience], bool] | None:
        """Return a test of whether an experience may be replayed in a rollout of these prompts; `None`: all may."""
        if self.tag_of is None:
            return None
        tags = {group.tag for group in groups}
        return lambda experience: self.tag_of(experience) in tags

    def learn(
        self, rollout: ReplayPlan, rewards_F: Tensor, scores_FR: Tensor, names: Sequence[str], step: int
    ) -> list[Experience]:
        """
        Take the rewards of all ranks' fresh completions, in the order of their places, and draw the replayed ones.

        Args:
            rewards_F (`Tensor` of shape (fresh,)): what they are trained with, NaN where no function gave any.
            scores_FR (`Tensor` of shape (fresh, reward functions)): of each function.
            names: of the reward functions.

        Returns:
            `list[Experience]`: the replayed completions, in the order of their places.
        """
        fresh_of: dict[int, list[int]] = {}
        places = rollout.places(replayed=False)
        for i, place in enumerate(places):
            fresh_of.setdefault(place // rollout.group_size, []).append(i)
        rewards = rewards_F.tolist()
        for number, group in enumerate(rollout.groups):
            self.vcrs.observe(group.key, [rewards[i] for i in fresh_of[number]])
        if self.hints is not None:
            thresholds = tier_thresholds(self.vcrs.baselines(), self.buffer.quantiles) if len(self.vcrs) else None
            told = [number for number, own in fresh_of.items() if not all(math.isnan(rewards[i]) for i in own)]
            for key in dict.fromkeys(rollout.groups[number].key for number in told):
                self.hints.observe(key, self._is_stuck(key, thresholds))
        counts = rollout.groups_of(rollout.places(replayed=True)).bincount(minlength=len(rollout.groups)).tolist()
        known = [
            [rewards[i] for i in fresh_of[number] if not math.isnan(rewards[i])]
            for number in range(len(rollout.groups))
        ]
        draw = self._draw_by_tier if self.scope == "tiers" else self._draw_by_prompt
        experiences = [experience for group in draw(rollout, counts, known, step) for experience in group]
        self._note(rollout, places, rewards, scores_FR.tolist(), names, step)
        self._note_replayed(rollout, experiences)
        return experiences

    def _draw_by_tier(
        self, rollout: ReplayPlan, counts: list[int], known: list[list[float]], step: int
    ) -> list[list[Experience]]:
        """
        Draw by tier what each group replays, as many completions as it has places.

        Completions of a prompt of the rollout go to its own group first. A prompt that is stuck replays one of its own
        whatever the draw: a hint asks how far the policy has moved on it, and completions that all failed are hardly
        drawn.
        """
        fresh: dict[str, list[float]] = {}
        dealt: list[list[Experience]] = [[] for _ in counts]
        for number, (group, rewards) in enumerate(zip(rollout.groups, known, strict=True)):
            fresh.setdefault(group.key, []).extend(rewards)
            served = any(own and own[0].prompt == group.key for own in dealt)
            if counts[number] and not served and self.hints is not None and self.hints.watches(group.key):
                dealt[number] = self.buffer.sample(group.key, 1, rewards, step, group.has_hint, draw="uniform")
        fits, taken = self._fitting(rollout.groups), {e for own in dealt for e in own}
        drawn = self.buffer.sample_batch(
            sum(counts) - sum(map(len, dealt)),
            step,
            draw=self.draw,
            baselines=self.vcrs,
            fresh_rewards=fresh,
            where=lambda e: e not in taken and (fits is None or fits(e)),
        )
        strange = []
        for experience in drawn:
            own = (i for i, group in enumerate(rollout.groups) if group.key == experience.prompt)
            place = next((i for i in own if len(dealt[i]) < counts[i]), None)
            (strange if place is None else dealt[place]).append(experience)
        others = iter(strange)
        return [[*own, *islice(others, count - len(own))] for own, count in zip(dealt, counts, strict=True)]

    def _draw_by_prompt(
        self, rollout: ReplayPlan, counts: list[int], known: list[list[float]], step: int
    ) -> list[list[Experience]]:
        """Draw completions of each group's own prompt, and with scope `buffer` others by tier for the places left."""
        how = {"draw": self.draw, "baselines": self.vcrs}
        drawn: list[list[Experience]] = [[] for _ in counts]
        for number, group in enumerate(rollout.groups):
            if counts[number]:
                drawn[number] = self.buffer.sample(
                    group.key, counts[number], known[number], step, hinted=group.has_hint, **how
                )
        missing = [count - len(own) for count, own in zip(counts, drawn, strict=True)]
        if any(missing):
            keys = [group.key for group in rollout.groups]
            others = iter(self.buffer.sample_batch(sum(missing), step, exclude=keys, **how))
            drawn = [[*own, *islice(others, count)] for own, count in zip(drawn, missing, strict=True)]
        return drawn

    def _is_stuck(self, key: str, thresholds: tuple[float, float] | None) -> bool:
        baseline = self.vcrs.baseline(key)
        return baseline is not None and baseline < self.hint_below and tier_of(baseline, thresholds) == "hard"

    def _note(self, rollout: ReplayPlan, places, rewards, scores, names, step: int) -> None:
        """Note what is known of fresh completions, until a training pass shows their log-probabilities."""
        for place, reward, row_scores in zip(places, rewards, scores, strict=True):
            number = place // rollout.group_size
            group = rollout.groups[number]
            if math.isnan(reward):  # no function could score it
                self.unstorable += 1
                continue
            self._pending[rollout.first_number + place] = Pending(
                group.key, group.row, reward, step, rollout.hinted[number], dict(zip(names, row_scores, strict=True))
            )

    def _note_replayed(self, rollout: ReplayPlan, experiences: Sequence[Experience]) -> None:
        """Note replayed completions' prompts, until a training pass shows how far the policy has moved on them."""
        for place, experience in zip(rollout.places(replayed=True), experiences, strict=True):
            self._replaying[rollout.first_number + place] = experience.prompt

    @property
    def nbytes(self) -> int:
        """Memory that completions and baselines take, about."""
        return self.buffer.nbytes + self.vcrs.nbytes

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget fresh completions that no training pass will see, so that they are not stored."""
        for number in numbers:
            self._pending.pop(number, None)

    def watches(self, number: int) -> bool:
        """Return whether a completion is stored even if it is not trained on: a hint waits for one of its prompt."""
        pending = self._pending.get(number)
        return pending is not None and self.hints is not None and self.hints.watches(pending.key)

    def waits_for(self, number: int) -> bool:
        """Return whether a completion, fresh or replayed, is still to be in a training pass."""
        return number in self._pending or number in self._replaying

    def write(self, found: Iterable[PassRecord]) -> None:
        """
        Store fresh completions, and tell hints how far the policy has moved on replayed ones.

        Args:
            found: what each rank found out, in the order of the ranks.
        """
        found = list(found)
        experiences = []
        # In the order in which they were generated, however the micro-batches were shuffled and shared.
        for number, ids, logps in sorted((c for part in found for c in part.completions), key=lambda c: c[0]):
            pending = self._pending.pop(number, None)
            if pending is None:  # it was in two passes since
                continue
            if not len(ids):
                self.unstorable += 1
                continue
            experiences.append(
                Experience(
                    pending.key,
                    pending.row,
                    ids,
                    logps,
                    pending.reward,
                    pending.step,
                    pending.hinted,
                    pending.rewards,
                )
            )
        self.buffer.add(experiences, self.vcrs)
        if self.retier:
            self.buffer.retier(self.vcrs)
        for number, total, tokens in sorted(d for part in found for d in part.divergences):
            key = self._replaying.pop(number, None)
            if key is not None and self.hints is not None:
                self.hints.observe_divergence(key, total, tokens)

    # State

    def metrics(self) -> dict[str, float]:
        """Return metrics of buffer, baselines and hints, and how many completions lacked a reward or a token."""
        metrics = self.buffer.metrics() | self.vcrs.metrics() | {"replay/unstorable": float(self.unstorable)}
        metrics.pop("replay/hit_rate", None)  # of what was planned, which the buffer always has
        return metrics if self.hints is None else metrics | self.hints.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Return all but the buffer, which has files of its own, ready for JSON."""
        return {
            "vcrs": self.vcrs.state_dict(),
            "hints": None if self.hints is None else self.hints.state_dict(),
            "unstorable": self.unstorable,
            "next_number": self._next_number,
            "pending": {str(number): vars(pending) for number, pending in self._pending.items()},
            "replaying": {str(number): key for number, key in self._replaying.items()},
        }

    def snapshot(self) -> Callable[[], None]:
        """Return what puts everything back to as it is, but for the completions that are stored."""
        state, put_buffer_back = self.state_dict(), self.buffer.snapshot()

        def put_back() -> None:
            self.load_state_dict(state)
            put_buffer_back()

        return put_back

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from [`state_dict`]."""
        self.vcrs.load_state_dict(state["vcrs"])
        if self.hints is not None and state["hints"] is not None:
            self.hints.load_state_dict(state["hints"])
        self.unstorable = state["unstorable"]
        self._next_number = state["next_number"]
        self._pending = {int(number): Pending(**pending) for number, pending in state["pending"].items()}
        self._replaying = {int(number): key for number, key in state["replaying"].items()}
