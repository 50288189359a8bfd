"""Which tokens a clipped objective holds back."""

from __future__ import annotations

from torch import Tensor


def clipped_tokens(
    ratio_NT: Tensor, advantages_N: Tensor, low: float | Tensor, high: float | Tensor, surrogate: str
) -> Tensor | None:
    """
    Mark the tokens whose importance ratio lies beyond the bound that counts for the sign of their advantage.

    Args:
        ratio_NT: importance ratios, shape (N, T).
        advantages_N: shape (N,) or (N, T); their sign alone matters.
        low, high: epsilons, numbers or of shape (N, 1). PPO's clipping holds the ratio in `[1 - low, 1 + high]`, CISPO's below `high`.
        surrogate: TRL's `loss_type`.

    Returns:
        bool tensor of shape (N, T), `None` for a surrogate that does not clip.
    """
    advantages_N = advantages_N if advantages_N.dim() == 2 else advantages_N[:, None]
    gains, loses = advantages_N > 0, advantages_N < 0
    if surrogate == "cispo":
        return (ratio_NT > high) & gains
    if surrogate in ("sapo", "vespo"):
        return None
    return (ratio_NT > 1 + high) & gains | (ratio_NT < 1 - low) & loses
