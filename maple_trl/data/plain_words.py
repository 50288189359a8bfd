"""Plain forms of text, for comparing what two texts say rather than how it is written."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from maple_trl.metrics.answers import HAN, UNSPACED, signs


# Letters of other scripts that look like Latin ones.
_SHAPES = str.maketrans(
    "АВСЕНІЈКМОРЅТХУавсеһіјкморѕтхуԁӏΑΒΕΖΗΙΚΜΝΟΡΤΥΧαβεικνορτυχ’‘‛´`“”„‐‑‒–—−",
    "ABCEHIJKMOPSTXYabcehijkmopstxydlABEZHIKMNOPTYXabeiknoptyx'''''\"\"\"------",
)
# Marks that are no accents: the vowels of Indian and South East Asian scripts, and the voicing of kana.
_LETTER_SIGN = re.compile(
    "[\u0900-\u109f\u1700-\u17ff\u1900-\u1aaf\u1b00-\u1c4f\u3099\u309a\ua800-\uabff\U00011000-\U00011fff]"
)
_UNSPACED_WORD = re.compile(f"[{UNSPACED}]")
_HAN_WORD = re.compile(f"[{HAN}]")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")

STOP_WORDS = frozenset(
    "a an the of to in on at is are was were be been it its this that these those and or for with by as from there their"
    " he she they his her has have had do does did".split()
)

# Such words of scripts without spaces; they and short replies are parts of other words, too.
STOP_CHARACTERS = frozenset("的了是在有不没沒否对對吗嗎吧呢也都就与與和之这這那")
_SHORT_REPLIES = frozenset(("はい", "いいえ", "ใช่", "ไม่", "ไม่ใช่"))

NO_LETTER_BEFORE = rf"(?<![^\W{UNSPACED}])"
NO_LETTER_BEHIND = rf"(?![^\W{UNSPACED}])"
"""Where a word may begin and end, as patterns; a character of a script without spaces is no part of another word."""

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_SMALL = {word: value for value, word in enumerate(_ONES)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_OTHERS = {"once": "1", "twice": "2", "thrice": "3", "dozen": "12", "half": "0.5"}


def same_shapes(text: str) -> str:
    """Return `text` in compatibility form, without accents and invisible characters, look-alikes as Latin letters."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf") or _LETTER_SIGN.match(c))
    return unicodedata.normalize("NFKC", text).translate(_SHAPES)


def plain(text: str) -> str:
    """Return [`same_shapes`] of a text without case, white space as single blanks."""
    return " ".join(same_shapes(same_shapes(text).casefold()).split())


def words(text: str) -> list[str]:
    """
    Return the words of a text in plain form; numbers in digits, also where they were written in English words.

    In a script without spaces each character is a word, with the signs on it.
    """
    return _with_digits([_canonical(word) for word in _word().findall(plain(text))])


@cache
def _word() -> re.Pattern[str]:
    letters = rf"[^\W\d_{UNSPACED}]+(?:[{signs()}]+[^\W\d_{UNSPACED}]*)*"
    number = rf"\d+(?:[.,]\d+)*(?:e[+-]?\d+(?![^\W_{UNSPACED}]))?"
    return re.compile(rf"{number}|[{UNSPACED}][{signs()}]*|{letters}(?:'{letters})*")


def tells(word: str) -> bool:
    """
    Return whether a word of [`words`] says something where it stands apart from the others of its text.

    Stop words do not, nor does a single letter of a script that has no spaces; a character of Chinese is a word, or most of one.
    """
    if _UNSPACED_WORD.match(word):
        return _HAN_WORD.match(word) is not None and word not in STOP_CHARACTERS
    return word not in STOP_WORDS


def is_common(found: list[str]) -> bool:
    """Return whether [`words`] are one short text that stands within many words of a script without spaces, such as `是` or `はい`."""
    alone = len(found) == 1 and _UNSPACED_WORD.match(found[0]) and not _HAN_WORD.match(found[0])
    return bool(alone) or STOP_CHARACTERS.issuperset(found) or "".join(found) in _SHORT_REPLIES


def stems(texts: Iterable[str]) -> list[str]:
    """Strip English plural and verb endings; crude, and the same for both sides of a comparison."""
    return [_stem(word) for word in texts]


def number_value(text: str) -> float | None:
    """Return the finite value of a text that is one number, in digits or English words; `None` for other text."""
    found = words(text)
    if len(found) != 1 or not found[0][0].isdigit():
        return None
    try:
        value = float(found[0])
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _canonical(word: str) -> str:
    """Rewrite a number: `1,200` -> `1200`, `12.50` -> `12.5`, `3,5` -> `3.5`; other words stay as they are."""
    if not word[0].isdigit():
        return word
    text = word.replace(",", "") if _THOUSANDS.fullmatch(word) else word.replace(",", ".")
    try:
        value = float(text)
    except ValueError:  # a date or a version: 1.2.3
        return text
    return repr(int(value)) if math.isfinite(value) and value.is_integer() and value < 1e15 else repr(value)


def _with_digits(found: list[str]) -> list[str]:
    """Join runs of number words to one number: `twenty`, `one` -> `21`; two numbers in a row stay two."""
    result: list[str] = []
    total, current = 0, None

    def end_run() -> None:
        nonlocal total, current
        if current is not None or total:
            result.append(str(total + (current or 0)))
        total, current = 0, None

    for word in found:
        if word in _SCALES:
            current = (1 if current is None else current) * _SCALES[word]
            if current >= 1000:
                total, current = total + current, None
        elif word in _SMALL:
            value = _SMALL[word]
            after_tens = bool(current) and current % 10 == 0 and current % 100 > 10
            after_hundreds = bool(current) and current % 100 == 0
            if current is None or (value and (after_hundreds or (after_tens and value < 10))):
                current = (current or 0) + value
            else:
                end_run()
                current = value
        elif word == "and" and (total or (current or 0) >= 100):
            continue
        else:
            end_run()
            result.append(_OTHERS.get(word, word))
    end_run()
    return result


def _stem(word: str) -> str:
    word = word.removesuffix("'s")
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word.removesuffix(ending)
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word
