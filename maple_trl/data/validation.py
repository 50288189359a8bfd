"""
Validation of tables of rows with the columns of [`~maple_trl.data.schema.ROW_FEATURES`]: what is wrong, where, and what would be right.

Tables are read a thousand rows at a time, so that memory does not depend on their size, but for two things that have to be known
of every row: a digest of its id and one of its clip with its split, about 200 bytes a row.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache

from maple_trl.data.benchmarks.options import described
from maple_trl.data.record_files import CUT_TEXT, RECORD_SUFFIXES, TableError, cut_field, read_records
from maple_trl.data.row_rules import (
    Fault,
    content_faults,
    is_blank,
    listed,
    picture_fault,
    prompt_faults,
    provenance_faults,
    read_tag,
    signals,
    stratum_faults,
    type_faults,
    unread_subtitle,
)
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.data.shards import ShardError, split_files, split_of
from maple_trl.modalities import IMAGE_COLUMNS, ModalityTag
from maple_trl.omni.media.subtitles import is_subtitle_file
from maple_trl.omni.options import plain_options


KINDS: Mapping[str, str] = MappingProxyType(
    {
        "column": "a column that must be there is missing",
        "type": "a value of another type than its column, or a text with half of a character",
        "empty": "a field that must be filled is empty",
        "id": "an id that another row has",
        "tag": "a tag or required tag that is none of the seven",
        "stratum": "a stratum that tag and required tag do not make",
        "prompt": "a prompt without a message of the user, or with marks of media that the row does not have",
        "answer": "options, answer and solution that do not agree",
        "reference": "a caption without the references of its tag's signals",
        "split": "a clip in two splits, or a row in another split than its file",
        "path": "a path that does not lie below the media root",
        "file": "a file that is not there, lies elsewhere by a link, or is no picture where one must be",
        "image": "pictures in two columns",
        "signal": "a tag that asks for a signal of which the row has no medium",
        "provenance": "an entry that does not say which field, and who",
    }
)
"""Kinds of problems, and what they are."""

REQUIRED = ("id", "clip", "tag", "source", "prompt")
"""Columns that every row must fill."""

_MEDIA = ("video", "audio")
_SPLITS = ("train", "validation", "test")  # of a file that is no shard
_FURTHER = ("completion",)  # a column that is not of the schema, and says that a row is neither question nor caption
_ROWS_AT_ONCE = 1000
_PATHS_AT_HAND = 20_000
_SHOWN = 10


@dataclass(frozen=True)
class Problem:
    """
    Something that is wrong.

    Attributes:
        kind: one of `KINDS`.
        file: the table.
        row: number of the row in its file, from 0; `None` where it is about the whole file.
        field: the column.
        message: what is wrong, and what would be right.
    """

    kind: str
    file: str
    row: int | None
    field: str
    message: str

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        return f"{self.file}{row}: field '{self.field}' {self.message}"


@dataclass
class ValidationReport:
    """
    What a validation found.

    Attributes:
        rows, files: how many were read.
        counts: problems by kind, all of them.
        shown: the first problems of each kind.
        passed_over: tables of the folders that were not read, as training does not take them.
    """

    rows: int = 0
    files: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[Problem]] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        shown = {kind: [vars(problem) for problem in problems] for kind, problems in self.shown.items()}
        return {
            "rows": self.rows,
            "files": self.files,
            "passed_over": self.passed_over,
            "counts": dict(self.counts),
            "problems": shown,
        }


def validate_tables(
    tables: Iterable[str | os.PathLike[str]],
    media_root: str | os.PathLike[str] | None = None,
    shown: int = _SHOWN,
    progress: Callable[[int], None] | None = None,
) -> ValidationReport:
    """
    Validate tables together: ids are unique and clips stand in one split over all of them.

    Args:
        tables: files (`.parquet`, `.jsonl`, `.json`, `.csv`, `.tsv`), and folders of such files.
        media_root: where media must lie. Without it their paths are looked at, and not their files.
        shown: how many problems of each kind to keep.
        progress: called with the number of rows that were read.

    Raises:
        TableError: for a table that is not there or cannot be read.
    """
    report = ValidationReport()
    files = [file for table in tables for file in table_files(Path(table), report.passed_over)]
    root = None if media_root is None else Path(media_root)
    if root is not None and not root.is_dir():
        raise TableError(f"media root: there is no folder {root}")
    report.files, seen = len(files), _Seen(files)
    for file in files:
        seen.begin(report.rows)
        checker = _RowChecker(file, root, seen)
        for faults_of_file, rows in _tables(file, checker):
            for fault in faults_of_file:
                _note(report, shown, file, None, fault)
            for row, faults in rows:
                for fault in faults:
                    _note(report, shown, file, row, fault)
                report.rows += 1
            if progress is not None:
                progress(report.rows)
    if not report.rows and not report.counts:
        raise TableError(f"there is no row in {', '.join(map(str, files))}")
    return report


def table_files(path: Path, passed_over: list[str] | None = None) -> list[Path]:
    """
    List the tables of a path: itself, or those of a folder that training reads, in order.

    Of a split that is there as shards, or as a file such as `test.parquet`, these are the ones that training takes
    ([`~maple_trl.data.shards.split_files`]). Tables of another name are read where the folder has no shards.

    Args:
        passed_over: gets the tables of a folder that are not read, such as notes beside shards.

    Raises:
        TableError: when there is none, or a shard is missing.
    """
    if path.is_file() and path.suffix.lower() in RECORD_SUFFIXES:
        return [path]
    if path.is_dir():
        found = tables_in(path)
        taken = _taken(path, found)
        if taken:
            if passed_over is not None:
                passed_over += [str(file) for file in found if file not in taken]
            return sorted(taken)
        raise TableError(f"{path} holds no table ({', '.join(RECORD_SUFFIXES)})")
    raise TableError(
        f"{path}: a table is one of {', '.join(RECORD_SUFFIXES)}" if path.exists() else f"there is no table {path}"
    )


def tables_in(folder: Path) -> list[Path]:
    """List all tables of a folder, whatever they are, in order."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in RECORD_SUFFIXES and file.is_file())


