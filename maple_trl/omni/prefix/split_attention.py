"""
Attention of completions to their prompt and to themselves, as two calls of a fused kernel whose results are merged.

The softmax over two sets of keys follows from that over each and the logarithms of both sums, which the kernels return.
Their backward pass takes such a logarithm to compute weights anew: handed the merged one, with the merged output, it
returns each set's part of the gradients. So no key is repeated, there is no mask, and no pair is looked at in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend


@dataclass(frozen=True)
class Completions:
    """
    A group's completions, and the keys and values of the prompt that they share.

    Attributes:
        states: query of shape (1, heads, S, D), key and value of (1, key heads, S, D) of all S tokens.
        prompt: key and value of shape (1, key heads, P, D).
        sizes: tokens of each completion.
    """

    states: tuple[Tensor, Tensor, Tensor]
    prompt: tuple[Tensor, Tensor]
    sizes: tuple[int, ...]


def can_split(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether there is a fused kernel for these that returns the logarithm of the sums."""
    if query.device.type == "cpu":
        # Of the kernels on CPUs the only one that is fused; the other looks at all pairs at once.
        backend = torch._fused_sdp_choice(query, key, value, enable_gqa=True)
        return backend == SDPBackend.FLASH_ATTENTION.value
    if query.device.type != "cuda" or query.size(-1) % 8:
        return False
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True))


def split_attention(groups: Sequence[Completions], scale: float | None) -> list[Tensor]:
    """Return what each group's completions attend to, (1, heads, S, D): their prompt, and what stands before in them."""
    parts = zip(*(group.states for group in groups), strict=True)
    states = [part[0] if len(groups) == 1 else torch.cat(part, dim=2) for part in parts]
    prompts = [tensor for group in groups for tensor in group.prompt]
    sizes = tuple(group.sizes for group in groups)
    output = _SplitAttention.apply(sizes, scale, *states, *prompts)
    return list(output.split(list(map(sum, sizes)), dim=2))


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, groups, scale, query, key, value, *prompts):  # noqa: ANN001
        sizes = _all_sizes(groups)
        own, own_sum, own_call = _attend(*(stack(states, sizes) for states in (query, key, value)), True, scale)
        own, own_sum = unstack(own, sizes), unstack(own_sum[..., None], sizes)
        shared = [
            _attend(part, *prompt, False, scale) if prompt[0].size(2) else _attend_nothing(part, own_sum.dtype)
            for part, prompt in zip(_spans(query, groups), _pairs(prompts), strict=True)
        ]
        before = torch.cat([output for output, *_ in shared], dim=2)
        before_sum = torch.cat([sums for _, sums, _ in shared], dim=2)[..., None]
        share = torch.sigmoid(before_sum - own_sum)
        output = torch.lerp(own.to(share.dtype), before.to(share.dtype), share).to(query.dtype)
        ctx.groups, ctx.scale, ctx.calls = groups, scale, (own_call, [call for *_, call in shared])
        ctx.save_for_backward(query, key, value, output, torch.logaddexp(before_sum, own_sum), *prompts)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # noqa: ANN001
        query, key, value, output, sums, *prompts = ctx.saved_tensors
        sizes, (own_call, calls) = _all_sizes(ctx.groups), ctx.calls
        stacked = [stack(states, sizes) for states in (gradient, query, key, value, output, sums)]
        own = [unstack(part, sizes) for part in _gradients(*stacked, True, ctx.scale, own_call)]
        found: list[Tensor] = []
        spans = zip(*(_spans(states, ctx.groups) for states in (gradient, query, output, sums)), strict=True)
        for (part, queries, seen, logs), prompt, call in zip(spans, _pairs(prompts), calls, strict=True):
            if prompt[0].size(2):
                found += _gradients(part, queries, *prompt, seen, logs, False, ctx.scale, call)
            else:
                found += [torch.zeros_like(queries), *map(torch.zeros_like, prompt)]
        query_gradient = own[0] + torch.cat(found[::3], dim=2)
        of_prompts = [tensor for pair in zip(found[1::3], found[2::3], strict=True) for tensor in pair]
        return None, None, query_gradient, own[1], own[2], *of_prompts


def _all_sizes(groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(size for sizes in groups for size in sizes)


def _spans(states: Tensor, groups: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    return states.split(list(map(sum, groups)), dim=2)


def _pairs(prompts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(prompts[::2], prompts[1::2], strict=True))


# Kernels, as PyTorch's own context parallelism calls them


def _attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Sequence[Any]]:
    """Return the output, the logarithm of each query's sum, (B, heads, L), and what the backward pass needs beside."""
    if query.device.type == "cpu":
        output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
        return output, sums, ()
    output, sums, *call, _ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, scale=scale
    )
    return output, sums, call


def _attend_nothing(query: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Sequence[Any]]:
    return torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf, dtype=dtype), ()


def _gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    causal: bool,
    scale: float | None,
    call: Sequence[Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of query, key and value; `sums` has the shape (B, heads, L, 1)."""
    states = (gradient, query, key, value, output, sums[..., 0].contiguous())  # the kernels look at no strides of sums
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*states, 0.0, causal, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *states, *call[:4], 0.0, causal, *call[4:], scale=scale
    )


# Completions as a batch


def stack(states: Tensor, sizes: Sequence[int]) -> Tensor:
    """
    Stack completions that stand one after the other, (1, heads, S, D), as (completions, heads, longest, D).

    Shorter ones are filled up with zeros at their end, which under a causal mask no token of theirs sees.
    """
    rows = states[0].transpose(0, 1)
    longest = max(sizes)
    if min(sizes) < longest:
        places = _places(tuple(sizes), states.device)
        rows = rows.new_zeros(len(sizes) * longest, *rows.shape[1:]).index_copy(0, places, rows)
    return rows.unflatten(0, (len(sizes), longest)).transpose(1, 2)


def unstack(stacked: Tensor, sizes: Sequence[int]) -> Tensor:
    """Undo [`stack`]."""
    rows = stacked.transpose(1, 2).flatten(0, 1)
    if min(sizes) < max(sizes):
        rows = rows.index_select(0, _places(tuple(sizes), stacked.device))
    return rows.transpose(0, 1)[None]


@lru_cache(maxsize=16)  # each layer asks for the same
def _places(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where the tokens of completions stand among those of a batch as wide as the longest."""
    width = max(sizes)
    lengths = torch.tensor(sizes)
    places = (torch.arange(width) < lengths[:, None]).flatten().nonzero()[:, 0]
    return places.to(device)
