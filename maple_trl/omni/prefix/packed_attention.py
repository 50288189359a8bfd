"""
Attention over rows that hold a prompt once and its completions after it, with the kernels that transformers knows.

Each completion sees the prompt and itself. Which kernel computes that follows from the model's own attention
implementation, which goes on to compute everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested


@dataclass(frozen=True)
class PackedLayout:
    """
    Where the groups of a packed row lie, one after the other.

    Attributes:
        groups: for each group the length of its prefix (the prompt without its last token) and those of its suffixes.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]

    def __len__(self) -> int:
        return sum(prefix + sum(suffixes) for prefix, suffixes in self.groups)


class PackedAttention:
    """
    An attention function of transformers that reads packed rows as well.

    Args:
        plain: the function, called where a forward has no `shared_prefix`.
        packed: called instead of it as `packed(plain, module, query, key, value, layout, **kwargs)`, where query has the
            shape (1, heads, L, D) and key and value (1, key heads, L, D). Returns what `plain` does: a tensor of shape
            (1, L, heads, D) and None.
    """

    def __init__(self, plain: Callable, packed: Callable):
        self.plain = plain
        self.packed = packed

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | BlockMask | None,
        shared_prefix: PackedLayout | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within a packed row, or leave any other to the function that was there before."""
        if shared_prefix is None:
            return self.plain(module, query, key, value, attention_mask, **kwargs)
        return self.packed(self.plain, module, query, key, value, shared_prefix, **kwargs)


def install(model: nn.Module) -> bool:
    """
    Make a language model's attention able to read packed rows; all else it computes as before.

    Nothing is switched around a forward, which reads a packed row where it is passed a `shared_prefix`: gradient
    checkpointing computes a layer again in the backward pass, when what was switched on would be off.

    Returns:
        `bool`: False where the model's attention is not over the whole sequence, or of an implementation other than `sdpa`,
        `flex_attention` and those of FlashAttention.
    """
    config = model.config.get_text_config()
    packed = _packed_for(config._attn_implementation)
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if packed is None or layers != {"full_attention"}:
        return False
    # Loading a kernel of the Hub puts its own function into the table, so it has to come before ours.
    if "/" in config._attn_implementation:
        flash_utils.lazy_import_flash_attention(config._attn_implementation)
    plain = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    if not isinstance(plain, PackedAttention):
        ALL_ATTENTION_FUNCTIONS.register(config._attn_implementation, PackedAttention(plain, packed))
    return True


def _packed_for(implementation: str) -> Callable | None:
    if is_flash_attention_requested(requested_attention_implementation=implementation):
        return packed_flash
    return {"sdpa": packed_sdpa, "flex_attention": packed_flex}.get(implementation)


# Scaled dot product


def packed_sdpa(
    plain: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend within a group's prompt, then within its completions as a batch whose keys begin with the prompt's."""
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.size(1) != key.size(1)}
    outputs, start = [], 0
    for prefix, suffixes in layout.groups:
        end = start + prefix + sum(suffixes)
        outputs += _group_attention(
            *(states[:, :, start:end] for states in (query, key, value)), prefix, suffixes, options
        )
        start = end
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _group_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: int, suffixes: tuple[int, ...], options: dict
) -> list[Tensor]:
    """Compute the attention of a group's tokens, in pieces along its length, each of shape (1, heads, length, D)."""
    attend: Callable = F.scaled_dot_product_attention
    if len(suffixes) == 1:
        return [attend(query, key, value, is_causal=True, **options)]
    count, longest = len(suffixes), max(suffixes)
    head = [states[:, :, :prefix] for states in (query, key, value)]
    tails = [_stacked(states[0, :, prefix:], suffixes, longest) for states in (query, key, value)]
    keys, values = (
        torch.cat([shared.expand(count, -1, -1, -1), own], dim=2)
        for shared, own in zip(head[1:], tails[1:], strict=True)
    )
    if options["enable_gqa"] and query.device.type != "cpu":
        # The fused kernels of GPUs take a mask or fewer key heads, not both.
        keys, values = (repeat_kv(states, query.size(1) // key.size(1)) for states in (keys, values))
        masked_options = options | {"enable_gqa": False}
    else:
        masked_options = options
    # A completion sees the whole prefix and what stands before it in itself.
    visible = torch.ones(longest, prefix + longest, dtype=torch.bool, device=query.device).tril(prefix)
    tail = attend(tails[0], keys, values, attn_mask=visible, **masked_options)
    if min(suffixes) == longest:
        flat = tail.transpose(0, 1).flatten(1, 2)
    else:
        flat = torch.cat([tail[i, :, :size] for i, size in enumerate(suffixes)], dim=1)
    return ([attend(*head, is_causal=True, **options)] if prefix else []) + [flat[None]]


def _stacked(states: Tensor, sizes: tuple[int, ...], longest: int) -> Tensor:
    """Stack the suffixes of a group, (heads, their total length, D), as (suffixes, heads, longest, D)."""
    if min(sizes) == longest:
        return states.unflatten(1, (len(sizes), longest)).transpose(0, 1)
    return torch.stack([F.pad(part, (0, 0, 0, longest - part.size(1))) for part in states.split(sizes, dim=1)])


# FlashAttention


def packed_flash(
    plain: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, **kwargs
) -> tuple[Tensor, None]:
    """
    Attend in one call within each prompt, and within each completion with the keys of its prompt before its own.

    The kernels align a causal mask with the end of the keys where there are fewer queries (FlashAttention 2.1 and later).
    """
    queries, keys = zip(*_sequences(layout), strict=True)
    return plain(
        module,
        query,
        _with_prefixes(key, layout),
        _with_prefixes(value, layout),
        None,
        is_causal=True,
        cu_seq_lens_q=_boundaries(queries, query.device),
        cu_seq_lens_k=_boundaries(keys, query.device),
        max_length_q=max(queries),
        max_length_k=max(keys),
        **kwargs,
    )


def _sequences(layout: PackedLayout) -> list[tuple[int, int]]:
    """Return the numbers of queries and of keys of each sequence."""
    found = []
    for prefix, suffixes in layout.groups:
        if len(suffixes) == 1:
            found.append((prefix + suffixes[0],) * 2)
            continue
        found += [(prefix, prefix)] * bool(prefix) + [(size, prefix + size) for size in suffixes]
    return found


def _with_prefixes(states: Tensor, layout: PackedLayout) -> Tensor:
    """Repeat the prompt of a group before each of its completions."""
    lengths = [length for prefix, suffixes in layout.groups for length in (prefix, *suffixes)]
    parts = iter(states.split(lengths, dim=2))
    pieces = []
    for _, suffixes in layout.groups:
        prefix = next(parts)
        if len(suffixes) > 1:
            pieces.append(prefix)
        for _ in suffixes:
            pieces += [prefix, next(parts)]
    return torch.cat(pieces, dim=2)


@lru_cache(maxsize=16)  # each layer asks for the same
def _boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return F.pad(torch.tensor(lengths, device=device).cumsum(0, dtype=torch.int32), (1, 0))


# FlexAttention


def packed_flex(
    plain: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """
    Attend within the packed row as it is, under a mask of blocks.

    PyTorch has no backward of it on CPUs, and there computes it without a fused kernel.

    Raises:
        ValueError: for dropout, which FlexAttention does not have.
    """
    if dropout:
        raise ValueError(f"flex_attention has no attention dropout, which the model's configuration sets to {dropout}")
    heads, repeats = query.size(1), query.size(1) // key.size(1)
    if heads & (heads - 1):  # as transformers does: not every kernel takes fewer key heads then
        key, value, repeats = repeat_kv(key, repeats), repeat_kv(value, repeats), 1
    attend = _compiled(flex_attention, query.device.type)
    mask = _block_mask(layout, query.device)
    output = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=repeats > 1)
    return output.transpose(1, 2).contiguous(), None


@lru_cache
def _compiled(function: Callable, device: str) -> Callable:
    """Compile flex attention or its mask, which else hold a value per pair of tokens; rows differ in length."""
    return function if device == "cpu" else torch.compile(function, dynamic=True)


@lru_cache(maxsize=4)  # each layer asks for the same
def _block_mask(layout: PackedLayout, device: torch.device) -> BlockMask:
    groups, owners = [], []
    for number, (prefix, suffixes) in enumerate(layout.groups):
        groups += [number] * (prefix + sum(suffixes))
        owners += [0] * prefix + [i for i, size in enumerate(suffixes, 1) for _ in range(size)]
    group, owner = torch.tensor(groups, device=device), torch.tensor(owners, device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (owner[key] == 0) | (owner[key] == owner[query])
        return (key <= query) & (group[key] == group[query]) & own

    length = len(layout)
    return _compiled(create_block_mask, device.type)(sees, None, None, length, length, device=device)
