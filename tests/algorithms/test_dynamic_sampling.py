"""Dynamic sampling: which groups teach something, what is left out, and what is remembered."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.algorithms.sampling import DynamicSampling, informative_groups
from maple_trl.modalities import ModalityTag


NAN = math.nan
rewards = st.one_of(st.just(NAN), st.sampled_from([0.0, 1.0, 0.5, 1e-7, 1 + 2e-6, -3.0]))


def naive(group, tolerance=1e-6):
    """By the rule in words: two scorable completions whose rewards differ by more than the tolerance."""
    return any(abs(a - b) > tolerance for a in group for b in group if not (math.isnan(a) or math.isnan(b)))


@given(size=st.integers(1, 6), data=st.data())
def test_a_group_is_informative_when_two_of_its_rewards_differ(size, data):
    groups = data.draw(st.lists(st.lists(rewards, min_size=size, max_size=size), min_size=1, max_size=8))
    found = informative_groups(torch.tensor(groups, dtype=torch.float64))
    assert found.dtype == torch.bool and found.tolist() == [naive(group) for group in groups]


def test_worked_groups():
    groups = [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, NAN, 1.0], [0.0, NAN, 1.0], [NAN, NAN, NAN], [NAN, NAN, 1.0]]
    assert informative_groups(torch.tensor(groups)).tolist() == [False, True, False, True, False, False]


def test_the_tolerance_is_an_argument():
    groups = torch.tensor([[0.0, 1e-6], [0.0, 2e-6], [0.0, 0.1]], dtype=torch.float64)
    assert informative_groups(groups).tolist() == [False, True, True]
    assert informative_groups(groups, tolerance=0.05).tolist() == [False, False, True]
    assert informative_groups(groups, tolerance=0).tolist() == [True, True, True]


def test_no_groups():
    assert informative_groups(torch.zeros(0, 4)).tolist() == []


# Modes


@pytest.mark.parametrize(
    ("mode", "dropping"),
    [("none", [False, False, False]), ("early", [True, True, True]), ("mid", [False, True, True])],
)
def test_when_groups_are_dropped(mode, dropping):
    options = {} if mode == "none" else {"revisit": "informative"}
    sampling = DynamicSampling(mode, **options)
    sampling.observe([3, 1, 2], ["V", "V", "V"], [False, True, False], [True, True, True])
    assert [sampling.drops(epoch) for epoch in range(3)] == dropping
    assert [sampling.skipped(epoch) for epoch in range(3)] == [[2, 3] if drops else [] for drops in dropping]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("late",), "dynamic sampling must be one of none, early, mid, got 'late'"),
        (("none", 1), "refill_rounds is 1, but with dynamic sampling 'none' it must be 0"),
        (("early", -1), "refill_rounds is -1"),
        (("early", 0, "some"), "revisit must be one of all, unsolved, informative, got 'some'"),
        (("none", 0, "unsolved"), "revisit is 'unsolved', but with dynamic sampling 'none' every epoch visits all"),
        (("early", 0, "unsolved", 0), "revisit_after must be at least 1 epoch, got 0"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicSampling(*arguments)


# Memory


visits = st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6), max_size=8)


def see(sampling, rollout):
    rows, varied = zip(*rollout, strict=True)
    sampling.observe(rows, ["VA"] * len(rows), varied, varied)


@given(visits)
def test_the_last_visit_of_a_row_counts(visits):
    """Where a row stands several times in one rollout, one informative group is enough."""
    sampling, expected = DynamicSampling("early", revisit="informative"), {}
    for rollout in visits:
        see(sampling, rollout)
        for row, _ in rollout:
            expected[row] = any(varied for other, varied in rollout if other == row)
    assert sampling.skipped(0) == sorted(row for row, varied in expected.items() if not varied)


@pytest.mark.parametrize("order", [[True, False], [False, True]])
def test_a_row_twice_in_a_rollout(order):
    sampling = DynamicSampling("early", revisit="informative")
    see(sampling, [(4, order[0]), (5, False), (4, order[1]), (5, False)])
    assert sampling.skipped(0) == [5]


def test_a_row_without_a_gradient_is_forgotten_when_it_has_one_again():
    sampling = DynamicSampling("early", revisit="informative")
    see(sampling, [(0, False), (1, False)])
    see(sampling, [(1, True), (2, False)])
    assert sampling.skipped(7) == [0, 2]


def test_lists_must_have_one_length():
    with pytest.raises(ValueError, match="zip"):
        DynamicSampling("early").observe([1, 2], ["V", "V"], [True], [True, True])


# Visits


visit = st.one_of(st.none(), st.sampled_from(["solved", "wrong", "varied"]))


@given(
    revisit=st.sampled_from(["all", "unsolved", "informative"]),
    after=st.integers(1, 3),
    mode=st.sampled_from(["early", "mid"]),
    history=st.lists(st.lists(visit, min_size=4, max_size=4), min_size=1, max_size=6),
    restart=st.integers(0, 5),
)
def test_epochs_visit_what_they_are_to(revisit, after, mode, history, restart):
    """By each row's last visits that could be judged; the state goes through JSON in between."""
    sampling = DynamicSampling(mode, revisit=revisit, revisit_after=after)
    last: dict[int, tuple[int, str]] = {}
    for epoch, outcomes in enumerate(history):
        if epoch == restart:
            sampling, state = DynamicSampling(mode, revisit=revisit, revisit_after=after), sampling.state_dict()
            sampling.load_state_dict(json.loads(json.dumps(state)))
        skipped = set()
        for row, (when, outcome) in last.items():
            if mode == "mid" and epoch == 0 or revisit == "all":
                continue
            if revisit == "informative" and outcome != "varied":
                skipped.add(row)
            if revisit == "unsolved" and outcome == "solved" and epoch - when <= after:
                skipped.add(row)
        assert sampling.skipped(epoch) == sorted(skipped)
        rows = [row for row in range(4) if row not in skipped]
        seen = [outcomes[row] for row in rows]
        varied = [None if one is None else one == "varied" for one in seen]
        solved = [None if one is None else one == "solved" for one in seen]
        sampling.observe(rows, ["V"] * len(rows), varied, [bool(v) for v in varied], solved, epoch)
        last |= {row: (epoch, one) for row, one in zip(rows, seen, strict=True) if one is not None}


