"""
How many completions AVATAR generates until it answers well, beside plain GRPO and two controls, on the embedded model and data.

    python benchmarks/sample_efficiency.py --json sample_efficiency.json
    python benchmarks/sample_efficiency.py --sweep replay --json replay.json
    python benchmarks/sample_efficiency.py --sweep replay --hard-only --prompts 2 --json hard_prompts.json
    python benchmarks/sample_efficiency.py --sweep lambda --json tas_lambda.json

All variants begin from the embedded model (the cold start) and train on the same prompts: half of them a hard tier, drawn
from those of which the model answers at most one of 16 samples rightly, half drawn from the others (`--hard-only`: none). All
variants of a seed run before those of the next, in another order for each seed, with the same batches and settings:

- **GRPO**: 8 fresh completions a group. **TAS**: the same with shaped advantages. **replay**: 4 fresh and 4 replayed.
  **AVATAR**: both.
- The controls of replay generate as few: **GRPO, G = 4** has groups of 4 fresh ones, **replay, alpha 0** is replay whose
  replayed completions weigh nothing. What replay is better at than these comes from J_off; the rest from generating less.

Every few optimizer steps the policy is asked all training prompts of the hard tier and held-out questions, each `--samples`
times, outside of the measurement. Counted are the completions that were generated and the CPU seconds of training until the
accuracy, as the mean of two neighbouring measurements, reaches a target for the first time. A run that never does counts
as not reached, and is not left out of what is printed. Behind `±` stands the standard error over seeds; that of one evaluation
(over its questions) is printed with each run and, as `evaluation ±`, with each accuracy at the end.

A finished run is kept in `--runs` and not repeated: a benchmark that was stopped goes on, and more seeds or variants add to it.
The paper (arXiv 2508.03100) reports 80 % fewer generated completions than GRPO (1 600 against more than 8 000) for a 7B model
on video questions; nothing here is tuned to agree with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from maple_trl import AvatarConfig, AvatarTrainer
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.evaluation.sampled import choose_questions
from maple_trl.rewards import accuracy_reward, format_reward


REPLAY: dict[str, Any] = {"replayed_generations": 4, "tas_lambda": 0.0}
GRPO: dict[str, Any] = {"replayed_generations": 0, "tas_lambda": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "GRPO": GRPO,
    "GRPO, G = 4": GRPO | {"num_generations": 4},
    "replay": REPLAY,
    "replay, alpha 0": REPLAY | {"replay_alpha": 0.0},
    "TAS": GRPO | {"tas_lambda": 0.5},
    "AVATAR": REPLAY | {"tas_lambda": 0.5},
}
DRAWS = ("uniform", "diverse", "balanced", "priority")
SWEEPS: dict[str, dict[str, dict[str, Any]]] = {
    "methods": VARIANTS,
    "replay": {name: VARIANTS[name] for name in ("GRPO", "GRPO, G = 4", "replay, alpha 0")}
    | {draw: REPLAY | {"replay_draw": draw} for draw in DRAWS}
    | {"own prompt, diverse": REPLAY | {"replay_scope": "prompt", "replay_draw": "diverse"}},
    "lambda": {f"lambda {value:g}": {"tas_lambda": value} for value in (0.0, 0.3, 0.5, 1.0, 2.0)},
    "shape": {
        shape: {"tas_shape": shape, "tas_lambda": 0.5}
        for shape in ("parabolic", "linear_decay", "linear_incline", "inverse_parabolic")
    }
    | {"uniform": {"tas_lambda": 0.0}},
    "group": {group: {"advantage_group": group, "tas_lambda": 0.5} for group in ("fresh", "mixed")},
}
LATE = (
    "grad_norm",
    "frac_reward_zero_std",
    "replay/zero_variance_fresh",
    "replay/zero_variance_mixed",
    "replay/effective_share",
    "replay/advantage_mean",
    "replay/gradient_on",
    "replay/gradient_off",
    "replay/gradient_cosine",
)
"""What is kept of a run's log, as means over its second half."""
PAPER = {"GRPO": "> 8000", "AVATAR": "1600"}
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "av")


