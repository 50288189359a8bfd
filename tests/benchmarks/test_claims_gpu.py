"""Claims that need a GPU: what they compare, that nothing but a GPU decides them, and each task's path, tiny and on the CPU."""

import contextlib
import gc
import io
import re
from dataclasses import replace

import claim_sets
import pytest
import torch
from claim_sets import CLAIMS, known_tasks, write_register
from register import IS_THERE, RegisterError, read_register


LARGE = ("replay_large", "reasoning_large", "three_b")


@pytest.fixture(scope="module")
def register():
    return read_register(CLAIMS)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setitem(IS_THERE, "gpu", lambda: False)


def claims(*words):
    """`python benchmarks/claims` in this process; its status and what it says."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = claim_sets.command()([str(word) for word in words])
    return status, out.getvalue()


# The register


@pytest.mark.long
def test_rows_are_those_of_the_small_models(register):
    """The same measures, by the clock of the GPU where seconds are counted, of variants that differ in their task alone."""
    pairs = {
        "gpu-completions": "avatar-completions",
        "gpu-seconds": "avatar-seconds",
        "gpu-saves-by-replay": "avatar-saves-by-replay",
        "gpu-shape": "avatar-shape",
        "gpu-lambda": "avatar-lambda",
    }

    def told(claim):
        return {
            one.name: (
                one.metric.text.replace("cpu_seconds", "wall_seconds"),
                one.effect,
                one.expects,
                one.least,
                one.role,
            )
            for one in register.claims[claim].measures
        }

    for large, small in pairs.items():
        assert told(large) == told(small)
        assert register.claims[large].number == register.claims[small].number
        for own, other in zip(register.claims[large].variants, register.claims[small].variants, strict=True):
            own, other = register.variants[own], register.variants[other]
            assert own.task == f"{other.task}_large"
            configs = [one.run(0).config() for one in (own, other)]
            apart = {name for name in configs[0] if configs[0][name] != configs[1].get(name)}
            assert apart == {"use_cpu", "learning_rate"} and set(configs[0]) >= set(configs[1])
            assert configs[0]["learning_rate"] * 8 == pytest.approx(configs[1]["learning_rate"])
            assert replace(own, name=other.name, task=other.task, options=other.options) == other
    every = [one for one in register.claims.values() if one.needs == "gpu"]
    assert {one.number for one in every} == {2, 12, 16} and len(every) == 8


@pytest.mark.long
def test_the_device_decides_runs_of_these_tasks_alone(register, monkeypatch):
    from tasks import load_task

    for variant in register.variants.values():
        _, job = variant.run(0).jobs()[-1]
        assert job["use_cpu"] == (variant.task not in LARGE)
    run = register.variants["gpu-replay-avatar"].run(0)
    key = run.key()
    monkeypatch.setattr(load_task("replay_large"), "DEVICE", "cpu")
    assert run.key() != key


def test_a_claim_of_such_a_task_must_say_what_it_needs(tmp_path):
    def change(topic, **needs):
        for variant in topic["variants"].values():
            variant["task"] = "replay_large"
        for claim in topic["claims"].values():
            claim.update(needs)

    known_tasks(write_register(tmp_path / "silent", change))
    with pytest.raises(RegisterError, match="claim better: needs must be gpu, on which runs of the task replay_large"):
        read_register(tmp_path / "silent")
    write_register(tmp_path / "told", lambda topic: change(topic, needs="gpu"))
    assert read_register(tmp_path / "told").claims["better"].needs == "gpu"


def test_without_a_gpu_they_are_not_run_and_not_left(register, without_gpu, tmp_path):
    from evidence import Evidence
    from page import Page

    own = [one.name for one in register.claims.values() if one.needs == "gpu"]
    status, said = claims("run", "gpu", "--results", tmp_path)
    assert status == 0 and re.findall(r"^(\S+) is not run: it needs a GPU$", said, re.MULTILINE) == own
    assert said.endswith("\n0 runs are done, 0 failed, 0 are left\n")
    _, said = claims("status", "gpu", "--results", tmp_path)
    assert [line.split()[1] for line in said.splitlines()[:-1]] == [f"{name}:" for name in own]
    assert said.count(": not run, needs a GPU\n") == len(own) and said.endswith(
        "0 runs are left in all, 0.0 CPU hours left\n"
    )
    page = Page(Evidence(register, tmp_path), tmp_path)
    assert {page.verdict(register.claims[name]) for name in own} == {"not run (needs a GPU)"}
    assert page.decided("") == []


def test_with_a_gpu_they_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setitem(IS_THERE, "gpu", lambda: True)
    _, said = claims("status", "gpu-step-time-full", "gpu-lambda", "--results", tmp_path)
    assert "gpu-step-time-full: 0 of 5 runs" in said and "gpu-lambda: 0 of 25 runs" in said
    assert said.splitlines()[-1].startswith("30 runs are left in all")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_that_finds_no_gpu_is_refused(register, tmp_path, monkeypatch):
    """A trainer would take the CPU in its place, and nothing in the result would tell."""
    import worker

    monkeypatch.setattr("tasks._cache", tmp_path)
    with pytest.raises(RuntimeError, match="tasks.replay_large runs on a GPU, and torch finds none here"):
        worker.carry_out(register.variants["gpu-replay-avatar"].run(0))
    assert not list(tmp_path.iterdir())


def test_what_a_task_is_made_of_decides_whether_it_is_made_anew(tmp_path, monkeypatch):
    import tasks
    from tasks import replay, replay_large

    monkeypatch.setattr(replay_large, "DEVICE", "cpu")
    before = tasks._made_by(replay_large)["source"]
    changed = tmp_path / "replay.py"
    changed.write_text("HARD = 63")
    monkeypatch.setattr(replay, "__file__", str(changed))
    assert tasks._made_by(replay_large)["source"] != before
    assert replay_large.VERSION // 100 == replay.VERSION  # with which its rows change


# Models and rows


def test_sizes_are_those_that_are_told():
    import argparse
    import sys

    import large_model
    from tasks import three_b

    from maple_trl.data.tiny_omni import build_config, build_tokenizer

    sys.path[:0] = [str(three_b.BENCHMARKS)]
    import _shared_prefix_model as sizes

    def parameters(config):
        with torch.device("meta"):
            return sum(one.numel() for one in sizes.Qwen2_5OmniThinkerForConditionalGeneration(config).parameters())

    assert parameters(build_config(build_tokenizer(), **large_model.SIZES)) == pytest.approx(58e6, rel=0.02)
    asked = argparse.Namespace(**three_b.SIZES)
    assert parameters(sizes.make_config(asked)) == pytest.approx(4.7e9, rel=0.01)


def test_one_in_ten_is_told_a_wrong_letter():
    import large_model

    from maple_trl.data.tiny_omni import target_text

    rows = [
        {"id": f"{number}", "question": "color?", "answer": "ABCD"[number % 4], "tag": "V", "truth_V": "red"}
        for number in range(2000)
    ]
    told = [large_model.slipping_target(row) for row in rows]
    wrong = [text[-10] for text, row in zip(told, rows, strict=True) if text != target_text(row)]
    assert len(wrong) / len(rows) == pytest.approx(0.1, abs=0.02) and told == [*map(large_model.slipping_target, rows)]
    assert all(0.15 < wrong.count(letter) / len(wrong) < 0.35 for letter in "ABCD")


def test_rewards_are_drawn_and_half_of_the_rows_are_alike():
    from tasks import three_b

    ids = [f"{number}-{kind}" for kind in ("alike", "varied") for number in range(40) for _ in range(8)]
    tokens = [[number, number % 7] for number in range(len(ids))]
    found = three_b.drawn_reward(completion_ids=tokens, id=ids)
    groups = [set(found[start : start + 8]) for start in range(0, len(found), 8)]
    assert groups[:40] == [{0.0}] * 40 and sum(group == {0.0, 1.0} for group in groups[40:]) >= 38


@pytest.mark.long
def test_prompts_are_as_long_as_is_told(monkeypatch, tmp_path):
    """By the processor that lies beside the model, of a row that is fed all."""
    from tasks import three_b
    from transformers import AutoProcessor

    from maple_trl.data.tiny_omni import build_model, build_tokenizer
    from maple_trl.omni.families import family_for
    from maple_trl.omni.media.loader import MediaLimits, MediaLoader
    from maple_trl.omni.prompt import PromptBuilder

    monkeypatch.setattr(three_b, "PROMPTS_PER_TAG", 1)
    monkeypatch.setattr(three_b, "DEVICE", "cpu")
    monkeypatch.setattr(three_b, "SIZES", TINY_3B)
    three_b.prepare(tmp_path)
    told = three_b.options("mapo")
    limits = MediaLimits(num_frames=told["num_frames"], max_pixels=told["max_pixels"])
    family = family_for(build_model(build_tokenizer()), AutoProcessor.from_pretrained(tmp_path / "model"))
    row = next(row for row in three_b.held_out(tmp_path) if row["tag"] == "VAS")
    prompt = PromptBuilder(family, MediaLoader(tmp_path / "data", limits)).encode(row)
    assert prompt.media_tokens == {"video": 960, "audio": 750, "subtitle": 1}
    assert 1730 < len(prompt) <= 1770 < told["max_prompt_length"], len(prompt)


# Each task's path


TINY_3B = {
    "real": False,
    "hidden": 32,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "vocab": 640,
    "tower": 32,
    "tower_layers": 1,
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The tasks on the CPU, of models and sets as small as they can be."""
    import large_model
    import step_times
    from tasks import reasoning, reasoning_large, replay, replay_large, three_b

    monkeypatch.setattr("tasks._cache", tmp_path)
    small = {"hidden_size": 32, "layers": 2, "heads": 2, "tower_size": 32, "tower_layers": 1}
    sizes = {
        large_model: {"SIZES": small, "PROMPTS_PER_TAG": 2, "CLIPS_PER_PAIR": 1, "ASKED": 1, "BATCH": 8},
        replay: {"HARD": 9, "OTHERS": 7, "HELD_OUT_HARD": 9, "HELD_OUT_OTHERS": 7, "ASKED_PER_TAG": 32, "ASKED": 2},
        replay_large: {"DEVICE": "cpu", "COLD_STEPS": 1, "HINT_STEPS": 1},
        reasoning: {"TRAIN_PER_TAG": 2, "TEST_PER_TAG": 2, "COLD_CHAINS": 1},
        reasoning_large: {"DEVICE": "cpu", "COLD_STEPS": 3, "QUESTIONS": 1, "SAMPLES": 1},
        three_b: {
            "DEVICE": "cpu",
            "SIZES": TINY_3B,
            "SECONDS": 2,
            "SIDE": 56,
            "PROMPTS_PER_TAG": 2,
            "ROLLOUT": 2,
            "COMPLETION": 3,
        },
        step_times: {
            "RECIPES": {name: step_times.RECIPES[name] for name in ("mapo", "early")} | {"mupo": "tiny/mupo"}
        },
    }
    for module, constants in sizes.items():
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def carried_out(register, name, **options):
    """The result of a variant's run with other options, which must be a few steps."""
    import worker

    variant = register.variants[name]
    return worker.carry_out(replace(variant, options={**variant.options, **options}).run(100))