def _taken(folder: Path, found: Sequence[Path]) -> set[Path]:
    splits = {split for split in map(_split_of, found) if split is not None}
    try:
        taken = {split: split_files(folder, split, RECORD_SUFFIXES) for split in splits}
    except ShardError as error:
        raise TableError(str(error)) from error
    further = [] if any(map(split_of, found)) else [file for file in found if not taken.get(_split_of(file) or "")]
    return {file for files in taken.values() for file in files} | set(further)


def _split_of(file: Path) -> str | None:
    """Return the split that a file is of by its name."""
    return split_of(file) or (file.stem if file.stem in _SPLITS else None)


def _note(report: ValidationReport, shown: int, file: Path, row: int | None, fault: Fault) -> None:
    kind, name, message = fault
    report.counts[kind] += 1
    problems = report.shown.setdefault(kind, [])
    if len(problems) < shown:
        problems.append(Problem(kind, str(file), row, name, message))


# Reading


_Found = tuple[list[Fault], Iterator[tuple[int, list[Fault]]]]


def _tables(file: Path, checker: _RowChecker) -> Iterator[_Found]:
    """Yield what is wrong with the columns of a file, and then with its rows, a batch at a time."""
    if file.suffix.lower() == ".parquet":
        yield from _parquet_tables(file, checker)
        return
    records = read_records(file)
    begin = 0
    while batch := list(islice(records, _ROWS_AT_ONCE)):
        names = dict.fromkeys(name for row in batch for name in row)
        faults = _column_faults(names) if begin == 0 else []
        checker.columns |= set(names)
        checker.missing = (set(REQUIRED) if begin == 0 else checker.missing) - set(names)
        yield faults, _numbered(checker, batch, begin, set(ROW_FEATURES) & set(names))
        begin += len(batch)


