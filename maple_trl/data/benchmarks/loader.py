"""Rows of a benchmark, as training and evaluation read them."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from datasets import Dataset, Features, List, Value

from maple_trl import Registry
from maple_trl.data.benchmarks.base import Benchmark, BenchmarkError, FieldError, LeaveOut, Medium, Question, Record
from maple_trl.data.benchmarks.media import UnusableMedium, existing, locate
from maple_trl.data.benchmarks.omni import OMNI_BENCHMARKS
from maple_trl.data.benchmarks.options import described, shuffled
from maple_trl.data.benchmarks.prompts import PromptStyle, prompt_style
from maple_trl.data.benchmarks.tables import find_tables, media_root, records
from maple_trl.data.benchmarks.video import VIDEO_BENCHMARKS
from maple_trl.data.record_files import CUT_TEXT, TableError, cut_field
from maple_trl.data.schema import QUESTION_COLUMNS
from maple_trl.files import as_json
from maple_trl.modalities import Modality, ModalityTag


logger = logging.getLogger(__name__)

BENCHMARKS: Registry[Benchmark] = Registry(
    "benchmark",
    "maple_trl.benchmarks",
    {benchmark.name: benchmark for benchmark in (*OMNI_BENCHMARKS, *VIDEO_BENCHMARKS)},
    fits=lambda found: isinstance(found, Benchmark),
)
"""Benchmarks by name."""

FEATURES = Features(
    {
        **QUESTION_COLUMNS,
        # Lists: a question of AV-Odyssey may have several.
        "video": List(Value("string")),
        "audio": List(Value("string")),
        "image": List(Value("string")),
        "subtitle": Value("string"),
        "benchmark": Value("string"),
        "category": Value("string"),
        "answer_kind": Value("string"),
        "answer_metric": Value("string"),
        "record": Value("string"),
    }
)
"""Columns of every benchmark's rows. `record` holds the published record as JSON, without files that it embeds."""

Pictures = Literal["keep", "clips"]
"""Whether a question's pictures are fed as they are, or as clips of two seconds."""

_SHOWN = 5  # faults in one message


def register_benchmark(benchmark: Benchmark) -> Benchmark:
    """Make a benchmark known under its name; ValueError for a name that another one has."""
    return BENCHMARKS.register(benchmark.name)(benchmark)


@dataclass(frozen=True)
class LeftOut:
    """
    A question, or one of its tags, that did not become a row.

    Attributes:
        name: the id that the row would have.
        place: file and record.
        reason: why, in words.
        cause: `"missing"` (a file is not there), `"unreadable"` (a form of medium that the models here cannot read),
            `"no-signal"` (the question has no such signal for its tag), or `"form"` (of the question).
    """

    name: str
    place: str
    reason: str
    cause: str


@dataclass
class BenchmarkRows:
    """
    Rows of a benchmark, and what did not become one.

    Attributes:
        benchmark: which it is.
        dataset: the rows, with the columns of `FEATURES`.
        left_out: what did not become a row, in order.
        faults: records that are not as published; empty unless asked for by [`check`].
        records: how many were read.
        files: the tables.
        media_root: the folder to which the media paths of the rows are relative.
        style: how prompts were written.
        pictures: how pictures are fed.
    """

    benchmark: Benchmark
    dataset: Dataset
    left_out: list[LeftOut]
    faults: list[str]
    records: int
    files: list[Path]
    media_root: Path
    style: PromptStyle
    pictures: Pictures = "keep"

    def summary(self) -> str:
        """Return one line for people."""
        counts = Counter(item.cause for item in self.left_out)
        left = ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items()))
        return f"{self.benchmark.title}: {len(self.dataset)} rows of {self.records} questions" + (
            f"; left out: {left}" if left else ""
        )


@dataclass
class _Options:
    tags: tuple[ModalityTag, ...]
    style: PromptStyle
    missing_media: str
    write_media: bool
    shuffle_seed: int | None
    pictures: Pictures
    collect: bool = False
    seen: dict[str, int] = field(default_factory=dict)


