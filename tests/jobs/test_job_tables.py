"""Data files: types are decided over all rows, media may be embedded, and errors name file, line and what would be right."""

import csv
import io
import json
import math
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, Features, LargeList, List, Value, Video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_files import tone, write_audio, write_video
from omni_runs import build_trainer
from PIL import Image

from maple_trl import cli
from maple_trl.data.record_files import read_records
from maple_trl.evaluation.served_prompts import MessageEncoder
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.options import OmniScriptArguments
from maple_trl.jobs.tables import read_tables
from maple_trl.omni import embedded
from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.rewards import accuracy_reward
from maple_trl.train import load_datasets
from maple_trl.trainers.common.rows import asked_rows


QUESTION = [{"role": "user", "content": "what color"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(path):
    return load_datasets(OmniScriptArguments(dataset_name=str(path)))[0]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def without_none(value):
    """A table fills in what a row lacks."""
    if isinstance(value, dict):
        return {name: without_none(member) for name, member in value.items() if member is not None}
    return [without_none(member) for member in value] if isinstance(value, list) else value


# Types


@pytest.mark.parametrize("first", [{}, {"video": None}], ids=["lacking", "null"])
def test_a_column_may_begin_after_ten_megabytes(tmp_path, first):
    filler = "x" * 60_000
    rows = [{"prompt": f"{i} {filler}", "audio": "a.wav", **first} for i in range(200)]
    last = {"prompt": QUESTION, "audio": "a.wav", "video": "v.mp4"}
    path = write_lines(tmp_path / "train.jsonl", [*rows, last])
    assert path.stat().st_size > 11 << 20
    train = read(tmp_path)["train"]
    assert (
        len(train) == 201
        and train[200] == last
        and train[0]["video"] is None
        and train[199] == rows[199] | {"video": None}
    )


def test_a_value_keeps_what_it_says_beside_others_of_another_type(tmp_path, caplog):
    rows = [
        {"prompt": "3", "solution": 3, "video": None, "extra": {"a": 1}},
        {"prompt": QUESTION, "solution": "A", "video": ["a.mp4", "b.mp4"], "time": "2020-01-01 00:00:00"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "solution": 2.5, "video": "a.mp4"},
        {"prompt": [{"role": "user", "content": "[1]"}], "solution": "003", "extra": {"b": True}, "big": 10**30},
    ]
    train = read(write_lines(tmp_path / "rows.jsonl", rows))["train"]
    assert train["solution"][:] == ["3", "A", "2.5", "003"] and train["big"][3] == str(10**30)
    assert [row["prompt"] for row in train] == [row["prompt"] for row in rows]
    assert train["video"][:] == [None, ["a.mp4", "b.mp4"], "a.mp4", None]
    assert train["time"][1] == "2020-01-01 00:00:00" and without_none(train["extra"][:]) == [
        {"a": 1},
        None,
        None,
        {"b": True},
    ]
    assert "column 'solution' holds numbers as well as texts" in caplog.text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1000, 1000, width=16) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)


def alike(value, stored):
    """Whether a stored value says what the row says: a number may have become one of another type, or its text."""
    if isinstance(value, dict) and isinstance(stored, dict):
        return all(alike(value.get(name), stored.get(name)) for name in {*value, *stored})
    if isinstance(value, list) and isinstance(stored, list):
        return len(value) == len(stored) and all(map(alike, value, stored))
    if isinstance(stored, str) and not isinstance(value, str):
        return json.dumps(value) == stored
    if isinstance(value, float) and isinstance(stored, float):
        return math.isclose(value, stored, rel_tol=1e-12, abs_tol=1e-15)  # `datasets.Json` writes 15 decimals
    return value == stored


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["prompt", "solution", "x"]), VALUES, min_size=1), min_size=1, max_size=5
    ),
    st.booleans(),
)
def test_any_rows_come_back(tmp_path, rows, as_list):
    path = tmp_path / ("rows.json" if as_list else "rows.jsonl")
    path.write_text(json.dumps(rows, indent=1) if as_list else "\n\n".join(map(json.dumps, rows)))
    found = read_tables([path]).to_list()
    assert len(found) == len(rows)
    for row, stored in zip(rows, found, strict=True):
        assert alike(row, stored), (row, stored)


def test_shards_of_which_one_lacks_a_column(tmp_path):
    prompts = {"prompt": [QUESTION] * 2}
    Dataset.from_dict({**prompts, "video": [None, None]}).to_parquet(tmp_path / "train-00000-of-00003.parquet")
    Dataset.from_dict({**prompts, "video": ["a.mp4", None]}).to_parquet(tmp_path / "train-00001-of-00003.parquet")
    Dataset.from_dict(prompts).to_parquet(tmp_path / "train-00002-of-00003.parquet")
    write_lines(tmp_path / "test.jsonl", [{"prompt": "x"}])
    splits = read(tmp_path)
    assert splits["train"]["video"][:] == [None, None, "a.mp4", None, None, None] and len(splits["test"]) == 1


