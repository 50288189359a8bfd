"""AVATAR on one and two processes: the same groups, losses and weights, one buffer, and no rank that waits."""

import itertools
import json
import signal

import pyarrow.parquet as pq
import pytest
import torch
from jobs.runner import Job, changes, facts, once, weights, write_inputs
from test_mapo_resume import per_step
from test_processes import by_tag, worst


pytestmark = pytest.mark.slow


PLAIN = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "max_steps": 3,
    "shuffle_dataset": False,
    "gradient_checkpointing": False,
    "replayed_generations": 2,
    "replay_scope": "prompt",
}
# Rows of a rollout by run, and how many of them a process takes at once; two micro-batches but for the first.
RUNS = {
    # One prompt a rollout: its group lies on both ranks.
    "spanning": {"rows": 8, "accumulation": 1, "num_generations": 8, "replayed_generations": 4},
    "spanning-most": {"rows": 8, "accumulation": 1, "num_generations": 8, "replayed_generations": 6},
    "wide": {"rows": 16, "num_generations": 4, "advantage_scope": "tag", "loss_type": "grpo"},
    "stratified": {"rows": 16, "num_generations": 4, "batching": "stratified", "advantage_group": "mixed"},
    # By tier: completions of any prompts. The norms of both terms' gradients are of both ranks' rows.
    "tiers": {"rows": 8, "num_generations": 4, "replay_scope": "tiers", "replay_gradient_steps": 1},
    "tiers-stratified": {
        "rows": 16,
        "num_generations": 4,
        "replay_scope": "tiers",
        "replay_draw": "priority",
        "batching": "stratified",
    },
    # Two of the four prompts a rollout: their first time, they are filled up with completions of the others.
    "buffer": {"rows": 8, "num_generations": 4, "replay_scope": "buffer"},
    "passes": {
        "rows": 16,
        "num_generations": 4,
        "num_iterations": 2,
        "beta": 0.1,
        "replay_alpha": 0.5,
        "max_steps": 4,
    },
    "hints": {
        "rows": 16,
        "num_generations": 4,
        "hints": True,
        "hint_visits": 1,
        "hint_max_kl": 1e6,
        "replay_quantiles": [1.0, 1.0],
        "max_steps": 5,
    },
}
UNEQUAL = ("unequal", "unequal-spanning")
SELDOM = ("spanning-most", "wide", "stratified", "tiers-stratified")


def some(names):
    """Parameters of which those that are dear and much like others are left to `make test-long`."""
    return [pytest.param(name, marks=pytest.mark.long) if name in SELDOM else name for name in names]


LONG = {
    "max_steps": 6,
    "learning_rate": 1e-3,
    "num_generations": 8,
    "replayed_generations": 2,  # so that a rank has more fresh rows, which stand together, than a step takes
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "replay_retier": True,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 3,
}


def plan(world, rows, names):
    runs = []

    def add(name, rows_of_rollout, accumulation=2, reward="of_completion", rows=rows, **options):
        sizes = {
            "gradient_accumulation_steps": accumulation,
            "per_device_train_batch_size": rows_of_rollout // accumulation // world,
        }
        # Three steps in float32 add up roundings to 1e-4 of the smallest gradients; float64 leaves only real differences.
        run = {"name": name, "trainer": "avatar", "reward": reward, "rows": rows}
        run |= {"fixed_completions": True, "dtype": "float64"}
        runs.append(run | {"options": PLAIN | sizes | options})

    for name, options in RUNS.items():
        if name not in names:
            continue
        options = dict(options)
        used = [rows[0], rows[1]] if name.startswith("spanning") else rows
        add(name, options.pop("rows"), rows=[row | {"known": True} for row in used], **options)
    # The second rank's first prompt (its whole share of a rollout, or a part) never gets a reward.
    told = [row | {"known": i != 2} for i, row in enumerate(rows)]
    add("unequal", 16, rows=told, reward="where_known", num_generations=4)
    told = [row | {"known": i != 0} for i, row in enumerate(rows[:3])]
    add("unequal-spanning", 24, accumulation=1, rows=told, reward="where_known", num_generations=8)
    if world == 2:
        options = {name: value for name, value in RUNS["passes"].items() if name != "rows"}
        add("unsynced", 16, rows=[row | {"known": True} for row in rows], **options)
        runs[-1]["unsynced"] = True
    return runs


