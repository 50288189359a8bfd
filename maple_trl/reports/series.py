"""Curves out of a trainer's log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maple_trl.modalities import ModalityTag


MAX_POINTS = 1000
"""Points of a curve; of a longer one, each point is the mean of neighbours."""

TAGS = [str(tag) for tag in ModalityTag]

Series = Mapping[str, tuple[list[float], list[float]]]
"""Steps and values by the metric's name."""


def series_of(log: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Return every number of a log by name, as steps and values; what is no finite number is left out."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for entry in log:
        step = entry.get("step")
        if not isinstance(step, int | float):
            continue
        for name, value in entry.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return found


def thinned(series: Series, most: int = MAX_POINTS) -> tuple[dict[str, dict[str, list[float]]], int]:
    """
    Thin curves until they are short enough to draw.

    Returns:
        `{"step": …, "value": …}` by name, rounded to 6 digits; and how many log entries stand behind a point of the
        longest curve.
    """
    curves, largest = {}, 1
    for name, (steps, values) in series.items():
        size = -(-len(steps) // most)
        largest = max(largest, size)
        starts = np.arange(0, len(steps), size)
        counts = np.diff([*starts, len(steps)])
        means = [np.add.reduceat(np.asarray(column, float), starts) / counts for column in (steps, values)]
        curves[name] = {"step": rounded(means[0]), "value": rounded(means[1])}
    return curves, largest


def sharing_steps(curves: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """Return curves with the steps of each kind once: `{"steps": [[…], …], "metrics": {name: [number of its steps, values]}}`."""
    steps: dict[tuple[float, ...], int] = {}
    metrics = {
        name: [steps.setdefault(tuple(curve["step"]), len(steps)), curve["value"]] for name, curve in curves.items()
    }
    return {"steps": list(map(list, steps)), "metrics": metrics}


def rounded(values: Sequence[float] | np.ndarray, digits: int = 6) -> list[float | None]:
    """Round numbers to so many significant digits; `None` for what is not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in map(float, values)]


def ends(steps: Sequence[float], share: float = 0.2) -> tuple[float, float]:
    """Return the steps up to which the first fifth of those logged goes, and from which the last one goes."""
    ordered = sorted(set(steps))
    count = max(1, int(len(ordered) * share))
    return ordered[count - 1], ordered[-count]


def end_means(steps: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the means of a curve over the first and over the last fifth of its steps."""
    early, late = ends(steps)
    at, curve = np.asarray(steps), np.asarray(values, float)
    return float(curve[at <= early].mean()), float(curve[at >= late].mean())


def metrics_by_tag(series: Series, metric: str) -> dict[str, tuple[list[float], list[float]]]:
    """Return a metric's curves by tag, in canonical order; those of evaluations left out."""
    return {tag: series[f"tag/{tag}/{metric}"] for tag in TAGS if f"tag/{tag}/{metric}" in series}
