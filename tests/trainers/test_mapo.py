"""MAPOTrainer through `train()`: what is trained on, in which order, and what is logged about it."""

import json
import math
import os
from collections import Counter, defaultdict
from statistics import fmean, pstdev, stdev

import pytest
import torch
from datasets import Dataset
from media_files import tone, write_video
from omni_runs import DEFAULTS as OMNI_DEFAULTS
from omni_runs import spread_reward
from safetensors.torch import load_file
from tiny_models import FAMILIES, GEMMA, build_tiny, build_tiny_text, save_tiny
from transformers import TrainerCallback

from maple_trl import MAPOConfig, MAPOTrainer, ModalityTag
from maple_trl.algorithms import bernoulli_kl
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model
from maple_trl.omni.lora import build_lora_config
from maple_trl.omni.prompt import RowError


pytestmark = pytest.mark.slow


G = 4  # completions of a prompt
DEFAULTS = OMNI_DEFAULTS | {"num_generations": G, "max_steps": 2, "lr_scheduler_type": "constant"}


@pytest.fixture
def build(seven_tags, tmp_path):
    """A trainer of a tiny random model; the last arguments are fields of the config."""

    def make(dataset, reward=spread_reward, trainer_class=MAPOTrainer, family="qwen2_5_omni", **options):
        arguments = ("model", "processing_class", "eval_dataset", "peft_config", "callbacks")
        given = {name: options.pop(name) for name in arguments if name in options}
        if "model" not in given:
            model, processor = build_tiny(family)
            if options.get("beta"):  # the reference model is loaded from where the model came from
                model = load_model(str(save_tiny(family, tmp_path / "model")), dtype="float32")
            given = {"model": model, "processing_class": processor} | given
        options = {"output_dir": str(tmp_path / "run"), "media_root": str(seven_tags[0]), **DEFAULTS, **options}
        return trainer_class(reward_funcs=reward, args=MAPOConfig(**options), train_dataset=dataset, **given)

    return make


def take(dataset, **counts):
    """So many rows of each tag, e.g. `V=4, S=2`, in canonical order of the tags."""
    return dataset.select([i for tag, n in counts.items() for i in places(dataset, tag)[:n]])


def places(dataset, tag):
    return [i for i, other in enumerate(dataset["tag"]) if other == tag]


class Diary:
    """
    A reward function that remembers what it was asked for.

    `value(row id, tag, copy, call)` is the reward of one completion; `calls` holds, per call, ids, tags and rewards.
    """

    __name__ = "diary"

    def __init__(self, value):
        self.value = value
        self.calls = []
        self.trainer = None

    def __call__(self, completions, id, tag, **kwargs):
        counted, rewards = Counter(), []
        for one, its_tag in zip(id, tag, strict=True):
            rewards.append(self.value(one, its_tag, counted[one] % G, len(self.calls)))
            counted[one] += 1
        entry = {"ids": list(id), "tags": list(tag), "rewards": rewards, "prompts": list(id)[::G]}
        if self.trainer is not None:
            entry |= {"epoch": self.trainer.schedule.epoch, "training": self.trainer.model.training}
        self.calls.append(entry)
        return rewards

    def epochs(self):
        """Per epoch, the rows that were visited, in order."""
        visited = defaultdict(list)
        for call in self.calls:
            visited[call["epoch"]] += call["prompts"]
        return dict(visited)


def varied(one, tag, copy, call):
    return copy / G


def follow(diary, trainer):
    diary.trainer = trainer
    return trainer


class Watched(MAPOTrainer):
    """Notes the rows of each forward pass, the loss's inputs, and the weights before each optimizer step."""

    def __init__(self, *args, **kwargs):
        self.passes, self.trained, self.probed, self.asked = [], [], [], 0
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        before = getattr(self._flight, "kept", None)
        self.passes.append(len(input_ids) if before is None else len(before))
        return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)

    def _compute_loss(self, model, inputs):
        if self.model.training:
            mask = inputs["completion_mask"]
            self.trained.append([p.key for p, m in zip(inputs["omni_prompts"], mask, strict=True) if m.any()])
        return super()._compute_loss(model, inputs)

    def _probe_gradient(self, tag):
        named = self.model.named_parameters()
        grads = [p.grad.flatten().double() for n, p in named if "lm_head" in n and p.grad is not None]
        self.probed.append((tag, torch.cat(grads)))
        super()._probe_gradient(tag)

    def generate_completions(self, rows, batch_size=None):
        self.asked += len(rows)
        return super().generate_completions(rows, batch_size)


