"""Files that appear whole or not at all, digests, and values as strict JSON and YAML know them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import pyarrow as pa


def user_cache() -> Path:
    """Return the folder of this package in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maple_trl"


def write_atomically(path: str | os.PathLike[str], text: str, remade: bool = False) -> None:
    """
    Write a file so that a reader sees the old content or the new, never a part, after a power cut too.

    Args:
        remade: the file can be made anew from others, as a page of a report: the disk is not waited for.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device or a pipe, whose place a file must not take
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            if not remade:
                file.flush()
                os.fsync(file.fileno())  # a name must not outlive a power cut that its content does not
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def read_json(path: str | os.PathLike[str]) -> Any:
    """
    Read a JSON file; `None` where there is no file.

    Raises:
        ValueError: when it is no JSON.
    """
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


class YamlKeyError(ValueError):
    """A key of a YAML file that is given twice, or that cannot be one; the message names line and key."""


def parse_yaml(text: str) -> Any:
    """
    Parse YAML as plain data.

    Raises:
        YamlKeyError: for a key that is written twice, of which YAML would silently take the last.
        yaml.YAMLError: for what is no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses keys that are no single names."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    raise YamlKeyError(f"line {key_node.start_mark.line + 1}: {key!r} cannot be the name of an option")
                if key in seen:
                    raise YamlKeyError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice")
                seen.add(key)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)  # a SafeLoader: it builds plain data only


def _umask() -> int:
    """Return the process's umask; a scratch file is private, the finished one is not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file so that it appears whole or not at all."""
    import pyarrow.parquet as pq  # as long as most commands take

    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(scratch, "wb") as file:
        pq.write_table(table, file, compression="zstd")  # prompts repeat
        file.flush()
        os.fsync(file.fileno())  # as above
    os.replace(scratch, path)


def as_json(value: Any) -> Any:
    """Convert a value to what strict JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def row_constant(name: str) -> float | None:
    """
    Return what a bare `NaN` or `Infinity` in JSON is in a row, as `parse_constant` of Python's readers.

    `NaN` is what pandas writes for an empty cell.
    """
    return None if name == "NaN" else float(name)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's JSON text, keys sorted; what JSON does not know counts by its `str`."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def files_digest(folder: str | Path, names: Iterable[str]) -> str:
    """Return the SHA-256 over files of a folder by their names; one that is not there counts as such."""
    whole = hashlib.sha256()
    for name in names:
        path = Path(folder, name)
        whole.update(f"{name} {path.is_file()}".encode())
        if path.is_file():
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """List the places at which two trees of JSON values differ, e.g. `["generation.temperature: 1.0, not 0.7"]`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys([*one, *other])
        return [
            text
            for key in keys
            for text in differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if one == other else [f"{path}: {one!r}, not {other!r}"]


# A state in several files that belong together


class DamagedFileError(ValueError):
    """A file of a state that is missing, cut short or changed; the message says which."""


def write_part(folder: Path, name: str, suffix: str, write: Callable[[Path], None]) -> dict[str, Any]:
    """
    Write one of the files that a state is made of, under a name that holds what it contains.

    One that is there already stays whole until the manifest of the new state takes its place.

    Returns:
        `dict`: its ending, size and SHA-256, for the manifest.
    """
    scratch = folder / f"{name}-partial{suffix}"
    write(scratch)
    flush(scratch)
    part = {"suffix": suffix, "bytes": scratch.stat().st_size, "sha256": _file_digest(scratch)}
    os.replace(scratch, folder / _part_name(name, part))
    return part


def write_manifest(
    folder: Path, name: str, about: Mapping[str, Any], content: Any, parts: Iterable[Mapping[str, Any]]
) -> None:
    """
    Write `NAME.json`, from which on the state counts, and remove the files of the one before.

    Args:
        about: the format, which readers ask for.
        content: as JSON knows it.
        parts: what [`write_part`] returned.
    """
    manifest = dict(about) | {"sha256": digest(content), "content": content}
    scratch = folder / f"{name}-partial.json"
    scratch.write_text(json.dumps(manifest, separators=(",", ":")), encoding="utf-8")
    flush(scratch)
    flush(folder)  # the names of the other files, which this one must not come before
    os.replace(scratch, folder / f"{name}.json")
    flush(folder)
    current = {_part_name(name, part) for part in parts}
    for path in folder.glob(f"{name}-*"):
        if path.name not in current:
            path.unlink()


def read_manifest(path: Path, about: Mapping[str, Any]) -> Any:
    """
    Read the content of a manifest.

    Raises:
        DamagedFileError: when it is missing, damaged or of another format.
    """
    if not path.is_file():
        raise DamagedFileError(f"{path} is missing: nothing was saved there, or saving it did not finish")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{path} is cut short or damaged: {error}") from error
    found = {name: manifest.get(name) for name in about} if isinstance(manifest, dict) else {}
    if found != about:
        raise DamagedFileError(f"{path} is of another format: expected {about}, found {found}")
    content = manifest.get("content")
    if manifest.get("sha256") != digest(content):
        raise DamagedFileError(f"{path} was changed after it was written: its content does not match its SHA-256")
    return content


def check_part(folder: Path, name: str, part: Mapping[str, Any]) -> Path:
    """
    Return the file of a part, once it has been held against what its manifest says.

    Raises:
        DamagedFileError: when it is missing, cut short or changed.
    """
    path = folder / _part_name(name, part)
    if not path.is_file():
        raise DamagedFileError(f"{path} is missing")
    size = path.stat().st_size
    if size != part["bytes"]:
        raise DamagedFileError(f"{path} has {size} bytes instead of {part['bytes']}: it was not written to its end")
    if _file_digest(path) != part["sha256"]:
        raise DamagedFileError(f"{path} was changed after it was written: its SHA-256 is not the one in {name}.json")
    return path


def _part_name(name: str, part: Mapping[str, Any]) -> str:
    return f"{name}-{part['sha256'][:16]}{part['suffix']}"


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
