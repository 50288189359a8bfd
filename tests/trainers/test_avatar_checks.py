"""What AvatarTrainer refuses or tells before it trains, what its memory depends on, and hints that fail on the way."""

import logging
import shutil

import pytest
import torch
from datasets import Dataset, Image, Sequence, Value
from PIL import Image as Pictures
from test_avatar import MODEL, G, contents_of, data, logs, make, take
from test_avatar_hints import USUAL, VISITS, stuck, with_hints
from torch import nn

from maple_trl.omni.errors import MediaError
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.lora import build_lora_config
from maple_trl.trainers.common.checkpoint import ResumeError
from maple_trl.trainers.common.hinted_rows import row_digest


pytestmark = pytest.mark.slow


__all__ = ["data"]  # a fixture


# Prompts that do not come back


def test_a_single_epoch_is_refused(data, tmp_path):
    rows = take(data[1], V=4, S=4)
    with pytest.raises(ValueError, match="this run visits 8 of 8 rows once. Raise num_train_epochs or max_steps"):
        make(data[0], tmp_path, rows, max_steps=-1, num_train_epochs=1)
    assert make(data[0], tmp_path, rows, max_steps=-1, num_train_epochs=2).memory.replayed
    make(data[0], tmp_path, rows, max_steps=-1, num_train_epochs=1, replayed_generations=0)


def test_a_first_try_of_a_few_steps_is_only_told(data, tmp_path, caplog):
    rows = take(data[1], V=8, S=8)
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        make(data[0], tmp_path, rows, max_steps=1)
    assert "Nothing is replayed" in caplog.text


def test_a_buffer_that_an_epoch_fills_is_told(data, tmp_path, caplog):
    rows = take(data[1], V=4, S=4)
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        make(data[0], tmp_path / "large", rows, max_steps=20)
        assert "replay_capacity" not in caplog.text
        make(data[0], tmp_path / "small", rows, max_steps=20, replay_capacity=8)
    assert "An epoch over 8 rows writes at least" in caplog.text and "replay_capacity (8)" in caplog.text


# Hints that could never be shown


@pytest.mark.matrix(cases=2)
@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"num_train_epochs": 3}, False),
        ({"num_train_epochs": 3.5}, True),  # half of the rows come a fourth time
        ({"num_train_epochs": 4}, True),
        ({"num_train_epochs": 4, "hint_visits": 4}, False),
        ({"num_train_epochs": 2, "hint_visits": 1}, False),  # nothing of a prompt is replayed at its first visit
        ({"num_train_epochs": 3, "hint_visits": 1}, True),
    ],
)
def test_hints_need_prompts_that_come_back(data, tmp_path, options, fits):
    rows = with_hints(take(data[1], V=4, S=4), *["zebra"] * 8)
    options = {"hints": True, "max_steps": -1, **options}
    if fits:
        assert make(data[0], tmp_path, rows, **options).args.hints
        return
    needed = max(options.get("hint_visits", 3), 2) + 1
    match = (
        rf"no hint can ever be shown: with hint_visits=\d that is at a prompt's visit {needed} .*visits each of 8 rows"
    )
    with pytest.raises(ValueError, match=match):
        make(data[0], tmp_path, rows, **options)
    make(data[0], tmp_path, rows, **{**options, "hints": False, "hint_visits": 3})


def test_equal_rows_are_visits_of_one_prompt(data, tmp_path):
    rows = with_hints(take(data[1], V=2, S=2), *["zebra"] * 4).to_list()
    options = {"hints": True, "max_steps": -1, "num_train_epochs": 2}
    with pytest.raises(ValueError, match="no hint can ever be shown"):
        make(data[0], tmp_path, Dataset.from_list(rows), **options)
    make(data[0], tmp_path, Dataset.from_list(rows * 2), **options)


