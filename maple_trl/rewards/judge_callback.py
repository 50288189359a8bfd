"""Stopping a run whose judge does not answer: after the step, with a checkpoint, on all ranks at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maple_trl.rewards.judge_limits import JudgeUnavailableError


class Guarded(Protocol):
    """A judge that says what has gone wrong with it: `None` as long as it answers often enough."""

    tripped: str | None

    def guard(self, state: Any) -> None:
        """Begin anew for a run with this trainer state."""


class JudgeCallback(TrainerCallback):
    """
    Ends a run in order when one of its judges fails too often.

    A step that is under way is finished (what the judge did not score counts as not scored), a checkpoint is written,
    and then `train()` raises [`JudgeUnavailableError`] on every rank. `train(resume_from_checkpoint=True)` goes on from
    there. The ranks tell each other after each step, so that none waits for one that has stopped.

    Args:
        judges (`Iterable[Guarded]`): the judges among the reward functions.
    """

    def __init__(self, judges: Iterable[Guarded]):
        self.judges = list(judges)
        self._problem: str | None = None

    def on_train_begin(self, args, state: TrainerState, control, **kwargs) -> None:
        """Put the judges under this callback."""
        self._problem = None
        for judge in self.judges:
            judge.guard(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Stop the run where a judge has failed too often."""
        self._stop_if_tripped(args, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Stop the run where a judge has failed too often."""
        self._stop_if_tripped(args, control)

    def _stop_if_tripped(self, args: TrainingArguments, control: TrainerControl) -> None:
        own = [judge.tripped for judge in self.judges if judge.tripped]
        problems = gather_object(own) if args.world_size > 1 else own
        if problems:
            self._problem = problems[0]
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state: TrainerState, control, **kwargs) -> None:
        """Raise on every rank where a judge has stopped the run."""
        for judge in self.judges:
            judge.guard(None)
        if self._problem is not None:
            raise JudgeUnavailableError(
                f"{self._problem}. Stopped after step {state.global_step}; the checkpoint of that step is in "
                f"{args.output_dir}. Once the judge answers, go on with resume_from_checkpoint=True."
            )
