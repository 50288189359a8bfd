"""The task `replay` with a model of 58 M parameters, on a GPU: the same rows, the same rules, the same hints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import large_model
from devices import CPU, CUDA
from large_model import scaled_rate, slipping_target, write_large_model

from tasks import replay
from tasks.replay import held_out, score


__all__ = ["held_out", "score"]  # of `replay`

DEVICE = CUDA
MADE_OF = (replay, large_model)
VERSION = 100 * replay.VERSION + 1
"""The first of this task's own for that of `replay`."""
ACCESSES, QUESTIONS, SAMPLES = replay.ACCESSES, replay.QUESTIONS, replay.SAMPLES
COLD_STEPS = large_model.STEPS
HINT_STEPS = 150
HINT_RATE, RATE = 1e-3, 2e-4
"""Learning rates of the embedded model, in reading hints and in the recipe."""


def prepare(folder: Path) -> None:
    use_cpu = DEVICE == CPU
    model = write_large_model(folder, COLD_STEPS, use_cpu)
    replay.prepare(folder, model, HINT_STEPS, slipping_target, learning_rate=scaled_rate(HINT_RATE), use_cpu=use_cpu)


def options(trainer: str) -> Mapping[str, Any]:
    return {**replay.options(trainer), "learning_rate": scaled_rate(RATE)}
