"""Rewards for some rows only, and all rewards together in a real GRPOTrainer of TRL."""

import asyncio
import functools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pandas
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_tiny_text
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from maple_trl import rewards
from maple_trl.modalities import ModalityTag
from maple_trl.rewards import (
    LengthReward,
    accuracy_reward,
    box_iou_reward,
    for_rows,
    for_tags,
    format_reward,
    object_place_reward,
    self_consistency_reward,
    temporal_iou_reward,
)


def letters_reward(prompts, completions, completion_ids, letters=None, log_extra=None, log_metric=None, **columns):
    """Depends on the row and the completion, and writes what it saw."""
    if log_extra is not None:
        log_extra("seen", [text[:2] for text in completions])
        log_metric("letters/rows", float(len(completions)))
    return [(len(text) + letter) / 1000 for text, letter in zip(completions, letters, strict=True)]


async def async_letters_reward(**arguments):
    await asyncio.sleep(0)
    return letters_reward(**arguments)


class AsyncScorer:
    async def __call__(self, **arguments):
        return letters_reward(**arguments)


TAGS = st.one_of(st.none(), st.just(""), st.sampled_from([*ModalityTag, "av", "SA", "svA", " v "]))


@given(
    st.lists(st.tuples(TAGS, st.text(max_size=5), st.integers(0, 9)), max_size=10),
    st.sets(st.sampled_from([*ModalityTag]), min_size=1),
)
def test_only_rows_of_the_tags_are_scored(rows, tags):
    tag, completions, letters = ([row[i] for row in rows] for i in range(3))
    columns = {
        "prompts": ["q"] * len(rows),
        "completions": completions,
        "completion_ids": [[1]] * len(rows),
        "letters": letters,
        "tag": tag,
    }
    everywhere = letters_reward(**columns)
    expected = [
        value if name and ModalityTag.parse(name) in tags else None
        for name, value in zip(tag, everywhere, strict=True)
    ]
    assert for_tags(letters_reward, tags)(**columns) == expected
    assert asyncio.run(for_tags(async_letters_reward, tags)(**columns)) == expected
    assert asyncio.run(for_tags(AsyncScorer(), tags)(**columns)) == expected


def test_the_inner_reward_gets_its_rows_and_nothing_else():
    calls = []

    def inner(**arguments):
        calls.append(arguments)
        return [0.5] * len(arguments["completions"])

    state, batch = object(), {"prompts": list("pqr"), "completions": list("abc"), "completion_ids": [[1], [2], [3]]}
    columns = {
        "tag": ["V", "VA", "VA"],
        "solution": ("x", "y", "z"),
        "group_ids": [1, 2, 3],
        "name": "abc",
        "short": [9],
        "trainer_state": state,
    }
    assert for_tags(inner, ["VA"])(**batch, **columns) == [None, 0.5, 0.5]
    (call,) = calls
    assert call == {
        "prompts": ["q", "r"],
        "completions": ["b", "c"],
        "completion_ids": [[2], [3]],
        "tag": ["VA", "VA"],
        "solution": ["y", "z"],
        "group_ids": [2, 3],
        "name": "abc",
        "short": [9],
        "trainer_state": state,
    }
    assert for_tags(inner, ["S"])(**batch, **columns) == [None] * 3
    assert len(calls) == 1  # not called for no row
    assert for_tags(inner, ["S"])(**{name: [] for name in batch}, tag=[]) == []


def test_log_extra_gets_one_value_per_row():
    tables = []
    log = {"log_extra": lambda column, values: tables.append((column, values)), "log_metric": lambda name, value: None}
    routed = for_tags(letters_reward, ["A"])
    batch = {
        "prompts": [""] * 3,
        "completions": ["abc", "def", "ghi"],
        "completion_ids": [[1]] * 3,
        "letters": [1, 2, 3],
    }
    routed(**batch, **log, tag=["V"] * 3)
    assert tables == []
    routed(**batch, **log, tag=["A", "V", "A"])
    routed(**batch, **log, tag=["V"] * 3)
    assert tables == [("seen", ["ab", None, "gh"]), ("seen", [None] * 3)]


