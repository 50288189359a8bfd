"""Folders of Parquet shards, `train-00000-of-00003.parquet`: written as rows come, whole or not at all, and found again."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from glob import escape as glob_escape
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from maple_trl.data.schema import ROW_FEATURES
from maple_trl.files import flush
from maple_trl.locks import LockedError, held_file


SHARD_ROWS = 50_000
_GROUP_ROWS = 1000  # in memory at once, and the row groups of a file, so that the same rows are the same bytes
_SPLIT = re.compile(r"\w+(\.\w+)*")  # what the datasets library takes
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}\.(parquet|jsonl?|[ct]sv)")


class ShardError(ValueError):
    """A folder of shards that cannot be written or read; the message says which, and what would be right."""


class ShardWriter:
    """
    Writes rows as shards of a folder, by split, in the order in which they come.

    Used as a context manager: the folder appears at its end, and not at all when an error leaves it. At most a thousand
    rows of a split are in memory. The same rows give the same bytes.

    Args:
        folder: must not hold anything yet.
        features: columns.
        shard_rows: most rows of one file.

    Raises:
        ShardError: when the folder holds something, or for less than one row in a file.
    """

    def __init__(
        self, folder: str | os.PathLike[str], features: Features = ROW_FEATURES, shard_rows: int = SHARD_ROWS
    ):
        self.folder = Path(folder)
        if shard_rows < 1:
            raise ShardError(f"shard_rows must be 1 or more, got {shard_rows}")
        check_unused(self.folder)
        self.schema = features.arrow_schema
        self.shard_rows = shard_rows
        self.rows: Counter[str] = Counter()
        """Rows by split."""
        self._scratch = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.partial")
        self._splits: dict[str, _Rows] = {}

    def __enter__(self) -> ShardWriter:
        self._remove_abandoned()
        try:
            self._scratch.mkdir(parents=True)
        except OSError as error:
            raise ShardError(f"{self.folder} cannot be written: {error}") from error
        return self

    def _remove_abandoned(self) -> None:
        """Remove what processes that were killed had begun to write for this folder."""
        for scratch in self.folder.parent.glob(f".{glob_escape(self.folder.name)}.*.partial"):
            process = scratch.name.split(".")[-2]
            if process.isdigit() and (int(process) == os.getpid() or not _runs(int(process))):
                shutil.rmtree(scratch, ignore_errors=True)

    def write(self, row: Mapping[str, Any], split: str = "train") -> None:
        """
        Add a row to a split.

        Raises:
            ShardError: for a name of a split that cannot be one, and a row that does not fit the columns.
        """
        if split not in self._splits:
            if not _SPLIT.fullmatch(split):
                raise ShardError(f"split {split!r} must be letters, digits and underscores, as 'train' is")
            writer = _SplitWriter(self._scratch, split, self.schema, self.shard_rows)
            self._splits[split] = _Rows(writer)
        self._splits[split].add(row)
        self.rows[split] += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            for split in self._splits.values():
                split.writer.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _finish(self) -> None:
        if not self._splits:
            raise ShardError(f"{self.folder}: there is no row to write")
        for split in self._splits.values():
            split.finish()
        flush(self._scratch)
        try:
            if self.folder.is_dir():
                self.folder.rmdir()  # it was empty
            os.rename(self._scratch, self.folder)
        except OSError as error:
            raise ShardError(
                f"{self.folder} cannot be put in its place, another process may have made it: {error}"
            ) from error
        flush(self.folder.parent)


class _SplitWriter:
    """Writes tables of one split as shards; how many there are, which their names say, is known at the end alone."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema, shard_rows: int):
        self.folder, self.split, self.schema, self.shard_rows = folder, split, schema, shard_rows
        self.room = shard_rows
        """How many more rows the open shard takes, or the next one where none is open."""
        self._files: list[Path] = []
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Write a table, over as many shards as it takes."""
        while len(table):
            part = table.slice(0, self.room)
            self._open().write_table(part)
            self.room -= len(part)
            if not self.room:
                self.close()
            table = table.slice(len(part))

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._files.append(self.folder / f"{self.split}-{len(self._files):05}.part")
            self._writer = pq.ParquetWriter(self._files[-1], self.schema, compression="zstd")
        return self._writer

    def close(self) -> None:
        """Close the shard that is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer, self.room = None, self.shard_rows

    def finish(self) -> list[str]:
        """Give the shards their names, and return these; without a row there is one shard that is empty."""
        if not self._files:
            self._open()
        self.close()
        names = [f"{self.split}-{number:05}-of-{len(self._files):05}.parquet" for number in range(len(self._files))]
        for file, name in zip(self._files, names, strict=True):
            flush(file)
            os.rename(file, file.with_name(name))
        return names


