"""
Training runs in a process of their own: `train_job.py PLAN.json`, alone or under a launcher.

The plan holds `rows` (the data set), `media_root`, `out` (where results go) and `runs`, done one after the other. A run
has a `name` and may have

    model             folder of the model; the plan's `model` by default
    options           fields of `OmniGRPOConfig` that differ from `DEFAULTS`
    lora              adapt all towers by LoRA instead of training every weight
    fixed_completions completions that depend on nothing but the prompt and the number of the copy
    reward            a key of `REWARDS`
    hold_at           in the middle of the accumulation that follows this step: write `NAME.held`, wait to be killed
    resume            a checkpoint to go on from; `true` means the last complete one of `output_dir`
    unsynced          never average gradients over the ranks

Every rank writes `NAME-RANK.json` (world size, rows that it used, log, error) and `NAME-RANK.safetensors` (the trained
weights, and under `before.` what they were).
"""

import json
import random
import sys
import time
import zlib
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed

from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.lora import build_lora_config
from maple_trl.trainers.omni_grpo import OmniGRPOTrainer
from maple_trl.trainers.omni_grpo_config import OmniGRPOConfig
from maple_trl.trainers.rollout_state import ResumeError


DEFAULTS = {
    "num_frames": 4,
    "min_pixels": 1024,
    "max_pixels": 4096,
    "num_generations": 2,
    "max_completion_length": 6,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "logging_steps": 1,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
}


def _of_completion(completion_ids, **_):
    return [zlib.crc32(str(list(ids)).encode()) % 101 / 101 for ids in completion_ids]


def _of_rank(completion_ids, **_):
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return [zlib.crc32(f"{rank}{list(ids)}".encode()) % 101 / 101 for ids in completion_ids]


REWARDS = {"of_completion": _of_completion, "of_rank": _of_rank}


class Hold(TrainerCallback):
    def __init__(self, step: int, marker: Path):
        self.step, self.marker = step, marker

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.marker.touch()
            time.sleep(600)


class JobTrainer(OmniGRPOTrainer):
    """The trainer under test, watched: it notes which rows each rank really used."""

    run: dict = {}

    def encode_rows(self, rows):
        used, prompts = super().encode_rows(rows)
        self.used = [*getattr(self, "used", []), [row["id"] for row in used]]
        return used, prompts

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if not self.run.get("fixed_completions"):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        tokenizer = self.processing_class.tokenizer
        special = {*tokenizer.all_special_ids, *self.family.suppressed_ids}
        words = [i for i in range(len(tokenizer)) if i not in special]
        first = self.accelerator.process_index * len(prompt_ids)
        completions = []
        for row, prompt in enumerate(self._serving, start=first):
            draw = random.Random(f"{prompt.key} {row % self.num_generations}")
            completions.append(draw.choices(words, k=draw.randint(2, 6)))
        return completions, None

    def training_step(self, model, *args, **kwargs):
        if not self.run.get("unsynced"):
            return super().training_step(model, *args, **kwargs)
        with model.no_sync():
            return super().training_step(model, *args, **kwargs)


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def do(run: dict, plan: dict) -> None:
    out = Path(plan["out"])
    path = run.get("model", plan["model"])
    options = {"output_dir": str(out / run["name"]), "media_root": plan["media_root"], **DEFAULTS}
    args = OmniGRPOConfig(**{**options, **run.get("options", {})})
    set_seed(7)  # adapters are drawn at random
    model, kwargs = path, {}
    if run.get("lora"):
        model = load_model(path, dtype="float32")
        kwargs["peft_config"] = build_lora_config(model, family_for(model, load_processor(path)), r=4, alpha=8)
    if "hold_at" in run:
        kwargs["callbacks"] = [Hold(run["hold_at"], out / f"{run['name']}.held")]
    trainer = JobTrainer(
        model,
        REWARDS[run.get("reward", "of_completion")],
        args,
        train_dataset=Dataset.from_list(run.get("rows", plan["rows"])),
        processing_class=load_processor(path),
        **kwargs,
    )
    trainer.run = run
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    before = trainable(trainer.model)
    result = {"rank": rank, "world": world, "backend": None, "error": None}
    if world > 1:
        result["backend"] = torch.distributed.get_backend()
    try:
        trainer.train(resume_from_checkpoint=run.get("resume"))
    except ResumeError as error:
        result["error"] = str(error)
    result |= {
        "log": trainer.state.log_history,
        "used": getattr(trainer, "used", []),
        "quarantined": [row.path for row in trainer.rows.quarantined],
    }
    result["find_unused"] = getattr(trainer.model_wrapped, "find_unused_parameters", None)
    after = trainable(trainer.accelerator.unwrap_model(trainer.model))
    save_file(
        after | {f"before.{name}": weight for name, weight in before.items()},
        out / f"{run['name']}-{rank}.safetensors",
    )
    (out / f"{run['name']}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    Path(plan["out"]).mkdir(parents=True, exist_ok=True)
    for run in plan["runs"]:
        do(run, plan)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
