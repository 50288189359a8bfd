"""
Judges inside real training runs: with faults, with the judge gone and back, on one process and on two.

The file is also the job of the test with two processes: `test_judge_training.py MEDIA OUT URL`.
"""

import json
import math
import os
import random
import sys
import zlib
from pathlib import Path

import pytest
import torch
from chat_server import ChatServer, half, hang_up, raw, say, status
from datasets import Dataset
from omni_runs import QUIET_ON_CPU
from programs import Ranks

from maple_trl import MAPOConfig, OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.chat import ChatOptions
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.rewards import CaptionJudge, JudgeUnavailableError, for_tags, format_reward, judge_callbacks
from maple_trl.trainers.common.checkpoint import last_complete_checkpoint
from maple_trl.trainers.mapo.trainer import MAPOTrainer


pytestmark = pytest.mark.slow


MODEL = "builtin:tiny-omni"
KEY = "sk-test-0123456789abcdefghijklmnop"
SCALE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
OPTIONS = QUIET_ON_CPU | {
    "num_frames": 4,
    "max_pixels": 3136,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 14,
    "max_steps": 4,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "reward_weights": [0.1, 1.0],
    "seed": 5,
}


def judged(rows):
    """Rows with references: the truth about each signal, in words."""
    words = {"V": "The shape is {}.", "A": "The tone is {}.", "S": "The word is {}."}
    found = []
    for row in rows:
        told = {letter: text.format(row[f"truth_{letter}"]) for letter, text in words.items()}
        reference = " ".join(told[letter] for letter in row["tag"])
        found.append({**row, "reference": reference} | {f"reference_{c.lower()}": told[c] for c in told})
    return Dataset.from_list(found)


