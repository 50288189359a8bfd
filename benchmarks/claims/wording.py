"""Effects, expectations and what intervals say of them, in words."""

from __future__ import annotations

from collections.abc import Sequence

from register import Claim, Measure
from verdicts import CONTRARY, DOES_NOT, EXCLUDED, HOLDS, REVERSED, SMALLER, Finding, no_effect


NOT_MEASURED = "not measured"


def lacks_runs(found: Finding) -> bool:
    """Tell whether a measure has no value because its first look lacks runs."""
    return found.estimate is None and found.reason.startswith(NOT_MEASURED)


def looks_for_an_effect(claim: Claim) -> bool:
    """Tell whether a claim expects an effect, of any of the measures that decide it."""
    return any(one.role == "claim" and one.expects in ("above", "below") for one in claim.measures)


def expected(measure: Measure) -> str:
    """Return what a measure is expected to be, with the least effect that would matter."""
    none = f"{no_effect(measure.effect):g}"
    if measure.expects == "equal":
        return f"{none} ± {measure.least:g}"
    if measure.expects.startswith("not "):
        return f"{measure.expects} {none}, by {measure.least:g} or more"
    return f"{measure.expects} {none} ({measure.least:g} would matter)"


def told_nuance(measure: Measure, found: Finding) -> str:
    """Return in words what the interval of a measure says beside its verdict."""
    what = {"not below": "below", "not above": "above", "equal": "apart"}.get(measure.expects)
    if what and found.verdict == DOES_NOT:
        return f"{what}, by {measure.least:g} or more"
    if what and found.nuance == CONTRARY:
        if found.verdict == HOLDS:
            return f"{what}, by less than {measure.least:g}"
        return f"{what}, perhaps by {measure.least:g} or more"
    return {
        SMALLER: "smaller than would matter",
        REVERSED: "the other way round",
        EXCLUDED: told_bound(measure),
    }.get(found.nuance, "")


def told_bound(measure: Measure) -> str:
    """Return on which side of the smallest effect that would matter an interval lies that excludes it."""
    above = measure.expects == "above"
    bound = no_effect(measure.effect) + (measure.least if above else -measure.least)
    return ("less than " if above else "more than ") + (f"× {bound:g}" if measure.effect == "ratio" else f"{bound:+g}")


def by_name(told: Sequence[tuple[str, str]]) -> str:
    """Return what is told of each of several names, those of which the same is told together; of all the same without names."""
    names: dict[str, list[str]] = {}
    for name, what in told:
        names.setdefault(what, []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{', '.join(own)}: {what}" for what, own in names.items() if what)


def shown_number(number: float, measure: Measure) -> str:
    """Return an effect without its interval."""
    return f"× {number:.3g}" if measure.effect == "ratio" else f"{number:+.4f}"


def where_it_lies(figure: float, found: Finding) -> str:
    """Return whether a paper's figure lies within the interval that is found."""
    if found.estimate is None:
        return ""
    return " (within)" if found.estimate.holds(figure) else " (outside)"


def shown_interval(found: Finding, measure: Measure) -> str:
    """Return an effect with its interval."""
    estimate = found.estimate
    if estimate is None:
        return NOT_MEASURED
    sign = "" if measure.effect == "ratio" else "+"
    numbers = (estimate.value, estimate.low, estimate.high)
    small = measure.effect != "ratio" and max(map(abs, numbers)) < 0.1
    value, low, high = (
        f"{one:{sign}.{4 if small else 3}{'f' if max(map(abs, numbers)) < 1000 else 'g'}}" for one in numbers
    )
    return f"{'× ' if measure.effect == 'ratio' else ''}{value} [{low}, {high}]"


def shown_effect(found: Finding, measure: Measure) -> str:
    """Return an effect, or why there is none, in a line on the screen."""
    return shown_interval(found, measure) if found.estimate else f"no value: {found.reason}"
