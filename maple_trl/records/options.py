"""
Which options decide a result.

A field of a configuration that decides none says so in its type, as `media_workers: Annotated[int, "speed"]`:

- `"speed"`: how fast, how safely and within which limits of the machine;
- `"place"`: where things are, and what is told about them.

Every other one decides what is learned or measured. What goes on after a stop, is taken from a cache or compared with
something earlier asks here whether an option has to be the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from functools import cache
from typing import Any, get_type_hints


# Fields of TRL and transformers that decide no result. One that is not named here does, also one that a later version adds.
INHERITED = {
    "speed": {
        *("activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading"),
        *("dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_persistent_workers"),
        *(
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "dataset_num_proc",
            "ddp_bucket_cap_mb",
            "ddp_timeout",
        ),
        *("ds3_gather_for_generation", "enable_jit_checkpoint", "eval_accumulation_steps", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "skip_memory_metrics", "torch_empty_cache_steps"),
        *("vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_server_timeout"),
        "generation_batch_size",  # what follows from the other sizes of a batch
    },
    "place": {
        *("debug", "disable_tqdm", "do_eval", "do_predict", "do_train", "eval_delay", "eval_do_concat_batches"),
        *("eval_on_start", "eval_packing", "eval_steps", "eval_strategy", "eval_use_gather_object", "hub_always_push"),
        *("hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token", "include_for_metrics"),
        *("include_num_input_tokens_seen", "local_rank", "log_completions", "log_completions_hub_repo", "log_level"),
        *("log_level_replica", "log_multimodal", "log_on_each_node", "log_unique_prompts", "logging_first_step"),
        *("logging_nan_inf_filter", "logging_steps", "logging_strategy", "num_completions_to_print", "output_dir"),
        *("project", "push_to_hub", "report_to", "resume_from_checkpoint", "run_name", "save_on_each_node"),
        *("save_only_model", "save_steps", "save_strategy", "save_total_limit", "trackio_bucket_id"),
        *("trackio_space_id", "trackio_static_space_id", "vllm_group_port", "vllm_server_base_url"),
        *("vllm_server_host", "vllm_server_port"),
    },
}


@cache
def not_deciding(config: type) -> dict[str, str]:
    """Return the options of a dataclass that decide no result, by name: `"speed"` or `"place"`."""
    inherited = {name: kind for kind, names in INHERITED.items() for name in names}
    types = get_type_hints(config, include_extras=True)
    said = {
        name: kind for name, kept in types.items() for kind in getattr(kept, "__metadata__", ()) if kind in INHERITED
    }
    kinds = inherited | said
    return {field.name: kinds[field.name] for field in fields(config) if field.name in kinds}


def deciding(config: Any, declared_by: type | None = None) -> dict[str, Any]:
    """
    Return the options that decide a result, by name.

    Args:
        config: a dataclass instance.
        declared_by (`type`, *optional*): only those that this dataclass knows.
    """
    names = [field.name for field in fields(declared_by or config)]
    return {name: getattr(config, name) for name in names if name not in not_deciding(config.__class__)}


def chosen(config: Any) -> dict[str, Any]:
    """Return the options of a dataclass that decide a result, are not the default, and can be written in a file, by name."""
    kept = deciding(config)
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(config)
    }
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in kept.items()}
    return {name: value for name, value in plain.items() if value != defaults[name] and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


KEY_NAMES = (
    *("api_key", "key", "token", "secret", "password", "authorization", "bearer", "credential", "pwd", "passwd"),
    *("passphrase", "cookie"),
)
"""Ends of the names under which people write keys; their values are shown and kept nowhere."""

# And of those for several at once, in a list or by names of their own; `tokens` and `keys` alone are also other things.
_SEVERAL = ("credentials", "secrets", "passwords", "api_keys", "apikeys", "access_keys", "secret_keys", "auth_tokens")
_HIDDEN = "<hidden>"
_IN_URL = re.compile(
    rf"(?P<name>[?&](?:[\w.-]*?(?:{'|'.join((*KEY_NAMES, *_SEVERAL))}|signature|sig))=)[^&#\s\"']+", re.IGNORECASE
)


def is_key(name: str, value: Any) -> bool:
    """Return whether an option holds a key, or several, by its name."""
    name = name.lower().replace("-", "_")
    if isinstance(value, str):
        return name.endswith((*KEY_NAMES, *_SEVERAL))
    return isinstance(value, Mapping | list | tuple) and bool(value) and name.endswith(_SEVERAL)


def without_keys(value: Any) -> Any:
    """Return options with keys hidden, and those in addresses: `https://USER:KEY@HOST` and `https://HOST/?api_key=KEY`."""
    if isinstance(value, Mapping):
        return {name: _HIDDEN if is_key(str(name), item) else without_keys(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_keys(item) for item in value]
    if not isinstance(value, str) or "://" not in value:
        return value
    return _IN_URL.sub(rf"\g<name>{_HIDDEN}", re.sub(r"(?<=://)[^/@\s]+@", f"{_HIDDEN}@", value))
