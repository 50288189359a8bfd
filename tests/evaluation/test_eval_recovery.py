"""Evaluations that are interrupted, damaged, watched, and asked of odd rows."""

import ast
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import sys
import termios
import threading
from functools import partial
from pathlib import Path

import eval_runs
import pytest
from accelerate import PartialState
from eval_runs import MODEL, folder_with_ending, lines_of, result_of, run_of
from forks import start, status_of
from programs import Ranks

from maple_trl.data import default_folder, load_seven_tags
from maple_trl.evaluation.identity import PARSER_VERSION
from maple_trl.rewards import answers


pytestmark = pytest.mark.slow


ASKED = [*MODEL, "--samples", "2", "--batch-size", "2", "--quiet"]
SEVEN = ["--data", "builtin:seven-tags", "--limit", "8"]
evaluate = partial(eval_runs.evaluate, *ASKED)


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Words with a scoring function that an interrupt stops in the third batch, once `ENDED_AT` says so."""
    monkeypatch.setenv("ENDED_BY", str(int(signal.SIGINT)))
    with folder_with_ending(tmp_path):
        yield [*SEVEN, "--judge", "ending:ending"]


# Interruptions


def test_an_interrupt_says_how_to_go_on(judged, tmp_path, monkeypatch, capsys):
    assert evaluate(*judged, "--output", "whole") == 0
    sys.modules.pop("ending")  # in which calls are counted
    monkeypatch.setenv("ENDED_AT", "3")
    assert evaluate(*judged, "--output", "cut") == 130
    assert "stopped; the same command goes on from the last finished batch" in capsys.readouterr().err
    assert len(list(Path("cut/batches").glob("*.parquet"))) == 2
    monkeypatch.delenv("ENDED_AT")
    assert evaluate(*judged, "--output", "cut") == 0
    for name in ("result.json", "rows.parquet"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.long
def test_two_processes_are_killed_and_two_or_one_go_on(judged, tmp_path):
    words = [*judged, "--limit", "14"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def ends(rank):
        PartialState._reset_state()
        os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"ENDED_AT": "3", "ENDED_BY": str(int(signal.SIGKILL))}
        return evaluate(*words, "--output", "cut")

    processes = [start(partial(ends, rank)) for rank in range(2)]
    assert [status_of(process) for process in processes] == [-signal.SIGKILL] * 2
    assert sorted(path.name for path in Path("cut/batches").glob("*.parquet")) == [
        f"0000{i}.parquet" for i in range(4)
    ]
    shutil.copytree("cut", "alone")
    two = Ranks(2, ["-m", "maple_trl.cli", "eval", *ASKED, *words, "--output", "cut"], "two.log")
    assert two.wait() == 0, Path("two.log").read_text()[-3000:]
    assert run_of(Path("cut"))["processes"] == 2
    assert run_of(Path("cut"))["batches_done_before"] == 4
    assert Path("two.log").read_text().count("Accuracy (pass@1)") == 1
    for output in ("alone", "whole"):
        assert evaluate(*words, "--output", output) == 0
        for name in ("result.json", "rows.parquet"):
            assert Path("cut", name).read_bytes() == Path(output, name).read_bytes()


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert evaluate(*SEVEN, "--output", folder / "out") == 0
    return folder / "out"


def test_a_batch_that_is_damaged_is_asked_again(judged, whole, monkeypatch):
    monkeypatch.setenv("ENDED_AT", "3")
    assert evaluate(*judged, "--output", "cut") == 130
    first = Path("cut/batches/00000.parquet")
    first.write_bytes(first.read_bytes()[:200])  # as a disk that was full leaves it
    Path("cut/batches/.00001.parquet.77.partial").write_bytes(b"half")
    Path("cut/.rows.parquet.77.partial").write_bytes(b"half")
    monkeypatch.delenv("ENDED_AT")
    assert evaluate(*judged, "--output", "cut") == 0
    assert lines_of(Path("cut")) == lines_of(whole)
    assert run_of(Path("cut"))["batches_done_before"] == 1
    assert sorted(path.name for path in Path("cut").iterdir()) == [
        ".lock",
        "evaluation.json",
        "result.json",
        "rows.parquet",
        "run.json",
    ]


@pytest.mark.parametrize("name", ["rows.parquet", "evaluation.json"])
def test_a_finished_file_that_is_damaged_is_named(whole, tmp_path, capsys, name):
    shutil.copytree(whole, tmp_path / "out")
    content = (whole / name).read_bytes()
    (tmp_path / "out" / name).write_bytes(content[: len(content) // 2])
    assert evaluate(*SEVEN, "--output", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert f"{name} cannot be read" in told and "begin anew with --overwrite" in told
    assert evaluate(*SEVEN, "--output", tmp_path / "out", "--overwrite") == 0
    assert (tmp_path / "out" / "result.json").read_bytes() == (whole / "result.json").read_bytes()


# The report


def test_a_report_is_written_beside_the_numbers(whole, tmp_path, capsys):
    pytest.importorskip("jinja2")
    pytest.importorskip("plotly")
    shutil.copytree(whole, tmp_path / "out")
    before = (whole / "result.json").read_bytes()
    assert evaluate(*SEVEN, "--output", tmp_path / "out", "--report") == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert evaluate(*SEVEN, "--output", tmp_path / "out", "--report", tmp_path / "other.html") == 0
    assert (tmp_path / "other.html").is_file() and (tmp_path / "out" / "result.json").read_bytes() == before
    capsys.readouterr()
    assert evaluate(*SEVEN, "--output", tmp_path / "out", "--report", tmp_path) == 1  # a folder
    assert "maple-trl eval: no report: " in capsys.readouterr().err


# Rows


def test_odd_rows_have_a_clear_outcome(tmp_path, capsys):
    """Ids that are given twice, text in any script, a prompt of no message, a column of another type."""
    rows = load_seven_tags()["test"].select(range(7)).to_list()
    for row in rows:
        row["id"] = "same ж\u0301 中 😀"
        row["prompt"][0]["content"] += " é中😀\u202e \u0000"
        row["category"] = "Катего́рия"
    rows[3]["prompt"] = []
    rows[4]["audio_in_video"] = None
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", tmp_path, "--media-root", default_folder()]
    assert evaluate(*words, "--output", tmp_path / "out") == 1
    found = result_of(tmp_path / "out")
    assert [(error["row"], error["reason"]) for error in found["errors"]] == [(3, "invalid-row")]
    assert found["accesses"]["required"]["counts"]["scored"] == 6
    assert list(found["accesses"]["required"]["accuracy"]["per_category"]) == ["Катего́рия"]
    assert {line["id"] for line in lines_of(tmp_path / "out")} == set("0123456")
    before = (tmp_path / "out" / "result.json").read_bytes()
    assert evaluate(*words, "--output", tmp_path / "out", "--max-errors", "1") == 0
    assert (tmp_path / "out" / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--media-root", "nowhere"], "media root 'nowhere' is not a folder"),
        (["--filter", '{"tag": []}'], "dataset_filter must be a mapping of columns to lists of values"),
        (["--filter", "tag=V"], "is no JSON"),
    ],
)
def test_more_wrong_commands(tmp_path, capsys, words, message):
    assert evaluate(*SEVEN, *words, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_samples_that_are_all_equal_are_counted(tmp_path):
    """Which shows that nothing is sampled, whatever the options say."""
    assert evaluate(*SEVEN, "--top-k", "1", "--output", tmp_path / "equal") == 0
    assert evaluate(*SEVEN, "--temperature", "5", "--output", tmp_path / "spread") == 0
    name = "questions_with_equal_samples"
    equal, spread = (
        result_of(tmp_path / out)["accesses"]["required"]["completions"][name] for out in ("equal", "spread")
    )
    assert equal == 8 and spread == 0


# Watching


def shown_on_a_terminal(tmp_path, monkeypatch, *words):
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    shown = bytearray()

    def read():
        try:
            while part := os.read(main, 65536):
                shown.extend(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    asked = [word for word in ASKED if word != "--quiet"]
    with os.fdopen(terminal, "w") as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        assert eval_runs.evaluate(*asked, *SEVEN, "--output", tmp_path / "out", *words) == 0
    reader.join()
    os.close(main)
    return bytes(shown)


def test_progress_is_shown_on_a_terminal(tmp_path, monkeypatch):
    shown = shown_on_a_terminal(tmp_path, monkeypatch)
    assert re.search(rb"Questions:\s+0%", shown) and re.search(rb"Questions: 100%.* 8/8", shown)
    assert b"Questions" not in shown_on_a_terminal(tmp_path, monkeypatch, "--overwrite", "--quiet")


# The parser


def source_digest(module):
    """Of a module's code, without comments and docstrings."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


