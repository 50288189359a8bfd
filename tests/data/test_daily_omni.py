"""
Daily-Omni: its records become rows, and its real clips train a model in all seven tags.

The clips are not part of this repository. Tests that need them look at MAPLE_TRL_DAILY_OMNI, then beside the
repository, and are skipped where neither holds a copy.
"""

import json
import logging
import math
import os
import re
from pathlib import Path

import av
import pytest
from tiny_models import build_tiny
from transformers import TrainerCallback

from maple_trl.data.benchmarks import read_benchmark
from maple_trl.data.converters import ConvertOptions, convert
from maple_trl.data.daily_omni import FEATURES, load_daily_omni, with_tags
from maple_trl.data.validation import validate_tables
from maple_trl.jobs.data import load_datasets
from maple_trl.jobs.options import OmniScriptArguments
from maple_trl.modalities import ModalityTag
from maple_trl.omni.prompt import RowError
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
from maple_trl.trainers.omni_grpo.trainer import PROMPTS_KEY, OmniGRPOTrainer


REPOSITORY = Path(__file__).resolve().parents[2]


# Records


def record(video_id="abc", **changes) -> dict:
    fields = {
        "Question": "What is heard when the cat jumps?",
        "Choice": ["A. A bell", "B. Rain", "C. Laughter: loud", "D. Nothing"],
        "Answer": "C",
        "video_id": video_id,
        "Type": "AV Event Alignment",
        "content_parent_category": "No content_parent_category provided",
        "content_fine_category": "None",
        "video_category": "Pets & Animals",
        "video_duration": "30s",
    }
    fields.update(changes)
    return {name: value for name, value in fields.items() if value is not ...}


def write(root: Path, records, clips=("abc",), captions=(), wavs=()) -> Path:
    """A folder as Daily-Omni's archives leave it; what the clips hold does not matter to the table."""
    (root / "qa.json").write_text(json.dumps(records), encoding="utf-8")
    for name in clips:
        folder = root / "Videos" / name
        folder.mkdir(parents=True)
        (folder / f"{name}_video.mp4").write_bytes(b"\0")
        if name in captions:
            (folder / "audio_revised_captions.txt").write_text(f"0-10s: sounds of {name}\n", encoding="utf-8")
        if name in wavs:
            (folder / f"{name}_audio.wav").write_bytes(b"\0")
    return root


def test_a_record_becomes_a_row(tmp_path):
    write(tmp_path, [record()], captions=["abc"], wavs=["abc"])
    dataset = load_daily_omni(tmp_path)
    assert dataset.features == FEATURES
    (row,) = dataset
    assert row["answer"] == row["solution"] == "C" and row["tag"] == "VA" and row["id"] == "daily-omni-0000"
    assert row["options"] == ["A bell", "Rain", "Laughter: loud", "Nothing"]
    assert row["video"] == "Videos/abc/abc_video.mp4" and row["audio"] == "Videos/abc/abc_audio.wav"
    assert row["subtitle"] == "0-10s: sounds of abc"
    assert (row["Type"], row["video_category"], row["video_duration"]) == (
        "AV Event Alignment",
        "Pets & Animals",
        "30s",
    )
    assert row["content_parent_category"] is row["content_fine_category"] is None
    (message,) = row["prompt"]
    lines = message["content"].split("\n")
    assert message["role"] == "user" and lines[0] == "What is heard when the cat jumps?"
    assert lines[1:5] == ["A. A bell", "B. Rain", "C. Laughter: loud", "D. Nothing"]
    assert "<think>" in lines[5] and "<answer>LETTER</answer>" in lines[5]


def test_rows_without_clip_are_left_out_and_counted(tmp_path, caplog):
    records = [record("gone"), record("abc"), record("gone"), record("-x_1"), record("away")]
    write(tmp_path, records, clips=["abc", "-x_1"])
    with caplog.at_level(logging.WARNING):
        dataset = load_daily_omni(tmp_path)
    assert dataset["id"] == ["daily-omni-0001", "daily-omni-0003"]  # their numbers in qa.json
    assert "2 rows of 5 questions; left out: 3 missing" in caplog.text
    assert "no file Videos/gone/gone_video.mp4 (2)" in caplog.text
    assert dataset["audio"] == dataset["subtitle"] == [None, None]


