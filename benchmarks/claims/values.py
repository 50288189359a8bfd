"""What a metric may say instead of a plain number, and the arithmetic of curves that metrics share."""

from __future__ import annotations

from collections.abc import Sequence


Point = tuple[float, float]
"""What training had cost, and the accuracy there."""


class Censored(float):
    """A value of which is known only that the true one is at least this large."""


class MissingValueError(ValueError):
    """A result does not say what a metric asks for; the message says what is missing."""


POINT_NAMES = {"tokens": "completion_tokens", "steps": "step", "held_out": "all"}


def point_name(name: str) -> str:
    """Return what points of curves call what metrics call by a name of their own: a cost, or whose accuracy."""
    return POINT_NAMES.get(name, name)


def up_to(points: Sequence[Point], budget: float) -> list[Point] | None:
    """Return a curve up to a budget, its end interpolated; `None` where the run ended before it."""
    if points[-1][0] < budget:
        return None
    kept = [points[0]]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x1 >= budget:
            kept.append((budget, y0 + (y1 - y0) * (budget - x0) / (x1 - x0) if x1 > x0 else y1))
            break
        kept.append((x1, y1))
    return kept


def area_under(points: Sequence[Point]) -> float:
    """Return the area under a curve of straight lines."""
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False))
