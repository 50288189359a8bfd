"""`--dry_run`: what is said is what would be done; no server is asked, no file is written, and mistakes are refused."""

import contextlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer, say
from run_checkpoints import write_checkpoint

from maple_trl import cli
from maple_trl.data.shards import ShardWriter
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.forecasts import forecast_training, look_at_data, look_at_model, many, size_of
from maple_trl.jobs.options import parse_args


MODEL = ("--model_name_or_path", "builtin:tiny-omni")
ROWS = [
    {"id": f"q{i}", "question": f"Which {i}?", "options": ["a", "b"], "answer": "A", "solution": "A", "tag": tag, "subtitle": "a word",
     "prompt": f"Which {i}?\nA. a\nB. b"}
    for i, tag in enumerate(["S", "S", "S", "VS", "VS", "AS"] * 2)
]  # fmt: skip

# The same as a training job asks them.
JOB_ROWS = [
    row
    | {"prompt": [{"role": "user", "content": row["prompt"]}]}
    | {"video": "clip.mp4" if "V" in row["tag"] else None, "audio": "sound.wav" if "A" in row["tag"] else None}
    for row in ROWS
]


# What is watched

_events: list[tuple[str, str]] = []
_watching = False
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _note(event, arguments):
    if not _watching:
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, mode, flags = os.fsdecode(arguments[0]), arguments[1], arguments[2]
        writes = set(mode or "") & set("wax+") if isinstance(mode, str) else (flags or 0) & _WRITING
        if writes and "__pycache__" not in path and not path.startswith(("/dev/", "/proc/")):
            _events.append((event, path))
    elif event in ("os.mkdir", "os.rename", "os.remove", "sqlite3.connect", "tempfile.mkdtemp", "tempfile.mkstemp"):
        if "__pycache__" not in str(arguments[0]) and str(arguments[0]) != ":memory:":
            _events.append((event, str(arguments[0])))
    elif event in ("socket.connect", "socket.getaddrinfo"):
        _events.append((event, str(arguments[1:] if event == "socket.connect" else arguments[0])))


sys.addaudithook(_note)  # for as long as the process lives; it looks on while a test asks it to


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Libraries make folders of their own when they are imported."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):  # here may be a run of the demo
        assert cli.main(["train", "--config", "demo", "--dry_run"]) == 0


