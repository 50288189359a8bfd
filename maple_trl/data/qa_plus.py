"""
MAPLE-QA+ (arXiv 2602.11596, 5.4.1 and B.2): questions that are also asked with more than they require, and with less.

From each question with options come rows of three strata: `exact` is fed what it requires, `superset` more, `deficit`
lacks a signal that it requires. The right option of a deficit row is replaced by a none answer, which is then the right
one; so it is in a share of the exact and superset rows.

1. A first pass reads what each row is (`qa_items.py`) and keeps a few numbers of it.
2. [`Plan`] says which questions are asked with which input, and where an option is replaced: by digests of seed and id, so
   that the order of rows decides nothing but the order of what is written.
3. A second pass makes the rows, and writes them shard by shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from maple_trl.data.benchmarks.prompts import PromptStyle, prompt_style
from maple_trl.data.none_answers import NONE_ANSWERS
from maple_trl.data.qa_items import COLUMNS, Files, Item, NotAnItem, read_item, replace_options, write_prompt
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.data.shards import hold_split, replace_held_split, shards_of
from maple_trl.files import digest, write_atomically
from maple_trl.modalities import STRATA, ModalityTag
from maple_trl.omni.options import bare_options, plain_options


KEEP = "keep"
"""As `prompt_style`: prompts stay as they are but for their options."""

_TAGS = tuple(ModalityTag)
_BITS = np.array([sum(1 << "VAS".index(letter) for letter in tag) for tag in _TAGS], np.uint8)
_UNUSED = len(_TAGS)
_BATCH = 2048
_SHOWN = 5  # ids of each reason in the summary


class QAPlusError(ValueError):
    """QA+ rows cannot be made as asked; the message says what would be right."""


@dataclass(frozen=True)
class QAPlusOptions:
    """
    What is made of the questions.

    Args:
        exact, superset, deficit: rows of each stratum. Default: one of every question that allows it. More than that asks
            questions with a second input of the stratum, and so on.
        evaluation: ask every question with all seven inputs instead.
        none_share: the share of exact and of superset rows in which an option is replaced, kept to rounding in each.
        replace: which option that is there: `right` (5.4.1), so that the none answer is right, or `wrong` (B.2), so that it
            is not.
        prompt_style: how prompts are written: a name in [`~maple_trl.data.benchmarks.prompts.PROMPT_STYLES`], or `keep`.
        seed: of all draws.
        shard_rows: rows of a file.

    Raises:
        QAPlusError: for values that are out of range or contradict each other.
    """

    exact: int | None = None
    superset: int | None = None
    deficit: int | None = None
    evaluation: bool = False
    none_share: float = 0.25
    replace: str = "right"
    prompt_style: str = KEEP
    seed: int = 0
    shard_rows: int = 50_000

    def __post_init__(self):
        for stratum, number in self.sizes.items():
            if number is not None and number < 0:
                raise QAPlusError(f"{stratum} must be 0 or more rows, got {number}")
            if number is not None and self.evaluation:
                raise QAPlusError(f"{stratum}: sizes are for training; for evaluation every question has all inputs")
        if not 0 <= self.none_share <= 1:
            raise QAPlusError(f"none_share must be a share in [0, 1], got {self.none_share}")
        if self.replace not in ("right", "wrong"):
            raise QAPlusError(f"replace must be 'right' or 'wrong', got {self.replace!r}")
        if self.shard_rows < 1:
            raise QAPlusError(f"shard_rows must be 1 or more, got {self.shard_rows}")
        try:
            self.style  # noqa: B018
        except ValueError as error:
            raise QAPlusError(f"{error}, and '{KEEP}'") from None

    @property
    def sizes(self) -> dict[str, int | None]:
        """The number of rows asked for, by stratum."""
        return {stratum: getattr(self, stratum) for stratum in STRATA}

    @property
    def style(self) -> PromptStyle | None:
        """How prompts are written; `None` where they are kept."""
        return None if self.prompt_style == KEEP else prompt_style(self.prompt_style)


@dataclass
class QAPlusSummary:
    """
    What became of the rows.

    Attributes:
        read: rows that were read.
        questions: those of them that are questions with options.
        rows: by stratum and input, how many were made.
        replaced: by stratum, in how many of them an option is a none answer.
        left_out: rows of which nothing was made, by reason: `count` and the first `ids`.
        not_made: by stratum and reason, questions that have no row there; of an evaluation, questions and inputs.
        files: the shards.
    """

    read: int = 0
    questions: int = 0
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_made: dict[str, dict[str, int]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All rows that were made."""
        return sum(sum(by_tag.values()) for by_tag in self.rows.values())


