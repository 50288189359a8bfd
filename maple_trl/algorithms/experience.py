"""A completion that may be replayed, in memory and in files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor


_COLUMNS = pa.schema(
    {
        "prompt": pa.string(),
        "row": pa.int64(),
        "reward": pa.float64(),
        "step": pa.int64(),
        "hinted": pa.bool_(),
        "tier": pa.string(),
        "rewards": pa.map_(pa.string(), pa.float64()),
    }
)


@dataclass(frozen=True, eq=False)
class Experience:
    """
    A completion that may be replayed, with what importance sampling needs (AVATAR 4.1).

    Args:
        prompt (`str`):
            Key of the prompt: what the baseline is kept by, and a reference to what it shows, never that itself.
        row (`int`):
            Its row of the data set.
        completion_ids (`Tensor` or array of shape (L,)):
            Token ids, without padding, at least one. Copied to the CPU as int32.
        logps (`Tensor` or array of shape (L,)):
            Log-probability of each token under the policy that wrote it. Copied to the CPU as float32: a ratio to a
            policy that has not moved since is then exactly 1, which half precision would round away.
        reward (`float`):
            The reward that it was trained with. A completion without a reward (NaN) cannot be replayed.
        step (`int`):
            Optimizer step of the policy that wrote it.
        hinted (`bool`, *optional*, defaults to `False`):
            Whether the prompt held its hint.
        rewards (`Mapping[str, float]`, *optional*):
            The reward of each function; NaN is allowed.

    Raises:
        ValueError: when tokens and log-probabilities are not equally many, or some value is none that a completion can
            have.
    """

    prompt: str
    row: int
    completion_ids: Tensor
    logps: Tensor
    reward: float
    step: int
    hinted: bool = False
    rewards: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        ids, logps = torch.as_tensor(self.completion_ids), torch.as_tensor(self.logps)
        if ids.dim() != 1 or ids.shape != logps.shape or not len(ids):
            raise ValueError(
                f"Expected at least one token id and as many log-probabilities for prompt {self.prompt!r}, "
                f"got shapes {tuple(ids.shape)} and {tuple(logps.shape)}"
            )
        if ids.is_floating_point() or int(ids.min()) < 0:
            raise ValueError(f"Token ids of prompt {self.prompt!r} must be integers of at least 0")
        # Copies: a view would keep the whole batch in memory that the completion was cut out of.
        ids = ids.detach().to("cpu", torch.int32, copy=True)
        logps = logps.detach().to("cpu", torch.float32, copy=True)
        if not logps.isfinite().all():
            raise ValueError(f"A log-probability of prompt {self.prompt!r} is not finite")
        reward = float(self.reward)
        if not math.isfinite(reward):
            raise ValueError(f"The reward of an experience must be finite, got {reward} for prompt {self.prompt!r}")
        rewards = self.rewards and {name: float(value) for name, value in self.rewards.items()}
        values: dict[str, Any] = {"row": int(self.row), "step": int(self.step), "hinted": bool(self.hinted)}
        values |= {"reward": reward, "completion_ids": ids, "logps": logps, "rewards": rewards or None}
        for name, value in values.items():
            object.__setattr__(self, name, value)


_EXPERIENCE_BYTES = 3 << 10  # of objects; measured


def experience_bytes(tokens: int) -> int:
    """Return about what a stored completion of so many tokens takes of memory."""
    return _EXPERIENCE_BYTES + 8 * tokens


# Files


def as_tensors(experiences: Sequence[Experience]) -> dict[str, Tensor]:
    """Join the tokens of some completions, and note the length of each."""
    return {
        "completion_ids": torch.cat([e.completion_ids for e in experiences]),
        "logps": torch.cat([e.logps for e in experiences]),
        "lengths": torch.tensor([len(e.completion_ids) for e in experiences]),
    }


def as_table(tiers: Sequence[str], experiences: Sequence[Experience]) -> pa.Table:
    """Return all of some completions but their tokens, each with the tier that it is filed in."""
    fields = ("prompt", "row", "reward", "step", "hinted")
    columns: dict[str, list[Any]] = {name: [getattr(e, name) for e in experiences] for name in fields}
    columns |= {"tier": list(tiers), "rewards": [e.rewards and list(e.rewards.items()) for e in experiences]}
    return pa.table(columns, schema=_COLUMNS)


def read_experiences(table: Path, tensors: Sequence[Path]) -> list[tuple[str, Experience]]:
    """Read the files of [`as_table`] and of one [`as_tensors`] after the other: completions, each with its tier."""
    rows = pq.read_table(table, schema=_COLUMNS).to_pylist()
    entries: list[tuple[str, Experience]] = []
    for path in tensors:
        shard = load_file(path)
        lengths = shard["lengths"].tolist()
        for ids, logps in zip(shard["completion_ids"].split(lengths), shard["logps"].split(lengths), strict=True):
            row = rows[len(entries)]
            tier, rewards = row.pop("tier"), row.pop("rewards")
            entries.append(
                (tier, Experience(**row, completion_ids=ids, logps=logps, rewards=rewards and dict(rewards)))
            )
    return entries
