"""Whether a model's prompts can be shared, found out by comparing both ways."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids, generation_position_ids
from maple_trl.omni.shared_prefill import share_prefill
from maple_trl.omni.shared_prefix import pack, packed_forward


# Mean difference of log-probabilities that rounding explains. A wrong position or mask moves them by far more.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE_OF_HALF = 0.1
_TOKENS = 3

Serve = Callable[..., AbstractContextManager]
"""`serve(model, prompts, packed=False)`: the context in which a forward reads the prompts' media."""


@torch.no_grad()
def sharing_error(model: nn.Module, core: nn.Module, prompt: EncodedPrompt, serve: Serve) -> float:
    """
    How far two completions of a prompt come out differently when they share it: the largest of the mean differences of
    log-probabilities and of the next token's, as a multiple of what rounding explains.

    Args:
        model: has TRL's fused head, and an attention that reads packed rows.
        core: the module whose hidden states the head reads.
        prompt: any; its last tokens stand in for completions.
    """
    was_training = model.training
    model.eval()
    try:
        differences = [
            _log_prob_difference(model, core, prompt, serve),
            _prefill_difference(model, core, prompt, serve),
        ]
    finally:
        model.train(was_training)
    dtype = core.get_input_embeddings().weight.dtype
    return max(differences) / _TOLERANCE.get(dtype, _TOLERANCE_OF_HALF)


def _log_prob_difference(model: nn.Module, core: nn.Module, prompt: EncodedPrompt, serve: Serve) -> float:
    device = core.get_input_embeddings().weight.device
    rows = [prompt, prompt]
    tokens = prompt.input_ids[-_TOKENS:].to(device)
    completions = torch.stack([tokens, tokens.flip(0)])
    width = completions.size(1)
    ids = torch.cat([prompt.input_ids.to(device).expand(2, -1), completions], dim=1)
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    positions = _of_text_models(batch_position_ids(rows, len(prompt), width)).to(device)
    with serve(model, rows):
        apart = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            labels=labels,
            fused_lm_head=True,
        ).log_probs[:, -width:]
    batch = pack(rows, completions, [width, width - 1])
    with serve(model, batch.prompts, packed=True):
        together = packed_forward(model, core, batch, tuple(completions.shape)).log_probs
    difference = (apart - together).abs()
    difference[1, -1] = 0.0  # the second is a token shorter there
    return float(difference.mean())


def _prefill_difference(model: nn.Module, core: nn.Module, prompt: EncodedPrompt, serve: Serve) -> float:
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
    with serve(model, rows):
        apart = model(**inputs).logits[:, -1]
    with share_prefill(core, rows), serve(model, rows[:1]):
        together = model(**inputs).logits[:, -1]
    return float((apart.float().log_softmax(-1) - together.float().log_softmax(-1)).abs().mean())


def _of_text_models(positions: Tensor) -> Tensor:
    return positions[0] if positions.size(0) == 1 else positions
