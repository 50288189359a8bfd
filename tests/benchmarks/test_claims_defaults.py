"""Defaults of the configs are what their sources and the committed results say."""

import pytest
from claim_sets import CLAIMS
from defaults import (
    BETTER,
    NO_CLEARER,
    OPEN,
    WORSE,
    Alternative,
    judge_alternative,
    read_defaults,
    settings_beside,
)
from evidence import Evidence
from register import RegisterError, read_register
from verdicts import CANT_TELL, HOLDS, ClaimVerdict, Estimate, Finding


def finding(low, value, high, verdict=HOLDS):
    return Finding(verdict, Estimate(value, low, high, 5, 0.01, 0.01, 4))


def test_each_default_is_what_its_sources_and_the_results_say():
    register = read_register(CLAIMS)
    evidence = Evidence(register, CLAIMS / "results")
    defaults = read_defaults(register)
    bearing = {name for one in defaults for other in one.alternatives for name, _ in other.signs}
    found = {name: evidence.claim(register.claims[name]) for name in bearing}
    assert {one.config for one in defaults} == {"MAPOConfig", "AvatarConfig"}
    for one in defaults:
        assert one.actual == one.value, f"{one.config}.{one.field}"
        for other in one.alternatives:
            assert judge_alternative(other, found, register) != BETTER, f"{one.config}.{one.field}: {other.value}"


@pytest.mark.parametrize(
    "value, tests, expected",
    [
        ((-0.09, -0.06, -0.03), 1, BETTER),  # the measure is of the default: below speaks for the alternative
        ((0.03, 0.06, 0.09), 1, WORSE),
        ((-0.02, 0.01, 0.04), 1, NO_CLEARER),
        ((-0.03, -0.02, -0.01), 1, NO_CLEARER),  # clear, and smaller than would matter
        ((-0.09, -0.05, -0.01), 10, NO_CLEARER),  # clear, and not for the best of ten
        ((-0.06, -0.05, -0.04), 10, BETTER),
        ((0.01, 0.05, 0.09), 10, WORSE),  # what speaks against a change needs no correction
    ],
)
def test_an_alternative_is_better_by_its_corrected_interval_alone(value, tests, expected):
    register = read_register(CLAIMS)
    other = Alternative("token", {("maple-sample-accuracy", "accuracy"): -1}, tests)
    held = ClaimVerdict(HOLDS, (), ())
    assert (
        judge_alternative(other, {"maple-sample-accuracy": (held, {"accuracy": finding(*value)})}, register)
        == expected
    )
    # A control that fails says that the effect may be something else.
    failing = ClaimVerdict(HOLDS, ("scale",), ())
    said = judge_alternative(other, {"maple-sample-accuracy": (failing, {"accuracy": finding(*value)})}, register)
    assert said == NO_CLEARER
    nothing = {"maple-sample-accuracy": (held, {"accuracy": Finding(CANT_TELL, reason="not measured")})}
    assert judge_alternative(other, nothing, register) == OPEN


@pytest.mark.parametrize(
    ("second", "by_each", "expected"),
    [
        ((-0.02, 0.01, 0.04), False, BETTER),
        ((-0.02, 0.01, 0.04), True, NO_CLEARER),  # better for one cost alone
        ((-0.09, -0.06, -0.03), True, BETTER),
        (None, True, NO_CLEARER),
    ],
)
def test_measures_that_hold_different_costs_equal_must_all_speak_for_an_alternative(second, by_each, expected):
    names = [("avatar-ratio", "6-2"), ("avatar-ratio-completions", "6-2")]
    other = Alternative("2", dict.fromkeys(names, -1), 1, by_each)
    held = ClaimVerdict(HOLDS, (), ())
    findings = [finding(-0.09, -0.06, -0.05), finding(*second) if second else Finding(CANT_TELL)]
    found = {claim: (held, {name: one}) for (claim, name), one in zip(names, findings, strict=True)}
    assert judge_alternative(other, found, read_register(CLAIMS)) == expected


def test_an_alternative_is_corrected_for_all_that_bears_on_its_field():
    by_field = {(one.config, one.field): one for one in read_defaults(read_register(CLAIMS))}
    curriculum = by_field["MAPOConfig", "curriculum"].alternatives
    assert len(curriculum) > 1
    assert {one.tests for one in curriculum} == {len({name for one in curriculum for name in one.signs})}


def test_what_both_sides_of_a_measure_have_instead_of_a_default_is_told():
    register = read_register(CLAIMS)
    defaults = read_defaults(register)
    by_field = {(one.config, one.field): one for one in defaults}

    def beside(config, field, claim, name):
        return settings_beside(register, defaults, by_field[config, field], register.claims[claim].measure(name))

    # MAPLE's axes are measured beside token-level aggregation, and its loss aggregation beside nothing else.
    weights = beside("MAPOConfig", "tag_weights", "maple-adaptive-weights-accuracy", "accuracy")
    assert weights == {"loss_aggregation": "token"}
    assert beside("MAPOConfig", "loss_aggregation", "maple-sample-accuracy", "accuracy") == {}
    assert beside("AvatarConfig", "tas_shape", "avatar-shape", "inverse") == {"tas_lambda": 1.0}
    # What the two differ in is not beside them.
    assert "tas_lambda" not in beside("AvatarConfig", "replay_draw", "avatar-components", "both")


@pytest.mark.parametrize(
    "text, why",
    [
        (
            "MAPOConfig: {}\nAvatarConfig: {}\nMAPOConfig: {}",
            "defaults.yaml: line 3: MAPOConfig is given twice, first in",
        ),
        ("AvatarConfig: {hints: {default: 1, default: 2}}", "line 1: default is given twice"),
        ("GRPOConfig: {beta: {}}", "no config 'GRPOConfig'"),
        ("MAPOConfig: {betta: {}}", "MAPOConfig.betta: the config has no such field"),
        ("MAPOConfig: {hints: {default: 1}}", "no such field|must have"),
        ("AvatarConfig: {hints: {default: 1}}", "must have default, from and alternatives"),
        (
            "AvatarConfig: {hints: {default: 1, from: x, by: all, alternatives: {}}}",
            "by must be any or each, got 'all'",
        ),
        ("AvatarConfig: {hints: }", "must have default, from and alternatives, got None"),
        (
            "AvatarConfig: {hints: {default: 1, from: x, alternatives: {2: {nothing.at-all: above}}}}",
            "no measure 'nothing",
        ),
        ("AvatarConfig: {hints: {default: 1, from: x, alternatives: {2: {avatar-lambda.none-0.3: up}}}}", "got 'up'"),
    ],
)
def test_a_mistake_in_the_file_of_defaults_is_named(tmp_path, text, why):
    (tmp_path / "defaults.yaml").write_text(text)
    with pytest.raises(RegisterError, match=why):
        read_defaults(read_register(CLAIMS), tmp_path / "defaults.yaml")
