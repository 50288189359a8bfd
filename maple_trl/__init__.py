"""RL post-training for language models that see video, hear audio and read subtitles."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_EXPORTS = {
    "AvatarConfig": "maple_trl.trainers.avatar_config",
    "AvatarTrainer": "maple_trl.trainers.avatar",
    "MAPOConfig": "maple_trl.trainers.mapo_config",
    "MAPOTrainer": "maple_trl.trainers.mapo",
    "Modality": "maple_trl.modalities",
    "ModalityTag": "maple_trl.modalities",
    "OmniGRPOConfig": "maple_trl.trainers.omni_grpo_config",
    "OmniGRPOTrainer": "maple_trl.trainers.omni_grpo",
    "OmniSFTConfig": "maple_trl.trainers.omni_sft_config",
    "OmniSFTTrainer": "maple_trl.trainers.omni_sft",
}
__all__ = [
    "AvatarConfig",
    "AvatarTrainer",
    "MAPOConfig",
    "MAPOTrainer",
    "Modality",
    "ModalityTag",
    "OmniGRPOConfig",
    "OmniGRPOTrainer",
    "OmniSFTConfig",
    "OmniSFTTrainer",
]

if TYPE_CHECKING:
    from maple_trl.modalities import Modality, ModalityTag
    from maple_trl.trainers.avatar import AvatarTrainer
    from maple_trl.trainers.avatar_config import AvatarConfig
    from maple_trl.trainers.mapo import MAPOTrainer
    from maple_trl.trainers.mapo_config import MAPOConfig
    from maple_trl.trainers.omni_grpo import OmniGRPOTrainer
    from maple_trl.trainers.omni_grpo_config import OmniGRPOConfig
    from maple_trl.trainers.omni_sft import OmniSFTTrainer
    from maple_trl.trainers.omni_sft_config import OmniSFTConfig


def __getattr__(name: str) -> Any:
    # Imported when first used: torch and TRL take seconds, which `maple-trl --help` should not.
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
