"""What a MAPO run keeps in a checkpoint: `mapo.json`, and the moments of its gradients."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file, save_file

from maple_trl.algorithms import GradientMoments
from maple_trl.files import read_json, write_atomically
from maple_trl.trainers.common.checkpoint import ResumeError


STATE_FILE = "mapo.json"
PROBE_FILE = "gradient_probe.safetensors"


class ScheduleState:
    """
    Where a run stands in its schedule, and what its components have seen.

    Args:
        components: by name; each has `state_dict` and `load_state_dict`, ready for JSON.
        step: tells the micro-batches that the run has made.

    Attributes:
        epoch_began (`int`): micro-batches that were made when the schedule's epoch began.
        loaded_step (`int`): micro-batches at the checkpoint that the run went on from.
    """

    def __init__(self, components: dict[str, Any], step: Callable[[], int]):
        self.components = components
        self.step = step
        self.epoch_began = 0
        self.loaded_step = 0

    def save(self, folder: str) -> None:
        """Write `mapo.json` into the folder of a checkpoint."""
        os.makedirs(folder, exist_ok=True)
        state = {"step": self.step(), "epoch_began": self.epoch_began}
        state |= {name: part.state_dict() for name, part in self.components.items()}
        write_atomically(os.path.join(folder, STATE_FILE), json.dumps(state))

    def load(self, folder: str) -> None:
        """
        Continue from [`save`].

        Raises:
            ResumeError: when the folder holds no such state, or one of other options.
        """
        path = os.path.join(folder, STATE_FILE)
        state = read_json(path)
        if state is None:
            raise ResumeError(f"{path} is missing: {folder} is not a checkpoint of a run with a schedule of tags")
        for name, part in self.components.items():
            try:
                part.load_state_dict(state[name])
            except ValueError as error:
                raise ResumeError(f"{path}, {name}: {error}") from error
        self.epoch_began, self.loaded_step = state["epoch_began"], state["step"]

    def snapshot(self) -> Callable[[], None]:
        """Return what puts the components back to as they are."""
        states, epoch_began = {name: part.state_dict() for name, part in self.components.items()}, self.epoch_began

        def put_back() -> None:
            for name, part in self.components.items():
                part.load_state_dict(states[name])
            self.epoch_began = epoch_began

        return put_back


class ProbeState:
    """
    Moments of a run's gradients, as a checkpoint keeps them.

    Args:
        count (`int`): coordinates that the run looks at; 0 where it does not.
    """

    def __init__(self, moments: GradientMoments, count: int):
        self.moments = moments
        self.count = count

    def save(self, folder: str) -> None:
        """Write the moments into the folder of a checkpoint."""
        os.makedirs(folder, exist_ok=True)
        save_file(self.moments.state_dict(), os.path.join(folder, PROBE_FILE))

    def snapshot(self) -> Callable[[], None]:
        """Return what does nothing: rollouts have no gradients."""
        return lambda: None

    def load(self, folder: str) -> None:
        """
        Continue from [`save`], where both runs look at gradients.

        Raises:
            ResumeError: when the checkpoint's gradients have other coordinates.
        """
        path = os.path.join(folder, PROBE_FILE)
        state = load_file(path) if self.count and os.path.exists(path) else {}
        if not state:
            return
        if len(state["all.vector"]) != self.count:
            raise ResumeError(
                f"gradient_probe: the checkpoint's has {len(state['all.vector'])} coordinates, this run's {self.count}; "
                "resume with the same or with 0"
            )
        self.moments.load_state_dict(state)
