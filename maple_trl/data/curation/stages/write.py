"""Stage 9: files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from maple_trl.data.curation.config import CurationConfig
from maple_trl.data.curation.stage import Row
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.files import write_atomically, write_table
from maple_trl.modalities import Modality, ModalityTag


CLIPS = "clips.jsonl"
SPLITS = ("train", "test")
_SHARD = re.compile(r"(?:train|test)-\d{5}-of-\d{5}\.parquet")


def write(
    tables: Mapping[str, Sequence[Row]], clips: Sequence[Row], config: CurationConfig
) -> dict[str, dict[str, int]]:
    """
    Write a folder of Parquet files for each table, and `CLIPS` with what was written about each clip's signals.

    Args:
        tables: the rows of `questions` and of `captions`, with their splits.
        clips: rows of the clips, as the alignment left them.

    Returns:
        table -> split -> rows.
    """
    counts: dict[str, dict[str, int]] = {}
    cues = {row["clip"]: heard(row) for row in clips}
    for kind, rows in tables.items():
        folder = Path(config.output, kind)
        folder.mkdir(parents=True, exist_ok=True)
        names = set()
        for split in SPLITS:
            part = [with_cues(row, cues[row["clip"]]) for row in rows if row["split"] == split]
            counts.setdefault(kind, {})[split] = len(part)
            names |= _write_split(folder, split, part, config)
        for path in folder.iterdir():  # of an earlier run with other rows
            if _SHARD.fullmatch(path.name) and path.name not in names:
                path.unlink()
    about = ("clip", "seconds", "media", "notes", "provenance")
    lines = (json.dumps({name: row[name] for name in about}, ensure_ascii=False) for row in clips)
    write_atomically(Path(config.output, CLIPS), "".join(f"{line}\n" for line in lines))
    return counts


def heard(clip: Row) -> dict[str, Any]:
    """Return what rows that feed a clip's sound say of it: its cues as text, and the provenance of that."""
    cues = clip["notes"].get(Modality.AUDIO.value, {}).get("cues")
    written = [entry for entry in clip["provenance"] if entry["field"] == f"notes.{Modality.AUDIO}"]
    if not cues:
        return {"provenance": []}
    text = "; ".join(f"{cue['event'].strip().rstrip('.')} ({cue['second']:g} s)" for cue in cues)
    return {"audio_cues": text, "provenance": [{**entry, "field": "audio_cues"} for entry in written]}


def with_cues(row: Row, told: Mapping[str, Any]) -> Row:
    """Return a row with what is heard, where it feeds the sound."""
    if Modality.AUDIO not in ModalityTag(row["tag"]).modalities:
        return row
    return {**row, **told, "provenance": [*row["provenance"], *told["provenance"]]}


def _write_split(folder: Path, split: str, rows: Sequence[Row], config: CurationConfig) -> set[str]:
    size = config.write.rows_per_file
    shards = [rows[start : start + size] for start in range(0, len(rows), size)]
    names = set()
    for number, shard in enumerate(shards):
        name = f"{split}-{number:05}-of-{len(shards):05}.parquet"
        full = [{**dict.fromkeys(ROW_FEATURES), **row, "source": config.name} for row in shard]
        write_table(pa.Table.from_pylist(full, schema=ROW_FEATURES.arrow_schema), folder / name)
        names.add(name)
    return names
