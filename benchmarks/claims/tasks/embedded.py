"""
The seven-tag set made so that MAPLE's choices differ on it, and the embedded model, cold-started on both kinds of input.

- **Told values.** Where a question is not about the word (tags V, A, VA), the subtitle, which is a signal that it does not need,
  also tells the value of one attribute that is asked: rightly in `REDUNDANT` of these rows, wrongly in `DISTRACTING`. Being fed all
  signals both helps and misleads. Of the other tags subtitles hold the word alone: their signals outside the tag say nothing.
- **Tiers.** Of each tag's questions `HARD_SHARE` begin with "Answer" (column `tier`: `hard`, and the row's id ends so): the right letter
  is then the next one after that of the attributes, a rule that the cold start has never shown.
- **Rewards.** In training, accuracies of a tag are turned around by chance (`NOISE`) and multiplied (`SCALE`). What difficulty and the
  log call `accuracy_reward` is the noisy one before it is scaled. The evaluation has neither.
- **Cold start.** `COLD_STEPS` supervised steps on other clips, two thirds of them on questions with all signals, the others with a tag's own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from supervised import train_supervised

from maple_trl.data.schema import LETTERS
from maple_trl.data.synthetic import ATTRIBUTES, WORDS, write_seven_tags, write_subtitle
from maple_trl.modalities import Modality, ModalityTag
from maple_trl.rewards import accuracy_reward


VERSION = 2
ACCESSES = ("required", "all")
QUESTIONS, SAMPLES = 64, 5
PROMPTS_PER_TAG = 64
COLD_STEPS = 70

REDUNDANT = DISTRACTING = 0.3125
"""Shares of 64 rows: 20 and 20."""
COLD_REDUNDANT = 0.75
HARD_SHARE = 0.125
NOISE = {"V": 0.05, "A": 0.1, "S": 0.2, "VA": 0.05, "VS": 0.1, "AS": 0.2, "VAS": 0.1}
SCALE = {"V": 2.0, "A": 1.0, "S": 0.5, "VA": 0.5, "VS": 2.0, "AS": 1.0, "VAS": 1.0}

START = {"required": (0.6, 0.75), "all": (0.5, 0.7)}
"""Between which the accuracies lie, over all tags, that runs begin with, by what is fed."""
START_OF_A_TAG = (0.3, 0.9)
START_OF_THE_HARD_TIER = 0.25


# Data


def asked_of(row: Mapping[str, Any]) -> list[Modality]:
    """Return the modalities whose values a row's subtitle may tell: those of its tag, where that is not one of them."""
    modalities = ModalityTag.parse(row["tag"]).modalities
    return [] if Modality.SUBTITLE in modalities else sorted(modalities, key=list(Modality).index)


def tell(
    rows: Sequence[dict[str, Any]],
    folder: Path,
    split: str,
    seed: int,
    redundant: float = REDUNDANT,
    distracting: float = DISTRACTING,
) -> list[dict[str, Any]]:
    """Let subtitles tell values of attributes; adds the columns `told` (right, wrong or nothing) and `told_value`."""
    draw = random.Random(f"told {split} {seed}")
    told: list[dict[str, Any]] = [dict(row) | {"told": "", "told_value": ""} for row in rows]
    for tag in ("V", "A", "VA"):
        own = [row for row in told if row["tag"] == tag]
        draw.shuffle(own)
        right, wrong = round(redundant * len(own)), round(distracting * len(own))
        for number, row in enumerate(own[: right + wrong]):
            modality = draw.choice(asked_of(row))
            truth = row[f"truth_{modality.value}"]
            others = [value for value in ATTRIBUTES[modality] if value != truth]
            row["told"], row["told_value"] = ("right", truth) if number < right else ("wrong", draw.choice(others))
            row["subtitle"] = f"{split}/told-{row['truth_S']}-{row['told_value']}.srt"
    values = [value for modality in (Modality.VIDEO, Modality.AUDIO) for value in ATTRIBUTES[modality]]
    for word in WORDS:
        for value in values:
            start = draw.randrange(100)
            write_subtitle(folder / split / f"told-{word}-{value}.srt", f"{word} {value}", start, start + 200)
    return told


