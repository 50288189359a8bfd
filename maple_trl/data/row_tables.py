"""Tables of rows as training reads them (.parquet, .json, .jsonl), with one text column added and written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maple_trl.data.record_files import CUT_TEXT, TableError, cut_field, read_records
from maple_trl.files import as_json


SUFFIXES = (".parquet", ".json", ".jsonl")


class RowTable:
    """
    The rows of one file.

    Parquet is kept as it is, so that types, metadata and columns that are never looked at come out unchanged. JSON rows
    are kept as objects: nothing is guessed about their types.

    Args:
        path (`str` or `os.PathLike`):
            `.parquet`, `.jsonl` (an object a line) or `.json` (a list of objects, or an object a line).

    Raises:
        TableError: when there is no such file, it is no such table, or a text of a row is none that a file can hold.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.suffix not in SUFFIXES:
            raise TableError(f"{self.path}: a table is one of {', '.join(SUFFIXES)}")
        if not self.path.is_file():
            raise TableError(f"there is no file {self.path}")
        self._table: pa.Table | None = None
        self._rows: list[dict[str, Any]] = []
        if self.path.suffix == ".parquet":
            try:
                self._table = pq.read_table(self.path)
            except (pa.ArrowException, OSError) as error:
                raise TableError(f"cannot read {self.path}: {error}") from error
            self.columns = list(self._table.column_names)
        else:
            self._rows = list(read_records(self.path))
            for number, row in enumerate(self._rows):  # no table could be written of them, whatever was done with it
                if (cut := cut_field(row)) is not None:
                    raise TableError(f"{self.path}, row {number}: field {cut!r} {CUT_TEXT}; mend or remove it")
            self.columns = list(dict.fromkeys(name for row in self._rows for name in row))

    def __len__(self) -> int:
        return len(self._rows) if self._table is None else self._table.num_rows

    def column(self, name: str) -> list[Any]:
        """Return the values of a column, `None` where a row lacks it."""
        if self._table is not None:
            return self._table.column(name).to_pylist()
        return [row.get(name) for row in self._rows]

    def write(self, path: str | os.PathLike, name: str, values: Sequence[str | None]) -> None:
        """
        Write all rows with the text column `name`, in the place of one of that name.

        The file appears whole or not at all.

        Raises:
            TableError: when the rows cannot be written in the format of `path`.
        """
        path = Path(path)
        if path.suffix == ".parquet":
            table = _with_text_column(self._as_arrow(path), name, values)
            _write_whole(path, lambda scratch: pq.write_table(table, scratch))
            return
        rows = self._rows if self._table is None else self._table.to_pylist()
        rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
        try:
            lines = [json.dumps(as_json(row), ensure_ascii=False, allow_nan=False) for row in rows]
        except (TypeError, ValueError) as error:
            raise TableError(f"{path}: the rows of {self.path} cannot be JSON ({error}); write .parquet") from error
        text = "".join(line + "\n" for line in lines)
        if path.suffix == ".json":
            text = "[" + ",\n".join(lines) + "]\n"
        _write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))

    def _as_arrow(self, path: Path) -> pa.Table:
        if self._table is not None:
            return self._table
        try:
            return pa.table({name: self.column(name) for name in self.columns})
        except (pa.ArrowException, TypeError) as error:
            raise TableError(f"{path}: the rows of {self.path} cannot be Parquet ({error}); write .jsonl") from error


def _with_text_column(table: pa.Table, name: str, values: Sequence[str | None]) -> pa.Table:
    field, column = pa.field(name, pa.string()), pa.array(values, pa.string())
    if name in table.column_names:
        table = table.set_column(table.column_names.index(name), field, column)
    else:
        table = table.append_column(field, column)
    # What the datasets library wrote about its columns has to know the new one, or it refuses the file.
    metadata = dict(table.schema.metadata or {})
    if b"huggingface" in metadata:
        described = json.loads(metadata[b"huggingface"])
        features = (described.get("info") or {}).get("features")
        if isinstance(features, dict):
            features[name] = {"dtype": "string", "_type": "Value"}
        metadata[b"huggingface"] = json.dumps(described).encode()
    return table.replace_schema_metadata(metadata)


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may be writing the same table
    try:
        write(scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise TableError(f"cannot write {path}: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
