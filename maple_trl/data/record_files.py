"""Records of published files, one at a time: memory depends on the largest record, not on how many there are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from maple_trl.data.csv_rows import CSV_SUFFIXES, CsvError, csv_rows
from maple_trl.files import row_constant


class TableError(ValueError):
    """A table that cannot be read or written as asked; the message names the file, and the row where there is one."""


CUT_TEXT = "holds half of a character (a surrogate without the other), which is no text"
"""What is wrong with a field that [`cut_field`] finds."""

_CHUNK = 1 << 20  # characters read at once
_ROWS_AT_ONCE = 64  # a row may carry whole pictures and sounds
_BLANK = re.compile(r"\s*")
_NEAR = 16  # characters from the end of a text at which what looks malformed may only be cut


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """
    Read the records of a file: `.parquet`, `.jsonl` (an object a line), `.json` (a list of objects, or one a line), `.csv`, `.tsv`.

    The last two are read as training reads them, see [`~maple_trl.data.csv_rows.csv_rows`].

    Raises:
        TableError: when it cannot be read, naming the file, and record or line.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TableError(f"{path}: a file of records is one of {', '.join(_READERS)}")
    if not path.is_file():
        raise TableError(f"there is no file {path}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise TableError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    except CsvError as error:
        raise TableError(str(error)) from error
    except (OSError, pa.ArrowException) as error:
        raise TableError(f"cannot read {path}: {error}") from error


def cut_field(row: Mapping[str, Any]) -> str | None:
    """Return the first field of a row that holds half of a character, as JSON can spell it; `None` where all texts are whole."""
    for name, value in row.items():
        if any(map(_is_cut, _texts({name: value}))):
            return name.encode(errors="backslashreplace").decode()  # it may be the name itself that cannot be printed
    return None


def _is_cut(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value that are not plain ASCII, names of members among them."""
    if isinstance(value, str):
        if not value.isascii():
            yield value
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield from _texts(name)
            yield from _texts(member)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line, parse_constant=row_constant)
                except RecursionError as error:
                    raise TableError(f"{path}, line {number}: nested too deeply") from error
                except ValueError as error:
                    raise TableError(f"{path}, line {number}: {error}; expected one object a line") from error
                yield _as_record(value, f"{path}, line {number}")


def _json(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        items = _Items(path, file)
        is_list = items.peek() == "["
        if is_list:
            yield from items
    if not is_list:
        yield from _json_lines(path)


class _Items:
    """The items of a JSON list, decoded while its text comes in."""

    def __init__(self, path: Path, file: TextIO):
        self.path = path
        self.file = file
        self.text, self.at = "", 0
        self.decoder = json.JSONDecoder(parse_constant=row_constant)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.at += 1  # the bracket
        number = 0
        while self.peek() != "]":
            yield _as_record(self._value(number), f"{self.path}, record {number}")
            number += 1
            if self.peek() == ",":
                self.at += 1
                if self.peek() == "]":
                    raise TableError(f"{self.path}, record {number}: nothing stands behind the last comma")
            elif self.peek() != "]":
                raise TableError(f"{self.path}, record {number}: not JSON (expected a comma or the end of the list)")
        self.at += 1
        if self.peek():  # as where two lists were put one behind the other, of which the second would be lost
            raise TableError(
                f"{self.path}, record {number}: something stands behind the ] that ends the list; expected one list alone, or "
                "one object a line"
            )

    def peek(self) -> str:
        """Return the next character that is not blank; empty at the end."""
        while True:
            self.at = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _more(self) -> bool:
        chunk = self.file.read(_CHUNK)
        self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def _value(self, number: int) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise TableError(f"{self.path}, record {number}: nested too deeply") from error
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _NEAR
                if cut and self._more():
                    continue
                raise TableError(f"{self.path}, record {number}: not JSON ({error.msg})") from error
            except ValueError as error:  # a number of more digits than Python reads
                raise TableError(f"{self.path}, record {number}: a number that cannot be read ({error})") from error
            if end == len(self.text) and self._more():  # a number may go on
                continue
            self.at = end
            return value


def _as_record(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TableError(f"{place}: expected an object, got {type(value).__name__}")
    return dict(value)


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    for _, row in csv_rows(path):
        yield row


_READERS: Mapping[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".json": _json,
    **dict.fromkeys(CSV_SUFFIXES, _csv),
}
RECORD_SUFFIXES = tuple(_READERS)
"""Endings of files of records."""
