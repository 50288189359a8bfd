"""Video-R1 mixes clips and pictures: its records are converted, validated, trained on by AVATAR's first stage, and reported."""

import json
import shutil
from pathlib import Path

import pytest
from chat_server import ChatServer, say
from PIL import Image

from maple_trl import cli
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.records.rollouts import read_rollouts


pytestmark = pytest.mark.slow

TINY = Path(__file__).resolve().parents[2] / "recipes" / "avatar" / "tiny"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Three pictures and a clip, as Video-R1 is published."""
    folder = tmp_path_factory.mktemp("video_r1")
    clip = next(row["video"] for row in load_seven_tags()["train"] if row["tag"] == "V")
    shutil.copy(default_folder() / clip, folder / "clip.mp4")
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (112, 112), color).save(folder / f"{number}.png")
    shared = {"problem": "Which is it?", "problem_type": "multiple choice", "options": ["A. red", "B. other"]}
    files = [("image", "0.png", "A"), ("image", "1.png", "B"), ("image", "2.png", "B"), ("video", "clip.mp4", "A")]
    records = [
        {"problem_id": i, "data_type": kind, "path": f"./{path}", "solution": f"<answer>{letter}</answer>", **shared}
        for i, (kind, path, letter) in enumerate(files)
    ]
    (folder / "Video-R1-260k.json").write_text(json.dumps(records))
    thoughts = [{**record, "process": "<think>I look at it.</think>"} for record in records]
    (folder / "Video-R1-COT-165k.json").write_text(json.dumps(thoughts))
    return folder


def train(recipe, source, rows, root, folder, *words):
    words = ["--config", TINY / recipe, "--output_dir", folder, "--dataset_name", rows, "--media_root", root, *words]
    words += ["--dataset_filter", json.dumps({"source": [source]}), "--dataset_test_split", "none", "--max_steps", 2]
    words += ["--evaluate_before_after", "false", "--use_cpu", "true", "--bf16", "false", "--save_strategy", "no"]
    return cli.main(["train", *map(str, words), "--logging_steps", "1"])


def logged(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize(("pictures", "images"), [("keep", 3), ("clips", 0), ("leave_out", 0)])
@pytest.mark.matrix(cases=1)
def test_video_r1_with_its_pictures_is_trained_on(published, tmp_path, capsys, pictures, images):
    rows = tmp_path / "rows"
    assert cli.main(["data", "convert", "video-r1", str(published), str(rows), "--pictures", pictures]) == 0
    assert ("rows with pictures │ 3" in " ".join(capsys.readouterr().out.split())) == (pictures == "keep")
    assert cli.main(["data", "validate", str(rows), "--media_root", str(published)]) == 0
    if pictures == "leave_out":
        return
    # A step of all four rows, each with the recipe's group of eight.
    words = ["--hints", "false", "--hint_max_kl", 0.01, "--per_device_train_batch_size", 32]
    assert train("s1_visual.yaml", "Video-R1", rows, published, tmp_path / "run", *words) == 0, capsys.readouterr().err
    first, last = logged(tmp_path / "run")
    assert (first["media_tokens/image"] > 0) == (last["media_tokens/image"] > 0) == (images > 0)
    assert first["media_tokens/video"] > 0
    table, root, broken = read_rollouts(tmp_path / "run" / "rollouts")
    named = {path for line in table["image"].to_pylist() for path in line}
    assert named == {f"{number}.png" for number in range(images)} and not broken and root == str(published)
    if not images:
        return
    assert {line["clip"] for line in table.to_pylist()} == {"0.png", "1.png", "2.png", "clip.mp4"}
    assert cli.main(["report", str(tmp_path / "run"), "--json", str(tmp_path / "report.json")]) == 0
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["runs"][0]["rollouts"]["completions"]["image"][0] is not None


def test_blocks_name_their_files_and_sizes(published, tmp_path, capsys):
    """As docs/data.md shows them: rows are checked by the command before there is a model."""
    asked = {"type": "text", "text": "Which is it?"}
    media = [{"type": "image", "image": "0.png", "max_pixels": 3136}, {"type": "image", "image": "1.png"}]
    media.append({"type": "video", "video": "clip.mp4", "nframes": 2})
    rows = [{"prompt": [{"role": "user", "content": [block, asked]}], "solution": "A"} for block in media]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model_name_or_path": "builtin:tiny-omni", "dataset_name": tmp_path / "rows.jsonl", "max_steps": 1}
    options |= {"media_root": published, "output_dir": tmp_path / "run", "reward_funcs": "accuracy_reward"}
    options |= {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "num_generations": 2}
    options |= {"max_completion_length": 2, "use_cpu": "true", "bf16": "false", "save_strategy": "no"}
    options |= {"min_pixels": 784, "max_pixels": 12544, "evaluate_before_after": "false", "logging_steps": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", *words]) == 0, capsys.readouterr().err
    assert logged(tmp_path / "run")[0]["media_tokens/image"] == 2 * (4 + 16)
    assert "3 rows; fed image 2, video 1, audio 0, subtitle 0" in capsys.readouterr().out


def test_thoughts_about_pictures_are_learned(published, tmp_path, capsys):
    """Stage 0, supervised: Video-R1-CoT."""
    rows, table = tmp_path / "rows", published / "Video-R1-COT-165k.json"
    assert cli.main(["data", "convert", "video-r1-cot", str(table), str(rows)]) == 0
    # The rows bring what is learned.
    (tmp_path / "job.yaml").write_text(f"extends: {TINY / 's0_sft.yaml'}\ncompletion_template: null\n")
    words = ["--per_device_train_batch_size", 4]
    status = train(tmp_path / "job.yaml", "Video-R1-CoT", rows, published, tmp_path / "run", *words)
    assert status == 0, capsys.readouterr().err
    assert all(entry["media_tokens/image"] > 0 < entry["media_tokens/video"] for entry in logged(tmp_path / "run"))


def test_a_judge_sees_the_pictures_that_were_fed(published, tmp_path, capsys):
    """Of a picture's row that picture, of a clip's row its frames: one call each, or the judge grades what it cannot see."""
    rows = tmp_path / "rows"
    assert cli.main(["data", "convert", "video-r1", str(published), str(rows)]) == 0
    with ChatServer(lambda number, body: say(json.dumps({"visual_objects": 0.4, "spatial_locations": 0.8}))) as server:
        judge = {"reward": "stepwise_reasoning_judge", "frames": 2, "server": {"model": "m", "base_url": server.url}}
        words = ["--hints", "false", "--hint_max_kl", 0.01, "--per_device_train_batch_size", 32]
        words += ["--reward_funcs", "format_reward", json.dumps(judge), "--reward_weights", 0.5, 0.5]
        status = train("s1_visual.yaml", "Video-R1", rows, published, tmp_path / "run", *words)
        calls = [call.body["messages"][-1]["content"] for call in server.calls]
    assert status == 0, capsys.readouterr().err
    shown = [[block["type"] for block in content].count("image_url") for content in calls if isinstance(content, list)]
    assert len(shown) == len(calls) and set(shown) == {1, 2}
    told = [content[0]["text"] for content in calls]
    assert {text.partition(":")[0].partition(",")[0] for text in told} == {
        "1 picture(s) of the question",
        "2 pictures of the clip",
    }
