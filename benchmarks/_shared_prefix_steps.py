"""The optimizer step that `shared_prefix.py` compares, made by the trainer itself on each side."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import _shared_prefix_model as sizes
import torch
import transformers
from datasets import Dataset
from torch import Tensor

from maple_trl.data.tiny_omni import build_processor
from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.omni.lora import freeze
from maple_trl.planning.sizes import generation_work, plain_work, shared_work
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
from maple_trl.trainers.omni_grpo.trainer import OmniGRPOTrainer


BASELINES = ("trl", "rows")
OURS = "shared"
SIDES = (*BASELINES, OURS)
"""
`trl`: every row is a prompt of its own, whose media pass the towers in each forward. `rows`: `shared_prefix="off"` with
all else as it comes, also the cache of what frozen towers made. `shared`: `shared_prefix="on"`.
"""

NOISE = 0.05


class BenchmarkTrainer(OmniGRPOTrainer):
    """The trainer with prompts that are encoded already: decoding and the processor are not what is compared."""

    prompt: EncodedPrompt
    repeats_media = False
    sampled: Tensor

    def encode_rows(self, rows):
        if not self.repeats_media:
            return list(rows), [replace(self.prompt, _digests={})] * len(rows)
        # A clip is told by its digest: with one for each row, each row's passes the towers.
        digests = [dict.fromkeys(self.prompt.kinds, f"row {i}") for i in range(len(rows))]
        return list(rows), [replace(self.prompt, _digests=own) for own in digests]

    def _probe_prompt(self):
        # The processor is the tiny model's, whose sound has fewer bands than this model's.
        return sizes.make_prompt(self.model.base_model, self.family, sizes.PROMPT_UNIT)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.sampled = output["completion_ids"]
        return output


def distinct_tokens(completion_ids, **_) -> list[float]:
    """A reward that the completions of a random model differ in."""
    return [float(sum(ids) % 97) for ids in completion_ids]


def save_model(args: argparse.Namespace, folder: Path) -> None:
    """The trainer loads the policy and its reference from here."""
    model, _ = sizes.make_model(args)
    model.save_pretrained(folder)


def make_trainer(
    side: str, args: argparse.Namespace, prompt_tokens: int, completion: int, group: int, folder: Path
) -> BenchmarkTrainer:
    """
    One step of it is a rollout of a group, the reference's log-probabilities, and one micro-batch of G rows.

    Args:
        folder: holds the model in `model`.
    """
    config = OmniGRPOConfig(
        str(folder / side),
        shared_prefix="on" if side == OURS else "off",
        encoder_cache_bytes=0 if side == "trl" else 1 << 30,
        media_prefetch=False,
        per_device_train_batch_size=group,
        gradient_accumulation_steps=1,
        num_generations=group,
        max_completion_length=completion,
        generation_kwargs={"min_new_tokens": completion},
        beta=0.04,
        seed=args.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=args.checkpointing,
        report_to=[],
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Question {i}"}]} for i in range(group)])
    trainer = BenchmarkTrainer(
        str(folder / "model"), distinct_tokens, config, train_dataset=rows, processing_class=build_processor()
    )
    trainer.repeats_media = side == "trl"
    trainer.prompt = sizes.make_prompt(trainer.model.base_model, trainer.family, prompt_tokens, args.seed)
    if not args.train_towers:
        freeze(trainer.model, trainer.family, "vision", "audio", "projectors")
    # As in the midst of training: with the reference's own weights the KL term is zero. Frozen parts are still equal.
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter += NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return trainer


def step(trainer: BenchmarkTrainer, seed: int) -> float:
    """One step up to the optimizer, on a clip that no tower has seen; gradients stay. Returns the loss."""
    if trainer.towers is not None:
        trainer.towers = trainer._make_tower_cache()
    trainer.model.zero_grad(set_to_none=True)
    transformers.set_seed(seed)
    trainer._step, trainer._buffered_inputs = 0, None
    trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
    rows = [trainer.train_dataset[0]] * trainer.num_generations
    return float(trainer.training_step(trainer.model, rows, None))


def operations(trainer: BenchmarkTrainer, args: argparse.Namespace, side: str) -> float:
    """Of a step: rollout, reference's pass, and forward and backward of the loss."""
    config, prompt, group = trainer.model.config, len(trainer.prompt), trainer.num_generations
    length, shared = trainer.args.max_completion_length, side == OURS
    work = (shared_work if shared else plain_work)(prompt, length, group)
    passes = sizes.language_operations(config, work) * (1 + 3 + args.checkpointing)
    rollout = sizes.language_operations(config, generation_work(prompt, length, group, shared))
    # Frozen towers' output is kept from the rollout on; else policy and reference need a pass in each phase.
    tower_passes = (1 + 1 + (3 + args.checkpointing if args.train_towers else 1)) if side == "trl" else 1
    if side != "trl" and args.train_towers:
        tower_passes = 1 + 1 + 3 + args.checkpointing
    copies = group if side == "trl" else 1
    return passes + rollout + copies * tower_passes * sizes.tower_operations(config, trainer.prompt)
