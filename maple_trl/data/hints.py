"""
Hints for the rows of a data set (the hint mechanism of AVATAR, arXiv 2508.03100, section 4.1).

A teacher model that sees the whole problem says where to look, and not what the answer is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maple_trl.chat import ChatClient, ChatRequest
from maple_trl.data.hint_leaks import LEAKS, leaks_answer
from maple_trl.data.hint_options import HintError, HintOptions, HintSummary
from maple_trl.data.hint_prompts import SYSTEM, Problem, ProblemError, clean_hint, first_messages, next_messages
from maple_trl.data.record_files import TableError
from maple_trl.data.row_tables import SUFFIXES, RowTable
from maple_trl.locks import LockedError, held_file
from maple_trl.modalities import IMAGE_COLUMNS
from maple_trl.omni.media.loader import MediaError, MediaLimits, MediaLoader


__all__ = ["LEAKS", "HintError", "HintOptions", "HintSummary", "build_hints", "leaks_answer"]

HINT_COLUMN = "hint"
_SEEN = ("video", *IMAGE_COLUMNS)


def build_hints(
    input_file: str | os.PathLike,
    output_file: str | os.PathLike,
    client: ChatClient,
    options: HintOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> HintSummary:
    """
    Write a table with a column `hint`: text, or null where there is none.

    Rows that are not asked, or fail, keep the hint that they had.

    Each finished row is noted in `OUTPUT.progress.jsonl` at once, so that a run that was killed goes on where it was; with
    a cache in the client's options, no answer that had arrived is paid for twice either. Failed rows are asked again by
    the next run.

    Args:
        input_file, output_file (`str` or `os.PathLike`):
            `.parquet`, `.json` or `.jsonl`; may be the same. Rows need `prompt` and `solution`, and may have `options` and
            `video`. Of a table without the column `prompt`, which a template is to make, `question` is read. With a dry run nothing is written.
        client (`ChatClient`):
            The teacher.
        options (`HintOptions`, *optional*):
            What it is shown.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called with rows done and rows asked.

    Returns:
        `HintSummary`: what became of the rows.

    Raises:
        HintError: for tables and columns that are not as they must be, and when another process is writing the table;
            nothing has been sent then.
        ChatSetupError: when the client cannot work.
    """
    options = options or HintOptions()
    try:
        builder = _Builder(Path(input_file), Path(output_file), client, options)
        with builder.loader, nullcontext() if client.options.dry_run else builder.held_output():
            return builder.run(on_progress or (lambda *_: None))
    except LockedError as error:
        raise HintError(
            f"{output_file}: another process is writing it; wait for its end, or name another file"
        ) from error
    except TableError as error:
        raise HintError(str(error)) from error


@dataclass
class _Row:
    """A row that a hint is wanted for, and the conversation about it."""

    index: int
    problem: Problem
    key: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    hint: str | None = None
    leak: str | None = None
    failure: str | None = None
    detail: str = ""


class _Builder:
    def __init__(self, source: Path, target: Path, client: ChatClient, options: HintOptions):
        self.source, self.target, self.client, self.options = source, target, client, options
        if target.suffix not in SUFFIXES:
            raise HintError(f"{target}: a table is one of {', '.join(SUFFIXES)}")
        self.table = RowTable(source)
        self.progress_file = target.with_name(target.name + ".progress.jsonl")
        has_question = "prompt" not in self.table.columns and "question" in self.table.columns
        self.asked = "question" if has_question else "prompt"
        missing = [name for name in (self.asked, "solution", *options.columns) if name not in self.table.columns]
        if missing:
            raise HintError(f"{source} has no column {missing[0]!r}; its columns: {', '.join(self.table.columns)}")
        if (
            options.frames
            and not set(_SEEN) & set(self.table.columns)
            and not isinstance(self.table.column(self.asked)[0], list)
        ):
            raise HintError(
                f"{source} has no column 'video' to take {options.frames} frames from, nor 'image' or 'images'; leave frames at 0"
            )
        root = Path(options.media_root) if options.media_root is not None else source.parent
        try:
            self.loader = MediaLoader(root, MediaLimits(num_frames=max(1, options.frames)), cache_bytes=64 << 20)
        except (FileNotFoundError, ValueError) as error:
            raise HintError(str(error)) from error
        self.summary = HintSummary(rows=len(self.table))

    def held_output(self) -> AbstractContextManager[None]:
        """Keep others from the table and from the file of progress, whose rows they would pay for once more."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        return held_file(self.target.with_name(f".{self.target.name}.lock"))

    def run(self, on_progress: Callable[[int, int], None]) -> HintSummary:
        nothing: list[str | None] = [None] * len(self.table)
        former = self.table.column(HINT_COLUMN) if HINT_COLUMN in self.table.columns else nothing
        hints = [hint if isinstance(hint, str) and hint.strip() else None for hint in former]
        rows = self._rows(hints if self.options.only_missing else nothing)
        done = self._read_progress()
        waiting = []
        for row in rows:
            if row.key in done:
                row.hint, row.leak = done[row.key]
                self.summary.resumed += 1
            else:
                waiting.append(row)
        on_progress(len(rows) - len(waiting), len(rows))
        self._ask_all(waiting, on_progress, len(rows))
        for row in rows:
            if row.failure is None:  # what was not answered says nothing against the hint that the row had
                hints[row.index] = row.hint
            self.summary.hinted += row.hint is not None
            self.summary.refused.update([row.leak] if row.leak else [])
            self.summary.failed.update([row.failure] if row.failure else [])
        self.summary.usage = self.client.usage
        if not self.client.options.dry_run and self.summary.stopped is None:
            self.table.write(self.target, HINT_COLUMN, hints)
        return self.summary

    # Rows

    def _rows(self, hints: list[str | None]) -> list[_Row]:
        """Read the rows to ask for, all of them before anything is sent."""
        optional = [name for name in ("options", *_SEEN) if name in self.table.columns]
        names = list(dict.fromkeys([self.asked, "solution", *optional, *self.options.columns]))
        columns = {name: self.table.column(name) for name in names}
        rows = []
        for index in range(len(self.table)):
            if hints[index] is not None:
                self.summary.kept += 1
                continue
            if self.options.limit is not None and len(rows) >= self.options.limit:
                continue
            try:
                row = {name: values[index] for name, values in columns.items()}
                row.setdefault("prompt", row[self.asked])
                problem = Problem.from_row(row, self.options.columns)
            except ProblemError as error:
                raise HintError(f"{self.source}, row {index}: {error}") from error
            if problem is None:
                self.summary.skipped += 1
            elif self.options.frames and problem.video is None and not problem.images:
                raise HintError(
                    f"{self.source}, row {index}: field 'video' names no file to take {self.options.frames} frames from, nor is "
                    "there a picture; leave frames at 0 for rows without a video"
                )
            else:
                rows.append(_Row(index, problem, self._key(problem)))
        self.summary.asked = len(rows)
        return rows

    def _key(self, problem: Problem) -> str:
        """Digest all that the teacher is shown and its hints must be, to tell outcomes apart in the progress file."""
        chat, options = self.client.options, self.options
        content = [SYSTEM, chat.model, dict(chat.sampling), options.max_tries, options.max_words, options.frames]
        content += [problem.question, problem.solution, problem.extras]
        if not problem.segment.whole or problem.parts:  # keys of whole clips stay as they were
            content.append([problem.segment.part, problem.parts])
        shown = (problem.video, *problem.images) if options.frames else (None,)
        for path in (*shown, *(text for _, text in problem.extras)):
            try:
                status = os.stat(self.loader.resolve(path)) if path and len(path) < 1000 else None
                content.append([path, status and status.st_size, status and status.st_mtime_ns])
            except (MediaError, OSError):  # no file; the question itself will tell
                content.append(path)
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    # Asking

    def _ask_all(self, rows: list[_Row], on_progress: Callable[[int, int], None], total: int) -> None:
        finished = total - len(rows)
        for chunk in _chunks(rows, self.options.chunk):
            if self.summary.stopped:
                for row in chunk:
                    row.failure = "not-asked"
                continue
            self._ask(chunk)
            finished += len(chunk)
            on_progress(finished, total)
            failures = [row for row in chunk if row.failure not in (None, "dry-run")]
            if len(failures) == len(chunk) and finished < total:
                reasons = ", ".join(sorted({row.failure for row in failures}))
                self.summary.stopped = f"all {len(chunk)} rows of a chunk failed ({reasons}): {failures[0].detail}"

    def _ask(self, chunk: list[_Row]) -> None:
        """Ask for one chunk until every row has a hint, has been refused too often, or has failed."""
        for row in chunk:
            try:
                row.messages = first_messages(row.problem, self.options.max_words, self.loader, self.options.frames)
            except MediaError as error:
                row.failure, row.detail = f"media:{error.reason}", str(error)
        asking = [row for row in chunk if row.failure is None]
        for _ in range(self.options.max_tries):
            results = self.client.complete_many([ChatRequest(row.messages) for row in asking])
            refused = []
            for row, result in zip(asking, results, strict=True):
                row.leak = None
                if not result.ok:
                    row.failure, row.detail = result.reason, result.detail
                    continue
                if result.finish_reason == "length":  # what was cut is no hint, and may be thoughts about the answer
                    row.failure, row.detail = "truncated", "cut at the token limit; allow more tokens (max_tokens)"
                    continue
                hint, problem = clean_hint(result.text), row.problem
                row.leak = leaks_answer(hint, problem.question, problem.solution, max_words=self.options.max_words)
                if row.leak is None:
                    row.hint = hint
                else:
                    row.messages = next_messages(row.messages, hint, row.leak, self.options.max_words)
                    refused.append(row)
            asking = refused
        self._note([row for row in chunk if row.failure is None])
        for row in chunk:
            row.messages = []

    # Progress

    def _note(self, rows: list[_Row]) -> None:
        if not rows:
            return
        self.progress_file.parent.mkdir(parents=True, exist_ok=True)
        # A line that a killed run left unfinished must not swallow the next one, hence the line break in front.
        lines = (json.dumps({"key": row.key, "hint": row.hint, "refused": row.leak}) for row in rows)
        with open(self.progress_file, "a", encoding="utf-8") as file:
            file.write("".join(f"\n{line}" for line in lines) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_progress(self) -> dict[str, tuple[str | None, str | None]]:
        done = {}
        if self.progress_file.is_file():
            for line in self.progress_file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    done[entry["key"]] = (entry["hint"], entry["refused"])
                except (ValueError, KeyError, TypeError):
                    continue
        return done


def _chunks(rows: list[_Row], size: int) -> Iterator[list[_Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
