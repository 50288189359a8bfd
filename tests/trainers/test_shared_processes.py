"""Two processes that share prompts do what they do without, and what one process does."""

import json
from pathlib import Path

import pytest
import torch
from jobs.runner import Job, changes, facts, once, weights, write_inputs
from programs import Ranks
from test_processes import TAGS, by_tag, step_options, worst


pytestmark = pytest.mark.slow


SHARED = ("off", "on")
LONG = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_steps": 4,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "shuffle_dataset": False,
}
KINDS = {
    "omni": {"beta": 0.05, "steps_per_generation": 4, "num_iterations": 2},
    "odd": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
    "mapo": {"dynamic_sampling": "early", "batching": "mixed"},
    "avatar": {"replayed_generations": 2, "max_steps": 8},
}


def long_runs(kinds):
    return [
        {
            "name": f"{name}-{shared}",
            "trainer": name if name in ("mapo", "avatar") else "omni",
            "options": {**LONG, **options, "shared_prefix": shared},
        }
        for name, options in KINDS.items()
        if name in kinds
        for shared in SHARED
    ]


def one_step(world):
    """
    One gradient step on greedy completions, the same however many processes there are. A prompt's completions are alike,
    so they are told apart from those of the other prompts.
    """
    options = {
        "loss_type": "dapo",
        "generation_kwargs": {"do_sample": False},
        "advantage_scope": "batch",
        "batching": "mixed",
    }
    return [
        {
            "name": f"step-{shared}",
            "trainer": "mapo",
            "options": {**step_options(world, 2, **options), "shared_prefix": shared},
        }
        for shared in SHARED
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory, tested):
    kinds = {"odd", *tested("test_sharing_changes_nothing_on_two_processes", "name")}

    def make(folder):
        rows = by_tag(write_inputs(folder), TAGS)
        one = Job(1, folder, "one", rows, one_step(1))
        two = Job(2, folder, "two", rows, one_step(2) + long_runs(kinds))
        one.wait()
        two.wait()

    return once(tmp_path_factory, "shared-processes", make)


LOGGED = ("loss", "kl", "entropy", "grad_norm", "reward", "completions/mean_length")


def logged(told):
    return [{name: entry[name] for name in LOGGED if name in entry} for entry in told["log"] if "loss" in entry]


@pytest.mark.parametrize("name", [*list(KINDS)[:-1], pytest.param("avatar", marks=pytest.mark.long)])
def test_sharing_changes_nothing_on_two_processes(results, name):
    out = results / "two"
    for rank in (0, 1):
        off, on = (facts(out, f"{name}-{shared}", rank) for shared in SHARED)
        assert (on["rank"], on["world"], on["backend"], on["error"]) == (rank, 2, "gloo", None)
        assert off["used"] == on["used"] and off["trained"] == on["trained"]
        assert len(logged(on)) == len(logged(off)) >= 4
        for one, two in zip(logged(off), logged(on), strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
        assert on["passes"] == off["passes"] and on["packed"] and not off["packed"]
    plain, shared = weights(out, f"{name}-off"), weights(out, f"{name}-on")
    largest = max(value.norm() for value in plain.values())
    for key, value in plain.items():
        assert (shared[key] - value).norm() <= 1e-5 * max(value.norm(), 1e-3 * largest), key
    other = weights(out, f"{name}-on", 1)
    assert all(torch.equal(value, other[key]) for key, value in shared.items())
    assert any(value.any() for value in changes(out, f"{name}-on").values())


@pytest.mark.parametrize("shared", SHARED)
def test_two_processes_give_the_gradient_of_one(results, shared):
    one, two = changes(results / "one", f"step-{shared}"), changes(results / "two", f"step-{shared}")
    error, where = worst(one, two)
    assert error <= 1e-4, where


def test_one_process_gives_the_same_gradient_either_way(results):
    one, two = (changes(results / "one", f"step-{shared}") for shared in SHARED)
    error, where = worst(one, two)
    assert error <= 1e-5, where


def test_groups_are_split_over_ranks(results):
    """The runs above hold prompts of which each rank has some of the rows."""
    tag_of = {row["id"]: row["tag"] for row in json.loads((results / "two.json").read_text())["rows"]}
    ranks = [facts(results / "two", "odd-on", rank)["used"][0] for rank in (0, 1)]
    assert set(ranks[0]) & set(ranks[1]) and set(map(tag_of.get, ranks[0])) != set(map(tag_of.get, ranks[1]))


ONE_RANK_APART = """
import json, sys
from pathlib import Path
from datasets import Dataset
sys.path.insert(0, sys.argv[1])
from omni_runs import build_trainer
from accelerate import PartialState
from maple_trl.omni.loading import load_model, load_processor
folder, rows = Path(sys.argv[2]), json.loads(sys.argv[3])
rank = PartialState(cpu=True).process_index
model = load_model(str(folder / "model"), dtype="float32", attn_implementation=["sdpa", "eager"][rank])
trainer = build_trainer(
    folder / "media",
    Dataset.from_list(rows),
    model=model,
    processing_class=load_processor(str(folder / "model")),
    output_dir=str(folder / "run"),
)
trainer.train()
(folder / f"{rank}.json").write_text(json.dumps([trainer._sharing, trainer.state.global_step]))
"""


def test_where_one_process_cannot_share_none_does(tmp_path):
    """Their passes wait for each other."""
    rows = by_tag(write_inputs(tmp_path), TAGS)
    program = tmp_path / "program.py"
    program.write_text(ONE_RANK_APART)
    log = tmp_path / "log"
    ranks = Ranks(2, [program, Path(__file__).parents[1], tmp_path, json.dumps(rows)], log)
    told = (ranks.wait(), log.read_text())
    assert told[0] == 0, told[1][-4000:]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[False, 1]] * 2
    assert told[1].count("Each completion passes its prompt on its own") >= 1
