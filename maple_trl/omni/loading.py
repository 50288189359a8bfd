"""Loads omni models, the Thinker alone where a checkpoint holds more."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.core_model_loading import WeightRenaming
from transformers.utils import cached_file

from maple_trl.omni.checkpoints import reach, read_config
from maple_trl.omni.generation import TOKENS
from maple_trl.omni.quantization import is_quantized, settle, with_kept_parts


# TRL 1.16 and PEFT use names of models that transformers 5.23 deprecates; who trains can do nothing about it.
warnings.filterwarnings(
    "ignore",
    r"`(is_gradient_checkpointing|gradient_checkpointing_(enable|disable))` is deprecated",
    FutureWarning,
    r"transformers\.modeling_utils",
)

logger = logging.getLogger(__name__)

BUILTIN_PREFIX = "builtin:"
_THINKERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
_HUB_ARGUMENTS = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only")
_ASSETS = Path(__file__).resolve().parents[1] / "assets"


def resolve_checkpoint(name_or_path: str) -> str:
    """
    Return the folder of an embedded model (`builtin:tiny-omni`), or the name unchanged.

    Raises:
        ValueError: when no embedded model has this name.
    """
    if not name_or_path.startswith(BUILTIN_PREFIX):
        return name_or_path
    folder = _ASSETS / name_or_path.removeprefix(BUILTIN_PREFIX)
    if not (folder / "config.json").is_file():
        known = sorted(BUILTIN_PREFIX + path.parent.name for path in _ASSETS.glob("*/config.json"))
        raise ValueError(f"There is no embedded model {name_or_path!r}; embedded: {', '.join(known) or 'none'}")
    return str(folder)


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Pick those arguments of a model's `from_pretrained` that its config and processor take as well."""
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}


def load_model(
    name_or_path: str, dtype: str | torch.dtype = "float32", quantize_towers: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """
    Load the class that can be trained.

    Of an Omni checkpoint that is the Thinker (its talker and vocoder are neither read nor kept in memory), else the
    architecture that the checkpoint names.

    Args:
        name_or_path (`str`): a folder, a Hub id, or `builtin:NAME`.
        dtype (`str` or `torch.dtype`): precision of the weights, e.g. `"bfloat16"`.
        quantize_towers (`bool`): with `quantization_config`, quantize towers and projectors too.
        kwargs: passed to `from_pretrained`. `trust_remote_code` is False unless given. Of an omni model a
            `quantization_config` quantizes the language model alone, unless it lists what to leave.

    Raises:
        ImportError: for a `quantization_config` without bitsandbytes.
        ValueError: when weights of the model are missing from the checkpoint, naming them, or nothing was quantized.
    """
    path = resolve_checkpoint(name_or_path)
    if os.path.exists(os.path.join(path, "adapter_config.json")) and not os.path.exists(
        os.path.join(path, "config.json")
    ):
        raise ValueError(
            f"{name_or_path} holds a LoRA adapter, not a model: merge it into its base model and save that "
            "(`PeftModel.from_pretrained(base, adapter).merge_and_unload()`)"
        )
    kwargs |= reach(path, hub_arguments(kwargs))
    config = read_config(path, hub_arguments(kwargs))
    architecture = _THINKERS.get(config.model_type) or (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(f"{name_or_path}: transformers has no architecture {architecture!r}")
    if config.model_type in _THINKERS:
        kwargs["config"] = config.thinker_config
    if kwargs.get("attn_implementation") == "flex_attention" and not model_class._supports_flex_attn:
        raise ValueError(
            f"transformers computes {architecture} not with attn_implementation='flex_attention'. Load it with 'sdpa', the "
            "default; packed_attention='flex_attention' then computes with it the passes that share prompts"
        )
    dtype = kwargs.pop("torch_dtype", dtype)  # its older name
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype {dtype!r} is unknown; e.g. 'float32', 'bfloat16', 'float16' or 'auto'")
        dtype = getattr(torch, dtype)
    if kwargs.get("quantization_config") is not None:
        own = config.thinker_config if config.model_type in _THINKERS else config
        kwargs["quantization_config"] = with_kept_parts(
            kwargs["quantization_config"], model_class, own, quantize_towers
        )
    kwargs.setdefault("generation_config", _usable_generation_config(path, kwargs))
    model, info = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name_or_path}: {len(missing)} weights of {architecture} are not in the checkpoint, e.g. {missing[0]!r}"
        )
    _forget_unused_renamings(model)
    if is_quantized(model):
        settle(model)
    return model


def _forget_unused_renamings(model: PreTrainedModel) -> None:
    """
    Keep the names with which a model is saved those with which it was loaded.

    Under ZeRO-3 transformers notes all ways to read a checkpoint instead of those that it has used, and reverts them all.
    """
    noted = getattr(model, "_weight_conversions", None)
    if noted:
        model._weight_conversions = [
            entry for entry in noted if entry.was_used() or not isinstance(entry, WeightRenaming)
        ]


def _usable_generation_config(path: str, kwargs: Mapping[str, Any]) -> GenerationConfig | None:
    """Return the tokens of a `generation_config.json` that the library refuses to read; `None` for any other."""
    hub = hub_arguments(kwargs)
    hub.pop("trust_remote_code", None)
    try:
        GenerationConfig.from_pretrained(path, **hub)
    except OSError:  # there is none, or it cannot be reached, which reading the model will tell
        return None
    except (ValueError, TypeError, AttributeError) as error:
        file = Path(cached_file(path, "generation_config.json", **hub))
        options = json.loads(file.read_text(encoding="utf-8"))
        tokens = {name: options[name] for name in TOKENS if name in options}
        logger.warning("%s: of its generation_config.json only the tokens are used: %s", path, error)
        return GenerationConfig(**tokens)
    return None


def load_processor(name_or_path: str, **kwargs: Any) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load the processor of a checkpoint (of a text model its tokenizer), padding on the left for generation."""
    path = resolve_checkpoint(name_or_path)
    processor = AutoProcessor.from_pretrained(path, **reach(path, kwargs))
    tokenizer = getattr(processor, "tokenizer", processor)
    # Not as arguments above: there they would reach the audio feature extractor as well.
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    return processor
