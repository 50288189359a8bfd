"""Qwen2.5-VL: video only."""

from __future__ import annotations

import torch

from maple_trl.omni.families.base import OmniFamily, register_family


@register_family
class Qwen2_5VLFamily(OmniFamily):
    """Video; rows whose tag needs audio are rejected."""

    model_types = ("qwen2_5_vl",)
    placeholders = {"video": "<|video_pad|>"}
    media_tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    scopes = {
        "projectors": r"(^|\.)visual\.merger\.",
        "vision": r"(^|\.)visual\.",
        "llm": r"(^|\.)language_model\.",
    }

    def position_ids(self, batch, media, videos, interleaved):
        # These models' `get_rope_index` expects vision tokens; plain text counts up in all three dimensions.
        if not videos:
            return torch.arange(batch["input_ids"].size(1)).expand(3, -1)
        token_types = (batch["input_ids"] == self.placeholder_ids["video"]).int() * 2
        positions, _ = self._rope_index(
            batch["input_ids"],
            mm_token_type_ids=token_types,
            video_grid_thw=media["video_grid_thw"],
            attention_mask=torch.ones_like(batch["input_ids"]),
            second_per_grid_ts=self.second_per_grid(videos),
        )
        return positions[:, 0]
