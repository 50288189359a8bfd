r"""
Subtitle files to the plain text that goes into a prompt.

The content decides the format, as it does for media. Readers of subtitles keep how a line looks and lose what it says
(pysubs2 takes every brace for a tag, every `\N` for a line break and WebVTT's notes for speech), so the plain formats are
read here; ASS, where braces and breaks are just that, by pysubs2.
"""

import codecs
import html
import json
import math
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pysubs2

from maple_trl.modalities import SUBTITLE_SUFFIXES
from maple_trl.omni.errors import MediaError


MAX_BYTES = 16 << 20  # hours of dense dialogue; anything above is not a subtitle

NOT_UTF8 = "subtitle-cp1252"
"""The note of a subtitle file that is no UTF-8 and was read as Windows-1252."""

Part = tuple[float, float]
"""From when to when a part of a clip is, in seconds from the start of the file; infinite where it goes on to the end."""

_TOUCH = 0.0005  # seconds by which a cue may reach into a part and only touch it: half of a time in milliseconds

_EXPECTED = (
    "expected SubRip, WebVTT, SBV, ASS/SSA, TTML, MicroDVD, or JSON as "
    '[{"start": s, "end": s, "text": "..."}] or {"segments": [...]}'
)

# Endings of files that are not read as subtitles. A text that ends so is the name of a file.
_OTHER_ENDINGS = (
    "txt|tsv|csv|xml|html?|smil?|sami|lrc|idx|sup|pgs|stl|scc|mcc|itt|ttml2|ttxt|webvtt|usf|mpl|mpl2|vob|jsonl|parquet|bak|"
    "mp4|m4v|m4a|m4b|mkv|mka|mks|mk3d|webm|mov|avi|mpg|mpeg|m2v|ts|mts|m2ts|wmv|asf|flv|f4v|3gp|3g2|ogv|ogg|oga|opus|"
    "mp3|mp2|wav|wave|flac|aac|aif|aiff|amr|wma|ac3|dts|gif|png|jpg|jpeg|webp|pdf|docx?|zip|rar|7z|tar|gz|tgz|bz2|xz|zst"
)
_NAME = re.compile(rf".*[^\s.]\.(?:{_OTHER_ENDINGS})", re.IGNORECASE)
# A path with an ending, an absolute one, one from the folder that is worked in, or an address.
_PATH = re.compile(r"\S+[/\\]\S+\.\w{2,4}|/\S*[/\\]\S+|(?:~|\.{1,2}|[A-Za-z]:)[/\\]\S+|[A-Za-z][\w+.-]*://\S+")

_TIME = r"(-?)(?:(\d+)\s*:\s*)?(\d{1,2})\s*:\s*(\d{1,2})(?:\s*[.,:]\s*(\d{1,9}))?"
_TIMES = re.compile(rf"\s*{_TIME}\s*-{{1,2}}>\s*{_TIME}(?:\s.*)?")
# What was meant for one: it would be fed as speech, and its cue as the end of the one before it.
_BAD_TIMES = re.compile(r"\s{0,40}-?\d[-\d:.,\s]{0,40}:[-\d:.,\s]{0,40}-{1,2}>\s{0,40}-?\d.*")
_SBV_TIME = r"()(\d+):(\d\d):(\d\d)\.(\d{3})"
_SBV_TIMES = re.compile(rf"\s*{_SBV_TIME},{_SBV_TIME}\s*")
_VTT_ASIDE = re.compile(r"(?:NOTE|STYLE|REGION|WEBVTT)(?:\s.*)?|X-TIMESTAMP-MAP=.*")
_FRAMES = re.compile(r"\s*[{\[](\d+)[}\]][{\[](\d*)[}\]]")
_FRAME_STYLE = re.compile(r"\{[a-zA-Z]:[^{}]*\}")