class Snapshots(TrainerCallback):
    """The weights after each optimizer step, the first before any."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_step_end(self, *args, **kwargs):
        self.on_train_begin(*args, **kwargs)

    def moved(self, step):
        """Whether optimizer step `step` (from 0) changed anything."""
        before, after = self.weights[step : step + 2]
        return any(not torch.equal(before[name], after[name]) for name in before)

    def finite(self):
        return all(value.isfinite().all() for value in self.weights[-1].values())


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def tags_in(entry, name):
    return {key.split("/")[1] for key in entry if key.startswith("tag/") and key.endswith(f"/{name}")}


# Data


def test_one_tag_alone_trains(seven_tags, build):
    seen = Snapshots()
    trainer = build(take(seven_tags[1], VA=4), tag_weights="adaptive", callbacks=[seen])
    trainer.train()
    assert seen.moved(0) and seen.moved(1) and seen.finite()
    for entry in logs(trainer):
        assert tags_in(entry, "reward") == {"VA", "all"} and math.isfinite(entry["loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row, i: row | {"tag": "XY"} if i == 2 else row,
            "train_dataset, row 2: field 'tag': 'XY' is not a moda",
        ),
        (
            lambda row, i: row | {"tag": None} if i == 3 else row,
            "train_dataset, row 3: field 'tag': None is not a moda",
        ),
        (
            lambda row, i: row | {"tag": ""} if i == 1 else row,
            "train_dataset, row 1: field 'tag': '' is not a modality",
        ),
    ],
    ids=["unknown", "none", "empty"],
)
def test_a_row_without_a_known_tag_is_named(seven_tags, build, change, message):
    rows = [change(row, i) for i, row in enumerate(take(seven_tags[1], S=4))]
    with pytest.raises(RowError, match=message):
        build(Dataset.from_list(rows))


def test_rows_need_a_tag_column(seven_tags, build):
    rows = seven_tags[1].remove_columns("tag")
    with pytest.raises(ValueError, match="no column 'tag'.*one of V, A, S, VA, VS, AS, VAS"):
        build(rows)
    with pytest.raises(ValueError, match="needs a map-style Dataset, got IterableDataset"):
        build(seven_tags[1].to_iterable_dataset())


def test_tags_in_another_spelling_are_the_same_tags(seven_tags, build):
    rows = [row | {"tag": row["tag"].lower()[::-1]} for row in take(seven_tags[1], VS=2, S=2)]
    trainer = build(Dataset.from_list(rows), curriculum="static")
    trainer.train()
    assert [tags_in(entry, "reward") for entry in logs(trainer)] == [{"S", "all"}, {"VS", "all"}]


def test_a_tag_with_fewer_rows_than_a_batch_is_filled(seven_tags, build, caplog):
    diary = Diary(varied)
    data = take(seven_tags[1], S=4, AS=1)
    trainer = build(data, diary, curriculum="static", max_steps=-1, num_train_epochs=1)
    trainer.train()
    assert [entry["schedule/filled_rows"] for entry in logs(trainer)] == [0, 0, 1]
    assert sorted(diary.calls[0]["prompts"] + diary.calls[1]["prompts"]) == sorted(data["id"][:4])
    assert diary.calls[2]["ids"] == [data["id"][4]] * 2 * G
    assert logs(trainer)[2]["tag/AS/kept"] == 2
    assert "Tag AS has 1 rows, fewer than the 2 prompts of a rollout" in caplog.text and "Tag S has" not in caplog.text


def test_left_over_rows_of_all_tags_can_share_the_last_batch(seven_tags, build):
    diary = Diary(varied)
    data = take(seven_tags[1], S=3, AS=1)
    trainer = build(data, diary, leftover="mixed", max_steps=-1, num_train_epochs=1)
    trainer.train()
    assert [set(call["tags"]) for call in diary.calls] == [{"S"}, {"S", "AS"}]
    assert [entry["schedule/filled_rows"] for entry in logs(trainer)] == [0, 0]
    assert tags_in(logs(trainer)[1], "reward") == {"S", "AS", "all"}


# Rewards


def test_a_batch_without_any_reward_changes_no_history(seven_tags, build):
    diary = Diary(lambda one, tag, copy, call: None if call == 1 else float(copy % 2))
    seen, states = Snapshots(), []

    class Noting(Watched):
        def assign(self, rollout):
            output = super().assign(rollout)
            states.append(json.dumps([self.tag_weights.state_dict(), self.curriculum.state_dict()]))
            return output

    options = {"tag_weights": "adaptive", "max_steps": 3, "dynamic_sampling": "early", "callbacks": [seen]}
    trainer = build(take(seven_tags[1], S=4, V=4), diary, Noting, **options)
    trainer.train()
    assert states[0] == states[1] != states[2]
    # Adam would go on by its momentum; there is no gradient, so it makes no step.
    assert [seen.moved(step) for step in range(3)] == [True, False, True] and seen.finite()
    empty = logs(trainer)[1]
    assert empty["sampling/steps_without_update"] == 1 and empty["tag/all/unscorable"] == 1
    assert not tags_in(empty, "reward") and not tags_in(empty, "accuracy") and not tags_in(empty, "kl")
    assert len(logs(trainer)) == 3 and trainer.state.global_step == 3


@pytest.mark.parametrize(("nothing", "sampling"), [(None, "none"), (math.nan, "early")])
def test_without_rewards_nothing_is_learned(seven_tags, build, nothing, sampling):
    seen = Snapshots()
    options = {"tag_weights": "adaptive", "dynamic_sampling": sampling, "callbacks": [seen]}
    trainer = build(take(seven_tags[1], S=4), Diary(lambda *_: nothing), **options)
    trainer.train()
    assert not seen.moved(0) and not seen.moved(1)
    assert trainer.tag_weights.state_dict()["histories"] == {} and trainer.tag_weights.weight("S") == 0.5
    assert all(entry["loss"] == 0 and entry["grad_norm"] == 0 for entry in logs(trainer))


def test_a_completion_without_reward_has_no_advantage_and_counts_in_no_mean(seven_tags, build):
    """Its group is judged by the others."""
    diary = Diary(lambda one, tag, copy, call: math.nan if copy == 0 else copy / 4)
    trainer = build(take(seven_tags[1], S=2), diary, log_completions=True, max_steps=1)
    trainer.train()
    got = list(trainer._logs["advantages"])
    scale = stdev([0.25, 0.5, 0.75] * 2) + 1e-4
    assert got == pytest.approx([0, -0.25 / scale, 0, 0.25 / scale] * 2, abs=1e-6)
    entry = logs(trainer)[0]
    assert entry["tag/S/reward"] == pytest.approx(0.5) and entry["tag/S/unscorable"] == pytest.approx(0.25)
    assert entry["tag/S/zero_variance"] == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_reward_names_its_function(seven_tags, build, value):
    def good(completions, **_):
        return [0.5] * len(completions)

    def runaway(completions, **_):
        return [value] * len(completions)

    trainer = build(take(seven_tags[1], S=2), [good, runaway])
    with pytest.raises(
        ValueError, match="reward function 'runaway' returned an infinite reward; use a finite one or None"
    ):
        trainer.train()


ACCURACIES = {"V": 0.5, "S": 0.5}


WEIGHTS, ORDER = {"tag_weights": "adaptive"}, {"curriculum": "adaptive", "zero_shot_accuracy": ACCURACIES}


# Each two of the three choices together.
@pytest.mark.parametrize(
    ("difficulty", "needs", "value"),
    [
        ("binary", WEIGHTS, 1.5),
        ("continuous", ORDER, 1.5),
        ("binary", ORDER, -0.25),
        ("continuous", WEIGHTS, -0.25),
    ],
)
def test_difficulty_needs_rewards_between_0_and_1(seven_tags, build, difficulty, needs, value):
    diary = Diary(lambda one, tag, copy, call: value if copy == 1 else 0.5)
    trainer = build(take(seven_tags[1], S=2), diary, difficulty=difficulty, **needs)
    with pytest.raises(ValueError, match=rf"'diary', a row of tag S: .*in \[0, 1\], got {value}; let `task_reward`"):
        trainer.train()


def test_other_rewards_train_where_no_difficulty_is_needed(seven_tags, build):
    seen = Snapshots()
    diary = Diary(lambda one, tag, copy, call: 10.0 * copy - 7)
    trainer = build(take(seven_tags[1], S=4), diary, callbacks=[seen])
    trainer.train()
    assert seen.moved(0) and seen.moved(1)
    assert logs(trainer)[0]["tag/S/reward"] == pytest.approx(8.0) and not tags_in(logs(trainer)[0], "kl")


def named(name, value=0.5):
    def reward(completions, **_):
        return [value if i % G else 1.0 for i in range(len(completions))]

    reward.__name__ = name
    return reward


def test_the_task_reward_must_be_found(seven_tags, build):
    data = take(seven_tags[1], S=2)
    two = [named("style"), named("length")]
    with pytest.raises(ValueError, match=r"task_reward must name the reward.*\(style, length\), got None"):
        build(data, two, tag_weights="adaptive")
    with pytest.raises(ValueError, match=r"task_reward must name the reward.*\(style, length\), got None"):
        build(data, two, curriculum="adaptive", zero_shot_accuracy=ACCURACIES)
    with pytest.raises(ValueError, match=r"task_reward must name the reward.*\(style, length\), got 'accuracy'"):
        build(data, two, task_reward="accuracy")
    trainer = build(data, two, max_steps=1)
    trainer.train()
    assert not tags_in(logs(trainer)[0], "accuracy") and tags_in(logs(trainer)[0], "reward")


@pytest.mark.parametrize(
    ("names", "task_reward", "accuracy"),
    [
        (("style", "accuracy_reward"), None, (1 + 3 * 0.2) / 4),
        (("style", "length"), "style", (1 + 3 * 0.1) / 4),
        (("length", "style"), "style", (1 + 3 * 0.2) / 4),
    ],
)
def test_the_task_reward_is_the_accuracy(seven_tags, build, names, task_reward, accuracy):
    rewards = [named(names[0], 0.1), named(names[1], 0.2)]
    trainer = build(take(seven_tags[1], S=2), rewards, task_reward=task_reward, max_steps=1)
    trainer.train()
    entry = logs(trainer)[0]
    assert entry["tag/S/accuracy"] == pytest.approx(accuracy)
    assert entry["tag/S/reward"] == pytest.approx((2 + 3 * 0.3) / 4)
    assert entry["tag/S/kl"] == pytest.approx(bernoulli_kl(0.25))


# Dynamic sampling


LEAVING = {"dynamic_sampling": "early", "revisit": "informative"}


def dull_of(data, *numbers):
    """Rows whose completions are all rewarded alike, and a reward that does so."""
    ids = {data["id"][i] for i in numbers}
    return ids, lambda one, tag, copy, call: 0.0 if one in ids else float(copy % 2)


@pytest.mark.parametrize("mode", ["none", "early", "mid"])
@pytest.mark.matrix(cases=1)
def test_prompts_that_taught_nothing_are_left_out_of_later_epochs(seven_tags, build, mode):
    data = take(seven_tags[1], V=4, S=4)
    dull, value = dull_of(data, 0, 1, 5)
    diary = Diary(value)
    options = {"dynamic_sampling": mode} | ({} if mode == "none" else {"revisit": "informative"})
    trainer = follow(diary, build(data, diary, Watched, max_steps=-1, num_train_epochs=3, beta=0.01, **options))
    trainer.train()
    visited = diary.epochs()
    everyone, useful = set(data["id"]), set(data["id"]) - dull
    assert set(visited[0]) == everyone
    assert set(visited[1]) == (everyone if mode == "none" else useful)
    assert set(visited[2]) == (everyone if mode == "none" else useful)
    shorter = 4 if mode == "none" else 3  # 2 batches of V become 1, those of S stay 2: 3 rows are left
    assert [sum(call["epoch"] == e for call in diary.calls) for e in range(3)] == [4, shorter, shorter]
    assert trainer.state.global_step == 4 + 2 * shorter
    dropped = sum(entry["tag/all/dropped"] for entry in logs(trainer))
    assert dropped == (3 if mode == "early" else 0)
    # Dropped groups are in no pass over the completions, those of the reference model included.
    groups = sum(len(call["prompts"]) for call in diary.calls)
    assert sum(trainer.passes) == (2 * G) * (groups - dropped)
    assert sum(map(len, trainer.trained)) == G * (groups - dropped)
    last = logs(trainer)[-1]
    assert last["schedule/skipped_rows"] == (0 if mode == "none" else 3)
    assert last["sampling/uninformative_prompts"] == 3


def test_a_prompt_that_varies_again_comes_back(seven_tags, build, caplog):
    """All prompts are dull in the first epoch, so the second visits all again."""
    data = take(seven_tags[1], S=4)
    diary = Diary(lambda one, tag, copy, call: 0.0 if call < 2 else float(copy % 2))
    seen = Snapshots()
    options = LEAVING | {"max_steps": -1, "num_train_epochs": 3, "callbacks": [seen]}
    trainer = follow(diary, build(data, diary, **options))
    trainer.train()
    assert [set(rows) for rows in diary.epochs().values()] == [set(data["id"])] * 3
    assert [seen.moved(step) for step in range(6)] == [False] * 2 + [True] * 4
    assert "epoch 1 visits all again" in caplog.text
    assert [entry["sampling/steps_without_update"] for entry in logs(trainer)] == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("revisit", ["all", "unsolved", "informative"])
@pytest.mark.matrix(cases=1)
def test_what_later_epochs_visit(seven_tags, build, revisit):
    """Rows 0 and 5 are solved in the first epoch, and for good; row 1 fails always; the judge fails on row 2."""
    data = take(seven_tags[1], V=4, S=4)
    solved, wrong, failed = {data["id"][0], data["id"][5]}, {data["id"][1]}, {data["id"][2]}

    def value(one, tag, copy, call):
        if one in failed:
            return None
        return 1.0 if one in solved else 0.0 if one in wrong else float(copy % 2)

    diary = Diary(value)
    options = {"dynamic_sampling": "early", "revisit": revisit, "max_steps": -1, "num_train_epochs": 4}
    more = {"revisit_after": 2} if revisit == "unsolved" else {}
    trainer = follow(diary, build(data, diary, **options, **more))
    trainer.train()
    everyone = set(data["id"])
    resting, uninformative = everyone - solved, everyone - solved - wrong
    expected = {"all": [everyone] * 4, "unsolved": [everyone, resting, resting, everyone]}
    expected["informative"] = [everyone] + [uninformative] * 3
    assert [set(rows) for rows in diary.epochs().values()] == expected[revisit]
    assert logs(trainer)[-1]["sampling/uninformative_prompts"] == 3
    if revisit == "unsolved":
        assert logs(trainer)[-1]["sampling/solved_prompts"] == 2


def test_a_resumed_run_knows_what_was_solved(seven_tags, build, tmp_path):
    """Checkpoint 4 is the end of the first epoch, in which row 0 was solved: it rests for one epoch."""
    data = take(seven_tags[1], S=4, V=4)
    options = {"dynamic_sampling": "early", "revisit": "unsolved", "max_steps": -1, "num_train_epochs": 3}
    options |= {"save_strategy": "steps", "save_steps": 1}
    value = dict.fromkeys(data["id"][:1], 1.0)

    def run(checkpoint=None):
        diary = Diary(lambda one, tag, copy, call: value.get(one, float(copy % 2)))
        trainer = follow(diary, build(data, diary, **options))
        trainer.train(resume_from_checkpoint=checkpoint)
        return [call["prompts"] for call in diary.calls if call["training"]], trainer

    whole, first = run()
    resumed, second = run(str(tmp_path / "run" / "checkpoint-4"))
    assert len(whole) == 12 and resumed == whole[4:]
    solved = data["id"][0]
    assert [any(solved in rows for rows in whole[i : i + 4]) for i in (0, 4, 8)] == [True, False, True]
    assert first.sampling.state_dict() == second.sampling.state_dict()
    with pytest.raises(ValueError, match="revisit unsolved -> all"):
        build(data, Diary(varied), **options | {"revisit": "all"}).train(str(tmp_path / "run" / "checkpoint-4"))


def test_solved_needs_a_task_reward(seven_tags, build):
    options = {"dynamic_sampling": "early", "revisit": "unsolved"}
    two = [named("style"), named("length")]
    with pytest.raises(ValueError, match=r"task_reward must name the reward.*\(style, length\), got None"):
        build(take(seven_tags[1], S=2), two, **options)
    build(take(seven_tags[1], S=2), two, task_reward="length", **options)


def test_refilling_keeps_the_batch_full_with_rows_of_its_tag(seven_tags, build):
    data = take(seven_tags[1], S=4, AS=4)
    dull, value = dull_of(data, 0, 1, 2, 4)
    diary = Diary(value)
    options = {"dynamic_sampling": "early", "refill_rounds": 3, "max_steps": -1, "num_train_epochs": 1}
    trainer = follow(diary, build(data, diary, Watched, **options))
    trainer.train()
    assert sorted(one for call in diary.calls for one in call["prompts"]) == sorted(data["id"])
    assert all(len(set(call["tags"])) == 1 for call in diary.calls)
    per_step = [sum(map(len, trainer.trained[i : i + 2])) for i in range(0, len(trainer.trained), 2)]
    kept = [entry["tag/all/kept"] for entry in logs(trainer)]
    assert [rows / G for rows in per_step] == kept and sum(kept) == 8 - len(dull)
    assert sum(entry["tag/all/dropped"] for entry in logs(trainer)) == len(dull)
    # A batch is short only where its tag has no further row.
    tag_of = dict(zip(data["id"], data["tag"], strict=True))
    left = Counter(tag_of[one] for one in data["id"] if one not in dull)
    for entry in logs(trainer):
        [tag] = tags_in(entry, "kept") - {"all"}
        assert entry["tag/all/kept"] == min(2, left[tag])
        left[tag] -= entry["tag/all/kept"]


def test_refilling_ends_after_its_rounds(seven_tags, build):
    data = take(seven_tags[1], S=4, AS=4, VS=4)
    diary = Diary(lambda *_: 0.0)
    options = {"dynamic_sampling": "early", "refill_rounds": 1, "max_steps": -1, "num_train_epochs": 1}
    trainer = follow(diary, build(data, diary, **options))
    trainer.train()
    assert len(diary.calls) == 6 and trainer.state.global_step == 3
    assert [entry["tag/all/dropped"] for entry in logs(trainer)] == [4, 4, 4]


def test_a_run_of_so_many_steps_makes_them_although_epochs_get_shorter(seven_tags, build):
    data = take(seven_tags[1], S=4, AS=4)
    _, value = dull_of(data, 0, 1, 2, 4, 5, 6)
    diary = Diary(value)
    trainer = follow(diary, build(data, diary, max_steps=10, **LEAVING))
    trainer.train()
    assert trainer.state.global_step == 10
    assert [sum(call["epoch"] == e for call in diary.calls) for e in range(4)] == [4, 2, 2, 2]


# Order


def test_the_zero_shot_pass_orders_the_first_epoch_and_is_made_once(seven_tags, build, tmp_path):
    data = take(seven_tags[1], V=2, S=2, AS=2)
    easy = {"S": 0.25, "V": 0.75, "AS": 0.5}
    file = tmp_path / "run" / "zero_shot.json"

    def start(**options):
        diary = Diary(lambda one, tag, copy, call: easy[tag])
        options = {"curriculum": "adaptive", "max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, **options}
        trainer = follow(diary, build(data, diary, Watched, **options))
        trainer.train()
        assert [call["tags"][0] for call in diary.calls if call["training"]] == ["S", "AS", "V"]
        assert json.loads(file.read_text())["accuracy"] == easy
        return trainer.asked

    assert start() == 6
    written = file.read_bytes()
    assert start() == 0 and file.read_bytes() == written
    for broken in (b"", written[: len(written) // 2], b"[]", b'{"key": 3}'):
        file.write_bytes(broken)
        assert start() == 6 and file.read_bytes() == written
    assert start(seed=1) == 6
    assert start(seed=1, zero_shot_questions=1) == 3
    assert start(seed=1, zero_shot_questions=1, temperature=0.7) == 3


def test_the_zero_shot_pass_leaves_the_random_stream_of_the_run(seven_tags, build):
    """A run that measures and one that finds the measurement draw the same completions."""
    data = take(seven_tags[1], S=4)
    first = build(data, curriculum="adaptive", max_steps=2)
    first.train()
    second = build(data, curriculum="adaptive", max_steps=2)
    second.train()
    assert [e["loss"] for e in logs(first)] == [e["loss"] for e in logs(second)] != [0, 0]


def test_given_accuracies_are_used_and_nothing_is_measured(seven_tags, build, tmp_path):
    diary = Diary(varied)
    options = {"curriculum": "adaptive", "max_steps": -1, "num_train_epochs": 1}
    accuracy = {"S": 0.9, "AS": 0.1, "V": 0.5}
    data = take(seven_tags[1], V=2, S=2, AS=2)
    trainer = build(data, diary, Watched, zero_shot_accuracy=accuracy, **options)
    trainer.train()
    assert [call["tags"][0] for call in diary.calls] == ["AS", "V", "S"]
    assert not trainer.asked and not (tmp_path / "run" / "zero_shot.json").exists()


def test_the_adaptive_order_of_later_epochs_follows_the_rewards(seven_tags, build):
    right = {"S": 0.0, "V": 1.0, "AS": 0.5}
    diary = Diary(lambda one, tag, copy, call: float(copy / G < right[tag]))
    accuracy = {"V": 0.1, "AS": 0.2, "S": 0.3}
    options = {"curriculum": "adaptive", "max_steps": -1, "num_train_epochs": 2, "zero_shot_accuracy": accuracy}
    trainer = build(take(seven_tags[1], V=2, S=2, AS=2), diary, **options)
    trainer.train()
    assert [call["tags"][0] for call in diary.calls] == ["V", "AS", "S", "S", "AS", "V"]
    for entry in logs(trainer)[3:]:
        for tag, share in right.items():
            assert entry[f"tag/{tag}/priority"] == pytest.approx(bernoulli_kl(share), rel=1e-5)


@pytest.mark.matrix(cases=2)
@pytest.mark.parametrize("granularity", [None, "cycle", "epoch"])
def test_the_adaptive_curriculum_goes_round_by_round(seven_tags, build, granularity):
    """One batch of each tag, the hardest first; on request all batches of a tag together."""
    right = {"S": 0.0, "V": 1.0}
    diary = Diary(lambda one, tag, copy, call: float(copy / G < right[tag]))
    options = {"curriculum": "adaptive", "max_steps": -1, "num_train_epochs": 1}
    options |= {"zero_shot_accuracy": {"V": 0.1, "S": 0.2}, "curriculum_granularity": granularity}
    build(take(seven_tags[1], V=4, S=4), diary, **options).train()
    rounds = {"epoch": ["V", "V", "S", "S"]}.get(granularity, ["V", "S", "S", "V"])
    assert [call["tags"][0] for call in diary.calls] == rounds


def test_a_text_model_cannot_measure_zero_shot_accuracy(build):
    rows = Dataset.from_list([{"prompt": "which", "tag": "S", "id": str(i)} for i in range(2)])
    model, tokenizer = build_tiny_text()
    given = {"model": model, "processing_class": tokenizer, "curriculum": "adaptive"}
    with pytest.raises(ValueError, match="measured with an omni model and .* give zero_shot_accuracy"):
        build(rows, **given)
    trainer = build(rows, Diary(varied), zero_shot_accuracy={"S": 0.5}, **given)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in logs(trainer))


# Metrics


NAMES = [
    "reward",
    "accuracy",
    "zero_variance",
    "advantage_mean",
    "advantage_std",
    "weight",
    "kl",
    "priority",
    "kept",
    "dropped",
    "clip_fraction",
    "entropy",
    "completion_length",
    "media_tokens",
    "prompt_tokens",
    "reward_kept",
    "seconds",
    "grad_norm",
]


def test_metrics_are_those_of_the_recorded_rewards(seven_tags, build):
    data = take(seven_tags[1], V=2, S=2, VA=2)
    dull = {data["id"][0]}
    table = {"V": [1, 0, 0, 1], "S": [1, 1, 1, 0], "VA": [0, 0, 0, 1]}
    diary = Diary(lambda one, tag, copy, call: 1.0 if one in dull else float(table[tag][copy]))
    options = {"tag_weights": "adaptive", "curriculum": "adaptive", "num_iterations": 2, "learning_rate": 0.05}
    options["zero_shot_accuracy"] = {"V": 0.1, "S": 0.2, "VA": 0.3}
    trainer = build(data, diary, Watched, max_steps=6, shuffle_dataset=False, **options)
    trainer.train()
    history, rollouts = [], logs(trainer)[::2]  # two optimizer steps on each
    _, prompts = trainer.encode_rows(data.to_list())
    media = {
        one: sum(p.media_tokens.get(k, 0) for k in ("video", "audio"))
        for one, p in zip(data["id"], prompts, strict=True)
    }
    lengths = {one: len(p.input_ids) for one, p in zip(data["id"], prompts, strict=True)}
    for entry, call, tag in zip(rollouts, diary.calls, ["V", "S", "VA"], strict=True):
        assert set(call["tags"]) == {tag}
        assert all(tags_in(entry, name) >= {tag, "all"} for name in NAMES), entry.keys()
        rewards = call["rewards"]
        groups = [rewards[:G], rewards[G:]]
        kl = bernoulli_kl(rewards.count(1.0) / len(rewards))
        history.append(kl)
        weight = 0.5
        if len(history) > 1:
            z = (kl - fmean(history)) / (stdev(history) + 1e-4)
            weight = 1 / (1 + math.exp(-z))
        scale = stdev(rewards) + 1e-4
        advantages = [(r - fmean(group)) / scale for group in groups for r in group]
        expected = {
            "reward": fmean(rewards),
            "reward_kept": fmean(rewards),  # nothing is left out
            "accuracy": fmean(rewards),
            "zero_variance": 0.5 if tag == "V" else 0.0,
            "advantage_mean": 0.0,
            "advantage_std": pstdev(advantages),
            "weight": weight,
            "kl": kl,
            "priority": kl,
            "kept": 2,
            "dropped": 0,
            "media_tokens": fmean(media[one] for one in call["ids"]),
            "prompt_tokens": fmean(lengths[one] for one in call["ids"]),
            "completion_length": entry["completions/mean_length"],
        }
        for name, value in expected.items():
            assert entry[f"tag/{tag}/{name}"] == pytest.approx(value, abs=1e-5), (tag, name)
        for name in ("reward", "accuracy", "zero_variance", "advantage_std", "media_tokens", "prompt_tokens"):
            assert entry[f"tag/all/{name}"] == pytest.approx(expected[name], abs=1e-5), name
    assert media[data["id"][0]] > 0
    for entry in logs(trainer):
        assert entry["tag/all/grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert entry["tag/all/seconds"] > 0
    assert all(entry["tag/all/clip_fraction"] == 0 for entry in logs(trainer)[::2])  # on policy
    assert any(entry["tag/all/clip_fraction"] > 0 for entry in logs(trainer)[1::2])


def test_clip_fraction_and_entropy_are_those_of_trl_for_one_micro_batch(seven_tags, build):
    options = {"num_iterations": 2, "learning_rate": 0.05, "max_steps": 4, "epsilon_high": 0.1}
    options |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    trainer = build(take(seven_tags[1], S=4), Diary(varied), **options)
    trainer.train()
    entropies = [entry["entropy"] for entry in logs(trainer)]
    assert [entry["tag/all/entropy"] for entry in logs(trainer)] == pytest.approx(entropies, rel=1e-5)
    clipped = [entry["tag/S/clip_fraction"] for entry in logs(trainer)]
    assert clipped == pytest.approx([entry["clip_ratio/region_mean"] for entry in logs(trainer)], abs=1e-6)
    assert clipped[1] > 0


def test_the_gradient_probe_against_the_recorded_gradients(seven_tags, build):
    options = {"gradient_probe": 10**9, "gradient_probe_pattern": "lm_head", "gradient_probe_window": 4}
    trainer = build(take(seven_tags[1], S=4, AS=4), Diary(varied), Watched, max_steps=7, **options)
    trainer.train()
    decay = 1 - 1 / 4
    for i, entry in enumerate(logs(trainer)):
        for name in ("all", "S", "AS"):
            seen = [g for tag, g in trainer.probed[: i + 1] if name in ("all", tag)]
            if len(seen) < 2:
                assert f"tag/{name}/grad_variance" not in entry
                continue
            weights = [decay ** (len(seen) - 1 - k) for k in range(len(seen))]
            total, squares = sum(weights), sum(w * w for w in weights)
            mean = sum(w * g for w, g in zip(weights, seen, strict=True)) / total
            spread = sum(w * float(((g - mean) ** 2).sum()) for w, g in zip(weights, seen, strict=True)) / total
            expected = spread / (1 - squares / total**2)
            assert entry[f"tag/{name}/grad_variance"] == pytest.approx(expected, rel=1e-4)
            assert entry[f"tag/{name}/grad_mean_norm"] == pytest.approx(float(mean.norm()), rel=1e-4)
    both = torch.stack([g for _, g in trainer.probed[:2]])
    plain = float(both.double().var(dim=0).sum())
    assert logs(trainer)[1]["tag/all/grad_variance"] == pytest.approx(plain, rel=0.2)  # nearly equal weights
    assert trainer.probed[0][1].numel() == trainer.model.lm_head.weight.numel()


def test_the_gradient_probe_reads_a_few_coordinates_of_parameters_that_exist(seven_tags, build):
    trainer = build(take(seven_tags[1], S=4), Diary(varied), gradient_probe=7)
    trainer.train()
    assert trainer.gradient_moments.state_dict()["all.vector"].shape == (7,)
    with pytest.raises(ValueError, match="Pattern 'no_such' matches none"):
        build(take(seven_tags[1], S=4), Diary(varied), gradient_probe=7, gradient_probe_pattern="no_such").train()


def test_evaluation_logs_its_own_metrics_per_tag_and_leaves_training_alone(seven_tags, build):
    data, held_out = take(seven_tags[1], S=4, V=2), take(seven_tags[1], VA=2, AS=1)
    table = {"VA": 0.25, "AS": 0.75}
    options = {"tag_weights": "adaptive", "max_steps": 3}

    def run(**more):
        diary = Diary(lambda one, tag, copy, call: table.get(tag, copy / G))
        trainer = build(data, diary, **options, **more)
        trainer.train()
        return trainer

    evaluating = {"eval_dataset": held_out, "eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2}
    trainer = run(**evaluating, per_device_eval_batch_size=2)
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 3
    for entry in found:
        assert entry["eval_tag/VA/reward"] == pytest.approx(0.25)
        assert entry["eval_tag/AS/accuracy"] == pytest.approx(0.75)
        assert "eval_tag/S/reward" not in entry and entry["eval_tag/VA/media_tokens"] > 0
        assert entry["eval_tag/all/zero_variance"] == 1
    plain = run()
    assert trainer.tag_weights.state_dict() == plain.tag_weights.state_dict()
    assert trainer.schedule.state_dict() == plain.schedule.state_dict()
    assert not any(key.startswith("eval") for entry in logs(trainer) for key in entry)


def test_rows_of_an_evaluation_set_may_have_no_tag(seven_tags, build):
    rows = [row | {"tag": None} if i == 0 else row for i, row in enumerate(take(seven_tags[1], VA=2))]
    diary = Diary(lambda one, tag, copy, call: 0.25 if tag is None else 0.75)
    trainer = build(take(seven_tags[1], S=2), diary, eval_dataset=Dataset.from_list(rows), num_generations_eval=2)
    trainer.args.per_device_eval_batch_size = 2
    found = trainer.evaluate()
    assert found["eval_tag/VA/reward"] == 0.75 and found["eval_tag/all/reward"] == 0.5


# Variants


def test_mupo_feeds_all_signals_and_mixes_tags(seven_tags, build):
    data = take(seven_tags[1], **dict.fromkeys(ModalityTag, 2))
    diary = Diary(varied)
    options = {"method": "mupo", "max_steps": 1, "per_device_train_batch_size": 28, "log_completions": True}
    trainer = build(data, diary, Watched, **options)
    trainer.train()
    [call] = diary.calls
    assert set(call["tags"]) == set(ModalityTag)
    entry = logs(trainer)[0]
    assert all(entry[f"tag/{tag}/media_tokens"] > 0 for tag in ModalityTag)
    _, prompts = trainer.encode_rows(data.to_list())
    assert all(set(prompt.media_tokens) == {"video", "audio", "subtitle"} for prompt in prompts)
    scale = stdev([copy / G for copy in range(G)]) + 1e-4
    expected = [(copy / G - 0.375) / scale for copy in range(G)] * 14
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-5)
    required = build(data, Diary(varied), per_device_train_batch_size=8, max_steps=1, curriculum="static")
    required.train()
    assert logs(required)[0]["tag/V/media_tokens"] < entry["tag/V/media_tokens"]


def test_a_reference_model_keeps_the_policy_close(seven_tags, build):
    """The KL term is not scaled by the advantages: it moves the weights where no completion has one."""

    def moved_by(beta):
        seen = Snapshots()
        options = {"num_iterations": 2, "callbacks": [seen], "beta": beta}
        trainer = build(
            take(seven_tags[1], S=4), Diary(lambda one, t, c, call: float(c % 2) if call < 1 else 0.5), **options
        )
        trainer.train(resume_from_checkpoint=None)
        return trainer, seen

    trainer, seen = moved_by(0.5)
    assert logs(trainer)[0]["kl"] == pytest.approx(0, abs=1e-6) and logs(trainer)[1]["kl"] > 0
    plain = moved_by(0.0)[1]
    after, other = seen.weights[2], plain.weights[2]
    assert any(not torch.equal(after[name], other[name]) for name in after)
    first, other_first = seen.weights[1], plain.weights[1]
    assert all(torch.allclose(first[name], other_first[name], atol=1e-6) for name in first)


def readable(family, dataset):
    """Rows of the tags that a family can read."""
    spec = FAMILIES[family]
    lacking = ("" if spec.has_vision else "V") + ("" if spec.has_audio else "A")
    tags = [tag for tag in ModalityTag if not set(tag) & set(lacking)]
    return take(dataset, **dict.fromkeys(tags, 2)), len(tags)


# Families whose heads are of all kinds: with adapters each family is tried, without them `make test-long` tries the others.
HEADS = ("qwen2_5_omni", "qwen3_omni", "gemma4", "phi4_multimodal")


def whole_weights(family, *values):
    return pytest.param(family, *values, marks=[pytest.mark.long] * (family not in HEADS))


@pytest.mark.parametrize(
    ("family", "lora"), [whole_weights(name, False) for name in FAMILIES] + [(name, True) for name in FAMILIES]
)
@pytest.mark.matrix(cases=1)
def test_the_head_computes_in_float32(seven_tags, build, family, lora):
    data, _ = readable(family, seven_tags[1])
    model, processor = build_tiny(family)
    model.to(torch.bfloat16)
    given = {"model": model, "processing_class": processor}
    if lora:
        given["peft_config"] = build_lora_config(model, family_for(model, processor), r=2, alpha=4)
    seen, outputs = Snapshots(), set()
    trainer = build(data, Diary(varied), max_steps=1, callbacks=[seen], learning_rate=0.01, **given)
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: outputs.add(output.dtype))
    assert head.weight.dtype == torch.float32
    others = {p.dtype for n, p in trainer.model.named_parameters() if "lm_head" not in n and "lora" not in n}
    assert torch.bfloat16 in others
    trainer.train()
    assert seen.moved(0) and seen.finite() and logs(trainer)[0]["grad_norm"] > 0
    assert trainer.model.get_output_embeddings().weight.dtype == torch.float32
    assert outputs <= {torch.float32}


@pytest.mark.parametrize("family", map(whole_weights, FAMILIES))
@pytest.mark.matrix(cases=1)
def test_a_bfloat16_checkpoint_keeps_the_float32_head_exactly(seven_tags, build, family, tmp_path):
    data, _ = readable(family, seven_tags[1])

    def run(steps, **options):
        model, processor = build_tiny(family, seed=steps)  # the second run starts from other weights
        given = {"model": model.to(torch.bfloat16), "processing_class": processor}
        seen = Snapshots()
        trainer = build(data, Diary(varied), max_steps=steps, callbacks=[seen], learning_rate=0.01, **given, **options)
        trainer.train(resume_from_checkpoint=True)
        return seen.weights

    saved = run(1, save_strategy="steps", save_steps=1)[-1]
    # Gemma's head is its embedding.
    name = "language_model.embed_tokens.weight" if family in GEMMA else "lm_head.weight"
    head = next(value for other, value in saved.items() if other.endswith(name))
    assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16().float())
    stored = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert any(value.dtype == torch.float32 and torch.equal(value, head) for value in stored.values())
    resumed = run(2)[0]
    assert all(
        resumed[name].dtype == value.dtype and torch.equal(resumed[name], value) for name, value in saved.items()
    )


# Broken media


def test_a_clip_that_breaks_in_training_is_replaced_by_one_of_its_tag(build, tmp_path):
    question = [{"role": "user", "content": "what color"}]
    names = [f"good{i}.mp4" for i in range(4)] + ["damaged.mp4"]
    for i, name in enumerate(names):
        write_video(tmp_path / name, frames=24, audio=tone(0.5 + 0.1 * i, 16000))
    damaged = bytearray((tmp_path / "damaged.mp4").read_bytes())
    start = damaged.index(b"mdat") + 4
    damaged[start : start + 4000] = bytes(4000)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    files = [("V", "good0"), ("V", "damaged"), ("VA", "good1"), ("V", "good2"), ("VA", "good3")]
    data = Dataset.from_list(
        [{"prompt": question, "video": f"{name}.mp4", "tag": tag, "id": name} for tag, name in files]
    )
    diary = Diary(varied)
    options = {"media_root": str(tmp_path), "max_steps": -1, "num_train_epochs": 1, "shuffle_dataset": False}
    trainer = build(data, diary, curriculum="static", media_prefetch=False, **options)
    trainer.train()
    used = [(call["tags"][0], sorted(call["prompts"])) for call in diary.calls]
    assert [tag for tag, _ in used] == ["V", "V", "VA"] and all(len(set(c["tags"])) == 1 for c in diary.calls)
    assert used[0][1] == ["good0", "good2"], "the next row of the tag stands in"
    assert logs(trainer)[0]["media/quarantined_prompts"] == 1
    assert os.path.exists(tmp_path / "run" / "quarantine.json")
