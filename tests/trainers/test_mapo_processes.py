"""MAPO on one, two and four processes: the same gradients, the same decisions on every rank, and no rank that waits."""

import json
from statistics import fmean

import pytest
import torch
from jobs.runner import Job, changes, facts, once, weights, write_inputs
from test_processes import by_tag, worst


pytestmark = pytest.mark.slow


WORLDS = (1, 2, 4)
# Two processes make two prompts each of the first four, four processes one (with four copies).
TAGS = ("S", "VA", "VAS", "A", "VS", "S", "V", "AS")
ROWS = 16  # completions of a rollout
PLAIN = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    "max_steps": 1,
    "num_generations": 4,
    "batching": "mixed",
    "shuffle_dataset": False,
    "gradient_checkpointing": False,
}
EARLY = {"dynamic_sampling": "early"}
# Which of the first prompts (and of those that a refill draws) have completions that are told apart.
LAST_RANKS_KEEP_NONE = [True, True, False, False, True, False, True, True]
ONE_RANK_KEEPS_MOST = [False, True, True, True, True, True, True, True]
ONE_PROMPT = [False, False, False, True, True, True, True, True]
# That nothing is learned is known from what is gathered, however many ranks it was dealt to.
IDLE_WORLDS = WORLDS[:2]
ON_FOUR = ("mixed", "adaptive", "early", "early-most", "early-one", "refill", "stratified", "stratified-early")


def options(world, accumulation, **more):
    return PLAIN | {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": ROWS // accumulation // world,
        **more,
    }


def gradient_runs(world, rows, of_one_tag):
    def run(name, accumulation=2, varied=(True,) * 8, reward="where_varied", rows=rows, lora=False, **more):
        told = [row | {"varied": v} for row, v in zip(rows, varied, strict=False)]
        settings = {"rows": told, "fixed_completions": True, "trainer": "mapo", "reward": reward, "lora": lora}
        settings["dtype"] = "float64"  # in float32 the smallest gradients are rounding
        return {"name": name, "options": options(world, accumulation, **more), **settings}

    passes = {"beta": 0.1, "num_iterations": 2, "max_steps": 2, "learning_rate": 0.01, **EARLY}
    runs = [
        run("mixed", loss_aggregation="token"),
        run("mixed-1", accumulation=1, advantage_scope="tag_whitened"),
        run("adaptive", reward="in_thirds", tag_weights="adaptive", kl_window=50, loss_aggregation="prompt"),
        run("sapo", loss_type="sapo", num_iterations=2, max_steps=2, learning_rate=0.01),
        run("early", varied=LAST_RANKS_KEEP_NONE, **EARLY),
        run("early-most", varied=ONE_RANK_KEEPS_MOST, accumulation=1, **EARLY),
        run("early-sapo", varied=ONE_RANK_KEEPS_MOST, loss_type="sapo", **EARLY),
        run("early-one", varied=ONE_PROMPT, advantage_scope="group", loss_strata="batch", **EARLY),
        run("early-passes", varied=ONE_PROMPT, **passes),
        run("early-waiting", varied=ONE_PROMPT, ddp_find_unused_parameters=False, **passes | {"beta": 0.0}),
        run("checkpointing", varied=ONE_PROMPT, gradient_checkpointing=True, beta=0.1, **EARLY),
        run("refill", varied=LAST_RANKS_KEEP_NONE, refill_rounds=2, **EARLY),
        run("stratified", rows=of_one_tag, batching="stratified", loss_aggregation="token"),
        run("stratified-early", rows=of_one_tag, varied=ONE_RANK_KEEPS_MOST, batching="stratified", **EARLY),
    ]
    return [run for run in runs if world < 4 or run["name"] in ON_FOUR]


def controls(rows):
    settings = {"fixed_completions": True, "trainer": "mapo", "options": options(2, 2, loss_aggregation="token")}
    told = [row | {"varied": True} for row in rows]
    return [
        {"name": "rank-reward", "rows": told, "reward": "of_rank", **settings},
        {"name": "unsynced", "rows": told, "reward": "where_varied", "unsynced": True, **settings},
    ]


def alike_runs(world, rows):
    """The second rollout teaches nothing; then one that does."""
    told = [row | {"varied": not 4 <= i < 8} for i, row in enumerate(rows)]
    adam = options(world, 2, optim="adamw_torch", learning_rate=1e-3, weight_decay=0.1, max_steps=4)
    settings = {"rows": told, "fixed_completions": True, "trainer": "mapo", "reward": "where_varied"}
    never = [row | {"varied": False} for row in rows[:8]]
    return [
        {"name": "alike", "options": adam | EARLY, **settings},
        {"name": "alike-passes", "options": adam | EARLY | {"num_iterations": 2, "max_steps": 6}, **settings},
        {"name": "never", "options": adam | EARLY | {"refill_rounds": 1, "max_steps": 3}, **settings, "rows": never},
    ]


