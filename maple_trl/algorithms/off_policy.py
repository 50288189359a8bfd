"""Arithmetic of groups that mix fresh and replayed completions (AVATAR, arXiv 2508.03100, 4.1 and 4.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maple_trl.algorithms.replay_draws import SAME_REWARD


def replayed_slots(wanted: Sequence[int], group_size: int, ranks: int = 1) -> list[bool]:
    """
    Choose which completions of a batch are replayed instead of generated (AVATAR 4.1: 4 of the 8 of each group).

    Completions are numbered group by group, and dealt to the ranks in equal, contiguous shares. As ranks generate
    together and wait for each other, all get the same number of replayed ones: the smallest that one of them has.
    A group's replayed completions are spread evenly over its places, so that it is the same to each rank that holds a
    part of it.

    Args:
        wanted (`Sequence[int]`):
            Replayed completions that each group is to have, from 0 to `group_size`.
        group_size (`int`):
            Completions of a group.
        ranks (`int`, *optional*, defaults to `1`):
            Number of ranks, which divides the number of completions.

    Returns:
        `list[bool]`: for each completion whether it is replayed. A group has at most as many as it is to have.

    Raises:
        ValueError: when the completions cannot be shared equally, or a group is to have more than it has places.
    """
    if len(wanted) * group_size % ranks:
        raise ValueError(f"{len(wanted)} groups of {group_size} cannot be shared by {ranks} ranks equally")
    if any(not 0 <= count <= group_size for count in wanted):
        raise ValueError(f"A group of {group_size} cannot hold {list(wanted)} replayed completions")
    slots = [
        (place + 1) * count // group_size > place * count // group_size
        for count in wanted
        for place in range(group_size)
    ]
    share = len(slots) // ranks
    shares = [slots[start : start + share] for start in range(0, len(slots), share)] if slots else []
    fewest = min(map(sum, shares), default=0)
    return [replayed for own in shares for replayed in _keep_first(own, fewest)]


def _keep_first(flags: Sequence[bool], count: int) -> list[bool]:
    kept = []
    for flag in flags:
        kept.append(flag and count > 0)
        count -= flag
    return kept


def replay_advantages(rewards_N: Tensor, baselines_N: Tensor, limit: float | None = None, eps: float = 1e-4) -> Tensor:
    """
    Return the advantages of replayed completions: (r - Rbar) / (sd_off + eps), AVATAR eq. 11.

    Rbar is the moving average of the prompt's on-policy rewards, sd_off the unbiased standard deviation of the rewards
    given. Where all of these are equal they have no scale, and r - Rbar is returned as it is: divided by eps alone it
    would be thousands.

    Args:
        rewards_N (`Tensor` of shape (N,)):
            Rewards of the replayed batch, over all ranks.
        baselines_N (`Tensor` of shape (N,)):
            The moving average reward of each one's prompt.
        limit (`float`, *optional*):
            Advantages are cut to [-limit, limit]. Nearly equal rewards far from their baselines would exceed it.
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation, in units of the reward.

    Returns:
        `Tensor` of shape (N,), float32, on the device of the rewards.

    Raises:
        ValueError: for shapes that differ, a value that is not finite, or a limit that is not positive.
    """
    if rewards_N.dim() != 1 or rewards_N.shape != baselines_N.shape:
        raise ValueError(
            f"Expected one baseline per reward, got shapes {tuple(rewards_N.shape)} and {tuple(baselines_N.shape)}"
        )
    if not (rewards_N.isfinite().all() and baselines_N.isfinite().all()):
        raise ValueError("Rewards and baselines of replayed completions must be finite")
    if limit is not None and limit <= 0:
        raise ValueError(f"The limit of an advantage must be positive, got {limit}")
    rewards_N = rewards_N.double()
    advantages_N = rewards_N - baselines_N.to(rewards_N)
    if len(rewards_N) and rewards_N.max() - rewards_N.min() > SAME_REWARD:
        advantages_N = advantages_N / (rewards_N.std() + eps)
    return (advantages_N if limit is None else advantages_N.clamp(-limit, limit)).float()


def term_scales(fresh: float, replayed: float, filled: float, alpha: float, lost: float = 0.0) -> tuple[float, float]:
    """
    Return the factors that turn one mean over all completions into J_on + alpha J_off (AVATAR eq. 3).

    J_on is the mean over the fresh completions, J_off that over the replayed ones. Where the buffer could serve only
    a part of those that were asked for, alpha counts by that part: a single replayed completion does not weigh as much
    as all fresh ones together.

    Args:
        fresh (`float`):
            What the mean counts of fresh completions (their number, or that of their tokens), over all ranks.
        replayed (`float`):
            The same of replayed ones.
        filled (`float`):
            Share of the replayed completions asked for that there were, from 0 to 1.
        alpha (`float`):
            Weight of J_off.
        lost (`float`, *optional*, defaults to `0.0`):
            What the mean counts beside them as 0: completions that could not be scored.

    Returns:
        `tuple[float, float]`: the factors of fresh and of replayed completions; 0 for a kind that there is none of.
    """
    everything = fresh + replayed + lost
    return everything / fresh if fresh else 0.0, alpha * filled * everything / replayed if replayed else 0.0


def effective_share(ratios_N: Tensor) -> float:
    """
    Return the effective sample size of importance ratios (Kong 1992) as a share of their number.

    That is (sum w)^2 / (N sum w^2): 1 while all ratios are equal, 1/N when one of them outweighs all others; NaN without
    any.

    Args:
        ratios_N (`Tensor` of shape (N,)): the ratios w of AVATAR eq. 4, not negative.
    """
    ratios_N = ratios_N.double()
    return float(ratios_N.sum() ** 2 / (len(ratios_N) * ratios_N.square().sum()))


def policy_divergence(log_ratios_NT: Tensor) -> Tensor:
    """
    Estimate KL(current policy || behaviour policy), token by token, from tokens that the latter wrote.

    With w the ratio of the current to the behaviour policy, w log w - (w - 1) has that expectation and is never
    negative (Schulman 2020, "Approximating KL divergence"). AVATAR 4.1 calls for a hint where it is low.

    Args:
        log_ratios_NT (`Tensor`): log w of each token, any shape.

    Returns:
        `Tensor` of the same shape, in nats.
    """
    ratios_NT = log_ratios_NT.exp()
    return torch.xlogy(ratios_NT, ratios_NT) - (ratios_NT - 1)
