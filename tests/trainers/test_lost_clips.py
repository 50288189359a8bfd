"""A clip that vanishes while the rows that show it change ranks: it is handed over, and no rank waits for another."""

import shutil

import pytest
import torch
from jobs.runner import Job, changes, facts, once, weights, write_inputs
from test_processes import by_tag


pytestmark = pytest.mark.slow


# The first rank makes the first two prompts, none of which is kept. It is given the rows of the third.
TAGS = ("S", "A", "VA", "S")
OPTIONS = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    "max_steps": 1,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "batching": "mixed",
    "dynamic_sampling": "early",
    "shuffle_dataset": False,
    "gradient_checkpointing": False,
}


def run_with(folder, rows, name, vanishes, **extra):
    """A run in which the clip of the third prompt may vanish, once its completions are scored."""
    told = [row | {"vanishes": None if i < 2 else ""} for i, row in enumerate(rows)]
    told[2]["vanishes"] = str(folder / "media" / "own.mp4") if vanishes else ""
    run = {"name": name, "trainer": "mapo", "reward": "of_vanishing", "fixed_completions": True, "options": OPTIONS}
    return run | {"rows": told, **extra}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def make(folder):
        rows = by_tag(write_inputs(folder), TAGS)
        clip = folder / "media" / rows[2]["video"]
        rows[2] |= {"video": "own.mp4", "audio": "sound.mp4"}
        for name in ("own.mp4", "sound.mp4"):
            shutil.copy(clip, folder / "media" / name)
        planned = [run_with(folder, rows, "stays", False), run_with(folder, rows, "vanishes", True)]
        Job(2, folder, "out", rows, planned, variables={"WATCHDOG": "60"}).wait()
        (folder / "gone").write_text(str(not (folder / "media" / "own.mp4").exists()))
        shutil.copy(clip, folder / "media" / "own.mp4")
        alone = run_with(folder, rows, "alone", True, undone="common.updates:_handed_over")
        status = Job(2, folder, "undone", rows, [alone], variables={"WATCHDOG": "5"}).process.wait()
        (folder / "status").write_text(str(status))

    return once(tmp_path_factory, "lost-clips", make)


def test_rows_whose_clip_has_gone_are_trained_on_all_the_same(results):
    out = results / "out"
    assert (results / "gone").read_text() == "True"
    log = (results / "out.log").read_text()
    assert log.count("Another process hands over what it has read") == 1 and "own.mp4" in log
    for rank in (0, 1):
        trained = facts(out, "vanishes", rank)["trained"]
        assert sum(map(len, trained)) == 4 and any(v.any() for v in changes(out, "vanishes", rank).values())
        one, other = (weights(out, name, rank) for name in ("stays", "vanishes"))
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    first, second = (facts(out, "vanishes", rank)["trained"] for rank in (0, 1))
    assert {key for batch in first for key, _ in batch}.isdisjoint(key for batch in second for key, _ in batch)


def test_the_rank_that_lost_it_would_fail_alone(results):
    assert (results / "status").read_text() != "0"
    told = next(line for line in (results / "undone.log").read_text().splitlines() if line.startswith("watchdog:"))
    first, second = told.split("; rank 1 ")
    assert "KeyError" in first and "KeyError" not in second
