"""
Rows of JSON, CSV and Parquet files.

Rows of several kinds in one file are what this library is for, so the type of a column is decided over all rows: a
column that a row lacks is empty there, numbers beside texts are read as texts, and what has no common type otherwise
(a text beside a list) is kept as it is written. What cannot be read is named with file and line.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.files import row_constant
from maple_trl.jobs.errors import SetupError


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
"""Endings of data files, the preferred one first."""


def read_tables(paths: Sequence[Path]) -> Dataset:
    """
    Read the rows of one split, from files of one ending.

    Raises:
        SetupError: with file and line, for what cannot be read.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    if paths[0].suffix.lower() == ".parquet":
        return _read_parquet(paths)
    _, kinds = count_rows(paths)
    for name in [name for name, kind in kinds.items() if kind == "text"]:
        logger.warning("%s: column %r holds numbers as well as texts; all are read as texts", paths[0], name)
    try:
        return Dataset.from_generator(
            _conformed,
            features=_features(kinds),
            gen_kwargs={
                "paths": [str(path) for path in paths],
                "kinds": kinds,
                # Of the content, so that a changed file is read anew.
                "state": [(path.stat().st_mtime_ns, path.stat().st_size) for path in paths],
            },
        )
    except (OSError, ValueError, OverflowError, DatasetsError) as error:
        raise SetupError(f"cannot read {paths[0]}: {error.__cause__ or error}") from error


def count_rows(paths: Sequence[Path]) -> tuple[int, dict[str, Any]]:
    """
    Return how many rows JSON and CSV files hold, and the kinds of their columns, for [`hold_rows`].

    Raises:
        SetupError: with file and line, for what cannot be read, and for files without a row.
    """
    kinds: dict[str, Any] = {}
    rows = 0
    for _, row in table_rows(paths):
        rows += 1
        for name, value in row.items():
            kinds[name] = _common(kinds.get(name), _kind(value))
    if not rows or not kinds:
        raise SetupError(f"cannot read {paths[0]}: it holds no row{' with a column' if rows else ''}")
    return rows, kinds


def hold_rows(rows: Iterable[Mapping[str, Any]], kinds: Mapping[str, Any]) -> Dataset:
    """Return rows of JSON and CSV files as [`read_tables`] does, in memory alone, with the columns that `kinds` names."""
    from datasets import Dataset

    conformed = [{name: _as_kind(row.get(name), kind) for name, kind in kinds.items()} for row in rows]
    return Dataset.from_list(conformed, features=_features(kinds))


def _read_parquet(paths: Sequence[Path]) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, Features
    from datasets.exceptions import DatasetsError

    try:
        schemas = [pq.read_schema(path) for path in paths]
        if not sum(pq.read_metadata(path).num_rows for path in paths):
            raise ValueError("it holds no row")
        if all(schema.equals(schemas[0]) for schema in schemas):
            # Not load_dataset("parquet"), which tells a server that it was called.
            return Dataset.from_parquet([str(path) for path in paths])
        # A shard without one video has another type in that column, or no such column.
        schema = pa.unify_schemas(schemas, promote_options="permissive")
        tables = [pq.read_table(path) for path in paths]
        table = pa.concat_tables(tables, promote_options="permissive")
        features = Features.from_arrow_schema(schema)
        return Dataset(table.cast(features.arrow_schema))
    except (OSError, ValueError, TypeError, pa.ArrowException, DatasetsError) as error:
        raise SetupError(f"cannot read {paths[0]}: {error.__cause__ or error}") from error


