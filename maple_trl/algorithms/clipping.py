"""Which tokens a clipped objective holds back."""

from __future__ import annotations

from torch import Tensor


def clipped_tokens(
    ratio_NT: Tensor, advantages_N: Tensor, low: float | Tensor, high: float | Tensor, surrogate: str
) -> Tensor | None:
    """
    Mark the tokens whose importance ratio lies beyond the bound that counts for the sign of their advantage.

    MAPLE 5.2 compares symmetric with asymmetric bounds by the share of these tokens. The bounds are those of PPO
    (arXiv 1707.06347, eq. 7), or of CISPO (arXiv 2506.13585, section 3.1), which bounds from above alone.

    Args:
        ratio_NT: importance ratios, shape (N, T).
        advantages_N: shape (N,) or (N, T); their sign alone matters.
        low: epsilon, a number or of shape (N, 1): PPO's clipping holds the ratio above `1 - low`.
        high: epsilon, a number or of shape (N, 1): PPO's clipping holds the ratio below `1 + high`, CISPO's below `high`.
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
