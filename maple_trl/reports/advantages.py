"""Advantages of completions, fresh and replayed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maple_trl.reports.folders import RunData
from maple_trl.reports.rollouts import Rollouts
from maple_trl.reports.sections import Section, missing, no_rollouts
from maple_trl.reports.series import rounded


BINS = 41
"""An odd number, so that an advantage of 0 is in the middle of a bin."""
_MOST = 0.995  # of all sizes of advantages that the bins reach; what is beyond counts to the outermost ones


def advantage_sections(runs: Sequence[RunData], rollouts: Sequence[Rollouts | None]) -> list[Section]:
    """
    Return, of each run, histograms of the advantages of fresh and of replayed completions, in the same bins.

    Of completions whose rewards are all alike it is 0: those teach nothing (AVATAR, arXiv 2508.03100).
    """
    values = [_values(found) for found in rollouts]
    sizes = [abs(value) for own in values for column in own.values() for value in column]
    limit = max(float(np.quantile(sizes, _MOST)) if sizes else 0.0, 1e-6)
    edges = np.linspace(-limit, limit, BINS + 1)
    return [_section(run, found, own, edges) for run, found, own in zip(runs, rollouts, values, strict=True)]


def _values(rollouts: Rollouts | None) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"fresh": [], "replayed": []}
    if rollouts is not None:
        for value, replayed in zip(rollouts.get("advantage"), rollouts.get("replayed"), strict=True):
            if value is not None:
                found["replayed" if replayed else "fresh"].append(value)
    return {name: column for name, column in found.items() if column}


def _section(run: RunData, rollouts: Rollouts | None, values: dict[str, list[float]], edges: np.ndarray) -> Section:
    if run.kind == "evaluation":
        return missing("An evaluation has no advantages.")
    if rollouts is None or not len(rollouts):
        return no_rollouts(run)
    if not values:
        return missing("The completions that were kept have no advantages.")
    found: Section = {"centres": rounded((edges[:-1] + edges[1:]) / 2), "kinds": {}}
    for name, column in values.items():
        counts = np.histogram(np.clip(column, edges[0], edges[-1]), bins=edges)[0]
        found["kinds"][name] = {
            "share": rounded(counts / len(column)),
            "count": len(column),
            "mean": float(np.mean(column)),
            "std": float(np.std(column)),
            "zero": float(np.mean(np.abs(column) < 1e-6)),
        }
    return found
