"""Which prompts a rollout takes: properties that must hold for any data set, batch size and order of tags."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import groupby

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler
from trl.trainer.utils import RepeatSampler

from maple_trl.algorithms.curriculum import CURRICULA, TagCurriculum
from maple_trl.algorithms.schedule import GRANULARITIES, LEFTOVERS, StratifiedSchedule, rank_share
from maple_trl.modalities import ModalityTag


tag_lists = st.lists(st.sampled_from(list(ModalityTag)), min_size=1, max_size=40)
difficulties = st.dictionaries(st.sampled_from(list(ModalityTag)), st.floats(0, 5), max_size=7)
options = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "stratified": st.booleans(),
        "granularity": st.sampled_from(GRANULARITIES),
        "leftover": st.sampled_from(LEFTOVERS),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
curricula = st.builds(TagCurriculum, st.sampled_from(list(CURRICULA)), st.integers(1, 6))


def epoch_of(schedule):
    """The batches of the next epoch."""
    batches = [schedule.next_batch()]
    while not schedule.exhausted:
        batches.append(schedule.next_batch())
    assert schedule.peek() is None
    return batches


def strata(batches):
    return [batch.stratum for batch in batches]


def rounds(names):
    """Names with repetitions next to each other left out."""
    return [name for name, _ in groupby(names)]


# Coverage


@given(tags=tag_lists, options=options, curriculum=curricula, seen=st.lists(difficulties, max_size=6), data=st.data())
def test_every_row_comes_once_an_epoch_besides_the_counted_fillers(tags, options, curriculum, seen, data):
    skipped = data.draw(st.lists(st.sets(st.integers(0, len(tags) - 1)), min_size=3, max_size=3))
    schedule = StratifiedSchedule(tags, curriculum=curriculum, skipped=lambda epoch: skipped[epoch], **options)
    for epoch in range(3):
        batches = [schedule.next_batch()]
        while not schedule.exhausted:
            if seen:
                curriculum.observe(seen[len(batches) % len(seen)])
            batches.append(schedule.next_batch())
        assert schedule.epoch == epoch
        due = set(range(len(tags))) - skipped[epoch] or set(range(len(tags)))
        if skipped[epoch] and len(due) < len(tags):  # short epochs have short batches
            assert all(0 < len(batch.rows) <= options["batch_size"] and not batch.filled for batch in batches)
        else:
            assert all(len(batch.rows) == options["batch_size"] for batch in batches)
        fresh = [row for batch in batches for row in batch.rows[: len(batch.rows) - batch.filled]]
        assert sorted(fresh) == sorted(due)
        assert all(row in due for batch in batches for row in batch.rows)
        assert all(batch.filled < options["batch_size"] for batch in batches)
        assert len(batches) <= schedule.batches_per_epoch
        if due == set(range(len(tags))):
            assert len(batches) == schedule.batches_per_epoch
        assert schedule.metrics() == {"schedule/epoch": epoch, "schedule/skipped_rows": len(tags) - len(due)}
        check_strata(tags, options, batches)


def check_strata(tags, options, batches):
    for batch in batches:
        found = {tags[row] for row in batch.rows}
        assert batch.stratum == "mixed" or found == {ModalityTag(batch.stratum)}
    if not options["stratified"]:
        assert set(strata(batches)) == {"mixed"}
        assert not any(batch.filled for batch in batches[:-1])
    elif options["leftover"] == "fill":
        assert "mixed" not in strata(batches)
        for tag in set(tags):  # only a tag's last batch is filled
            assert not any(batch.filled for batch in [b for b in batches if b.stratum == tag][:-1])
    else:
        mixed = [name == "mixed" for name in strata(batches)]
        assert mixed == sorted(mixed), "mixed batches come last"
        assert not any(batch.filled for batch in batches[:-1])


@given(tags=tag_lists, options=options)
def test_a_filler_is_another_row_as_long_as_there_is_one(tags, options):
    schedule = StratifiedSchedule(tags, **options)
    for batch in epoch_of(schedule):
        alike = len(tags) if batch.stratum == "mixed" else tags.count(batch.stratum)
        assert len(set(batch.rows)) == min(alike, options["batch_size"])


def test_rows_that_are_left_out_do_not_fill_batches():
    skipped = {"skipped": lambda epoch: [0, 1, 2, 3] if epoch else []}
    for multiple_of, filled in ((1, 0), (2, 0), (4, 2)):
        schedule = StratifiedSchedule(["V"] * 6, 4, multiple_of=multiple_of, **skipped)
        epoch_of(schedule)
        [batch] = epoch_of(schedule)
        assert set(batch.rows) == {4, 5} and len(batch.rows) == 2 + filled and batch.filled == filled


def test_an_epoch_that_would_leave_out_all_rows_visits_all(caplog):
    schedule = StratifiedSchedule(["V", "A", "VA"], 2, skipped=lambda epoch: range(3) if epoch else ())
    epoch_of(schedule)
    assert {row for batch in epoch_of(schedule) for row in batch.rows} == {0, 1, 2}
    assert "epoch 1 visits all again" in caplog.text


@given(tags=tag_lists, options=options, curriculum=curricula, data=st.data())
def test_rows_that_are_drawn_leave_the_epoch(tags, options, curriculum, data):
    schedule = StratifiedSchedule(tags, curriculum=curriculum, **options)
    for _ in range(2):
        taken, batches = [], 0
        while batches == 0 or not schedule.exhausted:
            batch = schedule.next_batch()
            batches += 1
            taken += batch.rows[: len(batch.rows) - batch.filled]
            count, multiple = data.draw(st.integers(0, 12)), data.draw(st.sampled_from([1, 1, 2, 3]))
            drawn = schedule.draw(batch.stratum, count, multiple)
            assert len(drawn) <= count and len(drawn) % multiple == 0
            assert batch.stratum == "mixed" or all(tags[row] == batch.stratum for row in drawn)
            taken += drawn
        assert sorted(taken) == list(range(len(tags)))
        assert batches <= schedule.batches_per_epoch


def test_a_stratum_gives_no_more_rows_than_it_has():
    schedule = StratifiedSchedule(["V"] * 5 + ["A"] * 3, 2, TagCurriculum("static"))
    assert schedule.next_batch().stratum == "V"
    assert len(schedule.draw("V", 10)) == 3
    assert schedule.draw("V", 1) == []
    assert strata([schedule.next_batch(), schedule.next_batch()]) == ["A", "A"] and schedule.exhausted


# Order


SEVEN = [tag for tag in ModalityTag for _ in range(4)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_static_order_goes_from_one_signal_to_three(shuffle):
    mixed_up = random.Random(0).sample(SEVEN, len(SEVEN))
    schedule = StratifiedSchedule(mixed_up, 2, TagCurriculum("static"), shuffle=shuffle, seed=1)
    orders = [strata(epoch_of(schedule)) for _ in range(3)]
    for order in orders:
        assert [len(tag) for tag in order] == [1] * 6 + [2] * 6 + [3] * 2
    assert all(rounds(order) == list(ModalityTag) for order in orders) != shuffle
    assert all(order == orders[0] for order in orders[1:]) != shuffle


def test_static_order_of_a_cycle_is_canonical():
    schedule = StratifiedSchedule(SEVEN, 2, TagCurriculum("static"), granularity="cycle")
    assert strata(epoch_of(schedule)) == list(ModalityTag) * 2


def test_without_curriculum_the_order_is_random_and_another_each_epoch():
    schedule = StratifiedSchedule(SEVEN, 2)
    orders = [strata(epoch_of(schedule)) for _ in range(3)]
    assert len(set(map(tuple, orders))) == 3
    assert all(Counter(order) == dict.fromkeys(ModalityTag, 2) for order in orders)
    assert any(len(rounds(order)) > len(ModalityTag) for order in orders)  # tags are interleaved


def test_without_curriculum_and_shuffling_batches_stand_where_their_first_rows_do():
    tags = ["VA", "V", "VA", "V", "VA", "VA", "A", "A"]
    batches = epoch_of(StratifiedSchedule(tags, 2, shuffle=False))
    assert [batch.rows for batch in batches] == [[0, 2], [1, 3], [4, 5], [6, 7]]


def test_rounds_go_on_with_the_tags_that_are_left():
    tags = ["V"] * 6 + ["A"] * 2 + ["VAS"] * 3
    schedule = StratifiedSchedule(tags, 2, TagCurriculum("static"), granularity="cycle")
    assert strata(epoch_of(schedule)) == ["V", "A", "VAS", "V", "VAS", "V"]
    schedule = StratifiedSchedule(tags, 2, TagCurriculum("static"), granularity="cycle", leftover="mixed")
    assert strata(epoch_of(schedule)) == ["V", "A", "VAS", "V", "V", "mixed"]


def test_the_adaptive_order_is_that_at_the_beginning_of_the_epoch():
    accuracy = {"V": 0.9, "A": 0.1, "VA": 0.5}
    curriculum = TagCurriculum("adaptive", zero_shot=accuracy)
    schedule = StratifiedSchedule(["V"] * 4 + ["A"] * 4 + ["VA"] * 4, 2, curriculum)
    order = []
    for step in range(6):
        order.append(schedule.next_batch().stratum)
        curriculum.observe({"V": 3.0, "A": 1.0, "VA": 2.0} if step else {"V": 9.0})
    assert order == ["A", "A", "VA", "VA", "V", "V"]  # whatever was observed in between
    assert strata(epoch_of(schedule)) == ["V", "V", "VA", "VA", "A", "A"]


@given(
    tags=st.lists(st.sampled_from(list(ModalityTag)), min_size=1, max_size=25),
    batch_size=st.integers(1, 4),
    seen=st.lists(difficulties, min_size=1, max_size=9),
    accuracy=st.dictionaries(st.sampled_from(list(ModalityTag)), st.floats(0, 1)),
    leftover=st.sampled_from(LEFTOVERS),
)
def test_each_round_begins_with_the_order_of_the_curriculum(tags, batch_size, seen, accuracy, leftover):
    curriculum = TagCurriculum("adaptive", 3, accuracy)
    schedule = StratifiedSchedule(tags, batch_size, curriculum, granularity="cycle", leftover=leftover)
    step = 0
    for _ in range(2):
        left = Counter(tags)
        while True:
            whole = [tag for tag in left if left[tag] >= batch_size or (leftover == "fill" and left[tag] > 0)]
            expected = curriculum.order(whole, random.Random(0))
            if not expected:
                break
            for tag in expected:
                assert schedule.next_batch().stratum == tag
                left[tag] -= min(batch_size, left[tag])
                curriculum.observe(seen[step % len(seen)])
                step += 1
        while not schedule.exhausted:
            assert schedule.next_batch().stratum == "mixed"


def test_one_stratum_has_the_order_of_trl():
    rows, batch, copies, repeats = 23, 4, 2, 3
    schedule = StratifiedSchedule(["VA"] * rows, batch, seed=7)
    sampler = RepeatSampler(range(rows), copies, batch, repeats, shuffle=True, seed=7)
    for _ in range(3):
        ours = [batch.rows for batch in epoch_of(schedule)]
        theirs = list(sampler)
        # TRL drops the rows that do not fill a batch.
        assert [row for rows in ours[:-1] for _ in range(repeats) for row in rows for _ in range(copies)] == theirs
        assert set(ours[-1][:3]) == set(range(rows)) - set(theirs)
    other = StratifiedSchedule(["VA"] * rows, batch, seed=8)
    assert epoch_of(other)[0].rows != epoch_of(StratifiedSchedule(["VA"] * rows, batch, seed=7))[0].rows


def test_mixed_batches_have_the_order_of_trl_whatever_the_tags():
    tags = SEVEN[:20]
    schedule = StratifiedSchedule(tags, 4, stratified=False, seed=3)
    sampler = RepeatSampler(tags, 1, 4, 1, shuffle=True, seed=3)
    for _ in range(3):
        assert [row for batch in epoch_of(schedule) for row in batch.rows] == list(sampler)


PROGRAM = """
from maple_trl.algorithms.curriculum import TagCurriculum
from maple_trl.algorithms.schedule import StratifiedSchedule
for options in ({}, {"granularity": "cycle"}, {"leftover": "mixed"}, {"stratified": False}):
    schedule = StratifiedSchedule(["V", "A", "VAS", "VA", "A"] * 5, 3, TagCurriculum(), seed=5, **options)
    print([schedule.next_batch() for _ in range(40)])
