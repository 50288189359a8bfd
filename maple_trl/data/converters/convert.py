"""Conversion of a published set into a folder of Parquet shards, a record at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from datasets import Features, Value

from maple_trl.data.benchmarks.base import BenchmarkError, FieldError, LeaveOut, Medium, Record
from maple_trl.data.benchmarks.media import UnusableMedium, existing, locate
from maple_trl.data.benchmarks.options import described
from maple_trl.data.benchmarks.prompts import PromptStyle, prompt_style
from maple_trl.data.converters.base import CONVERTERS, Converter, Place, Sample
from maple_trl.data.record_files import CUT_TEXT, TableError, cut_field
from maple_trl.data.row_rules import mark_fault, unread_subtitle
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.data.shards import SHARD_ROWS, ShardWriter
from maple_trl.data.validation import text_digest
from maple_trl.modalities import Modality, ModalityTag
from maple_trl.omni.media.subtitles import is_subtitle_file


Pictures = Literal["keep", "clips", "leave_out"]
MissingMedia = Literal["keep", "leave_out"]

_SHOWN = 10


class ConversionError(ValueError):
    """A set that cannot be converted; the message names the file, and record and field where it is one."""


@dataclass
class ConvertOptions:
    """
    How a set is converted.

    Args:
        media_root: what the paths of rows are relative to; default is the folder of the table. In a folder above that one, such
            as the common one of several sets, the media are looked for beside the table as before.
        tags: give every question once in each of these tags, and its id the tag behind it. Default: what its authors feed, or
            what it has media for. **Such a tag says what a row is fed, not what its question needs.**
        prompt_style: a name in [`~maple_trl.data.benchmarks.prompts.PROMPT_STYLES`], or a style.
        split: what all rows are of, in the place of what the set says.
        shard_rows: most rows of one file.
        skip_malformed: count and name records that are not as published, and go on; else the first of them ends it.
        pictures: `keep` rows with pictures, which are fed as they are; make a clip of two seconds of a row's one picture
            (`clips`), below `media_root/extracted`, for models that read clips alone; or `leave_out` such rows.
        missing_media: `keep` rows that name a file that is not there (validation then names them), or `leave_out` them.

    Raises:
        ConversionError: for `tags` that are one text, and an unknown way with pictures or missing media.
        ValueError: for an unknown tag or prompt style.
    """

    media_root: str | os.PathLike[str] | None = None
    tags: tuple[ModalityTag | str, ...] = ()
    prompt_style: str | PromptStyle = "think"
    split: str | None = None
    shard_rows: int = SHARD_ROWS
    skip_malformed: bool = False
    pictures: Pictures = "keep"
    missing_media: MissingMedia = "keep"

    def __post_init__(self) -> None:
        if isinstance(self.tags, str):
            raise ConversionError(f"tags must be a list such as ['VA'], got {self.tags!r}")
        self.tags = tuple(dict.fromkeys(map(ModalityTag.parse, self.tags)))
        self.prompt_style = prompt_style(self.prompt_style)
        for name, known in (("pictures", Pictures), ("missing_media", MissingMedia)):
            if getattr(self, name) not in get_args(known):
                given = getattr(self, name)
                raise ConversionError(f"{name} must be one of {', '.join(get_args(known))}, got {given!r}")


@dataclass
class ConversionSummary:
    """
    What became of a set.

    Attributes:
        files: the tables that were read.
        passed_over: tables of the set's forms beside them, which were not.
        media_root: the folder to which the media paths of the rows are relative.
        records: how many were read.
        rows: by split.
        tags: rows by tag.
        left_out: well-formed records, and tags of them, that did not become rows, by reason.
        malformed: records that are not as published.
        named: the first of them.
        pictures: rows with pictures.
        missing: rows that name a file that is not there.
    """

    files: list[str]
    media_root: str
    records: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    malformed: int = 0
    named: list[str] = field(default_factory=list)
    pictures: int = 0
    missing: int = 0
    passed_over: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


def convert(
    name: str | Converter,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: ConvertOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> ConversionSummary:
    """
    Convert a published set into a folder of shards, see [`~maple_trl.data.shards.ShardWriter`].

    Args:
        name: one of `CONVERTERS`, or a converter itself.
        source: the folder of a local copy, or one table.
        output: a folder that holds nothing yet; it appears whole or not at all.
        options: how.
        progress: called with the number of records that were read.

    Returns:
        [`ConversionSummary`].

    Raises:
        ConversionError: for an unknown converter, a table that is not there, a malformed record, and when no row is left.
        ShardError: when the output holds something.

    Example:
    ```python
    >>> from maple_trl.data.converters import ConvertOptions, convert

    >>> convert("avqa", "data/avqa", "data/avqa_rows", ConvertOptions(tags=("VA",)))  # doctest: +SKIP
    ```
    """
    try:
        converter = name if isinstance(name, Converter) else CONVERTERS.find(name)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    options, source = options or ConvertOptions(), Path(source)
    files = find_files(converter, source)
    folder = source if source.is_dir() else source.parent
    root = Path(options.media_root or folder)
    if not root.is_dir():
        raise ConversionError(f"media_root: there is no folder {root}")
    # Whole: jobs read '.' as the folder of the rows.
    summary = ConversionSummary([str(file) for file, _ in files], str(root.resolve()))
    summary.passed_over = list(map(str, _others(converter, source, {file for file, _ in files})))
    rows = _Rows(converter, options, root, _below(root, folder), summary)
    features = Features({**ROW_FEATURES, **{name: Value("string") for name in converter.further}})
    with ShardWriter(output, features, options.shard_rows) as writer:
        for file, split in files:
            for record in _records(converter, file, summary, progress):
                for row in rows.of_record(record, split):
                    writer.write(row, row["split"])
        summary.rows = writer.rows
        if not summary.rows:
            reasons = [f"{reason} ({count})" for reason, count in summary.left_out.most_common(3)] + summary.named[:1]
            raise ConversionError(
                f"{source}: no row is left of {summary.records} records of {converter.title}: "
                f"{'; '.join(reasons) or 'it has none'}. {converter.title}: {converter.media}"
            )
    return summary


def _below(root: Path, folder: Path) -> str:
    """Return the path of a folder below the media root; empty where it is the root itself, or not below it."""
    root, folder = root.resolve(), folder.resolve()
    return folder.relative_to(root).as_posix() if root in folder.parents else ""


def find_files(converter: Converter, source: Path) -> list[tuple[Path, str | None]]:
    """
    Find the tables of a set: the one given, or those of a folder, with the split that each one is.

    Of a split the files of the first glob count that has any: a set is published in one form, or in several with the same rows.

    Raises:
        ConversionError: when there is none, saying what was looked for.
    """
    if source.is_file():
        return [(source, next((split for glob, split in converter.tables if source.match(glob)), None))]
    if not source.is_dir():
        raise ConversionError(f"there is no file or folder {source}")
    found: dict[str | None, list[Path]] = {}
    for glob, split in converter.tables:
        if split is not None or not found:
            taken = {path for paths in found.values() for path in paths}
            paths = [path for path in sorted(source.glob(glob)) if path not in taken]
            if paths:
                found.setdefault(split, paths)
    if not found:
        looked = ", ".join(glob for glob, _ in converter.tables)
        raise ConversionError(f"{source} holds no table of {converter.title}: looked for {looked}")
    return [(path, split) for split, paths in found.items() for path in paths]


def _others(converter: Converter, source: Path, read: set[Path]) -> list[Path]:
    """Return the tables of a folder that look like those of a set and are not read."""
    if not source.is_dir():
        return []
    return sorted({path for glob, _ in converter.tables for path in source.glob(glob)} - read)


def _records(
    converter: Converter, file: Path, summary: ConversionSummary, progress: Callable[[int], None] | None
) -> Iterator[tuple[dict[str, Any], Path, int]]:
    try:
        for number, fields in enumerate(converter.records(file)):
            yield fields, file, number
            summary.records += 1
            if progress is not None:
                progress(summary.records)
    except TableError as error:
        raise ConversionError(str(error)) from error


class _Unfed(Exception):
    """A sample that does not become a row of a tag; its text is the reason."""


class _Rows:
    """Makes rows of records, and keeps account of what does not become one."""

    def __init__(
        self, converter: Converter, options: ConvertOptions, root: Path, beside: str, summary: ConversionSummary
    ):
        self.converter = converter
        self.options = options
        self.root = root
        self.beside = beside
        self.summary = summary
        self.names: dict[int, int] = {}  # those given, and the last number behind each

    def of_record(self, record: tuple[dict[str, Any], Path, int], split: str | None) -> list[dict[str, Any]]:
        """Return the rows of a record: none where it is left out."""
        fields, file, number = record
        rows = []
        try:
            for sample in self._samples(fields, file, number):
                rows += self._of_sample(sample, split)
        except LeaveOut as reason:
            self.summary.left_out[str(reason)] += 1
        except BenchmarkError as error:
            told = f"{file}, record {number}: {error}"
            if not self.options.skip_malformed:
                raise ConversionError(told) from error
            self.summary.malformed += 1
            self.summary.named += [told] if len(self.summary.named) < _SHOWN else []
            return []
        for row in rows:
            self.summary.tags[row["tag"]] += 1
            self.summary.pictures += bool(row["image"] or row["images"])
        return rows

    def _samples(self, fields: Mapping[str, Any], file: Path, number: int) -> Iterable[Sample]:
        missing = next((name for name in self.converter.required if name not in fields), None)
        if missing is not None:
            needed = f"a record of {self.converter.title} has {', '.join(self.converter.required)}"
            raise FieldError(missing, f"is missing; {needed}, and this one has {', '.join(fields) or 'no field'}")
        return self.converter.read(Record(fields, file.stem), Place(file, number, self.root / self.beside))

    def _of_sample(self, sample: Sample, split: str | None) -> list[dict[str, Any]]:
        has = _signals(sample)
        if sample.tag is not None:
            tags = (sample.tag,) if not self.options.tags or sample.tag in self.options.tags else ()
            if not tags:
                self.summary.left_out[f"tag {sample.tag}, which was not asked for"] += 1
        elif not has:
            raise LeaveOut("no medium at all")
        else:
            usual = has if self.converter.tag is None else self.converter.tag.modalities & has
            tags = self.options.tags or (ModalityTag.from_modalities(usual or has),)
        name = self._name(sample)
        rows = []
        for tag in tags:
            try:
                own = f"{name}-{tag}" if self.options.tags and sample.tag is None else name
                rows.append(self._row(sample, own, tag, has, split))
            except _Unfed as reason:
                self.summary.left_out[str(reason)] += 1
        return rows

    def _name(self, sample: Sample) -> str:
        number = self.summary.records
        name = f"{self.converter.name}-{sample.name if sample.name is not None else f'{number:07}'}"
        own, digest = name, text_digest(name)
        while text_digest(own) in self.names:  # a record may be called what another one becomes: a, a, a-2
            self.names[digest] += 1
            own = f"{name}-{self.names[digest]}"
        self.names[text_digest(own)] = 1
        return own

    def _row(
        self, sample: Sample, name: str, tag: ModalityTag, has: frozenset[Modality], split: str | None
    ) -> dict[str, Any]:
        lacking = sorted(modality.name.lower() for modality in tag.modalities - has)
        if lacking:
            raise _Unfed(f"tag {tag} needs {' and '.join(lacking)}, which the record does not have")
        media = self._media(sample, tag)
        references = {f"reference_{signal.lower()}": text for signal, text in sample.references.items()}
        row = {
            "id": name,
            "clip": sample.clip,
            "tag": tag.value,
            "source": sample.source or self.converter.source,
            "split": self.options.split or sample.split or split or "train",
            "question": sample.question,
            "options": list(sample.options) or None,
            "answer": sample.solution,
            "solution": sample.solution,
            "question_type": sample.question_type,
            "required_tag": None if sample.required_tag is None else sample.required_tag.value,
            "reference": sample.reference,
            "hint": sample.hint,
            "provenance": [{"field": written, "model": model} for written, model in sample.written],
            **references,
            **media,
            **sample.further,
            "prompt": self._prompt(sample),  # last, so that a fault is told of what it is made from
        }
        if (cut := cut_field(row)) is not None:
            raise FieldError(cut, CUT_TEXT)
        if sample.pictures and self.options.pictures == "clips":
            row["prompt"] = [
                {**turn, "content": turn["content"].replace("<image>", "<video>")} for turn in row["prompt"]
            ]
        if mark_fault(row) is not None:
            raise _Unfed("marks of media in its text, of which it has another number")
        return row

    def _prompt(self, sample: Sample) -> list[Mapping[str, str]]:
        if sample.messages:
            return [dict(message) for message in sample.messages]
        style: PromptStyle = self.options.prompt_style  # type: ignore[assignment]
        return [{"role": "user", "content": style.render(sample.question or "", sample.options, sample.kind)}]

    def _media(self, sample: Sample, tag: ModalityTag) -> dict[str, Any]:
        """Return the media columns of a row, and count what is not there."""
        found: dict[str, Any] = dict.fromkeys(("video", "audio", "subtitle", "image", "images"))
        missing = False
        for kind, paths in (("video", sample.video), ("audio", sample.audio)):
            if paths:
                there = self._existing(paths)
                found[kind], missing = there or self._paths(paths)[0], missing or there is None
        pictures = [self._place(picture) for picture in sample.pictures]
        missing |= any(there is None for there in pictures)
        if sample.track and not sample.audio:
            found["audio"] = self._existing(sample.track)
        found["subtitle"], lost = self._subtitle(sample, tag)
        if (missing or lost) and self.options.missing_media == "leave_out":
            raise _Unfed("a file that is not there")
        if sample.pictures:
            found |= self._picture_columns(sample, pictures)
        self.summary.missing += missing or lost
        return found

    def _paths(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Return where a medium may lie below the root, the likeliest first."""
        return (*(f"{self.beside}/{path}" for path in paths), *paths) if self.beside else paths

    def _existing(self, paths: tuple[str, ...]) -> str | None:
        return existing(self.root, Medium(self._paths(paths)))

    def _place(self, picture: Medium) -> str | None:
        """Return where a picture lies, written there if the table holds it; `None` where it is not there."""
        if picture.content is None:
            return self._existing(picture.paths)
        return locate(self.root, picture, write=True) if self.options.pictures == "keep" else ""

    def _picture_columns(self, sample: Sample, there: Sequence[str | None]) -> dict[str, Any]:
        if self.options.pictures == "leave_out":
            raise _Unfed("a picture, and pictures were to be left out")
        if self.options.pictures == "keep":
            paths = [
                path or self._paths(picture.paths)[0] for path, picture in zip(there, sample.pictures, strict=True)
            ]
            return {"image": paths[0]} if len(paths) == 1 else {"images": paths}
        if len(sample.pictures) > 1 or sample.video:
            raise _Unfed("more to be seen than one picture, of which one clip cannot be made")
        [picture] = sample.pictures
        try:
            medium = picture if picture.content is not None else Medium((there[0] or picture.paths[0],), still=True)
            return {"video": locate(self.root, medium, write=True, as_clips=True)}
        except UnusableMedium as error:
            raise _Unfed("a picture that is not there or cannot be read") from error

    def _subtitle(self, sample: Sample, tag: ModalityTag) -> tuple[str | None, bool]:
        """Return a subtitle's file or text, and whether its file is missing."""
        if sample.text is not None:
            if is_subtitle_file(sample.text) or (reason := unread_subtitle(sample.text, self.root)) is not None:
                looks = "is the name of a file" if is_subtitle_file(sample.text) else reason
                raise FieldError(
                    "subtitle", f"must be the text itself, but is {described(sample.text)}, which {looks}"
                )
            return sample.text, False
        if not sample.subtitle:
            return None, False
        wanted = Modality.SUBTITLE in tag.modalities
        if sample.stand_in and not wanted:
            return None, False
        path = self._existing(sample.subtitle)
        if path is None and sample.stand_in:
            raise _Unfed(
                f"tag {tag} needs subtitle, and there is no file {Path(sample.subtitle[0]).name} beside the clip"
            )
        if path is None:
            return self._paths(sample.subtitle)[0], True
        if not path.lower().endswith(".txt"):
            return path, False
        try:
            text = (self.root / path).read_text(encoding="utf-8-sig").strip()
            return (text if unread_subtitle(text, self.root) is None else f"{text}."), False
        except UnicodeDecodeError as error:
            raise FieldError("subtitle", f"names {self.root / path}, which is not UTF-8 text: {error}") from error


def _signals(sample: Sample) -> frozenset[Modality]:
    """Return the signals that a sample has, whether or not their files are there."""
    has = {
        Modality.VIDEO: bool(sample.video or sample.pictures),
        Modality.AUDIO: bool(sample.audio or sample.video),
        Modality.SUBTITLE: bool(sample.subtitle or sample.text),
    }
    return frozenset(modality for modality, there in has.items() if there)
