"""What claims 9, 25 and 26 watch: abstention on QA+, TRL's own trainer in the place of ours, and prompts shared and not."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from tasks import qa_plus

from maple_trl.rewards.answers import extract_answer, option_letter


HERE = Path(__file__).resolve().parent


# QA+


class Abstention:
    """
    How often a policy chooses a none answer that is always among the options, by required tag and stratum.

    It is right where a signal is missing alone, and takes the place of a wrong option elsewhere: that it is shown says nothing. In the
    questions of MAPLE 5.4.1 a none answer is right wherever it is shown, and none can be chosen wrongly.
    """

    ASKS = True
    SAMPLES = 1

    def __init__(self, trainer: Any, measure: Callable[..., Any], cost: Any):
        self._trainer = trainer

    def result(self) -> dict[str, Any]:
        folder = Path(self._trainer.args.media_root).parent  # the task's
        rows = [dict(row) for row in qa_plus.held_out(folder, "asked_always")] * self.SAMPLES
        with torch.random.fork_rng():
            torch.manual_seed(0)
            answers = self._trainer.generate_completions(rows)
        counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        for row, text in zip(rows, answers, strict=True):
            letter = option_letter(extract_answer(text or "") or "")
            own = counts[row["required_tag"], row["stratum"]]
            own[0] += 1
            own[1] += letter == none_letter(row)
            own[2] += letter == row["solution"]
        return {"counts": [[*key, *own] for key, own in sorted(counts.items())]}


def none_letter(row: dict[str, Any]) -> str:
    """Return the letter of a row's none answer, which must have one."""
    [place] = [i for i, text in enumerate(row["options"]) if text != qa_plus.OPTIONS[i]]
    return "ABCD"[place]


# TRL's own trainer


class UnmodifiedTRL:
    """
    Has a run trained by `trl.GRPOTrainer` as it is, on the same prompts, rewards and options, and tells which weights moved.

    TRL is given the decoded media and the texts of each row as blocks of a message. All else of the run is as of any: its costs, its
    log, its curve and what it is asked afterwards, for which its own trainer serves.
    """

    PARTS = {"visual": "visual.", "audio_tower": "audio_tower.", "layers": "model.layers."}

    def __init__(self, trainer: Any, measure: Callable[..., Any], cost: Any):
        self._trainer, self._cost = trainer, cost
        self._before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train = self._train

    def _train(self) -> None:
        from instruments import Curve
        from transformers import PrinterCallback
        from trl import GRPOConfig, GRPOTrainer

        ours = self._trainer
        # TRL derives this one from the others, and takes one or the other.
        known = {field.name for field in fields(GRPOConfig) if field.init} - {"generation_batch_size"}
        options = GRPOConfig(**{name: getattr(ours.args, name) for name in known})
        prompts, data = conversations(ours)
        theirs = GRPOTrainer(ours.model, ours.reward_funcs, options, data, processing_class=ours.processing_class)
        theirs.remove_callback(PrinterCallback)
        for callback in ours.callback_handler.callbacks:
            if isinstance(callback, Curve):
                theirs.add_callback(callback)
        self._same = same_tokens(ours, theirs, prompts)
        self._cost.__init__(theirs)  # it watches another trainer from here on
        theirs.train()
        ours.state = theirs.state

    def result(self) -> dict[str, Any]:
        moved = {
            name: float((value.detach() - self._before[name]).abs().max())
            for name, value in self._trainer.model.named_parameters()
        }
        return {
            "same_prompts": self._same,
            "moved": {
                part: max(by for name, by in moved.items() if inside in name) for part, inside in self.PARTS.items()
            },
        }


def conversations(ours: Any) -> tuple[list[list[dict[str, Any]]], Any]:
    """Return the prompts of a trainer's rows with their media and texts as blocks of one message, and a data set of them."""
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
    return prompts, Dataset.from_dict({"number": list(range(len(rows)))}).with_transform(show)


def same_tokens(ours: Any, theirs: Any, prompts: list[list[dict[str, Any]]], count: int = 56) -> float:
    """Return the share of rows whose prompts are the same tokens by TRL's processor and by ours."""
    ids, _, _ = theirs._tokenize_prompts(prompts[:count])
    rows = [dict(ours.train_dataset[i]) for i in range(len(ids))]
    encoded = [ours.prompt_builder.encode(ours.prompt_builder.asked(row)).input_ids.tolist() for row in rows]
    return statistics.fmean(list(own) == other for own, other in zip(ids, encoded, strict=True))


# Shared prompts


