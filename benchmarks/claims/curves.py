"""The accuracy of a policy while it trains, against what training has cost so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Curve(TrainerCallback):
    """Accuracy on held-out questions against steps, completions, tokens and CPU seconds of training, which it does not add to."""

    ASKS = True
    QUESTIONS, SAMPLES, POINTS = 24, 3, 12
    COSTS = ("completions", "completion_tokens", "cpu_seconds", "wall_seconds")

    def __init__(self, trainer: Any, measure: Callable[..., dict[str, Any]], cost: Any):
        self._measure, self._cost = measure, cost
        self.points: list[dict[str, Any]] = []
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._every = max(1, args.max_steps // self.POINTS)
        self._add(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._add(state.global_step)

    def _add(self, step: int) -> None:
        spent = {name: value for name, value in self._cost.result().items() if name in self.COSTS}
        self.points.append({"step": step, **spent, **self._look()})

    def _look(self) -> dict[str, Any]:
        """Return what a point says of the policy as it is."""
        return {"accuracy": self._measure(self.QUESTIONS, self.SAMPLES)["trained"]["accuracy"]}

    def result(self) -> dict[str, Any]:
        return {"points": self.points}
