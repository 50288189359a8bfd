"""Generation reads a prompt once for all rows that share it, and computes logits of its last position alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicLayer

from maple_trl.omni.encoded import EncodedPrompt, MediaMismatchError, unique_prompts
from maple_trl.omni.prefix.growing_cache import GrowingLayer


def grows_cache(config: GenerationConfig) -> bool:
    """Return whether generation grows a key-value cache, whose rows alone [`share_prefill`] can repeat."""
    return config.use_cache is not False and config.cache_implementation in (None, "dynamic")


@contextmanager
def last_position_alone(core: nn.Module) -> Iterator[None]:
    """
    Let the LM head read the last position of each row alone, which is all that `generate()` looks at.

    `generate()` asks for that itself where a model's forward takes `logits_to_keep`, which those of Omni's Thinkers and of
    Qwen2-Audio do not: of a long prompt their logits take gigabytes.

    Args:
        core: the module whose hidden states the LM head reads.
    """

    def keep_last(module: nn.Module, args: tuple, output: Any) -> Any:
        if getattr(output, "last_hidden_state", None) is not None:
            output.last_hidden_state = output.last_hidden_state[:, -1:]
        return output

    with core.register_forward_hook(keep_last):
        yield


@contextmanager
def share_prefill(core: nn.Module, rows: Sequence[EncodedPrompt]) -> Iterator[None]:
    """
    Let the first forward of `core` inside this context read each distinct prompt once, for all rows that share it.

    `generate()` notices nothing: it passes a row per completion, and gets back the last position's hidden state of each
    row and a key-value cache with a row for each. Of the prompts' other positions no logits are computed.

    Args:
        core: the module whose hidden states the LM head reads.
        rows: one prompt per row of `generate()`, rows of a prompt sharing the object. Its settings satisfy
            [`grows_cache`].

    Raises:
        MediaMismatchError: when that forward has more or fewer rows, as with `num_beams` or `num_return_sequences`.
    """
    prompts, order = unique_prompts(rows)
    first = {}
    for row, prompt in enumerate(order):
        first.setdefault(prompt, row)
    chosen = torch.tensor([first[i] for i in range(len(prompts))])
    expand = torch.tensor(order)
    done = False

    def take(value, dim: int = 0):
        return value.index_select(dim, chosen.to(value.device)) if isinstance(value, Tensor) else value

    def reduce(module: nn.Module, args: tuple, kwargs: dict):
        if done:
            return None
        kwargs = dict(kwargs)
        given = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
        if len(given) != len(rows):
            raise MediaMismatchError(f"{len(rows)} prompts were given for a forward of {len(given)} rows")
        for name in ("input_ids", "attention_mask", "inputs_embeds"):
            kwargs[name] = take(kwargs.get(name))
        positions = kwargs.get("position_ids")
        if positions is not None:  # of shape (rotary dimensions, rows, tokens) or (rows, tokens)
            kwargs["position_ids"] = take(positions, positions.dim() - 2)
        return args, kwargs

    def restore(module: nn.Module, args: tuple, kwargs: dict, output):
        nonlocal done
        if done:
            return None
        done = True
        hidden = output.last_hidden_state[:, -1:]
        output.last_hidden_state = hidden.index_select(0, expand.to(hidden.device))
        cache = output["cache" if "cache" in output else "past_key_values"]  # transformers 5.24 renames it
        if cache is not None:
            _give_each_row_its_prompt(cache, expand.to(hidden.device))
        return output

    with (
        core.register_forward_pre_hook(reduce, with_kwargs=True),
        core.register_forward_hook(restore, with_kwargs=True),
    ):
        yield


def _give_each_row_its_prompt(cache: Cache, rows: Tensor) -> None:
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer(layer, rows)
        else:
            layer.batch_select_indices(rows)
