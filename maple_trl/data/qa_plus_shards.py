"""Tables into the shards of one split, `train-00000-of-00002.parquet`, which appear together once all are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def shards_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a split that are there, one whole or several shards."""
    return sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*-of-*.parquet")])


def write_shards(
    tables: Iterable[pa.Table], schema: pa.Schema, rows: int, folder: Path, split: str, shard_rows: int
) -> list[Path]:
    """
    Write tables one after another, and put the shards in the place of those of the split that are there.

    Args:
        rows: of all tables together.
        shard_rows: of each shard but the last.

    Returns:
        `list[Path]`: the shards.

    Raises:
        ValueError: when the tables hold another number of rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{split}.partial"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir()
    count = max(-(-rows // shard_rows), 1)
    names = [f"{split}-{number:05}-of-{count:05}.parquet" for number in range(count)]
    try:
        _write(tables, schema, rows, [scratch / name for name in names], shard_rows)
        for path in shards_of(folder, split):
            path.unlink()
        for name in names:
            os.replace(scratch / name, folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [folder / name for name in names]


def _write(tables: Iterable[pa.Table], schema: pa.Schema, rows: int, paths: list[Path], shard_rows: int) -> None:
    waiting = iter(paths)
    writer, room, written = pq.ParquetWriter(next(waiting), schema, compression="zstd"), shard_rows, 0
    try:
        for table in tables:
            while len(table):
                if not room:
                    writer.close()
                    writer, room = pq.ParquetWriter(next(waiting), schema, compression="zstd"), shard_rows
                part = table.slice(0, room)
                writer.write_table(part)
                table, room, written = table.slice(len(part)), room - len(part), written + len(part)
    finally:
        writer.close()
    if written != rows:
        raise ValueError(f"{rows} rows were to be written, but there were {written}")
