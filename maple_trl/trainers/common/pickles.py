"""
Refuses checkpoints with pickles that would run code.

Most of a checkpoint is read by libraries that build tensors and plain data alone (safetensors, JSON, `torch.load` with
`weights_only`). DeepSpeed's files and the sharded ones of `torch.distributed.checkpoint` (FSDP's) are read with `pickle`, which
imports and calls whatever a file names. They are looked into before.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.trainer_pt_utils import safe_globals

from maple_trl.trainers.common.checkpoint import ResumeError


_STATE = re.compile(r"(optimizer|scheduler|scaler)[^/]*\.(pt|bin)|rng_state[^/]*\.pth")
"""States that transformers reads, of tensors and numbers alone; it takes nothing else."""

_PLAIN = {
    "_codecs": {"encode"},  # bytes, in older forms of pickles
    "builtins": {
        "bool",
        "bytearray",
        "bytes",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "set",
        "slice",
        "str",
        "tuple",
    },
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "datetime": {"date", "datetime", "timedelta", "timezone"},
    "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "torch": {"Size", "Tensor", "device"},
    "torch._utils": {"_rebuild_parameter", "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"TypedStorage", "UntypedStorage"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "deepspeed.runtime.fp16.loss_scaler": {"DynamicLossScaler", "LossScaler"},
    "deepspeed.runtime.zero.config": {"ZeroStageEnum"},
    "deepspeed.utils.tensor_fragment": {"fragment_address"},
}
"""What builds plain data, numbers, tensors or records of them, and calls nothing else: module and names in it."""


class _Stub:
    """Takes the place of whatever a pickle names: is built, called and filled, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Stub:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> _Stub:
        return _Stub()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def _take(self, *_: Any) -> None:
        pass

    __setstate__ = append = extend = add = _take


class _Names(pickle.Unpickler):
    """Runs a pickle with stubs for all that it names, which are noted: the same machine, and nothing to call."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.found: dict[tuple[str, str], None] = {}

    def find_class(self, module: str, name: str) -> type[_Stub]:
        self.found[module, name] = None
        return _Stub

    def persistent_load(self, reference: Any) -> _Stub:
        return _Stub()


def foreign_names(file: BinaryIO) -> list[str]:
    """
    List what a pickle names beyond plain data and tensors, as `module.name`; nothing of it is imported.

    Raises:
        ValueError: when it is no pickle that can be followed.
    """
    reader = _Names(file)
    try:
        reader.load()
    except Exception as error:  # damaged ones end in errors of any kind
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return [f"{module}.{name}" for module, name in reader.found if not _is_plain(module, name)]


def _is_plain(module: str, name: str) -> bool:
    if name in _PLAIN.get("builtins" if module == "__builtin__" else module, ()):  # its name in Python 2 is read too
        return True
    # Dots would lead from a module on to what it has imported itself.
    if module != "torch" or "." in name:
        return False
    return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)


def check_pickles(checkpoint: str) -> None:
    """
    Check that no state and none of the files that are read with `pickle` names anything that could run code.

    Raises:
        ResumeError: naming the file, and what it would import.
    """
    for file in sorted(Path(checkpoint).iterdir()):
        if _STATE.fullmatch(file.name) and zipfile.is_zipfile(file):  # another one is damaged, which is told elsewhere
            _refuse(file, lambda file=file: _unsafe(file))
    for file, record in _pickles(Path(checkpoint)):
        _refuse(file, lambda record=record: foreign_names(io.BytesIO(record())))


def _refuse(file: Path, look: Callable[[], list[str]]) -> None:
    try:
        names = look()
    except (ValueError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ResumeError(
            f"resume_from_checkpoint: {file} is a pickle that cannot be looked into ({' '.join(str(error).split())}), and "
            "reading it could run code. Resume from another checkpoint"
        ) from error
    if names:
        raise ResumeError(
            f"resume_from_checkpoint: {file} is a pickle that would import {', '.join(sorted(names))}, which can run any "
            "code, and no checkpoint of this library needs it. Resume from another checkpoint"
        )


def _unsafe(file: Path) -> list[str]:
    """List what a state names that transformers would refuse, with the advice to read it in full all the same."""
    with safe_globals():
        return get_unsafe_globals_in_checkpoint(file)


def _pickles(checkpoint: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the pickles of a checkpoint that are read in full: their file, and what reads them."""
    for folder in sorted(path for path in checkpoint.iterdir() if path.is_dir()):
        metadata = folder / ".metadata"
        if metadata.is_file():
            yield metadata, metadata.read_bytes
            yield from _sharded(folder)
        if folder.name.startswith("global_step"):
            for file in sorted(folder.rglob("*.pt")):
                yield file, lambda file=file: _record(str(file))


def _sharded(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Yield what is neither tensor nor metadata of sharded files, once the metadata has been found to be plain."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = FileSystemReader(folder).read_metadata()
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            yield folder / place.relative_path, lambda place=place: _record(io.BytesIO(_slice(folder, place)))


def _slice(folder: Path, place: Any) -> bytes:
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"it is stored by {', '.join(place.transform_descriptors)}")
    with open(folder / place.relative_path, "rb") as file:
        file.seek(place.offset)
        return file.read(place.length)


def _record(file: str | BinaryIO) -> bytes:
    """Return the pickle in a file of `torch.save`, by torch's own reader, which may take another one than `zipfile` would."""
    reader = torch._C.PyTorchFileReader(file)
    if "constants.pkl" in reader.get_all_records():
        raise ValueError("it holds a program (TorchScript)")
    return reader.get_record("data.pkl")
