"""From rows to encoded prompts during a run: broken rows are replaced, on all ranks alike."""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from datasets import Dataset, Features, IterableDataset, LargeList, List, Value, concatenate_datasets

from maple_trl.modalities import IMAGE_COLUMNS, ModalityTag
from maple_trl.omni.embedded import as_paths
from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.omni.errors import MediaError
from maple_trl.omni.host_memory import HostCache, host_memory
from maple_trl.omni.prompt import PromptBuilder, RowError
from maple_trl.omni.prompt_spec import PROMPT_COLUMNS, PromptSpec, prompt_columns
from maple_trl.trainers.common.quarantine import QuarantinedPrompt, Ranks, RowRegistry
from maple_trl.trainers.common.run_errors import TooManyQuarantinedError


logger = logging.getLogger(__name__)

Row = dict[str, Any]

_ROUNDS = 8  # times that stand-ins of one batch may fail
_SPEC_BYTES = 64 << 20  # more than this rollout and the next one have of texts


class RowEncoder:
    """
    Encodes rows, one prompt object per distinct prompt, and keeps account of those that cannot be used.

    Args:
        builder: encodes one row.
        ranks: the processes of the run. `encode` is a collective call.
        probe, progress: see [`RowRegistry`].
        most_lost (`float`): the share of rows above which looking for ones that stand in is given up.
    """

    def __init__(
        self, builder: PromptBuilder, ranks: Ranks, probe: bool = True, progress: bool = True, most_lost: float = 1.0
    ):
        self.builder = builder
        self.ranks = ranks
        self.probe = probe
        self.progress = progress
        self.most_lost = most_lost
        self.registries: dict[str, RowRegistry] = {}
        self._met: set[str] = set()
        self._specs: HostCache[Hashable, PromptSpec] = host_memory().cache("specs", _SPEC_BYTES)

    def register(self, dataset: Any, name: str) -> Any:
        """
        Check a data set before hours are spent on it, and return its usable rows; a streamed one passes unseen.

        Raises:
            RowError: for the first row that cannot be a prompt.
            ValueError: when no row is usable.
        """
        if isinstance(dataset, Mapping):
            raise ValueError(f"{name} holds several splits ({', '.join(dataset)}); pass one of them")
        columns = getattr(dataset, "column_names", None) or []
        check_spelling(columns, name, makes_prompt=self.builder.template is not None)
        dataset = asked_rows(as_paths(dataset), self.builder, name)
        if not isinstance(dataset, Dataset):
            return dataset
        self._tell_own_system(dataset, name)
        registry = RowRegistry(dataset, self.builder, name, self.probe, self.progress, self.ranks)
        self.registries[name] = registry
        host_memory().hold("rows", registry, registry.nbytes)
        if self.ranks.rank == 0:
            print(f"{name}: {registry.fed_summary()}")
            if registry.left_out:
                print(f"{name}: {len(registry.left_out)} of {len(dataset)} rows left out: {registry.summary()}")
        return registry.usable_dataset()

    def _tell_own_system(self, dataset: Dataset, name: str) -> None:
        """Warn of rows whose own system message stays in the place of `system_prompt`."""
        if self.builder.system_prompt is None or self.ranks.rank != 0:
            return
        own = sum(_text(prompt[0]["content"]) != self.builder.system_prompt for prompt in dataset["prompt"])
        if own:
            logger.warning("%s: %d of %d rows keep a system message of their own", name, own, len(dataset))

    @property
    def quarantined(self) -> list[QuarantinedPrompt]:
        """Prompts of all data sets that are in quarantine."""
        return [row for registry in self.registries.values() for row in registry.quarantined.values()]

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of media of the rows that are known: of the data sets, and of all ranks' batches; the same on all ranks."""
        return frozenset(self._met).union(*(registry.kinds for registry in self.registries.values()))

    def state_dict(self) -> dict[str, Any]:
        """Return which rows of each data set are used, ready for JSON; each registry continues from its own."""
        return {name: registry.state_dict() for name, registry in self.registries.items()}

    def note_kinds(self, specs: Iterable[PromptSpec]) -> None:
        """Note the kinds of media of rows that every rank knows."""
        self._met.update(kind for spec in specs for kind in spec.kinds)

    def encode(self, rows: Sequence[Row], evaluating: bool = False) -> tuple[list[Row], list[EncodedPrompt]]:
        """
        Encode rows, with others in place of those whose media cannot be used; a collective call.

        A row whose media cannot be used goes into quarantine, and the next usable row of its data set stands in for it
        on all ranks.

        Returns:
            the rows that are really used, and their prompts.

        Raises:
            MediaError: for a row of a streamed data set, for which nothing can stand in.
            TooManyQuarantinedError: when most that stand in fail as well, e.g. as the folder of the media has gone.
        """
        encoded: dict[str, EncodedPrompt] = {}
        for rounds in count(1):
            used = [self.usable(row, evaluating) for row in rows]
            rows = [row for row, _ in used]
            tried: list[tuple[str, frozenset[str], MediaError | None, list[str]]] = []
            for key, spec in {spec.key: spec for _, spec in used}.items():
                if key not in encoded:
                    try:
                        encoded[key] = self.builder.encode(spec)
                        tried.append((key, spec.kinds, None, self._changed_files(spec)))
                    except MediaError as error:
                        tried.append((key, spec.kinds, error, []))
            tried = self.ranks.gather(tried)
            self._met.update(kind for _, kinds, *_ in tried for kind in kinds)
            for registry in self.registries.values():
                registry.note_seen(key for key, *_ in tried)
                registry.changed_files.update(file for key, *_, files in tried if key in registry for file in files)
            failed = [(key, error) for key, _, error, _ in tried if error is not None]
            if not failed:
                return rows, [encoded[spec.key] for _, spec in used]
            for key, error in failed:
                registries = [registry for registry in self.registries.values() if key in registry]
                if not registries:
                    raise _of_row(error, next((row for row, spec in used if spec.key == key), None))
                for registry in registries:
                    registry.add(key, error)
            problem = self.too_many(self.most_lost) if rounds >= _ROUNDS else None
            if problem is not None:
                raise TooManyQuarantinedError(
                    f"{problem}. Rows that were to stand in failed {rounds} times in a row, so that the step could not be "
                    "made. Are the media still there? Go on from the last checkpoint, which does not count them as lost"
                )

    def _changed_files(self, spec: PromptSpec) -> list[str]:
        """List the files of a prompt that were changed since they were first read."""
        files = [*spec.files, *([spec.subtitle] if spec.subtitle_file else [])]
        return [file for file in dict.fromkeys(files) if self.builder.loader.has_changed(file)]

    def too_many(self, limit: float) -> str | None:
        """Return a complaint where a data set has lost more rows than a share; see [`RowRegistry.too_many`]."""
        return next(filter(None, (registry.too_many(limit) for registry in self.registries.values())), None)

    def usable(self, row: Row, evaluating: bool = False) -> tuple[Row, PromptSpec]:
        """Return the row, or one that stands in for it, with the same columns, and what it is fed."""
        spec = self.spec(row)
        names = sorted(self.registries, key=lambda name: name.startswith("train") == evaluating)
        for registry in (self.registries[name] for name in names):
            if spec.key in registry.quarantined:
                stand_in = registry.substitute(spec.key)
                row = {name: stand_in.get(name) for name in row}
                return row, self.spec(row)
        return row, spec

    def spec(self, row: Row) -> PromptSpec:
        """Find out what a row is fed, once for all its copies and each access to its signals."""
        said = self.builder.modality_access, prompt_columns(row)
        spec = self._specs.get(said)
        if spec is None:
            spec = self._specs[said] = self.builder.spec(row)
        return spec

    def encode_each(self, rows: Sequence[Row]) -> list[EncodedPrompt | None]:
        """Encode rows without replacing any: `None` stands where the media cannot be used. Not a collective call."""
        encoded: dict[str, EncodedPrompt | None] = {}
        specs = [self.spec(row) for row in rows]
        for key, spec in {spec.key: spec for spec in specs}.items():
            try:
                encoded[key] = self.builder.encode(spec)
            except MediaError as error:
                logger.warning("A row is left out: %s", error)
                encoded[key] = None
        return [encoded[spec.key] for spec in specs]


