"""What the readers of README and of the pages have before they give a command: files, data sets and runs, all of them small."""

import io
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from curation_server import WORD
from eval_runs import MODEL, evaluate
from media_files import copy_small_set, tone, write_video
from PIL import Image
from review_sets import desk_of, seen


ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["red", "green", "blue", "yellow"]
LETTERED = [f"{letter}. {option}" for letter, option in zip("ABCD", OPTIONS, strict=True)]
# Those that AVATAR's stages ask for.
SOURCES = ("Video-R1-CoT", "TPO", "Video-R1", "AVQA", "AVE", "AVSBench")
REFERENCES = ("reference", "reference_v", "reference_a", "reference_s")


# Files that a page shows, or one's own


def job(folder, page):
    """The `job.yaml` of the page, or else that of README."""
    shown = "\n".join([page, (ROOT / "README.md").read_text(encoding="utf-8")])
    (folder / "job.yaml").write_text(re.search(r"```yaml\n(# job\.yaml\n.*?)```", shown, re.DOTALL)[1])


def evaluation_file(folder, page):
    told = {"model_name_or_path": "Qwen/Qwen2.5-Omni-3B", "dataset_name": "data/", "output_dir": "runs/config"}
    (folder / "eval.yaml").write_text(yaml.safe_dump(told))


def curation(folder, page):
    """The commented file of the examples, and two clips."""
    clips("clips", folder, page)
    shutil.copy(folder / "examples/curation.yaml", folder / "curation.yaml")


# Rows and clips


def rows_in(folder):
    """Four rows of each tag, in all columns that pages speak of, with their clips."""
    rows = copy_small_set(folder).to_list()
    for i, row in enumerate(rows):
        shown = [f"{letter}. {option}" for letter, option in zip("ABCD", row["options"], strict=True)]
        row["prompt"] = [{"role": "user", "content": "\n".join([row["question"], *shown])}]
        row |= {
            "source": SOURCES[i % len(SOURCES)],
            "completion": f"<think>So.</think><answer>{row['answer']}</answer>",
        }
        row |= {"question_type": "multiple choice", "audio_cues": "A tone.", "hint": "Look at the colour."}
        row |= dict.fromkeys(REFERENCES, "A shape moves.")
    return pa.Table.from_pylist(rows)


def data(name, folder, page):
    """A folder with splits."""
    rows = rows_in(folder / name)
    for split in ("train", "test"):
        pq.write_table(rows, folder / name / f"{split}.parquet")


def table(name, media, folder, page):
    """A file of rows, with their clips in another folder."""
    pq.write_table(rows_in(folder / media), folder / name)


def reviewed(folder, page):
    """Of `rows.parquet` Ann has looked at the first row, and found it good."""
    desk = desk_of(folder / "rows.parquet", folder / "rows.review.log")
    desk.decide(0, "ann", "accept", seen(desk, 0))


def clips(place, folder, page):
    for name in ("bell", "door"):
        clip(folder / place / f"{name}.mp4")
        (folder / place / f"{name}.srt").write_text(f"1\n00:00:00,000 --> 00:00:01,000\n{name} {WORD}\n")


def clip(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, frames=8, fps=8, size=(56, 56), audio=tone(1.0, 16000))


# Published sets, in the form in which they are published


def video_r1(folder, page):
    place = folder / "data/video_r1"
    for number in range(4):
        clip(place / f"clips/{number}.mp4")
    numbered = [
        r1_record(problem_id=i, path=f"./clips/{i % 4}.mp4", solution=f"<answer>{'ABCD'[i % 4]}</answer>")
        for i in range(8)
    ]
    (place / "Video-R1-260k.json").write_text(json.dumps(numbered))


def r1_record(**fields):
    kind = {"data_type": "video", "problem_type": "multiple choice", "solution": "<answer>A</answer>", "process": ""}
    return {"problem": "color?", "options": LETTERED} | kind | fields


def intent_train(folder, page):
    place = folder / "data/intent_train"
    clip(place / "social/a.mp4")
    (place / "social_rewrite.json").write_text(json.dumps([r1_record(path="social/a.mp4")]))


def avqa(folder, page):
    place = folder / "data/avqa"
    clip(place / "videos/a.mp4")
    record = {"id": 1, "video_name": "a", "video_id": 1, "question_text": "Which colour?", "multi_choice": OPTIONS}
    record |= {"answer": 1, "question_relation": "View", "question_type": "Happening"}
    (place / "train_qa.json").write_text(json.dumps([record]))


def ave(folder, page):
    clip(folder / "data/ave/AVE/b.mp4")
    (folder / "data/ave/trainSet.txt").write_text("Bark&b&good&7&9\n")


def daily_omni(folder, page):
    clip(folder / "Daily-Omni/Videos/abc/abc_video.mp4")
    record = {"Question": "Which colour?", "Choice": LETTERED, "Answer": "A", "video_id": "abc", "Type": "Reasoning"}
    record |= dict.fromkeys(("content_parent_category", "content_fine_category", "video_category"), "Pets")
    (folder / "Daily-Omni/qa.json").write_text(json.dumps([record | {"video_duration": "30s"}]))