def test_names():
    assert for_tags(accuracy_reward, ["sav", "AV", "V"]).__name__ == "accuracy_reward_for_V_VA_VAS"
    assert for_tags(LengthReward(1, 2), ["V"]).__name__ == "length_reward_for_V"
    assert for_tags(functools.partial(accuracy_reward), ["V"]).__name__ == "accuracy_reward_for_V"
    assert for_tags(accuracy_reward, ["V"], name="accuracy_reward").__name__ == "accuracy_reward"
    assert for_rows(box_iou_reward, "kind", ["where", 2]).__name__ == "box_iou_reward_for_where_2"
    assert get_callable_name(for_tags(accuracy_reward, ["V"])) == "accuracy_reward_for_V"


def test_trl_sees_what_is_async():
    assert is_async_callable(for_tags(async_letters_reward, ["V"]))
    assert is_async_callable(for_tags(AsyncScorer(), ["V"]))
    assert is_async_callable(for_rows(functools.partial(async_letters_reward), "kind", [1]))
    assert not is_async_callable(for_tags(letters_reward, ["V"]))


def test_rewards_can_be_sent_to_another_process():
    """As TRL's asynchronous trainer does, which a closure would not survive."""
    routed = for_tags(accuracy_reward, ["V"])
    columns = {"completions": ["<answer>B</answer>"] * 2, "tag": ["V", "A"], "solution": ["B", "B"]}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        scored = pool.submit(routed, **columns)
        length = pool.submit(LengthReward(0, 10), completions=["red"], completion_ids=[[1] * 5])
        assert scored.result() == [1.0, None] and length.result() == [0.5]


def test_routing_by_another_column():
    rewards = [for_rows(temporal_iou_reward, "kind", ["when"]), for_rows(accuracy_reward, "kind", ["what", None])]
    columns = {
        "completions": ["<answer>1-2</answer>", "<answer>B</answer>", "<answer>B</answer>", "<answer>B</answer>"],
        "kind": ["when", "what", None, "other"],
        "solution": ["1-2", "B", "C", "B"],
    }
    assert [reward(**columns) for reward in rewards] == [[1.0, None, None, None], [None, 1.0, 0.0, None]]
    # A cell that cannot be a value, as a list is, is none of them.
    odd = {"completions": ["<answer>B</answer>"] * 3, "solution": ["B"] * 3, "kind": [["what"], {"a": 1}, None]}
    assert rewards[1](**odd) == [None, None, 1.0]
    # Unrouted, the same rows are an error: an option is no interval.
    with pytest.raises(ValueError, match="the solution of row 1"):
        temporal_iou_reward(**columns)


def test_a_reward_within_a_reward():
    both = for_rows(for_tags(accuracy_reward, ["V"]), "kind", ["what"])
    columns = {"tag": ["V", "A", "V"], "kind": ["what", "what", "who"], "solution": ["B"] * 3}
    assert both(completions=["<answer>B</answer>"] * 3, **columns) == [1.0, None, None]


def test_refusals():
    with pytest.raises(ValueError, match="'X' is not a modality tag; the tags are V, A, S"):
        for_tags(accuracy_reward, ["V", "X"])
    with pytest.raises(ValueError, match=r"takes a list of tags, got 'VA'; write \['VA'\]"):
        for_tags(accuracy_reward, "VA")
    with pytest.raises(ValueError, match=r"takes a list of values, got 'when'"):
        for_rows(accuracy_reward, "kind", "when")
    for make in (lambda: for_tags(accuracy_reward, []), lambda: for_rows(accuracy_reward, "kind", [])):
        with pytest.raises(ValueError, match="a reward for no row at all"):
            make()
    for reward in ("org/reward-model", torch.nn.Linear(1, 1), LengthReward, None):
        with pytest.raises(TypeError, match="only a reward function can be routed"):
            for_tags(reward, ["V"])
    with pytest.raises(ValueError, match=r"accuracy_reward_for_V needs a column `tag`.*\['solution'\]"):
        for_tags(accuracy_reward, ["V"])(completions=["B"], solution=["B"])
    with pytest.raises(ValueError, match="'VX' is not a modality tag"):
        for_tags(accuracy_reward, ["V"])(completions=["B"], solution=["B"], tag=["VX"])
    with pytest.raises(
        ValueError, match="accuracy_reward_for_V: the inner reward returned 1 values for 2 completions"
    ):
        for_tags(lambda **k: [1.0], ["V"], name="accuracy_reward_for_V")(completions=["B"] * 2, tag=["V"] * 2)


