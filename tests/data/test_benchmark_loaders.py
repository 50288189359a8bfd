"""Public benchmarks in their published form become rows; what is not as published is named."""

import io
import json
import logging
import math
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import build_tiny

from maple_trl.data.benchmarks import (
    BENCHMARKS,
    FEATURES,
    PROMPT_STYLES,
    BenchmarkError,
    check,
    load_benchmark,
    read_benchmark,
)
from maple_trl.data.benchmarks.options import FormError, read_letter, read_options, shuffled
from maple_trl.data.daily_omni import load_daily_omni
from maple_trl.data.hint_leaks import leaks_answer, split_options
from maple_trl.data.hint_prompts import Problem, ProblemError
from maple_trl.data.prompt_templates import PROMPT_TEMPLATES
from maple_trl.data.review.rows import shown_options
from maple_trl.data.synthetic import make_tone
from maple_trl.omni.errors import RowError
from maple_trl.omni.families.base import family_for
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.media.sampling import MediaLimits
from maple_trl.omni.options import bare_options, plain_options
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.templates import PromptTemplate
from maple_trl.rewards import accuracy_reward, answers


REPOSITORY = Path(__file__).resolve().parents[2]
LETTERED = ["A. red", "B. dark red", "C. blue: light", "D. none"]
PLAIN = ["red", "dark red", "blue: light", "none"]


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (61, 90, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def sound() -> bytes:
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes((make_tone("mid", np.random.default_rng(0)) * 32767).astype("<i2").tobytes())
    return file.getvalue()


# Of each benchmark: the table, a record as published, the files that it speaks of, and what the row must say.
CASES = {
    "daily-omni": (
        "qa.json",
        {
            "Question": "What is heard?",
            "Choice": LETTERED,
            "Answer": "C",
            "video_id": "-x_1",
            "Type": "Reasoning",
            "content_parent_category": "None",
            "content_fine_category": "None",
            "video_category": "Sports",
            "video_duration": "30s",
        },
        ["Videos/-x_1/-x_1_video.mp4", "Videos/-x_1/-x_1_audio.wav"],
        {"tag": "VA", "solution": "C", "audio": ["Videos/-x_1/-x_1_audio.wav"], "category": "Reasoning"},
    ),
    "intentbench": (
        "qa.json",
        {
            "problem": "Why does she laugh?",
            "options": str(LETTERED),
            "solution": "<answer>B</answer>",
            "problem_type": "multiple choice",
            "data_type": "video",
            "path": "./social/a b.mp4",
        },
        ["videos/social/a b.mp4"],
        {"tag": "VA", "solution": "B", "audio": None, "category": "multiple choice", "answer_metric": "accuracy"},
    ),
    "omnibench": (
        "data/train-00000-of-00001.parquet",
        {
            "index": 7,
            "question": "Which colour?",
            "options": PLAIN,
            "answer": "blue: light",
            "audio": {"bytes": sound(), "path": "s.wav"},
            "image": {"bytes": picture(), "path": "p.png"},
            "audio content": "a tone",
            "image content": "noise",
            "task type": "Object",
        },
        [],
        {"tag": "VA", "solution": "C", "id": "omnibench-7", "category": "Object"},
    ),
    "worldsense": (
        "test.jsonl",
        {
            "index": 12,
            "video": "abc",
            "video_path": "videos/abc.mp4",
            "duration": "1min",
            "domain": "Music",
            "candidates": LETTERED[:3],
            "task_domain": "Perception",
            "task_type": "Audio Change",
            "audio_class": ["Speech"],
            "subtitle_path": "subtitles/abc.srt",
            "audio_path": "audios/abc.wav",
            "question": "Which colour?",
            "answer": "A",
        },
        ["videos/abc.mp4", "subtitles/abc.srt", "audios/abc.wav"],
        {
            "tag": "VA",
            "solution": "A",
            "subtitle": "subtitles/abc.srt",
            "audio": ["audios/abc.wav"],
            "id": "worldsense-12",
        },
    ),
    "av-odyssey": (
        "av_odyssey.parquet",
        {
            "question_id": "quiz_1",
            "question": "Which of [img1] [img2] goes with [audio1]?",
            "options": LETTERED,
            "answer": "D",
            "data_type": "image_audio",
            "subfield": "Timbre",
            "image_path": ["p1.png", "p2.png"],
            "audio_path": ["a1.wav"],
            "video_path": None,
        },
        ["p1.png", "p2.png", "a1.wav"],
        {"tag": "VA", "solution": "D", "audio": ["a1.wav"], "image": ["p1.png", "p2.png"], "video": None},
    ),
    "av-counting": (
        "test.json",
        {
            "index": 3,
            "video": "v1.mp4",
            "question": "How many knocks?",
            "answer": 4,
            "type": "A2V",
            "category": "event",
            "query_interval": [1.0, 30.5],
            "clue": "[]",
        },
        ["cg_videos_720p/v1.mp4"],
        {
            "tag": "VA",
            "solution": "4",
            "answer_kind": "number",
            "answer_metric": "counting",
            "options": [],
            "category": "event",
        },
    ),
    "av-counting-clips": (
        "test.json",
        {
            "index": 3,
            "video": "v1.mp4",
            "question": "How many knocks?",
            "answer": 4,
            "type": "A2V",
            "category": "event",
            "query_interval": [1, 30.5],
        },
        ["ref_videos/v1_1.00_30.50.mp4"],
        {"solution": "4", "video": ["ref_videos/v1_1.00_30.50.mp4"]},
    ),
    "mvbench": (
        "json/object_existence.json",
        {"video": "video_1.mp4", "question": "Is it red?", "candidates": ["yes", "no", "not sure"], "answer": "no"},
        ["video/clevrer/video_validation/video_1.mp4"],
        {"tag": "V", "solution": "B", "category": "object_existence"},
    ),
    "videomme": (
        "videomme/test-00000-of-00001.parquet",
        {
            "video_id": "001",
            "videoID": "fFjv93ACGo8",
            "question_id": "001-1",
            "question": "Which colour?",
            "options": LETTERED,
            "answer": "C",
            "duration": "short",
            "domain": "Knowledge",
            "sub_category": "History",
            "task_type": "Counting Problem",
        },
        ["data/fFjv93ACGo8.mp4", "subtitle/fFjv93ACGo8.srt"],
        {"tag": "V", "solution": "C", "subtitle": "subtitle/fFjv93ACGo8.srt", "id": "videomme-001-1"},
    ),
    "lvbench": (
        "data/train-00000-of-00001.parquet",
        {
            "video_path": "Cm73.mp4",
            "question": "Which year?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633",
            "answer": "D",
            "question_type": ["key information retrieval"],
        },
        ["Cm73.mp4"],
        {
            "tag": "V",
            "question": "Which year?",
            "options": ["1636", "1366", "1363", "1633"],
            "solution": "D",
            "category": "key information retrieval",
        },
    ),
    "video-holmes": (
        "test_Video-Holmes.json",
        {
            "video ID": "D6W",
            "Question ID": "D6W_1",
            "Question Type": "SR",
            "Question": "Who?",
            "Options": dict(zip("FEDCBA", "uvwxyz", strict=True)),
            "Answer": "F",
            "Explanation": "because",
        },
        ["videos_cropped/D6W.mp4"],
        {"tag": "V", "options": list("zyxwvu"), "solution": "F", "category": "SR"},
    ),
    "mmvu": (
        "validation.jsonl",
        {
            "id": "validation_0",
            "video_path": "videos/Art/0.mp4",
            "question_type": "open-ended",
            "question": "Which style?",
            "choices": dict.fromkeys("ABCDE"),
            "answer": "cubism",
        },
        ["videos/Art/0.mp4"],
        {
            "tag": "V",
            "options": [],
            "solution": "cubism",
            "answer_kind": "text",
            "answer_metric": "judge",
            "category": "open-ended",
        },
    ),
    "tomato": (
        "test.json",
        {
            "id": "count-1",
            "video_path": "videos/human/1.mp4",
            "question": "How often?",
            "options": PLAIN,
            "answer": 1,
            "reason_type": "count",
            "demonstration_type": "human",
        },
        ["videos/human/1.mp4"],
        {"tag": "V", "solution": "B", "category": "count", "id": "tomato-count-1"},
    ),
}


def write_table(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))