class _Rows:
    """Rows of one split that wait until they are a row group."""

    def __init__(self, writer: _SplitWriter):
        self.writer = writer
        self.waiting: list[Mapping[str, Any]] = []
        self.written = 0

    def add(self, row: Mapping[str, Any]) -> None:
        self.waiting.append(row)
        if len(self.waiting) in (_GROUP_ROWS, self.writer.room):
            self._write()

    def _write(self) -> None:
        self.writer.write(self._table())
        self.written += len(self.waiting)
        self.waiting = []

    def _table(self) -> pa.Table:
        schema = self.writer.schema
        try:
            return _table(self.waiting, schema)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            for number, row in enumerate(self.waiting, self.written):
                for name in schema.names:
                    try:
                        _table([row], pa.schema([schema.field(name)]))
                    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                        expected = schema.field(name).type
                        raise ShardError(
                            f"split {self.writer.split!r}, row {number}: field {name!r} must be {expected}: {error}"
                        ) from error
            raise

    def finish(self) -> None:
        self._write()
        self.writer.finish()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    rows = list(rows)
    arrays = []
    for column in schema:
        cells = [row.get(column.name) for row in rows]
        if pa.types.is_list(column.type) and any(isinstance(cell, str) for cell in cells):
            raise TypeError("a text, and no list of texts")  # Arrow would take it for a list of its letters
        arrays.append(pa.array(cells, column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def check_unused(folder: Path) -> None:
    """
    Check that a folder for new files is empty or not there yet.

    Raises:
        ShardError: for a folder that holds something already, and for a file in its place.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ShardError(f"{folder} is there already; name another folder, or remove it first")


def write_shards(
    rows: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    features: Features = ROW_FEATURES,
    shard_rows: int = SHARD_ROWS,
) -> Counter[str]:
    """
    Write rows into a new folder, each into the shards of its `split` (`train` where it has none).

    Args:
        rows: as they are to be stored; of each the columns of `features` are kept.
        folder: must not hold anything yet.
        features: columns.
        shard_rows: most rows of one file.

    Returns:
        `Counter`: rows by split.

    Raises:
        ShardError: when the folder holds something, there is no row, or one does not fit the columns.
    """
    with ShardWriter(folder, features, shard_rows) as writer:
        for row in rows:
            writer.write(row, row.get("split") or "train")
    return writer.rows


def find_shards(folder: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """
    Find the shards of a folder, by split, in order.

    Raises:
        ShardError: when there is none, or one of a split is missing.
    """
    found: dict[str, list[Path]] = {}
    folder = Path(folder)
    for path in sorted(folder.glob("*.parquet")) if folder.is_dir() else []:
        if (match := _SHARD.fullmatch(path.name)) is not None:
            found.setdefault(match["split"], []).append(path)
    if not found:
        raise ShardError(f"{folder} holds no shards; they are named as train-00000-of-00001.parquet is")
    for split, paths in found.items():
        check_whole(paths, split)
    return found


def check_whole(paths: Sequence[Path], split: str) -> None:
    """
    Check that files (`paths`) which are named as shards of a `split`, in order, are all of them.

    Raises:
        ShardError: when one is missing, or those of two sets stand together.
    """
    expected = [f"{split}-{number:05}-of-{len(paths):05}{paths[0].suffix}" for number in range(len(paths))]
    if [path.name for path in paths] != expected:
        raise ShardError(
            f"{paths[0].parent}: the shards of split {split!r} are not one whole set: it has "
            f"{', '.join(path.name for path in paths[:5])}; expected {', '.join(expected[:5])}"
        )


def split_of(path: Path) -> str | None:
    """Return the split that the name of a shard (`path`), of whatever format, says; `None` for any other file."""
    match = _SHARD.fullmatch(path.name)
    return match["split"] if match else None


def split_files(folder: Path, split: str, suffixes: Sequence[str]) -> list[Path]:
    """
    Return the files of a split of a folder that training reads: one such as `train.parquet`, or else its shards; may be none.

    Args:
        folder: where they lie.
        split: its name.
        suffixes: endings, the preferred one first; the files of one alone are taken.

    Raises:
        ShardError: when a shard is missing.
    """
    for suffix in suffixes:
        whole = folder / f"{split}{suffix}"
        if whole.is_file():
            return [whole]
        if shards := sorted(folder.glob(f"{split}-*-of-*{suffix}")):
            check_whole(shards, split)
            return shards
    return []


def shards_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a `split` that are there in a `folder`, one whole or several shards."""
    return sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*-of-*.parquet")])


def make_folder(folder: Path) -> bool:
    """
    Make a folder for shards where there is none, and return whether there was none.

    Raises:
        ShardError: where there cannot be one.
    """
    there = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(f"{folder} cannot be written: {error}") from error
    return not there


@contextmanager
def hold_split(folder: Path, split: str) -> Iterator[None]:
    """
    Hold a split of a folder alone; the folder is made where it is missing, and goes again where nothing was written into it.

    Raises:
        ShardError: when another process holds it, and where there cannot be such a folder.
    """
    made = make_folder(folder)
    with ExitStack() as stack:
        if made:
            stack.callback(_remove_empty, folder)
        try:
            stack.enter_context(held_file(folder / f".{split}.lock"))
        except LockedError as error:
            raise ShardError(
                f"{folder}: another process is writing split {split!r}; wait for its end, or name another folder"
            ) from error
        except OSError as error:
            raise ShardError(f"{folder} cannot be written: {error}") from error
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something, or somebody else was faster
        folder.rmdir()


def replace_split(
    tables: Iterable[pa.Table], schema: pa.Schema, folder: Path, split: str, shard_rows: int
) -> list[Path]:
    """
    Write tables one after another, and put the shards in the place of those of the split that are there.

    Args:
        tables: what is written, all of the one schema.
        schema: columns.
        folder: where the shards belong; made where it is missing.
        split: name of the split.
        shard_rows: of each shard but the last.

    Returns:
        `list[Path]`: the shards.

    Raises:
        ShardError: when another process is writing the split, and where the folder cannot be written.
    """
    with hold_split(folder, split):
        return replace_held_split(tables, schema, folder, split, shard_rows)


def replace_held_split(
    tables: Iterable[pa.Table], schema: pa.Schema, folder: Path, split: str, shard_rows: int
) -> list[Path]:
    """
    Do what [`replace_split`] does, for a caller that holds the split ([`hold_split`]) and writes more than its shards.

    Args:
        tables, schema, folder, split, shard_rows: as of [`replace_split`].

    Returns:
        `list[Path]`: the shards.
    """
    scratch = folder / f".{split}.partial"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir()
    writer = _SplitWriter(scratch, split, schema, shard_rows)
    try:
        for table in tables:
            writer.write(table)
        names = writer.finish()
        former = [path for path in shards_of(folder, split) if path.name not in names]
        # In this order what a killed process leaves is one of the sets, or no whole one, which is refused.
        if len(names) > 1:
            (folder / names[-1]).unlink(missing_ok=True)
        for name in names:
            os.replace(scratch / name, folder / name)
        for path in former:
            path.unlink()
    finally:
        writer.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return [folder / name for name in names]
