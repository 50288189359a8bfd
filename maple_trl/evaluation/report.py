"""What a job writes and prints at its end: files that appear whole, and a table."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maple_trl.modalities import ModalityTag


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a device or a pipe, whose place a file must not take
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def _umask() -> int:
    """The process's umask; a scratch file is private, the finished one is not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_metrics(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Writes a trainer's log as JSON lines; values that JSON cannot hold (NaN, infinity) become `null`."""
    write_atomically(path, "".join(json.dumps(as_json(entry)) + "\n" for entry in log_history))


def as_json(value: Any) -> Any:
    """A value as strict JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def accuracy_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Before and after by tag, in canonical order and `all` last."""
    names = [*(tag.value for tag in ModalityTag), "all"]
    return [(name, before[name], after[name]) for name in names if name in before and name in after]


def print_summary(summary: Mapping[str, Any], output_dir: str) -> None:
    """Prints accuracy per tag before and after, where the results are, and last what was left out."""
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
    steps, seconds = summary["steps"], summary["seconds"]
    console.print(f"{steps} steps, {seconds:.0f} s in all; results in {output_dir}", highlight=False)
    if "left_out" in summary:
        console.print(left_out_line(summary["left_out"]), highlight=False, markup=False, soft_wrap=True)


def left_out_line(notes: Sequence[Mapping[str, Any]]) -> str:
    """What was left out of a run, failed in it or never fired, in one line."""
    if not notes:
        return "Nothing was left out, failed or never fired."
    return f"Left out, failed or never fired: {'; '.join(note['text'] for note in notes)}"
