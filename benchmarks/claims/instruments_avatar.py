"""What AVATAR's claims watch: the accuracy on each tier of held-out questions, against what training has cost so far."""

from __future__ import annotations

from typing import Any

from curves import Curve
from metrics_avatar import accuracy, by_tier


class TierCurve(Curve):
    """Accuracy on all held-out questions of a task whose questions' names begin with their tier."""

    VERSION = 2
    QUESTIONS, SAMPLES, POINTS = 1000, 1, 16
    """One answer to each question: for as many answers, more questions tell more."""
    COSTS = (*Curve.COSTS, "rollout_cpu_seconds", "rollouts")

    def _look(self) -> dict[str, Any]:
        found = self._measure(self.QUESTIONS, self.SAMPLES)["trained"]
        return {tier: accuracy(right, self.SAMPLES) for tier, right in by_tier(found["questions"]).items()}


INSTRUMENTS: dict[str, type] = {"tier_curve": TierCurve}
"""By the names that runs ask for them by."""
