"""
What MAPO's bookkeeping costs: schedule, difficulties, weights, advantages, metrics; and what the gradient probe adds.

    python benchmarks/mapo_bookkeeping.py --json mapo_bookkeeping.json

Two measures, on the embedded model and data with adaptive weights, adaptive curriculum by cycle and early filtering:

- **share**: CPU seconds inside the methods that only MAPOTrainer has (none runs the model, none calls TRL), over those
  of the whole step; without and with the gradient probe on 4096 coordinates, which is off by default.
- **pairs**: the step of MAPOTrainer against OmniGRPOTrainer on rows of one tag, both doing the same passes over the same
  number of rows, a few steps of one and of the other in turns in one process. What else the machine does is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from maple_trl import MAPOConfig, MAPOTrainer, OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.rewards import accuracy_reward, format_reward


BOOKKEEPING = (
    "_own_rows",
    "_refill",
    "assign",
    "_fold_weights",
    "_add_to_optimizer_step",
    "on_optimizer_step",
    "_log_of_optimizer_step",
)
SCHEDULE = ("next_batch", "peek", "draw")
EVERYTHING = {
    "tag_weights": "adaptive",
    "curriculum": "adaptive",
    "curriculum_granularity": "cycle",
    "dynamic_sampling": "early",
    "zero_shot_accuracy": dict.fromkeys(("V", "A", "S", "VA", "VS", "AS", "VAS"), 0.5),
}


class Clock:
    """Seconds inside some methods, those that call each other counted once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def watch(self, owner: Any, names: tuple[str, ...]) -> None:
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside, began = True, time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began
                self._inside = False

        return timed


def build(trainer_class: type, config_class: type, rows: Any, folder: str, steps: int, **options: Any) -> Any:
    args = config_class(
        output_dir=folder,
        media_root=str(default_folder()),
        num_frames=4,
        max_pixels=56 * 56,
        per_device_train_batch_size=64,
        max_completion_length=14,
        learning_rate=2e-4,
        max_steps=steps,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        logging_steps=5,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = trainer_class(
        load_model("builtin:tiny-omni"),
        [format_reward, accuracy_reward],
        args,
        train_dataset=rows,
        processing_class=load_processor("builtin:tiny-omni"),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def share(rows: Any, folder: str, steps: int, probe: int) -> list[float]:
    """The part of each step that is bookkeeping, but for the first, which warms up."""
    trainer = build(MAPOTrainer, MAPOConfig, rows, folder, steps, gradient_probe=probe, **EVERYTHING)
    clock, shares = Clock(), []
    clock.watch(trainer, BOOKKEEPING)
    step = trainer.training_step

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        if trainer._step == 0:
            clock.watch(trainer.schedule, SCHEDULE)
        before, began = clock.seconds, time.thread_time()
        loss = step(*args, **kwargs)
        shares.append((clock.seconds - before) / (time.thread_time() - began))
        return loss

    trainer.training_step = timed_step
    trainer.train()
    return shares[1:]


def pairs(rows: Any, folder: str, steps: int, repeats: int) -> list[float]:
    """MAPO's time over OmniGRPO's, of neighbouring short runs on the same rows."""
    sides = {
        OmniGRPOTrainer: (OmniGRPOConfig, {"cast_lm_head_to_fp32": True}),
        MAPOTrainer: (MAPOConfig, EVERYTHING | {"dynamic_sampling": "none"}),
    }
    ratios = []
    for _ in range(repeats):
        seconds = {}
        for trainer_class, (config_class, options) in sides.items():
            trainer = build(trainer_class, config_class, rows, folder, steps, **options)
            began = time.process_time()
            trainer.train()
            seconds[trainer_class] = time.process_time() - began
        ratios.append(seconds[MAPOTrainer] / seconds[OmniGRPOTrainer])
    return ratios


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("--steps", type=int, default=40, help="steps of the run whose bookkeeping is timed")
    parser.add_argument("--pair-steps", type=int, default=10, help="steps of one side of a pair")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args(argv)
    disable_progress_bar()
    rows = load_seven_tags()["train"]
    with tempfile.TemporaryDirectory(prefix="maple-bench-") as folder:
        shares = share(rows, folder, args.steps, probe=0)
        probed = share(rows, folder, args.steps, probe=4096)
        one_tag = rows.filter(lambda row: row["tag"] == "VAS")
        ratios = pairs(one_tag, folder, args.pair_steps, args.pairs)
    result = {"share": spread(shares), "share_with_probe": spread(probed), "pairs_cpu_time": spread(ratios)}
    for name, title in {"share": "bookkeeping", "share_with_probe": "with the gradient probe"}.items():
        print(f"{title}, share of a step: median {result[name]['median']:.2%}, most {result[name]['max']:.2%}")
    print(
        "MAPO / OmniGRPO, CPU time of neighbouring runs: median {median:.3f}, {min:.3f} - {max:.3f}, n = {n}".format(
            **result["pairs_cpu_time"]
        )
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
