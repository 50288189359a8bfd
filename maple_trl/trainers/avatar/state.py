"""An AVATAR run's memory in a checkpoint: `avatar.json`, and the buffer's own files in `replay/`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from maple_trl.algorithms import ReplayStateError
from maple_trl.files import write_atomically
from maple_trl.records.options import deciding
from maple_trl.trainers.avatar.config import AvatarConfig
from maple_trl.trainers.avatar.replay_memory import ReplayMemory
from maple_trl.trainers.common.checkpoint import ResumeError
from maple_trl.trainers.common.hinted_rows import is_plain
from maple_trl.trainers.common.media_config import MediaConfig


logger = logging.getLogger(__name__)

STATE_FILE = "avatar.json"
BUFFER_FOLDER = "replay"


class MemoryState:
    """
    A run's memory, as a checkpoint keeps it.

    Args:
        memory: of the run.
        needed: tells what the memory depends on; see [`provenance`].
        recovery (`str`): what happens where it cannot be read: `"refuse"`, or `"empty"` to go on with an empty one.
        empty: makes the run's memory an empty one.
    """

    def __init__(
        self,
        memory: ReplayMemory,
        needed: Callable[[], Mapping[str, str]],
        recovery: str,
        empty: Callable[[], None],
    ):
        self.memory = memory
        self.needed = needed
        self.recovery = recovery
        self.empty = empty

    def save(self, folder: str) -> None:
        """Write the memory into the folder of a checkpoint."""
        save_memory(folder, self.memory, self.needed())

    def snapshot(self) -> Callable[[], None]:
        """Return what puts the memory back to as it is; completions are stored and dropped between rollouts."""
        return self.memory.snapshot()

    def load(self, folder: str) -> None:
        """
        Continue from the memory of a checkpoint; a collective call, so that all ranks have the same.

        Raises:
            ResumeError: when it cannot be read, or depends on something that has changed.
        """
        errors: list[str] = []
        try:
            load_memory(folder, self.memory, self.needed())
        except ReplayStateError as error:
            errors = [str(error)]
        errors = gather_object(errors)
        if errors and self.recovery != "empty":
            raise ResumeError(f"{errors[0]}. Set replay_recovery='empty' to go on with an empty replay buffer.")
        if errors:
            logger.warning("The run goes on with an empty replay buffer: %s", errors[0])
            self.empty()


def provenance(
    args: AvatarConfig, dataset: Any, rewards: list[str], weights: Tensor, tokenizer: Any, processing_class: Any
) -> dict[str, str]:
    """
    Return digests of what stored completions and their rewards depend on, by name.

    Args:
        rewards, weights: names of the reward functions, and the weight of each (R,).
    """
    prompting = [*deciding(args, MediaConfig).values(), args.hint_template, args.temperature]
    parts = {
        "reward functions and weights": [rewards, weights.tolist()],
        "tokenizer": [sorted(tokenizer.get_vocab().items()), processing_class.chat_template],
        "prompt options": [*map(str, prompting), args.chat_template_kwargs],
    }
    if isinstance(dataset, Dataset):
        plain = [name for name, value in dataset[0].items() if is_plain(value)]
        parts["data set"] = {name: dataset[name][:] for name in plain}
    text = {name: json.dumps(part, sort_keys=True) for name, part in parts.items()}
    return {name: _digest(part) for name, part in text.items()}


def save_memory(folder: str, memory: ReplayMemory, written_with: Mapping[str, str]) -> None:
    """
    Write a memory into the folder of a checkpoint.

    Args:
        written_with: what it depends on; see [`provenance`].
    """
    os.makedirs(folder, exist_ok=True)
    state = {"provenance": written_with, "memory": memory.state_dict()}
    text = json.dumps(state)
    write_atomically(os.path.join(folder, STATE_FILE), text)
    memory.buffer.save(os.path.join(folder, BUFFER_FOLDER), fingerprint=_digest(text))


def load_memory(folder: str, memory: ReplayMemory, needed: Mapping[str, str]) -> None:
    """
    Read what [`save_memory`] wrote.

    Raises:
        ReplayStateError: when a file is missing or damaged, or the memory depends on something that has changed. What
            has been read by then stays in the memory.
    """
    path = os.path.join(folder, STATE_FILE)
    if not os.path.exists(path):
        raise ReplayStateError(f"{path} is missing: {folder} holds no state of AvatarTrainer with replay")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        state = json.loads(text)
        written = state["provenance"]
        changed = sorted(name for name in {*written, *needed} if written.get(name) != needed.get(name))
        if not changed:
            memory.load_state_dict(state["memory"])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ReplayStateError(f"{path} is cut short or damaged: {error!r}") from error
    except OSError as error:
        raise ReplayStateError(f"{path} cannot be read: {error}") from error
    if changed:
        raise ReplayStateError(f"the replay buffer of {folder} was written with another {', another '.join(changed)}")
    try:
        memory.buffer.load(os.path.join(folder, BUFFER_FOLDER), fingerprint=_digest(text))
    except (ReplayStateError, OSError) as error:
        raise ReplayStateError(
            f"{error} ({path} and {BUFFER_FOLDER}/ are of one checkpoint, and as it wrote them)"
        ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
