"""AVATAR with MAPLE's axes on two processes: the same gradients and memory as on one, and a killed run goes on as if nothing was."""

import json
import signal

import pytest
import torch
from jobs.runner import Job, changes, facts, once, weights, write_inputs
from test_avatar_processes import NAMES, assert_same_weights, close, told, trained
from test_mapo_resume import per_step, waiting
from test_processes import by_tag, worst


pytestmark = [pytest.mark.slow, pytest.mark.long]


TAGS = ("VA", "AS")
AXES = {
    "method": "mapo",
    "tag_weights": "adaptive",
    "kl_window": 5,
    "difficulty": "continuous",
    "dynamic_sampling": "early",
    "loss_aggregation": "token",
}
ORDER = {"curriculum": "adaptive", "zero_shot_accuracy": {"VA": 0.5, "AS": 0.1}}
REPLAY = {
    "num_generations": 4,
    "replayed_generations": 2,
    "replay_alpha": 0.5,
    "replay_draw": "balanced",
    "gradient_checkpointing": False,
}
HINTS = {"hints": True, "hint_visits": 1, "hint_max_kl": 1e6, "replay_quantiles": [1.0, 1.0]}  # all prompts are hard
PLAIN = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "shuffle_dataset": False}
SAVED = {"save_strategy": "steps", "save_steps": 100}  # after the last step
# By run: rows of a rollout, the reward, and the options. One optimizer step takes all rows of a rollout: of several, each
# rank would deal out its own.
RUNS = {
    "stratified": (8, "where_varied", AXES | ORDER | HINTS | {"refill_rounds": 1, "revisit": "unsolved", "max_steps": 11}),
    "mixed": (16, "sometimes_failed", AXES | {"batching": "mixed", "num_iterations": 2, "max_steps": 8}),
}  # fmt: skip
# Two steps on a rollout, completions of the model: checkpoint 5 is in the middle of the third rollout.
LONG = {
    "max_steps": 9,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "temperature": 1.2,
    "refill_rounds": 1,
    "difficulty": "binary",
    "save_strategy": "steps",
    "save_steps": 5,
}
HOLD_AT = 5


def plan(world, rows):
    runs = []
    for name, (size, reward, options) in RUNS.items():
        sizes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": size // 2 // world}
        run = {"name": name, "trainer": "avatar", "reward": reward, "fixed_completions": True, "dtype": "float64"}
        runs.append(run | {"rows": rows, "options": PLAIN | SAVED | REPLAY | sizes | options})
    return runs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def make(folder):
        # The second row of each tag is rewarded alike whatever is said to it, and has a hint.
        rows = by_tag(write_inputs(folder), TAGS * 4)
        stuck = range(len(TAGS), 2 * len(TAGS))
        told = [row | {"varied": i not in stuck, "known": True} for i, row in enumerate(rows)]
        told = [row | {"hint": "look" if i in stuck else None} for i, row in enumerate(told)]
        long = {"name": "long", "trainer": "avatar", "reward": "in_thirds"}
        long["options"] = REPLAY | AXES | ORDER | HINTS | LONG
        Job(1, folder, "1", told, plan(1, told)).wait()
        killed = Job(2, folder, "killed", told, [long | {"hold_at": HOLD_AT}])
        killed.wait_for("long.held")
        (folder / "status.json").write_text(json.dumps(killed.kill()))
        Job(2, folder, "2", told, [*plan(2, told), long]).wait()
        options = long["options"] | {"output_dir": str(folder / "killed" / "long")}
        Job(2, folder, "resumed", told, [long | {"resume": True, "options": options}]).wait()

    return once(tmp_path_factory, "maple-avatar-processes", make)


