"""How far what sampled completions is from what is trained."""

from __future__ import annotations

import torch
from torch import Tensor


def raw_ratios(logps_NT: Tensor, sampled_NT: Tensor, mask_NT: Tensor, sequences: bool) -> Tensor:
    """
    Return the importance ratios of completions, trained to sampling policy (MAPLE 4.1), before anything is cut from them.

    Args:
        logps_NT (`Tensor` of shape (N, T)): log-probabilities of the trained policy; NaN where they are unknown.
        sampled_NT (`Tensor` of shape (N, T)): those with which the tokens were sampled; NaN where they are unknown.
        mask_NT (`Tensor` of shape (N, T)): which tokens count.
        sequences (`bool`): of whole completions, the products of their tokens' ratios, else of each token.

    Returns:
        `Tensor` of shape (N, T), or (N, 1) for sequences; NaN where there is none.
    """
    counted = mask_NT.bool() & ~(logps_NT - sampled_NT).isnan()
    difference = torch.where(counted, logps_NT - sampled_NT, 0.0).double()
    if sequences:
        return difference.sum(dim=1, keepdim=True).exp().masked_fill(~counted.any(dim=1, keepdim=True), torch.nan)
    return difference.exp().masked_fill(~counted, torch.nan)


def summarise_ratios(ratios_NT: Tensor, low: float | None, high: float | None) -> Tensor:
    """
    Summarise each completion's ratios (those of MAPLE 4.1, see [`raw_ratios`]).

    Args:
        ratios_NT (`Tensor` of shape (N, T)): NaN where there is none.
        low (`float`, *optional*): the lower limit that they are cut or masked by; `None`: there is none.
        high (`float`, *optional*): the upper limit; `None`: there is none.

    Returns:
        `Tensor` of shape (N, 5): number, sum, smallest, largest, and number of those beyond the limits.
    """
    known = ~ratios_NT.isnan()
    beyond = (ratios_NT < (-torch.inf if low is None else low)) | (ratios_NT > (torch.inf if high is None else high))
    columns = [
        known.sum(dim=1),
        ratios_NT.nansum(dim=1),
        ratios_NT.nan_to_num(nan=torch.inf).amin(dim=1),
        ratios_NT.nan_to_num(nan=-torch.inf).amax(dim=1),
        beyond.sum(dim=1),
    ]
    return torch.stack([column.double() for column in columns], dim=1)
