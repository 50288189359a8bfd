"""Decoder processes are killed, stopped, or short of memory in the middle of training and of an evaluation."""

import json
import os
import signal
import sys

import faults
import media_files as files
import pytest
import torch
from datasets import Dataset
from eval_runs import SMALL, evaluate, lines_of, result_of
from omni_runs import build_trainer

from maple_trl.omni.media import workers


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="faults are sent through /proc"),
]

QUESTION = [{"role": "user", "content": "what tone"}]
NAMES = ("good0.wav", "victim.flac", "good1.wav", "good2.wav")
PLAIN = {
    "shuffle_dataset": False,
    "media_check": "none",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    for i in range(3):
        files.write_audio(root / f"good{i}.wav", files.tone(0.4 + 0.1 * i, 16000))
    faults.write_long_sound(root / "victim.flac")
    files.write_video(root / "large.mp4", frames=64)
    return root


def rows(names=NAMES):
    """Sounds are heard, clips are seen."""
    seen = {name: name.endswith(".mp4") for name in names}
    return [
        {
            "prompt": QUESTION,
            "audio": None if seen[name] else name,
            "video": name if seen[name] else None,
            "tag": "V" if seen[name] else "A",
            "solution": "A",
        }
        for name in names
    ]


def quarantined(output_dir):
    with open(os.path.join(output_dir, "quarantine.json")) as file:
        return [(entry["path"], entry["reason"], entry["rows"]) for entry in json.load(file)]


@pytest.mark.parametrize(
    ("number", "reason", "prefetch"),
    [
        (signal.SIGKILL, "decoder-crashed", True),
        (signal.SIGKILL, "decoder-crashed", False),
        (signal.SIGSTOP, "decode-timeout", True),
    ],
)
@pytest.mark.matrix(cases=1)
def test_training_goes_on_without_the_row(folder, number, reason, prefetch):
    options = PLAIN | {"media_decode_timeout": 1.5, "media_prefetch": prefetch}
    trainer = build_trainer(folder, Dataset.from_list(rows()), **options)
    with faults.struck(folder / "victim.flac", number) as count:
        trainer.train()
        assert count() == 1  # what was met in the background is not tried again
    assert trainer.state.global_step == 2
    assert quarantined(trainer.args.output_dir) == [("victim.flac", reason, [1])]
    assert [entry["media/quarantined_prompts"] for entry in trainer.state.log_history if "loss" in entry] == [1, 1]
    assert trainer.loader.decodes["audio", str(folder / "good0.wav")] == 1  # decoded before, and not anew


def test_the_check_before_training_loses_the_row_too(folder):
    """Reading a header decodes a little."""
    data = Dataset.from_list(rows(("good0.wav", "good1.wav", "large.mp4", "good2.wav")))
    with faults.struck(folder / "large.mp4", signal.SIGKILL) as count:
        trainer = build_trainer(folder, data, **PLAIN | {"media_check": "probe"})
        hits = count()
    names = [entry[0] for entry in quarantined(trainer.args.output_dir)] if trainer.row_encoder.quarantined else []
    assert names == ["large.mp4"] * min(hits, 1)  # a header is read in a moment, in which no signal may come


def test_a_clip_that_eats_memory_costs_its_row(folder):
    data = Dataset.from_list(rows(("good0.wav", "good1.wav", "large.mp4", "good2.wav")))
    large = {"num_frames": 64, "min_pixels": 1 << 20, "max_pixels": 1 << 21}
    trainer = build_trainer(folder, data, **PLAIN | large | {"media_worker_bytes": workers.LEAST_BYTES})
    trainer.train()
    assert trainer.state.global_step == 2
    assert quarantined(trainer.args.output_dir) == [("large.mp4", "decoder-memory", [2])]


@pytest.mark.long
def test_a_run_that_goes_on_equals_one_that_was_never_stopped(folder, tmp_path):
    def run(name, steps, **options):
        options |= PLAIN | {
            "max_steps": steps,
            "lr_scheduler_type": "constant",
            "save_strategy": "steps",
            "save_steps": 1,
            "seed": 3,
        }
        trainer = build_trainer(folder, Dataset.from_list(rows()), output_dir=str(tmp_path / name), **options)
        trainer.train(resume_from_checkpoint=(tmp_path / name).exists() and bool(os.listdir(tmp_path / name)))
        return trainer

    with faults.struck(folder / "victim.flac", signal.SIGKILL) as count:
        whole = run("whole", 4)
        run("parts", 2)
        assert count() >= 2
    parts = run("parts", 4)  # nothing strikes any more, and the row stays out
    assert parts.state.global_step == 4 and quarantined(tmp_path / "parts") == quarantined(tmp_path / "whole")
    other = parts.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in whole.model.state_dict().items())
    assert not parts.loader.decodes["audio", str(folder / "victim.flac")]


@pytest.mark.matrix(cases=1)
@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "decoder-crashed"), (signal.SIGSTOP, "decode-timeout")]
)
def test_an_evaluation_goes_on_without_the_row(folder, tmp_path, number, reason):
    with open(folder / "eval.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows())
    words = ["--model", "builtin:tiny-omni", *SMALL, "--data", folder / "eval.jsonl", "--samples", "1", "--quiet"]
    words += ["--media-decode-timeout", "1.5", "--batch-size", "2", "--output", tmp_path / "out", "--max-errors", "1"]
    with faults.struck(folder / "victim.flac", number) as count:
        assert evaluate(*words) == 0
        assert count() == 1
    lines = lines_of(tmp_path / "out")
    assert len(lines) == 4
    [named] = [line for line in lines if line["reason"]]
    assert named["reason"] == reason and "victim.flac" in json.dumps(named, default=str)
    assert "decode" in json.dumps(result_of(tmp_path / "out"))