def long_run(rows):
    """Three epochs of sampled completions: every rank has its own."""
    more = {"curriculum": "adaptive", "zero_shot_accuracy": {"S": 0.5, "VA": 0.1, "A": 0.3}, "tag_weights": "adaptive"}
    more |= {"num_generations": 2, "max_steps": -1, "num_train_epochs": 3, "shuffle_dataset": True, **EARLY}
    more |= {"revisit": "informative", "curriculum_granularity": "epoch"}
    settings = options(2, 1, batching="stratified", learning_rate=1e-2, **more)
    settings["per_device_train_batch_size"] = 2
    return {"name": "long", "trainer": "mapo", "reward": "in_halves", "rows": rows, "options": settings}


@pytest.fixture(scope="module")
def results(tmp_path_factory, tested):
    """The same plan on one and two processes, and, where that is looked at, on four."""
    # Two of them serve as controls in any case.
    names = {"mixed", "early", *tested("test_any_number_of_processes_gives_the_same_gradient", "name")}
    worlds = {1, 2, *tested("test_any_number_of_processes_gives_the_same_gradient", "world")}

    def make(folder):
        rows = write_inputs(folder)
        few = by_tag(rows, TAGS)
        of_three = [row for row in rows if row["tag"] in ("S", "VA", "A")]
        jobs = []
        for world in sorted(worlds):
            of_one_tag = [row for row in rows if row["tag"] == "VAS"]
            runs = [run for run in gradient_runs(world, few, of_one_tag) if run["name"] in names]
            if world in IDLE_WORLDS:
                runs += alike_runs(world, rows[:12])
            if world == 2:
                runs += controls(few) + [long_run(of_three)]
            jobs.append(Job(world, folder, f"{world}", rows, runs))
            if world == 2:
                for job in jobs:  # four more at the same time would be too many for the memory of a small machine
                    job.wait()
        for job in jobs[2:]:
            job.wait()

    return once(tmp_path_factory, "mapo-processes", make)


def trained(results, world, name):
    """The completions that each rank trained on, over all its micro-batches."""
    told = [facts(results / f"{world}", name, rank)["trained"] for rank in range(world)]
    return [[(key, tuple(ids)) for chunk in chunks for key, ids in chunk] for chunks in told]


def steps(results, world, name, rank=0):
    return [entry for entry in facts(results / f"{world}", name, rank)["log"] if "loss" in entry]


# Completions that all ranks together train on.
KEPT = {
    "mixed": 16,
    "mixed-1": 16,
    "adaptive": 16,
    "sapo": 32,
    "early": 8,
    "early-most": 12,
    "early-sapo": 12,
    "early-one": 4,
    "early-passes": 8,
    "early-waiting": 8,
    "checkpointing": 4,
    "refill": 16,
    "stratified": 16,
    "stratified-early": 12,
}
NO_VIDEO = ("early-one", "early-passes", "early-waiting", "checkpointing")  # only prompt 3 is trained on
USUAL = [
    (name, 2)
    for name in ("mixed", "adaptive", "early", "early-most", "early-one", "early-passes", "refill", "stratified-early")
]
CASES = [
    (name, world) if (name, world) in USUAL else pytest.param(name, world, marks=pytest.mark.long)
    for name in KEPT
    for world in WORLDS[1:]
    if world < 4 or name in ON_FOUR
]


@pytest.mark.parametrize(("name", "world"), CASES)
def test_any_number_of_processes_gives_the_same_gradient(results, name, world):
    one, many = changes(results / "1", name), changes(results / f"{world}", name)
    error, where = worst(one, many)
    assert error <= 1e-5, where
    for tower in ("audio_tower", "visual", "language_model"):
        moved = any(value.norm() > 1e-4 for key, value in one.items() if tower in key)
        assert moved or (tower == "visual" and name in NO_VIDEO), tower
    for rank in range(1, world):
        told = facts(results / f"{world}", name, rank)
        assert (told["rank"], told["world"], told["backend"]) == (rank, world, "gloo")
        other = weights(results / f"{world}", name, rank)
        assert all(torch.equal(value, other[key]) for key, value in weights(results / f"{world}", name).items())


