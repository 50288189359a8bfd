"""What a command says when something stops it: a line for who gave the command, the traceback for who mends the fault."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence

from maple_trl.records.notes import FAILED as NOTE


# Nothing heavier than the standard library up here: every command passes through this module.

DONE, FAILED, WRONG, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141
"""Exit statuses; the last two are 128 and the number of the signal, as shells count them."""

VARIABLE = "MAPLE_TRL_TRACEBACK"
"""Set to 1, every error is shown with its traceback."""

LOG = "traceback.txt"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What libraries that write files themselves say instead.
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "PytorchStreamWriter failed")
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


def asks_for_help(words: Sequence[str]) -> bool:
    """Return whether a command line asks for help."""
    return not {"-h", "--help"}.isdisjoint(words)


def refuse(command: str, error: BaseException | str, status: int = WRONG, folder: str | None = None) -> int:
    """
    Print what stopped a command as its last line.

    Args:
        command: as it was called, e.g. `"train"`; empty where no command is meant.
        error: with a message for the user.
        status: the exit status.
        folder: where the command writes, for what a full disk says.

    Returns:
        `int`: the exit status.
    """
    if isinstance(error, BaseException) and _wanted():
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, BaseException) and (full := _full(error, folder)) is not None:
        error, status = full, FAILED
    print(f"{_called(command)}: {one_line(error)}", file=sys.stderr, flush=True)
    return status


def fail(command: str, error: BaseException, folder: str | None = None, again: str = "") -> int:
    """
    Print what ended a command whose options were right.

    The traceback of an error that is not told by its message goes into a file in the folder.

    Args:
        again: how to go on.

    Returns:
        `int`: the exit status, `FAILED`.
    """
    told = _full(error, folder) or _known(error)
    if told is not None or _wanted():
        if _wanted():
            traceback.print_exception(error, file=sys.stderr)
        told = told or f"ended by an error: {_described(error)}"
    else:
        file = _write_log(error, folder)
        kept = f"its traceback is in {file}" if file else f"{VARIABLE}=1 shows its traceback"
        told = f"ended by an error ({kept}): {_described(error)}"
    print(f"{_called(command)}: {one_line(told)}{again and f'; {again}'}", file=sys.stderr, flush=True)
    return FAILED


def _called(command: str) -> str:
    return f"maple-trl {command}".rstrip()


def one_line(message: BaseException | str) -> str:
    """Strip a message of its line breaks: the last line of the output says all."""
    return " ".join(str(message).split())


def chain(error: BaseException) -> Iterator[BaseException]:
    """Return an error and those that led to it."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _wanted() -> bool:
    return os.environ.get(VARIABLE, "").strip().lower() not in ("", "0", "false", "no", "off")


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _full(error: BaseException, folder: str | None) -> str | None:
    """Return what to say where a disk is full; `None` for any other error."""
    for link in chain(error):
        words = next((words for words in _FULL_WORDS if words in str(link)), None)
        if not (isinstance(link, OSError) and link.errno in _FULL) and words is None:
            continue
        reason = link.strerror if isinstance(link, OSError) and link.strerror else words
        place = getattr(link, "filename", None) or folder
        where = f" into {place}" if place else ""
        return f"cannot write{where}: {reason}. Make room or choose another place; what was written whole is kept"
    return None


def _known(error: BaseException) -> str | None:
    """Return what to say of an error whose message tells a user what to do; `None` for a possible fault of ours."""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE and error.filename:
        return f"no access to {error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory: lower host_memory_bytes, the batch size, num_frames or max_pixels"
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported here
        return (
            "out of GPU memory: lower per_device_train_batch_size, max_completion_length, num_frames or max_pixels, or set "
            f"gradient_checkpointing or use_peft. {error}"
        )
    if isinstance(error, RuntimeError) and "probability tensor contains" in str(error):
        return (
            "the model gives probabilities that are no numbers (inf or NaN): its weights are damaged, training has diverged "
            "(lower learning_rate or max_grad_norm), or dtype is too narrow (float16; bfloat16 and float32 are wider)"
        )
    for link in chain(error):
        note = next((note for note in getattr(link, "__notes__", ()) if note.startswith(NOTE)), None)
        if note is not None:
            return note
    ours = type(error).__module__.split(".")[0] == "maple_trl"
    if ours and isinstance(error, ValueError):  # every class of errors here says what is wrong
        return str(error)
    return None


def _write_log(error: BaseException, folder: str | None) -> str | None:
    """Write an error's traceback into a file; return its path, `None` where none can be written."""
    text = "".join(traceback.format_exception(error))
    if folder is not None and os.path.isdir(folder):
        path = os.path.join(folder, LOG)
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            return path
        except OSError:
            pass
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="maple-trl-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        return file.name
    except OSError:
        return None
