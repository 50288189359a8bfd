import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from maple_trl.algorithms.hinting import HintTrigger
from maple_trl.trainers.common.hinted_rows import has_hint, with_hint


NAMES = ("a", "b", "c")
prompts = st.sampled_from(NAMES)


class Naive:
    """Every visit of a prompt is kept, and all is worked out from that."""

    def __init__(self, visits, highest):
        self.needed, self.highest = visits, highest
        self.log = {name: [] for name in NAMES}
        self.hinted = {}  # prompt -> at how many entries of its log it was given its hint
        self.given = self.withdrawn = 0

    def streak(self, name):
        """What was seen since the prompt was last not stuck."""
        log = self.log[name]
        last = max((i for i, (kind, *_) in enumerate(log) if kind == "free"), default=-1)
        return log[last + 1 :]

    def is_stuck(self, name):
        return any(kind == "stuck" for kind, *_ in self.streak(name))

    def due(self, name):
        if name in self.hinted:
            return True
        streak = self.streak(name)
        visits = [i for i, (kind, *_) in enumerate(streak) if kind == "stuck"]
        if len(visits) < self.needed:
            return False
        measured = [entry[1:] for entry in streak[visits[-1] :] if entry[0] == "measured"]
        tokens = sum(count for _, count in measured)
        return tokens > 0 and sum(total for total, _ in measured) / tokens <= self.highest


class TriggerMachine(RuleBasedStateMachine):
    """Visits, measurements and hints in any order; the naive model must agree after each."""

    def __init__(self):
        super().__init__()
        self.trigger, self.naive = HintTrigger(2, 0.1), Naive(2, 0.1)

    @rule(name=prompts, stuck=st.sampled_from([True, True, True, False]))
    def visit(self, name, stuck):
        self.trigger.observe(name, stuck)
        if not stuck and self.naive.hinted.pop(name, None):
            self.naive.withdrawn += 1
        self.naive.log[name].append(("stuck" if stuck else "free",))

    @rule(name=prompts, total=st.sampled_from([0.0, 0.25, 0.5, 2.0]), tokens=st.sampled_from([0.0, 1.0, 4.0]))
    def measure(self, name, total, tokens):
        self.trigger.observe_divergence(name, total, tokens)
        if self.naive.is_stuck(name):
            self.naive.log[name].append(("measured", total, tokens))

    @precondition(lambda self: any(map(self.naive.due, NAMES)))
    @rule(name=prompts)
    def give(self, name):
        if self.naive.due(name):
            self.trigger.give(name)
            self.naive.given += name not in self.naive.hinted
            self.naive.hinted[name] = True

    @rule()
    def save_and_load(self):
        state = json.loads(json.dumps(self.trigger.state_dict()))
        self.trigger = HintTrigger(2, 0.1)
        self.trigger.load_state_dict(state)

    @invariant()
    def agree(self):
        for name in NAMES:
            assert self.trigger.due(name) == self.naive.due(name), name
        assert self.trigger.metrics() == {
            "hint/stuck_prompts": sum(map(self.naive.is_stuck, NAMES)),
            "hint/hinted_prompts": len(self.naive.hinted),
            "hint/given": self.naive.given,
            "hint/withdrawn": self.naive.withdrawn,
        }


TestTrigger = TriggerMachine.TestCase
TestTrigger.settings = settings(stateful_step_count=25)


def stuck_for(visits, divergence=0.0, trigger=None):
    trigger = trigger or HintTrigger(3, 0.01)
    for _ in range(visits):
        trigger.observe("a", stuck=True)
        trigger.observe_divergence("a", divergence, 1.0)
    return trigger


def test_a_prompt_gets_its_hint_after_some_visits_and_keeps_it_until_it_improves():
    assert not HintTrigger().due("a")
    assert not stuck_for(2).due("a")
    trigger = stuck_for(3)
    assert trigger.due("a") and not trigger.due("b")
    trigger.give("a")
    trigger.observe("a", stuck=True)
    assert trigger.due("a")  # also where nothing was measured, and
    trigger.observe_divergence("a", 50.0, 1.0)
    assert trigger.due("a")  # where the policy moves again: that is what the hint is for
    trigger.observe("a", stuck=False)
    assert not trigger.due("a")
    assert trigger.metrics()["hint/withdrawn"] == 1
    assert not stuck_for(2, trigger=trigger).due("a")  # the count begins anew
    assert stuck_for(1, trigger=trigger).due("a")


