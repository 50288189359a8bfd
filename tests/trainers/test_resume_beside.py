"""What a run changes beside policy, optimizer and random numbers goes on from a checkpoint too, or is refused by name."""

import json
import shutil

import pytest
import torch
import transformers.trainer
from datasets import Dataset
from omni_runs import DEFAULTS, spread_reward
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import BEMACallback

from maple_trl import OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.trainers.common.checkpoint import REFERENCE_FILE, ResumeError, last_complete_checkpoint
from maple_trl.trainers.common.resume_checks import last_whole_checkpoint
from maple_trl.trainers.common.stop_checkpoint import StopCheckpoint


pytestmark = pytest.mark.slow

STEPS = 4
ENTROPY_FILE = "entropy_ctrl_state.json"
ROWS = Dataset.from_list(
    [
        {"prompt": [{"role": "user", "content": "which word"}], "subtitle": f"word {i}", "tag": "S", "solution": "A"}
        for i in range(12)
    ]
)
# The reference follows at once, and the coefficient rises with each step, the first of which has no bonus.
OPTIONS = {
    "beta": 0.5,
    "sync_ref_model": True,
    "ref_model_sync_steps": 1,
    "ref_model_mixup_alpha": 0.5,
    "use_adaptive_entropy": True,
    "entropy_coef": 0.1,
    "entropy_coef_delta": 0.1,
    "entropy_coef_max": 1.0,
    "entropy_target": 100.0,
    "learning_rate": 1e-2,
    "max_completion_length": 4,
    "steps_per_generation": 1,  # a rollout for each of a step's two micro-batches
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": STEPS,
}


class Killed(BaseException):
    """What ends a run where nothing catches it."""


class Steps(TrainerCallback, ExportableState):
    """Counts steps, as a callback that decides by what it has seen."""

    def __init__(self):
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


class Later(Steps):
    """One that the run did not have when the checkpoint was written."""


class Forgetful(TrainerCallback):
    """The control: counts too, and says nothing of it."""

    def __init__(self):
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1


class Entropies(TrainerCallback):
    """Notes by which entropy the controller decides after each step."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, {}
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        self.seen[state.global_step] = self.trainer._last_world_entropy


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny("qwen2_5_omni", tmp_path_factory.mktemp("model"))


def make(path, folder, reward=spread_reward, callbacks=(), eval_dataset=None, **options):
    args = OmniGRPOConfig(**(DEFAULTS | OPTIONS | {"output_dir": str(folder)} | options))
    return OmniGRPOTrainer(str(path), reward, args, ROWS, eval_dataset, callbacks=list(callbacks))


def weights(trainer):
    models = {"policy": trainer.model, "reference": trainer.ref_model}
    return {f"{name}.{key}": value.clone() for name, m in models.items() for key, value in m.state_dict().items()}


def differing(trainer, whole):
    """Which of the two models differ in any bit from those at the end of the whole run."""
    found, expected = weights(trainer), weights(whole)
    assert found.keys() == expected.keys()
    return {name.split(".")[0] for name, value in found.items() if not torch.equal(value, expected[name])}


def logged(trainer):
    names = ("step", "loss", "kl", "entropy", "entropy_coef", "reward")
    return [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]


def copy(folder, to, step=2):
    shutil.copytree(folder / f"checkpoint-{step}", to / f"checkpoint-{step}")
    return to / f"checkpoint-{step}"


@pytest.fixture(scope="module")
def run(path, tmp_path_factory):
    """A run that nothing stops, its folder with checkpoints 2 and 4, and its entropies."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(path, folder, callbacks=[Steps()])
    entropies = Entropies(trainer)
    trainer.train()
    initial = load_file(path / "model.safetensors")
    moved = load_file(folder / "checkpoint-2" / REFERENCE_FILE)
    assert any(not torch.equal(moved[name], value) for name, value in initial.items() if name in moved)
    return trainer, folder, entropies.seen


def test_a_run_killed_once_its_checkpoint_counts_as_complete_goes_on_as_a_whole_one(run, path, tmp_path, monkeypatch):
    """TRL would have written the entropy's state then, and the reference never."""
    whole, _, entropies = run

    def kill(**_):
        raise Killed

    with monkeypatch.context() as patch:  # what transformers calls next after it wrote trainer_state.json
        patch.setattr(transformers.trainer, "rotate_checkpoints", kill)
        with pytest.raises(Killed):
            make(path, tmp_path, callbacks=[Steps()]).train()
    callbacks = [Steps(), Later(), Forgetful()]
    again = make(path, tmp_path, callbacks=callbacks)
    found = Entropies(again)
    again.train(resume_from_checkpoint=True)
    assert again.steps_made == 2 and not differing(again, whole)
    assert logged(again) == logged(whole)
    assert again.entropy_coef == whole.entropy_coef and found.seen == {step: entropies[step] for step in (3, 4)}
    assert [callback.count for callback in callbacks] == [STEPS, 2, 2]
    ended = json.loads((tmp_path / "checkpoint-4" / ENTROPY_FILE).read_text())
    assert ended == {"entropy_coef": whole.entropy_coef, "last_world_entropy": whole._last_world_entropy}


