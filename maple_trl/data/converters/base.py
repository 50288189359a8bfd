"""What a converter is: how the records of a published set become rows of one form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maple_trl import Registry
from maple_trl.data.benchmarks.base import FieldError, Medium, Question, Record
from maple_trl.data.benchmarks.options import unwrapped
from maple_trl.data.record_files import read_records
from maple_trl.modalities import ModalityTag


@dataclass(frozen=True)
class Place:
    """
    Where a record stands.

    Attributes:
        file: the table.
        number: of the record in it, from 0.
        root: the folder in which the set's media lie.
    """

    file: Path
    number: int
    root: Path


@dataclass(frozen=True)
class Sample:
    """
    A question or caption of a published set, before it has a tag and a prompt.

    Attributes:
        clip: what it is about; the rows of one clip share a split.
        question: text, without options; `None` of a caption.
        solution: of a question, as of the kind.
        kind: one of [`~maple_trl.data.benchmarks.prompts.ANSWER_KINDS`].
        options: texts without letters.
        name: the set's own name of it, where it has one.
        question_type: the set's own category of it, where it has one.
        video: paths below the media root at which the video may lie, the likeliest first.
        audio: the same of sound.
        subtitle: the same of a subtitle.
        image: the same of a picture.
        images: pictures in the order in which they are shown, in the place of `image`.
        track: the video's sound as a file, used where it is there.
        stand_in: whether the subtitle only stands in for one, and is given where a tag asks for it alone.
        text: the subtitle itself, where the set has it.
        tag: the signals that it is fed, where the set or the converter says so.
        required_tag: the signals that it needs, where the set says so.
        reference: of a caption, what all of its tag's signals tell.
        references: what single signals tell, by `V`, `A` and `S`.
        hint: what helps without telling the answer, where the set has it.
        messages: the prompt as messages, where it is not made from question and options.
        written: what a model is known to have written: names of fields, and the model.
        split: where the record says it.
        source: what the row's column `source` says, in the place of the converter's.
        further: values of the converter's further columns.
    """

    clip: str
    question: str | None = None
    solution: str | None = None
    kind: str = "option"
    options: tuple[str, ...] = ()
    name: str | None = None
    question_type: str | None = None
    video: tuple[str, ...] = ()
    audio: tuple[str, ...] = ()
    subtitle: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    images: tuple[Medium, ...] = ()
    track: tuple[str, ...] = ()
    stand_in: bool = False
    text: str | None = None
    tag: ModalityTag | None = None
    required_tag: ModalityTag | None = None
    reference: str | None = None
    references: Mapping[str, str] = field(default_factory=dict)
    hint: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    written: tuple[tuple[str, str], ...] = ()
    split: str | None = None
    source: str | None = None
    further: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> tuple[Medium, ...]:
        """All its pictures."""
        return self.images or ((Medium(self.image, still=True),) if self.image else ())


@dataclass(frozen=True)
class Converter:
    """
    A published set and how its records are read.

    Attributes:
        name: as it is asked for.
        title: as its authors write it.
        source: what the rows' column `source` says, unless a record says it.
        read: a record to samples; raises [`~maple_trl.data.benchmarks.base.FieldError`], or
            [`~maple_trl.data.benchmarks.base.LeaveOut`] for a well-formed record that has no place in a table of rows.
        tables: globs of its tables below a folder, each with the split that it is; `None` where the user says it.
        media: archives to unpack, or what to put where.
        hub: where it is published.
        required: fields that every record must have.
        tag: the signals that a row is given of those that it has; `None`: all of them.
        further: columns beside those of [`~maple_trl.data.schema.ROW_FEATURES`], all of them texts.
        records: reads a table.
    """

    name: str
    title: str
    source: str
    read: Callable[[Record, Place], Iterable[Sample]]
    tables: tuple[tuple[str, str | None], ...]
    media: str
    hub: str
    required: tuple[str, ...] = ()
    tag: ModalityTag | None = None
    further: tuple[str, ...] = ()
    records: Callable[[Path], Iterator[dict[str, Any]]] = read_records


CONVERTERS: Registry[Converter] = Registry(
    "converter", "maple_trl.converters", fits=lambda found: isinstance(found, Converter)
)
"""Converters by name; packages add theirs as entry points of the group `maple_trl.converters`."""


def register_converter(converter: Converter) -> Converter:
    """Make a converter known under its name; ValueError for a name that another one has."""
    return CONVERTERS.register(converter.name)(converter)


def of_question(question: Question, clip: str, **known: Any) -> Sample:
    """
    Make a sample of a benchmark's question.

    Args:
        question: with at most one clip and one sound.
        clip: what it is about.
        known: further attributes of the sample.
    """
    moving = [medium for medium in question.videos if not medium.still]
    media = {
        "video": moving[0].paths if moving else (),
        "images": tuple(medium for medium in question.videos if medium.still),
        "audio": question.audios[0].paths if question.audios else (),
        "track": question.track.paths if question.track else (),
        "subtitle": question.subtitle.paths if question.subtitle else (),
    }
    return Sample(
        **{
            "clip": clip,
            "question": question.question,
            "solution": question.solution,
            "kind": question.kind,
            "options": question.options,
            "name": question.name,
            "question_type": question.category,
            "stand_in": question.stand_in,
            **media,
            **known,
        }
    )


def optional_text(record: Record, name: str) -> str | None:
    """
    Read a text that may be missing or blank.

    Raises:
        FieldError: when it is something else.
    """
    value = record.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return record.text(name)


def answer_text(record: Record, name: str) -> str:
    """Read an open answer, which may stand in `<answer>` tags and may be a number."""
    value = record.get(name)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.15g}"  # a whole number is one, where a table holds fractions too
    return str(unwrapped(record.name(name) if isinstance(value, int | float) else record.text(name)))


def first_of(record: Record, *names: str) -> str:
    """
    Return the first of several names that the record has a value of.

    Raises:
        FieldError: when it has none.
    """
    found = next((name for name in names if record.get(name) not in (None, "")), None)
    if found is None:
        others = f" (or {', '.join(map(repr, names[1:]))})" if len(names) > 1 else ""
        raise FieldError(names[0], f"must be filled{others}; the record has {', '.join(record.fields) or 'no field'}")
    return found
