"""Sampling options of a run, as vLLM names them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


_NAMES = {"stop_strings": "stop", "min_new_tokens": "min_tokens"}
"""Options of `generate()` that vLLM has under another name."""

_NEVER = -100.0
OWN_ENGINE_OPTIONS = frozenset(
    """
    model load_format dtype tensor_parallel_size pipeline_parallel_size data_parallel_size gpu_memory_utilization max_model_len
    max_num_seqs model_impl enable_sleep_mode distributed_executor_backend logprobs_mode seed trust_remote_code quantization
    """.split()
)
"""Arguments of the engine that a trainer sets itself."""


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)


def _is_penalty(value: Any) -> bool:
    return _is_number(value) and -2 <= value <= 2


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_biases(value: Any) -> bool:
    return isinstance(value, Mapping) and all(str(k).isdecimal() and _is_number(v) for k, v in value.items())


_KNOWN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bad_words": (_are_texts, "a list of texts"),
    "frequency_penalty": (_is_penalty, "a number from -2 to 2"),
    "logit_bias": (_are_biases, "a mapping of ids of tokens to numbers"),
    "min_tokens": (lambda value: type(value) is int and value >= 0, "a whole number of tokens"),
    "presence_penalty": (_is_penalty, "a number from -2 to 2"),
    "stop": (lambda value: _are_texts([value] if isinstance(value, str) else value), "a text or a list of texts"),
    "suppress_tokens": (
        lambda value: isinstance(value, list) and all(type(token) is int and token >= 0 for token in value),
        "a list of ids of tokens",
    ),
}
"""Options of vLLM's `SamplingParams`, and `suppress_tokens`: what they must be, and how that is said."""


def vllm_options(further: Mapping[str, Any], suppressed: Sequence[int], ends: Sequence[int]) -> dict[str, Any]:
    """
    Return what vLLM's `SamplingParams` are given beside the options that TRL passes on.

    Args:
        further: `generation_kwargs`, by the names of `generate()` or of vLLM.
        suppressed: ids of tokens that are not to be sampled.
        ends: ids of tokens that end a completion.

    Raises:
        ValueError: for an option that vLLM lacks or a value that it would refuse, naming it.
    """
    options: dict[str, Any] = {}
    for given, value in further.items():
        name = _NAMES.get(given, given)
        if name not in _KNOWN:
            raise ValueError(
                f"generation_kwargs: vLLM rollouts do not know {given!r}; they know {', '.join(sorted({*_KNOWN, *_NAMES}))} "
                "(use_vllm=False takes the options of generate())"
            )
        if name in options:
            raise ValueError(f"generation_kwargs: {given} and {name} are one option under two names; give one")
        if value is None:
            continue
        fits, right = _KNOWN[name]
        if not fits(value):
            raise ValueError(f"generation_kwargs: {given} must be {right}, got {value!r}")
        options[name] = value
    never = {*suppressed, *options.pop("suppress_tokens", ())}
    bias = {int(token): float(value) for token, value in (options.get("logit_bias") or {}).items()}
    return options | {
        "logit_bias": bias | dict.fromkeys(sorted(never), _NEVER),
        "stop_token_ids": sorted(set(ends)),
    }
