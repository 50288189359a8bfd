"""What defaults of the configs follow from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from register import Measure, Register, RegisterError, load
from verdicts import ClaimVerdict, Finding, no_effect, widened

from maple_trl.algorithms.replay import QUANTILES
from maple_trl.trainers import AvatarConfig, MAPOConfig


FILE = Path(__file__).with_name("defaults.yaml")
CONFIGS = {config.__name__: config for config in (MAPOConfig, AvatarConfig)}
SIDES = {"above": 1, "below": -1}
WRITTEN_OUT = {"replay_quantiles": list(QUANTILES)}
"""What a default of null is, where recipes write it out."""
RULE = (
    "A default is what its source says and stays so, unless an alternative is found better: the interval of a measure lies "
    "wholly on the side that speaks for the alternative, its effect is no smaller than would matter, no control of its claim "
    "fails, and no measure of the same alternative is clear against it. The interval that speaks for an alternative is corrected "
    "(Bonferroni) for how many measures bear on the field, so that a field without any better value keeps its default in 95 of "
    "100 cases; those shown, and those that speak against it, are not. A measure of a claim with a control that fails speaks for "
    "nothing. Where measures of a field hold different costs equal (as many steps, as many generated completions), each of them must say "
    "that an alternative is better. Where the measures can't tell, the source decides. Accuracy alone counts: filtering, which is for speed, can't win "
    "here. What both sides of a measure have beside the field, where that is not the default, stands behind it: the measure is about "
    "these settings, and its effect may be another with the defaults."
)
ANY, EACH = "any", "each"
"""How many of an alternative's measures must say that it is better."""
BETTER, WORSE, NO_CLEARER, OPEN = "better", "worse", "no clear difference", "not measured"


@dataclass(frozen=True)
class Alternative:
    """
    Another value than the default.

    Attributes:
        signs: of each measure that bears on it, by claim and measure, 1 where an effect above none speaks for it, else -1.
        tests: how many measures bear on the field, those of its other alternatives included.
        by_each: whether it is better only where each of its measures says so, as they hold different costs equal.
    """

    value: str
    signs: Mapping[tuple[str, str], int]
    tests: int
    by_each: bool = False


@dataclass(frozen=True)
class Default:
    """A field of a config, with its default and where that comes from."""

    config: str
    field: str
    value: Any
    source: str
    alternatives: Sequence[Alternative]

    @property
    def actual(self) -> Any:
        """What the config has."""
        return next(one.default for one in fields(CONFIGS[self.config]) if one.name == self.field)


def read_defaults(register: Register, file: Path = FILE) -> list[Default]:
    """
    Read the file of defaults.

    Raises:
        RegisterError: for a name that is given twice, and for a config, a field, a claim, a measure or a side that there is not,
            with its place.
    """
    found = []
    for config, own in load(file)[0].items():
        if config not in CONFIGS:
            raise RegisterError(f"{file.name}: no config {config!r}; there are {', '.join(CONFIGS)}")
        names = {one.name for one in fields(CONFIGS[config])}
        for field, told in own.items():
            where = f"{file.name}: {config}.{field}"
            if field not in names:
                raise RegisterError(f"{where}: the config has no such field")
            if not isinstance(told, dict) or set(told) - {"by"} != {"default", "from", "alternatives"}:
                got = ", ".join(told) if isinstance(told, dict) else repr(told)
                raise RegisterError(f"{where}: must have default, from and alternatives, got {got or 'nothing'}")
            if (by := told.get("by", ANY)) not in (ANY, EACH):
                raise RegisterError(f"{where}: by must be {ANY} or {EACH}, got {by!r}")
            signs = {
                _shown(value): {_measure(register, one, where): _sign(side, where) for one, side in by.items()}
                for value, by in told["alternatives"].items()
            }
            tests = len({one for own_signs in signs.values() for one in own_signs})
            alternatives = [Alternative(value, own_signs, tests, by == EACH) for value, own_signs in signs.items()]
            found.append(Default(config, field, told["default"], told["from"], alternatives))
    return found


def settings_beside(register: Register, defaults: Sequence[Default], one: Default, measure: Measure) -> dict[str, Any]:
    """Return what all variants of a measure have of the other fields with a default, where that is another value."""
    jobs = [register.variants[name].run(0).jobs()[-1][1] for name in measure.variants]
    beside: dict[str, Any] = {}
    for other in defaults:
        values = [job.get(other.field, other.value) for job in jobs]
        if other.config == one.config and other.field != one.field and values == [values[0]] * len(values):
            if values[0] not in (other.value, WRITTEN_OUT.get(other.field, other.value)):
                beside[other.field] = values[0]
    return beside


def _measure(register: Register, text: str, where: str) -> tuple[str, str]:
    claim, _, name = text.partition(".")
    if claim not in register.claims or all(one.name != name for one in register.claims[claim].measures):
        raise RegisterError(f"{where}: the register has no measure {text!r}")
    return claim, name


def _sign(side: str, where: str) -> int:
    if side not in SIDES:
        raise RegisterError(f"{where}: a side is one of {', '.join(SIDES)}, got {side!r}")
    return SIDES[side]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def speaks(finding: Finding, measure: Measure, sign: int, level: float, tests: int) -> int:
    """
    Return 1 where a finding speaks for an alternative, -1 where it speaks against it, 0 where it does neither.

    It takes more to speak for it, which changes a default: an interval that is corrected for so many tests.
    """
    estimate = finding.estimate
    if estimate is None:
        return 0
    none = no_effect(measure.effect)
    side = sign if estimate.value > none else -sign
    if side > 0:
        estimate = widened(estimate, measure.effect, level, tests)
    clear = not estimate.holds(none) and abs(estimate.value - none) >= measure.least
    return side if clear else 0


def judge_alternative(
    alternative: Alternative, found: Mapping[str, tuple[ClaimVerdict, Mapping[str, Finding]]], register: Register
) -> str:
    """Return what the measures say of an alternative to a default: `BETTER`, `WORSE`, `NO_CLEARER` or `OPEN`."""
    said = []
    for (claim, name), sign in alternative.signs.items():
        verdict, findings = found[claim]
        if findings[name].estimate is None:
            continue
        measure = register.claims[claim].measure(name)
        speech = speaks(findings[name], measure, sign, register.rules.level, alternative.tests)
        said.append(0 if verdict.failed else speech)
    if not said:
        return OPEN
    needed = len(alternative.signs) if alternative.by_each else 1
    if said.count(1) >= needed and -1 not in said:
        return BETTER
    return WORSE if -1 in said and 1 not in said else NO_CLEARER
