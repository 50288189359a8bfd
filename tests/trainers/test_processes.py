"""Two processes do what one does; they meet broken media together."""

import json
import signal
import sys
from collections import defaultdict

import faults
import pytest
import torch
from jobs.runner import ACCELERATE, Job, changes, facts, once, weights, write_inputs
from test_mixed_images import write_pictures
from tiny_models import save_tiny

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.loader import MediaLoader


pytestmark = pytest.mark.slow


# With two processes the first four prompts are rank 0's (no video among them), the others rank 1's.
TAGS = ("A", "S", "AS", "A", "V", "VA", "VS", "VAS")
ROWS = 16  # completions of one optimizer step
# Every two of three choices together.
COMBINATIONS = [("full", 1, "grpo"), ("full", 2, "dapo"), ("lora", 1, "dapo"), ("lora", 2, "grpo")]
TOWERS = ("visual", "audio_tower", "language_model")
# Rank 1's rows have these beside their clips, or in place of them, where ranks wait for each other's towers.
SHOWN = {4: "wide28.png", 5: "square28.png", 6: "high28.png", 7: "other28.png"}
PICTURES = {
    "pictures": SHOWN,
    "no pictures": {},
    "pictures alone": SHOWN,
    "other pictures": SHOWN | {5: "other28.png"},
}


def by_tag(rows, tags):
    waiting = defaultdict(list)
    for row in rows:
        waiting[row["tag"]].append(row)
    return [waiting[tag].pop(0) for tag in tags]


def step_options(world, accumulation, **options):
    """One plain gradient step, of which the change of the weights tells the gradient."""
    return {
        "optim": "sgd",
        "learning_rate": 10.0,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": ROWS // accumulation // world,
        **options,
    }


def gradient_runs(world, folder):
    def run(name, accumulation=2, extra=None, **options):
        return {"name": name, "fixed_completions": True, "options": step_options(world, accumulation, **options)} | (
            extra or {}
        )

    runs = [
        run(f"{kind}-{accumulation}-{loss}", accumulation, {"lora": kind == "lora"}, loss_type=loss)
        for kind, accumulation, loss in COMBINATIONS
    ]
    runs.append(run("checkpointing", beta=0.1, gradient_checkpointing=True))
    # The load-balancing term is a product of means over a micro-batch: not the same for other micro-batches.
    runs.append(run("experts", extra={"model": str(folder / "experts")}, router_aux_loss_coef=0.0))
    runs.append(run("gemma4", extra={"model": str(folder / "gemma4")}))
    if world == 2:
        runs.append(run("rank-reward", extra={"reward": "of_rank"}))
        runs.append(run("unsynced", extra={"unsynced": True}))
    return runs


def picture_runs(world, rows):
    runs = []
    for name, pictures in PICTURES.items():
        own = [row | {"image": pictures.get(i)} for i, row in enumerate(rows)]
        if name == "pictures alone":
            own = [row | {"audio": row["video"], "video": None} for row in own]
        options = step_options(world, 2, ddp_find_unused_parameters=False)
        runs.append({"name": name, "rows": own, "fixed_completions": True, "options": options})
    return runs


def long_run(name, **extra):
    """Four steps on one rollout, gone over twice: a checkpoint of step 2 stands in its middle."""
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_checkpointing": False,
        "beta": 0.05,
    }
    return {"name": name, "options": options, **extra}


@pytest.fixture(scope="module")
def results(tmp_path_factory, tested):
    """Results of the same plan on one process and on two."""
    names = tested("test_two_processes_give_the_gradient_of_one", "name")
    names |= {"full-2-dapo", "rank-reward", "unsynced", "pictures", "other pictures"}  # of further tests

    def make(folder):
        rows = by_tag(write_inputs(folder), TAGS)
        save_tiny("qwen3_omni", folder / "experts")
        write_pictures(folder / "media")
        save_tiny("gemma4", folder / "gemma4")
        runs = {
            world: [run for run in gradient_runs(world, folder) + picture_runs(world, rows) if run["name"] in names]
            for world in (1, 2)
        }
        one = Job(1, folder, "one", rows, runs[1])
        resumed = long_run("half", resume=str(folder / "two" / "whole" / "checkpoint-2"))
        pieces = long_run("pieces")
        pieces["options"] |= {"generation_batch": 3}
        long_runs = [long_run("whole"), resumed, pieces]
        two = Job(2, folder, "two", rows, runs[2] + long_runs)
        one.wait()
        two.wait()

    return once(tmp_path_factory, "two-processes", make)


