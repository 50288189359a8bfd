"""`maple-trl data difficulty`: which rows stay, which leave by which name, and that no answer is asked for twice."""

import dataclasses
import json
import os
import signal
from collections import Counter
from pathlib import Path

import programs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from chat_server import ChatServer, completion, status
from eval_runs import SMALL
from hypothesis import given
from hypothesis import strategies as st

from maple_trl import cli
from maple_trl.chat import ChatClient
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.jobs import models
from maple_trl.jobs.difficulty import Measured, measure, reason_to_drop
from maple_trl.records.evaluations import LINES


ROOT = Path(__file__).resolve().parents[2]


def text_of(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def is_question(body):
    return "seed" in body


def answers(right_of, act=lambda body: None):
    """A server that is right on the first `right_of(text)` samples of a prompt, by their order of arrival."""
    seen = Counter()

    def choose(number, body):
        done = act(body)
        if done is not None:
            return done
        text = text_of(body)
        letter, times = right_of(text) if is_question(body) else ("A", 1)
        seen[text] += is_question(body)
        wrong = "ABCD"[("ABCD".index(letter) + 1) % 4]
        found = letter if seen[text] <= times else wrong
        media = [
            block
            for block in body["messages"][-1]["content"]
            if not isinstance(block, str) and block["type"] != "text"
        ]
        reply = completion(f"<answer>{found}</answer>", prompt_tokens=10 + len(text) + 50 * len(media))

        async def send(request, body):
            return web.json_response(reply)

        return send

    return choose


def write_rows(folder, count=10):
    """Rows whose question names them, and what each is to be right on, of eight samples."""
    rows = load_seven_tags()["train"].select(range(count)).to_list()
    for place, row in enumerate(rows):
        row["prompt"][0]["content"] = f"Row {place}: {row['question']}"
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def difficulty(folder, output, *words):
    words = ["--dataset_name", folder, "--media_root", default_folder(), *SMALL, "--quiet", "--output", output, *words]
    return cli.main(["data", "difficulty", *map(str, words)])


def table_of(folder, name):
    return [row for path in sorted(folder.glob(f"{name}-*.parquet")) for row in pq.read_table(path).to_pylist()]


# The rule


@given(st.integers(0, 8), st.floats(0, 0.9), st.floats(0, 1))
def test_which_accuracies_stay(right, above, width):
    at_most = above + (1 - above) * width
    reason = reason_to_drop(Measured(0, "0", "V", right / 8, 8), above, at_most)
    assert (reason is None) == (above < right / 8 <= at_most)
    assert (reason == "never solved") == (right == 0) and (reason == "always solved") == (right == 8 and at_most < 1)


def test_the_default_bounds():
    kept = [right for right in range(9) if reason_to_drop(Measured(0, "0", "V", right / 8, 8), 0.0, 0.75) is None]
    assert kept == [1, 2, 3, 4, 5, 6]


def test_lines_become_accuracies():
    lines = [
        {"row": 1, "id": "b", "tag": "V", "status": "scored", "score": s, "sample": i}
        for i, s in enumerate([1.0, 0.5])
    ]
    lines += [{"row": 1, "id": "b", "tag": "V", "status": "unscored", "reason": "no-score", "sample": 2}]
    lines += [{"row": 0, "id": "a", "tag": None, "status": "unscored", "reason": "no-score", "sample": 0}]
    lines += [{"row": 2, "id": "c", "tag": "A", "status": "error", "reason": "not-found", "detail": "no file"}]
    found = measure(pa.Table.from_pylist(lines, LINES))
    assert [(m.name, m.tag, m.accuracy, m.samples) for m in found] == [
        ("a", "", None, 0),
        ("b", "V", 0.75, 2),
        ("c", "A", None, 0),
    ]
    assert [reason_to_drop(m, 0, 0.75) for m in found] == ["unscorable", None, "quarantined: not-found"]


# The command


@pytest.mark.slow
def test_rows_stay_or_leave_by_name(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows")
    rows[3]["video"] = rows[3]["subtitle"] = "gone.mp4"
    rows[4]["solution"] = rows[4]["answer"] = None
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    times = [0, 1, 8, 4, 4, 6, 7, 8, 5, 0]

    def right_of(text):
        place = int(text.rsplit("Row ", 1)[1].split(":")[0])
        return rows[place]["solution"] or "A", times[place]

    words = ["--model", "served", "--server"]
    with ChatServer(answers(right_of)) as server:
        assert difficulty(tmp_path / "rows", tmp_path / "out", *words, server.url) == 0
        asked = sum(is_question(call.body) for call in server.calls)
        assert asked == 8 * 9
        capsys.readouterr()
        # Other bounds ask nothing anew.
        assert (
            difficulty(tmp_path / "rows", tmp_path / "out", *words, server.url, "--keep_at_most", "0.5", "--json") == 0
        )
        assert json.loads(capsys.readouterr().out)["kept"] == {rows[1]["tag"]: 1}
        assert difficulty(tmp_path / "rows", tmp_path / "out", *words, server.url) == 0
        assert sum(is_question(call.body) for call in server.calls) == asked
    kept = table_of(tmp_path / "out", "train")
    assert [(row["id"], row["accuracy"], row["samples"]) for row in kept] == [
        (rows[place]["id"], times[place] / 8, 8) for place in (1, 5, 8)
    ]
    assert all(row["prompt"] == rows[place]["prompt"] for row, place in zip(kept, (1, 5, 8), strict=True))
    dropped = {row["id"]: row["reason"] for row in table_of(tmp_path / "out", "dropped-train")}
    reasons = {
        0: "never solved",
        9: "never solved",
        2: "always solved",
        7: "always solved",
        6: "too easy",
        4: "unscorable",
    }
    assert dropped.pop(rows[3]["id"]).startswith("quarantined: ")
    assert dropped == {rows[place]["id"]: reason for place, reason in reasons.items()}
    summary = json.loads((tmp_path / "out" / "difficulty-train.json").read_text())
    assert (
        summary["rows"]
        == 10
        == sum(summary["kept"].values()) + sum(sum(found.values()) for found in summary["dropped"].values())
    )
    never = Counter(rows[place]["tag"] for place in (0, 9))
    assert summary["dropped"]["never solved"] == never
    told = capsys.readouterr().out
    assert "never solved" in told and f"media_root: {default_folder()}" in told
    # Its output is a data set.
    with ChatServer(answers(right_of)) as server:
        assert difficulty(tmp_path / "out", tmp_path / "again", *words, server.url) == 0
    assert [row["accuracy"] for row in table_of(tmp_path / "again", "train")] == [1 / 8, 6 / 8, 5 / 8]


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_asked_twice(tmp_path):
    rows = write_rows(tmp_path / "rows", 6)
    process = []

    def right_of(text):
        place = int(text.rsplit("Row ", 1)[1].split(":")[0])
        return rows[place]["solution"], 1 + place

    def kill(body):
        if is_question(body) and len([call for call in server.calls if is_question(call.body)]) == 29:
            os.kill(process[0], signal.SIGKILL)
            return status(503)

    words = [
        "data",
        "difficulty",
        "--dataset_name",
        tmp_path / "rows",
        "--media_root",
        default_folder(),
        *SMALL,
        "--quiet",
    ]
    words += ["--output", tmp_path / "out", "--model", "served", "--concurrency", "1", "--batch_size", "2"]
    with ChatServer(answers(right_of, kill)) as server:
        words += ["--server", server.url]
        killed = programs.Program(
            ["-m", "maple_trl.cli", *map(str, words)], tmp_path / "log", variables={"PYTHONPATH": str(ROOT)}
        )
        process.append(killed.pid)
        assert killed.wait() == -signal.SIGKILL
        before = [json.dumps(call.body, sort_keys=True) for call in server.calls if is_question(call.body)]
        assert len(before) == 29
        assert (
            not list((tmp_path / "out").glob("train*"))
            and len(list((tmp_path / "out/evaluation/batches").iterdir())) == 1
        )
        assert cli.main(list(map(str, words))) == 0
        after = [json.dumps(call.body, sort_keys=True) for call in server.calls if is_question(call.body)][29:]
    # The one that was never answered is asked again; batch 1 was under way, and its other 12 answers were kept.
    assert after[0] == before[-1] and len(after) == 6 * 8 - 28
    assert not set(before[:-1]) & set(after)
    kept = table_of(tmp_path / "out", "train")
    assert [row["accuracy"] for row in kept] == [place / 8 for place in range(1, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_a_server_that_fails_in_the_middle(kept, tmp_path, monkeypatch, capsys):
    """Only the answer that failed is asked for again; the control, without answers of its own, repeats the whole batch."""
    if not kept:
        monkeypatch.setattr(
            models, "ChatClient", lambda options: ChatClient(dataclasses.replace(options, cache_file=None))
        )
    write_rows(tmp_path / "rows", 6)
    failed = []

    def fail(body):
        if is_question(body) and sum(is_question(call.body) for call in server.calls) == 29 and not failed:
            failed.append(body)
            return status(401)

    words = ["--model", "served", "--concurrency", "1", "--batch_size", "2", "--server"]
    with ChatServer(answers(lambda text: ("A", 3), fail)) as server:
        assert difficulty(tmp_path / "rows", tmp_path / "out", *words, server.url) == 1
        assert "the same command goes on from what is answered" in capsys.readouterr().err
        assert difficulty(tmp_path / "rows", tmp_path / "out", *words, server.url) == 0
        asked = [json.dumps(call.body) for call in server.calls if is_question(call.body)]
    twice = {body for body, count in Counter(asked).items() if count > 1}
    assert len(twice) == (1 if kept else 16) and json.dumps(failed[0]) in twice
    assert len(asked) == 48 + len(twice)


@pytest.mark.slow
def test_a_model_in_this_process(tmp_path, capsys):
    words = [
        "--dataset_name",
        "builtin:seven-tags",
        *SMALL,
        "--model",
        "builtin:tiny-omni",
        "--limit",
        "14",
        "--samples",
        "4",
    ]
    words += ["--quiet", "--output", str(tmp_path / "out"), "--keep_at_most", "1"]
    assert cli.main(["data", "difficulty", *words]) == 0
    lines = pq.read_table(tmp_path / "out" / "evaluation" / "rows.parquet").to_pylist()
    mean = {
        name: sum(line["score"] for line in lines if line["id"] == name) / 4 for name in {line["id"] for line in lines}
    }
    kept = {row["id"]: row["accuracy"] for row in table_of(tmp_path / "out", "train")}
    assert kept == {name: accuracy for name, accuracy in mean.items() if accuracy > 0} and len(mean) == 14


@pytest.mark.slow
def test_what_is_refused(tmp_path, capsys):
    write_rows(tmp_path / "rows", 2)
    for words, message in (
        (["--keep_above", "0.8"], "above --keep_above and at most --keep_at_most"),
        (["--keep_at_most", "1.5"], "both in [0, 1]"),
        (["--access", "V,A"], "rows are measured with one choice of signals, got V, A"),
        (["--report"], "unknown"),
        (["--split", "dev"], "dev"),
        (["--temperature", "0"], "gives 8 times the same sample"),
    ):
        assert difficulty(tmp_path / "rows", tmp_path / "out", "--model", "builtin:tiny-omni", *words) == 2
        assert message in capsys.readouterr().err
    assert (
        difficulty(tmp_path / "rows", tmp_path / "rows", "--model", "served", "--server", "http://127.0.0.1:9/v1") != 0
    )
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"id": ["mine"]}), tmp_path / "shards" / "train-00000-of-00001.parquet")
    assert difficulty(tmp_path / "rows", tmp_path / "shards", "--model", "builtin:tiny-omni") == 2
    assert "is there already and is none of this command" in capsys.readouterr().err
    with ChatServer(answers(lambda text: ("A", 0))) as server:
        rows = write_rows(tmp_path / "rows", 1)
        assert rows
        words = ["--model", "served", "--server", server.url, "--keep_above", "0.99", "--keep_at_most", "1"]
        assert difficulty(tmp_path / "rows", tmp_path / "none", *words) == 1
    assert "none of 1 rows is kept" in capsys.readouterr().err
    assert cli.main(["data", "difficulty", "--help"]) == 0
    assert "--keep_at_most" in capsys.readouterr().out