def published(folder: Path, name: str, *changes: dict, files: bool = True) -> Path:
    """A copy of a benchmark with one record for each of the changes (`...` takes a field away)."""
    table, record, media, _ = CASES[name]
    records = [record | change for change in changes or ({},)]
    records = [{key: value for key, value in fields.items() if value is not ...} for fields in records]
    write_table(folder / table, records)
    for path in media if files else ():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(picture() if path.endswith(".png") else b"\0")
    return folder


def stills(name: str) -> dict:
    return {"write_media": True} if name == "omnibench" else {}


def test_every_benchmark_has_a_case():
    assert set(CASES) == set(BENCHMARKS)


@pytest.mark.parametrize("name", CASES)
def test_a_record_becomes_a_row(name, tmp_path, caplog):
    table, record, _, expected = CASES[name]
    with caplog.at_level(logging.WARNING):
        dataset = load_benchmark(name, published(tmp_path, name), **stills(name))
    assert not caplog.records
    assert dataset.features == FEATURES
    (row,) = dataset
    assert {key: row[key] for key in expected} == expected
    assert row["benchmark"] == name and row["answer"] == row["solution"]
    (message,) = row["prompt"]
    lines = message["content"].split("\n")
    rendered = [f"{letter}. {text}" for letter, text in zip("ABCDEF", row["options"], strict=False)]
    assert lines[:-1] == [*row["question"].split("\n"), *rendered] and "<answer>" in lines[-1]
    fields = json.loads(row["record"])
    assert set(fields) == set(record) and fields[BENCHMARKS[name].required[0]]
    assert all((tmp_path / path).is_file() for kind in ("video", "audio", "image") for path in row[kind] or ())
    assert accuracy_reward(
        completions=[f"<answer>{row['solution']}</answer>", "<answer>zzz</answer>"],
        solution=[row["solution"]] * 2,
        options=[row["options"]] * 2,
    ) == [1.0, 0.0]
    # The table itself is a path as well, and has the same media.
    again = load_benchmark(name, tmp_path / table, **stills(name))
    assert again.to_list() == dataset.to_list()


