"""
AVE (ECCV 2018, https://sites.google.com/view/audiovisualresearch): events that are seen and heard, with their time.

Relied on: `data/Annotations.txt` of the authors' repository, one `Category&VideoID&Quality&StartTime&EndTime` a line, in seconds of a clip of
ten; the lists `trainSet.txt`, `valSet.txt` and `testSet.txt` of the download have the same form.

Guesses: clips lie in `AVE/{VideoID}.mp4`. AVE has labels and no questions: the questions are this converter's. `ave` asks which of four events
it is (three others are drawn from AVE's 28, the same for the same clip), `ave-intervals` asks when it happens, for `temporal_iou_reward`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from maple_trl.data.benchmarks.base import FieldError, LeaveOut, Record, clips, file_name
from maple_trl.data.converters.base import Converter, Place, Sample
from maple_trl.data.record_files import TableError
from maple_trl.modalities import ModalityTag


FIELDS = ("Category", "VideoID", "Quality", "StartTime", "EndTime")
CATEGORIES = (
    "Church bell",
    "Male speech, man speaking",
    "Bark",
    "Fixed-wing aircraft, airplane",
    "Race car, auto racing",
    "Female speech, woman speaking",
    "Helicopter",
    "Violin, fiddle",
    "Flute",
    "Ukulele",
    "Frying (food)",
    "Truck",
    "Shofar",
    "Motorcycle",
    "Acoustic guitar",
    "Train horn",
    "Clock",
    "Banjo",
    "Goat",
    "Baby cry, infant cry",
    "Bus",
    "Chainsaw",
    "Cat",
    "Horse",
    "Toilet flush",
    "Rodents, rats, mice",
    "Accordion",
    "Mandolin",
)
_SHOWN = 4  # options


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """
    Read the records of a list, with or without a header.

    Raises:
        TableError: when it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                cells = line.rstrip("\r\n").split("&")
                if line.strip() and cells != list(FIELDS):
                    yield dict(zip(FIELDS, cells, strict=False))
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"cannot read {path}: {error}") from error


def _common(record: Record) -> dict[str, Any]:
    clip = record.read("VideoID", file_name)
    return {"clip": clip, "name": clip, "video": clips(clip, "AVE", "videos", "AVE_Dataset/AVE")}


def _event(record: Record, place: Place) -> Iterator[Sample]:
    category, known = record.text("Category"), _common(record)
    options, letter = drawn_options(category, CATEGORIES, known["clip"])
    question = "Which event is both seen and heard in this clip?"
    yield Sample(question=question, options=options, solution=letter, question_type="event", **known)


def _interval(record: Record, place: Place) -> Iterator[Sample]:
    start, end = _second(record, "StartTime"), _second(record, "EndTime")
    if start >= end:
        raise LeaveOut("its event lasts no second")
    question = (
        f"When is this event both seen and heard in the clip: {record.text('Category')}? "
        "Answer with start and end in seconds, as 2-5."
    )
    known = _common(record)
    yield Sample(question=question, solution=f"{start}-{end}", kind="text", question_type="interval", **known)


def _second(record: Record, name: str) -> int:
    text = record.text(name).strip()
    if not text.isdigit():
        raise FieldError(name, f"must be a whole second, but is {text!r}")
    return int(text)


def drawn_options(right: str, others: tuple[str, ...], name: str) -> tuple[tuple[str, ...], str]:
    """Return four options and the letter of the right one; `name` decides which others there are, and the order."""
    draw = random.Random(int.from_bytes(sha256(name.encode()).digest()[:8], "big"))
    options = [right, *draw.sample([other for other in others if other != right], _SHOWN - 1)]
    draw.shuffle(options)
    return tuple(options), ascii_uppercase[options.index(right)]


_TABLES = (
    ("trainSet.txt", "train"),
    ("valSet.txt", "validation"),
    ("testSet.txt", "test"),
    ("Annotations.txt", None),
    ("data/Annotations.txt", None),
)


def _ave(name: str, title: str, read: Any) -> Converter:
    return Converter(
        name=name,
        title=title,
        source="AVE",
        read=read,
        tables=_TABLES,
        media="unpack AVE_Dataset.zip, so that AVE/{VideoID}.mp4 is there",
        hub="https://sites.google.com/view/audiovisualresearch",
        required=FIELDS,
        tag=ModalityTag.VA,
        records=read_lines,
    )


AVE = _ave("ave", "AVE, which event", _event)
AVE_INTERVALS = _ave("ave-intervals", "AVE, when", _interval)
