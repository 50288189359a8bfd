"""The completions and the log that a run leaves for reports: through `train()`, kills, resumes and two processes."""

import json
import signal
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from eval_runs import folder_with_ending
from hypothesis import given
from hypothesis import strategies as st
from omni_runs import QUIET_ON_CPU
from programs import Ranks
from tiny_models import build_tiny_text

from maple_trl import AvatarConfig, AvatarTrainer, MAPOConfig, MAPOTrainer, OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.data import load_seven_tags
from maple_trl.jobs.options import parse_args
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.machine_memory import machine_memory
from maple_trl.rewards import accuracy_reward
from maple_trl.train import run
from maple_trl.trainers.common.rollout_log import stride


pytestmark = pytest.mark.slow


MODEL = "builtin:tiny-omni"
DEFAULTS = QUIET_ON_CPU | {
    "num_frames": 4,
    "max_pixels": 3136,
    "max_prompt_length": 128,
    "max_completion_length": 14,
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
}


class Noted:
    """A reward that notes what it was asked for: an account of the completions that owes nothing to the log."""

    __name__ = "accuracy_reward"

    def __init__(self):
        self.seen = []

    def __call__(self, completions, id, solution, tag, completion_ids, **columns):
        rewards = accuracy_reward(completions=completions, solution=solution)
        texts = [completion[0]["content"] for completion in completions]
        self.seen.append(list(zip(id, tag, texts, rewards, map(len, completion_ids), strict=True)))
        return rewards


def train(output, trainer=OmniGRPOTrainer, config=OmniGRPOConfig, rows=16, **options):
    data = load_seven_tags()["train"].shuffle(seed=1).select(range(rows))
    from maple_trl.data import default_folder

    reward = Noted()
    made = trainer(
        model=load_model(MODEL, dtype="float32"),
        processing_class=load_processor(MODEL),
        reward_funcs=reward,
        args=config(output_dir=str(output), media_root=str(default_folder()), **DEFAULTS | options),
        train_dataset=data,
    )
    made.train()
    return made, reward, data


def files_of(output):
    return (
        sorted(path.name for path in Path(output, "rollouts").iterdir()) if Path(output, "rollouts").exists() else []
    )


def lines_of(output):
    """All lines, by file."""
    return [pq.read_table(Path(output, "rollouts", name)).to_pylist() for name in files_of(output)]


# What is written


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    output = tmp_path_factory.mktemp("plain")
    return output, *train(output)


def test_a_file_holds_what_the_reward_was_asked_for(plain):
    output, trainer, reward, data = plain
    assert files_of(output) == [f"{number:08}.parquet" for number in range(3)]
    rows = {row["id"]: i for i, row in enumerate(data)}
    for number, (lines, seen) in enumerate(zip(lines_of(output), reward.seen, strict=True)):
        got = [(line["id"], line["tag"], line["completion"], line["reward"], line["tokens"]) for line in lines]
        assert got == seen
        assert {(line["rollout"], line["step"]) for line in lines} == {(number, number)}
        assert [line["row"] for line in lines] == [rows[line["id"]] for line in lines]
        assert all(dict(line["rewards"]) == {"accuracy_reward": line["reward"]} for line in lines)
        assert not any(line["replayed"] or line["hinted"] for line in lines)
        # Four completions a prompt, whose advantages are around their mean.
        of_group = Counter(line["group"] for line in lines)
        assert set(of_group.values()) == {4}
        for group in of_group:
            mine = [line for line in lines if line["group"] == group]
            assert sum(line["advantage"] for line in mine) == pytest.approx(0, abs=1e-5)
            mean = sum(line["reward"] for line in mine) / 4
            for line in mine:
                assert (line["advantage"] > 1e-6) == (line["reward"] > mean)


def test_media_are_those_that_were_fed(plain):
    """A row of a tag names its video, sound and subtitle only as far as the tag needs them."""
    output, _, _, data = plain
    of_row = {row["id"]: row for row in data}
    for line in (line for lines in lines_of(output) for line in lines):
        row = of_row[line["id"]]
        assert line["video"] == ([row["video"]] if "V" in row["tag"] else [])
        assert line["audio"] == ([row["video"]] if "A" in row["tag"] else [])
        assert line["subtitle"] == (row["subtitle"] if "S" in row["tag"] else None)
        assert line["prompt"] == f"user: {row['prompt'][0]['content']}" and line["solution"] == row["solution"]


