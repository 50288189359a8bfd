"""Qwen3-VL: images and video, with the time of each temporal patch written in text."""

from __future__ import annotations

from transformers.video_utils import VideoMetadata

from maple_trl.omni.families.base import register_family
from maple_trl.omni.families.qwen2_5_vl import Qwen2_5VLFamily


@register_family
class Qwen3VLFamily(Qwen2_5VLFamily):
    """Images and video; rows whose tag needs audio are rejected."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    scopes = Qwen2_5VLFamily.scopes | {"projectors": r"(^|\.)visual\.(merger|deepstack_merger_list)\."}

    def processor_kwargs(self, media, interleaved):
        kwargs = super().processor_kwargs(media, interleaved)
        if media.videos:
            # The processor writes index / fps into the prompt: an index of milliseconds gives the true times.
            kwargs["videos_kwargs"]["video_metadata"] = [
                VideoMetadata(
                    total_num_frames=len(clip.frames),
                    fps=1000.0,
                    duration=clip.duration,
                    frames_indices=[round(1000 * t) for t in clip.timestamps],
                )
                for clip in media.videos
            ]
            del kwargs["videos_kwargs"]["fps"]
        return kwargs
