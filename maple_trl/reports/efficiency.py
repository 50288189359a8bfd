"""Training efficiency: what an optimizer step takes, by the size of its batch (MAPLE, arXiv 2602.11596, 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maple_trl.metrics.accuracy import training_efficiency
from maple_trl.reports.folders import RunData
from maple_trl.reports.sections import Section, missing


DEFINITION = (
    "Training efficiency: wall-clock seconds of an optimizer step (generation, rewards and passes: step_time of the log), "
    "mean over all steps but those of the first log entry, which warm up, divided by the batch, the completions that a "
    "step trains on over all processes (MAPLE, 3.3). Runs are comparable on the same machine."
)


def efficiency_section(run: RunData) -> Section:
    """
    Return the seconds of an optimizer step, and those divided by the completions of its batch.

    The log has means over the steps since the entry before, so each entry counts as often as it has steps. The size of the
    batch is that of the options in `args.json`, also where dynamic sampling drops groups.
    """
    if run.kind == "evaluation":
        return missing("An evaluation makes no optimizer steps.")
    seconds, before, entries = [], 0, 0
    for entry in run.log:
        if "step_time" not in entry:
            continue
        steps = [entry["step_time"]] * max(int(entry["step"]) - before, 1)
        before = int(entry["step"])
        seconds = steps if entries == 1 else seconds + steps  # the first entry's steps go once there is another
        entries += 1
    seconds = [value for value in seconds if value > 0]
    if not seconds:
        return missing("The log has no step_time: TRL's GRPO and the trainers that build on it write it.")
    batch = completions_per_step(run.options or {})
    found = training_efficiency(seconds, batch or 1)
    return {
        "seconds_per_step": found.seconds_per_step,
        "seconds_per_completion": found.seconds_per_sample if batch else None,
        "completions_per_step": batch,
        "steps": found.steps,
    }


def completions_per_step(options: dict[str, Any]) -> int | None:
    """Return how many completions an optimizer step trains on, over all processes; `None` where it is not told."""
    names = ("generation_batch_size", "steps_per_generation", "gradient_accumulation_steps")
    whole, parts, taken = (options.get(name) for name in names)
    if not all(isinstance(value, int) and value > 0 for value in (whole, parts, taken)):
        return None
    return max(whole * taken // parts, 1)


def compared_efficiency(found: Sequence[Section]) -> list[dict[str, Any]]:
    """Return how much of the first run's time each further one takes, per step and per completion, where both are known."""
    if not found or "missing" in found[0]:
        return []
    first, ratios = found[0], []
    for i, other in enumerate(found[1:], 1):
        if "missing" in other:
            continue
        known = first["seconds_per_completion"] and other["seconds_per_completion"]
        per = other["seconds_per_completion"] / first["seconds_per_completion"] if known else None
        ratio = other["seconds_per_step"] / first["seconds_per_step"]
        ratios.append({"run": i, "per_step": ratio, "per_completion": per})
    return ratios
