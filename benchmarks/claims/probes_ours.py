"""Two claims that no run of a recipe shows: TRL's own trainer on prompts with media, and a shared prompt at the same numbers."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from instruments import Cost, Curve
from runs import Run
from tasks import load_task, prepared


VERSION = 1
HERE = Path(__file__).resolve().parent


# TRL's own trainer


def unmodified_trl(run: Run) -> dict[str, Any]:
    """
    Train with `trl.GRPOTrainer` as it is, on the prompts and decoded media of a task.

    Rewards, options and model are those of the run's job, whose own trainer decodes media and asks the questions of the curve, and
    trains nothing.

    Returns:
        `curve` and `cost` as of a run; `unmodified_trl`: how far weights of each part have moved at most, and the share of rows whose
        prompts have the tokens that ours have.
    """
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer
    from worker import job_file, measuring

    from maple_trl.jobs.options import parse_args
    from maple_trl.jobs.train import build_trainer

    task, folder = load_task(run.task), prepared(run.task)
    with tempfile.TemporaryDirectory(prefix="claims-") as output:
        ours, _ = build_trainer(*parse_args(["--config", str(job_file(run, folder, Path(output)))]))
        known = {field.name for field in fields(GRPOConfig)}
        options = {name: value for name, value in run.config().items() if name in known}
        options |= {"output_dir": output, "save_strategy": "no", "report_to": [], "use_cpu": True, "logging_steps": 1}
        options |= {"disable_tqdm": True, "remove_unused_columns": False, "generation_kwargs": None}
        rewards = ours.reward_funcs
        before = {name: value.detach().clone() for name, value in ours.model.named_parameters()}
        data, same = conversations(ours)
        trainer = GRPOTrainer(ours.model, rewards, GRPOConfig(**options), data, processing_class=ours.processing_class)
        trainer.remove_callback(PrinterCallback)
        measure = measuring(ours, task, task.held_out(folder))
        cost = Cost(trainer)
        curve = Curve(trainer, measure, cost)
        trainer.train()
        moved = {
            name: float((value.detach() - before[name]).abs().max()) for name, value in ours.model.named_parameters()
        }
        return {
            "cost": cost.result(),
            "curve": curve.result(),
            "unmodified_trl": {
                "same_prompts": same(trainer),
                "moved": {
                    part: max(by for name, by in moved.items() if inside in name) for part, inside in PARTS.items()
                },
            },
        }


PARTS = {"visual": "visual.", "audio_tower": "audio_tower.", "layers": "model.layers."}
"""What is told of which weights moved, by a part of their names."""


def conversations(ours: Any) -> tuple[Any, Any]:
    """
    Return a trainer's rows as TRL takes them: decoded media and texts as blocks of one message.

    The second is a function that says which share of the rows TRL's processor makes the same tokens of as ours does.
    """
    from datasets import Dataset

    from maple_trl.modalities import ModalityTag

    rows = [dict(row) for row in ours.train_dataset]
    prompts = []
    for row in rows:
        fed, blocks = ModalityTag.parse(row["tag"]).value, []
        if "V" in fed:
            blocks.append({"type": "video", "video": ours.loader.video(row["video"]).frames.copy()})
        if "A" in fed:
            blocks.append({"type": "audio", "audio": ours.loader.audio(row["video"]).waveform.copy()})
        if "S" in fed:
            shown = ours.args.subtitle_template.format(subtitle=ours.loader.subtitle(row["subtitle"]))
            blocks.append({"type": "text", "text": shown})
        blocks.append({"type": "text", "text": row["question"]})
        prompts.append([{"role": "user", "content": blocks}])

    def show(batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        told = {name: [rows[i][name] for i in batch["number"]] for name in rows[0] if name != "prompt"}
        return told | {"prompt": [prompts[i] for i in batch["number"]]}

    # Python objects: arrow would make nested lists of the arrays.
    data = Dataset.from_dict({"number": list(range(len(rows)))}).with_transform(show)

    def same(trainer: Any, count: int = 56) -> float:
        ids, _, _ = trainer._tokenize_prompts(prompts[:count])
        pairs = zip(ids, rows[:count], strict=True)
        return statistics.fmean(
            list(own) == ours.prompt_builder.encode(ours.prompt_builder.asked(row)).input_ids.tolist()
            for own, row in pairs
        )

    return data, same


# Shared prompts

PROMPTS = (256, 512, 1024)
GROUP, COMPLETION, REPEATS, STEPS = 8, 32, 5, 12
SIZES = ("--hidden", "192", "--layers", "3", "--heads", "4", "--vocab", "2048", "--tower", "64", "--tower-layers", "2")
SIDES = ("rows", "shared")


def shared_prompt(run: Run) -> dict[str, Any]:
    """
    Compare completions that share their prompt with completions that stand alone: numbers and CPU seconds.

    `training`: the run's job, carried out both ways by one seed. `at`: by the prompt's tokens, a step of a larger model with random
    weights both ways: what differs, and how many times faster sharing is, in turns in this process.
    """
    return {"shared_prompt": {"training": both_ways(run), "at": at_lengths(run.seed)}}


def both_ways(run: Run) -> dict[str, float]:
    """Train for some steps with and without sharing; return the largest differences of what they did."""
    from worker import job_file

    from maple_trl.jobs.options import parse_args
    from maple_trl.jobs.train import build_trainer

    folder, done = prepared(run.task), {}
    for shared in ("off", "on"):
        with tempfile.TemporaryDirectory(prefix="claims-") as output:
            options = {**run.options, "shared_prefix": shared, "max_steps": STEPS}
            one = Run(run.task, run.recipe, run.seed, options)
            trainer, _ = build_trainer(*parse_args(["--config", str(job_file(one, folder, Path(output)))]))
            done[shared] = {"completions": watch_completions(trainer)}
            trainer.train()
            done[shared] |= {
                "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                "norm": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
                "weights": {name: value.detach().clone() for name, value in trainer.model.named_parameters()},
                "shares": bool(trainer._sharing),
            }
    alone, together = done["off"], done["on"]
    if alone["shares"] or not together["shares"]:
        raise RuntimeError("the two sides did not do what they were to do: sharing off, sharing on")
    pairs = [(value, together["weights"][name]) for name, value in alone["weights"].items()]
    return {
        "same_completions": statistics.fmean(
            own == other for own, other in zip(alone["completions"], together["completions"], strict=True)
        ),
        "loss": max(abs(a - b) for a, b in zip(alone["loss"], together["loss"], strict=True)),
        "gradient_norm": max(abs(a - b) / a for a, b in zip(alone["norm"], together["norm"], strict=True)),
        "weights": max(float((own - other).abs().max()) for own, other in pairs),
        "steps": STEPS,
    }


def watch_completions(trainer: Any) -> list[list[int]]:
    """Return a list that a trainer's sampled completions are put into, token by token."""
    seen: list[list[int]] = []
    generate = trainer._generate_single_turn

    def kept(*args: Any, **kwargs: Any) -> Any:
        found = generate(*args, **kwargs)
        seen.extend(list(map(int, ids)) for ids in found[0])
        return found

    trainer._generate_single_turn = kept
    return seen


