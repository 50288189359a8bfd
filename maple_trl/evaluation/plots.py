"""Plots. matplotlib is optional: `pip install "maple-trl[plots]"`."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maple_trl.modalities import ModalityTag


def _figure(width: float, height: float):
    """
    A figure that belongs to nobody's interactive session.

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
    Draws the reward over the steps, and the accuracy of each tag before and after training.

    Args:
        log_history (`Sequence[Mapping]`):
            A trainer's `state.log_history`: `step`, `reward` and `rewards/NAME/mean` are drawn, entries without a
            reward are passed over.
        before, after (`Mapping[str, float]`, *optional*):
            Accuracy in `[0, 1]` by tag and under `all`; without them there is no second panel.
        path (`str` or `os.PathLike`):
            The image file; its ending gives the format.

    Returns:
        `Path`: the file that was written.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
    """
    bars = before is not None and after is not None
    figure = _figure(11 if bars else 6, 4)
    axes = figure.subplots(1, 2 if bars else 1, squeeze=False)[0]
    _draw_rewards(axes[0], log_history)
    if bars:
        _draw_accuracies(axes[1], before, after)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Drawn beside its place and then moved, so that a viewer never opens half an image.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        scratch = Path(folder, path.name)
        figure.savefig(scratch, dpi=120)
        os.replace(scratch, path)
    return path


def reward_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """
    The curves in a log: `"reward"` (the weighted sum) and one per reward function, as `(step, value)`.

    Values that are no finite number (a reward that scored no row of a step) are left out.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        if "step" not in entry:
            continue
        for key, value in entry.items():
            name = key.removeprefix("rewards/").removesuffix("/mean")
            if key != "reward" and key != f"rewards/{name}/mean":
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


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
    names = [name for name in (*(tag.value for tag in ModalityTag), "all") if name in before and name in after]
    for values, shift, label in ((before, -0.2, "before"), (after, 0.2, "after")):
        positions = [index + shift for index in range(len(names))]
        bars = axes.bar(positions, [values[name] for name in names], width=0.4, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set(ylim=(0, 1.1), ylabel="sampled accuracy", title="Accuracy by tag")
    axes.set_xticks(range(len(names)), names)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)  # below: bars fill the panel
