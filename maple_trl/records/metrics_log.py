"""The log of a training run, and what its names mean."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from maple_trl.files import as_json, write_atomically
from maple_trl.modalities import ModalityTag


LOG_ENTRIES = 1_000
"""Entries of its log that a trainer holds in memory, and writes into each checkpoint; all are in `metrics.jsonl`."""
RATIO_EDGES = (1 / 4, 1 / 2, 4 / 5, 9 / 10, 19 / 20, 20 / 19, 10 / 9, 5 / 4, 2, 4)
"""
Borders of the bins of importance ratios, for `replay/ratio_share/0` to `/10`: below the first, from each to the next, and
from the last on. The bin in the middle is within 5 % of 1; on either side the same ratios up and down.
"""


def write_metrics(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write a trainer's log as JSON lines; values that JSON cannot hold (NaN, infinity) become `null`."""
    write_atomically(path, "".join(json.dumps(as_json(entry)) + "\n" for entry in log_history))


def whole_log(
    log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], kept: int | None = None
) -> list[Mapping[str, Any]]:
    """
    Return a run's log from its beginning, of which a trainer may hold but the end.

    Args:
        log_history: what the trainer holds.
        path: the file that has been written meanwhile.
        kept (`int`, *optional*): entries that a trainer holds at most, [`LOG_ENTRIES`] by default; of fewer, none is missing.
    """
    if len(log_history) < (LOG_ENTRIES if kept is None else kept) or not os.path.isfile(path):
        return list(log_history)
    first = log_history[0].get("step", 0)
    written = read_log(path)
    # Of a step may be several entries, those of an evaluation among them.
    held = sum(entry.get("step") == first for entry in log_history)
    older = [entry for entry in written if entry.get("step", 0) < first]
    same = [entry for entry in written if entry.get("step") == first]
    return [*older, *same[: max(len(same) - held, 0)], *log_history]


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the entries of a log's file; half a line, as of a run that was killed, is none."""
    with open(path, encoding="utf-8") as file:
        return [entry for line in file if (entry := _entry(line)) is not None]


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:  # half a line, of a run that was killed
        return None
    return entry if isinstance(entry, dict) else None


# What a log calls the numbers that sum a run up; the first one that is there counts.
_HEADLINES = {
    "reward": ("reward",),
    "loss": ("loss",),
    "accuracy": ("tag/all/accuracy", "rewards/accuracy_reward/mean"),
    "token accuracy": ("mean_token_accuracy",),
    "length": ("completions/mean_length",),
    **{str(tag): (f"tag/{tag}/accuracy", f"tag/{tag}/rewards/accuracy_reward") for tag in ModalityTag},
}


def headline(entry: Mapping[str, Any], name: str) -> float | None:
    """
    Return a headline number in an entry of a log; `None` where it has no finite one.

    Names are `"reward"`, `"loss"`, `"accuracy"`, `"token accuracy"`, `"length"`, and a tag for its accuracy.
    """
    values = (entry.get(key) for key in _HEADLINES[name])
    return next(filter(_is_finite, values), None)


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def first_and_last(log_history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """
    Average headline numbers of a log over the first and over the last tenth of its entries that have them.

    They are reward (or loss, where there is none), accuracy and that of each tag.
    """
    found = {}
    for name in ("reward", "loss", "accuracy", "token accuracy", *map(str, ModalityTag)):
        values = [value for entry in log_history if (value := headline(entry, name)) is not None]
        tenth = max(len(values) // 10, 1)
        if len(values) > 1 and not (name == "loss" and "reward" in found):
            found[name] = (sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth)
    return found


def reward_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """
    Return the curves in a log: `"reward"` (the weighted sum) and one per reward function, as `(step, value)`.

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
            if _is_finite(value):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def tag_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the mean reward of each tag in a log, as `(step, value)`; empty where it is not logged by tag."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for tag in map(str, ModalityTag):
        for entry in log_history:
            value = entry.get(f"tag/{tag}/reward")
            if _is_finite(value) and "step" in entry:
                curves.setdefault(tag, []).append((entry["step"], value))
    return curves


def signal_profile(log_history: Sequence[Mapping[str, Any]]) -> list[float]:
    """
    Return the size of the training signal over positions in a completion, as a share of its mean over positions.

    Means of `loss_profile/0`, `loss_profile/1`, … over a log (AVATAR, arXiv 2508.03100, Fig. 8); empty without them.
    """
    means: list[float] = []
    while values := [entry[name] for entry in log_history if (name := f"loss_profile/{len(means)}") in entry]:
        means.append(sum(values) / len(values))
    return [mean * len(means) / sum(means) for mean in means] if sum(means) else []
