"""A run that is killed goes on from its last checkpoint as if nothing had happened."""

import json
import shutil
import signal

import pytest
import torch
from jobs.runner import Job, changes, facts, once, weights, write_inputs

from maple_trl.trainers.common.checkpoint import last_complete_checkpoint


pytestmark = pytest.mark.slow


STEPS = 6
OPTIONS = {
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "beta": 0.05,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 2,
}
CASES = {
    "plain": {"options": OPTIONS},
    # A rollout lasts four steps: checkpoint 2 stands in its middle.
    "rollout": {"options": {**OPTIONS, "num_iterations": 2, "steps_per_generation": 4}},
    "lora": {"lora": True, "options": OPTIONS},
}
KILLED = ("plain", "rollout")  # the others go on from a checkpoint of a whole run, as if it had been


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    def make(folder):
        rows = write_inputs(folder)
        # 16 prompts, 4 a step: the second pass over them begins after step 4.
        passes = {"rows": rows[:16], "options": OPTIONS}
        cases = CASES | {"passes": passes}
        whole = Job(1, folder, "whole", rows, [{"name": name, **case} for name, case in cases.items()])
        killed = {name: Job(1, folder, name, rows, [{"name": name, "hold_at": 2, **CASES[name]}]) for name in KILLED}
        status = {}
        for name, job in killed.items():
            job.wait_for(f"{name}.held")
            status[name] = job.kill()
        (folder / "status.json").write_text(json.dumps(status))
        whole.wait()

        resumed = []

        def resume(name, case, output_dir):
            options = {**case["options"], "output_dir": str(output_dir)}
            resumed.append({**case, "name": name, "resume": True, "options": options})

        def copy(name, *steps, case="plain"):
            for step in steps:
                source = folder / "whole" / case / f"checkpoint-{step}"
                shutil.copytree(source, folder / "copies" / name / source.name)
            return folder / "copies" / name

        for name in KILLED:
            resume(name, CASES[name], folder / name / name)
        resume("lora", CASES["lora"], copy("lora", 2, case="lora"))
        resume("passes", passes, copy("passes", 4, case="passes"))
        incomplete = copy("incomplete", 2, 4)
        (incomplete / "checkpoint-4" / "trainer_state.json").unlink()
        resume("incomplete", CASES["plain"], incomplete)
        no_rollout = copy("no-rollout", 2, case="rollout")
        (no_rollout / "checkpoint-2" / "rollout_0.json").unlink()
        resume("no-rollout", CASES["rollout"], no_rollout)
        other_random = copy("other-random", 2)
        shutil.copy(folder / "whole" / "plain" / "checkpoint-4" / "rng_state.pth", other_random / "checkpoint-2")
        resume("other-random", CASES["plain"], other_random)
        Job(1, folder, "resumed", rows, resumed).wait()

    return once(tmp_path_factory, "resume", make)


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(value, two[name]) for name, value in one.items())


def losses(told):
    return {entry["step"]: entry["loss"] for entry in told["log"] if "loss" in entry}


@pytest.mark.parametrize("name", KILLED)
def test_the_run_was_killed_between_two_checkpoints(runs, name):
    assert json.loads((runs / "status.json").read_text())[name] == -signal.SIGKILL
    assert not (runs / name / f"{name}-0.json").exists()  # it never came to its end
    rollout = json.loads((runs / "whole" / name / "checkpoint-2" / "rollout_0.json").read_text())
    assert bool(rollout["chunks"]) == (name == "rollout")


@pytest.mark.parametrize("name", [*CASES, "passes"])
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(runs, name):
    start = 4 if name == "passes" else 2
    whole, resumed = facts(runs / "whole", name), facts(runs / "resumed", name)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == STEPS
    used = resumed["used"]
    assert used == whole["used"][-len(used) :] and len(used) == (1 if name == "rollout" else STEPS - start)
    assert same(weights(runs / "whole", name), weights(runs / "resumed", name))
    moved = changes(runs / "whole", name)
    assert all(any(v.any() for k, v in moved.items() if part in k) for part in ("visual", "audio", "language_model"))


def test_an_incomplete_checkpoint_is_passed_over(runs):
    assert facts(runs / "resumed", "incomplete")["used"] == facts(runs / "whole", "plain")["used"][2:]  # from step 2
    assert same(weights(runs / "whole", "plain"), weights(runs / "resumed", "incomplete"))


def test_a_half_written_state_does_not_make_a_checkpoint_complete(runs, tmp_path):
    for step in (2, 4):
        shutil.copytree(runs / "whole" / "plain" / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    text = state.read_text()
    for part in (text[: len(text) // 2], ""):  # killed while it was being written
        state.write_text(part)
        assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_a_checkpoint_without_its_rollout_is_refused(runs):
    told = facts(runs / "resumed", "no-rollout")
    assert "rollout_0.json is missing" in told["error"] and not told["used"]


def test_with_another_random_state_the_weights_differ(runs):
    """Without any, `test_resume_refusals` finds the checkpoint refused."""
    told = facts(runs / "resumed", "other-random")
    assert len(losses(told)) == STEPS
    assert not same(weights(runs / "whole", "plain"), weights(runs / "resumed", "other-random"))