@pytest.mark.long  # the tasks are those of test_claims_avatar.py and test_claims_reasoning.py, with a larger model
def test_completions_to_a_target_are_counted(tiny, register):
    found = carried_out(register, "gpu-replay-avatar", max_steps=2, hints=False, hint_max_kl=0.01)
    assert found["config"]["use_cpu"] and found["config"]["learning_rate"] == pytest.approx(2e-4 * 64 / 32)
    points = found["tier_curve"]["points"]
    assert [point["step"] for point in points] == [0, 1, 2] and {"hard", "other", "wall_seconds"} <= set(points[0])
    assert [point["completions"] for point in points] == [
        0,
        64,
        96,
    ]  # whole groups first, then four fresh ones of eight


@pytest.mark.long
def test_chains_are_trained_and_read(tiny, register):
    few = {"max_steps": 1, "num_generations": 4, "replayed_generations": 2, "per_device_train_batch_size": 4}
    found = carried_out(register, "gpu-reason-parabolic-1", **few, max_completion_length=16, replay_min_size=1)
    assert found["chains"]["after"]["completions"] == 7 and found["chains"]["start"]["completions"] == 14
    assert found["config"]["tas_lambda"] == 1 and found["config"]["learning_rate"] == pytest.approx(3e-4 * 64 / 32)


