"""A reviewed set as tables: what was decided is done to the rows, and says who decided it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features

from maple_trl.data.review.desk import ReviewDesk
from maple_trl.data.review.edits import changed, emptied
from maple_trl.data.review.entries import Entry
from maple_trl.data.review.outcomes import DECIDED, Outcome
from maple_trl.data.review.rows import ReviewError
from maple_trl.data.review.summary import outcomes
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.files import write_table


UNDECIDED_RULES = ("drop", "keep", "refuse")
"""What happens to rows that nobody, or too few, decided on, or on which reviewers disagree."""


def export_rows(
    desk: ReviewDesk, output: str | os.PathLike[str], rule: str = "agree", least: int = 1, undecided: str = "drop"
) -> dict[str, Any]:
    """
    Write the rows that a review keeps, with what it changed in them.

    Each changed field gets a line in `provenance` for every reviewer who decided so. All other columns stay as they are, but for a
    `completion` and a `hint` that were made for a question which has changed, see [`~maple_trl.data.review.edits.changed`].

    Args:
        desk: the set and the log of its review.
        output: a `.parquet` file for all rows, or a folder that gets a Parquet file for each file of the set.
        rule, least: as of [`~maple_trl.data.review.outcomes.settle`].
        undecided: one of `UNDECIDED_RULES`; kept rows stay as they were proposed.

    Returns:
        `dict`: `files`, and rows: `written`, `rejected`, `changed`, those without decision, `undecided_kept` or
        `undecided_dropped`, and, where there are some, those that lost their `completion` or `hint`: `completion_emptied`,
        `hint_emptied`.

    Raises:
        ReviewError: when nothing would be written, `output` would take the place of the set itself, or rows are undecided
            that must not be.
    """
    if undecided not in UNDECIDED_RULES:
        raise ReviewError(f"undecided rows are one of {', '.join(UNDECIDED_RULES)}, got {undecided!r}")
    found = outcomes(desk, rule, least)
    waiting = [desk.data.ids[index] for index, item in enumerate(found) if item.status != DECIDED]
    if waiting and undecided == "refuse":
        raise ReviewError(
            f"{len(waiting)} of {len(found)} rows are undecided under the rule {rule}, the first of them {waiting[0]!r}; "
            "nothing was written"
        )
    targets = _targets(desk, Path(output))
    tables, start, lost = [], 0, Counter()
    for name, table in desk.data.tables:
        part = found[start : start + table.num_rows]
        tables.append((name, _written(desk, table, start, part, undecided == "keep", lost)))
        start += table.num_rows
    if not sum(table.num_rows for _, table in tables):
        raise ReviewError(f"no row would be left under the rule {rule}; nothing was written")
    if len(targets) == 1:
        tables = [("", pa.concat_tables([table for _, table in tables], promote_options="default"))]
    for path, (_, table) in zip(targets, tables, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(table, path)
    entries = [item.entry for item in found if item.entry is not None]
    kept = [entry for entry in entries if not entry.rejected]
    return {
        "files": [str(path) for path in targets],
        "written": sum(table.num_rows for _, table in tables),
        "rejected": len(entries) - len(kept),
        "changed": sum(bool(entry.changes) for entry in kept),
        f"undecided_{'kept' if undecided == 'keep' else 'dropped'}": len(waiting),
        **{f"{name}_emptied": count for name, count in sorted(lost.items())},
    }


def _targets(desk: ReviewDesk, output: Path) -> list[Path]:
    """Return the files to write: one, or as many as the set has."""
    source = desk.data.path.resolve()
    if output.suffix == ".parquet":
        targets = [output]
    elif output.suffix in (".json", ".jsonl", ".csv"):
        raise ReviewError(f"{output}: a reviewed set is written as a .parquet file, or as such files in a folder")
    else:
        targets = [output / f"{name}.parquet" for name, _ in desk.data.tables]
    for path in targets:
        if path.is_dir():
            raise ReviewError(f"{path} is a folder; name a file")
        if path.resolve() == source or (source.is_dir() and path.resolve().is_relative_to(source)):
            raise ReviewError(f"{path} lies in the set that is reviewed; the review would no longer fit it")
    if output.exists() and not output.is_dir() and output.suffix != ".parquet":
        raise ReviewError(f"{output} is a file; name a folder, or a .parquet file")
    return targets


def _written(
    desk: ReviewDesk, table: pa.Table, start: int, found: Sequence[Outcome], keep_undecided: bool, lost: Counter[str]
) -> pa.Table:
    """Return the rows of one table that are kept, changed, and count columns that were emptied in `lost`."""
    kept, edits = [], {}
    for place, item in enumerate(found):
        if item.entry is None:
            kept += [place] * keep_undecided
        elif not item.entry.rejected:
            if item.entry.changes:
                edits[len(kept)] = (desk.data.row(start + place), item.entry, item.reviewers)
            kept.append(place)
    table = _with_provenance(table.take(pa.array(kept, pa.int64())))
    columns: dict[str, list[Any]] = {}
    for place, (row, entry, reviewers) in edits.items():
        lost.update(emptied(row, entry.changes))
        for name, value in _new_values(row, entry, reviewers).items():
            if name not in columns:
                columns[name] = table.column(name).to_pylist()
            columns[name][place] = value
    for name, values in columns.items():
        number = table.column_names.index(name)
        table = table.set_column(number, table.schema.field(number), pa.array(values, table.schema.field(number).type))
    return table


def _new_values(row: dict[str, Any], entry: Entry, reviewers: Sequence[str]) -> dict[str, Any]:
    """Return the columns of a row that a decision changes."""
    new = changed(row, entry.changes)
    values = {name: new[name] for name in new if name in row and new[name] != row[name]}
    lines = [
        {"field": name, "model": None, "prompt_hash": None, "reviewer": reviewer}
        for name in values
        for reviewer in reviewers
    ]
    return values | {"provenance": [*(row.get("provenance") or []), *lines]}


def _with_provenance(table: pa.Table) -> pa.Table:
    """Return a table that has the column `provenance`, in the form of the schema."""
    features = Features.from_arrow_schema(table.schema)
    name, feature = "provenance", ROW_FEATURES["provenance"]
    kind = Features({name: feature}).arrow_schema.field(0).type
    if name not in table.column_names or pa.types.is_null(table.schema.field(name).type):
        there = table.column_names
        table = table.drop_columns([name]) if name in there else table
        table = table.append_column(name, pa.nulls(table.num_rows, kind))
    elif table.schema.field(name).type != kind:
        try:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
        except pa.ArrowException as error:
            raise ReviewError(f"column provenance is {table.schema.field(name).type}, and not {kind}") from error
    features = Features({column: features.get(column, feature) for column in table.column_names} | {name: feature})
    return table.replace_schema_metadata(features.arrow_schema.metadata)
