"""Sampling options of a run, as vLLM names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


_NAMES = {"stop_strings": "stop", "min_new_tokens": "min_tokens"}
"""Options of `generate()` that vLLM has under another name."""

_KNOWN = ("bad_words", "frequency_penalty", "logit_bias", "min_tokens", "presence_penalty", "seed", "stop")
_NEVER = -100.0
OWN_ENGINE_OPTIONS = frozenset(
    (
        "model",
        "load_format",
        "dtype",
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "max_model_len",
        "max_num_seqs",
    )
    + (
        "enable_sleep_mode",
        "distributed_executor_backend",
        "logprobs_mode",
        "seed",
        "trust_remote_code",
        "quantization",
    )
)
"""Arguments of the engine that a trainer sets itself."""


def vllm_options(further: Mapping[str, Any], suppressed: Sequence[int], ends: Sequence[int]) -> dict[str, Any]:
    """
    Return what vLLM's `SamplingParams` are given beside the options that TRL passes on.

    Args:
        further: `generation_kwargs`, by the names of `generate()` or of vLLM.
        suppressed: ids of tokens that are not to be sampled.
        ends: ids of tokens that end a completion.

    Raises:
        ValueError: for an option that vLLM lacks, naming it.
    """
    options: dict[str, Any] = {}
    never = set(suppressed)
    for name, value in further.items():
        if name == "suppress_tokens":
            never |= set(value or ())
        elif _NAMES.get(name, name) in _KNOWN:
            options[_NAMES.get(name, name)] = value
        else:
            raise ValueError(
                f"generation_kwargs: vLLM rollouts do not know {name!r}; they know {', '.join(sorted({*_KNOWN, *_NAMES}))} "
                "and suppress_tokens (use_vllm=False takes the options of generate())"
            )
    bias = {int(token): float(value) for token, value in (options.get("logit_bias") or {}).items()}
    return options | {
        "logit_bias": bias | dict.fromkeys(sorted(never), _NEVER),
        "stop_token_ids": sorted(set(ends)),
    }
