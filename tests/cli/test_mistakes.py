"""What strangers do wrong on each command: one line that says what, the exit status of the table, and no traceback."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maple_trl import cli
from maple_trl.cli.base import STATUSES
from maple_trl.cli.command import GROUPS


ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "id": "1",
    "question": "Which?",
    "options": ["a", "b"],
    "answer": "A",
    "solution": "A",
    "tag": "S",
    "subtitle": "x",
}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder with what people name by mistake."""
    folder = tmp_path_factory.mktemp("things")
    for name in ("folder", "run"):
        (folder / name).mkdir()
    rows = [json.dumps(ROW | {"id": str(i), "prompt": "Which?"}) for i in range(4)]
    texts = {
        "rows.jsonl": "\n".join(rows),
        "broken.jsonl": '{"a": 1}\n{',
        "empty.jsonl": "",
        "file": "x",
        "run/metrics.jsonl": "{broken",
        "open.yaml": "a: [",
        "list.yaml": "- a",
        "empty.yaml": "",
        "tab.yaml": "a:\n\t- b",
        "twice.yaml": "shown: 1\nshown: 2",
        "type.yaml": "samples: many",
        "list_value.yaml": "shown: [1, 2]",
        "list_text.yaml": "media_root: [a]",
        "bool.yaml": "json: maybe",
        "unknown.yaml": "shwon: 3",
        "loop.yaml": "extends: loop.yaml",
        "nowhere.yaml.yaml": "extends: nowhere.yaml",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.jsonl").write_bytes('{"question": "caf\xe9"}'.encode("latin-1"))
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "no.parquet").write_bytes(b"PAR1 not really")
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "dangling.jsonl").symlink_to("nowhere")
    return folder


