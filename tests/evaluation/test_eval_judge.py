"""`maple-trl eval --judge`: captions graded by a model on a server or in this process."""

import json
import re
from functools import partial

import eval_runs
import pytest
from chat_server import ChatServer, say, status, thinking_model
from eval_runs import MODEL, lines_of, result_of, run_of

from maple_trl.data import default_folder, load_seven_tags


GRADES = {"missing": 0.8, "errors": 0.6, "fusion": 1.0}
ASKED = [*MODEL, "--samples", "2", "--batch-size", "2", "--quiet", "--judge", "caption_judge"]
evaluate = partial(eval_runs.evaluate, *ASKED)


def grading(number, body):
    return say(json.dumps(GRADES))


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Six rows with reference captions; the last has none."""
    folder = tmp_path_factory.mktemp("captions")
    rows = load_seven_tags()["test"].select(range(6)).to_list()
    for i, row in enumerate(rows):
        row["reference"] = f"Reference caption {i}: a disc moves." if i < 5 else None
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", folder, "--media-root", default_folder()]


def test_captions_are_graded_by_a_server(captions, tmp_path):
    with ChatServer(grading) as server:
        words = [*captions, "--judge-model", "grader", "--judge-server", server.url]
        assert evaluate(*words, "--output", tmp_path / "out") == 0
        sent, asked = [call.body for call in server.calls], len(server.calls)
        assert evaluate(*words, "--output", tmp_path / "out") == 0 and len(server.calls) == asked
    assert {body["model"] for body in sent} == {"grader"} and {body["temperature"] for body in sent} == {0}
    lines = lines_of(tmp_path / "out")
    asked_about = {line["completion"] for line in lines if line["score"] is not None}
    text = "\n".join(json.dumps(body, ensure_ascii=False) for body in sent)
    shown = [answer for c in asked_about for answer in re.findall(r"<answer>(.*)</answer>", c)]
    assert "Reference caption 3" in text and shown and all(answer in text for answer in shown)
    found = result_of(tmp_path / "out")
    for line in lines:
        assert line["score"] in (None, 0.0, pytest.approx(0.8))  # 0 by rule: a completion with nothing to grade
        if line["score"]:
            assert json.loads(json.loads(line["extra"])["caption_judge_grades"]) == GRADES
    assert [line["status"] for line in lines if line["row"] == 5] == ["unscored"] * 2
    counts = found["accesses"]["required"]["counts"]
    assert (counts["scored"], counts["unscored"]) == (5, 1) and sum(line["score"] == 0 for line in lines) < 10
    by_row = {row: [line["score"] for line in lines if line["row"] == row] for row in range(5)}
    mean = sum(sum(scores) / 2 for scores in by_row.values()) / 5
    assert found["accesses"]["required"]["accuracy"]["sample_mean"]["value"] == pytest.approx(mean)
    assert found["accesses"]["required"]["grades"] == pytest.approx(GRADES)
    scored = found["scoring"]["score"]
    assert scored["name"].endswith(":CaptionJudge") and scored["entry"]["server"]["model"] == "grader"
    assert re.fullmatch("[0-9a-f]{64}", scored["guideline_sha256"]) and server.url not in json.dumps(found)
    assert run_of(tmp_path / "out")["judging"] is not None and (tmp_path / "out" / "judge.sqlite").is_file()


def test_a_judge_that_thinks_has_room_and_its_own_sampling(captions, tmp_path):
    words = [*captions, "--limit", "2", "--judge-model", "grader", "--judge-server"]
    for more, limit in (([], 2048), (["--judge-max-tokens", "300"], 300)):
        with ChatServer(thinking_model(grading)) as server:
            assert evaluate(*words, server.url, *more, "--output", tmp_path / str(limit)) == 0
            assert {call.body.get("max_completion_tokens") for call in server.calls} == {None, limit}
            assert {call.body.get("max_tokens") for call in server.calls} == {None, limit}
        found = result_of(tmp_path / str(limit))
        assert found["scoring"]["score"]["entry"]["server"]["sampling"] == {"temperature": 0, "max_tokens": limit}
        assert found["accesses"]["required"]["grades"] == pytest.approx(GRADES)


def test_a_judge_that_fails_costs_nothing_twice(captions, tmp_path, capsys):
    """The evaluation stops, and goes on with the answers that had been given."""
    words = [*captions, "--limit", "5", "--judge"]

    def judge(url):
        options = {"model": "grader", "base_url": url, "max_attempts": 1}
        return json.dumps({"reward": "caption_judge", "max_failure_rate": 0, "min_requests": 1, "server": options})

    with ChatServer(grading) as server:
        assert evaluate(*words, judge(server.url), "--output", tmp_path / "whole") == 0
        needed = len(server.calls)
    with ChatServer(lambda number, body: grading(number, body) if number < 3 else status(500)) as server:
        assert evaluate(*words, judge(server.url), "--output", tmp_path / "cut") == 1
    told = capsys.readouterr().err
    assert "JudgeUnavailableError: caption_judge failed for" in told and "goes on from the last finished batch" in told
    assert not (tmp_path / "cut" / "result.json").exists()
    with ChatServer(grading) as server:
        assert evaluate(*words, judge(server.url), "--output", tmp_path / "cut") == 0
        assert len(server.calls) == needed - 3
    for name in ("result.json", "rows.parquet"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_judge_of_another_model_is_another_evaluation(captions, tmp_path, capsys):
    with ChatServer(grading) as server:
        words = [*captions, "--limit", "2", "--judge-server", server.url, "--output", tmp_path]
        assert evaluate(*words, "--judge-model", "one") == 0
        assert evaluate(*words, "--judge-model", "two") == 2
    assert "scoring.score.entry.server.model: 'one', not 'two'" in capsys.readouterr().err


def test_a_judge_in_this_process(captions, tmp_path):
    """A tiny random model gives no verdict: its rows are not scored, and never wrong."""
    from tiny_models import build_tiny_text

    for part in build_tiny_text():
        part.save_pretrained(tmp_path / "judge")
    entry = {"reward": "caption_judge", "max_failure_rate": None}
    entry["local"] = {"model": str(tmp_path / "judge"), "max_new_tokens": 5}
    (tmp_path / "eval.yaml").write_text(json.dumps({"judge": entry, "limit": 3}))  # JSON is YAML
    words = [*MODEL, "--samples", "1", "--quiet", "--output", tmp_path / "out"]
    assert eval_runs.evaluate(*words, "--config", tmp_path / "eval.yaml", *captions) in (0, 1)
    found = result_of(tmp_path / "out")
    assert found["scoring"]["score"]["entry"]["local"]["max_new_tokens"] == 5
    for line in lines_of(tmp_path / "out"):
        assert line["status"] == "unscored" or line["score"] == 0.0 and not re.search(r"\w", line["answer"] or "")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--judge", "caption_judge"], "caption_judge needs a model that judges: --judge_model NAME"),
        (["--judge", "caption_judge", "--judge-server", "http://127.0.0.1:9/v1"], "--judge-model, and where it is"),
        (["--judge", "accuracy_reward", "--judge-max-tokens", "9"], "and so is --judge-max-tokens"),
        (["--judge", "caption_judge", "--judge-model", "m", "--judge-max-tokens", "0"], "must be 1 or more, got 0"),
        (
            ["--judge", "accuracy_reward", "--judge-model", "m"],
            "--judge-model, and where it is with --judge-server, are for",
        ),
        (["--judge", "caption_judge", "--judge-model", "m", "--judge-server", "here"], "base_url must look like http"),
        (["--judge", '{"reward": "caption_judge", "server": {"model": "m", "timout": 3}}'], "did you mean timeout?"),
        (["--judge", '{"reward": "caption_judg", "server": {}}'], "did you mean caption_judge?"),
        (["--judge", '{"reward": '], "--judge is no JSON object"),
    ],
)
def test_judges_that_are_described_wrongly(captions, tmp_path, capsys, words, message):
    assert evaluate(*captions, *words, "--output", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_a_data_set_without_references_is_told(tmp_path, capsys):
    words = ["--data", "builtin:seven-tags", "--limit", "2", "--judge-model", "m", "--judge-server"]
    with ChatServer(grading) as server:
        assert evaluate(*words, server.url, "--output", tmp_path) == 2  # before a model is loaded
    assert (
        "the reward 'caption_judge' needs a column 'reference', which builtin:seven-tags has not"
        in capsys.readouterr().err
    )
