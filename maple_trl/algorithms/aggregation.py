"""Weights of rows with which a plain sum over tokens is the stratified loss (MAPLE, arXiv 2602.11596, eq. 2 and 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


AGGREGATIONS = ("token", "sample", "prompt")


def stratum_totals(lengths_N: Tensor, strata_N: Tensor, strata: int) -> Tensor:
    """
    Count the rows and tokens of each stratum; totals of ranks or micro-batches can be added up.

    The rows are |B_M| of MAPLE eq. 2, which stratum M is divided by; tokens are what the aggregation by token divides by.

    Args:
        lengths_N: unmasked completion tokens per row, integers of shape (N,).
        strata_N: the stratum of each row, from 0 to `strata - 1`, integers of shape (N,).
        strata: how many strata there are, also those that none of the rows is of.

    Returns:
        int64 tensor of shape (strata, 2): rows, tokens.

    Raises:
        ValueError: for different lengths, a negative number of tokens, or a stratum out of range.
    """
    _check_rows(lengths_N, strata_N, strata)
    totals = torch.zeros(strata, 2, dtype=torch.long, device=lengths_N.device)
    return totals.index_add_(0, strata_N.long(), torch.stack((torch.ones_like(lengths_N), lengths_N), dim=1).long())


def row_coefficients(
    lengths_N: Tensor,
    strata_N: Tensor,
    weights: Mapping[int, float] | None,
    aggregation: str,
    max_length: int,
    totals: Tensor | None = None,
) -> Tensor:
    """
    Return coefficients c such that `sum_i c_i * sum_t loss_it` is `sum_M w_M * (mean of the loss over stratum M)`.

    With B_M the rows of stratum M, T_M their tokens and L_i the tokens of row i, the mean over a stratum is

    - `token`: over all its tokens, c = w_M / T_M;
    - `sample`: over its rows' means over tokens, c = w_M / (|B_M| max(L_i, 1));
    - `prompt`: over its rows' sums divided by a constant, c = w_M / (|B_M| max_length).

    A row without tokens counts in |B_M| and has a finite coefficient. The sum over strata is MAPLE eq. 3 (eq. 2 where
    all weights are 1), the three means are the loss aggregations of MAPLE 5.2.

    Args:
        lengths_N: unmasked completion tokens per row, integers of shape (N,).
        strata_N: the stratum of each row, integers from 0, of shape (N,).
        weights: w_M >= 0 by stratum, 1 where missing.
        aggregation: `"token"`, `"sample"` or `"prompt"`.
        max_length: tokens; read by `prompt` only.
        totals: [`stratum_totals`], of shape (strata, 2), of the whole optimizer batch (all ranks, all micro-batches)
            when the rows given are a share of it. Coefficients of the shares then add up to the loss of the whole.

    Returns:
        float32 tensor of shape (N,) on the device of the lengths.

    Raises:
        ValueError: for an unknown aggregation, bad rows (see [`stratum_totals`]), a negative weight, a `max_length`
            below 1 with `prompt`, or totals that cannot contain the rows given.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"Unknown loss aggregation {aggregation!r}; choose one of {', '.join(AGGREGATIONS)}")
    if aggregation == "prompt" and max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length}")
    weights = weights or {}
    for stratum, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"The weight of stratum {stratum} must not be negative, got {weight}")
    if totals is None:
        present = int(strata_N.max()) + 1 if len(strata_N) else 0
        totals = stratum_totals(lengths_N, strata_N, present)
    else:
        totals = totals.to(lengths_N.device)
        given = stratum_totals(lengths_N, strata_N, len(totals))
        if (given > totals).any():
            raise ValueError(
                f"The rows given hold {given.tolist()} (rows, tokens) per stratum, more than the totals "
                f"{totals.tolist()}; totals must be those of the whole optimizer batch"
            )
    strata_N = strata_N.long()
    weights_M = torch.tensor([float(weights.get(m, 1.0)) for m in range(len(totals))], dtype=torch.float64)
    rows_N, tokens_N = totals.double()[strata_N].unbind(1)
    if aggregation == "token":
        divisor_N = tokens_N.clamp(min=1)
    elif aggregation == "sample":
        divisor_N = rows_N * lengths_N.clamp(min=1)
    else:
        divisor_N = rows_N * max_length
    return (weights_M.to(lengths_N.device)[strata_N] / divisor_N).float()


def _check_rows(lengths_N: Tensor, strata_N: Tensor, strata: int) -> None:
    if lengths_N.dim() != 1 or lengths_N.shape != strata_N.shape:
        raise ValueError(
            f"Expected one length and one stratum per row, got shapes {tuple(lengths_N.shape)} "
            f"and {tuple(strata_N.shape)}"
        )
    if (lengths_N < 0).any():
        raise ValueError(f"Lengths must not be negative, got {lengths_N.tolist()}")
    if ((strata_N < 0) | (strata_N >= strata)).any():
        raise ValueError(f"Strata must be from 0 to {strata - 1}, got {strata_N.tolist()}")