# Of ASS and MicroDVD, which converters leave in other formats.
_OVERRIDE = re.compile(r"\{(?:\\\w[^{}\n]*|[yY]:[biusBIUS,]+|[cC]:\$[0-9a-fA-F]{6})\}")
_DRAWING = re.compile(r"\\p([0-9])|\\r(?![a-zA-Z_0-9 ])")  # of ASS: begins or ends a drawing; ends all that was set
_VOICE = re.compile(r"<v(?:\.[^\s<>]*)?\s+([^<>\s][^<>]*)>")
_VOICE_END = re.compile(r"</v\s*>")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_MARKUP = re.compile(
    r"</?(?:b|i|u|s|em|strong|strike|ruby|rt|rp)\s*>|</?(?:font|span|p|div|lang)(?:\s[^<>]*)?>|</?[cv](?:\.[^<>]*)?>"
    r"|<(?:\d+:)?\d\d:\d\d\.\d{1,3}>",
    re.IGNORECASE,
)
_ANY_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


class Cue(NamedTuple):
    """What is said, and from when to when it is shown, in seconds; `None` where the file does not say until when."""

    start: float
    end: float | None
    text: str


@dataclass(frozen=True)
class Subtitle:
    """
    The cues of a subtitle file.

    Attributes:
        name: of the file, for errors.
        cues: in the order of their starts, each with text.
        notes: what was special about the file.
        in_seconds: whether the times are seconds; numbers of frames of which there is no telling when they are shown
            otherwise.
    """

    name: str
    cues: tuple[Cue, ...]
    notes: tuple[str, ...] = ()
    in_seconds: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the cues, about."""
        return sum(sys.getsizeof(cue) + sys.getsizeof(cue.text) + 48 for cue in self.cues)

    def text(self, parts: Iterable[Part] = ()) -> str:
        """
        Return the lines that are shown during one of some parts of the clip, or all of them where no part is named.

        There is one per text line. A line that repeats the one before it is dropped: rolling captions show every line
        twice. What only ends where a part begins, or begins where it ends, is not shown in it. Empty where nothing is.

        Raises:
            MediaError: where parts are named and the file's times are numbers of frames.
        """
        wanted, lines = tuple(parts), list[str]()
        if wanted and not self.in_seconds:
            raise MediaError(
                "bad-subtitle",
                self.name,
                "its times are numbers of frames, and it does not say how many there are in a second, so that what is said "
                f"{in_parts(wanted)} is not known: begin the file with a line such as {{1}}{{1}}25, or convert it to SubRip",
            )
        for cue in self.cues:
            if not wanted or any(_is_shown(cue, *part) for part in wanted):
                for line in cue.text.split("\n"):
                    if lines[-1:] != [line]:
                        lines.append(line)
        return "\n".join(lines)


def _is_shown(cue: Cue, start: float, end: float) -> bool:
    """Return whether a cue is shown in a part; one that is shown for no time is at its start."""
    goes_on = cue.end is None or cue.end > start + _TOUCH
    return cue.start < end - _TOUCH and (goes_on or cue.start >= start - _TOUCH)


def in_parts(parts: Iterable[Part]) -> str:
    """Name parts of a clip, for errors: `from 2 s to 5 s, or from 9 s to the end`."""
    ends = ((start, "the end" if end == math.inf else f"{end:g} s") for start, end in parts)
    return ", or ".join(f"from {start:g} s to {end}" for start, end in ends)


def is_subtitle_file(text: str) -> bool:
    """Return whether a row's subtitle is the name of a file that is read, rather than the text itself."""
    return "\n" not in text and text.lower().endswith(SUBTITLE_SUFFIXES)


def unread_file(text: str, root: str) -> str | None:
    """
    Return why a row's subtitle must be the name of a file that is not read as a subtitle; `None` where it is text.

    Args:
        root (`str`): the media root.
    """
    if "\n" in text or "\r" in text:
        return None
    if len(text) < 1024 and "\0" not in text and os.path.isfile(os.path.join(root, text)):
        return "names a file below the media root" if not os.path.isabs(text) else "names a file"
    return "looks like a file" if _NAME.fullmatch(text) or _PATH.fullmatch(text) else None


def subtitle_text(data: bytes, name: str) -> str:
    """Return all that a subtitle file says; see [`read_subtitle`]."""
    return read_subtitle(data, name).text()


