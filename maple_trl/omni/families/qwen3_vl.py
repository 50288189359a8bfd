"""Qwen3-VL: images and video, with the time of each temporal patch written in text."""

from __future__ import annotations

from maple_trl.omni.families.base import register_family
from maple_trl.omni.families.qwen2_5_vl import Qwen2_5VLFamily


@register_family
class Qwen3VLFamily(Qwen2_5VLFamily):
    """Images and video; rows whose tag needs audio are rejected."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    scopes = Qwen2_5VLFamily.scopes | {"projectors": r"(^|\.)visual\.(merger|deepstack_merger_list)\."}
    times_in_text = True
