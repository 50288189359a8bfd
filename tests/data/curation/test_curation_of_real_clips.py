"""From clips of Daily-Omni to a set of all seven tags, and a step of MAPO on it; from speech to a subtitle."""

import json
import math
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from curation_server import WORD, CurationServer
from media_files import tone, write_video
from test_curation import all_rows, check_questions, rows_of, run, write_config

from maple_trl import cli
from maple_trl.data.curation import curate, read_config
from maple_trl.data.review.desk import ReviewDesk, Shown
from maple_trl.data.review.log import ReviewLog
from maple_trl.data.review.rows import ReviewSet
from maple_trl.modalities import ModalityTag
from maple_trl.omni.media.loader import MediaLoader


@pytest.fixture(scope="module")
def daily_omni() -> Path:
    named = os.environ.get("MAPLE_TRL_DAILY_OMNI")
    root = Path(named) if named else Path(__file__).resolve().parents[4] / "shared" / "data" / "daily_omni"
    if not (root / "qa.json").is_file():
        pytest.skip(f"Daily-Omni is not at {root}; set MAPLE_TRL_DAILY_OMNI to the folder that holds qa.json")
    return root


def spoken(folder: Path) -> str:
    """What its captions quote of the speech, in place of subtitles, which Daily-Omni has not."""
    return " ".join(re.findall(r'"([^"]+)"', (folder / "audio_revised_captions.txt").read_text()))


def review(folder: Path) -> tuple[str, str]:
    """Accept all rows but one, which goes, and one, which gets another tag; return their ids."""
    desk = ReviewDesk(ReviewSet(folder), ReviewLog(folder.with_name(f"{folder.name}.review.log")))
    places = {tag: desk.data.tags.index(tag) for tag in ("V", "AS")}
    for index in range(len(desk.data)):
        shown = Shown(desk.data.digest(index))
        if index == places["V"]:
            desk.decide(index, "ann", "reject", shown, reason="not clear")
        elif index == places["AS"]:
            desk.decide(index, "ann", "retag", shown, tag="VAS")
        else:
            desk.decide(index, "ann", "accept", shown)
    return desk.data.ids[places["V"]], desk.data.ids[places["AS"]]


@pytest.mark.long
@pytest.mark.slow
def test_from_real_clips_to_a_step_of_training(daily_omni, tmp_path, capsys):
    table = tmp_path / "clips.jsonl"
    videos = sorted(daily_omni.glob("Videos/*/*_video.mp4"))
    rows = [
        {
            "clip": path.parent.name,
            "video": path.relative_to(daily_omni).as_posix(),
            "subtitle": f"{spoken(path.parent)} {WORD}",
        }
        for path in videos
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with CurationServer() as server:
        sections = {"source": {"path": table.name, "media_root": str(daily_omni)}, "questions": {}}
        path = write_config(tmp_path, server.url, splits={"test_share": 0.5}, **sections)
        assert run(path) == 0, capsys.readouterr().err
        assert server.violations == []
    out = tmp_path / "out"
    questions = all_rows(out, "questions")
    check_questions(questions, out)
    for split in ("train", "test"):
        kept = rows_of(out, "questions", split)
        assert Counter(row["tag"] for row in kept) == {tag.value: 6 for tag in ModalityTag}
        assert len({row["clip"] for row in kept}) == 1

    reviewed = tmp_path / "reviewed"
    rejected, retagged = review(out / "questions")
    assert cli.main(["data", "review", str(out / "questions"), "--export", str(reviewed)]) == 0
    kept = [row for split in ("train", "test") for row in rows_of(reviewed.parent, reviewed.name, split)]
    assert {row["id"] for row in questions} - {row["id"] for row in kept} == {rejected}
    (changed,) = [row for row in kept if any(entry["reviewer"] for entry in row["provenance"])]
    assert (changed["id"], changed["tag"]) == (retagged, "VAS")
    assert cli.main(["data", "validate", str(reviewed), "--media_root", str(out)]) == 0

    job = {
        "trainer": "mapo",
        "model_name_or_path": "builtin:tiny-omni",
        "dtype": "float32",
        "dataset_name": str(reviewed),
        "media_root": str(out),
        "num_frames": 4,
        "max_pixels": 8 * 28 * 28,
        "reward_funcs": ["format_reward", "accuracy_reward"],
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "curriculum": "static",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "output_dir": str(tmp_path / "job"),
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert cli.main(["train", "--config", str(tmp_path / "job.yaml")]) == 0
    (line, *_) = [json.loads(text) for text in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(line["loss"]) and line["media/quarantined_prompts"] == 0
    assert any(name.startswith("tag/") for name in line)


@pytest.mark.slow
def test_speech_to_text_of_a_clip_without_subtitle(daily_omni, tmp_path):
    """By faster-whisper with a model that hears one word in all speech: a real clip has it, and a tone has none."""
    pytest.importorskip("faster_whisper")
    from tiny_whisper import write_whisper

    clips = tmp_path / "clips"
    clips.mkdir()
    shutil.copyfile(next(daily_omni.glob("Videos/bswbQtOPk6E/*_video.mp4")), clips / "talk.mp4")
    write_video(clips / "tone.mp4", frames=6, fps=6, audio=tone(1.0, 16000))
    asr = {"model": str(write_whisper(tmp_path, WORD)), "device": "cpu", "language": "en"}
    with CurationServer() as server:
        sections = {"split": {"frames": 2, "workers": 0, "asr": asr}, "tags": ["S", "V"]}
        config = read_config(write_config(tmp_path, server.url, **sections))
        summary = curate(config)
        assert server.violations == [] and server.kinds["annotate-subtitle"] == 1
    assert summary.accounts[1].notes == {"without S": 1}
    rows = all_rows(tmp_path / "out", "captions")
    assert {(row["clip"], row["tag"]) for row in rows} == {("talk", "S"), ("talk", "V"), ("tone", "V")}
    (row,) = [row for row in rows if row["tag"] == "S"]
    assert {"field": "subtitle", "model": "faster-whisper:tiny-whisper", "prompt_hash": None, "reviewer": None} in row[
        "provenance"
    ]
    assert set(MediaLoader(tmp_path / "out", workers=0).subtitle(row["subtitle"]).split()) == {WORD}
