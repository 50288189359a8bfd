"""Validation of tables: each kind of problem is found where it is, and a right table has none."""

import csv
import json
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from maple_trl import cli
from maple_trl.data.record_files import TableError
from maple_trl.data.row_rules import signals
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.data.shards import write_shards
from maple_trl.data.validation import KINDS, table_files, validate_tables
from maple_trl.evaluation.served_prompts import MessageEncoder
from maple_trl.jobs.data import find_tables
from maple_trl.jobs.tables import read_tables
from maple_trl.modalities import Modality
from maple_trl.omni.media.loader import MediaError, MediaLoader
from maple_trl.omni.media.sampling import MediaLimits
from maple_trl.omni.prompt import PromptBuilder


PROMPT = [{"role": "user", "content": "What is it?"}]


def question(number=0, **changes):
    fields = {
        "id": f"q{number}",
        "clip": f"clip{number}",
        "tag": "VA",
        "source": "s",
        "split": "train",
        "prompt": PROMPT,
        "question": "What is it?",
        "options": ["red", "blue"],
        "answer": "B",
        "solution": "B",
        "video": f"{number}.mp4",
        "provenance": [{"field": "question", "model": "m", "prompt_hash": "0123456789abcdef", "reviewer": None}],
    }
    return fields | changes


def asked(text):
    return [{"role": "user", "content": text}]


def caption(number=0, **changes):
    fields = question(
        number, question=None, options=None, answer=None, solution=None, subtitle="Hello there.", tag="VS"
    )
    return fields | {"reference": "A dog.", "reference_v": "A dog.", "reference_s": "Hello."} | changes


def opened(**changes):
    return question(**{"options": None, "answer": "a dog", "solution": "a dog", **changes})


RIGHT = [
    question(),
    question(options=["a"] * 26, answer="A,Z", solution="A,Z"),
    question(options=["red", "blue", None, ""]),  # padded to the longest list of a table
    question(options=["a"] * 26 + [None]),
    opened(),
    opened(options=[None, None]),
    opened(options=[]),
    caption(),
    caption(tag="AS", video=None, audio="0.wav", reference_v=None, reference_a="A bark."),
    question(tag="V", video=None, image="0.png"),
    question(prompt=asked("<video>What? <audio>")),
    question(tag="V", video=None, image="0.png", prompt=asked("In <image>?")),
    question(tag="V", video=None, images=["0.png", "1.png"], prompt=asked("Is <image> like <image>?")),
    question(images=["0.png", "1.png"]),
    question(images=[]),
    question(tag="VAS", subtitle="Hi there.", prompt=asked("Said: <subtitle>")),
    question(tag="s", video=None, subtitle="0.srt"),
    question(stratum="exact", required_tag="AV"),
    question(stratum="superset", required_tag="A"),
    question(stratum="deficit", required_tag="VAS"),
    question(provenance=None, split=None),
    question(provenance=[{"field": "tag", "reviewer": "me"}]),
    question(question=None, answer=None, solution=None, options=None) | {"completion": "It is red."},
]


