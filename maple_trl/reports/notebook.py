"""What notebooks show of a run beside the trainer itself: its curves as a picture, and its completions."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from PIL import Image

from maple_trl.modalities import ModalityTag
from maple_trl.records.metrics_log import whole_log
from maple_trl.records.rollouts import ROLLOUTS, read_rollouts
from maple_trl.records.run_html import completions_html
from maple_trl.reports.folders import read_run
from maple_trl.reports.plots import plot_training


if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True)
class Picture:
    """A picture that a notebook shows; pages that run no script show it too."""

    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png


@dataclass(frozen=True)
class Tables:
    """HTML that a notebook shows; see `maple_trl.records.run_html`."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


def curves(
    run: Trainer | str | os.PathLike,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
) -> Picture:
    """
    Draw rewards and accuracies of a run over its steps, as `training.png` of a job does.

    Args:
        run (`Trainer`, `str` or `os.PathLike`): a trainer of this package, or the output folder of a run.
        before, after (`Mapping[str, float]`, *optional*): accuracy by tag and under `all`, in `[0, 1]`; by default those that
            the folder of a job has.

    Raises:
        ReportError: for a folder without a run.
        ImportError: without matplotlib, naming the extra that brings it.
    """
    log, summary = _log_of(run)
    before = summary.get("before") if before is None else before
    after = summary.get("after") if after is None else after
    with tempfile.TemporaryDirectory() as folder, io.BytesIO() as small:
        # A notebook is kept with its pictures: lines need few colours.
        with Image.open(plot_training(log, before, after, Path(folder, "curves.png"))) as drawn:
            drawn.convert("RGB").quantize(64).save(small, "png", optimize=True)
        return Picture(small.getvalue())


def completions(
    run: Trainer | str | os.PathLike, tag: str | None = None, step: int | None = None, groups: int = 1
) -> Tables:
    """
    Show completions of a run in their groups, with prompt, rewards and advantages; the best rewarded of a group first.

    Args:
        run (`Trainer`, `str` or `os.PathLike`): a trainer of this package, or the output folder of a run.
        tag (`str`, *optional*): of rows with this tag alone, however it is spelt.
        step (`int`, *optional*): sampled when so many optimizer steps were done, or last before; the latest by default.
        groups (`int`, *optional*, defaults to 1): how many.

    Raises:
        ValueError: when there is none.
    """
    folder = Path(_folder_of(run))
    table, _, _ = read_rollouts(folder / ROLLOUTS)
    if table is not None and tag is not None:
        table = table.filter(pc.equal(table["tag"], str(ModalityTag.parse(tag))))
    if table is not None and step is not None:
        table = table.filter(pc.less_equal(table["step"], step))
    if table is None or not len(table):
        raise ValueError(f"{folder} holds no completions that are asked for; rollout_log_size: 0 keeps none")
    return Tables(completions_html(table, groups))


def _folder_of(run: Trainer | str | os.PathLike) -> str | os.PathLike:
    return run if isinstance(run, str | os.PathLike) else run.args.output_dir


def _log_of(run: Trainer | str | os.PathLike) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]:
    """Return a run's log, and what a job has summed it up to."""
    if isinstance(run, str | os.PathLike):
        found = read_run(run)
        return found.log, found.summary or {}
    return whole_log(run.state.log_history, os.path.join(run.args.output_dir, "metrics.jsonl")), {}