def test_complete_data_reports_nothing(tmp_path, caplog):
    write(tmp_path, [record()])
    with caplog.at_level(logging.WARNING):
        load_daily_omni(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Question": ...}, "field 'Question' must be a text, but is None"),
        ({"Question": "  "}, "field 'Question' must be a text, but is '  '"),
        ({"Answer": "E"}, "field 'Answer' must be the letter of an option (A, B, C, D), but is 'E'"),
        ({"Answer": "AB"}, "field 'Answer' must be the letter of an option (A, B, C, D), but is 'AB'"),
        ({"Answer": None}, "field 'Answer' must be the letter of an option (A, B, C, D), but is None"),
        ({"Choice": ["A. x"]}, "field 'Choice' must be a list of 2 to 26 options, but is list of 1 items"),
        ({"Choice": {"B": "x"}}, "field 'Choice' must have the letters A, B, C, … without gaps, but has B"),
        (
            {"Choice": ["A. x", "B. y", "C.", "D. w"]},
            "field 'Choice' must have a text behind the letter of each option",
        ),
        ({"Choice": ["A. x", "B. y", [3], "D. w"]}, "field 'Choice' must have a text as option C, but has [3]"),
        ({"video_id": "../etc"}, "field 'video_id' must be a path below the media root, but is '../etc'"),
        ({"video_id": "a/b"}, "field 'video_id' must be a file name, but is 'a/b'"),
        ({"video_id": 7}, "field 'video_id' must be a path below the media root, but is 7"),
    ],
)
def test_malformed_records_are_named(tmp_path, changes, words):
    write(tmp_path, [record(), record(**changes)])
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load_daily_omni(tmp_path)
    assert "qa.json, record 1" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "qa.json, record 0: not JSON"),
        (
            '{"Question": "?"}',
            "qa.json, record 0: field 'Choice' is missing; a record of Daily-Omni has Question, Choice",
        ),
        ("[]", "qa.json: no record in it"),
        ('["?"]', "qa.json, record 0: expected an object, got str"),
    ],
)
def test_malformed_files_are_named(tmp_path, content, words):
    (tmp_path / "qa.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_daily_omni(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no table of split 'test': looked for qa.json"):
        load_daily_omni(tmp_path)
    write(tmp_path, [record("abc"), record("def")], clips=[])
    with pytest.raises(
        ValueError, match=r"no question of Daily-Omni is left of 2; .*no file Videos/abc/abc_video\.mp4"
    ):
        load_daily_omni(tmp_path)


