"""What a run remembers, step by step: which completions are generated, what is learnt of them, and what is stored."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.algorithms import HintTrigger, StratifiedReplayBuffer, Vcrs
from maple_trl.algorithms.replay_draws import DRAWS
from maple_trl.trainers.avatar.replay_memory import Group, PassRecord, ReplayMemory


NAMES = ["accuracy", "format"]
SIZE = 4


def group(key, row=0, tag=-1, has_hint=False):
    return Group(key, row, tag, has_hint)


def memory_of(replayed=2, hints=None, capacity=100, window=20, **options):
    options = {"scope": "prompt", "draw": "diverse"} | options
    return ReplayMemory(StratifiedReplayBuffer(capacity), Vcrs(window), replayed, hints, **options)


def scores_of(rewards):
    """The two functions that add up to a reward."""
    return torch.tensor([[reward - 0.25, 0.25] for reward in rewards], dtype=torch.float64).reshape(-1, 2)


def learn(memory, rollout, rewards, step=0):
    return memory.learn(rollout, torch.tensor(rewards, dtype=torch.float64), scores_of(rewards), NAMES, step)


def written(rollout, places=None, length=3):
    """Completions as a training pass gives them: tokens and log-probabilities tell their number."""
    numbers = [rollout.first_number + place for place in rollout.places(replayed=False)]
    numbers = numbers if places is None else [numbers[i] for i in places]
    return [(n, torch.full((length,), n), torch.full((length,), -n / 8)) for n in numbers]


def measured(rollout, totals):
    numbers = [rollout.first_number + place for place in rollout.places(replayed=True)]
    return [(n, total, 2.0) for n, total in zip(numbers, totals, strict=True)]


def contents(memory, key):
    return [
        (e.completion_ids.tolist(), e.logps.tolist(), e.reward, e.step, e.hinted) for e in memory.buffer.stored(key)
    ]


def visit(memory, groups, rewards, step=0, ranks=1):
    """A whole rollout of which all completions are trained on."""
    rollout = memory.plan(groups, SIZE, step, ranks)
    experiences = learn(memory, rollout, rewards, step)
    memory.write([PassRecord(written(rollout))])
    return rollout, experiences


# By hand


def test_three_steps_by_hand():
    memory = memory_of()
    groups = [group("a", 5), group("b", 6)]
    rollout = memory.plan(groups, SIZE, 0, 1)
    assert rollout.replayed == [False] * 8 and rollout.hinted == [False, False] and rollout.first_number == 0
    assert rollout.places(replayed=False) == list(range(8)) and rollout.places(replayed=True) == []
    assert rollout.groups_of([0, 3, 4, 7]).tolist() == [0, 0, 1, 1]
    rewards = [1.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.25, 0.0]
    assert learn(memory, rollout, rewards) == []
    assert memory.vcrs.baseline("a") == 0.5 and memory.vcrs.baseline("b") == 0.0625
    assert len(memory.buffer) == 0  # nobody knows their log-probabilities yet
    assert all(memory.waits_for(number) for number in range(8)) and not memory.waits_for(8)
    memory.write([PassRecord(written(rollout))])
    assert not any(memory.waits_for(number) for number in range(8))
    assert contents(memory, "a") == [([n] * 3, [-n / 8] * 3, rewards[n], 0, False) for n in range(4)]
    assert contents(memory, "b") == [([n] * 3, [-n / 8] * 3, rewards[n], 0, False) for n in range(4, 8)]
    assert [e.row for key in "ab" for e in memory.buffer.stored(key)] == [5] * 4 + [6] * 4
    assert dict(memory.buffer.stored("a")[0].rewards) == {"accuracy": 0.75, "format": 0.25}

    rollout = memory.plan([group("b", 6), group("c", 7)], SIZE, 1, 1)
    assert rollout.first_number == 8
    assert rollout.replayed == [False, True, False, True] + [False] * 4
    experiences = learn(memory, rollout, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0], step=1)
    # Before it is replayed, the prompt's baseline holds the rewards of now.
    assert memory.vcrs.baseline("b") == pytest.approx(0.25 / 6) and memory.vcrs.baseline("c") == 1.0
    assert [e.prompt for e in experiences] == ["b", "b"] and experiences[0] is not experiences[1]
    assert 0.25 in [e.reward for e in experiences]  # the one that differs from the fresh ones
    memory.write([PassRecord(written(rollout))])
    assert [step for *_, step, _ in contents(memory, "b")] == [0] * 4 + [1] * 2  # those replayed are not stored again
    assert len(memory.buffer) == 14
    assert memory.metrics()["replay/unstorable"] == 0 and "hint/given" not in memory.metrics()


def test_as_few_are_generated_as_what_is_stored_allows():
    memory = memory_of(replayed=3)
    visit(memory, [group("a")], [math.nan, 1.0, math.nan, math.nan])
    assert memory.plan([group("a")], SIZE, 1, 1).replayed == [False, False, False, True]
    assert memory.plan([group("a"), group("b")], SIZE, 1, 1).replayed.count(True) == 1
    visit(memory, [group("a")], [0.0, 0.0, 0.0], step=1)
    assert memory.plan([group("a")], SIZE, 2, 1).replayed == [False, True, True, True]


def test_ranks_wait_for_the_one_that_has_fewest():
    memory = memory_of()
    visit(memory, [group("a")], [1.0, 0.0, 1.0, 0.0])
    groups = [group("a"), group("new")]
    assert sum(memory.plan(groups, SIZE, 1, 1).replayed) == 2
    rollout = memory.plan(groups, SIZE, 1, 2)
    assert sum(rollout.replayed) == 0
    assert learn(memory, rollout, [1.0] * 8, 1) == []
    visit(memory, [group("new")], [0.0] * 4)
    assert memory.plan(groups, SIZE, 1, 2).replayed == [False, True] * 4


def test_completions_that_are_too_old_are_generated_anew():
    memory = ReplayMemory(StratifiedReplayBuffer(100, max_age=2), Vcrs(), 2, scope="prompt")
    visit(memory, [group("a")], [1.0, 0.0, 1.0, 0.0], step=0)
    assert sum(memory.plan([group("a")], SIZE, 2, 1).replayed) == 2
    assert sum(memory.plan([group("a")], SIZE, 3, 1).replayed) == 0


# What cannot be stored


def test_completions_without_a_reward_are_not_stored():
    memory = memory_of()
    rollout, _ = visit(memory, [group("a"), group("b")], [1.0, math.nan, 0.0, math.nan] + [math.nan] * 4)
    assert [e.reward for e in memory.buffer.stored("a")] == [1.0, 0.0]
    assert memory.buffer.stored("b") == [] and memory.vcrs.baseline("b") is None
    assert memory.vcrs.baseline("a") == 0.5
    assert memory.unstorable == memory.metrics()["replay/unstorable"] == 6
    assert not any(map(memory.waits_for, range(8)))
    rollout, experiences = visit(memory, [group("b"), group("a")], [math.nan] * 6, step=1)
    assert rollout.replayed == [False] * 4 + [False, True, False, True]
    assert sorted(e.reward for e in experiences) == [0.0, 1.0]  # without fresh rewards still one of each
    assert memory.vcrs.baseline("a") == 0.5


def test_a_function_without_a_reward_is_remembered_as_such():
    memory = memory_of()
    rollout = memory.plan([group("a")], 1, 0, 1)
    memory.learn(rollout, torch.tensor([0.5]), torch.tensor([[math.nan, 0.5]]), NAMES, 0)
    memory.write([PassRecord(written(rollout))])
    (experience,) = memory.buffer.stored("a")
    assert math.isnan(experience.rewards["accuracy"]) and experience.rewards["format"] == 0.5


def test_completions_without_a_token_are_not_stored():
    memory = memory_of()
    rollout = memory.plan([group("a")], SIZE, 0, 1)
    learn(memory, rollout, [1.0, 0.0, 1.0, 0.0])
    found = written(rollout)
    found[2] = (found[2][0], torch.tensor([], dtype=torch.long), torch.tensor([]))
    memory.write([PassRecord(found)])
    assert [e.reward for e in memory.buffer.stored("a")] == [1.0, 0.0, 0.0]
    assert memory.unstorable == 1 and not memory.waits_for(rollout.first_number + 2)


def test_a_completion_is_stored_once():
    """A later pass over the rollout finds it trained on; so does one that shares an optimizer step with the first."""
    memory = memory_of()
    rollout = memory.plan([group("a")], SIZE, 0, 1)
    learn(memory, rollout, [1.0, 0.0, 1.0, 0.0])
    twice = [(number, ids, logps - 1) for number, ids, logps in written(rollout)]
    memory.write([PassRecord(written(rollout) + twice)])
    assert [logps for _, logps, *_ in contents(memory, "a")] == [[-n / 8] * 3 for n in range(4)]
    memory.write([PassRecord(twice)])
    memory.write([PassRecord(), PassRecord()])
    assert len(memory.buffer) == 4


def test_what_is_stored_is_no_view_of_a_batch():
    memory = memory_of()
    rollout = memory.plan([group("a")], 1, 0, 1)
    learn(memory, rollout, [1.0])
    ids, logps = torch.zeros(50, 50, dtype=torch.long), torch.zeros(50, 50)
    memory.write([PassRecord([(rollout.first_number, ids[0, :3], logps[0, :3])])])
    (experience,) = memory.buffer.stored("a")
    assert experience.completion_ids.untyped_storage().nbytes() == experience.logps.untyped_storage().nbytes() == 12


# Two groups of one prompt


def test_two_groups_of_one_prompt():
    memory = memory_of()
    visit(memory, [group("a"), group("a")], [1.0, 0.0, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0])
    assert memory.vcrs.baseline("a") == 0.3125
    assert len(memory.buffer.stored("a")) == 8
    rollout = memory.plan([group("a"), group("a")], SIZE, 1, 1)
    assert sum(rollout.replayed) == 4
    experiences = learn(memory, rollout, [1.0, 1.0, 0.0, 0.0], step=1)
    assert len(experiences) == 4
    for pair in (experiences[:2], experiences[2:]):
        assert pair[0] is not pair[1]  # within a group none twice
    # Each group by its own fresh rewards: those of the first are all 1, those of the second all 0.
    assert all(e.reward != 1.0 for e in experiences[:2]) and all(e.reward != 0.0 for e in experiences[2:])
    assert memory.vcrs.baseline("a") == pytest.approx((2.5 + 2) / 12)


# In any order


@given(data=st.data(), ranks=st.integers(1, 3))
def test_the_order_of_micro_batches_and_ranks_does_not_matter(data, ranks):
    """Shuffled rows, shared in any way: the buffer and what it will draw are the same."""
    states = []
    for shuffled in (False, True):
        memory = memory_of(hints=HintTrigger(1, 0.1))
        for step in range(3):
            rollout = memory.plan([group("a", has_hint=True), group("b"), group("c")], SIZE, step, 1)
            rewards = [(n * 7 + step) % 5 / 5 for n in range(len(rollout.places(replayed=False)))]
            experiences = learn(memory, rollout, rewards, step)
            rows = [("completions", row) for row in written(rollout)]
            rows += [("divergences", row) for row in measured(rollout, [0.1 * n for n in range(len(experiences))])]
            found = [PassRecord() for _ in range(ranks)]
            if shuffled:
                rows = data.draw(st.permutations(rows))
                for kind, row in rows:
                    getattr(found[data.draw(st.integers(0, ranks - 1))], kind).append(row)
            else:
                for kind, row in rows:
                    getattr(found[0], kind).append(row)
            memory.write(found)
        drawn = [e.completion_ids.tolist() for e in memory.buffer.sample("a", 3, [0.0], 3)]
        kept = [contents(memory, key) for key in "abc"]
        states.append((drawn, kept, memory.state_dict(), memory.metrics()))
    assert states[0] == states[1]


def test_a_rollout_may_be_written_in_parts():
    memory, whole = memory_of(), memory_of()
    rewards = [1.0, 0.0, 0.5, 0.25]
    rollout = memory.plan([group("a")], SIZE, 0, 1)
    learn(memory, rollout, rewards)
    memory.write([PassRecord(written(rollout, [2, 0]))])
    assert [memory.waits_for(n) for n in range(4)] == [False, True, False, True]
    memory.write([PassRecord(written(rollout, [3, 1]))])
    visit(whole, [group("a")], rewards)
    assert sorted(contents(memory, "a")) == sorted(contents(whole, "a"))


# Hints


def hinting(**options):
    return memory_of(hints=HintTrigger(2, 0.1), **options)


def stuck_visits(memory, count, total=0.0, first=0, rewards=(0.0,) * SIZE):
    """Visits of a prompt that fails, of which those that are replayed are measured; the rollouts."""
    found = []
    for step in range(first, first + count):
        rollout = memory.plan([group("a", has_hint=True)], SIZE, step, 1)
        learn(memory, rollout, rewards[: len(rollout.places(replayed=False))], step)
        memory.write([PassRecord(written(rollout), measured(rollout, [total] * sum(rollout.replayed)))])
        found.append(rollout)
    return found


def test_a_stuck_prompt_gets_its_hint_and_replays_say_how_they_were_written():
    memory = hinting(capacity=1000)
    rollouts = stuck_visits(memory, 4)
    # The first visit replays nothing, so nothing is known of the policy until the second one.
    assert [rollout.hinted for rollout in rollouts] == [[False], [False], [True], [True]]
    assert [e.hinted for e in memory.buffer.stored("a")] == [False] * 6 + [True] * 4
    assert memory.may_hint("a") and not memory.may_hint("b")
    assert memory.metrics()["hint/given"] == memory.metrics()["hint/hinted_prompts"] == 1
    stuck_visits(memory, 1, first=4, rewards=(1.0,) * SIZE)  # written with the hint, and the mean is still low
    assert memory.plan([group("a", has_hint=True)], SIZE, 5, 1).hinted == [True]
    stuck_visits(memory, 40, first=5, rewards=(1.0,) * SIZE)
    assert memory.plan([group("a", has_hint=True)], SIZE, 50, 1).hinted == [False]
    assert memory.metrics()["hint/withdrawn"] == 1 and memory.metrics()["hint/stuck_prompts"] == 0
    assert memory.may_hint("a")  # some of the stored ones were written with it


@pytest.mark.parametrize(
    "change",
    [
        {"total": 1.0},  # the policy moves
        {"rewards": (1.0,) * SIZE},  # it is solved, though all prompts are Hard
        {"rewards": (0.8,) * SIZE},
    ],
    ids=str,
)
def test_a_prompt_that_is_not_stuck_gets_none(change):
    memory = hinting()
    assert not any(rollout.hinted[0] for rollout in stuck_visits(memory, 5, **change))


def test_the_bound_of_stuck_is_an_option():
    assert stuck_visits(hinting(hint_below=0.9), 5, rewards=(0.8,) * SIZE)[-1].hinted == [True]


def test_a_prompt_of_another_tier_is_not_stuck():
    memory = hinting()
    for key in "bcd":
        visit(memory, [group(key)], [0.0] * SIZE)
    rollouts = stuck_visits(memory, 5, rewards=(0.5,) * SIZE)  # three of four prompts are below it
    assert memory.buffer.tier("a", memory.vcrs) == "easy"
    assert not any(rollout.hinted[0] for rollout in rollouts)


def test_prompts_without_a_hint_are_not_hinted():
    memory = hinting()
    for step in range(5):
        rollout = memory.plan([group("a")], SIZE, step, 1)
        learn(memory, rollout, [0.0] * len(rollout.places(replayed=False)), step)
        memory.write([PassRecord(written(rollout), measured(rollout, [0.0] * sum(rollout.replayed)))])
        assert rollout.hinted == [False]
    assert memory.metrics()["hint/given"] == 0
    without = memory_of()
    assert not any(rollout.hinted[0] for rollout in stuck_visits(without, 5)) and not without.may_hint("a")


# Tiers


@pytest.mark.parametrize(
    ("retier", "sizes"),
    [(False, {"easy": 4, "medium": 6, "hard": 8}), (True, {"easy": 0, "medium": 10, "hard": 8})],
)
def test_stored_experiences_move_along_if_asked(retier, sizes):
    memory = memory_of(window=2, retier=retier)
    visit(memory, [group(key) for key in "abcd"], [0.0] * 4 + [0.25] * 4 + [0.5] * 4 + [1.0] * 4)
    assert memory.buffer.sizes() == {"easy": 4, "medium": 4, "hard": 8}
    visit(memory, [group("a")], [1.0, 1.0], step=1)  # now c is Hard, and d and a are Medium
    assert memory.buffer.sizes() == sizes
    assert memory.metrics()["replay/promoted"] == (4 if retier else 0)
    assert memory.metrics()["replay/demoted"] == (8 if retier else 0)


# State


def test_state_round_trip():
    """In the middle of a rollout, with completions whose tokens are still to come."""
    one = hinting()
    stuck_visits(one, 3)
    visit(one, [group("b", row=9), group("c")], [math.nan, 1.0, 0.5, 0.0] + [0.25] * 4, step=3)
    rollout = one.plan([group("a", has_hint=True), group("b", row=9)], SIZE, 4, 1)
    learn(one, rollout, [0.0, 0.0, 1.0, math.nan], 4)
    one.write([PassRecord(written(rollout, [0]))])
    state = json.loads(json.dumps(one.state_dict()))

    two = hinting()
    two.load_state_dict(state)
    two.buffer = one.buffer  # it has files of its own; see test_replay.py
    assert json.dumps(two.state_dict()) == json.dumps(one.state_dict())
    assert [two.waits_for(n) for n in range(40)] == [one.waits_for(n) for n in range(40)]
    assert two.may_hint("a") and two.unstorable == one.unstorable == 2
    assert two.vcrs.baseline("b") == one.vcrs.baseline("b")
    before = len(one.buffer)
    two.write([PassRecord(written(rollout)[1:3], measured(rollout, [0.0] * sum(rollout.replayed)))])
    assert len(two.buffer) == before + 2
    assert [e.hinted for e in two.buffer.stored("a")][-1] is True
    assert two.plan([group("a", has_hint=True)], SIZE, 5, 1) == replace(
        one.plan([group("a", has_hint=True)], SIZE, 5, 1), first_number=rollout.first_number + 8
    )


def test_a_run_without_hints_reads_the_state_of_one_with_them():
    one = hinting()
    stuck_visits(one, 3)
    two = memory_of()
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict()["hints"] is None and two.vcrs.baseline("a") == 0.0


@pytest.mark.parametrize("order", list(permutations(range(3)))[1:3])
def test_the_order_of_rewards_is_told_apart(order):
    """The negative control: other rewards are kept of other completions."""
    rewards = [0.0, 0.5, 1.0]
    one, two = memory_of(), memory_of()
    for memory, others in ((one, rewards), (two, [rewards[i] for i in order])):
        rollout = memory.plan([group("a")], 3, 0, 1)
        learn(memory, rollout, others)
        memory.write([PassRecord(written(rollout))])
    assert contents(one, "a") != contents(two, "a")


# Rewards that failed


def test_a_visit_without_any_reward_is_no_visit():
    """A prompt gets its hint for being stuck, not for a judge that is down."""
    memory = memory_of(hints=HintTrigger(visits=2, max_divergence=1.0))
    stuck = [group("a", has_hint=True)]

    def again(rewards, step):
        rollout, _ = visit(memory, stuck, rewards, step)
        memory.write([PassRecord(divergences=measured(rollout, [0.0] * sum(rollout.replayed)))])
        return rollout

    again([0.0] * SIZE, 0)
    for step in range(1, 4):
        again([math.nan] * 2, step)
    assert memory.vcrs.baseline("a") == 0.0 and not memory.hints.due("a")
    again([0.0] * 2, 4)
    assert memory.hints.due("a")


def test_functions_that_apply_are_known_from_what_is_stored():
    memory = memory_of()
    assert memory.scored_by("a", NAMES) == [False, False]
    rollout = memory.plan([group("a")], SIZE, 0, 1)
    scores = torch.tensor([[math.nan, 0.5]] * 3 + [[math.nan, math.nan]], dtype=torch.float64)
    memory.learn(rollout, torch.tensor([0.5] * 3 + [math.nan], dtype=torch.float64), scores, NAMES, 0)
    memory.write([PassRecord(written(rollout))])
    assert memory.scored_by("a", NAMES) == [False, True] and memory.scored_by("b", NAMES) == [False, False]
    assert len(memory.buffer.stored("a")) == 3


# By tier


def by_tier(**options):
    return memory_of(**{"scope": "tiers", "draw": "balanced"} | options)


def test_any_prompts_are_replayed_and_own_ones_in_their_own_group():
    memory = by_tier()
    visit(memory, [group("a"), group("b")], [1.0, 0.0] * 4)
    rollout = memory.plan([group("a"), group("new")], SIZE, 1, 2)
    assert rollout.replayed == [False, True] * 4  # the second rank, whose prompt is new, replays as much as the first
    drawn = Counter()
    for _ in range(40):
        experiences = learn(memory, rollout, [0.0] * 4, step=1)
        assert len(experiences) == len(set(experiences)) == 4
        own = sum(e.prompt == "a" for e in experiences)
        assert [e.prompt for e in experiences[:2]].count("a") == min(own, 2)
        drawn.update(e.prompt for e in experiences)
        sides = [e.reward > memory.vcrs.baseline(e.prompt) for e in experiences]
        assert sides.count(True) == sides.count(False) == 2
    assert drawn["a"] > 40 and drawn["b"] > 40


@pytest.mark.parametrize(("stored", "wanted"), [(0, [0, 0, 0]), (2, [0, 1, 1]), (5, [1, 2, 2]), (9, [2, 2, 2])])
def test_what_little_there_is_is_spread_evenly(stored, wanted):
    memory = by_tier()
    if stored:
        rollout = memory.plan([group("a")], stored, 0, 1)
        learn(memory, rollout, [0.0] * stored)
        memory.write([PassRecord(written(rollout))])
    rollout = memory.plan([group(key) for key in "xyz"], SIZE, 1, 1)
    assert [sum(rollout.replayed[i : i + SIZE]) for i in (0, 4, 8)] == wanted


def test_a_rollout_of_one_tag_draws_of_that_tag():
    memory = by_tier(tag_of=lambda e: e.row)
    visit(memory, [group("a", row=1, tag=1)], [1.0, 0.0, 1.0, 0.0])
    visit(memory, [group("b", row=2, tag=2)], [1.0, 0.0, 1.0, 0.0], step=1)
    for tag, key in ((1, "a"), (2, "b")):
        rollout = memory.plan([group("new", tag=tag)], SIZE, 2, 1)
        assert {e.prompt for e in learn(memory, rollout, [0.0, 0.0], 2)} == {key}
    assert sum(memory.plan([group("new", tag=3)], SIZE, 3, 1).replayed) == 0


def test_two_groups_of_a_stuck_prompt_replay_nothing_twice():
    memory = by_tier(replayed=1, hints=HintTrigger(1, 1.0))
    visit(memory, [group("a", has_hint=True)], [0.0] * SIZE)
    rollout = memory.plan([group("a", has_hint=True)] * 2, SIZE, 1, 1)
    for _ in range(40):
        first, second = learn(memory, rollout, [0.0] * 6, step=1)
        assert first is not second and memory.hints.watches("a")


@pytest.mark.parametrize("draw", DRAWS)
def test_a_stuck_prompt_gets_its_hint_among_others(draw):
    """Its completions all failed, so they teach nothing and would hardly be drawn; a hint needs to see one again."""
    memory = by_tier(draw=draw, hints=HintTrigger(2, 0.1), capacity=1000)
    visit(memory, [group(key) for key in "bcde"], [1.0, 0.0, 0.0, 0.0] * 4)
    hinted = []
    for step in range(1, 5):
        groups = [group("a", has_hint=True), group("b")]
        rollout = memory.plan(groups, SIZE, step, 1)
        fresh = [place // SIZE for place in rollout.places(replayed=False)]
        experiences = learn(memory, rollout, [float(number and i % 2) for i, number in enumerate(fresh)], step)
        if step > 2:
            assert any(e.prompt == "a" for e in experiences)
        memory.write([PassRecord(written(rollout), measured(rollout, [0.0] * len(experiences)))])
        hinted.append(rollout.hinted[0])
    assert hinted[-1]
