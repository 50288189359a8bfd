"""
Chains of operations over what a clip shows, sounds like and says, which the think text writes down step by step.

A question names the signals that count and then 2 to 5 sums, labelled in their order: `"color word? a+3 b+7 c+1"`. The
register begins with the sum of the signals' indices, each step adds its amount, modulo 8, and the answer is the letter A to H
that the last value stands for. With one amount unknown all letters that it could lead to are equally likely, with one signal
unknown four. Questions of the *easy* tier add 0 to 6, those of the *hard* one add 7 at two of their steps
(so that with two steps the signals alone tell the answer).

    <think> color word: a+3,b+7,c+1. color red=0, pitch x=0, word sun=2. 0+0=0, 0+2=2. a:2+3=5. b:5+7=4. c:4+1=5. so 5=F</think>...
            plan                     evidence                                          steps                     synthesis

The cold start first learns whole chains, then chains that give up: each item (an amount copied, a signal seen, a sum, the letter) is
left open with the same small chance wherever it stands, a sum with 7 nearly always, and what follows from an open item is open. So
the policy that runs begin with writes the form, fails anywhere along it, and hardly ever solves the hard tier, although it
could: both of its sums with 7 must succeed at once, for one alone is not rewarded. (With one of them plain GRPO, from any
start, soon solved it as often as the easy tier.)
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from supervised import train_supervised

from maple_trl.rewards import accuracy_reward


VERSION = 2
ACCESSES = ()
QUESTIONS, SAMPLES = 64, 6

LETTERS = "ABCDEFGH"
LABELS = "abcde"
STEPS = (2, 3, 4, 5)
TIERS = ("easy", "hard")
TRAIN_PER_TAG, TEST_PER_TAG = 16, 64
COLD_CHAINS = 8
COLD_HARD = (0.25, 0.5)
COLD_SLIPS = (0.05, 0.93)
COLD_STEPS = 300
OPEN_SHARE = 80 / 300
"""Of them, those on chains that give up, which come last."""
COLD_RATES = (2e-3, 1e-3)


HARD, HARD_STEPS = 7, 2
"""The amount that so many steps of each question of the hard tier add."""
OPEN = "?"
"""What stands in place of an item that is given up."""


def apply(value: int, operation: str) -> int:
    """Return the register after an operation, such as `"+3"`."""
    return (value + int(operation[1:])) % len(LETTERS)


class Slips:
    """Who gives up: each item with the same chance wherever it stands, a sum with 7 with one of its own."""

    def __init__(self, chance: float, hard: float, rng: random.Random):
        self._chance, self._hard, self._rng = chance, hard, rng

    def __call__(self, hard: bool = False) -> bool:
        """Return whether an item is left open."""
        return self._rng.random() < (self._hard if hard else self._chance)


def chain_of(row: Mapping[str, Any], operations: Sequence[str], slips: Slips | None = None) -> str:
    """
    Return the think text of a row's question, which ends in the letter of the answer.

    With slips items are left open; what follows from an open item is open too.
    """
    from maple_trl.data.synthetic import ATTRIBUTES, NOUNS

    slip = slips or (lambda hard=False: False)
    copied = [operation[0] + (OPEN if slip() else operation[1:]) for operation in operations]
    asked = [modality for modality in ATTRIBUTES if modality.value in row["tag"]]
    plan = "".join(f" {NOUNS[modality]}" for modality in asked)
    plan += ": " + ",".join(f"{label}{operation}" for label, operation in zip(LABELS, copied, strict=False)) + "."
    seen, indices = [], []
    for modality, words in ATTRIBUTES.items():
        word = "x" if modality not in asked or slip() else row[f"truth_{modality.value}"]
        indices.append("0" if word == "x" else str(words.index(word)))
        seen.append(f" {NOUNS[modality]} {word}={indices[-1]}")

    def added(value: str, operation: str) -> str:
        given_up = slip(operation == f"+{HARD}")
        return OPEN if given_up or OPEN in value + operation else str(apply(int(value), operation))

    first, second, third = indices
    partly = added(first, f"+{second}")
    value = added(partly, f"+{third}")
    text = f"{plan}{','.join(seen)}. {first}+{second}={partly}, {partly}+{third}={value}."
    for label, operation in zip(LABELS, copied, strict=False):
        after = added(value, operation)
        text += f" {label}:{value}{operation}={after}."
        value = after
    letter = OPEN if value == OPEN or slip() else LETTERS[int(value)]
    return f"{text} so {value}={letter}"


_FORM = re.compile(
    r"<think>(?P<plan> [a-z ]+: [a-e]\+[\d?](?:,[a-e]\+[\d?])*\.)"
    r"(?P<evidence> color [a-z]+=(\d), pitch [a-z]+=(\d), word [a-z]+=(\d)\.)"
    r" (?P<partly>\d\+\d=[\d?]), (?P<begin>[\d?]\+\d=[\d?])\."
    r"(?P<steps>(?: [a-e]:[\d?]\+[\d?]=[\d?]\.)+) so (?P<last>[\d?])=(?P<letter>[A-H?])"
    r"</think><answer>(?P<answer>[A-H?])</answer>"
)
_STEP = re.compile(r" ([a-e]):([\d?])(\+[\d?])=([\d?])\.")


@dataclass(frozen=True)
class Reading:
    """
    How far a completion is right.

    Attributes:
        well_formed: whether it has the form of a think text, with as many steps as the question asks, and an answer.
        plan, evidence: whether it restates the question, and whether what it names is there and has these indices.
        sums, hard: of each sum but those with 7, and of those, whether it goes on from what is written before, by the operation that is
            asked, to the right value.
        follows: whether the answer is the letter of the value written last.
        answered: whether the answer is right.
        first_error: where it first differs from the right think text, as a share of its length; `None`: nowhere.
    """

    well_formed: bool
    plan: bool
    evidence: bool
    sums: tuple[bool, ...]
    hard: tuple[bool, ...]
    follows: bool
    answered: bool
    first_error: float | None


def read_completion(text: str, row: Mapping[str, Any]) -> Reading:
    """Compare a completion with what is right for a row."""
    told, right = text.partition("</think>")[0], target_text(row["chain"]).partition("</think>")[0]
    same = next((i for i, (a, b) in enumerate(zip(told, right, strict=False)) if a != b), min(len(told), len(right)))
    error = None if told == right else same / len(right)
    answered = accuracy_reward(completions=[text], solution=[row["solution"]]) == [1.0]
    form, ideal = _FORM.fullmatch(text), _FORM.fullmatch(target_text(row["chain"]))
    steps = _STEP.findall(form["steps"]) if form else []
    if form is None or len(steps) != row["steps"]:
        return Reading(False, False, False, (), (), False, answered, error)
    first, second, third = form.group(3, 4, 5)
    partly, value = form["partly"][-1], form["begin"][-1]
    sums = [
        form["partly"] == f"{first}+{second}={apply(int(first), f'+{second}')}",
        partly != OPEN and form["begin"] == f"{partly}+{third}={apply(int(partly), f'+{third}')}",
    ]
    hard: list[bool] = []
    for told_step, asked_step in zip(steps, _STEP.findall(ideal["steps"]), strict=True):
        (label, before, operation, after), (asked_label, _, asked, _) = told_step, asked_step
        follows = (label, before, operation) == (asked_label, value, asked)
        own = hard if asked == f"+{HARD}" else sums
        own.append(follows and OPEN not in before + operation and after == str(apply(int(before), operation)))
        value = after
    letter = LETTERS[int(value) % len(LETTERS)] if value != OPEN else OPEN
    ends = value == form["last"] and letter == form["letter"] == form["answer"]
    return Reading(
        True,
        form["plan"] == ideal["plan"],
        form["evidence"] == ideal["evidence"],
        tuple(sums),
        tuple(hard),
        ends,
        answered,
        error,
    )


def draw_operations(steps: int, tier: str, rng: random.Random) -> list[str]:
    """Draw the operations of a question."""
    odd = rng.sample(range(steps), HARD_STEPS) if tier == "hard" else ()
    return [f"+{HARD if place in odd else rng.randrange(HARD)}" for place in range(steps)]


def with_chain(row: Mapping[str, Any], name: str, steps: int, tier: str, rng: random.Random) -> dict[str, Any]:
    """Return a row of the seven-tag set with a chain of operations on what it asks."""
    operations = draw_operations(steps, tier, rng)
    question = f"{row['question']} " + " ".join(f"{a}{b}" for a, b in zip(LABELS, operations, strict=False))
    chain = chain_of(row, operations)
    row = {column: value for column, value in row.items() if column != "options"}
    return row | {
        "id": f"{name}-{steps}-{tier}",
        "prompt": [{"role": "user", "content": question}],
        "question": question,
        "answer": chain[-1],
        "solution": chain[-1],
        "source": "reasoning",
        "steps": steps,
        "tier": tier,
        "operations": operations,
        "chain": chain,
    }


def with_chains(rows: Sequence[Mapping[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Give each row a chain, with as many of each number of steps and tier within a tag."""
    rng = random.Random(seed)
    seen: dict[str, int] = {}
    cells = [(steps, tier) for tier in TIERS for steps in STEPS]
    for row in rows:
        place = seen[row["tag"]] = seen.get(row["tag"], -1) + 1
        yield with_chain(row, row["id"], *cells[place % len(cells)], rng)