def test_a_first_try_with_hints_is_only_told(data, tmp_path, caplog):
    rows = with_hints(take(data[1], V=4, S=4), *["zebra"] * 8)
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        make(data[0], tmp_path / "long", rows, hints=True, max_steps=60)
        assert "no hint" not in caplog.text and "hints wait" not in caplog.text
        make(data[0], tmp_path / "short", rows, hints=True, max_steps=1)
        assert "no hint can ever be shown" in caplog.text and "(max_steps=1)" in caplog.text
        make(data[0], tmp_path / "small", rows, hints=True, max_steps=60, replay_capacity=8)
    assert "hints wait for one of a prompt's own" in caplog.text


def test_completions_that_are_dropped_too_soon_for_hints(data, tmp_path):
    rows = with_hints(take(data[1], V=4, S=4), *["zebra"] * 8)
    options = {"hints": True, "max_steps": -1, "num_train_epochs": 5, "per_device_train_batch_size": 4 * G}
    match = r"older than replay_max_age=1 when the prompt comes back \(2 steps later at least\)"
    with pytest.raises(ValueError, match=match):
        make(data[0], tmp_path, rows, replay_max_age=1, shuffle_dataset=False, **options)
    make(data[0], tmp_path, rows, replay_max_age=1, **options)  # shuffled, it may come back at once
    make(data[0], tmp_path, rows, replay_max_age=2, shuffle_dataset=False, **options)


# The buffer's first entries


def test_nothing_is_replayed_before_the_buffer_holds_enough(data, tmp_path):
    rows = take(data[1], V=1)
    trainer = make(data[0], tmp_path, rows, max_steps=4, replay_min_size=G + 1, per_device_train_batch_size=G)
    trainer.train()
    assert [entry["replay/generated"] for entry in logs(trainer)] == [G, G, G / 2, G / 2]
    trainer = make(data[0], tmp_path / "usual", rows, max_steps=3, per_device_train_batch_size=G)
    trainer.train()
    assert [entry["replay/generated"] for entry in logs(trainer)] == [G, G / 2, G / 2]


# The paper


def test_the_model_card_cites_the_paper(data, tmp_path):
    trainer = make(data[0], tmp_path, take(data[1], V=4))
    trainer.create_model_card(model_name="card")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "AVATAR: Reinforcement Learning to See, Hear, and Reason Over Video" in card and "2508.03100" in card
    assert "@article{kulkarni2025avatar" in card and "Yogesh Kulkarni and Pooyan Fazli" in card


# Random log-probabilities


def test_dropout_is_refused_with_replay(data, tmp_path):
    rows = take(data[1], V=4)
    model, processor = load_model(MODEL, dtype="float32"), load_processor(MODEL)
    config = build_lora_config(model, family_for(model, processor), r=4, alpha=8, dropout=0.05)
    given = {"model": model, "processing_class": processor, "peft_config": config}
    with pytest.raises(ValueError, match=r"dropout layer\(s\) make random .*set lora_dropout to 0"):
        make(data[0], tmp_path, rows, **given)


