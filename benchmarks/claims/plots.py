"""Plots of a claim: the effects of its measures with their intervals, and the curves that these are read off."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from evidence import Evidence
from register import EFFECTS, Claim, Measure
from scipy.special import stdtrit
from values import point_name
from verdicts import Finding, no_effect


GREY, BLUE, ORANGE = "#7d7d7d", "#3f83c9", "#c97a2b"
"""Legible on white and on black."""


Shown = tuple[Measure, Finding, float | None]
"""A measure, what is found of it, and what the paper reports of it."""


def forest(shown: Sequence[Shown]) -> str:
    """Return a plot of effects with their intervals, as SVG; equal input gives equal bytes."""
    return as_svg(plotted, shown)


def as_svg(draw: Callable[..., Any], *of: Any) -> str:
    """Return the figure that a function draws as SVG, the same bytes each time."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "claims", "svg.fonttype": "none", "font.size": 9}):
        FigureCanvasSVG(draw(*of)).print_svg(stream, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def plotted(shown: Sequence[Shown]) -> Any:
    """Draw effects with their intervals: differences, then ratios."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in EFFECTS if any(each[0].effect == kind for each in shown)]
    panels = [[each for each in shown if each[0].effect == kind] for kind in kinds]
    heights = [0.9 + 0.3 * len(panel) for panel in panels]
    figure = Figure(figsize=(7, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for kind, panel, axis in zip(kinds, panels, axes, strict=True):
        _draw(axis, kind, panel)
    return figure


def _draw(axis: Any, kind: str, panel: Sequence[Shown]) -> None:
    none = no_effect(kind)
    axis.axvline(none, color=GREY, linewidth=1)
    for place, (measure, found, figure) in enumerate(panel):
        estimate = found.estimate
        assert estimate is not None
        color = BLUE if measure.role == "claim" else ORANGE
        fill = color if measure.role == "claim" and not found.withheld else "none"
        axis.plot([estimate.low, estimate.high], [place, place], color=color, linewidth=1.5)
        axis.plot(estimate.value, place, "o", color=color, markerfacecolor=fill, markersize=5)
        if figure is not None:
            axis.plot(figure, place, "x", color=GREY, markersize=6)
        signs = {"above": (1,), "not above": (1,), "below": (-1,), "not below": (-1,), "equal": (-1, 1)}[
            measure.expects
        ]
        for sign in signs:
            axis.plot(none + sign * measure.least, place, "|", color=GREY, markersize=12)
    names = [
        one.name + f" ({one.role})" * (one.role != "claim") + " (not judged)" * found.withheld
        for one, found, _ in panel
    ]
    axis.set_yticks(range(len(panel)), names)
    axis.set_ylim(len(panel) - 0.5, -0.5)
    if kind == "ratio":
        lows = [found.estimate.low for _, found, _ in panel if found.estimate]
        highs = [found.estimate.high for _, found, _ in panel if found.estimate]
        if max(highs) / max(min(lows), 1e-12) > 20:
            axis.set_xscale("log")
    told = f"{kind}, with its interval\ngrey ticks: the smallest effect that would matter"
    told += "; crosses: the paper's" * any(figure is not None for _, _, figure in panel)
    axis.set_xlabel(told, color=GREY)
    _bare(axis)


def _bare(axis: Any) -> None:
    """Leave the page's background and no frame."""
    axis.patch.set_alpha(0)
    axis.figure.patch.set_alpha(0)
    axis.tick_params(colors=GREY)
    for spine in axis.spines.values():
        spine.set_visible(False)


# Curves

SHOWN_COSTS = {
    "completion_tokens": "generated tokens",
    "cpu_seconds": "CPU seconds of training",
    "wall_seconds": "seconds of training",
    "step": "steps",
}
GRID = 25
"""Costs at which a curve is drawn."""
LEVEL = 0.05
"""Of the complement of a band, at each cost."""
COLORS = ("#3f83c9", "#c97a2b", "#4a9c5d", "#b0508f", "#8a72c9", "#8c8c3c", "#3d9a9a", "#c05050")


@dataclass(frozen=True)
class Curves:
    """
    Curves of accuracy that measures of a claim are read off.

    Attributes:
        instrument: the part of a result that they stand in.
        of: whose accuracy: `all`, a tag or a tier.
        cost: what it is drawn over, as points name it.
        variants: whose curves, those first that a measure which decides is about.
    """

    instrument: str
    of: str
    cost: str
    variants: tuple[str, ...]

    def points(self, result: Mapping[str, Any]) -> list[tuple[float, float]]:
        """Return cost and accuracy at each point of a run's curve."""
        points = result[self.instrument]["points"]
        return [(point[self.cost], point.get("accuracy", point)[self.of]) for point in points]


def curves_of(claim: Claim) -> list[Curves]:
    """Return the curves that a claim's measures are read off, in the order of the measures."""
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for measure in sorted(claim.measures, key=lambda one: one.role != "claim"):
        instrument = next((path for path in measure.metric.paths if path in ("curve", "tier_curve")), None)
        if instrument is None:
            continue
        told = measure.metric.arguments
        of, cost = told.get("what", told.get("tier", "all")), told.get("cost", "completions")
        found.setdefault((instrument, point_name(of), point_name(cost)), {}).update(dict.fromkeys(measure.variants))
    return [Curves(*what, tuple(variants)) for what, variants in found.items()]


def band(runs: Sequence[Sequence[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Return the mean over runs of a curve, at costs that all of them reached.

    Returns:
        Costs, means, and how far the interval of each mean reaches, by Student's t over runs; each of `GRID` numbers.
    """
    costs_G = np.linspace(0, min(points[-1][0] for points in runs), GRID)
    values_RG = np.stack([np.interp(costs_G, *zip(*points, strict=True)) for points in runs])
    reach = float(stdtrit(len(runs) - 1, 1 - LEVEL / 2)) / len(runs) ** 0.5
    return costs_G, values_RG.mean(axis=0), values_RG.std(axis=0, ddof=1) * reach


def drawn_curves(evidence: Evidence, claim: Claim) -> str | None:
    """
    Return the curves of a claim as SVG, each with its band; `None` where no two seeds of one are there.

    A variant of which a run has no point is left out, as are those of one seed.
    """
    panels = []
    for curves in curves_of(claim):
        lines = {}
        for name in curves.variants:
            seeds = evidence.seeds([name])
            runs = [curves.points(evidence.read(name, seed)) for seed in seeds]
            if len(runs) > 1 and all(runs):
                lines[f"{name} ({len(runs)} seeds)"] = band(runs)
        if lines:
            panels.append((curves, lines))
    return as_svg(_curves_figure, panels) if panels else None


def _curves_figure(panels: Sequence[tuple[Curves, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (curves, lines) in zip(axes, panels, strict=True):
        for color, (name, (costs_G, means_G, reaches_G)) in zip(COLORS * len(lines), lines.items(), strict=False):
            low_G, high_G = np.clip((means_G - reaches_G, means_G + reaches_G), 0, 1)  # an accuracy
            axis.fill_between(costs_G, low_G, high_G, color=color, alpha=0.18, linewidth=0)
            axis.plot(costs_G, means_G, color=color, linewidth=1.8, label=name)
        axis.set_xlabel(SHOWN_COSTS.get(curves.cost, curves.cost), color=GREY)
        axis.set_ylabel("accuracy" if curves.of == "all" else f"accuracy, {curves.of}", color=GREY)
        axis.grid(color=GREY, alpha=0.25, linewidth=0.6)
        _bare(axis)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, labelcolor=GREY)
    return figure