def cold_rows(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Make the rows of the cold start, whole chains and chains that give up; one half is fed its tag's signals, one half all."""
    from maple_trl.data.synthetic import write_seven_tags
    from maple_trl.modalities import ModalityTag

    rng = random.Random(1000)
    rows = write_seven_tags(folder, prompts_per_tag=64, seed=1000, splits=("train",))["train"]
    told: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for part, hard, slips in zip(told, COLD_HARD, (None, Slips(*COLD_SLIPS, rng)), strict=True):
        for row in rows:
            for number in range(COLD_CHAINS):
                tier = "hard" if rng.random() < hard else "easy"
                made = with_chain(row, f"{row['id']}-{number}", rng.choice(STEPS), tier, rng)
                text = target_text(chain_of(made, made["operations"], slips))
                made["completion"] = [{"role": "assistant", "content": text}]
                part.append(made | ({"tag": ModalityTag.VAS.value} if number % 2 else {}))  # says here what is fed
    return told


def target_text(chain: str) -> str:
    """Return the completion that ends a think text by its answer."""
    return f"<think>{chain}</think><answer>{chain[-1]}</answer>"


def prepare(
    folder: Path,
    model: Any = "builtin:tiny-omni",
    steps: int | None = None,
    rates: Sequence[float] = COLD_RATES,
    **training: Any,
) -> None:
    """
    Make the task, as [`tasks.Task`] says.

    Args:
        model: what learns the chains, in so many steps (`COLD_STEPS`) and at the two parts' learning rates.
        training: further options of the supervised training.
    """
    from maple_trl.data.synthetic import write_seven_tags

    counts = {"train": TRAIN_PER_TAG, "test": TEST_PER_TAG}
    for seed, (split, rows) in enumerate(write_seven_tags(folder / "data", counts, seed=0).items()):
        Dataset.from_list(list(with_chains(rows, seed))).to_parquet(folder / "data" / f"{split}.parquet")
    steps = COLD_STEPS if steps is None else steps
    opened = max(1, round(OPEN_SHARE * steps))
    shares = (max(1, steps - opened), opened)
    for part, rows, own, rate in zip(("whole", "open"), cold_rows(folder / "cold"), shares, rates, strict=True):
        model = str(
            train_supervised(
                folder,
                rows,
                own,
                model,
                "model" if part == "open" else "whole-chains",
                learning_rate=rate,
                lr_scheduler_type="constant_with_warmup" if part == "whole" else "linear",
                warmup_steps=10,
                logging_steps=20,
                **training,
            )
        )


def options(trainer: str) -> Mapping[str, Any]:
    return {
        "model_name_or_path": "{folder}/model",
        "dataset_name": "{folder}/data",
        "media_root": "{folder}/data",
        "dataset_filter": None,
        "max_completion_length": 112,
        "hints": False,
        "hint_max_kl": 0.01,  # without hints it has no effect
        "max_steps": 112,
        "per_device_train_batch_size": 32,
        "steps_per_generation": 2,
        "top_k": 8,  # most of the vocabulary was never trained: a long text would hardly ever keep its form
        "temperature": 0.9,
        "learning_rate": 3e-4,
        "reward_funcs": ["format_reward", "accuracy_reward"],
        "reward_weights": [0.1, 0.9],
    }


def held_out(folder: Path) -> Dataset:
    return Dataset.from_parquet(str(folder / "data" / "test.parquet"), keep_in_memory=True)


def score(**columns: Any) -> list[float | None]:
    return accuracy_reward(**columns)
