"""Qwen2.5-Omni Thinker."""

from __future__ import annotations

import torch

from maple_trl.omni.families.base import OmniFamily, register_family


@register_family
class Qwen2_5OmniFamily(OmniFamily):
    """Video, separate audio, and audio interleaved with the video's tokens."""

    model_types = ("qwen2_5_omni_thinker",)
    placeholders = {"video": "<|VIDEO|>", "audio": "<|AUDIO|>"}
    media_tokens = (
        "<|IMAGE|>",
        "<|VIDEO|>",
        "<|AUDIO|>",
        "<|vision_bos|>",
        "<|vision_eos|>",
        "<|audio_bos|>",
        "<|audio_eos|>",
    )
    scopes = {
        "projectors": r"(^|\.)(visual\.merger|audio_tower\.proj)(\.|$)",
        "vision": r"(^|\.)visual\.",
        "audio": r"(^|\.)audio_tower\.",
        "llm": r"(^|\.)language_model\.",
    }
    interleaves_audio = True

    def processor_kwargs(self, videos, audios, interleaved):
        kwargs = super().processor_kwargs(videos, audios, interleaved)
        if interleaved:
            kwargs |= {"load_audio_from_video": True, "audio_from_video_indices": list(range(len(videos)))}
        return kwargs

    def position_ids(self, batch, media, videos, interleaved):
        mask = media.get("feature_attention_mask")
        positions, _ = self._rope_index(
            batch["input_ids"],
            video_grid_thw=media.get("video_grid_thw"),
            attention_mask=torch.ones_like(batch["input_ids"]),
            use_audio_in_video=interleaved,
            audio_seqlens=None if mask is None else mask.sum(-1),
            second_per_grids=self.second_per_grid(videos) if videos else None,
        )
        return positions[:, 0]

    def audio_token_count(self, mel_frames):
        return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1