# Metrics and state


def test_metrics_count_the_groups_of_the_last_rollout():
    sampling = DynamicSampling("early")
    assert sampling.metrics() == {"tag/all/kept": 0, "tag/all/dropped": 0, "sampling/uninformative_prompts": 0}
    sampling.observe([1, 2, 3, 4], ["V", "sv", "VS", "VS"], [True, False, False, True], [True, False, False, False])
    assert sampling.metrics() == {
        "tag/all/kept": 1,
        "tag/all/dropped": 3,
        "tag/V/kept": 1,
        "tag/V/dropped": 0,
        "tag/VS/kept": 0,
        "tag/VS/dropped": 3,
        "sampling/uninformative_prompts": 2,
    }
    sampling.observe([2], [ModalityTag.A], [True], [True])
    assert sampling.metrics() == {
        "tag/all/kept": 1,
        "tag/all/dropped": 0,
        "tag/A/kept": 1,
        "tag/A/dropped": 0,
        "sampling/uninformative_prompts": 1,
    }


@given(visits, visits)
def test_the_memory_survives_a_round_trip_through_json(before, after):
    sampling, restored = (DynamicSampling("mid", revisit="informative") for _ in range(2))
    for rollout in before:
        see(sampling, rollout)
    restored.load_state_dict(json.loads(json.dumps(sampling.state_dict())))
    for rollout in after:
        see(sampling, rollout)
        see(restored, rollout)
    assert restored.skipped(1) == sampling.skipped(1)
    assert restored.state_dict() == sampling.state_dict()
