"""Converters: records in the form in which each set is published become valid rows, and what is malformed is named."""

import csv
import hashlib
import io
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as Picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maple_trl import cli
from maple_trl.data import converters
from maple_trl.data.converters import (
    CONVERTERS,
    ConversionError,
    ConversionSummary,
    Converter,
    ConvertOptions,
    Sample,
    convert,
)
from maple_trl.data.converters.ave import CATEGORIES
from maple_trl.data.converters.avsbench import box_of
from maple_trl.data.converters.convert import _Rows
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.data.shards import find_shards, write_shards
from maple_trl.data.validation import validate_tables
from maple_trl.modalities import ModalityTag
from maple_trl.omni.content import place_blocks, read_content
from maple_trl.rewards import box_iou_reward, temporal_iou_reward
from maple_trl.rewards.answers import extract_answer


DAILY = {
    "Question": "What is heard when the cat jumps?",
    "Choice": ["A. A bell", "B. Rain", "C. Laughter: loud", "D. Nothing"],
    "Answer": "C",
    "video_id": "abc",
    "Type": "Event Sequence",
}
R1 = {
    "problem_id": 2,
    "problem": "What appears?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. A notification", "B. A command"],
    "process": "",
    "solution": "<answer>A</answer>",
    "path": "./LLaVA/clip.mp4",
}
OMNI = {
    "problem": "Why does he laugh?",
    "options": ["A. Joy", "B. Fear", "C. Spite"],
    "solution": "<answer>A,C</answer>",
    "problem_type": "emer_ov_mc",
    "data_type": "video",
    "path": "emer/x.mp4",
}
TPO = {"video": "yt/v1", "prompt": "<image>\nWhen does she sit?", "chosen": "At the end.", "rejected": "Never."}
AVQA = {
    "id": 183,
    "video_name": "-HG3Omg_89c_000030",
    "video_id": 341,
    "question_text": "What happened in the video?",
    "multi_choice": ["motorboat", "yacht", "sailboat", "car"],
    "answer": 1,
    "question_relation": "View",
    "question_type": "Happening",
}
AVATAR = {
    "messages": [{"role": "user", "content": "<video>Where is what barks?"}],
    "videos": ["clips/dog.mp4"],
    "solution": "<answer>left</answer>",
    "problem_type": "free_form",
    "audio_cues": "A dog barks.",
    "prompt_id": "p7",
    "hint": "Listen first.",
    "source": "AVSBench",
}
VAST = {
    "clip_id": "abc.5",
    "vision_cap": ["A dog runs.", "A dog."],
    "audio_cap": ["It barks."],
    "subtitle": "Come here!",
    "vast_cap": "A dog runs to who calls it, and barks.",
}
SHARE = {
    "id": "s1",
    "conversations": [
        {"from": "human", "value": "<video>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "What color?"},
        {"from": "gpt", "value": "Black."},
    ],
    "video": "c/cat.mp4",
}


def rows_of(folder) -> list[dict]:
    return [row for paths in find_shards(folder).values() for path in paths for row in pq.read_table(path).to_pylist()]


def converted(tmp_path, name, records, file="data.json", **options):
    """The rows of records in the form of a set's file; every one of them is valid."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / file).parent.mkdir(exist_ok=True)
    (source / file).write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
    summary = convert(name, source, tmp_path / "rows", ConvertOptions(**options))
    report = validate_tables([tmp_path / "rows"])
    assert not report.counts, report.shown
    rows = rows_of(tmp_path / "rows")
    assert len(rows) == sum(summary.rows.values()) == report.rows
    return rows, summary


def prompt(row):
    [message] = row["prompt"]
    assert message["role"] == "user"
    return message["content"]


def test_every_row_has_a_name_of_its_own(tmp_path):
    """Also where a record is called what another one of two with one name becomes."""
    names = ["a", "a", "a-2", "a", "a-2", "a-3", "b"]
    rows, _ = converted(tmp_path, "sharegpt", [SHARE | {"id": name} for name in names])
    found = [row["id"].removeprefix("sharegpt-") for row in rows]
    assert found == ["a", "a-2", "a-2-2", "a-3", "a-2-3", "a-3-2", "b"]


# Each set


def test_daily_omni(tmp_path):
    clip = tmp_path / "source" / "Videos" / "abc"
    clip.mkdir(parents=True)
    (clip / "abc_video.mp4").write_bytes(b"x")
    (clip / "audio_detail_captions.txt").write_text("A cat meows.\n", encoding="utf-8-sig")
    rows, summary = converted(tmp_path, "daily-omni", [DAILY, DAILY], "qa.json", tags=("VA", "VAS"))
    assert [(row["id"], row["tag"], row["split"]) for row in rows] == [
        ("daily-omni-0000000-VA", "VA", "test"),
        ("daily-omni-0000000-VAS", "VAS", "test"),
        ("daily-omni-0000001-VA", "VA", "test"),
        ("daily-omni-0000001-VAS", "VAS", "test"),
    ]
    first, second = rows[:2]
    assert (first["clip"], first["source"], first["question_type"]) == ("abc", "Daily-Omni", "Event Sequence")
    assert first["options"][2] == "Laughter: loud" and first["answer"] == first["solution"] == "C"
    assert first["video"] == "Videos/abc/abc_video.mp4" and first["audio"] is first["subtitle"] is None
    assert second["subtitle"] == "A cat meows." and "<answer>LETTER</answer>" in prompt(first)
    assert {entry["field"] for entry in first["provenance"]} == {"question", "options", "answer"}
    assert summary.missing == 0 and summary.tags == {"VA": 2, "VAS": 2}


def test_human_omni(tmp_path):
    picture = OMNI | {"path": {"image": "i.png", "audio": "a.wav"}, "data_type": "image", "problem_type": "emer_ov"}
    sound = OMNI | {"path": "s.wav", "data_type": "audio", "problem_type": "judge", "solution": "<answer>yes</answer>"}
    thinks = OMNI | {"process": "<think>He smiles.</think>"}
    rows, summary = converted(tmp_path, "humanomni", [OMNI, picture, sound, thinks], "social_rewrite.json")
    assert [row["tag"] for row in rows] == ["VA", "VA", "A", "VA"] and summary.pictures == 1
    assert rows[0]["answer"] == "A,C" and rows[0]["video"] == "emer/x.mp4" and rows[0]["split"] == "train"
    assert (rows[1]["image"], rows[1]["audio"], rows[1]["video"], rows[1]["options"]) == ("i.png", "a.wav", None, None)
    assert all(row["images"] is None for row in rows)
    assert rows[1]["question_type"] == "emer_ov" and rows[2]["answer"] == "Yes" and rows[2]["audio"] == "s.wav"
    assert rows[3]["completion"] == "<think>He smiles.</think><answer>A,C</answer>" and rows[0]["completion"] is None


def test_video_r1(tmp_path):
    picture = R1 | {
        "data_type": "image",
        "path": "./Chart/1.png",
        "problem_type": "numerical",
        "solution": "<answer>3.5</answer>",
    }
    rows, summary = converted(tmp_path, "video-r1", [R1, picture, R1], "Video-R1-260k.json")
    assert [row["id"] for row in rows] == ["video-r1-2", "video-r1-2-2", "video-r1-2-3"]  # names tell rows apart
    assert rows[0]["video"] == rows[0]["clip"] == "LLaVA/clip.mp4" and rows[0]["options"] == [
        "A notification",
        "A command",
    ]
    assert (rows[0]["tag"], rows[0]["answer"], rows[0]["source"]) == ("V", "A", "Video-R1")
    assert (rows[1]["image"], rows[1]["video"], rows[1]["answer"], rows[1]["tag"]) == ("Chart/1.png", None, "3.5", "V")
    assert summary.pictures == 1 and summary.missing == 3 and "completion" not in rows[0]


def test_video_r1_cot_teaches_thoughts_and_answer(tmp_path):
    bare = R1 | {"process": "It is a pop-up.", "solution": "B"}
    tagged = R1 | {"process": "<think>It is a pop-up.</think>"}
    rows, _ = converted(tmp_path, "video-r1-cot", [bare, tagged], "Video-R1-COT-165k.json")
    assert [row["completion"] for row in rows] == [
        "<think>It is a pop-up.</think><answer>B</answer>",
        "<think>It is a pop-up.</think><answer>A</answer>",
    ]
    assert [extract_answer(row["completion"]) for row in rows] == [row["solution"] for row in rows] == ["B", "A"]
    entry = {"field": "completion", "model": "Qwen2.5-VL-72B-Instruct", "prompt_hash": None, "reviewer": None}
    assert rows[0]["provenance"] == [entry] and rows[0]["source"] == "Video-R1-CoT"


def test_pictures_become_clips_or_are_left_out(tmp_path):
    (tmp_path / "source").mkdir()
    Image.new("RGB", (6, 4), (200, 10, 10)).save(tmp_path / "source" / "1.png")
    records = [R1 | {"data_type": "image", "path": "1.png"}, R1 | {"data_type": "image", "path": "2.png"}, R1]
    rows, summary = converted(tmp_path, "video-r1", records, "Video-R1-260k.json", pictures="clips")
    clip = rows[0]["video"]
    assert rows[0]["image"] is None and clip.startswith("extracted/") and rows[0]["clip"] == "1.png"
    assert (tmp_path / "source" / clip).is_file() and len(rows) == 2 and summary.pictures == 0
    assert summary.left_out == {"a picture that is not there or cannot be read": 1}
    summary = convert("video-r1", tmp_path / "source", tmp_path / "more", ConvertOptions(pictures="leave_out"))
    assert summary.rows == {"train": 1} and summary.left_out == {"a picture, and pictures were to be left out": 2}


def test_marks_of_pictures_lead_to_their_clips(tmp_path):
    (tmp_path / "source").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "source" / "1.png")
    records = [
        R1 | {"data_type": "image", "path": "1.png", "problem": problem}
        for problem in ("<image>\nWhat?", "In <image>, what?", "<image> is like what: <image>, <image>?")
    ]
    rows, summary = converted(tmp_path, "video-r1", records, "Video-R1-260k.json", pictures="clips")
    assert prompt(rows[0]).startswith("What?\nA. ") and prompt(rows[1]).startswith("In <video>, what?")
    assert len(rows) == 2 and summary.left_out == {"marks of media in its text, of which it has another number": 1}
    convert("video-r1", tmp_path / "source", tmp_path / "kept")
    assert prompt(rows_of(tmp_path / "kept")[1]).startswith("In <image>, what?")
    assert not validate_tables([tmp_path / "kept"]).counts


def png(color) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(file, "PNG")
    return file.getvalue()


def test_several_pictures_keep_their_places(tmp_path):
    several = {
        "id": "s2",
        "messages": [
            {"role": "user", "content": "<image>\nIs it like <image>?"},
            {"role": "assistant", "content": "No."},
        ],
        "images": ["a.png", "b.png"],
    }
    unmarked = several | {"id": "s3", "messages": [{"role": "user", "content": "Alike?"}, several["messages"][1]]}
    lost = several | {"id": "s4", "images": ["a.png", "b.png", "c.png"]}
    rows, summary = converted(tmp_path, "sharegpt", [several, unmarked, lost])
    assert [(row["tag"], row["image"], row["images"]) for row in rows] == [("V", None, ["a.png", "b.png"])] * 2
    assert [prompt(row) for row in rows] == ["<image>\nIs it like <image>?", "Alike?"]
    assert summary.pictures == 2 and rows[0]["clip"] == "a.png"
    assert summary.left_out == {"marks of media in its text, of which it has another number": 1}
    with pytest.raises(ConversionError, match="more to be seen than one picture, of which one clip cannot be made"):
        convert("sharegpt", tmp_path / "source", tmp_path / "clips", ConvertOptions(pictures="clips"))


def test_blocks_name_their_files(tmp_path):
    blocks = [{"type": "text", "text": "Is "}, {"type": "image", "image": "a.png"}, {"type": "text", "text": " like "}]
    blocks += [{"type": "image", "path": "b.png"}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "No."}]
    rows, _ = converted(tmp_path, "sharegpt", [{"messages": turns}])
    assert rows[0]["images"] == ["a.png", "b.png"] and prompt(rows[0]) == "Is <image> like <image>?"
    url = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
    (tmp_path / "source" / "data.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": [url]}, turns[1]]}])
    )
    with pytest.raises(
        ConversionError, match=r"'messages\[0\]' must have blocks of the types text, video, audio, image"
    ):
        convert("sharegpt", tmp_path / "source", tmp_path / "none")


def test_pictures_inside_a_table_are_written_out(tmp_path):
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]
    cells = [[{"bytes": png("red"), "path": "image.png"}], [{"bytes": png("blue"), "path": "image.png"}] * 2]
    (tmp_path / "source").mkdir()
    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(Picture())}
    )
    two = [turns[0] | {"content": "<image> or <image>?"}, turns[1]]
    Dataset.from_dict({"messages": [turns, two], "images": cells}, features).to_parquet(
        tmp_path / "source/data.parquet"
    )
    convert("sharegpt", tmp_path / "source", tmp_path / "rows")
    report = validate_tables([tmp_path / "rows"], media_root=tmp_path / "source")
    assert not report.counts, report.shown
    one, other = rows_of(tmp_path / "rows")
    assert (tmp_path / "source" / one["image"]).read_bytes() == png("red") and one["images"] is None
    assert other["images"] == [other["images"][0]] * 2 and (
        tmp_path / "source" / other["images"][0]
    ).read_bytes() == png("blue")
    assert one["clip"] != other["clip"]  # though all files have one name
    convert("sharegpt", tmp_path / "source", tmp_path / "clips", ConvertOptions(pictures="clips"))
    [clip] = rows_of(tmp_path / "clips")
    assert clip["video"].endswith(".mp4") and clip["image"] is None and prompt(clip) == "What?"


def test_tpo(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with (source / "dataset.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, TPO)
        writer.writeheader()
        writer.writerow(TPO)
        writer.writerow(TPO | {"prompt": "Who, and\nwhen?"})
    convert("tpo", source, tmp_path / "rows")
    rows = rows_of(tmp_path / "rows")
    assert prompt(rows[0]) == rows[0]["question"] == "When does she sit?" and rows[1]["question"] == "Who, and\nwhen?"
    assert rows[0]["completion"] == rows[0]["answer"] == "At the end." and rows[0]["rejected"] == "Never."
    assert (rows[0]["video"], rows[0]["tag"], rows[0]["source"]) == ("yt/v1.mp4", "V", "TPO")
    assert not validate_tables([tmp_path / "rows"]).counts


def test_avqa(tmp_path):
    source = tmp_path / "source"
    (source / "videos").mkdir(parents=True)
    (source / "videos" / f"{AVQA['video_name']}.mp4").write_bytes(b"x")
    (source / "val_qa.json").write_text(
        json.dumps([AVQA | {"id": 9, "video_name": "other", "question_relation": "?"}])
    )
    rows, summary = converted(tmp_path, "avqa", [AVQA], "train_qa.json")
    by_split = {row["split"]: row for row in rows}
    assert by_split["train"]["answer"] == "B" and by_split["train"]["id"] == "avqa-183"
    assert (by_split["train"]["tag"], by_split["train"]["required_tag"]) == ("VA", "V")
    assert (
        by_split["train"]["video"] == f"videos/{AVQA['video_name']}.mp4"
        and by_split["validation"]["required_tag"] is None
    )
    assert summary.rows == {"train": 1, "validation": 1} and summary.missing == 1


LINES = "Category&VideoID&Quality&StartTime&EndTime\nChurch bell&RUh&good&0&10\nBark&3jS&good&7&9\nBark&VWi&good&0&0\n"


def test_several_sets_become_one_table(tmp_path, monkeypatch):
    """As docs/data.md says it."""
    monkeypatch.chdir(tmp_path)
    for path in ("data/avqa/videos", "data/ave/AVE", "data/shown"):
        Path(path).mkdir(parents=True)
    Path("data/avqa/train_qa.json").write_text(json.dumps([AVQA]))
    Path(f"data/avqa/videos/{AVQA['video_name']}.mp4").write_bytes(b"x")
    Path("data/ave/trainSet.txt").write_text("Bark&3jS&good&7&9\n")
    Path("data/ave/AVE/3jS.mp4").write_bytes(b"x")
    for name in ("avqa", "ave"):
        summary = convert(name, f"data/{name}", f"rows/{name}", ConvertOptions(media_root="data"))
        assert summary.missing == 0
    assert not validate_tables(["rows/avqa", "rows/ave"], media_root="data").counts
    code = (Path(__file__).parents[2] / "docs" / "data.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, {})
    rows = rows_of("rows/avatar")
    assert [(row["source"], row["video"]) for row in rows] == [
        ("AVQA", f"avqa/videos/{AVQA['video_name']}.mp4"),
        ("AVE", "ave/AVE/3jS.mp4"),
    ]
    assert rows == rows_of("rows/avqa") + rows_of("rows/ave")


def test_rows_of_clips_that_are_not_there_are_left_out_where_asked(tmp_path):
    (tmp_path / "source" / "videos").mkdir(parents=True)
    (tmp_path / "source" / "videos" / "here.mp4").write_bytes(b"x")
    records = [AVQA, AVQA | {"video_name": "here"}]
    rows, summary = converted(tmp_path, "avqa", records, "train_qa.json", missing_media="leave_out")
    assert [row["clip"] for row in rows] == ["here"] and summary.left_out == {"a file that is not there": 1}


def test_ave(tmp_path):
    rows, _ = converted(tmp_path, "ave", LINES, "trainSet.txt")
    assert [row["clip"] for row in rows] == ["RUh", "3jS", "VWi"]
    for row, category in zip(rows, ("Church bell", "Bark", "Bark"), strict=True):
        assert row["options"]["ABCD".index(row["answer"])] == category and set(row["options"]) <= set(CATEGORIES)
        assert len(set(row["options"])) == 4 and row["video"] == f"AVE/{row['clip']}.mp4" and row["tag"] == "VA"
    assert len(set(CATEGORIES)) == 28


def test_a_list_of_ave_that_begins_with_a_byte_order_mark(tmp_path):
    rows, _ = converted(tmp_path, "ave", f"\ufeff{LINES}", "trainSet.txt")
    assert [row["clip"] for row in rows] == ["RUh", "3jS", "VWi"]


def test_ave_intervals_are_scored(tmp_path):
    rows, summary = converted(tmp_path, "ave-intervals", LINES, "Annotations.txt", split="test")
    assert [(row["solution"], row["split"]) for row in rows] == [("0-10", "test"), ("7-9", "test")]
    assert summary.left_out == {"its event lasts no second": 1}
    said = ["<answer>0-5</answer>", "<answer>7 s to 9 s</answer>"]
    assert temporal_iou_reward(completions=said, solution=[row["solution"] for row in rows]) == [0.5, 1.0]


def test_the_lists_of_splits_come_before_the_list_of_all(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("Annotations.txt", "trainSet.txt", "testSet.txt"):
        (source / name).write_text(LINES)
    summary = convert("ave", source, tmp_path / "rows")
    assert summary.rows == {"train": 3, "test": 3} and len(summary.files) == 2


def avsbench(source: Path) -> None:
    source.mkdir(exist_ok=True)
    lines = ["name,start,category,split", "a_0,0,dog_barking,train", "b_1,5,race_car,val", "c_2,5,race_car,test"]
    (source / "s4_meta_data.csv").write_text("\n".join(lines) + "\n")
    for split, category, name, marked in (("train", "dog_barking", "a_0", True), ("val", "race_car", "b_1", False)):
        folder = source / "gt_masks" / split / category / name
        folder.mkdir(parents=True)
        mask = np.zeros((20, 30), np.uint8)
        mask[5:15, 3:13] = 255 * marked
        Image.fromarray(mask).save(folder / f"{name}_1.png")


def test_avsbench(tmp_path):
    avsbench(tmp_path / "source")
    summary = convert("avsbench", tmp_path / "source", tmp_path / "rows")
    rows = rows_of(tmp_path / "rows")
    assert not validate_tables([tmp_path / "rows"]).counts and summary.rows == {"train": 1, "validation": 1, "test": 1}
    dog = next(row for row in rows if row["clip"] == "a_0")
    assert (dog["answer"], dog["video"], dog["tag"]) == ("dog barking", "raw_videos/train/dog_barking/a_0.mp4", "VA")
    assert dog["options"] is None and "what it does" in dog["question"] and dog["source"] == "AVSBench"


def test_avsbench_boxes_are_scored(tmp_path):
    avsbench(tmp_path / "source")
    summary = convert("avsbench-boxes", tmp_path / "source", tmp_path / "rows")
    [row] = rows_of(tmp_path / "rows")
    assert row["solution"] == "[3, 5, 13, 15]" and "30 x 20" in row["question"]
    assert dict(summary.left_out) == {"its first mask is empty": 1, "no mask; put the masks below the media root": 1}
    said = ["<answer>[3, 5, 13, 15]</answer>", "<answer>[3, 5, 13, 10]</answer>"]
    assert box_iou_reward(completions=said, solution=[row["solution"]] * 2) == [1.0, 0.5]
    assert box_of(tmp_path / "source/gt_masks/val/race_car/b_1/b_1_1.png") == (None, 30, 20)


def test_avsbench_semantic(tmp_path):
    source = tmp_path / "source"
    (source / "v2" / "u1").mkdir(parents=True)
    (source / "v2" / "u1" / "audio.wav").write_bytes(b"x")
    (source / "metadata.csv").write_text("vid,uid,s_min,s_sec,a_obj,split,label\nv,u1,0,1,guitar_piano,test,v2\n")
    convert("avsbench", source, tmp_path / "rows")
    [row] = rows_of(tmp_path / "rows")
    assert (row["answer"], row["video"], row["audio"]) == ("guitar piano", "v2/u1/video.mp4", "v2/u1/audio.wav")


def test_avatar(tmp_path):
    chosen = {
        "question": "Which?",
        "options": {"A": "x", "B": "y"},
        "solution": "B",
        "videos": "c.mp4",
        "audios": ["c.wav"],
    }
    records = "".join(json.dumps(record) + "\n" for record in (AVATAR, chosen, {"solution": "A", "question": "?"}))
    rows, summary = converted(tmp_path, "avatar-rl", records, "stage3.jsonl")
    first, second = rows
    assert prompt(first) == first["question"] == "Where is what barks?" and first["answer"] == "left"
    assert (first["source"], first["hint"], first["audio_cues"]) == ("AVSBench", "Listen first.", "A dog barks.")
    assert first["id"] == "avatar-rl-p7" and first["tag"] == "VA" and second["source"] == "AVATAR-RL"
    assert "A. x\nB. y" in prompt(second) and second["audio"] == "c.wav" and second["answer"] == "B"
    assert summary.left_out == {"no medium at all": 1}


def test_answers_between_the_questions_of_avatars_records_stay(tmp_path):
    said = [("user", "<video>What barks?"), ("assistant", "A dog."), ("user", "Where?"), ("assistant", "left")]
    record = AVATAR | {"messages": [{"role": role, "content": text} for role, text in said]}
    [row], _ = converted(tmp_path, "avatar-rl", json.dumps(record), "stage3.jsonl")
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert row["prompt"][1]["content"] in ("A dog.", [{"type": "text", "text": "A dog."}])
    assert row["question"] == "Where?" and row["answer"] == "left"


def test_vast(tmp_path):
    silent = {"video_id": "def", "desc": "A wall.", "split": "test"}
    rows, _ = converted(tmp_path, "vast", [VAST, silent], "annotations.json")
    clip = [row for row in rows if row["clip"] == "abc.5"]
    assert [row["tag"] for row in clip] == list(ModalityTag) and len({row["id"] for row in rows}) == 8
    assert {row["split"] for row in clip} == {"train"} and {row["video"] for row in clip} == {"videos/abc.5.mp4"}
    by_tag = {row["tag"]: row for row in clip}
    assert by_tag["VA"]["reference"] == "A dog runs. It barks." and by_tag["VAS"]["reference"] == VAST["vast_cap"]
    assert by_tag["A"]["reference"] == by_tag["A"]["reference_a"] == "It barks." and by_tag["A"]["reference_v"] is None
    assert by_tag["S"]["reference_s"] == by_tag["S"]["subtitle"] == "Come here!"
    assert "to be seen, what is to be heard and what the subtitles say" in prompt(by_tag["VAS"])
    assert {(e["field"], e["model"]) for e in by_tag["VAS"]["provenance"]} >= {("reference", "Vicuna-13b")}
    [other] = [row for row in rows if row["clip"] == "def"]
    assert (other["tag"], other["split"], other["reference"]) == ("V", "test", "A wall.")


def test_share_gpt(tmp_path):
    chat = {
        "messages": [
            {"role": "user", "content": [{"type": "audio", "audio": "x"}, {"type": "text", "text": "Who speaks?"}]},
            {"role": "assistant", "content": "A child."},
        ],
        "audios": ["a.wav"],
        "system": "Be brief.",
    }
    many = chat | {"audios": ["a.wav", "b.wav"]}
    rows, summary = converted(tmp_path, "sharegpt", [SHARE, chat, many], "data.json")
    assert [(message["role"], message["content"]) for message in rows[0]["prompt"]] == [
        ("user", "<video>\nWhat is it?"),
        ("assistant", "A cat."),
        ("user", "What color?"),
    ]
    assert rows[0]["completion"] == rows[0]["answer"] == "Black." and rows[0]["question"] == "What color?"
    assert (rows[0]["id"], rows[0]["tag"], rows[0]["clip"]) == ("sharegpt-s1", "VA", "c/cat.mp4")
    assert rows[1]["prompt"][0] == {"role": "system", "content": "Be brief."} and rows[1]["tag"] == "A"
    assert summary.left_out == {"several media of the kind audio; a row has one of it": 1}


PLACES = {  # what is said, the media, and where those stand in the messages that the chat template gets
    "one question, marked as it would be without": (["<video>\nQ"], {"video": "v"}, "[video]Q"),
    "the first question": (["<video>Q1", "A1", "Q2"], {"video": "v"}, "[video]Q1|A1|Q2"),
    "the last question": (["Q1", "A1", "<video>Q2"], {"video": "v"}, "Q1|A1|[video]Q2"),
    "no mark, as ms-swift reads it": (
        ["Q1", "A1", "Q2"],
        {"videos": ["v"], "audios": ["a"]},
        "[video][audio]Q1|A1|Q2",
    ),
    "one kind marked": (["Q1", "A1", "<audio>Q2"], {"video": "v", "audio": "a"}, "[video]Q1|A1|[audio]Q2"),
    "the clip as LLaVA-NeXT marks it": (["<image>\nQ1", "A1", "Q2"], {"video": "v"}, "[video]\nQ1|A1|Q2"),
    "behind the text": (["Q <video>"], {"video": "v"}, "Q [video]"),
    "in an order of its own": (["<video><image>Q"], {"video": "v", "image": "i"}, "[video][image]Q"),
    "a turn without words": (["<image>", "A1", "Q2"], {"image": "i"}, "[image]|A1|Q2"),
    "two pictures": (["<image>Q1", "A1", "<image>Q2"], {"images": ["i", "j"]}, "[image]Q1|A1|[image]Q2"),
}


@pytest.mark.parametrize("case", PLACES)
def test_media_stand_where_the_conversation_has_them(tmp_path, case):
    said, media, placed = PLACES[case]
    roles = ("user", "assistant") * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    [row], _ = converted(tmp_path, "sharegpt", [{"messages": messages, "solution": "S", **media}])
    own_place = {"image": [True] * (len(row["images"] or ()) or bool(row["image"]))}
    own_place |= {kind: [True] * bool(row[kind]) for kind in ("video", "audio")}
    shown = place_blocks(read_content(row["prompt"]).messages, own_place, "")
    texts = ["".join(block.get("text", f"[{block['type']}]") for block in turn["content"]) for turn in shown]
    assert texts == placed.split("|")
    assert row["question"] == re.sub("<[a-z]+>", "", said[-1]).strip()


def test_tables_that_are_passed_over_are_named(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    record = {"messages": [{"role": "user", "content": "Q"}], "solution": "S", "video": "v"}
    for name in ("a.jsonl", "b.json", "notes.txt"):
        (source / name).write_text(json.dumps(record))
    Dataset.from_list([record]).to_parquet(source / "c.parquet")
    assert cli.main(["data", "convert", "sharegpt", str(source), str(tmp_path / "rows")]) == 0
    told = capsys.readouterr().out.replace("\n", "")
    assert all(f"not read beside {source / 'a.jsonl'}: {source / name}" in told for name in ("b.json", "c.parquet"))
    assert "notes.txt" not in told and len(rows_of(tmp_path / "rows")) == 1
    assert convert("sharegpt", source / "b.json", tmp_path / "one").passed_over == []


def test_a_question_of_marks_alone_is_none(tmp_path):
    with pytest.raises(ConversionError, match="words beside the marks of media in the last turn of the user"):
        converted(
            tmp_path,
            "sharegpt",
            [{"messages": [{"role": "user", "content": "<video>"}], "solution": "S", "video": "v"}],
        )


def test_share_gpt_takes_the_solution_that_a_record_has(tmp_path):
    asked, said = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "<think>B?</think>It is B."}
    media = {"images": ["a.png"]}
    records = [
        {"messages": [asked, said], "solution": "B", **media},
        {"messages": [asked], "solution": "<answer> 12 </answer>", **media},
        {"messages": [said, asked], "solution": 12.0, **media},
        {"messages": [asked, said], "solution": "", **media},
    ]
    rows, _ = converted(tmp_path, "sharegpt", records)
    assert [row["solution"] for row in rows] == ["B", "12", "12", said["content"]]
    assert [row["answer"] for row in rows] == [row["solution"] for row in rows]
    assert [row["completion"] for row in rows] == [said["content"], None, None, said["content"]]
    assert [[turn["role"] for turn in row["prompt"]] for row in rows] == [
        ["user"],
        ["user"],
        ["assistant", "user"],
        ["user"],
    ]
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    with pytest.raises(ConversionError, match="'solution' must be a text"):
        converted(wrong, "sharegpt", [records[0] | {"solution": ["B"]}])


# What is malformed


MALFORMED = [
    ("daily-omni", "qa.json", DAILY | {"Answer": "E"}, "Answer", "must be the letter of an option"),
    ("daily-omni", "qa.json", {"Question": "?"}, "Choice", "is missing; a record of Daily-Omni has Question"),
    ("humanomni", "qa.json", OMNI | {"problem_type": "essay"}, "problem_type", "must be one of"),
    ("humanomni", "qa.json", OMNI | {"path": {"image": "a.png"}}, "path.audio", "must be a path"),
    ("video-r1", "Video-R1-260k.json", R1 | {"path": "../x.mp4"}, "path", "must be a path below the media root"),
    ("video-r1", "Video-R1-260k.json", R1 | {"data_type": "audio"}, "data_type", "must be video or image"),
    ("video-r1", "Video-R1-260k.json", R1 | {"problem": "half \ud83d"}, "question", "half of a character"),
    ("video-r1-cot", "Video-R1-COT-165k.json", R1, "process", "must be a text, but is ''"),
    ("video-r1-cot", "Video-R1-COT-165k.json", R1 | {"process": "<think>a"}, "process", "1 beginnings and 0 ends"),
    ("tpo", "t.json", {"video": "a", "prompt": "q", "chosen": "c"}, "rejected", "must be filled (or 'dispreferred'"),
    ("avqa", "train_qa.json", AVQA | {"answer": 4}, "answer", "must be the number of an option from 0 to 3"),
    ("ave-intervals", "Annotations.txt", "Bark&x&good&a&9\n", "StartTime", "must be a whole second"),
    ("ave", "Annotations.txt", "Bark&x\n", "Quality", "is missing"),
    ("avsbench", "s4_meta_data.csv", "name,start,category,split\na,0,b,dev\n", "split", "must be one of train, val"),
    ("avatar-rl", "a.json", AVATAR | {"messages": "hello"}, "messages", "must be a list of turns"),
    ("vast", "annotations.json", VAST | {"audio_cap": [3]}, "audio_cap", "must be a text or a list of texts"),
    ("vast", "annotations.json", VAST | {"subtitle": "abc.srt"}, "subtitle", "which is the name of a file"),
    ("vast", "annotations.json", VAST | {"subtitle": "subs/abc.ab"}, "subtitle", "which looks like a file"),
    ("sharegpt", "a.json", SHARE | {"conversations": SHARE["conversations"][:3]}, "conversations", "ends in user"),
    (
        "sharegpt",
        "a.json",
        SHARE | {"conversations": [{"from": "cat", "value": "x"}]},
        "conversations[0]",
        "is of 'cat'",
    ),
]


@pytest.mark.parametrize(("name", "file", "record", "field", "error"), MALFORMED)
def test_a_malformed_record_is_named(tmp_path, name, file, record, field, error):
    (tmp_path / file).write_text(record if isinstance(record, str) else json.dumps([record]))
    with pytest.raises(ConversionError) as caught:
        convert(name, tmp_path, tmp_path / "rows")
    assert str(caught.value).startswith(f"{tmp_path / file}, record 0: field '{field}' ") and error in str(
        caught.value
    )
    assert not (tmp_path / "rows").exists()


def test_malformed_records_are_skipped_where_asked(tmp_path, capsys):
    records = [AVQA | {"id": n, "answer": n % 5} for n in range(20)]
    (tmp_path / "train_qa.json").write_text(json.dumps(records))
    words = ["data", "convert", "avqa", str(tmp_path), str(tmp_path / "rows")]
    assert cli.main(words) == 2 and "record 4: field 'answer'" in capsys.readouterr().err
    assert cli.main([*words, "--skip-malformed", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["malformed"] == 4 and summary["rows"] == {"train": 16} and summary["records"] == 20
    assert [told.split(": ")[0].rpartition(" ")[2] for told in summary["named"]] == ["4", "9", "14", "19"]


# What holds for all


def test_every_converter_is_tested_here_and_says_what_it_relied_on():
    tested = {case[0] for case in MALFORMED} | {"avsbench-boxes"}
    assert set(CONVERTERS) == tested
    for converter in CONVERTERS.values():
        text = __import__(converter.read.__module__, fromlist=["x"]).__doc__
        assert "Relied on:" in text and converter.media and converter.hub or converter.name == "sharegpt"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["A", "x.mp4"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["A", "B", "role", "from", "value"]), inner)
    ),
    max_leaves=6,
)
RECORDS = {
    "daily-omni": DAILY,
    "humanomni": OMNI,
    "video-r1": R1,
    "video-r1-cot": R1 | {"process": "<think>so</think>"},
    "tpo": TPO,
    "avqa": AVQA,
    "ave": dict(
        zip(("Category", "VideoID", "Quality", "StartTime", "EndTime"), ("Bark", "x", "good", "1", "3"), strict=True)
    ),
    "avsbench": {"name": "a_0", "start": "0", "category": "dog", "split": "train"},
    "avatar-rl": AVATAR | {"options": None, "question": "?"},
    "vast": VAST,
    "sharegpt": SHARE,
}
RECORDS |= {"ave-intervals": RECORDS["ave"], "avsbench-boxes": RECORDS["avsbench"]}


@pytest.mark.slow
@given(st.data())
def test_a_record_is_refused_or_becomes_valid_rows(data):
    """Whatever stands in one of its fields."""
    name = data.draw(st.sampled_from(sorted(CONVERTERS)))
    record = dict(RECORDS[name])
    field = data.draw(st.sampled_from(sorted(record)))
    record[field] = data.draw(JSON)
    with tempfile.TemporaryDirectory() as folder:
        summary = ConversionSummary([], folder)
        rows = _Rows(CONVERTERS[name], ConvertOptions(), Path(folder), "", summary)
        try:
            made = rows.of_record((record, Path("records.json"), 0), None)
        except ConversionError as error:
            assert str(error).startswith("records.json, record 0: field '")
            return
        assert made or summary.left_out
        if made:
            features = Features({**ROW_FEATURES, **{name: Value("string") for name in CONVERTERS[name].further}})
            write_shards(made, f"{folder}/rows", features)
            report = validate_tables([f"{folder}/rows"])
            assert not report.counts, report.shown


def test_the_same_records_are_the_same_bytes(tmp_path):
    (tmp_path / "trainSet.txt").write_text(LINES * 40)
    for name in ("one", "two"):
        convert("ave", tmp_path, tmp_path / name, ConvertOptions(shard_rows=50))
    found = {
        name: [hashlib.sha256(p.read_bytes()).digest() for p in find_shards(tmp_path / name)["train"]]
        for name in ("one", "two")
    }
    assert len(found["one"]) == 3 and found["one"] == found["two"]


def test_a_package_adds_a_converter(tmp_path):
    def read(record, place):
        yield Sample(
            clip=record.text("c"), question=record.text("q"), solution="yes", kind="yes_no", text=f"At {place.number}."
        )

    mine = Converter("mine", "Mine", "me", read, (("*.jsonl", "train"),), media="none", hub="", required=("q",))
    (tmp_path / "a.jsonl").write_text('{"q": "Is it?", "c": "k"}\n')
    summary = convert(mine, tmp_path, tmp_path / "rows", ConvertOptions(prompt_style="answer"))
    [row] = rows_of(tmp_path / "rows")
    assert row["tag"] == "S" and row["subtitle"] == "At 0." and "Yes or No" in prompt(row) and summary.tags == {"S": 1}
    assert not validate_tables([tmp_path / "rows"]).counts
    with pytest.raises(ValueError, match="the converter 'avqa' is there already"):
        converters.register_converter(CONVERTERS["avqa"])


def test_tags_that_a_record_cannot_be_fed_are_counted(tmp_path):
    rows, summary = converted(tmp_path, "avqa", [AVQA], "train_qa.json", tags=("V", "AS"))
    assert [row["id"] for row in rows] == ["avqa-183-V"]
    assert summary.left_out == {"tag AS needs subtitle, which the record does not have": 1}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["avqua", "{here}", "out"], "Unknown converter 'avqua'; choose one of daily-omni"),
        (["avqa", "absent", "out"], "there is no file or folder absent"),
        (["avqa", "{here}", "out"], "holds no table of AVQA: looked for train_qa.json"),
        (["sharegpt", "{here}", "{here}"], "is there already; name another folder"),
        (["sharegpt", "{here}", "out", "--pictures", "eat"], "pictures must be one of keep, clips, leave_out"),
        (["sharegpt", "{here}", "out", "--tags", "VX"], "'VX' is not a modality tag"),
        (["sharegpt", "{here}", "out", "--prompt-style", "x"], "there is no prompt style 'x'"),
        (["sharegpt", "{here}", "out", "--media-root", "absent"], "media_root: there is no folder absent"),
        (["sharegpt", "{here}", "out", "--tag", "S"], "no row is left of 1 records"),
        (["sharegpt"], "the following arguments are required: SOURCE, OUTPUT"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys, monkeypatch, words, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([SHARE]))
    assert cli.main(["data", "convert", *(word.format(here=tmp_path) for word in words)]) == 2
    assert error in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command_says_what_became_of_the_records(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([SHARE, SHARE | {"video": ["a.mp4", "b.mp4"]}]))
    assert cli.main(["data", "convert", "sharegpt", str(tmp_path), str(tmp_path / "rows"), "--split", "test"]) == 0
    shown = capsys.readouterr().out
    assert "rows of split test" in shown and "left out: several media of the kind video" in shown
    assert f"train with dataset_name: {tmp_path / 'rows'} and media_root: {tmp_path}" in shown
    assert cli.main(["data", "convert", "--help"]) == 0
    assert f"set: {', '.join(CONVERTERS)}".replace(", sharegpt", " or sharegpt") in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_media_root_is_told_whole(tmp_path, capsys, monkeypatch):
    """A job reads '.' as the folder of its rows."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.json").write_text(json.dumps([SHARE]))
    monkeypatch.chdir(tmp_path / "set")
    for source in (".", "a.json"):
        assert cli.main(["data", "convert", "sharegpt", source, f"../of {source}"]) == 0
        assert f"media_root: {tmp_path / 'set'}" in capsys.readouterr().out


def test_tables_of_parquet_are_records_too(tmp_path):
    Dataset.from_list([AVATAR]).to_parquet(tmp_path / "train.parquet")
    convert("avatar-rl", tmp_path / "train.parquet", tmp_path / "rows")
    [row] = rows_of(tmp_path / "rows")
    assert row["video"] == "clips/dog.mp4" and row["split"] == "train"
