"""What a benchmark is here, and what its reader makes of one record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from maple_trl.data.benchmarks.options import FormError, described
from maple_trl.modalities import ModalityTag
from maple_trl.omni.media.formats import VIDEO_SUFFIXES


class BenchmarkError(ValueError):
    """A benchmark that cannot be read as published; the message names the file, and record and field where it is one."""


class FieldError(BenchmarkError):
    """A field that is not as published."""

    def __init__(self, name: str, fault: str):
        super().__init__(f"field '{name}' {fault}")


class LeaveOut(Exception):
    """A record that is well-formed, and that no model family here can be asked; its text is the reason."""


@dataclass(frozen=True)
class Medium:
    """
    One picture, clip, sound or subtitle of a question.

    Attributes:
        paths: where it may lie below the media root, the likeliest first.
        content: the file itself, where the table holds it.
        still: whether it is a picture.
    """

    paths: tuple[str, ...]
    content: bytes | None = None
    still: bool = False


@dataclass(frozen=True)
class Question:
    """
    A record in the common form.

    Attributes:
        question: text, without options.
        solution: as of the kind.
        kind: one of [`~maple_trl.data.benchmarks.prompts.ANSWER_KINDS`].
        metric: one of [`~maple_trl.metrics.answers.ANSWER_METRICS`]: what the benchmark's authors report.
        options: texts without letters.
        category: what reports group by.
        name: the benchmark's own name of the question, where it has one.
        videos: clips and pictures, each kind in the order in which the question counts it.
        audios: sounds of their own, in that order; `None`: the sound is the videos' own track.
        track: a copy of that track as a file, used where it is there.
        subtitle: a file.
        stand_in: whether the subtitle is none and only stands in for one. Then a row has it only where its tag asks.
    """

    question: str
    solution: str
    kind: str = "option"
    metric: str = "accuracy"
    options: tuple[str, ...] = ()
    category: str | None = None
    name: str | None = None
    videos: tuple[Medium, ...] = ()
    audios: tuple[Medium, ...] | None = None
    track: Medium | None = None
    subtitle: Medium | None = None
    stand_in: bool = False


class Record:
    """
    The fields of one record, checked as they are read.

    Args:
        fields: as published.
        table: the stem of the record's file, which some benchmarks use as category.
    """

    def __init__(self, fields: Mapping[str, Any], table: str = ""):
        self.fields = fields
        self.table = table

    def get(self, name: str) -> Any:
        """Return a field's value, `None` where it is missing."""
        return self.fields.get(name)

    def text(self, name: str) -> str:
        """
        Read a text that is not blank.

        Raises:
            FieldError: for anything else.
        """
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise FieldError(name, f"must be a text, but is {self._described(name)}")
        return value.strip()

    def name(self, name: str) -> str:
        """Read a text or whole number that names something, as text; a column with an empty cell holds its numbers as floats."""
        value = self.fields.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise FieldError(name, f"must be a text or a whole number, but is {self._described(name)}")
        return str(value).strip()

    def path(self, name: str) -> str:
        """Read a path, see [`relative_path`]."""
        return self.read(name, relative_path)

    def paths(self, name: str) -> tuple[str, ...]:
        """Read a list of paths; a single path counts as a list of one, `None` as empty."""
        value = self.fields.get(name)
        if value is None or value == "":
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise FieldError(name, f"must be a list of paths, but is {self._described(name)}")
        return tuple(self._read(name, relative_path, item) for item in values)

    def pictures(self, name: str) -> tuple[Medium, ...]:
        """
        Read a picture, or a list of them: paths, or the files themselves as `{"bytes", "path"}` or bytes.

        Raises:
            FieldError: for anything else.
        """
        value = self.fields.get(name)
        if value is None or value == "":
            return ()
        return tuple(self._picture(name, item) for item in (value if isinstance(value, list | tuple) else [value]))

    def _picture(self, name: str, value: Any) -> Medium:
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, value)
        if not isinstance(data, bytes):
            return Medium((self._read(name, relative_path, path),), still=True)
        suffix = PurePosixPath(path).suffix.lower() if isinstance(path, str) else ""
        # Tables often give all their files one name.
        digest = hashlib.blake2b(data, digest_size=10).hexdigest()
        return Medium((f"{digest}{suffix or '.png'}",), content=data, still=True)

    def read(self, name: str, reader: Callable[..., Any], *args: Any) -> Any:
        """
        Read a field with a function of [`~maple_trl.data.benchmarks.options`].

        Raises:
            FieldError: when it refuses the value.
        """
        return self._read(name, reader, self.fields.get(name), *args)

    def _read(self, name: str, reader: Callable[..., Any], value: Any, *args: Any) -> Any:
        try:
            return reader(value, *args)
        except FormError as error:
            raise FieldError(name, str(error)) from error

    def _described(self, name: str) -> str:
        return described(self.fields[name]) if name in self.fields else "missing"


_LONGEST_NAME, _LONGEST_PATH = 200, 1000
"""Bytes, such that there is room for a suffix and a folder."""


def relative_path(value: Any) -> str:
    """
    Check a path below the media root, and write it with `/`.

    Raises:
        FormError: when it is no text, absolute, leads out, or is longer than file systems take.
    """
    parts = PurePosixPath(value.strip().replace("\\", "/")).parts if isinstance(value, str) else ()
    if not parts or parts[0] == "/" or ".." in parts:
        raise FormError(f"must be a path below the media root, but is {described(value)}")
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in parts]
    if max(sizes) > _LONGEST_NAME or sum(sizes) > _LONGEST_PATH:
        raise FormError(
            f"must be a path of at most {_LONGEST_PATH} bytes, {_LONGEST_NAME} a name, but is {described(value)}"
        )
    return "/".join(parts)


def file_name(value: Any) -> str:
    """
    Check a name that becomes part of a path.

    Raises:
        FormError: when it holds a slash, or is no text.
    """
    path = relative_path(value)
    if "/" in path:
        raise FormError(f"must be a file name, but is {described(value)}")
    return path


def below(path: str, *folders: str) -> tuple[str, ...]:
    """Return a path as it is, and below each of the folders that archives unpack to."""
    return (path, *(f"{folder}/{path}" for folder in folders))


CLIP_SUFFIXES = (*VIDEO_SUFFIXES, ".MP4")


def clips(name: str, *folders: str) -> tuple[str, ...]:
    """Return the paths of a clip, whose `name` has no suffix, in each of the folders, `.mp4` first."""
    return tuple(f"{folder}/{name}{suffix}" for folder in folders for suffix in CLIP_SUFFIXES)


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark and how its records are read.

    Attributes:
        name: as it is asked for.
        title: as its authors write it.
        read: a record to a [`Question`]; raises [`FieldError`] or [`LeaveOut`].
        required: fields that every record must have.
        kept: further published fields; what else a record has is kept as well.
        tables: globs of its tables below a folder, `{split}` for the split.
        splits: those that are published; the first is the default.
        hub: id of the copy that `download` fetches.
        tag: the signals that a question is given.
        media: archives to unpack, or what to put where.
    """

    name: str
    title: str
    read: Callable[[Record], Question]
    required: tuple[str, ...]
    tables: tuple[str, ...]
    splits: tuple[str, ...]
    hub: str
    tag: ModalityTag
    media: str
    kept: tuple[str, ...] = ()