def subtitle_bytes(path: str | os.PathLike) -> bytes:
    """Read a file up to one byte more than [`read_subtitle`] takes: no more of it needs to be in memory to be refused."""
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def read_subtitle(data: bytes, name: str) -> Subtitle:
    """
    Read the cues of a subtitle file in time order, without tags and numbers.

    Who speaks (`<v Ann>`) stands before what is said: `Ann: It is mine.` A cue that does not say when it ends is shown
    until the next one begins.

    Args:
        data (`bytes`): the file.
        name (`str`): its path, for errors.

    Raises:
        MediaError: `bad-subtitle` if the encoding or the structure is wrong or no cue has text.
    """
    if len(data) > MAX_BYTES:
        raise MediaError("bad-subtitle", name, f"more bytes than the {MAX_BYTES} that a subtitle file has at most")
    text, notes = _decode(data, name)
    text = text.lstrip()
    reader = _reader(text[:1024].lower())
    try:
        cues = sorted(reader(text), key=lambda cue: cue.start)
    except (
        ValueError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        SyntaxError,  # of XML
        NotImplementedError,
        pysubs2.Pysubs2Error,
    ) as error:
        raise MediaError(
            "bad-subtitle", name, f"cannot be parsed: {_EXPECTED}; found {type(error).__name__}: {error}"
        ) from error
    said = tuple(cue for cue in map(_tidy, _with_ends(cues)) if cue.text)
    if not said:
        raise MediaError("bad-subtitle", name, f"{_EXPECTED}; found no cue with text")
    return Subtitle(name, said, notes, in_seconds=reader is not _frame_cues or _frame_rate(text) is not None)


def _with_ends(cues: list[Cue]) -> Iterator[Cue]:
    """Yield cues with their ends; one without an end, or with one before its start, is shown until a later one begins."""
    starts = [cue.start for cue in cues]
    for cue in cues:
        if cue.end is None or cue.end < cue.start:
            later = bisect_right(starts, cue.start)
            cue = cue._replace(end=starts[later] if later < len(starts) else math.inf)
        yield cue


def _tidy(cue: Cue) -> Cue:
    """Return a cue with single spaces, and without lines that say nothing."""
    lines = (" ".join(line.split()) for line in cue.text.split("\n"))
    return cue._replace(text="\n".join(filter(None, lines)))


# Encoding


