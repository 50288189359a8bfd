"""What AVATAR's claims watch: the accuracy on each tier of held-out questions, against what training has cost so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metrics_avatar import accuracy_and_error, by_tier
from transformers import TrainerCallback


class TierCurve(TrainerCallback):
    """Accuracy on all held-out questions of a task whose questions' names begin with their tier, which adds nothing to the cost."""

    ASKS = True
    SAMPLES, POINTS = 3, 16

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
        point: dict[str, Any] = {"step": step, **self._cost.result()}
        found = self._measure(1000, self.SAMPLES)["trained"]
        for tier, right in by_tier(found["questions"]).items():
            point[tier], point[f"{tier}_error"] = accuracy_and_error(right, self.SAMPLES)
        self.points.append(point)

    def result(self) -> dict[str, Any]:
        return {"points": self.points}


INSTRUMENTS: dict[str, type] = {"tier_curve": TierCurve}
"""By the names that runs ask for them by."""
