"""What every way of asking a data set has in common: which row is fed what, in which batches, and how it is scored."""

from __future__ import annotations

import copy
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

from maple_trl.evaluation.captions import CaptionRows
from maple_trl.evaluation.inputs import as_text, fed_columns
from maple_trl.evaluation.options import ALL, REQUIRED, EvalOptions, ScoringError
from maple_trl.metrics.clips import clips_of
from maple_trl.modalities import ModalityTag
from maple_trl.omni.errors import MediaError
from maple_trl.omni.prompt import PromptBuilder, RowError
from maple_trl.records.evaluations import EvaluationError


NO_SCORE, NO_REFERENCE = "no-score", "no-reference"
REASON = "reason"
"""What a scoring function may note beside a score of `None`: why there is none."""

Row = Mapping[str, Any]
Line = dict[str, Any]
"""One line of the table of results: a sample, or a question that was not asked and why."""


@dataclass(frozen=True)
class Batch:
    """Questions that pass the model together: rows by number, under one access."""

    number: int
    access: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """
    One sample.

    Attributes:
        text: the completion.
        finish: `"end"`, or `"length"` where it was cut.
        tokens: of the completion; `None` where nobody counted them.
        prompt_tokens: likewise.
        ids: the tokens themselves; `None` where they are not known.
        notes: what is special about it, beside the notes of its prompt.
    """

    text: str
    finish: str
    tokens: int | None
    prompt_tokens: int | None
    ids: list[int] | None = None
    notes: tuple[str, ...] = ()


