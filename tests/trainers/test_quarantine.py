"""Broken media: found before training or in the middle of it, named, counted, replaced, never a crash."""

import json
import os
import shutil

import pytest
import torch
from datasets import Dataset, IterableDataset
from media_files import cut, tone, write_audio, write_video
from omni_runs import build_config, build_trainer, spread_reward
from PIL import Image
from tiny_models import build_tiny, build_tiny_text

from maple_trl import OmniGRPOTrainer
from maple_trl.omni.errors import MediaError
from maple_trl.omni.prompt import RowError


pytestmark = pytest.mark.slow


QUESTION = [{"role": "user", "content": "what color"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for i in range(4):
        write_video(root / f"good{i}.mp4", frames=24, audio=tone(0.5 + 0.1 * i, 16000))
    write_video(root / "silent.mp4", frames=24)
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("not a film")
    # Its header is whole and names the right length, its pictures are not: only decoding notices.
    damaged = bytearray((root / "good0.mp4").read_bytes())
    start = damaged.index(b"mdat") + 4
    damaged[start : start + 4000] = bytes(4000)
    (root / "damaged.mp4").write_bytes(damaged)
    cut(root / "good1.mp4", root / "cut.mp4", 0.5)
    return root


def rows(*files, tag="VA"):
    return Dataset.from_list([{"prompt": QUESTION, "video": name, "tag": tag, "solution": "A"} for name in files])


def test_probe_finds_broken_files_before_training(folder, capsys):
    data = rows("good0.mp4", "empty.mp4", "good1.mp4", "text.mp4", "cut.mp4", "good2.mp4", "missing.mp4", "good3.mp4")
    trainer = build_trainer(folder, data, max_steps=2)
    assert trainer.train_dataset["video"] == [f"good{i}.mp4" for i in range(4)]
    said = capsys.readouterr().out
    assert "4 of 8 rows left out" in said and "1 empty-file" in said and "1 not-found" in said
    with open(os.path.join(trainer.args.output_dir, "quarantine.json")) as file:
        written = {entry["path"]: entry["reason"] for entry in json.load(file)}
    assert written == {
        "empty.mp4": "empty-file",
        "text.mp4": "not-media",
        "cut.mp4": written["cut.mp4"],
        "missing.mp4": "not-found",
    }
    assert written["cut.mp4"] in ("truncated", "unreadable")
    trainer.train()
    assert trainer.state.log_history[0]["media/quarantined_prompts"] == 4


def test_a_clip_that_breaks_in_the_middle_is_replaced(folder):
    data = rows("good0.mp4", "damaged.mp4", "good1.mp4", "silent.mp4")
    trainer = build_trainer(
        folder, data, shuffle_dataset=False, per_device_train_batch_size=16, gradient_accumulation_steps=1, max_steps=2
    )
    assert len(trainer.train_dataset) == 4  # the header is fine
    _, prompts = trainer.encode_rows(data)
    good1 = trainer.prompt_builder.spec(data[2]).key
    assert [p.key for p in prompts].count(good1) == 2  # the next usable row stands in
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["media/quarantined_prompts"] == 1 and log["media/rows_without_audio_track"] == 4
    with open(os.path.join(trainer.args.output_dir, "quarantine.json")) as file:
        [entry] = json.load(file)
    assert entry["path"] == "damaged.mp4" and entry["rows"] == [1] and entry["detail"]


def test_a_resumed_run_remembers_the_quarantine(folder, tmp_path):
    data = rows("good0.mp4", "damaged.mp4", "good1.mp4", "silent.mp4")
    options = {"shuffle_dataset": False, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    options |= {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    build_trainer(folder, data, max_steps=1, **options).train()
    (tmp_path / "quarantine.json").unlink()
    resumed = build_trainer(folder, data, max_steps=2, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    with open(tmp_path / "checkpoint-2" / "rows.json") as file:
        [entry] = json.load(file)["train_dataset"]["quarantined"]
    assert entry["path"] == "damaged.mp4"
    damaged = os.path.realpath(folder / "damaged.mp4")
    assert not resumed.loader.decodes["video", damaged]  # nor tried again


def test_without_the_probe_training_meets_broken_files_itself(folder):
    data = rows("good0.mp4", "empty.mp4", "good1.mp4", "good2.mp4")
    trainer = build_trainer(folder, data, media_check="none", max_steps=4, num_train_epochs=4)
    assert len(trainer.train_dataset) == 4
    trainer.train()
    assert trainer.state.log_history[-2]["media/quarantined_prompts"] == 1


def test_probe_reads_subtitles_and_tracks(folder):
    (folder / "bad.srt").write_bytes(b"\xff\xfe\xfa")
    write_audio(folder / "sound.wav", tone(0.5, 16000))
    files = ("good0.mp4", "sound.wav", "good1.mp4", "good2.mp4", "sound.wav")
    data = [dict(row, subtitle=None, video_id="x", tags="y") for row in rows(*files)]
    data[2]["subtitle"], data[2]["tag"] = "bad.srt", "VS"
    data[4]["tag"] = "A"  # needs the sound alone, which is there
    trainer = build_trainer(folder, Dataset.from_list(data))
    reasons = {prompt.path: prompt.reason for prompt in trainer.row_encoder.quarantined}
    assert reasons == {"sound.wav": "no-video-track", "bad.srt": "bad-subtitle"}
    assert trainer.train_dataset["video"] == ["good0.mp4", "good2.mp4", "sound.wav"]


@pytest.mark.parametrize(("wrong", "right"), [("videos", "video"), ("Audio", "audio"), ("sub_titles", "subtitle")])
def test_a_misspelt_media_column_is_refused(folder, wrong, right):
    data = Dataset.from_list([{"prompt": QUESTION, wrong: "good0.mp4"}] * 2)
    with pytest.raises(
        ValueError, match=f"train_dataset has the column '{wrong}', which is not read.*rename it to '{right}'"
    ):
        build_trainer(folder, data)


def test_the_start_says_what_rows_are_fed(folder, capsys):
    build_trainer(folder, rows("good0.mp4", "good1.mp4"))
    assert "train_dataset: 2 rows; fed video 2, audio 2, subtitle 0" in capsys.readouterr().out
    Image.new("RGB", (56, 56)).save(folder / "seen.png")
    columns = {"video": ["good0.mp4", None, None], "image": [None, "seen.png", None], "subtitle": [None, None, "Red."]}
    build_trainer(folder, Dataset.from_dict({"prompt": [QUESTION] * 3, **columns}))
    assert "train_dataset: 3 rows; fed image 1, video 1, audio 0, subtitle 1" in capsys.readouterr().out


def test_many_broken_files_do_not_flood_the_log(folder, caplog):
    data = rows("good0.mp4", "good1.mp4", *[f"missing{i}.mp4" for i in range(50)])
    trainer = build_trainer(folder, data)
    assert len(trainer.row_encoder.quarantined) == 50
    assert sum("quarantined" in record.message for record in caplog.records) == 11


def test_an_evaluation_row_is_replaced_by_one_of_its_own_set(folder):
    train = rows("good0.mp4", "damaged.mp4", "good1.mp4").map(lambda row: {"split": "train"})
    test = rows("damaged.mp4", "good2.mp4", "good3.mp4").map(lambda row: {"split": "test"})
    trainer = build_trainer(folder, train, eval_dataset=test)
    for training, split in ((True, "train"), (False, "test")):
        trainer.model.train(training)
        used, _ = trainer.encode_rows([(train if training else test)[1 if training else 0]])
        assert used[0]["split"] == split and used[0]["video"] != "damaged.mp4"


def test_a_resumed_run_keeps_its_rows_when_files_change(folder, tmp_path):
    """Files that broke or were mended in between change neither the rows nor their order."""
    for i in range(6):
        (tmp_path / f"c{i}.mp4").write_bytes((folder / f"good{i % 4}.mp4").read_bytes() + bytes(i))
    (tmp_path / "c2.mp4").write_bytes(b"")

    def order(trainer):
        seen = []
        original = trainer.row_encoder.encode
        trainer.row_encoder.encode = lambda rows, **k: (
            seen.append([row["video"] for row in rows[::4]]) or original(rows, **k)
        )
        return seen

    data = rows(*[f"c{i}.mp4" for i in range(6)])
    options = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "run"), "max_steps": 4}
    options |= {"eval_dataset": {"x": rows("c1.mp4", "c2.mp4", "c3.mp4")}}
    whole = build_trainer(tmp_path, data, **options)
    expected = order(whole)
    whole.train()
    (tmp_path / "c2.mp4").write_bytes((folder / "good2.mp4").read_bytes())
    resumed = build_trainer(tmp_path, data, **options)
    assert len(resumed.train_dataset) == 6
    seen = order(resumed)
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert resumed.eval_dataset["x"]["video"] == whole.eval_dataset["x"]["video"] == ["c1.mp4", "c3.mp4"]
    assert seen == expected[2:]
    other = build_trainer(tmp_path, data.select(range(5, -1, -1)), **options)
    with pytest.raises(ValueError, match="train_dataset is not the data set of the checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    changed = build_trainer(tmp_path, data, **options | {"num_generations": 2})
    with pytest.raises(ValueError, match="other settings: num_generations 4 -> 2"):
        changed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_audio_alone_without_a_track_is_left_out(folder):
    data = rows("good0.mp4", "silent.mp4", "good1.mp4", tag="A")
    trainer = build_trainer(folder, data)
    assert trainer.train_dataset["video"] == ["good0.mp4", "good1.mp4"]


def test_evaluation_counts_unusable_questions_apart(folder):
    trainer = build_trainer(folder, rows("good0.mp4", "good1.mp4"))
    asked = rows("good0.mp4", "good1.mp4", "damaged.mp4").to_list()
    answers = trainer.generate_completions(asked)
    assert [answer is None for answer in answers] == [False, False, True]


def test_nothing_left_is_an_error_that_counts(folder):
    with pytest.raises(
        ValueError,
        match=r"train_dataset: no usable row is left: 2 rows quarantined \(1 empty-file, 1 not-media; first empty.mp4",
    ):
        build_trainer(folder, rows("empty.mp4", "text.mp4"))


def test_too_few_rows_for_one_rollout_are_an_error(folder):
    """TRL's sampler would drop them all and the run would end, with success, before its first step."""
    data = rows("good0.mp4", "good1.mp4", "empty.mp4")
    build_trainer(folder, data)  # two prompts a rollout
    with pytest.raises(ValueError, match="2 usable rows, but one rollout takes 3 prompts"):
        build_trainer(folder, data, per_device_train_batch_size=6)


def test_a_bad_row_is_named_before_training(folder):
    data = Dataset.from_list(
        [
            {"prompt": QUESTION, "video": "good0.mp4", "tag": "V"},
            {"prompt": QUESTION, "video": None, "tag": "V"},
        ]
    )
    with pytest.raises(RowError, match="train_dataset, row 1: tag V needs video"):
        build_trainer(folder, data)


def test_files_outside_the_root_are_left_out(folder, tmp_path):
    write_video(tmp_path / "secret.mp4", frames=24)
    os.symlink(tmp_path / "secret.mp4", folder / "link.mp4")
    data = rows("good0.mp4", "link.mp4", "../secret.mp4", "http://localhost/clip.mp4", "good1.mp4")
    trainer = build_trainer(folder, data)
    reasons = {row.path: row.reason for row in trainer.row_encoder.quarantined}
    assert (
        reasons["link.mp4"] == "outside-media-root" and reasons["http://localhost/clip.mp4"] == "network-not-allowed"
    )
    assert reasons["../secret.mp4"] in ("outside-media-root", "not-found")
    assert trainer.train_dataset["video"] == ["good0.mp4", "good1.mp4"]


def test_streamed_rows_train_and_a_broken_one_is_an_error(folder):
    def stream(*files):
        return IterableDataset.from_generator(lambda: iter(rows(*files).to_list()))

    trainer = build_trainer(folder, stream("good0.mp4", "good1.mp4"), max_steps=2)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    trainer = build_trainer(folder, stream("empty.mp4", "good1.mp4"))
    with pytest.raises(MediaError, match=r"empty-file: empty.mp4: 0 bytes \(the row whose 'prompt' \[\{"):
        trainer.train()


def test_a_picture_of_no_size_within_the_limits_is_found_before_training(folder):
    for name, size in {"fits.png": (60, 90), "thin.png": (2, 900)}.items():
        Image.new("RGB", size).save(folder / name)
    data = Dataset.from_dict({"prompt": [QUESTION] * 3, "image": ["thin.png", "fits.png", "fits.png"]})
    registry = build_trainer(folder, data).row_encoder.registries["train_dataset"]
    assert registry.left_out == [0] and registry.reasons() == {"bad-aspect-ratio": 1}
    with pytest.raises(
        ValueError, match="no usable row is left: 3 rows quarantined .3 bad-aspect-ratio; first thin.png"
    ):
        build_trainer(folder, data, min_pixels=3136, max_pixels=3136)  # a square, or a picture as thin as it


def test_duplicate_rows_are_left_out_together(folder):
    trainer = build_trainer(folder, rows("empty.mp4", "good0.mp4", "empty.mp4", "good1.mp4"))
    assert trainer.train_dataset["video"] == ["good0.mp4", "good1.mp4"]


# Options that do not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality_access": "some"}, "modality_access must be one of 'required', 'all'"),
        ({"media_check": "deep"}, "media_check must be one of"),
        ({"media_backend": "magic"}, "media_backend must be one of"),
        ({"subtitle_template": "no place"}, "subtitle_template must hold"),
        ({"max_media_tokens": 0}, "max_media_tokens must be positive"),
        ({"num_frames": 4, "video_fps": 2.0}, "num_frames and video_fps"),
        ({"min_pixels": 10_000, "max_pixels": 100}, "min_pixels=10000 is above max_pixels"),
        ({"overlong_media": "ignore"}, "overlong_media must be"),
        ({"media_decode_timeout": 0.0}, "media_decode_timeout must be positive"),
        (
            {"use_vllm": True, "vllm_enable_sleep_mode": True},
            "vllm_enable_sleep_mode does not support prompts with media",
        ),
        ({"use_transformers_continuous_batching": True}, "does not support media"),
    ],
)
def test_config_rejects_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        build_config(".", **options)


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_trainer_rejects_what_would_lose_media(folder, name):
    model, processor = build_tiny("qwen2_5_omni")
    with pytest.raises(ValueError, match=f"does not support `{name}`"):
        OmniGRPOTrainer(
            model,
            spread_reward,
            build_config(folder),
            rows("good0.mp4"),
            processing_class=processor,
            **{name: [lambda: None]},
        )


def test_a_tokenizer_means_plain_grpo(tmp_path):
    model, tokenizer = build_tiny_text()
    data = Dataset.from_dict({"prompt": ["what color is", "low or high"]})
    trainer = build_trainer(
        tmp_path,
        data,
        model=model,
        processing_class=tokenizer,
        reward=lambda completions, **k: [0.5] * len(completions),
    )
    assert trainer.family is None
    trainer.train()


def test_a_clip_that_is_replaced_during_the_run_is_named(folder, tmp_path, caplog):
    """Its rows show something else than before: they are trained on, and the run says so at its end."""
    for i in range(4):
        shutil.copy(folder / f"good{i}.mp4", tmp_path)
    Image.new("RGB", (56, 56), "red").save(tmp_path / "seen.png")
    files = ["good0.mp4", "good1.mp4", "good2.mp4", "good3.mp4", None]
    data = Dataset.from_dict({"prompt": [QUESTION] * 5, "video": files, "image": [None] * 4 + ["seen.png"]})
    trainer = build_trainer(tmp_path, data, max_steps=2)
    trainer.encode_rows(data)
    assert "changed_files" not in {note["kind"] for note in trainer.left_out()}
    shutil.copy(folder / "silent.mp4", tmp_path / "other.mp4")
    os.replace(tmp_path / "other.mp4", tmp_path / "good2.mp4")
    Image.new("RGB", (84, 56), "blue").save(tmp_path / "seen.png")
    trainer.encode_rows(data)
    trainer.encode_rows(data)
    (note,) = [note for note in trainer.left_out() if note["kind"] == "changed_files"]
    assert (
        note["count"] == 2 and note["files"] == ["good2.mp4", "seen.png"] and "2 files changed while" in note["text"]
    )
    assert caplog.text.count("good2.mp4 was changed while it was in use") == 1 and not trainer.row_encoder.quarantined
    state = trainer.row_encoder.registries["train_dataset"].state_dict()
    again = build_trainer(tmp_path, data, max_steps=2)
    again.row_encoder.registries["train_dataset"].load_state_dict(json.loads(json.dumps(state)))
    assert note in again.left_out()  # a resumed run has not forgotten it
