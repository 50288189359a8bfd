"""Accuracies that benchmarks of trained models print: five samples a question, each with its standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from maple_trl.evaluation import SampledAccuracy, sampled_accuracy
from maple_trl.rewards import accuracy_reward


SAMPLES = 5
"""Completions per question."""


def measure(trainer: Any, rows: Any, questions: int, seed: int, samples: int = SAMPLES) -> SampledAccuracy:
    """
    Accuracy of a trainer's policy by tag, and over all questions as `all`; `errors` hold the standard errors over clips.

    Args:
        questions: of each tag, at most.
        seed: of the choice of questions and of the sampling.
    """
    return sampled_accuracy(trainer.generate_completions, rows, accuracy_reward, questions, seed, samples)


def spread(values: Sequence[float], errors: Sequence[float] | None = None) -> dict[str, Any]:
    """
    Mean, standard deviation and standard error of a number over runs that differ in their seed.

    Args:
        values: one per run.
        errors: the standard error of each over its questions, which stands in where there is one run.

    Returns:
        `mean`, `std` (0 of one run), `error` (`None` where nothing is known of it) and `runs`, their number.
    """
    runs = len(values)
    std = statistics.stdev(values) if runs > 1 else 0.0
    error = std / math.sqrt(runs) if runs > 1 else errors[0] if errors else None
    if error is not None and not math.isfinite(error):
        error = None
    return {"mean": statistics.fmean(values), "std": std, "error": error, "runs": runs}


def shown(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A number with its standard error, e.g. `0.583 ± 0.012`."""
    if value is None:
        return "–"
    error = value.get("error")
    return f"{value['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
