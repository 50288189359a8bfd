"""Whether a model's prompts can be shared, found out by comparing both ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids, forward_position_ids, generation_position_ids
from maple_trl.omni.prefix.shared_prefill import share_prefill
from maple_trl.omni.prefix.shared_prefix import pack, packed_forward
from maple_trl.omni.quantization import computes_exactly, with_whole_inputs


_TOKENS = 8
_PADDING = 3
_WINDOW = 5
"""Of layers that have one, while both ways are compared: theirs are longer than the prompt, and nothing would show."""
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


@dataclass
class Comparison:
    """
    Compares two completions that share their prompt with two that do not.

    Weights in float32 are compared in float32, whatever the run computes in; FlashAttention has no kernels for that. Windows of
    layers are shortened meanwhile, so that they end within the prompt and within a completion. Layers of 8 bits are
    compared as what their weights stand for: what they round depends on the batch in either way.

    Attributes:
        model: has TRL's fused head, and an attention that reads packed rows.
        core: the module whose hidden states the head reads.
        prompt: any; its last tokens stand in for completions.
        media_ids: tokens that no completion holds: a clip may stand at the very end of a prompt.
        attention: what packed rows are computed with, where that is not the model's own.
    """

    model: nn.Module
    core: nn.Module
    prompt: EncodedPrompt
    serve: Serve
    media_ids: Sequence[int] = ()
    attention: str | None = None

    def difference(self) -> float:
        """
        Return how much sharing changes: the larger mean difference, of log-probabilities and of the next token's.

        That takes three forwards: both rows apart, both in a packed row, and what generation reads of a prompt.
        """
        with self._ready():
            self._apart, hidden = self._log_probs_apart()
            training = _mean_difference(self._apart, self._log_probs_packed())
            prefill = _prefill_difference(self.model, self.core, self.prompt, self.serve, hidden)
        # Of two numbers, `max` may give the other.
        return math.nan if math.isnan(training + prefill) else max(training, prefill)

    @property
    def least_tolerance(self) -> float:
        """What rounding explains in any model, in the precision of this one."""
        return _TOLERANCE if self._exact else _HALF_TOLERANCE

    def tolerance(self) -> float:
        """Return what rounding explains in this model, by two further forwards; after [`difference`]."""
        with self._ready():
            padding = _mean_difference(self._apart, self._log_probs_apart(_PADDING)[0])
            shift = _mean_difference(self._apart, self._log_probs_packed(shift=1))
        if self._exact and padding <= _EXACT:
            return _TOLERANCE
        return max(_HALF_TOLERANCE, _TOLERATED_PADDING * padding, _TOLERATED_SHARE * shift)

    @cached_property
    def _exact(self) -> bool:
        dtype = self.core.get_input_embeddings().weight.dtype
        text = self.core.config.get_text_config()
        exact = dtype in (torch.float32, torch.float64) and computes_exactly(self.core)
        return exact and not is_flash_attention_requested(text)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            exactly = self._without_autocast() if self._exact else nullcontext()
            with torch.no_grad(), with_whole_inputs(self.model), exactly, _short_windows(self.core):
                yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def _without_autocast(self) -> Iterator[None]:
        """Turn off autocast, also that which accelerate puts inside `forward`, where none around a call reaches."""
        with torch.autocast(self._device.type, enabled=False):
            if "_original_forward" not in vars(self.model):
                yield
                return
            prepared, self.model.forward = self.model.forward, self.model._original_forward
            try:
                yield
            finally:
                self.model.forward = prepared

    @property
    def _device(self) -> torch.device:
        return self.core.get_input_embeddings().weight.device

    @cached_property
    def _completions(self) -> Tensor:
        ids = self.prompt.input_ids
        is_media = torch.isin(ids, ids.new_tensor(list(self.media_ids)))
        tokens = ids[~is_media][-_TOKENS:].to(self._device)
        return torch.stack([tokens, tokens.flip(0)])

    @property
    def _lengths(self) -> list[int]:
        width = self._completions.size(1)
        return [width, max(width - 1, 1)]

    def _log_probs_apart(self, padding: int = 0) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the completions, and the hidden state of the prompt's last token, (1, 1, hidden)."""
        rows, completions = [self.prompt, self.prompt], self._completions
        width, end = completions.size(1), padding + len(self.prompt)
        ids = torch.cat([self.prompt.input_ids.to(self._device).expand(2, -1), completions], dim=1)
        padded = F.pad(ids, (padding, 0))
        labels = padded.clone()
        labels[:, :-width] = -100
        positions = forward_position_ids(batch_position_ids(rows, end, width)).to(self._device)
        with _noting(self.core, end - 1) as noted, self.serve(self.model, rows):
            output = self.model(
                input_ids=padded,
                attention_mask=F.pad(torch.ones_like(ids), (padding, 0)),
                position_ids=positions,
                labels=labels,
                fused_lm_head=True,
            )
        log_probs = output.log_probs[:, -width:]
        log_probs[1, self._lengths[1] :] = 0.0
        return log_probs, noted[0]

    def _log_probs_packed(self, shift: int = 0) -> Tensor:
        """Return log-probabilities of the completions in a packed row, with positions that are so much too far."""
        batch, size = (
            pack([self.prompt, self.prompt], self._completions, self._lengths),
            tuple(self._completions.shape),
        )
        if shift:
            positions = batch.position_ids.clone()
            positions[:, :, batch.suffix] += shift
            batch = replace(batch, position_ids=positions)
        with self.serve(self.model, batch.prompts, packed=True):
            return packed_forward(self.model, self.core, batch, size, self.attention).log_probs


