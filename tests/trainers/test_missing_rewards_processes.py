"""Rewards that failed, on two processes: decided by all ranks' scores, the same gradients, and no rank that waits."""

import pytest
import torch
from jobs.runner import Job, changes, facts, once, weights, write_inputs
from test_mapo_processes import PLAIN
from test_processes import by_tag, worst


pytestmark = [pytest.mark.slow, pytest.mark.long]


TAGS = ("S", "VA", "VAS")
COPIES = 4  # of three prompts, six completions a process: the second prompt lies on both
RUNS = {
    "mapo": {"trainer": "mapo", "options": {"loss_aggregation": "sample"}},
    "mapo-early": {"trainer": "mapo", "options": {"dynamic_sampling": "early"}},
    "omni": {"trainer": "omni", "options": {"loss_type": "grpo"}},
    "avatar": {"trainer": "avatar", "options": {"loss_type": "grpo", "replayed_generations": 2}},
}
# The first rollout teaches something, the next two nothing.
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 3}


def plan(world, rows):
    told = [row | {"known": i != 0} for i, row in enumerate(rows)]
    runs = []
    for name, run in RUNS.items():
        options = {key: value for key, value in PLAIN.items() if key != "batching" or run["trainer"] == "mapo"}
        options |= {"per_device_train_batch_size": 6 // world, "gradient_accumulation_steps": 2, **run["options"]}
        settings = {"trainer": run["trainer"], "rows": told, "fixed_completions": True, "dtype": "float64"}
        runs.append({"name": name, **settings, "reward": "sometimes_failed", "options": options})
        if name in ("mapo", "omni"):
            runs.append(
                {"name": f"{name}-adam", **settings, "reward": "failed_after_the_first", "options": options | ADAM}
            )
    return runs + [runs[0] | {"name": "all-scored", "reward": "of_completion"}]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def make(folder):
        rows = by_tag(write_inputs(folder), TAGS)
        for world in (1, 2):
            Job(world, folder, str(world), rows, plan(world, rows)).wait()

    return once(tmp_path_factory, "missing-rewards", make)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_leave_out_the_same(results, name):
    one, two = changes(results / "1", name), changes(results / "2", name)
    error, where = worst(one, two)
    assert error <= 1e-5, where
    assert any(value.norm() > 1e-4 for value in one.values())
    told = [facts(results / f"{world}", name, rank) for world, rank in ((1, 0), (2, 0), (2, 1))]
    assert told[0]["missing"] == told[1]["missing"] == told[2]["missing"]
    by_tag = {tag: count for _, tag, count in told[0]["missing"]}
    assert by_tag["S"] >= COPIES, "the first prompt is never scored: all of a rank's share but two"
    assert sum(by_tag.values()) > by_tag["S"], "others in part"
    same = weights(results / "2", name, 1)
    assert all(torch.equal(value, same[key]) for key, value in weights(results / "2", name).items())


def test_the_comparison_notices_what_is_left_out(results):
    assert worst(changes(results / "1", "mapo"), changes(results / "2", "all-scored"))[0] > 0.01


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ["mapo-adam", "omni-adam"])
def test_rollouts_without_a_reward_move_nothing_on_any_rank(results, name, world):
    for rank in range(world):
        told = facts(results / f"{world}", name, rank)
        logged = [entry for entry in told["log"] if "loss" in entry]
        assert [entry["sampling/steps_without_update"] for entry in logged] == [0, 1, 1]
        first, second, third = told["checksums"]
        assert first == second == third  # weights and the optimizer's state
        assert sum(count for *_, count in told["missing"]) == 2 * len(TAGS) * COPIES
