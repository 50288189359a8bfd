import json
import math
import os
import random
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.algorithms.experience import Experience
from maple_trl.algorithms.replay import MANIFEST, ReplayStateError, StratifiedReplayBuffer
from maple_trl.algorithms.replay_tiers import TIERS, Vcrs, tier_of, tier_thresholds


# Few values, so that ties are the rule.
rewards = st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0])
prompts = st.sampled_from([f"row-{i}" for i in range(8)])


def experience(prompt="a", reward=0.0, step=0, mark=0, length=3, **more):
    """`mark` is its first token, by which a test knows it again."""
    ids = torch.arange(mark, mark + length)
    return Experience(prompt, 7, ids, -torch.rand(length), reward, step, **more)


def marks(experiences):
    return [int(e.completion_ids[0]) for e in experiences]


def observed(baselines):
    vcrs = Vcrs()
    for prompt, value in baselines.items():
        vcrs.observe(prompt, [value])
    return vcrs


def everything(buffer):
    return {
        tier: [
            (n, e.prompt, e.row, e.completion_ids.tolist(), e.logps.tolist(), e.reward, e.step, e.hinted, e.rewards)
            for n, e in enumerate(members.values())
        ]
        for tier, members in buffer._tiers.items()
    }


def filled(count=30, rows_seed=0, **options):
    """A buffer with experiences of five prompts, one of which each tier holds at least."""
    draw = random.Random(rows_seed)
    vcrs = observed({f"row-{i}": i / 4 for i in range(5)})
    buffer = StratifiedReplayBuffer(**options)
    for mark in range(count):
        row = draw.randrange(5)
        reward = float(draw.random() < row / 4)
        functions = {"accuracy": reward, "judge": math.nan} if mark % 2 else None
        more = {"length": draw.randrange(1, 9), "hinted": mark % 3 == 0, "rewards": functions}
        buffer.add([experience(f"row-{row}", reward, step=mark // 4, mark=mark, **more)], vcrs)
    return buffer, vcrs


# The baseline


@given(st.lists(st.tuples(prompts, st.lists(st.floats(-5, 5) | st.just(math.nan), max_size=4)), max_size=30))
def test_the_baseline_is_the_mean_of_the_latest_rewards(visits):
    vcrs, seen = Vcrs(window=6), {}
    for prompt, values in visits:
        vcrs.observe(prompt, values)
        seen.setdefault(prompt, []).extend(value for value in values if value == value)
    expected = {prompt: sum(values[-6:]) / len(values[-6:]) for prompt, values in seen.items() if values}
    for prompt, values in seen.items():
        baseline = vcrs.baseline(prompt)
        assert baseline == (pytest.approx(expected[prompt], abs=1e-12) if values else None)
    assert sorted(vcrs.baselines()) == pytest.approx(sorted(expected.values()), abs=1e-12)


def test_twenty_rewards_count():
    vcrs = Vcrs()
    vcrs.observe("a", [1.0] * 30)
    vcrs.observe("a", torch.zeros(5))
    assert vcrs.baseline("a") == 15 / 20 and vcrs.baseline("b") is None
    assert Vcrs(window=100).baseline("a") is None


def test_the_baseline_goes_on_from_its_state():
    vcrs, restored, smaller = Vcrs(window=3), Vcrs(window=3), Vcrs(window=2)
    vcrs.observe("a", [1.0, 0.0, 0.1, 0.2])
    vcrs.observe("b", [1.0])
    restored.observe("gone", [1.0])
    restored.load_state_dict(json.loads(json.dumps(vcrs.state_dict())))
    smaller.load_state_dict(vcrs.state_dict())
    assert smaller.baseline("a") == pytest.approx(0.15)
    for each in (vcrs, restored):
        each.observe("a", [0.7])
    assert restored.state_dict() == vcrs.state_dict() == {"a": [0.1, 0.2, 0.7], "b": [1.0]}
    assert restored.metrics() == vcrs.metrics()
    assert restored.baselines().tolist() == vcrs.baselines().tolist()


def test_baselines_are_measured():
    assert Vcrs().metrics() == {"vcrs/prompts": 0.0}
    metrics = observed({str(i): i / 10 for i in range(11)}).metrics()
    assert metrics["vcrs/prompts"] == 11 and metrics["vcrs/mean"] == pytest.approx(0.5)
    assert {p: metrics[f"vcrs/p{p}"] for p in (10, 25, 50, 75, 90)} == pytest.approx(
        {10: 0.1, 25: 0.25, 50: 0.5, 75: 0.75, 90: 0.9}
    )


def test_an_infinite_reward_changes_nothing():
    vcrs = Vcrs()
    with pytest.raises(ValueError, match="A reward of prompt 'a' is infinite"):
        vcrs.observe("a", [1.0, -math.inf])
    assert vcrs.baseline("a") is None
    with pytest.raises(ValueError, match="at least 1 reward, got 0"):
        Vcrs(window=0)


# Tiers of prompts


def naive_tier(baseline, baselines, quantiles):
    """By counting, in fractions: the share of prompts that are below."""
    below = Fraction(sum(other < baseline for other in baselines), len(baselines))
    hard, medium = (Fraction(str(quantile)) for quantile in quantiles)
    return "hard" if below < hard else "medium" if below < medium else "easy"


@given(
    baselines=st.lists(rewards | st.floats(-1, 1), min_size=1, max_size=60),
    quantiles=st.sampled_from([(0.4, 0.75), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.07, 0.29)]),
)
def test_tiers_are_quantiles_also_under_ties(baselines, quantiles):
    thresholds = tier_thresholds(baselines, quantiles)
    for baseline in baselines:
        assert tier_of(baseline, thresholds) == naive_tier(baseline, baselines, quantiles)


@pytest.mark.parametrize("count", [1, 2, 7, 20, 100])
def test_tiers_without_ties_have_their_shares(count):
    draw = random.Random(count)
    baselines = draw.sample(range(1000), count)
    tiers = [tier_of(value, tier_thresholds(baselines)) for value in baselines]
    assert tiers.count("hard") == math.ceil(count * 2 / 5)
    assert tiers.count("hard") + tiers.count("medium") == math.ceil(count * 3 / 4)
    ranking = sorted(zip(baselines, tiers, strict=True))
    assert [TIERS.index(tier) for _, tier in ranking] == sorted((TIERS.index(t) for t in tiers), reverse=True)


def test_ties_belong_to_the_harder_tier():
    assert {tier_of(v, tier_thresholds([v] * 5)) for v in (0.0, 1.0)} == {"hard"}
    mostly_failing = tier_thresholds([0.0] * 9 + [1.0])
    assert tier_of(0.0, mostly_failing) == "hard" and tier_of(1.0, mostly_failing) == "easy"
    mostly_solved = tier_thresholds([0.0] * 4 + [1.0] * 6)
    assert tier_of(0.0, mostly_solved) == "hard" and tier_of(1.0, mostly_solved) == "medium"
    with pytest.raises(ValueError, match="baseline of at least one prompt"):
        tier_thresholds([])


def test_the_tier_of_a_prompt():
    vcrs = observed({f"row-{i}": i for i in range(20)})
    buffer = StratifiedReplayBuffer()
    tiers = [buffer.tier(f"row-{i}", vcrs) for i in range(20)]
    assert tiers == ["hard"] * 8 + ["medium"] * 7 + ["easy"] * 5
    assert buffer.tier("never", vcrs) is None


# Capacities


@given(capacity=st.integers(1, 400), parts=st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any))
def test_capacities_add_up_and_are_off_by_less_than_one(capacity, parts):
    shares = {tier: part / sum(parts) for tier, part in zip(TIERS, parts, strict=True)}
    capacities = StratifiedReplayBuffer(capacity, shares).capacities
    assert sum(capacities.values()) == capacity
    for tier, part in zip(TIERS, parts, strict=True):
        assert abs(capacities[tier] - Fraction(part * capacity, sum(parts))) < 1


def test_capacities_of_the_paper():
    assert StratifiedReplayBuffer().capacities == {"easy": 2500, "medium": 3500, "hard": 4000}
    # 1.75, 2.45 and 2.8: the two left over go to the largest remainders.
    assert StratifiedReplayBuffer(7).capacities == {"easy": 2, "medium": 2, "hard": 3}
    assert StratifiedReplayBuffer(1).capacities == {"easy": 0, "medium": 0, "hard": 1}


# A naive buffer: one list, filtered anew for everything


class NaiveBuffer:
    def __init__(self, capacities, max_age):
        self.capacities, self.max_age = capacities, max_age
        self.entries = []  # [mark, prompt, step, tier], oldest first

    def tier(self, prompt, vcrs):
        values = [vcrs.baseline(p) for p in vcrs.state_dict()]
        return naive_tier(vcrs.baseline(prompt), values, (0.4, 0.75))

    def trim(self):
        for tier, capacity in self.capacities.items():
            members = [entry for entry in self.entries if entry[3] == tier]
            gone = members[: max(len(members) - capacity, 0)]
            self.entries = [entry for entry in self.entries if entry not in gone]

    def add(self, added, vcrs):
        self.entries += [[mark, prompt, step, self.tier(prompt, vcrs)] for mark, prompt, step in added]
        self.trim()

    def retier(self, vcrs):
        for entry in self.entries:
            entry[3] = self.tier(entry[1], vcrs)
        self.trim()

    def expire(self, step):
        self.entries = [entry for entry in self.entries if step - entry[2] <= self.max_age]

    def discard(self, prompt):
        self.entries = [entry for entry in self.entries if entry[1] != prompt]


commands = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.tuples(prompts, rewards), max_size=5)),
        st.tuples(st.just("observe"), st.tuples(prompts, rewards)),
        st.tuples(st.just("retier"), st.none()),
        st.tuples(st.just("sample"), st.tuples(prompts, st.integers(0, 5), rewards)),
        st.tuples(st.just("sample_batch"), st.integers(0, 8)),
        st.tuples(st.just("discard"), prompts),
    ),
    max_size=40,
)


