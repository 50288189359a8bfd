"""How often the rules find what is there, and what is not: registers with known effects, judged as measured ones are."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from evidence import GROUPS, Evidence
from numpy.typing import NDArray
from verdicts import HOLDS, Looks, Sample, judge


REGISTERS = 200
CLAIMS = 10
"""Claims with the planted effect, and as many without any, in each register."""
STATED = {"planted": 0.70, "null": 0.05}
"""Shares of claims found, at the deviations of `Setting`: at least, of planted effects; at most, of nulls, either way."""


@dataclass(frozen=True)
class Setting:
    """
    What differs by chance, in accuracy.

    Attributes:
        effect: what is planted.
        seeds: standard deviation between runs of one variant, with the noise of their answers.
        questions: standard deviation, between questions, of how much better one variant is on them than the other.
        asked, samples: questions of a run, and answers to each.
    """

    effect: float = 0.03
    seeds: float = 0.02
    questions: float = 0.1
    asked: int = 448
    samples: int = 5


@dataclass(frozen=True)
class Planted:
    """A claim that a variant is better."""

    least: float
    effect: str = "difference"
    expects: str = "above"


@dataclass(frozen=True)
class Rates:
    """
    Shares of claims.

    Attributes:
        planted: with the effect, that hold.
        null: without one, whose interval leaves out no effect, on either side.
        claims: how many of each were simulated.
        second_looks: of both, that were looked at twice.
    """

    planted: float
    null: float
    claims: int
    second_looks: float


def simulate(rules: Looks, setting: Setting, registers: int = REGISTERS, seed: int = 0) -> Rates:
    """Judge simulated registers, each with [`CLAIMS`] claims with the effect and as many without."""
    draw = np.random.default_rng(seed)
    asked = Planted(least=setting.effect)
    planted = null = twice = 0
    for _ in range(registers):
        for effect in (setting.effect, 0.0):
            for of, against in _claims(draw, setting, effect, rules.looks[-1]):
                found = judge(of, against, asked, rules)
                assert found.estimate is not None
                twice += found.estimate.seeds > rules.looks[0]
                if effect:
                    planted += found.verdict == HOLDS
                else:
                    null += found.estimate.low > 0 or found.estimate.high < 0
    claims = registers * CLAIMS
    return Rates(planted / claims, null / claims, claims, twice / (2 * claims))


def _claims(draw: np.random.Generator, setting: Setting, effect: float, seeds: int) -> list[tuple[Sample, Sample]]:
    """Return the two variants' accuracies of each claim of a register."""
    shape = (CLAIMS, 1, setting.asked)
    level = draw.uniform(0.3, 0.8, shape)
    noise = float((level * (1 - level)).mean()) / (setting.samples * setting.asked)
    own = math.sqrt(max(0.0, setting.seeds**2 - noise))
    better = effect + setting.questions * draw.standard_normal(shape)
    arms = []
    for share in (0.5, -0.5):
        run = own * draw.standard_normal((CLAIMS, seeds, 1))
        chance = level + share * better + run
        right = sum(draw.random(chance.shape, dtype=np.float32) < chance for _ in range(setting.samples))
        arms.append(_samples(right / setting.samples))
    return list(zip(*arms, strict=True))


def _samples(scores_CSQ: NDArray[np.float64]) -> list[Sample]:
    asked = scores_CSQ.shape[2]
    member_QG = np.arange(asked)[:, None] % GROUPS == np.arange(GROUPS)
    total_CS1 = scores_CSQ.sum(axis=2, keepdims=True)
    left_CSG = (total_CS1 - scores_CSQ @ member_QG) / (asked - member_QG.sum(axis=0))
    return [Sample(list(means[:, 0] / asked), list(left)) for means, left in zip(total_CS1, left_CSG, strict=True)]


def measured_setting(evidence: Evidence, setting: Setting) -> Setting:
    """Return a setting with the deviations of whole accuracies that the results on disk show, where there are enough of them."""
    looks = evidence.register.rules.looks
    between, questions = [], []
    for claim in evidence.register.claims.values():
        for measure in claim.measures:
            accuracy = re.fullmatch(r"after\.(\w+)\.accuracy\.all", measure.metric.text)
            if accuracy is None:
                continue
            found = evidence.measure(measure).estimate
            if (
                found is None
                or measure.effect != "difference"
                or found.seeds < looks[0]
                or math.isnan(found.evaluation)
            ):
                continue
            between.append(found.spread**2 / 2)
            questions.append(
                found.evaluation**2 * len(evidence.read(measure.of, 0)["after"][accuracy[1]]["questions"])
            )
    if not between:
        return setting
    return replace(
        setting,
        seeds=math.sqrt(statistics.fmean(between)),
        questions=math.sqrt(statistics.fmean(questions)),
    )


def told_rates(setting: Setting, rates: Rates, stated: bool) -> Sequence[str]:
    """Return what a simulation found, in words."""
    margin = 2 * math.sqrt(0.25 / rates.claims)
    lines = [
        f"{rates.claims} claims with an effect of {setting.effect:+.3f} and as many without; standard deviation "
        f"{setting.seeds:.3f} between seeds, {setting.questions:.3f} between questions ({setting.asked} of them, "
        f"{setting.samples} answers each)",
        f"planted effects found: {rates.planted:.1%} (to {margin:.1%})",
        f"nulls found, either way: {rates.null:.1%}",
        f"looked at twice: {rates.second_looks:.1%}",
    ]
    if stated:
        lines.append(f"stated: at least {STATED['planted']:.0%} and at most {STATED['null']:.0%}")
    return lines