def _parquet_tables(file: Path, checker: _RowChecker) -> Iterator[_Found]:
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            twice = next((name for name, number in Counter(schema.names).items() if number > 1), None)
            if twice is not None:
                raise TableError(f"{file} has several columns {twice!r}")
            yield _column_faults(schema.names), iter(())
            checker.columns |= set(schema.names)
            checker.missing = set(REQUIRED) - set(schema.names)
            names = [name for name in schema.names if name in ROW_FEATURES or name in _FURTHER]
            odd = {name for name in names if name in ROW_FEATURES and not _fits(name, schema.field(name).type)}
            begin = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=names):
                columns = [batch.column(name).to_pylist() for name in names]
                rows = [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]
                yield [], _numbered(checker, rows, begin, odd)
                begin += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise TableError(f"cannot read {file}: {error}") from error


def _numbered(
    checker: _RowChecker, rows: Sequence[Mapping[str, Any]], begin: int, untyped: set[str]
) -> Iterator[tuple[int, list[Fault]]]:
    for number, row in enumerate(rows, begin):
        yield number, checker.faults(number, row, untyped)


def _fits(name: str, found: pa.DataType) -> bool:
    expected = ROW_FEATURES.arrow_schema.field(name).type
    return pa.types.is_null(found) or _written(found) == _written(expected)


def _written(kind: pa.DataType) -> str:
    """Return a type's text, in which sizes of offsets and names of items do not count."""
    return str(kind).replace("large_", "").replace("<element:", "<item:")


def _column_faults(names: Iterable[str]) -> list[Fault]:
    names = list(names)
    faults: list[Fault] = []
    for name in REQUIRED:
        if name not in names:
            like = get_close_matches(name, [other for other in names if other not in ROW_FEATURES], 1, 0.75)
            advice = f"; rename {like[0]!r}?" if like else f"; the columns are {', '.join(names)}"
            faults.append(("column", name, f"is no column of the table{advice}"))
    for name in names:
        like = [] if name in ROW_FEATURES else get_close_matches(name, ROW_FEATURES, 1, 0.85)
        if like and like[0] not in names and like[0] not in REQUIRED:
            faults.append(("column", name, f"is not read; rename it to {like[0]!r} if that is meant"))
    return faults


# Rows


class _Seen:
    """The ids and clips of all rows so far, as digests."""

    def __init__(self, files: Sequence[Path]):
        self.files = files
        self.ids: dict[int, int] = {}
        self.clips: dict[int, tuple[str, int]] = {}
        self.begins: list[int] = []

    def begin(self, rows: int) -> None:
        """Say how many rows the files before hold."""
        self.begins.append(rows)

    def number(self, row: int) -> int:
        """Return the number of a row of the current file, over all files."""
        return self.begins[-1] + row

    def place(self, number: int) -> str:
        file = bisect_right(self.begins, number) - 1
        return f"{self.files[file]}, row {number - self.begins[file]}"


