"""Prompts as vLLM's engine takes them: tokens with features that are processed already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature

from maple_trl.rollout.engine_models import POSITIONS
from maple_trl.rollout.engine_rows import EngineRow


def engine_input(processor: Any, row: EngineRow) -> Any:
    """
    Return a prompt for `LLMEngine.add_request`, which runs no processor of its own on it.

    Args:
        processor: vLLM's for the model; it names the fields that the model reads.
        row: the prompt.
    """
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    if not row.items:
        return tokens_input(row.token_ids)
    # One of them overlaps another, or is not whole.
    interleaved = any(item.mask is not None for items in row.items.values() for item in items)
    options = {"use_audio_in_video": interleaved}
    data = processor._postprocess_hf_mm_data({}, options, BatchFeature(_with_seconds(row.media)))
    config = dict(processor._get_mm_fields_config(data, options))
    kind = next(iter(row.items))
    data[POSITIONS] = row.position_ids[None].expand(len(row.items[kind]), -1, -1)
    config[POSITIONS] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
    return mm_input(
        row.token_ids,
        mm_kwargs=MultiModalKwargsItems.from_hf_inputs(data, config),
        mm_hashes={kind: [item.digest for item in items] for kind, items in row.items.items()},
        mm_placeholders={
            kind: [PlaceholderRange(item.offset, item.length, item.mask) for item in items]
            for kind, items in row.items.items()
        },
    )


def engine_output(output: Any) -> tuple[list[tuple[list[int], list[float]]], str | None]:
    """Return tokens and log-probabilities of each completion of a finished request, and why there are none."""
    broken = [one.finish_reason for one in output.outputs if one.finish_reason in ("abort", "error")]
    if broken:
        return [], f"the engine ended the request early ({broken[0]})"
    completions = [
        (list(one.token_ids), [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)])
        for one in output.outputs
    ]
    return completions, None


def _with_seconds(media: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what the towers read, with what vLLM's processors ask for to compute positions, which are given here."""
    inputs = {name: values for of_kind in media.values() for name, values in of_kind.items()}
    if "video" not in media:
        return inputs
    seconds = torch.ones(len(inputs["video_grid_thw"]))
    return {**inputs, "video_second_per_grid": seconds, "second_per_grid_ts": seconds}
