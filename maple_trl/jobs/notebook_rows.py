"""A notebook's table of a training run; importing it needs IPython, which every notebook has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from transformers import TrainerState, TrainingArguments
from transformers.utils.notebook import NotebookProgressCallback

from maple_trl.modalities import ModalityTag


class Rows(Protocol):
    """What says what a row holds, as [`~maple_trl.jobs.console.LogRows`] does."""

    tags: Collection[ModalityTag]

    def cells(self, logs: Mapping[str, Any], state: TrainerState) -> dict[str, str]:
        """Return the cells of a row by the names of their columns."""


class NotebookRows(NotebookProgressCallback):
    """
    The bar of transformers, and below it a row for each entry of the log as [`~maple_trl.jobs.console.LogRows`] prints it.

    Args:
        rows: says what a row holds.
    """

    def __init__(self, rows: Rows):
        super().__init__()
        self._rows = rows

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        """Begin a table, of which the first entry names the columns."""
        super().on_train_begin(args, state, control, **kwargs)
        self.training_tracker.inner_table = None

    def on_log(self, args, state: TrainerState, control, logs=None, **kwargs):
        """Add a row, with an empty cell for each tag that the entry says nothing of."""
        cells = self._rows.cells(logs or {}, state)
        if self.training_tracker is not None and len(cells) > 1:
            cells = {name: text for name, text in cells.items() if name not in ("s/step", "left")}
            self.training_tracker.write_line(
                cells | {tag: cells.get(tag, "") for tag in map(str, ModalityTag) if tag in self._rows.tags}
            )
