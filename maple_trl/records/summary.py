"""The summary of a training job as it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maple_trl.modalities import ModalityTag


def accuracy_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Return before and after by tag, in canonical order and `all` last."""
    names = [*(tag.value for tag in ModalityTag), "all"]
    return [(name, before[name], after[name]) for name in names if name in before and name in after]


def print_summary(summary: Mapping[str, Any], output_dir: str) -> None:
    """Print accuracy per tag before and after, what was learned and written, and last what was left out."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if summary["before"] is not None:
        table = Table(title="Sampled accuracy", title_justify="left")
        table.add_column("tag")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        for name, old, new in accuracy_rows(summary["before"], summary["after"]):
            if name == "all":
                table.add_section()
            table.add_row(name, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
        console.print(table)
    learned = summary.get("learned") or {}
    if learned:
        ends = ", ".join(f"{name} {first:.3f} -> {last:.3f}" for name, (first, last) in learned.items())
        text = f"Learned, from the first to the last tenth of the log: {ends}"
        console.print(text, highlight=False, soft_wrap=True)
    steps, seconds = summary["steps"], summary["seconds"]
    line = f"{steps} steps, {seconds:.0f} s in all; results in {output_dir}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if "written" in summary:
        written = f"Written: {', '.join(summary['written'])}"
        console.print(written, highlight=False, markup=False, soft_wrap=True)
    if summary.get("fired"):
        fired = f"Fired: {'; '.join(note['text'] for note in summary['fired'])}"
        console.print(fired, highlight=False, markup=False, soft_wrap=True)
    if "left_out" in summary:
        console.print(left_out_line(summary["left_out"]), highlight=False, markup=False, soft_wrap=True)


def left_out_line(notes: Sequence[Mapping[str, Any]]) -> str:
    """Say in one line what was left out of a run, failed in it or never fired."""
    if not notes:
        return "Nothing was left out, failed or never fired."
    return f"Left out, failed or never fired: {'; '.join(note['text'] for note in notes)}"