# Errors


def test_a_shard_that_is_missing(tmp_path):
    for number in (0, 2):
        Dataset.from_dict({"prompt": ["a"]}).to_parquet(tmp_path / f"train-{number:05}-of-00003.parquet")
    with pytest.raises(SetupError, match="the shards of split 'train' are not one whole set"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b",}\n', r"a\.jsonl, line 3, column 16: not JSON .*one row as a JSON object"),
        ("a.jsonl", b'{"prompt": "a"}\n[1, 2]\n', r"a\.jsonl, line 2: a list, not a row; a row is an object"),
        ("a.jsonl", b'{"prompt": "a"}\n"b"\n', r"a\.jsonl, line 2: a text, not a row"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe4"}\n', r"a\.jsonl, line 2: not UTF-8 .*save the file as UTF-8"),
        ("a.jsonl", b'{"prompt": "a \\ud83d"}\n', r"a\.jsonl, line 1: half of a character"),
        ("a.jsonl", b'{"prompt": "a"', r"a\.jsonl, line 1, column \d+: not JSON"),
        ("a.json", b'[\n{"prompt": "a"},\n{"prompt": "b"\n]\n', r"a\.json, line 4, column 1: not JSON"),
        ("a.json", b'[{"prompt": "a"}, 3]', r"a\.json, item 2 of the list: the value 3, not a row"),
        ("a.jsonl", b"\n\n", "it holds no row"),
        ("a.csv", b"prompt,solution\n", "it holds no row"),
        ("a.csv", b"prompt,solution\na,b\nc,d,e\n", r"a\.csv, line 3: 3 cells, and the header has 2 \(prompt, solution\)"),
        ("a.csv", b'prompt,solution\n"a,b\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.csv", b'prompt,solution\n"a\nb",c\n"d,e\nf\n', r"a\.csv, line 4: unexpected end of data; are its quotes closed"),
        ("a.csv", b'prompt,solution\n"a\nb",c,d\n', r"a\.csv, line 2: 3 cells"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl, line 2, column 11: not JSON"),
        ("a.jsonl", b"{}\n{}\n", r"a\.jsonl: it holds no row with a column"),
        ("a.csv", b"prompt,prompt\na,b\n", r"a\.csv, line 1: the header must name every column once"),
        ("a.csv", b"prompt,solution\na\xe4,b\n", r"a\.csv, line 2: not UTF-8"),
        ("a.csv", b"prompt,solution\n\"[{'role': 'user'}]\",b\n", r"a\.csv, line 2: column 'prompt' begins like a list.*json\.dumps"),
        ("a.xlsx", b"PK", r"a\.xlsx: a data file is one of \.parquet, \.jsonl, \.json, \.csv, \.tsv"),
        ("a.parquet", b"PAR1", "cannot read .*a.parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(SetupError, match=message):
        read(tmp_path / name)


def test_parquet_without_a_row(tmp_path):
    Dataset.from_dict({"prompt": ["a"]}).select([]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(SetupError, match=r"cannot read .*a\.parquet: it holds no row"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("column", ["question", "problem", "messages"])
def test_a_question_under_another_name(tmp_path, column, capsys):
    write_lines(tmp_path / "rows.jsonl", [{column: "a", "solution": "A"}])
    job = ["--model_name_or_path", "builtin:tiny-omni", "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", *job, "--dataset_name", str(tmp_path / "rows.jsonl")]) == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"has no column 'prompt'; its columns: {column}, solution" in said and f"{column!r} to 'prompt'" in said


# CSV


def test_csv_cells_are_texts_and_conversations_stand_as_json(tmp_path):
    (tmp_path / "train.csv").write_text(
        'prompt,video,solution,audio_in_video,images\n"[{""role"": ""user"", ""content"": ""Hi, you""}]",a.mp4,NA,True,\n\n'
        '"[sic] one\ntwo","[""a.mp4"", ""b.mp4""]",003,,"[""a.png"", ""b.png""]"\n',
        encoding="utf-8-sig",
    )
    first, second = read(tmp_path)["train"].to_list()
    assert first == {
        "prompt": [{"role": "user", "content": "Hi, you"}], "video": "a.mp4", "solution": "NA", "audio_in_video": True,
        "images": None,
    }  # fmt: skip
    assert second == {
        "prompt": "[sic] one\ntwo",
        "video": ["a.mp4", "b.mp4"],
        "solution": "003",
        "audio_in_video": None,
        "images": ["a.png", "b.png"],
    }


def test_options_in_csv_are_lists_in_json_or_as_pandas_and_numpy_write_them(tmp_path):
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "options", "solution"])
        numpy = str(np.array(["a red one", "it's", "blue"] * 6, dtype=object)), str(np.array(["a b", "c"]))
        cells = ['["red", "blue"]', str(["red", "it's"]), "['a', 'b']", "[2, 3]", None, *numpy, '["red", "blue", NaN]']
        cells += ["[]", "['red', nan]", "['a', 'b', None]"]
        writer.writerows([number, cell, "B"] for number, cell in enumerate(cells))
    rows = read(tmp_path)["train"]
    expected = [["red", "blue"], ["red", "it's"], ["a", "b"], ["2", "3"], None, ["a red one", "it's", "blue"] * 6]
    expected += [["a b", "c"], ["red", "blue", None], None, ["red", None], ["a", "b", None]]
    assert rows["options"] == expected and "\n" in numpy[0]
    rows = rows.select(range(8))
    said = [f"<answer>{text}</answer>" for text in ("blue", "it's", "a", "3", "B", "B", "c", "red")]
    scores = accuracy_reward(completions=said, solution=rows["solution"], options=rows["options"])
    assert scores == [1, 1, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("cell", ['"red" "blue" "green"', "('a' 'b')", "{'a' 'b'}", "[2 3]", "[nan 'a'"])
def test_what_spells_no_list_of_options_stays_a_text(tmp_path, cell):
    with open(tmp_path / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "options", "solution"], ["One", cell, "A"]])
    rows = read(tmp_path)["train"]
    assert rows["options"][:] == [cell]
    assert accuracy_reward(completions=["<answer>A</answer>"], solution=["A"], options=rows["options"]) == [1.0]


@pytest.mark.parametrize("cell", ["['red', 'it''s']", "['red' 'blue', 'green']", "['red''blue']"])
def test_options_without_a_comma_between_two_are_refused(tmp_path, cell):
    """Python would read two of them as one."""
    (tmp_path / "train.csv").write_text(f'prompt,options,solution\nOne,"{cell}",A\n')
    named = r"train\.csv, line 2: column 'options' has '\w+' and '\w+' side by side, .* part options by commas"
    with pytest.raises(SetupError, match=named):
        read(tmp_path)


def test_missing_cells_that_pandas_wrote_as_nan_are_empty(tmp_path):
    rows = [
        {"prompt": "One", "solution": "A", "subtitle": "Hi", "options": ["a", "b"], "score": 0.5, "place": 3},
        {
            "prompt": "Two",
            "solution": math.nan,
            "subtitle": math.nan,
            "options": math.nan,
            "score": math.nan,
            "place": math.nan,
        },
    ]
    write_lines(tmp_path / "train.jsonl", rows)
    assert "NaN" in (tmp_path / "train.jsonl").read_text()
    first, second = read(tmp_path)["train"].to_list()
    assert first == rows[0]
    empty = ("solution", "subtitle", "options", "score", "place")
    assert [second[name] for name in empty] == [None] * 5
    write_lines(tmp_path / "list.json", [rows])
    for name in ("train.jsonl", "list.json"):  # hints, validation and conversions read what training reads
        assert list(read_records(tmp_path / name))[1] == {"prompt": "Two"} | dict.fromkeys(empty)


CELLS = st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]), max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=4),
    st.sampled_from([(".csv", ","), (".csv", ";"), (".tsv", "\t")]),
)
def test_any_csv_comes_back(tmp_path, rows, kind):
    suffix, delimiter = kind
    text = io.StringIO()
    rows = [(prompt, solution, note or "x") for prompt, solution, note in rows]
    csv.writer(text, delimiter=delimiter).writerows([("prompt", "solution", "note"), *rows])
    (tmp_path / f"rows{suffix}").write_text(text.getvalue(), encoding="utf-8", newline="")
    found = read_tables([tmp_path / f"rows{suffix}"]).to_list()
    assert [tuple(row.values()) for row in found] == [(a or None, b or None, c) for a, b, c in rows]


