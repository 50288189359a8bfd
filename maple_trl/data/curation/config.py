"""What a curation reads, asks and writes: a YAML file with sections, checked whole before anything is sent."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from maple_trl.chat import ChatClient, ChatOptions, ChatSetupError
from maple_trl.data.benchmarks.prompts import PROMPT_STYLES
from maple_trl.data.curation.errors import CurationError
from maple_trl.data.curation.prompts import QUESTION_TYPES
from maple_trl.files import YamlKeyError, parse_yaml
from maple_trl.messages import did_you_mean
from maple_trl.modalities import Modality, ModalityTag


EVIDENCE = ("annotations", "media", "both")
"""What a model is shown of a tag's signals: what was written about each, the signals themselves, or both."""

ROLES = ("vision", "audio", "text", "judge")
"""Who is asked: about pictures, about sound, about text, and whether signals agree. The voters of the filter come besides."""

# The client's own business here: answers are kept beside the output, and a malformed one is asked about, not asked for anew.
_OWN_OPTIONS = ("cache_file", "cache_bytes", "dry_run", "invalid_attempts", "batch_timeout")


@dataclass(frozen=True)
class Source:
    """
    Where clips come from.

    Args:
        path: a folder of videos, or a table (.parquet, .json, .jsonl) with a column `video`, and where wanted `clip` (its
            name), `audio` (a file for the sound), `subtitle` (a file or the text).
        media_root: folder of a table's paths; default is that of the table.
        suffixes: endings of videos in a folder.
        max_seconds: longest clip.
        limit: take the first clips only.
    """

    path: str
    media_root: str | None = None
    suffixes: tuple[str, ...] = (".mp4", ".mkv", ".webm", ".mov", ".avi")
    max_seconds: float = 300.0
    limit: int | None = None


@dataclass(frozen=True)
class Asr:
    """Speech to text by faster-whisper, for clips without a subtitle: its model (a name or a folder), and how it runs."""

    model: str
    device: str = "auto"
    compute_type: str = "default"
    language: str | None = None


@dataclass(frozen=True)
class Splitting:
    """
    How a clip becomes signals.

    Args:
        frames: pictures of a clip.
        max_pixels: area of a picture.
        workers: processes that decode; 0: this one.
        asr: speech to text for clips without a subtitle; without it, they have none.
    """

    frames: int = 8
    max_pixels: int = 448 * 448
    workers: int = 2
    asr: Asr | None = None


@dataclass(frozen=True)
class Captions:
    """What captions are written from: one of `EVIDENCE`."""

    evidence: str = "annotations"


@dataclass(frozen=True)
class Questions:
    """Which types of questions, how many of each for a clip and a tag, and what they are written from."""

    types: tuple[str, ...] = tuple(QUESTION_TYPES)
    per_type: int = 1
    evidence: str = "annotations"


@dataclass(frozen=True)
class Filtering:
    """How many of the voters must be right for a question to count as answered, and what they are shown."""

    quorum: int = 1
    evidence: str = "media"


@dataclass(frozen=True)
class Splits:
    """Share of each tag's rows for the test split, and whether that split gets as many of each tag."""

    test_share: float = 0.1
    balance_test: bool = True


@dataclass(frozen=True)
class Writing:
    """Rows of a file, and the style of prompts: a name of [`~maple_trl.data.benchmarks.prompts.PROMPT_STYLES`]."""

    rows_per_file: int = 10_000
    prompt_style: str = "think"


@dataclass(frozen=True)
class Running:
    """
    How a run goes about it; nothing here decides what is written.

    Args:
        chunk: rows under way at a time.
        ray_workers: processes of `--engine ray`.
        ray_address: a cluster's address; without one Ray starts on this machine.
        max_unfinished: share of a stage's rows that may be left out because servers failed. Above it the run stops.
    """

    chunk: int = 32
    ray_workers: int = 2
    ray_address: str | None = None
    max_unfinished: float = 0.0


