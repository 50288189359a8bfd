"""
Draws the pictures of docs/concepts.md and of the pages that it leads to: `docs/concepts/*.svg`.

    python scripts/draw_concepts.py
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from svg_files import DRAWN, compact

from maple_trl import ModalityTag
from maple_trl.algorithms import tas_weights


FOLDER = Path(__file__).resolve().parents[1] / "docs" / "concepts"
VIDEO, AUDIO, TEXT, GREY, DARK = "#2a9d8f", "#e76f51", "#e9b44c", "#d9dee2", "#264653"
SIGNALS = {"V": ("video", VIDEO), "A": ("audio", AUDIO), "S": ("subtitles", TEXT)}


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", **words) -> None:
    """Draw a box with a text in its middle."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.07", facecolor=colour, edgecolor="white"
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **{"fontsize": 9, "color": DARK} | words)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=DARK, linewidth=1.1))


def canvas(width: float, height: float, right: float, top: float) -> tuple[Figure, Axes]:
    """Return a figure with one empty area from (0, 0) to (right, top)."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    axes.axis("off")
    return figure, axes


def draw_tags() -> Figure:
    """Draw what each of the seven tags feeds of one clip, and that all stand in one batch."""
    figure, axes = canvas(8, 3.9, 10, 7.9)
    for column, (name, colour) in enumerate(SIGNALS.values()):
        axes.text(2.55 + 1.9 * column, 7.4, name, ha="center", fontsize=10, color=colour, weight="bold")
    axes.text(8.6, 7.4, "question", ha="center", fontsize=10, color=DARK, weight="bold")
    for row, tag in enumerate(ModalityTag):
        y = 6.3 - row
        axes.text(0.75, y + 0.35, tag.name, ha="center", va="center", fontsize=11, weight="bold", color=DARK)
        for column, (letter, (name, colour)) in enumerate(SIGNALS.items()):
            fed = letter in tag.name
            words = {"color": "white"} if fed and letter != "S" else {}
            box(axes, 1.7 + 1.9 * column, y, 1.7, 0.72, colour if fed else "#f3f5f6", name if fed else "", **words)
        box(axes, 7.75, y, 1.7, 0.72, GREY, "text")
    return figure


def draw_mapo() -> Figure:
    """Draw the way of a rollout by MAPO: rows of a tag, their completions, advantages, weight, and difficulty back."""
    figure, axes = canvas(9, 3.5, 12.6, 5)
    for place, (tag, colour) in enumerate((("V", VIDEO), ("AS", AUDIO), ("VAS", TEXT))):
        for row in range(3):
            box(
                axes,
                0.1 + 0.13 * row,
                3.45 - 1.35 * place + 0.13 * row,
                1.45,
                0.62,
                colour,
                tag if row == 2 else "",
                color="white" if place < 2 else DARK,
                weight="bold",
            )
    axes.text(0.95, 4.6, "rows by tag", ha="center", fontsize=9, color=DARK)
    arrow(axes, (1.95, 2.5), (2.6, 2.5))
    axes.text(3.85, 4.6, "one tag a rollout: G completions each", ha="center", fontsize=9, color=DARK)
    rewards = ((1, 0, 0, 1), (0, 0, 1, 0), (1, 1, 1, 1))
    for row, rewarded in enumerate(rewards):
        y = 3.25 - 1.0 * row
        box(axes, 2.7, y, 0.8, 0.6, AUDIO, "AS", color="white", weight="bold")
        for place, reward in enumerate(rewarded):
            box(axes, 3.6 + 0.43 * place, y, 0.4, 0.6, "#a8dadc" if reward else GREY, str(reward))
    axes.text(3.9, 0.72, "all alike: filtered, if asked for", ha="center", fontsize=8, style="italic", color=DARK)
    arrow(axes, (5.45, 2.5), (6.1, 2.5))
    axes.text(7.35, 4.6, "advantages", ha="center", fontsize=9, color=DARK)
    box(axes, 6.2, 2.55, 2.3, 1.2, "#eef2f4", "reward - mean of\nits prompt")
    box(axes, 6.2, 1.15, 2.3, 1.2, "#eef2f4", "/ deviation\nwithin the tag")
    arrow(axes, (8.6, 2.5), (9.25, 2.5))
    axes.text(10.9, 4.6, "loss", ha="center", fontsize=9, color=DARK)
    box(axes, 9.35, 1.15, 3.1, 2.6, "#eef2f4", "Σ over tags of\n\nweight × mean over\nthe tag's completions")
    arrow(axes, (10.9, 1.05), (10.9, 0.4))
    axes.plot((10.9, 0.9), (0.3, 0.3), color=DARK, linewidth=1.1)
    arrow(axes, (0.9, 0.3), (0.9, 0.6))
    axes.text(
        6.6,
        0.02,
        "how hard each tag still is: weights, and which tag comes next",
        ha="center",
        va="bottom",
        fontsize=8,
        color=DARK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    return figure


def draw_avatar() -> Figure:
    """Draw a group with replayed completions, the buffer's tiers by their shares, and the weights of positions."""
    figure, axes = canvas(9, 3.2, 12.6, 4.6)
    axes.text(1.6, 4.2, "buffer, by difficulty", ha="center", fontsize=9, color=DARK)
    for bottom, share, name, colour in (
        (0.3, 0.4, "hard 40 %", AUDIO),
        (1.7, 0.35, "medium 35 %", TEXT),
        (2.95, 0.25, "easy 25 %", VIDEO),
    ):
        box(axes, 0.4, bottom, 2.4, 3.4 * share, colour, name, color=DARK if colour == TEXT else "white")
    arrow(axes, (2.95, 1.4), (3.7, 1.4))
    axes.text(5.2, 4.2, "a group of 8 completions", ha="center", fontsize=9, color=DARK)
    for place in range(8):
        fresh = place < 4
        box(
            axes,
            3.8,
            3.55 - 0.46 * place,
            2.8,
            0.42,
            "#a8dadc" if fresh else "#f4c7b8",
            "fresh" if fresh else "replayed",
            fontsize=8,
        )
    plot = figure.add_axes((0.6, 0.17, 0.37, 0.68))
    length = 101
    x = np.linspace(0, 1, length)
    mask = torch.ones(1, length)
    for shape, style in (
        ("parabolic", "-"),
        ("linear_incline", "--"),
        ("linear_decay", ":"),
        ("inverse_parabolic", "-."),
    ):
        plot.plot(
            x,
            tas_weights(mask, 0.3, shape)[0].numpy(),
            style,
            color=DARK if shape == "parabolic" else "#8795a1",
            linewidth=2 if shape == "parabolic" else 1,
            label=shape,
        )
    plot.set_title("weight of a token's advantage (λ = 0.3)", fontsize=9, color=DARK)
    plot.set_xlabel("position in the completion", fontsize=8)
    plot.tick_params(labelsize=7)
    plot.set_ylim(0.98, 1.46)
    plot.legend(fontsize=7, frameon=False, loc="upper center", ncols=2)
    plot.spines[["top", "right"]].set_visible(False)
    return figure


