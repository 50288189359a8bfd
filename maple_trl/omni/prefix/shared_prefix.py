"""
One forward for the completions of a prompt, which passes the prompt once.

The rows of a batch that share a prompt become one group in a packed row: the prompt without its last token, then for each
completion the prompt's last token and the completion without its own. Positions restart after the prompt, and attention
lets a completion see the prompt and itself. So log-probabilities and gradients are those of the rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from maple_trl.omni.encoded import EncodedPrompt, forward_position_ids, unique_prompts
from maple_trl.omni.prefix.packed_attention import PackedLayout, install


NO_LABEL = -100


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
        """Return the values of the suffixes' tokens as a batch of shape (batch, width), 0 where there is no token."""
        empty = values_1S.new_zeros(batch, width)
        return empty.index_put((self.rows, self.columns), values_1S[0])


def pack(rows: Sequence[EncodedPrompt], completion_ids: Tensor, lengths: Sequence[int]) -> PackedBatch:
    """
    Pack the rows of a batch.

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
        _check_blocks(prompt)
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
        PackedLayout(tuple(groups), tuple(prompt.blocks for prompt in prompts)),
        torch.cat(ids)[None],
        torch.cat(positions, dim=1)[:, None],
        torch.cat(suffix),
        torch.cat(labels)[None],
        torch.cat(row_index),
        torch.cat(column_index),
    )


def _check_blocks(prompt: EncodedPrompt) -> None:
    """Refuse a prompt whose last token, which stands before each completion, is seen by tokens before it."""
    if prompt.blocks is not None and prompt.blocks.spans[-1][1] >= len(prompt):
        raise ValueError(
            f"prompt {prompt.key} ends with a picture whose tokens see each other both ways, and cannot be shared so: put "
            "text behind the picture, or train with shared_prefix='off'"
        )


@dataclass
class PackedOutput:
    """What TRL reads of a forward with its fused head; tensors of shape (B, T), 0 where a row has no token."""

    log_probs: Tensor
    entropy: Tensor | None


def packed_forward(
    model: nn.Module, core: nn.Module, batch: PackedBatch, size: tuple[int, int], attention: str | None = None
) -> PackedOutput:
    """
    Return log-probabilities of the packed completions, by TRL's fused head, which is run on their tokens alone.

    Args:
        model: has the fused head; may be wrapped.
        core: the module inside it whose hidden states the head reads.
        size: (B, T), rows and width of the batch that was packed.
        attention: what computes attention, `"sdpa"` or `"flex_attention"`; the model's own if `None`.

    Raises:
        RuntimeError: when the model's attention cannot read packed rows.
    """

    def suffixes_only(module: nn.Module, args: tuple, output):
        output.last_hidden_state = output.last_hidden_state[:, batch.suffix]
        return output

    if not install(core):  # again: its attention may have been set since, or another model have loaded a kernel anew
        raise RuntimeError(
            f"The attention {core.config.get_text_config()._attn_implementation!r}, set since prompts began to be shared, "
            "cannot read packed rows: set it before training, or train with shared_prefix='off'"
        )
    with core.register_forward_hook(suffixes_only):
        output = model(
            input_ids=batch.input_ids,
            position_ids=forward_position_ids(batch.position_ids),
            # transformers takes a mask of four dimensions as it is, instead of making one of L x L that none reads.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
            shift_labels=batch.labels,
            fused_lm_head=True,
            shared_prefix=replace(batch.layout, attention=attention),
        )
    log_probs, entropy = (
        None if values is None else batch.unpack(values, *size) for values in (output.log_probs, output.entropy)
    )
    return PackedOutput(log_probs, entropy)
