"""Numbers read off a run's result: dotted paths into it, and functions over it by name."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from values import Censored, MissingValueError, area_under, point_name

from maple_trl.messages import did_you_mean
from maple_trl.metrics.gaps import modality_gap


Result = Mapping[str, Any]


def needs(*names: str) -> Callable[[Callable], Callable]:
    """Say which parts of a result a function reads, so that a measure of a variant without them is refused."""

    def told(function: Callable) -> Callable:
        function.needs = names  # type: ignore[attr-defined]
        return function

    return told


@dataclass(frozen=True)
class Metric:
    """
    A metric as the register writes it.

    Attributes:
        paths: what it reads of a result, or the parts that it reads from.
        value: what it is of a result; raises [`MissingValueError`] where that does not say.
        arguments: of a function, by name, those that are not written too.
    """

    text: str
    paths: tuple[str, ...]
    value: Callable[[Result], float]
    arguments: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def reads_questions(self) -> bool:
        """Whether questions may stand behind it: those of `after`, which a function may read that names no part."""
        return not self.paths or any(path.split(".")[0] in ("after", "stages") for path in self.paths)

    @property
    def reads_seconds(self) -> bool:
        """Whether it is of the seconds that whole runs took, which depend on what ran beside them."""
        return "_seconds" in self.text


def read_metric(text: str) -> Metric:
    """Read a dotted path (`after.trained.accuracy.all`), or a function with arguments (`reached(all, 0.6, completions)`)."""
    called = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", text.strip())
    if called is None:
        return Metric(text, (text,), lambda result: read(result, text))
    name, inside = called.groups()
    if inside is None and name not in METRICS:
        return Metric(text, (name,), lambda result: read(result, name))
    if name not in METRICS:
        raise ValueError(f"no function {name!r}" + did_you_mean(name, METRICS, f"there are {', '.join(METRICS)}"))
    arguments = [_number(one.strip()) for one in inside.split(",")] if inside and inside.strip() else []
    function = METRICS[name]
    try:
        bound = inspect.signature(function).bind(None, *arguments)
    except TypeError as error:
        raise ValueError(f"{text}: {error}; its arguments are {_told_arguments(function)}") from None
    parts = list(getattr(function, "needs", ()))
    if getattr(function, "takes_paths", False):
        parts += [one for one in arguments if isinstance(one, str)]
    bound.apply_defaults()
    _, *told = bound.arguments.items()
    return Metric(text, tuple(parts), lambda result: _checked(text, function(result, *arguments)), dict(told))


def _told_arguments(function: Callable) -> str:
    return (
        ", ".join(str(one).split(":")[0] for one in [*inspect.signature(function).parameters.values()][1:]) or "none"
    )


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _checked(text: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MissingValueError(f"{text} is {value!r}, no finite number")
    return value if isinstance(value, float) else float(value)


def find(result: Result, path: str) -> Any:
    """Return what stands at a dotted path of a result; names may hold slashes, numbers count in lists."""
    place: Any = result
    parts = path.split(".")
    for number, part in enumerate(parts):
        known = place if isinstance(place, Mapping) else range(len(place)) if isinstance(place, list) else ()
        key = int(part) if isinstance(place, list) and part.isdigit() else part
        if key not in known:
            there = ", ".join(map(str, known)) or "nothing"
            raise MissingValueError(
                f"{path}: no {part!r} in {'.'.join(parts[:number]) or 'the result'}; there is {there}"
            )
        place = place[key]
    return place


def read(result: Result, path: str) -> float:
    """Return the number at a dotted path of a result."""
    value = find(result, path)
    if isinstance(value, list):
        raise MissingValueError(f"{path} is a series; say mean({path}), first({path}) or last({path})")
    return _checked(path, value)


def _paths(function: Callable) -> Callable:
    function.takes_paths = True  # type: ignore[attr-defined]
    return function


# Of a series, and of two numbers


def _series(result: Result, path: str, part: float = 1.0) -> tuple[list[float], int]:
    values = [value for value in find(result, path) if value is not None]
    if not values:
        raise MissingValueError(f"{path} has no value")
    return values, max(1, round(len(values) * part))


@_paths
def mean(result: Result, path: str) -> float:
    """Return the mean of a series."""
    return statistics.fmean(_series(result, path)[0])


@_paths
def first(result: Result, path: str, part: float = 0.25) -> float:
    """Return the mean of the first part of a series, by default a quarter."""
    values, count = _series(result, path, part)
    return statistics.fmean(values[:count])


@_paths
def last(result: Result, path: str, part: float = 0.25) -> float:
    """Return the mean of the last part of a series, by default a quarter."""
    values, count = _series(result, path, part)
    return statistics.fmean(values[-count:])


@_paths
def quotient(result: Result, above: str, below: str) -> float:
    """Return one number of a result over another."""
    divisor = read(result, below)
    if divisor == 0:
        raise MissingValueError(f"{below} is 0, and nothing can be divided by it")
    return read(result, above) / divisor


@_paths
def minus(result: Result, first: str, second: str) -> float:
    """Return one number of a result less another."""
    return read(result, first) - read(result, second)


# Of accuracies and curves


@needs("after")
def gap(result: Result, access: str = "trained", weighting: str = "sample") -> float:
    """Return MAPLE's modality gap after training (the mean of its three differences, as a fraction)."""
    found = find(result, f"after.{access}")
    try:
        return modality_gap(found["accuracy"], found.get("counts"), weighting).mean
    except ValueError as error:
        raise MissingValueError(str(error)) from error


def _points(result: Result, what: str, cost: str) -> list[tuple[float, float]]:
    """Return cost and accuracy of each point of a run's learning curve."""
    points = find(result, "curve.points")
    if not points:
        raise MissingValueError("curve.points is empty")
    return [(read(point, point_name(cost)), read(point, f"accuracy.{point_name(what)}")) for point in points]


@needs("curve")
def reached(result: Result, what: str, target: float, cost: str) -> float:
    """
    Return what a run had spent when the mean of two neighbouring points of its curve first reached a target.

    That is counted at the later of the two. A run that never gets there has its whole cost, [`Censored`].

    Args:
        what: `all` (or `held_out`), or a tag.
        cost: `completions`, `tokens`, `steps`, `cpu_seconds` or `wall_seconds` of training.
    """
    points = _points(result, what, cost)
    for (_, before), (spent, after) in zip(points, points[1:], strict=False):
        if (before + after) / 2 >= target:
            return spent
    return Censored(points[-1][0])


@needs("curve")
def area(result: Result, what: str, cost: str = "completions") -> float:
    """Return the mean accuracy over a run's cost: the area under its curve over the curve's length."""
    points = _points(result, what, cost)
    length = points[-1][0] - points[0][0]
    if length <= 0:
        raise MissingValueError(f"the curve has no length in {cost}")
    return area_under(points) / length


METRICS: dict[str, Callable[..., float]] = {
    "mean": mean,
    "first": first,
    "last": last,
    "quotient": quotient,
    "minus": minus,
    "gap": gap,
    "reached": reached,
    "area": area,
}
"""Functions by the name that the register calls them by; those of `metrics_<topic>.py` are added."""


def collect(files: Sequence[Path] | None = None) -> None:
    """Add the `METRICS` of every `metrics_<topic>.py`; a name that two files have is an error."""
    for file in sorted(Path(__file__).parent.glob("metrics_*.py")) if files is None else files:
        for name, function in importlib.import_module(file.stem).METRICS.items():
            if METRICS.setdefault(name, function) is not function:
                raise ValueError(f"{file.name}: there is another metric {name!r}; a name has one meaning")


collect()