def harden(rows: Sequence[dict[str, Any]], seed: int, share: float = HARD_SHARE) -> list[dict[str, Any]]:
    """Put a share of each tag's rows under the rule of the hard tier; adds the column `tier`."""
    draw = random.Random(f"tier {seed}")
    hard = set()
    for tag in ModalityTag:
        own = [row["id"] for row in rows if row["tag"] == tag.value]
        hard |= set(draw.sample(own, round(share * len(own))))
    return [_under_rule(row) if row["id"] in hard else row | {"tier": "usual"} for row in rows]


def _under_rule(row: Mapping[str, Any]) -> dict[str, Any]:
    following = LETTERS[(LETTERS.index(row["answer"]) + 1) % len(LETTERS)]
    question = f"Answer {row['question']}"
    return dict(row) | {
        "id": f"{row['id']}-hard",
        "question": question,
        "prompt": [{"role": "user", "content": question}],
        "options": [*row["options"][-1:], *row["options"][:-1]],
        "answer": following,
        "solution": following,
        "tier": "hard",
    }


def write_set(folder: Path, seed: int, splits: Sequence[str], cold: bool = False) -> dict[str, Dataset]:
    """Write the set into a folder, as `write_seven_tags` does, or what the cold start learns from."""
    tables = {}
    for split, rows in write_seven_tags(folder, PROMPTS_PER_TAG, seed, splits).items():
        shares = (COLD_REDUNDANT, 0.0) if cold else (REDUNDANT, DISTRACTING)
        told = tell(list(rows), folder, split, seed, *shares)
        tables[split] = Dataset.from_list(harden(told, seed, 0.0 if cold else HARD_SHARE))
        pq.write_table(tables[split].data.table, folder / f"{split}.parquet")
    return tables


# Model


def prepare(folder: Path) -> None:
    from maple_trl.data.tiny_omni import target_text

    write_set(folder / "data", 0, ("train", "test"))
    rows = write_set(folder / "cold", 1000, ("train",), cold=True)["train"]
    told = [row | {"completion": [{"role": "assistant", "content": target_text(row)}]} for row in rows]
    told += [row | {"tag": ModalityTag.VAS.value} for row in told for _ in range(2)]  # a tag says here what is fed
    train_supervised(folder, told, COLD_STEPS)


def options(trainer: str) -> Mapping[str, Any]:
    return {
        "model_name_or_path": "{folder}/model",
        "dataset_name": "{folder}/data",
        "media_root": "{folder}/data",
        "reward_funcs": ["format_reward", "tasks.embedded:noisy_accuracy", "tasks.embedded:scale"],
        "reward_weights": [0.1, 1.0, 1.0],
    }


def held_out(folder: Path) -> Dataset:
    return Dataset.from_parquet(str(folder / "data" / "test.parquet"), keep_in_memory=True)


# Rewards


def noisy_accuracy(
    *, completions: Sequence[Any], tag: Sequence[str], trainer_state: Any = None, **columns: Any
) -> list[float | None]:
    """Grade completions in training: of each tag a share is turned around, by a draw that step and completions seed."""
    exact = accuracy_reward(completions=completions, tag=tag, **columns)
    draw = random.Random(f"{getattr(trainer_state, 'global_step', 0)} {list(columns['id'])} {list(completions)}")
    turned = [draw.random() < NOISE[ModalityTag.parse(one).value] for one in tag]
    return [score if score is None or not turn else 1.0 - score for score, turn in zip(exact, turned, strict=True)]


noisy_accuracy.__name__ = "accuracy_reward"  # by which trainers find what says that a task is solved


def scale(*, tag: Sequence[str], **columns: Any) -> list[float | None]:
    """Return what a tag's scale adds to its noisy accuracy, so that the two of them are the accuracy times the scale."""
    scores = noisy_accuracy(tag=tag, **columns)
    return [
        None if score is None else score * (SCALE[ModalityTag.parse(one).value] - 1)
        for score, one in zip(scores, tag, strict=True)
    ]


def score(**columns: Any) -> list[float | None]:
    return accuracy_reward(**columns)
