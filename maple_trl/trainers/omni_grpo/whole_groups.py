"""Rewards that compare the completions of a group are called with all of them, whichever ranks hold them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object
from trl.trainer.utils import is_async_callable

from maple_trl.modalities import MEDIA_COLUMNS


# What a prompt's key tells apart. The others of a group have the same, which may be large, so that it is not sent.
_IN_THE_KEY = ("prompts", *MEDIA_COLUMNS)
# These are TRL's also where a column of the data set is called so.
_NO_COLUMNS = ("trainer_state", "log_metric")


@dataclass(frozen=True)
class WholeGroups:
    """
    All completions of the groups that this rank has a part in.

    Attributes:
        rows: what a reward function is told of each, by argument, in the order of the ranks.
        own: which of them are this rank's.
    """

    rows: list[dict[str, Any]]
    own: list[int]

    @classmethod
    def gathered(cls, rows: Sequence[dict[str, Any]], keys: Sequence[Hashable] | None, rank: int) -> WholeGroups:
        """
        Gather what other ranks hold of this rank's groups; a collective call.

        Args:
            rows: what is known of each of this rank's completions; the ranks need not have equally many.
            keys: the group of each; `None` where only the reward functions can tell: then all ranks' completions are gathered.
            rank: of this process.
        """
        named = [None] * len(rows) if keys is None else keys
        holders: dict[Hashable, set[int]] = {}
        for holder, held in enumerate(gather_object([list(named)])):
            for key in held:
                holders.setdefault(key, set()).add(holder)
        shared = {key for key, ranks in holders.items() if len(ranks) > 1}
        if not shared:  # told by all ranks' keys, so that none gathers alone
            return cls(list(rows), list(range(len(rows))))
        left_out = () if keys is None else _IN_THE_KEY
        sent = [
            (key, {name: value for name, value in row.items() if name not in left_out})
            for key, row in zip(named, rows, strict=True)
            if key in shared
        ]
        of_key = {
            key: {name: row[name] for name in left_out if name in row} for key, row in zip(named, rows, strict=True)
        }
        found: list[dict[str, Any]] = []
        own: list[int] = []
        for holder, given in enumerate(gather_object([sent])):
            if holder == rank:
                own = list(range(len(found), len(found) + len(rows)))
                found += rows
            else:
                found += [of_key[key] | row for key, row in given if key in of_key]
        return cls(found, own)

    def called_with(self, reward: Callable) -> Callable:
        """Wrap a reward function, plain or `async`, that TRL calls with this rank's completions: it is called with all."""
        if is_async_callable(reward):

            async def call(**arguments: Any) -> list[Any]:
                return self._part(await reward(**self._whole(arguments)))

        else:

            def call(**arguments: Any) -> list[Any]:
                return self._part(reward(**self._whole(arguments)))

        return call

    def _whole(self, arguments: dict[str, Any]) -> dict[str, Any]:
        log_extra = arguments["log_extra"]

        def log_part(column: str, values: Sequence) -> None:
            log_extra(column, self._part(values))

        columns = {name: [row.get(name) for row in self.rows] for name in arguments if name in self.rows[0]}
        return arguments | columns | {name: arguments[name] for name in _NO_COLUMNS} | {"log_extra": log_part}

    def _part(self, values: Sequence) -> list[Any]:
        return [values[i] for i in self.own]
