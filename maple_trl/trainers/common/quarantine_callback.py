"""Stopping a run whose media cannot be used: after the step, with a checkpoint, on all ranks at once."""

from __future__ import annotations

from collections.abc import Callable

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maple_trl.trainers.common.run_errors import TooManyQuarantinedError


class QuarantineCallback(TrainerCallback):
    """
    Ends a run in order when more rows than `max_quarantined_share` are in quarantine.

    The step that is under way is finished with the rows that stand in, a checkpoint is written, and then `train()` raises
    [`TooManyQuarantinedError`] on every rank: all know the same rows, as encoding them is a collective call.

    Args:
        too_many: what is wrong when there are more, `None` until then.
    """

    def __init__(self, too_many: Callable[[], str | None]):
        self.too_many = too_many
        self._problem: str | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._problem = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._stop_if_too_many(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._stop_if_too_many(control)

    def _stop_if_too_many(self, control: TrainerControl) -> None:
        self._problem = self.too_many()
        if self._problem is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        if self._problem is not None:
            raise TooManyQuarantinedError(
                f"{self._problem}. Stopped after step {state.global_step}; the checkpoint of that step is in "
                f"{args.output_dir}. Mend the files and begin anew, or go on with resume_from_checkpoint=True and a larger "
                "max_quarantined_share."
            )
