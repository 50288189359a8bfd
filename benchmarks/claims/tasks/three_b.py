"""
Rows of the seven tags with clips of half a minute, and a Thinker of Qwen2.5-Omni-3B's sizes with random weights: for step times alone.

- **Clips.** Those of the seven-tag set, drawn out: `SECONDS` pictures of `SIDE` x `SIDE` pixels, one a second, and as many seconds of sound.
  A row that is fed all has about 1 770 prompt tokens, of which 960 are of the pictures and 750 of the sound.
- **Model.** bfloat16, all weights trained, towers too, with gradient checkpointing. It has the tiny model's tokenizer in a vocabulary of the
  real size, never ends a completion by itself, and so generates `COMPLETION` tokens each time.
- **Rewards.** Drawn, for such a model is never right: of every other row of a tag all completions are rewarded alike, which is what
  early filtering leaves out. The share is stated here and not found: what is measured is what leaving out half of the prompts saves.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from devices import CUDA

from maple_trl.rewards import accuracy_reward


VERSION = 1
DEVICE = CUDA
ACCESSES = ()
QUESTIONS, SAMPLES = 1, 1  # nothing is asked of random weights: it is in the result of every run

SIZES: dict[str, Any] = {
    "real": True,
    "hidden": 2048,
    "layers": 36,
    "heads": 16,
    "kv_heads": 2,
    "vocab": 151_936,
    "tower": 1280,
    "tower_layers": 32,
}
"""Qwen2.5-Omni-3B's, as `benchmarks/gpu.py` has them: the Thinker has 4.7 B parameters."""
MEL_BINS = 128
SECONDS, SIDE = 30, 224
PROMPTS_PER_TAG = ROLLOUT = 16
"""Prompts of a rollout: an epoch has one of each tag."""
COMPLETION = 256
BENCHMARKS = Path(__file__).resolve().parents[2]


def prepare(folder: Path) -> None:
    write_rows(folder / "data")
    write_model(folder / "model")


def write_rows(folder: Path) -> None:
    """Write the seven-tag set with long clips in place of its own; every other row of a tag is named `alike`."""
    from maple_trl.data.synthetic import FRAME_SIDE, draw_frames, make_tone, write_clip, write_seven_tags

    rng = np.random.default_rng(0)
    counts = {"train": PROMPTS_PER_TAG, "test": QUESTIONS}
    for split, rows in write_seven_tags(folder, counts, seed=0, clips_per_pair=1).items():
        for clip, row in {row["video"]: row for row in rows}.items():
            frames = np.concatenate([draw_frames(row["truth_V"], rng) for _ in range(-(-SECONDS // 4))])[:SECONDS]
            larger = frames.repeat(SIDE // FRAME_SIDE, axis=1).repeat(SIDE // FRAME_SIDE, axis=2)
            tone = make_tone(row["truth_A"], rng)
            write_clip(folder / clip, larger, np.resize(tone, SECONDS * 16_000), frame_rate=1)
        seen: dict[str, int] = {}
        named = []
        for row in rows:
            place = seen[row["tag"]] = seen.get(row["tag"], -1) + 1
            named.append(row | {"id": f"{row['id']}-{'alike' if place % 2 else 'varied'}"})
        Dataset.from_list(named).to_parquet(str(folder / f"{split}.parquet"))


def write_model(folder: Path) -> None:
    """Write the model and a processor whose sound has as many bands as the model's."""
    from transformers import WhisperFeatureExtractor

    from maple_trl.data.tiny_omni import build_processor

    sys.path[:0] = [str(BENCHMARKS)]
    import _shared_prefix_model

    asked = argparse.Namespace(**SIZES, seed=0, device=DEVICE, train_towers=True)
    model, _ = _shared_prefix_model.make_model(asked)
    model.save_pretrained(folder, max_shard_size="2GB")
    processor = build_processor()
    processor.feature_extractor = WhisperFeatureExtractor(
        feature_size=MEL_BINS, sampling_rate=16_000, return_attention_mask=True
    )
    processor.save_pretrained(folder)


def options(trainer: str) -> Mapping[str, Any]:
    return {
        "model_name_or_path": "{folder}/model",
        "dataset_name": "{folder}/data",
        "media_root": "{folder}/data",
        "dtype": "bfloat16",  # of the weights, and so of what they compute
        "gradient_checkpointing": True,
        "shared_prefix": "on",
        "num_frames": SECONDS,
        "max_pixels": SIDE * SIDE,
        "max_prompt_length": 2048,
        "max_completion_length": COMPLETION,
        "generation_kwargs": {"min_new_tokens": COMPLETION},
        # A micro-batch is a prompt's 8 completions, which pass the model together; two updates a rollout.
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": ROLLOUT // 2,
        "steps_per_generation": ROLLOUT,
        "max_steps": 2 * 7 * PROMPTS_PER_TAG // ROLLOUT,
        "learning_rate": 2e-6,
        "reward_funcs": ["tasks.three_b:drawn_reward"],
        "reward_weights": None,
    }


def held_out(folder: Path) -> Dataset:
    return Dataset.from_parquet(str(folder / "data" / "test.parquet"), keep_in_memory=True)


def score(**columns: Any) -> list[float | None]:
    return accuracy_reward(**columns)


def drawn_reward(completion_ids: Sequence[Sequence[int]], id: Sequence[str], **columns: Any) -> list[float]:
    """Reward half of the completions, by what they say, and none of a row that is named `alike`."""
    return [
        0.0 if name.endswith("alike") else float(zlib.crc32(repr(list(tokens)).encode()) % 2)
        for tokens, name in zip(completion_ids, id, strict=True)
    ]
