"""What decides an evaluation's numbers, as digests and versions."""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from maple_trl.files import digest
from maple_trl.packages import installed_versions
from maple_trl.rewards.identity import source_digest


if TYPE_CHECKING:
    import torch
    from torch import nn


PACKAGES = (
    "maple-trl",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "numpy",
    "av",
    "torchcodec",
)


PARSER_VERSION = 6
"""
Version of how answers are read out of completions and compared with solutions (`maple_trl.rewards.answers`). It counts up
with every change of that code: accuracies of two versions are not comparable.
"""


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 over all columns of rows, in order; files that they name are not read."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(digest(dict(row)).encode())
    return whole.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """
    Return the SHA-256 over the names, types, shapes and bytes of a model's weights as they are loaded.

    Of the loaded weights and not of files: a checkpoint that was cut into other shards is the same model, one that was
    loaded with another precision is not.
    """
    import torch

    whole = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        whole.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        whole.update(memoryview(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return whole.hexdigest()


def describe_function(function: Callable) -> dict[str, str | None]:
    """
    Return the name and the source file's SHA-256 of a function, or of the class of a callable object.

    A scorer that asks a judge on a server does so with a model that nothing here can pin.
    """
    owner = function if inspect.isfunction(function) or inspect.isclass(function) else type(function)
    return {"name": f"{owner.__module__}:{owner.__qualname__}", "source_sha256": source_digest(owner)}


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that touch an answer; `None` for one that is not installed."""
    return {"python": platform.python_version(), **installed_versions(PACKAGES)}


def device_name(device: torch.device) -> str:
    """Name what computes: `cpu` with its architecture, or the accelerator."""
    if device.type != "cuda":
        return f"{device.type} ({platform.machine()})"
    import torch

    return torch.cuda.get_device_name(device)