@dataclass
class _Draws:
    """What the first pass keeps of `n` rows, in their order."""

    required: NDArray[np.uint8]  # (n,) index of the tag, _UNUSED of a row that is no question
    right: NDArray[np.uint8]  # (n,) place of the right option
    signals: NDArray[np.uint8]  # (n,) bits of those that the row has
    fixed: NDArray[np.uint8]  # (n,) 0, or 1 + the number of the reason why no option can be replaced
    picks: NDArray[np.uint64]  # (n, 3) digest of the id by stratum: which questions are taken
    order: NDArray[np.uint64]  # (n, 8) by input: which inputs of a question are taken; the last names the id
    swaps: NDArray[np.uint64]  # (n, 8) likewise: in which of them an option is replaced


class Plan:
    """
    Which questions of a data set are asked with which input.

    Args:
        source: rows with the columns of [`~maple_trl.data.schema.ROW_FEATURES`] that questions have; others are kept.
        options: what is made of them.
        media_root: where their media must be; `None` looks for none.
        left_out: called with each row that is left out: its place, its id (if any), the reason and the detail.
        split: rows that say in their column `split` that they are of another one are left out.

    Attributes:
        summary: of what will be made.
        features: of the rows.

    Raises:
        QAPlusError: where two rows have one id, nothing can be made, or less than was asked for.
    """

    def __init__(
        self,
        source: Dataset,
        options: QAPlusOptions,
        media_root: str | Path | None = None,
        left_out: Callable[[int, Any, str, str], Any] = lambda *_: None,
        split: str | None = None,
    ):
        self.options, self._source, self._style = options, source, options.style
        self._root, self._split = media_root, split
        self.summary = QAPlusSummary(read=len(source))
        self.features = _features(source.features, writes_prompt=self._style is not None)
        self._reasons: list[str] = []
        self._details: dict[str, str] = {}
        self._draws = self._read(Files(media_root), left_out)
        self.summary.questions = int((self._draws.required != _UNUSED).sum())
        if not self.summary.questions:
            raise QAPlusError(f"none of {len(source)} rows is a question with options: {self._told()}")
        self._check_ids()
        self._chosen = self._choose()
        self._swapped = self._replace()
        self._count()

    # The first pass

    def _read(self, files: Files, left_out: Callable[[int, Any, str, str], Any]) -> _Draws:
        n = len(self._source)
        numbers = [np.full(n, value, np.uint8) for value in (_UNUSED, 0, 0, 0)]
        picks, order, swaps = (np.zeros((n, width), np.uint64) for width in (len(STRATA), 8, 8))
        draws = _Draws(*numbers, picks, order, swaps)
        places = {tag: place for place, tag in enumerate(_TAGS)}
        bits = dict(zip(["", *_TAGS], [0, *map(int, _BITS)], strict=True))
        reasons: dict[str, int] = {}
        for place, row in _rows(self._source):
            try:
                item = self._item(row, files)
            except NotAnItem as error:
                self._leave_out(row.get("id"), error.reason, str(error))
                left_out(place, row.get("id"), error.reason, str(error))
                continue
            draws.required[place], draws.right[place] = places[item.tag], item.right
            draws.signals[place] = bits[item.signals]
            if item.fixed is not None:
                draws.fixed[place] = reasons.setdefault(item.fixed, len(reasons)) + 1
                left_out(place, item.name, item.fixed, "no option of it is replaced, and it has no deficit row")
            draws.picks[place] = _keys(self.options.seed, "picks", item.name)[: len(STRATA)]
            draws.order[place] = _keys(self.options.seed, "order", item.name)
            draws.swaps[place] = _keys(self.options.seed, "swaps", item.name)
        self._reasons = list(reasons)
        return draws

    def _item(self, row: Mapping[str, Any], files: Files) -> Item:
        own = row.get("split")
        if self._split is not None and own not in (None, "", self._split):
            raise NotAnItem("another split", f"field 'split' is {own!r}, and rows of {self._split!r} are asked for")
        return read_item(row, self._style, files)

    def _leave_out(self, name: Any, reason: str, detail: str) -> None:
        self._details.setdefault(reason, detail)
        entry = self.summary.left_out.setdefault(reason, {"count": 0, "ids": []})
        entry["count"] += 1
        if len(entry["ids"]) < _SHOWN:
            entry["ids"].append(None if name is None else str(name))

    def _told(self) -> str:
        return "; ".join(
            f"{entry['count']} {reason} (the first, {entry['ids'][0]!r}: {self._details[reason]})"
            for reason, entry in self.summary.left_out.items()
        )

    def _check_ids(self) -> None:
        used = np.flatnonzero(self._draws.required != _UNUSED)
        _, first, counts = np.unique(self._draws.order[used, 7], return_index=True, return_counts=True)
        if (counts > 1).any():
            place = int(used[first[counts > 1].min()])
            name = self._source[place]["id"]
            raise QAPlusError(
                f"row {place}: another row has its id {name!r} too; what becomes of a question is drawn by its id, so ids "
                "must differ"
            )

    # The choice

    def _choose(self) -> NDArray[np.bool_]:
        """Return which questions are asked with which input, of shape (n, 7)."""
        draws, options = self._draws, self.options
        used = draws.required != _UNUSED
        needs = _BITS[np.where(used, draws.required, 0)][:, None]
        covers, exact = (_BITS & needs) == needs, _BITS == needs
        self._strata = np.where(exact, 0, np.where(covers, 1, 2)).astype(np.uint8)
        has = (_BITS & ~draws.signals[:, None]) == 0
        fits = has & used[:, None] & ((self._strata != 2) | (draws.fixed == 0)[:, None])
        self._note_lacking(used, has, fits)
        chosen = np.zeros(fits.shape, bool)
        for number, stratum in enumerate(STRATA):
            rows, tags = np.nonzero(fits & (self._strata == number))
            if not options.evaluation:
                taken = self._taken(stratum, rows, tags)
                rows, tags = rows[taken], tags[taken]
            chosen[rows, tags] = True
        if not chosen.any():
            where = "" if self._root is None else f"; media were looked for in {self._root}, which media_root says"
            raise QAPlusError(
                f"no row can be made of {self.summary.questions} questions: not made: {self.summary.not_made}; sizes: "
                f"{options.sizes}{where}"
            )
        return chosen

    def _taken(self, stratum: str, rows: NDArray[Any], tags: NDArray[Any]) -> NDArray[Any]:
        """Return which of the possible rows of a stratum are made: first one of each question, in the order of digests."""
        # Not by the inputs' own digests: the least of six is less than the least of three.
        picks, names = self._draws.picks[rows, STRATA.index(stratum)], self._draws.order[rows, 7]
        keys = self._draws.order[rows, tags]
        by_question = np.lexsort((keys, rows))
        starts = np.flatnonzero(np.diff(rows[by_question], prepend=-1))
        turn = np.empty(len(rows), np.int64)
        turn[by_question] = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
        wanted = self.options.sizes[stratum]
        if wanted is None:
            return np.flatnonzero(turn == 0)
        if wanted > len(rows):
            raise QAPlusError(
                f"{stratum}: {wanted} rows are asked for, and {len(rows)} can be made of "
                f"{self.summary.questions} questions; not made: {self.summary.not_made.get(stratum, {})}"
            )
        return np.lexsort((names, picks, turn))[:wanted]

    def _note_lacking(self, used: NDArray[Any], has: NDArray[Any], fits: NDArray[Any]) -> None:
        """Count what a stratum does without, by reason; of an evaluation by input."""
        for number, stratum in enumerate(STRATA):
            mine = (self._strata == number) & used[:, None]
            counts: Counter[str] = Counter()
            if self.options.evaluation:
                for place, tag in enumerate(_TAGS):
                    counts[f"{tag}: no such signal"] = int((mine & ~has)[:, place].sum())
            else:
                counts["requires all signals already"] = int((used & ~mine.any(1)).sum())
                counts["no such signal"] = int((mine.any(1) & ~(mine & has).any(1)).sum())
            for kind, reason in enumerate(self._reasons, 1):
                without = mine & has & ~fits & (self._draws.fixed == kind)[:, None]
                counts[reason] = int(without.sum() if self.options.evaluation else without.any(1).sum())
            self.summary.not_made[stratum] = {reason: count for reason, count in counts.items() if count}

    def _replace(self) -> NDArray[np.bool_]:
        """Return in which of the rows an option is replaced, of shape (n, 7)."""
        swapped = self._chosen & (self._strata == 2)
        for number in (0, 1):
            mine = self._chosen & (self._strata == number)
            wanted = math.floor(self.options.none_share * int(mine.sum()) + 0.5)
            rows, tags = np.nonzero(mine & (self._draws.fixed == 0)[:, None])
            if wanted > len(rows):
                raise QAPlusError(
                    f"none_share {self.options.none_share:g} of the {STRATA[number]} rows is {wanted}, but of only {len(rows)} "
                    f"an option can be replaced ({', '.join(self._reasons)}); give a smaller share"
                )
            keys = self._draws.swaps[rows, tags], self._draws.swaps[rows, 7]
            taken = np.lexsort((keys[1], keys[0]))[:wanted]
            swapped[rows[taken], tags[taken]] = True
        return swapped

    def _count(self) -> None:
        for number, stratum in enumerate(STRATA):
            mine = self._chosen & (self._strata == number)
            counts = mine.sum(0)
            self.summary.rows[stratum] = {str(tag): int(n) for tag, n in zip(_TAGS, counts, strict=True) if n}
            self.summary.replaced[stratum] = int((mine & self._swapped).sum())

    # The second pass

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows, those of a question together and questions in the order of the data set."""
        kept = [name for name in self._source.column_names if name not in _MADE]
        start = 0
        for table in _tables(self._source):
            chosen = self._chosen[start : start + len(table)]
            places, tags = np.nonzero(chosen)
            if len(places):
                read = [name for name in (*COLUMNS, *_FOR_OPTIONS) if name in table.column_names]
                rows = table.select(read).to_pylist()
                made = [
                    self._row(start + int(place), rows[place], int(tag))
                    for place, tag in zip(places, tags, strict=True)
                ]
                yield self._table(table.select(kept).take(pa.array(places)), made)
            start += len(table)

    def _row(self, place: int, row: Mapping[str, Any], column: int) -> dict[str, Any]:
        name, tag = str(row["id"]), _TAGS[column]
        stratum = STRATA[self._strata[place, column]]
        # Their letters stand in the prompt; one that is replaced has none of its own.
        given = bare_options(plain_options(row["options"]))
        right, options, replaced = int(self._draws.right[place]), given, None
        if self._swapped[place, column]:
            replaced = "right" if stratum == "deficit" else self.options.replace
            options = _with_none(options, right, replaced, _keys(self.options.seed, f"words {tag}", name))
        prompt = row.get("prompt")
        if self._style is not None:
            prompt = write_prompt(prompt, row["question"], options, self._style)
        elif replaced is not None and "prompt" in row:
            prompt = replace_options(prompt, given, options)
        return {
            "id": f"{name}-{tag}",
            "prompt": prompt,
            "options": options,
            "tag": tag.value,
            "required_tag": _TAGS[self._draws.required[place]].value,
            "stratum": stratum,
            "question_id": name,
            "replaced": replaced,
            # It may lead to an option that is gone.
            "hint": None if replaced == "right" else row.get("hint"),
            # Its thoughts may weigh an option that is gone.
            "completion": None if replaced is not None else row.get("completion"),
        }

    def _table(self, rest: pa.Table, made: list[dict[str, Any]]) -> pa.Table:
        schema = self.features.arrow_schema
        columns = {
            name: pa.array([row[name] for row in made], schema.field(name).type)
            if name in _MADE
            else rest[name].cast(schema.field(name).type)
            for name in schema.names
        }
        return pa.table(columns, schema=schema)


_ADDED = {name: Value("string") for name in ("required_tag", "stratum", "question_id", "replaced")}
_FOR_OPTIONS = ("hint", "completion")
"""Columns that were written with a question's options in view."""

