"""Stage 9: files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from maple_trl.data.curation.config import CurationConfig
from maple_trl.data.curation.stage import Row
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.data.shards import replace_split, shards_of
from maple_trl.files import write_atomically
from maple_trl.modalities import Modality, ModalityTag


CLIPS = "clips.jsonl"
SPLITS = ("train", "test")
_BATCH = 2000


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
        for split in SPLITS:
            part = [with_cues(row, cues[row["clip"]]) for row in rows if row["split"] == split]
            counts.setdefault(kind, {})[split] = len(part)
            if part:
                size = config.write.rows_per_file
                replace_split(_tables(part, config), ROW_FEATURES.arrow_schema, folder, split, size)
            else:
                for path in shards_of(folder, split):  # of an earlier run
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


def _tables(rows: Sequence[Row], config: CurationConfig) -> Iterator[pa.Table]:
    for start in range(0, len(rows), _BATCH):
        full = [{**row, "source": config.name} for row in rows[start : start + _BATCH]]
        yield pa.Table.from_pylist(full, schema=ROW_FEATURES.arrow_schema)