@pytest.mark.parametrize("name, field", [(name, field) for name in CASES for field in BENCHMARKS[name].required])
def test_a_renamed_field_is_named(name, field, tmp_path):
    value = CASES[name][1][field]
    published(tmp_path, name, {field: ..., f"new {field}": value})
    with pytest.raises(BenchmarkError) as error:
        load_benchmark(name, tmp_path)
    words = str(error.value)
    assert f"field '{field}' is missing" in words and f"'new {field}' are not known" in words
    assert f"{CASES[name][0]}, record 0: " in words


MALFORMED = [
    ("daily-omni", {"Answer": "E"}, "field 'Answer' must be the letter of an option (A, B, C, D), but is 'E'"),
    ("daily-omni", {"Choice": ["A. x", "B."]}, "must have a text behind the letter of each option, but has 'B.'"),
    ("daily-omni", {"Choice": ["A. x", None, "z"]}, "field 'Choice' must have a text as option B, but has None"),
    ("daily-omni", {"Choice": []}, "field 'Choice' must be a list of 2 to 26 options, but is list of 0 items"),
    ("daily-omni", {"Question": " "}, "field 'Question' must be a text, but is ' '"),
    ("daily-omni", {"video_id": "../etc"}, "field 'video_id' must be a path below the media root, but is '../etc'"),
    ("daily-omni", {"video_id": "a/b"}, "field 'video_id' must be a file name, but is 'a/b'"),
    ("intentbench", {"problem_type": "essay"}, "field 'problem_type' must be one of multiple choice, emer_ov_mc,"),
    ("intentbench", {"data_type": "text"}, "field 'data_type' must be video, image or audio, but is 'text'"),
    ("intentbench", {"path": ...}, "field 'video' must be a path (or field 'path'), but both are missing"),
    ("intentbench", {"path": "/etc/passwd"}, "field 'path' must be a path below the media root"),
    ("intentbench", {"options": "['A. x'"}, "field 'options' must be a list of 2 to 26 options, but is \"['A. x'\""),
    ("intentbench", {"problem_type": "judge"}, "field 'solution' must be Yes or No, but is 'B'"),
    ("intentbench", {"problem_type": "emer_ov_mc", "solution": "A,A"}, "field 'solution' must be letters of options"),
    ("omnibench", {"answer": "green"}, "field 'answer' must be the text of one option, but no option has"),
    ("omnibench", {"options": ["a", "a"], "answer": "a"}, "but 2 options have the text 'a'"),
    ("omnibench", {"audio": None}, "field 'audio' must hold a file or its path, but is None"),
    ("av-odyssey", {"image_path": ["p1.png"]}, "field 'image_path' has 1 paths, but the question speaks of [img2]"),
    ("av-odyssey", {"audio_path": []}, "field 'audio_path' must name at least one sound, but is empty"),
    ("av-odyssey", {"data_type": "text"}, "field 'data_type' must name image or video, but is 'text'"),
    ("av-counting", {"answer": "many"}, "field 'answer' must be a whole number of 0 or more, but is 'many'"),
    ("av-counting", {"answer": -1}, "field 'answer' must be a whole number of 0 or more, but is -1"),
    ("av-counting-clips", {"query_interval": [1]}, "field 'query_interval' must be [start, end] in seconds"),
    ("mvbench", {"answer": "maybe"}, "field 'answer' must be the text of one option"),
    ("lvbench", {"question": "Which year?"}, "field 'options' is missing, and the question holds no lines '(A) …'"),
    ("video-holmes", {"Options": {"A": "x", "C": "y"}}, "must have the letters A, B, C, … without gaps, but has A, C"),
    ("mmvu", {"question_type": "other"}, "field 'question_type' must be multiple-choice or open-ended"),
    ("tomato", {"answer": 4}, "field 'answer' must be the number of an option from 0 to 3, but is 4"),
    ("tomato", {"answer": "1"}, "field 'answer' must be the number of an option from 0, but is '1'"),
]


