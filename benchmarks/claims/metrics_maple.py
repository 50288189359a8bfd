"""Numbers of MAPLE's claims that are read off a run's result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from maple_trl.metrics.gaps import tag_disparity


TAGS = ("V", "A", "S", "VA", "VS", "AS", "VAS")


def gradient_ratio(result: Mapping[str, Any], scheme: str, base: str, what: str = "variance") -> float:
    """Return a quantity of a scheme's gradients over that of another's, at the same weights; NaN where one is not known."""
    above, below = (result["gradient"][name][what] for name in (scheme, base))
    return above / below if above is not None and below else math.nan


def tags_accuracy(result: Mapping[str, Any], access: str, *tags: str) -> float:
    """Return the plain mean of some tags' accuracies after training, asked with an access."""
    accuracy = result["after"][access]["accuracy"]
    return statistics.fmean(accuracy[tag] for tag in tags)


def embedded_tier(result: Mapping[str, Any], access: str, tier: str) -> float:
    """Return the accuracy after training on the questions of the `hard` tier, or on the `usual` ones, asked with an access."""
    if tier not in ("hard", "usual"):
        raise ValueError(f"a tier is hard or usual, not {tier!r}")
    asked = result["after"][access]
    own = [total for name, _, total in asked["questions"] if name.endswith("-hard") == (tier == "hard")]
    return statistics.fmean(own) / asked["samples"] if own else math.nan


def disparity(result: Mapping[str, Any], access: str) -> float:
    """Return the mean difference between the accuracies of two tags (MAPLE, figures 4 and 5), asked with an access."""
    accuracy = result["after"][access]["accuracy"]
    differences = tag_disparity({tag: accuracy[tag] for tag in TAGS})
    return float(differences[np.triu_indices(len(TAGS), 1)].mean())


def weight_lead(result: Mapping[str, Any], part: str, *tags: str) -> float:
    """Return how much more some tags weighed than the others, in the `first` or the `last` half of a log; NaN where one is not in it."""
    return _mean_weight(result, part, tags) - _mean_weight(result, part, [tag for tag in TAGS if tag not in tags])


def _mean_weight(result: Mapping[str, Any], part: str, tags: Sequence[str]) -> float:
    if part not in ("first", "last"):
        raise ValueError(f"a weight is of the first or the last half of a run, not of {part!r}")
    means = []
    for tag in tags:
        series = result["log"].get(f"tag/{tag}/weight", [])
        half = series[: len(series) // 2] if part == "first" else series[len(series) // 2 :]
        values = [value for value in half if value is not None]
        means.append(statistics.fmean(values) if values else math.nan)
    return statistics.fmean(means)


def remaining(result: Mapping[str, Any], name: str) -> float:
    """Return what is left of a logged quantity at the end: the mean of its last quarter over that of its first."""
    values = [value for value in result["log"][name] if value is not None]
    quarter = max(1, len(values) // 4)
    return statistics.fmean(values[-quarter:]) / statistics.fmean(values[:quarter])


METRICS: dict[str, Callable[..., float]] = {
    "gradient_ratio": gradient_ratio,
    "tags_accuracy": tags_accuracy,
    "embedded_tier": embedded_tier,
    "disparity": disparity,
    "weight_lead": weight_lead,
    "remaining": remaining,
}
"""Functions by the name that the register calls them by."""

for _name, _parts in {
    "gradient_ratio": ("gradient",),
    "tags_accuracy": ("after",),
    "embedded_tier": ("after",),
    "disparity": ("after",),
    "weight_lead": ("log",),
    "remaining": ("log",),
}.items():
    METRICS[_name].needs = _parts  # type: ignore[attr-defined]
