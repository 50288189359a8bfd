"""MAPLE's MAPO and MUPO."""

from maple_trl import lazy_names


__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MAPOConfig": "maple_trl.trainers.mapo.config",
        "MAPOTrainer": "maple_trl.trainers.mapo.trainer",
    },
)