HALF = "holds half of a character (a surrogate without the other), which is no text"
LONG = "must be a path of at most 1000 bytes, 200 a name, but is 'ж"
# Of JSON alone; the column of another's type is told by Arrow.
MALFORMED += [
    ("daily-omni", {"Question": "what \ud800?"}, f"field 'Question' {HALF}"),
    ("daily-omni", {"video_category": ["\udfff"]}, f"field 'video_category' {HALF}"),
    ("daily-omni", {"video_id": "ж" * 101}, f"field 'video_id' {LONG}"),
    ("tomato", {"video_path": "/".join(["ж" * 50] * 11)}, f"field 'video_path' {LONG}"),
    ("av-counting", {"answer": "1" * 5000}, "field 'answer' must be a whole number of 0 or more, but is '111"),
]


@pytest.mark.parametrize(("name", "change", "words"), MALFORMED)
def test_malformed_records_are_named(name, change, words, tmp_path):
    published(tmp_path, name, {}, change)
    with pytest.raises(BenchmarkError, match=re.escape(words)) as error:
        load_benchmark(name, tmp_path)
    assert f"{CASES[name][0]}, record 1: " in str(error.value)


# What fields are read for: letters, numbers, lists as text, marks of media, paths; and what no file of text can hold.
ODD = ["A", "(B)", "['x', 'y']", "(" * 9000, "3", "1e3", "1" * 5000, "[img9]", "[audio1]", "../x", "/x", "a\0.mp4"]
ODD += ["<answer>A</answer>", "video", "image_audio", "judge", "multiple-choice", "x" * 5000, "{}%s", "\ud800", "", -1]
JSON = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(ODD),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["A", "B", "path"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@pytest.mark.matrix(cases=3)
def test_any_value_in_any_field_gives_rows_or_names_its_place(name, data):
    table, record, _, _ = CASES[name]
    embedded = {"image": "p.png", "audio": "a.wav"} if name == "omnibench" else {}
    record = record | embedded
    change = data.draw(st.dictionaries(st.sampled_from(sorted(record)), JSON, min_size=1, max_size=2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(table).stem + ".json")
        path.write_text(json.dumps([record, record | change]))
        try:
            found = read_benchmark(name, path, missing_media="keep")
        except BenchmarkError as error:
            assert re.search(r"\.json, record 1: .*field '", str(error), re.DOTALL), error
        else:
            assert found.records == 2 and len(found.dataset) + len(found.left_out) >= 2


def test_check_lists_every_fault(tmp_path):
    published(tmp_path, "tomato", {"answer": 9}, {}, {"options": ["x"]}, {"video_path": "gone.mp4"})
    found = check("tomato", tmp_path)
    assert [re.search(r"record \d: field '\w+'", fault)[0] for fault in found.faults] == [
        "record 0: field 'answer'",
        "record 2: field 'options'",
    ]
    assert found.records == 4 and len(found.dataset) == 1 and [item.cause for item in found.left_out] == ["missing"]
    assert "no file gone.mp4; TOMATO: unpack" in check("tomato", tmp_path, missing_media="error").faults[-1]


def test_questions_with_one_id_are_numbered_until_a_name_is_free(tmp_path):
    names = ["a", "a", "a-2", "a", "a-2"]
    published(tmp_path, "videomme", *({"question_id": name} for name in names))
    found = [name.removeprefix("videomme-") for name in load_benchmark("videomme", tmp_path)["id"]]
    assert found == ["a", "a-2", "a-2-2", "a-3", "a-2-3"]


def test_whole_numbers_of_a_column_with_an_empty_cell(tmp_path):
    """Which pandas turns into floats."""
    published(tmp_path, "tomato", {"id": 3.0, "answer": 1.0}, {"id": 4.5}, {"answer": 1.5})
    found = check("tomato", tmp_path)
    assert [(row["id"], row["solution"]) for row in found.dataset] == [("tomato-3", "B")]
    assert "field 'id' must be a text or a whole number, but is 4.5" in found.faults[0]
    assert "field 'answer' must be the number of an option from 0 to" in found.faults[1]


SPELLINGS = [
    *(("A. red", "B. blue"), ("A.red", "B.blue"), ("A: red", "B: blue"), ("A:red", "B:blue"), ("(A) red", "(B) blue")),
    *(
        ("(A)red", "(B)blue"),
        ("A) red", "B) blue"),
        ("a. red", "b. blue"),
        (" A. red ", "B. blue "),
        ("A、red", "B、blue"),
    ),
    *(
        ("A．red", "B．blue"),
        ("Ａ．red", "Ｂ．blue"),
        ("（A）red", "（B）blue"),
        ("A：red", "B：blue"),
        ("(A). red", "(B). blue"),
    ),
    *(
        ("A : red", "B : blue"),
        ("A\u00a0: red", "B\u202f: blue"),
        ("(A) : red", "(B) : blue"),
        ("A ：red", "B ：blue"),
        ("A  : red", "B  : blue"),
        ("A . red", "B . blue"),
        ("A ) red", "B ) blue"),
    ),
    *(("red", "blue"), ("A red", "B blue"), ("A. red", "blue"), ("B. red", "A. blue"), ("A. red", "C. blue")),
    *(
        (3, 4.5),
        (3.0, 4.0),
        ("red", 4),
        ("A. red", "B. blue", None),
        ("red", "blue", math.nan, None),
        ("red", "blue", "", " "),
    ),
]


@pytest.mark.parametrize("options", SPELLINGS, ids=lambda options: "|".join(map(str, options)))
def test_all_who_read_options_tell_letters_from_texts_alike(options):
    """What rewards compare with is what the builder of QA+ replaces, what hints are checked with, and what prompts show."""
    texts = list(answers.option_texts(options).values())
    assert bare_options(plain_options(options)) == texts and read_options(list(options)) == [t.strip() for t in texts]
    row = {"question": "Which?", "prompt": "Which?", "options": list(options), "solution": "A"}
    lettered = bare_options(plain_options(options)) != plain_options(options)
    shown = PromptTemplate({"default": "{options}"}).render(row, None).split("\n")
    assert shown == (plain_options(options) if lettered else [f"{x}. {t}" for x, t in zip("AB", texts, strict=True)])
    styled = PROMPT_TEMPLATES["answer"].render(row, None).split("\n")
    assert styled[0] == "Which?" and styled[1:-1] == shown and "one right option" in styled[-1]
    hint = Problem.from_row(row)
    assert hint.question == "\n".join(["Which?", *(f"{x}. {t}" for x, t in zip("AB", texts, strict=True))])
    assert shown_options(row) == texts
    if texts == ["red", "blue"]:
        assert split_options(hint.question)[1] == {"A": "red", "B": "blue"}


@pytest.mark.parametrize("form", ["{} : {}", "{}\u00a0: {}", "{}: {}"])
def test_options_of_a_prompt_in_french_are_seen_in_it(form):
    """So that a hint's teacher is not shown them twice, and a hint that names one is found."""
    prompt = "Quelle couleur ?\n" + "\n".join(form.format(*pair) for pair in (("A", "rouge"), ("B", "bleu")))
    assert split_options(prompt)[1] == {"A": "rouge", "B": "bleu"}
    row = {"prompt": prompt, "options": ["A : rouge", "B : bleu"], "solution": "A : rouge"}
    assert Problem.from_row(row).question == prompt
    assert leaks_answer("Cherchez le rouge.", prompt, "A : rouge") == "option-text"
    spoken = "Dialogue : A : Bonjour ! B : Salut ! Qui parle en premier ?"
    assert Problem.from_row({"prompt": spoken, "options": ["lui", "elle"], "solution": "A"}).question.endswith(
        "B. elle"
    )


def test_an_option_that_is_missing_in_between_is_no_padding():
    for options in (["red", None, "blue"], ["red", math.nan, "blue"]):
        with pytest.raises(FormError, match="must have a text as option B"):
            read_options(options)
        with pytest.raises(RowError, match="not texts"):
            PromptTemplate({"default": "{options}"}).render({"options": options}, None)
        with pytest.raises(ProblemError, match="field 'options' must be a list"):
            Problem.from_row({"prompt": "Which?", "options": options, "solution": "A"})
    assert read_options({"A": "red", "B": 4, "C": math.nan, "D": ""}) == ["red", "4"]
    assert read_options("[3, 4, NaN]") == ["3", "4"]


def test_missing_clips_are_counted_kept_or_refused(tmp_path, caplog):
    published(tmp_path, "mmvu", {}, {"id": "x", "video_path": "videos/gone.mp4"})
    with caplog.at_level(logging.WARNING):
        dataset = load_benchmark("mmvu", tmp_path)
    assert dataset["id"] == ["mmvu-validation_0"]
    assert "1 rows of 2 questions; left out: 1 missing" in caplog.text and "no file videos/gone.mp4 (1)" in caplog.text
    kept = load_benchmark("mmvu", tmp_path, missing_media="keep")
    assert kept["video"][1] == ["videos/gone.mp4"]
    with pytest.raises(BenchmarkError, match=r"record 1: no file videos/gone\.mp4; MMVU: unpack"):
        load_benchmark("mmvu", tmp_path, missing_media="error")
    (tmp_path / "videos/Art/0.mp4").unlink()
    with pytest.raises(BenchmarkError, match=r"no question of MMVU is left of 2; the first: .*no file videos/Art"):
        load_benchmark("mmvu", tmp_path)


def test_what_no_model_here_reads_is_left_out_with_the_reason(tmp_path):
    found = read_benchmark("av-odyssey", published(tmp_path / "a", "av-odyssey"), pictures="clips")
    (item,) = found.left_out
    assert item.cause == "unreadable" and "it is to become a clip; write_media=True" in item.reason
    assert item.name == "av-odyssey-quiz_1" and item.place.endswith("av_odyssey.parquet, record 0")
    assert not list((tmp_path / "a").glob("extracted*"))
    found = read_benchmark("omnibench", published(tmp_path / "o", "omnibench"))
    assert "the table holds the file itself; write_media=True" in found.left_out[0].reason
    published(tmp_path / "m", "mvbench", {}, {"video": "castle_s01e01_seg02_clip_00"})
    found = read_benchmark("mvbench", tmp_path / "m")
    assert found.left_out[0].cause == "form" and "a folder of single frames" in found.left_out[0].reason


def test_pictures_and_sounds_inside_a_table_can_be_fed(tmp_path):
    """They become files that the media loader reads, and written once."""
    (row,) = load_benchmark("omnibench", published(tmp_path, "omnibench"), write_media=True)
    written = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "extracted").iterdir()}
    assert len(written) == 2
    load_benchmark("omnibench", tmp_path, write_media=True)
    assert written == {path: os.stat(path).st_mtime_ns for path in (tmp_path / "extracted").iterdir()}
    assert row["video"] is None and (tmp_path / row["image"][0]).read_bytes() == picture()
    model, processor = build_tiny("qwen2_5_omni")
    family = family_for(model, processor)
    with MediaLoader(tmp_path, MediaLimits(num_frames=2)) as loader:
        prompt = PromptBuilder(family, loader).encode(row)
    ids = prompt.input_ids.tolist()
    assert prompt.tag == "VA" and prompt.media_tokens["audio"] > 0
    assert ids.count(family.placeholder_ids["image"]) == prompt.media_tokens["image"] > 0
    assert family.placeholder_ids["video"] not in ids and "video" not in prompt.kinds


