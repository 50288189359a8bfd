"""Rows whose media cannot be used: named, counted, written down, and replaced."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maple_trl.files import write_atomically
from maple_trl.modalities import Modality
from maple_trl.omni.errors import MediaError
from maple_trl.omni.prompt import PromptBuilder, RowError
from maple_trl.omni.prompt_spec import PromptSpec
from maple_trl.trainers.common.checkpoint import ResumeError
from maple_trl.trainers.common.run_errors import TooManyQuarantinedError


logger = logging.getLogger(__name__)

NAMED_FILES = 3
"""Files that a summary of what is wrong with some names."""

_SPOKEN = 10  # prompts that are named in the log; all are in quarantine.json
_ROW_BYTES = 400  # of a key, and of the lists and tables that hold it
_READ = 16  # rows that are read at once
_FEWEST = 10  # rows from which a share of them says something


@dataclass(frozen=True)
class Ranks:
    """
    A process among those of a run, before and after the trainer has an accelerator.

    Attributes:
        gather: concatenates the lists of all ranks, in rank order.
    """

    rank: int = 0
    world: int = 1
    gather: Callable[[list], list] = list


@dataclass(frozen=True)
class QuarantinedPrompt:
    """
    A prompt that is left out of training, and why.

    Attributes:
        dataset: the argument of the trainer that holds it.
        rows: the rows with this prompt, counted from 0.
        path: the file that cannot be used, as the row names it.
    """

    dataset: str
    rows: list[int]
    key: str
    reason: str
    path: str | None
    detail: str


class RowRegistry:
    """
    Knows every row of a data set by its prompt's key, and which rows are in quarantine.

    Args:
        dataset: rows with the columns that [`PromptBuilder`] reads.
        name: how errors call the data set.
        probe: look at every media file once (headers; subtitles whole) and quarantine rows whose files cannot be used.
            The ranks share the work and its result, so that all train on the same rows. `"paths"`: see whether the files
            are there, and say nothing of those that are not.

    Raises:
        RowError: for the first row that cannot be a prompt, with its number and field.
        ValueError: when no row is left.
    """

    def __init__(
        self,
        dataset: Dataset,
        builder: PromptBuilder,
        name: str = "train_dataset",
        probe: bool | Literal["paths"] = True,
        progress: bool = True,
        ranks: Ranks | None = None,
    ):
        self.dataset = dataset
        self.opens = probe != "paths"
        self.builder = builder
        self.name = name
        self.ranks = ranks or Ranks()
        self.quarantined: dict[str, QuarantinedPrompt] = {}
        if not len(dataset):
            raise ValueError(f"{name} holds no row")
        specs: list[PromptSpec] = []
        known: dict[str, PromptSpec] = {}  # rows with the same prompt share it
        shown = {"desc": "Checking rows", "disable": None if progress else True, "leave": False}
        for i, row in enumerate(tqdm(_rows(dataset), total=len(dataset), **shown)):
            try:
                spec = builder.spec(row)
            except RowError as error:
                raise RowError(f"{name}, row {i}: {error}") from error
            specs.append(known.setdefault(spec.key, _without_texts(spec)))
        self._keys = [spec.key for spec in specs]
        self._tags = [spec.tag for spec in specs]
        self.kinds = frozenset(kind for spec in specs for kind in spec.kinds)  # of media
        self._rows_of: dict[str, list[int]] = {}
        for i, key in enumerate(self._keys):
            self._rows_of.setdefault(key, []).append(i)
        if probe:
            self._probe(known, progress)
        self._fed = Counter(what for spec in specs if spec.key not in self.quarantined for what in _fed(spec))
        self.left_out = [i for i, key in enumerate(self._keys) if key in self.quarantined]
        self.seen: set[str] = set()  # prompts that batches have asked for, on any rank
        self.changed_files: set[str] = set()  # of prompts that show something else than when the run began
        self._rows_seen = 0
        if len(self.left_out) == len(self._keys):
            raise ValueError(self._none_left())

    def _probe(self, specs: dict[str, PromptSpec], progress: bool) -> None:
        files = sorted({file for spec in specs.values() for file in _files(spec)}, key=repr)

        def probe(clip: tuple[str, str, Any]) -> tuple[tuple, MediaError | None, bool, bool]:
            """Return the file and what is asked of it, what is wrong, and whether it has pictures and sound."""
            file, kind, request = clip
            try:
                if not self.opens:
                    self.builder.loader.resolve(file)
                    return clip, None, True, True
                if kind == "clip":
                    info = self.builder.loader.probe(file, request=request)
                    return clip, None, info.has_video, info.has_audio
                if kind == "image":
                    self.builder.check_image(file, request)
                else:
                    self.builder.check_subtitle(file, *request)
                return clip, None, False, False
            except MediaError as error:
                return clip, error, False, False

        own = files[self.ranks.rank :: self.ranks.world]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(probe, own)
            found = list(
                tqdm(found, total=len(own), desc="Probing media", disable=None if progress else True, leave=False)
            )
        loader = self.builder.loader
        read = [(file, loader.identity(file)) for (file, *_), error, *_ in found if error is None]
        found, read = self.ranks.gather(found), self.ranks.gather(read)
        for file, identity in read:
            if identity is not None:
                loader.expect(file, identity)
        errors = {clip: error for clip, error, *_ in found if error is not None}
        with_pictures = {file for (file, *_), _, has_video, _ in found if has_video}
        with_sound = {file for (file, *_), *_, has_audio in found if has_audio}
        for key, spec in specs.items():
            error = next((errors[clip] for clip in _files(spec) if clip in errors), None)
            blind = next((file for file in spec.videos if file not in with_pictures), None)
            if error is None and blind is not None:
                error = MediaError(
                    "no-video-track", blind, "the row's video has sound alone; name it in field 'audio'"
                )
            if error is None and spec.fed == {Modality.AUDIO} and not with_sound & set(spec.audios):
                error = MediaError("no-signal", spec.audios[0], "the row is fed audio alone and the file has none")
            if error is not None:
                self.add(key, error)

    def __contains__(self, key: str) -> bool:
        return key in self._rows_of

    @property
    def nbytes(self) -> int:
        """Memory that keys and numbers take, about, and the table where it is no file of the disk."""
        table = 0 if self.dataset.cache_files else self.dataset.data.nbytes
        return _ROW_BYTES * len(self._keys) + table

    def add(self, key: str, error: MediaError) -> None:
        """Put the rows of a prompt into quarantine."""
        if key in self.quarantined:
            return
        rows = self._rows_of[key]
        self.quarantined[key] = QuarantinedPrompt(self.name, rows, key, error.reason, error.path, error.detail)
        if not self.opens:
            return
        if len(self.quarantined) <= _SPOKEN:
            logger.warning("%s, row %d is quarantined: %s", self.name, rows[0], error)
        elif len(self.quarantined) == _SPOKEN + 1:
            logger.warning("%s: further rows are quarantined; quarantine.json lists them", self.name)

    def usable_dataset(self) -> Dataset:
        """Return the rows that were not in quarantine when the run began, in order."""
        left_out = set(self.left_out)
        return (
            self.dataset.select([i for i in range(len(self._keys)) if i not in left_out]) if left_out else self.dataset
        )

    def substitute(self, key: str) -> dict[str, Any]:
        """Return the next usable row after a quarantined one, of its tag if there is one; all ranks find the same."""
        start = self._rows_of[key][0]
        order = chain(range(start + 1, len(self._keys)), range(start))
        usable = (i for i in order if self._keys[i] not in self.quarantined)
        nearest = next(usable, None)
        if nearest is None:
            raise ValueError(self._none_left())
        alike = (i for i in chain([nearest], usable) if self._tags[i] == self._tags[start])
        return self.dataset[next(alike, nearest)]

    def _none_left(self) -> str:
        count = self.reasons().total()
        return (
            f"{self.name}: no usable row is left: {count} rows quarantined {self.reasons_and_files()}; media are looked for "
            f"below media_root, {self.builder.loader.root}"
        )

    def row_number(self, key: str) -> int:
        """Return the number of the first row with this prompt, counted from 0."""
        return self._rows_of[key][0]

    def row_of(self, key: str) -> dict[str, Any]:
        """Return a row with this prompt."""
        return self.dataset[self.row_number(key)]

    def rows_of(self, key: str) -> list[dict[str, Any]]:
        """Return all rows with this prompt, in order."""
        return [self.dataset[i] for i in self._rows_of[key]]

    def reasons(self) -> Counter:
        """Count the rows in quarantine by reason."""
        counts: Counter = Counter()
        for prompt in self.quarantined.values():
            counts[prompt.reason] += len(prompt.rows)
        return counts

    def summary(self) -> str:
        """Return counts of rows by reason, e.g. `3 rows quarantined (2 unreadable, 1 empty-file)`."""
        reasons = self._named_reasons()
        return f"{self.reasons().total()} rows quarantined" + (f" ({reasons})" if reasons else "")

    def _named_reasons(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons().most_common())

    def first_files(self) -> list[str]:
        """Return the first files that cannot be used, as their rows name them."""
        paths = dict.fromkeys(prompt.path for prompt in self.quarantined.values() if prompt.path)
        return list(paths)[:NAMED_FILES]

    def reasons_and_files(self) -> str:
        """Return reasons and first files, e.g. `(2 unreadable, 1 empty-file; first a.mp4, b.mp4)`."""
        reasons, files = self._named_reasons(), self.first_files()
        return f"({reasons}; first {', '.join(files)})" if files else f"({reasons})"

    def note_seen(self, keys: Iterable[str]) -> None:
        """Note that batches have asked for these prompts; those of other data sets are passed over."""
        new = {key for key in keys if key in self._rows_of} - self.seen
        self.seen |= new
        self._rows_seen += sum(len(self._rows_of[key]) for key in new)

    def usable_seen(self) -> int:
        """Count the usable rows that batches have asked for."""
        return self._rows_seen - sum(len(prompt.rows) for key, prompt in self.quarantined.items() if key in self.seen)

    def too_many(self, limit: float) -> str | None:
        """
        Return a complaint where the share of rows that cannot be used is above a limit.

        `None` where it is not, or where there are too few rows to tell.

        Rows count as seen once the probe or a batch has looked at their media. The share is that of the rows which the
        probe left out, and among the others that of the rows which broke in the batches that asked for them. Fewer than
        10 rows are not judged, nor so few that one alone would be above the limit; a limit of 0 tolerates none.
        """
        fewest = max(_FEWEST, math.ceil(1 / limit)) if limit else 1
        every, before = len(self._keys), len(self.left_out)
        share, found = before / every, f"{before} of {every} rows"
        if before and every >= fewest and share > limit:
            return self._too_many(found, share, limit)
        broken = self.reasons().total() - before
        seen = self.usable_seen() + broken
        share += (1 - share) * broken / max(seen, 1)
        if broken and (seen >= fewest or (seen == every - before and every >= fewest)) and share > limit:
            found = f"{broken} of the {seen} rows that batches asked for" + (f", and {found} before" if before else "")
            return self._too_many(found, share, limit)
        return None

    def _too_many(self, found: str, share: float, limit: float) -> str:
        return (
            f"{self.name}: {found} cannot be used {self.reasons_and_files()}, which is {share:.0%} of what was looked at and "
            f"more than max_quarantined_share={limit:g} allows. quarantine.json names them all"
        )

    def fed_summary(self) -> str:
        """
        Return how many usable rows are fed what, e.g. `448 rows; fed video 256, audio 256, subtitle 256`.

        Pictures are named where there are any.
        """
        names = ["image"] * ("image" in self._fed) + ["video", "audio", "subtitle"]
        counts = ", ".join(f"{name} {self._fed[name]}" for name in names)
        return f"{len(self._keys) - len(self.left_out)} rows; fed {counts}"

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to see the same rows in the same order."""
        return {
            "content": self._content(),
            "left_out": self.left_out,
            "seen": sorted(self._rows_of[key][0] for key in self.seen),
            "quarantined": [asdict(row) for row in self.quarantined.values()],
            "changed_files": sorted(self.changed_files),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Take over the rows and the quarantine of the run that is resumed, whatever has happened to the files since.

        Raises:
            ResumeError: when the data set is not the one of that run.
        """
        if state["content"] != self._content():
            raise ResumeError(
                f"{self.name} is not the data set of the checkpoint: its prompts or their order differ. Resume with the "
                "same data, tags, modality_access, prompt_template and system_prompt."
            )
        self.left_out = state["left_out"]
        # That of an earlier version does not say which rows it has seen: all, so that none counts as broken too soon.
        self.seen, self._rows_seen = set(), 0
        self.note_seen(self._keys[row] for row in state.get("seen", range(len(self._keys))))
        self.quarantined |= {row["key"]: QuarantinedPrompt(**row) for row in state["quarantined"]}
        self.changed_files |= set(state.get("changed_files", ()))

    def _content(self) -> str:
        return hashlib.sha256("\n".join(self._keys).encode()).hexdigest()


def _rows(dataset: Dataset) -> Iterator[Mapping[str, Any]]:
    """Yield the rows, read a few at a time: reading one takes as long as all that is done with it here."""
    if dataset.format["type"] is not None:  # one of the caller, which may make something else of several rows
        yield from dataset
        return
    for rows in dataset.iter(_READ):
        yield from (dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True))


def _fed(spec: PromptSpec) -> set[str]:
    """Return what a prompt is fed: kinds of media, and `subtitle`."""
    return {*spec.kinds, *(["subtitle"] if Modality.SUBTITLE in spec.fed else [])}


def _files(spec: PromptSpec) -> list[tuple[str, str, Any]]:
    """
    Return a prompt's files, each with what it is (an image, a clip or a subtitle), and what is asked of it.

    Of a subtitle, these are the parts of its clip, and whether the row needs it.
    """
    pictures = [(file, "image", request) for file, request in dict.fromkeys(spec.pictures)]
    clips = [(file, "clip", request) for file, request in spec.clips]
    subtitle = (spec.subtitle, "subtitle", (spec.subtitle_parts, spec.needs_subtitle))
    return [*pictures, *clips, *([subtitle] if spec.subtitle_file else [])]


def _without_texts(spec: PromptSpec) -> PromptSpec:
    """Return a spec with its files and its key alone: texts of all rows of a large data set would fill the memory."""
    bare = replace(spec, messages=(), subtitle=spec.subtitle if spec.subtitle_file else None)
    vars(bare)["key"] = spec.key
    return bare


def write_quarantine(path: str, rows: list[QuarantinedPrompt]) -> None:
    """Write the list as JSON, replacing the file in one step."""
    write_atomically(path, json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))


class QuarantineCallback(TrainerCallback):
    """
    Ends a run in order when more rows than `max_quarantined_share` are in quarantine.

    The step that is under way is finished with the rows that stand in, a checkpoint is written, and then `train()` raises
    [`TooManyQuarantinedError`] on every rank: all know the same rows, as encoding them is a collective call.

    Args:
        too_many: says what is wrong when there are more; `None` until then.
    """

    def __init__(self, too_many: Callable[[], str | None]):
        self.too_many = too_many
        self._problem: str | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Forget the problem of a run before."""
        self._problem = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Stop the run where too many rows are in quarantine."""
        self._stop_if_too_many(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Stop the run where too many rows are in quarantine."""
        self._stop_if_too_many(control)

    def _stop_if_too_many(self, control: TrainerControl) -> None:
        self._problem = self.too_many()
        if self._problem is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        """Raise on every rank where the run was stopped."""
        if self._problem is not None:
            raise TooManyQuarantinedError(
                f"{self._problem}. Stopped after step {state.global_step}; the checkpoint of that step is in "
                f"{args.output_dir}. Mend the files and begin anew, or go on with resume_from_checkpoint=True and a larger "
                "max_quarantined_share."
            )
