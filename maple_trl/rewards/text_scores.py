"""How close a free text comes to the right one, in [0, 1]: by word errors, or by common words (ROUGE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

from maple_trl.metrics.answers import rouge_f1, word_error_rate, words


def word_error_score(answer: str, truth: str) -> float:
    """Return 1 - [`~maple_trl.metrics.answers.word_error_rate`], at least 0; for texts that are read off (OCR) or heard."""
    return max(0.0, 1.0 - word_error_rate(answer, truth))


def rouge_mean(answer: str, truth: str) -> float:
    """
    Return the mean of [`~maple_trl.metrics.answers.rouge_f1`]; for answers in sentences.

    ROUGE-2 counts where both texts have two words.
    """
    have_pairs = min(len(words(answer)), len(words(truth))) > 1
    return fmean(value for kind, value in rouge_f1(answer, truth).items() if have_pairs or kind != "rouge2")


TEXT_SCORES: Mapping[str, Callable[[str, str], float]] = {"wer": word_error_score, "rouge": rouge_mean}
"""Scores of an answer against a right text, by the name that jobs use."""


def text_score(name: str) -> Callable[[str, str], float]:
    """
    Return a score by its name.

    Raises:
        ValueError: for another name.
        ImportError: when the package that computes it is not installed.
    """
    if name not in TEXT_SCORES:
        raise ValueError(f"a score of texts must be one of {', '.join(TEXT_SCORES)}, got {name!r}")
    TEXT_SCORES[name]("one", "one")
    return TEXT_SCORES[name]
