"""Sampling in which the question and the sample's number decide every draw, whatever else is in the batch."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sample_stream(seed: int, question: str, sample: int, length: int) -> NDArray[np.float64]:
    """
    Draw uniform numbers for one completion, token by token.

    They come from a counter-based generator (Philox, whose raw stream NumPy keeps between versions) whose key is a
    digest of the arguments: no state is carried from one completion to the next, and a longer stream begins with the
    shorter one.

    Args:
        seed: of the evaluation.
        question: the question's name.
        sample: number of the sample of this question, from 0.
        length: how many numbers.

    Returns:
        Of shape (length,), in [0, 1), multiples of 2^-32.
    """
    digest = hashlib.sha256(json.dumps([seed, question, sample]).encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(length)
    return (raw >> np.uint64(32)) / 2**32


class StreamSampler:
    """
    A logits processor for `generate(do_sample=False)` that leaves each row the one token its stream draws.

    The draw inverts the cumulative distribution: the first token at which the summed probability passes the number.
    `torch.multinomial` takes its numbers from one generator for the whole batch, so that a row's completion depends on
    the rows beside it and on all that was sampled before.

    Args:
        streams_NT (`Tensor` of shape (N, T), float64):
            For each row of the batch and new token a number in [0, 1), as of [`sample_stream`].
        prompt_width: tokens of the padded prompts.
    """

    def __init__(self, streams_NT: Tensor, prompt_width: int):
        self.streams_NT = streams_NT
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave each row the token that its stream draws."""
        # In float64, where the sum over a large vocabulary does not round small probabilities away.
        mass_NV = scores.double().softmax(-1).cumsum(-1)
        # The number is at most 1 - 2^-32: the target stays below the whole mass, and a token of probability 0, where the
        # sum does not grow, is never the first to pass it.
        self.streams_NT = self.streams_NT.to(mass_NV.device)  # once
        number_N = self.streams_NT[:, input_ids.size(1) - self.prompt_width]
        chosen_N1 = torch.searchsorted(mass_NV, (number_N * mass_NV[:, -1])[:, None], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_N1, 0.0)
