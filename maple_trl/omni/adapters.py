"""LoRA adapters, also those that were trained on a whole Omni model, put on the Thinker that is loaded here."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME, cached_file

from maple_trl.omni.checkpoints import SPEECH, CheckpointError, check_hub_id, hub_is_silent, names_in
from maple_trl.omni.layouts import RENAMINGS, name_in_class
from maple_trl.omni.loading import BUILTIN_PREFIX, load_model, load_processor


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


logger = logging.getLogger(__name__)

_BESIDE = ("*token*.json", "vocab.json", "merges.txt", "*processor_config.json", "chat_template.*")  # of its processor
_REACHING = {
    "megatron_config": "import the module that megatron_core names",
    "adapters": "fetch other adapters by their names",
    "tokenizer_name_or_path": "fetch a tokenizer by its name",
}
"""Fields of an adapter's config by which more than its own weights would be read."""

_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)\.(?P<part>lora_\w+)(?:\.weight)?")
_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.(?P<leaf>\w+)$")


def load_adapter(model: PreTrainedModel, folder: str, trainable: bool = False) -> PeftModel:
    """
    Put a LoRA adapter on a model, every weight of it.

    On a Thinker its names may be those of a Thinker or of a whole Omni model, of any release of transformers. What it says of
    the layers that it is on is not asked: it is on those that it has weights for.

    Args:
        trainable: whether it is trained on.

    Raises:
        CheckpointError: when its weights are pickled, one of them belongs to no layer of the model, or some are missing.
    """
    from peft import PeftModel

    file = Path(folder, ADAPTER_SAFE_WEIGHTS_NAME)
    if not file.is_file():
        pickle = Path(folder, ADAPTER_WEIGHTS_NAME)
        pickled = f" Pickled ones ({pickle.name}) are not read, since that can run code" if pickle.is_file() else ""
        raise CheckpointError(
            f"{folder} holds no weights of an adapter: there is no {ADAPTER_SAFE_WEIGHTS_NAME}.{pickled}"
        )
    names = names_in(file)
    config = read_adapter_config(folder)
    places: dict[str, str] = {}
    options: dict[str, Any] = {}
    # Of other models, and of parameters that are no layer, the names are PEFT's business.
    if _is_of_layers(config) and model.config.model_type.endswith("_thinker"):
        places = _places(type(model).__name__, dict(model.named_modules()), folder, names)
        options = {"key_mapping": RENAMINGS}
        _check_whole(config, places, model, folder)
        _retarget(config, places)
    with warnings.catch_warnings():
        # PEFT only warns, and an adapter would be half there.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config, **options)
        except UserWarning as error:
            raise CheckpointError(str(error)) from error
        except (RuntimeError, TypeError) as error:  # of which PyTorch tells each weight
            first, *others = [line.strip() for line in str(error).splitlines() if "state_dict for" not in line]
            more = f" ({len(others)} more of the kind)" if others else ""
            raise CheckpointError(
                f"{folder}: {first}{more}: its {ADAPTER_CONFIG_NAME} is of another adapter than its weights, or it was trained on another model"
            ) from error
    _check_values(adapted, file, places)
    if config.peft_type == "LORA" and not places:
        _check_count(adapted, file, names)
    return adapted