def worst(one, two):
    """The largest relative difference between the same tensors of two gradients, and where."""
    assert one.keys() == two.keys()
    # Some gradients are zero but for rounding, such as that of a key's bias under softmax.
    floor = 1e-4 * max(value.norm() for value in one.values())
    errors = {name: float((two[name] - one[name]).norm() / max(one[name].norm(), floor)) for name in one}
    return max((error, name) for name, error in errors.items())


NAMES = ["-".join(map(str, combination)) for combination in COMBINATIONS]
SELDOM = ("full-1-grpo", "lora-2-grpo", "checkpointing", "experts", "pictures alone", "reentrant", "whole-usual")


def some(cases):
    """Parameters of which those that are dear and much like others are left to `make test-long`."""
    told = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.long] * (case[0] in SELDOM)) for case in told]


@pytest.mark.parametrize("name", some([*NAMES, "experts", "gemma4", "checkpointing", *PICTURES]))
def test_two_processes_give_the_gradient_of_one(results, name):
    for rank in (0, 1):
        told = facts(results / "two", name, rank)
        assert (told["rank"], told["world"], told["backend"]) == (rank, 2, "gloo")
    assert facts(results / "one", name)["world"] == 1
    one, two = changes(results / "one", name), changes(results / "two", name)
    error, where = worst(one, two)
    assert error <= 1e-4, where
    assert facts(results / "two", name)["find_unused"] == (name not in PICTURES)
    for tower in ("vision_tower", *TOWERS[1:]) if name == "gemma4" else TOWERS:
        assert any(value.norm() > 1e-4 for key, value in one.items() if tower in key), tower
    other = weights(results / "two", name, 1)
    assert all(torch.equal(value, other[key]) for key, value in weights(results / "two", name).items())


@pytest.mark.parametrize(
    ("name", "kinds"), some([("pictures", 2), ("no pictures", 1), ("pictures alone", 1), ("other pictures", 2)])
)
def test_a_tower_runs_for_no_kind_that_no_row_has(results, name, kinds):
    """Ranks that wait for each other pass the vision tower once for each kind that some row has, whatever their own have."""
    told = [facts(results / "two", name, rank) for rank in (0, 1)]
    assert [fact["seen"] for fact in told] == [kinds * len(fact["passes"]) for fact in told]
    assert told[0]["passes"]


def test_the_comparison_sees_another_picture(results):
    assert worst(changes(results / "one", "pictures"), changes(results / "two", "other pictures"))[0] > 0.001


def test_both_runs_saw_the_same_batch(results):
    (one,) = facts(results / "one", "full-2-dapo")["used"]
    ranks = [facts(results / "two", "full-2-dapo", rank)["used"][0] for rank in (0, 1)]
    assert one == ranks[0] + ranks[1] and len(one) == ROWS
    tag_of = {row["id"]: row["tag"] for row in json.loads((results / "one.json").read_text())["rows"]}
    assert not any("V" in tag_of[row] for row in ranks[0]) and all("V" in tag_of[row] for row in ranks[1])
    assert set(map(tag_of.get, one)) == set(TAGS)  # all seven


def test_the_comparison_notices_a_broken_average(results):
    one = changes(results / "one", "full-2-dapo")
    # Rewards that depend on the rank: another objective.
    assert worst(one, changes(results / "two", "rank-reward"))[0] > 0.01
    # Ranks that keep their own gradients: rank 0 holds no video, so its vision tower stays as it was.
    alone = changes(results / "two", "unsynced")
    assert worst(one, alone)[0] > 0.01
    assert not any(value.any() for key, value in alone.items() if "visual" in key)
    assert worst(changes(results / "two", "unsynced", 1), alone)[0] > 0.01


