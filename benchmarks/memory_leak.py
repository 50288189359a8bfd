"""
Whether a run's memory grows: AVATAR with replay on real clips, an evaluation and checkpoints in between.

    python benchmarks/memory_leak.py --json memory_leak.json
    python benchmarks/memory_leak.py --plant prompts        # a control: every step a prompt is kept

The budget of host memory is small, so that clips are decoded anew all the time. Samples of the first `--warm-up` steps do not
count: until then the replay buffer, caches and PyTorch's allocator fill. With `--plant` a leak begins after as many further steps
as there were; samples before and after it are judged apart.

Exit status: 0 where what should be flat is flat; 1 where something grows, or a planted leak is not noticed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _memory import measure, table, trends, verdict
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from maple_trl import AvatarConfig, AvatarTrainer
from maple_trl.data import load_seven_tags
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.records import metrics_log


PLANTS = ("prompts", "list", "files")


def letters(completions: list, **columns: Any) -> list[float]:
    """Different completions get different rewards."""
    return [sum(map(ord, completion[0]["content"])) % 11 / 11 for completion in completions]


class Watch(TrainerCallback):
    """Takes samples, and from a step on keeps what nobody needs."""

    def __init__(self, every: int, plant: str | None, plant_at: int):
        self.every, self.plant, self.plant_at = every, plant, plant_at
        self.samples: list[tuple[int, dict[str, float]]] = []
        self.kept: list[Any] = []
        self.trainer: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Take what is there to stay out of garbage collections, which are many here."""
        gc.collect()
        gc.freeze()

    def on_step_end(self, args, state, control, **kwargs):
        """Leak, where it is time to, and take a sample."""
        step = state.global_step
        if self.plant and step > self.plant_at:
            self.leak()
        if step % self.every == 0:
            self.samples.append((step, measure()))

    def leak(self) -> None:
        if self.plant == "prompts":
            row = self.trainer.train_dataset[self.trainer.state.global_step % len(self.trainer.train_dataset)]
            self.kept.append(self.trainer.prompt_builder.encode(row))
        elif self.plant == "list":
            self.kept.extend(float(i) for i in range(500))
        else:
            self.kept.append(open(os.devnull, encoding="utf-8"))  # noqa: SIM115


def build(folder: str, steps: int, watch: Watch) -> AvatarTrainer:
    """Make the trainer of a run that uses much of what can leak."""
    media_root = str(Path(folder, "clips"))
    rows = load_seven_tags(media_root, prompts_per_tag=8, splits=("train",))["train"]
    rows = rows.filter(lambda row: row["tag"] in ("VA", "VAS")).select(range(12))
    model = load_model("builtin:tiny-omni", dtype="float32")
    for name, weight in model.named_parameters():  # what the frozen towers make is cached
        weight.requires_grad_("visual" not in name and "audio_tower" not in name)
    args = AvatarConfig(
        output_dir=str(Path(folder, "run")),
        media_root=media_root,
        host_memory_bytes="800KB",
        media_workers=1,
        num_frames=2,
        max_pixels=3136,
        max_completion_length=4,
        num_generations=4,
        replayed_generations=2,
        replay_capacity=12,
        replay_max_age=6,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
        max_steps=steps,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="steps",
        save_steps=40,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=60,
        per_device_eval_batch_size=4,
        rollout_log_size=64,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = AvatarTrainer(
        model,
        [letters],
        args,
        train_dataset=rows,
        eval_dataset=rows.select(range(1)),
        processing_class=load_processor("builtin:tiny-omni"),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    watch.trainer = trainer
    return trainer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--warm-up", type=int, default=100, help="steps before the first sample that counts")
    parser.add_argument("--every", type=int, default=5, help="steps between samples")
    parser.add_argument("--plant", choices=PLANTS, help="leak, from half of the other steps on")
    args = parser.parse_args(argv)
    disable_progress_bar()
    torch.manual_seed(0)
    metrics_log.LOG_ENTRIES = args.warm_up // 2  # the log is full before it is measured
    plant_at = (args.warm_up + args.steps) // 2 if args.plant else args.steps
    watch = Watch(args.every, args.plant, plant_at)
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="maple-bench-") as folder:
        trainer = build(folder, args.steps, watch)
        trainer.train()
        trainer.loader.close()
        log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    parts = {"before": [s for s in watch.samples if args.warm_up <= s[0] <= plant_at]}
    if args.plant:
        parts["planted"] = [s for s in watch.samples if s[0] > plant_at]
    found = {name: trends(samples) for name, samples in parts.items()}
    for name, values in found.items():
        print(f"{name}, steps {parts[name][0][0]} to {parts[name][-1][0]}:\n{table(values)}")
    result: dict[str, Any] = {name: verdict(values) for name, values in found.items()}
    result |= {"steps": args.steps, "cpu_seconds": round(time.process_time() - began, 1)}
    result["memory"] = {name: value for name, value in log.items() if name.startswith("memory/")}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['cpu_seconds']} s of CPU time")
    leaks = bool(result["before"]["grows"]) or (bool(args.plant) and not result["planted"]["grows"])
    return int(leaks)


if __name__ == "__main__":
    raise SystemExit(main())
