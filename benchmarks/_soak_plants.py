"""
Two faults of a product that a soak has to find, planted into the run's own processes.

Named as a reward of weight 0 in the job (`_soak_plants:planted`), with what is planted in `SOAK_PLANT`: `leak`, a list that
grows, or `loss`, a row that is passed over for its neighbour and counted nowhere.
"""

from __future__ import annotations

import os
from typing import Any


PLANTS = ("leak", "loss")
LEAK_BYTES = 8 << 20  # a step and process
_kept: list[bytearray] = []


def planted(completions: list, **columns: Any) -> list[float]:
    """Give every completion 0; of no weight."""
    if "leak" in os.environ["SOAK_PLANT"]:
        _kept.append(bytearray(os.urandom(1) * LEAK_BYTES))
    return [0.0] * len(completions)


def _pass_over_a_row() -> None:
    from maple_trl.trainers.common.rows import RowEncoder

    usable = RowEncoder.usable

    def careless(self: RowEncoder, row: Any, evaluating: bool = False) -> Any:
        registry = self.registries["train_dataset"]
        lost = registry.dataset[0]
        if row["id"] == lost["id"]:
            alike = next(
                other for other in registry.dataset if other["tag"] == lost["tag"] and other["id"] != lost["id"]
            )
            row = {name: alike.get(name) for name in row}
        return usable(self, row, evaluating)

    RowEncoder.usable = careless


if "loss" in os.environ.get("SOAK_PLANT", ""):
    _pass_over_a_row()