def load_benchmark(
    name: str | Benchmark, path: str | os.PathLike | None = None, split: str | None = None, **options: Any
) -> Dataset:
    """
    Load the rows of a benchmark, in the order of its tables; how many questions were left out is logged as a warning.

    Args:
        name, path, split, options: as of [`read_benchmark`], which also tells what was left out, and why.

    Returns:
        `Dataset` with the columns of `FEATURES`; the media paths are relative to `path` (of a table, to its folder).

    Raises:
        BenchmarkError: as [`read_benchmark`], and when no row is left.
        FileNotFoundError: when there is no table.

    Example:
    ```python
    >>> from maple_trl.data.benchmarks import load_benchmark

    >>> rows = load_benchmark("worldsense", "data/worldsense", tags=["VAS"])  # doctest: +SKIP
    ```
    """
    found = read_benchmark(name, path, split, **options)
    if found.left_out:
        shown = Counter(item.reason for item in found.left_out).most_common(_SHOWN)
        reasons = "; ".join(f"{reason} ({count})" for reason, count in shown)
        logger.warning("%s. Reasons, the most frequent first: %s", found.summary(), reasons)
    if not len(found.dataset):
        raise BenchmarkError(
            f"{found.media_root}: no question of {found.benchmark.title} is left of {found.records}; the first: "
            f"{found.left_out[0].place}: {found.left_out[0].reason}. {found.benchmark.title}: {found.benchmark.media}"
        )
    return found.dataset


def read_benchmark(
    name: str | Benchmark,
    path: str | os.PathLike | None = None,
    split: str | None = None,
    *,
    prompt_style: str | PromptStyle = "think",
    tags: Iterable[ModalityTag | str] | None = None,
    missing_media: Literal["leave_out", "keep", "error"] = "leave_out",
    write_media: bool = False,
    shuffle_seed: int | None = None,
    pictures: Pictures = "keep",
    download: bool = False,
    revision: str | None = None,
) -> BenchmarkRows:
    """
    Read a benchmark from a local copy.

    Args:
        name: one of `BENCHMARKS`, or a benchmark itself.
        path: the folder as published, with its archives unpacked, or one table in it. Also the root of its media.
        split: default is the benchmark's first.
        prompt_style: a name in [`~maple_trl.data.benchmarks.prompts.PROMPT_STYLES`], or a style.
        tags: give every question once in each of these tags, and its id the tag behind it. Default: the benchmark's own.
        missing_media: leave out questions whose files are not there, keep their rows (an evaluation then names them as
            errors), or refuse.
        write_media: write files that tables hold, and pictures that become clips, below `path/extracted`.
        shuffle_seed: give every question's options another order, drawn from this and its id. Of a question whose
            options speak of each other ("both A and B") the sense is lost.
        pictures: `"keep"` feeds pictures as they are (column `image`); `"clips"` shows each for two seconds (column `video`), for
            models that read clips alone.
        download: fetch the benchmark's tables and archives from the Hub when no `path` is given. Nothing goes over the
            network without it. Archives have to be unpacked.
        revision: of the Hub's copy.

    Returns:
        [`BenchmarkRows`].

    Raises:
        BenchmarkError: for an unknown benchmark or split, a record that is not as published, and (with `"error"`) a
            missing file, naming file, record and field.
        FileNotFoundError: when there is no table.
    """
    options = _options(prompt_style, tags, missing_media, write_media, shuffle_seed, pictures)
    return _read(_benchmark(name), path, split, options, download, revision)


def check(
    name: str | Benchmark,
    path: str | os.PathLike,
    split: str | None = None,
    *,
    tags: Iterable[ModalityTag | str] | None = None,
    missing_media: Literal["leave_out", "keep", "error"] = "leave_out",
    write_media: bool = False,
    pictures: Pictures = "keep",
) -> BenchmarkRows:
    """
    Read all of a benchmark and list what is wrong, where [`read_benchmark`] stops at the first fault.

    Args:
        name, path, split, tags, missing_media, write_media, pictures:
            As of [`read_benchmark`]; with `missing_media="error"` every missing file is a fault.

    Returns:
        [`BenchmarkRows`], whose `faults` name file, record, field and what would be right.
    """
    options = _options("think", tags, missing_media, write_media, None, pictures)
    options.collect = True
    return _read(_benchmark(name), path, split, options, download=False, revision=None)