# Media in tables


@pytest.fixture
def media(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "FOLDER", tmp_path / "cache")
    root = tmp_path / "root"
    root.mkdir()
    write_video(root / "clip.mp4", frames=24, audio=tone(0.5, 16000))
    write_audio(root / "sound.wav", tone(0.3, 16000))
    write_video(tmp_path / "outside.mp4", frames=24)
    return root


def test_embedded_media_train_without_torchcodec(media):
    data = {name: (media / name).read_bytes() for name in ("clip.mp4", "sound.wav")}
    stored = {"bytes": Value("binary"), "path": Value("string")}
    prompts = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": prompts, "video": Video(), "audio": stored})
    rows = [
        {"prompt": QUESTION, "video": {"bytes": data["clip.mp4"], "path": "my films/the clip.MP4"}, "audio": None},
        {"prompt": QUESTION, "video": None, "audio": {"bytes": data["sound.wav"], "path": None}},
        {"prompt": QUESTION, "video": {"path": str(media / "clip.mp4"), "bytes": None}, "audio": None},
    ]  # fmt: skip
    # Encoding a cell of `Audio`, unlike reading one, takes torchcodec: the column is made of what it stores.
    given = Dataset.from_list(rows, features=features).cast_column("audio", Audio())
    given.to_parquet(media / "train.parquet")
    assert isinstance(given.features["video"], Video) and isinstance(given.features["audio"], Audio)
    dataset, root = load_datasets(OmniScriptArguments(dataset_name=str(media)))
    dataset = dataset["train"]
    assert dataset.features["video"] == Value("string") and dataset["video"][2] == str(media / "clip.mp4")
    assert dataset["video"][0].startswith("embedded:") and dataset["video"][0].endswith("/the clip.MP4")
    loader = MediaLoader(root)
    assert (loader.video(dataset["video"][0]).frames == loader.video("clip.mp4").frames).all()
    trainer = build_trainer(
        root, given, shuffle_dataset=False, per_device_train_batch_size=12, gradient_accumulation_steps=1
    )
    assert trainer.train_dataset["video"][0] == dataset["video"][0]
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["media/quarantined_prompts"] == 0 and log["media_tokens/video"] and log["media_tokens/audio"]


