"""The supervised steps by which benchmarks make the models that their runs begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def train_supervised(
    folder: Path, rows: Any, steps: int, model: Any = "builtin:tiny-omni", saved: str = "model", **options: Any
) -> Path:
    """
    Train a model on rows with completions whose media are in `folder/cold`, and save it.

    Args:
        folder: where the model goes, too.
        rows: a `Dataset`, or a list of rows.
        model: what it begins with: a name, a folder, or a model.
        saved: the name of the model's folder.
        options: of `OmniSFTConfig`, over those that all have; `processing_class` is the trainer's.

    Returns:
        `Path`: the model's folder.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    from maple_trl.trainers.omni_sft.config import OmniSFTConfig
    from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer

    usual = {
        "num_frames": 4,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "seed": 0,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    processor = options.pop("processing_class", None)
    places = {"output_dir": str(folder / f"{saved}-run"), "media_root": str(folder / "cold")}
    config = OmniSFTConfig(**usual | places | {"max_steps": steps} | options)
    table = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    trainer = OmniSFTTrainer(model, config, train_dataset=table, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(folder / saved))
    return folder / saved
