"""Model families. Each file holds one; importing this package registers them all."""

from maple_trl.omni.families import (
    gemma4,
    phi4_multimodal,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen2_audio,
    qwen3_omni,
    qwen3_vl,
    video_llama_3,
)
from maple_trl.omni.families.base import (
    OmniFamily,
    PromptEncoder,
    family_class,
    family_for,
    is_omni,
    register_family,
    registered_types,
    unwrap,
)


__all__ = [
    "OmniFamily",
    "PromptEncoder",
    "family_class",
    "family_for",
    "gemma4",
    "is_omni",
    "phi4_multimodal",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen3_omni",
    "qwen3_vl",
    "register_family",
    "registered_types",
    "unwrap",
    "video_llama_3",
]
