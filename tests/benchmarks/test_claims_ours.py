"""Claims of QA+, of everything together and of shared prompts: their metrics, task, probes and register."""

import importlib
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest


CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))


@pytest.fixture
def metrics():
    return importlib.import_module("metrics_ours")


# Curves


def curve_of(points):
    names = ("completion_tokens", "cpu_seconds", "step")
    return {
        "curve": {
            "points": [dict(zip(names, costs, strict=True), accuracy={"all": accuracy}) for *costs, accuracy in points]
        }
    }


CURVE = curve_of([(0, 0.0, 0, 0.5), (100, 2.0, 4, 0.6), (180, 5.0, 8, 0.8), (300, 6.0, 12, 0.7)])


def test_a_curve_is_read_at_a_budget_as_numpy_reads_it(metrics):
    tokens, accuracy = [0, 100, 180, 300], [0.5, 0.6, 0.8, 0.7]
    for budget in (50, 100, 150, 299, 300):
        fine = np.linspace(0, budget, 100_001)
        assert metrics.value_at(CURVE, "tokens", budget) == pytest.approx(np.interp(budget, tokens, accuracy))
        assert metrics.area_to(CURVE, "tokens", budget) == pytest.approx(
            np.interp(fine, tokens, accuracy).mean(), abs=1e-5
        )
    assert metrics.value_at(CURVE, "cpu_seconds", 3.5) == pytest.approx(0.7)


def test_a_curve_that_ends_before_the_budget_has_no_value_there(metrics):
    assert metrics.value_at(CURVE, "tokens", 301) is None and metrics.area_to(CURVE, "steps", 13) is None
    with pytest.raises(ValueError, match="no cost 'hours' of a curve; there are tokens"):
        metrics.value_at(CURVE, "hours", 1)


# QA+


def qa_result(rows, samples=2):
    """Rows of question, required tag, stratum, input and right answers."""
    told = [[f"{q}/{required}/{stratum}/none/{fed}", fed, right] for q, required, stratum, fed, right in rows]
    return {"after": {"trained": {"questions": told, "samples": samples}}}


def test_accuracy_is_told_by_stratum_and_by_required_tag(metrics):
    result = qa_result(
        [
            ("a", "V", "exact", "V", 2),
            ("a", "V", "superset", "VA", 1),
            ("a", "V", "superset", "VAS", 0),
            ("a", "V", "deficit", "A", 0),
            ("b", "VA", "exact", "VA", 0),
            ("b", "VA", "deficit", "S", 2),
            ("c", "V", "exact", "V", 2),
        ]
    )
    assert metrics.stratum_accuracy(result, "exact") == pytest.approx(2 / 3)
    assert metrics.stratum_accuracy(result, "deficit") == pytest.approx(1 / 2)
    assert metrics.sufficient_accuracy(result) == pytest.approx((1 + 0.5 + 0 + 0 + 1) / 5)
    assert metrics.required_accuracy(result, "V") == pytest.approx((1 + 0.5 + 0 + 0 + 1) / 5)
    assert metrics.several_over_one(result) == pytest.approx(0.5 - 0.5)
    # a: (1 + .5 + 0) / 3, c: 1; V: their mean; VA: 0.
    assert metrics.superset_macro(result) == pytest.approx(((0.5 + 1) / 2 + 0) / 2)
    assert metrics.required_accuracy(result, "AS") is None  # none was asked


def test_abstention_tells_a_policy_that_looks_from_one_that_always_abstains(metrics):
    def counts(exact, superset, deficit):
        return {
            "abstention": {
                "counts": [
                    ["V", "exact", 10, exact, 0],
                    ["V", "superset", 30, superset, 0],
                    ["VA", "deficit", 60, deficit, 0],
                ]
            }
        }

    always, never, looks = counts(10, 30, 60), counts(0, 0, 0), counts(1, 3, 48)
    assert metrics.abstention_skill(always) == 0 and metrics.abstention_precision(always) == 0.5
    assert metrics.abstention_skill(never) == 0 and metrics.abstention_precision(never) is None
    assert metrics.abstention_recall(looks) == 0.8 and metrics.needless_abstention(looks) == 0.1
    assert metrics.abstention_precision(looks) == pytest.approx(0.8 / 0.9)


