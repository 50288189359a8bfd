"""The passes that `shared_prefix.py` compares, each as a function without arguments for each side."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import _shared_prefix_model as sizes
import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from trl.trainer.utils import add_fused_lm_head

from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids, generation_position_ids
from maple_trl.omni.families.base import OmniFamily
from maple_trl.omni.prefix.packed_attention import install
from maple_trl.omni.prefix.shared_prefill import last_position_alone, share_prefill
from maple_trl.omni.prefix.shared_prefix import pack, packed_forward
from maple_trl.omni.serving import serve_media
from maple_trl.omni.towers import TowerCache, run_tower
from maple_trl.planning.sizes import generation_work, plain_work, shared_work


BASELINES = ("trl", "rows")
OURS = ("shared", "cached")
SIDES = (*BASELINES, *OURS)
"""
`trl`: G rows, and media G times, as transformers alone would have it. `rows`: G rows, media once, as
`shared_prefix="off"` has it. `shared`: prompt and media once. `cached`: the same, with what the towers made kept.
"""

MEDIA_PER_SIDE = {"trl": None, "rows": 1, "shared": 1, "cached": 0}  # None: once per row
CACHE_BYTES = 4 << 30


@dataclass
class Group:
    """A prompt with G completions of R tokens, and the model that reads them."""

    model: nn.Module
    family: OmniFamily
    prompt: EncodedPrompt
    completions: Tensor
    advantages: Tensor
    cache: TowerCache
    whole_prefill: bool = False  # the head reads all positions, also on `rows`
    attention: str | None = None  # of packed rows, where it is not the model's

    @classmethod
    def make(cls, args: argparse.Namespace, prompt_tokens: int, completion: int, group: int) -> Group:
        model, family = sizes.make_model(args)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        if not install(model):
            raise RuntimeError("the model's attention cannot read packed rows")
        if args.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        prompt = sizes.make_prompt(model.base_model, family, prompt_tokens, args.seed)
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(sizes.FIRST_TEXT_ID, len(family.tokenizer), (group, completion), generator=generator)
        advantages = torch.randn(group, 1, generator=generator)
        device = torch.device(args.device)
        return cls(model, family, prompt, ids.to(device), advantages.to(device), TowerCache(CACHE_BYTES))

    def with_completions(self, completion: int, seed: int) -> Group:
        """The same prompt and model, other completions."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.completions), completion)
        ids = torch.randint(sizes.FIRST_TEXT_ID, len(self.family.tokenizer), shape, generator=generator)
        return replace(self, completions=ids.to(self.completions.device))

    @property
    def core(self) -> nn.Module:
        return self.family.core(self.model)

    @property
    def prompt_ids(self) -> Tensor:
        return self.prompt.input_ids.to(self.completions.device).expand(len(self.completions), -1)

    def repeated_media(self) -> dict[str, Tensor]:
        """The media once per row, as a processor gives them for G prompts."""
        count, device = len(self.completions), self.completions.device
        media = {name: value for inputs in self.prompt.media.values() for name, value in inputs.items()}
        repeated = {name: value.repeat(count, *[1] * (value.dim() - 1)).to(device) for name, value in media.items()}
        return repeated | {"video_second_per_grid": torch.ones(count, device=device)}


def log_probs(group: Group, side: str) -> Tensor:
    """Log-probabilities of the completions, shape (G, R)."""
    if side in OURS:
        return _packed_log_probs(group, group.cache if side == "cached" else None)
    ids = torch.cat([group.prompt_ids, group.completions], dim=1)
    width = group.completions.size(1)
    labels = ids.clone()
    labels[:, :-width] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "fused_lm_head": True}
    if side == "trl":
        return group.model(**inputs, **group.repeated_media()).log_probs[:, -width:]
    rows = [group.prompt] * len(ids)
    positions = batch_position_ids(rows, len(group.prompt), width).to(ids.device)
    with serve_media(group.family, group.model, rows):
        return group.model(**inputs, position_ids=positions).log_probs[:, -width:]


