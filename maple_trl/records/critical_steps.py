"""Where the critical steps of sampled completions stand, as a judge has told: the file that a report draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maple_trl.files import as_json, write_atomically
from maple_trl.records.run_folder import CRITICAL_STEPS_FILE


def write_critical_steps(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write what a judge has told into the folder of a run or an evaluation."""
    path = Path(folder, CRITICAL_STEPS_FILE)
    write_atomically(path, json.dumps(as_json(found), indent=1, ensure_ascii=False) + "\n")
    return path


def read_critical_steps(folder: Path) -> dict[str, Any] | None:
    """
    Read what a judge has told; `None` where nobody was asked.

    Raises:
        ValueError: for a file that is damaged or something else.
    """
    path = Path(folder, CRITICAL_STEPS_FILE)
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    steps = found.get("steps") if isinstance(found, dict) else None
    fits = isinstance(steps, list) and all(
        isinstance(step, dict) and isinstance(step.get("position"), int | float) and 0 <= step["position"] <= 1
        for step in steps
    )
    if not fits or not isinstance(found.get("judge"), str):
        raise ValueError("it is none of `maple-trl critical-steps`")
    return dict(found)
