"""When a prompt is stuck and gets its hint (AVATAR, arXiv 2508.03100, 4.1, "Hinting Mechanism")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class _Prompt:
    """What is known of a prompt: visits in a row at which it was stuck, and the divergence measured at the last."""

    visits: int = 0
    hinted: bool = False
    divergence_sum: float = 0.0
    tokens: float = 0.0


class HintTrigger:
    """
    Decides which prompts are shown with their hint (AVATAR 4.1, the hinting mechanism).

    A prompt gets it when it was stuck at its last visits and the policy has stopped moving on it: the mean token KL of
    the current policy to those that wrote the replayed completions, as measured at the last visit, is small. It keeps
    it until it is no longer stuck.

    Args:
        visits (`int`):
            How many visits in a row a prompt must have been stuck.
        max_divergence (`float`):
            The highest mean token KL, in nats, at which the policy counts as having stopped.

    Raises:
        ValueError: for a number of visits below 1 or a negative divergence.
    """

    def __init__(self, visits: int = 3, max_divergence: float = 0.01):
        if visits < 1:
            raise ValueError(f"A prompt must be stuck for at least 1 visit, got {visits}")
        if not max_divergence >= 0:
            raise ValueError(f"The divergence must be at least 0, got {max_divergence}")
        self.visits = visits
        self.max_divergence = max_divergence
        self._prompts: dict[str, _Prompt] = {}
        self._given = 0
        self._withdrawn = 0

    def observe(self, prompt: str, stuck: bool) -> None:
        """Note a visit of a prompt and whether it is stuck now; the divergence of earlier visits no longer counts."""
        known = self._prompts.get(prompt)
        if not stuck:
            self._withdrawn += known is not None and known.hinted
            self._prompts.pop(prompt, None)
            return
        known = self._prompts.setdefault(prompt, _Prompt())
        known.visits += 1
        known.divergence_sum = known.tokens = 0.0

    def observe_divergence(self, prompt: str, total: float, tokens: float) -> None:
        """
        Add a token KL of the last visit; prompts that are not stuck are left alone.

        Args:
            prompt (`str`): key of the prompt.
            total (`float`): the KL in nats, summed over some of the visit's tokens.
            tokens (`float`): how many tokens that are.
        """
        known = self._prompts.get(prompt)
        if known is not None:
            known.divergence_sum += total
            known.tokens += tokens

    def watches(self, prompt: str) -> bool:
        """Return whether a prompt was stuck at its last visit, so that its divergence is asked for."""
        return prompt in self._prompts

    def due(self, prompt: str) -> bool:
        """Return whether a prompt is to be shown with its hint at the visit that begins now."""
        known = self._prompts.get(prompt)
        if known is None or known.hinted:
            return known is not None
        stopped = known.tokens > 0 and known.divergence_sum / known.tokens <= self.max_divergence
        return known.visits >= self.visits and stopped

    def give(self, prompt: str) -> None:
        """Note that a prompt that is due is shown with its hint from now on."""
        self._given += not self._prompts[prompt].hinted
        self._prompts[prompt].hinted = True

    def metrics(self) -> dict[str, float]:
        """Count prompts that are stuck or have their hint now, and hints given and withdrawn since the run began."""
        return {
            "hint/stuck_prompts": float(len(self._prompts)),
            "hint/hinted_prompts": float(sum(known.hinted for known in self._prompts.values())),
            "hint/given": float(self._given),
            "hint/withdrawn": float(self._withdrawn),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the prompts, ready for JSON."""
        prompts = {prompt: asdict(known) for prompt, known in self._prompts.items()}
        return {"prompts": prompts, "given": self._given, "withdrawn": self._withdrawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state` that [`state_dict`] gave."""
        self._prompts = {prompt: _Prompt(**known) for prompt, known in state["prompts"].items()}
        self._given, self._withdrawn = state["given"], state["withdrawn"]
