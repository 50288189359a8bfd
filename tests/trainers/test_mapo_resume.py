"""A MAPO run that is killed goes on as if nothing had happened: order, weights of tags, kept prompts, every number."""

import json
import shutil
import signal

import pytest
import torch
from jobs.runner import Job, changes, facts, once, weights, write_inputs


pytestmark = pytest.mark.slow


COMMON = {
    "max_steps": 8,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 2,
    "temperature": 1.2,
}
ADAPTIVE = {"tag_weights": "adaptive", "curriculum": "adaptive", "kl_window": 4}
# Three tags of four rows, four prompts a batch: an epoch has three steps.
TAGS = ("S", "VA", "AS")
CASES = {
    "epoch": {
        "hold_at": 4,
        "options": {
            **COMMON,
            **ADAPTIVE,
            "curriculum_granularity": "epoch",
            "difficulty": "continuous",
            "zero_shot_accuracy": {"S": 0.5, "VA": 0.1, "AS": 0.9},
            "gradient_probe": 64,
            "gradient_probe_window": 5,
            "lr_scheduler_type": "linear",
        },
    },
    # Half as many prompts a batch: two cycles an epoch. The accuracies are measured.
    "cycle": {
        "hold_at": 4,
        "options": {
            **COMMON,
            **ADAPTIVE,
            "weight_history": "per_tag",
            "curriculum_granularity": "cycle",
            "per_device_train_batch_size": 2,
            "zero_shot_questions": 2,
        },
    },
    # A third of the groups teaches nothing, so epochs get shorter.
    "filtering": {
        "hold_at": 5,
        "options": {
            **COMMON,
            "tag_weights": "adaptive",
            "per_device_train_batch_size": 2,
            "dynamic_sampling": "early",
            "revisit": "informative",
            "refill_rounds": 1,
            "beta": 0.05,
            "max_steps": -1,
            "num_train_epochs": 4,
            "save_steps": 1,
        },
    },
    # A rollout lasts four steps: checkpoint 3 stands in its middle, with uneven micro-batches.
    "rollout": {
        "hold_at": 3,
        "options": {
            **COMMON,
            "batching": "mixed",
            "tag_weights": "adaptive",
            "dynamic_sampling": "early",
            "steps_per_generation": 4,
            "num_iterations": 2,
            "per_device_train_batch_size": 3,
            "save_steps": 3,
            "seed": 4,
        },
    },
}
# Resumed from checkpoints of the uninterrupted run: at the end of an epoch, after the last step, beside empty micro-batches.
COPIES = {"epoch-end": ("epoch", 6), "filtering-end": ("filtering", None), "rollout-empty": ("rollout-empty", 3)}
TIMES = ("seconds", "time", "per_second", "memory", "flos")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    def make(folder):
        rows = [row for row in write_inputs(folder) if row["tag"] in TAGS]
        usual = {"trainer": "mapo", "reward": "in_thirds"}
        cases = {name: {"name": name, **usual, "options": case["options"]} for name, case in CASES.items()}
        options = CASES["rollout"]["options"] | {"seed": 1}
        empty = cases["rollout"] | {"name": "rollout-empty", "options": options}
        whole = Job(1, folder, "whole", rows, [*cases.values(), empty])
        status = {}
        for pair in (("epoch", "cycle"), ("filtering", "rollout")):  # a process per core
            jobs = {n: Job(1, folder, n, rows, [cases[n] | {"hold_at": CASES[n]["hold_at"]}]) for n in pair}
            for name, job in jobs.items():
                job.wait_for(f"{name}.held")
                status[name] = job.kill()
        (folder / "status.json").write_text(json.dumps(status))
        whole.wait()

        resumed = [case | {"resume": True, "options": {**case["options"], "output_dir": str(folder / name / name)}}
                   for name, case in cases.items()]  # fmt: skip

        def copied(name, case, step, change=None, **options):
            target = folder / "copies" / name / f"checkpoint-{step}"
            shutil.copytree(folder / "whole" / case["name"] / target.name, target)
            if change is not None:
                change(target)
            options = {**case["options"], **options, "output_dir": str(target.parent)}
            resumed.append(case | {"name": name, "resume": True, "options": options})

        for name, (case, step) in COPIES.items():
            step = step or len(per_step(facts(whole.out, case)))
            copied(name, cases.get(case, empty), step)

        def control(name, change=None, **options):
            copied(name, cases["epoch"], 4, change, **options)

        control("no-state", lambda target: (target / "mapo.json").unlink())
        control("other-past", other_past)
        control("other-leftover", leftover="mixed")
        control("other-batching", batching="mixed", curriculum="none", zero_shot_accuracy=None)
        control("other-seed", seed=1)
        control("other-history", weight_history="per_tag")
        Job(1, folder, "resumed", rows, resumed).wait()

    return once(tmp_path_factory, "mapo-resume", make)


def other_past(checkpoint):
    """Other difficulties than those that the run has seen."""
    file = checkpoint / "mapo.json"
    state = json.loads(file.read_text())
    state["tag_weights"]["histories"] = {"all": [9.0] * 4}
    file.write_text(json.dumps(state))


