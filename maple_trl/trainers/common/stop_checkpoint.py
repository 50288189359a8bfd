"""The checkpoint that is written when a job is asked to end (`enable_jit_checkpoint`), at the end of a step."""

from __future__ import annotations

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class StopCheckpoint(JITCheckpointCallback):
    """
    Ends training with a checkpoint once a step is whole and logged, on all ranks at the same one.

    Transformers writes it after a step's gradients and before its update, too: weights are then of the step before, rollout,
    schedule and replay buffer of the next one, and a run that goes on from there leaves rows out. It writes it before the step
    is logged, and every rank decides by a clock of its own.

    Attributes:
        ended: whether the last training ended by it before its last step.
    """

    ended = False

    @classmethod
    def instead_of_transformers(cls, trainer: Trainer) -> StopCheckpoint | None:
        """Put one in the place of the callback that a trainer has, if it has one; the signal's handler stays."""
        usual = trainer.pop_callback(JITCheckpointCallback)
        if usual is None:
            return None
        own = cls()
        own.trainer, own.jit_manager = usual.trainer, usual.jit_manager
        trainer.add_callback(own)
        return own

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget a training before this one."""
        self.ended = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Do nothing: the step's end is near."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Do nothing: the rows of the step have been drawn."""

    def on_step_end(self, args, state, control, **kwargs):
        """Let the step be logged and saved, and be the last one, where any rank was asked to end."""
        if self.jit_manager is None or not any(gather_object([self.jit_manager.is_checkpoint_requested])):
            return
        self.jit_manager.is_checkpoint_requested = False
        self.ended = state.global_step < state.max_steps
        control.should_log = control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        """Do nothing: the end of the next step follows, or that of the training."""