def grade(_, body):
    """Grades that depend on what is asked and on nothing else."""
    digest = zlib.crc32(json.dumps(body["messages"]).encode())
    return say(json.dumps({axis: SCALE[digest // 7**i % 6] for i, axis in enumerate(("missing", "errors", "fusion"))}))


def judge_of(url, **changes):
    fast = {"retry_wait": 0.001, "retry_wait_max": 0.01, "timeout": 5.0, "max_attempts": 4, "api_key_env": "JUDGE_KEY"}
    return AllText(ChatOptions(model="scripted", base_url=url, **{**fast, **changes}), name="captions")


class AllText(CaptionJudge):
    """The model thinks in a word and answers with a letter: both together differ more, and mean more calls."""

    def judged_text(self, text):
        return text.replace("<", "").replace(">", " ") + "."


def build(media, rewards, out, dataset, trainer_class=MAPOTrainer, eval_dataset=None, **options):
    config_class = MAPOConfig if trainer_class is MAPOTrainer else OmniGRPOConfig
    return trainer_class(
        load_model(MODEL),
        rewards,
        config_class(output_dir=str(out), media_root=str(media), **{**OPTIONS, **options}),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=load_processor(MODEL),
        callbacks=judge_callbacks(rewards),
    )


@pytest.fixture
def train(seven_tags, tmp_path, monkeypatch):
    """Makes a trainer with a judge behind `url`."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    folder, rows = seven_tags
    dataset = judged(rows)

    def make(judge, out=tmp_path / "run", guarded=True, **options):
        trainer = build(folder, [format_reward, judge], out, dataset, **options)
        if not guarded:
            for callback in judge_callbacks(judge):
                trainer.remove_callback(type(callback))
        return trainer

    return make


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def files_with(text, folder):
    needle = text.encode()
    return [path for path in Path(folder).rglob("*") if path.is_file() and needle in path.read_bytes()]


FAULTS = [status(500, f"failed for {KEY}"), status(429, headers={"Retry-After": "0"}), hang_up(), half(), raw(b"{")]


def test_a_run_with_faults_goes_through(train, tmp_path):
    dice = random.Random(4)

    def choose(number, body):
        return dice.choice(FAULTS) if dice.random() < 0.3 else grade(number, body)

    advantages, out = [], tmp_path / "run"
    with ChatServer(choose) as server:
        judge = judge_of(server.url, cache_file=out / "answers.sqlite", prompt_price=1.0, max_attempts=8)
        trainer = train(judge, out, save_strategy="steps", save_steps=2, log_completions=True)
        replaced = trainer._replace_logged_advantages
        trainer._replace_logged_advantages = lambda values: (advantages.append(values), replaced(values))
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        trainer.save_model()
        trainer.create_model_card(model_name="judged")
        assert trainer.state.global_step == 4
        assert judge.counts["scored"] > 32 and len(server.calls) == judge.usage.sent
        judge.close()
    assert judge.usage.faults.total() > 5 and judge.usage.retries > 5
    assert len(advantages) == 4 and all(torch.isfinite(values).all() for values in advantages)
    assert any(values.abs().max() > 0 for values in advantages)
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
    entries = logs(trainer)
    assert len(entries) == 4
    for entry in entries:
        assert math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])
        for name in ("failure_rate", "calls", "cached", "prompt_tokens", "cost", "cost_total", "by_rule", "missing"):
            assert math.isfinite(entry[f"judge/captions/{name}"]), name
        assert 0 <= entry["judge/captions/failure_rate"] <= 0.2 and 0 <= entry["rewards/captions/mean"] <= 1
    assert sum(entry["judge/captions/calls"] for entry in entries) == judge.usage.sent
    # The server quoted the key in its errors; it is in nothing that the run left behind.
    assert len([path for path in out.rglob("*") if path.is_file()]) > 15
    assert files_with(KEY, out) == [] and files_with(KEY[3:19], out) == []
    (out / "planted.bin").write_bytes(b"\0" + KEY.encode() + b"\0")
    assert files_with(KEY, out) == [out / "planted.bin"]  # the control


class Line:
    """A judge that goes away after some calls, and comes back."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, number, body):
        self.left -= 1
        return grade(number, body) if self.left >= 0 else status(503, f"down; the key was {KEY}")


def test_a_judge_that_goes_away_stops_the_run_which_goes_on_when_it_is_back(train, tmp_path):
    line = Line(40)
    out = tmp_path / "run"
    with ChatServer(line) as server:
        judge = judge_of(server.url, cache_file=out / "answers.sqlite", max_attempts=2)
        trainer = train(judge, out, max_steps=8)  # nothing is saved but by the judge
        with pytest.raises(JudgeUnavailableError) as caught:
            trainer.train()
        message = str(caught.value)
        stopped = trainer.state.global_step
        assert 1 <= stopped < 8 and f"Stopped after step {stopped}" in message
        assert "captions failed for" in message and "server-error" in message and "resume_from_checkpoint" in message
        assert "[key]" in message and KEY not in message
        checkpoint = last_complete_checkpoint(str(out))
        assert checkpoint == str(out / f"checkpoint-{stopped}")
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
        assert state["global_step"] == stopped and files_with(KEY, out) == []
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
        judge.close()

        # Still down: it stops again, one step on, and harms nothing.
        again = train(judge_of(server.url, max_attempts=1), out, max_steps=8)
        with pytest.raises(JudgeUnavailableError, match=f"Stopped after step {stopped + 1}"):
            again.train(resume_from_checkpoint=True)

        line.left = 10_000
        judge = judge_of(server.url, cache_file=out / "answers.sqlite")
        resumed = train(judge, out, max_steps=8)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 8
        steps = [entry["step"] for entry in logs(resumed)]
        assert steps == list(range(1, 9))
        assert all(math.isfinite(entry["loss"]) for entry in logs(resumed))
        assert logs(resumed)[-1]["judge/captions/failure_rate"] == 0.0 and judge.tripped is None
        judge.close()


def test_nothing_is_sent_between_the_failure_and_the_end_of_the_step(train):
    """An optimizer step of three rollouts: the second and third are not asked about, as nobody answers."""
    calls = []

    def choose(number, body):
        calls.append(number)
        return status(503)

    with ChatServer(choose) as server:
        judge = judge_of(server.url, max_attempts=1)
        options = {"gradient_accumulation_steps": 3, "steps_per_generation": 1, "per_device_train_batch_size": 16}
        trainer = train(judge, trainer_class=OmniGRPOTrainer, max_steps=3, **options)
        with pytest.raises(JudgeUnavailableError, match="Stopped after step 1"):
            trainer.train()
        assert 0 < len(calls) <= 16 and judge.counts["failed"] <= 16
        assert math.isfinite(logs(trainer)[0]["loss"])


@pytest.mark.long
def test_without_its_callback_a_judge_raises_at_once(train, tmp_path):
    line = Line(40)
    with ChatServer(line) as server:
        trainer = train(judge_of(server.url, max_attempts=1), guarded=False, save_strategy="steps", save_steps=1)
        trainer.args.max_steps = 8
        with pytest.raises(JudgeUnavailableError, match="Go on from the last checkpoint"):
            trainer.train()
        assert last_complete_checkpoint(str(tmp_path / "run")).endswith(f"-{trainer.state.global_step}")
        line.left = 10_000
        resumed = train(judge_of(server.url), save_strategy="steps", save_steps=1, max_steps=8)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 8


def test_a_judge_that_fails_in_an_evaluation_stops_the_run_too(train, tmp_path, seven_tags):
    choose = lambda number, body: grade(number, body) if trainer.model.training else status(503)  # noqa: E731
    with ChatServer(choose) as server:
        judge = judge_of(server.url, max_attempts=1)
        rows = judged(seven_tags[1]).select(range(8))
        options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 16}
        trainer = train(judge, eval_dataset=rows, **options)
        with pytest.raises(JudgeUnavailableError, match="Stopped after step 2"):
            trainer.train()
        assert last_complete_checkpoint(str(tmp_path / "run")).endswith("checkpoint-2")
        judge.close()


def test_a_judge_for_some_tags_is_guarded_too(train):
    with ChatServer(Line(0)) as server:
        judge = for_tags(judge_of(server.url, max_attempts=1), ["V", "A", "S", "VA", "VS", "AS", "VAS"])
        with pytest.raises(JudgeUnavailableError, match="Stopped after step"):
            train(judge).train()


# Two processes


def test_a_judge_that_one_of_two_ranks_cannot_reach_stops_both(seven_tags, tmp_path):
    folder, rows = seven_tags
    judged(rows).to_json(tmp_path / "rows.jsonl")
    with ChatServer(grade) as server:
        log = tmp_path.with_suffix(".log")
        Ranks(2, [__file__, folder, tmp_path, server.url], log, {"JUDGE_KEY": KEY}).wait()
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)], log.read_text()
    errors = [rank["error"] for rank in told[0]]
    assert errors[0] == errors[1] and "connection" in errors[0] and "Stopped after step" in errors[0], told[1][-3000:]
    steps = {rank["step"] for rank in told[0]}
    assert len(steps) == 1 and steps < set(range(1, 4))
    assert last_complete_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / f"checkpoint-{steps.pop()}")
    assert KEY not in told[1] and files_with(KEY, tmp_path) == []


def job(media, out, url):
    """A run in which rank 1 finds no judge; what became of it goes to `rank-N.json`."""
    rank = int(os.environ["RANK"])
    dataset = Dataset.from_json(str(Path(out, "rows.jsonl")), cache_dir=str(Path(out, f"cache-{rank}")))
    judge = judge_of(url if rank == 0 else "http://127.0.0.1:9/v1", max_attempts=1)
    trainer = build(media, [format_reward, judge], Path(out, "run"), dataset)
    error = None
    try:
        trainer.train()
    except JudgeUnavailableError as caught:
        error = str(caught)
    Path(out, f"rank-{rank}.json").write_text(json.dumps({"error": error, "step": trainer.state.global_step}))


if __name__ == "__main__":
    job(*sys.argv[1:])
