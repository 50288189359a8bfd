"""What `maple-trl eval` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from rich.table import Table

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
    add("samples unscored", lambda found: sum(found["ungraded_samples"].values()))
    add("clips", lambda found: found["accuracy"].get("sample_mean", {}).get("clips"))
    console.print(table)
    if "sample_mean" in result["over_inputs"]:
        console.print(_table_over_inputs(result))
    macro = result["superset_macro"]
    if "value" in macro and set(macro["inputs"]) != {"1"}:  # of one input each it is the mean of tags
        low, high = (_plain(macro[end]) for end in ("low", "high"))
        text = f"superset macro {macro['value']:.3f} [{low}, {high}]: mean over inputs that contain the tag, then over tags"
        _say(console, text)
    if "value" in result["fusion_gain"]:
        _say(console, f"fusion gain {result['fusion_gain']['value']:.3f}")
    _print_measured(console, result)
    failed: dict[tuple, list[str]] = {}
    for error in result["errors"]:
        where = shorten(": ".join(filter(None, (error["path"], error["detail"]))), _CHARACTERS, placeholder=" …")
        failed.setdefault((error["row"], error["id"], error["reason"], where), []).append(error["access"])
    for (row, name, reason, where), under in list(failed.items())[:_SHOWN]:
        text = f"row {row} ({name}), access {', '.join(under)}: {reason}: {where}"
        _say(console, text)
    if len(failed) > _SHOWN:
        _say(console, f"and {len(failed) - _SHOWN} more; result.json names them all")
    if result["left_out"]:
        _say(console, f"{len(result['left_out'])} questions were left out; result.json names them")
    _say(console, f"results in {folder}")


def _table_over_inputs(result: Mapping[str, Any]) -> Table:
    """Return accuracy by required tag over all inputs (MAPLE, arXiv 2602.11596, table 4), and over those of each stratum."""
    from rich.table import Table

    from maple_trl.modalities import STRATA, ModalityTag

    strata = {name: result.get("strata", {}).get(name) for name in STRATA}
    columns = {"all inputs": result["over_inputs"]} | {name: found for name, found in strata.items() if found}
    table = Table(title="By required tag, over inputs", title_justify="left")
    for name in ("required", *columns):
        table.add_column(name, justify="left" if name == "required" else "right")
    for tag in map(str, ModalityTag):
        if tag in result["over_inputs"]["per_tag"]:
            values = [found["per_tag"].get(tag, {}).get("value") for found in columns.values()]
            table.add_row(tag, *map(_plain, values))
    table.add_section()
    for name, end in (("all", "value"), ("  from", "low"), ("  to", "high"), ("scored", "count")):
        table.add_row(name, *(_plain(found["sample_mean"][end]) for found in columns.values()))
    return table


def _plain(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _print_measured(console: Any, result: Mapping[str, Any]) -> None:
    """Print what a preset has set, and of each access what is measured beyond accuracy."""
    preset = result.get("preset")
    if preset:
        told = ", ".join(f"{name} {_told(value)}" for name, value in preset["set"].items())
        _say(console, f"preset {preset['name']} set {told or 'nothing that was not given'}")
    for access, found in result["accesses"].items():
        _print_metrics(console, access if len(result["accesses"]) > 1 else None, found)


def _say(console: Any, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _told(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _print_metrics(console: Any, access: str | None, found: Mapping[str, Any]) -> None:
    """Print what benchmarks measure beyond accuracy, what was not judged, and how much sound was left out."""
    under = "" if access is None else f" ({access})"
    for name, estimate in found.get("metrics", {}).items():
        low, high = (_plain(estimate[end]) for end in ("low", "high"))
        _say(console, f"{name}{under} {_plain(estimate['value'])} [{low}, {high}] of {estimate['count']} questions")
    waiting = found.get("reasons", {}).get("no-judge")
    if waiting:
        _say(
            console,
            f"{waiting} open answers{under} need a judge and are not scored, nor counted as wrong: name one with --judge_model",
        )
    sound = found.get("sound", {})
    if sound.get("in_part"):
        _say(
            console,
            f"sound{under}: {sound['in_part']} of {sound['questions']} questions were fed parts of it; {sound['seconds']:.0f} s "
            f"fed, {sound['left_out_seconds']:.0f} s left out",
        )
