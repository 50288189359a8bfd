"""Temporal advantage shaping: how much each token's advantage counts by its place (AVATAR, arXiv 2508.03100, 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


# What is added to a weight of 1 for a lambda of 1, at x from 0 (first token) to 1 (last token).
_CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "parabolic": lambda x: (2 * x - 1) ** 2,
    "uniform": torch.zeros_like,
    "linear_decay": lambda x: 1 - x,
    "linear_incline": lambda x: x,
    "inverse_parabolic": lambda x: 1 - (2 * x - 1) ** 2,
}
SHAPES = tuple(_CURVES)


def tas_weights(mask_NT: Tensor, lam: float, shape: str = "parabolic") -> Tensor:
    """
    Return the factors of the tokens' advantages.

    With L the unmasked tokens of a row and x = t / (L - 1) the place of the t-th of them, counted from 0:

    | shape | weight |
    | --- | --- |
    | `parabolic` | 1 + lambda (2x - 1)^2, AVATAR eq. 6: the first and last tokens count most |
    | `uniform` | 1 |
    | `linear_decay` | 1 + lambda (1 - x) |
    | `linear_incline` | 1 + lambda x |
    | `inverse_parabolic` | 1 + lambda (1 - (2x - 1)^2) |

    The only token of a row has weight 1, whatever lambda and shape. Masked tokens take no place: those before, between
    and after the others change no weight but their own, which is 0.

    Args:
        mask_NT (`Tensor` of shape (N, T)):
            Nonzero where a token counts.
        lam (`float`):
            Lambda, at least 0. AVATAR's text calls a moderate one best; its authors' released settings have 0.3.
        shape (`str`, *optional*, defaults to `"parabolic"`):
            One of `SHAPES`.

    Returns:
        `Tensor` of shape (N, T), float32, on the device of the mask.

    Raises:
        ValueError: for an unknown shape, a mask that is not two-dimensional, or a lambda that is negative or not
            finite.
    """
    if shape not in SHAPES:
        raise ValueError(f"Unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    if mask_NT.dim() != 2:
        raise ValueError(f"Expected a mask of shape (rows, tokens), got shape {tuple(mask_NT.shape)}")
    if not 0 <= lam < math.inf:
        raise ValueError(f"lambda must be a finite number of at least 0, got {lam}")
    counts_NT = mask_NT != 0
    places_NT = counts_NT.cumsum(dim=1) - 1
    lengths_N1 = counts_NT.sum(dim=1, keepdim=True)
    x_NT = places_NT.float() / (lengths_N1 - 1).clamp(min=1)
    weights_NT = torch.where(lengths_N1 > 1, 1 + lam * _CURVES[shape](x_NT), 1.0)
    return weights_NT * counts_NT