@pytest.mark.parametrize(("name", "world"), CASES)
def test_ranks_share_the_kept_rows_and_no_others(results, name, world):
    (alone,) = trained(results, 1, name)
    ranks = trained(results, world, name)
    assert list(map(len, ranks)) == [KEPT[name] // world] * world
    assert sorted(row for rows in ranks for row in rows) == sorted(alone)


@pytest.mark.long
def test_the_kept_rows_lay_on_few_ranks(results):
    """What the names of the runs promise: without sharing, ranks would have trained on very different numbers."""
    kept = {"early": [4, 4, 0, 0], "early-most": [0, 4, 4, 4], "early-one": [0, 0, 0, 4]}
    told = json.loads((results / "4.json").read_text())["runs"]
    for name, expected in kept.items():
        (run,) = [run for run in told if run["name"] == name]
        varied = {row["id"]: row["varied"] for row in run["rows"]}
        used = [facts(results / "4", name, rank)["used"][0] for rank in range(4)]
        assert [sum(map(varied.get, ids)) for ids in used] == expected


@pytest.mark.parametrize(
    ("name", "world"), [case for case in CASES if not {"checkpointing", "sapo"} & set(getattr(case, "values", case))]
)
def test_rows_of_dropped_groups_are_in_no_forward_pass_of_any_rank(results, name, world):
    # The log-probabilities that a second pass needs; ranks that must not run ahead of others compute as many rows as these.
    before_training = {"early-passes": 4, "early-waiting": 4 * world}.get(name, 0)
    passes = [sum(facts(results / f"{world}", name, rank)["passes"]) for rank in range(world)]
    assert sum(passes) == KEPT[name] + before_training


def test_the_comparison_notices_a_broken_average(results):
    one = changes(results / "1", "mixed")
    assert worst(one, changes(results / "2", "rank-reward"))[0] > 0.01
    assert worst(one, changes(results / "2", "unsynced"))[0] > 0.01
    assert worst(one, changes(results / "1", "early"))[0] > 0.01


# Rollouts that teach nothing


@pytest.mark.parametrize("world", IDLE_WORLDS)
@pytest.mark.parametrize(("name", "idle"), [("alike", [2]), ("alike-passes", [3, 4])])
def test_a_rollout_that_teaches_nothing_leaves_weights_and_optimizer_alone(results, world, name, idle):
    for rank in range(world):
        logged = steps(results, world, name, rank)
        without = [entry["step"] for entry in logged if entry["sampling/steps_without_update"]]
        assert without == idle and all(logged[step - 1]["loss"] == 0 for step in idle)
        sums = facts(results / f"{world}", name, rank)["checksums"]
        assert len(sums) == len(logged) == (4 if name == "alike" else 6)
        for step in range(2, len(sums) + 1):
            now, before = sums[step - 1], sums[step - 2]
            assert [a == b for a, b in zip(now, before, strict=True)] == [step in idle] * 2, step


@pytest.mark.parametrize("world", IDLE_WORLDS)
def test_a_run_that_learns_nothing_ends(results, world):
    for rank in range(world):
        logged = steps(results, world, "never", rank)
        assert len(logged) == 3 and all(entry["sampling/steps_without_update"] == 1 for entry in logged)
        assert not any(value.any() for value in changes(results / f"{world}", "never", rank).values())
        assert not any(trained(results, world, "never"))
        # The eight prompts of an epoch are a rollout and its refill; each epoch has to visit all again.
        assert [entry["schedule/epoch"] for entry in logged] == [0, 1, 2]


# Decisions


def test_all_ranks_decide_alike_for_three_epochs(results):
    out = results / "2"
    first, second = (facts(out, "long", rank) for rank in (0, 1))
    assert first["known"] == second["known"]
    tag_of = {row["id"]: row["tag"] for row in json.loads((results / "2.json").read_text())["rows"]}
    order = []
    for one, two in zip(first["used"], second["used"], strict=True):
        (tag,) = {tag_of[row] for row in one + two}
        order.append(tag)
    assert order[:6] == ["VA", "VA", "A", "A", "S", "S"]  # by zero-shot accuracy
    known = first["known"]
    assert known[-1]["StratifiedSchedule"]["epoch"] == 2 and len(known) == len(order) < 3 * 6  # some rows were skipped
    assert any(state["StratifiedSchedule"]["skipped"] for state in known)
    completions = trained(results, 2, "long")
    assert completions[0] and completions[1] and not set(completions[0]) & set(completions[1])
    assert all(not set(one) & set(two) for one, two in list(zip(first["used"], second["used"], strict=True))[:6])
    # The rest of a log differs by rank in nothing that was measured over all of them.
    for one, two in zip(steps(results, 2, "long", 0), steps(results, 2, "long", 1), strict=True):
        names = {name for name in one if name.startswith(("tag/", "sampling/", "schedule/"))}
        assert names == {name for name in two if name.startswith(("tag/", "sampling/", "schedule/"))}
        assert all(one[name] == two[name] for name in names if not name.endswith("/seconds"))
    assert all(torch.equal(value, weights(out, "long", 1)[key]) for key, value in weights(out, "long").items())


def test_the_order_follows_what_was_measured(results):
    """In each later epoch the tags come in the order of the priorities that were known when it began."""
    told = facts(results / "2", "long")
    tag_of = {row["id"]: row["tag"] for row in json.loads((results / "2.json").read_text())["rows"]}
    order = [tag_of[ids[0]] for ids in told["used"]]
    epochs = [state["StratifiedSchedule"]["epoch"] for state in told["known"]]
    for epoch in (1, 2):
        begin = epochs.index(epoch)
        histories = told["known"][begin - 1]["TagCurriculum"]["histories"]
        priority = {tag: fmean(values) for tag, values in histories.items()}
        visited = [tag for tag, e in zip(order, epochs, strict=True) if e == epoch]
        assert visited == sorted(visited, key=lambda tag: -priority[tag])
        assert len(set(priority.values())) > 1