@dataclass(frozen=True)
class CurationConfig:
    """
    A whole curation.

    Args:
        source (`Source`): where clips come from.
        output (`str`): folder of all that is written.
        name (`str`): `source` of the rows.
        servers (`Mapping[str, ChatOptions]`): of the roles.
        voters (`tuple[ChatOptions, ...]`): of the filter.
        seed (`int`): of letters and splits.
        tags (`tuple[ModalityTag, ...]`): which are made.
        split (`Splitting`): how a clip becomes signals.
        captions (`Captions`): what captions are written from.
        questions (`Questions`): which questions are written, and what from.
        filter (`Filtering`): when a question counts as answered.
        splits (`Splits`): which rows are kept for the test.
        write (`Writing`): what files and prompts look like.
        run (`Running`): how the run goes about it.
    """

    source: Source
    output: str
    servers: Mapping[str, ChatOptions]
    voters: tuple[ChatOptions, ...]
    name: str = "curated"
    seed: int = 0
    tags: tuple[ModalityTag, ...] = tuple(ModalityTag)
    split: Splitting = field(default_factory=Splitting)
    captions: Captions = field(default_factory=Captions)
    questions: Questions = field(default_factory=Questions)
    filter: Filtering = field(default_factory=Filtering)
    splits: Splits = field(default_factory=Splits)
    write: Writing = field(default_factory=Writing)
    run: Running = field(default_factory=Running)

    @property
    def work(self) -> Path:
        """Folder of what a run needs to go on."""
        return Path(self.output, "work")

    def endpoints(self) -> Iterator[tuple[str, ChatOptions]]:
        """Yield every server by the name under which it is asked and counted."""
        yield from self.servers.items()
        for number, options in enumerate(self.voters, start=1):
            yield f"voter-{number}", options


_SECTIONS: dict[str, type] = {
    "source": Source,
    "split": Splitting,
    "captions": Captions,
    "questions": Questions,
    "filter": Filtering,
    "splits": Splits,
    "write": Writing,
    "run": Running,
}
_PLAIN = {"output": str, "name": str, "seed": int, "tags": tuple[str, ...]}
_LEAST = {"frames": 1, "max_pixels": 28 * 28, "workers": 0, "per_type": 1, "quorum": 1, "rows_per_file": 1, "chunk": 1}
_LEAST |= {"ray_workers": 1, "limit": 1}
_WITHIN = {"test_share": (0.0, 0.5), "max_unfinished": (0.0, 1.0)}
_CHOICES = {"evidence": EVIDENCE, "prompt_style": tuple(PROMPT_STYLES)}


