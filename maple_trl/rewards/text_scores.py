"""How close a free text comes to the right one, in [0, 1]: by word errors, or by common words (ROUGE)."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any


_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return _WORD.findall(text.casefold())


def word_error_score(answer: str, truth: str) -> float:
    """
    Return 1 - the word error rate, at least 0; for texts that are read off (OCR) or heard.

    Case and punctuation do not count. Of a right text without a word, only the same text scores.
    """
    import jiwer

    said, right = words(answer), words(truth)
    if not right:
        return float(answer.strip() == truth.strip())
    return max(0.0, 1.0 - jiwer.wer(" ".join(right), " ".join(said)))


def rouge_mean(answer: str, truth: str) -> float:
    """
    Return the mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L; for answers in sentences.

    ROUGE-2 counts where both texts have two words.
    """
    said, right = words(answer), words(truth)
    if not right:
        return float(answer.strip() == truth.strip())
    names = ["rouge1", "rouge2", "rougeL"] if min(len(said), len(right)) > 1 else ["rouge1", "rougeL"]
    found = _rouge().score(truth, answer)
    return fmean(found[name].fmeasure for name in names)


class _Words:
    """What ROUGE compares; its own tokenizer knows ASCII letters alone."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


TEXT_SCORES: Mapping[str, Callable[[str, str], float]] = {"wer": word_error_score, "rouge": rouge_mean}
"""Scores of an answer against a right text, by the name that jobs use."""
_PACKAGES = {"wer": ("jiwer", "jiwer"), "rouge": ("rouge_score", "rouge-score")}


def text_score(name: str) -> Callable[[str, str], float]:
    """
    Return a score by its name.

    Raises:
        ValueError: for another name.
        ImportError: when the package that computes it is not installed.
    """
    if name not in TEXT_SCORES:
        raise ValueError(f"a score of texts must be one of {', '.join(TEXT_SCORES)}, got {name!r}")
    module, package = _PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        raise ImportError(f'{name!r} needs {package}: pip install "maple-trl[texts]"')
    return TEXT_SCORES[name]
