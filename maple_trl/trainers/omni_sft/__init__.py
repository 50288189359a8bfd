"""Supervised training on rows that hold media."""

from maple_trl import lazy_names


__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "OmniSFTConfig": "maple_trl.trainers.omni_sft.config",
        "OmniSFTTrainer": "maple_trl.trainers.omni_sft.trainer",
    },
)