PARSERS = {
    1: "196976531b3ae0039d7cf764fdab0f75d17e6c63c8e93ffb84e3f208680dd629",
    2: "59b20de073ac9d564e57f40e254102cbeb72dcd66943fecc1dae54c7353a9c40",
    3: "c00d60a7554570eb36723694f0a97768296394ca240ec1ef5d037e25cc6d1f37",
    4: "60f647c4249bc5eabf134031c12d27cc0843ab305639338a262d8fbdb2ea27b2",
    5: "def39d0cc8996aae0aef3e769cd58661ea14e11e864489b8f0e7f1be60de3235",
    6: "a7fb882970cc44d6bad6643ec22fdc5425024ce5cf6fb129f74b9b271388308a",
}


def test_a_changed_parser_has_a_new_version(whole):
    """When this fails, accuracies of before and after may differ: raise `PARSER_VERSION` and add the digest here."""
    assert PARSERS[PARSER_VERSION] == source_digest(answers) and max(PARSERS) == PARSER_VERSION
    parser = result_of(whole)["scoring"]["parser"]
    assert parser["version"] == PARSER_VERSION and parser["name"] == "maple_trl.rewards.answers:extract_answer"


def test_the_digest_sees_code_and_not_words(tmp_path):
    from types import SimpleNamespace

    text = 'def f(a):\n    """What."""\n    return a + 1  # why\n'
    digests = []
    for version in (text, text.replace("What", "Other").replace("why", "else"), text.replace("1", "2")):
        (tmp_path / "module.py").write_text(version)
        digests.append(source_digest(SimpleNamespace(__file__=str(tmp_path / "module.py"))))
    assert digests[0] == digests[1] != digests[2]
