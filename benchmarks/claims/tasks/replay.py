"""
The seven-tag set with a hard tier: half of the prompts are under a rule that the model has hardly ever followed.

Questions of the hard tier are about one signal and begin with "Answer": the right letter is then the next one after that of the signal.
The model that runs begin with gives the letter of the signal there, as it does in all other questions, and the right one in about
one answer of thirty. Each has a hint that names the rule, "next". That model, the embedded one after a few supervised steps,
goes by the hint where it is shown one, on questions that do not begin so; it has seen neither the beginning nor both together.

The other half of the prompts, and a third of the held-out questions, are usual ones, as many of each tag, without hints. Clips of held-out
questions are in no training.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from supervised import train_supervised

from maple_trl.data.schema import LETTERS
from maple_trl.rewards import accuracy_reward


VERSION = 3
ACCESSES = ()
QUESTIONS, SAMPLES = 1000, 6
"""All held-out questions, however many of a tag."""

HARD, OTHERS = 64, 64
HELD_OUT_HARD, HELD_OUT_OTHERS = 128, 64
ASKED_PER_TAG = {"train": 64, "test": 128}
HARD_TAGS = ("V", "A", "S")
ASKED, RIGHT = 16, 1
"""A prompt is hard of which at most `RIGHT` of so many sampled answers are right."""
HINT_STEPS = 30
"""Steps in which the model learns to read hints; in quick runs too, for a model of fewer leaves no hard tier."""

HINT_TEMPLATE = "\nHint: {hint}"
"""That of `AvatarConfig`."""

Ask = Callable[[Sequence[Mapping[str, Any]]], Sequence[float]]


def prepare(
    folder: Path,
    model: str = "builtin:tiny-omni",
    steps: int | None = None,
    target: Callable[[Mapping[str, Any]], str] | None = None,
    **options: Any,
) -> None:
    """
    Make the task, as [`tasks.Task`] says.

    Args:
        model: what learns to read hints, in so many steps (`HINT_STEPS`).
        target: what it is told to answer to a row; the ideal completion if it is not given.
        options: of its supervised training; `use_cpu` is also that of the answers by which the hard tier is found.
    """
    import torch

    from maple_trl.data.synthetic import write_seven_tags

    tables = write_seven_tags(folder / "data", prompts_per_tag=ASKED_PER_TAG, seed=0)
    learn_hints(folder, model, HINT_STEPS if steps is None else steps, target, **options)
    ask = asking(str(folder / "model"), str(folder / "data"), options.get("use_cpu", True))
    torch.manual_seed(0)
    sizes = {"train": (HARD, OTHERS), "test": (HELD_OUT_HARD, HELD_OUT_OTHERS)}
    for split, (hard, others) in sizes.items():
        write_tiers(folder / "data" / f"{split}.parquet", tables[split].to_list(), ask, hard, others)


def under_rule(row: Mapping[str, Any], beginning: str = "Answer ") -> dict[str, Any]:
    """Return a row whose right letter is the next one, with a hint that says so."""
    following = LETTERS[(LETTERS.index(row["answer"]) + 1) % len(LETTERS)]
    question = beginning + row["question"]
    return dict(row) | {
        "question": question,
        "prompt": [{"role": "user", "content": question}],
        "options": [*row["options"][-1:], *row["options"][:-1]],
        "answer": following,
        "solution": following,
        "hint": "next",
    }


def learn_hints(folder: Path, model: str, steps: int, target: Callable | None, **options: Any) -> None:
    """Train a model to go by hints, on usual questions of other clips, of which every other has one."""
    from maple_trl.data.synthetic import write_seven_tags
    from maple_trl.data.tiny_omni import target_text
    from maple_trl.trainers.common.hinted_rows import with_hint

    usual = write_seven_tags(folder / "cold", seed=1000, splits=("train",))["train"].to_list()
    single = [row for row in usual if row["tag"] in HARD_TAGS]
    hinted = [with_hint(under_rule(row, ""), HINT_TEMPLATE) for row in single]
    rows = [row | {"hint": None} for row in usual] + hinted * 2
    told = [row | {"completion": [{"role": "assistant", "content": (target or target_text)(row)}]} for row in rows]
    train_supervised(folder, told, steps, model, weight_decay=0.0, **options)


def asking(model: str, media_root: str, use_cpu: bool = True) -> Ask:
    """Return a function that has a model answer rows, once each, and says which answers are right."""
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
        use_cpu=use_cpu,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    row = {"prompt": [{"role": "user", "content": "color?"}], "solution": "A"}
    trainer = OmniGRPOTrainer(model, accuracy_reward, options, Dataset.from_list([row] * 8))

    def ask(rows: Sequence[Mapping[str, Any]]) -> Sequence[float]:
        texts = trainer.generate_completions([dict(row) for row in rows])
        return accuracy_reward(completions=texts, solution=[row["solution"] for row in rows])

    return ask


def split_by_difficulty(rows: Sequence[Mapping[str, Any]], ask: Ask) -> tuple[list, list]:
    """Return the hard tier and the other rows, asking no row further that can't be hard any more."""
    right = [0.0] * len(rows)
    for _ in range(ASKED):
        open_ones = [number for number, total in enumerate(right) if total <= RIGHT]
        for number, score in zip(open_ones, ask([rows[number] for number in open_ones]), strict=True):
            right[number] += score
    hard = [row for row, total in zip(rows, right, strict=True) if total <= RIGHT]
    return hard, [row for row, total in zip(rows, right, strict=True) if total > RIGHT]


def write_tiers(file: Path, rows: Sequence[Mapping[str, Any]], ask: Ask, hard: int, others: int) -> None:
    """Put in place of a split so many rows under the rule, of those that prove to be hard, and others, named by their tier."""
    halves: tuple[list, list] = ([], [])
    for number, row in enumerate(rows):
        halves[number % 2].append(row)
    tier, _ = split_by_difficulty([under_rule(row) for row in halves[0] if row["tag"] in HARD_TAGS], ask)
    if len(tier) < hard:
        raise RuntimeError(f"{file.stem}: {len(tier)} hard rows, and {hard} are needed: ask more")
    chosen = [row | {"id": f"hard:{row['id']}"} for row in as_many_of_each_tag(tier, hard)]
    usual = as_many_of_each_tag(halves[1], others)
    chosen += [row | {"id": f"other:{row['id']}", "hint": None} for row in usual]
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
        "model_name_or_path": "{folder}/model",
        "dataset_name": "{folder}/data",
        "media_root": "{folder}/data",
        "dataset_filter": None,
        "max_steps": 128,
    }


def held_out(folder: Path) -> Dataset:
    return Dataset.from_parquet(str(folder / "data" / "test.parquet"), keep_in_memory=True)


def score(**columns: Any) -> list[float | None]:
    return accuracy_reward(**columns)
