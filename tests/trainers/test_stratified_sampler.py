"""The sampler behind batches of one tag: TRL's order where there is one tag, every row each epoch, one tag a rollout."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import RepeatSampler

from maple_trl.algorithms.schedule import StratifiedSchedule
from maple_trl.modalities import ModalityTag
from maple_trl.trainers.common.samplers import StratifiedSampler


tag_lists = st.lists(st.sampled_from(list(ModalityTag)), min_size=1, max_size=30)
sizes, copies, repeats = st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)


def sampler_of(tags, prompts, copies, repeats, **options):
    return StratifiedSampler(StratifiedSchedule(tags, prompts, **options), copies, repeats)


def rollouts_of(order, prompts, copies, repeats):
    """The prompts of each rollout; every one stands there as TRL's loader wants it."""
    size = prompts * copies * repeats
    assert len(order) % size == 0
    found = []
    for start in range(0, len(order), size):
        whole = order[start : start + size]
        rows = whole[: prompts * copies : copies]
        assert whole == [row for row in rows for _ in range(copies)] * repeats
        found.append(rows)
    return found


@given(
    batches=st.integers(1, 4),
    prompts=sizes,
    copies=copies,
    repeats=repeats,
    shuffle=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_tag_is_the_order_of_trl(batches, prompts, copies, repeats, shuffle, seed):
    rows = batches * prompts
    theirs = RepeatSampler(range(rows), copies, prompts, repeats, shuffle=shuffle, seed=seed)
    ours = sampler_of(["VA"] * rows, prompts, copies, repeats, shuffle=shuffle, seed=seed)
    assert len(ours) == len(theirs)
    for _ in range(3):  # epochs
        assert list(ours) == list(theirs)


@given(rows=st.integers(2, 20), prompts=sizes, seed=st.integers(0, 99))
def test_where_a_batch_is_short_trl_leaves_its_rows_out(rows, prompts, seed):
    """One tag still: ours begins alike and fills the last batch."""
    theirs = list(RepeatSampler(range(rows), 2, prompts, 2, shuffle=True, seed=seed))
    ours = list(sampler_of(["S"] * rows, prompts, 2, 2, seed=seed))
    assert ours[: len(theirs)] == theirs
    assert set(ours) == set(range(rows)) and len(ours) == -(-rows // prompts) * prompts * 4


@given(tags=tag_lists, prompts=sizes, copies=copies, repeats=repeats, shuffle=st.booleans(), seed=st.integers(0, 99))
def test_every_row_each_epoch_and_one_tag_a_rollout(tags, prompts, copies, repeats, shuffle, seed):
    sampler = sampler_of(tags, prompts, copies, repeats, shuffle=shuffle, seed=seed)
    for epoch in range(3):
        order = list(sampler)
        assert len(order) == len(sampler)
        assert sampler.schedule.epoch == epoch
        rollouts = rollouts_of(order, prompts, copies, repeats)
        assert all(len({tags[row] for row in rows}) == 1 for rows in rollouts)
        counts = Counter(row for rows in rollouts for row in rows)
        assert set(counts) == set(range(len(tags)))
        extra = sum(counts.values()) - len(tags)
        assert extra == sum(-tags.count(tag) % prompts for tag in set(tags))  # what fills the last batch of each tag


def test_epochs_differ_and_seeds_repeat():
    tags = ["V"] * 6 + ["A"] * 6
    one, two = (sampler_of(tags, 2, 2, 1, seed=4) for _ in range(2))
    epochs = [list(one) for _ in range(3)]
    assert [list(two) for _ in range(3)] == epochs
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(sampler_of(tags, 2, 2, 1, seed=5)) != epochs[0]


def test_a_pass_that_is_broken_off_is_an_epoch():
    """A resumed run draws the first row of each epoch that is done."""
    tags = ["V"] * 5 + ["VAS"] * 7
    one, two = (sampler_of(tags, 3, 2, 2, seed=1) for _ in range(2))
    epochs = [list(one) for _ in range(3)]
    for _ in range(2):
        next(iter(two))
    assert list(two) == epochs[2]
    assert epochs[2] != epochs[0]


def test_rows_of_one_tag_are_not_shuffled_into_other_rollouts():
    """The negative control: TRL's own order mixes tags."""
    tags = [tag for _ in range(6) for tag in ("V", "A")]
    mixed = rollouts_of(list(RepeatSampler(range(12), 2, 3, 1, shuffle=True, seed=0)), 3, 2, 1)
    assert any(len({tags[row] for row in rows}) > 1 for rows in mixed)


def test_where_rows_wait_for_rewards_it_only_keeps_time():
    """As long as the other way, with the first row alone, and without taking from the schedule."""
    schedule = StratifiedSchedule(["V"] * 5 + ["VAS"] * 4, 3)
    clock, named = StratifiedSampler(schedule, 2, 2, ahead=False), StratifiedSampler(schedule, 2, 2)
    assert list(clock) == [0] * len(clock) and schedule.epoch == -1
    assert len(clock) == len(list(named)) == 4 * 3 * 2 * 2 and schedule.epoch == 0


def test_a_wrong_tag_is_refused():
    with pytest.raises(ValueError, match="modality tag"):
        sampler_of(["V", "X"], 1, 1, 1)
