"""Files of a checkpoint that say where a run stands: the rows of its data, and of a rollout that is still trained on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from maple_trl.files import read_json
from maple_trl.trainers.common.batch import PROMPTS_KEY, Batch


_LAST_FILE = "trainer_state.json"
_SIGNATURE = "geometry"  # its name in the files of checkpoints
# What checkpoints of earlier versions may not say.
_NOTED_LATER = ("gradient_accumulation_steps", "sync_ref_model", "seed", "shuffle_dataset")
REFERENCE_FILE = os.path.join("ref_model", "parameters.safetensors")
"""A reference model that has moved; in a folder of its own, since some read all of a checkpoint's safetensors as the model's."""


class ResumeError(ValueError):
    """A checkpoint with which this run cannot go on; the message says what differs or is missing."""


class LostPromptsError(RuntimeError):
    """
    Prompts of a rollout that cannot be shown any more.

    Attributes:
        failed: their keys, and what is wrong with their media.
        step (`int`): where the run stood, in micro-batches.
    """

    def __init__(self, failed: list[tuple[str, Exception]]):
        super().__init__("; ".join(f"prompt {key}: {error}" for key, error in failed))
        self.failed = failed
        self.step = 0


class StatePart(Protocol):
    """Something of a run that a checkpoint keeps in files of its own."""

    def save(self, folder: str) -> None:
        """Write it into the folder of a checkpoint; the main process calls it."""

    def load(self, folder: str) -> None:
        """Continue from what was written; every process calls it."""

    def snapshot(self) -> Callable[[], None]:
        """Return what puts it back to as it is before a rollout, if that ends early."""


def save_rollout(
    folder: str, rank: int, step: int, chunks: Sequence[Batch] | None, resume_signature: dict[str, Any]
) -> None:
    """
    Write where a rank stands within its rollout, and the rollout's rows as long as updates on them are to come.

    Prompts are written by key; their media are decoded again from the data set. `resume_signature` (processes, batch sizes) is
    what the numbers of a run depend on.
    """
    os.makedirs(folder, exist_ok=True)
    state: dict[str, Any] = {"step": step, "chunks": [], _SIGNATURE: resume_signature}
    if chunks:
        batch = Batch.merge(chunks)
        tensors = {name: value.contiguous().cpu() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        others = sorted(set(batch) - set(tensors) - {PROMPTS_KEY})
        unknown = [name for name in others if batch[name] is not None]
        if unknown:
            raise TypeError(
                f"rollout fields {', '.join(unknown)} are neither tensors nor prompts; they cannot be saved"
            )
        save_file(tensors, os.path.join(folder, f"rollout_{rank}.safetensors"))
        prompts = batch.prompts
        sizes = [chunk.rows for chunk in chunks]
        state |= {"chunks": sizes, "prompts": prompts and [prompt.key for prompt in prompts]}
    with open(os.path.join(folder, f"rollout_{rank}.json"), "w", encoding="utf-8") as file:
        json.dump(state, file)


def _read_state(folder: str, rank: int) -> dict[str, Any]:
    path = os.path.join(folder, f"rollout_{rank}.json")
    state = read_json(path)
    if state is None:
        raise ResumeError(
            f"{path} is missing: the checkpoint was written by another trainer or by fewer processes than {rank + 1}. "
            "Resume with the same trainer and number of processes."
        )
    return state


def check_resume_signature(folder: str, rank: int, resume_signature: dict[str, Any]) -> None:
    """
    Check that a checkpoint was written by a run with the same `resume_signature`; see [`save_rollout`].

    What an earlier version did not write down is taken to be the same.

    Raises:
        ResumeError: when the checkpoint holds no state for this rank, or was written with other numbers.
    """
    written = _read_state(folder, rank)[_SIGNATURE]
    unsaid = [name for name in _NOTED_LATER if name in resume_signature and name not in written]
    written |= {name: resume_signature[name] for name in unsaid}
    # Of both: what the checkpoint's trainer had, this one may not know, and would go on without.
    changed = [
        f"{name} {written.get(name)} -> {resume_signature.get(name)}"
        for name in {**resume_signature, **written}
        if written.get(name) != resume_signature.get(name)
    ]
    if changed:
        raise ResumeError(
            f"{folder} was written by a run with other settings: {', '.join(changed)}. Resume with those"
            + ("." if written.keys() == resume_signature.keys() else ", and with the same trainer.")
        )


def load_rollout(
    folder: str, rank: int, prompts_by_key: Callable, device: torch.device
) -> tuple[int, list[Batch] | None]:
    """
    Read what [`save_rollout`] wrote.

    Returns:
        micro-batches that the run had made, and those of the rollout, `None` where no update on them was to come.

    Raises:
        ResumeError: when the checkpoint holds no state for this rank.
        LostPromptsError: when `prompts_by_key` raises it.
    """
    state = _read_state(folder, rank)
    if not state["chunks"]:
        return state["step"], None
    tensors = load_file(os.path.join(folder, f"rollout_{rank}.safetensors"))
    batch = Batch({name: value.to(device) for name, value in tensors.items()})  # safetensors knows no "cpu:0"
    if state["prompts"]:
        try:
            batch[PROMPTS_KEY] = prompts_by_key(state["prompts"])
        except LostPromptsError as error:
            error.step = state["step"]
            raise
    return state["step"], batch.split(state["chunks"])


def save_rows(folder: str, states: dict[str, Any]) -> None:
    """Write which rows of each data set a run uses."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "rows.json"), "w", encoding="utf-8") as file:
        json.dump(states, file, ensure_ascii=False)


def load_rows(folder: str) -> dict[str, Any]:
    """
    Read what [`save_rows`] wrote.

    Raises:
        ResumeError: when the folder holds none.
    """
    path = os.path.join(folder, "rows.json")
    state = read_json(path)
    if state is None:
        raise ResumeError(f"{path} is missing: {folder} is not a checkpoint of OmniGRPOTrainer")
    return state


def last_complete_checkpoint(output_dir: str) -> str | None:
    """
    Find the newest checkpoint that was written to its end; `trainer_state.json` is the last file of one.

    `None` when there is none, as for a first start.
    """
    return next(iter(complete_checkpoints(output_dir)), None)


def complete_checkpoints(output_dir: str) -> list[str]:
    """List the checkpoints that were written to their end, the newest first."""
    return [path for _, path in checkpoints(output_dir) if is_complete(path)]


def checkpoints(output_dir: str) -> list[tuple[int, str]]:
    """List the checkpoints of a folder, complete or not, by their step, the newest first."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    found = [(re.fullmatch(r"checkpoint-(\d+)", name), os.path.join(output_dir, name)) for name in names]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def reopen(checkpoint: str) -> None:
    """
    Let a checkpoint of an earlier run count as incomplete, before one of the same step is written over it file by file.

    A run that is killed meanwhile would leave one of parts of both.
    """
    with suppress(FileNotFoundError):
        os.remove(os.path.join(checkpoint, _LAST_FILE))


def is_complete(checkpoint: str) -> bool:
    """Return whether a checkpoint's last file, `trainer_state.json`, was written to its end."""
    try:
        with open(os.path.join(checkpoint, _LAST_FILE), encoding="utf-8") as file:
            return isinstance(json.load(file), dict)
    except (OSError, ValueError):
        return False