WRONG = [
    (question(id=None), "empty", "id", "must be filled"),
    (question(prompt=[]), "empty", "prompt", "must be filled"),
    (question(source=" "), "empty", "source", "must be filled"),
    (question(tag="VX"), "tag", "tag", "must be one of V, A, S, VA, VS, AS, VAS, but is 'VX'"),
    (question(required_tag="none"), "tag", "required_tag", "must be one of"),
    (question(prompt=[{"role": "robot", "content": "x"}]), "prompt", "prompt", "one of 'robot'"),
    (question(prompt=[{"role": "user", "content": None}]), "prompt", "prompt", "an empty message of the user"),
    (question(prompt=[{"role": "system", "content": "x"}]), "prompt", "prompt", "no message of the user"),
    (
        question(prompt=asked("Here: <audio>, <video> and <image>.")),
        "prompt",
        "prompt",
        "holds 1 <image> mark(s), but the row has 0",
    ),
    (
        question(prompt=asked("<video> or <video>?")),
        "prompt",
        "prompt",
        "holds 2 <video> mark(s), but the row has 1 of that",
    ),
    (question(subtitle="subs/words.ab"), "path", "subtitle", "which looks like a file; files that are read end in"),
    (question(answer="C", solution="C"), "answer", "answer", "must be the letter of an option (A, B), or"),
    (question(answer="blue", solution="blue"), "answer", "answer", "but is 'blue'"),
    (question(answer="A,A", solution="A,A"), "answer", "answer", "but is 'A,A'"),
    (question(solution="A"), "answer", "solution", "is 'A', but must be the answer, 'B'"),
    (question(answer=None), "answer", "answer", "must be filled for a question"),
    (opened(solution=None), "answer", "solution", "must be filled for a question"),
    (
        question(options=["red"], answer="A", solution="A"),
        "answer",
        "options",
        "2 to 26 texts, or none at all, but are 1",
    ),
    (question(options=["red", "", "blue"]), "answer", "options", "option B is empty"),
    (
        question(options=["red", "", None], answer="A", solution="A"),
        "answer",
        "options",
        "must be 2 to 26 texts, or none at all, but are 1",
    ),
    (caption(reference=None), "reference", "reference", "a row is a question or a caption"),
    (caption(reference_s=None), "reference", "reference_s", "must be filled for a caption of VS"),
    (caption(tag="VAS"), "reference", "reference_a", "must be filled for a caption of VAS"),
    (question(video="/abs/0.mp4"), "path", "video", "must be a path below the media root"),
    (question(audio="../0.wav"), "path", "audio", "without '..', but is '../0.wav'"),
    (question(video="http://host/0.mp4"), "path", "video", "below the media root"),
    (question(video="C:\\0.mp4"), "path", "video", "below the media root"),
    (question(tag="VAS"), "signal", "tag", "is VAS, but field 'subtitle' is empty, which S needs"),
    (question(tag="V", video=None, audio="0.wav"), "signal", "tag", "field 'video' or 'image' is empty"),
    (question(image="0.png", images=["1.png"]), "image", "images", "must be empty beside 'image'"),
    (question(images=["0.png", "/1.png"]), "path", "images", "below the media root, without '..', but is '/1.png'"),
    (
        question(images=["0.png", "1.png"], prompt=asked("In <image>?")),
        "prompt",
        "prompt",
        "holds 1 <image> mark(s), but the row has 2",
    ),
    (question(tag="A", video=None, image="0.png"), "signal", "tag", "field 'audio' or 'video' is empty"),
    (question(stratum="best", required_tag="V"), "stratum", "stratum", "must be exact, superset or deficit"),
    (question(stratum="exact", required_tag="V"), "stratum", "stratum", "is fed VA is superset"),
    (question(stratum="superset", required_tag="S"), "stratum", "stratum", "is fed VA is deficit"),
    (question(stratum="exact"), "stratum", "required_tag", "is empty beside a stratum"),
    (
        question(provenance=[{"field": "color", "model": "m"}]),
        "provenance",
        "provenance",
        "'color', which is no column",
    ),
    (question(provenance=[{"field": "answer"}]), "provenance", "provenance", "without model and reviewer"),
    (
        question(provenance=[{"field": "answer", "model": "m", "prompt_hash": "no hash"}]),
        "provenance",
        "provenance",
        "which must be 8 to 64 hexadecimal digits",
    ),
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def found(report):
    return [(p.kind, p.field, p.row) for problems in report.shown.values() for p in problems]


def test_right_rows_have_no_problem(tmp_path):
    rows = [{**row, "id": str(i), "clip": str(i)} for i, row in enumerate(RIGHT)]
    report = validate_tables([write_jsonl(tmp_path / "train.jsonl", rows)])
    assert (report.rows, report.files, found(report)) == (len(RIGHT), 1, [])


@pytest.mark.parametrize(
    ("row", "kind", "field", "message"), WRONG, ids=[f"{w[1]}-{w[2]}-{i}" for i, w in enumerate(WRONG)]
)
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_each_problem_is_found_at_its_row(tmp_path, form, row, kind, field, message):
    rows = [question(8), row, question(9)]
    if form == "parquet":
        write_shards(rows, tmp_path / "rows")
        [path] = (tmp_path / "rows").iterdir()
    else:
        path = write_jsonl(tmp_path / "t.jsonl", rows)
    report = validate_tables([path])
    assert found(report) == [(kind, field, 1)] and kind in KINDS
    [problem] = report.shown[kind]
    assert message in problem.message
    assert str(problem).startswith(f"{path}, row 1: field '{field}' ")


def test_ids_and_clips_are_compared_over_all_tables(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [question(0), question(1), question(2, clip="clip0")])
    two = write_jsonl(tmp_path / "two.jsonl", [question(1, clip="other"), question(5, clip="clip0", split="test")])
    report = validate_tables([one, two])
    assert report.counts == {"id": 1, "split": 1} and report.rows == 5
    assert f"is 'q1', which {one}, row 1 has already" in report.shown["id"][0].message
    assert f"is 'test', but clip 'clip0' stands in 'train' ({one}, row 0)" in report.shown["split"][0].message


def test_a_shard_says_the_split_of_its_rows(tmp_path):
    write_shards([question(0, split=None), question(1, split="test")], tmp_path / "rows")
    assert not validate_tables([tmp_path / "rows"]).counts
    (tmp_path / "rows" / "test-00000-of-00001.parquet").rename(tmp_path / "rows" / "dev-00000-of-00001.parquet")
    report = validate_tables([tmp_path / "rows"])
    assert "is 'test', but the file is of 'dev'" in report.shown["split"][0].message


def test_a_file_named_as_a_split_is_one(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [question(0, split=None)])
    write_jsonl(tmp_path / "test.jsonl", [question(1, split=None, clip="clip0"), question(2)])
    report = validate_tables([tmp_path])
    assert report.counts == {"split": 2}
    messages = "\n".join(problem.message for problem in report.shown["split"])
    assert "but the file is of 'test'" in messages and "but clip 'clip0' stands in 'test'" in messages


def test_media_must_be_there_where_a_root_is_named(tmp_path):
    (tmp_path / "0.mp4").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    rows = [
        question(0, subtitle="There is a text.srt.", tag="VAS"),
        question(1),
        question(2, video="folder"),
        question(3, video="0.mp4", subtitle="none.srt"),
        question(4, video="0.mp4\0"),
    ]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    report = validate_tables([path], media_root=tmp_path)
    assert found(report) == [("file", "video", 1), ("file", "video", 2), ("file", "subtitle", 3), ("file", "video", 4)]
    assert f"names '1.mp4', and there is no such file in {tmp_path}" in report.shown["file"][0].message
    assert not validate_tables([path]).counts


def test_a_picture_must_be_one(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    rows = [question(n, video=None, tag="V", image=f"{n}.png") for n in range(3)]
    rows += [question(4, video=None, tag="V", images=["0.png", "1.png"])]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    report = validate_tables([path], media_root=tmp_path)
    assert found(report) == [("file", "image", 1), ("file", "image", 2), ("file", "images", 3)]
    messages = [problem.message for problem in report.shown["file"]]
    assert "names '1.png', and that is no picture that can be fed: not-media: " in messages[0]
    assert "names '2.png', and there is no such file in" in messages[1]


def test_pictures_are_judged_as_training_judges_them(tmp_path):
    """Also those on whose header Pillow fails by other errors than its own, and those that lie elsewhere."""
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "elsewhere.png")
    Image.new("RGB", (40, 40), "red").save(root / "whole.webp")
    (root / "0.png").symlink_to(tmp_path / "elsewhere.png")
    (root / "1.png").write_bytes((tmp_path / "elsewhere.png").read_bytes()[:20])
    (root / "2.png").write_bytes(b"")
    (root / "3.png").write_bytes((root / "whole.webp").read_bytes()[:20])
    rows = [question(n, video=None, tag="V", image=f"{n}.png") for n in range(4)]
    report = validate_tables([write_jsonl(tmp_path / "train.jsonl", rows)], media_root=root)
    messages = [problem.message for problem in report.shown["file"]]
    assert messages[0].endswith(f"names '0.png', and that is a link which leads out of {root}")
    reasons = [message.partition("that is no picture that can be fed: ")[2].partition(":")[0] for message in messages]
    assert reasons[1:] == ["truncated", "empty-file", "truncated"]
    with MediaLoader(root, workers=0) as loader:
        for number, reason in enumerate(["outside-media-root", *reasons[1:]]):
            with pytest.raises(MediaError) as caught:
                loader.probe_image(f"{number}.png")
            assert caught.value.reason == reason


def test_options_may_be_numbers(tmp_path):
    rows = [question(0, options=[3, 4.5, None]), question(1, options=[1, 2, 3])]
    write_jsonl(tmp_path / "t.jsonl", rows)
    Dataset.from_list([row | {"id": f"p{row['id']}"} for row in rows]).to_parquet(tmp_path / "p.parquet")
    report = validate_tables([tmp_path / "t.jsonl", tmp_path / "p.parquet"])
    assert report.rows == 4 and found(report) == []


def test_types_are_checked_where_the_file_does_not_ensure_them(tmp_path):
    rows = [
        question(0),
        question(1, options="AB"),
        question(2, answer=1),
        question(3, prompt=["x"]),
        question(4, tag=None),
    ]
    report = validate_tables([write_jsonl(tmp_path / "t.jsonl", rows)])
    assert found(report) == [("type", "options", 1), ("type", "answer", 2), ("type", "prompt", 3), ("empty", "tag", 4)]
    messages = [problem.message for problem in report.shown["type"]]
    assert messages[0] == "must be a list of texts, but is 'AB'" and messages[1] == "must be a text, but is 1"
    assert messages[2].startswith("must be a list of {role, content}")
    Dataset.from_list([question(0) | {"answer": 3}, question(1) | {"answer": 4}]).to_parquet(tmp_path / "t.parquet")
    assert validate_tables([tmp_path / "t.parquet"]).counts == {"type": 2}


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_half_of_a_character_is_named_wherever_it_stands(tmp_path, name):
    """JSON can spell it, and no file of text can hold it."""
    rows = [
        question(0, question="What is 😀?"),
        question(1, prompt=asked("cut \ud83d")),
        question(2, options=["red", "\ude00"]),
        question(3) | {"further": {"deep": ["\ud83d"]}},
    ]
    text = json.dumps(rows) if name == "t.json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    report = validate_tables([tmp_path / name])
    assert found(report) == [("type", "prompt", 1), ("type", "options", 2), ("type", "further", 3)]
    assert {problem.message for problem in report.shown["type"]} == {
        "holds half of a character (a surrogate without the other), which is no text"
    }


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["A", "VAS", "exact"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "field", "model"]), inner)
    ),
    max_leaves=5,
)


