"""Rows of CSV files, as people and spreadsheets write them: one reading for training, validation and conversion."""

from __future__ import annotations

import ast
import csv
import io
import json
import tokenize
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from maple_trl.files import row_constant


class CsvError(ValueError):
    """A CSV file that cannot be read; the message names file and line."""


CSV_SUFFIXES = (".csv", ".tsv")

_MAX_CELL = (
    64 << 20
)  # characters; the reader's own limit is 128 KiB, which a long prompt or an answer with thoughts exceeds
_CONVERSATIONS = ("prompt", "completion")
_FILES = ("video", "audio", "image", "images")
_OPTIONS = ("options", "choices")


def csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield rows of texts, one at a time, each with its place for errors.

    A cell without text is `None`. Conversations and lists of files stand as JSON, options so or as pandas or NumPy writes a list. The delimiter of a `.csv` is guessed from its header.

    Raises:
        CsvError: for what is no such table.
        OSError: when it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(_first_line(file))
            file.seek(0)
            yield from _rows(path, csv.reader(file, delimiter=delimiter, strict=True), delimiter)
    except UnicodeDecodeError as error:  # whose place is one within what was read ahead
        raise CsvError(
            f"{path}, line {_undecodable_line(path)}: not UTF-8 ({error}); save the file as UTF-8"
        ) from error


def _rows(path: Path, reader: Any, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_CELL))
    header: list[str] = []
    begin = 1  # a row with line breaks has several lines
    try:
        for cells in reader:
            place = f"{path}, line {begin}"
            begin = reader.line_num + 1
            if not any(cells):
                continue
            if not header:
                header = [name.strip() for name in cells]
                if "" in header or len(set(header)) < len(header):
                    raise CsvError(
                        f"{place}: the header must name every column once, found {', '.join(map(repr, cells))}"
                    )
                continue
            if len(cells) != len(header):
                raise CsvError(
                    f"{place}: {len(cells)} cells, and the header has {len(header)} ({', '.join(header)}); a text with "
                    f"{delimiter!r} or a line break stands in double quotes"
                )
            yield place, {name: _cell(name, cell, place) for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise CsvError(f"{path}, line {begin}: {error}; are its quotes closed?") from error


def _first_line(file: Any) -> str:
    return next((line for line in file if line.strip()), "")


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _delimiter(header: str) -> str:
    """Guess the delimiter: spreadsheets of some countries write semicolons."""
    names = {delimiter: [name.strip(' "\r\n') for name in header.split(delimiter)] for delimiter in ",;\t|"}
    named = next((delimiter for delimiter in names if "prompt" in names[delimiter]), None)
    return named or max(names, key=lambda delimiter: len(names[delimiter]))


def _cell(name: str, cell: str, place: str) -> Any:
    if not cell:
        return None
    if name == "audio_in_video" and cell.strip().lower() in ("true", "false"):
        return cell.strip().lower() == "true"
    if name in _OPTIONS:
        return _list_of_options(name, cell, place)
    if name not in (*_CONVERSATIONS, *_FILES) or not cell.lstrip().startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except json.JSONDecodeError as error:
        if cell.lstrip()[1:].lstrip().startswith("{") or name in _FILES:
            raise CsvError(
                f"{place}: column {name!r} begins like a list in JSON, and is none ({error}); write it with json.dumps"
            ) from error
        return cell
    is_list_of = dict if name in _CONVERSATIONS else str
    return value if value and all(isinstance(item, is_list_of) for item in value) else cell


def _list_of_options(name: str, cell: str, place: str) -> Any:
    """Return a list of texts or numbers that a cell spells; the cell where it spells none."""
    for read in (partial(json.loads, parse_constant=row_constant), _literal_list):
        try:
            value = read(cell.strip())
        except JoinedTextsError as error:
            raise CsvError(
                f"{place}: column {name!r} has {error} side by side, which Python reads as one text; part options by commas, "
                "or write the list with json.dumps"
            ) from error
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if value == []:
            return None  # of an open question
        if isinstance(value, list) and all(isinstance(option, str | int | float | None) for option in value):
            return value
    return cell


class JoinedTextsError(ValueError):
    """A literal in which texts stand side by side without a comma; the message shows two of them."""


def _items(text: str) -> list[ast.expr]:
    listed = ast.parse(text, mode="eval").body
    if not isinstance(listed, ast.List):
        raise ValueError("no list")
    return listed.elts


def _literal_list(text: str) -> Any:
    """
    Read a list as Python writes it (`['red', 'blue']`; `nan` is `None`) or NumPy (`['red' 'blue']`).

    Raises:
        JoinedTextsError: where some texts have no comma between them, or no space either.
    """
    if not text.startswith("["):
        raise ValueError("no list")
    value = [None if isinstance(one, ast.Name) and one.id == "nan" else ast.literal_eval(one) for one in _items(text)]
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
    inner = tokens[1:-1]
    joined = next(((a, b) for a, b in pairwise(inner) if a.type == b.type == tokenize.STRING), None)
    if joined is None:
        return value
    if any(token.type != tokenize.STRING for token in inner) or any(a.end == b.start for a, b in pairwise(inner)):
        raise JoinedTextsError(" and ".join(token.string for token in joined))
    return [ast.literal_eval(token.string) for token in inner]
