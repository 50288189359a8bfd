"""Loads omni models, the Thinker alone where a checkpoint holds more."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.core_model_loading import WeightRenaming
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from maple_trl.omni.checkpoints import (
    ELSEWHERE,
    PROCESSOR,
    CheckpointError,
    check_weights,
    commit_of,
    reach,
    read_config,
)
from maple_trl.omni.families import family_class
from maple_trl.omni.generation import TOKENS
from maple_trl.omni.layouts import check_names, check_thinker, tell_unread, thinker_files
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
THINKERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
THINKERS |= {f"{kind}_thinker": name for kind, name in THINKERS.items()}
_FILE_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")
_ASSETS = Path(__file__).resolve().parents[1] / "assets"


def resolve_checkpoint(name_or_path: str) -> str:
    """
    Return the folder of an embedded model (`builtin:tiny-omni`), or `name_or_path` unchanged.

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
    """Pick of `kwargs`, a model's `from_pretrained` arguments, those that its config and processor take as well."""
    return {name: kwargs[name] for name in ("trust_remote_code", *_FILE_ARGUMENTS) if name in kwargs}


def _file_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Pick those that say where and in which state a file is found on the Hub."""
    return {name: kwargs[name] for name in _FILE_ARGUMENTS if name in kwargs}


def load_model(
    name_or_path: str, dtype: str | torch.dtype = "float32", quantize_towers: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """
    Load the class that can be trained.

    Of an Omni checkpoint that is the Thinker, in whatever layout (`layouts.py`; its talker and vocoder are neither read
    nor kept in memory), else the architecture that the checkpoint names.

    Args:
        name_or_path (`str`): a folder, a Hub id, or `builtin:NAME`.
        dtype (`str` or `torch.dtype`): precision of the weights, e.g. `"bfloat16"`.
        quantize_towers (`bool`): with `quantization_config`, quantize towers and projectors too.
        kwargs: passed to `from_pretrained`. `trust_remote_code` is False unless given. Of an omni model a
            `quantization_config` quantizes the language model alone, unless it lists what to leave.

    Raises:
        ValueError: when weights of the model are missing from the checkpoint, or pickled, or of another model, naming
            them; or when nothing was quantized.
        CheckpointError: when the checkpoint's configuration names no class.
        ImportError: for a `quantization_config` without bitsandbytes.
    """
    path = resolve_checkpoint(name_or_path)
    if Path(path, ADAPTER_CONFIG_NAME).exists() and not Path(path, CONFIG_NAME).exists():
        raise ValueError(
            f"{name_or_path} holds a LoRA adapter, not a model: merge it into its base model and save that "
            "(`PeftModel.from_pretrained(base, adapter).merge_and_unload()`)"
        )
    kwargs.setdefault("trust_remote_code", False)
    kwargs |= reach(path, hub_arguments(kwargs))
    commit = commit_of(path, _file_arguments(kwargs))
    if commit is not None:
        kwargs["revision"] = commit  # all files are of one state
    config = read_config(path, hub_arguments(kwargs))
    model_class = _class_of(config, name_or_path)
    architecture = model_class.__name__
    elsewhere = any(kwargs.get(argument) for argument in ELSEWHERE)
    is_thinker = config.model_type in THINKERS
    if is_thinker:
        kwargs["config"] = _thinker_config(config, path, hub_arguments(kwargs))
    if kwargs.get("attn_implementation") == "flex_attention" and not model_class._supports_flex_attn:
        raise ValueError(
            f"transformers computes {architecture} not with attn_implementation='flex_attention'. Load it with 'sdpa', the "
            "default; packed_attention='flex_attention' then computes with it the passes that share prompts"
        )
    dtype = _read_dtype(kwargs.pop("torch_dtype", dtype))  # its older name
    if kwargs.get("quantization_config") is not None:
        # Transformers would take that instead, with a warning.
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{name_or_path} was saved with weights of few bits, and is read as it was saved: leave load_in_4bit, load_in_8bit "
                "and quantization_config out"
            )
        kwargs["quantization_config"] = with_kept_parts(
            kwargs["quantization_config"], model_class, kwargs.get("config", config), quantize_towers
        )
    kwargs.setdefault("generation_config", _usable_generation_config(path, kwargs))
    kwargs.setdefault("use_safetensors", True)
    if os.path.isdir(path) and not elsewhere:
        check_weights(Path(path))
    if is_thinker:
        model = _load_thinker(model_class, path, name_or_path, dtype, kwargs)
    else:
        model, info = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{name_or_path}: {len(missing)} weights of {architecture} are not in the checkpoint, e.g. {missing[0]!r}"
            )
    model.config._commit_hash = commit
    _forget_unused_renamings(model)
    if is_quantized(model):
        settle(model)
    return model


def _class_of(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """Return the class that a checkpoint is loaded as: of an Omni model the Thinker's."""
    architecture = THINKERS.get(config.model_type) or (config.architectures or [""])[0]
    if not architecture:
        raise CheckpointError(
            f'{name}: its config.json names no class of transformers: it needs "architectures": [CLASS], as the model has that '
            "it was trained from"
        )
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(f"{name}: transformers has no architecture {architecture!r}")
    return model_class


def _read_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return a precision by its name; `auto` stays what it is."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r} is unknown; e.g. 'float32', 'bfloat16', 'float16' or 'auto'")
    return getattr(torch, dtype)