def read_adapter_config(folder: str) -> PeftConfig:
    """
    Read what an adapter says of itself.

    Raises:
        CheckpointError: when it is damaged, of a kind that PEFT does not know, or names what PEFT would import or fetch.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{Path(folder, ADAPTER_CONFIG_NAME)} cannot be read: {type(error).__name__}: {error}"
        ) from error
    for option, what in _REACHING.items():
        if getattr(config, option, None):
            raise CheckpointError(
                f"{Path(folder, ADAPTER_CONFIG_NAME)} has {option}, by which PEFT would {what}: it is not read"
            )
    return config


def fetch_adapter(name: str, revision: str = "main") -> str | None:
    """
    Return the folder of an adapter, fetched from the Hub where it is not on this machine; `None` where `name` is none.

    Raises:
        CheckpointError: when `name` is neither a folder nor a Hub id.
    """
    if os.path.exists(name):
        return name if Path(name, ADAPTER_CONFIG_NAME).is_file() else None
    check_hub_id(name, "model")
    hub: dict[str, Any] = {"revision": revision, "local_files_only": hub_is_silent() is not None}
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(name, ADAPTER_CONFIG_NAME, **lenient, **hub) is None:
        return None
    return snapshot_download(name, allow_patterns=[ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, *_BESIDE], **hub)


def adapted_model(folder: str, written: str) -> str:
    """
    Return the model that an adapter was trained on, by the name in its config.

    A trainer of the Thinker alone writes the name that the Thinker has within the full model: NAME/thinker.

    Raises:
        CheckpointError: when the config names the Thinker of a model that can only be guessed.
    """
    whole = written.removesuffix("/thinker")
    if whole == written or os.path.isdir(written):
        return written
    if os.path.isdir(whole) or "/" in whole:
        return whole
    raise CheckpointError(
        f"{Path(folder, ADAPTER_CONFIG_NAME)} says that the adapter was trained on {written!r}, the Thinker of a model without its owner: "
        f"write the full model there (base_model_name_or_path, e.g. Qwen/{whole}), or name both, --model Qwen/{whole} --adapter "
        f"{folder}"
    )


def adapter_folder(name: str, revision: str = "main") -> str | None:
    """
    Return the folder of the adapter that a name stands for, fetched where it has to be; `None` where it is a whole model.

    Raises:
        CheckpointError: when the name is neither a folder nor a Hub id.
    """
    folder = None if name.startswith(BUILTIN_PREFIX) else fetch_adapter(name, revision)
    return None if folder is None or Path(folder, "config.json").is_file() else folder


def load_whole(
    name: str, base_model: str | None = None, revision: str = "main", **options: Any
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin | PreTrainedTokenizerBase]:
    """
    Load a model, or an adapter on the model that it was trained on, and the processor that belongs to it.

    Args:
        name: a folder, a Hub id, or `builtin:NAME`.
        base_model (`str`, *optional*): what an adapter is put on, where it does not say that itself.
        revision: of `name` on the Hub.
        options: as of [`~maple_trl.omni.loading.load_model`].

    Raises:
        CheckpointError: when there is no such model, it is damaged, or what an adapter belongs to is not known.
    """
    folder = adapter_folder(name, revision)
    if folder is None:
        return load_model(name, revision=revision, **options), load_processor(name, revision=revision)
    written = base_model or read_adapter_config(folder).base_model_name_or_path
    if not written:
        raise CheckpointError(
            f"{name} does not say which model the adapter belongs to (base_model_name_or_path): name that model"
        )
    whole = adapted_model(folder, written)
    if not whole.startswith(BUILTIN_PREFIX) and not os.path.exists(whole):
        try:
            check_hub_id(whole, "model")
        except CheckpointError as error:
            raise CheckpointError(
                f"{name} is an adapter for {whole}, which is not here: name that model ({error})"
            ) from error
    model = load_model(whole, **options)
    processor = load_processor(folder if processor_beside(folder) else whole)
    return load_adapter(model, folder), processor


def processor_beside(folder: str | None) -> bool:
    """Return whether a processor of media was saved with an adapter; some trainers save the tokenizer alone."""
    files = ("processor_config.json", "preprocessor_config.json")
    return (
        folder is not None
        and Path(folder, "tokenizer_config.json").is_file()
        and any(Path(folder, file).is_file() for file in files)
    )


def _is_of_layers(config: Any) -> bool:
    return config.peft_type == "LORA" and not getattr(config, "target_parameters", None)


def _places(architecture: str, modules: Collection[str], folder: str, names: list[str]) -> dict[str, str]:
    """Return for each weight of an adapter the module of the Thinker that it is on; other weights than LoRA's have none."""
    found: dict[str, str] = {}
    spoken: list[str] = []
    foreign: list[str] = []
    for name in names:
        match = _KEY.fullmatch(name)
        if match is None:
            if not name.startswith("base_model.model.") or name.startswith("base_model.model.thinker."):
                foreign.append(name)
            continue
        module = match["module"]
        if module.startswith(SPEECH):
            spoken.append(name)
        elif name_in_class(module) in modules or _EXPERT.search(module):
            found[name] = name_in_class(module)
        else:
            foreign.append(name)
    if foreign or not found:
        what = f"e.g. {foreign[0]!r}" if foreign else "it has none for it"
        raise CheckpointError(
            f"{folder}: {len(foreign)} of the {len(names)} weights of this adapter fit no layer of {architecture}, "
            f"{what}: it was trained on another model"
        )
    if spoken:
        logger.info("%s: %d weights for parts that speak are not read", folder, len(spoken))
    return found