@given(commands=commands, capacity=st.integers(1, 14), max_age=st.integers(0, 30))
def test_keeps_what_a_naive_buffer_keeps(commands, capacity, max_age):
    vcrs = Vcrs(window=2)
    buffer = StratifiedReplayBuffer(capacity, max_age=max_age)
    naive = NaiveBuffer(buffer.capacities, max_age)
    mark = 0
    for step, (command, argument) in enumerate(commands):
        if command == "add":
            added = []
            for prompt, reward in argument:
                vcrs.observe(prompt, [reward])
                added.append((experience(prompt, reward, step, mark), (mark, prompt, step)))
                mark += 1
            buffer.add([e for e, _ in added], vcrs)
            naive.add([entry for _, entry in added], vcrs)
        elif command == "observe":
            vcrs.observe(argument[0], [argument[1]])
        elif command == "retier":
            buffer.retier(vcrs)
            naive.retier(vcrs)
        elif command == "discard":
            held = len(buffer.stored(argument))
            assert buffer.discard(argument) == held
            naive.discard(argument)
        else:
            naive.expire(step)
            prompt = None if command == "sample_batch" else argument[0]
            candidates = {entry[0] for entry in naive.entries if prompt in (None, entry[1])}
            if prompt is None:
                count, drawn = argument, buffer.sample_batch(argument, step)
            else:
                assert buffer.available(prompt, step) == len(candidates)
                count, drawn = argument[1], buffer.sample(prompt, argument[1], [argument[2]], step)
            drawn = marks(drawn)
            assert len(drawn) == len(set(drawn)) == min(count, len(candidates))
            assert set(drawn) <= candidates

        for tier in TIERS:
            assert buffer.sizes()[tier] <= buffer.capacities[tier]
            assert marks(buffer._tiers[tier].values()) == [e[0] for e in naive.entries if e[3] == tier]
        for prompt in {entry[1] for entry in naive.entries} | {"never"}:
            assert marks(buffer.stored(prompt)) == [e[0] for e in naive.entries if e[1] == prompt]
        assert len(buffer) == len(naive.entries)
    counted = buffer.metrics()
    assert mark == counted["replay/size"] + sum(
        counted[f"replay/{name}"] for name in ("evicted", "expired", "discarded")
    )


