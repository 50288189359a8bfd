"""The rows that are reviewed: tables of a file or of a folder, read once and taken row by row."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maple_trl.data.row_tables import SUFFIXES, RowTable, TableError
from maple_trl.data.validation import table_files, tables_in
from maple_trl.files import digest
from maple_trl.modalities import ModalityTag
from maple_trl.omni.options import bare_options, plain_options


SEEN = ("prompt", "question", "options", "answer", "solution", "tag", "required_tag", "stratum")
SEEN += ("reference", "reference_v", "reference_a", "reference_s", "video", "audio", "subtitle", "image", "images")
"""Columns that a reviewer judges by; a row that differs in one of them is another row."""

_LISTS = ("options", "images")
_TEXTS = tuple(name for name in SEEN if name not in ("prompt", *_LISTS))
_SHOWN_FAULTS = 5


class ReviewError(ValueError):
    """A set, a log or an order that cannot be reviewed as asked; the message says what would be right."""


class ReviewSet:
    """
    The rows of a tagged set, in the columns of `maple_trl.data.schema.ROW_FEATURES` (not all need be there).

    Args:
        path (`str` or `os.PathLike`):
            A `.parquet`, `.json` or `.jsonl` file; a folder with such files (Parquet alone where there is one, and shards
            alone where a split has them), also in its folder `data`; or a folder made by `save_to_disk`.

    Attributes:
        tables (`list[tuple[str, pa.Table]]`): name without ending, and rows, of each file.
        ids (`list[str]`), tags (`list[str]`): of all rows, in order.

    Raises:
        ReviewError: when there is no such set, or rows lack an `id` of their own or a tag; the first ones are named.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.tables = [(name, _with_option_texts(table)) for name, table in _read(self.path)]
        self.ids: list[str] = []
        self.tags: list[str] = []
        faults: list[str] = []
        self._starts: list[int] = []
        for name, table in self.tables:
            _check_columns(name, table)
            self._starts.append(len(self.ids))
            faults += self._add(name, table)
        self._index = {name: index for index, name in enumerate(self.ids)}
        if len(self._index) < len(self.ids):
            faults += [f"id {name!r} stands in several rows" for name in _repeated(self.ids)]
        if faults:
            more = f"; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
            raise ReviewError(f"{self.path}: {'; '.join(faults[:_SHOWN_FAULTS])}{more}")
        if not self.ids:
            raise ReviewError(f"{self.path} holds no rows")
        self.digest = functools.lru_cache(maxsize=None)(self._digest)
        self.row = functools.lru_cache(maxsize=256)(self._row)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def folder(self) -> Path:
        """The folder of the set, below which its media lie unless something else is said."""
        return self.path if self.path.is_dir() else self.path.parent

    def index_of(self, name: str) -> int | None:
        """Return where the row whose id is `name` stands; `None` where there is none."""
        return self._index.get(name)

    def _add(self, name: str, table: pa.Table) -> Iterator[str]:
        for number, (row, tag) in enumerate(zip(table["id"].to_pylist(), table["tag"].to_pylist(), strict=True)):
            try:
                parsed = ModalityTag.parse(tag).value
            except ValueError as error:
                yield f"{name}, row {number}: {error}"
                parsed = "VAS"
            if not isinstance(row, str) or not row.strip():
                yield f"{name}, row {number}: id is {row!r}; every row needs a text of its own"
            self.ids.append(str(row))
            self.tags.append(parsed)

    def place(self, index: int) -> tuple[int, int]:
        """Return in which table the row at `index` stands, and where in it."""
        table = max(number for number, start in enumerate(self._starts) if start <= index)
        return table, index - self._starts[table]

    def _row(self, index: int) -> dict[str, Any]:
        table, place = self.place(index)
        (row,) = self.tables[table][1].slice(place, 1).to_pylist()
        return row | {"tag": self.tags[index]}

    def _digest(self, index: int) -> str:
        return row_digest(self.row(index))


def row_digest(row: dict[str, Any]) -> str:
    """Return what identifies a row as a reviewer sees it: 16 digits of the SHA-256 over the columns of `SEEN`."""
    return digest({name: row[name] for name in SEEN if row.get(name) is not None})[:16]


