"""The task `reasoning` with a model of 58 M parameters, on a GPU: the same chains, the same two parts of the cold start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import large_model
from devices import CPU, CUDA
from large_model import scaled_rate, write_large_model

from tasks import reasoning, replay
from tasks.reasoning import held_out, score


__all__ = ["held_out", "score"]  # of `reasoning`

DEVICE = CUDA
MADE_OF = (reasoning, replay, large_model)
VERSION = 100 * reasoning.VERSION + 1
"""The first of this task's own for that of `reasoning`."""
ACCESSES, QUESTIONS, SAMPLES = reasoning.ACCESSES, reasoning.QUESTIONS, reasoning.SAMPLES
PERCEIVING, CHAINS = large_model.STEPS, 800
COLD_STEPS = PERCEIVING + CHAINS


def prepare(folder: Path) -> None:
    use_cpu = DEVICE == CPU
    perceiving = round(COLD_STEPS * PERCEIVING / (PERCEIVING + CHAINS))
    model = write_large_model(folder, perceiving, use_cpu)
    rates = [scaled_rate(rate) for rate in reasoning.COLD_RATES]
    reasoning.prepare(folder, model, COLD_STEPS - perceiving, rates, use_cpu=use_cpu)


def options(trainer: str) -> Mapping[str, Any]:
    usual = reasoning.options(trainer)
    return {**usual, "learning_rate": scaled_rate(usual["learning_rate"])}
