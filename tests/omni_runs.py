"""Short training runs on real files, for tests that go through `trainer.train()`."""

import tempfile

import torch
from tiny_models import build_tiny

from maple_trl import OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.omni.prefix.sharing import Comparison


# A short run whose log is read afterwards.
QUIET_ON_CPU = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
DEFAULTS = QUIET_ON_CPU | {
    "num_frames": 4,
    "min_pixels": 32 * 32,
    "max_pixels": 64 * 64,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 1,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
}


def spread_reward(completions, **kwargs):
    """Different completions get different rewards, so that every group has a gradient."""
    return [sum(map(ord, c[0]["content"])) % 11 / 11 for c in completions]


def build_config(media_root, **options):
    folders = {"output_dir": tempfile.mkdtemp(prefix="omni-run-"), "media_root": str(media_root)}
    return OmniGRPOConfig(**(folders | DEFAULTS | options))


def build_trainer(
    media_root, dataset, family="qwen2_5_omni", trainer_class=OmniGRPOTrainer, reward=spread_reward, **options
):
    """A trainer of a tiny random model; `model`, `processing_class`, `eval_dataset` and `peft_config` may be given."""
    arguments = ("model", "processing_class", "eval_dataset", "peft_config", "callbacks")
    given = {name: options.pop(name) for name in arguments if name in options}
    if "model" not in given:
        model, processor = build_tiny(family)
        given = {"model": model, "processing_class": processor} | given
    return trainer_class(reward_funcs=reward, args=build_config(media_root, **options), train_dataset=dataset, **given)


def one_row_per_tag(dataset):
    """Seven rows, one per tag, in the order in which they appear."""
    first = {}
    for i, tag in enumerate(dataset["tag"]):
        first.setdefault(tag, i)
    return dataset.select(sorted(first.values()))


def watch_updates(trainer, gradients, weights):
    """Have a training add to these lists the gradients of each optimizer step, and the weights before it, by name."""
    create_optimizer = trainer.create_optimizer

    def remember(*_):
        named = list(trainer.model.named_parameters())
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named})
        weights.append({n: p.detach().clone() for n, p in named})

    def watched_optimizer(*args, **kwargs):
        optimizer = create_optimizer(*args, **kwargs)
        optimizer.register_step_pre_hook(remember)
        return optimizer

    trainer.create_optimizer = watched_optimizer


def sharing_error(*args, **kwargs):
    """What a `Comparison` with these arguments finds, as a multiple of what rounding explains."""
    comparison = Comparison(*args, **kwargs)
    difference = comparison.difference()
    if difference <= comparison.least_tolerance:
        return difference / comparison.least_tolerance
    return difference / comparison.tolerance()
