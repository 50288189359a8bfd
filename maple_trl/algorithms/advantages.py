"""Advantages of completions under several choices of baseline and scale (MAPLE, arXiv 2602.11596, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maple_trl import Registry
from maple_trl.modalities import ModalityTag


Scope = Callable[[Tensor, Tensor, Tensor, float], Tensor]
SCOPES: Registry[Scope] = Registry("advantage scope", "maple_trl.scopes")
"""
Pure functions `(rewards_N, prompts_N, tags_N, eps) -> advantages_N` by name: float64 rewards of all completions that have
one, and for each the number of its prompt (equal within a group) and the position of its tag in `list(ModalityTag)`.
"""
register_scope = SCOPES.register


def group_advantages(
    rewards_N: Tensor,
    prompt_ids_N: Tensor | Sequence[int],
    tags_N: Tensor | Sequence[ModalityTag | str],
    scope: str = "tag",
    eps: float = 1e-4,
) -> Tensor:
    """
    Compute how much better than expected each completion of a generation batch is.

    With q the prompt of a completion, M its tag and B the batch:

    | scope | advantage | source |
    | --- | --- | --- |
    | `group` | (r - mean_q) / (std_q + eps) | GRPO; MAPLE Table 7 |
    | `tag` | (r - mean_q) / (std_M + eps) | MAPLE 4.1, a prompt's own baseline scaled within its tag |
    | `tag_whitened` | (r - mean_M) / (std_M + eps) | MAPLE 4.1 and Algorithm 2, read literally |
    | `batch` | (r - mean_B) / (std_B + eps) | MAPLE 4.1, the estimator that ignores tags, read literally |

    Standard deviations are unbiased, and 0 where there are fewer than two rewards. They are those of the rewards
    given, so pass the completions of all ranks.

    Args:
        rewards_N: shape (N,). NaN marks a completion that no reward function could score: its advantage is 0, and
            it counts in no mean and no standard deviation.
        prompt_ids_N: shape (N,); completions of one prompt share a number; any order.
        tags_N: shape (N,); tags in any spelling, or an integer tensor of positions in `list(ModalityTag)`.
        scope: one of `SCOPES`; a further one is a function with [`register_scope`].
        eps: added to each standard deviation, in units of the reward; TRL's value.

    Returns:
        float32 tensor of shape (N,) on the device of the rewards.

    Raises:
        ValueError: for an unknown scope, one that does not give a number for each completion, arguments of different
            lengths, an infinite reward, or a bad tag.
    """
    scaled = SCOPES.find(scope)
    if rewards_N.dim() != 1 or not len(rewards_N) == len(prompt_ids_N) == len(tags_N):
        raise ValueError(
            f"Expected one prompt and one tag per reward, got rewards of shape {tuple(rewards_N.shape)}, "
            f"{len(prompt_ids_N)} prompts and {len(tags_N)} tags"
        )
    if rewards_N.isinf().any():
        raise ValueError(f"Reward {int(rewards_N.isinf().nonzero()[0])} of the batch is infinite")
    device = rewards_N.device
    # In float64 the mean of equal float32 rewards is exactly that reward, so their advantages are exactly 0.
    rewards_N = rewards_N.double()
    scorable_N = ~rewards_N.isnan()
    prompts_N = torch.as_tensor(prompt_ids_N, device=device).unique(return_inverse=True)[1]
    tags_N = _tag_positions(tags_N).to(device)
    given_M = rewards_N[scorable_N]
    found_M = torch.as_tensor(scaled(given_M, prompts_N[scorable_N], tags_N[scorable_N], eps)).to(given_M)
    if found_M.shape != given_M.shape or not found_M.isfinite().all():
        raise ValueError(
            f"The advantage scope {scope!r} must give a finite number for each of {len(given_M)} completions, got {found_M}"
        )
    return torch.zeros_like(rewards_N).masked_scatter(scorable_N, found_M).float()


def lifts_equal_rewards(scope: str) -> bool:
    """Try whether completions of a prompt that were all rewarded alike have an advantage other than 0 beside others."""
    rewards, prompts, tags = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 0.0]), [0, 0, 1, 1, 2, 2], [*"VVVVAA"]
    return bool(group_advantages(rewards, prompts, tags, scope)[:2].any())


@register_scope("group")
def scale_within_prompts(rewards_N: Tensor, prompts_N: Tensor, tags_N: Tensor, eps: float) -> Tensor:
    """Take mean and deviation of the prompt."""
    return _scaled(rewards_N, prompts_N, prompts_N, eps)


@register_scope("tag")
def scale_within_tags(rewards_N: Tensor, prompts_N: Tensor, tags_N: Tensor, eps: float) -> Tensor:
    """Take the mean of the prompt, the deviation of the tag."""
    return _scaled(rewards_N, prompts_N, tags_N, eps)


@register_scope("tag_whitened")
def whiten_tags(rewards_N: Tensor, prompts_N: Tensor, tags_N: Tensor, eps: float) -> Tensor:
    """Take mean and deviation of the tag."""
    return _scaled(rewards_N, tags_N, tags_N, eps)


@register_scope("batch")
def whiten_batch(rewards_N: Tensor, prompts_N: Tensor, tags_N: Tensor, eps: float) -> Tensor:
    """Take mean and deviation of all."""
    batch_N = torch.zeros_like(prompts_N)
    return _scaled(rewards_N, batch_N, batch_N, eps)


def _scaled(rewards_N: Tensor, baseline_N: Tensor, scale_N: Tensor, eps: float) -> Tensor:
    return (rewards_N - _moments(rewards_N, baseline_N)[0]) / (_moments(rewards_N, scale_N)[1] + eps)


def _tag_positions(tags: Tensor | Sequence[ModalityTag | str]) -> Tensor:
    known = list(ModalityTag)
    if not isinstance(tags, Tensor):
        return torch.tensor([known.index(ModalityTag.parse(tag)) for tag in tags], dtype=torch.long)
    if tags.is_floating_point() or ((tags < 0) | (tags >= len(known))).any():
        raise ValueError(f"Tags given as a tensor must be integers from 0 to {len(known) - 1}, got {tags.tolist()}")
    return tags.long()


def _moments(values_N: Tensor, groups_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and unbiased standard deviation of each row's group."""
    size = int(groups_N.max()) + 1 if len(groups_N) else 0

    def total(summands_N: Tensor) -> Tensor:
        sums = torch.zeros(size, dtype=torch.float64, device=summands_N.device)
        return sums.index_add_(0, groups_N, summands_N)[groups_N]

    count_N = total(torch.ones_like(values_N))
    mean_N = total(values_N) / count_N
    variance_N = total((values_N - mean_N) ** 2) / (count_N - 1).clamp(min=1)
    return mean_N, variance_N.sqrt()
