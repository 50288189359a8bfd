"""Reading an answer out of a completion, and grading it. Plain strings in, plain numbers out."""

from __future__ import annotations

import datetime
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from string import ascii_letters, ascii_uppercase
from typing import Any


_BRACKETED = re.compile(r"\[([^\[\]]{1,400})\]")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK_TAG = re.compile(r"</?think>")
# Written out without re.IGNORECASE and without \d on purpose: with Unicode case folding the Kelvin sign would match K
# and the long s would match S, and \d takes digits of every script.
_OPTION = re.compile(
    r"(?:([A-Za-z])[.):]?|\(([A-Za-z])\)[.:]?)|(?:([A-Za-z])[.):]|\(([A-Za-z])\)[.:]?)\s(.*)", re.DOTALL
)
# Wide letters, brackets and punctuation of East Asian texts, and typographic quotes, in their ASCII form. A mark that ends a
# letter's part needs no space behind it there. Look-alikes of other scripts and styles stay what they are.
_WIDE = str.maketrans(
    {chr(ord(char) + 0xFEE0): char for char in ascii_letters + "([{*$"}
    | {"）": ") ", "］": "] ", "｝": "} "}
    | dict.fromkeys("。．、", ". ")
    | {"：": ": ", "，": ", ", "；": "; ", "！": "!", "\u3000": " "}
    | dict.fromkeys("【「『〔", "[")
    | dict.fromkeys("】」』〕", "] ")
    | dict.fromkeys("“”„«»", '"')
    | dict.fromkeys("‘’", "'")
)
# Of an option in a row: the letter, marked as an option's, and its text, with or without a space between.
_LISTED_OPTION = re.compile(
    r"(?:[(（]([A-Za-zＡ-Ｚａ-ｚ])[)）](?:\s*[.．。、:：])?|([A-Za-zＡ-Ｚａ-ｚ])\s*[.)．。、）:：])\s*(\S.*)",
    re.DOTALL,
)
_PAIRS = [
    ("[[", "]]"),
    *(("**", "**"), ("__", "__"), ("\\boxed{", "}"), ("\\fbox{", "}"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)")),
    *(("\\[", "\\]"), ("[", "]"), ("(", ")"), ("{", "}"), ("<", ">"), ('"', '"'), ("'", "'"), ("`", "`")),
]
_AROUND_ALL = [*_PAIRS, ("*", "*"), ("_", "_")]  # these two also stand for multiplication and an index
_MACRO = re.compile(r"\\(?:text(?:bf|rm|it|sf|tt)?|math(?:bf|rm|it|sf|tt)|operatorname) ?\{([^{}\\]*)\}")
# Every gap and choice is bounded, so that no text takes longer than its length.
_SAYING = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s{1,3})?"
    # Not of "I choose a" and "It is a", which go on.
    r"(?:(?:(?:i(?:\s(?:would|will))?|i'd|i'll)\s(?:choose|pick|select|go\swith|say)|it\sis|it's)"
    r"(?!\s{1,3}(?-i:[ai])\.?\s{0,2}$)|"
    r"(?:(?:the|my)\s)?(?:(?:final|correct|right|best)\s){0,2}(?:answer|ans|option|choice|letter))"
    r"(?:\s(?:is|would\sbe|should\sbe|must\sbe|will\sbe))?(?:\s(?:option|choice|letter|answer))?"
    r"(?:\s{0,2}[:=]\s{0,3}|\s{1,3}|(?=[*_$\"'(\[\\`]))",
    re.IGNORECASE | re.ASCII,
)
_SAYING_ELSEWHERE = re.compile(
    r"(?:所以|因此|故|因而|那么)?[,:]?\s{0,2}(?:我)?(?:认为|的)?(?:正确|最终|最佳|最后|标准|正確|最終)?(?:的)?"
    r"(?:答案|选项|選項|选择|選擇|应选|應選|应该选|选|選|答え|正解|解答|答|정답|답)"
    r"(?:应该|应当|应|應該)?(?:是|为|為|は|은|는)?(?:选项|選項|选|選)?\s{0,2}:?\s{0,3}"
)
_SAID_BEHIND = re.compile(
    r"(?:\s(?:is|was)(?:\s(?:the|my))?"
    r"(?:\s(?:final|correct|right|best)(?:\s(?:answer|option|choice|one))?|\s(?:answer|option|choice|one))"
    r"|\s?(?:选项|選項|项|項|です|입니다|是正确的|正确|是对的))[.!]?\s{0,2}$",
    re.IGNORECASE | re.ASCII,
)
_BEHIND = 60  # characters of what is said behind a letter
_SOLE = re.compile(r"([A-Za-z])[.):]?|\(([A-Za-z])\)[.:]?")
_PEELS = 8  # wrappers around one answer
# What in the text behind an option's letter names a second option: "(C)", "C)", "or C.", "C." where a line begins,
# ", C" where one ends.
_SECOND_OPTION = re.compile(
    r"(?:^|[\s,;/])(?:\([A-Za-z]\)|[A-Z]\))|(?:^|[,;/] ?|\b(?:or|and) )[A-Z][.:](?=\s|$)|(?:[,;/] ?|\bor )[A-Z]$",
    re.MULTILINE,
)
# Likewise in the other forms; here a letter that is the option's own names no second one.
_MARKED = re.compile(
    r"\[\(?([A-Za-z])[.)]?\]|\*\*\(?([A-Za-z])[.)]?\*\*|\\boxed ?\{\(?([A-Za-z])\)?\}|"
    r"(?:\b[Oo]ption|\b[Cc]hoice|[Aa]nswer(?: is|:)?|[选選]|答案[是为為]?:?) ?\(?([A-Z])(?![A-Za-z0-9_'])",
)
_PARTED = re.compile(r"[,;\[({*$`]")
# Nothing here comes from other modules of ours: results carry a version for what this one does, by a digest of its code.
_BETWEEN_LETTERS = re.compile(r"[\s,;/&+|.:()\[\]{}*$\"'`]+")
# As in `maple_trl.metrics.answers`: what is written without spaces between words.
_HAN = "\u3005-\u3007\u3021-\u3029\u3038-\u303c\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ece\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa76\uaa7a-\uaa7f"  # Burmese
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
    "\u3031-\u3035\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana
    "\uff66-\uff9f\U0001aff0-\U0001b16f" + _HAN
)
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")  # there each character is a word
_RUNS = re.compile(r"\w+")
_COMMON = "不没沒是有否对對的了在会會能"  # stand in texts of every kind
_LISTED_LETTERS = re.compile(r"[A-Za-z](?: ?[,，、] ?[A-Za-z])+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """
    Return the text that the model wrote, for both forms in which TRL hands over a completion.

    Args:
        completion (`str` or `list[dict]`):
            Plain text, or the messages of a conversational completion. Of the messages only the assistant's count
            (what a tool returned is not the model's answer); content may be text, a list of content blocks, or `None`.

    Returns:
        `str`: the assistant's texts, joined by newlines.
    """
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        if message.get("role", "assistant") != "assistant":
            continue
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(block.get("text") or "" for block in content if block.get("type", "text") == "text")
        texts.append(content)
    return "\n".join(texts)


def without_wide_forms(text: str) -> str:
    """Return a text with wide letters, brackets and punctuation in their ASCII forms."""
    return text.translate(_WIDE)


def _visible(text: str) -> str:
    """Return a text without characters that only steer how others are shown: zero-width spaces and joiners, byte-order marks."""
    return text if text.isascii() else "".join(char for char in text if unicodedata.category(char) != "Cf")


def extract_answer(text: str) -> str | None:
    """
    Return the content of the one `<answer>…</answer>` of a completion's `text`, stripped.

    `None` when there is no answer, when there are several (hedging is not answering), when a tag is left open, or when
    the answer stands inside a think block. A completion whose `<think>` stood in the prompt is read correctly: it
    starts inside the block, and its answer counts when it comes after `</think>`.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    match = _ANSWER.search(text)
    if match is None or _THINK_TAG.search(match[1]):
        return None
    before = _THINK_TAG.findall(text[: match.start()])
    after = _THINK_TAG.findall(text[match.end() :])
    inside_think = (before and before[-1] == "<think>") or (after and after[0] == "</think>")
    return None if inside_think else _visible(match[1]).strip()


def extract_bracketed(text: str) -> str | None:
    """
    Return the answer in square brackets in which a completion ends, as in MAPLE's prompts (arXiv 2602.11596, B.4).

    Brackets inside a think block do not count. Of the others, those that hold an option (`[B]`, `[(B)]`, `[B. red]`) must
    agree on it; where none does, all must hold the same text (`[12]`, `[Yes]`). `None` otherwise, and when the think block
    is left open.
    """
    outside = text.rsplit("</think>", 1)[-1]
    if "<think>" in outside:
        return None
    found = [content.strip() for content in map(_visible, _BRACKETED.findall(outside)) if content.strip()]
    options = [content for content in found if option_letter(content) is not None]
    said = {option_letter(content) for content in options} if options else {content.casefold() for content in found}
    return (options or found)[-1] if len(said) == 1 else None


ANSWER_FORMATS: Mapping[str, Callable[[str], str | None]] = {"tags": extract_answer, "brackets": extract_bracketed}
"""How a completion marks its answer, and what reads it: `<answer>B</answer>`, or `[B]`."""


def option_letter(text: str) -> str | None:
    r"""
    Return the upper-case option letter that an answer names.

    It may stand alone or before the option's text, parted from it (`B`, `b`, `B.`, `(B)`, `B)`, `B:`, `B. a red square`);
    in emphasis, brackets, quotes or a box (`**B**`, `[B]`, `"B"`, `\boxed{B}`, `$B$`, `**(B)** a red square`), in wide
    letters (`Ｂ`, `B。`), and behind words that do nothing but announce it (`The answer is B.`, `Option B`, `答案是B`, `选B`).

    `None` for anything else; `A cat` and `The answer is a cat` name no option, for nothing parts the letter from the text.
    """
    read = _read_option(text)
    return read[0] if read else None


def _read_option(text: str) -> tuple[str, str] | None:
    """Read the letter that an answer names, and the text behind it."""
    text = _without_macros(without_wide_forms(text).strip())
    for _ in range(_PEELS):
        if len(text) <= 4:
            text = text.rstrip(" .!,;")
        match = _OPTION.fullmatch(text)
        if match:
            return next(group for group in match.groups() if group).upper(), (match[5] or "").strip()
        lead = _marked_lead(text)
        if lead:
            return lead
        peeled = _peeled(text)
        if peeled == text:
            return None
        text = peeled
    return None


def _without_macros(text: str) -> str:
    for _ in range(2 if "\\" in text else 0):
        text = _MACRO.sub(r"\1", text)
    return text


def _marked_lead(text: str) -> tuple[str, str] | None:
    """Read the letter that stands in marks at the beginning of a text (`**(B)** red`), and what is behind it."""
    for before, after in _PAIRS:
        if text.startswith(before):
            end = text.find(after, len(before), len(before) + 16)
            letter = _sole_letter(text[len(before) : end]) if end > 0 else None
            rest = text[end + len(after) :] if letter else ""
            if letter and rest[:1] in tuple(".:)"):
                rest = rest[1:]
            if letter and (not rest or rest[0].isspace()):
                return letter, rest.strip()
    return None


def _sole_letter(text: str) -> str | None:
    """Read the letter of a short text that is nothing else but marks around it."""
    for _ in range(3):
        text = text.strip()
        match = _SOLE.fullmatch(text)
        if match:
            return (match[1] or match[2]).upper()
        text = next((text[len(a) : -len(b)] for a, b in _AROUND_ALL if text.startswith(a) and text.endswith(b)), "")
    return None


def _peeled(text: str) -> str:
    """Strip a text of the marks around all of it, or of the words that announce an option."""
    text = text.strip()
    inner = text.rstrip(".!,;") if text[:1] not in ascii_letters else text
    for before, after in _AROUND_ALL:
        if inner.startswith(before) and inner.endswith(after) and len(inner) > len(before) + len(after):
            content = inner[len(before) : -len(after)]
            if before not in content and after not in content:
                return content.strip()
    end = text.find("**", 2, _BEHIND) if text.startswith("**") else -1  # of **Answer:** B
    for saying in (_SAYING, _SAYING_ELSEWHERE):
        if end > 0 and saying.fullmatch(f"{text[2:end]} "):
            return text[end + 2 :].lstrip(": ")
        match = saying.match(text)
        if match:
            return text[match.end() :]
    match = _SAID_BEHIND.search(text, max(0, len(text) - _BEHIND))
    return text[: match.start()] if match else text


def number(text: str) -> float | None:
    """Return the finite number that a text consists of (`12`, `-3.5`, `−3.5`, `1e3`, `1,200`), or `None`."""
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    if not _NUMBER.fullmatch(text) or not any("0" <= char <= "9" for char in text.lower().split("e")[0]):
        return None
    value = float(text.replace(",", ""))
    return value if math.isfinite(value) else None


def read_number(text: str) -> float | None:
    r"""
    Return the number that an answer consists of, as [`number`] reads it, in marks or behind words that announce it.

    Marks and words are those of [`option_letter`]: `$12$`, `\boxed{12}`, `**12**`, `The answer is 12.`, `答案是12`.
    `None` for anything else: other words (`12 apples`), a second number (`12 or 13`).
    """
    text = _without_macros(without_wide_forms(text).strip())
    for _ in range(_PEELS):
        value, peeled = number(text.removesuffix(".")), _peeled(text)
        if value is not None or peeled == text:
            return value
        text = peeled
    return number(text)


def option_texts(options: Any) -> dict[str, str]:
    """
    Return a row's options by letter.

    Args:
        options (`Sequence[str]` or `Mapping[str, str]`):
            The texts in the order of their letters, with or without them (`"red"`, or `"A. red"`, `"(A) red"`, `"A、红"`
            where every one has its own), or the texts by letter; a letter without a text (`None`, NaN) is left out, as
            are blank texts at the end. Numbers are their texts.

    Returns:
        `dict[str, str]`: texts by upper-case letter; empty for a row without options, and for a column of that name
        that holds anything else.
    """
    options = options.tolist() if hasattr(options, "tolist") else options  # of NumPy
    if isinstance(options, Mapping):
        given = {key.strip().upper(): text for key, text in options.items() if isinstance(key, str)}
    elif isinstance(options, Sequence) and not isinstance(options, str):
        given = dict(zip(ascii_uppercase, options, strict=False))
        if any(not _is_padding(option) for option in options[len(given) :]):
            return {}
        while given and _is_padding(next(reversed(given.values()))):
            given.popitem()
    else:
        return {}
    # NaN is not equal to itself.
    texts = {letter: _as_text(text) for letter, text in given.items() if text is not None and text == text}
    if len(texts) < 2 or not all(
        len(letter) == 1 and letter in ascii_uppercase and isinstance(text, str) for letter, text in texts.items()
    ):
        return {}
    parted = {letter: _LISTED_OPTION.fullmatch(text.strip()) for letter, text in texts.items()}
    if all(match and option_letter(match[1] or match[2]) == letter for letter, match in parted.items()):
        return {letter: match[3] for letter, match in parted.items()}
    return texts


def _is_padding(option: Any) -> bool:
    """Return whether what stands in a list of options is none: `None`, NaN or a blank text."""
    return option is None or option != option or (isinstance(option, str) and not option.strip())


def _as_text(option: Any) -> Any:
    """Return a number as its text, a whole one without a point, as tables make 3.0 of 3; anything else as it is."""
    whole = isinstance(option, float) and option.is_integer()
    return str(int(option) if whole else option) if isinstance(option, int | float) else option


def row_options(options: list | None, choices: list | None, rows: int) -> list:
    """Return each row's options: the first of the columns `options` and `choices` there is, else `None` per row."""
    return next((column for column in (options, choices) if column is not None), [None] * rows)


def chosen_option(answer: str, texts: Mapping[str, str] | None = None) -> str | None:
    """
    Return the one option that an answer chooses.

    The forms of [`option_letter`] count, but not where the text behind the letter names a second option (`B. or C.`,
    `(B) (C)`, `B. red, C. blue`). That is seen by the letters alone; with the options' texts it is certain: the text
    behind the letter may not hold another option's text, the letter must be one of theirs, and an option may also be
    chosen by its text (case, white space and a full stop at the end do not matter; a text of one letter, such as a name of a
    note, that is also the letter of an option is that letter). One letter several times (`B, B`, `[B] [B]`) is that letter.

    Args:
        answer (`str`):
            The content of the answer tag.
        texts (`Mapping[str, str]`, *optional*):
            What [`option_texts`] returned.

    Returns:
        `str` or `None`: the upper-case letter; `None` when the answer chooses none or several.
    """
    match = _OPTION.fullmatch(answer.strip())
    if texts and not (match and not match[5]) and (named := _named_option(answer, texts)):
        return named
    read = _repeated(answer) or _read_option(answer)
    if read is None:
        return None
    letter, rest = read
    if texts and letter not in texts:
        return None if rest else _named_option(letter, texts)
    if not rest:
        return letter
    return None if (_contradicts(rest, letter, texts) if texts else _names_second_option(rest, letter)) else letter


def _named_option(answer: str, texts: Mapping[str, str]) -> str | None:
    """Return the letter of the one option whose text an answer is, with or without its letter (`A.red`, as rows may spell it)."""
    named = [name for name, text in texts.items() if _plain(text) and _plain(text) == _plain(answer)]
    if not named and (listed := _LISTED_OPTION.fullmatch(answer.strip())):
        letter = unicodedata.normalize("NFKC", listed[1] or listed[2]).upper()
        return letter if _plain(texts.get(letter, "")) == _plain(listed[3]) != "" else None
    return named[0] if len(named) == 1 else None


def _repeated(answer: str) -> tuple[str, str] | None:
    """Return the letter of an answer that says nothing but one letter several times (`B, B`, `[B] [B]`)."""
    answer = without_wide_forms(answer)
    letters = _letters(answer)
    once = {letter.upper() for letter in letters}
    return (once.pop(), "") if len(letters) > 1 == len(once) and _PARTED.search(answer) else None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(" .。．｡")


def _is_short(text: str) -> bool:
    """Return whether a text in a script without spaces has fewer than two characters of Han, or four others, that tell it."""
    if not re.search(f"[{_UNSPACED}]", text):
        return False
    telling = [char for char in text if char.isalnum() and char not in _COMMON]
    return len(telling) + len(re.findall(f"[{_HAN}]", "".join(telling))) < 4


def _contradicts(rest: str, letter: str, texts: Mapping[str, str]) -> bool:
    """Return whether the text behind the letter of an option speaks of another one."""
    texts = {name: without_wide_forms(text) for name, text in texts.items()}
    if _plain(rest) == _plain(texts[letter]):
        return False
    # What is short stands within other words of such a script; it counts where it is all between two marks or spaces.
    patterns = {name: _RUNS if _is_short(text) else _WORDS for name, text in texts.items()}
    return any(
        _speaks_of(rest, text, texts[letter], patterns[name]) for name, text in texts.items()
    ) or _names_second_option(rest, letter)


def _speaks_of(rest: str, other: str, own: str, words: re.Pattern[str]) -> bool:
    """Return whether a text holds that of another option, word for word."""
    rest, other, own = (f" {' '.join(words.findall(text.casefold()))} " for text in (rest, other, own))
    # "red" inside the own text "dark red" is no second option; "dark red" around the own text "red" is.
    return other not in (own, "  ") and other in (rest if own in other else rest.replace(own, " | "))


def _names_second_option(rest: str, letter: str) -> bool:
    lines = "\n".join(" ".join(line.split()) for line in rest.splitlines())
    if _letters(rest) or _SECOND_OPTION.search(lines):
        return True
    return any(group and group.upper() != letter for found in _MARKED.findall(lines) for group in found)


def _letters(text: str) -> list[str]:
    """Return the letters of a text that lists nothing but single letters (`B, C or D`); else none."""
    words = [word for word in _BETWEEN_LETTERS.split(text) if word and word not in ("or", "and")]
    return words if all(len(word) == 1 and word in ascii_letters for word in words) else []


def answer_key(answer: str | None, options: Any = None) -> tuple | None:
    """
    Return what an answer says, such that two answers that say the same have equal keys.

    `B`, `(b)` and `B. text` are one option, `12`, `12.0`, `1.2e1` and `$12$` one number, `Red  cat.` and `red cat` one text.

    Args:
        answer (`str`, *optional*):
            What [`extract_answer`] returned.
        options (`Sequence[str]` or `Mapping[str, str]`, *optional*):
            The row's options; with them an answer that chooses none of them says nothing.

    Returns:
        `tuple` or `None`: a hashable key; `None` for an answer that says nothing (no answer, no letter or digit in it)
        or names several options.
    """
    if answer is None or not any(map(str.isalnum, answer)):
        return None
    texts = option_texts(options)
    letter = chosen_option(answer, texts)
    if letter is not None:
        return ("option", letter)
    if texts or option_letter(answer) is not None or len(_letters(answer)) > 1:
        return None
    value = read_number(answer)
    return ("text", _compared(answer)) if value is None else ("number", value)


def _compared(text: str) -> str:
    """Return a text without case, white space that is doubled, and a final stop; listed letters without any space."""
    plain = _plain(text) or text
    return re.sub("[ ,，、]+", ",", plain) if _LISTED_LETTERS.fullmatch(plain) else plain


def grade_answer(answer: str | None, solution: Any, options: Any = None) -> float | None:
    """
    Grade one extracted answer against the row's solution.

    Letters are ASCII ones or their wide forms, digits ASCII ones, a minus also the sign U+2212: look-alikes of other scripts and
    styles (Cyrillic `В`, circled `Ⓑ`, `𝐁`) name no option and no number. Texts are compared in Unicode's form NFC, in which an
    accent is a part of its letter, and without invisible characters.

    Args:
        answer (`str`, *optional*):
            What [`extract_answer`] returned.
        solution (`Any`):
            The row's solution: an option (`"B"`, `"(B)"`, `"B. text"`), a number or its text, or any other text; an
            `<answer>` wrapper around it is taken off.
        options (`Sequence[str]` or `Mapping[str, str]`, *optional*):
            The row's options as in [`option_texts`]. If the solution is the letter or the text of one of them, that
            option must be chosen, by letter or by text (see [`chosen_option`]); otherwise they are not used.

    Returns:
        `float` or `None`: in `[0, 1]`; 1 for the right option (case does not matter), `max(0, 1 - |y' - y| / |y|)` for
        a number `y != 0`, exact equality for `y = 0` (the answer's is [`read_number`]'s), equality up to case, white space and a
        final stop for other text; a list of letters (`A, C` for `A,C`) needs their order. Where the row has no options, and
        both solution and answer have a text behind their letter, one of these texts must hold the other (`E. faecalis` is not
        `E. coli`). `None` when there is no solution (`None`, NaN or blank): the row can't be graded.

    Raises:
        ValueError: for a solution that is neither a text nor a number: a list, a mapping, a date.
    """
    # Whose Python form nobody would answer.
    if not isinstance(solution, str) and (hasattr(solution, "__len__") or isinstance(solution, datetime.date)):
        raise ValueError(
            f"a solution must be a text or a number, such as 'B', 'A, C' or 12, but is a {type(solution).__name__}: "
            f"{solution!r:.60}"
        )
    expected = solution_text(solution)
    if expected is None:
        return None
    if answer is None:
        return 0.0
    letter = option_letter(expected)
    texts = option_texts(options)
    right = letter if letter in texts else chosen_option(expected, texts) if texts else None
    if right is not None:
        return float(chosen_option(answer, texts) == right)
    if letter is not None:
        return float((chosen_option(answer) == letter and _same_text(answer, expected)) or answer == expected)
    truth = number(expected)
    if truth is not None:
        value = read_number(answer)
        if value is None:
            return 0.0
        return float(value == 0.0) if truth == 0.0 else max(0.0, 1.0 - abs(value - truth) / abs(truth))
    return float(_compared(answer) == _compared(expected))


def _same_text(answer: str, solution: str) -> bool:
    """Return whether the texts behind two equal letters can be one option's: where both have one, one holds the other."""
    (_, one), (_, other) = _repeated(answer) or _read_option(answer), _read_option(solution)
    one, other = (f" {' '.join(_WORDS.findall(_plain(text)))} " for text in (one, other))
    return one in other or other in one or not one.strip() or not other.strip()


def solution_text(solution: Any) -> str | None:
    """Return a row's solution as stripped text, without an `<answer>` wrapper; `None` for `None`, NaN and blank."""
    if solution is None or (isinstance(solution, float) and math.isnan(solution)):
        return None
    text = _visible(str(solution)).strip()
    wrapped = extract_answer(text)
    return (text if wrapped is None else wrapped) or None