@pytest.fixture(scope="module")
def results(tmp_path_factory, tested):
    names = tested("test_two_processes_give_the_same_losses_and_weights", "name")
    # What further tests compare, or look at.
    names |= {"spanning", "passes", "buffer", "tiers", "hints"}

    def prepare(folder):
        inputs = write_inputs(folder)
        rows = by_tag(inputs, ("VA", "AS", "VA", "AS"))
        rows = [row | {"hint": f"hint {i}" if i % 2 else None} for i, row in enumerate(rows)]
        long = {"name": "long", "trainer": "avatar", "reward": "in_thirds", "options": LONG}
        alone = Job(1, folder, "1", rows, plan(1, rows, names))
        alone.wait()
        Job(2, folder, "2", rows, [*plan(2, rows, names), long]).wait()
        killed = Job(2, folder, "killed", rows, [long | {"hold_at": 3}])
        killed.wait_for("long.held")
        (folder / "status.json").write_text(json.dumps(killed.kill()))
        options = LONG | {"output_dir": str(folder / "killed" / "long")}
        Job(2, folder, "resumed", rows, [long | {"resume": True, "options": options}]).wait()

    return once(tmp_path_factory, "avatar-processes", prepare)


def told(results, world, name, rank=0):
    return facts(results / f"{world}", name, rank)


def trained(results, world, name):
    """The completions that were trained on at each step of each rank: prompt, tokens and whether it was replayed."""
    steps = []
    for rank in range(world):
        batches = told(results, world, name, rank)["trained"]
        steps.append([[(key, tuple(ids), past) for key, ids, past in batch] for batch in batches])
    return steps


NAMES = ("loss", "grad_norm", "reward", "replay/", "vcrs/", "hint/", "tag/", "loss_profile/", "rewardless", "frac_")


