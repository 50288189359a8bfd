"""Rows with pictures through every trainer: they reach loss and towers, are replayed, and a run goes on where it stopped."""

import json
import os
import shutil

import pytest
import torch
from datasets import Dataset
from omni_runs import DEFAULTS, spread_reward, watch_updates
from test_mixed_batches import alone_by_transformers
from test_mixed_images import SEEING, picture_rows, write_pictures
from tiny_models import FAMILIES, build_tiny, towers_of

from maple_trl import (
    AvatarConfig,
    AvatarTrainer,
    MAPOConfig,
    MAPOTrainer,
    OmniGRPOConfig,
    OmniGRPOTrainer,
)
from maple_trl.omni.families import family_for
from maple_trl.omni.lora import build_lora_config
from maple_trl.trainers.omni_sft.config import OmniSFTConfig
from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer


pytestmark = pytest.mark.slow

TRAINERS = {
    "grpo": (OmniGRPOTrainer, OmniGRPOConfig, {"num_iterations": 2, "steps_per_generation": 4}),
    "mapo": (
        MAPOTrainer,
        MAPOConfig,
        {"tag_weights": "adaptive", "per_device_train_batch_size": 4, "num_generations": 2},
    ),
    "avatar": (
        AvatarTrainer,
        AvatarConfig,
        {"replayed_generations": 2, "steps_per_generation": 4, "replay_alpha": 0.5},
    ),
    "sft": (OmniSFTTrainer, OmniSFTConfig, {}),
}
ONE_ROLLOUT = {"max_steps": 1, "steps_per_generation": 2, "num_iterations": 1, "save_strategy": "no"}


@pytest.fixture(scope="module")
def folder(seven_tags):
    write_pictures(seven_tags[0])
    return seven_tags[0]


def table(name, dataset, rows=None):
    """Rows of each tag that is seen, and others, with pictures; a teacher's answer for supervised training."""
    rows = picture_rows(name, dataset) if rows is None else rows
    columns = ("prompt", "tag", "video", "audio", "subtitle", "audio_in_video", "images")
    return Dataset.from_list(
        [{column: row.get(column) for column in columns} | {"completion": f"answer {i}"} for i, row in enumerate(rows)]
    )


def make(kind, name, folder, output_dir, data, **options):
    trainer_class, config_class, own = TRAINERS[kind]
    model, processor = build_tiny(name)
    given = {key: options.pop(key) for key in ("peft_config",) if key in options}
    settings = DEFAULTS | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | own | options
    if kind == "sft":
        settings.pop("num_generations")
    else:
        given["reward_funcs"] = spread_reward
    args = config_class(output_dir=str(output_dir), media_root=str(folder), **settings)
    return trainer_class(model, args=args, train_dataset=data, processing_class=processor, **given)


def logged(trainer, metric):
    return [entry[metric] for entry in trainer.state.log_history if metric in entry]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.matrix(cases=1)
