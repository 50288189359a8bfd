"""What `maple-trl eval` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any


_SHOWN = 10  # rows with errors that are printed
_CHARACTERS = 300  # of what is said of one


def print_results(result: Mapping[str, Any], folder: str | Path) -> None:
    """Print accuracy by access and tag, the modality gap, and what went wrong."""
    from rich.console import Console
    from rich.table import Table

    from maple_trl.modalities import ModalityTag

    console, accesses = Console(), result["accesses"]
    table = Table(title="Accuracy (pass@1)", title_justify="left")
    table.add_column("tag")
    for access in accesses:
        table.add_column(access, justify="right")

    def add(name: str, value: Callable[[Mapping[str, Any]], Any]) -> None:
        table.add_row(name, *(_plain(value(found)) for found in accesses.values()))

    for tag in map(str, ModalityTag):
        if any(tag in found["accuracy"].get("per_tag", {}) for found in accesses.values()):
            add(tag, lambda found, tag=tag: found["accuracy"].get("per_tag", {}).get(tag, {}).get("value"))
    table.add_section()
    for name, end in (("all", "value"), ("  from", "low"), ("  to", "high")):
        add(name, lambda found, end=end: found["accuracy"].get("sample_mean", {}).get(end))
    add("mean of tags", lambda found: (found["accuracy"].get("tag_mean") or {}).get("value"))
    add("modality gap", lambda found: found["modality_gap"]["sample"].get("mean", {}).get("value"))
    table.add_section()
    for name in ("scored", "errors", "unscored", "lacking"):
        add(name, lambda found, name=name: found["counts"][name])
    add("clips", lambda found: found["accuracy"].get("sample_mean", {}).get("clips"))
    console.print(table)
    macro = result["superset_macro"]
    if "value" in macro and set(macro["inputs"]) != {"1"}:  # of one input each it is the mean of tags
        low, high = (_plain(macro[end]) for end in ("low", "high"))
        text = f"superset macro {macro['value']:.3f} [{low}, {high}]: mean over inputs that contain the tag, then over tags"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if "per_stratum" in result.get("over_inputs", {}):
        _print_over_inputs(console, result["over_inputs"])
    if "value" in result["fusion_gain"]:
        console.print(f"fusion gain {result['fusion_gain']['value']:.3f}", highlight=False)
    failed: dict[tuple, list[str]] = {}
    for error in result["errors"]:
        where = shorten(": ".join(filter(None, (error["path"], error["detail"]))), _CHARACTERS, placeholder=" …")
        failed.setdefault((error["row"], error["id"], error["reason"], where), []).append(error["access"])
    for (row, name, reason, where), under in list(failed.items())[:_SHOWN]:
        text = f"row {row} ({name}), access {', '.join(under)}: {reason}: {where}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if len(failed) > _SHOWN:
        console.print(f"and {len(failed) - _SHOWN} more; result.json names them all", highlight=False)
    if result["left_out"]:
        console.print(f"{len(result['left_out'])} questions were left out; result.json names them", highlight=False)
    console.print(f"results in {folder}", highlight=False, markup=False, soft_wrap=True)


def _print_over_inputs(console: Any, found: Mapping[str, Any]) -> None:
    """Print accuracy over all inputs that questions were asked with, by what they require and by stratum."""
    from rich.table import Table

    table = Table(title="Over all inputs, by required tag and stratum", title_justify="left")
    for name in ("required", "accuracy", "from", "to", "rows"):
        table.add_column(name, justify="left" if name == "required" else "right")

    def add(name: str, estimate: Mapping[str, Any]) -> None:
        table.add_row(name, *(_plain(estimate[end]) for end in ("value", "low", "high", "count")))

    for tag, estimate in found["per_tag"].items():
        add(tag, estimate)
    table.add_section()
    add("all", found["sample_mean"])
    table.add_section()
    for stratum, estimate in found["per_stratum"].items():
        add(stratum, estimate)
    console.print(table)


def _plain(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
