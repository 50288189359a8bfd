"""How far an answer is from the right one, where more is asked than whether it is right: counts, sets of letters, texts."""

from __future__ import annotations

import re
import unicodedata
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

HAN = "\u3005-\u3007\u3021-\u3029\u3038-\u303c\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of Chinese, which other languages use too, as the inside of a character class."""

UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ece\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa76\uaa7a-\uaa7f"  # Burmese
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
    "\u3031-\u3035\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana
    "\uff66-\uff9f\U0001aff0-\U0001b16f" + HAN
)
"""
Letters and signs of the scripts that put no spaces between words, as the inside of a character class: Thai, Lao, Burmese,
Khmer, kana and [`HAN`]. Their digits and punctuation are not among them.
"""

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
    """
    Return the words of a text, without case and punctuation.

    In a script without spaces between words ([`UNSPACED`]) each character is one, with the vowel and tone signs on it; its
    digits make numbers, as elsewhere. In other scripts signs belong to their word.
    """
    return _word().findall(unicodedata.normalize("NFC", text.casefold()))


@cache
def signs() -> str:
    """Return the vowel signs, tones and accents that belong to the letter before them, as the inside of a character class."""
    marks = (char for char in map(chr, range(0x300, 0x20000)) if unicodedata.category(char) in ("Mn", "Mc"))
    return "".join(char for char in marks if not "\ufe00" <= char <= "\ufe0f")  # which choose a glyph


@cache
def _word() -> re.Pattern[str]:
    return re.compile(rf"[{UNSPACED}][{signs()}]*|[^\W{UNSPACED}]+(?:[{signs()}]+[^\W{UNSPACED}]*)*")


def word_error_rate(told: str, truth: str) -> float:
    """
    Return the edits of words that lead from an answer to the truth, by words of the truth; it may pass 1.

    Case and punctuation do not count. In scripts without spaces between words, it is the rate of wrong characters (see
    [`words`]). Of a truth without a word, nothing but the same text is free of errors.

    Raises:
        ImportError: naming the extra with the package, where that is missing.
    """
    if not words(truth):
        return float(told.strip() != truth.strip())
    return float(_optional("jiwer", "a word error rate").wer(" ".join(words(truth)), " ".join(words(told))))


def rouge_f1(told: str, truth: str) -> dict[str, float]:
    """
    Return the F1 of shared words, of shared pairs of words, and of the longest common subsequence (ROUGE-1, -2, -L).

    Words are those of [`words`], not stemmed; case and punctuation do not count. Of a truth without a word, nothing but the
    same text scores.

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