def make_trainer(options: dict[str, Any], rows: Dataset, args: argparse.Namespace, seed: int) -> AvatarTrainer:
    options = {"num_generations": 8} | options
    config = AvatarConfig(
        output_dir=tempfile.mkdtemp(prefix="sample-efficiency-"),
        media_root=str(default_folder()),
        num_frames=4,
        max_pixels=56 * 56,
        max_prompt_length=128,
        per_device_train_batch_size=options["num_generations"] * args.prompts,
        gradient_accumulation_steps=1,
        max_completion_length=14,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        max_steps=args.steps,
        reward_weights=[0.1, 1.0],
        logging_steps=args.every,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        seed=seed,
        **options,
    )
    trainer = AvatarTrainer("builtin:tiny-omni", [format_reward, accuracy_reward], config, rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def split_by_difficulty(args: argparse.Namespace, samples: int = 16) -> tuple[Dataset, Dataset]:
    """The hard tier and the other training prompts, as the embedded model answers them before any training."""
    rows = load_seven_tags()["train"]
    trainer = make_trainer(GRPO, rows, args, seed=0)
    torch.manual_seed(0)
    right = [0.0] * len(rows)
    for _ in range(samples):
        texts = trainer.generate_completions(rows, batch_size=112)
        scores = accuracy_reward(completions=texts, solution=rows["solution"])
        right = [total + score for total, score in zip(right, scores, strict=True)]
    hard = [i for i, total in enumerate(right) if total <= 1]
    return rows.select(hard), rows.select([i for i in range(len(rows)) if i not in set(hard)])


class Measurement(TrainerCallback):
    """Accuracy against generated completions and CPU seconds, measured without counting itself."""

    def __init__(self, trainer: AvatarTrainer, hard: Dataset, held_out: Dataset, args: argparse.Namespace):
        self.trainer, self.hard, self.held_out, self.args = trainer, hard, held_out, args
        self.generated = 0
        self.points: list[dict[str, float]] = []
        self._paused = 0.0
        generate = trainer._generate_single_turn

        def counted(prompt_ids: list, *rest: Any) -> Any:
            self.generated += len(prompt_ids) if trainer.model.training else 0
            return generate(prompt_ids, *rest)

        trainer._generate_single_turn = counted

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = time.process_time()
        self._measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.args.every == 0:
            self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        now = time.process_time()
        hard = ask(self.trainer, self.hard.to_list(), self.args.samples, step)
        held_out = ask(self.trainer, choose_questions(self.held_out, self.args.questions), self.args.samples, step)
        seconds = now - self._began - self._paused
        point = {"step": step, "generated": self.generated, "cpu_seconds": seconds}
        self.points.append(
            point | dict(zip(("hard", "hard_error", "held_out", "held_out_error"), hard + held_out, strict=True))
        )
        self._paused += time.process_time() - now


def ask(trainer: AvatarTrainer, questions: list[dict], samples: int, seed: int) -> tuple[float, float]:
    """The accuracy on some questions, each asked several times, and its standard error over the questions."""
    asked = [question for question in questions for _ in range(samples)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts = trainer.generate_completions(asked)
    scores = accuracy_reward(completions=texts, solution=[question["solution"] for question in asked])
    return mean_and_error([statistics.fmean(scores[i : i + samples]) for i in range(0, len(scores), samples)])


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN of one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def run_variant(options: dict[str, Any], hard: Dataset, others: Dataset, args: argparse.Namespace, seed: int) -> dict:
    count = args.rows // 2
    own_hard = hard.shuffle(seed=seed).select(range(min(count, len(hard))))
    rows = [own_hard] if args.hard_only else [own_hard, others.shuffle(seed=seed).select(range(count))]
    trainer = make_trainer(options, concatenate_datasets(rows), args, seed)
    measurement = Measurement(trainer, own_hard, load_seven_tags()["test"], args)
    trainer.add_callback(measurement)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    late = logs[len(logs) // 2 :]
    known = {name: [entry[name] for entry in late if name in entry] for name in LATE}
    means = {name: statistics.fmean(values) for name, values in known.items() if values}
    return {"points": measurement.points, "late": means}


DECIDING = ("steps", "every", "rows", "prompts", "questions", "samples", "learning_rate", "hard_only")


def run_file(folder: str, options: dict[str, Any], args: argparse.Namespace, seed: int) -> Path:
    """The file of a run, named by all that decides it."""
    if options.get("replayed_generations", 4):
        defaults = {field.name: field.default for field in fields(AvatarConfig)}
        options = {name: defaults[name] for name in ("replay_alpha", "replay_draw", "replay_scope")} | options
    what = {"options": options, "seed": seed, "version": version("maple-trl")}
    what |= {name: getattr(args, name) for name in DECIDING}
    return Path(folder) / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}.json"


def run_once(
    name: str, options: dict[str, Any], tiers: Callable[[], tuple], args: argparse.Namespace, seed: int
) -> dict:
    """A run, or what is known of it from before."""
    file = run_file(args.runs, options, args, seed)
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    run = {"variant": name, "options": options, "seed": seed} | run_variant(options, *tiers(), args, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".partial")
    scratch.write_text(json.dumps(run), encoding="utf-8")
    os.replace(scratch, file)
    return run


def reached(points: list[dict[str, float]], what: str, target: float, cost: str) -> float | None:
    """What a run had cost when the mean of two neighbouring measurements first reached a target."""
    for before, now in zip(points, points[1:], strict=False):
        if (before[what] + now[what]) / 2 >= target:
            return now[cost]
    return None


def summary(runs: list[dict], targets: dict[str, list[float]]) -> dict[str, Any]:
    """What the seeds of a variant show: each number with its standard error over them."""
    table: dict[str, Any] = {}
    for what, values in targets.items():
        for target in values:
            for cost in ("generated", "cpu_seconds"):
                found = [reached(run["points"], what, target, cost) for run in runs]
                table[f"{what} {target:g} {cost}"] = entry(found)
        ends = [run["points"][-1] for run in runs]
        table[f"{what} at the end"] = entry([end[what] for end in ends])
        table[f"{what} at the end"]["evaluation_error"] = statistics.fmean(end[f"{what}_error"] for end in ends)
    for cost in ("generated", "cpu_seconds"):
        table[f"{cost} in all"] = entry([run["points"][-1][cost] for run in runs])
    for name in LATE:
        if all(name in run["late"] for run in runs):
            table[name] = entry([run["late"][name] for run in runs])
    return table


def entry(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    mean, error = mean_and_error(known) if known else (None, None)
    return {"runs": values, "reached": len(known), "mean": mean, "error": error}


def cell(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return "not reached"
    digits = 0 if entry["mean"] >= 100 else 3
    text = f"{entry['mean']:.{digits}f} ± {entry['error']:.{digits}f}"
    if "evaluation_error" in entry:
        text += f" (evaluation ± {entry['evaluation_error']:.3f})"
    return text + ("" if entry["reached"] == len(entry["runs"]) else f" ({entry['reached']} of {len(entry['runs'])})")


def write(args: argparse.Namespace, tiers: dict[str, int], runs: dict[str, list[dict]]) -> dict[str, Any]:
    """Writes what is known by now, if asked, and returns the table."""
    targets = {"hard": args.hard_targets, "held_out": args.held_out_targets}
    table = {name: summary(found, targets) for name, found in runs.items() if found}
    if args.json:
        result = {
            "benchmark": "sample_efficiency",
            "options": vars(args),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "prompts": tiers,
            "paper": PAPER,
            "summary": table,
            "runs": runs,
        }
        Path(args.json).write_text(json.dumps(result, indent=2), encoding="utf-8")
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there, again after each run")
    parser.add_argument(
        "--runs", metavar="FOLDER", default="runs/sample_efficiency", help="where finished runs are kept"
    )
    parser.add_argument("--sweep", choices=sorted(SWEEPS), default="methods", help="what is compared")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these variants")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of a run")
    parser.add_argument("--every", type=int, default=8, help="steps between two measurements")
    parser.add_argument("--rows", type=int, default=64, help="training prompts")
    parser.add_argument("--hard-only", action="store_true", help="train on the hard tier alone")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step")
    parser.add_argument("--questions", type=int, default=32, help="held-out questions of each tag")
    parser.add_argument("--samples", type=int, default=5, help="answers to a question")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--hard-targets", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--held-out-targets", type=float, nargs="+", default=[0.6, 0.65, 0.7])
    args = parser.parse_args(argv)
    disable_progress_bar()
    variants = {n: o for n, o in SWEEPS[args.sweep].items() if not args.only or n in args.only}
    tiers = cache(lambda: split_by_difficulty(args))
    sizes = {"hard": len(tiers()[0]), "others": len(tiers()[1])}
    print(f"{sizes['hard']} hard prompts, {sizes['others']} others; {args.prompts} prompts a step")
    runs: dict[str, list[dict]] = {name: [] for name in variants}
    for seed in range(args.seeds):
        names = list(variants)
        for name in names[seed % len(names) :] + names[: seed % len(names)]:
            runs[name].append(run_once(name, variants[name], tiers, args, seed))
            last = runs[name][-1]["points"][-1]
            print(f"seed {seed}  {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in last.items()), flush=True)
            table = write(args, sizes, runs)
    for key in dict.fromkeys(key for entries in table.values() for key in entries):
        print(f"\n{key}")
        for name, entries in table.items():
            if key in entries:
                print(f"  {name:20} {cell(entries[key])}")
    if args.sweep == "methods":
        print(f"\npaper, completions to its target: {', '.join(f'{k} {v}' for k, v in PAPER.items())} (5x)")


if __name__ == "__main__":
    main()