def test_a_caption_that_is_no_text_is_named(tmp_path):
    write(tmp_path, [record()])
    (tmp_path / "Videos/abc/audio_revised_captions.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"audio_revised_captions\.txt is not UTF-8"):
        load_daily_omni(tmp_path)


def test_the_next_caption_file_stands_in(tmp_path):
    write(tmp_path, [record()])
    (tmp_path / "Videos/abc/audio_revised_captions.txt").write_text(" \n")
    (tmp_path / "Videos/abc/audio_detail_captions.txt").write_text("a bell rings\n")
    assert load_daily_omni(tmp_path)["subtitle"] == ["a bell rings"]
    (tmp_path / "Videos/abc/audio_detail_captions.txt").write_text("\n")
    assert load_daily_omni(tmp_path)["subtitle"] == [None]
    found = read_benchmark("daily-omni", tmp_path, tags=["S", "VA"])
    assert found.dataset["tag"] == ["VA"] and found.left_out[0].cause == "missing"  # no row of S with nothing to read


def test_with_tags_gives_every_question_in_every_tag(tmp_path, caplog):
    write(tmp_path, [record("abc"), record("def")], clips=["abc", "def"], captions=["abc"])
    dataset = load_daily_omni(tmp_path)
    with caplog.at_level(logging.WARNING):
        tagged = with_tags(dataset)
    assert tagged["tag"][:7] == [tag.value for tag in ModalityTag]
    assert tagged["tag"][7:] == ["V", "A", "VA"]  # the second clip has no caption
    assert "4 rows of tags with S are left out" in caplog.text
    assert tagged["id"][:2] == ["daily-omni-0000-V", "daily-omni-0000-A"] and len(set(tagged["id"])) == 10
    assert load_daily_omni(tmp_path, tags=["av", "v"]).to_list() == with_tags(dataset, ["VA", "V"]).to_list()


def test_with_tags_refuses_what_leaves_nothing(tmp_path):
    dataset = load_daily_omni(write(tmp_path, [record()]))
    with pytest.raises(ValueError, match="tags is empty"):
        with_tags(dataset, [])
    with pytest.raises(ValueError, match="X"):
        with_tags(dataset, ["VX"])
    with pytest.raises(ValueError, match=r"No row is left in the tags S, VS: .*caption file beside its clip"):
        with_tags(dataset, ["S", "VS"])


# Real clips


@pytest.fixture(scope="module")
def daily_omni() -> Path:
    named = os.environ.get("MAPLE_TRL_DAILY_OMNI")
    root = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "daily_omni"
    if not (root / "qa.json").is_file():
        pytest.skip(f"Daily-Omni is not at {root}; set MAPLE_TRL_DAILY_OMNI to the folder that holds qa.json")
    return root


def seven_rows(root: Path):
    """One row per tag, of two clips in turns."""
    rows = with_tags(load_daily_omni(root))
    clips = list(dict.fromkeys(rows["video"]))
    wanted = [(tag.value, clips[i % len(clips)]) for i, tag in enumerate(ModalityTag)]
    found = list(zip(rows["tag"], rows["video"], strict=True))
    return rows.select([found.index(pair) for pair in wanted])


class Gradients(TrainerCallback):
    """Gradient norms of the model's parts, before the optimizer uses and clears them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms = {"visual": 0.0, "audio_tower": 0.0, "language_model": 0.0}
        for name, parameter in model.named_parameters():
            part = next((part for part in self.norms if f".{part}." in f".{name}"), None)
            if part and parameter.grad is not None:
                self.norms[part] += float(parameter.grad.square().sum())


def reward(completions, **columns):
    assert set(columns["solution"]) <= set("ABCD") and "Type" in columns
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def one_step(root: Path, rows, folder: Path):
    """One real training step; returns the trainer, the rows' prompts by tag, and the gradient norms."""
    model, processor = build_tiny("qwen2_5_omni")
    args = OmniGRPOConfig(
        str(folder),
        media_root=str(root),
        num_frames=4,
        min_pixels=4 * 28 * 28,
        max_pixels=8 * 28 * 28,
        per_device_train_batch_size=2 * len(rows),
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    gradients = Gradients()
    trainer = OmniGRPOTrainer(
        model, reward, args, train_dataset=rows, processing_class=processor, callbacks=[gradients]
    )
    trainer.train()
    prompts = {prompt.tag: prompt for prompt in trainer._buffered_inputs[0][PROMPTS_KEY]}
    return trainer, prompts, gradients.norms


def audio_tokens(path: Path) -> int:
    """Tokens of a clip's sound by plain PyAV: 16 kHz, a mel frame every 160 samples, two convolutions of stride 2."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=16_000)
        frames = [*container.decode(audio=0), None]
        samples = sum(piece.samples for frame in frames for piece in resampler.resample(frame))
    return (math.ceil(samples // 160 / 2) - 2) // 2 + 1


def test_a_step_on_real_clips_in_all_seven_tags(daily_omni, tmp_path):
    rows = seven_rows(daily_omni)
    trainer, prompts, norms = one_step(daily_omni, rows, tmp_path)

    log = trainer.state.log_history[0]
    assert math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"]) and log["grad_norm"] > 0
    assert log["reward_std"] > 0 and log["media/quarantined_prompts"] == 0
    assert min(norms.values()) > 0, norms

    assert set(prompts) == set(ModalityTag)
    for row in rows:
        tokens = prompts[ModalityTag(row["tag"])].media_tokens
        assert set(tokens) == {
            kind for kind, letter in zip(("video", "audio", "subtitle"), "VAS", strict=True) if letter in row["tag"]
        }
        if "V" in row["tag"]:
            # 640 x 360 pixels within 8 squares of 28 x 28: 3 x 2 of them. Four frames are two steps in time.
            assert tokens["video"] == 2 * 3 * 2
        if "A" in row["tag"]:
            assert tokens["audio"] == pytest.approx(audio_tokens(daily_omni / row["video"]), abs=1)
            assert tokens["audio"] == pytest.approx(30 * 25, abs=2)  # half a minute, not a trimmed beginning
        if "S" in row["tag"]:
            text = trainer.processing_class.tokenizer(row["subtitle"], add_special_tokens=False)["input_ids"]
            assert tokens["subtitle"] == len(text)
    # The step's own count: two completions for each row.
    for kind in ("video", "audio", "subtitle"):
        total = sum(prompt.media_tokens.get(kind, 0) for prompt in prompts.values())
        assert log[f"media_tokens/{kind}"] == 2 * total

    # Every clip is in several rows, and each row stands for two completions.
    clips = {str((daily_omni / path).resolve()) for path in rows["video"]}
    assert dict(trainer.loader.decodes) == {(kind, clip): 1 for clip in clips for kind in ("video", "audio")}


@pytest.mark.long
def test_a_step_on_real_clips_with_interleaved_audio(daily_omni, tmp_path):
    rows = seven_rows(daily_omni)
    rows = rows.add_column("audio_in_video", [row["tag"] == "VA" for row in rows])  # VAS stays separate
    rows = rows.filter(lambda row: row["tag"] in ("VA", "VAS", "A"))
    trainer, prompts, norms = one_step(daily_omni, rows, tmp_path)
    assert math.isfinite(trainer.state.log_history[0]["loss"]) and min(norms.values()) > 0

    def changes(tag):
        """How often the prompt goes from video to audio tokens, or back."""
        ids = trainer.family.placeholder_ids
        media = [int(i) for i in prompts[tag].input_ids if int(i) in ids.values()]
        return sum(a != b for a, b in zip(media, media[1:], strict=False))

    assert changes(ModalityTag.VAS) == 1 and changes(ModalityTag.A) == 0
    assert changes(ModalityTag.VA) > 1
    for tag in (ModalityTag.VA, ModalityTag.VAS):
        assert prompts[tag].media_tokens["video"] == 2 * 3 * 2
        assert prompts[tag].media_tokens["audio"] == pytest.approx(30 * 25, abs=2)
    # Interleaved tokens share the clip's time axis; separate ones are counted one after the other.
    assert prompts[ModalityTag.VA].position_ids.max() < len(prompts[ModalityTag.VA])


def test_rows_without_sound_leave_the_audio_tower_without_gradient(daily_omni, tmp_path):
    """The control of the gradients above: they come from the media, not from somewhere else."""
    rows = seven_rows(daily_omni).filter(lambda row: row["tag"] in ("V", "S"))
    trainer, _, norms = one_step(daily_omni, rows, tmp_path)
    assert norms["audio_tower"] == 0 and norms["visual"] > 0 and norms["language_model"] > 0
    assert {kind for kind, _ in trainer.loader.decodes} == {"video"}


def test_a_tag_that_the_row_cannot_serve_is_refused(daily_omni, tmp_path):
    rows = seven_rows(daily_omni).remove_columns("subtitle")
    with pytest.raises(RowError, match="tag S needs subtitle"):
        one_step(daily_omni, rows, tmp_path)


@pytest.mark.slow
def test_converted_rows_of_real_clips_are_valid_and_trained_on(daily_omni, tmp_path):
    """The same questions, options and answers as the loader's, by way of shards."""
    options = ConvertOptions(tags=tuple(ModalityTag), missing_media="leave_out")
    summary = convert("daily-omni", daily_omni, tmp_path / "rows", options)
    assert not validate_tables([tmp_path / "rows"], media_root=daily_omni).counts
    job = OmniScriptArguments(dataset_name=str(tmp_path / "rows"), dataset_train_split="test")
    splits, _ = load_datasets(job)
    rows, loaded = splits["test"], with_tags(load_daily_omni(daily_omni))
    assert summary.rows == {"test": len(loaded)} and rows["tag"] == loaded["tag"]
    for name in ("prompt", "question", "options", "answer", "video"):
        assert rows[name][:] == loaded[name][:], name
    first = [list(rows["tag"]).index(tag) for tag in ModalityTag]
    _, prompts, norms = one_step(
        daily_omni, rows.select(first).rename_column("question_type", "Type"), tmp_path / "run"
    )
    assert set(prompts) == set(ModalityTag) and min(norms.values()) > 0
