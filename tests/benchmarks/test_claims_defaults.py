"""Defaults of the configs are what their sources and the committed results say."""

import pytest
from claim_sets import CLAIMS
from defaults import BETTER, NO_CLEARER, OPEN, WORSE, Alternative, judge_alternative, read_defaults
from evidence import Evidence
from register import RegisterError, read_register
from verdicts import CANT_TELL, HOLDS, ClaimVerdict, Estimate, Finding


def finding(low, value, high, verdict=HOLDS):
    return Finding(verdict, Estimate(value, low, high, 5, 0.01, 0.01))


def test_each_default_is_what_its_sources_and_the_results_say():
    register = read_register(CLAIMS)
    evidence = Evidence(register, CLAIMS / "results")
    found = {claim.name: evidence.claim(claim) for claim in register.claims.values()}
    defaults = read_defaults(register)
    assert {one.config for one in defaults} == {"MAPOConfig", "AvatarConfig"}
    for one in defaults:
        assert one.actual == one.value, f"{one.config}.{one.field}"
        for other in one.alternatives:
            assert judge_alternative(other, found, register) != BETTER, f"{one.config}.{one.field}: {other.value}"


@pytest.mark.parametrize(
    "value, expected",
    [
        ((-0.09, -0.06, -0.03), BETTER),  # the measure is of the default: below speaks for the alternative
        ((0.03, 0.06, 0.09), WORSE),
        ((-0.02, 0.01, 0.04), NO_CLEARER),
        ((-0.03, -0.02, -0.01), NO_CLEARER),  # clear, and smaller than would matter
    ],
)
def test_an_alternative_is_better_by_its_interval_alone(value, expected):
    register = read_register(CLAIMS)
    other = Alternative("token", {("maple-sample-accuracy", "accuracy"): -1})
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
    "text, why",
    [
        ("GRPOConfig: {beta: {}}", "no config 'GRPOConfig'"),
        ("MAPOConfig: {betta: {}}", "MAPOConfig.betta: the config has no such field"),
        ("MAPOConfig: {hints: {default: 1}}", "no such field|must have"),
        ("AvatarConfig: {hints: {default: 1}}", "must have default, from and alternatives"),
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