def _benchmark(name: str | Benchmark) -> Benchmark:
    if isinstance(name, Benchmark):
        return name
    if name not in BENCHMARKS:
        raise BenchmarkError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _options(style, tags, missing_media, write_media, shuffle_seed, pictures) -> _Options:
    if pictures not in get_args(Pictures):
        raise BenchmarkError(f"pictures must be one of {', '.join(get_args(Pictures))}, got {pictures!r}")
    if missing_media not in ("leave_out", "keep", "error"):
        raise BenchmarkError(f"missing_media must be 'leave_out', 'keep' or 'error', got {missing_media!r}")
    if isinstance(tags, str):
        raise BenchmarkError(f"tags must be a list such as ['VA'], got {tags!r}")
    chosen = () if tags is None else tuple(dict.fromkeys(map(ModalityTag.parse, tags)))
    if tags is not None and not chosen:
        raise BenchmarkError(f"tags is empty; give at least one of {', '.join(ModalityTag)}")
    return _Options(chosen, prompt_style(style), missing_media, write_media, shuffle_seed, pictures)


def _read(benchmark: Benchmark, path, split, options: _Options, download: bool, revision: str | None) -> BenchmarkRows:
    if path is None:
        path = _downloaded(benchmark, download, revision)
    elif download:
        raise BenchmarkError("download is for a benchmark without a local path; leave out one of the two")
    if split is not None and split not in benchmark.splits:
        raise BenchmarkError(f"{benchmark.title} has no split {split!r}; it has {', '.join(benchmark.splits)}")
    path = Path(path)
    try:
        files = find_tables(path, benchmark.tables, split or benchmark.splits[0])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{benchmark.title}: {error}") from error
    except TableError as error:
        raise BenchmarkError(str(error)) from error
    root = media_root(path, benchmark.tables)
    rows: list[dict[str, Any]] = []
    left_out: list[LeftOut] = []
    faults: list[str] = []
    count = 0
    for file in files:
        for number, record in _numbered(file):
            place = f"{file}, record {number}"
            try:
                rows += _rows(benchmark, record, file, count, place, root, options, left_out)
            except BenchmarkError as error:
                faults.append(f"{place}: {error}")
                if not options.collect:
                    raise BenchmarkError(faults[0]) from error
            count += 1
    if not count:
        raise BenchmarkError(f"{', '.join(map(str, files))}: no record in it; {benchmark.title} has one per question")
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)
    return BenchmarkRows(benchmark, dataset, left_out, faults, count, files, root, options.style, options.pictures)


