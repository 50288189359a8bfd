"""What is wrong with a row of [`~maple_trl.data.schema.ROW_FEATURES`] by what it says itself; not by other rows or its files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from datasets import Features, List, Value

from maple_trl.data.benchmarks.options import described
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.modalities import IMAGE_COLUMNS, STRATA, SUBTITLE_SUFFIXES, Modality, ModalityTag
from maple_trl.omni.content import MARK
from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.clips import Source
from maple_trl.omni.media.subtitles import unread_file
from maple_trl.omni.media.tasks import Task, perform


_ROLES = ("system", "user", "assistant")
_LETTERS = re.compile(r"[A-Z](,[A-Z])*")
_DIGEST = re.compile(r"[0-9a-f]{8,64}")

Fault = tuple[str, str, str]
"""Kind (of [`~maple_trl.data.validation.KINDS`]), field and message."""


def signals(row: Mapping[str, Any]) -> frozenset[Modality]:
    """Return the signals that a row has a medium for: a picture counts as seen, a video's sound as heard."""
    has = {
        Modality.VIDEO: any(row.get(name) for name in ("video", *IMAGE_COLUMNS)),
        Modality.AUDIO: bool(row.get("audio") or row.get("video")),
        Modality.SUBTITLE: not is_blank(row.get("subtitle")),
    }
    return frozenset(modality for modality, there in has.items() if there)


def is_blank(value: Any) -> bool:
    """Return whether a field is empty: nothing, white space, or no items."""
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def read_tag(row: Mapping[str, Any], name: str, faults: list[Fault]) -> ModalityTag | None:
    """Return the tag in a field; `None` where it is empty, or is none of the seven, which is added to `faults`."""
    if is_blank(row.get(name)):
        return None
    try:
        return ModalityTag.parse(row[name])
    except ValueError:
        faults.append(("tag", name, f"must be one of {', '.join(ModalityTag)}, but is {described(row[name])}"))
        return None


def stratum_faults(row: Mapping[str, Any], tag: ModalityTag | None, required: ModalityTag | None) -> list[Fault]:
    """Return what is wrong with a row's stratum beside the tag it is fed and the one it needs."""
    stratum = row.get("stratum")
    if stratum is None:
        return []
    if stratum not in STRATA:
        return [("stratum", "stratum", f"must be exact, superset or deficit, but is {described(stratum)}")]
    if tag is None or required is None:
        return (
            [] if required or row.get("required_tag") else [("stratum", "required_tag", "is empty beside a stratum")]
        )
    is_superset = tag.modalities > required.modalities
    right = "exact" if tag == required else "superset" if is_superset else "deficit"
    message = f"is {stratum}, but a row that needs {required} and is fed {tag} is {right}"
    return [] if stratum == right else [("stratum", "stratum", message)]


def picture_fault(path: Path) -> str | None:
    """Return why a file is no picture that can be fed, by what its header says; `None` where it is one."""
    try:
        size = path.stat().st_size
        if not size:
            return "empty-file: 0 bytes"
        perform(Task("image-header", Source(path.name, str(path), (0, size))))
    except MediaError as error:
        return f"{error.reason}: {error.detail}"
    except OSError as error:
        return str(error)
    return None


def unread_subtitle(text: str, root: Path | None) -> str | None:
    """Return why a subtitle's text would be refused as the name of a file that is not read; `None` where it is text."""
    reason = unread_file(text.strip(), os.devnull if root is None else str(root))
    endings = ", ".join(SUBTITLE_SUFFIXES)
    return (
        reason
        and f"{reason}; files that are read end in {endings}, and text must not look like a name (end it with a full stop)"
    )