@pytest.fixture
def watch(loaded, tmp_path, monkeypatch):
    """Run a command in a folder with a table, watched; return its status and what it opened for writing or connected to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(JOB_ROWS), tmp_path / "job.parquet")
    Path("job.yaml").write_text("extends: demo\ndataset_name: job.parquet\nevaluate_before_after: false\n")

    def run(*words):
        global _watching
        there = sorted(tmp_path.rglob("*"))
        _events.clear()
        _watching = True
        try:
            status = cli.main(list(words))
        finally:
            _watching = False
        return status, list(_events), sorted(set(tmp_path.rglob("*")) - set(there))

    return run


def shards(folder):
    from datasets import Features

    from maple_trl.data.schema import ROW_FEATURES

    with ShardWriter(folder, Features(ROW_FEATURES), 100) as writer:
        for row in ROWS[:3]:
            prompt = [{"role": "user", "content": row["prompt"]}]
            given = {"split": "train", "source": "test", "clip": row["id"], "prompt": prompt}
            known = {name: row[name] for name in ROW_FEATURES if name in row}
            writer.write(dict.fromkeys(ROW_FEATURES) | known | given, "train")


DRY = {
    "train": "train --config job.yaml",
    "train, stages": "train --config avatar/tiny/stages",
    "train, the set is not made": "train --config demo",
    "eval": "eval --model builtin:tiny-omni --data rows.parquet --split train --output_dir out",
    "eval of the Hub": "eval --model Nobody/Nothing-1B --data nobody/nothing --output_dir out",
    "data difficulty": "data difficulty --model builtin:tiny-omni --data rows.parquet --output_dir out",
    "data qa-plus": "data qa-plus rows.parquet out",
    "data hints": "data hints --dataset_name rows.parquet --output hinted.parquet --model NAME",
    "data push": "data push shards me/rows",
    "push": "push model me/model",
    "export": "export builtin:tiny-omni out",
}


@pytest.mark.parametrize("name", DRY)
def test_nothing_is_asked_and_nothing_is_written(name, watch, tmp_path, capsys):
    if name == "data push":
        shards(tmp_path / "shards")
    if name == "push":
        shutil.copytree(Path(cli.__file__).parents[1] / "assets" / "tiny-omni", tmp_path / "model")
    status, events, new = watch(*DRY[name].split(), "--dry_run")
    told = capsys.readouterr()
    assert status == 0, told.err
    assert events == [] and new == []
    if name != "data hints":  # it prints its table, with the numbers of a run
        assert "no network was asked, and nothing was written" in told.out


def test_the_watch_sees_what_is_written_and_asked(watch, capsys):
    """The same commands without `--dry_run`: else the test above could not fail."""
    status, events, new = watch("data", "qa-plus", "rows.parquet", "out")
    assert status == 0 and {event for event, _ in events} >= {"open", "os.mkdir"}
    assert {path.name for path in new} >= {"out", "qa_plus-train.json"}
    status, events, _ = watch(
        *(
            "data hints --dataset_name rows.parquet --output hinted.parquet --model NAME --limit 1 --max_attempts 1"
        ).split(),
        *("--base_url", "http://127.0.0.1:9/v1"),
    )
    assert status == 1 and any(event == "socket.connect" for event, _ in events)


def test_calls_that_are_told_are_those_that_come(watch, capsys):
    words = "data hints --dataset_name rows.parquet --output hinted.parquet --model NAME --json".split()
    with ChatServer(lambda number, body: say("Read the words.")) as server:
        words += ["--base_url", server.url]
        assert watch(*words, "--dry_run")[0] == 0
        told = json.loads(capsys.readouterr().out)
        assert server.calls == [] and told["usage"]["failed"] == {"dry-run": len(ROWS)}
        assert watch(*words)[0] == 0
        assert len(server.calls) == len(ROWS)


def test_an_evaluation_is_counted(watch, capsys):
    judge = '{"reward": "answer_judge", "server": {"model": "JUDGE", "base_url": "http://127.0.0.1:9/v1"}}'
    words = "eval --model NAME --server http://127.0.0.1:9/v1 --data rows.parquet --split train --output_dir out --samples 3".split()
    words += [
        "--access",
        "required,S",
        "--max_new_tokens",
        "10",
        "--judge",
        judge,
        "--filter",
        '{"tag": ["S", "AS"]}',
        "--json",
    ]
    assert watch(*words, "--dry_run")[0] == 0
    told = json.loads(capsys.readouterr().out)
    rows = sum(row["tag"] in ("S", "AS") for row in ROWS)
    completions = rows * 2 * 3
    assert told["numbers"] == {
        "rows": rows,
        "completions": completions,
        "tokens": 10 * completions,
        "calls": 2 * completions,
    }
    assert any("JUDGE at http://127.0.0.1:9/v1" in line for line in told["asks"]) and told["dry_run"] is True


def test_a_training_job_is_counted(watch, tmp_path):
    """The numbers of TRL's own arithmetic, and of the files of the embedded model."""
    options = {
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
    }
    options |= {
        "num_iterations": 2,
        "max_completion_length": 7,
        "save_steps": 2,
        "use_cpu": "true",
        "dtype": "float32",
    }
    judge = {"reward": "answer_judge", "server": {"model": "JUDGE", "base_url": "http://127.0.0.1:9/v1"}}
    keys = {
        "model_name_or_path": "builtin:tiny-omni",
        "dataset_name": "job.parquet",
        "output_dir": "out",
        "bf16": False,
    }
    Path("judged.yaml").write_text(json.dumps(keys | {"reward_funcs": ["accuracy_reward", judge]}))  # JSON is YAML
    words = [
        "--config",
        "judged.yaml",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]
    found = forecast_training(parse_args(words))
    # 5 steps of 2 micro-batches of 4; each rollout is trained on twice.
    assert found.numbers["completions"] == 5 * 2 * 4 / 2 and found.numbers["tokens"] == 7 * 5 * 2 * 4 / 2
    assert found.numbers["calls"] == found.numbers["completions"] and found.numbers["rows"] == len(ROWS)
    weights = look_at_model("builtin:tiny-omni").weights
    assert (
        found.numbers["bytes"] == 4 * weights + 3 * 3 * 4 * weights
    )  # the model, and 3 checkpoints with Adam's moments
    epochs = forecast_training(parse_args([*words, "--max_steps", "-1", "--num_train_epochs", "3"]))
    prompts = 4 * 2 // 4
    assert epochs.numbers["steps"] == 3 * (len(ROWS) // prompts) * 2
    filtered = parse_args([*words, "--dataset_filter", '{"tag": ["AS"]}'])
    assert forecast_training(filtered).numbers["rows"] == 2


def test_the_weights_are_those_of_the_model():
    from maple_trl.omni.loading import load_model

    model = load_model("builtin:tiny-omni")
    assert look_at_model("builtin:tiny-omni").weights == sum(
        math.prod(tensor.shape) for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values()
    )


def test_tables_are_counted_by_their_headers(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS[:5]), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[5:]), tmp_path / "train-00001-of-00002.parquet")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, ROWS[:3])))
    found = look_at_data(str(tmp_path), ("train", "test"))
    assert {split: part.rows for split, part in found.items()} == {"train": 12, "test": 3}
    found = look_at_data(str(tmp_path), ("train", "test"), {"tag": ["S"]})
    assert {split: part.rows for split, part in found.items()} == {"train": 6, "test": 3}
    with pytest.raises(SetupError, match="has no column 'tga'"):
        look_at_data(str(tmp_path), ("train",), {"tga": ["S"]})
    assert look_at_data("nobody/nothing", ("train",))["train"].fetched