def _of_row(error: MediaError, row: Row | None) -> MediaError:
    """Return an error that says which row of a stream it is of, where this process has that: its number is not known."""
    if row is None:
        return error
    named = f"'id' {row['id']!r}" if row.get("id") is not None else f"'prompt' {row.get('prompt')!r:.120}"
    return MediaError(error.reason, error.path, f"{error.detail} (the row whose {named})")


_CONVERSATION = List({"role": Value("string"), "content": Value("string")})


def asked_rows(dataset: Any, builder: PromptBuilder, name: str) -> Any:
    """
    Return a data set whose column `prompt` is what its rows are asked; a streamed one is changed as it is read.

    Raises:
        RowError: for the first row that cannot be asked, with its number.
    """
    if not builder.rewords:
        return dataset
    if isinstance(dataset, IterableDataset):
        features = dataset.features
        if features is not None:
            features = Features(features | {"prompt": _prompt_feature(features)})
        return dataset.map(builder.asked, features=features)
    if not isinstance(dataset, Dataset) or not len(dataset):
        return dataset
    prompts = []
    for i, row in enumerate(dataset):
        try:
            prompts.append(builder.asked(row)["prompt"])
        except RowError as error:
            raise RowError(f"{name}, row {i}: {error}") from error
    column = Dataset.from_dict({"prompt": prompts}, Features({"prompt": _prompt_feature(dataset.features)}))
    others = [other for other in dataset.column_names if other != "prompt"]
    return concatenate_datasets([dataset.select_columns(others), column], axis=1) if others else column


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(block.get("text") or "" for block in content or ())