@contextmanager
def _short_windows(core: nn.Module) -> Iterator[None]:
    """Shorten the windows of a model's attention, and of the masks and caches that are made for it."""
    holders: list[Any] = [core.config.get_text_config(), *core.modules()]
    before = [(one, one.sliding_window) for one in holders if isinstance(getattr(one, "sliding_window", None), int)]
    for one, window in before:
        one.sliding_window = min(window, _WINDOW)
    try:
        yield
    finally:
        for one, window in before:
            one.sliding_window = window


def prefill_difference(model: nn.Module, core: nn.Module, prompt: EncodedPrompt, serve: Serve) -> float:
    """Return how much the next token's log-probabilities differ on average when two rows read a prompt once."""
    with with_whole_inputs(model):
        with _noting(core, -1, alone=True) as noted, serve(model, [prompt, prompt]):
            model(**_prefill_inputs(core, prompt))
        return _prefill_difference(model, core, prompt, serve, noted[0])


def _prefill_difference(
    model: nn.Module, core: nn.Module, prompt: EncodedPrompt, serve: Serve, expected: Tensor
) -> float:
    """Compare with what comes of the hidden state of the prompt's last token, (1, 1, hidden), through the same head."""

    def add_expected(module: nn.Module, args: tuple, output):
        output.last_hidden_state = torch.cat([output.last_hidden_state, expected])
        return output

    rows = [prompt, prompt]
    with share_prefill(core, rows), core.register_forward_hook(add_expected), serve(model, rows[:1]):
        logits = model(**_prefill_inputs(core, prompt)).logits[:, -1]
    together, apart = logits.float().log_softmax(-1).split([2, 1])
    return _mean_difference(together, apart)


def _prefill_inputs(core: nn.Module, prompt: EncodedPrompt) -> dict:
    """Make inputs of two rows as `generate()` does, which passes a further dimension of positions, that of the text."""
    device = core.get_input_embeddings().weight.device
    ids = prompt.input_ids.to(device).expand(2, -1)
    positions = generation_position_ids([prompt, prompt], len(prompt)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions, "use_cache": True}


@contextmanager
def _noting(core: nn.Module, place: int, alone: bool = False) -> Iterator[list[Tensor]]:
    """Note the hidden state at a place of the first row, and let the head read that `alone`: logits take gigabytes."""
    noted: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output):
        noted.append(output.last_hidden_state[:1, place, None])
        if alone:
            output.last_hidden_state = noted[0]
        return output

    with core.register_forward_hook(note):
        yield noted


def _mean_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())
