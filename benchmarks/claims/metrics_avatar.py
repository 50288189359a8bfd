"""Numbers of a run's result for AVATAR's claims: accuracies by tier, costs at a target, gains of stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from values import Censored, MissingValueError, area_under, up_to


Result = Mapping[str, Any]


def by_tier(questions: Iterable[tuple[str, str, float]]) -> dict[str, list[float]]:
    """Return how many answers were right to each question of a tier, which its name begins with."""
    tiers: dict[str, list[float]] = defaultdict(list)
    for name, _, right in questions:
        tiers[name.partition(":")[0]].append(right)
    return tiers


def accuracy(right: Sequence[float], samples: int) -> float:
    """Return the share of right answers, of so many to each question."""
    return sum(right) / (len(right) * samples)


def tier_accuracy(result: Result, tier: str) -> float:
    """Return the accuracy on a tier's held-out questions at the end."""
    found = result["after"]["trained"]
    return accuracy(by_tier(found["questions"])[tier], found["samples"])


# Curves


def rising(values: Sequence[float]) -> list[float]:
    """Return the nearest sequence that never falls, each value weighing the same (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (low, count), (high, more) = pools[-2:]
            pools[-2:] = [((low * count + high * more) / (count + more), count + more)]
    return [value for value, count in pools for _ in range(count)]


def crossing(values: Sequence[float], costs: Sequence[float], target: float) -> float | None:
    """Return the cost at which values, made to rise, first reach a target, between two by a line; `None` where they don't."""
    values = rising(values)
    place = next((place for place, value in enumerate(values) if value >= target), None)
    if not place:
        return None if place is None else costs[0]
    share = (target - values[place - 1]) / (values[place] - values[place - 1])
    return costs[place - 1] + share * (costs[place] - costs[place - 1])


def _curve(result: Result, tier: str, cost: str) -> tuple[list[float], list[float]]:
    points = result["tier_curve"]["points"]
    return [point[tier] for point in points], [point[cost] for point in points]


def tier_reached(result: Result, tier: str, target: float, cost: str) -> float:
    """
    Return what training had cost when the accuracy on a tier reached a target.

    Args:
        cost: `completions`, `completion_tokens`, `cpu_seconds` of training, or `step`.

    Returns:
        Of a run that never does, its whole cost, of which only so much is known that it is too little.
    """
    values, costs = _curve(result, tier, cost)
    found = crossing(values, costs, target)
    return Censored(costs[-1]) if found is None else found


def tier_reaches(result: Result, tier: str, target: float) -> float:
    """Return 1 where the accuracy on a tier reached a target, 0 where it did not."""
    values, _ = _curve(result, tier, "step")
    return float(rising(values)[-1] >= target)


def tier_mean(result: Result, tier: str, cost: str, limit: float) -> float:
    """Return the mean accuracy on a tier while training cost up to a limit, which all runs that are compared reach."""
    values, costs = _curve(result, tier, cost)
    kept = up_to(list(zip(costs, values, strict=True)), limit)
    if kept is None:
        raise MissingValueError(f"the run cost {costs[-1]:g} {cost}, which is less than {limit:g}")
    return area_under(kept) / limit


# Stages


def _accuracies(result: Result) -> dict[str, float]:
    """Return the accuracy after each stage, by its name."""
    names = [name for name, _ in result["config"]["stages"]]
    found = {stage["name"]: stage["after"] for stage in result.get("stages", ())} | {names[-1]: result["after"]}
    return {name: after["trained"]["accuracy"]["all"] for name, after in found.items()}


def stage_accuracy(result: Result, stage: str) -> float:
    """Return the accuracy after a stage of a run; of one that is not trained that of its model."""
    return _accuracies(result)[stage] if result["trained"] else result["after"]["trained"]["accuracy"]["all"]


def stage_gain(result: Result, stage: str) -> float:
    """Return by how much a stage, behind another, raised the accuracy."""
    found = _accuracies(result)
    names = list(found)
    place = names.index(stage)
    if place == 0:
        raise ValueError(f"{stage} is the first stage: what was before it is another run")
    return found[stage] - found[names[place - 1]]


for _function in (tier_reached, tier_reaches, tier_mean):
    _function.needs = ("tier_curve",)  # type: ignore[attr-defined]
tier_accuracy.needs = ("after",)  # type: ignore[attr-defined]
for _function in (stage_accuracy, stage_gain):
    _function.needs = ("after", "stages")  # type: ignore[attr-defined]

METRICS: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        tier_accuracy,
        tier_reached,
        tier_reaches,
        tier_mean,
        stage_accuracy,
        stage_gain,
    )
}
"""What the register may name."""
