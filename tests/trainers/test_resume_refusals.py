"""A run goes on from a whole checkpoint or not at all: what is missing is named, for every trainer."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from jobs.runner import Job, facts, once, weights, write_inputs
from omni_runs import DEFAULTS, spread_reward
from tiny_models import build_tiny, build_tiny_text

from maple_trl import AvatarConfig, AvatarTrainer, MAPOConfig, MAPOTrainer, OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.trainers.common.checkpoint import ResumeError, check_resume_signature, save_rollout
from maple_trl.trainers.common.resume_checks import missing_parts
from maple_trl.trainers.omni_sft.config import OmniSFTConfig
from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer


pytestmark = pytest.mark.slow


TRAINERS = {
    "omni_grpo": (OmniGRPOTrainer, OmniGRPOConfig),
    "mapo": (MAPOTrainer, MAPOConfig),
    "avatar": (AvatarTrainer, AvatarConfig),
    "omni_sft": (OmniSFTTrainer, OmniSFTConfig),
}
ROWS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": "which word"}],
            "subtitle": f"word {i}",
            "tag": "S",
            "solution": "A",
            "completion": "A",
        }
        for i in range(12)
    ]
)
PARTS = {
    "optimizer.pt": r"lacks the optimizer's state \(optimizer.pt\)\.",
    "scheduler.pt": r"lacks the learning-rate schedule's \(scheduler.pt\)\.",
    "rng_state.pth": r"lacks the random numbers' \(rng_state.pth\)",
    "model.safetensors": "lacks the model's weights",
}


def make(name, folder, **options):
    trainer_class, config = TRAINERS[name]
    given = DEFAULTS | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "output_dir": str(folder)} | options
    model, processor = build_tiny("qwen2_5_omni")
    arguments = {"processing_class": processor, "train_dataset": ROWS}
    if name == "avatar":
        given["replayed_generations"] = 2
    if name == "omni_sft":
        given.pop("num_generations")
    else:
        arguments["reward_funcs"] = spread_reward
    return trainer_class(model, args=config(**given), **arguments)


@pytest.fixture(scope="module", params=TRAINERS)
def run(request, tmp_path_factory):
    """A trainer's name, its folder with checkpoints 1 and 2 of a whole run, and that run."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make(request.param, folder)
    trainer.train()
    return request.param, folder, trainer


def copy(folder, to, *steps):
    for step in steps:
        shutil.copytree(folder / f"checkpoint-{step}", to / f"checkpoint-{step}")
    return to / f"checkpoint-{steps[-1]}"


@pytest.mark.matrix(cases=2)
def test_every_missing_part_is_named(run, tmp_path):
    name, folder, whole = run
    trainer = make(name, tmp_path / "again")
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    for part, message in PARTS.items():
        checkpoint = copy(folder, tmp_path / part, 1)
        (checkpoint / part).unlink()
        with pytest.raises(ResumeError, match=message) as caught:
            trainer.train(resume_from_checkpoint=checkpoint)
        assert f"model_name_or_path={checkpoint}" in str(caught.value)
        (checkpoint / part).touch()  # nor is an empty file one
        with pytest.raises(ResumeError, match=message):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not trainer.state.log_history
    assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in before.items())

    # The control: the whole checkpoint, from which the same trainer ends with the weights of the whole run.
    trainer.train(resume_from_checkpoint=copy(folder, tmp_path / "again", 1))
    assert trainer.state.global_step == 2 and trainer.steps_made == 1
    ours, theirs = trainer.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_folder_that_is_no_checkpoint_is_named(run, tmp_path):
    name, folder, _ = run
    trainer = make(name, tmp_path / "again")
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "nowhere"): f"there is no folder {tmp_path / 'nowhere'}",
        str(tmp_path / "empty"): f"{tmp_path / 'empty'} is no checkpoint",
        str(folder): f"it holds checkpoint-2: name {folder / 'checkpoint-2'}",
    }
    for wanted, message in cases.items():
        with pytest.raises(ResumeError) as caught:
            trainer.train(resume_from_checkpoint=wanted)
        assert message in str(caught.value)
    cut_off = copy(folder, tmp_path / "cut", 2) / "trainer_state.json"
    cut_off.write_text(cut_off.read_text()[:40])
    with pytest.raises(ResumeError, match="was not written to its end: it has no whole trainer_state.json"):
        trainer.train(resume_from_checkpoint=cut_off.parent)
    assert not trainer.state.log_history


def test_the_last_checkpoint_of_a_folder_without_any_is_a_beginning_that_is_told(tmp_path, caplog):
    """A script can start a job and restart it; the command refuses (see `test_cli`)."""
    trainer = make("omni_sft", tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == trainer.steps_made == 1
    told = f"there is no complete checkpoint-N folder in {tmp_path}; the run begins anew"
    assert any(told in record.message for record in caplog.records)


def test_a_run_that_is_at_its_end_makes_no_step_more(run, tmp_path, caplog):
    name, folder, whole = run
    trainer = make(name, tmp_path)
    trainer.train(resume_from_checkpoint=copy(folder, tmp_path, 2))
    assert trainer.state.global_step == 2 and trainer.steps_made == 0
    ours, theirs = trainer.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    notes = {note["kind"]: note["text"] for note in trainer.left_out()}
    assert notes["no_new_step"] == "no step was left to make: the checkpoint is at step 2"
    assert any("no step was left to make" in record.message for record in caplog.records)


def test_weights_alone_are_named_as_such(tmp_path):
    trainer = make("omni_grpo", tmp_path, save_only_model=True, max_steps=1)
    trainer.train()
    again = make("omni_grpo", tmp_path, save_only_model=True)
    with pytest.raises(ResumeError) as caught:
        again.train(resume_from_checkpoint=True)
    message = str(caught.value)
    assert (
        "lacks the optimizer's state (optimizer.pt), the learning-rate schedule's (scheduler.pt) and the random"
        in message
    )
    assert "as one that was written with save_only_model=True" in message
    # What the message advises.
    from maple_trl.omni.loading import load_model

    again = load_model(str(tmp_path / "checkpoint-1"), dtype="float32").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in trainer.model.state_dict().items())


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    """Whichever of the two knows more: what only the other one had would be left out in silence."""
    plain, more = (
        {"processes": 1, "num_generations": 4},
        {"processes": 1, "num_generations": 4, "batching": "stratified"},
    )
    for written, now, told in ((more, plain, "batching stratified -> None"), (plain, more, "batching None -> strat")):
        save_rollout(str(tmp_path), 0, 0, None, written)
        check_resume_signature(str(tmp_path), 0, written)
        with pytest.raises(ResumeError, match=f"{told}.*, and with the same trainer"):
            check_resume_signature(str(tmp_path), 0, now)


