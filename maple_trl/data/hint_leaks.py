"""Does a hint give the answer away? Plain strings in, a reason out."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from string import ascii_letters, ascii_uppercase
from typing import Any

from maple_trl.data.plain_words import (
    NO_LETTER_BEFORE,
    NO_LETTER_BEHIND,
    is_common,
    number_value,
    plain,
    same_shapes,
    stems,
    tells,
    words,
)
from maple_trl.metrics.answers import UNSPACED, signs


LEAKS: dict[str, str] = {
    "empty": "it has no words",
    "too-long": "it is longer than {max_words} words",
    "markup": "it holds a tag such as <answer> or <think>, a \\boxed{{…}}, or a special token",
    "names-option": "it names an option by its letter or position",
    "option-text": "it holds the text of the right option, or the words that set it apart",
    "number": "it holds the number that is the answer, in digits or words",
    "answer-text": "it holds the answer, or the words that it consists of",
}
"""Why a hint is refused: the closed list of what [`leaks_answer`] returns, as the teacher is told."""

CHARACTERS_PER_WORD = 15
_MAX_LISTS = 50  # places looked at, from the end, where a row of options may begin

_MARKUP = re.compile(
    r"<\s*/?\s*(?:answer|think|hint|data-)|<\s*\||\|\s*>|\\boxed|<\s*/?\s*(?:im_|s\s*>)", re.IGNORECASE
)
_WRAPPED = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?|([A-Za-z])\)")
_LETTER_AND_TEXT = re.compile(
    rf"(?:\(([A-Za-z])\)[.:]?|([A-Za-z])(?:[.)]|\s?:))(?:\s+|(?=[{UNSPACED}]))(\S.*)", re.DOTALL
)
_CAPITAL = re.compile(r"[A-Z]")
# The wide forms of East Asian texts, which need no space behind them, in those above.
_WIDE_LETTERS = {chr(ord(letter) + 0xFEE0): letter for letter in ascii_letters}
_WIDE_FORMS = str.maketrans(
    _WIDE_LETTERS | dict.fromkeys("．。、", ".") | {"（": "(", "）": ")", "：": ":", "，": ","}
)
_OPTION_MARK = re.compile(
    r"(?:^|(?<=[\s。？！；：]))[(\[（［【]?([A-ZＡ-Ｚ])"
    rf"(?:[.):\]]+(?:\s+|(?=[{UNSPACED}]))|[．。、：）］】]+[.:]?\s*|"
    r"(?<=^[A-Z])[ \u00a0\u202f]:\s+)",  # French sets a space before the colon; within a line it may be who speaks
    re.MULTILINE,
)

_KIND = r"(?:option|choice|alternative)"
_PLACE = r"(?:first|second|third|fourth|fifth|sixth|last|final|middle|1st|2nd|3rd|[4-9]th)"
_KINDS_ELSEWHERE = same_shapes("选项|選項|选择|選擇|选|選|答案|答え|正解|選択肢|คำตอบ|ตัวเลือก|ข้อ")
_NUMBER = r"(?:[1-9]|one|two|three|four|five|six)"
_BY_POSITION = re.compile(
    rf"\b{_PLACE}\s+{_KIND}\b|\b{_KIND}\s*(?:number|no\.?|#)?\s*{_NUMBER}\b|\banswer\s+(?:number|no\.?|#)\s*{_NUMBER}\b"
    rf"|\b{_PLACE}\s+of\s+the\s+(?:\w+\s+)?(?:{_KIND}|answer)s\b",
    re.IGNORECASE,
)


def leaks_answer(hint: str, prompt_text: str, solution: Any, *, max_words: int = 60) -> str | None:
    """
    Return why a hint must not be given, or `None`.

    Compared are plain forms: compatibility and look-alike characters, case, accents, white space, hyphens between the
    letters of a word, plural and verb endings, and numbers in digits or English words make no difference. A paraphrase
    in other words, or in another language, is not found.

    In scripts without spaces between words (Han, kana, Thai, Lao, Khmer, Burmese) an answer is found wherever its characters
    stand one behind the other. What sets an option apart are, of these, its Han characters alone. Short replies that are parts of
    many words (`是`, `はい`) must stand apart. Numbers in words and options named by their position are known in English alone.

    Args:
        hint (`str`):
            The hint.
        prompt_text (`str`):
            The question as the student reads it, with its options (`A. …`, `(A) …`) where it has any.
        solution (`Any`):
            An option (`"B"`, `"(B)"`, `"B. text"`, `"B、text"`), several (`"A,C"`), a number or its text, or any other text; as the
            accuracy reward takes it.
        max_words (`int`, *optional*, defaults to 60):
            Longest hint; at most 15 characters a word count.

    Returns:
        `str` or `None`: a key of [`LEAKS`]. Any option that is named counts, not only the right one: a hint that rules
        out the others names it, too.
    """
    if not re.search(r"[^\W_]", hint):
        return "empty"
    if len(hint.split()) > max_words or len(hint) > max_words * CHARACTERS_PER_WORD:
        return "too-long"
    if _MARKUP.search(same_shapes(hint)):
        return "markup"
    reasons = (_leak(hint, problem) for problem in _Problem.read_each(prompt_text, solution))
    return next((reason for reason in reasons if reason is not None), None)


def _leak(hint: str, problem: _Problem) -> str | None:
    if problem.letter is not None and _names_option(hint, problem.letters):
        return "names-option"
    if problem.number is not None and _holds_number(hint, problem.number):
        return "number"
    if problem.text and _holds_text(hint, problem):
        return "answer-text" if problem.letter is None else "option-text"
    return None


@dataclass
class _Problem:
    """Question and answer taken apart; `letter` is `None` where the answer is no option."""

    question: str
    options: dict[str, str]
    letter: str | None
    text: str
    number: float | None

    @property
    def letters(self) -> str:
        return "".join(sorted({*(self.options or "ABCD"), self.letter}))

    @classmethod
    def read_each(cls, prompt_text: str, solution: Any) -> list[_Problem]:
        """Read one problem, or of a solution of several letters (`A,C`) one for each, of whose options the other right ones are none."""
        question, options = split_options(prompt_text)
        text = str(solution).strip()
        wrapped = _WRAPPED.fullmatch(text)
        letters = re.split(r"\s*[,，、]\s*", (wrapped[1] if wrapped else text).strip())
        if len(letters) < 2 or not all(map(_CAPITAL.fullmatch, letters)) or (options and set(letters) - set(options)):
            return [cls.read(prompt_text, solution)]
        wrong = {letter: option for letter, option in options.items() if letter not in letters}
        texts = [options.get(letter, "") for letter in letters]
        return [
            cls(question, {**wrong, letter: text} if options else {}, letter, text, number_value(text))
            for letter, text in zip(letters, texts, strict=True)
        ]

    @classmethod
    def read(cls, prompt_text: str, solution: Any) -> _Problem:
        question, options = split_options(prompt_text)
        text = (
            "" if solution is None or (isinstance(solution, float) and math.isnan(solution)) else str(solution).strip()
        )
        wrapped = _WRAPPED.fullmatch(text)
        text = wrapped[1].strip() if wrapped else text
        marked = text.translate(_WIDE_FORMS)  # of the same length
        alone, both = _LETTER.fullmatch(marked), _LETTER_AND_TEXT.fullmatch(marked)
        letter = None
        if alone:
            letter = (alone[1] or alone[2]).upper()
            text = options.get(letter, "")
        elif both:
            letter, text = (both[1] or both[2]).upper(), text[both.start(3) :]
        elif text:
            letter = next((name for name, option in options.items() if plain(option) == plain(text)), None)
        return cls(question, options, letter, text, number_value(text))


def split_options(prompt_text: str) -> tuple[str, dict[str, str]]:
    """
    Split a question into its text and its options by letter; none where no `A. … B. …` (or `A、…`) stands in it.

    The last such row counts, and the last option ends with its line.
    """
    marks = list(_OPTION_MARK.finditer(prompt_text))
    letters = [mark[1].translate(_WIDE_FORMS) for mark in marks]
    starts = [index for index, letter in enumerate(letters) if letter == "A"]
    for start in reversed(starts[-_MAX_LISTS:]):
        run = [marks[start]]
        for mark, letter in zip(marks[start + 1 :], letters[start + 1 :], strict=True):
            if ord(letter) == ord("A") + len(run):
                run.append(mark)
        if len(run) < 2:
            continue
        options, last_end = {}, run[-1].end()
        for letter, mark, following in zip(ascii_uppercase, run, [*run[1:], None], strict=False):
            if following is not None:
                options[letter] = prompt_text[mark.end() : following.start()].strip()
            else:
                line = prompt_text[mark.end() :].split("\n", 1)[0]
                options[letter], last_end = line.strip(), mark.end() + len(line)
        return prompt_text[: run[0].start()] + prompt_text[last_end:], options
    return prompt_text, {}


def _names_option(hint: str, letters: str) -> bool:
    text = same_shapes(hint)
    # "a" and "i" are words; alone they name an option only where a word could not stand.
    plain_letters = "".join(letters + letters.lower()).translate({ord("a"): None, ord("i"): None})
    article = "".join(char for char in "ai" if char.upper() in letters)
    letter = f"(?:[{plain_letters}]" + (rf"|[{article}](?=\s*(?:[.,;:!?)\]\"'*]|$)))" if article else ")")
    any_letter = f"[{letters}{letters.lower()}]"
    capitals = letters.replace("A", "").replace("I", "")
    kinds = r"(?:option|choice|alternative|letter|answer|candidate|solution|pick|choose|select)s?"
    verb = r"(?:is|are|was|be|to\s+be|would\s+be|must\s+be|should\s+be)"
    before, behind = rf"{NO_LETTER_BEFORE}(?<!')", rf"{NO_LETTER_BEHIND}(?!')"
    patterns = [
        rf"[(\[{{\"'*_`「『【〔]\s*{any_letter}\s*[)\]}}\"'*_`.」』】〕]",
        rf"(?:^|(?<=\s)){any_letter}[):]{NO_LETTER_BEHIND}",
        rf"^\W*{any_letter}\W*$",
        rf"{NO_LETTER_BEFORE}(?i:{kinds}){NO_LETTER_BEHIND}[\s:=\-\"'*(\[]*(?:(?i:{verb})\b)?[\s:=\-\"'*(\[]*"
        rf"{letter}{NO_LETTER_BEHIND}",
        rf"(?:{_KINDS_ELSEWHERE})(?:是|为|為|は|が|คือ)?[\s:=\-\"'*(\[「『【〔]*{any_letter}{NO_LETTER_BEHIND}",
        # Beside a character of a script without spaces, a single Latin letter is neither a word nor a part of one.
        rf"(?<=[{UNSPACED}]){any_letter}{behind}|{before}{any_letter}(?=[{UNSPACED}])",
    ]
    if capitals:
        patterns.append(rf"{before}[{capitals}]{behind}")
    if (
        "A" in letters
    ):  # a capital A before a word is an article, unless that word is a verb or joins it to another letter
        patterns.append(rf"{before}A{behind}(?!\s+[^\W{UNSPACED}])")
        patterns.append(
            rf"{before}A\s+(?:is|was|and|or|nor|not|fits|matches|holds|wins|must|cannot|can't|seems|looks)\b"
        )
    return any(re.search(pattern, text) for pattern in patterns) or bool(_BY_POSITION.search(text))


def _holds_number(hint: str, number: float) -> bool:
    wanted = [abs(number)]
    if re.search(r"%|\bper\s?cent", plain(hint)):  # a share and a percentage are one answer
        wanted += [abs(number) * 100, abs(number) / 100]
    values = [value for value in map(number_value, words(hint)) if value is not None]
    return any(math.isclose(value, one) for value in values for one in wanted)


def _holds_text(hint: str, problem: _Problem) -> bool:
    answer, said = words(problem.text), words(hint)
    if not answer:
        return problem.text in hint
    if len(answer) == 1 and answer[0] in ("a", "i"):
        return False
    if is_common(answer):
        return _stands_apart("".join(answer), hint)
    if _spelled(problem.text, hint) or _run_of(stems(answer), stems(said)):
        return True
    telling = set(stems(filter(tells, answer)))
    telling -= set(stems(words(problem.question)))
    others = [text for letter, text in problem.options.items() if letter != problem.letter]
    own = telling - set(stems(words(" ".join(others))))
    # Words that other options have as well tell nothing one by one.
    if not own and len(telling) < 2:
        return False
    wanted = own or telling
    found = len(wanted & set(stems(said)))
    return found == len(wanted) if len(wanted) < 5 else found >= 0.8 * len(wanted)


def _spelled(answer: str, hint: str) -> bool:
    """
    Return whether a hint spells the answer, whatever stands between letters: `r-e-d`, `R E D`, `redsquare`.

    No letter stands around it, other than of a script without spaces.
    """
    letter, end = _spelling()
    spelled, hint = "".join(letter.findall(plain(answer))), plain(hint)
    if not spelled or all(map(str.isdigit, spelled)):  # "1, 2" is not 12
        return False
    places = [match.start() for match in letter.finditer(hint)]
    letters = "".join(map(hint.__getitem__, places))
    start = letters.find(spelled)
    while start >= 0:
        first, last = places[start], places[start + len(spelled) - 1]
        if _BEGINNING.match(hint, first) and end.match(hint, last):
            return True
        start = letters.find(spelled, start + 1)
    return False


_BEGINNING = re.compile(rf"[{UNSPACED}]|{NO_LETTER_BEFORE}")


@cache
def _spelling() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return what a letter is, and where the last one of a spelling may stand."""
    end = rf"(?:[{UNSPACED}]|.(?:e?s)?{NO_LETTER_BEHIND})(?![{signs()}])"
    return re.compile(rf"[^\W_]|[{signs()}]"), re.compile(end)


def _stands_apart(text: str, hint: str) -> bool:
    return re.search(rf"(?<![\w{UNSPACED}]){re.escape(text)}(?![\w{UNSPACED}])", plain(hint)) is not None


def _run_of(part: list[str], whole: list[str]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))
