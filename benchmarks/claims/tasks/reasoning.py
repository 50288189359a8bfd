"""
Chains of operations over what a clip shows, sounds like and says, which the think text writes down step by step.

A question names the signals that count and then 2 to 5 operations, labelled in their order: `"color word? a+3 b*6 c+1"`.
The register begins with the sum of the signals' indices, each operation changes it, modulo 8, and the answer is the letter
A to H that the last value stands for:

    v + c   the sum
    v * c   3 v + c + 1, which no v and c give as their sum

Both are a permutation of the eight values for every c, and of the c for every v: with one operation unknown all eight letters
are equally likely, with one signal unknown four of them. The two don't commute. `*` stands in no question of the *easy* tier
and once in each of the *hard* one.

The cold start learns chains of which each item (an amount copied, a signal, a sum, the letter) is wrong with the same small chance
wherever it stands, and the rest goes on from it; for `*` it has seen nothing but random results. So the policy that runs begin
with writes the form, errs anywhere, and solves the hard tier by chance alone.

    <think> color word: a+3,b*6,c+1. color red=0, pitch x=0, word sun=2. 0+0=0, 0+2=2. a:2+3=5. b:5*6=6. c:6+1=7. so 7=H</think>...
            plan                     evidence                                          steps                     synthesis
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from maple_trl.rewards import accuracy_reward


VERSION = 1
ACCESSES = ()
QUESTIONS, SAMPLES = 64, 4

LETTERS = "ABCDEFGH"
LABELS = "abcde"
STEPS = (2, 3, 4, 5)
TIERS = ("easy", "hard")
TRAIN_PER_TAG, TEST_PER_TAG = 16, 64
COLD_CHAINS = 8
COLD_HARD = 0.5
COLD_SLIPS = 0.06
COLD_STEPS = 300


def apply(value: int, operation: str) -> int:
    """Return the register after an operation, such as `"+3"`."""
    kind, amount = operation[0], int(operation[1:])
    return (value + amount if kind == "+" else 3 * value + amount + 1) % len(LETTERS)


class Slips:
    """Errors of whoever writes a chain: each item wrong with the same chance wherever it stands, and `*` not known at all."""

    def __init__(self, chance: float, rng: random.Random):
        self._chance, self._rng = chance, rng

    def __call__(self, right: int, count: int) -> int:
        """Return one of `count` choices: the right one, or with the chance of an error any other."""
        if self._rng.random() >= self._chance:
            return right
        return (right + self._rng.randrange(1, count)) % count

    def product(self) -> int:
        """Return what is written for `*`: any value."""
        return self._rng.randrange(len(LETTERS))


def chain_of(row: Mapping[str, Any], operations: Sequence[str], slips: Slips | None = None) -> str:
    """
    Return the think text of a row's question, which ends in the letter of the answer.

    With slips each item goes on from what is written, right or wrong: a copied amount, a signal, a sum, a letter.
    """
    from maple_trl.data.synthetic import ATTRIBUTES, NOUNS

    slip = slips or (lambda right, count: right)
    count = len(LETTERS)
    copied = [f"{operation[0]}{slip(int(operation[1:]), count)}" for operation in operations]
    asked = [modality for modality in ATTRIBUTES if modality.value in row["tag"]]
    plan = "".join(f" {NOUNS[modality]}" for modality in asked)
    plan += ": " + ",".join(f"{label}{operation}" for label, operation in zip(LABELS, copied, strict=False)) + "."
    seen, indices = [], []
    for modality, words in ATTRIBUTES.items():
        index = slip(words.index(row[f"truth_{modality.value}"]), len(words)) if modality in asked else 0
        seen.append(f" {NOUNS[modality]} {words[index] if modality in asked else 'x'}={index}")
        indices.append(index)
    first, second, third = indices
    partly = slip(first + second, count)
    value = slip((partly + third) % count, count)
    text = f"{plan}{','.join(seen)}. {first}+{second}={partly}, {partly}+{third}={value}."
    for label, operation in zip(LABELS, copied, strict=False):
        known = slips is None or operation[0] == "+"
        after = slip(apply(value, operation), count) if known else slips.product()
        text += f" {label}:{value}{operation}={after}."
        value = after
    return f"{text} so {value}={LETTERS[slip(value, count)]}"


_FORM = re.compile(
    r"<think>(?P<plan> [a-z ]+: [a-e][+*]\d(?:,[a-e][+*]\d)*\.)"
    r"(?P<evidence> color [a-z]+=(\d), pitch [a-z]+=(\d), word [a-z]+=(\d)\.)"
    r" (?P<partly>\d\+\d=\d), (?P<begin>\d\+\d=\d)\."
    r"(?P<steps>(?: [a-e]:\d[+*]\d=\d\.)+) so (?P<last>\d)=(?P<letter>[A-H])"
    r"</think><answer>(?P<answer>[A-H])</answer>"
)
_STEP = re.compile(r" ([a-e]):(\d)([+*]\d)=(\d)\.")


@dataclass(frozen=True)
class Reading:
    """
    How far a completion is right.

    Attributes:
        well_formed: whether it has the form of a think text, with as many steps as the question asks, and an answer.
        plan, evidence: whether it restates the question, and whether what it names is there and has these indices.
        sums, products: of each sum and each `*`, whether it goes on from what is written before, by the operation that is
            asked, to the right value.
        follows: whether the answer is the letter of the value written last.
        answered: whether the answer is right.
        first_error: where it first differs from the right think text, as a share of its length; `None`: nowhere.
    """

    well_formed: bool
    plan: bool
    evidence: bool
    sums: tuple[bool, ...]
    products: tuple[bool, ...]
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
        form["begin"] == f"{partly}+{third}={apply(int(partly), f'+{third}')}",
    ]
    products: list[bool] = []
    for told_step, asked_step in zip(steps, _STEP.findall(ideal["steps"]), strict=True):
        (label, before, operation, after), (asked_label, _, asked, _) = told_step, asked_step
        follows = (label, before, operation) == (asked_label, value, asked)
        own = products if asked[0] == "*" else sums
        own.append(follows and int(after) == apply(int(before), operation))
        value = after
    ends = (
        value == form["last"] and int(value) < len(LETTERS) and LETTERS[int(value)] == form["letter"] == form["answer"]
    )
    return Reading(
        True,
        form["plan"] == ideal["plan"],
        form["evidence"] == ideal["evidence"],
        tuple(sums),
        tuple(products),
        ends,
        answered,
        error,
    )


def draw_operations(steps: int, tier: str, rng: random.Random) -> list[str]:
    """Draw the operations of a question."""
    odd = rng.randrange(steps) if tier == "hard" else None
    return [f"{'*' if place == odd else '+'}{rng.randrange(len(LETTERS))}" for place in range(steps)]


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


def cold_rows(folder: Path) -> list[dict[str, Any]]:
    """Make the rows of the cold start: chains with slips, one half fed their tag's signals, one half all."""
    from maple_trl.data.synthetic import write_seven_tags
    from maple_trl.modalities import ModalityTag

    rng = random.Random(1000)
    rows = write_seven_tags(folder, prompts_per_tag=64, seed=1000, splits=("train",))["train"]
    told = []
    for row in rows:
        for number in range(COLD_CHAINS):
            tier = "hard" if rng.random() < COLD_HARD else "easy"
            made = with_chain(row, f"{row['id']}-{number}", rng.choice(STEPS), tier, rng)
            text = target_text(chain_of(made, made["operations"], Slips(COLD_SLIPS, rng)))
            made["completion"] = [{"role": "assistant", "content": text}]
            told.append(made | ({"tag": ModalityTag.VAS.value} if number % 2 else {}))  # a tag says here what is fed
    return told


