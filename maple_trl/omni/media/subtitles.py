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
from collections.abc import Callable, Iterator
from itertools import pairwise
from xml.etree import ElementTree

import pysubs2

from maple_trl.modalities import SUBTITLE_SUFFIXES
from maple_trl.omni.errors import MediaError


MAX_BYTES = 16 << 20  # hours of dense dialogue; anything above is not a subtitle

NOT_UTF8 = "subtitle-cp1252"
"""The note of a subtitle file that is no UTF-8 and was read as Windows-1252."""

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
_SBV_TIMES = re.compile(r"\s*()(\d+):(\d\d):(\d\d)\.(\d{3}),\d+:\d\d:\d\d\.\d{3}\s*")
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
    """Return the text of [`read_subtitle`] alone."""
    return read_subtitle(data, name)[0]


def subtitle_bytes(path: str | os.PathLike) -> bytes:
    """Read a file up to one byte more than [`read_subtitle`] takes: no more of it needs to be in memory to be refused."""
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def read_subtitle(data: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """
    Read the lines of a subtitle file in time order, without tags, numbers and times, and its notes.

    There is one per text line. A line that repeats the one before it is dropped: rolling captions show every line
    twice. Who speaks (`<v Ann>`) stands before what is said: `Ann: It is mine.`

    Args:
        data (`bytes`): the file.
        name (`str`): its path, for errors.

    Raises:
        MediaError: `bad-subtitle` if the encoding or the structure is wrong or no cue has text.
    """
    if len(data) > MAX_BYTES:
        raise MediaError("bad-subtitle", name, f"more bytes than the {MAX_BYTES} that a subtitle file has at most")
    text, notes = _decode(data, name)
    try:
        cues = sorted(_cues(text), key=lambda cue: cue[0])
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
    lines: list[str] = []
    for _, said in cues:
        for line in said.split("\n"):
            line = " ".join(line.split())
            if line and lines[-1:] != [line]:
                lines.append(line)
    if not lines:
        raise MediaError("bad-subtitle", name, f"{_EXPECTED}; found no cue with text")
    return "\n".join(lines), notes


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
    """Decode text unless it must be something else: damaged UTF-8, or a script with few or no ASCII letters."""
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    words = re.findall(r"[^\W\d_]+", text)
    foreign = sum(len(word) > 3 and not re.search("[a-zA-Z]", word) for word in words) > 0.05 * len(words)
    letters = "".join(words)
    foreign = foreign or sum(not letter.isascii() for letter in letters) > 0.75 * len(letters)
    foreign = foreign or len(_SIGN_WITHIN.findall(text)) > 0.01 * len(words)
    utf8 = data.decode("utf-8", errors="replace")
    damaged = sum(not letter.isascii() for letter in utf8) > 2 * utf8.count("\ufffd")
    return None if foreign or damaged else text


# Signs of Windows-1252 that are letters in other code pages.
_SIGN_WITHIN = re.compile(r"[^\W\d_][\xa2-\xa9\xac\xae-\xb3\xb6-\xb9\xbc-\xbf][^\W\d_]")


# Formats


def _cues(text: str) -> Iterator[tuple[float, str]]:
    """Yield start and text of every cue; starts are comparable, whatever their unit."""
    text = text.lstrip()
    return _reader(text[:1024].lower())(text)


def _reader(head: str) -> Callable[[str], Iterator[tuple[float, str]]]:
    if re.match(r"(?:[;!].*\n|\s)*\[(script info|v4\+? styles|events)\]", head):  # comments may stand before
        return _ass_cues
    if _FRAMES.match(head):
        return _frame_cues
    if head.startswith(("[", "{")):
        return _json_cues
    if re.match(r"<(\?xml|!--|(\w+:)?tt[\s>])", head):
        return _ttml_cues
    return _vtt_cues if re.match(r"webvtt(\s|$)", head) else _srt_cues


def _srt_cues(text: str) -> Iterator[tuple[float, str]]:
    """Yield the cues of SubRip, and of YouTube's SBV."""
    for begin, lines in _timed_blocks(text.split("\n"), webvtt=False):
        yield begin, html.unescape(_without_markup(lines))


def _vtt_cues(text: str) -> Iterator[tuple[float, str]]:
    for begin, lines in _timed_blocks(text.split("\n"), webvtt=True):
        yield begin, html.unescape(_ANY_TAG.sub("", _without_markup(lines)))


def _timed_blocks(lines: list[str], webvtt: bool) -> Iterator[tuple[float, list[str]]]:
    """
    Yield cues as the lines between two lines of times, less the number or name of the next cue.

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
    begin, said, aside = None, [], False
    for i in filled:
        after_blank = i > 0 and not lines[i - 1].strip()
        if times[i]:
            if begin is not None:
                yield begin, said
            begin, said, aside = _seconds(times[i]), [], False
        elif webvtt and after_blank and _VTT_ASIDE.fullmatch(lines[i]):
            aside = True
        elif webvtt and after_blank and i + 1 < len(lines) and times[i + 1]:
            continue
        elif not webvtt and numbered and i in before_times and lines[i].strip().isdecimal():
            continue
        elif not aside:
            said.append(lines[i])
    if begin is not None:
        yield begin, said


def _seconds(times: re.Match) -> float:
    sign, hours, minutes, seconds, fraction = times.groups(default="0")[:5]
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


def _ass_cues(text: str) -> Iterator[tuple[float, str]]:
    for event in pysubs2.SSAFile.from_string(text, format_="ass"):
        said = None if event.is_comment else _ass_text(event.text)
        if said is not None:
            yield event.start, said


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


def _frame_cues(text: str) -> Iterator[tuple[float, str]]:
    """Yield the cues of MicroDVD and MPL2: `{first}{last}text|text` by frame, or in brackets by tenth of a second."""
    for number, line in enumerate(line for line in text.split("\n") if line.strip()):
        match = _FRAMES.match(line)
        if match is None:
            raise ValueError(f"line {line[:80]!r} has no times")
        said = _FRAME_STYLE.sub("", line[match.end() :]).split("|")
        if number == 0 and re.fullmatch(r"\d+[.,]?\d*", said[0].strip()) and match[1] == match[2]:
            continue  # the frame rate
        yield int(match[1]), "\n".join(part.removeprefix("/") for part in said)  # the slash: italics


def _json_cues(text: str) -> Iterator[tuple[float, str]]:
    """Yield segments as Whisper writes them."""
    content = json.loads(text)
    for segment in content["segments"] if isinstance(content, dict) else content:
        start, said = float(segment["start"]), segment["text"]
        if not math.isfinite(start) or not isinstance(said, str):
            raise ValueError(f"segment {segment!r}")
        said.encode()  # half of a character, which JSON can spell, is none
        yield start, said


def _ttml_cues(text: str) -> Iterator[tuple[float, str]]:
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

    def walk(node: ElementTree.Element, begin: float) -> Iterator[tuple[float, str]]:
        begin += seconds(node.get("begin", "0s").strip())
        if _local(node.tag) == "p":
            yield begin, _ttml_text(node)
            return
        for child in node:
            yield from walk(child, begin)

    for node in root:
        if _local(node.tag) == "body":
            yield from walk(node, 0.0)


def _ttml_text(node: ElementTree.Element) -> str:
    parts = ["\n"] if _local(node.tag) == "br" else [" ".join((node.text or "").split("\n"))]
    for child in node:
        parts.append("" if _local(child.tag) == "metadata" else _ttml_text(child))
        parts.append(" ".join((child.tail or "").split("\n")))
    return "".join(parts)


def _local(name: str) -> str:
    """Return an XML name without its namespace, of which TTML has had several; a comment has none."""
    return name.rpartition("}")[2] if isinstance(name, str) else ""