@pytest.mark.slow
@pytest.mark.long
def test_steps_of_the_3b_are_timed_by_the_clock(tiny, register, monkeypatch):
    import step_times
    from transformers import TrainerCallback

    from maple_trl.trainers import MAPOTrainer

    dropped, stopwatch = {"none": [], "early": []}, step_times.stopwatch

    class Dropped(TrainerCallback):
        def on_log(self, args, state, control, logs, **told):
            if "tag/all/dropped" in logs:
                dropped[args.dynamic_sampling].append(logs["tag/all/dropped"])

    def watched(trainer):
        trainer.add_callback(Dropped())
        return stopwatch(trainer)

    monkeypatch.setattr(step_times, "stopwatch", watched)
    found = carried_out(register, "gpu-step-times-3b", max_steps=4)["step_times_3b"]
    assert set(found) == {"mupo", "mapo", "early"}
    for one in found.values():
        assert one["wall"] == pytest.approx(one["generate_wall"] + one["update_wall"], rel=1e-3)
        assert one["step"] > one["wall"] > 0 and one["update_wall"] > 0 and one["media_tokens"] > 0
    assert found["mapo"]["media_tokens"] < found["mupo"]["media_tokens"]
    assert set(dropped["none"]) == {0.0} and set(dropped["early"]) == {1.0}  # of a rollout's two prompts the one alike
    gc.collect()  # what a GPU's memory is given back after
    assert not [one for one in gc.get_objects() if isinstance(one, MAPOTrainer)]