def _thinker_config(config: PreTrainedConfig, path: str, hub: Mapping[str, Any]) -> PreTrainedConfig:
    """
    Return the config of the Thinker of a full Omni model, or of a Thinker alone.

    Older releases of transformers asked the language model's config whether the head is tied, today's asks the Thinker's.
    """
    thinker: PreTrainedConfig = getattr(config, "thinker_config", config)
    written, _ = PreTrainedConfig.get_config_dict(path, **hub)
    written = written.get("thinker_config", written)
    for part in ("text_config", "vision_config", "audio_config"):
        # Without it the class would be of a size of its own: of 7 G weights, all drawn before the first is missed.
        if not isinstance(written, Mapping) or not isinstance(written.get(part), Mapping):
            raise CheckpointError(
                f"{path}: its config.json has no {part}, so that the model's size is not known; copy it from the model that "
                "it was trained from"
            )
    tied = written.get("text_config", {}).get("tie_word_embeddings")
    if tied is not None and "tie_word_embeddings" not in written:
        thinker.tie_word_embeddings = tied
    return thinker


def _load_thinker(
    model_class: type[PreTrainedModel], path: str, name: str, dtype: torch.dtype | str, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Load a Thinker, and raise CheckpointError for weights that are missing or of something else."""
    elsewhere = any(kwargs.get(argument) for argument in ELSEWHERE if argument != "config")
    hub = _file_arguments(kwargs)
    kwargs = {"ignore_mismatched_sizes": True} | kwargs  # which are refused below, by their names
    unknown: AbstractContextManager[tuple[str, list[str]]] = nullcontext((path, []))
    with unknown if elsewhere else thinker_files(path, hub, _offloads(kwargs)) as (source, names):
        check_names(name, names)
        model, info = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **kwargs)
    check_thinker(name, model, info, names)
    tell_unread(name, names)
    model.name_or_path = model.config._name_or_path = path
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head.weight is not embedding.weight:
        # Or who ties the weights again (PEFT, accelerate) would overwrite the head.
        model.config.tie_word_embeddings = False
    return model


def _offloads(kwargs: Mapping[str, Any]) -> bool:
    """Return whether weights may stay on disk, to be read from their files whenever they are computed with."""
    places = kwargs.get("device_map")
    if isinstance(places, Mapping):
        return "disk" in places.values()
    return bool(kwargs.get("offload_folder")) or places in ("auto", "balanced", "balanced_low_0", "sequential")


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
    hub = _file_arguments(kwargs)
    try:
        GenerationConfig.from_pretrained(path, **hub)
    except OSError:  # there is none, or it cannot be reached, which reading the model will tell
        return None
    except (ValueError, TypeError, AttributeError) as error:
        file = Path(cached_file(path, GENERATION_CONFIG_NAME, **hub))
        options = json.loads(file.read_text(encoding="utf-8"))
        tokens = {name: options[name] for name in TOKENS if name in options}
        logger.warning("%s: of its %s only the tokens are used: %s", path, GENERATION_CONFIG_NAME, error)
        return GenerationConfig(**tokens)
    return None


def load_processor(name_or_path: str, **kwargs: Any) -> ProcessorMixin | PreTrainedTokenizerBase:
    """
    Load the processor of a checkpoint (of a text model its tokenizer), padding on the left for generation.

    Args:
        name_or_path (`str`): a folder, a Hub id, or `builtin:NAME`.
        kwargs: passed to `from_pretrained`. `trust_remote_code` is False unless given.

    Raises:
        CheckpointError: when a model that reads media has no processor of media beside it, or no chat template.
    """
    path = resolve_checkpoint(name_or_path)
    options = reach(path, kwargs)
    try:
        processor = AutoProcessor.from_pretrained(path, **{"trust_remote_code": False, **options})
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and not os.path.isdir(path):
            raise  # the Hub's
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}; {PROCESSOR}") from error
    _check_processor(processor, path, options)
    tokenizer = getattr(processor, "tokenizer", processor)
    # Not as arguments above: there they would reach the audio feature extractor as well.
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    if getattr(processor, "chat_template", None) is None:  # Phi-4's does not read the one that stands beside it
        processor.chat_template = tokenizer.chat_template
    return processor


def _check_processor(processor: Any, path: str, options: Mapping[str, Any]) -> None:
    if not isinstance(processor, ProcessorMixin):
        kind = read_config(path, hub_arguments(options)).model_type
        if family_class(kind) is not None or family_class(f"{kind}_thinker") is not None:
            raise CheckpointError(
                f"{path} holds a tokenizer, but not the processor of media that a model of type {kind!r} needs; {PROCESSOR}"
            )
    elif getattr(processor, "chat_template", None) is None and processor.tokenizer.chat_template is None:
        raise CheckpointError(f"the processor in {path} has no chat template; {PROCESSOR}")


def check_tokens(processor: Any, config: PreTrainedConfig, name: str) -> None:
    """
    Check that a processor from elsewhere has the tokens for media that the model has.

    Args:
        processor: what was loaded.
        config: the model's, or that of its full checkpoint.
        name (`str`): where the processor is from, for the message.

    Raises:
        CheckpointError: when a token has another number than in the model's configuration.
    """
    config = getattr(config, "thinker_config", config)
    for kind in ("image", "video", "audio"):
        token = getattr(processor, f"{kind}_token", None)
        wanted = getattr(config, f"{kind}_token_id", None) or getattr(config, f"{kind}_token_index", None)
        found = None if token is None else processor.tokenizer.convert_tokens_to_ids(token)
        if None not in (wanted, found) and wanted != found:
            raise CheckpointError(
                f"the processor in {name} is of another model: its token {token!r} is {found}, the model's for {kind} is {wanted}"
            )