@pytest.fixture(scope="module")
def qa_sets(tmp_path_factory):
    """The sets of the task, of fewer questions and clips."""
    from maple_trl.data.synthetic import write_seven_tags

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CLAIMS))
        task = importlib.import_module("tasks.qa_plus")
        folder = tmp_path_factory.mktemp("qa-plus")

        def small(path, prompts_per_tag, seed, splits=("train", "test")):
            return write_seven_tags(path, 8, seed, splits, clips_per_pair=1)

        patch.setattr("maple_trl.data.synthetic.write_seven_tags", small)
        task.write_sets(folder)
    return task, folder


def test_what_is_trained_on_has_the_paper_s_proportions_and_none_answers(qa_sets):
    task, folder = qa_sets
    n = 7 * 8
    exact = task.rows_of(folder / "exact")
    assert len(exact) == n and set(exact["stratum"]) == {"exact"} and set(exact["replaced"]) == {None}
    assert all(row["options"] == list(task.OPTIONS) for row in exact)
    rows = task.rows_of(folder / "qa_plus")
    strata = Counter(rows["stratum"])
    assert strata == {"exact": n, "superset": round(n * 31_635 / 47_893), "deficit": round(n * 23_737 / 47_893)}
    replaced = Counter(zip(rows["stratum"], rows["replaced"], strict=True))
    assert replaced["deficit", "right"] == strata["deficit"] and replaced["exact", "right"] == n / 4
    assert set(task.rows_of(folder / "enough")["stratum"]) == {"exact", "superset"}
    wrong = task.rows_of(folder / "qa_plus_wrong")
    assert Counter(zip(wrong["stratum"], wrong["replaced"], strict=True))["exact", "wrong"] == n / 4


def test_prompts_show_the_options_and_the_letter_of_a_none_answer_is_found(qa_sets):
    from instruments_ours import none_letter

    task, folder = qa_sets
    rows = task.held_out(folder, "asked_always")
    assert len(rows) == 7 * 8 * 7 and len(set(rows["id"])) == len(rows)
    for row in rows.select(range(0, len(rows), 13)):
        shown = "".join(f"\n{'ABCD'[i]}. {text}" for i, text in enumerate(row["options"]))
        assert row["prompt"][-1]["content"] == row["question"] + shown
        assert (none_letter(row) == row["solution"]) is (row["stratum"] == "deficit")


def test_an_ideal_answer_names_what_is_fed_of_what_is_required_and_is_right(qa_sets):
    task, folder = qa_sets
    rows = task.rows_of(folder / "cold-plain").to_list()
    assert all(
        task.score(completions=[task.ideal_answer(row)], solution=[row["solution"]], options=[row["options"]]) == [1.0]
        for row in rows
    )
    row = next(row for row in rows if row["required_tag"] == "VAS" and row["stratum"] == "deficit")
    seen = "".join(f" {row[f'truth_{signal}']}" for signal in "VAS" if signal in row["tag"])
    assert task.ideal_answer(row) == f"<think>{seen}</think><answer>{row['solution']}</answer>"


class Answering:
    """A trainer whose policy answers by rule."""

    def __init__(self, folder, answer):
        self.args = types.SimpleNamespace(media_root=str(folder / "media"))
        self.generate_completions = lambda rows: [answer(row) for row in rows]


def test_abstention_is_measured_of_the_letter_that_is_answered(qa_sets, metrics):
    import instruments_ours

    task, folder = qa_sets

    def seen(answer):
        found = {"abstention": instruments_ours.Abstention(Answering(folder, answer), None, None).result()}
        rows = found["abstention"]["counts"]
        assert sum(row[2] for row in rows) == 7 * 8 * 7 and all(row[4] <= row[2] for row in rows)
        return found

    ideal = seen(task.ideal_answer)
    assert metrics.abstention_recall(ideal) == 1 and metrics.needless_abstention(ideal) == 0
    assert all(row[4] == row[2] for row in ideal["abstention"]["counts"])
    always = seen(lambda row: f"<think></think><answer>{instruments_ours.none_letter(row)}</answer>")
    assert metrics.abstention_recall(always) == metrics.needless_abstention(always) == 1
    silent = seen(lambda row: None)
    assert metrics.abstention_recall(silent) == 0


# TRL's own trainer, and shared prompts


