"""What benchmarks measure beyond right and wrong: through `maple-trl eval`, and in its results, against scikit-learn and SciPy."""

import dataclasses
import json
import math
import shutil
import sys

import numpy as np
import pytest
from chat_server import ChatServer, say
from eval_runs import MODEL, evaluate, lines_of, result_of
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t
from sklearn.metrics import mean_absolute_error, root_mean_squared_error
from test_eval_inputs import results

from maple_trl.data import default_folder, load_seven_tags
from maple_trl.evaluation.evaluator import Evaluator
from maple_trl.rewards import MeasuredReward
from maple_trl.rewards.measures import told_letters, told_number


# In results


def counted(clip, category, errors, truth=5):
    """A line of a question that was answered several times, each off by so much."""
    measures = [
        {"ACC": float(e == 0), "OBOA": float(abs(e) <= 1), "MAE": float(abs(e)), "answered": 1.0} for e in errors
    ]
    return {
        "tag": "VA",
        "fed": "VA",
        "clip": clip,
        "category": category,
        "benchmark": "av-counting",
        "score": [measure["ACC"] for measure in measures],
        "extra": [json.dumps({"measures": json.dumps(measure)}) for measure in measures],
    }


COUNTS = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.sampled_from(["event", "object"]),
        st.lists(st.integers(-9, 9), min_size=2, max_size=2),
    ),
    min_size=1,
    max_size=12,
)


@given(COUNTS)
def test_counts_as_scikit_learn_has_them(rows):
    found = results([counted(*row) for row in rows], samples=2)["accesses"]["required"]["metrics"]
    for group in ("all", "event", "object"):
        errors = [error for _, category, errors in rows if group in ("all", category) for error in errors]
        if not errors:
            continue
        values = {
            name: estimate["value"] if group == "all" else estimate["per_category"][group]["value"]
            for name, estimate in found.items()
        }
        truth = np.full(len(errors), 5)
        told = truth + errors
        assert values["MAE"] == pytest.approx(mean_absolute_error(truth, told))
        assert values["RMSE"] == pytest.approx(root_mean_squared_error(truth, told))
        assert values["ACC"] == pytest.approx(np.mean(truth == told))
        assert values["OBOA"] == pytest.approx(np.mean(np.abs(truth - told) <= 1))
    assert found["MAE"]["value"] <= found["RMSE"]["value"] + 1e-9 and found["ACC"]["value"] <= found["OBOA"]["value"]
    assert found["MAE"]["count"] == len(rows) and found["MAE"]["clips"] == len({clip for clip, *_ in rows})
    assert found["MAE"]["per_benchmark"]["av-counting"] == {
        k: found["MAE"][k] for k in found["MAE"]["per_benchmark"]["av-counting"]
    }
    assert found["ACC"]["per_tag"]["VA"]["value"] == found["ACC"]["value"]


def test_intervals_are_by_clip():
    """Every clip left out once, and Student's t; RMSE's ends are the roots of its square's."""
    by_clip = {"a": [0, 1, 3], "b": [2, 2, 5], "c": [1, 0, 0]}
    rows = [(clip, "event", [error]) for clip, errors in by_clip.items() for error in errors]
    found = results([counted(*row) for row in rows])["accesses"]["required"]["metrics"]
    for name, power in (("MAE", 1), ("RMSE", 2)):
        mean = np.mean([error**power for _, _, (error,) in rows])
        without = [np.mean([error**power for clip, _, (error,) in rows if clip != left]) for left in by_clip]
        deviation = math.sqrt(2 / 3 * sum((value - mean) ** 2 for value in without))
        low, high = mean + t.ppf([0.025, 0.975], df=2) * deviation
        assert found[name]["value"] == pytest.approx(mean ** (1 / power))
        assert found[name]["low"] == pytest.approx(max(low, 0) ** (1 / power))
        assert found[name]["high"] == pytest.approx(high ** (1 / power))
    # Negative control: by question, they are others.
    bare = results([counted(None, *row[1:]) for row in rows])["accesses"]["required"]["metrics"]
    assert bare["MAE"]["clips"] is None and bare["MAE"]["high"] != found["MAE"]["high"]


# Reading answers


