"""An AVATAR run that is killed goes on as if nothing had happened, and a checkpoint that is damaged is noticed."""

import json
import os
import re
import shutil
import signal

import pytest
import yaml
from jobs.runner import Job, changes, facts, once, weights, write_inputs
from safetensors.torch import load_file
from test_avatar import DEFAULTS, MODEL, G, Worth, contents, contents_of, data, logs, make, take
from test_mapo_resume import per_step, same

from maple_trl import cli
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.trainers.common.checkpoint import ResumeError


pytestmark = pytest.mark.slow


__all__ = ["data"]  # a fixture

# Four prompts of four completions, two of which are replayed.
COMMON = {
    "max_steps": 8,
    "learning_rate": 1e-3,
    "num_generations": 4,
    "replayed_generations": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
}
CASES = {
    # A prompt a step: step 6 is in the middle of the second epoch.
    "epoch": {
        "hold_at": 6,
        "options": {
            **COMMON,
            "per_device_train_batch_size": 2,
            "batching": "stratified",
            "advantage_scope": "tag",
            "replay_retier": True,
            "replay_capacity": 20,
            "replay_max_age": 6,
            "vcrs_window": 6,
            "lr_scheduler_type": "linear",
            "save_steps": 6,
        },
    },
    # A rollout lasts two steps: checkpoint 5 is in the middle of the third, the second with replay.
    "rollout": {
        "hold_at": 5,
        "options": {**COMMON, "steps_per_generation": 4, "beta": 0.05, "replay_alpha": 0.5, "save_steps": 5},
    },
    # A prompt a rollout of two steps, filled up with completions of the others: the second when it is killed, the third after.
    "buffer": {
        "hold_at": 3,
        "options": {
            **COMMON,
            "max_steps": 6,
            "per_device_train_batch_size": 1,
            "steps_per_generation": 4,
            "replay_scope": "buffer",
            "save_steps": 3,
        },
    },
    # As "rollout", with prompts that are shown with their hint from the third rollout on.
    "hints": {
        "hold_at": 5,
        "options": {
            **COMMON,
            "max_steps": 12,
            "steps_per_generation": 4,
            "advantage_group": "mixed",
            "hints": True,
            "seed": 4,
            "hint_visits": 1,
            "hint_max_kl": 1e6,
            "replay_quantiles": [0.9, 1.0],  # nearly all prompts are hard
            "save_steps": 5,
        },
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    def prepare(folder):
        inputs = write_inputs(folder)
        rows = [row for tag in ("VA", "AS") for row in [r for r in inputs if r["tag"] == tag][:2]]
        rows = [row | {"hint": f"hint {i}" if i % 2 == 0 else None} for i, row in enumerate(rows)]
        usual = {"trainer": "avatar", "reward": "in_thirds"}
        cases = {name: {"name": name, **usual, "options": case["options"]} for name, case in CASES.items()}
        whole = Job(1, folder, "whole", rows, list(cases.values()))
        jobs = {n: Job(1, folder, n, rows, [cases[n] | {"hold_at": CASES[n]["hold_at"]}]) for n in cases}
        status = {}
        for name, job in jobs.items():
            job.wait_for(f"{name}.held")
            status[name] = job.kill()
        (folder / "status.json").write_text(json.dumps(status))
        whole.wait()
        resumed = []
        for name, case in cases.items():
            options = case["options"] | {"output_dir": str(folder / name / name)}
            resumed.append(case | {"resume": True, "options": options})
        # The control: the same checkpoint without what it remembers.
        target = folder / "copies" / "checkpoint-5"
        shutil.copytree(folder / "whole" / "rollout" / target.name, target)
        (target / "avatar.json").unlink()
        options = cases["rollout"]["options"] | {"replay_recovery": "empty", "output_dir": str(target.parent)}
        resumed.append(cases["rollout"] | {"name": "forgetful", "resume": True, "options": options})
        Job(1, folder, "resumed", rows, resumed).wait()

    return once(tmp_path_factory, "avatar-resume", prepare)


@pytest.mark.parametrize("name", CASES)
def test_the_run_was_killed_in_the_middle(runs, name):
    assert json.loads((runs / "status.json").read_text())[name] == -signal.SIGKILL
    assert not (runs / name / f"{name}-0.json").exists()  # it never came to its end
    last = runs / name / name / f"checkpoint-{CASES[name]['hold_at']}"
    assert (last / "avatar.json").exists() and (last / "replay" / "replay.json").exists()


@pytest.mark.parametrize("name", CASES)
def test_the_resumed_run_is_the_uninterrupted_one(runs, name):
    whole, resumed = facts(runs / "whole", name), facts(runs / "resumed", name)
    assert resumed["error"] is None
    for what in ("known", "used", "trained", "checksums"):  # the buffer, rows, draws, weights and optimizer
        told = resumed[what]
        assert told and told == whole[what][-len(told) :], what
    assert len(resumed["known"]) == CASES[name]["options"]["max_steps"] - CASES[name]["hold_at"]
    expected, got = per_step(whole), per_step(resumed)
    assert got.keys() == expected.keys()
    for step, entry in expected.items():
        assert got[step] == entry, step
    assert same(weights(runs / "whole", name), weights(runs / "resumed", name))
    assert any(value.any() for value in changes(runs / "whole", name).values())


def test_the_cases_show_what_they_are_there_for(runs):
    told = {name: facts(runs / "whole", name) for name in CASES}
    for name, case in CASES.items():
        later = per_step(told[name])[case["hold_at"] + 1]
        share = [entry.get("replay/share") for entry in per_step(told[name]).values()]
        assert share[-2] == 0.5 or share[-1] == 0.5
        # Draws of the buffer after the resume.
        assert any(replayed for batch in facts(runs / "resumed", name)["trained"] for *_, replayed in batch)
        assert later["replay/size"] > 0
    last = per_step(told["epoch"])[8]
    assert last["replay/expired"] + last["replay/evicted"] > 0 and last["replay/promoted"] + last["replay/demoted"] > 0
    filled = [entry.get("replay/of_other_prompts") for entry in per_step(told["buffer"]).values()]
    assert [value for value in filled if value is not None] == [0, 0.5, 0.5]
    for name in ("rollout", "hints"):
        state = json.loads((runs / name / name / "checkpoint-5" / "avatar.json").read_text())["memory"]
        # Half of the rollout, fresh and replayed rows in any mixture, is not trained on yet.
        assert state["pending"] and state["replaying"] and len(state["pending"]) + len(state["replaying"]) == 8
    keys = json.loads((runs / "hints" / "hints" / "checkpoint-5" / "rollout_0.json").read_text())["prompts"]
    assert {key.endswith("+hint") for key in keys} == {True, False}
    state = json.loads((runs / "hints" / "hints" / "checkpoint-5" / "avatar.json").read_text())["memory"]
    assert {pending["hinted"] for pending in state["pending"].values()} == {True, False}
    trained = facts(runs / "resumed", "hints")["trained"]
    assert any(key.endswith("+hint") and replayed for batch in trained for key, _, replayed in batch)
    assert per_step(told["hints"])[8]["hint/hinted_prompts"] >= 1


def test_with_another_past_the_run_goes_on_differently(runs):
    whole, other = facts(runs / "whole", "rollout"), facts(runs / "resumed", "forgetful")
    assert other["error"] is None and per_step(other).keys() == per_step(whole).keys()
    assert per_step(other)[5] == per_step(whole)[5] and per_step(other)[8] != per_step(whole)[8]
    assert per_step(other)[7]["replay/share"] == 0 != per_step(whole)[7]["replay/share"]
    assert not same(weights(runs / "whole", "rollout"), weights(runs / "resumed", "forgetful"))


# Damaged and foreign checkpoints

SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
FILES = {
    "tokens": "replay/replay-*.safetensors",
    "table": "replay/replay-*.parquet",
    "manifest": "replay/replay.json",
    "state": "avatar.json",
}


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """A run of four steps that saved after two: its folder, its rows and what it held at its end."""
    output = tmp_path_factory.mktemp("saved")
    rows = take(data[1], VAS=2, AS=2)
    trainer = make(data[0], output, rows, Worth(), **SAVED)
    trainer.train()
    return output, rows, contents(trainer), per_step({"log": trainer.state.log_history})


@pytest.fixture
def resume(data, saved, tmp_path):
    """Goes on from a copy of the checkpoint after two steps, which may be damaged before; other options as for `make`."""

    def go(damage=None, rows=None, folder=None, **options):
        target = tmp_path / f"run-{len(os.listdir(tmp_path))}"
        shutil.copytree(saved[0] / "checkpoint-2", target / "checkpoint-2")
        if damage is not None:
            damage(target / "checkpoint-2")
        reward = options.pop("reward", None) or Worth()
        trainer = make(folder or data[0], target, rows or saved[1], reward, **(SAVED | options))
        trainer.train(resume_from_checkpoint=True)
        return trainer

    return go


def found(checkpoint, name):
    (path,) = checkpoint.glob(FILES[name])
    return path


def missing(path):
    path.unlink()


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def edited(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def garbage(path):
    path.write_bytes(b"\xff\xfe\x00\x80" * 100)


DAMAGES = [(name, damage) for name in FILES for damage in (missing, cut_short, edited)]
DAMAGES += [("state", garbage), ("state", emptied), ("manifest", garbage)]
DAMAGES.remove(("state", edited))


def test_an_undamaged_checkpoint_goes_on_as_before(saved, resume):
    trainer = resume()
    assert contents(trainer) == saved[2]
    assert per_step({"log": trainer.state.log_history}) == saved[3]


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.matrix(cases=3)
def test_a_damaged_file_is_named(resume, caplog, name, damage):
    def spoil(checkpoint):
        damage(found(checkpoint, name))

    path = FILES[name].replace("*", r"[0-9a-f]+").replace(".", r"\.")
    with pytest.raises(ResumeError, match=rf"checkpoint-2/{path}.*Set replay_recovery='empty'"):
        resume(spoil)
    if damage is not missing and (name, damage) != ("state", garbage):
        return
    trainer = resume(spoil, replay_recovery="empty")
    told = [r.getMessage() for r in caplog.records if "goes on with an empty replay buffer" in r.getMessage()]
    assert len(told) == 1 and re.search(path, told[0])
    assert trainer.state.global_step == 4
    after = [entry for entry in logs(trainer) if entry["step"] > 2]
    assert [entry["replay/share"] for entry in after] == [0, 0.5]
    assert [entry["replay/size"] for entry in after] == [4 * G, 6 * G]


def test_an_edited_state_is_noticed(resume):
    """A reward that was changed by hand would be a baseline that no one had."""

    def spoil(checkpoint):
        path = checkpoint / "avatar.json"
        state = json.loads(path.read_text())
        rewards = next(iter(state["memory"]["vcrs"].values()))
        rewards[0] += 0.5
        path.write_text(json.dumps(state))

    with pytest.raises(ResumeError, match="avatar.json"):
        resume(spoil)


def test_the_buffer_of_another_checkpoint_is_noticed(saved, resume):
    """Its files are whole, but they belong to another step than the baselines."""

    def spoil(checkpoint):
        shutil.rmtree(checkpoint / "replay")
        shutil.copytree(saved[0] / "checkpoint-4" / "replay", checkpoint / "replay")

    with pytest.raises(ResumeError, match="replay"):
        resume(spoil)


def with_template(_):
    processor = load_processor(MODEL)
    processor.chat_template = processor.chat_template.replace("assistant", "Assistant")
    return {"processing_class": processor, "model": load_model(MODEL, dtype="float32")}


def with_token(_):
    processor = load_processor(MODEL)
    processor.tokenizer.add_tokens(["<hm>"])
    return {"processing_class": processor, "model": load_model(MODEL, dtype="float32")}


def with_hints(rows):
    return {"rows": rows.map(lambda row: {"hint": "look"})}


def with_solutions(rows):
    return {"rows": rows.map(lambda row: {"solution": "A" if row["solution"] != "A" else "B"})}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_template, "was written with another tokenizer"),
        (with_token, "was written with another tokenizer"),
        (lambda rows: {"reward_weights": [0.5]}, "another reward functions and weights"),
        (with_hints, "another data set"),
        (with_solutions, "another data set"),
        (lambda rows: {"max_prompt_length": 100}, "another prompt options"),
    ],
    ids=["template", "token", "weights", "hints", "solutions", "prompt-options"],
)
@pytest.mark.matrix(cases=2)
def test_what_stored_completions_depend_on_must_not_have_changed(saved, resume, caplog, change, message):
    with pytest.raises(ResumeError, match=message):
        resume(**change(saved[1]))
    if change is with_token:
        return
    trainer = resume(**change(saved[1]), replay_recovery="empty")
    assert any(message in r.getMessage() and "empty replay buffer" in r.getMessage() for r in caplog.records)
    assert [entry["replay/share"] for entry in logs(trainer) if entry["step"] > 2] == [0, 0.5]