def read_config(path: str | Path) -> CurationConfig:
    """
    Read a curation's file, the YAML at `path`. Relative paths in it start where the file lies.

    Raises:
        CurationError: naming file and key, and what would be right.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CurationError(f"{path}: cannot be read: {error}") from error
    try:
        content = parse_yaml(text)
    except YamlKeyError as error:
        raise CurationError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise CurationError(f"{path}: is no YAML: {error}") from error
    try:
        return make_config(content, path.parent)
    except CurationError as error:
        raise CurationError(f"{path}: {error}") from error


def make_config(content: Any, folder: str | Path = ".") -> CurationConfig:
    """
    Make a curation of the content of its file.

    Args:
        folder: where relative paths start.

    Raises:
        CurationError: naming the key, and what would be right.
    """
    _check_keys("", content, [*_PLAIN, *_SECTIONS, "servers"], ("source", "output", "servers"))
    made = {name: _value(name, content[name], kind) for name, kind in _PLAIN.items() if name in content}
    made |= {name: _section(name, content[name], kind) for name, kind in _SECTIONS.items() if name in content}
    if "tags" in made:
        made["tags"] = _tags(made["tags"])
    made["servers"], made["voters"] = _servers(content["servers"], made.get("tags", tuple(ModalityTag)), folder)
    config = CurationConfig(**made)
    _check_whole(config)
    source = dataclasses.replace(
        config.source,
        path=str(Path(folder, config.source.path)),
        media_root=None if config.source.media_root is None else str(Path(folder, config.source.media_root)),
    )
    return dataclasses.replace(config, source=source, output=str(Path(folder, config.output)))


# Sections


def _section(place: str, content: Any, kind: type) -> Any:
    if content is None:  # all of its keys are comments
        content = {}
    content = {"path": content} if kind is Source and isinstance(content, str) else content
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    _check_keys(place, content, [f.name for f in fields], required)
    made = {name: _value(f"{place}.{name}", value, hints[name]) for name, value in content.items()}
    for name, value in made.items():
        _check_range(f"{place}.{name}", name, value)
    return kind(**made)


def _check_keys(place: str, content: Any, known: Sequence[str], required: Sequence[str]) -> None:
    at = f"{place}: " if place else ""
    if not isinstance(content, Mapping):
        raise CurationError(f"{at}must be a mapping with {', '.join(known)}, got {_short(content)}")
    for name in content:
        if name not in known:
            advice = did_you_mean(str(name), known, otherwise=f"there are {', '.join(known)}")
            raise CurationError(f"{at}there is no key {name!r}{advice}")
    for name in required:
        if content.get(name) is None:
            raise CurationError(f"{at}the key {name!r} is missing")


def _value(place: str, value: Any, kind: Any) -> Any:
    """Return a value as its field's type has it."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = [part for part in kind.__args__ if part is not type(None)]
    if dataclasses.is_dataclass(kind):
        return _section(place, value, kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise CurationError(f"{place}: must be a list of texts, got {_short(value)}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        name = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise CurationError(f"{place}: must be {name}, got {_short(value)}")
    if kind is str and not value.strip():
        raise CurationError(f"{place}: must not be empty")
    return value


def _check_range(place: str, name: str, value: Any) -> None:
    if name in _LEAST and value is not None and value < _LEAST[name]:
        raise CurationError(f"{place}: must be at least {_LEAST[name]}, got {value}")
    if name in _WITHIN and not _WITHIN[name][0] <= value <= _WITHIN[name][1]:
        raise CurationError(f"{place}: must be in {list(_WITHIN[name])}, got {value}")
    if name == "max_seconds" and not (value > 0 and math.isfinite(value)):
        raise CurationError(f"{place}: must be positive and finite, got {value}")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise CurationError(f"{place}: must be one of {', '.join(_CHOICES[name])}, got {value!r}")
    if name == "types":
        wrong = [item for item in value if item not in QUESTION_TYPES]
        if wrong:
            raise CurationError(f"{place}: there is no type {wrong[0]!r}; there are {', '.join(QUESTION_TYPES)}")
        if len(set(value)) < len(value):
            raise CurationError(f"{place}: names a type twice; per_type says how many questions of a type are written")


def _tags(names: Sequence[str]) -> tuple[ModalityTag, ...]:
    try:
        wanted = {ModalityTag.parse(name) for name in names}
    except ValueError as error:
        raise CurationError(f"tags: {error}") from error
    return tuple(tag for tag in ModalityTag if tag in wanted)


def _short(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:100]


# Servers


def _servers(content: Any, tags: Sequence[ModalityTag], folder: str | Path) -> tuple[dict, tuple]:
    fed = {modality for tag in tags for modality in tag.modalities}
    needed = ["vision"] * (Modality.VIDEO in fed) + ["audio"] * (Modality.AUDIO in fed) + ["text"]
    _check_keys("servers", content, [*ROLES, "voters"], [*needed, "voters"])
    servers = {role: _server(f"servers.{role}", content[role], folder) for role in ROLES if content.get(role)}
    servers.setdefault("judge", servers["text"])
    voters = content["voters"]
    if not isinstance(voters, list) or not voters:
        raise CurationError(f"servers.voters: must be a list of servers, got {_short(voters)}")
    return servers, tuple(_server(f"servers.voters[{i}]", voter, folder) for i, voter in enumerate(voters))


def _server(place: str, content: Any, folder: str | Path) -> ChatOptions:
    known = [f.name for f in dataclasses.fields(ChatOptions) if f.name not in _OWN_OPTIONS]
    _check_keys(place, content, known, ("model",))
    given = dict(content)
    if isinstance(given.get("api_key_file"), str):
        given["api_key_file"] = str(Path(folder, given["api_key_file"]))
    try:
        return ChatOptions(**given)
    except (ValueError, TypeError) as error:
        raise CurationError(f"{place}: {error}") from error


# What concerns several keys, or this machine


def _check_whole(config: CurationConfig) -> None:
    if config.filter.quorum > len(config.voters):
        raise CurationError(
            f"filter.quorum: is {config.filter.quorum}, and there are {len(config.voters)} servers.voters; it can be at "
            f"most their number"
        )
    if not 0 <= config.seed < 2**32:
        raise CurationError(f"seed: must be in [0, 2**32), got {config.seed}")


def check_machine(config: CurationConfig, engine: str, dry_run: bool = False) -> None:
    """
    Check what a run needs of this machine: the source, keys of the servers, optional packages.

    Raises:
        CurationError: naming the key, and what would be right.
    """
    path = Path(config.source.path)
    if not path.exists():
        raise CurationError(f"source.path: there is no {path}; name a folder of videos or a table")
    root = config.source.media_root
    if root is not None and not Path(root).is_dir():
        raise CurationError(f"source.media_root: {root} is no folder")
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise CurationError(f"output: {config.output} is no folder")
    if path.is_dir() and path.resolve().is_relative_to(Path(config.output).resolve()):
        raise CurationError(f"output: {config.output} holds the source {path}; name a folder beside it")
    for name, options in config.endpoints():
        place = f"servers.{name}" if name in ROLES else f"servers.voters[{int(name.split('-')[1]) - 1}]"
        try:
            ChatClient(dataclasses.replace(options, dry_run=dry_run)).close()
        except ChatSetupError as error:
            raise CurationError(f"{place}: {error}") from error
    wanted = [("openai", "curation", "servers"), ("jsonschema", "curation", "servers")]
    wanted += [("faster_whisper", "asr", "split.asr")] * (config.split.asr is not None)
    wanted += [("ray", "ray", "--engine ray")] * (engine == "ray")
    for package, extra, place in wanted:
        if importlib.util.find_spec(package) is None:
            raise CurationError(f'{place}: needs the package {package}: pip install "maple-trl[{extra}]"')