def _prompt_feature(features: Features) -> Any:
    """Return the type of conversations in a table: that of its own, or texts."""
    own = features.get("prompt")
    return own if isinstance(own, (List, LargeList)) else _CONVERSATION


# Columns in which other libraries' data sets hold the question.
_QUESTIONS = ("question", "problem", "query", "instruction", "input", "prompts", "messages", "conversations")


_SUFFIX = re.compile(
    r"(?<=image|video|audio)s?(path|file|filename|url)?s?$|(?<=subtitle)s?(path|file|filename|url)?s?$"
)


def _bare(column: str) -> str:
    """Return a column's name without case, separators and endings such as `path`: `Video_Paths` as `video`, `img` as `image`."""
    return _SUFFIX.sub("", re.sub(r"^(img|picture)", "image", re.sub(r"[\W_]", "", column.lower())))


def check_spelling(columns: Sequence[str], name: str, makes_prompt: bool = False) -> None:
    """
    Check the names of the columns that are read.

    A misspelt media column would be left unread, and the run would train on text alone.

    Args:
        makes_prompt: a template makes the column `prompt` of others.

    Raises:
        ValueError: with the column to rename or to drop.
    """
    if columns and "prompt" not in columns and not makes_prompt:
        asked = next((other for other in _QUESTIONS if other in columns), None)
        advice = f"rename {asked!r} to 'prompt'" if asked else "a prompt is a text, or messages with role and content"
        advice += ", or prompt_template makes it of other columns"
        raise ValueError(f"{name} has no column 'prompt'; its columns: {', '.join(columns)}; {advice}")
    for column in PROMPT_COLUMNS:
        alike = [other for other in columns if _bare(other) == column.replace("_", "")]
        same = IMAGE_COLUMNS if column in IMAGE_COLUMNS else (column,)
        if alike and not set(same) & set(columns):
            raise ValueError(
                f"{name} has the column {alike[0]!r}, which is not read, and no column {column!r}: rename it to "
                f"{column!r}, or to something less alike if it means something else"
            )


def check_row_tags(tags: Iterable[Any], field: str = "field 'tag'") -> None:
    """
    Check that each row of the training set has a tag.

    Args:
        field: how an error begins that tells of one.

    Raises:
        RowError: for the first row without one, or with an unknown one.
    """
    for i, tag in enumerate(tags):
        try:
            ModalityTag.parse(tag)
        except ValueError as error:
            raise RowError(f"train_dataset, row {i}: {field}: {error}") from error
