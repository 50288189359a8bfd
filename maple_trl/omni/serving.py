"""Hands a batch's media to the model: encoded once per unique prompt, proven to have arrived."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from maple_trl.omni.encoded import EncodedPrompt, MediaMismatchError, unique_prompts
from maple_trl.omni.families.base import OmniFamily


@contextmanager
def serve_media(
    family: OmniFamily, model: nn.Module, rows: Sequence[EncodedPrompt], touch_all_towers: bool = False
) -> Iterator[None]:
    """
    Inside this context, a forward of `model` over `rows` merges the rows' media into its embeddings.

    The towers run inside the model's own forward, so that DDP, FSDP and ZeRO see them, and each unique prompt passes
    them once however many rows share it. Decoding steps of `generate()` hold no placeholders and pass through.

    Args:
        rows: one prompt per row of the forward, in order.
        touch_all_towers (`bool`):
            Run towers that no row needs on a dummy, weighted by zero. Sharded parameters (FSDP, ZeRO-3) are gathered
            by collective calls, so all ranks must run the same towers.

    Raises:
        MediaMismatchError: when a row's placeholders and features differ in number, or no forward took the media.
    """
    rows = list(rows)
    served = False

    def merge(module: nn.Module, args: tuple, kwargs: dict):
        nonlocal served
        input_ids = kwargs.get("input_ids")
        first = not served  # a decoding step follows the forward that took the media, and has none of its own
        if input_ids is None or not (first and touch_all_towers or _has_placeholders(family, input_ids)):
            return None
        served = True
        return args, kwargs | _merged_inputs(family, module, rows, input_ids, touch_all_towers)

    handle = family.core(model).register_forward_pre_hook(merge, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    unread = [row for row in rows if row.kinds]
    if unread and not served:
        raise MediaMismatchError(
            f"The media of {len(unread)} row(s) never reached the model (first: prompt {unread[0].key}, tag "
            f"{unread[0].tag}): no forward with their placeholder tokens ran."
        )


def _has_placeholders(family: OmniFamily, input_ids: Tensor) -> bool:
    return any(bool((input_ids == token_id).any()) for token_id in family.placeholder_ids.values())


def _merged_inputs(
    family: OmniFamily, core: nn.Module, rows: list[EncodedPrompt], input_ids: Tensor, touch_all_towers: bool
) -> dict:
    """Arguments for the core's forward: embeddings with audio in place, and the vision tower's output per row."""
    _check_placeholders(family, rows, input_ids)
    token_embeddings = embeddings = core.get_input_embeddings()(input_ids)
    inputs: dict = {}
    for kind in family.placeholder_ids:
        holders = [row for row in rows if kind in row.kinds]
        if holders:
            prompts, order = unique_prompts(holders)
            if kind == "audio":
                embeddings = _scatter_audio(family, core, prompts, order, input_ids, embeddings)
            else:
                inputs["mm_encoder_outputs"] = {"video": _video_per_row(family, core, prompts, order)}
        elif touch_all_towers:
            embeddings = embeddings + 0.0 * family.dummy_output(core, kind).to(embeddings.dtype)
    if embeddings is not token_embeddings:
        inputs["inputs_embeds"] = embeddings
        if "mm_encoder_outputs" not in inputs:
            inputs["input_ids"] = None  # the vision-language cores take one of the two
    return inputs


def _check_placeholders(family: OmniFamily, rows: list[EncodedPrompt], input_ids: Tensor) -> None:
    if len(rows) != input_ids.size(0):
        raise MediaMismatchError(f"{len(rows)} prompts were given for a forward of {input_ids.size(0)} rows")
    for kind, token_id in family.placeholder_ids.items():
        found = (input_ids == token_id).sum(1).tolist()
        for i, (row, count) in enumerate(zip(rows, found, strict=True)):
            if count != row.media_tokens.get(kind, 0):
                raise MediaMismatchError(
                    f"row {i} (prompt {row.key}, tag {row.tag}) has {count} {kind} placeholder(s) in its tokens but "
                    f"{row.media_tokens.get(kind, 0)} {kind} feature(s)"
                )


def _scatter_audio(family, core, prompts, order, input_ids, embeddings) -> Tensor:
    counts = [prompt.media_tokens["audio"] for prompt in prompts]
    features = family.audio_embeddings(core, prompts).to(embeddings.dtype)
    if features.size(0) != sum(counts):
        raise MediaMismatchError(f"the audio tower gave {features.size(0)} features for {sum(counts)} placeholders")
    per_prompt = features.split(counts)
    mask = (input_ids == family.placeholder_ids["audio"]).unsqueeze(-1)
    return embeddings.masked_scatter(mask, torch.cat([per_prompt[i] for i in order]))


def _video_per_row(family, core, prompts, order):
    """The vision tower's output with each prompt's videos repeated for its rows."""
    outputs = family.video_outputs(core, prompts)
    ends = torch.tensor([len(prompt.media["video_grid_thw"]) for prompt in prompts]).cumsum(0).tolist()
    slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def per_row(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(feature for i in order for feature in features[slices[i]])

    outputs.pooler_output = per_row(outputs.pooler_output)
    if getattr(outputs, "deepstack_features", None) is not None:
        outputs.deepstack_features = [per_row(layer) for layer in outputs.deepstack_features]
    return outputs
