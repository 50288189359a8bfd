"""Accuracy before training: scored once, for all processes alike, and measured again when anything behind it changes."""

import hashlib
import importlib.util
import json
import math
import threading
from functools import partial
from pathlib import Path

import pytest
from jobs.runner import Job, facts, once, write_inputs
from test_mapo import DEFAULTS, Diary, Watched, follow, take
from tiny_models import build_tiny

from maple_trl import MAPOConfig
from maple_trl.chat import ChatOptions
from maple_trl.rewards import AccuracyReward, AnswerJudge, ContrastiveRewardWeighting, for_tags
from maple_trl.rewards.identity import reward_identity


pytestmark = pytest.mark.slow


ACCURACY = {"V": 0.75, "S": 0.25, "AS": 0.5}
EPOCH = {"curriculum": "adaptive", "max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}


@pytest.fixture
def build(seven_tags, tmp_path):
    """
    A trainer on two rows of V, S and AS, which make one step each, one of them with columns `mended`; more arguments are
    fields of the config.
    """

    def make(reward, mended=None, **options):
        folder, data = seven_tags
        model, processor = build_tiny("qwen2_5_omni")
        options = {"output_dir": str(tmp_path / "run"), "media_root": str(folder), **DEFAULTS, **EPOCH, **options}
        rows = take(data, V=2, S=2, AS=2)
        rows = rows.map(lambda row, i: mended if i == 3 else {}, with_indices=True) if mended else rows
        given = {"train_dataset": rows, "processing_class": processor}
        return Watched(model, reward, MAPOConfig(**options), **given)

    return make


def train(build, value, **options):
    """Trains with the rewards of a diary; a measurement is its call 0."""
    diary = Diary(value)
    trainer = follow(diary, build(diary, **options))
    trainer.train()
    return trainer, diary


def order(diary):
    return [call["tags"][0] for call in diary.calls if call["training"]]


def stored(tmp_path):
    return json.loads((tmp_path / "run" / "zero_shot.json").read_text())


def by_tag(one, tag, copy, call):
    return ACCURACY[tag]


# What is counted


@pytest.mark.parametrize("nothing", [None, math.nan], ids=["None", "NaN"])
@pytest.mark.matrix(cases=1)
def test_a_question_without_a_score_is_left_out(seven_tags, build, tmp_path, nothing):
    """Counted as wrong they would turn the order around."""
    first = {row["id"] for tag in ("V", "S") for row in take(seven_tags[1], **{tag: 1})}
    right = {"V": 0.75, "S": 0.5, "AS": 0.4}
    _, diary = train(build, lambda one, tag, copy, call: nothing if call == 0 and one in first else right[tag])
    assert stored(tmp_path)["accuracy"] == right and order(diary) == ["AS", "S", "V"]
    wrong = dict.fromkeys(first, 0.0)
    _, diary = train(build, lambda one, tag, copy, call: wrong.get(one, right[tag]), seed=1)
    assert stored(tmp_path)["accuracy"] == {"V": 0.375, "S": 0.25, "AS": 0.4} and order(diary) == ["S", "V", "AS"]


@pytest.mark.parametrize("nothing", [None, math.nan], ids=["None", "NaN"])
@pytest.mark.matrix(cases=1)
def test_a_tag_that_could_not_be_scored_comes_first(build, tmp_path, nothing, caplog):
    def value(one, tag, copy, call):
        return nothing if call == 0 and tag == "V" else ACCURACY[tag]

    trainer, diary = train(build, value)
    assert order(diary) == ["V", "S", "AS"] and trainer.state.global_step == 3
    assert "gave no reward to the answers of 2 questions (V 2), which are left out; tags of unknown" in caplog.text
    assert stored(tmp_path)["accuracy"] == {"S": 0.25, "AS": 0.5}
    assert "NaN" not in (tmp_path / "run" / "zero_shot.json").read_text()
    _, diary = train(build, by_tag, seed=1)
    assert order(diary) == ["S", "AS", "V"]


@pytest.mark.parametrize("value", [1.5, -0.25, math.inf])
def test_a_score_that_is_no_accuracy_names_its_function(build, tmp_path, value):
    diary = Diary(lambda one, tag, copy, call: value if tag == "S" else 0.5)
    trainer = follow(diary, build(diary))
    with pytest.raises(
        ValueError, match=rf"reward function 'diary' gave {value}: .*in \[0, 1\]; choose another with t"
    ):
        trainer.train()
    assert trainer.state.global_step == 0 and not any(call["training"] for call in diary.calls)
    assert not (tmp_path / "run" / "zero_shot.json").exists()


def test_the_bounds_are_accuracies(build, tmp_path):
    train(build, lambda one, tag, copy, call: int(tag == "S"))
    assert stored(tmp_path)["accuracy"] == {"V": 0, "S": 1, "AS": 0}


def test_where_nothing_can_be_scored_the_run_ends_before_it_trains(build, tmp_path):
    diary = Diary(lambda *_: math.nan)
    trainer = follow(diary, build(diary))
    with pytest.raises(ValueError, match="None of 6 questions could be scored"):
        trainer.train()
    assert len(diary.calls) == 1 and not (tmp_path / "run" / "zero_shot.json").exists()


# When it is measured


def asked(build, reward, **options):
    trainer = build(reward, max_steps=1, **options)
    trainer.train()
    return trainer.asked


@pytest.mark.long
def test_other_media_limits_are_measured_anew(build):
    diary = Diary(by_tag)
    assert asked(build, diary) == 6
    assert asked(build, diary) == 0
    assert asked(build, diary, max_pixels=48 * 48) == 6
    assert asked(build, diary, max_pixels=48 * 48) == 0
    assert asked(build, diary, max_pixels=48 * 48, num_frames=2) == 6
    assert asked(build, diary, max_pixels=48 * 48, num_frames=2, subtitle_template="{subtitle}") == 6
    assert (
        asked(build, diary, max_pixels=48 * 48, num_frames=2, subtitle_template="{subtitle}", learning_rate=0.1) == 0
    )


def reward_named(name, module):
    def reward(completions, **_):
        return [0.5] * len(completions)

    reward.__name__ = reward.__qualname__ = name
    reward.__module__ = module
    return reward


def test_another_reward_is_measured_anew(build):
    assert asked(build, reward_named("exact", "one")) == 6
    assert asked(build, reward_named("exact", "one")) == 0
    assert asked(build, reward_named("lenient", "one")) == 6
    assert asked(build, reward_named("lenient", "two")) == 6
    assert asked(build, reward_named("lenient", "two")) == 0


def test_a_reward_that_was_mended_under_its_name_is_measured_anew(build, tmp_path):
    def written(body):
        path = tmp_path / "own.py"
        path.write_text(f"def exact(completions, **_):\n    return [{body}] * len(completions)\n")
        spec = importlib.util.spec_from_file_location("own", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.exact

    assert asked(build, written("0.5")) == 6
    assert asked(build, written("0.5")) == 0
    assert asked(build, written("0.25")) == 6


def test_a_mended_solution_or_option_of_the_reward_is_measured_anew(build):
    assert asked(build, AccuracyReward("tags")) == 6
    assert asked(build, AccuracyReward("tags")) == 0
    assert asked(build, AccuracyReward("brackets")) == 6
    assert asked(build, AccuracyReward("brackets"), mended={"solution": "another"}) == 6
    assert asked(build, AccuracyReward("brackets"), mended={"solution": "another"}) == 0


class Keyed:
    """A reward of options in several forms, and of what it keeps while it runs."""

    def __init__(self, inner, strict=True, words=(), table=None):
        self.inner, self._strict, self.words, self.table = inner, strict, words, table
        self.mode = "strict" if strict else "lax"
        self.lock, self.trainer, self.calls = threading.Lock(), None, []

    def __call__(self, completions, **_):
        self.calls.append(len(completions))
        return [0.5] * len(completions)


def test_a_reward_is_told_by_its_name_and_options():
    told = reward_identity(Keyed(partial(exact, scale=0.5), words={"b", "a"}, table={"y": 1, "x": Path("z")}))
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    name = [__name__, "exact", "exact", source]
    options = {
        "_strict": True,
        "inner": ["partial", name, [], [["scale", 0.5]]],
        "mode": "strict",
        "table": [["x", "z"], ["y", 1]],
        "words": ["a", "b"],
    }
    # So it is in every process: there are no addresses in it.
    assert told == [__name__, None, None, "Keyed", source, options] and json.loads(json.dumps(told)) == told
    used = Keyed(exact)
    used([None, None])
    assert reward_identity(used) == reward_identity(Keyed(exact))
    others = [
        Keyed(exact),
        Keyed(partial(exact, scale=0.25)),
        Keyed(exact, strict=False),
        Keyed(exact, table={"x": [1, 2]}),
        Keyed(Keyed(exact)),
        Keyed(Keyed(exact, words=["a"])),
        Keyed(exact).__call__,
        Keyed(exact, words=["a"]).__call__,
        partial(exact, scale=0.25),
        exact,
        for_tags(exact, ["V", "A"]),
        for_tags(exact, ["A"], "exact_for_V_A"),
        ContrastiveRewardWeighting(exact, 0.5, 0.5, exact),
        ContrastiveRewardWeighting(exact, 0.6, 0.5, exact),
    ]
    assert len({json.dumps(reward_identity(other)) for other in others}) == len(others)


def test_a_judge_that_has_moved_is_the_same():
    def judge(**options):
        options = {"model": "m", "base_url": "http://here:1/v1", **options}
        return reward_identity(AnswerJudge(ChatOptions(**options)))

    assert judge() == judge(base_url="http://there:2/v1", concurrency=2) != judge(model="n")


def exact(completions, scale=1.0, **_):
    return [scale] * len(completions)


@pytest.mark.long
def test_another_callable_object_is_measured_anew(build):
    """Such a reward has no qualified name of its own."""
    exact, lenient = Diary(by_tag), Diary(by_tag)
    lenient.__name__ = "lenient"
    assert asked(build, exact) == 6
    assert asked(build, lenient) == 6
    assert asked(build, lenient) == 0


BROKEN = {
    "empty": lambda key: b"",
    "cut": lambda key: b'{"key": "',
    "no text": lambda key: b"\xff\xfe",
    "no accuracy": lambda key: json.dumps({"key": key}).encode(),
    "NaN": lambda key: json.dumps({"key": key, "accuracy": ACCURACY | {"S": math.nan}}).encode(),
    "above 1": lambda key: json.dumps({"key": key, "accuracy": ACCURACY | {"S": 7}}).encode(),
    "null": lambda key: json.dumps({"key": key, "accuracy": None}).encode(),
    "list": lambda key: json.dumps({"key": key, "accuracy": [0.5, 0.5, 0.5]}).encode(),
}


def test_a_file_that_holds_no_accuracies_is_replaced(build, tmp_path):
    train(build, by_tag)
    file = tmp_path / "run" / "zero_shot.json"
    written = file.read_bytes()
    for name, broken in BROKEN.items():
        file.write_bytes(broken(json.loads(written)["key"]))
        trainer, diary = train(build, by_tag, max_steps=1)
        assert trainer.asked == 6 and file.read_bytes() == written and order(diary) == ["S"], name


# Given accuracies


def test_every_tag_of_the_data_needs_a_given_accuracy(build):
    diary = Diary(by_tag)
    message = "zero_shot_accuracy has no accuracy for tag AS of train_dataset; give one for each tag"
    with pytest.raises(ValueError, match=message):
        build(diary, zero_shot_accuracy={"V": 0.5, "S": 0.5, "VAS": 0.5})
    assert not diary.calls
    trainer = build(diary, zero_shot_accuracy={"V": 0.5, "S": 0.5, "SA": 0.5, "VAS": 0.5})
    trainer.train()
    assert trainer.asked == 0 and trainer.state.global_step == 3


# Two processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def make(folder):
        rows = [row for row in write_inputs(folder) if row["tag"] in ("S", "A", "VA")]
        options = {
            **EPOCH,
            "curriculum_granularity": "epoch",  # the accuracies order all batches
            "zero_shot_questions": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
        }
        runs = [
            {"name": name, "trainer": "mapo", "reward": reward, "options": options}
            for name, reward in {
                "main": "of_tag_and_rank",
                "other": "of_tag_and_other_rank",
                "random": "unpredictable",
            }.items()
        ]
        again = {"output_dir": str(folder / "two" / "main")}
        runs.append(runs[0] | {"name": "again", "options": options | again})
        Job(2, folder, "two", rows, runs).wait()

    return once(tmp_path_factory, "zero-shot", make) / "two"


def visited(results, name):
    """The tag of each rollout, for the rows of both ranks."""
    rows = json.loads(results.with_suffix(".json").read_text())["rows"]
    tag_of = {row["id"]: row["tag"] for row in rows}
    first, second = (facts(results, name, rank)["used"] for rank in (0, 1))
    tags = [{tag_of[one] for one in (*a, *b)} for a, b in zip(first, second, strict=True)]
    assert all(len(of_rollout) == 1 for of_rollout in tags)
    return [tag for (tag,) in tags]


@pytest.mark.long
@pytest.mark.parametrize("name", ["main", "other", "random", "again"])
def test_all_processes_hold_what_the_first_one_scored(results, name):
    first, second = (facts(results, name, rank) for rank in (0, 1))
    assert first["known"] == second["known"] and len(first["known"]) == 6
    accuracy = json.loads((results / ("main" if name == "again" else name) / "zero_shot.json").read_text())["accuracy"]
    for told in (first, second):
        assert [known["TagCurriculum"]["zero_shot"] for known in told["known"]] == [accuracy] * 6
    assert visited(results, name) == [tag for tag in sorted(accuracy, key=accuracy.get) for _ in range(2)]


def test_the_other_process_would_have_scored_otherwise(results):
    """Else the test above would pass whoever scores."""
    assert visited(results, "main") == ["S", "S", "A", "A", "VA", "VA"]
    assert visited(results, "other") == ["VA", "VA", "A", "A", "S", "S"]


def test_all_processes_measure_the_prepared_model_or_none_does(results):
    for rank in (0, 1):
        for name in ("main", "other", "random"):
            assert facts(results, name, rank)["asked"] == [["DistributedDataParallel", 9]]
        assert facts(results, "again", rank)["asked"] == []
