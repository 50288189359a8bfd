"""How many completions a run keeps for reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated


@dataclass
class RolloutLogConfig:
    r"""
    The field of a trainer's configuration that says how many completions are kept for reports.

    A mixin: it stands before a configuration class of TRL among the bases.

    Raises:
        ValueError: for a negative number.
    """

    rollout_log_size: Annotated[int, "place"] = field(
        default=20_000,
        metadata={
            "help": "Completions kept in OUTPUT_DIR/rollouts, with prompt, rewards, advantage, tag and the media that "
            "were fed, for the viewer of `maple-trl report`. When there are more, every second rollout is removed and "
            "left out from then on, then every other of these, so that the whole run stays visible. 0 keeps none. "
            "`log_completions` is TRL's own switch: it prints samples, and writes the last rollout before each log "
            "entry, without the row."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rollout_log_size < 0:
            raise ValueError(f"rollout_log_size must be 0 or more, got {self.rollout_log_size}")
