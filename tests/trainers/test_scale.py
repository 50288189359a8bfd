"""
Four processes whose rows are of all seven tags: they finish, agree, and train as one process does, however they share the
model. `test_scale_deepspeed.py` does the same with DeepSpeed.

The launcher reads `examples/accelerate_configs/`, and a watchdog ends a run at the first collective call that waits in vain.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from jobs.runner import Job, changes, facts, once, weights, write_inputs
from test_mixed_images import write_pictures
from test_processes import by_tag, worst

from maple_trl.omni.loading import load_model


pytestmark = pytest.mark.slow


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
WORLD = 4
PATIENCE = {"WATCHDOG": "60"}  # seconds that a rank waits for another; its share of a step takes a fraction of one
# A rollout has four prompts, of which each rank makes one: those of a rollout differ in what is shown to the model.
TAGS = ("S", "VA", "VAS", "A", "VS", "S", "V", "AS")
ROWS = 16
PLAIN = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "shuffle_dataset": False, "num_generations": 4}
# By name: the options, and what else the run has.
EQUAL = {
    # Of the second rollout one prompt is kept, whose four rows all ranks share; of the third it is all but one.
    "mixed": ({"batching": "mixed", "dynamic_sampling": "early", "max_steps": 3, "learning_rate": 0.1}, {}),
    "stratified": ({"batching": "stratified", "leftover": "fill", "max_steps": 2, "beta": 0.1}, {}),
    "adapters": ({"batching": "mixed", "max_steps": 2, "gradient_checkpointing": True}, {"lora": True}),
    # One prompt of each rollout has a picture beside its clip.
    "pictures": (
        {"batching": "mixed", "max_steps": 2, "learning_rate": 0.1},
        {"pictures": {1: "wide28.png", 4: "high28.png"}},
    ),
    # Nothing of the second rollout is kept: a step without a gradient, which must not let weights decay.
    "idle": (
        {"batching": "mixed", "dynamic_sampling": "early", "max_steps": 3, "learning_rate": 0.1, "weight_decay": 0.5},
        {"varied": [True] * 4 + [False] * 4},
    ),
}
SFT = {"max_steps": 2, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
VARIED = [True, True, True, False, True, False, False, False]
LONG = {
    "max_steps": 6,
    "max_completion_length": 3,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "replayed_generations": 2,
    "replay_alpha": 0.5,
    "method": "mapo",
    "batching": "mixed",
    "dynamic_sampling": "early",
    "tag_weights": "adaptive",
    "gradient_checkpointing": False,
    "generation_kwargs": {"stop_strings": ["a", "e", "i", "o", "t"]},  # ranks end at different lengths
}
# Two steps on one rollout: a checkpoint of the first stands in its middle.
SAVED = {
    "max_steps": 2,
    "num_iterations": 2,
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "batching": "mixed",
    "gradient_checkpointing": False,
}


def equal_run(name, world, rows):
    options, extra = EQUAL[name]
    extra = dict(extra)
    pictures = extra.pop("pictures", {})
    varied = extra.pop("varied", VARIED if "dynamic_sampling" in options else [True] * len(rows))
    sizes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": ROWS // 2 // world}
    run = {"name": name, "trainer": "mapo", "reward": "where_varied", "fixed_completions": True, **extra}
    run["options"] = {"gradient_checkpointing": False, **PLAIN, **sizes, **options}
    own = [row | {"varied": v, "image": pictures.get(i)} for i, (row, v) in enumerate(zip(rows, varied, strict=True))]
    return run | {"rows": own}


def runs(world, rows, out=None, names=(*EQUAL, "sft"), long=True):
    told = [row | {"completion": row["solution"]} for row in rows]
    sft = {"name": "sft", "trainer": "sft", "rows": told, "options": SFT | {"per_device_train_batch_size": 4 // world}}
    equal = [equal_run(name, world, rows) for name in EQUAL if name in names] + [sft] * ("sft" in names)
    if world == 1:
        return equal
    saved = {"trainer": "mapo", "reward": "of_completion", "options": SAVED}
    whole = saved | {"name": "whole", "options": SAVED | {"save_strategy": "steps", "save_steps": 1}}
    half = saved | {"name": "half", "resume": str(out / "whole" / "checkpoint-1")}
    options = LONG | {"encoder_cache_dir": str(out.with_suffix(".towers"))}
    longer = {"name": "long", "trainer": "avatar", "reward": "in_thirds", "options": options}
    probed = saved | {"name": "probed", "refused": True, "options": SAVED | {"gradient_probe": 8}}
    moving = SAVED | {"beta": 0.1, "sync_ref_model": True}
    following = saved | {"name": "following", "refused": True, "options": moving}
    refused = {"ddp": [], "zero2": [probed]}.get(out.name, [probed, following])
    return [*equal, *[longer] * long, whole, half, *refused]


def launcher(config: Path) -> list[str]:
    """The arguments of accelerate's launcher for this configuration, as many processes of a CPU as here."""
    started = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(WORLD)]
    return [*started, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def results(tmp_path_factory, tested):
    # What two further tests compare with is there in any case.
    names = {*tested("test_four_processes_train_as_one_does", "name"), "stratified"}
    wanted = {"names": names, "long": bool(tested("test_four_processes_finish_and_agree", "way"))}

    def make(folder):
        rows = by_tag(write_inputs(folder), TAGS)
        write_pictures(folder / "media")
        Job(1, folder, "one", rows, runs(1, rows, **wanted)).wait()
        waiting = equal_run("stratified", WORLD, rows) | {"name": "waiting"}
        waiting["options"] = waiting["options"] | {"ddp_find_unused_parameters": False}
        planned = [*runs(WORLD, rows, folder / "ddp", **wanted), waiting]
        Job(launcher(CONFIGS / "ddp.yaml"), folder, "ddp", rows, planned, variables=PATIENCE).wait()
        shared = PATIENCE | {"ACCELERATE_TORCH_DEVICE": "cpu"}
        apart = equal_run("stratified", WORLD, rows) | {
            "name": "apart",
            "undone": "common.media_trainer:keep_head_whole",
        }
        planned = [*runs(WORLD, rows, folder / "fsdp2", **wanted), apart]
        Job(launcher(CONFIGS / "fsdp2.yaml"), folder, "fsdp2", rows, planned, variables=shared).wait()

    return once(tmp_path_factory, "scale", make)


WAYS = ["ddp", "fsdp2"]


def assert_finished(results, way, name="long", steps=LONG["max_steps"]):
    """Ranks showed the model different media, and all know the same after each step."""
    told = [facts(results / way, name, rank) for rank in range(WORLD)]
    tag_of = {row["id"]: row["tag"] for row in json.loads((results / f"{way}.json").read_text())["rows"]}
    for rank, of_rank in enumerate(told):
        assert (of_rank["rank"], of_rank["world"], of_rank["backend"]) == (rank, WORLD, "gloo")
        assert sum("loss" in entry for entry in of_rank["log"]) == steps
        assert of_rank["known"] == told[0]["known"] and len(of_rank["known"]) == steps
    shown = [{tag for rows in of_rank["used"] for tag in map(tag_of.get, rows)} for of_rank in told]
    assert set().union(*shown) == set(TAGS)
    at_once = zip(*([frozenset(map(tag_of.get, rows)) for rows in of_rank["used"]] for of_rank in told), strict=True)
    assert any(len({"V" in tag for tags in ranks for tag in tags}) == 2 for ranks in at_once)
    logged = [entry for entry in told[0]["log"] if "loss" in entry]
    assert max(entry["replay/share"] for entry in logged) > 0 and max(e["tag/all/dropped"] for e in logged) > 0


def assert_equal(results, way, name, of_one=None):
    one, other = changes(results / "one", of_one or name), changes(results / way, name)
    assert max(float((value - other[key]).abs().max()) for key, value in one.items()) <= 1e-5
    error, where = worst(one, other)
    assert error <= 1e-4, where
    for tower in ("visual", "audio_tower", "language_model"):
        assert any(value.norm() > 1e-3 for key, value in one.items() if tower in key), tower
    told = facts(results / way, name)
    assert told["packed"] or name == "sft"  # prompts were shared
    for rank in range(1, WORLD):
        assert all(
            torch.equal(v, weights(results / way, name)[key]) for key, v in weights(results / way, name, rank).items()
        )


def assert_goes_on(results, way):
    """A run goes on from a checkpoint of one in parts, whose weights any model can be loaded from."""
    whole, half = (weights(results / way, name) for name in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    assert len(facts(results / way, "whole")["used"]) == 1 and not facts(results / way, "half")["used"]
    loaded = load_model(str(results / way / "whole" / "checkpoint-2")).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in whole.items())
    assert any(value.any() for value in changes(results / way, "half").values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.long
def test_four_processes_finish_and_agree(results, way):
    assert_finished(results, way)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_four_processes_finish_twenty_steps_and_agree(way, tmp_path):
    rows = by_tag(write_inputs(tmp_path), TAGS)
    run = {"name": "longer", "trainer": "avatar", "reward": "in_thirds", "options": LONG | {"max_steps": 20}}
    variables = PATIENCE | ({"ACCELERATE_TORCH_DEVICE": "cpu"} if way == "fsdp2" else {})
    Job(launcher(CONFIGS / f"{way}.yaml"), tmp_path, way, rows, [run], variables=variables).wait()
    assert_finished(tmp_path, way, "longer", 20)


@pytest.mark.parametrize(
    "name",
    ["stratified", *(pytest.param(name, marks=pytest.mark.long) for name in [*EQUAL, "sft"] if name != "stratified")],
)
@pytest.mark.parametrize("way", WAYS)
def test_four_processes_train_as_one_does(results, way, name):
    assert_equal(results, way, name)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_from_a_checkpoint_of_whole_weights(results, way):
    assert_goes_on(results, way)


def assert_refused(results, way):
    """A probe of whole gradients, which no rank has, and a reference that moves, of which each has a part."""
    told = json.loads((results / way / "probed-refused.json").read_text())
    assert told == "gradient_probe reads whole gradients, which FSDP and DeepSpeed do not keep: set it to 0"
    if way != "zero2":  # there each rank has all of the reference model
        told = json.loads((results / way / "following-refused.json").read_text())
        assert told.startswith("sync_ref_model: FSDP and ZeRO-3 spread the reference model over the processes")


@pytest.mark.long  # of the long run
def test_the_folder_for_features_is_said_to_be_unused_where_towers_are_spread(results):
    unused = "encoder_cache_dir: nothing is kept there"
    assert unused in (results / "fsdp2.log").read_text() and unused not in (results / "ddp.log").read_text()


def test_what_needs_whole_gradients_is_refused(results):
    assert_refused(results, "fsdp2")


def test_ddp_may_wait_for_the_gradient_of_every_weight(results):
    """All towers run on all ranks then, and the one weight that no pass reads is not trained."""
    assert (
        facts(results / "ddp", "waiting")["find_unused"] is False
        and facts(results / "ddp", "stratified")["find_unused"]
    )
    assert_equal(results, "ddp", "waiting", of_one="stratified")


def test_the_comparison_notices_a_head_whose_gradient_is_not_shared(results):
    one, apart = changes(results / "one", "stratified"), changes(results / "fsdp2", "apart")
    error, where = worst(one, apart)
    assert error > 0.1 and where == "lm_head.weight"


@pytest.mark.long
def test_a_rank_that_stays_away_ends_the_run_by_name(results, tmp_path):
    rows = json.loads((results / "one.json").read_text())["rows"]
    (tmp_path / "model").symlink_to(results / "model")
    (tmp_path / "media").symlink_to(results / "media")
    run = equal_run("stratified", WORLD, rows) | {"stays_away": 2}
    job = Job(WORLD, tmp_path, "out", rows, [run], variables={"WATCHDOG": "5"})
    assert job.process.wait() != 0
    assert re.search("watchdog: rank 0 made .*; rank 2 did not come; rank 3 made", job.log.read_text())
