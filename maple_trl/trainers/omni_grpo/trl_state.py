"""What TRL's trainer changes beside policy, optimizer and random numbers, as a checkpoint keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from maple_trl.files import write_atomically
from maple_trl.trainers.common.checkpoint import REFERENCE_FILE, ResumeError


ENTROPY_FILE = "entropy_ctrl_state.json"  # TRL's name, by which it reads the file itself


class ReferenceState:
    """
    A reference model that follows the policy (`sync_ref_model`); TRL loads one anew for each run.

    Args:
        model: the reference model, each process with all of its weights.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def save(self, folder: str) -> None:
        """Write the parameters, which are all that the policy is mixed into, in their own precision."""
        path = os.path.join(folder, REFERENCE_FILE)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_file({name: value.detach().contiguous() for name, value in self.model.named_parameters()}, path)

    def check(self, folder: str) -> None:
        """
        Check that a checkpoint has the reference model.

        Raises:
            ResumeError: when it has none, as one of a run without `sync_ref_model`, or of an earlier version.
        """
        _check_there(os.path.join(folder, REFERENCE_FILE), "sync_ref_model", "the initial reference model")

    @torch.no_grad()
    def load(self, folder: str) -> None:
        """Continue from [`save`]."""
        with safe_open(os.path.join(folder, REFERENCE_FILE), framework="pt") as file:
            for name, value in self.model.named_parameters():
                value.copy_(file.get_tensor(name))

    def snapshot(self) -> Callable[[], None]:
        """Return what does nothing: the reference follows between rollouts."""
        return lambda: None


class EntropyState:
    """
    The controller of the entropy bonus (`use_adaptive_entropy`).

    TRL reads it itself, but writes it after `trainer_state.json`: a run that is killed in between would leave a checkpoint that
    counts as complete and lacks it.

    Args:
        values: tells `entropy_coef` and `last_world_entropy`, the entropy (in nats per token) of the last optimizer step.
    """

    def __init__(self, values: Callable[[], Mapping[str, float]]):
        self.values = values

    def save(self, folder: str) -> None:
        """Write `entropy_ctrl_state.json` into the folder of a checkpoint, in TRL's form."""
        write_atomically(os.path.join(folder, ENTROPY_FILE), json.dumps(self.values()))

    def check(self, folder: str) -> None:
        """
        Check that a checkpoint has the controller's state, over whose absence TRL passes.

        Raises:
            ResumeError: when it has none.
        """
        _check_there(os.path.join(folder, ENTROPY_FILE), "use_adaptive_entropy", "the initial entropy_coef")

    def load(self, folder: str) -> None:
        """Do nothing: TRL has read it with the optimizer."""

    def snapshot(self) -> Callable[[], None]:
        """Return what does nothing: the controller moves with optimizer steps."""
        return lambda: None


def _check_there(path: str, option: str, instead: str) -> None:
    if not os.path.isfile(path) or not os.path.getsize(path):
        raise ResumeError(
            f"{path} is missing ({option}): the run would go on without a word with {instead}. Resume from a checkpoint that "
            "has it, or begin a new run from this one's weights: model_name_or_path and another output_dir"
        )
