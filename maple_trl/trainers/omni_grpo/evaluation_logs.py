"""What evaluations log during training, apart from what training logs, and by the name of their data set."""

from __future__ import annotations

import copy
import math
import os
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from maple_trl.trainers.common.trl_compat import fit_columns, lent


class EvaluationLogMixin:
    """
    Keeps evaluations' metrics and completions to themselves, which TRL mixes with those of training and of each other.

    It names all metrics `eval_…`, whichever data set of several they are of, and keeps completions in one place and one file.
    """

    _metric_key_prefix: str | None = None  # that of the evaluation that is going on

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ):
        """
        Evaluate as [`~transformers.Trainer.evaluate`] does.

        Metrics of one of several data sets are named after it: `eval_NAME_reward`. With `log_completions` its completions lie
        in `OUTPUT_DIR/completions/eval_NAME`. The random stream is left as it was: how often is evaluated does not change
        what is trained.
        """
        with torch.random.fork_rng(), lent(self, _metric_key_prefix=metric_key_prefix, _logs=_emptied(self._logs)):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, of an evaluation by the name of its data set."""
        self._log_all(self._means[self._mode].take(), self._mode)
        fit_columns(self._logs)
        if (prefix := self._metric_key_prefix) is None:
            super().log(logs, start_time)
            return
        if prefix != "eval":
            logs.update({f"{prefix}_{name}": _mean(own) for name, own in self._metrics["eval"].items()})
            self._metrics["eval"].clear()
        with self._completions_apart(prefix):
            super().log(logs, start_time)

    @contextmanager
    def _completions_apart(self, folder: str) -> Iterator[None]:
        """Move the file of completions that is written to a folder of its own; one of training by this name stays."""
        file = Path(self.args.output_dir, "completions", f"completions_{self.state.global_step:05d}.parquet")
        if not (self.log_completions and self.accelerator.is_main_process):
            yield
            return
        training = file.with_suffix(".training")
        if file.exists():
            os.replace(file, training)
        try:
            yield
        finally:
            if file.exists():
                own = file.parent / folder / file.name
                own.parent.mkdir(exist_ok=True)
                os.replace(file, own)
            if training.exists():
                os.replace(training, file)


def _emptied(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns as long as those that TRL keeps, with nothing in them."""
    found = {name: copy.copy(columns) for name, columns in logs.items()}
    for columns in found.values():
        columns.clear()
    return found


def _mean(values: list[float]) -> float | None:
    valid = [value for value in values if not math.isnan(value)]
    return statistics.fmean(valid) if valid else None
