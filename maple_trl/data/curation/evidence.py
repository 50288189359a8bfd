"""
What a model is shown of a clip. Modality isolation is kept here: a row is cut down to a tag's signals before a request is made.

A clip's row holds, by modality (`V`, `A`, `S`), `signals` (files below the output folder) and `notes` (what was written about
each alone); neither its name nor its paths are ever shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from maple_trl.chat import fence, jpeg_block, text_block, wav_block
from maple_trl.data.curation.prompts import HEADINGS
from maple_trl.modalities import Modality, ModalityTag
from maple_trl.omni.media.subtitles import subtitle_bytes, subtitle_text


CHARACTERS_PER_SECOND = 15  # of speech, for estimates


def isolate(row: Mapping[str, Any], modalities: Iterable[Modality]) -> dict[str, Any]:
    """Return a row with the signals of some modalities alone."""
    wanted = set(modalities)
    cut = {
        name: {modality: value for modality, value in row.get(name, {}).items() if modality in wanted}
        for name in ("signals", "notes")
    }
    return {**row, **cut}


def possible_tags(row: Mapping[str, Any], tags: Iterable[ModalityTag]) -> list[ModalityTag]:
    """Return the tags all of whose signals a clip has, with what was written about each."""
    return [tag for tag in tags if all(modality in row["notes"] for modality in tag.modalities)]


def show(root: Path, row: Mapping[str, Any], modalities: Iterable[Modality], form: str) -> list[dict[str, Any]]:
    """
    Return content blocks with some of a clip's signals.

    Args:
        root: the output folder.
        form: one of [`~maple_trl.data.curation.config.EVIDENCE`].
    """
    wanted = set(modalities)
    row = isolate(row, wanted)
    blocks: list[dict[str, Any]] = []
    for modality in Modality:
        if modality in wanted and form in ("annotations", "both"):
            text = json.dumps(row["notes"][modality], ensure_ascii=False, indent=1)
            blocks.append(text_block(fence(f"description_of_{HEADINGS[modality].split()[0]}", text)))
        if modality in wanted and form in ("media", "both"):
            blocks += _media(root, modality, row["signals"][modality])
    return blocks


def _media(root: Path, modality: Modality, signal: Mapping[str, Any]) -> list[dict[str, Any]]:
    if modality is Modality.SUBTITLE:
        return [text_block(fence(HEADINGS[modality].split()[0], read_text(root, signal)))]
    if modality is Modality.AUDIO:
        return [text_block(f"{HEADINGS[modality].capitalize()}:"), _sound(root, signal)]
    times = ", ".join(f"{time:.1f}" for time in signal["times"])
    pictures = [_picture(root, name) for name in signal["frames"]]
    return [text_block(f"{len(pictures)} {HEADINGS[modality]}, at {times} seconds:"), *pictures]


def read_text(root: Path, signal: Mapping[str, Any]) -> str:
    """Return the words of a subtitle; in a dry run as many letters as it may have."""
    if "planned" in signal:
        return "x" * signal["planned"]
    return subtitle_text(subtitle_bytes(root / signal["file"]), signal["file"])


def _sound(root: Path, signal: Mapping[str, Any]) -> dict[str, Any]:
    return wav_block(bytes(signal["planned"]) if "planned" in signal else (root / signal["file"]).read_bytes())


def _picture(root: Path, name: str | None) -> dict[str, Any]:
    return jpeg_block(b"" if name is None else (root / name).read_bytes())
