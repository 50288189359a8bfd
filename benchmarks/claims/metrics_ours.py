"""Metrics of curves at a budget, and of QA+ by stratum, required tag and abstention."""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from values import area_under, point_name, up_to

from maple_trl.metrics.accuracy import superset_scores
from maple_trl.modalities import ModalityTag


# Curves

COSTS = ("tokens", "completions", "cpu_seconds", "steps")


def _points(result: Mapping[str, Any], cost: str, budget: float) -> list[tuple[float, float]] | None:
    """Return a run's curve up to a budget, its end interpolated; `None` where the run ended before it."""
    if cost not in COSTS:
        raise ValueError(f"no cost {cost!r} of a curve; there are {', '.join(COSTS)}")
    points = [(float(point[point_name(cost)]), float(point["accuracy"]["all"])) for point in result["curve"]["points"]]
    return up_to(points, budget)


def value_at(result: Mapping[str, Any], cost: str, budget: float) -> float | None:
    """Accuracy of a curve where a run has cost a budget."""
    kept = _points(result, cost, float(budget))
    return None if kept is None else kept[-1][1]


def area_to(result: Mapping[str, Any], cost: str, budget: float) -> float | None:
    """Mean accuracy of a curve from the start to a budget."""
    kept = _points(result, cost, float(budget))
    return None if kept is None else area_under(kept) / float(budget)


# QA+


def _answers(result: Mapping[str, Any]) -> list[tuple[str, str, str, str, float]]:
    """Return question, required tag, stratum, input and score of each row that was asked."""
    asked = result["after"]["trained"]
    rows = []
    for name, fed, right in asked["questions"]:
        question, required, stratum, *_ = name.split("/")
        rows.append((question, required, stratum, fed, right / asked["samples"]))
    return rows


def _mean(values: Iterable[float]) -> float | None:
    """Return a mean; `None` where there is nothing to take it of, as in a run that is asked a few questions."""
    known = list(values)
    return statistics.fmean(known) if known else None


def stratum_accuracy(result: Mapping[str, Any], stratum: str) -> float | None:
    """Accuracy of the rows of a stratum, each input of a question counting once."""
    return _mean(score for _, _, own, _, score in _answers(result) if own == stratum)


def sufficient_accuracy(result: Mapping[str, Any]) -> float | None:
    """Accuracy of the rows that are fed what they require, or more."""
    return _mean(score for _, _, own, _, score in _answers(result) if own != "deficit")


def required_accuracy(result: Mapping[str, Any], tag: str) -> float | None:
    """Accuracy over all inputs of the questions that require a tag: a column of MAPLE's Table 4."""
    return _mean(score for _, required, _, _, score in _answers(result) if required == str(tag))


@functools.cache
def _family(tag: str) -> str:
    return ModalityTag.parse(tag).arity


def family_accuracy(result: Mapping[str, Any], family: str) -> float | None:
    """Accuracy over all inputs of the questions that require one signal (`uni`), two (`bi`), three (`tri`) or several (`multi`)."""
    families = ("bi", "tri") if family == "multi" else (family,)
    return _mean(score for _, required, _, _, score in _answers(result) if _family(required) in families)


def several_over_one(result: Mapping[str, Any]) -> float | None:
    """How much better questions that require several signals are answered than those that require one."""
    several, one = family_accuracy(result, "multi"), family_accuracy(result, "uni")
    return None if several is None or one is None else several - one


def superset_macro(result: Mapping[str, Any]) -> float | None:
    """MAPLE 3.3: means over the inputs that suffice of each question, then over questions, then over required tags."""
    rows = _answers(result)
    tags = {question: required for question, required, *_ in rows}
    scores = superset_scores(
        [row[4] for row in rows], [row[0] for row in rows], [row[1] for row in rows], [row[3] for row in rows]
    )
    by_tag: dict[str, list[float]] = defaultdict(list)
    for question, own in scores.items():
        if own:
            by_tag[tags[question]].append(statistics.fmean(own))
    return _mean(statistics.fmean(own) for own in by_tag.values())


def _abstained(result: Mapping[str, Any], *strata: str) -> float:
    rows = [row for row in result["abstention"]["counts"] if row[1] in strata]
    return sum(row[3] for row in rows) / sum(row[2] for row in rows)


def abstention_recall(result: Mapping[str, Any]) -> float:
    """Of the questions that lack a signal, the share that is answered with the none answer."""
    return _abstained(result, "deficit")


def needless_abstention(result: Mapping[str, Any], stratum: str = "") -> float:
    """Of the questions that are fed enough, of one stratum or of both, the share that is answered with the none answer all the same."""
    return _abstained(result, *([stratum] if stratum else ["exact", "superset"]))


def abstention_precision(result: Mapping[str, Any]) -> float | None:
    """Of the none answers given, the share given where a signal was missing, as if as many questions lacked one as did not."""
    recall, needless = abstention_recall(result), needless_abstention(result)
    return recall / (recall + needless) if recall + needless else None


def abstention_skill(result: Mapping[str, Any]) -> float:
    """How much oftener the none answer is given where a signal is missing than where none is: 0 of a policy that does not look."""
    return abstention_recall(result) - needless_abstention(result)


METRICS: dict[str, Callable[..., float | None]] = {}
"""By name, as the register calls them; `needs` says what of a result they read."""

for _part, _functions in {
    "curve": (value_at, area_to),
    "after": (
        stratum_accuracy,
        sufficient_accuracy,
        required_accuracy,
        family_accuracy,
        several_over_one,
        superset_macro,
    ),
    "abstention": (abstention_recall, needless_abstention, abstention_precision, abstention_skill),
}.items():
    for _function in _functions:
        _function.needs = (_part,)  # type: ignore[attr-defined]
        METRICS[_function.__name__] = _function
