"""Files that appear whole or not at all, digests, and values as strict JSON knows them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import pyarrow as pa


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a device or a pipe, whose place a file must not take
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def _umask() -> int:
    """The process's umask; a scratch file is private, the finished one is not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file so that it appears whole or not at all."""
    import pyarrow.parquet as pq  # as long as most commands take

    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(scratch, "wb") as file:
        pq.write_table(table, file, compression="zstd")  # prompts repeat
        file.flush()
        os.fsync(file.fileno())  # a name must not outlive a power cut that its content does not
    os.replace(scratch, path)


def as_json(value: Any) -> Any:
    """A value as strict JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON text, keys sorted; what JSON does not know counts by its `str`."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def files_digest(folder: str | Path, names: Iterable[str]) -> str:
    """SHA-256 over files of a folder by their names; one that is not there counts as such."""
    whole = hashlib.sha256()
    for name in names:
        path = Path(folder, name)
        whole.update(f"{name} {path.is_file()}".encode())
        if path.is_file():
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """The places at which two trees of JSON values differ, e.g. `["generation.temperature: 1.0, not 0.7"]`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys([*one, *other])
        return [
            text
            for key in keys
            for text in differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if one == other else [f"{path}: {one!r}, not {other!r}"]
