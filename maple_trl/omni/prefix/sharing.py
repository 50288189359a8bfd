"""Whether a model's prompts can be shared, found out by comparing both ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids, forward_position_ids, generation_position_ids
from maple_trl.omni.prefix.shared_prefill import last_position_alone, share_prefill
from maple_trl.omni.prefix.shared_prefix import pack, packed_forward


_TOKENS = 8
_PADDING = 3
_TOLERANCE = 1e-4
"""Mean difference of log-probabilities that rounding explains in float32."""
_EXACT = 1e-5
"""Above this difference by padding alone, something computes less exactly than float32 does."""
_HALF_TOLERANCE = 5e-3
_TOLERATED_PADDING = 3
_TOLERATED_SHARE = 1 / 3
"""
In half precision rounding depends on the model: tolerated is the largest of a constant, a multiple of the difference that
padding makes, and a share of the one that positions make which are one too far.

Of tiny random models of all families, right ones differed by up to 0.011 and 0.11 of that share (in a mixture of experts,
where rounding can send a token to another expert), wrong ones by at least 0.029. Of deeper ones with weights as small as
Qwen's at first (12 to 28 layers, standard deviation 0.02), right ones differed by up to 0.0042 and 1.7 times as much as
padding made, where that was above the constant; there positions that are one too far cannot be told from rounding.
"""

Serve = Callable[..., AbstractContextManager]
"""`serve(model, prompts, packed=False)`: the context in which a forward reads the prompts' media."""


def probe_prompt(prompts: Iterable[EncodedPrompt]) -> EncodedPrompt:
    """Choose the prompt to compare on: with the most kinds of media, and of those the shortest."""
    return max(prompts, key=lambda prompt: (len(prompt.kinds), -len(prompt)))


@torch.no_grad()
def sharing_error(
    model: nn.Module, core: nn.Module, prompt: EncodedPrompt, serve: Serve, media_ids: Sequence[int] = ()
) -> float:
    """
    Measure how much two completions of a prompt change when they share it, as a multiple of what rounding explains.

    It is the larger of the mean differences of log-probabilities and of the next token's.

    Weights in float32 are compared in float32, whatever the run computes in; FlashAttention has no kernels for that.

    Args:
        model: has TRL's fused head, and an attention that reads packed rows.
        core: the module whose hidden states the head reads.
        prompt: any; its last tokens stand in for completions.
        media_ids: tokens that no completion holds: a clip may stand at the very end of a prompt.
    """
    weight = core.get_input_embeddings().weight
    exact = weight.dtype in (torch.float32, torch.float64)
    exact = exact and not is_flash_attention_requested(core.config.get_text_config())
    was_training = model.training
    model.eval()
    try:
        with _without_autocast(model, weight.device) if exact else nullcontext():
            apart, padded, together, shifted = _log_probs(model, core, prompt, serve, media_ids)
            prefill = prefill_difference(model, core, prompt, serve)
    finally:
        model.train(was_training)
    training, padding, shift = (float((apart - other).abs().mean()) for other in (together, padded, shifted))
    if exact and padding <= _EXACT:
        tolerance = _TOLERANCE
    else:
        tolerance = max(_HALF_TOLERANCE, _TOLERATED_PADDING * padding, _TOLERATED_SHARE * shift)
    if math.isnan(training + prefill):  # of two numbers, `max` may give the other
        return math.nan
    return max(training, prefill) / tolerance


@contextmanager
def _without_autocast(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Turn off autocast, also that which accelerate puts inside `forward`, where none around a call reaches."""
    with torch.autocast(device.type, enabled=False):
        if "_original_forward" not in vars(model):
            yield
            return
        prepared, model.forward = model.forward, model._original_forward
        try:
            yield
        finally:
            model.forward = prepared


def _log_probs(
    model: nn.Module, core: nn.Module, prompt: EncodedPrompt, serve: Serve, media_ids: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probabilities of two completions: apart, padded, in one row, and there one position too far."""
    device = core.get_input_embeddings().weight.device
    rows = [prompt, prompt]
    is_media = torch.isin(prompt.input_ids, prompt.input_ids.new_tensor(list(media_ids)))
    tokens = prompt.input_ids[~is_media][-_TOKENS:].to(device)
    completions = torch.stack([tokens, tokens.flip(0)])
    width = completions.size(1)
    lengths = [width, max(width - 1, 1)]
    ids = torch.cat([prompt.input_ids.to(device).expand(2, -1), completions], dim=1)
    found = []
    for padding in (0, _PADDING):
        padded = F.pad(ids, (padding, 0))
        labels = padded.clone()
        labels[:, :-width] = -100
        positions = forward_position_ids(batch_position_ids(rows, padding + len(prompt), width)).to(device)
        with serve(model, rows):
            output = model(
                input_ids=padded,
                attention_mask=F.pad(torch.ones_like(ids), (padding, 0)),
                position_ids=positions,
                labels=labels,
                fused_lm_head=True,
            )
        found.append(output.log_probs[:, -width:])
        found[-1][1, lengths[1] :] = 0.0
    batch = pack(rows, completions, lengths)
    late = batch.position_ids.clone()
    late[:, :, batch.suffix] += 1
    for packed in (batch, replace(batch, position_ids=late)):
        with serve(model, packed.prompts, packed=True):
            found.append(packed_forward(model, core, packed, tuple(completions.shape)).log_probs)
    return tuple(found)


def prefill_difference(model: nn.Module, core: nn.Module, prompt: EncodedPrompt, serve: Serve) -> float:
    """Return how much the next token's log-probabilities differ on average when two rows read a prompt once."""
    device = core.get_input_embeddings().weight.device
    rows = [prompt, prompt]
    ids = prompt.input_ids.to(device).expand(2, -1)
    # generate() passes a further dimension of positions, that of the text, which the cores take off.
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": generation_position_ids(rows, len(prompt)).to(device),
        "use_cache": True,
    }
    with last_position_alone(core), serve(model, rows):
        apart = model(**inputs).logits[:, -1]
    with share_prefill(core, rows), serve(model, rows[:1]):
        together = model(**inputs).logits[:, -1]
    return float((apart.float().log_softmax(-1) - together.float().log_softmax(-1)).abs().mean())
