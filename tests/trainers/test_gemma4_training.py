"""Gemma 4 in every trainer: the same numbers with shared prompts and without, after a resumption, and in fine-tuning."""

import json

import pytest
import torch
from datasets import Dataset
from test_mapo import readable
from test_mixed_batches import rows_of
from test_omni_sft import build as build_sft
from test_omni_sft import losses
from test_shared_training import MAPO, Avatar, Omni, both, build, trained, worst
from tiny_models import GEMMA, build_tiny, save_tiny, towers_of

from maple_trl import cli
from maple_trl.data.tiny_omni import target_text
from maple_trl.omni.families import family_for
from maple_trl.omni.lora import build_lora_config


pytestmark = pytest.mark.slow

BOUND = 1e-4


def moved(trainer, family):
    """The towers, and the language model, that a training has changed."""
    before = build_tiny(family)[0].state_dict()
    changed = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    parts = [*towers_of(build_tiny(family)[0].base_model), "language_model"]
    return [part for part in parts if any(f"{part}." in name for name in changed)], parts


@pytest.mark.parametrize("kind", [MAPO, Avatar])
@pytest.mark.parametrize("family", ["gemma4", "gemma4_unified"])
@pytest.mark.matrix(cases=1)
def test_the_other_trainers_share_prompts(family, kind, seven_tags, tmp_path):
    folder, dataset = seven_tags
    rows, _ = readable(family, dataset)
    options = {"replayed_generations": 2} if kind is Avatar else {}
    _, on = both(folder, rows, tmp_path, family=family, kind=kind, per_device_train_batch_size=8, **options)
    found, parts = moved(on, family)
    assert found == parts


@pytest.mark.parametrize("family", GEMMA)
@pytest.mark.matrix(cases=1)
def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(family, seven_tags, tmp_path):
    folder, dataset = seven_tags
    rows, _ = readable(family, dataset)
    options = {"family": family, "kind": Omni, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    _, whole = trained(folder, rows, tmp_path, "auto", **options)
    again = build(folder, rows, tmp_path, "auto", **options)
    with torch.no_grad():
        for weight in again.model.parameters():
            weight.zero_()
    again.train(resume_from_checkpoint=str(tmp_path / "run-auto" / "checkpoint-1"))
    found = {name: weight.detach() for name, weight in again.model.named_parameters()}
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


def test_adapters_train_with_shared_prompts(seven_tags, tmp_path):
    folder, dataset = seven_tags
    rows, _ = readable("gemma4_both_ways", dataset)

    def prepared():
        model, processor = build_tiny("gemma4_both_ways")
        lora = build_lora_config(model, family_for(model, processor), r=4, alpha=8)
        torch.manual_seed(0)
        return {"model": model, "processing_class": processor, "peft_config": lora}

    _, on = both(folder, rows, tmp_path, prepared, per_device_train_batch_size=8)
    assert {n for n, p in on.model.named_parameters() if p.requires_grad and "lora_" not in n} == set()


@pytest.mark.parametrize("family", GEMMA)
@pytest.mark.matrix(cases=1)
def test_fine_tuning_moves_all_parts(family, seven_tags, tmp_path):
    """What the loss is, is tested with all families; here that it falls, and that a run goes on from its first step."""
    folder, dataset = seven_tags
    rows = Dataset.from_list([row | {"completion": target_text(row)} for row in rows_of(family, dataset)])
    options = {"per_device_train_batch_size": len(rows), "gradient_accumulation_steps": 1, "max_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 1, "output_dir": tmp_path}
    trainer = build_sft(folder, rows, family, **options)
    trainer.train()
    assert losses(trainer)[1] < losses(trainer)[0]
    found, parts = moved(trainer, family)
    assert found == parts
    again = build_sft(folder, rows, family, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, value), (_, expected) in zip(
        again.model.named_parameters(), trainer.model.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("family", ["gemma4", "gemma4_unified"])
@pytest.mark.matrix(cases=1)
def test_checkpointing_changes_nothing(family, seven_tags, tmp_path):
    folder, dataset = seven_tags
    rows, _ = readable(family, dataset)
    _, plain = trained(folder, rows, tmp_path / "plain", "on", family=family)
    _, checkpointed = trained(folder, rows, tmp_path / "again", "on", family=family, gradient_checkpointing=True)
    error, where = worst(plain, checkpointed)
    assert error <= BOUND, (error, where)


# By the command line


@pytest.fixture
def job(seven_tags, tmp_path):
    """Rows in a file, and the words that train on them."""
    folder, dataset = seven_tags

    def words(family, **options):
        rows, _ = readable(family, dataset)
        rows.to_json(tmp_path / "rows.jsonl")
        own = {
            "model_name_or_path": save_tiny(family, tmp_path / family),
            "dataset_name": tmp_path / "rows.jsonl",
            "media_root": folder,
            "output_dir": tmp_path / "run",
            "rewards": "format_reward",
            "trainer": "mapo",
            "evaluate_before_after": "false",
            "bf16": "false",
        }
        given = {**{k: str(v).lower() if isinstance(v, bool) else v for k, v in RUN.items()}, **own, **options}
        return ["train", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]

    return words


RUN = {"use_cpu": True, "num_frames": 4, "min_pixels": 324, "max_pixels": 4096, "per_device_train_batch_size": 8}
RUN |= {"num_generations": 4, "max_completion_length": 6, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}


def test_a_job_trains_and_its_model_answers(job, tmp_path, seven_tags, capsys):
    assert cli.main(job("gemma4_moe", router_aux_loss_coef=0)) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in rows) >= 2
    made = tmp_path / "run"
    words = ["eval", "--model", made, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "eval"]
    words += ["--media_root", seven_tags[0], "--max_new_tokens", 4, "--max_pixels", 4096, "--min_pixels", 324]
    assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err


def test_a_job_with_sound_for_a_model_that_does_not_hear_is_refused_before_it_loads(job, tmp_path, seven_tags, capsys):
    words = job("gemma4_moe")
    seven_tags[1].to_json(tmp_path / "rows.jsonl")
    assert cli.main(words) == 2
    assert "Gemma4Family reads no audio, which the row" in capsys.readouterr().err