def draw_shared_prompt() -> Figure:
    """Draw a row that holds a prompt once with three completions, its positions, and its attention."""
    figure, axes = canvas(9, 3.6, 12.6, 5.04)
    prompt, length = 5, 3
    kinds = [VIDEO] * 3 + [AUDIO] + [GREY]
    axes.text(3.5, 4.6, "each completion apart: the prompt three times", ha="center", fontsize=9, color=DARK)
    answers = ("#a8dadc", "#f4c7b8", "#cdb4db")
    for row, colour in enumerate(answers):
        for place, kind in enumerate([*kinds, *[colour] * length]):
            axes.add_patch(Rectangle((0.4 + 0.7 * place, 3.9 - 0.5 * row), 0.64, 0.42, facecolor=kind))
    axes.text(3.5, 2.1, "shared: once, and positions restart behind it", ha="center", fontsize=9, color=DARK)
    row = [*kinds, *(colour for colour in answers for _ in range(length))]
    positions = [*range(prompt), *list(range(prompt, prompt + length)) * 3]
    for place, (kind, position) in enumerate(zip(row, positions, strict=True)):
        axes.add_patch(Rectangle((0.4 + 0.44 * place, 1.35), 0.4, 0.42, facecolor=kind))
        axes.text(0.6 + 0.44 * place, 1.12, str(position), ha="center", va="center", fontsize=7, color=DARK)
    axes.text(0.4, 0.6, "video", fontsize=8, color=VIDEO, weight="bold")
    axes.text(1.2, 0.6, "audio", fontsize=8, color=AUDIO, weight="bold")
    axes.text(2.0, 0.6, "text", fontsize=8, color="#8795a1", weight="bold")
    axes.text(2.8, 0.6, "and three completions", fontsize=8, color=DARK)
    size = len(row)
    part = [0] * prompt + [1 + place // length for place in range(size - prompt)]
    plot = figure.add_axes((0.63, 0.08, 0.35, 0.8))
    plot.set_xlim(0, size)
    plot.set_ylim(size, 0)
    plot.set_aspect("equal")
    for query in range(size):
        for key in range(size):
            seen = key <= query and part[key] in (0, part[query])
            plot.add_patch(Rectangle((key, query), 0.94, 0.94, facecolor=row[key] if seen else "#f3f5f6"))
    plot.set_title("which token (row) sees which (column)", fontsize=9, color=DARK)
    plot.axis("off")
    return figure


def main() -> None:
    """Write all pictures, the same bytes each time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with rc_context(DRAWN):
        for name, draw in (
            ("tags", draw_tags),
            ("mapo", draw_mapo),
            ("avatar", draw_avatar),
            ("shared_prompt", draw_shared_prompt),
        ):
            drawn = io.StringIO()
            draw().savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
            (FOLDER / f"{name}.svg").write_text(compact(drawn.getvalue()), encoding="utf-8")


if __name__ == "__main__":
    main()
