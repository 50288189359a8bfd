"""Which tokens a clipped objective holds back."""

from __future__ import annotations

from torch import Tensor


def clipped_tokens(ratio_NT: Tensor, advantages_N: Tensor, low: float, high: float, surrogate: str) -> Tensor | None:
    """
    Mark the tokens whose importance ratio lies beyond the bound that counts for the sign of their advantage.

    Args:
        ratio_NT: importance ratios, shape (N, T).
        advantages_N: shape (N,); their sign alone matters.
        low, high: epsilons. PPO's clipping holds the ratio in `[1 - low, 1 + high]`, CISPO's below `high`.
        surrogate: TRL's `loss_type`.

    Returns:
        bool tensor of shape (N, T), `None` for a surrogate that does not clip.
    """
    gains, loses = advantages_N[:, None] > 0, advantages_N[:, None] < 0
    if surrogate == "cispo":
        return (ratio_NT > high) & gains
    if surrogate in ("sapo", "vespo"):
        return None
    return (ratio_NT > 1 + high) & gains | (ratio_NT < 1 - low) & loses