def test_what_the_job_would_refuse_is_refused(watch, tmp_path, capsys):
    """By the checks that it makes itself before it loads a model."""
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "summary.json").write_text("{}")
    (tmp_path / "done" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "file").write_text("")
    bare = [{name: value for name, value in row.items() if name not in ("solution", "tag")} for row in ROWS]
    (tmp_path / "bare.jsonl").write_text("\n".join(map(json.dumps, bare)))
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps({"question": "Which?", "solution": "A"}) for _ in ROWS))
    torn = write_checkpoint(tmp_path / "torn" / "checkpoint-2", ranks=1) / "model.safetensors"
    os.truncate(torn, torn.stat().st_size - 4)
    asked = "eval --model builtin:tiny-omni --split train --data"
    for line, told in {
        "train --config job.yaml --reward_funcs acuracy_reward": "unknown reward 'acuracy_reward'; there are",
        "train --config job.yaml --dataset_name bare.jsonl": "needs a column 'solution', which bare.jsonl",
        "train --config job.yaml --dataset_name asked.jsonl": "has no column 'prompt'",
        "train --config job.yaml --plot_file file/plot.png": "plot_file: ",
        "train --config job.yaml --dataset_name rows.parquet": "row 0: a row with media needs a conversational 'prompt'",
        "train --config job.yaml --media_root nowhere": "media root 'nowhere' is not a folder",
        'train --config job.yaml --dataset_filter {"tag":["VX"]}': "has 'VX' in column 'tag'",
        "train --config job.yaml --output_dir torn --resume_from_checkpoint true": "model.safetensors is damaged",
        f"{asked} rows.parquet --output_dir done": "holds a training run or a model",
        f"{asked} rows.parquet --output_dir out --tags VA": "--tags gives the",
        f"{asked} rows.parquet --output_dir out --confidence 2": "strictly between",
        f"{asked} rows.parquet --output_dir out --judge nope": "unknown reward 'nope'",
        f"{asked} bare.jsonl --output_dir out": "needs a column 'solution'",
        "data convert sharegpt bare.jsonl out --pictures nope": "pictures must be one of",
        "data convert sharegpt bare.jsonl out --tags XX": "XX",
        "data convert sharegpt bare.jsonl out --shard_rows 0": "shard_rows must be 1 or more",
        "train --config job.yaml --output_dir done": "holds results of another run",
        "train --config job.yaml --output_dir file/out": "is a file",
        "train --config job.yaml --evaluate_before_after true": "has no split 'test' to evaluate on",
        "train --config job.yaml --num_generations 64 --per_device_train_batch_size 1024": "there are 12 rows, but one rollout takes",
        "train --config job.yaml --model_name_or_path done": "holds no model",
        "train --config job.yaml --resume_from_checkpoint true": "checkpoint",
        "eval --model builtin:tiny-omni --data rows.parquet --benchmark nope --output_dir out": "there is no benchmark 'nope'",
        "data push file me/rows": "holds no shards",
        "export done out": "holds no model",
        "export builtin:tiny-omni done": "is there already",
    }.items():
        status, events, _ = watch(*line.split(), "--dry_run")
        last = capsys.readouterr().err.strip().splitlines()[-1:]
        assert status == 2 and told in "".join(last), (line, last)
        assert events == []


def test_what_only_all_rows_can_say_is_not_said_of_the_first(tmp_path):
    """A row far down has what the job asks for, or makes a column one of texts."""
    rows = [{"prompt": f"Which {i}?", "tag": "S", "hint": None, "solution": i} for i in range(200)]
    rows[150] |= {"tag": "V", "hint": "look", "solution": "a text"}
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = look_at_data(str(tmp_path), ("train",), {"tag": ["V", "S"]})["train"]
    assert (found.rows, len(found.first), found.whole) == (200, 64, False)
    assert list(found.first["solution"]) == [str(i) for i in range(64)]
    found = look_at_data(str(tmp_path), ("train",), {"tag": ["V"]})["train"]
    assert (found.rows, list(found.first["hint"]), found.whole) == (1, ["look"], True)
    pq.write_table(pa.Table.from_pylist(rows[:150]), tmp_path / "test-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist([{"tag": "V", "prompt": "far"}]), tmp_path / "test-00001-of-00002.parquet")
    found = look_at_data(str(tmp_path), ("test",), {"tag": ["V"]})["test"]
    assert (found.rows, list(found.first["prompt"]), found.whole) == (1, ["far"], True)
    assert list(found.first["solution"]) == [None]  # a column that the other shard has


def test_words():
    assert (many(1, "row"), many(1200, "row")) == ("1 row", "1,200 rows")
    assert many(None, "row") == "rows (how many is not known yet)"
    assert [size_of(n) for n in (0, 10, 2048, 3 << 20, 5 << 40)] == [
        "0 bytes",
        "10 bytes",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
