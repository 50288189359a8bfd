"""
What vLLM knows of the model families here, and the models that it is taught.

vLLM finds [`register`] through an entry point, in each of its processes. Its models compute the rotary positions of a prompt
themselves, in whole numbers and from other facts than a trainer has; ours take those that the prompt brings along.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


POSITIONS = "trainer_positions"
"""The field of a clip that holds the positions of its prompt."""


@dataclass(frozen=True)
class EngineModel:
    """
    A family as vLLM serves it.

    Attributes:
        name: vLLM's own architecture.
        module: where that is.
        wrapped_in: `model_type` of the checkpoint whose part the trained model is, for families of which vLLM knows the
            whole alone.
        renamed: patterns of parameters' names, and what published checkpoints have in their place.
        switched_off: arguments of the engine that must be false.
        reloads_on_cpu: whether vLLM's CPU build computes with weights that came after its start.
    """

    name: str
    module: str
    wrapped_in: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    switched_off: tuple[str, ...] = ()
    reloads_on_cpu: bool = True

    @property
    def architecture(self) -> str:
        """The name under which our own subclass is registered, which leaves vLLM's alone."""
        return f"Maple{self.name}"


MEDIA_PER_PROMPT = {"image": 16, "video": 16, "audio": 16}
"""Pictures, clips and sounds of a prompt, at most."""

_THINKER = (
    (r"^model\.(audio_tower|visual)\.", r"thinker.\1."),
    (r"^model\.language_model\.", "thinker.model."),
    (r"^lm_head\.", "thinker.lm_head."),
)

ENGINE_MODELS = {
    "qwen2_5_omni_thinker": EngineModel(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "vllm.model_executor.models.qwen2_5_omni_thinker",
        "qwen2_5_omni",
        _THINKER,
    ),
    "qwen3_omni_moe_thinker": EngineModel(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "vllm.model_executor.models.qwen3_omni_moe_thinker",
        "qwen3_omni_moe",
        _THINKER,
        reloads_on_cpu=False,  # its experts are packed for a CPU when they are loaded first, and not again
    ),
    "qwen2_5_vl": EngineModel(
        "Qwen2_5_VLForConditionalGeneration",
        "vllm.model_executor.models.qwen2_5_vl",
        switched_off=("mm_device_do_normalize",),  # pictures have been normalised already
    ),
}
"""By `config.model_type` of the trained model."""


def engine_model(model_type: str, device: str = "cuda") -> EngineModel:
    """
    Return how vLLM serves a family.

    Args:
        device: where the engine computes.

    Raises:
        ValueError: where it is not known to.
    """
    if model_type not in ENGINE_MODELS:
        raise ValueError(
            f"use_vllm=True: vLLM rollouts are known for {', '.join(ENGINE_MODELS)}, not for {model_type!r}; generate with "
            "transformers (use_vllm=False)"
        )
    known = ENGINE_MODELS[model_type]
    if device == "cpu" and not known.reloads_on_cpu:
        raise ValueError(
            f"use_vllm=True: on a CPU vLLM goes on computing with the first weights of a {model_type}; generate with "
            "transformers (use_vllm=False)"
        )
    return known


def write_engine_folder(model: nn.Module, processor: Any, folder: Path) -> Path:
    """
    Write what an engine is started from, but for the weights: those come from the trainer.

    Args:
        model: without adapters and wrappers.
        folder: is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    if model.generation_config is not None:  # its end tokens alone: an engine takes sampling options from it
        ends = {"eos_token_id": model.generation_config.eos_token_id}
        (folder / "generation_config.json").write_text(json.dumps(ends))
    config = engine_config(json.loads(model.config.to_json_string(use_diff=False)))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def engine_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a trained model as an engine reads it."""
    known = engine_model(config["model_type"])
    part = dict(config)
    tied = bool(part.get("tie_word_embeddings", False))
    # vLLM reads some settings where checkpoints of transformers 5 do not repeat them.
    part["text_config"] = {"tie_word_embeddings": tied} | part["text_config"]
    if config["model_type"] == "qwen3_omni_moe_thinker":
        vision = part["vision_config"]
        side = int(vision["num_position_embeddings"] ** 0.5) * vision["patch_size"]
        part["vision_config"] = {"image_size": side, "apply_vit_abs_pos_embed": True} | vision
    if known.wrapped_in is None:
        return part | {"architectures": [known.architecture]}
    return {
        "model_type": known.wrapped_in,
        "architectures": [known.architecture],
        "thinker_config": part,
        "enable_audio_output": False,
        "dtype": config.get("dtype"),
        "tie_word_embeddings": tied,
    }


def engine_weights(
    weights: Iterable[tuple[str, Tensor]], known: EngineModel, tied: str | None
) -> Iterator[tuple[str, Tensor]]:
    """
    Name weights as published checkpoints do, which is what engines read.

    Args:
        weights: names and values as the trained model has them.
        tied: the name of the embedding that is the head as well, which an engine is to be told of; `None` where they are
            two.
    """
    for name, value in weights:
        for part, tensor in _split_experts(name, value):
            yield _renamed(part, known), tensor
        if name == tied:
            yield _renamed("lm_head.weight", known), value


def _split_experts(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield fused experts one by one."""
    if name.endswith("mlp.experts.gate_up_proj"):
        for i, expert in enumerate(value):
            for part, weight in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                yield name.replace("gate_up_proj", f"{i}.{part}.weight"), weight
    elif name.endswith("mlp.experts.down_proj"):
        for i, expert in enumerate(value):
            yield name.replace("down_proj", f"{i}.down_proj.weight"), expert
    else:
        yield name, value


def _renamed(name: str, known: EngineModel) -> str:
    for pattern, replacement in known.renamed:
        name = re.sub(pattern, replacement, name)
    return name


# In vLLM's processes


class TrainerPositions:
    """Takes the rotary positions that a prompt's clips bring along; a mixin of vLLM's models."""

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any], *args: Any, **kwargs: Any):
        """Return positions of shape (3, tokens), and how far they lag behind the number of tokens."""
        for feature in mm_features:
            if feature.data is not None and POSITIONS in feature.data:
                given = feature.data[POSITIONS].data.reshape(3, -1).long()
                # As in training, text goes on from the prompt's last position.
                last = given[:, -1].max()
                # More tokens than the prompt's: the completion of a request that was interrupted.
                later = last + 1 + torch.arange(len(input_tokens) - given.size(1))
                positions = torch.cat([given, later.expand(3, -1)], dim=1)
                return positions, int(last) + 1 - given.size(1)
        return super().get_mrope_input_positions(input_tokens, mm_features, *args, **kwargs)  # type: ignore[misc]


def register() -> None:
    """Teach vLLM our subclasses of its models, under names of their own."""
    from vllm import ModelRegistry

    for known in ENGINE_MODELS.values():
        ModelRegistry.register_model(known.architecture, f"{__name__}:{known.architecture}")


def __getattr__(name: str) -> type:
    known = next((known for known in ENGINE_MODELS.values() if known.architecture == name), None)
    if known is None:
        raise AttributeError(name)
    base = getattr(importlib.import_module(known.module), known.name)
    made = type(name, (TrainerPositions, base), {"__module__": __name__})
    globals()[name] = made
    return made
