"""Completions by the model's own `generate()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from maple_trl.omni.encoded import EncodedPrompt, generation_position_ids, unique_prompts
from maple_trl.omni.families.base import OmniFamily, unwrap
from maple_trl.omni.generation import own_options
from maple_trl.omni.prefix.shared_prefill import grows_cache, share_prefill
from maple_trl.rollout.engine import Completions, Turn
from maple_trl.rollout.pieces import BatchDraws, cut_into_pieces


@dataclass
class TransformersEngine:
    """
    Samples with `generate()`, which reads a prompt once for all its rows where that is possible.

    Attributes:
        model: with or without adapters; outside of wrappers of accelerate.
        tokenizer: the model's.
        generation_config: how tokens are drawn, and how many.
        family: of the model; `None` for a text-only model.
        serve: hands prompts' media to the forwards of a model inside its context.
        shares: tells whether rows share their prompts.
        pad_to_multiple_of: what TRL pads prompts to.
        rows_at_a_time: of a rank; `None` for all of them.
        largest: tells the largest number of all ranks, a collective call.
        failed: no row ever does.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig
    family: OmniFamily | None = None
    serve: Callable[[nn.Module, Sequence[EncodedPrompt]], AbstractContextManager[None]] | None = None
    shares: Callable[[], bool] = bool
    pad_to_multiple_of: int | None = None
    rows_at_a_time: int | None = None
    largest: Callable[[int], int] = int
    failed: dict[int, str] = field(default_factory=dict)

    def sample(self, turn: Turn, prompt_ids: list[list[int]], prompts: Sequence[EncodedPrompt] | None) -> Completions:
        """Sample a completion for each row, as [`RolloutEngine.sample`] says."""
        if self.rows_at_a_time is None:
            return self._sample(turn, prompt_ids, prompts)
        same = list(map(tuple, prompt_ids)) if prompts is None else list(map(id, prompts))
        pieces = cut_into_pieces(same, self.rows_at_a_time)
        count = self.largest(len(pieces))
        if count == 1:
            return self._sample(turn, prompt_ids, prompts)
        return self._sample_pieces(turn, prompt_ids, prompts, pieces, count), None

    def _sample_pieces(
        self,
        turn: Turn,
        prompt_ids: list[list[int]],
        prompts: Sequence[EncodedPrompt] | None,
        pieces: Sequence[slice],
        count: int,
    ) -> list[list[int]]:
        """Sample one piece after the other, `count` times on every rank: a forward can be a collective call."""
        model, draws = unwrap(self.model), BatchDraws(len(prompt_ids))
        completions: list[list[int]] = []
        try:
            for piece in pieces:
                with draws.of_piece(model, piece.start) if self.generation_config.do_sample else nullcontext():
                    completions += self._sample(turn, prompt_ids[piece], prompts and prompts[piece])[0]
            for _ in range(count - len(pieces)):  # other ranks have more
                self._sample(turn, prompt_ids[:1], prompts and prompts[:1])
        finally:
            draws.end()
        return completions

    def _sample(self, turn: Turn, prompt_ids: list[list[int]], prompts: Sequence[EncodedPrompt] | None) -> Completions:
        """Sample a completion for each row, all rows at once."""
        fields: dict[str, Any] = {}
        if prompts is not None:
            width = max(map(len, prompts))
            if self.pad_to_multiple_of is not None:
                width += -width % self.pad_to_multiple_of
            fields["position_ids"] = generation_position_ids(prompts, width)
        with own_options(self.model, self.tokenizer, self.generation_config) as sampling, self._serving(prompts):
            completions, logprobs = turn(prompt_ids, fields)
        return sampling.cut(completions), logprobs

    @contextmanager
    def _serving(self, prompts: Sequence[EncodedPrompt] | None) -> Iterator[None]:
        if prompts is None or self.family is None or self.serve is None:
            yield
        elif not (self.shares() and grows_cache(self.generation_config)):
            with self.serve(self.model, prompts):
                yield
        else:
            with (
                share_prefill(self.family.core(self.model), prompts),
                self.serve(self.model, unique_prompts(prompts)[0]),
            ):
                yield
