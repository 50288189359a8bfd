"""Contrastive reward weighting (MAPLE, arXiv 2602.11596, appendix E.3): a bonus for what a smaller input would not say."""

from __future__ import annotations

from torch import Tensor


def contrastive_rewards(rewards_N: Tensor, similarities_N: Tensor, alpha: float, tau: float) -> Tensor:
    r"""
    Weigh rewards by MAPLE eq. 10: `clip01(r (1 + alpha [s < tau]))`.

    The bonus is for a completion that is far from the one that the policy gives with some of the signals taken away.
    (The paper calls `s` a similarity in one line and a distance in another; what it wants to reward is distance.)

    Args:
        rewards_N (`Tensor` of shape (N,)):
            Rewards in `[0, 1]`; NaN where there is none.
        similarities_N (`Tensor` of shape (N,)):
            How alike completion and deficit completion are, in `[0, 1]`; NaN where there is no deficit completion.
        alpha (`float`):
            How much more a reward counts with the bonus, as a fraction of it; at least 0.
        tau (`float`):
            The similarity below which the bonus is given.

    Returns:
        `Tensor` of shape (N,), in `[0, 1]`: where the similarity is NaN the reward as it was, and NaN where that is NaN.

    Example:
    ```python
    >>> import torch
    >>> from maple_trl.algorithms import contrastive_rewards

    >>> r, s = torch.tensor([0.4, 0.4, 0.9, 0.4]), torch.tensor([0.2, 0.7, 0.2, torch.nan])
    >>> contrastive_rewards(r, s, alpha=0.5, tau=0.6)
    tensor([0.6000, 0.4000, 1.0000, 0.4000])
    ```
    """
    far = similarities_N < tau  # never so for NaN
    return (rewards_N * (1 + alpha * far.to(rewards_N.dtype))).clamp(0, 1)
