"""The card of a folder of shards on the Hub: what a reader of the set has to know, counted from its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from maple_trl.files import digest


_COUNTED = ("tag", "split", "source", "question_type", "required_tag", "stratum")
_SHOWN = 40  # values of one column
_ROWS_AT_ONCE = 10_000
_MARK = "<!-- written by maple-trl data push, "


@dataclass
class Contents:
    """
    What a folder of shards holds.

    Attributes:
        rows, bytes: by split; bytes are those of the files.
        counts: rows by the values of each column that is counted.
        written: rows of which a model wrote a field, by model and field; likewise of reviewers.
        touched: rows by whether a model, a reviewer, both or none is named in their provenance.
        columns: names and types, as the files have them.
    """

    rows: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in _COUNTED})
    written: Counter[tuple[str, str]] = field(default_factory=Counter)
    reviewed: Counter[tuple[str, str]] = field(default_factory=Counter)
    touched: Counter[str] = field(default_factory=Counter)
    columns: dict[str, str] = field(default_factory=dict)


def count_contents(shards: Mapping[str, Sequence[Path]]) -> Contents:
    """Count what shards hold, a batch at a time."""
    contents = Contents()
    for split, paths in shards.items():
        for path in paths:
            contents.bytes[split] += path.stat().st_size
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                contents.columns |= {name: str(schema.field(name).type) for name in schema.names}
                names = [name for name in (*_COUNTED, "provenance") if name in schema.names]
                for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=names):
                    contents.rows[split] += batch.num_rows
                    for name in names:
                        if name != "provenance":
                            _count(contents.counts[name], batch.column(name))
                    if "provenance" in names:
                        _count_provenance(contents, batch.column("provenance").to_pylist())
    return contents


def _count(counter: Counter[str], column: Any) -> None:
    for entry in column.value_counts().to_pylist():
        if entry["values"] is not None:
            counter[entry["values"]] += entry["counts"]


def _count_provenance(contents: Contents, cells: Iterable[list[dict[str, str | None]] | None]) -> None:
    for entries in cells:
        models, reviewers = set(), set()
        for entry in entries or ():
            models |= {(entry["model"], entry["field"])} if entry["model"] else set()
            reviewers |= {(entry["reviewer"], entry["field"])} if entry["reviewer"] else set()
        contents.written.update(models)
        contents.reviewed.update(reviewers)
        by = (
            "model and reviewer"
            if models and reviewers
            else "model"
            if models
            else "reviewer"
            if reviewers
            else "neither"
        )
        contents.touched[by] += 1


def render_card(
    contents: Contents,
    files: Mapping[str, Sequence[str]],
    repository: str,
    license: str | None = None,
    kept: Sequence[str] = (),
) -> str:
    """
    Render a card; its last line, which a page does not show, tells it from one that a person has changed.

    Args:
        contents: of the shards.
        files: the shards' paths in the repository, or patterns of them, by split.
        repository: its id.
        license: as the Hub calls it, e.g. `cc-by-4.0`.
        kept: those of the splits that an earlier upload has left there, which are not counted.
    """
    head: dict[str, Any] = {} if license is None else {"license": license}
    head["configs"] = [
        {
            "config_name": "default",
            "data_files": [{"split": split, "path": list(paths)} for split, paths in files.items()],
        }
    ]
    head["tags"] = ["maple-trl", "video", "audio", "subtitles", "image"]
    total = contents.rows.total()
    lines = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {repository.rpartition('/')[2]}", ""]
    lines += [
        f"{total:,} rows on clips, each with the signals that it is fed (`tag`): V video or pictures, A audio, S subtitles.",
        "",
    ]
    lines += _table(
        "Splits", ("split", "rows", "bytes"), [(s, n, contents.bytes[s]) for s, n in contents.rows.items()]
    )
    if kept:
        lines += [f"Of an earlier upload, and not counted on this page: {', '.join(kept)}.", ""]
    for name in _COUNTED:
        counter = contents.counts[name]
        if counter and name != "split":
            shown = [(value, count) for value, count in counter.most_common(_SHOWN)]
            rest = counter.total() - sum(count for _, count in shown)
            shown += [("others", rest)] if rest else []
            lines += _table(f"Rows by {name}", (name, "rows"), shown)
    lines += ["## Provenance", ""]
    lines += ["Who is named in the rows' column `provenance`; a row may be counted in several lines of one table.", ""]
    lines += _table(
        "", ("named", "rows", "share"), [(by, n, f"{n / total:.1%}") for by, n in contents.touched.most_common()]
    )
    for title, counter in (("model", contents.written), ("reviewer", contents.reviewed)):
        if counter:
            rows = [(who, name, n, f"{n / total:.1%}") for (who, name), n in counter.most_common(_SHOWN)]
            lines += _table("", (title, "field", "rows", "share"), rows)
    lines += ["## Use", "", "```python", "from datasets import load_dataset", ""]
    lines += [f'rows = load_dataset("{repository}", split="{next(iter(files))}")', "```", ""]
    lines += [
        "The media are not part of it: `video`, `audio`, `image` and `images` are paths below a media root of yours, as is `subtitle`"
    ]
    lines += [
        f"where it is no text. In a job of `maple-trl train`: `dataset_name: {repository}` and `media_root: FOLDER`.",
        "",
    ]
    lines += _table("Columns", ("column", "type"), list(contents.columns.items()))
    text = "\n".join(lines).rstrip() + "\n"
    return f"{text}\n{_mark(text)}\n"


def is_rendered(card: str) -> bool:
    """Return whether a card is one of [`render_card`], and as that has written it."""
    text, mark, _ = card.rpartition(f"\n{_MARK}")
    return bool(mark) and card == f"{text}\n{_mark(text)}\n"


def _mark(text: str) -> str:
    return f"{_MARK}{digest(text)[:16]} -->"


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"## {title}", ""] if title else []
    lines += [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return [*lines, ""]


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
