"""What AVATAR's claims watch: the accuracy on each tier of held-out questions, against what training has cost so far."""

from __future__ import annotations

from typing import Any

from curves import Curve
from metrics_avatar import accuracy_and_error, by_tier


class TierCurve(Curve):
    """Accuracy on all held-out questions of a task whose questions' names begin with their tier."""

    QUESTIONS, POINTS = 1000, 16
    COSTS = (*Curve.COSTS, "rollout_cpu_seconds", "rollouts")

    def _look(self) -> dict[str, Any]:
        told: dict[str, Any] = {}
        found = self._measure(self.QUESTIONS, self.SAMPLES)["trained"]
        for tier, right in by_tier(found["questions"]).items():
            told[tier], told[f"{tier}_error"] = accuracy_and_error(right, self.SAMPLES)
        return told


INSTRUMENTS: dict[str, type] = {"tier_curve": TierCurve}
"""By the names that runs ask for them by."""
