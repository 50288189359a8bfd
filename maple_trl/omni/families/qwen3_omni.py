"""Qwen3-Omni (mixture-of-experts) Thinker."""

from __future__ import annotations

import torch
from torch import Tensor

from maple_trl.omni.families.base import register_family
from maple_trl.omni.families.qwen2_5_omni import Qwen2_5OmniFamily


@register_family
class Qwen3OmniFamily(Qwen2_5OmniFamily):
    """Qwen2.5-Omni with other tokens, an audio tower of fixed windows and deep-stacked vision features."""

    model_types = ("qwen3_omni_moe_thinker",)
    placeholders = {"image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|audio_pad|>"}
    media_tokens = (
        "<|image_pad|>",
        "<|video_pad|>",
        "<|audio_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|audio_start|>",
        "<|audio_end|>",
    )
    scopes = {
        "projectors": r"(^|\.)(visual\.merger\w*|audio_tower\.proj[12])(\.|$)",
        "vision": r"(^|\.)visual\.",
        "audio": r"(^|\.)audio_tower\.",
        "llm": r"(^|\.)language_model\.",
    }

    def processor_kwargs(self, media, interleaved):
        kwargs = super().processor_kwargs(media, interleaved)
        if media.audios:
            kwargs["n_window"] = self.config.audio_config.n_window
        return kwargs

    def token_order(self, video: Tensor, audio: Tensor) -> Tensor:
        """Order tokens by time alone; of those of one time, the video's come first."""
        return torch.cat([video, audio]).argsort(stable=True)

    def audio_token_count(self, mel_frames):
        window = 2 * self.config.audio_config.n_window
        full, rest = divmod(mel_frames, window)
        return full * self._convolved(window) + (self._convolved(rest) if rest else 0)

    @staticmethod
    def _convolved(frames: int) -> int:
        for _ in range(3):
            frames = (frames - 1) // 2 + 1
        return frames