def test_a_run_with_pictures_goes_on_where_it_stopped(kind, folder, seven_tags, tmp_path):
    data = table("qwen2_5_omni", seven_tags[1])
    steps = {"max_steps": 8, "save_steps": 5} if kind == "avatar" else {}  # in the middle of a rollout with replay
    whole = make(kind, "qwen2_5_omni", folder, tmp_path / "whole", data, **steps)
    gradients, before = [], []
    watch_updates(whole, gradients, before)
    whole.train()
    assert sum(logged(whole, "media_tokens/image")) > 0
    for part in ("visual", "audio_tower", "language_model"):
        assert any(part in weight and value.any() for g in gradients for weight, value in g.items()), part
    if kind == "avatar":
        assert 0.5 in logged(whole, "replay/share")
    checkpoint = f"checkpoint-{steps.get('save_steps', 2)}"
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "resumed" / checkpoint)
    resumed = make(kind, "qwen2_5_omni", folder, tmp_path / "resumed", data, **steps)
    resumed.train(resume_from_checkpoint=True)
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[weight], value) for weight, value in whole.model.state_dict().items())
    assert logged(resumed, "loss") == logged(whole, "loss")
    if kind == "avatar":  # nothing of a picture is kept: it is decoded again
        names = {path.suffix for path in (tmp_path / "whole" / checkpoint).rglob("*")}
        assert not names & {".png", ".npy", ".pkl"}


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.matrix(cases=1)
def test_pictures_alone_move_the_vision_tower(name, folder, seven_tags, tmp_path):
    rows = [row for row in picture_rows(name, seven_tags[1]) if row["tag"] == "V" and row["video"] is None]
    tower = next(iter(towers_of(build_tiny(name)[0].base_model)))
    losses = []
    for images in (None, "other"):
        data = table(name, None, [row if images is None else other_pictures(row, name) for row in rows])
        trainer = make("grpo", name, folder, tmp_path / str(images), data, **ONE_ROLLOUT)
        gradients = []
        watch_updates(trainer, gradients, [])
        trainer.train()
        assert any(f"{tower}." in weight and value.norm() > 1e-4 for weight, value in gradients[0].items())
        assert logged(trainer, "media_tokens/video") == [0] and logged(trainer, "media_tokens/image")[0] > 0
        assert trainer._sharing
        losses.append(logged(trainer, "grad_norm"))
    assert losses[0] != losses[1]