def text_digest(text: str) -> int:
    """Return a text's digest in 64 bits: two of ten million texts have the same one with a chance of 3 in a million."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class _RowChecker:
    """Checks the rows of one file."""

    def __init__(self, file: Path, root: Path | None, seen: _Seen):
        self.split = _split_of(file)
        self.may_be_cut = file.suffix.lower() != ".parquet"  # texts of Parquet are UTF-8
        self.root = root
        self.seen = seen
        self.there: LRUCache[tuple[str, bool], str | None] = LRUCache(_PATHS_AT_HAND)
        self.columns: set[str] = set(ROW_FEATURES)
        self.missing: set[str] = set()

    def faults(self, number: int, row: Mapping[str, Any], untyped: set[str]) -> list[Fault]:
        """Return what is wrong with a row; `untyped` are the columns whose type the file does not ensure."""
        if isinstance(row.get("options"), list):
            row = {**row, "options": plain_options(row["options"])}
        faults = type_faults(row, untyped)
        if self.may_be_cut and (cut := cut_field(row)) is not None:
            faults.append(("type", cut, CUT_TEXT))
        if faults:  # the rest is about values of the right type
            return sorted(faults)
        empty = [name for name in REQUIRED if is_blank(row.get(name)) and name not in self.missing]  # told of the file
        faults += [("empty", name, "must be filled, but is empty") for name in empty]
        tag = read_tag(row, "tag", faults)
        required = read_tag(row, "required_tag", faults)
        faults += stratum_faults(row, tag, required)
        faults += prompt_faults(row)
        faults += content_faults(row, tag)
        faults += self._id_faults(row.get("id"), number)
        faults += self._split_faults(row, number)
        faults += self._media_faults(row, tag)
        faults += provenance_faults(row, self.columns)
        return faults

    def _id_faults(self, name: str | None, number: int) -> list[Fault]:
        if not name:
            return []
        own = self.seen.number(number)
        first = self.seen.ids.setdefault(text_digest(name), own)
        if first == own:
            return []
        return [("id", "id", f"is {name!r}, which {self.seen.place(first)} has already; every row needs its own")]

    def _split_faults(self, row: Mapping[str, Any], number: int) -> list[Fault]:
        split = row.get("split") or self.split
        faults: list[Fault] = []
        if row.get("split") and self.split and row["split"] != self.split:
            faults.append(("split", "split", f"is {row['split']!r}, but the file is of {self.split!r}"))
        if split is None or not row.get("clip"):
            return faults
        clip = text_digest(row["clip"])
        first, place = self.seen.clips.setdefault(clip, (split, self.seen.number(number)))
        if first != split:
            message = f"is {split!r}, but clip {row['clip']!r} stands in {first!r} ({self.seen.place(place)})"
            faults.append(("split", "split", f"{message}; all rows of a clip belong into one split"))
        return faults

    def _media_faults(self, row: Mapping[str, Any], tag: ModalityTag | None) -> list[Fault]:
        faults: list[Fault] = []
        media = {name: row.get(name) for name in _MEDIA}
        subtitle = row.get("subtitle")
        if subtitle and is_subtitle_file(subtitle.strip()):
            media["subtitle"] = subtitle.strip()
        elif subtitle and (reason := unread_subtitle(subtitle, self.root)) is not None:
            faults.append(("path", "subtitle", f"is {described(subtitle)}, which {reason}"))
        for name, path in media.items():
            if path is not None:
                faults += self._path_faults(name, path)
        for name in IMAGE_COLUMNS:
            for path in listed(row.get(name)):
                faults += self._path_faults(name, path, is_picture=True)
        if all(row.get(name) for name in IMAGE_COLUMNS):
            faults.append(
                ("image", "images", "must be empty beside 'image': a row's pictures stand in one of the two")
            )
        if tag is not None:
            has = signals(row)
            for lacking in sorted(tag.modalities - has):
                fields = {"V": "video' or 'image", "A": "audio' or 'video", "S": "subtitle"}[lacking]
                faults.append(("signal", "tag", f"is {tag}, but field '{fields}' is empty, which {lacking} needs"))
        return faults

    def _path_faults(self, name: str, path: str | None, is_picture: bool = False) -> list[Fault]:
        path = path or ""
        parts = PurePosixPath(path.replace("\\", "/")).parts
        if not path.strip() or not parts or parts[0] == "/" or ".." in parts or re.match(r"[A-Za-z]:|\w+://", path):
            return [("path", name, f"must be a path below the media root, without '..', but is {described(path)}")]
        if self.root is None:
            return []
        if (path, is_picture) not in self.there:
            self.there[path, is_picture] = self._file_fault(path, is_picture)
        fault = self.there[path, is_picture]
        return [] if fault is None else [("file", name, f"names {path!r}, and {fault}")]

    def _file_fault(self, path: str, is_picture: bool) -> str | None:
        assert self.root is not None
        try:
            real = os.path.realpath(self.root / path)
            if not os.path.isfile(real):
                return f"there is no such file in {self.root}"
        except (OSError, ValueError):  # too long a name, a zero byte
            return f"there is no such file in {self.root}"
        if not Path(real).is_relative_to(os.path.realpath(self.root)):
            return f"that is a link which leads out of {self.root}"
        fault = picture_fault(self.root / path) if is_picture else None
        return fault and f"that is no picture that can be fed: {fault}"
