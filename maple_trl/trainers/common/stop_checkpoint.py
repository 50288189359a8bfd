"""The checkpoint that transformers writes when a job is asked to end (`enable_jit_checkpoint`), at the end of a step."""

from __future__ import annotations

from transformers import Trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class StopCheckpoint(JITCheckpointCallback):
    """
    Writes the checkpoint once a step is whole.

    Transformers writes it after a step's gradients and before its update, too: weights are then of the step before, rollout,
    schedule and replay buffer of the next one, and a run that goes on from there leaves rows out.
    """

    @classmethod
    def instead_of_transformers(cls, trainer: Trainer) -> None:
        """Put one in the place of the callback that a trainer has, if it has one; the signal's handler stays."""
        usual = trainer.pop_callback(JITCheckpointCallback)
        if usual is None:
            return
        own = cls()
        own.trainer, own.jit_manager = usual.trainer, usual.jit_manager
        trainer.add_callback(own)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Do nothing: the step's end is near."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Do nothing: the rows of the step have been drawn."""
