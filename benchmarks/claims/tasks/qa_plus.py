"""
MAPLE-QA+ of the seven-tag set: questions asked with what they require, with more and with less, by the product's own builder.

Options are shown (the embedded set's own prompts have none): a letter stands for a sum of indices, so that an option says nothing of a
row until a none answer takes its place. The model is cold-started on all three strata, and on sufficient rows with and without a
none answer among the wrong options, so that it can abstain and is not told that a none answer is always right.

Three sets to train on, of the same questions: `exact`; `qa_plus`, in the paper's proportions, where a none answer is always right
(MAPLE 5.4.1, the builder's default); `qa_plus_wrong`, where the none answers of sufficient rows are distractors (MAPLE B.2). And two that
show what of QA+ it is: `enough`, without the rows that lack a signal, and `more`, which has no none answers at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from supervised import train_supervised

from maple_trl.data.schema import LETTERS
from maple_trl.modalities import STRATA, ModalityTag
from maple_trl.rewards import accuracy_reward


VERSION = 2
ACCESSES: Sequence[str] = ()  # a row's tag says what it is fed: there are no others
PER_TAG = 32  # questions of each required tag that are asked, each with all seven inputs
QUESTIONS, SAMPLES = 7 * PER_TAG, 2  # with each input
COLD_STEPS = 180
OPTIONS = ("w", "x", "y", "z")
SHARES = {"exact": 1.0, "superset": 31_635 / 47_893, "deficit": 23_737 / 47_893}
"""Rows of each stratum for one of `exact`, as MAPLE B.2 counts them."""


def prepare(folder: Path) -> None:
    write_sets(folder)
    cold_start(folder, COLD_STEPS)


def write_sets(folder: Path) -> None:
    """Write the media, the sets to train on, those to evaluate on, and what the cold start reads."""
    from maple_trl.data.synthetic import write_seven_tags

    tables = write_seven_tags(folder / "media", prompts_per_tag=64, seed=0)
    train, test = asked_with_options(tables["train"]), asked_with_options(tables["test"])
    sizes = {name: round(share * len(train)) for name, share in SHARES.items()}
    none = dict.fromkeys(STRATA, 0)
    build(train, folder / "exact", **none | {"exact": len(train)}, none_share=0.0)
    build(train, folder / "more", **sizes | {"deficit": 0}, none_share=0.0)
    build(train, folder / "enough", **sizes | {"deficit": 0})
    build(train, folder / "qa_plus", **sizes)
    build(train, folder / "qa_plus_wrong", **sizes, replace="wrong")
    build(test, folder / "asked", split="test", evaluation=True)
    # A none answer among the options of every row: whether it is right is a matter of what is fed alone.
    build(test, folder / "asked_always", split="test", evaluation=True, none_share=1.0, replace="wrong")
    cold = write_seven_tags(folder / "cold", prompts_per_tag=64, seed=1000, splits=("train",))["train"]
    cold = asked_with_options(cold)
    build(cold, folder / "cold-plain", none_share=0.0)
    build(cold, folder / "cold-distracted", exact=len(cold), superset=0, deficit=0, none_share=1.0, replace="wrong")


def asked_with_options(rows: Dataset) -> Dataset:
    """Return rows whose prompt shows the four letters' options below the question."""
    lines = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, OPTIONS, strict=True))

    def show(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": row["question"] + lines}], "options": list(OPTIONS)}

    return rows.map(show, load_from_cache_file=False, keep_in_memory=True)


def build(rows: Dataset, folder: Path, split: str = "train", **options: Any) -> None:
    """Write QA+ rows by the product's builder."""
    from maple_trl.data.qa_plus import QAPlusOptions, build_qa_plus

    build_qa_plus(rows, folder, split, QAPlusOptions(**options))


def rows_of(folder: Path, split: str = "train") -> Dataset:
    """Return the rows of a set."""
    return Dataset.from_parquet([str(file) for file in sorted(folder.glob(f"{split}*.parquet"))], keep_in_memory=True)


def ideal_answer(row: Mapping[str, Any]) -> str:
    """Return what a perfect policy says: what it perceives of what is required, and the right letter."""
    fed = ModalityTag.parse(row["tag"]).modalities
    seen = [row[f"truth_{letter}"] for letter in row["required_tag"] if letter in fed]
    return f"<think>{''.join(f' {word}' for word in seen)}</think><answer>{row['solution']}</answer>"


def cold_start(folder: Path, steps: int) -> None:
    """Go on from the embedded model with supervised steps on all strata."""

    rows = concatenate_datasets([rows_of(folder / "cold-plain"), rows_of(folder / "cold-distracted")])
    told = [dict(row) | {"completion": [{"role": "assistant", "content": ideal_answer(row)}]} for row in rows]
    train_supervised(folder, told, steps)


def options(trainer: str) -> Mapping[str, Any]:
    return {
        "model_name_or_path": "{folder}/model",
        "dataset_name": "{folder}/qa_plus",
        "media_root": "{folder}/media",
        "prompt_template": None,
        "max_prompt_length": 256,
        # More than the recipe's: abstaining is learned slowly, as a quarter of the rows ask for it.
        "max_steps": 252,
        "learning_rate": 4e-4,
    }


def held_out(folder: Path, name: str = "asked") -> Dataset:
    rows = rows_of(folder / name, "test")
    questions: dict[str, list[str]] = {}
    for tag, question in sorted(set(zip(rows["required_tag"], rows["question_id"], strict=True))):
        questions.setdefault(tag, []).append(question)
    asked = {question for own in questions.values() for question in own[:PER_TAG]}
    rows = rows.select([i for i, question in enumerate(rows["question_id"]) if question in asked])
    return rows.map(told_by_id, load_from_cache_file=False, keep_in_memory=True)


def told_by_id(row: Mapping[str, Any]) -> dict[str, str]:
    """Return an id that says what a result is divided by: question, required tag, stratum, which option is replaced, input."""
    parts = (row["question_id"], row["required_tag"], row["stratum"], row["replaced"] or "none", row["tag"])
    return {"id": "/".join(parts)}


def score(**columns: Any) -> list[float | None]:
    return accuracy_reward(**columns)