class SharedPrompt:
    """
    Compares completions that share their prompt with completions that stand alone: numbers and CPU seconds.

    `training`: the run's job, carried out both ways for some steps by one seed; shared as by default, for `on` also changes which rows
    without media an update holds. `at`: by the prompt's tokens, a step of a larger model
    with random weights both ways: what differs, and how many times faster sharing is, in turns in this process. A run of fewer
    steps than `STEPS` (one that only shows that it can be carried out) times each side once.
    """

    VERSION = 2
    STEPS, REPEATS = 12, 5
    PROMPTS, GROUP, COMPLETION = (256, 512, 1024), 8, 32
    SIZES = (
        *("--hidden", "192", "--layers", "3", "--heads", "4"),
        *("--vocab", "2048", "--tower", "64", "--tower-layers", "2"),
    )

    def __init__(self, trainer: Any, measure: Callable[..., Any], cost: Any):
        # Read now: the folder is of the trainer that the run is of.
        self._job = yaml.safe_load(Path(trainer.args.output_dir, "job.yaml").read_text(encoding="utf-8"))
        self._steps = min(self.STEPS, trainer.args.max_steps)
        self._seed = trainer.args.seed

    def result(self) -> dict[str, Any]:
        done = {shared: self._trained(shared) for shared in ("off", "auto")}
        return {"training": differences(done["off"], done["auto"]), "at": self._at_lengths()}

    def _trained(self, shared: str) -> dict[str, Any]:
        """Train for some steps; return what there is to compare."""
        from maple_trl.jobs.options import parse_args
        from maple_trl.jobs.train import build_trainer

        with tempfile.TemporaryDirectory(prefix="claims-") as output:
            job = self._job | {"output_dir": output, "shared_prefix": shared, "max_steps": self._steps}
            file = Path(output, "job.yaml")
            file.write_text(yaml.safe_dump(job), encoding="utf-8")
            trainer, _ = build_trainer(*parse_args(["--config", str(file)]))
            completions = watch_completions(trainer)
            trainer.train()
            if bool(trainer._sharing) is (shared == "off"):
                raise RuntimeError(f"shared_prefix={shared!r}, but completions did not do so")
            log = trainer.state.log_history
            return {
                "completions": completions,
                "loss": [entry["loss"] for entry in log if "loss" in entry],
                "norm": [entry["grad_norm"] for entry in log if "grad_norm" in entry],
                "weights": {name: value.detach().clone() for name, value in trainer.model.named_parameters()},
            }

    def _at_lengths(self) -> dict[str, dict[str, float]]:
        """Compare a step both ways at each length of the prompt."""
        sys.path[:0] = [str(HERE.parent)]
        import _shared_prefix_steps as steps
        import trl.trainer.utils
        from shared_prefix import parse_args

        args = parse_args([*self.SIZES, "--seed", str(self._seed), "--generations", str(self.GROUP)])
        torch.set_num_threads(1)
        usual = trl.trainer.utils._use_triton
        trl.trainer.utils._use_triton = lambda device: True  # TRL's head reads completions alone, as on a GPU
        found = {}
        try:
            for prompt in self.PROMPTS:
                with tempfile.TemporaryDirectory(prefix="claims-") as folder:
                    steps.save_model(args, Path(folder, "model"))
                    found[str(prompt)] = self._at_length(args, prompt, Path(folder), steps)
        finally:
            trl.trainer.utils._use_triton = usual
        return found

    def _at_length(self, args: argparse.Namespace, prompt: int, folder: Path, steps: Any) -> dict[str, float]:
        from shared_prefix import gradients_of, in_turns, relative_difference

        sides = ("rows", "shared")
        trainers = {
            side: steps.make_trainer(side, args, prompt, self.COMPLETION, self.GROUP, folder) for side in sides
        }
        losses, gradients = {}, {}
        for side, trainer in trainers.items():
            losses[side] = steps.step(trainer, args.seed)
            gradients[side] = gradients_of(trainer.model)
        repeats = self.REPEATS if self._steps == self.STEPS else 1
        turns = {side: lambda own=trainer: steps.step(own, args.seed) for side, trainer in trainers.items()}
        alone, shared = (times["cpu"] for times in in_turns(turns, repeats, "cpu").values())
        return {
            "same_tokens": float((trainers["rows"].sampled == trainers["shared"].sampled).double().mean()),
            "loss": abs(losses["shared"] - losses["rows"]) / abs(losses["rows"]),
            "gradient": relative_difference(gradients["shared"], gradients["rows"]),
            "seconds_alone": statistics.median(alone),
            "seconds_shared": statistics.median(shared),
            "times_faster": statistics.median(a / b for a, b in zip(alone, shared, strict=True)),
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


def differences(alone: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest differences of two trainings: of losses, of gradient norms (relative) and of the weights at the end."""
    pairs = [(value, shared["weights"][name]) for name, value in alone["weights"].items()]
    return {
        "same_completions": statistics.fmean(
            own == other for own, other in zip(alone["completions"], shared["completions"], strict=True)
        ),
        "loss": max(abs(a - b) for a, b in zip(alone["loss"], shared["loss"], strict=True)),
        "gradient_norm": max(abs(a - b) / a for a, b in zip(alone["norm"], shared["norm"], strict=True)),
        "weights": max(float((own - other).abs().max()) for own, other in pairs),
        "steps": len(alone["loss"]),
    }


INSTRUMENTS: dict[str, type] = {
    "abstention": Abstention,
    "unmodified_trl": UnmodifiedTRL,
    "shared_prompt": SharedPrompt,
}
"""By the names that runs ask for them by."""