def mark_fault(row: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the marks `<video>`, `<audio>`, `<subtitle>` and `<image>` of a row's prompt: each needs its medium."""
    marks = Counter(mark for message in row["prompt"] for mark in MARK.findall(message["content"]))
    has = {"video": row.get("video"), "audio": row.get("audio") or row.get("video"), "subtitle": row.get("subtitle")}
    counts = {kind: int(bool(medium)) for kind, medium in has.items()}
    counts["image"] = max(len(listed(row.get(name))) for name in IMAGE_COLUMNS)
    for kind, number in marks.items():
        if number != counts[kind]:
            return f"holds {number} <{kind}> mark(s), but the row has {counts[kind]} of that; each medium stands at its one mark"
    return None


def listed(value: Any) -> list[Any]:
    """Return a field's items: of a list its own, of one value that value."""
    return value if isinstance(value, list) else [] if value is None else [value]


def prompt_faults(row: Mapping[str, Any]) -> list[Fault]:
    """Return what is wrong with a row's messages and with the marks in them."""
    prompt = row.get("prompt")
    if not prompt:
        return []
    for message in prompt:
        if message is None:
            return [("prompt", "prompt", "has a null in place of a message")]
        if message.get("role") not in _ROLES:
            known = f"must have messages of {', '.join(_ROLES)}"
            return [("prompt", "prompt", f"{known}, but has one of {described(message.get('role'))}")]
        if is_blank(message.get("content")):
            return [("prompt", "prompt", f"has an empty message of the {message['role']}")]
    if not any(message["role"] == "user" for message in prompt):
        return [("prompt", "prompt", "has no message of the user, which is what the model is asked")]
    fault = mark_fault(row)
    return [] if fault is None else [("prompt", "prompt", fault)]


def content_faults(row: Mapping[str, Any], tag: ModalityTag | None) -> list[Fault]:
    """Return what is wrong with a row's question and answer, or with its references if it is a caption."""
    if not is_blank(row.get("question")):
        return _answer_faults(row)
    if is_blank(row.get("reference")) and row.get("completion"):
        return []  # of a table for supervised training
    return _reference_faults(row, tag)


def _answer_faults(row: Mapping[str, Any]) -> list[Fault]:
    answer, solution, options = row.get("answer"), row.get("solution"), row.get("options")
    for name, value in (("answer", answer), ("solution", solution)):
        if is_blank(value):
            return [("answer", name, "must be filled for a question, but is empty")]
    faults: list[Fault] = []
    if answer != solution:
        faults.append(("answer", "solution", f"is {described(solution)}, but must be the answer, {described(answer)}"))
    if not options:
        return faults
    if not 2 <= len(options) <= len(ascii_uppercase):
        faults.append(("answer", "options", f"must be 2 to 26 texts, or none at all, but are {len(options)}"))
    empty = next((i for i, option in enumerate(options[:26]) if is_blank(option)), None)
    if empty is not None:
        faults.append(("answer", "options", f"must be texts, but option {ascii_uppercase[empty]} is empty"))
    letters = ascii_uppercase[: len(options)]
    given = str(answer).split(",")
    if not _LETTERS.fullmatch(str(answer)) or set(given) - set(letters) or len(set(given)) < len(given):
        right = f"must be the letter of an option ({', '.join(letters)})"
        faults.append(("answer", "answer", f"{right}, or several joined by commas, but is {described(answer)}"))
    return faults


def _reference_faults(row: Mapping[str, Any], tag: ModalityTag | None) -> list[Fault]:
    if is_blank(row.get("reference")):
        return [("reference", "reference", "is empty, and so is 'question': a row is a question or a caption")]
    missing = [
        f"reference_{letter.lower()}" for letter in tag or "" if is_blank(row.get(f"reference_{letter.lower()}"))
    ]
    return [
        ("reference", name, f"must be filled for a caption of {tag}: what this signal alone tells") for name in missing
    ]


def provenance_faults(row: Mapping[str, Any], columns: set[str]) -> list[Fault]:
    """Return what is wrong with the entries of who wrote a row; `columns` are those of the table."""
    faults: list[Fault] = []
    for entry in row.get("provenance") or ():
        entry = entry or {}
        name, by = entry.get("field"), (entry.get("model"), entry.get("reviewer"))
        if name not in columns:
            message = f"has an entry of {described(name)}, which is no column"
        elif all(map(is_blank, by)):
            message = f"has an entry of {name!r} without model and reviewer: it must say who wrote or changed it"
        elif entry.get("prompt_hash") is not None and not _DIGEST.fullmatch(entry["prompt_hash"]):
            found = described(entry["prompt_hash"])
            message = f"has for {name!r} the prompt_hash {found}, which must be 8 to 64 hexadecimal digits"
        else:
            continue
        faults.append(("provenance", "provenance", message))
    return faults


def type_faults(row: Mapping[str, Any], columns: Iterable[str]) -> list[Fault]:
    """Return which of these columns hold values of another type than the schema says."""
    return [
        ("type", name, f"must be {_type_name(ROW_FEATURES[name])}, but is {described(row[name])}")
        for name in columns
        if row.get(name) is not None and not _is_of(row[name], ROW_FEATURES[name])
    ]


def _is_of(value: Any, feature: Any) -> bool:
    """Return whether a value that is not `None` is of a column's type."""
    if isinstance(feature, Value):
        return isinstance(value, str)
    if isinstance(feature, List):
        return isinstance(value, list) and all(item is None or _is_of(item, feature.feature) for item in value)
    return isinstance(value, Mapping) and all(
        value.get(name) is None or _is_of(value[name], member) for name, member in feature.items()
    )


def _type_name(feature: Features | Any) -> str:
    if isinstance(feature, List):
        return "a list of " + ("texts" if isinstance(feature.feature, Value) else f"{{{', '.join(feature.feature)}}}")
    return "a text"
