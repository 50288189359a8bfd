"""`maple-trl eval` on rows with pictures: what a model here and a server are shown, what is kept of it, and what a report shows."""

import base64
import io
import json
import shutil

import eval_runs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer
from datasets import Dataset, Features, List, Value
from datasets import Image as Cell
from eval_runs import SMALL, lines_of, result_of
from PIL import Image
from test_eval_server import always, answers, is_question
from test_judge_server import Served, needs_server
from tiny_models import save_tiny

from maple_trl.chat.messages import wav_bytes
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.data.shards import write_shards
from maple_trl.data.validation import validate_tables
from maple_trl.evaluation.served_prompts import MessageEncoder
from maple_trl.omni.families import family_class, registered_types
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.reports import write_report


pytestmark = pytest.mark.slow

SIZE = 56
SHOWN = {  # by row, the pictures that it has; the second has a clip too
    "one": ["0.png"],
    "beside": ["1.png"],
    "two": ["0.png", "2.png"],
    "heard": ["1.png"],
}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Clips of the built-in set and pictures of one colour each, below one folder."""
    root = tmp_path_factory.mktemp("media")
    row = next(row for row in load_seven_tags()["test"] if row["tag"] == "VAS")
    shutil.copy(default_folder() / row["video"], root / "clip.mp4")
    for number, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (SIZE, SIZE), color).save(root / f"{number}.png")
    return root


def rows():
    asked = [{"role": "user", "content": "Which? A. red\nB. blue"}]
    shared = {"solution": "B", "answer": "B", "options": ["red", "blue"], "question": "Which?", "source": "s"}
    return [
        {"id": "one", "tag": "V", "image": "0.png", "prompt": asked, **shared},
        {"id": "beside", "tag": "VA", "image": "1.png", "video": "clip.mp4", "prompt": asked, **shared},
        {
            "id": "two",
            "tag": "VS",
            "images": ["0.png", "2.png"],
            "subtitle": "They are alike.",
            "prompt": [{"role": "user", "content": "Is <image> like <image>? A. yes\nB. no"}],
            **shared,
        },
        {"id": "heard", "tag": "VA", "image": "1.png", "audio": "clip.mp4", "prompt": asked, **shared},
    ]


def write_rows(folder, split="test"):
    filled = [dict.fromkeys(("image", "images", "video", "audio", "subtitle")) | row for row in rows()]
    write_shards([row | {"clip": row["id"], "split": split} for row in filled], folder)
    return folder


def evaluate(folder, media, out, *words):
    words = ["--model", "builtin:tiny-omni", "--data", folder, "--media-root", media, *SMALL, *words]
    return eval_runs.evaluate(*words, "--quiet", "--output", out)


def by_row(folder, access):
    return {line["id"]: line for line in lines_of(folder) if line["access"] == access}


def test_a_model_here_is_shown_pictures_as_a_visual_signal(media, tmp_path):
    table = write_rows(tmp_path / "rows")
    assert not validate_tables([table], media_root=media).counts
    assert evaluate(table, media, tmp_path / "out", "--access", "required,V,A,S", "--samples", "1") == 0
    required = by_row(tmp_path / "out", "required")
    for name, line in required.items():
        assert line["image"] == SHOWN[name] and line["image_tokens"] == 4 * len(SHOWN[name])  # 56 x 56, 28 a token
        assert (line["video_tokens"] > 0) == (name == "beside") and line["status"] == "scored"
    assert required["two"]["prompt"] == "user: Is  [image]  like  [image] ? A. yes\nB. no"
    heard = by_row(tmp_path / "out", "A")
    assert {name: line["status"] for name, line in heard.items()} == {
        "one": "lacking",
        "beside": "scored",
        "two": "lacking",
        "heard": "scored",
    }
    assert heard["beside"]["image"] == [] and heard["beside"]["image_tokens"] == 0
    seen = by_row(tmp_path / "out", "V")
    assert all(line["status"] == "scored" and line["fed"] == "V" for line in seen.values())
    assert seen["heard"]["audio_tokens"] == 0 and by_row(tmp_path / "out", "S")["two"]["image_tokens"] == 0
    assert result_of(tmp_path / "out")["accesses"]["V"]["completions"]["image_tokens"] == 4 * 5


def test_pictures_inside_a_table_are_read_as_files_are(media, tmp_path, monkeypatch):
    """The same tokens, positions and pixels, from JSON with paths and from Parquet with the files in it."""
    monkeypatch.setattr("maple_trl.omni.embedded.FOLDER", tmp_path / "stored")
    (tmp_path / "paths").mkdir()
    (tmp_path / "paths" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    message = List({"role": Value("string"), "content": Value("string")})
    texts = dict.fromkeys(("id", "tag", "video", "audio", "subtitle", "solution", "answer"), Value("string"))
    features = Features({**texts, "options": List(Value("string")), "prompt": message, "images": List(Cell())})
    cells = [
        {name: row.get(name) for name in features}
        | {"images": [{"bytes": (media / name).read_bytes(), "path": None} for name in SHOWN[row["id"]]]}
        for row in rows()
    ]
    (tmp_path / "inside").mkdir()
    Dataset.from_list(cells, features=features).to_parquet(tmp_path / "inside" / "test.parquet")
    for name in ("paths", "inside"):
        assert evaluate(tmp_path / name, media, tmp_path / "out" / name, "--samples", "1") == 0
    paths, inside = (by_row(tmp_path / "out" / name, "required") for name in ("paths", "inside"))
    assert {name: line["inputs"] for name, line in paths.items()} == {
        name: line["inputs"] for name, line in inside.items()
    }
    assert len({line["inputs"] for line in paths.values()}) == 4
    assert inside["two"]["image"][0].startswith("embedded:") and paths["two"]["image"] == SHOWN["two"]
    write_report([tmp_path / "out" / "inside"], tmp_path / "report.html", json_path=tmp_path / "report.json")
    assert "data:image/jpeg" not in (tmp_path / "report.json").read_text()


def blocks(body):
    content = body["messages"][-1]["content"]
    return [(block["type"], block.get("text") or block.get("image_url", {}).get("url")) for block in content]


def test_a_server_gets_them_at_their_places(media, tmp_path):
    table = write_rows(tmp_path / "rows")
    words = ["--samples", "1", "--access", "required,A", "--concurrency", "1", "--batch-size", "1"]
    with ChatServer(always("B")) as server:
        words += ["--server", server.url, "--model", "served"]
        assert evaluate(table, media, tmp_path / "out", *words) == 0
        tried = [blocks(call.body) for call in server.calls if not is_question(call.body)]
        calls = [call.body for call in server.calls if is_question(call.body)]
    assert [("image_url" in dict(found), "input_audio" in dict(found)) for found in tried] == [
        (False, False),
        (True, False),  # a picture
        (True, False),  # frames
        (False, True),
    ]
    kinds = [[kind for kind, _ in blocks(call)] for call in calls]
    frames = ["text", "image_url"] * 4  # each behind its time
    assert kinds[0] == ["image_url", "text"]  # by rows, then by access
    assert kinds[1] == ["image_url", *frames, "input_audio", "text"] and kinds[2] == ["input_audio", "text"]
    assert [(kind, text if kind == "text" else "") for kind, text in blocks(calls[3])] == [
        ("text", "Subtitles:\nThey are alike.\n"),
        ("text", "Is "),
        ("image_url", ""),
        ("text", " like "),
        ("image_url", ""),
        ("text", "? A. yes\nB. no"),
    ]
    assert kinds[4] == ["image_url", "input_audio", "text"] and kinds[5] == ["input_audio", "text"] and len(kinds) == 6
    shown = [url for kind, url in blocks(calls[3]) if kind == "image_url"]
    with MediaLoader(media, MediaLimits(max_pixels=3136)) as loader:
        for url, name in zip(shown, SHOWN["two"], strict=True):
            prefix, data = url.split(",")
            seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
            assert prefix == "data:image/jpeg;base64" and np.abs(seen - loader.image(name).pixels).mean() < 3
    lines = by_row(tmp_path / "out", "required")
    assert {name: line["image"] for name, line in lines.items()} == SHOWN
    assert lines["one"]["image_tokens"] is None  # only the server knows


def test_text_that_any_family_reads_as_media_is_sent_to_no_server():
    """Also the tokens of a family that is made of another."""
    every = {token for name in registered_types() for token in family_class(name).media_tokens}
    assert every == set(MessageEncoder.media_tokens) and {"<|audio_pad|>", "<|AUDIO|>", "<image|>"} <= every


def test_a_server_that_ignores_pictures_is_refused(media, tmp_path, capsys):
    with ChatServer(answers(lambda body: "B", sees=False)) as server:
        words = ["--server", server.url, "--model", "served", "--samples", "1", "--filter", '{"id": ["one"]}']
        assert evaluate(write_rows(tmp_path / "rows"), media, tmp_path / "out", *words) == 1
    assert "the server ignores image: a prompt has" in capsys.readouterr().err


@needs_server
def test_a_real_server_reads_each_picture(media, tmp_path):
    """`transformers serve` with a tiny random vision model counts the tokens of what it was shown."""
    model = save_tiny("qwen2_5_vl", tmp_path / "vl")
    asked = [{"role": "user", "content": "Which?"}]
    table = [{"id": str(n), "prompt": asked, "solution": "A", "tag": "V", "images": ["0.png"] * n} for n in (1, 2, 3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    server = Served(model, tmp_path / "home")
    try:
        server.wait()
        words = ["--model", model, "--server", server.url, "--samples", "1", "--temperature", "0"]
        assert evaluate(tmp_path, media, tmp_path / "out", *words) == 0
    finally:
        server.stop()
    one, two, three = (line["prompt_tokens"] for line in lines_of(tmp_path / "out"))
    assert three - two == two - one > 0


def omni_bench(folder, media):
    """OmniBench as it is published, with one question."""
    with MediaLoader(media) as loader:
        sound = wav_bytes(loader.audio("clip.mp4").waveform, 16_000)
    record = {
        "index": 7,
        "question": "Which colour?",
        "options": ["red", "blue"],
        "answer": "blue",
        "task type": "Object",
    }
    record |= {"audio content": "a tone", "image content": "a colour", "audio": {"bytes": sound, "path": "s.wav"}}
    record["image"] = {"bytes": (media / "1.png").read_bytes(), "path": "p.png"}
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([record]), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def test_a_benchmark_s_pictures_are_fed_or_become_clips(media, tmp_path, capsys):
    folder = omni_bench(tmp_path / "omnibench", media)
    words = ["--benchmark", "omnibench", "--samples", "1"]
    assert evaluate(folder, folder, tmp_path / "none", *words) == 2
    assert "the table holds the file itself; write_media=True" in capsys.readouterr().err
    words += ["--write_media", "true"]
    assert evaluate(folder, folder, tmp_path / "fed", *words) == 0
    assert evaluate(folder, folder, tmp_path / "clips", *words, "--pictures", "clips") == 0
    [fed], [clip] = lines_of(tmp_path / "fed"), lines_of(tmp_path / "clips")
    assert fed["image_tokens"] > 0 and fed["video_tokens"] == 0 and fed["audio_tokens"] > 0 and fed["video"] == []
    assert clip["video_tokens"] > 0 and clip["image_tokens"] == 0 and clip["image"] == []
    data = [result_of(tmp_path / name)["data"] for name in ("fed", "clips")]
    assert [found["pictures"] for found in data] == ["keep", "clips"]
    assert evaluate(folder, folder, tmp_path / "fed", *words, "--pictures", "clips") == 2
    assert "holds another evaluation" in capsys.readouterr().err


def test_a_table_has_no_pictures_to_write(media, tmp_path, capsys):
    assert evaluate(write_rows(tmp_path / "rows"), media, tmp_path / "out", "--pictures", "clips") == 2
    assert "--pictures and --write_media are for a benchmark's own files" in capsys.readouterr().err