def _numbered(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from enumerate(records(file))
    except TableError as error:
        raise BenchmarkError(str(error)) from error


def _downloaded(benchmark: Benchmark, download: bool, revision: str | None) -> str:
    if not download:
        raise BenchmarkError(
            f"{benchmark.title} has no path: give the folder of a local copy, or download=True for {benchmark.hub} from "
            "the Hub"
        )
    from huggingface_hub import snapshot_download

    return snapshot_download(benchmark.hub, repo_type="dataset", revision=revision)


def _rows(
    benchmark: Benchmark,
    fields: Mapping[str, Any],
    file: Path,
    number: int,
    place: str,
    root: Path,
    options: _Options,
    left_out: list[LeftOut],
) -> list[dict[str, Any]]:
    """Return the rows of one record: one, or one per tag asked for."""
    _check_fields(benchmark, fields)
    record = _record_text(fields)
    try:
        question = benchmark.read(Record(fields, file.stem))
    except LeaveOut as reason:
        left_out.append(LeftOut(f"{benchmark.name}-{number:05}", place, str(reason), "form"))
        return []
    name = f"{benchmark.name}-{f'{number:05}' if question.name is None else question.name}"
    name = _free(name, options.seen)
    has = _signals(question)
    rows = []
    for tag in options.tags or (ModalityTag.from_modalities(benchmark.tag.modalities & has),):
        own = f"{name}-{tag.value}" if options.tags else name
        if not tag.modalities <= has:
            lacking = " and ".join(sorted(modality.name.lower() for modality in tag.modalities - has))
            left_out.append(
                LeftOut(own, place, f"tag {tag} needs {lacking}, which the question does not have", "no-signal")
            )
            continue
        try:
            media = _media(question, tag, root, options)
        except UnusableMedium as error:
            if error.missing and options.missing_media == "error":
                raise BenchmarkError(f"{error}; {benchmark.title}: {benchmark.media}") from error
            left_out.append(LeftOut(own, place, str(error), "missing" if error.missing else "unreadable"))
            continue
        rows.append(_row(benchmark, question, own, name, tag, record, options) | media)
    return rows


def _check_fields(benchmark: Benchmark, fields: Mapping[str, Any]) -> None:
    missing = [name for name in benchmark.required if name not in fields]
    if missing:
        strange = [name for name in fields if name not in (*benchmark.required, *benchmark.kept)]
        raise BenchmarkError(
            f"field '{missing[0]}' is missing; a record of {benchmark.title} has {', '.join(benchmark.required)}"
            + (
                f". Of this one's fields, {', '.join(map(repr, strange))} are not known: is one renamed?"
                if strange
                else ""
            )
        )


def _signals(question: Question) -> frozenset[Modality]:
    """Return the signals that a question has, whether or not their files are there."""
    has = {
        Modality.VIDEO: bool(question.videos),
        # A picture has no track.
        Modality.AUDIO: bool(question.audios)
        or (question.audios is None and not all(medium.still for medium in question.videos)),
        Modality.SUBTITLE: question.subtitle is not None,
    }
    return frozenset(modality for modality, there in has.items() if there)


def _media(question: Question, tag: ModalityTag, root: Path, options: _Options) -> dict[str, Any]:
    """
    Return the media columns of a row: what its tag feeds, and what else is there.

    Raises:
        UnusableMedium: for the first medium that the tag feeds and that cannot be used.
    """
    fed = tag.modalities
    track = existing(root, question.track) if question.track is not None else None
    audio_is_track = Modality.AUDIO in fed and question.audios is None and track is None
    stills = [medium for medium in question.videos if medium.still and options.pictures == "keep"]
    clips = [medium for medium in question.videos if medium not in stills]
    image = _located(root, stills, options, needed=Modality.VIDEO in fed)
    video = _located(root, clips, options, needed=Modality.VIDEO in fed or audio_is_track)
    audio = [track] if track else _located(root, question.audios or (), options, needed=Modality.AUDIO in fed)
    subtitle = []
    if question.subtitle is not None and (Modality.SUBTITLE in fed or not question.stand_in):
        subtitle = _located(root, (question.subtitle,), options, needed=Modality.SUBTITLE in fed)
    found = {"video": video, "audio": audio, "image": image}
    return {**{name: paths or None for name, paths in found.items()}, "subtitle": _subtitle(root, subtitle)}


def _located(root: Path, media: Sequence[Medium], options: _Options, needed: bool) -> list[str]:
    """Locate media; return none at all where one of them cannot be used and the tag does not feed them."""
    paths = []
    for medium in media:
        try:
            paths.append(locate(root, medium, options.write_media, options.pictures == "clips"))
        except UnusableMedium as error:
            if not needed:
                return []
            if not (error.missing and options.missing_media == "keep"):
                raise
            paths.append(medium.paths[0])
    return paths


def _free(name: str, seen: dict[str, int]) -> str:
    """Return a name that no question before has; one may be called what another one becomes: a, a, a-2."""
    own = name
    while own in seen:
        seen[name] += 1
        own = f"{name}-{seen[name]}"
    seen[own] = 1
    return own


def _subtitle(root: Path, paths: list[str]) -> str | None:
    """Return a subtitle file's path; of a plain text its content."""
    if not paths:
        return None
    if not paths[0].lower().endswith(".txt"):
        return paths[0]
    try:
        return (root / paths[0]).read_text(encoding="utf-8-sig").strip() or None
    except FileNotFoundError:
        return paths[0]
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{root / paths[0]} is not UTF-8 text: {error}") from error


def _row(
    benchmark: Benchmark,
    question: Question,
    name: str,
    drawn_by: str,
    tag: ModalityTag,
    record: str,
    options: _Options,
) -> dict[str, Any]:
    texts, solution = list(question.options), question.solution
    if options.shuffle_seed is not None and texts:
        texts, solution = shuffled(texts, solution, options.shuffle_seed, drawn_by)
    return {
        "id": name,
        "prompt": [{"role": "user", "content": options.style.render(question.question, texts, question.kind)}],
        "question": question.question,
        "options": texts,
        "answer": solution,
        "solution": solution,
        "tag": tag.value,
        "benchmark": benchmark.name,
        "category": question.category,
        "answer_kind": question.kind,
        "answer_metric": question.metric,
        "record": record,
    }


def _record_text(fields: Mapping[str, Any]) -> str:
    """
    Write a record as JSON.

    Raises:
        FieldError: for a field that no file of text can hold, which is a JSON file's alone.
    """
    if (name := cut_field(fields)) is not None:
        raise FieldError(name, CUT_TEXT)
    return json.dumps(as_json(fields), ensure_ascii=False, allow_nan=False, default=_as_text)


def _as_text(value: Any) -> Any:
    """Return a value for JSON: of embedded files the size, as a digest of the table covers their content."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return described(value)
