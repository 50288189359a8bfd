"""
AVATAR's stages on the seven-tag set: a table for each (by its tags), and a model that seldom reasons in the form.

That model is the embedded one, trained further to say the bare letter in three rows of four and, in one, its perceptions and the
letter in the form that is rewarded: what a base model is before a cold start. In a third of the rows that have a hint it is shown,
for the embedded model has never read one, and answers worse where it is. A held-out answer counts in either form, as
benchmarks read answers; rewards read the form alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from supervised import train_supervised

from maple_trl.modalities import ModalityTag
from maple_trl.rewards import accuracy_reward
from maple_trl.rewards.answers import completion_text


VERSION = 6
ACCESSES = ()
QUESTIONS, SAMPLES = 64, 2
PROMPTS_PER_TAG = {"train": 48, "test": 64}
COLD_STEPS, FORM, HINTED = 30, 4, 3
"""Steps in which the base model learns to say the bare letter, and one in how many of its rows has the form, and shows its hint."""

_THINK = re.compile(r"\A<think>(.*?)</think>", re.DOTALL)


def prepare(folder: Path) -> None:
    from maple_trl.data.synthetic import add_hints, write_seven_tags
    from maple_trl.data.tiny_omni import target_text
    from maple_trl.trainers.common.hinted_rows import with_hint

    for split, rows in write_seven_tags(folder / "data", PROMPTS_PER_TAG, seed=0).items():
        add_hints(rows).to_parquet(str(folder / "data" / f"{split}.parquet"))
    rows = add_hints(write_seven_tags(folder / "cold", seed=1000, splits=("train",))["train"])
    told = [
        (with_hint(row, "\nHint: {hint}") if row["hint"] and number % HINTED == 0 else row)
        | {"completion": [{"role": "assistant", "content": row["answer"] if number % FORM else target_text(row)}]}
        for number, row in enumerate(rows)
    ]
    train_supervised(folder, told, COLD_STEPS, weight_decay=0.0)


def options(trainer: str) -> Mapping[str, Any]:
    return {
        "model_name_or_path": "{folder}/model",
        "dataset_name": "{folder}/data",
        "media_root": "{folder}/data",
    }


def held_out(folder: Path) -> Dataset:
    return Dataset.from_parquet(str(folder / "data" / "test.parquet"), keep_in_memory=True)


def score(**columns: Any) -> list[float | None]:
    """Grade answers in the form, and bare ones."""
    texts = [completion_text(completion) for completion in columns["completions"]]
    columns["completions"] = [text if "<" in text else f"<answer>{text}</answer>" for text in texts]
    return accuracy_reward(**columns)


def perception_judge(
    completions: list, tag: list[str], truth_V: list[str], truth_A: list[str], truth_S: list[str], **columns: Any
) -> list[float]:
    """
    Grade the thoughts of completions as a judge would, but exactly: how many of their words are what the row's signals show.

    It stands in for a model that judges: it is right where that would err, and as blind to the answer. Words must be
    those of the tag's signals in their order; one too many costs as much as one that is missing.
    """
    truths = [dict(zip("VAS", row, strict=True)) for row in zip(truth_V, truth_A, truth_S, strict=True)]
    return [
        _perceived(completion_text(completion), [truth[letter] for letter in ModalityTag.parse(of).value])
        for completion, of, truth in zip(completions, tag, truths, strict=True)
    ]


def _perceived(text: str, shown: list[str]) -> float:
    found = _THINK.match(text)
    said = found[1].split() if found else []
    right = sum(own == true for own, true in zip(said, shown, strict=False))
    return right / max(len(said), len(shown))