def test_the_visits_must_be_in_a_row():
    trigger = stuck_for(2)
    trigger.observe("a", stuck=False)
    assert not stuck_for(2, trigger=trigger).due("a")


def test_a_policy_that_moves_gets_no_hint():
    assert stuck_for(3, 0.01).due("a")
    assert not stuck_for(9, 0.011).due("a")


def test_without_a_measurement_there_is_no_hint():
    """The divergence of the visit before says nothing of what the policy did since."""
    trigger = stuck_for(5)
    trigger.observe("a", stuck=True)
    assert not trigger.due("a")
    trigger.observe_divergence("a", 0.0, 0.0)
    assert not trigger.due("a")


def test_the_divergence_is_a_mean_over_tokens():
    trigger = HintTrigger(1, 0.1)
    trigger.observe("a", stuck=True)
    trigger.observe_divergence("a", 0.5, 1.0)
    assert not trigger.due("a")
    trigger.observe_divergence("a", 0.0, 4.0)
    assert trigger.due("a")


def test_a_divergence_that_is_no_number_is_not_small():
    assert not stuck_for(3, math.nan).due("a")


def test_giving_twice_counts_once():
    trigger = stuck_for(3)
    trigger.give("a")
    trigger.give("a")
    assert trigger.metrics()["hint/given"] == 1


def test_state_is_a_copy():
    trigger = stuck_for(3)
    trigger.give("a")
    state = trigger.state_dict()
    trigger.observe("a", stuck=False)
    other = HintTrigger()
    other.load_state_dict(json.loads(json.dumps(state)))
    assert other.due("a") and not trigger.due("a")


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="stuck for at least 1 visit, got 0"):
        HintTrigger(0)
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"The divergence must be at least 0, got {bad}"):
            HintTrigger(1, bad)


# Rows


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"hint": "listen"}, True),
        ({"hint": "  listen\n"}, True),
        ({"hint": ""}, False),
        ({"hint": " \n"}, False),
        ({"hint": None}, False),
        ({"hint": 3}, False),
        ({}, False),
    ],
    ids=str,
)
def test_blank_hints_are_none(row, expected):
    assert has_hint(row) is expected


TEMPLATE = "\nHint: {hint}"


def test_a_plain_prompt_ends_with_its_hint():
    row = {"prompt": "Which?", "hint": " look \n", "tag": "V"}
    assert with_hint(row, TEMPLATE) == row | {"prompt": "Which?\nHint: look"}
    assert row["prompt"] == "Which?"


def test_the_last_user_message_ends_with_its_hint():
    prompt = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "<think>"},
    ]
    row = {"prompt": prompt, "hint": "look"}
    before = json.dumps(row)
    found = with_hint(row, TEMPLATE)
    assert [message["content"] for message in found["prompt"]] == ["s", "one", "two", "three\nHint: look", "<think>"]
    assert [message["role"] for message in found["prompt"]] == [message["role"] for message in prompt]
    assert json.dumps(row) == before


def test_a_list_of_blocks_gets_one_more():
    blocks = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "Which?"}]
    row = {"prompt": [{"role": "user", "content": blocks, "name": "n"}], "hint": "look"}
    (message,) = with_hint(row, TEMPLATE)["prompt"]
    assert message == {
        "role": "user",
        "content": [*blocks, {"type": "text", "text": "\nHint: look"}],
        "name": "n",
    }
    assert len(blocks) == 2


@given(
    hint=st.text().filter(str.strip), template=st.sampled_from(["{hint}", "a {hint} b", "{hint}{hint}", "{x} {hint}"])
)
def test_any_text_may_be_a_hint(hint, template):
    """Braces and backslashes in it are text."""
    found = with_hint({"prompt": "q", "hint": hint}, template)["prompt"]
    left, *middle, right = template.split("{hint}")
    assert found == "q" + left + hint.strip() + "".join(part + hint.strip() for part in middle) + right