def test_another_number_of_micro_batches_a_step_is_named(tmp_path):
    """With the size of a rollout fixed, all else is the same, and other rows would be passed over as done."""
    options = {"generation_batch_size": 16, "max_steps": 6, "save_steps": 6, "max_completion_length": 2}
    make("omni_grpo", tmp_path / "run", gradient_accumulation_steps=4, **options).train()
    more = options | {"max_steps": 7}
    checkpoint = copy(tmp_path / "run", tmp_path / "copy", 6)
    again = make("omni_grpo", tmp_path / "again", gradient_accumulation_steps=2, **more)
    told = r"other settings: gradient_accumulation_steps 4 -> 2\. Resume with those\."
    with pytest.raises(ResumeError, match=told):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert not again.state.log_history

    # A checkpoint of before does not say how many there were, and goes on.
    state = checkpoint / "rollout_0.json"
    written = json.loads(state.read_text())
    del written["geometry"]["gradient_accumulation_steps"]
    state.write_text(json.dumps(written))
    again = make("omni_grpo", tmp_path / "again", gradient_accumulation_steps=4, **more)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 7 and again.steps_made == 1


def test_text_alone_is_held_to_the_same(tmp_path):
    model, tokenizer = build_tiny_text()
    texts = Dataset.from_dict({"prompt": ["which word"] * 8, "completion": ["A"] * 8})
    given = {name: value for name, value in DEFAULTS.items() if name != "num_generations"}
    options = given | {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    trainer = OmniSFTTrainer(model, OmniSFTConfig(**options), train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(ResumeError, match="lacks the optimizer's state"):
        trainer.train(resume_from_checkpoint=True)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"]


@given(st.sets(st.sampled_from(FILES)), st.sampled_from([(0, 1), (0, 2), (1, 2), (1, 3)]))
def test_what_is_missing_follows_from_the_files_alone(tmp_path_factory, names, ranks):
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in names:
        (folder / name).write_text("x")
    rank, world = ranks
    needed = {*FILES[:3], "rng_state.pth" if world == 1 else f"rng_state_{rank}.pth"}
    assert len(missing_parts(str(folder), rank, world)) == len(needed - names)


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors.index.json", "optimizer.bin", "scheduler.pt", "rng_state.pth"],
        ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
        ["pytorch_model_fsdp.bin", "optimizer_0/", "scheduler.pt", "rng_state.pth"],
        ["global_step3/", "rng_state.pth"],
    ],
    ids=["shards", "adapter", "fsdp", "deepspeed"],
)
def test_other_forms_of_a_whole_checkpoint_are_known(names, tmp_path):
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("x")
    assert missing_parts(str(tmp_path), 0, 1) == []


# Two processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    def prepare(folder):
        rows = [{**row, "subtitle": "word", "video": None} for row in write_inputs(folder) if row["tag"] == "S"]
        rows = [{**rows[0], "subtitle": f"word {i}"} for i in range(12)]
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
        whole = {"name": "whole", "options": options}
        broken = [dict(row) for row in rows]
        for i in (1, 4, 7, 10):
            broken[i]["subtitle"] = f"missing{i}.srt"
        more = {"media_check": "none", "max_steps": 6, "shuffle_dataset": False}
        stopped = {"name": "stopped", "rows": broken, "options": options | more}
        resumed = {"resume": True, "options": options, "copies": "whole/checkpoint-1"}
        lacking = {"second-rank": "rng_state_1.pth", "optimizer": "optimizer.pt", "control": None}
        runs = [{**resumed, "name": name, "without": part} for name, part in lacking.items()]
        Job(2, folder, "pair", rows, [whole, stopped, *runs]).wait()

    return once(tmp_path_factory, "resume-pair", prepare)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_lacks_stops_both(pair, rank):
    error = facts(pair / "pair", "second-rank", rank)["error"]
    assert "lacks the random numbers' (rng_state_1.pth)" in error and "of one process, and this run has 2" in error
    assert "lacks the optimizer's state (optimizer.pt)." in facts(pair / "pair", "optimizer", rank)["error"]
    assert facts(pair / "pair", "control", rank)["error"] is None
    ours, theirs = weights(pair / "pair", "control", rank), weights(pair / "pair", "whole", rank)
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())


def test_two_processes_stop_together_where_media_fail(pair):
    told = [facts(pair / "pair", "stopped", rank) for rank in (0, 1)]
    assert told[0]["error"] == told[1]["error"] and "cannot be used (" in told[0]["error"]
    assert told[0]["quarantined"] == told[1]["quarantined"]
    step = int(told[0]["error"].split("Stopped after step ")[1].split(";")[0])
    assert 1 <= step < 6 and (pair / "pair" / "stopped" / f"checkpoint-{step}" / "rng_state_1.pth").is_file()
