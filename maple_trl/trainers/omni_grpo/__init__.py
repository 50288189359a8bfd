"""GRPO on rows that hold media."""

from maple_trl import lazy_names


__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "OmniGRPOConfig": "maple_trl.trainers.omni_grpo.config",
        "OmniGRPOTrainer": "maple_trl.trainers.omni_grpo.trainer",
    },
)
