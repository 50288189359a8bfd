"""Stored completions as a batch that is trained on beside the fresh ones of a rollout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from maple_trl.algorithms import Experience
from maple_trl.trainers.common.batch import REPLAYED_KEY, UNSCORABLE_KEY, Batch


def replayed_batch(
    prompts: Sequence[Sequence[int]], experiences: Sequence[Experience | None], like: Batch, pad_id: int
) -> Batch:
    """
    Make a batch of replayed completions, with the fields of a batch of fresh ones.

    Args:
        prompts: tokens of each one's prompt.
        experiences: `None` for a completion that keeps its place and counts for nothing.
        like: the batch of fresh completions.
        pad_id: token that fills rows up.
    """
    device = like["advantages"].device
    rows = []
    for ids, experience in zip(prompts, experiences, strict=True):
        prompt = torch.as_tensor(ids, dtype=like["prompt_ids"].dtype)[None]
        tokens = torch.tensor([pad_id]) if experience is None else experience.completion_ids
        completion = tokens.to(like["completion_ids"].dtype)[None]
        counts = torch.full_like(completion, experience is not None, dtype=like["completion_mask"].dtype)
        rows.append(
            {
                "prompt_ids": prompt,
                "prompt_mask": torch.ones_like(prompt, dtype=like["prompt_mask"].dtype),
                "completion_ids": completion,
                "completion_mask": counts,
                "old_per_token_logps": torch.zeros(1, 1) if experience is None else experience.logps[None],
            }
        )
    batch = Batch({name: value.to(device) for name, value in Batch.concat(rows, pad_id).items()})
    batch["advantages"] = torch.zeros_like(like["advantages"][:1]).expand(len(rows))
    batch[REPLAYED_KEY] = torch.ones(len(rows), dtype=torch.long, device=device)
    if UNSCORABLE_KEY in like:
        batch[UNSCORABLE_KEY] = torch.zeros_like(batch[REPLAYED_KEY])
    logps = batch["old_per_token_logps"]
    # What another engine had sampled is corrected for by the old log-probabilities.
    if "sampling_per_token_logps" in like:
        batch["sampling_per_token_logps"] = logps
    if "importance_sampling_ratio" in like:
        by_token = like["importance_sampling_ratio"].size(1) == like["completion_ids"].size(1)
        batch["importance_sampling_ratio"] = torch.ones_like(logps if by_token else logps[:, :1])
    if "ref_per_token_logps" in like:  # the penalty is on the fresh ones alone
        batch["ref_per_token_logps"] = torch.full_like(logps, torch.nan)
    batch["num_items_in_batch"] = like["num_items_in_batch"]
    return batch
