"""Replay of past completions from tiers of difficulty (AVATAR, arXiv 2508.03100, 4.1)."""

from __future__ import annotations

import math
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import save_file

from maple_trl.algorithms.experience import Experience, as_table, as_tensors, experience_bytes, read_experiences
from maple_trl.algorithms.replay_draws import differs, draw_positions, side
from maple_trl.algorithms.replay_tiers import QUANTILES, SHARES, TIERS, Vcrs, rounded_shares, tier_of, tier_thresholds
from maple_trl.files import DamagedFileError, check_part, read_manifest, write_manifest, write_part


NAME = "replay"
MANIFEST = f"{NAME}.json"
FORMAT = {"format": "maple_trl replay buffer", "version": 1}
_SHARD = 1000  # experiences of a file of tokens: joining all at once would double the memory of the buffer


class ReplayStateError(ValueError):
    """A saved buffer that is missing, damaged, or not the one that is asked for."""


@dataclass
class _Counters:
    """What a buffer has to remember beside its experiences; the random draws follow from the seed and `draws`."""

    step: int = 0
    draws: int = 0
    evicted: int = 0
    expired: int = 0
    discarded: int = 0
    promoted: int = 0
    demoted: int = 0
    sampled_at: int = -1
    asked: int = 0
    served: int = 0
    easy: int = 0
    medium: int = 0
    hard: int = 0