@pytest.fixture
def sketch(monkeypatch, tmp_path):
    """A task of the embedded model as it is, with a question of each tag."""
    from maple_trl.data import load_seven_tags

    tasks, instruments = importlib.import_module("tasks"), importlib.import_module("instruments")
    embedded = importlib.import_module("tasks.embedded")
    told = {"model_name_or_path": "builtin:tiny-omni", "dataset_name": "builtin:seven-tags"}
    task = types.ModuleType("tasks.sketch")
    task.__file__ = __file__
    task.VERSION, task.ACCESSES, task.QUESTIONS, task.SAMPLES = 1, (), 1, 1
    task.prepare, task.options, task.score = lambda folder: None, lambda trainer: told, embedded.score
    task.held_out = lambda folder: load_seven_tags()["test"]
    monkeypatch.setitem(sys.modules, "tasks.sketch", task)
    monkeypatch.setattr(tasks, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(instruments.Curve, "QUESTIONS", 1)
    monkeypatch.setattr(instruments.Curve, "SAMPLES", 1)
    return "sketch"


def trained(task, options, instruments):
    """Carry a job out as a run does; return the trainer and what its instruments saw."""
    from instruments import INSTRUMENTS, Cost
    from runs import Run
    from worker import job_file

    from maple_trl.jobs.options import parse_args
    from maple_trl.jobs.train import build_trainer

    output = importlib.import_module("tasks").prepared(task)
    run = Run(
        task, "tiny/base", 0, {"trainer": "omni_grpo", "per_device_train_batch_size": 32, "max_steps": 2} | options
    )
    trainer, _ = build_trainer(*parse_args(["--config", str(job_file(run, output, output))]))

    def measure(questions, samples):
        return {"trained": {"accuracy": {"all": 0.5}}}

    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    cost = Cost(trainer)
    watched = {name: INSTRUMENTS[name](trainer, measure, cost) for name in instruments}
    trainer.train()
    moved = {name: float((value - before[name]).abs().max()) for name, value in trainer.model.named_parameters()}
    return trainer, cost.result(), moved, {name: one.result() for name, one in watched.items()}


@pytest.mark.long
@pytest.mark.slow
def test_unmodified_trl_trains_no_tower_on_the_prompts_that_ours_trains_both_on(sketch):
    from instruments_ours import UnmodifiedTRL

    trainer, cost, _, found = trained(sketch, {}, ["curve", "unmodified_trl"])
    assert found["unmodified_trl"]["same_prompts"] == 1
    moved = found["unmodified_trl"]["moved"]
    assert moved["visual"] == moved["audio_tower"] == 0 < moved["layers"]
    assert cost["completions"] == 64 and cost["cpu_seconds"] > 0
    assert [point["step"] for point in found["curve"]["points"]] == [0, 1, 2]
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2
    # The control: the same job by its own trainer.
    _, _, moved, _ = trained(sketch, {}, [])
    for inside in UnmodifiedTRL.PARTS.values():
        assert any(by > 0 for name, by in moved.items() if inside in name)


@pytest.fixture
def small(monkeypatch):
    """Comparisons of shared prompts that measure nothing."""
    from instruments_ours import SharedPrompt

    for name, value in {"STEPS": 2, "REPEATS": 1, "PROMPTS": (128,), "COMPLETION": 4}.items():
        monkeypatch.setattr(SharedPrompt, name, value)
    return SharedPrompt


@pytest.mark.slow
@pytest.mark.long
def test_a_shared_prompt_trains_the_same_weights_and_a_planted_difference_is_seen(sketch, small):
    from instruments_ours import differences

    trainer, _, _, found = trained(sketch, {}, ["shared_prompt"])
    training, at = found["shared_prompt"]["training"], found["shared_prompt"]["at"]["128"]
    assert training["same_completions"] == 1 and training["weights"] < 1e-5 and training["gradient_norm"] < 1e-4
    assert at["same_tokens"] == 1 and at["loss"] < 1e-4 and at["gradient"] < 1e-4
    assert at["times_faster"] == pytest.approx(at["seconds_alone"] / at["seconds_shared"])
    # The control: what is compared differs where one side takes other steps.
    watch = small(trainer, None, None)
    alone = watch._trained("off")
    watch._job["learning_rate"] = 1e-2
    faulty = differences(alone, watch._trained("auto"))
    assert faulty["weights"] > 1e-3