@pytest.mark.parametrize(
    "answer, letters",
    [
        ("A,C,F", "ACF"),
        ("A, C and F", "ACF"),
        ("(a) (c)", "AC"),
        ("[B]", "B"),
        ("A. happy, C. calm", "AC"),
        ("A: glad; B: sad", "AB"),
        ("a. happy, c. calm", "AC"),
        ("A. happy and C. calm", "AC"),
        ("A. happy, e.g. smiling", "A"),
        ("Ａ，Ｃ", "AC"),
        ("A、C", "AC"),
        ("A、高兴，C、平静", "AC"),
        ("happy and calm", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_letters_of_an_answer(answer, letters):
    assert told_letters(answer) == frozenset(letters)


@pytest.mark.parametrize(
    "answer, told",
    [
        ("4", 4),
        ("1,200", 1200),
        ("about 4 times, or 5", 4),
        ("-2.5", -2.5),
        ("2,3", 2),
        ("1,200,000 or 3", 1.2e6),
        ("many", None),
        (None, None),
    ],
)
def test_the_number_of_an_answer(answer, told):
    assert told_number(answer) == told


# Through the command


@pytest.fixture(scope="module")
def clip():
    return default_folder() / load_seven_tags()["test"][0]["video"]


def scripted(monkeypatch, said):
    """Lets the model be asked and run, and replaces what it wrote: by row, in the order of samples."""
    answers = Evaluator._answers

    def told(self, prompts, batch):
        return {
            number: [
                dataclasses.replace(answer, text=f"<answer>{said[number][i]}</answer>") for i, answer in enumerate(own)
            ]
            for number, own in answers(self, prompts, batch).items()
        }

    monkeypatch.setattr(Evaluator, "_answers", told)


def put(clip, folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder / name)


def test_counts_of_a_benchmark(clip, tmp_path, monkeypatch, capsys):
    record = {"question": "How many?", "type": "A2V", "query_interval": [0, 1], "clue": "[]"}
    records = [
        record | {"index": i, "video": f"v{i}.mp4", "answer": answer, "category": category}
        for i, (answer, category) in enumerate([(4, "event"), (4, "object"), (300, "event")])
    ]
    (tmp_path / "test.json").write_text(json.dumps(records))
    put(clip, tmp_path, *(f"cg_videos_720p/v{i}.mp4" for i in range(3)))
    scripted(monkeypatch, [["4", "5"], ["none", "9"], ["1000", "310"]])
    words = [*MODEL, "--benchmark", "av-counting", "--data", tmp_path, "--samples", "2", "--quiet"]
    assert evaluate(*words, "--output", tmp_path / "out") == 0
    found = result_of(tmp_path / "out")
    metrics = found["accesses"]["required"]["metrics"]
    # An answer without a number errs by all of it; 700 above 300 is more than twice as much and counts as 600.
    errors = [[0, 1], [4, 5], [600, 10]]
    means = {
        "ACC": (0.5 + 0 + 0) / 3,
        "OBOA": (1 + 0 + 0) / 3,
        "MAE": sum(sum(two) for two in errors) / 6,
        "RMSE": math.sqrt(sum(e * e for two in errors for e in two) / 6),
        "answered": 5 / 6,
    }
    assert {name: metrics[name]["value"] for name in metrics} == pytest.approx(means)
    assert metrics["ACC"]["per_category"]["object"]["value"] == 0 and metrics["ACC"]["clips"] == 3
    # The accuracy is that of the benchmark, and not the graded one of training.
    assert found["accesses"]["required"]["accuracy"]["sample_mean"]["value"] == pytest.approx(means["ACC"])
    assert found["scoring"]["score"]["metrics"] == ["counting"]
    assert found["scoring"]["score"]["name"] == "maple_trl.rewards.measures:MeasuredReward"
    assert {line["benchmark"] for line in lines_of(tmp_path / "out")} == {"av-counting"}
    assert "MAE 103.333 [" in capsys.readouterr().out


def test_letters_and_texts_of_a_benchmark(clip, tmp_path, monkeypatch):
    record = {"problem": "What?", "options": list("vwxyz"), "data_type": "video", "path": "a.mp4"}
    records = [
        record | {"problem_type": kind, "solution": solution}
        for kind, solution in (
            ("emer_ov_mc", "A,C,E"),
            ("OCR", "stop at the red line"),
            ("free-form", "the dog runs away"),
            ("multiple choice", "B"),
        )
    ]
    (tmp_path / "qa.json").write_text(json.dumps(records))
    put(clip, tmp_path, "videos/a.mp4")
    scripted(monkeypatch, [["A,B,C"], ["stop at red light"], ["the dog"], ["B"]])
    words = [*MODEL, "--benchmark", "intentbench", "--data", tmp_path, "--samples", "1", "--quiet"]
    assert evaluate(*words, "--output", tmp_path / "out") == 0
    metrics = result_of(tmp_path / "out")["accesses"]["required"]["metrics"]
    f1, wer = 2 * 2 / 6, 2 / 5  # two of three letters; one word left out and one wrong
    rouge = {"rouge1": 4 / 6, "rouge2": 2 / 4, "rougeL": 4 / 6}
    assert {name: metrics[name]["value"] for name in metrics} == pytest.approx(
        {"F1": f1, "exact": 0, "WER": wer} | rouge
    )
    assert list(metrics["F1"]["per_category"]) == ["emer_ov_mc"] and metrics["F1"]["count"] == 1
    scores = [line["score"] for line in lines_of(tmp_path / "out")]
    assert scores == pytest.approx([f1, 1 - wer, sum(rouge.values()) / 3, 1])


def test_a_missing_package_is_told_before_the_model_is_loaded(clip, tmp_path, monkeypatch, capsys):
    record = {"problem": "What?", "options": [], "data_type": "video", "path": "a.mp4"}
    (tmp_path / "qa.json").write_text(json.dumps([record | {"problem_type": "OCR", "solution": "stop"}]))
    put(clip, tmp_path, "videos/a.mp4")
    monkeypatch.setitem(sys.modules, "jiwer", None)
    words = ["--model", "no-such-model", "--benchmark", "intentbench", "--data", tmp_path]
    assert evaluate(*words, "--output", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "jiwer, which is not installed: pip install 'maple-trl[texts]'" in told


@pytest.fixture(scope="module")
def mmvu(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmvu")
    record = {"video_path": "videos/0.mp4", "question": "Which style?", "choices": dict.fromkeys("ABCDE")}
    records = [
        record | {"id": f"v{i}", "question_type": "open-ended", "answer": answer}
        for i, answer in enumerate(["cubism", "fauvism"])
    ]
    choices = {"choices": dict(zip("ABCDE", "vwxyz", strict=True)), "question_type": "multiple-choice"}
    records.append(record | choices | {"id": "v2", "answer": "B"})
    (folder / "validation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    put(clip, folder, "videos/0.mp4")
    return [*MODEL, "--benchmark", "mmvu", "--data", folder, "--samples", "1", "--quiet"]


SAID = [["the cubist style"], ["pointillism"], ["B"]]


def test_open_answers_are_judged(mmvu, tmp_path, monkeypatch):
    scripted(monkeypatch, SAID)

    def judging(number, body):
        text = json.dumps(body)
        return say(json.dumps({"correct": float("cubism" in text and "cubist" in text)}))

    with ChatServer(judging) as server:
        words = [*mmvu, "--judge-model", "grader", "--judge-server", server.url, "--output", tmp_path]
        assert evaluate(*words) == 0
        sent = [call.body for call in server.calls]
    assert len(sent) == 2 and all("Which style?" in json.dumps(body) for body in sent)
    found = result_of(tmp_path)
    assert [line["score"] for line in lines_of(tmp_path)] == [1.0, 0.0, 1.0]
    access = found["accesses"]["required"]
    assert access["metrics"]["judged"]["value"] == 0.5 and access["metrics"]["judged"]["count"] == 2
    assert access["accuracy"]["per_category"]["open-ended"]["value"] == 0.5
    assert found["scoring"]["score"]["judge"]["server"]["model"] == "grader" and server.url not in json.dumps(found)
    assert "completions" in json.loads((tmp_path / "run.json").read_text())["judging"]


def test_without_a_judge_open_answers_are_counted_and_not_wrong(mmvu, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, SAID)
    assert evaluate(*mmvu, "--output", tmp_path) == 0
    told = capsys.readouterr().out
    assert "2 open answers need a judge and are not scored, nor counted as wrong" in told
    access = result_of(tmp_path)["accesses"]["required"]
    assert access["reasons"] == {"no-judge": 2} and access["counts"]["unscored"] == 2
    assert access["accuracy"]["sample_mean"]["value"] == 1.0 and access["accuracy"]["sample_mean"]["count"] == 1
    assert access["bounds"]["sample_mean"] == {"low": 1 / 3, "high": 1.0} and access["metrics"] == {}


def test_a_judge_without_open_answers_is_refused(clip, tmp_path, capsys):
    rows = [{"question": "?", "prompt": [{"role": "user", "content": "?"}], "solution": "B"}]
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    words = [*MODEL, "--data", tmp_path, "--output", tmp_path / "out"]
    assert evaluate(*words, "--judge-model", "m") == 2
    assert "for open answers of a benchmark (rows whose answer_metric is judge)" in capsys.readouterr().err
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0] | {"answer_metric": "wer"}) + "\n")
    assert evaluate(*words) == 2
    assert "row 0, field 'answer_metric': must be one of accuracy, counting, letters_f1" in capsys.readouterr().err


def test_a_single_word_has_no_pairs():
    said = ["<answer>dog</answer>", "<answer>the dog</answer>", "no answer"]
    columns = {"solution": ["Dog.", "the cat", "the cat"], "answer_metric": ["rouge"] * 3}
    assert MeasuredReward()(completions=said, **columns) == pytest.approx([1.0, (0.5 + 0 + 0.5) / 3, 0.0])


def test_as_a_reward_function():
    noted = {}
    scores = MeasuredReward()(
        completions=["<answer>4</answer>", "<answer>B</answer>", "<answer>x</answer>"],
        solution=["4", "B", "y"],
        answer_metric=["counting", None, "judge"],
        log_extra=noted.__setitem__,
    )
    assert scores == [1.0, 1.0, None] and noted["reason"] == [None, None, "no-judge"]
    assert json.loads(noted["measures"][0])["MAE"] == 0 and noted["measures"][1:] == [None, None]