@given(
    st.lists(st.dictionaries(st.sampled_from([*ROW_FEATURES, "completion"]), JSON, max_size=8), min_size=1, max_size=4)
)
@example([{"prompt": [None]}])
def test_whatever_stands_in_a_table_is_told(rows):
    rows = [{**question(n), **row} for n, row in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        report = validate_tables([write_jsonl(Path(folder, "t.jsonl"), rows)], shown=1000)
    assert report.rows == len(rows)
    assert report.counts.total() == sum(map(len, report.shown.values())) and set(report.counts) <= set(KINDS)
    json.dumps(report.as_dict())


@given(
    st.fixed_dictionaries(
        {
            "tag": st.sampled_from(["V", "A", "S", "VA", "SV", "AS", "VAS", "X"]),
            "video": st.sampled_from([None, "0.mp4"]),
            "audio": st.sampled_from([None, "0.wav"]),
            "image": st.sampled_from([None, "0.png"]),
            "images": st.sampled_from([None, [], ["1.png"], ["1.png", "2.png"]]),
            "subtitle": st.sampled_from(
                [None, "0.srt", "Hello.", "a/b.txt", "~/words", "see x.mp4", "http://h/s.srt2"]
            ),
            "prompt": st.lists(
                st.fixed_dictionaries(
                    {
                        "role": st.sampled_from(["user", "system", "assistant"]),
                        "content": st.sampled_from(
                            [
                                *("What?", "<video>What?", "<audio> or <video>", "In <image>?", "<video><video>"),
                                *("<image><image>", "It says <subtitle>"),
                            ]
                        ),
                    }
                ),
                min_size=1,
                max_size=3,
            ),
        }
    )
)
def test_what_is_valid_is_what_a_trainer_reads(tmp_path_factory, changes):
    """The trainer's own reader of rows is the reference, in both directions."""
    row, root = question(**changes), tmp_path_factory.getbasetemp()
    try:
        with MediaLoader(str(root), MediaLimits(), backend="pyav") as loader:
            PromptBuilder(MessageEncoder(), loader).spec(row)
        told = None
    except ValueError as error:
        told = error
    with tempfile.TemporaryDirectory() as folder:
        report = validate_tables([write_jsonl(Path(folder, "t.jsonl"), [row])])
    assert bool(report.counts) == (told is not None), (report.shown, told)


def test_columns_that_are_missing_or_misspelt_are_named(tmp_path):
    row = question(0) | {"vide": "0.mp4", "subtitles": "x", "sources": "s", "mine": 1}
    del row["video"], row["source"]
    row["tag"] = "S"
    row["subtitle"] = None
    report = validate_tables([write_jsonl(tmp_path / "t.jsonl", [row])])
    fields = {problem.field: problem.message for problem in report.shown["column"]}
    assert fields["source"] == "is no column of the table; rename 'sources'?"
    assert not report.counts["empty"]  # a column that is missing is told once, and not of each row
    assert fields["vide"] == "is not read; rename it to 'video' if that is meant" and set(fields) == {"source", "vide"}


def test_what_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    (tmp_path / "t.json").write_text('[{"id": "a"}, {"id": ]')
    (tmp_path / "t.txt").write_text("x")
    (tmp_path / "none.jsonl").touch()
    pq.write_table(pa.table([["a"], ["b"]], names=["id", "id"]), tmp_path / "twice.parquet")
    for table, error in (
        ("absent.parquet", "there is no table"),
        ("empty", "holds no table"),
        ("t.parquet", "cannot read .*t.parquet"),
        ("t.json", "record 1: not JSON"),
        ("t.txt", "a table is one of"),
        ("none.jsonl", "there is no row in .*none.jsonl"),
        ("twice.parquet", "twice.parquet has several columns 'id'"),
    ):
        with pytest.raises(TableError, match=error):
            validate_tables([tmp_path / table])


def test_a_folder_of_shards_is_read_as_training_reads_it(tmp_path):
    """Shards alone, and all of them: notes and dropped rows of other commands lie beside them."""
    write_shards([question(number) for number in range(3)], tmp_path, shard_rows=1)
    beside = [tmp_path / name for name in ("dropped-train-00000-of-00001.parquet", "notes.json", "left_out.jsonl")]
    Dataset.from_list([{"reason": "never solved"}]).to_parquet(beside[0])
    for path in beside[1:]:
        path.write_text("{\n}")
    report = validate_tables([tmp_path])
    assert (report.rows, report.files, report.counts) == (3, 3, {})
    assert sorted(report.passed_over) == sorted(map(str, beside))
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(TableError, match="the shards of split 'train' are not one whole set"):
        validate_tables([tmp_path])


def test_of_a_folder_each_split_is_read_as_training_reads_it(tmp_path):
    """Shards of one split and a file of another; a file of the same split comes before its shards."""
    write_shards([question(number, split=None) for number in range(2)], tmp_path)
    Dataset.from_list([question(0, split=None), question(7, split=None)]).to_parquet(tmp_path / "test.parquet")
    (tmp_path / "test.jsonl").write_text("never read")
    report = validate_tables([tmp_path])
    assert (report.rows, report.counts) == (4, {"id": 1, "split": 1})
    assert report.passed_over == [str(tmp_path / "test.jsonl")]
    Dataset.from_list([question(5)]).to_parquet(tmp_path / "train.parquet")
    report = validate_tables([tmp_path])
    assert (report.rows, report.counts) == (3, {}) and len(report.passed_over) == 2
    taken = find_tables(tmp_path, ("train", "test"))
    assert sorted(path for files in taken.values() for path in files) == table_files(tmp_path)
    # Tables of other names are read where there are no shards.
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    Dataset.from_list([question(8)]).to_parquet(tmp_path / "more.parquet")
    assert [path.name for path in table_files(tmp_path)] == ["more.parquet", "test.parquet", "train.parquet"]


def test_messages_of_a_csv_file_stand_as_json(tmp_path):
    """As a training job reads them."""
    row = opened() | {"provenance": None}
    row = {name: row[name] for name in ("id", "clip", "tag", "source", "question", "answer", "solution", "video")}
    for prompt, faults in (
        (json.dumps(PROMPT), []),
        ("[not JSON", [("type", "prompt", 0)]),
        ("Hi?", [("type", "prompt", 0)]),
    ):
        with open(tmp_path / "t.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [*row, "prompt"])
            writer.writeheader()
            writer.writerow(row | {"prompt": prompt})
        assert found(validate_tables([tmp_path / "t.csv"])) == faults
        read = read_tables([tmp_path / "t.csv"]) if prompt != "[not JSON" else None
        assert read is None or isinstance(read["prompt"][0], list) == (not faults)


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ";"), ("t.tsv", "\t"), ("t.csv", "|")])
def test_a_table_that_trains_is_not_reported(tmp_path, name, delimiter):
    """As spreadsheets write it, with pictures as a list."""
    row = opened() | {"provenance": None}
    row = {name: row[name] for name in ("id", "clip", "tag", "source", "question", "answer", "solution")}
    row |= {"tag": "V", "images": json.dumps(["a.png", "b.png"]), "prompt": json.dumps(PROMPT)}
    with open(tmp_path / name, "w", newline="") as file:
        writer = csv.DictWriter(file, [*row], delimiter=delimiter)
        writer.writeheader()
        writer.writerow(row)
    assert found(validate_tables([tmp_path / name])) == []
    [read] = read_tables([tmp_path / name]).to_list()
    assert read["images"] == ["a.png", "b.png"] and read["prompt"] == PROMPT


