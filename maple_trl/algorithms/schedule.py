"""Which prompts each rollout takes: one tag a batch, in the order of the curriculum (MAPLE, section 4.2, Alg. 2)."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from maple_trl.algorithms.curriculum import FIXED_CURRICULA, TagCurriculum
from maple_trl.modalities import ModalityTag


logger = logging.getLogger(__name__)

GRANULARITIES = ("epoch", "cycle")
LEFTOVERS = ("fill", "mixed")
MIXED = "mixed"
"""The stratum of batches that hold several tags."""


@dataclass(frozen=True)
class PromptBatch:
    """
    The prompts of one rollout over all ranks: those of a batch B_M in MAPLE, Algorithm 2, where it holds one tag.

    Attributes:
        rows (`list[int]`): rows of the data set, one per prompt.
        stratum (`str`): the one tag of the batch, or `"mixed"`.
        filled (`int`): how many of the rows stand there a further time in this epoch, to make the batch full.
    """

    rows: list[int]
    stratum: str
    filled: int = 0


@dataclass
class _Position:
    """Where the schedule stands; everything else follows from the seed."""

    epoch: int = -1
    rounds: int = 0
    skipped: list[int] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)
    upcoming: list[str] = field(default_factory=list)


class StratifiedSchedule:
    """
    Hands out the prompts of one rollout after the other; every row once per epoch (MAPLE 4.2 and Algorithm 2).

    The next batch is chosen when it is asked for, so that the curriculum sees the rewards of the one before. All ranks
    hold the same schedule and take their share of each batch ([`rank_share`]).

    Args:
        tags (`Sequence[str]`):
            Tag of each row.
        batch_size (`int`):
            How many prompts a rollout has over all ranks.
        curriculum ([`TagCurriculum`], *optional*):
            Order of the tags; random by default.
        stratified (`bool`, *optional*, defaults to `True`):
            One tag per batch. Otherwise rows are taken in random order, whatever their tags.
        granularity (`str`, *optional*, defaults to `"epoch"`):
            `"epoch"`: the curriculum orders all batches of an epoch; `"cycle"`: it orders rounds of one batch per tag.
        leftover (`str`, *optional*, defaults to `"fill"`):
            A tag's last rows that are fewer than a batch: `"fill"` takes further rows of the same tag again, `"mixed"`
            puts those of all tags together at the end of the epoch, where only the last batch is filled.
        shuffle (`bool`, *optional*, defaults to `True`):
            Rows come in random order, another one in each epoch; otherwise in that of the data set.
        seed (`int`, *optional*, defaults to `0`):
            What the order is drawn by. With one stratum it is that of TRL's sampler with the same seed.
        skipped (`Callable`, *optional*):
            Given an epoch (counted from 0), the rows that it leaves out; asked when the epoch begins. An epoch that
            leaves out rows is to be short: its last batches stay short as well, and rows are taken again for
            `multiple_of` alone.
        multiple_of (`int`, *optional*, defaults to `1`):
            What the number of prompts of a batch is made a multiple of, in an epoch that leaves out rows.

    Raises:
        ValueError: for an unknown option or tag, no rows, or a batch size below 1.
    """

    def __init__(
        self,
        tags: Sequence[str],
        batch_size: int,
        curriculum: TagCurriculum | None = None,
        stratified: bool = True,
        granularity: str = "epoch",
        leftover: str = "fill",
        shuffle: bool = True,
        seed: int = 0,
        skipped: Callable[[int], Collection[int]] = lambda epoch: (),
        multiple_of: int = 1,
    ):
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        if leftover not in LEFTOVERS:
            raise ValueError(f"leftover must be one of {', '.join(LEFTOVERS)}, got {leftover!r}")
        if batch_size < 1 or not len(tags):
            raise ValueError(f"a schedule needs rows and a batch size of at least 1, got {len(tags)} and {batch_size}")
        self.tags = [ModalityTag.parse(tag) for tag in tags]
        self.batch_size = batch_size
        self.curriculum = curriculum or TagCurriculum()
        self.stratified = stratified
        self.granularity = granularity
        self.leftover = leftover
        self.shuffle = shuffle
        self.seed = seed
        self.multiple_of = multiple_of
        self._skipped = skipped
        self._position = _Position()
        self._queues: dict[str, list[int]] = {}

    # What is to come

    @property
    def epoch(self) -> int:
        """The epoch of the last batch, counted from 0; -1 before the first."""
        return self._position.epoch

    @property
    def exhausted(self) -> bool:
        """Whether every row of this epoch has been handed out."""
        return not any(self._left(stratum) for stratum in self._queues)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch that leaves out no row; no epoch has more."""
        sizes = [len(rows) for rows in self._strata(range(len(self.tags))).values()]
        if self.leftover == "mixed":
            sizes = [sum(sizes)]
        return sum(-(-size // self.batch_size) for size in sizes)

    def next_batch(self) -> PromptBatch:
        """Return the prompts of the next rollout; begin the next epoch when this one has no rows left."""
        if self.exhausted:
            self._begin_epoch()
        while True:
            if not self._position.upcoming:
                self._position.upcoming = self._next_round()
            stratum = self._position.upcoming.pop(0)
            if self._batches_left(stratum):  # refilling may have taken the rows of a planned batch
                rows = self.draw(stratum, self.batch_size)
                return self._filled(rows, stratum)

    def draw(self, stratum: str, count: int, multiple_of: int = 1) -> list[int]:
        """
        Take further rows of a stratum out of this epoch.

        Args:
            stratum (`str`): a tag; any other name takes rows of all.
            count (`int`): how many rows; fewer when there are no more.
            multiple_of (`int`, *optional*, defaults to `1`): what their number is rounded down to a multiple of.
        """
        count = min(count, self._left(stratum))
        count -= count % multiple_of
        rows: list[int] = []
        for name in [stratum] if stratum in self._queues else list(self._queues):
            used = self._position.used[name]
            taken = self._queues[name][used : used + count - len(rows)]
            self._position.used[name] += len(taken)
            rows += taken
        return rows

    def peek(self) -> PromptBatch | None:
        """Return what [`next_batch`] would give now, without taking it; `None` when the epoch has no rows left."""
        if self.exhausted:
            return None
        position = deepcopy(self._position)
        try:
            return self.next_batch()
        finally:
            self._position = position

    # Epochs and rounds

    def _begin_epoch(self) -> None:
        epoch = self._position.epoch + 1
        skipped = sorted(set(self._skipped(epoch)))
        if len(skipped) == len(self.tags):
            logger.warning("No prompt is left to visit: epoch %d visits all again", epoch)
            skipped = []
        self._position = _Position(epoch=epoch, skipped=skipped)
        self._fill_queues()
        self._position.used = dict.fromkeys(self._queues, 0)

    def _fill_queues(self) -> None:
        order = list(range(len(self.tags)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(self.epoch + 1):  # an order per epoch from one stream, as TRL's sampler draws them
                order = torch.randperm(len(self.tags), generator=generator).tolist()
        left_out = set(self._position.skipped)
        self._queues = self._strata(row for row in order if row not in left_out)

    def _strata(self, rows: Iterable[int]) -> dict[str, list[int]]:
        """Group rows by stratum, in canonical order of the tags."""
        strata: dict[str, list[int]] = defaultdict(list)
        for row in rows:
            strata[self.tags[row].value if self.stratified else MIXED].append(row)
        return {name: strata[name] for name in (*(tag.value for tag in ModalityTag), MIXED) if name in strata}

    def _left(self, stratum: str) -> int:
        if stratum in self._queues:
            return len(self._queues[stratum]) - self._position.used[stratum]
        return sum(map(self._left, self._queues))

    def _batches_left(self, stratum: str) -> int:
        """Count the batches that a stratum still gives; its last rows count as one where they are filled up."""
        whole, rest = divmod(self._left(stratum), self.batch_size)
        filled = self.leftover == "fill" or stratum == MIXED
        return whole + (rest > 0 and filled)

    def _next_round(self) -> list[str]:
        """Choose the strata of the batches to come: of the whole epoch, or of one cycle."""
        position = self._position
        draw = random.Random(f"{self.seed} round {position.epoch} {position.rounds}")
        position.rounds += 1
        counts = {stratum: self._batches_left(stratum) for stratum in self._queues}
        counts = {stratum: count for stratum, count in counts.items() if count}
        if not counts:
            return [MIXED]
        if not self.stratified:
            return [MIXED] * counts[MIXED]
        order = [tag.value for tag in self.curriculum.order(counts, draw)]
        if self.granularity == "cycle":
            return order
        batches = [stratum for stratum in order for _ in range(counts[stratum])]
        if self.curriculum.strategy not in FIXED_CURRICULA:
            return batches
        if self.shuffle:
            draw.shuffle(batches)
        elif self.curriculum.strategy == "none":
            batches = self._in_order_of_rows(counts)
        return sorted(batches, key=len) if self.curriculum.strategy == "static" else batches

    def _in_order_of_rows(self, counts: dict[str, int]) -> list[str]:
        """Return the strata of the batches, each where its first row stands in the data set."""
        starts = [
            (self._queues[stratum][self._position.used[stratum] + i * self.batch_size], stratum)
            for stratum, count in counts.items()
            for i in range(count)
        ]
        return [stratum for _, stratum in sorted(starts)]

    def _filled(self, rows: list[int], stratum: str) -> PromptBatch:
        """Fill up the batch with rows of its stratum that this epoch visits anyway."""
        missing = -len(rows) % self.multiple_of if self._position.skipped else self.batch_size - len(rows)
        names = [stratum] if stratum in self._queues else list(self._queues)
        others = [row for name in names for row in self._queues[name] if row not in rows] if missing else []
        draw = random.Random(f"{self.seed} fill {self.epoch} {stratum}")
        again = draw.sample(others, min(missing, len(others)))
        while len(again) < missing:
            again += rows[: missing - len(again)]
        return PromptBatch(rows + again, stratum, missing)

    @property
    def rows_left_out(self) -> list[int]:
        """Rows that the current epoch does not visit."""
        return self._position.skipped

    # State

    def metrics(self) -> dict[str, float]:
        """Return the epoch, and how many rows it leaves out."""
        return {"schedule/epoch": float(self.epoch), "schedule/skipped_rows": float(len(self._position.skipped))}

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule stands, and a digest of what it goes through, ready for JSON."""
        return {"content": self._content(), **vars(deepcopy(self._position))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continue from the `state` of a schedule of the same rows and options.

        Raises:
            ValueError: when the state is that of a schedule of other rows or options.
        """
        position = dict(state)
        if position.pop("content") != self._content():
            raise ValueError("the rows, their tags, the seed or the batching differ from those of the checkpoint")
        self._position = _Position(**position)
        if self.epoch >= 0:
            self._fill_queues()

    def _content(self) -> str:
        options = (self.batch_size, self.stratified, self.leftover, self.shuffle, self.seed)
        return hashlib.sha256(f"{options} {' '.join(self.tags)}".encode()).hexdigest()


def rank_share(rows: Sequence[int], copies: int, rank: int, world: int) -> list[int]:
    """
    Return the rows that one rank generates for, each prompt `copies` times in a row, as TRL's sampler deals them out.

    Args:
        rows (`Sequence[int]`): those of the batch, over all ranks.
        copies (`int`): completions of a prompt.
        rank (`int`): which rank, counted from 0.
        world (`int`): number of ranks.

    Raises:
        ValueError: when the copies cannot be shared equally.
    """
    total = len(rows) * copies
    if total % world:
        raise ValueError(f"{total} completions cannot be shared by {world} ranks equally")
    size = total // world
    return [rows[i // copies] for i in range(rank * size, (rank + 1) * size)]
