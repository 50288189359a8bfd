"""
Attention over rows that hold a prompt once and its completions after it, with the kernels that transformers knows.

Each completion sees the prompt and itself, in layers with a window as far as that reaches. Which kernel computes that follows
from the model's own attention implementation, which goes on to compute everything else.
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

from maple_trl.omni.encoded import Blocks
from maple_trl.omni.prefix.split_attention import Completions, can_split, split_attention, stack, unstack


@dataclass(frozen=True)
class PackedLayout:
    """
    Where the groups of a packed row lie, one after the other.

    Attributes:
        groups: for each group the length of its prefix (the prompt without its last token) and those of its suffixes.
        blocks: of each group, which tokens of its prompt see each other both ways; empty where none do.
        attention: the implementation that computes it, of those in [`CHOICES`]; `None` for the model's own.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    blocks: tuple[Blocks | None, ...] = ()
    attention: str | None = None

    def __len__(self) -> int:
        return sum(prefix + sum(suffixes) for prefix, suffixes in self.groups)

    def blocks_in(self, window: int | None) -> tuple[Blocks | None, ...]:
        """Return the blocks of each group in a layer with such a window, or with none."""
        found = self.blocks or (None,) * len(self.groups)
        return tuple(None if b is None or (window is None and not b.everywhere) else b for b in found)


class PackedAttention:
    """
    An attention function of transformers that reads packed rows as well.

    Args:
        plain: the function, called where a forward has no `shared_prefix`.
        packed: called instead of it as `packed(plain, module, query, key, value, layout, **kwargs)`, unless the layout asks
            for another, where query has the shape (1, heads, L, D) and key and value (1, key heads, L, D). Returns what
            `plain` does: a tensor of shape (1, L, heads, D) and None.
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
        packed = CHOICES[shared_prefix.attention] if shared_prefix.attention else self.packed
        return packed(self.plain, module, query, key, value, shared_prefix, **kwargs)


_LAYERS = {"full_attention", "sliding_attention"}


def install(model: nn.Module) -> bool:
    """
    Make a language model's attention able to read packed rows; all else it computes as before.

    Nothing is switched around a forward, which reads a packed row where it is passed a `shared_prefix`: gradient
    checkpointing computes a layer again in the backward pass, when what was switched on would be off.

    Returns:
        `bool`: False where the model's attention is not over what stands before, or a window of that, or of an
        implementation other than `sdpa`, `flex_attention` and those of FlashAttention. FlashAttention knows no tokens that
        see each other both ways.
    """
    config = model.config.get_text_config()
    packed = _packed_for(config._attn_implementation)
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    both_ways = getattr(config, "use_bidirectional_attention", None)
    if packed is None or not layers <= _LAYERS or both_ways == "all" or (both_ways and packed is packed_flash):
        return False
    # Loading a kernel of the Hub puts its own function into the table, so it has to come before ours.
    if "/" in config._attn_implementation:
        flash_utils.lazy_import_flash_attention(config._attn_implementation)
    plain = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    if not isinstance(plain, PackedAttention):
        ALL_ATTENTION_FUNCTIONS.register(config._attn_implementation, PackedAttention(plain, packed))
    return True


def why_not_trained(attention: str, device: torch.device) -> str | None:
    """Return why an implementation that computes packed rows cannot be trained with; `None` if it can."""
    if attention == "flex_attention" and device.type == "cpu":
        return "FlexAttention has no backward pass on CPUs: train on a GPU, or set packed_attention to 'sdpa'"
    return None


def _packed_for(implementation: str) -> Callable | None:
    if is_flash_attention_requested(requested_attention_implementation=implementation):
        return packed_flash
    return CHOICES.get(implementation)


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
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend within each group's prompt, then within all completions at once, which see their prompt as well."""
    query, key, value = (_as_autocast(states) for states in (query, key, value))
    options = {"dropout_p": dropout, "scale": scaling}
    outputs: list[Tensor | None] = []
    shared = []
    pieces = zip(*(states.split(_pieces(layout), dim=2) for states in (query, key, value)), strict=True)
    for (prefix, suffixes), blocks in zip(layout.groups, layout.blocks_in(sliding_window), strict=True):
        head = next(pieces)
        if len(suffixes) == 1 or prefix:
            outputs.append(_alone(head, sliding_window, blocks, options))
        if len(suffixes) > 1:
            group = Completions(next(pieces), head[1:], suffixes)
            if sliding_window is not None and sliding_window < prefix + max(suffixes):
                outputs.append(_masked(group, options, sliding_window))
            else:
                shared.append((len(outputs), group))
                outputs.append(None)
    if shared:
        places, groups = zip(*shared, strict=True)
        if dropout or not can_split(query, key, value):
            found = [_masked(group, options) for group in groups]
        else:
            found = split_attention(groups, scaling)
        for place, output in zip(places, found, strict=True):
            outputs[place] = output
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _alone(states: tuple[Tensor, ...], window: int | None, blocks: Blocks | None, options: dict) -> Tensor:
    """Attend within a prompt, or one with its only completion."""
    query, key, value = states
    length, repeats = query.size(2), query.size(1) // key.size(1)
    if blocks is None and (window is None or window >= length):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=repeats > 1, **options)
    # As transformers does with a mask, which hardly a kernel of GPUs takes together with fewer key heads.
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    mask = _banded(length, window, blocks, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


@lru_cache(maxsize=8)  # each layer asks for the same
def _banded(length: int, window: int | None, blocks: Blocks | None, device: torch.device) -> Tensor:
    """Return who sees whom: what stands before, as far as the window reaches, and what is of the same block."""
    first, last = _reach(length, window, blocks)
    keys = torch.arange(length, device=device)
    return (keys >= first[:, None].to(device)) & (keys <= last[:, None].to(device))


def _reach(length: int, window: int | None, blocks: Blocks | None) -> tuple[Tensor, Tensor]:
    """Return the first and the last token that each of a prompt sees, both of shape (length,): those between it sees too."""
    last = torch.arange(length)
    first = torch.zeros_like(last) if window is None else (last - window + 1).clamp(min=0)
    for start, end in () if blocks is None else blocks.spans:
        last[start:end] = end - 1  # what stands behind a token is always within its window
        if blocks.everywhere:
            first[start:end].clamp_(max=start)
    return first, last


def _as_autocast(states: Tensor) -> Tensor:
    """Convert to what autocast computes attention in, which knows PyTorch's function, but none of its kernels."""
    device = states.device.type
    if states.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
        return states
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def _pieces(layout: PackedLayout) -> list[int]:
    """Return the lengths of prompts and of all their completions together, or of both where there is only one."""
    lengths: list[int] = []
    for prefix, suffixes in layout.groups:
        lengths += [prefix + suffixes[0]] if len(suffixes) == 1 else [prefix, sum(suffixes)]
    return lengths


def _masked(group: Completions, options: dict, window: int | None = None) -> Tensor:
    """
    Compute as a batch, with a mask and with keys that begin with the prompt's, where no kernel returns its sums.

    Heads that share keys become further queries. Else keys would have to be repeated for each head, for hardly a kernel of
    GPUs takes a mask together with fewer key heads: FlashAttention takes no mask, the memory-efficient kernel takes fewer
    key heads only in PyTorch's latest versions, and cuDNN's, which takes both, computes in half precision alone.
    """
    query, key, value = (stack(states, group.sizes) for states in group.states)
    count, heads, longest, _ = query.shape
    prompt = group.prompt
    if window is not None:  # of the prompt, what a completion's first token sees
        unseen = max(prompt[0].size(2) - window + 1, 0)
        prompt = prompt[0][:, :, unseen:], prompt[1][:, :, unseen:]
    keys, values = (
        torch.cat([shared.expand(count, -1, -1, -1), own], dim=2)
        for shared, own in zip(prompt, (key, value), strict=True)
    )
    repeats = heads // keys.size(1)
    output = F.scaled_dot_product_attention(
        query.unflatten(1, (-1, repeats)).flatten(2, 3),
        keys,
        values,
        attn_mask=_visible(keys.size(2) - longest, longest, repeats, window, query.device),
        **options,
    )
    return unstack(output.unflatten(2, (repeats, longest)).flatten(1, 2), group.sizes)


@lru_cache(maxsize=4)  # each layer asks for the same
def _visible(prefix: int, longest: int, repeats: int, window: int | None, device: torch.device) -> Tensor:
    """Return the mask of a completion, which sees the prefix and what stands before in itself, as far as a window reaches."""
    visible = torch.ones(longest, prefix + longest, dtype=torch.bool, device=device).tril(prefix)
    if window is not None:
        visible = visible.triu(prefix - window + 1)
    return visible.repeat(repeats, 1)


# FlashAttention


def packed_flash(
    plain: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, **kwargs
) -> tuple[Tensor, None]:
    """
    Attend in one call within each prompt, and within each completion with the keys of its prompt before its own.

    The kernels align a causal mask, and the window of a layer (`sliding_window`), with the end of the keys where there are
    fewer queries (FlashAttention 2.1 and later).

    Raises:
        ValueError: where tokens see each other both ways.
    """
    if any(layout.blocks_in(kwargs.get("sliding_window"))):
        raise ValueError("FlashAttention knows no tokens that see each other both ways")
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
    sliding_window: int | None = None,
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
    mask = _block_mask(layout, sliding_window, query.device)
    output = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=repeats > 1)
    return output.transpose(1, 2).contiguous(), None


