"""
The seven-tag set with a hard tier: more than half of the prompts are under rules that the model seldom follows.

Questions of the hard tier are about one signal and begin with a word that ordinary ones lack. Each of three words has a rule: the
right letter is the next one after that of the signal ("Answer"), the opposite one ("Which"), or the one before ("What"), the four
letters lying in a circle. With three signals that is nine things to find, so that no single find decides a run. Each question has a
hint that names its rule, by a word of its own.

The model that runs begin with is the embedded one after a few supervised steps. It goes by hints where it is shown one, whichever
word the question begins with: it was told each hint with every word, and with none, equally often. Where a question begins with one
of the words and has no hint, it gives the letter of the signal, and now and then one of the three others: it was told one of these at
random in a share `SLIPS` of such rows, of all words and signals alike. So it was told nothing of which word has which rule, and gives
the right letter in one answer of about 25.

The other prompts, and some of the held-out questions, are usual ones, as many of each tag, without hints. Clips of
held-out questions are in no training.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from supervised import train_supervised

from maple_trl.data.schema import LETTERS
from maple_trl.rewards import accuracy_reward


VERSION = 4
ACCESSES = ()
QUESTIONS, SAMPLES = 1000, 6
"""All held-out questions, however many of a tag."""

HARD, OTHERS = 72, 56
HELD_OUT_HARD, HELD_OUT_OTHERS = 288, 63
ASKED_PER_TAG = {"train": 96, "test": 320}
HARD_TAGS = ("V", "A", "S")
RULES = {"Answer ": ("next", 1), "Which ": ("opposite", 2), "What ": ("before", 3)}
"""How questions under a rule begin, what hints call it, and by how many letters it moves the right one."""
SLIPS = 0.18
"""Share of rows that begin so, of which the model is told another letter than the signal's: each of the three in 6 %."""
ASKED, RIGHT = 16, 1
"""A prompt is hard of which at most `RIGHT` of so many sampled answers are right."""
HINT_STEPS = 75
"""Steps in which the model learns to read hints, and to slip; in quick runs too, for a model of fewer leaves no hard tier."""

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


def begun(row: Mapping[str, Any], beginning: str, answer: str) -> dict[str, Any]:
    """Return a row whose question begins with a word, and whose right letter is a given one."""
    question = beginning + row["question"]
    prompt = [{"role": "user", "content": question}]
    return dict(row) | {"question": question, "prompt": prompt, "answer": answer, "solution": answer, "hint": None}


def under_rule(row: Mapping[str, Any], rule: str, beginning: str | None = None) -> dict[str, Any]:
    """
    Return a row whose right letter is the one that a rule says, with a hint that names it.

    Args:
        rule: the beginning in `RULES` that has it.
        beginning: with which the question begins instead; `""` for none.
    """
    hint, shift = RULES[rule]
    answer = LETTERS[(LETTERS.index(row["answer"]) + shift) % len(LETTERS)]
    options = [*row["options"][-shift:], *row["options"][:-shift]]
    return begun(row, rule if beginning is None else beginning, answer) | {"options": options, "hint": hint}


def slipping(row: Mapping[str, Any], beginning: str) -> dict[str, Any]:
    """Return a row that begins as those under a rule do, without one: its letter is the signal's, or another in a share `SLIPS`."""
    draw = random.Random(f"slip {row['id']} {beginning}")
    others = [letter for letter in LETTERS if letter != row["answer"]]
    return begun(row, beginning, draw.choice(others) if draw.random() < SLIPS else row["answer"])


def learn_hints(folder: Path, model: str, steps: int, target: Callable | None, **options: Any) -> None:
    """
    Train a model on rows of other clips: usual ones; with a hint, and the letter that this names, each hint with every beginning; and
    with a beginning alone, whose letters tell nothing of a rule.
    """
    from maple_trl.data.synthetic import write_seven_tags
    from maple_trl.data.tiny_omni import target_text
    from maple_trl.trainers.common.hinted_rows import with_hint

    def told(rows: Sequence[Mapping[str, Any]], target: Callable) -> list[dict[str, Any]]:
        return [dict(row) | {"completion": [{"role": "assistant", "content": target(row)}]} for row in rows]

    usual = write_seven_tags(folder / "cold", seed=1000, splits=("train",))["train"].to_list()
    single = [row for row in usual if row["tag"] in HARD_TAGS]
    beginnings = itertools.cycle(["", *RULES])
    hinted = [with_hint(under_rule(row, rule, next(beginnings)), HINT_TEMPLATE) for rule in RULES for row in single]
    plain = [slipping(row, beginning) for beginning in RULES for row in single]
    rows = told([row | {"hint": None} for row in usual] + hinted * 2, target or target_text) + told(plain, target_text)
    train_supervised(folder, rows, steps, model, weight_decay=0.0, **options)


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
    """
    Put in place of a split so many rows under rules, of those that prove to be hard, and others, named by their tier.

    There are as many under each rule of each tag.

    Raises:
        RuntimeError: if too few under a rule of a tag are hard.
    """
    halves: tuple[list, list] = ([], [])
    for number, row in enumerate(rows):
        halves[number % 2].append(row)
    single = [row for row in halves[0] if row["tag"] in HARD_TAGS]
    ruled = [under_rule(row, beginning) for row, beginning in zip(single, itertools.cycle(RULES), strict=False)]
    tier, _ = split_by_difficulty(ruled, ask)
    kinds = Counter((row["hint"], row["tag"]) for row in tier)
    least = -(-hard // (len(RULES) * len(HARD_TAGS)))
    if len(kinds) < len(RULES) * len(HARD_TAGS) or min(kinds.values()) < least:
        raise RuntimeError(f"{file.stem}: of {dict(kinds)} hard rows, {least} of each are needed: ask more")
    chosen = [row | {"id": f"hard:{row['id']}"} for row in as_many_of_each(tier, hard, "hint", "tag")]
    usual = as_many_of_each(halves[1], others, "tag")
    chosen += [row | {"id": f"other:{row['id']}", "hint": None} for row in usual]
    random.Random(0).shuffle(chosen)
    Dataset.from_list(chosen).to_parquet(str(file))


def as_many_of_each(rows: Sequence[Mapping[str, Any]], count: int, *columns: str) -> list[Mapping[str, Any]]:
    """Return so many rows, taking one of each kind in turn; rows are of a kind that are equal in some columns."""
    by_kind: dict[tuple, list] = defaultdict(list)
    for row in rows:
        by_kind[tuple(row[column] for column in columns)].append(row)
    turns = [row for turn in range(count) for own in by_kind.values() for row in own[turn : turn + 1]]
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