def at_lengths(seed: int) -> dict[str, dict[str, float]]:
    """Return for each length of a prompt how a step with it shared compares with one where it is not."""
    sys.path[:0] = [str(HERE.parent)]
    import _shared_prefix_steps as steps
    from shared_prefix import parse_args

    args = parse_args([*SIZES, "--seed", str(seed), "--generations", str(GROUP)])
    torch.set_num_threads(1)
    trl.trainer.utils._use_triton = lambda device: (
        True
    )  # TRL's head reads completions alone, as on a GPU: on both sides
    found = {}
    for prompt in PROMPTS:
        with tempfile.TemporaryDirectory(prefix="claims-") as folder:
            steps.save_model(args, Path(folder, "model"))
            found[str(prompt)] = at_length(args, prompt, Path(folder), steps)
    return found


def at_length(args: argparse.Namespace, prompt: int, folder: Path, steps: Any) -> dict[str, float]:
    """Compare a step both ways at one length of the prompt."""
    from shared_prefix import gradients_of, in_turns, relative_difference

    trainers = {side: steps.make_trainer(side, args, prompt, COMPLETION, GROUP, folder) for side in SIDES}
    losses, gradients = {}, {}
    for side, trainer in trainers.items():
        losses[side] = steps.step(trainer, args.seed)
        gradients[side] = gradients_of(trainer.model)
    alone, shared = SIDES
    turns = {side: lambda own=trainer: steps.step(own, args.seed) for side, trainer in trainers.items()}
    seconds = {side: times["cpu"] for side, times in in_turns(turns, REPEATS, "cpu").items()}
    same = trainers[alone].sampled == trainers[shared].sampled
    return {
        "same_tokens": float(same.double().mean()),
        "loss": abs(losses[shared] - losses[alone]) / abs(losses[alone]),
        "gradient": relative_difference(gradients[shared], gradients[alone]),
        "seconds_alone": statistics.median(seconds[alone]),
        "seconds_shared": statistics.median(seconds[shared]),
        "times_faster": statistics.median(a / b for a, b in zip(seconds[alone], seconds[shared], strict=True)),
    }