def close(one, other, name=""):
    """Whether two things of JSON are the same but for the rounding of their numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key], key) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(close(a, b, name) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-4, abs=2e-5, nan_ok=True)
    return one == other


def assert_same_weights(results, name):
    """Of one and of two processes, which have trained something."""
    one, two = changes(results / "1", name), changes(results / "2", name)
    error, where = worst(one, two)
    print(f"{name}: {error:.1e}")
    assert error <= 1e-5, where
    assert any(value.norm() > 1e-4 for value in one.values())


@pytest.mark.parametrize("name", some(RUNS))
def test_two_processes_give_the_same_losses_and_weights(results, name):
    assert_same_weights(results, name)
    for alone, shared in zip(
        per_step(told(results, 1, name)).values(), per_step(told(results, 2, name)).values(), strict=True
    ):
        of_run = {entry for entry in alone if entry.startswith(NAMES)}
        assert of_run == {entry for entry in shared if entry.startswith(NAMES)}
        # TRL takes the loss from the first rank; the gradient is that of all.
        for entry in of_run - {"loss"}:
            assert shared[entry] == pytest.approx(alone[entry], rel=2e-4, abs=2e-5), entry
    for rank in (0, 1):
        facts_of_rank = told(results, 2, name, rank)
        assert (facts_of_rank["rank"], facts_of_rank["world"], facts_of_rank["backend"]) == (rank, 2, "gloo")
    other = weights(results / "2", name, 1)
    assert all(torch.equal(value, other[key]) for key, value in weights(results / "2", name).items())


@pytest.mark.parametrize("name", some(RUNS))
def test_two_processes_replay_the_same_completions(results, name):
    (alone,) = trained(results, 1, name)
    shared = trained(results, 2, name)
    assert sorted(row for batch in alone for row in batch) == sorted(row for r in shared for b in r for row in b)
    assert any(past for batch in alone for *_, past in batch)
    counts = [[sum(past for *_, past in batch) for batch in rank] for rank in shared]
    assert sum(counts[0]) == sum(counts[1]) > 0


@pytest.mark.parametrize("name", some([*RUNS, *UNEQUAL, "unsynced", "long"]))
def test_both_ranks_remember_the_same(results, name):
    first, second = told(results, 2, name, 0), told(results, 2, name, 1)
    assert first["known"] == second["known"] and len(first["known"]) == len(per_step(first))
    assert first["known"][-1]["experiences"] and first["known"][-1]["vcrs"]


@pytest.mark.parametrize("name", some(RUNS))
def test_two_processes_remember_what_one_does(results, name):
    one, two = told(results, 1, name)["known"], told(results, 2, name)["known"]
    assert close(one, two)
    assert not close(one[:-1], two[1:])


@pytest.mark.parametrize("name", some(RUNS))
def test_two_processes_write_the_same_advantages(results, name):
    """Of fresh and replayed completions, into the files of the rollouts."""

    def lines(world):
        tables = [pq.read_table(path) for path in sorted((results / str(world) / name / "rollouts").glob("*.parquet"))]
        names = ("step", "replayed", "id", "completion", "tokens", "reward", "written_at")
        return sorted(
            ([str(line[n]) for n in names], line["advantage"]) for table in tables for line in table.to_pylist()
        )

    alone, shared = lines(1), lines(2)
    assert [about for about, _ in alone] == [about for about, _ in shared]
    assert all(advantage is not None for _, advantage in alone)
    # What is alike in all else may stand in either order.
    for _, group in itertools.groupby(zip(alone, shared, strict=True), lambda pair: pair[0][0]):
        one, two = zip(*((a, b) for (_, a), (_, b) in group), strict=True)
        assert sorted(two) == pytest.approx(sorted(one), rel=1e-4, abs=1e-5)
    past = [advantage for about, advantage in alone if about[1] == "True"]
    assert past and any(abs(advantage) > 1e-3 for advantage in past)


@pytest.mark.parametrize("name", some(["spanning", "spanning-most"]))
def test_a_group_lies_on_both_ranks(results, name):
    replayed = RUNS[name]["replayed_generations"]
    first, second = trained(results, 2, name)
    for step, (one, two) in enumerate(zip(first, second, strict=True)):
        assert len(one) == len(two) == 4 and len({key for key, *_ in one + two}) == 1
        past = [sum(flag for *_, flag in rows) for rows in (one, two)]
        assert past == ([0, 0] if step < 2 else [replayed // 2] * 2)


def test_completions_of_other_prompts_fill_groups_on_both_ranks(results):
    logged = per_step(told(results, 2, "buffer"))
    assert [logged[step]["replay/of_other_prompts"] for step in (1, 2, 3)] == [0, 0.5, 0]


def test_tiers_fill_groups_on_both_ranks(results):
    logged = per_step(told(results, 2, "tiers"))
    assert [logged[step]["replay/share"] for step in (1, 2, 3)] == [0, 0.5, 0.5]
    assert max(logged[step]["replay/of_other_prompts"] for step in (2, 3)) > 0
    for step in (2, 3):
        on, off, cosine = (logged[step][f"replay/gradient_{name}"] for name in ("on", "off", "cosine"))
        assert (on**2 + off**2 + 2 * on * off * cosine) ** 0.5 == pytest.approx(logged[step]["grad_norm"], rel=1e-4)


def test_hints_are_given_on_both_ranks(results):
    first, second = trained(results, 2, "hints")
    for rank in (first, second):
        keys = [key for batch in rank for key, *_ in batch]
        assert {key.endswith("+hint") for key in keys} == {True, False}
    assert per_step(told(results, 2, "hints"))[5]["hint/given"] == 2


def test_ranks_generate_equally_many_where_one_has_less_to_replay(results):
    """The second rank holds two prompts, one of which is never stored: it can replay two completions, the first four."""
    first, second = trained(results, 2, "unequal")
    for one, two in zip(first, second, strict=True):
        assert len(one) == len(two)
    passes = [told(results, 2, "unequal", rank)["passes"] for rank in (0, 1)]
    assert passes[0] == passes[1]
    logged = per_step(told(results, 2, "unequal"))
    assert [logged[step]["replay/share"] for step in (1, 2, 3)] == [0, 4 / 16, 4 / 16]
    alone = per_step(told(results, 1, "unequal"))
    assert [alone[step]["replay/share"] for step in (1, 2, 3)] == [0, 6 / 16, 6 / 16]
    assert logged[3]["replay/unstorable"] > alone[3]["replay/unstorable"] * 0.9


def test_a_group_without_anything_stored_on_both_ranks(results):
    """Three groups of eight: the first has nothing stored, the second lies on both ranks."""
    first, second = trained(results, 2, "unequal-spanning")
    past = [[sum(flag for *_, flag in batch) for batch in rank] for rank in (first, second)]
    assert past[0] == past[1] and past[0][0] == 0 and 0 < past[0][1] <= 4
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [12] * 3
    assert told(results, 2, "unequal-spanning", 0)["passes"] == told(results, 2, "unequal-spanning", 1)["passes"]


def test_the_comparison_notices_other_completions(results):
    assert worst(changes(results / "1", "passes"), changes(results / "2", "hints"))[0] > 0.01
    assert not close(told(results, 1, "passes")["known"], told(results, 2, "unsynced")["known"])


# Kill and resume


def test_a_killed_run_of_two_processes_goes_on(results):
    assert json.loads((results / "status.json").read_text()) == -signal.SIGKILL
    held = results / "killed" / "long" / "checkpoint-3"
    state = json.loads((held / "avatar.json").read_text())["memory"]
    assert state["pending"] and (held / "rollout_1.json").exists()  # in the middle of a rollout
    for rank in (0, 1):
        whole, resumed = told(results, 2, "long", rank), facts(results / "resumed", "long", rank)
        assert resumed["error"] is None and len(resumed["known"]) == 3
        for what in ("known", "used", "trained", "checksums"):
            assert resumed[what] and resumed[what] == whole[what][-len(resumed[what]) :], what
        expected, got = per_step(whole), per_step(resumed)
        assert {step: got[step] for step in (4, 5, 6)} == {step: expected[step] for step in (4, 5, 6)}
        one, other = weights(results / "2", "long", rank), weights(results / "resumed", "long", rank)
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert any(past for batch in facts(results / "resumed", "long")["trained"] for *_, past in batch)
    sampled = [trained(results, 2, "long")[rank][0] for rank in (0, 1)]
    assert sampled[0] != sampled[1]  # every rank draws its own
