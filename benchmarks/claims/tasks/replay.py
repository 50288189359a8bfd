"""
The seven-tag set with a hard tier: half of the prompts are such as the embedded model answers rightly at most once in 16 samples.

Runs begin with the embedded model. The other half of the prompts, and a third of the held-out questions, are drawn from the rest, as
many of each tag. Held-out questions of the hard tier were found in the same way, among clips that no run trains on.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from maple_trl.rewards import accuracy_reward


VERSION = 2
ACCESSES = ()
QUESTIONS, SAMPLES = 1000, 6
"""All held-out questions, however many of a tag."""

HARD, OTHERS = 64, 64
HELD_OUT_HARD, HELD_OUT_OTHERS = 128, 64
ASKED_PER_TAG = {"train": 320, "test": 512}
BLOCK = 448
COLD_STEPS, RIGHT = 16, 1
"""A prompt is hard of which at most `RIGHT` of so many sampled answers are right; what is prepared by fewer is no evidence."""

Ask = Callable[[Sequence[Mapping[str, Any]]], Sequence[float]]


def prepare(folder: Path) -> None:
    import torch

    from maple_trl.data.synthetic import write_seven_tags

    tables = write_seven_tags(folder / "data", prompts_per_tag=ASKED_PER_TAG, seed=0)
    ask = asking(str(folder / "data"))
    torch.manual_seed(0)
    sizes = {"train": (HARD, OTHERS), "test": (HELD_OUT_HARD, HELD_OUT_OTHERS)}
    for split, (hard, others) in sizes.items():
        write_tiers(folder / "data" / f"{split}.parquet", tables[split], ask, hard, others)


def asking(media_root: str) -> Ask:
    """Return a function that has the embedded model answer rows, once each, and says which answers are right."""
    from tempfile import mkdtemp

    from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
    from maple_trl.trainers.omni_grpo.trainer import OmniGRPOTrainer

    options = OmniGRPOConfig(
        output_dir=mkdtemp(prefix="claims-replay-"),
        media_root=media_root,
        num_frames=4,
        max_completion_length=14,
        per_device_eval_batch_size=448,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    row = {"prompt": [{"role": "user", "content": "color?"}], "solution": "A"}
    trainer = OmniGRPOTrainer("builtin:tiny-omni", accuracy_reward, options, Dataset.from_list([row] * 8))

    def ask(rows: Sequence[Mapping[str, Any]]) -> Sequence[float]:
        texts = trainer.generate_completions([dict(row) for row in rows])
        return accuracy_reward(completions=texts, solution=[row["solution"] for row in rows])

    return ask


def split_by_difficulty(rows: Sequence[Mapping[str, Any]], ask: Ask) -> tuple[list, list]:
    """Return the hard tier and the other rows, asking no row further that can't be hard any more."""
    right = [0.0] * len(rows)
    for _ in range(COLD_STEPS):
        open_ones = [number for number, total in enumerate(right) if total <= RIGHT]
        for number, score in zip(open_ones, ask([rows[number] for number in open_ones]), strict=True):
            right[number] += score
    hard = [row for row, total in zip(rows, right, strict=True) if total <= RIGHT]
    return hard, [row for row, total in zip(rows, right, strict=True) if total > RIGHT]


def write_tiers(file: Path, rows: Dataset, ask: Ask, hard: int, others: int) -> None:
    """Put in place of a split so many of its hard rows and of its others, with hints, named by their tier."""
    from maple_trl.data.synthetic import add_hints

    asked, tier, rest = add_hints(rows).to_list(), [], []
    for first in range(0, len(asked), BLOCK):
        hard_ones, other_ones = split_by_difficulty(asked[first : first + BLOCK], ask)
        tier, rest = tier + hard_ones, rest + other_ones
        if len(tier) >= hard:
            break
    else:
        raise RuntimeError(f"{file.stem}: {len(tier)} hard rows of {len(asked)}, and {hard} are needed: ask more")
    chosen = [row | {"id": f"hard:{row['id']}"} for row in tier[:hard]]
    chosen += [row | {"id": f"other:{row['id']}"} for row in as_many_of_each_tag(rest, others)]
    random.Random(0).shuffle(chosen)
    Dataset.from_list(chosen).to_parquet(str(file))


def as_many_of_each_tag(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Return so many rows, taking one of each tag in turn."""
    by_tag: dict[str, list] = defaultdict(list)
    for row in rows:
        by_tag[row["tag"]].append(row)
    turns = [row for turn in range(count) for own in by_tag.values() for row in own[turn : turn + 1]]
    return turns[:count]


def options(trainer: str) -> Mapping[str, Any]:
    return {
        "model_name_or_path": "builtin:tiny-omni",
        "dataset_name": "{folder}/data",
        "media_root": "{folder}/data",
        "dataset_filter": None,
        "max_steps": 128,
    }


def held_out(folder: Path) -> Dataset:
    return Dataset.from_parquet(str(folder / "data" / "test.parquet"), keep_in_memory=True)


def score(**columns: Any) -> list[float | None]:
    return accuracy_reward(**columns)
