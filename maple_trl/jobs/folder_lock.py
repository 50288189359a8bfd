"""A job's hold on its output folder: what two jobs write into one at the same time cannot be told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from maple_trl.jobs.errors import SetupError
from maple_trl.locks import LockedError, lock_file


if TYPE_CHECKING:
    from transformers import TrainingArguments

LOCK_FILE = ".lock"
"""Lies in the folder of a run, also after it; only who holds it open writes there, so that a killed job leaves none locked."""


@contextmanager
def hold_folder(folder: str, args: TrainingArguments) -> Iterator[None]:
    """
    Keep other jobs out of a folder, which is made where there is none.

    The first process locks; every process of the job must call this, and learns of a refusal.

    Args:
        folder (`str`): where the job writes.
        args (`TrainingArguments`): which process this is, of how many.

    Raises:
        SetupError: in all processes, when another job holds the folder, or it cannot be written into.
    """
    with ExitStack() as held:
        problem = [_hold(folder, held) if args.process_index == 0 else None]
        if args.world_size > 1:
            from accelerate.utils import broadcast_object_list  # loads torch, which a help text does without

            broadcast_object_list(problem)
        if problem[0] is not None:
            raise SetupError(problem[0])
        yield


def _hold(folder: str, held: ExitStack) -> str | None:
    """Lock a folder; return why that is not possible."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        held.callback(lock_file(Path(folder, LOCK_FILE)).release)
    except LockedError:
        return f"output_dir: another job is writing into {folder}; wait until it has ended or stop it, or name another folder"
    except OSError as error:
        return f"output_dir: cannot write into {folder}: {error}"
    return None
