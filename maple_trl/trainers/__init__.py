"""Trainers: subclasses of TRL's."""

from maple_trl import lazy_names


__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AvatarConfig": "maple_trl.trainers.avatar.config",
        "AvatarTrainer": "maple_trl.trainers.avatar.trainer",
        "MAPOConfig": "maple_trl.trainers.mapo.config",
        "MAPOTrainer": "maple_trl.trainers.mapo.trainer",
        "OmniGRPOConfig": "maple_trl.trainers.omni_grpo.config",
        "OmniGRPOTrainer": "maple_trl.trainers.omni_grpo.trainer",
        "OmniSFTConfig": "maple_trl.trainers.omni_sft.config",
        "OmniSFTTrainer": "maple_trl.trainers.omni_sft.trainer",
    },
)