def test_other_rows_and_other_settings_are_refused(data, saved, resume):
    with pytest.raises(ResumeError, match="train_dataset is not the data set of the checkpoint"):
        resume(rows=take(data[1], VA=4))
    with pytest.raises(ResumeError, match="replayed_generations 4 -> 2"):
        resume(replayed_generations=2)
    with pytest.raises(ResumeError, match="vcrs_window 20 -> 3"):
        resume(vcrs_window=3)
    assert resume(reward=Worth()).state.global_step == 4


def test_a_refused_run_can_still_begin_anew(data, saved, resume, tmp_path):
    def spoil(checkpoint):
        missing(found(checkpoint, "table"))

    shutil.copytree(saved[0] / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    spoil(tmp_path / "again" / "checkpoint-2")
    trainer = make(data[0], tmp_path / "again", saved[1], Worth(), **SAVED)
    with pytest.raises(ResumeError):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert not any(row["replayed"] for row in trainer.trained[0]) and len(trainer.memory.buffer) == 10 * G


def test_a_smaller_buffer_keeps_the_newest(saved, resume):
    trainer = resume(replay_capacity=20)
    assert len(trainer.memory.buffer) <= 20 and logs(trainer)[-1]["replay/evicted"] > 0


# Clips that go missing


def clips(folder, target):
    shutil.copytree(folder, target)
    return target


LONG = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "shuffle_dataset": False}