_MADE = ("id", "prompt", "options", "tag", *_FOR_OPTIONS, *_ADDED)
"""Columns in which the rows of a question differ."""


def _features(source: Features, writes_prompt: bool) -> Features:
    """
    Return the features of QA+ rows: those of the source, and what is added.

    Without a column `prompt` there is none in the rows either, unless a style writes it.

    Raises:
        QAPlusError: where the source lacks a column of questions.
    """
    right = "solution" if "answer" not in source and "solution" in source else "answer"
    missing = [name for name in ("id", "tag", "options", right, "question") if name not in source]
    if missing:
        raise QAPlusError(
            f"there is no column {missing[0]!r}; a question has id, tag, question, options and answer (or solution), the rows have "
            f"{', '.join(source)}"
        )
    texts = {"id": Value("string"), "tag": Value("string"), "options": List(Value("string"))}
    prompt = {} if "prompt" in source or not writes_prompt else {"prompt": ROW_FEATURES["prompt"]}
    return Features({**source, **prompt, **texts, **_ADDED})


def _tables(source: Dataset) -> Iterator[pa.Table]:
    yield from source.with_format("arrow").iter(batch_size=_BATCH)


def _rows(source: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    names = [name for name in COLUMNS if name in source.column_names]
    start = 0
    for table in _tables(source):
        yield from enumerate(table.select(names).to_pylist(), start)
        start += len(table)


def _keys(seed: int, use: str, name: str) -> NDArray[np.uint64]:
    """Return eight numbers drawn by seed, use and id."""
    text = f"{seed} {use} {name}".encode("utf-8", "surrogatepass")
    return np.frombuffer(hashlib.blake2b(text, digest_size=64).digest(), "<u8")


def _with_none(options: list[str], right: int, replaced: str, keys: NDArray[np.uint64]) -> list[str]:
    """Return options with a none answer in the place of the right one, or of a wrong one that is drawn."""
    place = right
    if replaced == "wrong":
        place = int(keys[1]) % (len(options) - 1)
        place += place >= right
    return [*options[:place], NONE_ANSWERS[int(keys[0]) % len(NONE_ANSWERS)], *options[place + 1 :]]


def build_qa_plus(
    source: Dataset,
    folder: str | Path,
    split: str,
    options: QAPlusOptions,
    media_root: str | Path | None = None,
    overwrite: bool = False,
) -> QAPlusSummary:
    """
    Write the QA+ rows of a data set as shards.

    Beside them come `qa_plus-SPLIT.json` with options and counts, and `left_out-SPLIT.jsonl` with a line for each row of
    which nothing was made, or in which no option can be replaced, and why. The same rows, options and seed give the same bytes.

    Args:
        source, options, media_root: as of [`Plan`].
        folder: where to write.
        split: the name of the shards.
        overwrite: replace the split that is there.

    Raises:
        QAPlusError: as of [`Plan`], and when the split is there already.
        ShardError: when the folder cannot be written, or another process is writing the split.
    """
    folder = Path(folder)
    _check_split_unused(folder, split, overwrite)  # before anything is read
    with hold_split(folder, split):
        _check_split_unused(folder, split, overwrite)  # another process may have been at its end
        scratch = folder / f".left_out-{split}.partial"
        try:
            with open(scratch, "w", encoding="utf-8") as file:
                plan = Plan(source, options, media_root, lambda *found: file.write(_line(*found)), split)
            summary = plan.summary
            files = replace_held_split(plan.tables(), plan.features.arrow_schema, folder, split, options.shard_rows)
            os.replace(scratch, folder / f"left_out-{split}.jsonl")
        finally:
            scratch.unlink(missing_ok=True)
        summary.files = [path.name for path in files]
        described = {"options": asdict(options), "none_answers": digest(NONE_ANSWERS)[:16], **asdict(summary)}
        write_atomically(folder / f"qa_plus-{split}.json", json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    return summary


def _check_split_unused(folder: Path, split: str, overwrite: bool) -> None:
    if not overwrite and (there := shards_of(folder, split)):
        raise QAPlusError(f"{there[0]} is there already; name another folder, or replace the split with overwrite")


def _line(place: int, name: Any, reason: str, detail: str) -> str:
    entry = {"row": place, "id": None if name is None else str(name), "reason": reason, "detail": detail}
    return json.dumps(entry) + "\n"
