"""Accuracy of each tag before training, for the first epoch of the adaptive curriculum (MAPLE, section 4.2)."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch import nn

from maple_trl.evaluation import sampled_accuracy
from maple_trl.evaluation.report import write_atomically


if TYPE_CHECKING:
    from maple_trl.trainers.mapo import MAPOTrainer

ZERO_SHOT_FILE = "zero_shot.json"
_SETTINGS = ("seed", "zero_shot_questions", "temperature", "top_p", "top_k", "max_completion_length", "num_frames")


def check_measurable(trainer: MAPOTrainer, task_reward: int) -> None:
    """
    Raises:
        ValueError: where the accuracy cannot be measured and so has to be given.
    """
    reward = trainer.reward_funcs[task_reward]
    if trainer.family is None or isinstance(reward, nn.Module) or inspect.iscoroutinefunction(reward):
        raise ValueError(
            "The first epoch of the adaptive curriculum needs zero-shot accuracies, which are measured with an omni model "
            "and a reward that is a plain function: give zero_shot_accuracy"
        )


def zero_shot_accuracy(trainer: MAPOTrainer, task_reward: int) -> dict[str, float]:
    """
    Accuracy of the untrained policy on training prompts, by tag, from `zero_shot.json` in the output folder where the
    same measurement has been made before. A collective call.

    Args:
        task_reward: number of the reward function.
    """
    args, path = trainer.args, os.path.join(trainer.args.output_dir, ZERO_SHOT_FILE)
    key = _identity(trainer, task_reward)
    known = _read(path, key)
    if trainer.accelerator.num_processes > 1:
        known = gather_object([known])[0]
    if known is not None:
        return known
    tokenizer, reward = trainer._tokenizer, trainer.reward_funcs[task_reward]

    def score(completions: list, **columns: Any) -> list[float | None]:
        ids = [tokenizer.encode(completion[0]["content"], add_special_tokens=False) for completion in completions]
        return reward(completions=completions, completion_ids=ids, trainer_state=trainer.state, **columns)

    found = sampled_accuracy(
        trainer.generate_completions, trainer.train_dataset, score, args.zero_shot_questions, args.seed
    )
    accuracy = {tag: value for tag, value in found.accuracy.items() if tag != "all"}
    if trainer.accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
        write_atomically(path, json.dumps({"key": key, "accuracy": accuracy}, indent=2))
    return accuracy


def _identity(trainer: MAPOTrainer, task_reward: int) -> str:
    """What the accuracy depends on: rows, reward, settings and weights."""
    facts = [
        trainer.rows.registries["train_dataset"].state_dict()["content"],
        trainer.reward_func_names[task_reward],
        [getattr(trainer.args, name) for name in _SETTINGS],
        [float(weight.detach().float().sum()) for weight in trainer.model.parameters()],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read(path: str, key: str) -> dict[str, float] | None:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        return found["accuracy"] if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not what is written above: measured again
        return None