def other_pictures(row, name):
    return row | {"images": [f"other{FAMILIES[name].frame_multiple}.png"] * len(row["images"])}


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.matrix(cases=1)
def test_the_supervised_loss_is_that_of_rows_alone(name, folder, seven_tags, tmp_path):
    data = table(name, seven_tags[1])
    options = {"per_device_train_batch_size": len(data), "gradient_accumulation_steps": 1, "max_steps": 1}
    if name == "qwen3_omni":
        options["router_aux_loss_coef"] = 0.0
    trainer = make("sft", name, folder, tmp_path, data, save_strategy="no", **options)
    model, processor = build_tiny(name)
    total, tokens = 0.0, 0
    for row in data:
        ended = row["completion"] + FAMILIES[name].end + "\n"
        completion = processor.tokenizer(ended, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
        logits = alone_by_transformers(name, model.eval(), processor, trainer.prompt_builder, row, completion)
        total += torch.nn.functional.cross_entropy(
            logits[-len(completion) - 1 : -1], completion, reduction="sum"
        ).item()
        tokens += len(completion)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("scope", ["vision", "llm"])
def test_an_adapter_learns_from_pictures_in_its_scope(scope, folder, seven_tags, tmp_path):
    """Of the vision tower it has a gradient; of the language model too, with the pictures from the cache of frozen towers."""
    name = "qwen2_5_vl"
    rows = [row for row in picture_rows(name, seven_tags[1]) if row["images"] and "V" in row["tag"]]
    model, processor = build_tiny(name)
    parts = {part: part == scope for part in ("vision", "audio", "projectors", "llm")}
    adapter = build_lora_config(model, family_for(model, processor), r=4, **parts)
    options = ONE_ROLLOUT | {"max_steps": 2, "peft_config": adapter}
    trainer = make("grpo", name, folder, tmp_path, table(name, None, rows), **options)
    gradients = []
    watch_updates(trainer, gradients, [])
    trainer.train()
    learnt = {weight for g in gradients for weight, value in g.items() if value.any()}
    assert learnt and all(("visual" in weight) == (scope == "vision") for weight in learnt)
    assert bool(trainer.towers.misses) == (scope == "llm")


def test_a_broken_picture_costs_its_row(folder, seven_tags, tmp_path):
    rows = [{**row, "images": [f"{i}.png"]} for i, row in enumerate(picture_rows("qwen2_5_vl", seven_tags[1])[:4])]
    media = tmp_path / "media"
    shutil.copytree(folder, media)
    for i in range(4):
        shutil.copy(media / "square28.png", media / f"{i}.png")
    whole = (media / "1.png").read_bytes()
    (media / "1.png").write_bytes(
        whole[: len(whole) // 2]
    )  # its header is whole: the batch that asks for it finds out
    (media / "2.png").write_bytes(b"<!DOCTYPE html><title>404</title>")
    options = ONE_ROLLOUT | {"max_steps": 4}
    trainer = make("grpo", "qwen2_5_vl", media, tmp_path / "out", table("qwen2_5_vl", None, rows), **options)
    assert len(trainer.train_dataset) == 3
    trainer.train()
    with open(os.path.join(trainer.args.output_dir, "quarantine.json")) as file:
        found = {entry["path"]: entry["reason"] for entry in json.load(file)}
    assert found == {"2.png": "not-media", "1.png": "truncated"}
    assert trainer.state.global_step == 4 and logged(trainer, "media_tokens/image")


def test_rewards_are_told_of_pictures_that_trl_is_not(folder, seven_tags, tmp_path):
    """TRL would open the columns `image` and `images` itself, and put the pictures into prompts that hold them already."""
    told = []

    def reward(completions, images, image, **columns):
        told.extend(zip(images, image, strict=True))
        return [0.5] * len(completions)

    rows = [row for row in picture_rows("qwen2_5_vl", seven_tags[1]) if row["tag"] == "V" and row["video"] is None]
    data = table("qwen2_5_vl", None, rows)
    data = data.add_column("image", [None] * len(data))
    model, processor = build_tiny("qwen2_5_vl")
    args = OmniGRPOConfig(str(tmp_path), media_root=str(folder), **DEFAULTS)
    trainer = OmniGRPOTrainer(model, reward, args, data, processing_class=processor)
    trainer.train()
    assert {(tuple(images), image) for images, image in told} == {(tuple(row["images"]), None) for row in rows}
    prompts = trainer.encode_rows(list(data))[1]
    tokens = sum(prompt.media_tokens["image"] for prompt in prompts) * args.num_generations
    assert logged(trainer, "media_tokens/image") == [tokens]


def test_towers_are_run_for_kinds_that_rows_are_known_to_have(folder, seven_tags, tmp_path):
    class Sharded(OmniGRPOTrainer):
        _same_towers = True

    rows = [row for row in picture_rows("qwen2_5_omni", seven_tags[1]) if row["tag"] == "V"]
    stills, both = (
        [row for row in rows if row["video"] is None],
        [row for row in rows if row["video"] and row["images"]],
    )
    clips = [row for row in rows if not row["images"]]
    wanted = {
        "clips": (clips, "video"),
        "stills": (stills, "image"),
        "both": (both, "image video"),
        "none": ([], "video"),
    }
    for name, (held, kinds) in wanted.items():
        text = [{"prompt": rows[0]["prompt"], "tag": None}] * 4
        data = table("qwen2_5_omni", None, held + text)
        args = OmniGRPOConfig(str(tmp_path / name), media_root=str(folder), **DEFAULTS)
        model, processor = build_tiny("qwen2_5_omni")
        trainer = Sharded(model, spread_reward, args, data, processing_class=processor)
        assert trainer._touched == (*kinds.split(), "audio"), name
    # Rows of another data set, of which a rank encodes a share.
    trainer.generate_completions(stills[:1])
    assert trainer._touched == ("image", "audio")
    # A streamed data set is known as far as it was read.
    args = OmniGRPOConfig(str(tmp_path / "stream"), media_root=str(folder), **DEFAULTS)
    trainer = Sharded(
        model, spread_reward, args, table("qwen2_5_omni", None, both).to_iterable_dataset(), processing_class=processor
    )
    assert trainer._touched == ("video", "audio")
    trainer.encode_rows([{**row, "subtitle": None} for row in both[:1]])
    assert trainer._touched == ("image", "video", "audio")