def test_the_log_is_written_as_it_grows(plain):
    output, trainer, _, _ = plain
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 3]
    assert [entry.get("reward") for entry in entries] == [entry.get("reward") for entry in trainer.state.log_history]


def test_the_log_of_completions_can_be_switched_off(tmp_path):
    train(tmp_path, rollout_log_size=0, max_steps=1)
    assert files_of(tmp_path) == []
    with pytest.raises(ValueError, match="rollout_log_size must be 0 or more, got -1"):
        OmniGRPOConfig(output_dir=str(tmp_path), rollout_log_size=-1, bf16=False)


def test_dropped_and_refilled_groups_are_there(tmp_path):
    """MAPO samples further prompts for groups of equal rewards: the newest rollout's worth of all is kept."""
    _, reward, _ = train(
        tmp_path, MAPOTrainer, MAPOConfig, 40, dynamic_sampling="early", refill_rounds=2, max_steps=2, seed=3
    )
    asked = reward.seen
    assert len(asked) > 2, "nothing was refilled"
    kept = lines_of(tmp_path)
    assert len(kept) == 2
    everything = [entry for call in asked for entry in call]
    last = [(line["id"], line["tag"], line["completion"], line["reward"], line["tokens"]) for line in kept[-1]]
    assert len(last) == 16 and last == everything[-16:]


def test_replayed_completions_are_those_that_were_sampled_before(tmp_path):
    options = {"replayed_generations": 2, "max_steps": 6, "per_device_train_batch_size": 16}
    train(tmp_path, AvatarTrainer, AvatarConfig, 4, **options)
    fresh, replayed, history = {}, 0, {}
    for lines in lines_of(tmp_path):
        for line in (line for line in lines if not line["replayed"]):
            history.setdefault(line["group"], []).append(line["reward"])
        past = [line["reward"] for line in lines if line["replayed"]]
        scale = stdev(past) + 1e-4 if len(set(past)) > 1 else 1.0
        for line in (line for line in lines if line["replayed"]):
            replayed += 1
            # Held against the mean of the prompt's last twenty fresh rewards (AVATAR eq. 11).
            wanted = (line["reward"] - fmean(history[line["group"]][-20:])) / scale
            assert line["advantage"] == pytest.approx(min(max(wanted, -5), 5), abs=1e-4)
            assert line["completion"] in fresh[line["group"], line["written_at"]]
            assert line["reward"] == fresh[line["group"], line["written_at"]][line["completion"]]
        for line in (line for line in lines if not line["replayed"]):
            fresh.setdefault((line["group"], line["step"]), {})[line["completion"]] = line["reward"]
    # From the second rollout on, two of four.
    assert [sum(line["replayed"] for line in lines) for lines in lines_of(tmp_path)] == [0, 8, 8, 8, 8, 8]


def test_replayed_completions_of_a_text_model_stand_with_their_rows(tmp_path):
    """Also those that a small buffer has let go since: such a model has no encoded prompts to find their rows by."""
    model, tokenizer = build_tiny_text()
    words = ["three", "four", "five", "six", "seven", "one"]
    rows = Dataset.from_list([{"id": f"row-{word}", "prompt": f"one two {word}"} for word in words])
    asked = []  # by rollout

    def noted(completions, prompts, id, **columns):
        rewards = [len(text) % 4 / 4 for text in completions]  # which a float32 holds exactly
        asked.append(dict(zip(zip(id, prompts, completions, strict=True), rewards, strict=True)))
        return rewards

    options = {"replayed_generations": 2, "replay_scope": "buffer", "replay_capacity": 8, "max_steps": 8}
    options |= {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6}
    config = AvatarConfig(output_dir=str(tmp_path), gradient_checkpointing=False, **QUIET_ON_CPU, **options)
    trainer = AvatarTrainer(model, noted, config, rows, processing_class=tokenizer)
    trainer.train()

    replayed = [line for lines in lines_of(tmp_path) for line in lines if line["replayed"]]
    assert [sum(line["replayed"] for line in lines) for lines in lines_of(tmp_path)] == [0] + [4] * 7
    for line in replayed:
        then = asked[line["written_at"]]
        assert line["written_at"] < line["step"] and abs(line["advantage"]) <= 5
        assert line["reward"] == then[line["id"], line["prompt"], line["completion"]]
        assert dict(line["rewards"]) == {"noted": line["reward"]}
    buffer = trainer.memory.buffer
    held = {experience.step for key in buffer.prompts() for experience in buffer.stored(key)}
    assert {line["written_at"] for line in replayed} - held
    assert len({line["id"] for line in replayed}) > 1