def _packed_log_probs(group: Group, cache: TowerCache | None) -> Tensor:
    rows, (count, width) = [group.prompt] * len(group.completions), group.completions.shape
    batch = pack(rows, group.completions, [width] * count)
    with serve_media(group.family, group.model, batch.prompts, packed=True, cache=cache):
        return packed_forward(group.model, group.core, batch, (count, width), group.attention).log_probs


def train(group: Group, side: str) -> Tensor:
    """Forward and backward of GRPO's loss on the policy's own completions; returns the log-probabilities."""
    group.model.zero_grad(set_to_none=True)
    values = log_probs(group, side)
    (-((values - values.detach()).exp() * group.advantages).mean()).backward()
    return values.detach()


def generate(group: Group, side: str, seed: int = 0) -> Tensor:
    """Samples a completion of R tokens for each of the G rows; not in train mode, where checkpointing keeps no cache."""
    was_training = group.model.training
    group.model.eval()
    try:
        return _generate(group, side, seed)
    finally:
        group.model.train(was_training)


def _generate(group: Group, side: str, seed: int) -> Tensor:
    torch.manual_seed(seed)
    ids, length = group.prompt_ids, group.completions.size(1)
    rows = [group.prompt] * len(ids)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "generation_config": GenerationConfig(
            max_new_tokens=length,
            do_sample=True,
            top_k=0,
            suppress_tokens=group.family.suppressed_ids,
            pad_token_id=group.family.tokenizer.pad_token_id,
        ),
    }
    if side == "trl":
        output = group.model.generate(**inputs, **group.repeated_media())
    else:
        inputs["position_ids"] = generation_position_ids(rows, len(group.prompt)).to(ids.device)
        if side == "rows":
            alone = nullcontext() if group.whole_prefill else last_position_alone(group.core)
            with alone, serve_media(group.family, group.model, rows):
                output = group.model.generate(**inputs)
        else:
            cache = group.cache if side == "cached" else None
            with (
                share_prefill(group.core, rows),
                serve_media(group.family, group.model, rows[:1], cache=cache),
            ):
                output = group.model.generate(**inputs)
    return output[:, len(group.prompt) :]


def encode(group: Group, side: str) -> Tensor:
    """What the towers make of the prompt's media, for all of its rows or once; shape (tokens, hidden)."""
    features = []
    for kind in group.prompt.kinds:
        if side == "cached":
            known = group.cache.features(group.family, group.core, kind, [group.prompt])
        else:
            copies = len(group.completions) if side == "trl" else 1
            known = run_tower(group.family, group.core, kind, [replace(group.prompt) for _ in range(copies)])
        features.append(known[0]["tokens"])
    return torch.cat(features)


PASSES: dict[str, Callable[[Group, str], Tensor]] = {
    "train": train,
    "log_probs": torch.no_grad()(log_probs),
    "generate": torch.no_grad()(generate),
    "encode": torch.no_grad()(encode),
}


def operations(group: Group, name: str, side: str, trains_towers: bool, checkpointing: bool) -> float:
    """
    Of a pass; of a side of ours the fewest that sharing can need, not those that it makes.

    A backward pass takes twice those of the forward pass; gradient checkpointing makes the forward pass once more.
    """
    config, prompt, (count, length) = group.model.config, len(group.prompt), group.completions.shape
    media = MEDIA_PER_SIDE[side]
    media = count if media is None else media
    towers = media * sizes.tower_operations(config, group.prompt)
    if name == "encode":
        return towers
    if name == "generate":
        return towers + sizes.language_operations(config, generation_work(prompt, length, count, shared=side in OURS))
    work = (shared_work if side in OURS else plain_work)(prompt, length, count)
    backward = (3 + checkpointing) if name == "train" else 1
    return (backward if trains_towers else 1) * towers + backward * sizes.language_operations(config, work)
