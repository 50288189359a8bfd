"""Stage 1: the clips of a folder or table, and what their headers say."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from maple_trl.data.curation.config import CurationConfig
from maple_trl.data.curation.errors import CurationError
from maple_trl.data.curation.stage import Outcome, Row, Stage, Tools
from maple_trl.data.record_files import TableError
from maple_trl.data.row_tables import SUFFIXES, RowTable
from maple_trl.modalities import IMAGE_COLUMNS, SUBTITLE_SUFFIXES
from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.subtitles import is_subtitle_file


def source_root(config: CurationConfig) -> Path:
    """Return the folder below which the clips lie."""
    path = Path(config.source.path)
    return Path(config.source.media_root or (path if path.is_dir() else path.parent))


def list_source(config: CurationConfig) -> list[Row]:
    """
    List the clips, without opening them.

    Raises:
        CurationError: naming the table, row and column; and when there is no clip at all.
    """
    path = Path(config.source.path)
    rows = _of_folder(path, config) if path.is_dir() else _of_table(path)
    if not rows:
        raise CurationError(f"source.path: {path} holds no clip; looked for {', '.join(config.source.suffixes)}")
    root = source_root(config)
    return [{**row, "state": _state(root, row)} for row in rows[: config.source.limit]]


def _of_folder(folder: Path, config: CurationConfig) -> list[Row]:
    wanted = {suffix.lower() for suffix in config.source.suffixes}
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in wanted and path.is_file())
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in files]
    often = Counter(names)
    rows = []
    for path, name in zip(files, names, strict=True):
        video = path.relative_to(folder).as_posix()
        beside = [path.with_suffix(suffix) for suffix in SUBTITLE_SUFFIXES]
        subtitle = next((other.relative_to(folder).as_posix() for other in beside if other.is_file()), None)
        # Two files that differ in their ending are two clips.
        rows.append({"clip": name if often[name] == 1 else video, "video": video, "audio": None, "subtitle": subtitle})
    return rows


def _of_table(path: Path) -> list[Row]:
    if path.suffix not in SUFFIXES:
        raise CurationError(
            f"source.path: {path} is neither a folder nor a table; a table is one of {', '.join(SUFFIXES)}"
        )
    try:
        table = RowTable(path)
    except TableError as error:
        raise CurationError(f"source.path: {error}") from error
    if "video" not in table.columns:
        raise CurationError(f"source.path: {path} has no column 'video'; its columns: {', '.join(table.columns)}")
    columns = {name: table.column(name) for name in ("clip", "video", "audio", "subtitle") if name in table.columns}
    pictures = {name: table.column(name) for name in IMAGE_COLUMNS if name in table.columns}
    rows, seen = [], {}
    for index in range(len(table)):
        picture = next((name for name, cells in pictures.items() if cells[index]), None)
        if picture is not None:
            raise CurationError(
                f"source.path: {path}, row {index}: the column {picture!r} holds a picture, and clips are curated; leave such rows "
                "out, or make clips of pictures (maple-trl data convert --pictures clips)"
            )
        row = {name: _text(path, index, name, columns[name][index]) for name in columns}
        if row["video"] is None:
            raise CurationError(f"source.path: {path}, row {index}: the column 'video' must name a file")
        name = row.get("clip") or str(Path(row["video"]).with_suffix("").as_posix())
        if name in seen:
            raise CurationError(
                f"source.path: {path}, row {index}: the clip {name!r} stands in row {seen[name]} too; a clip has one row, "
                "with a name of its own in the column 'clip'"
            )
        seen[name] = index
        rows.append({"audio": None, "subtitle": None, **row, "clip": name})
    return rows


def _text(path: Path, index: int, name: str, value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise CurationError(f"source.path: {path}, row {index}: the column {name!r} must be text, got {value!r}")
    return value


def _state(root: Path, row: Row) -> list[Any]:
    """Return what tells a changed file apart."""
    state = []
    for name in ("video", "audio", "subtitle"):
        try:
            status = os.stat(root / row[name]) if row[name] else None
        except (OSError, ValueError):  # not there, or a text
            status = None
        state.append(status and [status.st_size, status.st_mtime_ns])
    return state


async def collect(row: Row, tools: Tools) -> Outcome:
    """Read a clip's headers; one that cannot be used is dropped by the medium's reason."""
    outcome = Outcome()
    try:
        info = tools.loader.probe(row["video"])
        sound = tools.loader.probe(row["audio"]) if row["audio"] else info
    except MediaError as error:
        outcome.drop(row["clip"], f"media:{error.reason}", error.detail)
        return outcome
    if not (info.has_video or sound.has_audio):
        outcome.drop(row["clip"], "no-streams", "the file has neither pictures nor sound")
        return outcome
    subtitle = row["subtitle"]
    if subtitle and is_subtitle_file(subtitle):
        try:
            tools.loader.subtitle(subtitle)
        except MediaError as error:
            outcome.notes[f"subtitle:{error.reason}"] += 1
            subtitle = None
    found = {"seconds": info.duration, "has_video": info.has_video, "has_audio": sound.has_audio, "subtitle": subtitle}
    outcome.rows.append({**row, **found})
    return outcome


STAGE = Stage("collect", None, collect, decides=lambda config: config.source.max_seconds)