def test_a_stream_of_easy_prompts_leaves_the_hard_tier_alone():
    vcrs = observed({"hard": 0.0, "hard, too": 0.1, "medium": 0.5, "easy": 1.0})
    buffer = StratifiedReplayBuffer(20)
    buffer.add([experience("hard", mark=i) for i in range(4)], vcrs)
    for mark in range(100, 200):
        buffer.add([experience("easy", 1.0, mark=mark)], vcrs)
    assert buffer.sizes() == {"easy": 5, "medium": 0, "hard": 4}
    assert marks(buffer.stored("hard")) == [0, 1, 2, 3] and marks(buffer.stored("easy")) == [195, 196, 197, 198, 199]
    # A plain queue of the same capacity would have lost them.
    assert not set(marks(buffer.stored("hard"))) & set(([*range(4), *range(100, 200)])[-20:])


def test_a_prompt_that_improves_is_filed_anew_and_the_old_ones_only_on_demand():
    vcrs = observed({"a": 0.0, "b": 0.1, "c": 0.2, "d": 0.3})
    buffer = StratifiedReplayBuffer(20)
    buffer.add([experience("a", 0.0, mark=1)], vcrs)
    vcrs.observe("a", [1.0] * 20)
    buffer.add([experience("a", 1.0, mark=2)], vcrs)
    assert buffer.sizes() == {"easy": 1, "medium": 0, "hard": 1}
    buffer.retier(vcrs)
    assert buffer.sizes() == {"easy": 2, "medium": 0, "hard": 0}
    assert marks(buffer._tiers["easy"].values()) == [1, 2]
    assert buffer.metrics()["replay/promoted"] == 1 and buffer.metrics()["replay/demoted"] == 0
    vcrs.observe("a", [0.0] * 20)
    buffer.retier(vcrs)
    assert buffer.metrics()["replay/demoted"] == 2 and marks(buffer.stored("a")) == [1, 2]
    buffer.retier(Vcrs())
    assert buffer.sizes()["hard"] == 2


