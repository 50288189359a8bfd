"""Difficulty of a tag: how far its rewards are from nearly perfect ones (MAPLE, arXiv 2602.11596, eq. 6 to 9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from maple_trl.modalities import ModalityTag


DIFFICULTIES = ("binary", "continuous")


def bernoulli_kl(p: float, target: float = 100 / 101, eps: float = 1e-6) -> float:
    """
    Return the KL divergence in nats from a share of right answers to a near-perfect one (MAPLE eq. 7 to 9).

    Args:
        p: share of right answers, clipped to [eps, 1 - eps].
        target: the near-perfect share, strictly between 0 and 1; 100/101 is the mean of Beta(100, 1).
        eps: how close to 0 and to 1 the share may come, as its logarithm would be infinite there.

    Raises:
        ValueError: when `p` is no share.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"A share of right answers must be in [0, 1], got {p}")
    p = min(max(p, eps), 1 - eps)
    return p * math.log(p / target) + (1 - p) * math.log((1 - p) / (1 - target))


def beta_histogram_kl(rewards: Tensor | Sequence[float], bins: int = 50, eps: float = 1e-10) -> float:
    """
    Return the KL divergence in nats from the histogram of rewards to the density of Beta(100, 1) (MAPLE eq. 6).

    Both are densities taken at `bins` equal bins of [0, 1], the target `100 x^99` at their centres. Each has `eps`
    added inside the logarithm: the target nearly vanishes at small rewards, where this sets the value (the paper
    gives no number).

    A reward on the border of two bins counts to the upper one, 1 to the last.

    Args:
        rewards: in [0, 1], at least one; a tensor of any shape counts all its values.
        bins: how many bins; the paper takes 50.
        eps: what both densities have added.

    Raises:
        ValueError: when there is no reward, or one is not in [0, 1].
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64).flatten()
    if not len(rewards):
        raise ValueError("The histogram of no rewards is undefined")
    _check_range(rewards)
    # The small shift puts rewards that rounding left just below a border (0.58 * 50 < 29) where they belong.
    positions = (rewards * bins + 1e-4).long().clamp(max=bins - 1)
    density = torch.bincount(positions.cpu(), minlength=bins).double() * bins / len(rewards)
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    target = 100 * centres**99
    return float((density * ((density + eps) / (target + eps)).log()).sum() / bins)


def tag_difficulty(rewards: Tensor | Sequence[float], kind: str) -> float | None:
    """
    Measure the difficulty of one tag by its task rewards: the higher, the harder (MAPLE eq. 6 to 9).

    Args:
        rewards: of one tag's completions, in [0, 1]; a tensor of any shape counts all its values. NaN (no reward function
            could score it) is left out.
        kind: `"binary"` ([`bernoulli_kl`] of the share of rewards equal to 1) or `"continuous"`
            ([`beta_histogram_kl`]).

    Returns:
        The divergence in nats, `None` when no reward is left.

    Raises:
        ValueError: for an unknown kind or a reward that is not in [0, 1].
    """
    if kind not in DIFFICULTIES:
        raise ValueError(f"Unknown difficulty {kind!r}; choose one of {', '.join(DIFFICULTIES)}")
    rewards = torch.as_tensor(rewards, dtype=torch.float64).flatten()
    rewards = rewards[~rewards.isnan()]
    _check_range(rewards)
    if not len(rewards):
        return None
    if kind == "binary":
        return bernoulli_kl(float((rewards == 1).double().mean()))
    return beta_histogram_kl(rewards)


def values_by_tag(values: Mapping[ModalityTag | str, float]) -> dict[ModalityTag, float]:
    """
    Return finite numbers by tag, in canonical order.

    Raises:
        ValueError: for a bad tag, two spellings of the same tag, or a number that is not finite.
    """
    parsed: dict[ModalityTag, float] = {}
    for spelling, value in values.items():
        tag = ModalityTag.parse(spelling)
        if tag in parsed:
            raise ValueError(f"Tag {tag} is given twice")
        if not math.isfinite(value):
            raise ValueError(f"The value of tag {tag} must be finite, got {value}")
        parsed[tag] = float(value)
    return {tag: parsed[tag] for tag in ModalityTag if tag in parsed}


def _check_range(rewards: Tensor) -> None:
    # Written so that NaN is out of range too.
    wrong = ~((rewards >= 0) & (rewards <= 1))
    if wrong.any():
        raise ValueError(
            f"Difficulty needs task rewards in [0, 1], got {float(rewards[wrong][0])}; let `task_reward` name a "
            "reward function that returns such values (1 for a right answer)"
        )
