"""Positions of critical steps in the reasoning, as a judge has told (AVATAR, arXiv 2508.03100, Fig. 6)."""

from __future__ import annotations

import numpy as np
import torch

from maple_trl.algorithms.shaping import tas_weights
from maple_trl.records.critical_steps import CRITICAL_STEPS_FILE, read_critical_steps
from maple_trl.reports.folders import RunData
from maple_trl.reports.sections import Section, missing
from maple_trl.reports.series import rounded


BINS = 10
_TOKENS = 1000  # of the reasoning whose weights are drawn


def critical_section(run: RunData) -> Section:
    """Return the histogram of the positions, from 0 to 1, and the weights that TAS gives to each part, for comparison."""
    try:
        found = read_critical_steps(run.folder)
    except (OSError, ValueError) as error:
        return missing(f"{CRITICAL_STEPS_FILE} cannot be read: {error}")
    if found is None:
        return missing(
            "No judge was asked where the critical steps stand: `maple-trl critical-steps RUN --model NAME --base_url URL` "
            f"asks one, and writes {CRITICAL_STEPS_FILE} into the run's folder."
        )
    positions = np.array([step["position"] for step in found["steps"]], dtype=float)
    if not len(positions):
        return missing(f"The judge has told no position: {CRITICAL_STEPS_FILE} says of which completions, and why.")
    counts = np.histogram(positions, bins=BINS, range=(0, 1))[0]
    return {
        "judge": found["judge"],
        "count": len(positions),
        "left_out": found.get("left_out") or {},
        "failed": found.get("failed") or {},
        "share": rounded(counts / len(positions)),
        "mean": float(positions.mean()),
        "shaped": shaped_shares(run),
    }


def shaped_shares(run: RunData) -> Section | None:
    """Return which share of the weight of TAS falls on each tenth of a completion; `None` where a run does not shape."""
    options = run.options or {}
    lam, shape = options.get("tas_lambda"), options.get("tas_shape", "parabolic")
    if not lam:
        return None
    try:
        weights = tas_weights(torch.ones(1, _TOKENS), lam, shape)[0].numpy().reshape(BINS, -1).sum(axis=1)
    except ValueError:
        return None
    return {"lambda": lam, "shape": shape, "share": rounded(weights / weights.sum())}