# Bounds


@given(st.integers(2, 50), st.integers(0, 5000))
def test_the_files_are_bounded_and_spread_over_the_run(files, number):
    step = stride(number, files)
    kept = [n for n in range(number + 1) if n % step == 0]
    assert len(kept) <= files
    assert step == 1 or len(kept) > files // 2
    assert kept[0] == 0 and number - kept[-1] < step
    if number:  # what is kept now was kept before
        assert step % stride(number - 1, files) == 0


@pytest.mark.parametrize(("size", "kept"), [(8, [0, 8]), (12, [0, 4, 8]), (1000, list(range(10)))])
@pytest.mark.matrix(cases=1)
def test_older_rollouts_are_thinned_out(tmp_path, size, kept):
    """With 4 completions a rollout: two files at most, three, and all."""
    train(tmp_path, rollout_log_size=size, per_device_train_batch_size=4, max_steps=10)
    assert files_of(tmp_path) == [f"{number:08}.parquet" for number in kept]
    assert [lines[0]["step"] for lines in lines_of(tmp_path)] == kept


# Kills and resumes

JOB = """
trainer: omni_grpo
model_name_or_path: builtin:tiny-omni
dtype: float32
dataset_name: builtin:seven-tags
num_frames: 4
max_pixels: 3136
max_prompt_length: 128
max_completion_length: 14
num_generations: 4
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
max_steps: 6
learning_rate: 1.0e-3
logging_steps: 1
save_steps: 2
report_to: none
bf16: false
use_cpu: true
disable_tqdm: true
gradient_checkpointing: false
seed: 4
rewards: ["ending:ending"]
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    with folder_with_ending(tmp_path_factory.mktemp("job")) as folder:
        (folder / "job.yaml").write_text(JOB)
        yield folder


def process(*words, processes=1, **environment):
    """The exit status and what was printed."""
    log = Path(f"{words[1]}.log")
    command = ["-m", "maple_trl.cli", "train", "--config", "job.yaml", *words]
    return Ranks(processes, command, log, environment).wait(), log.read_text()


@pytest.mark.long
def test_a_killed_run_goes_on_without_a_step_twice(job):
    run(*parse_args(["--config", "job.yaml", "--output_dir", "whole"]), last=False)
    # In the fifth rollout: the checkpoint is of the fourth step.
    ended = process("--output_dir", "killed", ENDED_AT="6")
    assert ended[0] == -signal.SIGKILL, ended[1][-3000:]
    assert files_of("killed") == [f"{number:08}.parquet" for number in range(5)]
    with open("killed/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"loss": 0.1, "st')  # as a kill in the middle of a line leaves it
    stale = Path("killed/rollouts/00000005.parquet")
    stale.write_bytes(b"of the run that was stopped")
    run(
        *parse_args(["--config", "job.yaml", "--output_dir", "killed", "--resume_from_checkpoint", "true"]), last=False
    )
    assert files_of("killed") == files_of("whole") == [f"{number:08}.parquet" for number in range(6)]
    assert lines_of("killed") == lines_of("whole")
    for name in ("killed", "whole"):
        entries = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6, 6]
    # A run that begins anew in the same folder does not keep what another left there.
    run(
        *parse_args(["--config", "job.yaml", "--output_dir", "killed", "--max_steps", "1", "--overwrite", "true"]),
        last=False,
    )
    assert files_of("killed") == ["00000000.parquet"]


@pytest.mark.long
def test_two_processes_write_one_file_with_all_completions(job):
    ended = process("--output_dir", "shared", "--max_steps", "2", "--save_strategy", "no", processes=2)
    assert ended[0] == 0, ended[1][-3000:]
    lines = lines_of("shared")
    assert [len(part) for part in lines] == [16, 16]  # 8 of each process
    for part in lines:
        assert set(Counter(line["group"] for line in part).values()) == {4}
        # Completions, rewards and rows are put together in the same order.
        expected = accuracy_reward(
            completions=[[{"role": "assistant", "content": line["completion"]}] for line in part],
            solution=[line["solution"] for line in part],
        )
        assert [line["reward"] for line in part] == expected
    entries = [json.loads(line) for line in Path("shared/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 2]
    # What a machine may keep is for all of its processes.
    assert entries[0]["memory/host_budget"] == machine_memory() // 2 // 2