def test_two_processes_resume_in_the_middle_of_a_rollout(results):
    out = results / "two"
    assert len(list((out / "whole" / "checkpoint-2").glob("rollout_[01].safetensors"))) == 2
    for rank in (0, 1):
        assert len(facts(out, "whole", rank)["used"]) == 1
        assert not facts(out, "half", rank)["used"]  # it goes on with the saved rollout
        whole, half = weights(out, "whole", rank), weights(out, "half", rank)
        assert all(torch.equal(whole[name], half[name]) for name in whole)
    assert all(value.any() for key, value in changes(out, "whole").items() if "mlp" in key)


def test_two_processes_generate_in_pieces_what_they_generate_at_once(results):
    out = results / "two"
    for rank in (0, 1):
        whole, pieces = weights(out, "whole", rank), weights(out, "pieces", rank)
        assert all(torch.equal(whole[name], pieces[name]) for name in whole)


# One process, which a launcher starts


WAITING = {"ddp_find_unused_parameters": False}


@pytest.fixture(scope="module")
def started(tmp_path_factory, tested):
    """Results of steps on rows without video, and without any media, of a plain process and of one under a launcher."""
    names = {"unread", *tested("test_a_launcher_may_start_one_process", "name")}

    def make(folder):
        rows = by_tag(write_inputs(folder), ("A", "S", "S", "A"))

        def run(name, trainer="omni", **options):
            options = step_options(1, 2, per_device_train_batch_size=2, max_steps=2, learning_rate=1.0, **options)
            return {"name": name, "lora": True, "fixed_completions": True, "trainer": trainer, "options": options}

        runs = [run("usual"), run("checkpointing", gradient_checkpointing=True), run("waiting", **WAITING)]
        reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
        runs.append(run("reentrant", gradient_checkpointing=True, **reentrant))
        mixed = {"batching": "mixed", "dynamic_sampling": "early"}
        runs.append(run("dropping", "mapo", num_iterations=2, **mixed, **WAITING))
        runs += [
            run(f"whole-{name}", **options) | {"lora": False}
            for name, options in (("usual", {}), ("waiting", WAITING))
        ]
        runs += [run("unread", **WAITING) | {"lora": False, "unread": True}]
        runs = [run for run in runs if run["name"] in names]
        jobs = [Job(1, folder, "plain", rows, runs), Job(1, folder, "launched", rows, runs, distributed=True)]
        for job in jobs:
            job.wait()

    return once(tmp_path_factory, "started", make)


@pytest.mark.parametrize(
    ("name", "find_unused"),
    some(
        [
            *(("usual", True), ("checkpointing", True), ("waiting", False), ("reentrant", False), ("dropping", False)),
            *(("whole-usual", True), ("whole-waiting", False)),
        ]
    ),
)
def test_a_launcher_may_start_one_process(started, name, find_unused):
    """DDP wraps the model there too, and waits for the gradients of towers that the rows have no media for."""
    plain, launched = (facts(started / out, name) for out in ("plain", "launched"))
    assert (plain["world"], plain["find_unused"]) == (1, None)
    assert (launched["world"], launched["find_unused"]) == (1, find_unused)
    assert launched["used"] == plain["used"] and len(launched["log"]) == len(plain["log"])
    error, where = worst(changes(started / "plain", name), changes(started / "launched", name))
    assert error <= 1e-4, where


def test_a_weight_without_a_gradient_is_named_where_ddp_waits_for_it(started):
    told = facts(started / "launched", "unread")
    assert told["error"].startswith(
        "ddp_find_unused_parameters is false, but no pass gives these weights a gradient: unread."
    )
    assert not any("loss" in entry for entry in told["log"])
    assert not any(value.any() for value in changes(started / "launched", "unread").values())  # before any update
    alone = facts(started / "plain", "unread")
    assert alone["error"] is None and sum("loss" in entry for entry in alone["log"]) == 2