# Sampling


def buffer_of(rewards_, **options):
    vcrs = observed({"a": 0.0})
    buffer = StratifiedReplayBuffer(100, **options)
    buffer.add([experience("a", reward, mark=i) for i, reward in enumerate(rewards_)], vcrs)
    return buffer


@given(st.lists(rewards, max_size=12), st.lists(rewards | st.just(math.nan), max_size=4), st.integers(0, 6))
def test_a_group_has_variance_where_the_buffer_allows_it(stored, fresh, count):
    buffer = buffer_of(stored)
    drawn = buffer.sample("a", count, fresh, step=0)
    assert len(drawn) == min(count, len(stored)) == len(set(marks(drawn)))
    known = [reward for reward in fresh if reward == reward]
    if len(set(known)) == 1:
        differing = [reward for reward in stored if reward != known[0]]
        assert sum(e.reward != known[0] for e in drawn) == min(count, len(differing))
    elif not known and count >= 2:
        assert len({e.reward for e in drawn}) >= min(len(set(stored)), 2)


def test_without_the_preference_groups_would_lack_variance():
    """The negative control: the same buffer, drawn from as if the fresh rewards already varied."""
    blind = preferring = 0
    for seed in range(200):
        blind += any(e.reward for e in buffer_of([1.0] + [0.0] * 7, seed=seed).sample("a", 2, [0.0, 1.0], 0))
        preferring += any(e.reward for e in buffer_of([1.0] + [0.0] * 7, seed=seed).sample("a", 2, [0.0, 0.0], 0))
    assert preferring == 200 and 20 < blind < 90