def per_step(told):
    """What was logged at each step, without times."""
    return {
        entry["step"]: {name: value for name, value in entry.items() if not any(word in name for word in TIMES)}
        for entry in told["log"]
        if "loss" in entry
    }


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("name", CASES)
def test_the_run_was_killed_in_the_middle(runs, name):
    assert json.loads((runs / "status.json").read_text())[name] == -signal.SIGKILL
    assert not (runs / name / f"{name}-0.json").exists()  # it never came to its end
    last = runs / name / name / f"checkpoint-{CASES[name]['hold_at']}"
    assert (last / "mapo.json").exists() and len(per_step(facts(runs / "whole", name))) > CASES[name]["hold_at"]


@pytest.mark.parametrize("name", CASES)
def test_the_resumed_run_is_the_uninterrupted_one(runs, name):
    whole, resumed = facts(runs / "whole", name), facts(runs / "resumed", name)
    assert resumed["error"] is None
    for what in ("known", "used", "trained", "checksums"):  # rows, tag weights, priorities, remembered prompts, ...
        told = resumed[what]
        assert told and told == whole[what][-len(told) :], what
    assert len(resumed["known"]) == len(per_step(whole)) - CASES[name]["hold_at"]
    expected, got = per_step(whole), per_step(resumed)
    assert got.keys() == expected.keys()
    for step, entry in expected.items():
        assert got[step] == entry, step
    assert same(weights(runs / "whole", name), weights(runs / "resumed", name))
    assert any(value.any() for value in changes(runs / "whole", name).values())


@pytest.mark.parametrize("name", COPIES)
def test_any_checkpoint_will_do(runs, name):
    case, step = COPIES[name]
    whole, resumed = facts(runs / "whole", case), facts(runs / "resumed", name)
    step = step or len(per_step(whole))
    assert resumed["error"] is None and len(resumed["known"]) == len(per_step(whole)) - step
    assert resumed["known"] == whole["known"][step:]
    assert per_step(resumed) == per_step(whole)
    assert same(weights(runs / "whole", case), weights(runs / "resumed", name))


def test_the_cases_show_what_they_are_there_for(runs):
    told = {name: facts(runs / "whole", name) for name in CASES}
    epochs = {name: [known["StratifiedSchedule"]["epoch"] for known in told[name]["known"]] for name in CASES}
    assert epochs["epoch"] == [0, 0, 0, 1, 1, 1, 2, 2] and epochs["cycle"] == [0] * 6 + [1] * 2
    for name in ("epoch", "cycle"):
        tag_weights = [json.dumps(known["AdaptiveTagWeights"]["weights"]) for known in told[name]["known"]]
        assert len(set(tag_weights)) > 3
    assert per_step(told["epoch"])[8]["tag/all/grad_variance"] > 0
    assert (runs / "cycle" / "cycle" / "zero_shot.json").exists()
    steps = [epochs["filtering"].count(epoch) for epoch in range(4)]
    assert steps[-1] < steps[0] and sum(steps) == len(epochs["filtering"])
    assert len(told["filtering"]["used"]) > sum(steps), "refilled"
    kept = [sum(map(len, told["rollout"]["trained"][i : i + 4])) for i in (0, 4)]
    assert kept == [10, 10] and len(told["rollout"]["used"][0]) == 12
    assert waiting(runs / "whole" / "rollout" / "checkpoint-3") == [3, 2, 3, 2]
    assert waiting(runs / "whole" / "rollout-empty" / "checkpoint-3") == [0, 3, 0, 3]
    assert waiting(runs / "whole" / "epoch" / "checkpoint-6") == []


def waiting(checkpoint):
    """Sizes of the micro-batches of a rollout that has updates to come."""
    return json.loads((checkpoint / "rollout_0.json").read_text())["chunks"]


# Controls


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-state", "mapo.json is missing: .*checkpoint-4 is not a checkpoint of"),
        ("other-leftover", "written by a run with other settings: leftover fill -> mixed. Resume with those"),
        (
            "other-batching",
            "written by a run with other settings: batching stratified -> mixed, curriculum adaptive -> none. Resume with those",
        ),
        ("other-seed", "written by a run with other settings: seed 42 -> 1. Resume with those"),
        ("other-history", "mapo.json, tag_weights: The state holds a 'pooled' history"),
    ],
)
def test_a_run_that_cannot_go_on_says_why(runs, name, message):
    told = facts(runs / "resumed", name)
    assert told["error"] is not None and not told["known"]
    with pytest.raises(ValueError, match=message):
        raise ValueError(told["error"])


def test_with_another_past_the_run_goes_on_differently(runs):
    whole, other = facts(runs / "whole", "epoch"), facts(runs / "resumed", "other-past")
    assert per_step(other).keys() == per_step(whole).keys()
    past, others = ([step["AdaptiveTagWeights"]["weights"] for step in told["known"]] for told in (whole, other))
    assert others != past[-len(others) :]
    assert not same(weights(runs / "whole", "epoch"), weights(runs / "resumed", "other-past"))
