"""Where runs are carried out: on the CPU, or, of a task that has `DEVICE = CUDA`, on a GPU that a run has for itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock


CPU, CUDA = "cpu", "cuda"


def on_gpu(task: Any) -> bool:
    """Tell whether a task's runs are carried out on a GPU."""
    return getattr(task, "DEVICE", CPU) == CUDA


def has_gpu() -> bool:
    """Tell whether this machine has a GPU that torch can use."""
    import torch

    return torch.cuda.is_available()


def made_on(task: Any) -> dict[str, str]:
    """Return what of the machine changes numbers of a task: the GPU and its library, nothing on the CPU."""
    if not on_gpu(task):
        return {}
    import torch

    return {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name()}


@contextmanager
def held(task: Any, folder: Path) -> Iterator[None]:
    """
    Hold the device of a task: what runs side by side would take a GPU's time and memory from each other.

    Args:
        folder: where the lock lies that says who has the GPU.

    Raises:
        RuntimeError: if there is none; what a CPU finds would stand as a GPU's.
    """
    if not on_gpu(task):
        yield
        return
    if not has_gpu():
        raise RuntimeError(f"{task.__name__} runs on a GPU, and torch finds none here")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "gpu.lock"):
        yield


def wait_for_gpu() -> None:
    """Wait until a GPU has done what it was asked to, where one is in use: clocks would otherwise count the asking."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def release_memory() -> None:
    """Give a GPU's memory back that nothing holds any more, where one is in use: a trainer is held by its own circles."""
    import torch

    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
