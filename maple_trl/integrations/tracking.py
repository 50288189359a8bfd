"""
What TRL's `report_to` leaves out, for the trackers that it names.

Every number that a trainer logs (rewards, all `tag/TAG/...` metrics) arrives in TensorBoard, trackio and W&B by `report_to`
itself; tables of completions arrive in the latter two with `log_completions`. This adds the plots as pictures, and the
tables where TRL writes none.
"""

from __future__ import annotations

import html
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maple_trl.evaluation.inputs import prompt_text
from maple_trl.records.metrics_log import reward_curves
from maple_trl.reports.plots import plot_training


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "trackio", "wandb")
PLOT, TABLE = "plots/training", "completions"

_CHARACTERS = 1000  # of a text in a table


class TrackingCallback(TrainerCallback):
    r"""
    Sends the training plot and a table of the latest completions to the trackers in `report_to` that are installed.

    Both are sent every so many optimizer steps, right after numbers were logged, and at the end. Where TRL sends a table
    itself (`log_completions` with trackio or W&B) none is added. Models write what stands in a table: its texts are
    escaped, and cut at 1000 characters. What cannot be drawn or sent is left out from then on, with a warning: the run goes on.

    Args:
        trainer (`Trainer`): whose run it is; a TRL trainer for the table.
        every_steps (`int`, *optional*, defaults to 50): optimizer steps between two of them.
        rows (`int`, *optional*, defaults to 16): completions in a table; 0 sends none.

    Raises:
        ValueError: for a number out of range.

    Example:
    ```python
    trainer = MAPOTrainer(..., args=MAPOConfig(report_to=["tensorboard"], ...))
    trainer.add_callback(TrackingCallback(trainer))
    ```
    """

    def __init__(self, trainer: Trainer, every_steps: int = 50, rows: int = 16):
        if every_steps < 1:
            raise ValueError(f"every_steps must be 1 or more, got {every_steps}")
        if rows < 0:
            raise ValueError(f"rows must be 0 or more, got {rows}")
        self.trainer, self.every_steps, self.rows = trainer, every_steps, rows
        self._sent_at = 0
        self._lost: set[str] = set()  # what is not tried again

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Note the step at which the run begins; called as [`~transformers.TrainerCallback.on_train_begin`]."""
        self._sent_at = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs,
    ) -> None:
        """Send plot and table when they are due; called as [`~transformers.TrainerCallback.on_log`]."""
        # Trackers are closed in on_train_end, before this callback has its turn; the summary of a run comes just before.
        ends = "train_runtime" in (logs or {})
        if not state.is_world_process_zero or (state.global_step - self._sent_at < self.every_steps and not ends):
            return
        if state.global_step == self._sent_at:
            return
        senders = self._senders(args)
        if not senders:
            return
        self._sent_at = state.global_step
        picture, table = self._tried("plots", self._picture, state), self._tried("tables", self._table)
        for name, sender in senders.items():
            told = None if name != "tensorboard" and args_log_tables(args) else table
            self._tried(name, sender, picture, told, state.global_step)

    def _tried(self, what: str, make: Callable[..., Any], *given: Any) -> Any:
        """Return what comes of a call; `None`, with a warning, where it fails, and from then on: no run ends for an ornament."""
        if what in self._lost:
            return None
        try:
            return make(*given)
        except Exception as error:
            logger.warning("%s: nothing more is drawn or sent: %s", what, error or type(error).__name__)
            self._lost.add(what)
            return None

    def _senders(self, args: TrainingArguments) -> dict[str, Any]:
        """Return a sender for each tracker that is in use."""
        wanted = [name for name in TRACKERS if name in (args.report_to or [])]
        found = {name: self._tried(name, getattr(self, f"_{name}")) for name in wanted}
        return {name: sender for name, sender in found.items() if sender is not None}

    # What is sent

    def _picture(self, state: TrainerState) -> Image.Image | None:
        if not reward_curves(state.log_history):
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = plot_training(state.log_history, None, None, Path(folder, "training.png"))
            with Image.open(path) as picture:
                return picture.convert("RGB")

    def _table(self) -> dict[str, list] | None:
        """Return the columns of the latest completions; `None` for a trainer that keeps none."""
        logs = getattr(self.trainer, "_logs", None)
        if not self.rows or not logs or not logs.get("completion"):
            return None
        columns = {"prompt": logs["prompt"], "completion": logs["completion"], **logs["rewards"]}
        columns |= {**logs.get("extra", {}), "advantage": logs["advantages"]}
        count = min(self.rows, *(len(values) for values in columns.values()))
        return {
            name: [cell if isinstance(cell, int | float) or cell is None else plain_text(cell) for cell in values]
            for name, values in ((name, list(values)[-count:]) for name, values in columns.items())
        }

    # Trackers

    def _tensorboard(self):
        from transformers.integrations import TensorBoardCallback

        callbacks = self.trainer.callback_handler.callbacks
        writer = next((c.tb_writer for c in callbacks if isinstance(c, TensorBoardCallback)), None)
        if writer is None:
            return None

        def send(picture: Image.Image | None, table: Mapping[str, list] | None, step: int) -> None:
            import numpy as np

            if picture is not None:
                writer.add_image(PLOT, np.asarray(picture), step, dataformats="HWC")
            if table is not None:
                writer.add_text(TABLE, markdown_table(table), step)

        return send

    def _trackio(self):
        # TRL and transformers import it where it is in use.
        trackio = sys.modules.get("trackio")
        if trackio is None or trackio.context_vars.current_run.get() is None:
            return None
        return _table_sender(trackio, trackio.log)

    def _wandb(self):
        wandb = sys.modules.get("wandb")
        if wandb is None or getattr(wandb, "run", None) is None:
            return None
        return _table_sender(wandb, wandb.log)


def args_log_tables(args: TrainingArguments) -> bool:
    """Return whether TRL itself sends completions to trackio and W&B with these `args` of a run."""
    return bool(getattr(args, "log_completions", False))


def _table_sender(module: Any, log: Any):
    """Return a sender through a module with `Image` and `Table`, beside the numbers of the same step."""

    def send(picture: Image.Image | None, table: Mapping[str, list] | None, step: int) -> None:
        found = {} if picture is None else {PLOT: module.Image(picture)}
        if table is not None:
            rows = [list(row) for row in zip(*table.values(), strict=True)]
            found[TABLE] = module.Table(columns=list(table), data=rows)
        if found:
            log({**found, "train/global_step": step})

    return send


def plain_text(cell: Any) -> str:
    """Return a `cell`, prompt or completion, as text: of messages, who says what; of their media, what kind they are."""
    text = prompt_text(cell) if isinstance(cell, list) else str(cell)
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"


def markdown_table(columns: Mapping[str, Sequence[Any]]) -> str:
    """Return a Markdown table of `columns`, in which cells are text: no markup of theirs, and no HTML, has any effect."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        text = "" if value is None else html.escape(str(value))
        # Every character that Markdown gives a meaning, as a character reference.
        marked = "".join(f"&#{ord(c)};" if c in "\\`*_{}[]()#+-.!|~:" else c for c in text)
        return marked.replace("\r", "").replace("\n", "<br>")

    rows = zip(*columns.values(), strict=True)
    lines = ["| " + " | ".join(map(cell, columns)) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)])