def test_pictures_can_become_clips(tmp_path):
    """For models that read clips alone."""
    published(tmp_path, "omnibench")
    found = read_benchmark("omnibench", tmp_path, write_media=True, pictures="clips")
    (row,), kept = found.dataset, read_benchmark("omnibench", tmp_path, write_media=True)
    assert (found.pictures, kept.pictures) == ("clips", "keep") and row["image"] is None
    model, processor = build_tiny("qwen2_5_omni")
    family = family_for(model, processor)
    with MediaLoader(tmp_path, MediaLimits(num_frames=2)) as loader:
        prompt = PromptBuilder(family, loader).encode(row)
        clip = loader.video(row["video"][0], multiple=2)
    assert prompt.media_tokens["video"] > 0 and family.placeholder_ids["image"] not in prompt.input_ids.tolist()
    shown = np.asarray(clip.frames[0])
    assert shown.shape[:2] == (60, 90)
    original = np.asarray(Image.open(io.BytesIO(picture())))[:60]
    # Luma survives; the colours of 2 x 2 pixels of noise are averaged.
    weights = np.array([0.299, 0.587, 0.114])
    assert np.abs(shown @ weights - original @ weights).mean() < 12


def test_intentbench_has_several_kinds_of_questions(tmp_path):
    published(
        tmp_path,
        "intentbench",
        {"problem_type": "emer_ov_mc", "solution": "<answer>C, A</answer>", "options": LETTERED},
        {"problem_type": "judge", "solution": "<answer>yes</answer>", "options": []},
        {"data_type": "image", "path": "p.png"},
        {"data_type": "audio", "path": "social/a b.mp4"},
    )
    (tmp_path / "videos/p.png").write_bytes(picture())
    dataset = load_benchmark("intentbench", tmp_path)
    assert dataset["image"] == [None, None, ["videos/p.png"], None]
    assert dataset["solution"] == ["A,C", "Yes", "B", "B"]
    assert dataset["answer_kind"] == ["options", "yes_no", "option", "option"]
    assert dataset["tag"] == ["VA", "VA", "V", "A"]
    assert (
        "joined by commas" in dataset[0]["prompt"][0]["content"] and "Yes or No" in dataset[1]["prompt"][0]["content"]
    )
    assert dataset["video"][3] is None and dataset["audio"][3] == ["videos/social/a b.mp4"]


