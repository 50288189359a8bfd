"""The options of a run, and what was changed in them between two of its starts."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from maple_trl.files import read_json, write_atomically


OPTIONS_FILE = "args.json"
"""Every option of a run as its last start had it, without keys."""

CHANGES_FILE = "option_changes.json"
"""`{"changes": [{"step", "options": {name: [before, after]}}]}`: what starts from a checkpoint had otherwise than the start before."""


def write_options(
    folder: str | os.PathLike[str],
    options: Mapping[str, Any],
    checkpoint: str | os.PathLike[str] | None = None,
    undecided: Collection[str] = (),
) -> dict[str, list[Any]]:
    """
    Write the options of a start, and keep what it changed of those with which its checkpoint was trained.

    Args:
        folder: of the run.
        options: by name, as JSON knows them.
        checkpoint: what the start goes on from; the options before lie beside it. `None` of a first start.
        undecided: names of options that decide no result, which may change.

    Returns:
        `dict`: values before and after, by name; empty where nothing was changed or nothing is known of before.
    """
    former, earlier = ({}, []) if checkpoint is None else _beside(Path(checkpoint))
    # One that there was not, as before an update of this package, was not changed by anybody.
    names = [name for name in options if name in former and name not in undecided]
    changed = {name: [former[name], options[name]] for name in names if former[name] != options[name]}
    if changed:
        step = (read_json(Path(checkpoint or "", "trainer_state.json")) or {}).get("global_step")
        earlier.append({"step": step, "options": changed})
    place = Path(folder, CHANGES_FILE)
    if earlier:
        write_atomically(place, json.dumps({"changes": earlier}, indent=2) + "\n")
    else:
        place.unlink(missing_ok=True)
    write_atomically(Path(folder, OPTIONS_FILE), json.dumps(options, indent=2) + "\n")
    return changed


def read_changes(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return what was changed in a run's options, first changes first: `step`, and by name `[before, after]` in `options`."""
    try:
        found = read_json(Path(folder, CHANGES_FILE))
        return [{"step": entry["step"], "options": dict(entry["options"])} for entry in (found or {})["changes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def told(changed: Mapping[str, list[Any]]) -> str:
    """Say in one clause what was changed: `beta 0.0 -> 0.04, num_frames 8 -> 4`."""
    return ", ".join(f"{name} {_text(before)} -> {_text(after)}" for name, (before, after) in changed.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _beside(checkpoint: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the options with which a checkpoint's run was started last, and the changes before them."""
    try:
        former = read_json(checkpoint.absolute().parent / OPTIONS_FILE)
    except (OSError, ValueError):
        former = None
    return former if isinstance(former, dict) else {}, read_changes(checkpoint.absolute().parent)