def _decode(data: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """Decode UTF-8, UTF-16, or with a note what may be Windows-1252: other code pages give wrong letters."""
    notes: tuple[str, ...] = ()
    try:
        text = data.decode(_unicode(data))
    except UnicodeDecodeError as error:
        text = _windows_1252(data)
        if text is None:
            raise MediaError("bad-subtitle", name, f"not UTF-8 (convert the file to UTF-8): {error}") from error
        notes = (NOT_UTF8,)
    if "\0" in text:
        raise MediaError("bad-subtitle", name, f"a binary file; {_EXPECTED}")
    return re.sub(r"\r*\n|\r", "\n", text), notes  # some are converted twice, to \\r\\r\\n


def _unicode(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    head = data[:4]  # without a mark, the first letters are ASCII in every format
    if len(head) == 4 and (head[0] == head[2] == 0 or head[1] == head[3] == 0) and any(head):
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    return "utf-8-sig"


def _windows_1252(data: bytes) -> str | None:
    """
    Decode text unless it must be something else.

    That is damaged UTF-8, a script with few or no ASCII letters, or a language that another code page is for, whose letters
    would become others.
    """
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    words = re.findall(r"[^\W\d_ªº]+", text)
    foreign = sum(len(word) > 3 and not re.search("[a-zA-Z]", word) for word in words) > 0.05 * len(words)
    letters = "".join(words)
    foreign = foreign or sum(not letter.isascii() for letter in letters) > 0.75 * len(letters)
    foreign = foreign or len(_SIGN_WITHIN.findall(text)) > 0.01 * len(words)
    foreign = foreign or not _is_western(words)
    utf8 = data.decode("utf-8", errors="replace")
    damaged = sum(not letter.isascii() for letter in utf8) > 2 * utf8.count("\ufffd")
    return None if foreign or damaged else text


# Signs of Windows-1252 that are letters in other code pages: within a word, and those of ordinals before a letter.
_SIGN_WITHIN = re.compile(r"[^\W\d_][\xa2-\xa9\xac\xae-\xb3\xb6-\xb9\xbc-\xbf][^\W\d_]|(?<!\d)[\xaa\xba][^\W\d_]")

# Letters beside a to z of the languages that are written in Windows-1252. Those of the last two stand where other code pages
# have letters of Turkish, Romanian, Croatian and the Baltic languages: one of their words has to be there.
_WESTERN = [
    ("àâæçéèêëîïôœùûüÿ", ()),  # French
    ("äöüßéàè", ()),  # German
    ("áéíñóúü", ()),  # Spanish
    ("áâãàçéêíóôõúü", ()),  # Portuguese
    ("àèéìíîòóù", ()),  # Italian
    ("àçéèíïñóòúü", ()),  # Catalan and Occitan
    ("áäâçéèëêíïîóöôúüûñà", ()),  # Dutch, Afrikaans, Luxembourgish
    ("æøåéèêóòôáü", ()),  # Danish and Norwegian
    ("åäöéàüšžõæø", ()),  # Swedish, Finnish and Estonian
    ("áàéèíìóòúù", ()),  # Irish and Scottish Gaelic
    ("çëéê", ()),  # Albanian, Basque
    ("áðéíóúýþæöå", ("það", "þú", "ég", "ekki", "við", "þetta", "og")),  # Icelandic
    ("áðíóúýæøå", ("tað", "eg", "ikki", "við", "hava", "og")),  # Faroese
]


def _is_western(words: list[str]) -> bool:
    """Return whether there is a language in whose letters all words are, but for one of twenty, as of names."""
    lowered = [word.lower() for word in words if not word.isascii()]
    present = {word.lower() for word in words}
    alphabets = [set(letters) for letters, proof in _WESTERN if not proof or present.intersection(proof)]
    beyond = [{letter for letter in word if not letter.isascii()} for word in lowered]
    return any(sum(not letters <= alphabet for letters in beyond) <= 0.05 * len(words) for alphabet in alphabets)


# Formats


def _reader(head: str) -> Callable[[str], Iterator[Cue]]:
    if re.match(r"(?:[;!].*\n|\s)*\[(script info|v4\+? styles|events)\]", head):  # comments may stand before
        return _ass_cues
    if _FRAMES.match(head):
        return _frame_cues
    if head.startswith(("[", "{")):
        return _json_cues
    if re.match(r"<(\?xml|!--|(\w+:)?tt[\s>])", head):
        return _ttml_cues
    return _vtt_cues if re.match(r"webvtt(\s|$)", head) else _srt_cues


def _srt_cues(text: str) -> Iterator[Cue]:
    """Yield the cues of SubRip, and of YouTube's SBV."""
    for begin, end, lines in _timed_blocks(text.split("\n"), webvtt=False):
        yield Cue(begin, end, html.unescape(_without_markup(lines)))


def _vtt_cues(text: str) -> Iterator[Cue]:
    for begin, end, lines in _timed_blocks(text.split("\n"), webvtt=True):
        yield Cue(begin, end, html.unescape(_ANY_TAG.sub("", _without_markup(lines))))


def _timed_blocks(lines: list[str], webvtt: bool) -> Iterator[tuple[float, float, list[str]]]:
    """
    Yield cues as their start and end, and the lines between two lines of times, less the number or name of the next cue.

    WebVTT's NOTE, STYLE and REGION blocks, and headers in the middle of joined files, are no cue's. Each begins behind a
    blank line, and what follows is none either (style sheets with blank lines), up to the next line of times, which begins
    a cue everywhere, as in browsers.
    """
    times = [_TIMES.fullmatch(line) or (None if webvtt else _SBV_TIMES.fullmatch(line)) for line in lines]
    bad = next((i for i, line in enumerate(lines) if not times[i] and _BAD_TIMES.fullmatch(line)), None)
    if bad is not None:
        raise ValueError(f"line {bad + 1}, {lines[bad].strip()[:80]!r}, whose times cannot be read")
    filled = [i for i, line in enumerate(lines) if line.strip()]
    before_times = {i for i, following in pairwise(filled) if times[following]}
    first = next((place for place, i in enumerate(filled) if times[i]), 0)
    numbered = first > 0 and lines[filled[first - 1]].strip().isdecimal()
    span, said, aside = None, [], False
    for i in filled:
        after_blank = i > 0 and not lines[i - 1].strip()
        if times[i]:
            if span is not None:
                yield *span, said
            span, said, aside = _span(times[i]), [], False
        elif webvtt and after_blank and _VTT_ASIDE.fullmatch(lines[i]):
            aside = True
        elif webvtt and after_blank and i + 1 < len(lines) and times[i + 1]:
            continue
        elif not webvtt and numbered and i in before_times and lines[i].strip().isdecimal():
            continue
        elif not aside:
            said.append(lines[i])
    if span is not None:
        yield *span, said


def _span(times: re.Match) -> tuple[float, float]:
    fields = times.groups(default="0")
    return _seconds(*fields[:5]), _seconds(*fields[5:])


def _seconds(sign: str, hours: str, minutes: str, seconds: str, fraction: str) -> float:
    value = int(hours) * 3600 + int(minutes) * 60 + float(f"{seconds}.{fraction}")
    return -value if sign == "-" else value


def _without_markup(lines: list[str]) -> str:
    """Strip the tags of SubRip and WebVTT; braces and backslashes are text, unless they are ASS's overrides."""
    text = _BREAK.sub("\n", _OVERRIDE.sub("", "\n".join(lines)))
    text, *voices = _VOICE.split(text)
    for name, said in zip(voices[::2], voices[1::2], strict=True):
        said, *after = _VOICE_END.split(said)
        name, said = " ".join(name.split()), said.lstrip()
        named = said.startswith(f"{name}:") or not _ANY_TAG.sub("", said).strip()
        text = "\n".join([text, said if named else f"{name}: {said}", *after])
    return _MARKUP.sub("", text)


def _ass_cues(text: str) -> Iterator[Cue]:
    for event in pysubs2.SSAFile.from_string(text, format_="ass"):
        said = None if event.is_comment else _ass_text(event.text)
        if said is not None:
            yield Cue(event.start / 1000, event.end / 1000, said)


def _ass_text(text: str) -> str | None:
    """
    Return what an event says, without overrides in braces; `None` of one that draws.

    `SSAEvent.plaintext` and `is_drawing` do the same in time that grows with the square of what is in braces.
    """
    said, at, draws = [], 0, False
    while (begin := text.find("{", at)) >= 0 and (end := text.find("}", begin)) >= 0:
        for tag in _DRAWING.finditer(text, begin, end):
            draws = tag[1] is not None and tag[1] != "0"
        if draws:
            return None
        said.append(text[at:begin])
        at = end + 1
    plain = "".join((*said, text[at:]))
    return plain.replace(r"\h", " ").replace(r"\n", "\n").replace(r"\N", "\n")


def _frame_cues(text: str) -> Iterator[Cue]:
    """
    Yield the cues of MicroDVD and MPL2: `{first}{last}text|text` by frame, or in brackets by tenth of a second.

    The times are numbers of frames where [`_frame_rate`] is not known.
    """
    rate = _frame_rate(text) or 1.0
    for number, line in enumerate(line for line in text.split("\n") if line.strip()):
        match = _FRAMES.match(line)
        if match is None:
            raise ValueError(f"line {line[:80]!r} has no times")
        if number == 0 and _stated_rate(line) is not None:
            continue
        said = _FRAME_STYLE.sub("", line[match.end() :]).split("|")
        shown = "\n".join(part.removeprefix("/") for part in said)  # the slash: italics
        yield Cue(int(match[1]) / rate, int(match[2]) / rate if match[2] else None, shown)


def _frame_rate(text: str) -> float | None:
    """Return how many frames a second has by the first line of MicroDVD, or 10 of MPL2; `None` where it is not said."""
    if text.startswith("["):
        return 10.0
    rate = _stated_rate(text.partition("\n")[0])
    return rate if rate and math.isfinite(rate) else None


def _stated_rate(line: str) -> float | None:
    """Return the frame rate that a line states, which may be 0; `None` of a line of speech."""
    match = _FRAMES.match(line)
    if match is None or match[1] != match[2]:
        return None
    said = _FRAME_STYLE.sub("", line[match.end() :]).split("|")[0].strip()
    return float(said.replace(",", ".")) if re.fullmatch(r"\d+[.,]?\d*", said) else None


def _json_cues(text: str) -> Iterator[Cue]:
    """Yield segments as Whisper writes them."""
    content = json.loads(text)
    for segment in content["segments"] if isinstance(content, dict) else content:
        start, said = float(segment["start"]), segment["text"]
        if not math.isfinite(start) or not isinstance(said, str):
            raise ValueError(f"segment {segment!r}")
        said.encode()  # half of a character, which JSON can spell, is none
        yield Cue(start, _known_end(segment.get("end")), said)


def _known_end(value: Any) -> float | None:
    """Read when a segment ends; what is no time is not known."""
    try:
        end = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return end if math.isfinite(end) else None


def _ttml_cues(text: str) -> Iterator[Cue]:
    if "<!doctype" in text.lower():
        raise ValueError("XML with a document type, which TTML has not")
    root = ElementTree.fromstring(text.encode(), parser=ElementTree.XMLParser(encoding="utf-8"))
    rates = {_local(name): float(value) for name, value in root.attrib.items() if _local(name).endswith("Rate")}
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "f": 1 / rates.get("frameRate", 30)}
    units["t"] = 1 / rates.get("tickRate", rates.get("frameRate", 1))

    def seconds(time: str) -> float:
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)(h|m|s|ms|f|t)", time):
            return float(match[1]) * units[match[2]]
        hours, minutes, whole, frames = re.fullmatch(
            r"(\d+):(\d\d):(\d\d(?:\.\d+)?)(?::(\d+(?:\.\d+)?))?", time
        ).groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(whole) + float(frames or 0) * units["f"]

    def known(time: str | None) -> float | None:
        """Read a time that nothing but the choice of cues hangs on."""
        try:
            return None if time is None else seconds(time.strip())
        except (AttributeError, ValueError):
            return None

    def end_of(node: ElementTree.Element, start: float, begin: float, end: float) -> float:
        """Return when an element ends that starts at `start`, within one that is shown from `begin` to `end`."""
        told = ((begin, known(node.get("end"))), (start, known(node.get("dur"))))
        return min([end, *(since + time for since, time in told if time is not None)])

    def spans_in(node: ElementTree.Element, begin: float, end: float) -> Iterator[Part]:
        """Yield when the outermost elements are shown that have times, within one that is shown from `begin` to `end`."""
        for child in node:
            if _is_timed(child):
                start = begin + (known(child.get("begin")) or 0.0)
                yield start, end_of(child, start, begin, end)
            else:
                yield from spans_in(child, begin, end)

    def walk(node: ElementTree.Element, begin: float, end: float) -> Iterator[Cue]:
        start = begin + seconds(node.get("begin", "0s").strip())
        end = end_of(node, start, begin, end)
        if _local(node.tag) == "p":
            spans = [] if _is_timed(node) else list(spans_in(node, start, end))
            if spans:
                start, end = min(span[0] for span in spans), max(span[1] for span in spans)
            yield Cue(start, None if end == math.inf else end, _ttml_text(node))
            return
        for child in node:
            yield from walk(child, start, end)

    for node in root:
        if _local(node.tag) == "body":
            yield from walk(node, 0.0, math.inf)


def _is_timed(node: ElementTree.Element) -> bool:
    return any(node.get(name) is not None for name in ("begin", "end", "dur"))


def _ttml_text(node: ElementTree.Element) -> str:
    parts = ["\n"] if _local(node.tag) == "br" else [" ".join((node.text or "").split("\n"))]
    for child in node:
        parts.append("" if _local(child.tag) == "metadata" else _ttml_text(child))
        parts.append(" ".join((child.tail or "").split("\n")))
    return "".join(parts)


def _local(name: str) -> str:
    """Return an XML name without its namespace, of which TTML has had several; a comment has none."""
    return name.rpartition("}")[2] if isinstance(name, str) else ""
