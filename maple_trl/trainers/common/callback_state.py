"""What callbacks know in a checkpoint: given back to those of a run that goes on, or refused where nothing keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import BEMACallback

from maple_trl.trainers.common.checkpoint import ResumeError


def check_callbacks(callbacks: Sequence[TrainerCallback]) -> None:
    """
    Check that no callback of a run that goes on has averaged weights that a checkpoint does not hold.

    Raises:
        ResumeError: naming it.
    """
    if any(isinstance(callback, BEMACallback) for callback in callbacks):
        raise ResumeError(
            "BEMACallback keeps its averages of the weights in no checkpoint, and would begin them anew from those of this one: "
            "resume without it, or begin a new run"
        )


def restore_callbacks(callbacks: Sequence[TrainerCallback], kept: dict[str, Any]) -> None:
    """
    Give callbacks the attributes that they had at a checkpoint, as how often the metric has not improved.

    Trainer writes those of each `ExportableState`, and reads them where `restore_callback_states_from_checkpoint` is set alone, together
    with whether the run was being stopped.

    Args:
        kept: `stateful_callbacks` of the checkpoint's `TrainerState`. Callbacks that the run did not have yet are added, which
            Trainer looks for when it writes the next checkpoint.
    """
    by_name: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            by_name.setdefault(type(callback).__name__, []).append(callback)
    for name, own in by_name.items():
        if name not in kept:
            kept[name] = own[0].state() if len(own) == 1 else [callback.state() for callback in own]
            continue
        states = kept[name] if isinstance(kept[name], list) else [kept[name]]
        # Of several callbacks of a class Trainer adds the states of each checkpoint to those before.
        for callback, state in zip(own, states[-len(own) :], strict=False):
            for attribute, value in state.get("attributes", {}).items():
                setattr(callback, attribute, value)