def test_large_lists_hold_media_and_messages(media):
    """As Polars writes lists: all of them are large."""
    picture = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(picture, "png")
    cell = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})
    block = pa.struct({"type": pa.large_string(), "text": pa.large_string()})
    message = pa.struct({"role": pa.large_string(), "content": pa.large_list(block)})
    asked = [{"role": "user", "content": [{"type": "text", "text": "what color"}]}]
    columns = {
        "images": pa.array([[{"bytes": picture.getvalue(), "path": None}] * 2], pa.large_list(cell)),
        "prompt": pa.array([asked], pa.large_list(message)),
    }
    pq.write_table(pa.table(columns), media / "large.parquet")
    given = Dataset.from_parquet(str(media / "large.parquet"))
    assert isinstance(given.features["images"], LargeList) and isinstance(given.features["prompt"], LargeList)
    for table in (given, given.to_iterable_dataset(), given.cast_column("images", LargeList(datasets.Image()))):
        (row,) = embedded.as_paths(table)
        assert len(row["images"]) == 2 and all(name.startswith("embedded:") for name in row["images"])
    builder = PromptBuilder(MessageEncoder(), MediaLoader(media, workers=0), system_prompt="Be brief.")
    (row,) = asked_rows(embedded.as_paths(given), builder, "rows")
    assert [message["role"] for message in row["prompt"]] == ["system", "user"] and row["prompt"][1:] == asked
    assert len([block for block in builder.encode(row).messages[1]["content"] if block["type"] == "image_url"]) == 2


def test_a_path_in_a_media_column_must_lie_below_the_root(media):
    paths = ["clip.mp4", str(media / "clip.mp4"), str(media.parent / "outside.mp4"), "../outside.mp4"]
    given = Dataset.from_dict({"prompt": [QUESTION] * 4, "video": paths}).cast_column("video", Video())
    videos = embedded.as_paths(given)["video"][:]
    assert videos == paths
    loader = MediaLoader(media)
    assert len(loader.video(videos[0]).frames) == len(loader.video(videos[1]).frames)
    for path in videos[2:]:
        with pytest.raises(MediaError, match="outside-media-root"):
            loader.video(path)


def test_a_reference_reaches_nothing_but_what_was_stored(media):
    (media.parent / "cache").mkdir()
    (media.parent / "cache" / "secret.mp4").write_bytes((media / "clip.mp4").read_bytes())
    loader = MediaLoader(media)
    for name in (
        "embedded:secret.mp4",
        "embedded:../outside.mp4",
        f"embedded:{'0' * 64}/x.mp4",
        f"embedded:{'0' * 64}/../../outside.mp4",
    ):
        with pytest.raises(MediaError, match="not-found|outside-media-root"):
            loader.video(name)


def test_streamed_and_plain_bytes(media):
    data = (media / "clip.mp4").read_bytes()
    plain = Dataset.from_dict({"prompt": [QUESTION], "video": [data]})
    [reference] = embedded.as_paths(plain)["video"]
    streamed = Dataset.from_list([{"prompt": QUESTION, "video": {"bytes": data, "path": "a.mp4"}}]).cast_column(
        "video", Video()
    )
    [row] = embedded.as_paths(streamed.to_iterable_dataset())
    assert len(MediaLoader(media).video(row["video"]).frames) == len(MediaLoader(media).video(reference).frames) == 8
    assert embedded.as_paths(3) == 3