def shown_options(row: Mapping[str, Any]) -> list[str]:
    """Return a row's options as a reviewer reads and changes them: all without their letters, and without what pads their list."""
    return bare_options([option or "" for option in plain_options(row.get("options") or [])])


def prompt_text(row: dict[str, Any]) -> str | None:
    """Return the text of a prompt that is one user message, or a text; `None` of any other."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0].get("content"), str):
        return prompt[0]["content"]
    return None


def _read(path: Path) -> list[tuple[str, pa.Table]]:
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return _stored(path)
    if not path.exists():
        raise ReviewError(f"there is no file or folder {path}")
    if not path.is_dir():
        return [(path.stem, _table(path))]
    for folder in (path, path / "data"):
        files = _files(folder) if folder.is_dir() else []
        for suffix in SUFFIXES:
            if of_suffix := [file for file in files if file.suffix == suffix]:
                return [(file.stem, _table(file)) for file in of_suffix]
    raise ReviewError(f"{path} holds no table; rows are read from {', '.join(SUFFIXES)} files in it")


def _files(folder: Path) -> list[Path]:
    """Return the tables of a folder that training reads: beside shards lie notes, and rows that a filter has dropped."""
    try:
        return table_files(folder) if tables_in(folder) else []
    except TableError as error:
        raise ReviewError(str(error)) from error


def _stored(path: Path) -> list[tuple[str, pa.Table]]:
    from datasets import DatasetDict, load_from_disk

    stored = load_from_disk(str(path))
    splits = dict(stored) if isinstance(stored, DatasetDict) else {path.name: stored}
    return [(name, split.flatten_indices().data.table.combine_chunks()) for name, split in splits.items()]


def _table(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        try:
            return pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise ReviewError(f"cannot read {path}: {error}") from error
    try:
        rows = RowTable(path)
        columns = {name: rows.column(name) for name in rows.columns}
        if "options" in columns:
            columns["options"] = list(map(_numbers_as_texts, columns["options"]))
        return pa.table(columns)
    except (TableError, pa.ArrowException, TypeError) as error:
        raise ReviewError(str(error) if isinstance(error, TableError) else f"cannot read {path}: {error}") from error


def _with_option_texts(table: pa.Table) -> pa.Table:
    """Return a table whose options are texts where they are numbers."""
    if "options" not in table.column_names:
        return table
    field = table.schema.field("options")
    if not (_is_list(field.type) and (pa.types.is_integer(v := field.type.value_type) or pa.types.is_floating(v))):
        return table
    texts = pa.array(map(_numbers_as_texts, table["options"].to_pylist()), pa.list_(pa.string()))
    # What the datasets library wrote about its columns no longer holds.
    return table.set_column(table.column_names.index("options"), "options", texts).replace_schema_metadata(None)


def _numbers_as_texts(options: Any) -> Any:
    has_numbers = isinstance(options, list) and any(isinstance(option, int | float) for option in options)
    return plain_options(options) if has_numbers else options


def _check_columns(name: str, table: pa.Table) -> None:
    missing = [column for column in ("id", "tag") if column not in table.column_names]
    if missing:
        raise ReviewError(
            f"{name} has no column {' and '.join(missing)}; a row has id and tag, and what maple_trl.data.schema "
            f"names besides; it has {', '.join(table.column_names)}"
        )
    for column in ("id", *_TEXTS):
        if column not in table.column_names:
            continue
        kind = table.schema.field(column).type
        if not _is_text(kind):
            raise ReviewError(f"{name}: column {column} is {kind}; it must be text (a path, where it names a medium)")
    for column in (column for column in _LISTS if column in table.column_names):
        kind = table.schema.field(column).type
        if not (pa.types.is_null(kind) or (_is_list(kind) and _is_text(kind.value_type))):
            raise ReviewError(f"{name}: column {column} is {kind}; it must be a list of texts")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    """Return whether a column's cells are texts, or empty all of them; Polars and pandas write large ones, and views."""
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def _repeated(names: list[str]) -> list[str]:
    seen: set[str] = set()
    return list(dict.fromkeys(name for name in names if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
