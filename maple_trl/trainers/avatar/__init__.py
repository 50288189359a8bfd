"""AVATAR: replay, shaped advantages, hints."""

from maple_trl import lazy_names


__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AvatarConfig": "maple_trl.trainers.avatar.config",
        "AvatarTrainer": "maple_trl.trainers.avatar.trainer",
    },
)