def test_tags_that_the_caller_asks_for(tmp_path):
    published(tmp_path, "worldsense", {}, {"index": 13, "subtitle_path": ""})
    found = read_benchmark("worldsense", tmp_path, tags=["avs", "V"])
    assert found.dataset["id"] == ["worldsense-12-VAS", "worldsense-12-V", "worldsense-13-V"]
    assert [(item.name, item.cause) for item in found.left_out] == [("worldsense-13-VAS", "no-signal")]
    assert "tag VAS needs subtitle" in found.left_out[0].reason
    for tags, words in (([], "tags is empty"), ("VA", "tags must be a list")):
        with pytest.raises(BenchmarkError, match=words):
            load_benchmark("worldsense", tmp_path, tags=tags)


def test_captions_in_a_text_file_begin_without_a_byte_order_mark(tmp_path):
    clip = published(tmp_path, "daily-omni", {}) / "Videos" / CASES["daily-omni"][1]["video_id"]
    (clip / "audio_revised_captions.txt").write_text("\ufeff\n", encoding="utf-8")  # says nothing
    (clip / "audio_detail_captions.txt").write_text("A cat meows.\n", encoding="utf-8-sig")
    (row,) = read_benchmark("daily-omni", tmp_path, tags=["VAS"]).dataset
    assert row["subtitle"] == "A cat meows."