class BaseEvaluator(ABC):
    """
    Asks and scores batch by batch; what is kept of it is the caller's business.

    A subclass says how prompts are answered (`_answers`), what was read of one (`_read`), and what else decides completions
    (`generation`).

    Args:
        builder ([`~maple_trl.omni.prompt.PromptBuilder`]):
            How rows become prompts; its own `modality_access` is not used.
        rows: with `prompt`, where they apply `image` or `images`, `video`, `audio`, `subtitle` and `tag`, and what `score` reads. A column
            `id`, where it names every row differently, decides the samples; else the row's number does. `tag` is what a
            question requires and is fed; where rows ask one question with several inputs, `required_tag` is what it
            requires, `tag` the row's input, and `question_id` the same for them (without such a column, they are the rows of
            a clip with the same `question` and `required_tag`). A caption is scored against what its clip's row for the
            signals that were fed says, see [`~maple_trl.evaluation.captions.CaptionRows`].
        score: a reward function with TRL's signature, whose scores lie in [0, 1]; `None` for what it cannot score.
        extract: the answer in a completion's text, or `None`.
        options: how questions are asked.

    Attributes:
        batches (`list[Batch]`): all work, in order; the same in every process.
        skipped (`list[Line]`): questions that are not asked under an access, for the row lacks a signal or is no prompt.
        generation (`dict`): what decides a completion beyond the prompt, as JSON values.

    Raises:
        EvaluationError: without a row, for a tag that is none, and when no row can be asked.
    """

    generation: dict[str, Any]

    def __init__(
        self,
        builder: PromptBuilder,
        rows: Sequence[Row],
        score: Callable[..., Sequence[float | None]],
        extract: Callable[[str], str | None],
        options: EvalOptions,
    ):
        self.family = builder.family
        self.loader = builder.loader
        self.template = builder.template
        self.rows = rows
        self.score, self.extract = score, extract
        self.options = options
        self._builders = {name: _with_access(builder, name) for name in (REQUIRED, ALL)}
        if not len(rows):
            raise EvaluationError("the data set holds no row")
        self.tags = [
            _tag(row, number, "required_tag" if row.get("required_tag") else "tag") for number, row in enumerate(rows)
        ]
        self.names = _names(rows)
        self.clips = clips_of(rows)
        self.questions = [self._question(number) for number in range(len(rows))]
        self.captions = CaptionRows(rows, self.clips)
        self.batches, self.skipped = self._plan()
        if not self.batches:
            first = self.skipped[0]
            raise EvaluationError(
                f"no row can be asked under access {', '.join(options.access)}: row {first['row']}: {first['detail']}"
            )

    def run(self, batch: Batch) -> list[Line]:
        """
        Ask and score one batch.

        Returns:
            a line per sample, and one for each row that could not be asked, in the order of rows and samples.

        Raises:
            EvaluationError: when a score is no number in [0, 1].
            ScoringError: when the scoring function fails.
        """
        found = {number: self._encode(number, batch.access) for number in batch.rows}
        answers = self._answers({n: prompt for n, prompt in found.items() if not isinstance(prompt, dict)}, batch)
        lines = {number: [found[number]] for number in batch.rows if number not in answers}
        lines |= {number: [given] for number, given in answers.items() if isinstance(given, dict)}
        samples = [(n, i, answer) for n in answers if n not in lines for i, answer in enumerate(answers[n])]
        scored = self._scored(
            [(n, answer) for n, _, answer in samples], [found[n].key for n, *_ in samples], batch.access
        )
        read = {number: self._read(found[number]) for number in answers if number not in lines}
        for (number, sample, answer), (score, reason, noted) in zip(samples, scored, strict=True):
            line = self._line(
                number,
                batch.access,
                "unscored" if score is None else "scored",
                sample=sample,
                completion=answer.text,
                answer=self.extract(answer.text),
                score=score,
                reason=reason,
                finish=answer.finish,
                completion_tokens=answer.tokens,
                prompt_tokens=answer.prompt_tokens,
                extra=noted,
                **read[number] | {"notes": [*read[number]["notes"], *answer.notes]},
            )
            lines.setdefault(number, []).append(line)
        return [line for number in batch.rows for line in lines[number]]

    @abstractmethod
    def _answers(self, prompts: Mapping[int, Any], batch: Batch) -> dict[int, list[Answer] | Line]:
        """Return the samples of each prompt by row, or the line that says why there are none."""

    @abstractmethod
    def _read(self, prompt: Any) -> dict[str, Any]:
        """Return the columns of a line that say what was read of a prompt."""

    # What is asked

    def _plan(self) -> tuple[list[Batch], list[Line]]:
        skipped: list[Line] = []
        chunks = []
        for place, access in enumerate(self.options.access):
            usable = []
            for number in range(len(self.rows)):
                try:
                    self._spec(number, access)
                    usable.append(number)
                except RowError as error:
                    lacking = access in list(ModalityTag) and self._is_prompt(number)
                    status, reason = ("lacking", "no-such-signal") if lacking else ("error", "invalid-row")
                    skipped.append(self._line(number, access, status, reason=reason, detail=str(error)))
            size = self.options.batch_size
            chunks += [(usable[i], place, access, tuple(usable[i : i + size])) for i in range(0, len(usable), size)]
        # By rows, then access: the clips of some rows are decoded once for all accesses.
        return [Batch(i, access, rows) for i, (_, _, access, rows) in enumerate(sorted(chunks))], skipped

    def _fed(self, number: int, access: str) -> tuple[PromptBuilder, Row]:
        """
        Return the builder and the row that feed a row what an access says, and ask what that is asked.

        Raises:
            RowError: when it cannot be asked.
        """
        if access in (REQUIRED, ALL):
            builder, row = self._builders[access], self.rows[number]
        else:
            builder, row = self._builders[REQUIRED], {**self.rows[number], "tag": access}
        return builder, builder.asked(row) if builder.rewords else row

    def _spec(self, number: int, access: str):
        builder, row = self._fed(number, access)
        return builder.spec(row)

    def _is_prompt(self, number: int) -> bool:
        """Return whether a row can be asked under any choice of signals."""
        row = self.rows[number]
        for tag in (None, "V", "A", "S"):
            try:
                self._builders[REQUIRED].spec(self._builders[REQUIRED].asked({**row, "tag": tag}))
                return True
            except RowError:
                continue
        return False

    def prefetch(self, batch: Batch) -> None:
        """Begin to decode a batch's media in the background."""
        calls = [self._fed(number, batch.access) for number in batch.rows]
        self.loader.prefetch([partial(builder.decode, row) for builder, row in calls])

    def _encode(self, number: int, access: str) -> Any:
        """Return a row's prompt, or the line (a `dict`) that says why there is none."""
        builder, row = self._fed(number, access)
        chosen = access not in (REQUIRED, ALL)
        try:
            prompt = builder.encode(row)
        except MediaError as error:
            # The file is whole and has no sound: it lacks the signal as a row without the field does.
            status = "lacking" if chosen and error.reason == "no-signal" else "error"
            return self._line(number, access, status, reason=error.reason, detail=error.detail, path=error.path)
        if chosen and "no-audio-track" in prompt.notes:
            return self._line(number, access, "lacking", reason="no-signal", detail="the file has no audio track")
        return prompt

    def _line(self, number: int, access: str, status: str, **values: Any) -> Line:
        row = self.rows[number]
        texts = {name: as_text(row.get(name)) for name in ("solution", "category")}
        try:
            spec = self._spec(number, access)
            fed = fed_columns(spec) | {"fed": ModalityTag.from_modalities(spec.fed).value if spec.fed else None}
        except RowError:
            fed = {}
        return {"id": self.names[number], "row": number, "tag": self.tags[number], **texts, **fed} | {
            "clip": self.clips[number],
            "question": self.questions[number],
            "benchmark": as_text(row.get("benchmark")),
            "access": access,
            "status": status,
            **values,
        }

    def _question(self, number: int) -> str:
        """Name the question that a row asks: the same for rows that ask it with several inputs."""
        row = self.rows[number]
        if row.get("question_id") not in (None, ""):
            return str(row["question_id"])
        if not row.get("required_tag") or self.clips[number] is None:
            return self.names[number]
        asked = row.get("question") or row.get("prompt")
        return json.dumps(
            [self.clips[number], self.tags[number], asked], ensure_ascii=False, sort_keys=True, default=str
        )

    def _scored(
        self, asked: list[tuple[int, Answer]], groups: list[str], access: str
    ) -> list[tuple[float | None, str | None, str | None]]:
        """Return of each sample its score, why there is none, and what the scoring function noted about it, as JSON."""
        found: list[tuple[float | None, str | None, str | None]] = [(None, NO_REFERENCE, None)] * len(asked)
        by_number = {number: self._row_to_score(number, access) for number, _ in asked}
        places = [i for i, (number, _) in enumerate(asked) if by_number[number] is not None]
        if places:
            # What a judge is told is what was asked.
            prompts = {number: self._fed(number, access)[1]["prompt"] for number, _ in asked}
            chosen = [
                (number, {**(by_number[number] or {}), "prompt": prompts[number]}, answer)
                for number, answer in (asked[i] for i in places)
            ]
            for i, scored in zip(places, self._scores(chosen, [groups[i] for i in places]), strict=True):
                found[i] = scored
        return found

    def _row_to_score(self, number: int, access: str) -> Row | None:
        """Return the row by which a completion is scored: its own, or of a caption that of the signals that were fed."""
        if access == REQUIRED or not self.captions.is_one(number):
            return self.rows[number]
        fed = self._spec(number, access).fed
        return self.captions.of(number, ModalityTag.from_modalities(fed)) if fed else self.rows[number]

    def _scores(
        self, asked: list[tuple[int, Row, Answer]], groups: list[str]
    ) -> list[tuple[float | None, str | None, str | None]]:
        rows = [row for _, row, _ in asked]
        names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
        columns = {name: [row.get(name) for row in rows] for name in names}
        messages = [
            answer.text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": answer.text}]
            for _, row, answer in asked
        ]
        columns["group_ids"] = groups
        if all(answer.ids is not None for *_, answer in asked):
            columns["completion_ids"] = [answer.ids for *_, answer in asked]
        noted: dict[str, list] = {}
        if _takes(self.score, "log_extra"):
            columns["log_extra"] = noted.__setitem__
        try:
            scores = self.score(prompts=[row["prompt"] for row in rows], completions=messages, **columns)
        except (Exception, SystemExit) as error:  # it is the user's, or asks a server: it can fail in any way
            raise ScoringError(f"the scoring function failed: {type(error).__name__}: {error}") from error
        if isinstance(scores, str | Mapping) or not isinstance(scores, Sized):
            raise EvaluationError(
                f"the scoring function gave {scores!r:.60} for {len(asked)} completions; it returns a list with a number or "
                "None for each"
            )
        for name, values in (("scores", scores), *noted.items()):
            if len(values) != len(asked):
                raise EvaluationError(f"the scoring function gave {len(values)} {name} for {len(asked)} completions")
        reasons = noted.pop(REASON, [None] * len(asked))
        found = []
        for i, (score, (number, *_)) in enumerate(zip(scores, asked, strict=True)):
            value = _checked_score(score, number)
            extra = {name: values[i] for name, values in noted.items() if values[i] is not None}
            text = json.dumps(extra, ensure_ascii=False, sort_keys=True, default=str) if extra else None
            found.append((value, (reasons[i] or NO_SCORE) if value is None else None, text))
        return found


def _with_access(builder: PromptBuilder, access: str) -> PromptBuilder:
    builder = copy.copy(builder)
    builder.modality_access = access
    return builder


def _tag(row: Row, number: int, field: str) -> str | None:
    try:
        return ModalityTag.parse(row[field]).value if row.get(field) else None
    except ValueError as error:
        raise EvaluationError(f"row {number}, field {field!r}: {error}") from None


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the rows' ids where they tell all rows apart, else their numbers."""
    ids = [row.get("id") for row in rows]
    usable = all(isinstance(name, str | int) and name != "" for name in ids) and len(set(map(str, ids))) == len(ids)
    return [str(name) for name in (ids if usable else range(len(ids)))]


def _checked_score(score: Any, number: int) -> float | None:
    if score is None:
        return None
    try:
        value = float(score)
    except (TypeError, ValueError):
        raise EvaluationError(f"row {number}: the scoring function gave {score!r}; a score is a number") from None
    if math.isnan(value):
        return None
    if not 0 <= value <= 1:
        raise EvaluationError(f"row {number}: the scoring function gave {value}; scores must lie in [0, 1]")
    return value


def _takes(function: Callable, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False