def broken_run(folder, output, rows, **options):
    """A run whose last three steps are done again after the first row's clip is gone."""
    make(folder, output, rows, Worth(), **LONG, **options).train()
    shutil.rmtree(output / "checkpoint-6")
    (folder / rows[0]["video"]).unlink()
    trainer = make(folder, output, rows, Worth(), **LONG, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    return trainer, trainer.prompt_builder.spec(rows[0]).key


@pytest.mark.long
def test_a_clip_that_was_deleted_before_the_resume(data, tmp_path, tmp_path_factory, caplog):
    folder = clips(data[0], tmp_path_factory.mktemp("fewer") / "set")
    rows = take(data[1], VAS=2, AS=2)
    trainer, key = broken_run(folder, tmp_path, rows, per_device_train_batch_size=2 * G)
    assert not trainer.memory.buffer.stored(key)
    count = G + G // 2  # steps 1 and 3 were its visits
    assert [entry["replay/discarded"] for entry in logs(trainer)] == [0] * 3 + [count] * 3
    (told,) = [r.getMessage() for r in caplog.records if "are not replayed" in r.getMessage()]
    assert told.startswith(f"{count} completions of prompt {key}")
    listed = json.loads((tmp_path / "quarantine.json").read_text())
    assert [(row["path"], row["reason"]) for row in listed] == [(rows[0]["video"], "not-found")]
    assert not any(row["key"] == key for batch in trainer.trained for row in batch)


@pytest.mark.long
def test_a_clip_that_was_deleted_in_the_middle_of_a_rollout(data, tmp_path, tmp_path_factory):
    """Completions of the rollout that were still to be trained on cannot be shown any more."""
    folder = clips(data[0], tmp_path_factory.mktemp("fewer") / "set")
    rows = take(data[1], VAS=2, AS=2)
    # The first two prompts are trained on for four steps.
    options = {"steps_per_generation": 2, "num_iterations": 2, "per_device_train_batch_size": G}
    trainer, key = broken_run(folder, tmp_path, rows, **options)
    assert not trainer.memory.buffer.stored(key)


def test_a_clip_that_is_deleted_during_the_run(data, tmp_path, tmp_path_factory, caplog):
    folder = clips(data[0], tmp_path_factory.mktemp("fewer") / "set")
    rows = take(data[1], VAS=3, AS=3)
    gone = rows[0]["video"]

    class Deleting(Worth):
        def __call__(self, *args, **kwargs):
            if len(self.calls) == 2:
                (folder / gone).unlink()
            return super().__call__(*args, **kwargs)

    options = {"media_cache_bytes": 1, "media_prefetch": False, "max_steps": 6, "per_device_train_batch_size": 6 * G}
    trainer = make(folder, tmp_path, rows, Deleting(), **options)
    trainer.train()
    assert trainer.state.global_step == 6
    key = trainer.prompt_builder.spec(rows[0]).key
    count = G + 2 * (G // 2)
    assert [entry["replay/discarded"] for entry in logs(trainer)] == [0, 0, 0] + [count] * 3
    (told,) = [r.getMessage() for r in caplog.records if "are not replayed" in r.getMessage()]
    assert told.startswith(f"{count} completions of prompt {key}") and not trainer.memory.buffer.stored(key)
    assert [row.path for row in trainer.row_encoder.quarantined] == [gone]
    assert not any(row["key"] == key for batch in trainer.trained[3:] for row in batch)
    # A row stands in for it, and its completions are replayed as its own.
    assert all(entry["replay/share"] == 0.5 for entry in logs(trainer)[3:])


# The folder


@pytest.mark.long
def test_a_checkpoint_holds_no_more_than_the_capacity(data, tmp_path):
    rows = take(data[1], VAS=2, AS=2)
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "replay_capacity": 40}
    trainer = make(data[0], tmp_path, rows, Worth(), **options)
    trainer.train()
    sizes = []
    for step in range(1, 9):
        files = list((tmp_path / f"checkpoint-{step}" / "replay").iterdir())
        assert sorted(path.suffix for path in files) == [".json", ".parquet", ".safetensors"]
        sizes.append(sum(path.stat().st_size for path in [*files, tmp_path / f"checkpoint-{step}" / "avatar.json"]))
    # 32 after one step, at most 40 then: a token takes 8 bytes, and the rest of an experience less than 200.
    tokens = 40 * trainer.args.max_completion_length * 8
    assert max(sizes) < tokens + 40 * 200 + 20_000 and max(sizes[4:]) < 1.2 * sizes[3]
    assert len(contents_of(trainer)) <= 40


def test_checkpoints_hold_no_pixels_and_no_pickles_of_replay(saved):
    for path in (saved[0] / "checkpoint-2" / "replay").iterdir():
        assert path.suffix in (".json", ".parquet", ".safetensors")
    assert sum(p.stat().st_size for p in (saved[0] / "checkpoint-2" / "replay").iterdir()) < 100_000


# The command line


@pytest.mark.long
def test_the_command_line_resumes(data, tmp_path):
    folder, rows = data
    take(rows, VAS=2, AS=2).to_json(folder / "few.jsonl")
    job = {name: value for name, value in DEFAULTS.items() if name not in ("disable_tqdm", "gradient_checkpointing")}
    job |= SAVED | {"trainer": "avatar", "model_name_or_path": MODEL, "dtype": "float32", "report_to": "none"}
    job |= {"dataset_name": str(folder / "few.jsonl"), "gradient_checkpointing": False, "rewards": ["accuracy_reward"]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))

    def run(name, *words):
        assert (
            cli.main(["train", "--config", str(tmp_path / "job.yaml"), "--output_dir", str(tmp_path / name), *words])
            == 0
        )
        entries = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return per_step({"log": entries}), load_file(tmp_path / name / "model.safetensors")

    expected, trained = run("whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    got, again = run("again", "--resume_from_checkpoint", "true")
    assert [entry["replay/share"] for entry in expected.values()] == [0, 0.5, 0.5, 0.5]
    assert {step: got[step] for step in (3, 4)} == {step: expected[step] for step in (3, 4)}
    assert same(trained, again)
    (tmp_path / "again" / "checkpoint-4" / "avatar.json").write_text("{")
    words = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", "true", "--max_steps", "5"]
    assert cli.main(["train", "--config", str(tmp_path / "job.yaml"), *words]) != 0
    assert cli.main(["train", "--config", str(tmp_path / "job.yaml"), *words, "--replay_recovery", "empty"]) == 0