def test_names_tell_questions_apart(tmp_path):
    published(tmp_path, "tomato", {}, {}, {})
    assert load_benchmark("tomato", tmp_path)["id"] == ["tomato-count-1", "tomato-count-1-2", "tomato-count-1-3"]


def test_what_cannot_be_found_is_named(tmp_path):
    with pytest.raises(BenchmarkError, match="there is no benchmark 'tomate'; there are daily-omni, "):
        load_benchmark("tomate", tmp_path)
    with pytest.raises(BenchmarkError, match=r"TOMATO has no path: .*download=True for lmms-eval/TOMATO"):
        load_benchmark("tomato")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load_benchmark("tomato", tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"TOMATO: .*looked for data/test-\*\.parquet, .*it holds notes\.txt"):
        load_benchmark("tomato", tmp_path)
    with pytest.raises(BenchmarkError, match=r"notes\.txt: a table is one of"):
        load_benchmark("tomato", tmp_path / "notes.txt")
    with pytest.raises(BenchmarkError, match="TOMATO has no split 'train'; it has test"):
        load_benchmark("tomato", tmp_path, "train")
    (tmp_path / "test.json").write_text("[{")
    with pytest.raises(BenchmarkError, match=r"test\.json, record 0: not JSON"):
        load_benchmark("tomato", tmp_path)
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(BenchmarkError, match=r"test\.json: no record in it"):
        load_benchmark("tomato", tmp_path)
    with pytest.raises(ValueError, match="there is no prompt style 'loud'; the styles are think, answer, brackets"):
        load_benchmark("tomato", tmp_path, prompt_style="loud")