# In TRL's own trainer

ROWS = {
    "prompt": [f"Which colour, {i}?" for i in range(8)],
    "tag": ["V", "A", "VA", "VAS"] * 2,
    "solution": ["1-2"] * 4 + ["[0, 0, 1, 1]"] * 4,
    "kind": ["when"] * 4 + ["where"] * 4,
    "options": [["red", "blue"], None] * 4,
    "letters": list(range(8)),
}
GOOD = {"when": "<think>x</think><answer>1-3</answer>", "where": "<think>x</think><answer>[0, 0, 1, 2]</answer>"}


def trainer_with(tmp_path, model_and_tokenizer, functions, trainer_class=GRPOTrainer, **options):
    model, tokenizer = model_and_tokenizer
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-3,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=3,
        **options,
    )
    return trainer_class(model, functions, args, train_dataset=Dataset.from_dict(ROWS), processing_class=tokenizer)


class Scripted(GRPOTrainer):
    """Rewards see good answers instead of a random model's noise: each second completion of a prompt."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        texts = [
            text if i % 2 else GOOD[row["kind"]] for i, (row, text) in enumerate(zip(inputs, completions, strict=True))
        ]
        self.seen = super()._calculate_rewards(inputs, prompts, texts, completion_ids_list)
        return self.seen


def all_rewards():
    return [
        format_reward,
        accuracy_reward,
        self_consistency_reward,
        LengthReward(2, 8),
        for_rows(temporal_iou_reward, "kind", ["when"]),
        for_rows(box_iou_reward, "kind", ["where"]),
        for_tags(letters_reward, ["VA", "VAS"]),
        for_tags(async_letters_reward, ["V"], name="async_reward"),
        object_place_reward,
    ]


def test_all_rewards_in_trls_trainer(tmp_path):
    model, tokenizer = build_tiny_text()
    functions = all_rewards()
    names = [get_callable_name(function) for function in functions]
    for name in rewards.__all__:
        assert not name.endswith("_reward") or any(logged.startswith(name) for logged in names)
    weights = [1.0, 0.5] + [0.25] * 7
    options = {"trainer_class": Scripted, "reward_weights": weights, "log_completions": True}
    trainer = trainer_with(tmp_path, (model, tokenizer), functions, **options)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())

    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) and entry["reward_std"] > 0
        assert {f"rewards/{name}/mean" for name in names} <= entry.keys()
        assert entry["rewards/format_reward/mean"] == 0.5
    # Unscorable means left out, not 0: of the intervals and boxes each row is exactly of one kind.
    either = trainer.seen[:, 4:6].isnan()
    assert (either[:, 0] != either[:, 1]).all()
    assert trainer.seen[:, 4:6].nan_to_num().sum(1).tolist() == [0.5, 0.0] * 4
    assert (trainer.seen[:, 2].reshape(-1, 4) == torch.tensor([1.0, 0.0, 1.0, 0.0])).all()
    tables = [pandas.read_parquet(path) for path in sorted(tmp_path.glob("completions/*.parquet"))]
    assert len(tables) == 2
    for table in tables:
        scored = table["letters_reward_for_VA_VAS"].notna()
        assert "seen" not in table or scored.any() or table["seen"].isna().all()


def test_the_control_of_the_trainer_test(tmp_path):
    """Rewards that never differ move nothing: what moved the weights above was the rewards."""
    model, tokenizer = build_tiny_text()
    trainer = trainer_with(tmp_path, (model, tokenizer), [for_tags(format_reward, ["V", "A", "VA", "VAS"])])
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_a_malformed_solution_stops_the_trainer_with_its_name(tmp_path):
    trainer = trainer_with(tmp_path, build_tiny_text(), [temporal_iou_reward])
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"solution": "soon"})
    with pytest.raises(
        ValueError, match="temporal_iou_reward: the solution of row 0 of the batch must be time intervals.*'soon'"
    ):
        trainer.train()
