"""How far an answer is from the right one, where more is asked than whether it is right: counts, sets of letters, texts."""

from __future__ import annotations

import re
from collections.abc import Set
from functools import cache
from importlib import import_module
from typing import Any


ANSWER_METRICS = ("accuracy", "counting", "letters_f1", "word_error_rate", "rouge", "judge")
"""
What a row's column `answer_metric` may name: right or wrong; a count; several letters; a transcript; free text; free text that a
model judges.
"""

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")

_WORD = re.compile(r"\w+")
_EXACT = 1e-5
_CAP = 100.0  # an error up to it is never capped


def count_measures(told: float | None, truth: float) -> dict[str, float]:
    """
    Measure a count as CG-AV-Counting does (arXiv 2506.05328).

    `ACC` is whether it is exact, `OBOA` whether it is off by at most one, `MAE` its absolute error. An error above
    `max(2 truth, 100)` counts as `2 truth`, so that one wild number does not decide a mean. An answer without a number is
    neither exact nor near, and its error is that of 0.

    Args:
        told: the number that the answer names; `None` where it names none.
        truth: the right one.
    """
    error = abs((told or 0.0) - truth)
    return {
        "ACC": float(told is not None and error <= _EXACT),
        "OBOA": float(told is not None and error <= 1 + _EXACT),
        "MAE": error if error <= max(2 * truth, _CAP) else abs(2 * truth),
        "answered": float(told is not None),
    }


def set_f1(told: Set[Any], truth: Set[Any]) -> float:
    """Return the harmonic mean of precision and recall of a set; 0 where both are empty."""
    total = len(told) + len(truth)
    return 2 * len(told & truth) / total if total else 0.0


def words(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return _WORD.findall(text.casefold())


def word_error_rate(told: str, truth: str) -> float:
    """
    Return the edits of words that lead from an answer to the truth, by words of the truth; it may pass 1.

    Case and punctuation do not count. Of a truth without a word, nothing but the same text is free of errors.

    Raises:
        ImportError: naming the extra with the package, where that is missing.
    """
    if not words(truth):
        return float(told.strip() != truth.strip())
    return float(_optional("jiwer", "a word error rate").wer(" ".join(words(truth)), " ".join(words(told))))


def rouge_f1(told: str, truth: str) -> dict[str, float]:
    """
    Return the F1 of shared words, of shared pairs of words, and of the longest common subsequence (ROUGE-1, -2, -L).

    Words are not stemmed; case and punctuation do not count. Of a truth without a word, nothing but the same text scores.

    Raises:
        ImportError: naming the extra with the package, where that is missing.
    """
    if not words(truth):
        return dict.fromkeys(ROUGE_KINDS, float(told.strip() == truth.strip()))
    found = _rouge_scorer().score(truth, told)
    return {kind: float(found[kind].fmeasure) for kind in ROUGE_KINDS}


class _Words:
    """What ROUGE compares; its own tokenizer knows ASCII letters alone."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _rouge_scorer() -> Any:
    return _optional("rouge_score.rouge_scorer", "ROUGE").RougeScorer(list(ROUGE_KINDS), tokenizer=_Words())


def _optional(module: str, purpose: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {module.split('.')[0]}, which is not installed: pip install 'maple-trl[texts]'"
        ) from error