def _check_whole(config: PeftConfig, places: Mapping[str, str], model: nn.Module, folder: str) -> None:
    """
    Raise CheckpointError where a linear layer that an adapter names has no weights.

    An adapter that picks its layers by an expression or by numbers may leave some out.
    """
    asked: Any = config
    if isinstance(asked.target_modules, str) or asked.exclude_modules or asked.layers_to_transform is not None:
        return
    held = {module for module in places.values() if not _EXPERT.search(module)}
    targets = {name for target in asked.target_modules or () for name in (target, name_in_class(target))}
    ends = tuple(f".{target}" for target in targets)
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    lacking = sorted(name for name in linear if f".{name}".endswith(ends) and name not in held)
    if lacking:
        raise CheckpointError(
            f"{folder}: its weights are not all there: {len(lacking)} layers have none, e.g. {lacking[0]!r}. Copy it again"
        )


def _retarget(config: PeftConfig, places: Mapping[str, str]) -> None:
    """Name in the config the modules as they are called in the model; experts, which are fused there, by their last name."""
    experts = {match["leaf"] for module in places.values() if (match := _EXPERT.search(module))}
    whole = {module for module in places.values() if not _EXPERT.search(module)}
    fields: Any = config
    fields.target_modules = whole | experts
    fields.exclude_modules = fields.layers_to_transform = fields.layers_pattern = None
    for pattern in ("rank_pattern", "alpha_pattern"):
        setattr(
            fields, pattern, {name_in_class(key): value for key, value in (getattr(fields, pattern) or {}).items()}
        )


def _check_values(adapted: PeftModel, file: Path, places: Mapping[str, str]) -> None:
    """Raise CheckpointError where a weight of the file has not arrived; fused experts have no weight of that name."""
    state = adapted.state_dict()
    with safe_open(file, framework="pt") as opened:
        for name, module in places.items():
            match = _KEY.fullmatch(name)
            if match is None or _EXPERT.search(module):
                continue
            place = f"base_model.model.{module}.{match['part']}.default"
            loaded = state.get(f"{place}.weight", state.get(place))  # an embedding's has no further name
            written = opened.get_tensor(name)
            if not written.isfinite().all():
                raise CheckpointError(f"{file}: {name!r} has numbers that are not finite: the adapter is spoilt")
            partitioned = loaded is not None and not loaded.numel()  # by ZeRO-3
            if loaded is None or not (partitioned or torch.equal(loaded.cpu(), written.to(loaded.dtype))):
                raise CheckpointError(f"{file}: {name!r} did not reach {module}")


def _check_count(adapted: PeftModel, file: Path, names: Collection[str]) -> None:
    """Raise CheckpointError where the file has more weights of LoRA than the model took: PEFT passes over the others."""
    held = [name for name in names if ".lora_" in name]
    taken = [name for name in adapted.state_dict() if re.search(r"\.lora_\w+\.default\b", name)]
    if len(held) > len(taken) and not any(_EXPERT.search(name.partition(".lora_")[0]) for name in held):
        raise CheckpointError(
            f"{file}: {len(held)} weights of LoRA, e.g. {held[0]!r}, of which the model took {len(taken)}: its layers have other "
            "names, or target_modules in its config names fewer"
        )