def video_mme(folder, page):
    clip(folder / "Video-MME/data/abc.mp4")
    record = {"video_id": "001", "videoID": "abc", "question_id": "001-1", "duration": "short", "domain": "Knowledge"}
    record |= {"sub_category": "Art", "task_type": "Counting Problem"}
    record |= {"question": "Which colour?", "options": LETTERED, "answer": "A"}
    (folder / "Video-MME/videomme").mkdir()
    pq.write_table(pa.Table.from_pylist([record]), folder / "Video-MME/videomme/test-00000-of-00001.parquet")


def omni_bench(folder, page):
    picture, sound = io.BytesIO(), clip(folder / "sound.mp4")
    Image.new("RGB", (56, 56), "red").save(picture, "PNG")
    record = {"index": 1, "question": "Which colour?", "options": OPTIONS, "answer": "red", "task type": "Object"}
    record |= {"audio content": "a tone", "image content": "a colour"}
    record |= {"audio": {"bytes": sound.read_bytes(), "path": "s.mp4"}}
    record |= {"image": {"bytes": picture.getvalue(), "path": "p.png"}}
    (folder / "OmniBench/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([record]), folder / "OmniBench/data/train-00000-of-00001.parquet")


# Runs


def adapter(place, folder, page):
    """LoRA on all linear layers, as a run leaves it."""
    from peft import LoraConfig, get_peft_model

    from maple_trl.omni.loading import load_model

    model = load_model("builtin:tiny-omni")
    model.name_or_path = model.config._name_or_path = "Qwen/Qwen2.5-Omni-7B"
    given = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, given).save_pretrained(folder / place)


def run(place, folder, page):
    """A training run that has ended, on two clips of which each was asked about under two tags."""
    from maple_trl.records.rollouts import write_rollout

    place = folder / place
    (place / "rollouts").mkdir(parents=True)
    thoughts = "I look at it. It is red. It moves to the left. So the first option fits."
    told = {"rollout": 0, "step": 0, "prompt": "user: Which?", "solution": "A", "advantage": 0.0, "tokens": 9}
    told |= {"replayed": False, "hinted": False}
    lines = []
    for row, (name, tag) in enumerate((name, tag) for name in ("one", "other") for tag in ("V", "VA")):
        asked = {"group": f"g{row}", "row": row, "id": f"row-{row}", "tag": tag, "clip": name}
        for answer, reward in (("A", 1.0), ("B", 0.0)):
            said = f"<think>{thoughts}</think>\n<answer>{answer}</answer>"
            scored = {"completion": said, "rewards": {"accuracy_reward": reward}, "reward": reward}
            lines.append(told | asked | scored)
    write_rollout(place / "rollouts", 0, lines, str(folder))
    entries = [{"loss": 0.1, "reward": 0.5, "step": 1}, {"train_runtime": 3.0, "step": 1}]
    (place / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def evaluation(place, folder, page):
    words = ["--data", "builtin:seven-tags", "--limit", "4", "--quiet"]
    assert evaluate(*MODEL, *words, "--output", folder / place) == 0


_DATA = partial(data, "data")
# By page, what its reader has beside a checkout.
HAS = {
    "README.md": [job, _DATA],
    "docs/avatar.md": [partial(table, "train.parquet", ""), _DATA],
    "docs/avatar_recipes.md": [_DATA],
    "docs/checkpoints.md": [job, _DATA, partial(data, "data/avatar"), daily_omni, partial(adapter, "FOLDER")],
    "docs/cli.md": [],
    "docs/curation.md": [curation],
    "docs/data.md": [video_r1, avqa, ave],
    "docs/distributed.md": [job, _DATA],
    "docs/evaluation.md": [
        *(evaluation_file, _DATA, daily_omni, video_mme, omni_bench),
        *(partial(adapter, name) for name in ("runs/first", "runs/mapo")),
        *(partial(table, f"{name}.parquet", "") for name in ("captions", "qa")),
    ],
    "docs/maple_recipes.md": [],
    "docs/mapo.md": [_DATA],
    "docs/moving.md": [intent_train],
    "docs/qa_plus.md": [partial(data, "rows")],
    "docs/quickstart.md": [job, _DATA],
    "docs/report.md": [
        *(partial(run, f"runs/{name}") for name in ("mapo", "plain", "crw", "avatar")),
        *(partial(evaluation, f"runs/{name}") for name in ("eval_grpo", "eval_avatar")),
    ],
    "docs/review.md": [partial(table, "rows.parquet", "clips"), reviewed],
    "docs/rows.md": [video_r1, partial(clips, "examples/clips")],
    "docs/scaling.md": [],
    "docs/small_gpus.md": [job, _DATA, partial(adapter, "runs/small_gpu")],
    "docs/troubleshooting.md": [],
}