# Broken media, under accelerate


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    def make(folder):
        rows = by_tag(write_inputs(folder), ("VAS", "S", "A", "VS", "VA", "AS", "V"))
        # Three prompts of four copies a step: the ranks share the second prompt of step 2, whose clip is broken.
        source = (folder / "media" / rows[4]["video"]).read_bytes()
        start, end = source.index(b"mdat") + 4, source.index(b"moov") - 4
        (folder / "media" / "broken.mp4").write_bytes(source[:start] + bytes(end - start) + source[end:])
        rows[4]["video"] = "broken.mp4"
        options = {"num_generations": 4, "per_device_train_batch_size": 6, "max_steps": 2, "shuffle_dataset": False}
        # The same with a sound at which the decoder of one rank, and of one alone, is killed.
        faults.write_long_sound(folder / "media" / "victim.flac")
        others = [{**row, "audio": None} for row in rows]
        others[4] |= {"tag": "A", "video": None, "audio": "victim.flac"}
        struck = {"name": "struck", "rows": others, "options": {**options, "media_check": "none"}}
        with faults.struck(folder / "media" / "victim.flac", signal.SIGKILL, most=1) as count:
            Job(ACCELERATE, folder, "out", rows, [{"name": "broken", "options": options}, struck]).wait()
            (folder / "struck.json").write_text(json.dumps(count()))

    return once(tmp_path_factory, "launched", make)


def test_accelerate_launch_starts_two_processes(launched):
    told = [facts(launched / "out", "broken", rank) for rank in (0, 1)]
    assert [(told[rank]["rank"], told[rank]["world"], told[rank]["backend"]) for rank in (0, 1)] == [
        (0, 2, "gloo"),
        (1, 2, "gloo"),
    ]
    steps = [entry for entry in told[0]["log"] if "loss" in entry]
    assert len(steps) == 2
    assert all(step["media_tokens/video"] > 0 and step["media_tokens/audio"] > 0 for step in steps)


def test_ranks_meet_a_broken_clip_together(launched):
    rows = [row["id"] for row in json.loads((launched / "out.json").read_text())["rows"]]
    told = [facts(launched / "out", "broken", rank) for rank in (0, 1)]
    assert told[0]["used"] == [[rows[0]] * 4 + [rows[1]] * 2, [rows[3]] * 4 + [rows[5]] * 2]
    assert told[1]["used"] == [[rows[1]] * 2 + [rows[2]] * 4, [rows[5]] * 2 + [rows[5]] * 4]
    assert told[0]["quarantined"] == told[1]["quarantined"] == ["broken.mp4"]
    counted = [entry["media/quarantined_prompts"] for entry in told[0]["log"] if "loss" in entry]
    assert counted == [0, 1]
    (entry,) = json.loads((launched / "out" / "broken" / "quarantine.json").read_text())
    assert entry["rows"] == [4] and entry["path"] == "broken.mp4" and entry["reason"] in ("unreadable", "no-frames")
    final = [weights(launched / "out", "broken", rank) for rank in (0, 1)]
    assert all(torch.equal(value, final[1][key]) for key, value in final[0].items())


@pytest.mark.skipif(sys.platform != "linux", reason="faults are sent through /proc")
def test_ranks_lose_a_row_together_whose_decoder_was_killed_on_one(launched):
    assert json.loads((launched / "struck.json").read_text()) == 1
    told = [facts(launched / "out", "struck", rank) for rank in (0, 1)]
    assert told[0]["quarantined"] == told[1]["quarantined"] == ["victim.flac"]
    rows = [row["id"] for row in json.loads((launched / "out.json").read_text())["rows"]]
    assert told[0]["used"][1] == [rows[3]] * 4 + [rows[2]] * 2  # the other row with sound alone stands in, on both
    assert told[1]["used"][1] == [rows[2]] * 2 + [rows[5]] * 4
    (entry,) = json.loads((launched / "out" / "struck" / "quarantine.json").read_text())
    assert (entry["path"], entry["reason"], entry["rows"]) == ("victim.flac", "decoder-crashed", [4])
    final = [weights(launched / "out", "struck", rank) for rank in (0, 1)]
    assert all(torch.equal(value, final[1][key]) for key, value in final[0].items())


def test_the_broken_clip_has_a_whole_header(launched):
    loader = MediaLoader(launched / "media")
    assert loader.probe("broken.mp4").has_video  # the check before training cannot see it
    with pytest.raises(MediaError):
        loader.video("broken.mp4")
