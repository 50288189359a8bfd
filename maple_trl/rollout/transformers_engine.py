"""Completions by the model's own `generate()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from maple_trl.omni.encoded import EncodedPrompt, generation_position_ids, unique_prompts
from maple_trl.omni.families.base import OmniFamily
from maple_trl.omni.generation import own_options
from maple_trl.omni.prefix.shared_prefill import grows_cache, share_prefill
from maple_trl.rollout.engine import Completions, Turn


@dataclass
class TransformersEngine:
    """
    Samples with `generate()`, which reads a prompt once for all its rows where that is possible.

    Attributes:
        model: with or without adapters; outside of wrappers of accelerate.
        family: of the model; `None` for a text-only model.
        serve: hands prompts' media to the forwards of a model inside its context.
        shares: tells whether rows share their prompts.
        pad_to_multiple_of: what TRL pads prompts to.
        failed: no row ever does.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig
    family: OmniFamily | None = None
    serve: Callable[[nn.Module, Sequence[EncodedPrompt]], AbstractContextManager[None]] | None = None
    shares: Callable[[], bool] = bool
    pad_to_multiple_of: int | None = None
    failed: dict[int, str] = field(default_factory=dict)

    def sample(self, turn: Turn, prompt_ids: list[list[int]], prompts: Sequence[EncodedPrompt] | None) -> Completions:
        """Sample a completion for each row."""
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
