"""Options of a question as rows hold them: texts or numbers, with or without their letters, padded to one length in some tables."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any


# As rewards tell the letter of an option from its text (`maple_trl.rewards.answers.option_texts`).
_LETTERED = re.compile(
    r"\s*(?:[(（]([A-Za-zＡ-Ｚａ-ｚ])[)）](?:\s*[.．。、:：])?|([A-Za-zＡ-Ｚａ-ｚ])\s*[.)．。、）:：])\s*(\S.*)",
    re.DOTALL,
)


def plain_options(options: Sequence[Any]) -> list[Any]:
    """Return options with numbers as their texts, and without what pads their list at its end: `None`, NaN, blank texts."""
    texts = [_as_text(option) for option in options]
    while texts and is_no_option(texts[-1]):
        texts.pop()
    return texts


def _as_text(option: Any) -> Any:
    """Return a number as its text, a whole one without a point, as tables make 3.0 of 3; anything else as it is."""
    if not isinstance(option, int | float) or is_no_option(option):
        return option
    return str(int(option) if isinstance(option, float) and option.is_integer() else option)


def is_no_option(option: Any) -> bool:
    """Return whether what stands in a list of options is none: `None`, NaN, or a blank text."""
    is_nan = isinstance(option, float) and math.isnan(option)
    return option is None or is_nan or (isinstance(option, str) and not option.strip())


def bare_options(texts: Sequence[str]) -> list[str]:
    """Return options without their letters, where every one has its own, in order (`A. red`, `(A)red`, `A : red`, `A、红`); else as they are."""
    found = [_LETTERED.fullmatch(text.strip()) for text in texts]
    letters = [unicodedata.normalize("NFKC", match[1] or match[2]).upper() if match else None for match in found]
    if len(texts) < 2 or letters != list(ascii_uppercase[: len(texts)]):
        return list(texts)
    return [match[3] for match in found if match]