# Of each command line: what its one line says.
MISTAKES = {
    # commands and options
    "eval --modle x": "unknown argument --modle; did you mean --model?",
    "env --jsno": "unknown argument --jsno; did you mean --json?",
    "env extra": "unknown value extra",
    "recipes --path": "--path: name a recipe",
    "recipes demo extra": "unknown value extra",
    "completion": "SHELL",
    "completion fish": "'fish'",
    "plan --gpus x": "invalid int value: 'x'",
    "data validate rows.jsonl --shown": "expected one argument",
    "data validate": "required: TABLE",
    "data convert daily-omni": "required: SOURCE, OUTPUT",
    "data push folder": "required: REPO_ID",
    "data hints": "--dataset_name is missing",
    "data curate": "required: --config",
    "critical-steps run": "--model is missing",
    "report": "required: RUN",
    "plan": "--model_name_or_path is missing",
    "eval --model m": "--dataset_name is missing",
    "data qa-plus rows.jsonl out --replace nope": "invalid choice: 'nope'",
    "data curate --config list.yaml --engine spark": "invalid choice: 'spark'",
    # config files
    "train --config": "--config needs a value",
    "train --config nowhere.yaml": "cannot read the config file nowhere.yaml",
    "train --config folder": "cannot read the config file folder: Is a directory",
    "train --config binary.yaml": "is not a YAML file",
    "train --config open.yaml": "open.yaml, line 1, column 5: is not a YAML file",
    "train --config tab.yaml": "indent with spaces",
    "train --config list.yaml": "must hold a mapping",
    "train --config empty.yaml": "must hold a mapping",
    "train --config loop.yaml": "extends loop.yaml, which is built on it",
    "train --config nowhere.yaml.yaml": "extends nowhere.yaml: cannot read the config file",
    "train --trainer mapoo --max_steps 3": "trainer must be one of",
    "train --config demo --max_stepz 3": "did you mean --max_steps?",
    "train --config demo --dry_run=maybe": "--dry_run must be true or false, got 'maybe'",
    "eval --config type.yaml": "samples must be a whole number, got 'many'",
    "data validate rows.jsonl --config twice.yaml": "'shown' is given twice",
    "data validate rows.jsonl --config list_value.yaml": "shown must be a whole number, got [1, 2]",
    "data validate rows.jsonl --config list_text.yaml": "media_root must be a text",
    "data validate rows.jsonl --config bool.yaml": "json must be true or false, got 'maybe'",
    "data validate rows.jsonl --config unknown.yaml": "did you mean shown?",
    "report run --config folder": "Is a directory",
    "data curate --config nowhere.yaml": "nowhere.yaml: cannot be read",
    "data curate --config folder": "folder: cannot be read",
    "data curate --config open.yaml": "is no YAML",
    "data curate --config empty.yaml": "must be a mapping",
    "data curate --config unknown.yaml": "there is no key 'shwon'",
    # paths
    "report nowhere": "there is no folder nowhere",
    "report file": "file is a file; name its folder",
    "report folder": "holds no run",
    "report run --output folder": "folder is a folder; name a file in it",
    "report run --output file": "is there already and no report",
    "critical-steps nowhere --model m --dry_run": "there is no folder nowhere",
    "critical-steps run --model m --api_key_file folder": "api_key_file folder: Is a directory",
    "plan --model folder": "folder holds no model: there is no config.json in it",
    "plan --model file": "file is a file; name the folder of a model",
    "data convert nope rows.jsonl out": "'nope'; choose one of daily-omni",
    "data convert daily-omni nowhere out": "there is no file or folder nowhere",
    "data convert daily-omni folder out": "holds no table of Daily-Omni",
    "data convert daily-omni rows.jsonl out": "record 0: field 'Question' is missing",
    "data convert daily-omni rows.jsonl out --pictures nope": "pictures must be one of",
    "data validate nowhere": "there is no table nowhere",
    "data validate folder": "folder holds no table",
    "data validate file": "a table is one of .parquet",
    "data validate broken.jsonl": "broken.jsonl, line 2",
    "data validate no.parquet": "cannot read no.parquet",
    "data validate empty.parquet": "empty.parquet",
    "data validate latin.jsonl": "is not UTF-8",
    "data validate dangling.jsonl": "there is no table dangling.jsonl",
    "data validate rows.jsonl --media_root nowhere": "there is no folder nowhere",
    "data validate rows.jsonl --shown -1": "--shown must be 0 or more, got -1",
    "data review nowhere": "there is no file or folder nowhere",
    "data review folder": "folder holds no table",
    "data review rows.jsonl --port 99999": "--port must be at most 65535",
    "data review rows.jsonl --export file --summary": "file is a file",
    "data review rows.jsonl --summary --log folder": "folder is a folder; a log is a file",
    "data review rows.jsonl --token_file nowhere": "--token_file nowhere: No such file or directory",
    "data hints --dataset_name rows.jsonl --output folder --model m --dry_run": "folder: a table is one of",
    "data hints --dataset_name folder --output o.jsonl --model m --dry_run": "folder: a table is one of",
    "data hints --dataset_name broken.jsonl --output o.jsonl --model m --dry_run": "broken.jsonl, line 2",
    "data hints --dataset_name rows.jsonl --output o.jsonl --model m --base_url notaurl": "base_url must look like",
    "data hints --dataset_name rows.jsonl --output o.jsonl --model m --cache folder": "cache_file folder",
    "data hints --dataset_name rows.jsonl --output o.jsonl --model m --max_failures 2": "a share in [0, 1], got 2",
    "data qa-plus nowhere.jsonl out": "there is no file or folder nowhere.jsonl",
    "data qa-plus broken.jsonl out": "broken.jsonl, line 2",
    "data qa-plus rows.jsonl file": "file cannot be written",
    "data qa-plus rows.jsonl out --media_root nowhere": "there is no folder nowhere",
    "data qa-plus rows.jsonl out --none_share 3": "none_share must be a share in [0, 1]",
    "data push nowhere me/rows": "nowhere holds no shards",
    "data push folder notanid": "is no id of a repository; write OWNER/NAME",
    "vllm-serve --model x --port 99999": "--port must be a port, got 99999",
    "parity --model x --dtype int8": "--dtype must be float32, bfloat16 or float16",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake(line, things, monkeypatch, capsys):
    monkeypatch.chdir(things)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    there = sorted(things.rglob("*"))
    status = cli.main(line.split())
    told = capsys.readouterr()
    (last,) = [
        text for text in told.err.splitlines() if text.startswith("maple-trl ") and "maple-trl: loading" not in text
    ]
    assert status == 2 and MISTAKES[line] in last, last
    name = max((c.name for group in GROUPS.values() for c in group if line.startswith(c.name)), key=len)
    assert last.startswith(f"maple-trl {name}: ") and told.err.splitlines()[-1] == last
    assert "Traceback" not in told.err and "ended by an error" not in last and not told.out
    left = set(things.rglob("*")) - set(there)
    assert not [path for path in left if not path.name.startswith((".", "o.jsonl"))], left


# Exit statuses


def test_statuses_of_the_table(things, monkeypatch, capsys, tmp_path):
    """Each is provoked, by a command that is fast."""
    monkeypatch.chdir(things)
    assert cli.main(["recipes"]) == 0
    assert cli.main(["data", "validate", "rows.jsonl"]) == 1  # a problem is found
    assert cli.main(["data", "validate", "nowhere"]) == 2
    plan = ["plan", "--model", "Qwen/Qwen2.5-Omni-7B", "--gpu", "RTX-4090"]
    assert cli.main(plan) == 1 and cli.main([*plan[:-1], "H200", "--use_peft", "true"]) == 0  # does not fit, and fits
    capsys.readouterr()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("maple_trl.data.validation.validate_tables", interrupted)
    assert cli.main(["data", "validate", "rows.jsonl"]) == 130
    assert capsys.readouterr().err == "maple-trl data validate: stopped\n"
    assert set(STATUSES) == {0, 1, 2, 130, 141}


def test_an_error_of_the_program_is_one_line_and_1(things, monkeypatch, capsys):
    monkeypatch.chdir(things)

    def broken(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("maple_trl.data.validation.validate_tables", broken)
    assert cli.main(["data", "validate", "rows.jsonl"]) == 1
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith("maple-trl data validate: ended by an error (its traceback is in ")
    assert last.endswith(": ZeroDivisionError: by zero")


PROGRAM = [sys.executable, "-m", "maple_trl.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}


@pytest.mark.parametrize("words", ["--help", "recipes", "data validate --help", "completion bash", "env --json"])
@pytest.mark.matrix(cases=3)
def test_whoever_reads_has_gone(words):
    """As `head` does: nothing is said, and the status is that of a closed pipe."""
    program = subprocess.Popen(
        [*PROGRAM, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait(120) == 141


def opened_by(process):
    """Returns the files that a process has open."""
    found = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(link.readlink())
    return found


def test_ctrl_c(tmp_path):
    """While many rows are checked."""
    row = json.dumps(ROW)
    (tmp_path / "rows.jsonl").write_text("\n".join([row] * 400_000))
    command = [*PROGRAM, "data", "validate", "rows.jsonl", "--json"]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path
    )
    while tmp_path / "rows.jsonl" not in opened_by(program.pid):
        assert program.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    told, error = program.communicate(timeout=120)
    assert (told, error, program.returncode) == ("", "maple-trl data validate: stopped\n", 130)


# A disk that is full, and no permission


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
@pytest.mark.parametrize("words", ["recipes", "data convert --help"])
def test_a_full_disk_under_the_output(words):
    with open("/dev/full", "w") as full:
        command = [*PROGRAM, *words.split()]
        shown = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=120)
    (line,) = shown.stderr.splitlines()
    name = words.removesuffix(" --help")
    assert line.startswith(f"maple-trl {name}: cannot write: No space left on device") and shown.returncode == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user and back")
def test_no_permission(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(ROW))
    cli.main(["data", "validate", "rows.jsonl"])  # libraries are loaded
    capsys.readouterr()
    Path("rows.jsonl").chmod(0)
    os.seteuid(65534)
    try:
        status = cli.main(["data", "validate", "rows.jsonl"])
    finally:
        os.seteuid(0)
    last = capsys.readouterr().err.splitlines()[-1]
    assert status in (1, 2) and "rows.jsonl" in last and "ermission denied" in last and "ended by an error" not in last