@pytest.mark.long
@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """But for the digests of ids and clips, which are said to take about 200 bytes a row; a row here is of 4 kB."""
    peaks = {}
    for rows in (2_000, 6_000):
        path = tmp_path / str(rows)
        write_shards(
            (question(n, question="why " * 1000, video=None, tag="S", subtitle="x") for n in range(rows)), path
        )
        tracemalloc.start()
        assert validate_tables([path]).rows == rows
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[6_000] - peaks[2_000]) / 4_000 < 500


def test_signals_of_a_row():
    assert signals({"video": "a"}) == {Modality.VIDEO, Modality.AUDIO} and signals({"image": "a"}) == {Modality.VIDEO}
    assert signals({"images": ["a"]}) == {Modality.VIDEO}
    assert signals({"subtitle": "a", "audio": "b"}) == {Modality.SUBTITLE, Modality.AUDIO} and signals({}) == set()


# The command


def test_the_command_counts_all_and_shows_the_first(tmp_path, capsys):
    path = write_jsonl(tmp_path / "t.jsonl", [question(n, answer="Z", solution="Z") for n in range(7)])
    assert cli.main(["data", "validate", str(path), "--shown", "2"]) == 1
    shown = capsys.readouterr().out
    assert "7 rows in 1 table" in shown and "7  answer  options, answer and solution that do not agree" in shown
    assert shown.count("field 'answer' must be the letter of an option (A, B)") == 2 and "answer: … 5 more" in shown


def test_the_command_prints_json(tmp_path, capsys):
    path = write_jsonl(tmp_path / "t.jsonl", [question(0), question(0, clip="b")])
    assert cli.main(["data", "validate", str(path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    [problem] = told["problems"]["id"]
    assert told["rows"] == 2 and told["counts"] == {"id": 1} and problem["row"] == 1 and problem["file"] == str(path)
    write_jsonl(path, [question(0)])
    assert cli.main(["data", "validate", str(path)]) == 0 and "no problem found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["absent.parquet"], "there is no table absent.parquet"),
        ([], "the following arguments are required: TABLE"),
        (["{table}", "--media-root", "absent"], "media root: there is no folder absent"),
        (["{table}", "--shown", "-1"], "--shown must be 0 or more"),
        (["{table}", "--wrong", "1"], "unknown argument --wrong"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys, monkeypatch, words, error):
    monkeypatch.chdir(tmp_path)
    table = write_jsonl(tmp_path / "t.jsonl", [question(0)])
    assert cli.main(["data", "validate", *(word.format(table=table) for word in words)]) == 2
    assert error in capsys.readouterr().err
