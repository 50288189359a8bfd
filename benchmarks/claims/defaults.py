"""What defaults of the configs follow from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from register import Measure, Register, RegisterError
from verdicts import ClaimVerdict, Finding, no_effect

from maple_trl.trainers import AvatarConfig, MAPOConfig


FILE = Path(__file__).with_name("defaults.yaml")
CONFIGS = {config.__name__: config for config in (MAPOConfig, AvatarConfig)}
SIDES = {"above": 1, "below": -1}
RULE = (
    "A default is what its source says and stays so, unless an alternative is found better: the interval of a measure lies "
    "wholly on the side that speaks for the alternative, its effect is no smaller than would matter, no control of its claim "
    "fails, and no measure of the same alternative is as clear against it. A measure of a claim with a control that fails speaks "
    "for nothing. Where the measures can't tell, the source decides. Intervals are not corrected for how many alternatives "
    "there are, and accuracy alone counts: filtering, which is for speed, can't win here."
)
BETTER, WORSE, NO_CLEARER, OPEN = "better", "worse", "no clear difference", "not measured"


@dataclass(frozen=True)
class Alternative:
    """
    Another value than the default.

    Attributes:
        signs: of each measure that bears on it, by claim and measure, 1 where an effect above none speaks for it, else -1.
    """

    value: str
    signs: Mapping[tuple[str, str], int]


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
        RegisterError: for a config, a field, a claim, a measure or a side that there is not, with its place.
    """
    found = []
    for config, own in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        if config not in CONFIGS:
            raise RegisterError(f"{file.name}: no config {config!r}; there are {', '.join(CONFIGS)}")
        names = {one.name for one in fields(CONFIGS[config])}
        for field, told in own.items():
            where = f"{file.name}: {config}.{field}"
            if field not in names:
                raise RegisterError(f"{where}: the config has no such field")
            if not isinstance(told, dict) or set(told) != {"default", "from", "alternatives"}:
                got = ", ".join(told) if isinstance(told, dict) else repr(told)
                raise RegisterError(f"{where}: must have default, from and alternatives, got {got or 'nothing'}")
            alternatives = [
                Alternative(
                    _shown(value), {_measure(register, one, where): _sign(side, where) for one, side in by.items()}
                )
                for value, by in told["alternatives"].items()
            ]
            found.append(Default(config, field, told["default"], told["from"], alternatives))
    return found


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


def speaks(finding: Finding, measure: Measure, sign: int) -> int:
    """Return 1 where a finding speaks for an alternative, -1 where it speaks against it, 0 where it does neither."""
    estimate = finding.estimate
    if estimate is None:
        return 0
    none = no_effect(measure.effect)
    if not estimate.low <= none <= estimate.high and abs(estimate.value - none) >= measure.least:
        return sign if estimate.value > none else -sign
    return 0


def judge_alternative(
    alternative: Alternative, found: Mapping[str, tuple[ClaimVerdict, Mapping[str, Finding]]], register: Register
) -> str:
    """Return what the measures say of an alternative to a default: `BETTER`, `WORSE`, `NO_CLEARER` or `OPEN`."""
    said = []
    for (claim, name), sign in alternative.signs.items():
        verdict, findings = found[claim]
        if findings[name].estimate is None:
            continue
        speech = speaks(findings[name], register.claims[claim].measure(name), sign)
        said.append(0 if verdict.failed else speech)
    if not said:
        return OPEN
    if 1 in said and -1 not in said:
        return BETTER
    return WORSE if -1 in said and 1 not in said else NO_CLEARER
