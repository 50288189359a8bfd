"""Options that TRL and transformers offer every trainer, and that would not do in GRPO what they say."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import SaveStrategy


_NO_EFFECT = {
    "data_seed": (None, "seed decides the order of rows, too"),
    "train_sampling_strategy": ("random", "shuffle_dataset decides the order of rows"),
    "label_smoothing_factor": (0.0, "no label is learnt"),
}
"""By name, the value that asks for nothing, and why any other would be ignored."""


def rate_by_reward(config: Any) -> None:
    """
    Have models be compared by the reward of an evaluation where nothing else is named.

    Transformers takes the loss, whose value is near 0 whatever the policy has learnt: its gradient alone means something.
    """
    saves_best = config.load_best_model_at_end or config.save_strategy == SaveStrategy.BEST
    if saves_best and config.metric_for_best_model is None:
        config.metric_for_best_model = "reward"


def check_inherited(config: Any) -> None:
    """
    Refuse inherited options that would silently do nothing, or something else.

    Raises:
        ValueError: naming the field.
    """
    for name, (nothing, why) in _NO_EFFECT.items():
        value = getattr(config, name)
        if value is not None and value != nothing:
            raise ValueError(f"{name}={value!r} has no effect: {why}")
    if config.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha={config.neftune_noise_alpha} is for supervised training: rollouts would be sampled with the "
            "noise, too, and each token with another one than it is trained with"
        )
    if config.max_completion_length is None:
        raise ValueError("max_completion_length must be a number: nothing else ends a completion")
    _check_loader(config.accelerator_config)
    _check_checkpointing(config.gradient_checkpointing_kwargs or {})
    _check_metric(config)
    _check_cispo(config)


def _check_loader(accelerator: Any) -> None:
    if accelerator.split_batches:
        raise ValueError(
            "accelerator_config.split_batches must stay False: rollouts are shared by rank already, and half of the rows would "
            "never be shown"
        )
    if accelerator.dispatch_batches:
        raise ValueError(
            "accelerator_config.dispatch_batches must stay False: rows are texts and paths, which cannot be sent as tensors"
        )


def _check_checkpointing(options: dict[str, Any]) -> None:
    # Trainer takes these out for itself, once; TRL hands all of them to torch, around each rollout.
    for name in ("every_n_layers", "offload"):
        if name in options:
            raise ValueError(
                f"gradient_checkpointing_kwargs: {name} does not last beyond the first rollout; leave it out"
            )


def _check_metric(config: Any) -> None:
    by_metric = {
        "load_best_model_at_end": config.load_best_model_at_end,
        "save_strategy='best'": config.save_strategy == SaveStrategy.BEST,
        f"lr_scheduler_type='{config.lr_scheduler_type.value}'": config.lr_scheduler_type.value
        in ("reduce_lr_on_plateau", "greedy"),
    }
    for name, used in by_metric.items():
        if used and (config.metric_for_best_model or "loss").removeprefix("eval_") == "loss":
            raise ValueError(
                f"{name} compares by metric_for_best_model, which is the loss: in GRPO that is near 0 whatever has been learnt. Set "
                "metric_for_best_model: reward" + (", and lr_scheduler_kwargs: {mode: max}" if "lr" in name else "")
            )


def _check_cispo(config: Any) -> None:
    if config.loss_type != "cispo":
        return
    for name in ("epsilon_high", "replay_epsilon_high"):
        value = getattr(config, name, None)
        if value is None and name == "epsilon_high":
            value = config.epsilon
        if value is not None and value < 1:
            raise ValueError(
                f"{name}={value} with loss_type='cispo', which takes it for the largest ratio itself: every ratio would become "
                f"{value}, and none would count. Set {name}, e.g. to 5.0"
            )
