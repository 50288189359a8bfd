"""Qwen3-VL: images and video, with the time of each temporal patch written in text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.video_utils import VideoMetadata

from maple_trl.omni.families.base import register_family
from maple_trl.omni.families.qwen2_5_vl import Qwen2_5VLFamily
from maple_trl.omni.media.clips import VideoClip


@register_family
class Qwen3VLFamily(Qwen2_5VLFamily):
    """Images and video; rows whose tag needs audio are rejected."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    scopes = Qwen2_5VLFamily.scopes | {"projectors": r"(^|\.)visual\.(merger|deepstack_merger_list)\."}

    def processor_kwargs(self, media, interleaved):
        return true_times(super().processor_kwargs(media, interleaved), media.videos)


def true_times(kwargs: dict[str, Any], videos: Sequence[VideoClip]) -> dict[str, Any]:
    """Return arguments of a processor that writes index / fps into the prompt such that it writes the pictures' times."""
    if not videos:
        return kwargs
    options = kwargs["videos_kwargs"] | {
        "video_metadata": [
            VideoMetadata(
                total_num_frames=len(clip.frames),
                fps=1000.0,  # the index is in milliseconds
                duration=clip.duration,
                frames_indices=[round(1000 * t) for t in clip.timestamps],
            )
            for clip in videos
        ]
    }
    del options["fps"]
    return kwargs | {"videos_kwargs": options}
