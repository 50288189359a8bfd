"""Scores of answers by the metric that each row names: a benchmark's own, where it is more than right or wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import ascii_letters
from typing import Any

from maple_trl.metrics.answers import ANSWER_METRICS, count_measures, rouge_f1, set_f1, word_error_rate
from maple_trl.rewards.answers import (
    ANSWER_FORMATS,
    completion_text,
    grade_answer,
    number,
    row_options,
    solution_text,
    without_wide_forms,
)
from maple_trl.rewards.judge import OpenAIJudge
from maple_trl.rewards.text_scores import rouge_mean, word_error_score


METRIC_COLUMN = "answer_metric"

_FIRST_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_BETWEEN = re.compile(r"[\s,;/&+|.:()\[\]{}*$\"'`]+")
_LED = re.compile(r"\s*\(?(?:([A-Z])[.):]|([a-z])[.):](?=\s)|([A-Z])\s*$)")  # not of "e.g."
_PARTS = re.compile(r"[,;\n]+|\b(?:and|or)\s+(?=\(?[A-Za-z][.):])")

Measured = tuple[float | None, dict[str, float]]
"""A score in [0, 1], or `None` where there is none; and what else was measured, by name."""


def told_number(answer: str | None) -> float | None:
    """Return the first number in an answer (`4`, `1,200`, `about 4 times`); `None` where it has none."""
    found = None if answer is None else number(answer)
    if found is None and answer is not None and (match := _FIRST_NUMBER.search(answer)):
        found = float(match[0].replace(",", ""))
    return found


def told_letters(answer: str | None) -> frozenset[str]:
    """Return the letters that an answer lists: alone (`A, C and F`), or each before its text (`A. happy, C. calm`)."""
    told = without_wide_forms(answer or "")
    words = [word for word in _BETWEEN.split(told) if word and word.lower() not in ("and", "or")]
    if all(len(word) == 1 and word in ascii_letters for word in words):
        return frozenset(word.upper() for word in words)
    led = [_LED.match(part) for part in _PARTS.split(told) if part.strip()]
    return frozenset(match[match.lastindex].upper() for match in led if match) if led and led[0] else frozenset()


def _counted(answer: str | None, truth: str) -> Measured:
    right = told_number(truth)
    if right is None:
        return None, {}
    found = count_measures(told_number(answer), right)
    return found["ACC"], found


def _lettered(answer: str | None, truth: str) -> Measured:
    told, right = told_letters(answer), told_letters(truth)
    found = {"F1": set_f1(told, right), "exact": float(told == right)}
    return (found["F1"], found) if right else (None, {})


def _transcribed(answer: str | None, truth: str) -> Measured:
    return word_error_score(answer or "", truth), {"WER": word_error_rate(answer or "", truth)}


def _overlapping(answer: str | None, truth: str) -> Measured:
    return rouge_mean(answer or "", truth), rouge_f1(answer or "", truth)


_MEASURES: Mapping[str, Callable[[str | None, str], Measured]] = {
    "counting": _counted,
    "letters_f1": _lettered,
    "word_error_rate": _transcribed,
    "rouge": _overlapping,
}


def check_metrics(metrics: Iterable[Any]) -> set[str]:
    """
    Check what rows name as their metric, and that what measures it is installed.

    Returns:
        the metrics that are named.

    Raises:
        ValueError: for a name that is none, with the row.
        ImportError: naming the extra that brings a package.
    """
    found: set[str] = set()
    for row, metric in enumerate(metrics):
        if metric is not None and metric not in ANSWER_METRICS:
            raise ValueError(
                f"row {row}, field '{METRIC_COLUMN}': must be one of {', '.join(ANSWER_METRICS)}, got {metric!r}"
            )
        found |= {metric} - {None}
    for metric in found & {"word_error_rate", "rouge"}:
        _MEASURES[metric]("one", "one")
    return found


class MeasuredReward:
    """
    A reward function that scores each answer by the metric that its row names in the column `answer_metric`.

    - `accuracy`, or none: as [`~maple_trl.rewards.accuracy_reward`];
    - `counting`: 1 for the exact count; `ACC`, `OBOA`, `MAE` and whether there was a number (`answered`);
    - `letters_f1`: `F1` of the letters, and whether all were right (`exact`);
    - `word_error_rate`: `1 - WER`, not below 0; `WER`;
    - `rouge`: the mean of `rouge1`, `rouge2` (where both texts have two words) and `rougeL`;
    - `judge`: the judge's verdict (`judged`); without a judge there is no score, and the reason is `no-judge`.

    What is measured is noted by `log_extra`, as the column `measures`.

    Args:
        answer_format (`str`): how a completion marks its answer, as in [`~maple_trl.rewards.accuracy_reward`].
        judge ([`OpenAIJudge`], *optional*): of open answers.
    """

    __name__ = "measured_reward"
    required_columns = ("solution",)

    def __init__(self, answer_format: str = "tags", judge: OpenAIJudge | None = None):
        self.extract = ANSWER_FORMATS[answer_format]
        self.answer_format = answer_format
        self.judge = judge

    def __call__(
        self,
        prompts: list | None = None,
        completions: list[str] | list[list[dict[str, Any]]] = None,
        completion_ids: list[list[int]] | None = None,
        *,
        solution: list,
        options: list | None = None,
        choices: list | None = None,
        answer_metric: list | None = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score completions; see the class."""
        count = len(completions)
        metrics = [metric or "accuracy" for metric in answer_metric or [None] * count]
        columns |= {"solution": solution, "options": options, "choices": choices}
        judged, told = self._judged(metrics, prompts, completions, columns, log_metric)
        answers = [self.extract(completion_text(completion)) for completion in completions]
        texts = row_options(options, choices, count)
        found: list[Measured] = [
            judged.get(i, (None, {})) if metric == "judge" else measure(metric, answer, solution[i], texts[i])
            for i, (metric, answer) in enumerate(zip(metrics, answers, strict=True))
        ]
        if log_extra is not None:
            log_extra("measures", [json.dumps(measures) if measures else None for _, measures in found])
            unjudged = [metric == "judge" and self.judge is None for metric in metrics]
            log_extra("reason", ["no-judge" if missing else None for missing in unjudged])
            for name, values in told.items():
                log_extra(name, values)
        return [score for score, _ in found]

    def _judged(
        self, metrics: Sequence[str], prompts: Any, completions: Any, columns: Mapping[str, Any], log_metric: Any
    ) -> tuple[dict[int, Measured], dict[str, list]]:
        """Ask the judge about the completions that are for it; return their scores by number, and what it noted."""
        places = [i for i, metric in enumerate(metrics) if metric == "judge"]
        if self.judge is None or not places:
            return {}, {}
        noted: dict[str, list] = {}
        rows = {
            name: [values[i] for i in places] if isinstance(values, list) and len(values) == len(metrics) else values
            for name, values in {**columns, "prompts": prompts, "completions": completions}.items()
            if values is not None
        }
        scores = self.judge(**rows, log_metric=log_metric, log_extra=noted.__setitem__)
        by_place = {
            i: (score, {} if score is None else {"judged": float(score)})
            for i, score in zip(places, scores, strict=True)
        }
        return by_place, {name: _at(places, values, len(metrics)) for name, values in noted.items()}


def measure(metric: str, answer: str | None, solution: Any, options: Any = None) -> Measured:
    """
    Measure one answer.

    Args:
        metric: one of [`~maple_trl.metrics.answers.ANSWER_METRICS`] but `judge`.
        answer: what was read out of the completion; `None` where it holds none.
        solution: the row's.
        options: the row's, for `accuracy`.
    """
    if metric == "accuracy":
        return grade_answer(answer, solution, options), {}
    truth = solution_text(solution)
    return (None, {}) if truth is None else _MEASURES[metric](answer, truth)


def _at(places: Sequence[int], values: Sequence[Any], count: int) -> list[Any]:
    by_place = dict(zip(places, values, strict=True))
    return [by_place.get(i) for i in range(count)]
