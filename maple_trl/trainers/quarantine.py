"""Rows whose media cannot be used: named, counted, written down, and replaced."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from datasets import Dataset
from tqdm.auto import tqdm

from maple_trl.modalities import Modality
from maple_trl.omni.errors import MediaError
from maple_trl.omni.prompt import PromptBuilder, PromptSpec, RowError


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuarantinedRow:
    """A row that is left out of training, and why."""

    row: int
    key: str
    reason: str
    path: str | None
    detail: str


class RowRegistry:
    """
    Knows every row of a data set by its prompt's key, and which rows are in quarantine.

    Args:
        dataset: rows with the columns that [`PromptBuilder`] reads.
        probe: open every media file once (headers only) and quarantine rows whose files cannot be used.

    Raises:
        RowError: for the first row that cannot be a prompt, with its number and field.
        ValueError: when no row is left.
    """

    def __init__(self, dataset: Dataset, builder: PromptBuilder, probe: bool = True, progress: bool = True):
        self.dataset = dataset
        self.builder = builder
        self.quarantined: dict[str, QuarantinedRow] = {}
        specs = []
        for i, row in enumerate(tqdm(dataset, desc="Checking rows", disable=not progress, leave=False)):
            try:
                specs.append(builder.spec(row))
            except RowError as error:
                raise RowError(f"row {i} of the data set: {error}") from error
        self._keys = [spec.key for spec in specs]
        self._first_row = {key: i for i, key in reversed(list(enumerate(self._keys)))}
        if probe:
            self._probe({spec.key: spec for spec in specs}, progress)
        if not self.usable_rows():
            raise ValueError(f"No usable row is left: {self.summary()}")

    def _probe(self, specs: dict[str, PromptSpec], progress: bool) -> None:
        files = sorted({file for spec in specs.values() for file in (*spec.videos, *spec.audios)})

        def probe(file: str):
            try:
                return self.builder.loader.probe(file)
            except MediaError as error:
                return error

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            probed = tqdm(
                pool.map(probe, files), total=len(files), desc="Probing media", disable=not progress, leave=False
            )
            outcome = dict(zip(files, probed, strict=True))
        for key, spec in specs.items():
            error = next(
                (outcome[f] for f in (*spec.videos, *spec.audios) if isinstance(outcome[f], MediaError)), None
            )
            if error is None and spec.fed == {Modality.AUDIO} and not any(outcome[f].has_audio for f in spec.audios):
                error = MediaError("no-signal", spec.audios[0], "the row is fed audio alone and the file has none")
            if error is not None:
                self.add(key, error)

    def add(self, key: str, error: MediaError) -> None:
        """Puts the rows of a prompt into quarantine."""
        row = self._first_row[key]
        if key not in self.quarantined:
            self.quarantined[key] = QuarantinedRow(row, key, error.reason, error.path, error.detail)
            logger.warning("Row %d is quarantined: %s", row, error)

    def restore(self, rows: list[QuarantinedRow]) -> None:
        """Puts rows of this data set back into quarantine, as a resumed run left them."""
        self.quarantined |= {row.key: row for row in rows if row.key in self}

    def usable_rows(self) -> list[int]:
        """Row numbers that are not in quarantine, in order."""
        return [i for i, key in enumerate(self._keys) if key not in self.quarantined]

    def substitute(self, key: str) -> dict:
        """The next usable row after a quarantined one; every rank finds the same."""
        start = self._first_row[key]
        for i in [*range(start + 1, len(self._keys)), *range(start)]:
            if self._keys[i] not in self.quarantined:
                return self.dataset[i]
        raise ValueError(f"No usable row is left: {self.summary()}")

    def row_of(self, key: str) -> dict:
        """A row with this prompt."""
        return self.dataset[self._first_row[key]]

    def __contains__(self, key: str) -> bool:
        return key in self._first_row

    def summary(self) -> str:
        """Counts by reason, e.g. `3 rows quarantined (2 unreadable, 1 empty-file)`."""
        counts = Counter(row.reason for row in self.quarantined.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        return f"{len(self.quarantined)} rows quarantined" + (f" ({reasons})" if reasons else "")


def write_quarantine(path: str, rows: list[QuarantinedRow]) -> None:
    """Writes the list as JSON, replacing the file in one step."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump([asdict(row) for row in rows], file, indent=2, ensure_ascii=False)
    os.replace(f"{path}.part", path)


def read_quarantine(path: str) -> list[QuarantinedRow]:
    """What [`write_quarantine`] wrote; nothing where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [QuarantinedRow(**row) for row in json.load(file)]
