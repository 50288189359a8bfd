"""How long a run has trained, over all of its starts."""

from __future__ import annotations

import json
import os
import time

from maple_trl.files import read_json, write_atomically


CLOCK_FILE = "run_clock.json"


class RunClock:
    """
    Counts the seconds of training that stand behind a run's steps.

    A start from a checkpoint goes on with those of the checkpoint; what was trained after it and is done anew does not count twice.

    Args:
        checkpoint (`str`, *optional*): from which the start goes on; one of an earlier version tells no time.
    """

    def __init__(self, checkpoint: str | None = None):
        kept = None if checkpoint is None else read_json(os.path.join(checkpoint, CLOCK_FILE))
        self.before: float = 0.0 if kept is None else kept["seconds"]  # in former starts
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far, those of former starts among them."""
        return self.before + time.monotonic() - self._began

    def save(self, folder: str) -> None:
        """Write the time so far into a checkpoint."""
        write_atomically(os.path.join(folder, CLOCK_FILE), json.dumps({"seconds": self.seconds}) + "\n")
