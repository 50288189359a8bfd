"""The files in which a training run keeps its completions; see `maple_trl.trainers.common.rollout_log`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maple_trl.files import write_table


ROLLOUTS = "rollouts"
"""The folder with the files, in the output folder of a run."""

_METADATA = b"maple_trl"
_COLUMNS = ("rollout", "step", "group", "tag", "completion", "rewards", "reward", "replayed")

LINES = pa.schema(
    [
        ("rollout", pa.int64()),  # counted from 0; also the name of the file
        ("step", pa.int64()),  # optimizer steps done when it was sampled
        ("group", pa.string()),  # of the prompt: equal for the completions of a group, and for later visits
        ("row", pa.int64()),  # of the training set, from 0; null where it is not known
        ("id", pa.string()),  # the column `id` of the row
        ("tag", pa.string()),
        ("clip", pa.string()),  # that the row is about, see `maple_trl.metrics.clips`
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("solution", pa.string()),
        ("rewards", pa.map_(pa.string(), pa.float64())),  # of each function; null where it gave none
        ("reward", pa.float64()),  # the weighted sum; null for a completion that could not be scored
        ("advantage", pa.float64()),  # before it is shaped or weighed
        ("tokens", pa.int64()),
        ("replayed", pa.bool_()),
        ("hinted", pa.bool_()),  # null for a text-only model, which does not tell
        ("written_at", pa.int64()),  # of a replayed completion, the step of the policy that wrote it
        ("video", pa.list_(pa.string())),  # the files that were fed, as the row names them
        ("audio", pa.list_(pa.string())),
        ("image", pa.list_(pa.string())),
        ("subtitle", pa.string()),  # a file, or the text itself
    ]
)
"""Columns of `rollouts/*.parquet`: a line per completion."""


def rollout_of(path: Path) -> int:
    """Return the number of the rollout in a file; -1 for a file of another name."""
    return int(path.stem) if path.suffix == ".parquet" and path.stem.isdigit() else -1


def write_rollout(folder: Path, number: int, lines: Iterable[Mapping[str, Any]], media_root: str) -> None:
    """Write the completions of a rollout, so that the file appears whole or not at all."""
    about = json.dumps({"format": 1, "media_root": os.path.abspath(media_root)})
    table = pa.Table.from_pylist(list(lines), LINES.with_metadata({_METADATA: about.encode()}))
    write_table(table, folder / f"{number:08}.parquet")


def read_rollouts(folder: Path, latest: int | None = None) -> tuple[pa.Table | None, str | None, list[str]]:
    """
    Read the completions of a run.

    Args:
        folder (`Path`): where the run keeps them.
        latest (`int`, *optional*): read so many of the latest rollouts, instead of all.

    Returns:
        the table, in the order of the rollouts, `None` where there is none; the folder below which the media lie; and
        the names of files that cannot be read. A file that disappears meanwhile was thinned out by the run.
    """
    tables, media_root, broken = [], None, []
    paths = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
    for path in paths if latest is None else paths[-latest:]:
        try:
            with open(path, "rb") as file:
                table = pq.ParquetFile(file).read()
        except FileNotFoundError:
            continue
        except (OSError, pa.ArrowException):
            broken.append(path.name)
            continue
        if not is_table_of(table, LINES, _COLUMNS):
            broken.append(path.name)
            continue
        about = (table.schema.metadata or {}).get(_METADATA)
        media_root = json.loads(about)["media_root"] if about else media_root
        tables.append(table.replace_schema_metadata(None))
    return pa.concat_tables(tables, promote_options="default") if tables else None, media_root, broken


def is_table_of(table: pa.Table, schema: pa.Schema, columns: Iterable[str]) -> bool:
    """Return whether a table has these columns of a schema, and none of the schema's with another type."""
    shared = [name for name in schema.names if name in table.column_names]
    return set(columns) <= set(shared) and all(schema.field(n).type == table.schema.field(n).type for n in shared)
