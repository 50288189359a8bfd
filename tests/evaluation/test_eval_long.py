"""A clip of twenty minutes through `maple-trl eval`: asked, and what of its sound was left out is counted."""

import json

import pytest
from eval_runs import MODEL, evaluate, lines_of, result_of
from test_long_media import SECONDS, write_long


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long-eval")
    write_long(folder / "long.mov")
    prompt = [{"role": "user", "content": "Which?"}]
    rows = [{"id": tag, "tag": tag, "prompt": prompt, "solution": "B", "video": "long.mov"} for tag in ("V", "VA")]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*MODEL, "--data", folder, "--samples", "2", "--quiet", "--max_media_seconds", "20", "--output"]


@pytest.mark.slow
def test_a_long_clip_is_asked_and_its_sound_counted(data, tmp_path, capsys):
    assert evaluate(*data, tmp_path / "out") == 0
    assert "1 of 1 questions were fed parts of it; 20 s fed, 1180 s left out" in capsys.readouterr().out
    found, lines = result_of(tmp_path / "out"), lines_of(tmp_path / "out")
    assert [line["status"] for line in lines] == ["scored"] * 4 and found["media"]["overlong_media"] == "spread"
    assert [line["audio_seconds"] for line in lines] == [None, None, 20, 20]
    assert lines[2]["audio_source_seconds"] == pytest.approx(SECONDS, abs=0.5) and "sound-spread" in lines[2]["notes"]
    sound = found["accesses"]["required"]["sound"]
    assert sound == pytest.approx(
        {"questions": 1, "in_part": 1, "seconds": 20, "left_out_seconds": SECONDS - 20}, abs=0.5
    )
    assert found["accesses"]["required"]["completions"]["note:sound-spread"] == 2
    # Negative control: what it was before.
    assert evaluate(*data, tmp_path / "strict", "--overlong_media", "quarantine") == 1
    assert {error["reason"] for error in result_of(tmp_path / "strict")["errors"]} == {"too-long"}


@pytest.mark.slow
def test_joined_parts_are_not_interleaved(data, tmp_path):
    """Their places among the pictures would be wrong: the row is fed as without audio in video."""
    for name, more in (("plain", []), ("interleaved", ["--audio_in_video", "true"])):
        assert evaluate(*data, tmp_path / name, *more) == 0
    plain, interleaved = (lines_of(tmp_path / name) for name in ("plain", "interleaved"))
    assert [line["inputs"] for line in plain] == [line["inputs"] for line in interleaved]
    # Negative control: of a sound that is fed whole, the option changes what is read.
    (folder,) = (word for word in data if hasattr(word, "is_dir") and (word / "test.jsonl").is_file())
    row = json.loads((folder / "test.jsonl").read_text().splitlines()[1])
    block = {"type": "video", "video": "long.mov", "video_start": 0, "video_end": 20}
    row |= {"video": None, "prompt": [{"role": "user", "content": [block, {"type": "text", "text": "Which?"}]}]}
    (tmp_path / "short.jsonl").write_text(json.dumps(row) + "\n")
    short = [tmp_path / "short.jsonl" if word == folder else word for word in data[:-1]]
    short += ["--split", "train", "--media-root", folder, "--output"]
    for name, more in (("a", []), ("b", ["--audio_in_video", "true"])):
        assert evaluate(*short, tmp_path / name, *more) == 0
    assert lines_of(tmp_path / "a")[0]["inputs"] != lines_of(tmp_path / "b")[0]["inputs"]
    assert lines_of(tmp_path / "a")[0]["audio_source_seconds"] == 20
