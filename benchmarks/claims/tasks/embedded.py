"""The seven-tag set and the embedded model, cold-started on both kinds of input: a tag's own signals, and all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from maple_trl.rewards import accuracy_reward


VERSION = 1
ACCESSES = ("required", "all")
QUESTIONS, SAMPLES = 64, 5
COLD_STEPS = 70


def prepare(folder: Path) -> None:
    from maple_trl.data.synthetic import write_seven_tags
    from maple_trl.data.tiny_omni import target_text
    from maple_trl.modalities import ModalityTag
    from maple_trl.trainers.omni_sft.config import OmniSFTConfig
    from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer

    write_seven_tags(folder / "data", prompts_per_tag=64, seed=0)
    rows = write_seven_tags(folder / "cold", prompts_per_tag=64, seed=1000, splits=("train",))["train"]
    told = [row | {"completion": [{"role": "assistant", "content": target_text(row)}]} for row in rows]
    told += [row | {"tag": ModalityTag.VAS.value} for row in told]  # a tag says here what is fed
    options = OmniSFTConfig(
        output_dir=str(folder / "cold-run"),
        media_root=str(folder / "cold"),
        num_frames=4,
        max_steps=COLD_STEPS,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_beta2=0.98,
        weight_decay=0.01,
        seed=0,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = OmniSFTTrainer("builtin:tiny-omni", options, train_dataset=Dataset.from_list(told))
    trainer.train()
    trainer.save_model(str(folder / "model"))


def options(trainer: str) -> Mapping[str, Any]:
    return {
        "model_name_or_path": "{folder}/model",
        "dataset_name": "{folder}/data",
        "media_root": "{folder}/data",
    }


def held_out(folder: Path) -> Dataset:
    return Dataset.from_parquet(str(folder / "data" / "test.parquet"), keep_in_memory=True)


def score(**columns: Any) -> list[float | None]:
    return accuracy_reward(**columns)
