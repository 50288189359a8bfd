"""Accuracy of each tag before training, for the first epoch of the adaptive curriculum (MAPLE, section 4.2)."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn
from trl.trainer.utils import is_async_callable

from maple_trl.evaluation import choose_questions, sampled_accuracy
from maple_trl.files import write_atomically
from maple_trl.records.options import deciding
from maple_trl.records.run_folder import ZERO_SHOT_FILE
from maple_trl.rewards.answers import completion_text
from maple_trl.rewards.calls import checked
from maple_trl.rewards.identity import reward_identity
from maple_trl.trainers.common.hinted_rows import row_digest
from maple_trl.trainers.common.media_config import MediaConfig


if TYPE_CHECKING:
    from maple_trl.trainers.omni_grpo.trainer import OmniGRPOTrainer

logger = logging.getLogger(__name__)

_SAMPLING = (
    "seed",
    "zero_shot_questions",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "chat_template_kwargs",
)
"""What the accuracy depends on beside rows, what is fed of them, reward and weights."""


def check_measurable(trainer: OmniGRPOTrainer, task_reward: int) -> None:
    """
    Check that the accuracy before training can be measured.

    Raises:
        ValueError: where the accuracy cannot be measured and so has to be given.
    """
    reward = trainer.reward_funcs[task_reward]
    if trainer.family is None or isinstance(reward, nn.Module) or is_async_callable(reward):
        raise ValueError(
            "The first epoch of the adaptive curriculum needs zero-shot accuracies, which are measured with an omni model "
            "and a reward that is a plain function: give zero_shot_accuracy"
        )


def zero_shot_accuracy(trainer: OmniGRPOTrainer, task_reward: int, weights: list[float]) -> dict[str, float]:
    """
    Measure the accuracy of the untrained policy on training prompts, by tag; a collective call.

    It is read from `zero_shot.json` in the output folder where the same measurement has been made before: of the same
    questions and solutions, with the same options and weights, by the same reward as
    [`reward_identity`] tells it. The main process alone scores.

    Args:
        task_reward: number of the reward function.
        weights: tell the untrained model from others; see [`fingerprint`].

    Raises:
        ValueError: for a reward outside [0, 1], or when none could be scored.
    """
    path = os.path.join(trainer.args.output_dir, ZERO_SHOT_FILE)
    key = _identity(trainer, task_reward, weights)
    accuracy = _of_main_process(trainer, _read(path, key))
    if accuracy is None:
        accuracy = _of_main_process(trainer, _measure(trainer, task_reward))
        if trainer.accelerator.is_main_process:
            os.makedirs(trainer.args.output_dir, exist_ok=True)
            write_atomically(path, json.dumps({"key": key, "accuracy": accuracy}, indent=2, allow_nan=False))
    return accuracy


def fingerprint(model: nn.Module) -> list[float]:
    """Return the sum of each parameter, which tells weights apart; taken before they are spread over processes."""
    sums = [weight.detach().float().sum() for weight in model.parameters()]
    return torch.stack([value.to(sums[0].device) for value in sums]).tolist()


def _of_main_process(trainer: OmniGRPOTrainer, value: Any) -> Any:
    return gather_object([value])[0] if trainer.accelerator.num_processes > 1 else value


def _measure(trainer: OmniGRPOTrainer, task_reward: int) -> dict[str, float]:
    tokenizer, reward = trainer._tokenizer, trainer.reward_funcs[task_reward]
    score_checked = checked(reward, trainer.reward_func_names[task_reward])

    def score(completions: list, **columns: Any) -> list[float | None]:
        if not trainer.accelerator.is_main_process:
            return [0.0] * len(completions)
        ids = [tokenizer.encode(completion_text(one), add_special_tokens=False) for one in completions]
        # Of one completion alone there is nothing to tell.
        named = {"completion_logprobs", "deficit_completions"} & set(inspect.signature(reward).parameters)
        columns |= {name: [None] * len(ids) for name in named}
        columns |= {"trainer_state": trainer.state, "log_extra": _unlogged, "log_metric": _unlogged}
        scores = score_checked(completions=completions, completion_ids=ids, **columns)
        for value in scores:
            if value is not None and not math.isnan(value) and not 0 <= value <= 1:
                raise ValueError(
                    f"The reward function {trainer.reward_func_names[task_reward]!r} gave {value}: accuracy is the mean of "
                    "rewards in [0, 1]; choose another with task_reward"
                )
        return scores

    found = sampled_accuracy(
        trainer.generate_completions,
        trainer.train_dataset,
        score,
        trainer.args.zero_shot_questions,
        trainer.args.seed,
    )
    if found.unscorable and trainer.accelerator.is_main_process:
        unknown = ", ".join(sorted(tag for tag in found.unscorable if tag not in found.accuracy))
        logger.warning(
            "Zero-shot accuracy: %r gave no reward to the answers of %d questions (%s), which are left out%s",
            trainer.reward_func_names[task_reward],
            sum(found.unscorable.values()),
            ", ".join(f"{tag} {count}" for tag, count in sorted(found.unscorable.items())),
            f"; tags of unknown accuracy come first: {unknown}" if unknown else "",
        )
    return {tag: value for tag, value in found.accuracy.items() if tag != "all"}


def _unlogged(*_: Any) -> None:
    """Ignore what a reward function logs, as no training step is being made."""


def _identity(trainer: OmniGRPOTrainer, task_reward: int, weights: list[float]) -> str:
    args = trainer.args
    # Beside its prompt a row has the columns that the reward is handed, of which the solution is one.
    asked = choose_questions(trainer.train_dataset, args.zero_shot_questions, args.seed)
    facts = [
        trainer.row_encoder.registries["train_dataset"].state_dict()["content"],
        [row_digest(row) for row in asked],
        reward_identity(trainer.reward_funcs[task_reward]),
        [getattr(args, name) for name in _SAMPLING],
        deciding(args, MediaConfig),
        weights,
    ]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _read(path: str, key: str) -> dict[str, float] | None:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        valid = all(0 <= value <= 1 for value in found["accuracy"].values())
        return found["accuracy"] if found["key"] == key and valid else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, or not what is written above
        return None