def test_the_hub_is_asked_only_on_request(tmp_path, monkeypatch):
    """With the hub's client offline, asking for a download is an error of the client, and not asking is one of ours."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    from huggingface_hub.errors import LocalEntryNotFoundError

    with pytest.raises((LocalEntryNotFoundError, OSError)):
        load_benchmark("tomato", download=True)
    with pytest.raises(BenchmarkError, match="download is for a benchmark without a local path"):
        load_benchmark("tomato", tmp_path, download=True)


# Prompts


def test_prompt_styles_are_pinned():
    """A changed text must come with a changed version; then new digests belong here."""
    assert {name: (style.version, style.digest) for name, style in PROMPT_STYLES.items()} == {
        "think": (1, "24f3a9918e2218f3"),
        "answer": (1, "23295c064c9bdbb9"),
        "brackets": (1, "da8c78b865aa4822"),
    }


def test_a_question_with_braces_stays_as_it_is():
    text = PROMPT_STYLES["answer"].render("Is {options} {0} red?", ["{letter}", "b"], "option")
    assert text.startswith("Is {options} {0} red?\nA. {letter}\nB. b\nAnswer with the letter")


option_texts = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8).filter(
        lambda text: not re.match(r"\(?[A-Z][.):]", text)
    ),
    min_size=2,
    max_size=26,
)


@given(option_texts, st.sampled_from(["{letter}. {text}", "({letter}) {text}", "{letter}: {text}"]))
def test_options_survive_their_letters(texts, form):
    lettered = [
        form.format(letter=letter, text=text)
        for letter, text in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", texts, strict=False)
    ]
    assert read_options(lettered) == read_options(texts) == texts
    assert read_options(repr(lettered)) == read_options(json.dumps(lettered)) == texts
    assert read_options(dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", texts, strict=False))) == texts


def test_letters_out_of_order_belong_to_the_texts():
    assert read_options(["B. x", "A. y"]) == ["B. x", "A. y"]
    for text in ("B", " b", "B. x", "", None, 1):
        if text == "B":
            assert read_letter(text, ["x", "y"]) == "B"
        else:
            with pytest.raises(FormError, match=r"must be the letter of an option \(A, B\)"):
                read_letter(text, ["x", "y"])


@given(st.integers(2, 26), st.data(), st.integers(0, 2**32), st.text(max_size=5))
def test_shuffled_options_keep_the_solution(count, data, seed, name):
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]
    texts = [f"text {i}" for i in range(count)]
    right = data.draw(st.sets(st.sampled_from(letters), min_size=1))
    moved, solution = shuffled(texts, ",".join(sorted(right)), seed, name)
    assert sorted(moved) == sorted(texts)
    assert {moved[letters.index(letter)] for letter in solution.split(",")} == {
        texts[letters.index(letter)] for letter in right
    }
    assert (moved, solution) == shuffled(texts, ",".join(sorted(right)), seed, name)


def test_shuffled_rows_keep_the_right_text(tmp_path):
    published(tmp_path, "tomato", *({"id": f"q{i}"} for i in range(12)))
    plain = load_benchmark("tomato", tmp_path)
    mixed = load_benchmark("tomato", tmp_path, shuffle_seed=1)
    assert [row["options"]["ABCD".index(row["solution"])] for row in mixed] == ["dark red"] * 12
    assert len(set(mixed["solution"])) > 1 and set(plain["solution"]) == {"B"}
    assert all(f"{row['solution']}. dark red" in row["prompt"][0]["content"] for row in mixed)
    assert mixed["id"] == plain["id"] and mixed["record"] == plain["record"]


# Real data


@pytest.fixture(scope="module")
def daily_omni() -> Path:
    named = os.environ.get("MAPLE_TRL_DAILY_OMNI")
    root = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "daily_omni"
    if not (root / "qa.json").is_file():
        pytest.skip(f"Daily-Omni is not at {root}; set MAPLE_TRL_DAILY_OMNI to the folder that holds qa.json")
    return root


def test_all_real_questions_are_read(daily_omni):
    found = read_benchmark("daily-omni", daily_omni, missing_media="keep")
    published_records = json.loads((daily_omni / "qa.json").read_text())
    assert len(found.dataset) == found.records == len(published_records) == 1197
    assert not found.left_out and not check("daily-omni", daily_omni).faults
    for row, record in zip(found.dataset, published_records, strict=True):
        texts = [
            choice.removeprefix(f"{letter}.").strip() for letter, choice in zip("ABCD", record["Choice"], strict=True)
        ]
        assert row["options"] == texts and row["question"] == record["Question"].strip()
        assert row["solution"] == record["Answer"] and row["category"] == record["Type"]
    assert len(set(found.dataset["id"])) == 1197 and len(set(found.dataset["category"])) == 6


def test_real_clips_are_those_of_the_training_loader(daily_omni):
    """The same questions with the same options and media, and the captions of rows that ask for none, too."""
    found = read_benchmark("daily-omni", daily_omni)
    other = load_daily_omni(daily_omni)
    assert len(found.dataset) == len(other) > 0
    assert len(found.dataset) + len(found.left_out) == 1197
    assert {item.cause for item in found.left_out} == {"missing"}
    for column in ("question", "options", "solution", "prompt", "tag"):
        assert found.dataset[column] == other[column]
    assert found.dataset["video"] == [[path] for path in other["video"]]
    tagged = read_benchmark("daily-omni", daily_omni, tags=["VAS"])
    assert tagged.dataset["subtitle"] == other["subtitle"] and set(found.dataset["subtitle"]) == {None}


def test_a_real_row_becomes_a_prompt(daily_omni):
    row = read_benchmark("daily-omni", daily_omni).dataset[0]
    model, processor = build_tiny("qwen2_5_omni")
    limits = MediaLimits(num_frames=2, max_pixels=8 * 28 * 28)
    with MediaLoader(daily_omni, limits) as loader:
        prompt = PromptBuilder(family_for(model, processor), loader).encode(row)
    assert prompt.media_tokens["video"] > 0 and prompt.media_tokens["audio"] > 700
