"""Records of a benchmark's published tables, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from maple_trl.data.record_files import TableError, read_records


SUFFIXES = (".parquet", ".jsonl", ".json")


def records(path: Path) -> Iterator[dict[str, Any]]:
    """
    Read the records of one file, all with the same fields: one that a record lacks is `None` there.

    Raises:
        TableError: when it cannot be read, naming the file, and the line where there is one.
    """
    if path.suffix == ".parquet":
        yield from read_records(path)
        return
    rows = list(read_records(path))
    names = dict.fromkeys(name for row in rows for name in row)
    for row in rows:
        yield {name: row.get(name) for name in names}


def find_tables(path: Path, patterns: tuple[str, ...], split: str) -> list[Path]:
    """
    Find the tables of a split: `path` itself where it is a file, else the files of the first pattern that has any.

    Args:
        path: file or folder.
        patterns: globs below the folder; `{split}` stands for the split's name.
        split: name of the split.

    Raises:
        FileNotFoundError: when there is none, saying what was looked for and what is there.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise TableError(f"{path}: a table is one of {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    looked = [pattern.format(split=split) for pattern in patterns]
    for pattern in looked:
        found = sorted(file for file in path.glob(pattern) if file.suffix in SUFFIXES)
        if found:
            return found
    there = sorted(file.name for file in path.iterdir())
    raise FileNotFoundError(
        f"{path} holds no table of split {split!r}: looked for {', '.join(looked)}; it holds "
        f"{', '.join(there[:20]) or 'nothing'}{', …' if len(there) > 20 else ''}"
    )


def media_root(path: Path, patterns: tuple[str, ...]) -> Path:
    """
    Return the folder that media paths are relative to: `path`, or of a table the folder that its pattern starts at.

    Args:
        path: file or folder.
        patterns: as of [`find_tables`].
    """
    if path.is_dir():
        return path
    file = path.resolve()
    for pattern in patterns:
        depth = len(PurePosixPath(pattern).parts)
        if file.match(pattern.format(split="*")) and depth <= len(file.parents):
            return file.parents[depth - 1]
    return file.parent