def test_a_trainer_that_failed_within_a_step_goes_on_as_a_whole_one(run, path, tmp_path):
    """The same object, whose reference has moved on, and which has seen the entropy of half a step."""
    whole, _, entropies = run
    calls = []

    def fails_once(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 6:  # the second micro-batch of the third step
            raise ConnectionError("gone")
        return spread_reward(completions)

    fails_once.__name__ = spread_reward.__name__
    trainer = make(path, tmp_path, fails_once)
    found = Entropies(trainer)
    with pytest.raises(ConnectionError, match="gone"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.steps_made == 2 and not differing(trainer, whole)
    assert found.seen == entropies
    assert logged(trainer) == logged(whole)


@pytest.mark.parametrize("ours", [True, False])
def test_a_job_that_is_asked_to_end_within_a_step_goes_on_as_a_whole_one(run, path, tmp_path, monkeypatch, ours):
    """The control: transformers writes its checkpoint between a step's gradients and its update."""
    whole, _, _ = run
    if not ours:
        monkeypatch.setattr(StopCheckpoint, "instead_of_transformers", lambda trainer: None)
    calls = []

    def asked_to_end(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 4:  # the second micro-batch of the second step
            [callback] = [one for one in trainer.callback_handler.callbacks if isinstance(one, JITCheckpointCallback)]
            callback.jit_manager.is_checkpoint_requested = True  # as a few seconds after SIGTERM
        return spread_reward(completions)

    asked_to_end.__name__ = spread_reward.__name__
    trainer = make(path, tmp_path, asked_to_end, enable_jit_checkpoint=True, save_steps=100)
    trainer.train()
    assert trainer.state.global_step < STEPS and [file.name for file in tmp_path.glob("checkpoint-*")] == [
        "checkpoint-2" if ours else "checkpoint-1"
    ]
    again = make(path, tmp_path, save_steps=100)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS and bool(differing(again, whole)) is not ours
    if ours:
        assert trainer.was_asked_to_end and not again.was_asked_to_end
        assert logged(again) == logged(whole)


@pytest.mark.parametrize(("option", "value"), [("seed", 7), ("shuffle_dataset", False)])
def test_a_run_whose_rows_would_come_in_another_order_is_refused(run, path, tmp_path, option, value):
    _, folder, _ = run
    checkpoint = copy(folder, tmp_path)
    with pytest.raises(ResumeError, match=f"other settings: {option} "):
        make(path, tmp_path, **{option: value}).train(resume_from_checkpoint=str(checkpoint))


def test_evaluations_do_not_change_what_is_trained(run, path, tmp_path):
    whole, _, _ = run
    trainer = make(path, tmp_path, eval_strategy="steps", eval_steps=1, eval_dataset=ROWS.select(range(2)))
    trainer.train()
    assert sum("eval_reward" in entry for entry in trainer.state.log_history) == STEPS
    assert not differing(trainer, whole)


def test_a_checkpoint_that_is_written_over_does_not_count_meanwhile(run, path, tmp_path, monkeypatch):
    """Killed between its weights and its optimizer, it is of two runs."""
    _, folder, _ = run
    earlier, later = copy(folder, tmp_path), copy(folder, tmp_path, 4)
    assert last_complete_checkpoint(str(tmp_path)) == str(later)

    def kill(*_):
        raise Killed

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", kill)
    with pytest.raises(Killed):
        make(path, tmp_path).train(resume_from_checkpoint=str(earlier))
    assert (later / "optimizer.pt").exists() and last_complete_checkpoint(str(tmp_path)) == str(earlier)


@pytest.mark.parametrize("name", ["reference", "entropy"])
def test_with_the_state_that_a_run_begins_with_it_ends_elsewhere(run, path, tmp_path, name):
    whole, folder, _ = run
    checkpoint = copy(folder, tmp_path)
    again = make(path, tmp_path)
    if name == "reference":
        beginning = {key: value.clone() for key, value in again.ref_model.named_parameters()}
        save_file(beginning, checkpoint / REFERENCE_FILE)
    else:
        beginning = {"entropy_coef": again.entropy_coef, "last_world_entropy": again._last_world_entropy}
        (checkpoint / ENTROPY_FILE).write_text(json.dumps(beginning))
    again.train(resume_from_checkpoint=str(checkpoint))
    assert differing(again, whole) == {"policy", "reference"}
    assert logged(again)[2] != logged(whole)[2] and logged(again)[:2] == logged(whole)[:2]


def test_what_a_checkpoint_lacks_is_named_before_training(run, path, tmp_path):
    _, folder, _ = run
    trainer = make(path, tmp_path / "again")
    before = weights(trainer)
    for name, file in {"sync_ref_model": REFERENCE_FILE, "use_adaptive_entropy": ENTROPY_FILE}.items():
        checkpoint = copy(folder, tmp_path / name)
        (checkpoint / file).write_text("")  # an empty file is none
        for _ in range(2):
            with pytest.raises(ResumeError) as caught:
                trainer.train(resume_from_checkpoint=str(checkpoint))
            assert f"{checkpoint / file} is missing ({name})" in str(caught.value)
            (checkpoint / file).unlink(missing_ok=True)
    trainer.add_callback(BEMACallback)
    with pytest.raises(ResumeError, match="BEMACallback keeps its averages of the weights in no checkpoint"):
        trainer.train(resume_from_checkpoint=str(copy(folder, tmp_path / "averaged")))
    assert not trainer.state.log_history
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())

    other = make(path, tmp_path / "other", sync_ref_model=False)
    with pytest.raises(ResumeError, match="other settings: sync_ref_model True -> False"):
        other.train(resume_from_checkpoint=str(tmp_path / "averaged" / "checkpoint-2"))


def test_a_torn_reference_is_passed_over(run, tmp_path):
    _, folder, _ = run
    earlier, torn = copy(folder, tmp_path), copy(folder, tmp_path, 4) / REFERENCE_FILE
    assert last_whole_checkpoint(str(tmp_path), 1) == str(torn.parents[1])
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    assert last_whole_checkpoint(str(tmp_path), 1) == str(earlier)