def last_checkpoint(results, out, name):
    steps = (LONG if name == "long" else RUNS[name][-1])["max_steps"]
    return results / out / name / f"checkpoint-{steps}"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_same_losses_and_weights(results, name):
    assert_same_weights(results, name)
    logs = [per_step(told(results, world, name)).values() for world in (1, 2)]
    for alone, shared in zip(*logs, strict=True):
        for entry in {entry for entry in alone if entry.startswith((*NAMES, "sampling/"))} - {
            "loss"
        }:  # TRL's: one rank's
            assert shared[entry] == pytest.approx(alone[entry], rel=2e-4, abs=2e-5, nan_ok=True), entry
    other = weights(results / "2", name, 1)
    assert all(torch.equal(value, other[key]) for key, value in weights(results / "2", name).items())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_on_the_same_completions(results, name):
    one, two = (trained(results, world, name) for world in (1, 2))
    rows = [sorted(row for rank in ranks for batch in rank for row in batch if row[1]) for ranks in (one, two)]
    assert rows[0] == rows[1] and {past for *_, past in rows[0]} == {False, True}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_know_what_one_does(results, name):
    """Order, weights of tags and what is known of prompts; the buffer, baselines and hints."""
    one, two = (last_checkpoint(results, world, name) for world in ("1", "2"))
    for file in ("mapo.json", "avatar.json"):
        assert close(without_steps(read(one / file)), without_steps(read(two / file))), file
    known = [told(results, world, name)["known"] for world in (1, 2)]
    assert close(*known) and not close(known[0][:-1], known[1][1:])
    assert told(results, 2, name, 1)["known"] == known[1]


def without_steps(state):
    """Numbers of micro-batches, of which several ranks need fewer, are left out."""
    return {name: value for name, value in state.items() if name not in ("step", "epoch_began")}


def test_the_runs_show_what_they_are_there_for(results):
    for world in (1, 2):
        logged = {name: per_step(told(results, world, name)) for name in RUNS}
        assert per_step(told(results, world, "stratified"))[11]["hint/given"] == len(TAGS)
        for name in RUNS:
            entries = list(logged[name].values())
            assert max(entry.get("tag/all/dropped", 0) for entry in entries) > 0
            assert max(entry.get("replay/share", 0) for entry in entries) == 0.5
        assert max(entry.get("tag/all/unscorable", 0) for entry in logged["mixed"].values()) > 0
        used = [len(rows) for rows in told(results, world, "stratified")["used"]]
        assert len(used) > 11  # refilled
    histories = read(last_checkpoint(results, "2", "stratified") / "mapo.json")["tag_weights"]["weights"]
    assert histories.keys() == set(TAGS) and len(set(histories.values())) == 2


def test_the_comparison_notices_other_runs(results):
    one, other = changes(results / "1", "stratified"), changes(results / "2", "mixed")
    assert worst(one, other)[0] > 0.01


# Kill and resume


def test_a_killed_run_goes_on_where_it_was(results):
    assert read(results / "status.json") == -signal.SIGKILL
    held = results / "killed" / "long" / f"checkpoint-{HOLD_AT}"
    assert waiting(held), "in the middle of a rollout"
    assert (held / "mapo.json").exists() and (held / "avatar.json").exists()
    for rank in (0, 1):
        whole, resumed = facts(results / "2", "long", rank), facts(results / "resumed", "long", rank)
        assert resumed["error"] is None and len(resumed["known"]) == LONG["max_steps"] - HOLD_AT
        for what in ("known", "used", "trained", "checksums"):
            assert resumed[what] and resumed[what] == whole[what][-len(resumed[what]) :], what
        expected, got = per_step(whole), per_step(resumed)
        assert got == expected
        one, other = weights(results / "2", "long", rank), weights(results / "resumed", "long", rank)
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert any(past for batch in facts(results / "resumed", "long")["trained"] for *_, past in batch)
    assert any(value.any() for value in changes(results / "2", "long").values())


def test_what_it_keeps_is_the_same_to_the_byte(results):
    whole, resumed = last_checkpoint(results, "2", "long"), last_checkpoint(results, "killed", "long")
    for name in ("mapo.json", "avatar.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
        assert (whole / name).read_bytes() != (whole.with_name(f"checkpoint-{HOLD_AT}") / name).read_bytes()
    buffers = [{path.name: path.read_bytes() for path in (one / "replay").iterdir()} for one in (whole, resumed)]
    assert buffers[0] == buffers[1] and len(buffers[0]) == 3