"""


@pytest.mark.slow
def test_other_processes_choose_the_same_batches(capsys):
    exec(PROGRAM, {})
    ours = capsys.readouterr().out
    env = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"}
    other = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, check=True, text=True)
    assert other.stdout == ours and len(set(ours.splitlines())) == 4


# Looking ahead, and going on


def drive(schedule, curriculum, steps, seed):
    """Some batches, with draws and rewards in between, all from one random stream."""
    draw, seen = random.Random(seed), []
    for _ in range(steps):
        batch = schedule.next_batch()
        seen.append(batch)
        if draw.random() < 0.3:
            seen.append(schedule.draw(batch.stratum, draw.randint(1, 3)))
        curriculum.observe({tag: draw.random() for tag in ModalityTag if draw.random() < 0.4})
    return seen


@given(tags=tag_lists, options=options, strategy=st.sampled_from(list(CURRICULA)), steps=st.integers(0, 15))
def test_peeking_changes_nothing(tags, options, strategy, steps):
    curriculum = TagCurriculum(strategy)
    schedule = StratifiedSchedule(tags, curriculum=curriculum, **options)
    drive(schedule, curriculum, steps, 0)
    before = schedule.state_dict()
    seen = schedule.peek()
    assert schedule.peek() == seen and schedule.state_dict() == before
    assert (seen is None) == schedule.exhausted
    following = schedule.next_batch()
    assert seen is None or seen == following


@given(
    tags=tag_lists,
    options=options,
    strategy=st.sampled_from(list(CURRICULA)),
    steps=st.integers(0, 25),
    left_out=st.sets(st.integers(0, 39), max_size=20),
)
def test_a_restored_schedule_goes_on_as_if_nothing_had_happened(tags, options, strategy, steps, left_out):
    def fresh():
        curriculum = TagCurriculum(strategy)
        return curriculum, StratifiedSchedule(
            tags,
            curriculum=curriculum,
            skipped=lambda epoch: [row for row in left_out if row < len(tags) and (row + epoch) % 3],
            **options,
        )

    curriculum, schedule = fresh()
    drive(schedule, curriculum, steps, 1)
    saved = json.loads(json.dumps([curriculum.state_dict(), schedule.state_dict()]))
    other_curriculum, other = fresh()
    other_curriculum.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert other.epoch == schedule.epoch and other.exhausted == schedule.exhausted
    assert other.peek() == schedule.peek()
    count = 3 * schedule.batches_per_epoch
    assert drive(other, other_curriculum, count, 2) == drive(schedule, curriculum, count, 2)


@pytest.mark.parametrize("leftover", LEFTOVERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_schedule_can_be_restored_after_any_batch(granularity, leftover):
    def fresh():
        return StratifiedSchedule(SEVEN + ["A"], 2, granularity=granularity, leftover=leftover)

    whole = fresh()
    states, batches = [whole.state_dict()], []
    for _ in range(40):
        batches.append(whole.next_batch())
        states.append(json.loads(json.dumps(whole.state_dict())))
    for i in range(35):
        restored = fresh()
        restored.load_state_dict(states[i])
        assert [restored.next_batch() for _ in range(5)] == batches[i : i + 5], i


def test_an_earlier_state_takes_a_schedule_back():
    schedule = StratifiedSchedule(SEVEN, 2)
    schedule.next_batch()
    state = schedule.state_dict()
    following = [schedule.next_batch() for _ in range(20)]
    schedule.load_state_dict(state)
    assert [schedule.next_batch() for _ in range(20)] == following


@pytest.mark.parametrize(
    "changed",
    [
        {"tags": ["V"] * 8},
        {"tags": ["V"] * 4 + ["A"] * 5},
        {"tags": ["A"] * 4 + ["V"] * 4},
        {"seed": 1},
        {"batch_size": 4},
        {"stratified": False},
        {"leftover": "mixed"},
        {"shuffle": False},
    ],
    ids=str,
)
def test_the_state_of_another_schedule_is_refused(changed):
    usual = {"tags": ["V"] * 4 + ["A"] * 4, "batch_size": 2}
    state = StratifiedSchedule(**usual).state_dict()
    StratifiedSchedule(**usual).load_state_dict(state)
    with pytest.raises(
        ValueError, match="the rows, their tags, the seed or the batching differ from those of the che"
    ):
        StratifiedSchedule(**{**usual, **changed}).load_state_dict(state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"granularity": "step"}, "granularity must be one of epoch, cycle, got 'step'"),
        ({"leftover": "drop"}, "leftover must be one of fill, mixed, got 'drop'"),
        ({"batch_size": 0}, "needs rows and a batch size of at least 1, got 2 and 0"),
        ({"tags": []}, "needs rows and a batch size of at least 1, got 0 and 2"),
        ({"tags": ["V", "X"]}, "'X' is not a modality tag"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        StratifiedSchedule(**{"tags": ["V", "A"], "batch_size": 2, **wrong})


def test_tags_may_be_spelt_in_any_way():
    assert epoch_of(StratifiedSchedule(["sv", "VS", "vs"], 3))[0].stratum == "VS"


# Ranks


@given(world=st.integers(1, 4), copies=st.integers(1, 4), factor=st.integers(1, 3), repeats=st.integers(1, 3))
def test_ranks_get_what_trl_and_accelerate_deal_out(world, copies, factor, repeats):
    prompts = world * factor
    data = range(2 * prompts)
    share = prompts * copies // world
    sampler = RepeatSampler(data, copies, prompts, repeats, shuffle=True, seed=3)
    schedule = StratifiedSchedule(["V"] * len(data), prompts, seed=3)
    batches = BatchSampler(sampler, share, drop_last=False)
    dealt = []
    for rank in range(world):  # the sampler draws its order anew each time
        sampler.generator.manual_seed(3)
        dealt.append(list(BatchSamplerShard(batches, world, rank)))
    for i in range(2):
        batch = schedule.next_batch()
        for repeat in range(repeats):
            ours = [rank_share(batch.rows, copies, rank, world) for rank in range(world)]
            assert ours == [dealt[rank][i * repeats + repeat] for rank in range(world)]
            assert sum(ours, []) == [row for row in batch.rows for _ in range(copies)]


def test_a_prompt_may_be_shared_by_ranks_but_not_unevenly():
    assert [rank_share([5, 9, 7], 2, rank, 2) for rank in (0, 1)] == [[5, 5, 9], [9, 7, 7]]
    with pytest.raises(ValueError, match="6 completions cannot be shared by 4 ranks equally"):
        rank_share([5, 9, 7], 2, 0, 4)