def stream_tables(paths: Sequence[Path]) -> IterableDataset:
    """
    Read the rows of one split as they are asked for, from Parquet files.

    Raises:
        SetupError: for files of another form, and shards whose columns differ.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import IterableDataset
    from datasets.exceptions import DatasetsError

    if paths[0].suffix.lower() != ".parquet":
        raise SetupError(f"dataset_streaming reads Parquet alone, and {paths[0]} is none; write shards (docs/data.md)")
    try:
        schemas = [pq.read_schema(path) for path in paths]
        odd = next((path for path, schema in zip(paths, schemas, strict=True) if not schema.equals(schemas[0])), None)
        if odd is not None:
            raise SetupError(f"dataset_streaming: {odd} has other columns or types than {paths[0]}")
        return IterableDataset.from_parquet([str(path) for path in paths])  # as above
    except (OSError, ValueError, TypeError, pa.ArrowException, DatasetsError) as error:
        raise error if isinstance(error, SetupError) else SetupError(f"cannot read {paths[0]}: {error}") from error


def _conformed(paths: Sequence[str], kinds: Mapping[str, Any], state: Any) -> Iterator[dict[str, Any]]:
    for _, row in table_rows([Path(path) for path in paths]):
        yield {name: _as_kind(row.get(name), kind) for name, kind in kinds.items()}


def table_rows(paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of JSON and CSV files, each with its place for errors."""
    # Not above: it brings `datasets`, and a job sets its variables first.
    from maple_trl.data.csv_rows import CSV_SUFFIXES, CsvError, csv_rows

    for path in paths:
        try:
            yield from (csv_rows if path.suffix.lower() in CSV_SUFFIXES else _json_rows)(path)
        except CsvError as error:
            raise SetupError(str(error)) from error
        except OSError as error:
            raise SetupError(f"cannot read {path}: {error}") from error


# JSON


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if head.startswith(b"["):
            values = _parsed(path, 1, file.read())
            places = [f"{path}, item {number} of the list" for number in range(1, len(values) + 1)]
            yield from ((place, _as_row(place, value)) for place, value in zip(places, values, strict=True))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _as_row(place, _parsed(path, number, line.rstrip()))


def _parsed(path: Path, number: int, data: bytes) -> Any:
    """Parse the JSON value that begins at a line."""
    text = _text(path, data, number)
    try:
        value = json.loads(text, parse_constant=row_constant)
    except json.JSONDecodeError as error:
        what = "one row as a JSON object a line, or one list of them"
        raise SetupError(
            f"{path}, line {number + error.lineno - 1}, column {error.colno}: not JSON ({error.msg}); expected {what}"
        ) from error
    except RecursionError as error:
        raise SetupError(f"{path}, line {number}: nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise SetupError(f"{path}, line {number}: {error}") from error
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise SetupError(
                f"{path}, line {number}: half of a character ({error.reason}: {error.object[error.start]!a})"
            ) from error
    return value


def _as_row(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(value), f"the value {value!r}")
        raise SetupError(
            f'{place}: {kind}, not a row; a row is an object such as {{"prompt": [...], "solution": "A"}}'
        )
    return value


def _text(path: Path, data: bytes, number: int = 1) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise SetupError(f"{path}, line {line}: not UTF-8 ({error}); save the file as UTF-8") from error


# Types


def _kind(value: Any) -> Any:
    """Return the type of a value: a name, `[type]` of a list's items, `{name: type}` of an object, or `None`."""
    if value is None:
        return None
    if isinstance(value, list):
        item = None
        for member in value:
            item = _common(item, _kind(member))
        return [item]
    if isinstance(value, dict):
        return {name: _kind(member) for name, member in value.items()} or "json"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "text"
    return {bool: "bool", int: "int64", float: "float64", str: "string"}[type(value)]


def _common(first: Any, second: Any) -> Any:
    """Return the type that holds values of both."""
    if first is None or second is None or first == second:
        return second if first is None else first
    if isinstance(first, list) and isinstance(second, list):
        return [_common(first[0], second[0])]
    if isinstance(first, dict) and isinstance(second, dict):
        return {name: _common(first.get(name), second.get(name)) for name in {**first, **second}}
    if isinstance(first, str) and isinstance(second, str) and "json" not in (first, second):
        return "float64" if {first, second} == {"int64", "float64"} else "text"
    return "json"


def _features(kinds: Mapping[str, Any]):
    from datasets import Features, Json, List, Value

    def feature(kind: Any):
        if isinstance(kind, list):
            return List(feature(kind[0]))
        if isinstance(kind, dict):
            return {name: feature(member) for name, member in kind.items()}
        return Json() if kind == "json" else Value({"text": "string", None: "null"}.get(kind, kind))

    return Features({name: feature(kind) for name, kind in kinds.items()})


def _as_kind(value: Any, kind: Any) -> Any:
    """Return a value as its column stores it."""
    if value is None:
        return None
    if kind == "json":  # `datasets` stores its text; a text that spells JSON itself would be taken for that
        return json.dumps(value, ensure_ascii=False)
    if isinstance(kind, list):
        return [_as_kind(member, kind[0]) for member in value]
    if isinstance(kind, dict):
        return {name: _as_kind(value.get(name), member) for name, member in kind.items()}
    return json.dumps(value) if kind == "text" and not isinstance(value, str) else value
