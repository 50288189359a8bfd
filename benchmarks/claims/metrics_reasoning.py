"""What is read off results of the task `reasoning`; a question's id ends in its number of steps and its tier."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any


SHORT, LONG = ("2", "3"), ("4", "5")


def accuracy_of(result: Mapping[str, Any], *which: Any) -> float:
    """Return the accuracy on questions of some tier (`easy`, `hard`) or numbers of steps (`2` to `5`)."""
    asked, samples = result["after"]["trained"]["questions"], result["after"]["trained"]["samples"]
    wanted = {one if isinstance(one, str) else f"{one:g}" for one in which}
    right = [count / samples for name, _, count in asked if wanted & set(name.split("-")[-2:])]
    if not right:
        raise ValueError(
            f"no question of {', '.join(sorted(wanted))}; ids end in -STEPS-TIER, such as {asked[0][0]!r}"
        )
    return statistics.fmean(right)


def long_above_short(result: Mapping[str, Any]) -> float:
    """Return the accuracy on 4 and 5 steps less that on 2 and 3."""
    return accuracy_of(result, *LONG) - accuracy_of(result, *SHORT)


def zero_variance(result: Mapping[str, Any], groups: str = "fresh") -> float:
    """
    Return the share of groups, over a run, whose rewards are all equal.

    Args:
        groups: `fresh` counts what is generated alone; `mixed` also the replayed completions of the group's own prompt.
    """
    if groups not in ("fresh", "mixed"):
        raise ValueError(f"groups must be fresh or mixed, got {groups!r}")
    series = result["log"].get(f"replay/zero_variance_{groups}", result["log"]["frac_reward_zero_std"])
    return statistics.fmean(value for value in series if value is not None)


for _function, _part in ((accuracy_of, "after"), (long_above_short, "after"), (zero_variance, "log")):
    _function.needs = (_part,)  # type: ignore[attr-defined]  # what of a result it reads

METRICS: dict[str, Callable[..., float]] = {
    "accuracy_of": accuracy_of,
    "long_above_short": long_above_short,
    "zero_variance": zero_variance,
}
