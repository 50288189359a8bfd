"""Qwen2.5-Omni Thinker."""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor

from maple_trl.omni.families.base import OmniFamily, mean_steps, pooled_audio_tokens, register_family


@register_family
class Qwen2_5OmniFamily(OmniFamily):
    """Images, video, separate audio, and audio interleaved with the video's tokens."""

    model_types = ("qwen2_5_omni_thinker",)
    placeholders = {"image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>"}
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
    unread = ("audio_tower.audio_bos_eos_token.weight",)
    interleaves_audio = True

    def processor_kwargs(self, media, interleaved):
        kwargs = super().processor_kwargs(media, interleaved)
        if interleaved:
            kwargs |= {"load_audio_from_video": True, "audio_from_video_indices": list(range(len(media.videos)))}
        return kwargs

    def position_ids(self, batch, media, interleaved):
        mask = batch.get("feature_attention_mask")
        # Beside sound, all pictures stand first and at the beginning until `interleave` places them.
        seconds = [torch.zeros(())] * len(media.videos) if interleaved else self.second_per_grid(media.videos)
        positions, _ = self._rope_index(
            batch["input_ids"],
            image_grid_thw=batch.get("image_grid_thw"),
            video_grid_thw=batch.get("video_grid_thw"),
            attention_mask=torch.ones_like(batch["input_ids"]),
            use_audio_in_video=interleaved,
            audio_seqlens=None if mask is None else mask.sum(-1),
            second_per_grids=seconds or None,
        )
        return positions[:, 0]

    def interleave(self, input_ids, position_ids, clip):
        """
        Place the video's tokens by the times of their pictures, on the clock of the sound.

        The processor and `get_rope_index` take it that pictures follow each other evenly from the sound's first sample
        on. Where they do, nothing changes here.
        """
        is_video, is_audio = (input_ids == self.placeholder_ids[kind] for kind in ("video", "audio"))
        media, seconds = (is_video | is_audio).nonzero()[:, 0], self.patch_seconds(clip)
        video, audio = position_ids[:, media].split([int(is_video.sum()), int(is_audio.sum())], dim=1)
        zero, video = audio[0, 0], video.clone()
        # The arithmetic of `get_rope_index`, in single precision, which integer positions round down.
        numbers = torch.arange(len(seconds)).clamp(min=1)
        times = (numbers * mean_steps(seconds) * self.config.position_id_per_seconds).to(position_ids.dtype)
        video[0] = zero + times.repeat_interleave(video.size(1) // len(seconds))
        order = self.token_order(video[0] - zero, audio[0] - zero)
        input_ids, position_ids, last = input_ids.clone(), position_ids.clone(), position_ids[:, media[-1]].max()
        input_ids[media] = torch.cat([input_ids[is_video], input_ids[is_audio]])[order]
        position_ids[:, media] = torch.cat([video, audio], dim=1)[:, order]
        # The text that follows counts on from the last token of the media.
        position_ids[:, media[-1] + 1 :] += position_ids[:, media[-1]].max() - last
        return input_ids, position_ids

    def token_order(self, video: Tensor, audio: Tensor) -> Tensor:
        """
        Order the tokens of a video and its sound, given the time position of each.

        Tokens stand in chunks of some seconds, and in each the video's come first.

        Returns:
            `Tensor` of shape (tokens,): indices into the video's tokens followed by the sound's.
        """
        per_chunk = int(self.config.position_id_per_seconds * self.config.seconds_per_chunk)
        late = int(video[0]) // per_chunk  # chunks that end before the first picture
        starts = [(0, 0)] * late
        chunks = [
            starts + self.processor.get_chunked_index(video - late * per_chunk, per_chunk),
            self.processor.get_chunked_index(audio, per_chunk),
        ]
        order, offsets = [], (0, len(video))
        for pair in zip_longest(*chunks, fillvalue=(0, 0)):
            for (first, end), offset in zip(pair, offsets, strict=True):
                order += range(offset + first, offset + end)
        return torch.tensor(order)

    def audio_token_count(self, mel_frames):
        return pooled_audio_tokens(mel_frames)
