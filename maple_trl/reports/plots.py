"""Plots. matplotlib is optional: `pip install "maple-trl[plots]"`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maple_trl.records.metrics_log import reward_curves, signal_profile, tag_curves
from maple_trl.records.summary import accuracy_rows


def _figure(width: float, height: float):
    """
    Make a figure that belongs to nobody's interactive session.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'plots need matplotlib ({error}): pip install "maple-trl[plots]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_training(
    log_history: Sequence[Mapping[str, Any]],
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    path: str | os.PathLike,
) -> Path:
    """
    Draw the reward over the steps, the training signal over positions in a completion, and accuracies.

    The reward is drawn for each tag where the log has it, the signal where the log has that, and accuracies before and
    after training.

    Args:
        log_history (`Sequence[Mapping]`):
            A trainer's `state.log_history`: `step`, `reward`, `rewards/NAME/mean`, `tag/TAG/reward` and
            `loss_profile/N` are drawn, entries without a reward are passed over.
        before, after (`Mapping[str, float]`, *optional*):
            Accuracy in `[0, 1]` by tag and under `all`; without them there is no panel for them.
        path (`str` or `os.PathLike`):
            The image file; its ending gives the format.

    Returns:
        `Path`: the file that was written.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
    """
    tags, profile = tag_curves(log_history), signal_profile(log_history)
    draw = [lambda axes: _draw_rewards(axes, log_history)]
    if tags:
        draw.append(lambda axes: _draw_tags(axes, tags))
    if profile:
        draw.append(lambda axes: _draw_profile(axes, profile))
    if before is not None and after is not None:
        draw.append(lambda axes: _draw_accuracies(axes, before, after))
    figure = _figure(5.5 * len(draw), 4)
    for panel, axes in zip(draw, figure.subplots(1, len(draw), squeeze=False)[0], strict=True):
        panel(axes)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Drawn beside its place and then moved, so that a viewer never opens half an image.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        scratch = Path(folder, path.name)
        figure.savefig(scratch, dpi=120)
        os.replace(scratch, path)
    return path


def _draw_profile(axes, profile: Sequence[float]) -> None:
    positions = [index / (len(profile) - 1) for index in range(len(profile))]
    axes.plot(positions, profile, marker=".")
    axes.axhline(1, color="gray", linewidth=1, linestyle="--")
    axes.set(xlabel="position in the completion", ylabel="signal / mean signal", title="Training signal by position")
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.grid(alpha=0.3)


def _draw_tags(axes, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for tag, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=tag, linewidth=1, marker=".", markersize=4)
    axes.set(xlabel="optimizer step", ylabel="mean reward", title="Reward by tag")
    axes.grid(alpha=0.3)
    _legend_below(axes, columns=len(curves))


def _draw_rewards(axes, log_history: Sequence[Mapping[str, Any]]) -> None:
    for name, points in reward_curves(log_history).items():
        steps, values = zip(*points, strict=True)
        total = name == "reward"
        label = "weighted sum" if total else name
        axes.plot(steps, values, label=label, linewidth=2 if total else 1, marker="." if len(steps) < 3 else None)
    axes.set(xlabel="optimizer step", ylabel="mean reward", title="Reward")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def _draw_accuracies(axes, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    rows = accuracy_rows(before, after)
    for column, shift, label in ((1, -0.2, "before"), (2, 0.2, "after")):
        positions = [index + shift for index in range(len(rows))]
        bars = axes.bar(positions, [row[column] for row in rows], width=0.4, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set(ylim=(0, 1.1), ylabel="sampled accuracy", title="Accuracy by tag")
    axes.set_xticks(range(len(rows)), [name for name, *_ in rows])
    axes.grid(alpha=0.3, axis="y")
    _legend_below(axes, columns=2)


def _legend_below(axes, columns: int) -> None:
    """Draw a legend outside of a panel that is full."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, frameon=False, columnspacing=1)