def test_without_dropout_adapters_of_any_size_have_ratios_of_one(data, tmp_path):
    rows = take(data[1], V=4)
    model, processor = load_model(MODEL, dtype="float32"), load_processor(MODEL)
    config = build_lora_config(model, family_for(model, processor), r=4, alpha=8, dropout=0.0)
    given = {"model": model, "processing_class": processor, "peft_config": config}
    trainer = make(data[0], tmp_path, rows, **given, max_steps=3, learning_rate=0.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    trainer.train()
    last = logs(trainer)[-1]
    assert last["replay/share"] > 0
    assert last["replay/ratio_max"] == pytest.approx(1, abs=1e-4) == last["replay/ratio_p05"]


# What rows are remembered by


def with_picture(rows):
    pictures = [{**row, "thumb": Pictures.new("RGB", (4, 4), (i, 0, 0))} for i, row in enumerate(rows)]
    return Dataset.from_list(pictures).cast_column("thumb", Image())


def test_a_column_of_pictures_neither_stops_replay_nor_changes_the_data_set(data, tmp_path):
    rows = with_picture(take(data[1], V=4))
    assert row_digest(rows[0]) == row_digest(rows[0]) != row_digest(rows[1])
    trainer = make(data[0], tmp_path, rows, max_steps=3)
    trainer.train()
    assert logs(trainer)[-1]["replay/share"] > 0
    told = trainer._provenance
    trainer._digests = None
    assert trainer._provenance == told


def test_digests_follow_every_plain_column():
    rows = Dataset.from_list([{"prompt": "p", "solution": "A", "cues": ["x"]}])
    rows = rows.cast_column("cues", Sequence(Value("string")))
    row = rows[0]
    for change in ({"solution": "B"}, {"cues": ["y"]}, {"prompt": "q"}, {"more": 1}):
        assert row_digest(row | change) != row_digest(row)
    assert row_digest(dict(reversed(row.items()))) == row_digest(row)


SAVED = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The folder of a run that was stopped at a checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    make(data[0], folder, take(data[1], V=4), **SAVED, max_steps=2).train()
    return folder


def go_on(stopped, data, tmp_path, **changed):
    """Trains further in a copy of the folder, with options that differ from the run's."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    trainer = make(data[0], tmp_path, take(data[1], V=4), **SAVED, max_steps=4, **changed)
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.5},
        {"num_frames": 2},
        {"max_pixels": 32 * 32, "min_pixels": 32 * 32},
        {"max_media_tokens": 60},
    ],
    ids=str,
)
def test_what_prompts_show_and_how_they_are_sampled_must_not_change(changed, stopped, data, tmp_path):
    with pytest.raises(ResumeError, match="written with another prompt options.*replay_recovery='empty'"):
        go_on(stopped, data, tmp_path, **changed)


def test_what_changes_no_prompt_may_change(stopped, data, tmp_path):
    harmless = {"media_prefetch": False, "media_cache_bytes": 1 << 20, "encoder_cache_bytes": 0}
    trainer = go_on(stopped, data, tmp_path, host_memory_bytes="1GiB", **harmless)
    assert trainer.state.global_step == 4


# Hints that are none, or give the answer away


def test_hints_of_the_user_are_read(data, tmp_path, caplog):
    rows = take(data[1], S=4)
    with pytest.raises(ValueError, match="row 1: field 'hint' must be a text or empty, got \\['look'\\]"):
        lists = Dataset.from_list(
            [dict(row, hint=hint) for row, hint in zip(rows, (None, ["look"], None, None), strict=True)]
        )
        make(data[0], tmp_path, lists, **USUAL)
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        make(data[0], tmp_path, with_hints(rows, "zebra quartz", None, None, None), **USUAL)
        assert "reveal the answer" not in caplog.text
        make(
            data[0],
            tmp_path,
            with_hints(rows, "zebra quartz", f"Take option {rows['solution'][1]}.", None, None),
            **USUAL,
        )
    assert "the hints of 1 rows reveal the answer" in caplog.text and "first row 1" in caplog.text


# Hints that fail


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.matrix(cases=1)
def test_a_hint_that_cannot_be_shown_for_once_ends_nothing(failing, data, tmp_path, monkeypatch):
    """As when decoding times out: completions written under the hint wait for the next visit."""
    rows = with_hints(take(data[1], VAS=2, S=2), "zebra quartz", None, None, None)
    trainer = make(data[0], tmp_path / "run", rows, stuck(rows["id"][0]), **(USUAL | {"max_steps": VISITS + 6}))
    encode, calls = trainer._encode_hinted, []

    def sometimes(row, key):
        calls.append(key)
        if len(calls) == failing:
            raise MediaError("decode-timeout", row["video"], "it took too long")
        return encode(row, key)

    monkeypatch.setattr(trainer, "_encode_hinted", sometimes)
    trainer.train()
    shown = [entry["hint/rate"] for entry in logs(trainer)]
    assert len(calls) > failing and shown.count(0.25) >= 3
    assert shown[VISITS + failing - 1] == 0
    assert any(e.hinted for e in contents_of(trainer)) and G
