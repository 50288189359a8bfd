"""Completions by vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.rollout.engine import Completions, Turn


@dataclass
class VLLMEngine:
    """
    Samples with the engine that TRL's `vllm_generation` reaches, in this process or on a server.

    Attributes:
        generation: [`~maple_trl.rollout.vllm_generation.OmniVLLMGeneration`], or of a text-only
            model [`~maple_trl.rollout.vllm_generation.MergingGeneration`].
    """

    generation: Any

    @property
    def failed(self) -> dict[int, str]:
        """Rows of the last call that have no completion, and why."""
        return getattr(self.generation, "failed", {})

    def sample(self, turn: Turn, prompt_ids: list[list[int]], prompts: Sequence[EncodedPrompt] | None) -> Completions:
        """Sample as [`RolloutEngine.sample`] says; TRL passes encoded prompts through as it does tokens."""
        return turn(prompt_ids if prompts is None else list(prompts), {})


def generation_class(mode: str) -> type:
    """Return what reaches the engine in a mode of TRL's; each imports what the other does not need."""
    if mode == "server":
        from maple_trl.rollout.vllm_server import ServedGeneration

        return ServedGeneration
    from maple_trl.rollout.vllm_colocate import ColocatedGeneration

    return ColocatedGeneration