class StratifiedReplayBuffer:
    """
    Keeps experiences in three tiers of fixed capacity, so that easy prompts cannot push out hard ones (AVATAR 4.1).

    **Filing.** A new experience goes to the tier that its prompt is in now: the prompt's baseline against quantiles of
    the baselines of all prompts seen ([`tier_thresholds`]). A full tier evicts the one of its experiences that was
    added to the buffer first, never one of another tier. Those already filed stay where they are, as in the paper,
    until [`retier`] is called.

    **Sampling.** [`sample_batch`] draws experiences of any prompts, by tier in proportion to the shares, so that hard
    prompts come back whatever the policy is asked now. [`sample`] draws those of one prompt, whatever tiers hold them.
    Which of a tier or of a prompt, [`~maple_trl.algorithms.replay_draws.draw_positions`] says.

    Experiences are handed out as they are stored: do not write to their tensors.

    Args:
        capacity (`int`, *optional*, defaults to `10_000`):
            How many experiences are kept at most. The paper finds more to be too stale.
        shares (`Mapping[str, float]`, *optional*):
            Share of the capacity of each tier, a fraction; they add up to 1. Capacities are rounded by largest remainder,
            and add up to `capacity`; equal remainders favour the harder tier. By default easy 0.25, medium 0.35, hard 0.40.
        quantiles (`tuple[float, float]`, *optional*, defaults to `(0.40, 0.75)`):
            The share of prompts that are Hard, and that of those that are Hard or Medium.
        max_age (`int`, *optional*):
            Experiences written more than this many optimizer steps ago are not sampled but dropped.
        seed (`int`, *optional*, defaults to `0`):
            The draws depend on it, on what is stored, and on how many were made before.

    Raises:
        ValueError: for an option out of its range.
    """

    def __init__(
        self,
        capacity: int = 10_000,
        shares: Mapping[str, float] | None = None,
        quantiles: tuple[float, float] = QUANTILES,
        max_age: int | None = None,
        seed: int = 0,
    ):
        shares = dict(SHARES if shares is None else shares)
        if capacity < 1:
            raise ValueError(f"A buffer must hold at least 1 experience, got a capacity of {capacity}")
        if set(shares) != set(TIERS) or not all(share >= 0 for share in shares.values()):
            raise ValueError(f"Expected a share of at least 0 for each of {', '.join(TIERS)}, got {shares}")
        total = sum(shares.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"The shares of the tiers must add up to 1, got {total}")
        if not (len(quantiles) == 2 and 0 <= quantiles[0] <= quantiles[1] <= 1):
            raise ValueError(f"The quantiles must be two ascending numbers in [0, 1], got {quantiles}")
        if max_age is not None and max_age < 0:
            raise ValueError(f"The age limit must be at least 0 optimizer steps, got {max_age}")
        self.capacity = capacity
        self.shares = {tier: shares[tier] / total for tier in TIERS}
        self.quantiles = quantiles
        self.max_age = max_age
        self.seed = seed
        self.capacities = rounded_shares(self.shares, capacity)
        self._counters = _Counters()
        # Experiences have numbers in the order of their adding. Within a tier they are sorted by them.
        self._next_number = 0
        self._tiers: dict[str, OrderedDict[int, Experience]] = {tier: OrderedDict() for tier in TIERS}
        self._prompts: dict[str, dict[int, str]] = {}
        self._oldest_step = math.inf

    # What is stored

    def __len__(self) -> int:
        return sum(map(len, self._tiers.values()))

    @property
    def nbytes(self) -> int:
        """Memory that the experiences take, about."""
        return sum(experience_bytes(len(e.completion_ids)) for held in self._tiers.values() for e in held.values())

    def sizes(self) -> dict[str, int]:
        """Count the experiences of each tier."""
        return {tier: len(members) for tier, members in self._tiers.items()}

    def prompts(self) -> list[str]:
        """Return the keys of the prompts that have experiences."""
        return list(self._prompts)

    def stored(self, prompt: str) -> list[Experience]:
        """Return the experiences of a prompt, oldest first. Those too old are among them until the next draw."""
        return [self._tiers[tier][number] for number, tier in self._prompts.get(prompt, {}).items()]

    def available(self, prompt: str, step: int, hinted: bool = True) -> int:
        """
        Count the experiences of a prompt that can be sampled at an optimizer step, each in place of a fresh one.

        Args:
            prompt (`str`): key of the prompt.
            step (`int`): the current optimizer step; what is too old at it is dropped.
            hinted (`bool`, *optional*, defaults to `True`): whether those written under a hint count.
        """
        self._expire(step)
        return len(self.stored(prompt)) if hinted else sum(not e.hinted for e in self.stored(prompt))

    def elsewhere(self, prompts: Iterable[str], step: int, where: Callable[[Experience], bool] | None = None) -> int:
        """
        Count the experiences of other prompts than these that can be sampled at an optimizer step.

        Args:
            prompts (`Iterable[str]`): keys of the prompts whose experiences do not count.
            step (`int`): the current optimizer step; what is too old at it is dropped.
            where (`Callable[[Experience], bool]`, *optional*): counts those alone for which it is true.
        """
        self._expire(step)
        others = len(self) - sum(len(self._prompts.get(prompt, ())) for prompt in set(prompts))
        return others if where is None else sum(map(len, self._members(prompts, where).values()))

    def _members(
        self, exclude: Iterable[str], where: Callable[[Experience], bool] | None
    ) -> dict[str, list[Experience]]:
        exclude = set(exclude)
        return {
            tier: [e for e in held.values() if e.prompt not in exclude and (where is None or where(e))]
            for tier, held in self._tiers.items()
        }

    # What comes in and goes out

    def add(self, experiences: Iterable[Experience], baselines: Vcrs) -> None:
        """
        File experiences by the tiers that their prompts are in now, those given first being the older ones.

        Args:
            experiences (`Iterable[Experience]`):
                New completions. On several ranks, those of all ranks in the same order, so that the buffers agree.
            baselines ([`Vcrs`]):
                Has observed the rewards of each prompt.

        Raises:
            ValueError: when a prompt was never observed; nothing is stored then.
        """
        filed: list[tuple[Experience, float]] = []
        for experience in experiences:
            baseline = baselines.baseline(experience.prompt)
            if baseline is None:
                raise ValueError(f"Prompt {experience.prompt!r} has no baseline; observe its rewards before adding it")
            filed.append((experience, baseline))
        if not filed:
            return
        thresholds = tier_thresholds(baselines.baselines(), self.quantiles)
        for experience, baseline in filed:
            self._store(experience, tier_of(baseline, thresholds))
        for tier in TIERS:
            self._evict(tier)

    def tier(self, prompt: str, baselines: Vcrs) -> str | None:
        """Return the tier that a prompt is in now by the `baselines`, `None` when they never observed it."""
        baseline = baselines.baseline(prompt)
        return None if baseline is None else tier_of(baseline, tier_thresholds(baselines.baselines(), self.quantiles))

    def retier(self, baselines: Vcrs) -> None:
        """
        Move stored experiences to the tiers that their prompts are in now by the `baselines`.

        A tier that gets too many evicts those added first, be it those that just came. Experiences of prompts without
        a baseline stay.
        """
        known = baselines.baselines()
        if not len(known):
            return
        thresholds = tier_thresholds(known, self.quantiles)
        moves = []
        for prompt, members in self._prompts.items():
            baseline = baselines.baseline(prompt)
            if baseline is not None:
                tier = tier_of(baseline, thresholds)
                moves += [(prompt, number, old, tier) for number, old in members.items() if old != tier]
        for prompt, number, old, tier in moves:
            self._prompts[prompt][number] = tier
            self._tiers[tier][number] = self._tiers[old].pop(number)
            if TIERS.index(tier) < TIERS.index(old):
                self._counters.promoted += 1
            else:
                self._counters.demoted += 1
        for tier in {tier for *_, tier in moves}:
            self._tiers[tier] = OrderedDict(sorted(self._tiers[tier].items()))
            self._evict(tier)

    def discard(self, prompt: str) -> int:
        """Take out the experiences of a prompt that cannot be shown any more; return how many they were."""
        numbers = list(self._prompts.get(prompt, {}).items())
        for number, tier in numbers:
            self._remove(number, tier)
        self._counters.discarded += len(numbers)
        return len(numbers)

    def _store(self, experience: Experience, tier: str) -> None:
        self._tiers[tier][self._next_number] = experience
        self._prompts.setdefault(experience.prompt, {})[self._next_number] = tier
        self._next_number += 1
        self._oldest_step = min(self._oldest_step, experience.step)
        self._counters.step = max(self._counters.step, experience.step)

    def _remove(self, number: int, tier: str) -> None:
        prompt = self._tiers[tier].pop(number).prompt
        del self._prompts[prompt][number]
        if not self._prompts[prompt]:
            del self._prompts[prompt]

    def _evict(self, tier: str) -> None:
        while len(self._tiers[tier]) > self.capacities[tier]:
            self._remove(next(iter(self._tiers[tier])), tier)
            self._counters.evicted += 1

    def _expire(self, step: int) -> None:
        """Drop what is too old at a step, looking through the buffer only where something may be."""
        self._counters.step = max(self._counters.step, step)
        if self.max_age is None or step - self._oldest_step <= self.max_age:
            return
        for tier, members in self._tiers.items():
            for number in [n for n, experience in members.items() if step - experience.step > self.max_age]:
                self._remove(number, tier)
                self._counters.expired += 1
        self._oldest_step = min(
            (e.step for members in self._tiers.values() for e in members.values()), default=math.inf
        )

    # Sampling

    def sample(
        self,
        prompt: str | None,
        count: int,
        fresh_rewards: Iterable[float],
        step: int,
        hinted: bool = True,
        draw: str = "diverse",
        baselines: Vcrs | None = None,
    ) -> list[Experience]:
        """
        Draw experiences for a group of completions of one prompt, none twice.

        Args:
            prompt (`str`):
                Key of the prompt. `None` draws any prompts, as [`sample_batch`] does.
            count (`int`):
                How many; fewer are returned where the buffer holds fewer.
            fresh_rewards (`Iterable[float]`):
                Of the group's other completions; NaN is left out. With `diverse`, where they are all equal, experiences
                with another reward are drawn before those with the same, so that the group has reward variance if the
                buffer allows it. Without any the first one drawn stands in for them.
            step (`int`):
                The current optimizer step, which ages are counted to.
            hinted (`bool`, *optional*, defaults to `True`):
                Whether those written under a hint may be drawn.
            draw (`str`, *optional*, defaults to `"diverse"`):
                Which are drawn; see [`~maple_trl.algorithms.replay_draws.draw_positions`].
            baselines ([`Vcrs`], *optional*):
                What `balanced` and `priority` hold rewards against.

        Raises:
            ValueError: for a negative count, an unknown draw, or one without the baselines that it needs.
        """
        if prompt is None:
            return self.sample_batch(count, step)
        chance = self._begin_draw(prompt, count, step)
        stored = [experience for experience in self.stored(prompt) if hinted or not experience.hinted]
        known = [reward for reward in map(float, fresh_rewards) if not math.isnan(reward)]
        first = []
        if draw == "diverse" and not known and stored and count:
            first = [stored.pop(chance.randrange(len(stored)))]
            known = [first[0].reward]
        chosen = first + self._chosen(stored, {prompt: known}, count - len(first), draw, baselines, chance)
        self._counters.served += len(chosen)
        return chosen

    def sample_batch(
        self,
        count: int,
        step: int,
        exclude: Iterable[str] = (),
        draw: str = "uniform",
        baselines: Vcrs | None = None,
        fresh_rewards: Mapping[str, Sequence[float]] | None = None,
        where: Callable[[Experience], bool] | None = None,
    ) -> list[Experience]:
        """
        Draw experiences of any prompts, none twice.

        The tier of each is drawn by the shares, among the tiers that have some left, so that counts are in proportion
        to the shares on average even where they are small.

        Args:
            count (`int`):
                How many; fewer are returned where the buffer holds fewer.
            step (`int`):
                The current optimizer step, which ages are counted to.
            exclude (`Iterable[str]`, *optional*):
                Prompts of which none is drawn.
            draw (`str`, *optional*, defaults to `"uniform"`):
                Which of a tier; see [`~maple_trl.algorithms.replay_draws.draw_positions`]. `balanced` counts over all
                tiers, so that an odd one of a tier is made up for in the next.
            baselines ([`Vcrs`], *optional*):
                What `balanced` and `priority` hold rewards against.
            fresh_rewards (`Mapping[str, Sequence[float]]`, *optional*):
                Of prompts that are visited now, for `diverse`. Of others their baseline is known.
            where (`Callable[[Experience], bool]`, *optional*):
                Those alone are drawn for which it is true.

        Raises:
            ValueError: for a negative count, an unknown draw, or one without the baselines that it needs.
        """
        chance = self._begin_draw(None, count, step)
        members = self._members(exclude, where)
        counts = dict.fromkeys(TIERS, 0)
        for _ in range(min(count, sum(map(len, members.values())))):
            left = [tier for tier in TIERS if counts[tier] < len(members[tier])]
            counts[chance.choices(left, [self.shares[tier] for tier in left])[0]] += 1
        known = {
            prompt: [reward for reward in rewards if not math.isnan(reward)]
            for prompt, rewards in (fresh_rewards or {}).items()
        }
        chosen: list[Experience] = []
        for tier, number in counts.items():
            chosen += self._chosen(members[tier], known, number, draw, baselines, chance, chosen)
            setattr(self._counters, tier, getattr(self._counters, tier) + number)
        chance.shuffle(chosen)
        self._counters.served += len(chosen)
        return chosen

    def _chosen(
        self,
        candidates: Sequence[Experience],
        known: Mapping[str, Sequence[float]],
        count: int,
        draw: str,
        baselines: Vcrs | None,
        chance: random.Random,
        before: Sequence[Experience] = (),
    ) -> list[Experience]:
        """Draw some of the candidates, with regard to those drawn before them."""
        if baselines is None and draw in ("balanced", "priority"):
            raise ValueError(f"The draw {draw!r} needs the baselines of the prompts")

        def advantage(experience: Experience) -> float:
            baseline = None if baselines is None else baselines.baseline(experience.prompt)
            return 0.0 if baseline is None else experience.reward - baseline

        def is_other(experience: Experience) -> bool:
            rewards = known.get(experience.prompt)
            return differs(experience.reward, rewards) if rewards else baselines is None or bool(advantage(experience))

        advantages = [0.0 if draw == "uniform" else advantage(e) for e in candidates]
        surplus = sum(side(advantage(e)) for e in before)
        differing = [is_other(e) for e in candidates] if draw == "diverse" else []
        return [candidates[i] for i in draw_positions(draw, advantages, differing, count, chance, surplus)]

    def _begin_draw(self, prompt: str | None, count: int, step: int) -> random.Random:
        if count < 0:
            raise ValueError(f"The number of experiences to sample must be at least 0, got {count}")
        self._expire(step)
        counters = self._counters
        if counters.sampled_at != step:
            counters.sampled_at, counters.asked, counters.served = step, 0, 0
            counters.easy = counters.medium = counters.hard = 0
        counters.asked += count
        counters.draws += 1
        return random.Random(f"{self.seed} {counters.draws} {prompt}")

    # State

    def metrics(self) -> dict[str, float]:
        """
        Count what is stored and what became of the rest.

        `replay/size` and `replay/size/hard` and so on count experiences. `replay/evicted`, `replay/expired` (too old),
        `replay/discarded`, `replay/promoted` and `replay/demoted` count them since the run began. `replay/hit_rate` is
        the share served of what was asked for at the last step that asked, and `replay/drawn/hard` and so on the tiers'
        shares of what was drawn by tier at that step. `replay/age_mean` and `replay/age_max` are optimizer steps.
        """
        counters = self._counters
        metrics = {"replay/size": float(len(self))}
        metrics |= {f"replay/size/{tier}": float(size) for tier, size in self.sizes().items()}
        for name in ("evicted", "expired", "discarded", "promoted", "demoted"):
            metrics[f"replay/{name}"] = float(getattr(counters, name))
        if counters.asked:
            metrics["replay/hit_rate"] = counters.served / counters.asked
        drawn = {tier: getattr(counters, tier) for tier in TIERS}
        if any(drawn.values()):
            metrics |= {f"replay/drawn/{tier}": number / sum(drawn.values()) for tier, number in drawn.items()}
        ages = [counters.step - e.step for members in self._tiers.values() for e in members.values()]
        if ages:
            metrics |= {"replay/age_mean": sum(ages) / len(ages), "replay/age_max": float(max(ages))}
        return metrics

    def snapshot(self) -> Callable[[], None]:
        """Return what puts draws and counts back to as they are, so that the same is drawn again."""
        kept = replace(self._counters)

        def put_back() -> None:
            self._counters = kept

        return put_back

    def save(self, folder: str | os.PathLike[str], fingerprint: str = "") -> None:
        """
        Write the buffer, whose new state counts once `replay.json` is in its place.

        Files are `replay-*.safetensors` (tokens), `replay-*.parquet` (the rest) and, last, `replay.json`, which holds
        their sizes and SHA-256.

        Files appear under their names when they are complete, and the names hold what they contain. So a state that
        was in the folder before stays whole until `replay.json` of the new one takes its place.

        Args:
            folder (`str` or `os.PathLike`):
                For this buffer alone; made if it is missing.
            fingerprint (`str`, *optional*, defaults to `""`):
                What the experiences depend on, e.g. data set and tokenizer. [`load`] asks for the same.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        entries = sorted(
            ((number, tier, e) for tier, members in self._tiers.items() for number, e in members.items()),
            key=lambda entry: entry[0],
        )
        experiences = [experience for *_, experience in entries]
        rows = as_table([tier for _, tier, _ in entries], experiences)
        table = write_part(folder, NAME, ".parquet", partial(pq.write_table, rows))
        shards = [experiences[i : i + _SHARD] for i in range(0, len(experiences), _SHARD)]
        tensors = [write_part(folder, NAME, ".safetensors", partial(save_file, as_tensors(some))) for some in shards]
        content = {
            "fingerprint": fingerprint,
            "experiences": len(entries),
            "counters": asdict(self._counters),
            "table": table,
            "tensors": tensors,
        }
        write_manifest(folder, NAME, FORMAT, content, [table, *tensors])

    def load(self, folder: str | os.PathLike[str], fingerprint: str = "") -> None:
        """
        Take over what [`save`] wrote; the buffer then samples as the saved one would have.

        What it held before is gone. Options stay those of this buffer: a tier that has become smaller evicts its
        oldest.

        Args:
            folder (`str` or `os.PathLike`):
                That which [`save`] wrote to.
            fingerprint (`str`, *optional*, defaults to `""`):
                What the experiences must have been saved with.

        Raises:
            ReplayStateError: when a file is missing, cut short, changed or of another format, or the fingerprint
                differs; the buffer stays as it was then.
        """
        folder = Path(folder)
        try:
            content = read_manifest(folder / MANIFEST, FORMAT)
            if content["fingerprint"] != fingerprint:
                raise ReplayStateError(
                    f"{folder / MANIFEST} belongs to other data: its fingerprint is {content['fingerprint']!r}, this run's "
                    f"{fingerprint!r}"
                )
            table, *tensors = (check_part(folder, NAME, part) for part in (content["table"], *content["tensors"]))
        except DamagedFileError as error:
            raise ReplayStateError(str(error)) from error
        try:
            entries = read_experiences(table, tensors)
            counters = _Counters(**content["counters"])
        except (LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ReplayStateError(f"{folder} holds no readable replay buffer: {error}") from error
        if len(entries) != content["experiences"]:
            raise ReplayStateError(f"{folder} holds {len(entries)} experiences, not {content['experiences']}")
        self._counters = counters
        self._next_number, self._oldest_step = 0, math.inf
        self._tiers = {tier: OrderedDict() for tier in TIERS}
        self._prompts = {}
        for tier, experience in entries:
            self._store(experience, tier)
        for tier in TIERS:
            self._evict(tier)
