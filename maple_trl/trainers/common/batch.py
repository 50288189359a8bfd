"""What a rank trains on: completions with their prompts, a row each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from maple_trl.omni.encoded import EncodedPrompt


PROMPTS_KEY = "omni_prompts"
UNSCORABLE_KEY = "unscorable"
SCALE_KEY = "loss_scale"
TAG_KEY = "tag_numbers"
REPLAYED_KEY = "replayed"
NUMBER_KEY = "completion_numbers"
FRESH_SCALE_KEY = "fresh_scale"

# TRL takes the logarithm of ratios, and adds up those of padding too (`loss_type="vespo"`).
_FILLERS = {"importance_sampling_ratio": 1}


class Batch(dict[str, Any]):
    """
    Completions of one rank as TRL's loss takes them.

    Tensors and lists have an entry per row; values of the whole batch are 0-d.

    | key | shape | holds |
    | --- | --- | --- |
    | `prompt_ids`, `prompt_mask` | (N, P) | padded on the left |
    | `completion_ids`, `completion_mask` | (N, T) | padded on the right; the mask is 0 for what does not count |
    | `advantages` | (N,) or (N, T) | of a row or of each token, with the weights of the loss folded in |
    | `old_per_token_logps`, `ref_per_token_logps` | (N, T) | where they are known; NaN stands for what the training pass gives |
    | `sampling_per_token_logps` | (N, T) | with which another engine sampled the tokens |
    | `importance_sampling_ratio` | (N, T) or (N, 1) | what TRL makes of the difference of the two |
    | `num_items_in_batch` | 0-d | tokens of all ranks |
    | `omni_prompts` | N | [`EncodedPrompt`]s; absent for a text-only model |
    | `unscorable`, `replayed` | (N,) | flags |
    | `tag_numbers` | (N,) | the tag that a row counts for, as a number |
    | `completion_numbers` | (N,) | counted over the run |
    | `loss_scale` | (N,) | factor of the KL penalty, which is in the same mean; 0 where nothing counts |
    | `fresh_scale` | (N,) | factor of the KL penalty, which is on fresh completions alone |
    """

    @property
    def prompts(self) -> list[EncodedPrompt] | None:
        """Prompt of each row; `None` for a text-only model."""
        return self.get(PROMPTS_KEY)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return next(len(value) for value in self.values() if isinstance(value, Tensor) and value.ndim)

    def take(self, order: Sequence[int]) -> Batch:
        """Return the given rows, in the given order."""
        index = torch.tensor(order, dtype=torch.long)

        def take(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim:
                return value[index.to(value.device)]
            return [value[i] for i in order] if isinstance(value, list) else value

        return Batch({name: take(value) for name, value in self.items()})

    def split(self, sizes: Sequence[int]) -> list[Batch]:
        """Split the rows, in order, into parts of the given sizes."""
        return [self.take(range(end - size, end)) for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def regroup(self, steps: Sequence[int] | None = None) -> Batch:
        """
        Put rows of one prompt next to each other.

        Prompts come in the order in which the shuffle met them first; those with fewer rows here come last, so that
        the others begin where micro-batches do. No further random number is drawn, so that the random stream stays
        TRL's.

        Args:
            steps: rows of each optimizer step. Where given, prompts are dealt out to the steps, so that those with many rows
                and those with few are in each.
        """
        rows_of: dict[int, list[int]] = {}
        for i, prompt in enumerate(self[PROMPTS_KEY]):
            rows_of.setdefault(id(prompt), []).append(i)
        dealt: list[list[int]] = [[] for _ in steps or (0,)]
        room = list(steps or (self.rows,))
        for rows in sorted(rows_of.values(), key=len, reverse=True):
            while rows:
                step = max(range(len(room)), key=room.__getitem__)
                fitting, rows = rows[: room[step]], rows[room[step] :]
                dealt[step] += fitting
                room[step] -= len(fitting)
        return self.take([i for rows in dealt for i in rows])

    @classmethod
    def merge(cls, chunks: Sequence[Batch]) -> Batch:
        """Join micro-batches of one width into one batch; values of the whole batch are those of the first."""
        return cls.concat(chunks, pad_token_id=0)

    @classmethod
    def concat(cls, batches: Sequence[Batch], pad_token_id: int) -> Batch:
        """
        Join the rows of several batches, padded as TRL pads: prompts on the left, completions on the right.

        Values of the whole batch are those of the first.
        """
        joined = cls()
        for name, first in batches[0].items():
            values = [batch[name] for batch in batches]
            if isinstance(first, list):
                joined[name] = [item for value in values for item in value]
            elif not isinstance(first, Tensor) or not first.ndim:
                joined[name] = first
            elif first.ndim == 1:
                joined[name] = torch.cat(values)
            else:
                width = max(value.size(1) for value in values)
                filler = pad_token_id if name.endswith("_ids") else _FILLERS.get(name, 0)
                left = name.startswith("prompt_")
                joined[name] = torch.cat([_widened(value, width, filler, left) for value in values])
        return joined


def _widened(rows: Tensor, width: int, filler: int, left: bool) -> Tensor:
    missing = width - rows.size(1)
    return torch.nn.functional.pad(rows, (missing, 0) if left else (0, missing), value=filler)
