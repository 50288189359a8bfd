"""Checkpoints of a run by hand, as far as is looked at before anything is loaded."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def write_checkpoint(folder: Path, ranks: int = 2) -> Path:
    """A folder with every part that a checkpoint of so many processes has."""
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    random = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    for name in ("optimizer.pt", "scheduler.pt", *random):
        torch.save({"state": [1]}, folder / name)
    (folder / "trainer_state.json").write_text("{}")
    return folder