@lru_cache
def _compiled(function: Callable, device: str) -> Callable:
    """Compile flex attention or its mask, which else hold a value per pair of tokens; rows differ in length."""
    return function if device == "cpu" else torch.compile(function, dynamic=True)


@lru_cache(maxsize=8)  # each layer of a kind asks for the same
def _block_mask(layout: PackedLayout, window: int | None, device: torch.device) -> BlockMask:
    groups, owners, places, firsts, lasts = [], [], [], [], []
    for number, ((prefix, suffixes), blocks) in enumerate(zip(layout.groups, layout.blocks_in(window), strict=True)):
        first, last = (bound.tolist() for bound in _reach(prefix + max(suffixes), window, blocks))
        for owner, (start, end) in enumerate([(0, prefix), *((prefix, prefix + size) for size in suffixes)]):
            groups += [number] * (end - start)
            owners += [owner] * (end - start)
            places += range(start, end)
            firsts += first[start:end]
            lasts += last[start:end]
    group, owner, place = (torch.tensor(numbers, device=device) for numbers in (groups, owners, places))
    first, last = (torch.tensor(numbers, device=device) for numbers in (firsts, lasts))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (owner[key] == 0) | (owner[key] == owner[query])
        near = (place[key] >= first[query]) & (place[key] <= last[query])
        return near & (group[key] == group[query]) & own

    length = len(layout)
    return _compiled(create_block_mask, device.type)(sees, None, None, length, length, device=device)


CHOICES: dict[str, Callable] = {"sdpa": packed_sdpa, "flex_attention": packed_flex}
"""What can compute packed rows whatever the model's own attention is."""
