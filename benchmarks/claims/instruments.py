"""What is watched of a run beside its log: an instrument is put on a trainer before it trains, and read afterwards."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from curves import Curve
from devices import wait_for_gpu


INSTRUMENTS_VERSION = 1
"""Raised with every change of what is measured of all runs; an instrument of a class with a `VERSION` counts by that."""


class Instrument(Protocol):
    """
    Something that watches a trainer; `result()` is what it saw, as JSON holds it.

    One that asks questions whose single scores it does not keep has `ASKS = True`: what their choice leaves in an effect is
    not known.
    """

    def result(self) -> dict[str, Any]: ...


def wrap(trainer: Any, name: str, tell: Callable[[float, float, tuple, Any], None]) -> None:
    """Have `tell(wall seconds, CPU seconds, arguments, result)` called after each call of a trainer's method."""
    method = getattr(trainer, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        wait_for_gpu()
        wall, cpu = time.perf_counter(), time.process_time()
        result = method(*args, **kwargs)
        wait_for_gpu()
        tell(time.perf_counter() - wall, time.process_time() - cpu, args, result)
        return result

    setattr(trainer, name, timed)


class Cost:
    """Seconds of training, in parts, and completions and tokens generated; on every run."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.cpu = self.wall = self.rollout_cpu = self.rollout_wall = 0.0
        self.rollouts = self.generated = self.tokens = 0
        wrap(trainer, "training_step", self._step)
        if hasattr(trainer, "_generate_single_turn"):  # which a supervised one has not
            wrap(trainer, "_generate_and_score_completions", self._rollout)
            wrap(trainer, "_generate_single_turn", self._generation)

    def _step(self, wall: float, cpu: float, args: tuple, result: Any) -> None:
        self.wall += wall
        self.cpu += cpu

    def _rollout(self, wall: float, cpu: float, args: tuple, result: Any) -> None:
        self.rollout_cpu += cpu
        self.rollout_wall += wall
        self.rollouts += 1

    def _generation(self, wall: float, cpu: float, args: tuple, result: Any) -> None:
        if self._trainer.model.training:
            completions = result[0]
            self.generated += len(completions)
            self.tokens += sum(map(len, completions))

    def result(self) -> dict[str, Any]:
        return {
            "cpu_seconds": self.cpu,
            "wall_seconds": self.wall,
            "rollout_cpu_seconds": self.rollout_cpu,
            "rollouts": self.rollouts,
            "completions": self.generated,
            "completion_tokens": self.tokens,
        }


INSTRUMENTS: dict[str, type] = {"curve": Curve}
"""Those that a run asks for by name, with those of `instruments_<topic>.py` and `step_times.py`; [`Cost`] is on every run."""


def collect() -> None:
    """Add the `INSTRUMENTS` of every topic's module; a name that two have is an error."""
    topics = [file.stem for file in sorted(Path(__file__).parent.glob("instruments_*.py"))]
    for topic in (*topics, "step_times"):
        for name, own in importlib.import_module(topic).INSTRUMENTS.items():
            if INSTRUMENTS.setdefault(name, own) is not own:
                raise ValueError(f"{topic}: there is another instrument {name!r}; a name has one meaning")


collect()
