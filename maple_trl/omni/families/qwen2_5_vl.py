"""Qwen2.5-VL: images and video."""

from __future__ import annotations

import torch
from torch import Tensor

from maple_trl.omni.families.base import OmniFamily, register_family


@register_family
class Qwen2_5VLFamily(OmniFamily):
    """Images and video; rows whose tag needs audio are rejected."""

    model_types = ("qwen2_5_vl",)
    placeholders = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    media_tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    scopes = {
        "projectors": r"(^|\.)visual\.merger\.",
        "vision": r"(^|\.)visual\.",
        "llm": r"(^|\.)language_model\.",
    }

    def position_ids(self, batch, media, interleaved):
        # These models' `get_rope_index` expects vision tokens; plain text counts up in all three dimensions.
        if not media.kinds:
            return torch.arange(batch["input_ids"].size(1)).expand(3, -1)
        ids, kinds = batch["input_ids"], ("image", "video")
        token_types = sum(number * (ids == self.placeholder_ids[kind]).int() for number, kind in enumerate(kinds, 1))
        positions, _ = self._rope_index(
            ids,
            mm_token_type_ids=token_types,
            image_grid_thw=batch.get("image_grid_thw"),
            video_grid_thw=batch.get("video_grid_thw"),
            attention_mask=torch.ones_like(ids),
            second_per_grid_ts=self.second_per_grid(media.videos) or None,
        )
        return _counted_on(positions[:, 0], token_types[0])


def _counted_on(positions: Tensor, token_types: Tensor) -> Tensor:
    """
    Have what follows a picture or a video begin after the latest of its positions, as these models were trained.

    transformers 5 counts on from a video's height and width, so that what follows a longer one stands among its frames;
    vLLM does not.

    Args:
        positions (`Tensor` of shape (R, T)): rotary positions of a prompt.
        token_types (`Tensor` of shape (T,)): the kind of each token; changes where a picture or a video begins or ends.
    """
    positions = positions.clone()
    for start in (token_types.diff().nonzero()[:, 0] + 1).tolist():
        positions[:, start:] += positions[:, :start].max() + 1 - positions[:, start].min()
    return positions
