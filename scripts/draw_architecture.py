"""
Draws which folder of the package imports which: `docs/architecture.png`, from the sources.

    python scripts/draw_architecture.py
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Arc


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "modalities": "tags and signals",
    "files": "whole files, digests",
    "algorithms": "advantages, weights, curriculum, replay: pure",
    "metrics": "accuracy, gaps, intervals: pure",
    "planning": "memory and time, computed: pure",
    "chat": "one client for judges and teachers",
    "omni": "media, prompts, model families",
    "records": "what runs write and others read",
    "hub": "cards, uploads, exports",
    "data": "schema, builders, benchmarks",
    "rewards": "callables and judges",
    "rollout": "what samples completions",
    "evaluation": "asks models, local and served",
    "trainers": "GRPO, MAPO, AVATAR, SFT",
    "reports": "pages and plots",
    "integrations": "lmms-eval, trackers",
    "jobs": "what a YAML file means",
    "cli": "one file per command",
}


def folder_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def count_imports() -> Counter[tuple[str, str]]:
    """How many imports lead from a folder to another."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in (ROOT / "maple_trl").rglob("*.py"):
        source = path.relative_to(ROOT / "maple_trl").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for target in (folder_of(name) for name in names if name.startswith("maple_trl.")):
                if source in FOLDERS and target in FOLDERS and source != target:
                    counts[source, target] += 1
    return counts


def draw(path: Path) -> None:
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = {name: -i for i, name in enumerate(FOLDERS)}
    for name, place in places.items():
        axes.text(-0.3, place, name, ha="right", va="center", weight="bold", fontsize=11)
        axes.text(-3.3, place, FOLDERS[name], ha="right", va="center", color="#555555", fontsize=9)
        axes.plot(0, place, "o", color="#1259a8", markersize=7)
    for (source, target), count in count_imports().items():
        middle, height = (places[source] + places[target]) / 2, abs(places[source] - places[target])
        color = "#1259a8" if places[source] < places[target] else "#c0392b"  # red: downwards, which no import may lead
        width = 0.5 + count**0.5 / 2
        axes.add_patch(
            Arc((0, middle), height, height, theta1=-90, theta2=90, color=color, alpha=0.45, linewidth=width)
        )
    axes.set(xlim=(-10.5, 8.0), ylim=(-len(FOLDERS) + 0.3, 0.7), aspect="equal")
    axes.set_title("Each folder imports from those above it; a line is as wide as there are imports", fontsize=11)
    axes.axis("off")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    (ROOT / "docs").mkdir(exist_ok=True)
    draw(ROOT / "docs" / "architecture.png")