def target_text(chain: str) -> str:
    """Return the completion that ends a think text by its answer."""
    return f"<think>{chain}</think><answer>{chain[-1]}</answer>"


def prepare(folder: Path) -> None:
    from maple_trl.data.synthetic import write_seven_tags
    from maple_trl.trainers.omni_sft.config import OmniSFTConfig
    from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer

    counts = {"train": TRAIN_PER_TAG, "test": TEST_PER_TAG}
    for seed, (split, rows) in enumerate(write_seven_tags(folder / "data", counts, seed=0).items()):
        Dataset.from_list(list(with_chains(rows, seed))).to_parquet(folder / "data" / f"{split}.parquet")
    options = OmniSFTConfig(
        output_dir=str(folder / "cold-run"),
        media_root=str(folder / "cold"),
        num_frames=4,
        max_steps=COLD_STEPS,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=10,
        adam_beta2=0.98,
        weight_decay=0.01,
        seed=0,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_steps=20,
    )
    rows = Dataset.from_list(cold_rows(folder / "cold"))
    trainer = OmniSFTTrainer("builtin:tiny-omni", options, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder / "model"))


def options(trainer: str) -> Mapping[str, Any]:
    return {
        "model_name_or_path": "{folder}/model",
        "dataset_name": "{folder}/data",
        "media_root": "{folder}/data",
        "dataset_filter": None,
        "max_completion_length": 112,
        "hints": False,
        "hint_max_kl": 0.01,  # without hints it has no effect
        "reward_funcs": ["format_reward", "accuracy_reward"],
        "reward_weights": [0.1, 0.9],
    }


def held_out(folder: Path) -> Dataset:
    return Dataset.from_parquet(str(folder / "data" / "test.parquet"), keep_in_memory=True)


def score(**columns: Any) -> list[float | None]:
    return accuracy_reward(**columns)
