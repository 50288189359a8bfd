"""
One forward for the completions of a prompt, which passes the prompt once.

The rows of a batch that share a prompt become one group in a packed row: the prompt without its last token, then for each
completion the prompt's last token and the completion without its own. Positions restart after the prompt, and attention
lets a completion see the prompt and itself. So log-probabilities and gradients are those of the rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from maple_trl.omni.encoded import EncodedPrompt, forward_position_ids, unique_prompts


ATTENTION = "maple_shared_prefix"
NO_LABEL = -100


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


@dataclass(frozen=True)
class PackedBatch:
    """
    Rows of a batch in one packed row of L tokens, S of which stand in suffixes.

    Attributes:
        prompts (`list[EncodedPrompt]`): one per group, in order.
        layout ([`PackedLayout`]): lengths.
        input_ids (`Tensor` of shape (1, L)): tokens.
        position_ids (`Tensor` of shape (R, 1, L)): rotary positions.
        suffix (`Tensor` of shape (S,)): places of the suffixes' tokens in the packed row.
        labels (`Tensor` of shape (1, S)): the token that each of them predicts.
        rows, columns (`Tensor` of shape (S,)): where its log-probability belongs in the batch.
    """

    prompts: list[EncodedPrompt]
    layout: PackedLayout
    input_ids: Tensor
    position_ids: Tensor
    suffix: Tensor
    labels: Tensor
    rows: Tensor
    columns: Tensor

    def unpack(self, values_1S: Tensor, batch: int, width: int) -> Tensor:
        """Values of the suffixes' tokens as a batch of shape (batch, width), 0 where there is no token."""
        empty = values_1S.new_zeros(batch, width)
        return empty.index_put((self.rows, self.columns), values_1S[0])


def pack(rows: Sequence[EncodedPrompt], completion_ids: Tensor, lengths: Sequence[int]) -> PackedBatch:
    """
    Packs the rows of a batch.

    Args:
        rows: the prompt of each row; rows of a prompt share the object, in any order.
        completion_ids (`Tensor` of shape (B, T)): padded on the right.
        lengths: tokens of each completion. A row without any keeps one place, which predicts nothing, so that its
            prompt is in the forward.
    """
    prompts, order = unique_prompts(rows)
    members: list[list[int]] = [[] for _ in prompts]
    for row, prompt in enumerate(order):
        members[prompt].append(row)
    device = completion_ids.device
    ids, positions, suffix, labels, row_index, column_index, groups = [], [], [], [], [], [], []
    place = 0
    for prompt, own in zip(prompts, members, strict=True):
        tokens, places = prompt.input_ids.to(device), prompt.position_ids.to(device)
        ids.append(tokens[:-1])
        positions.append(places[:, :-1])
        place += len(tokens) - 1
        sizes = []
        for row in own:
            size = max(int(lengths[row]), 1)
            steps = torch.arange(size, device=device)
            ids += [tokens[-1:], completion_ids[row, : size - 1]]
            positions.append(places[:, -1:] + steps)
            suffix.append(place + steps)
            labels.append(completion_ids[row, :size] if lengths[row] else torch.full_like(steps, NO_LABEL))
            row_index.append(torch.full_like(steps, row))
            column_index.append(steps)
            sizes.append(size)
            place += size
        groups.append((len(tokens) - 1, tuple(sizes)))
    return PackedBatch(
        prompts,
        PackedLayout(tuple(groups)),
        torch.cat(ids)[None],
        torch.cat(positions, dim=1)[:, None],
        torch.cat(suffix),
        torch.cat(labels)[None],
        torch.cat(row_index),
        torch.cat(column_index),
    )


# Attention


def install(model: nn.Module) -> bool:
    """
    Makes a language model's attention able to read packed rows; all else it computes as before.

    The implementation is set once and for all: gradient checkpointing computes a layer again in the backward pass, when
    an implementation that was set around the forward would be gone.

    Returns:
        `bool`: False where the model's attention is not PyTorch's scaled dot product over the whole sequence.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == ATTENTION:
        return True
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or layers != {"full_attention"}:
        return False
    config._attn_implementation = ATTENTION
    return True


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared_prefix: PackedLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """
    Attention as transformers calls it; without `shared_prefix` its own.

    Args:
        query (`Tensor` of shape (1, heads, L, D)), key, value (`Tensor` of shape (1, key heads, L, D)): a packed row.
        shared_prefix ([`PackedLayout`]): its groups.

    Returns:
        `Tensor` of shape (1, L, heads, D), and None.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.size(1) != key.size(1)}
    outputs, start = [], 0
    for prefix, suffixes in shared_prefix.groups:
        end = start + prefix + sum(suffixes)
        outputs += _group_attention(
            *(states[:, :, start:end] for states in (query, key, value)), prefix, suffixes, options
        )
        start = end
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _group_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: int, suffixes: tuple[int, ...], options: dict
) -> list[Tensor]:
    """Attention of a group's tokens, in pieces along its length, each of shape (1, heads, length, D)."""
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
    """The suffixes of a group, shape (heads, their total length, D), as a batch of shape (suffixes, heads, longest, D)."""
    if min(sizes) == longest:
        return states.unflatten(1, (len(sizes), longest)).transpose(0, 1)
    return torch.stack([F.pad(part, (0, 0, 0, longest - part.size(1))) for part in states.split(sizes, dim=1)])


# Forward


@dataclass
class PackedOutput:
    """What TRL reads of a forward with its fused head; tensors of shape (B, T), 0 where a row has no token."""

    log_probs: Tensor
    entropy: Tensor | None


def packed_forward(model: nn.Module, core: nn.Module, batch: PackedBatch, size: tuple[int, int]) -> PackedOutput:
    """
    Log-probabilities of the packed completions, by TRL's fused head, which is run on their tokens alone.

    Args:
        model: has the fused head; may be wrapped.
        core: the module inside it whose hidden states the head reads.
        size: (B, T), rows and width of the batch that was packed.
    """

    def suffixes_only(module: nn.Module, args: tuple, output):
        output.last_hidden_state = output.last_hidden_state[:, batch.suffix]
        return output

    handle = core.register_forward_hook(suffixes_only)
    try:
        output = model(
            input_ids=batch.input_ids,
            position_ids=forward_position_ids(batch.position_ids),
            # transformers takes a mask of four dimensions as it is, instead of making one of L x L that none reads.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
            shift_labels=batch.labels,
            fused_lm_head=True,
            shared_prefix=batch.layout,
        )
    finally:
        handle.remove()
    log_probs, entropy = (
        None if values is None else batch.unpack(values, *size) for values in (output.log_probs, output.entropy)
    )
    return PackedOutput(log_probs, entropy)


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
