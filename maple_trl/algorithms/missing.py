"""Rewards that failed: which completions cannot be scored, and what is left of a mean without them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def missing_scores(
    scores_NR: Tensor,
    weights_R: Tensor,
    prompt_ids_N: Tensor | Sequence[int],
    applies_NR: Tensor | None = None,
) -> Tensor:
    """
    Mark the scores that are missing, except those of functions that do not apply to the prompt.

    The rule is of no paper: they reward every completion. TRL would count a missing score as 0.

    A reward function that scored no completion of a prompt does not apply there: the weighted sum of the others is the
    reward. One that scored some of them failed on the rest. Where no function with a weight applies, all of them are
    missing. Functions of weight 0 are never missed.

    Args:
        scores_NR (`Tensor` of shape (N, R)):
            Of each reward function, NaN where it gave none.
        weights_R (`Tensor` of shape (R,)):
            Of the functions in the reward.
        prompt_ids_N (`Tensor` or `Sequence[int]` of shape (N,)):
            Completions of one prompt share a number; any order.
        applies_NR (`Tensor` of shape (N, R), *optional*):
            Where a function is known to apply from other completions of the prompt.

    Returns:
        `Tensor` of shape (N, R), bool. A completion with a missing score is unscorable.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    if scores_NR.dim() != 2 or scores_NR.shape != (len(prompt_ids_N), len(weights_R)):
        raise ValueError(
            f"Expected one prompt per row and one weight per column of the scores, got scores of shape "
            f"{tuple(scores_NR.shape)}, {len(prompt_ids_N)} prompts and {len(weights_R)} weights"
        )
    given_NR = ~scores_NR.isnan()
    prompts_N = torch.as_tensor(prompt_ids_N, device=scores_NR.device).unique(return_inverse=True)[1]
    known_NR = given_NR if applies_NR is None else given_NR | applies_NR.to(given_NR)
    prompts = int(prompts_N.max()) + 1 if len(prompts_N) else 0
    counts_QR = torch.zeros(prompts, scores_NR.size(1), dtype=torch.long, device=scores_NR.device)
    applies_NR = counts_QR.index_add_(0, prompts_N, known_NR.long())[prompts_N] > 0
    weighted_R = (weights_R != 0).to(scores_NR.device)
    applies_NR = applies_NR & weighted_R
    nothing_N = ~applies_NR.any(dim=1, keepdim=True)
    return ~given_NR & weighted_R & (applies_NR | nothing_N)


def left_alone(unscorable_N: Tensor, prompt_ids_N: Tensor) -> Tensor:
    """
    Mark the completions that are the only scorable one among several of their prompt, so that they have no deviation.

    Of no paper, like [`missing_scores`].

    Args:
        unscorable_N (`Tensor` of shape (N,)): bool.
        prompt_ids_N (`Tensor` of shape (N,)): as for [`missing_scores`].

    Returns:
        `Tensor` of shape (N,), bool.
    """
    prompts_N = prompt_ids_N.unique(return_inverse=True)[1]
    everyone_Q = prompts_N.bincount()
    known_Q = prompts_N[~unscorable_N].bincount(minlength=len(everyone_Q))
    return ~unscorable_N & (known_Q == 1)[prompts_N] & (everyone_Q > 1)[prompts_N]


def remaining_scale(counted: float, everything: float) -> float:
    """
    Return the factor from a mean over `everything`, with 0 for what is left out, to the mean over the `counted`.

    0 where nothing is left. Of no paper, like [`missing_scores`]; both are numbers of completions or of tokens.
    """
    return everything / counted if counted else 0.0
