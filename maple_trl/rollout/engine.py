"""What samples completions, as a trainer sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from maple_trl.omni.encoded import EncodedPrompt


Completions = tuple[list[list[int]], list[list[float]] | None]
"""Tokens of each row's completion, up to and with its end, and the log-probabilities with which they were sampled."""

Turn = Callable[[Sequence[Any], dict[str, Any]], Completions]
"""TRL's own generation, of prompts and further inputs of the model."""


class EngineError(RuntimeError):
    """An engine that has gone, or that samples something else than what is trained; the message says what to do."""


class WrongWeightsError(EngineError):
    """An engine that has other weights than the trainer has sent last, as a server that was started anew."""


class RolloutEngine(Protocol):
    """
    Samples a completion for each row of a rank, with the row's own media.

    TRL's generation does the rest: it hands weights to an engine of its own, gathers sharded ones, and keeps time.

    Attributes:
        failed: rows of the last call that have no completion, and why; one token stands in its place.
    """

    failed: dict[int, str]

    def sample(self, turn: Turn, prompt_ids: list[list[int]], prompts: Sequence[EncodedPrompt] | None) -> Completions:
        """
        Sample a completion for each row; a collective call.

        Args:
            turn: what TRL generates with.
            prompt_ids: tokens of each row's prompt.
            prompts: the rows, those of a prompt sharing the object; `None` for a text-only model.
        """
        ...
