"""What is watched of the task `reasoning`: how far the think texts are right, before and after training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.reasoning import Reading, read_completion


BINS = 10
START_QUESTIONS, START_SAMPLES = 16, 1


Read = tuple[Reading, int, tuple[str, ...]]
"""A completion: how far it is right, its tokens, and its question's tier and number of steps."""


class Chains:
    """
    Think texts that are well formed and right step by step, at the start and at the last evaluation of a run.

    It reads what the evaluations sample anyway; before training it asks a few questions itself, outside of the cost.
    """

    ASKS = True

    def __init__(self, trainer: Any, measure: Callable[..., dict[str, Any]], cost: Any):
        self._tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self._last: list[Read] = []
        generate = trainer.generate_completions

        def told(rows: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Sequence[str | None]:
            texts = generate(rows, *args, **kwargs)
            self._last = [self._read(row, text or "") for row, text in zip(rows, texts, strict=True)]
            return texts

        trainer.generate_completions = told
        measure(START_QUESTIONS, START_SAMPLES)
        self._start = summary(self._last)

    def _read(self, row: Mapping[str, Any], text: str) -> Read:
        tokens = len(self._tokenizer(text)["input_ids"])
        return read_completion(text, row), tokens, (row["tier"], str(row["steps"]))

    def result(self) -> dict[str, Any]:
        return {"start": self._start, "after": summary(self._last)}


def summary(found: Sequence[Read]) -> dict[str, Any]:
    """
    Return shares over completions.

    `well_formed` is of all; `answered`, by tier and number of steps, are right answers; `plan`, `evidence`, `sums` and `hard` (each by its own, given what the text has written before) and
    `whole` are of the well-formed. `follows` is of those that are not right throughout: how many answer by the value that they
    wrote last, as an answer that is not read off the chain does once in eight. `lucky` is the share of right answers whose think
    text is not right; `first_error` counts think texts by the tenth of their length in which they first differ from the right one.
    """
    readings = [reading for reading, *_ in found]
    formed = [reading for reading in readings if reading.well_formed]
    right = [reading for reading in readings if reading.answered]
    errors = [0] * BINS
    for reading in readings:
        if reading.first_error is not None:
            errors[min(BINS - 1, int(reading.first_error * BINS))] += 1
    answered: dict[str, list[bool]] = {}
    for reading, _, names in found:
        for name in names:
            answered.setdefault(name, []).append(reading.answered)
    return {
        "completions": len(readings),
        "tokens": mean([float(tokens) for _, tokens, _ in found]),
        "well_formed": mean([reading.well_formed for reading in readings]),
        "plan": mean([reading.plan for reading in formed]),
        "evidence": mean([reading.evidence for reading in formed]),
        "sums": mean([step for reading in formed for step in reading.sums]),
        "hard": mean([step for reading in formed for step in reading.hard]),
        "whole": mean([reading.first_error is None for reading in formed]),
        "follows": mean([reading.follows for reading in formed if reading.first_error is not None]),
        "lucky": mean([reading.first_error is not None for reading in right]),
        "first_error": errors,
        "answered": {name: mean(values) for name, values in sorted(answered.items())},
    }


def mean(values: Sequence[float]) -> float | None:
    """Return a mean; `None` of nothing."""
    return statistics.fmean(values) if values else None


INSTRUMENTS: dict[str, type] = {"chains": Chains}
"""By the names that runs ask for them by."""