def test_equally_likely_where_nothing_is_preferred():
    for fresh in ([0.0, 1.0], [0.5]):
        counts = np.zeros(6)
        buffer = buffer_of([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
        for _ in range(3000):
            counts[marks(buffer.sample("a", 2, fresh, 0))] += 1
        # 1000 each, with a standard deviation of 26.
        assert abs(counts - 1000).max() < 130


def test_a_batch_is_drawn_by_the_shares():
    buffer, _ = filled(400, capacity=100)
    assert all(buffer.sizes().values())
    tiers = {}
    for tier, members in buffer._tiers.items():
        tiers |= dict.fromkeys(marks(members.values()), tier)
    counts = dict.fromkeys(TIERS, 0)
    for _ in range(1000):
        drawn = marks(buffer.sample_batch(4, step=0))
        assert len(set(drawn)) == 4
        for mark in drawn:
            counts[tiers[mark]] += 1
    assert counts == pytest.approx({"easy": 1000, "medium": 1400, "hard": 1600}, abs=150)
    assert sorted(marks(buffer.sample_batch(1000, step=0))) == sorted(tiers)


def test_any_prompt_will_do_when_none_is_named():
    first, second = (filled()[0] for _ in range(2))
    assert marks(first.sample(None, 5, [], 0)) == marks(second.sample_batch(5, 0))


def test_stale_experiences_are_dropped_and_counted():
    vcrs = observed({"a": 0.0, "b": 1.0})
    buffer = StratifiedReplayBuffer(100, max_age=10)
    buffer.add([experience("a", step=step, mark=step) for step in range(5)], vcrs)
    buffer.add([experience("b", step=12, mark=12)], vcrs)
    assert buffer.available("a", 10) == 5
    assert buffer.available("a", 12) == 3
    assert sorted(marks(buffer.sample("a", 9, [], 13))) == [3, 4]
    metrics = buffer.metrics()
    assert metrics["replay/expired"] == 3 and metrics["replay/evicted"] == 0
    assert metrics["replay/age_mean"] == pytest.approx((10 + 9 + 1) / 3) and metrics["replay/age_max"] == 10
    assert buffer.sample_batch(9, 23) == [] and len(buffer) == 0
    assert buffer.sample("b", 1, [], 24) == []
    forever = StratifiedReplayBuffer(100)
    forever.add([experience("a", step=0)], vcrs)
    assert forever.available("a", 10**9) == 1


def test_the_hit_rate_is_that_of_the_last_step():
    buffer = buffer_of([0.0, 1.0, 1.0])
    assert "replay/hit_rate" not in buffer.metrics()
    buffer.sample("a", 4, [0.0], 1)
    buffer.sample("never", 4, [0.0], 1)
    assert buffer.metrics()["replay/hit_rate"] == 3 / 8
    buffer.sample_batch(2, 2)
    assert buffer.metrics()["replay/hit_rate"] == 1.0


# What an experience may be


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_experiences_are_copies_of_exact_values(dtype):
    batch = torch.arange(20).reshape(2, 10)
    logps = (-torch.rand(2, 10)).to(dtype)
    stored = Experience("a", 0, batch[1, :4], logps[1, :4], 1, 3)
    assert stored.completion_ids.dtype == torch.int32 and stored.completion_ids.tolist() == [10, 11, 12, 13]
    assert stored.logps.dtype == torch.float32 and torch.equal(stored.logps, logps[1, :4].float())
    batch.zero_()
    logps.zero_()
    assert stored.completion_ids.tolist() == [10, 11, 12, 13] and stored.logps.min() < 0
    # Not a window on the batch, which would have to stay in memory.
    assert stored.completion_ids.untyped_storage().nbytes() == stored.logps.untyped_storage().nbytes() == 16


def test_experiences_from_arrays():
    stored = Experience("a", 0, np.array([1, 2]), np.array([-0.5, -1.0], dtype=np.float16), 0.5, 0)
    assert stored.completion_ids.tolist() == [1, 2] and stored.logps.tolist() == [-0.5, -1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logps": torch.zeros(2)}, r"as many log-probabilities for prompt 'a', got shapes \(3,\) and \(2,\)"),
        ({"completion_ids": torch.zeros(0, dtype=torch.int32), "logps": torch.zeros(0)}, "at least one token id"),
        ({"completion_ids": torch.ones(1, 3), "logps": torch.zeros(1, 3)}, r"got shapes \(1, 3\)"),
        ({"completion_ids": torch.tensor([1, 2, -100])}, "must be integers of at least 0"),
        ({"completion_ids": torch.ones(3)}, "must be integers of at least 0"),
        ({"logps": torch.tensor([0.0, -math.inf, 0.0])}, "A log-probability of prompt 'a' is not finite"),
        ({"reward": math.nan}, "must be finite, got nan for prompt 'a'"),
    ],
)
def test_an_experience_names_what_is_wrong_with_it(changes, message):
    fields = {"prompt": "a", "row": 0, "completion_ids": torch.arange(3), "logps": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        Experience(**(fields | {"reward": 1.0, "step": 0} | changes))


def test_a_prompt_without_baseline_is_refused_as_a_whole():
    buffer = StratifiedReplayBuffer()
    with pytest.raises(ValueError, match="Prompt 'b' has no baseline; observe its rewards before adding"):
        buffer.add([experience("a"), experience("b")], observed({"a": 0.0}))
    assert len(buffer) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "at least 1 experience, got a capacity of 0"),
        ({"shares": {"easy": 0.5, "hard": 0.5}}, "a share of at least 0 for each of easy, medium, hard"),
        ({"shares": {"easy": 1.5, "medium": -0.5, "hard": 0.0}}, "a share of at least 0"),
        ({"shares": {"easy": 0.5, "medium": 0.5, "hard": 0.5}}, "must add up to 1, got 1.5"),
        ({"quantiles": (0.8, 0.4)}, "two ascending numbers"),
        ({"max_age": -1}, "at least 0 optimizer steps, got -1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        StratifiedReplayBuffer(**options)


def test_a_negative_count_is_refused():
    for sample in (buffer_of([0.0]).sample, lambda _, count, fresh, step: buffer_of([0.0]).sample_batch(count, step)):
        with pytest.raises(ValueError, match="must be at least 0, got -1"):
            sample("a", -1, [], 0)


# Saving


def go_on(buffer, vcrs, steps, seed):
    """More of a run: what it draws, and what it holds at its end."""
    draw = random.Random(seed)
    drawn = []
    for step in range(100, 100 + steps):
        prompt = f"row-{draw.randrange(5)}"
        drawn.append(marks(buffer.sample(prompt, 3, [0.0], step)))
        drawn.append(marks(buffer.sample_batch(4, step)))
        vcrs.observe(prompt, [draw.random()])
        buffer.add([experience(prompt, 1.0, step, mark=1000 + step, length=2, rewards={"f": 1.0})], vcrs)
        buffer.retier(vcrs)
    return drawn, [buffer.metrics(), {tier: marks(members.values()) for tier, members in buffer._tiers.items()}]


@pytest.mark.parametrize("count", [0, 1, 13, 40])
def test_a_loaded_buffer_goes_on_alike(count, tmp_path):
    options = {"capacity": 20, "max_age": 103, "seed": 5}
    buffer, vcrs = filled(count, **options)
    buffer.sample_batch(3, 7)
    buffer.retier(vcrs)
    buffer.save(tmp_path, "data 1")
    restored = StratifiedReplayBuffer(**options)
    restored.add([experience("gone")], observed({"gone": 0.0}))
    restored.load(tmp_path, "data 1")
    assert repr(everything(restored)) == repr(everything(buffer))
    assert restored.metrics() == buffer.metrics()
    restored_vcrs = Vcrs()
    restored_vcrs.load_state_dict(json.loads(json.dumps(vcrs.state_dict())))
    assert go_on(restored, restored_vcrs, 12, seed=count) == go_on(buffer, vcrs, 12, seed=count)


def test_a_large_buffer_is_several_files(tmp_path, monkeypatch):
    buffer, _ = filled(40)
    monkeypatch.setattr("maple_trl.algorithms.replay._SHARD", 15)
    buffer.save(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 3
    restored = StratifiedReplayBuffer()
    restored.load(tmp_path)
    assert repr(everything(restored)) == repr(everything(buffer))
    shards[1].unlink()
    with pytest.raises(ReplayStateError, match=f"{shards[1].name} is missing"):
        restored.load(tmp_path)


def test_equal_runs_draw_alike_and_other_seeds_do_not():
    runs = [go_on(*filled(40, capacity=20, seed=seed), 12, seed=1) for seed in (0, 0)]
    assert runs[0] == runs[1]
    one, other = (filled(40)[0] for _ in range(2))
    other.seed = 1
    assert [marks(one.sample_batch(9, 0)) for _ in range(3)] != [marks(other.sample_batch(9, 0)) for _ in range(3)]


def test_forgetting_the_draws_is_noticed(tmp_path):
    """The negative control: without the number of draws, a resumed run would repeat them."""
    buffer, _ = filled(40)
    before = marks(buffer.sample_batch(9, 0))
    buffer.save(tmp_path)
    restored = StratifiedReplayBuffer()
    restored.load(tmp_path)
    restored._counters.draws -= 1
    assert marks(restored.sample_batch(9, 0)) == before != marks(buffer.sample_batch(9, 0))


def test_a_smaller_buffer_takes_the_newest(tmp_path):
    buffer, _ = filled(60, capacity=40)
    buffer.save(tmp_path)
    smaller = StratifiedReplayBuffer(10)
    smaller.load(tmp_path)
    for tier, members in smaller._tiers.items():
        kept = marks(buffer._tiers[tier].values())
        assert marks(members.values()) == kept[-smaller.capacities[tier] :]
    evicted = smaller.metrics()["replay/evicted"] - buffer.metrics()["replay/evicted"]
    assert evicted == len(buffer) - len(smaller) > 0


def test_saving_again_replaces_what_was_there(tmp_path):
    buffer, vcrs = filled(10)
    buffer.save(tmp_path)
    first = {path.name for path in tmp_path.iterdir()}
    (tmp_path / "replay-partial.safetensors").write_bytes(b"of a run that was killed")
    (tmp_path / "notes.txt").write_text("not ours")
    buffer.add([experience("row-1", mark=77)], vcrs)
    buffer.save(tmp_path)
    second = {path.name for path in tmp_path.iterdir()}
    assert len(first) == 3 and second & first == {MANIFEST} and len(second) == 4 and "notes.txt" in second
    restored = StratifiedReplayBuffer()
    restored.load(tmp_path)
    assert repr(everything(restored)) == repr(everything(buffer))


def test_a_save_that_was_killed_leaves_the_state_before(tmp_path, monkeypatch):
    buffer, vcrs = filled(10)
    buffer.save(tmp_path)
    before = repr(everything(buffer))
    for survived in range(3):
        replaced = []

        def replace(source, target, survived=survived, replaced=replaced):
            if len(replaced) == survived:
                raise KeyboardInterrupt
            replaced.append(target)
            os.rename(source, target)

        buffer.add([experience("row-1", mark=77)], vcrs)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("maple_trl.algorithms.replay.os.replace", replace)
            buffer.save(tmp_path)
        restored = StratifiedReplayBuffer()
        restored.load(tmp_path)
        assert repr(everything(restored)) == before
    buffer.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    filled(20)[0].save(folder, "data 1")
    return folder


def refused(folder, match, fingerprint="data 1"):
    """The error of loading; what the buffer held before is still there."""
    buffer = buffer_of([0.0, 1.0])
    with pytest.raises(ReplayStateError, match=match) as error:
        buffer.load(folder, fingerprint)
    assert len(buffer) == 2 and marks(buffer.stored("a")) == [0, 1]
    return str(error.value)


def part(folder, kind):
    (path,) = folder.glob(MANIFEST if kind == "manifest" else f"replay-*.{kind}")
    return path


KINDS = ("manifest", "safetensors", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_named(kind, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = part(folder, kind)
    path.unlink()
    assert str(path) in refused(folder, "is missing")


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_file_is_named(kind, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = part(folder, kind)
    for size in (path.stat().st_size // 2, path.stat().st_size - 1, 0):
        os.truncate(path, size)
        assert str(path) in refused(folder, "it was not written to its end|is cut short or damaged")


@pytest.mark.parametrize("kind", KINDS)
def test_any_changed_byte_is_noticed(kind, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = part(folder, kind)
    whole = path.read_bytes()
    places = range(len(whole)) if kind == "manifest" else random.Random(0).sample(range(len(whole)), 40)
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert str(path) in refused(folder, "was changed after|is cut short or damaged|of another format")
    path.write_bytes(whole)
    StratifiedReplayBuffer().load(folder, "data 1")


def test_a_part_of_another_save_is_noticed(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    filled(20, rows_seed=1)[0].save(tmp_path / "other", "data 1")
    shutil.copy(part(tmp_path / "other", "safetensors"), part(folder, "safetensors"))
    assert ".safetensors" in refused(folder, "bytes instead of|was changed after")


def test_foreign_states_are_refused(saved, tmp_path):
    refused(saved, "its fingerprint is 'data 1', this run's 'data 2'", fingerprint="data 2")
    for other in ({"format": "maple_trl replay buffer", "version": 2}, {"format": "notes"}, [1, 2], None):
        (tmp_path / MANIFEST).write_text(json.dumps(other))
        refused(tmp_path, "is of another format: expected .*'version': 1")


def test_nothing_that_is_saved_is_code(saved):
    for path in saved.iterdir():
        assert path.suffix in (".json", ".safetensors", ".parquet")
