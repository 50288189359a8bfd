"""Subtitle files to plain text."""

import html
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.omni.media.loader import MediaError, MediaLoader
from maple_trl.omni.media.subtitles import NOT_UTF8, is_subtitle_file, read_subtitle, subtitle_text, unread_file


SRT = """1
00:00:02,000 --> 00:00:03,000
<i>second</i> line &amp; more

2
00:00:00,000 --> 00:00:01,000
first {\\an8}line

3
00:00:03,000 --> 00:00:04,000
second line & more

4
00:00:04,000 --> 00:00:05,000
second line & more
third
"""

VTT = """WEBVTT
Kind: captions

NOTE a comment

STYLE
::cue { color: red }

intro
00:00.000 --> 00:01.000 align:start
<v Anna>Hello <c.loud>there</c></v>

00:01.000 --> 00:02.000
<00:00:01.200>3 &lt; 4
"""

SEGMENTS = [{"start": 1.5, "end": 2, "text": " later "}, {"start": 0, "end": 1, "text": "sooner"}]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (SRT.encode(), "first line\nsecond line & more\nthird"),
        (SRT.replace("\n", "\r\n").encode("utf-8-sig"), "first line\nsecond line & more\nthird"),
        (SRT.encode("utf-16"), "first line\nsecond line & more\nthird"),
        (VTT.encode(), "Anna: Hello there\n3 < 4"),
        (json.dumps(SEGMENTS).encode(), "sooner\nlater"),
        (json.dumps({"text": "x", "segments": SEGMENTS}).encode(), "sooner\nlater"),
        ("1\n00:00:00,000 --> 00:00:01,000\nЗдравствуй, 世界\n".encode(), "Здравствуй, 世界"),
        (b"1\n00:00:00,000 --> 00:00:01,000\na < b and c > d\n", "a < b and c > d"),
    ],
    ids=["srt", "srt-crlf-bom", "srt-utf16", "vtt", "segments", "whisper", "letters", "no-tag"],
)
def test_text(data, expected):
    assert subtitle_text(data, "x") == expected


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (SRT.replace("first", "Здравствуй").encode("cp1251"), "UTF-8"),
        ("1\n00:00:00,000 --> 00:00:01,000\nこんにちは\n".encode("shift-jis"), "UTF-8"),
        ("1\n00:00:00,000 --> 00:00:01,000\nün œuf brûlé\n".encode()[:-2] + b"\n", "UTF-8"),  # cut within a letter
        (b"PG\x00\x00\x00\x01", "binary"),
        (b'<?xml version="1.0"?><!DOCTYPE tt [<!ENTITY a "b">]><tt/>', "document type"),
        (b'<tt xmlns="http://www.w3.org/ns/ttml"><body><p begin="one">x</p></body></tt>', "parsed"),
        (b"no times here", "no cue"),
        (b"WEBVTT\n\n", "no cue"),
        (b"1\n00:00:00,000 --> 00:00:01,000\n<i></i>\n", "no cue"),
        (b"[]", "no cue"),
        (b"{broken", "JSONDecodeError"),
        (b'{"words": []}', "KeyError"),
        (b'[{"start": 0, "end": 1}]', "KeyError"),
        (b'[{"start": "a", "end": 1, "text": "x"}]', "parsed"),
        (b'[{"start": NaN, "end": 1, "text": "x"}]', "parsed"),
        (b'[{"start": 1e999, "end": 1, "text": "x"}]', "parsed"),
        (b'["text"]', "parsed"),
        (b"[" * 100_000, "parsed"),
        (b'[{"start": 1, "text": "half \\ud800"}]', "surrogates not allowed"),
        ("1\n00:00:01,000 --> 00:00:02,000\nZażółć gęślą jaźń, proszę\n".encode("cp1250"), "UTF-8"),
        ("1\n00:00:01,000 --> 00:00:02,000\n你好,世界。今天天氣很好\n".encode("big5"), "UTF-8"),
        (
            b"1\n00:00:01,0 --> 00:00:02,0\nA\n\n2\n00:00:-3,0 --> 00:00:04,0\nB\n",
            "line 6, .*whose times cannot be read",
        ),
        (b"a" * ((16 << 20) + 1), "at most"),
    ],
)
def test_unusable_files_are_named(data, detail):
    with pytest.raises(MediaError, match=detail) as caught:
        subtitle_text(data, "dir/a.srt")
    assert caught.value.reason == "bad-subtitle" and caught.value.path == "dir/a.srt"


def test_loader_reads_once_and_the_content_decides(tmp_path):
    (tmp_path / "a.srt").write_text(VTT, encoding="utf-8")
    (tmp_path / "empty.srt").touch()
    loader = MediaLoader(tmp_path, allow_network=True)
    assert loader.subtitle("a.srt") == loader.subtitle(tmp_path / "a.srt") == "Anna: Hello there\n3 < 4"
    assert loader.decodes == {("subtitle", str(tmp_path / "a.srt")): 1}
    for path, reason in (
        ("empty.srt", "empty-file"),
        ("b.srt", "not-found"),
        ("http://h/a.srt", "network-not-allowed"),
    ):
        with pytest.raises(MediaError) as caught:
            loader.subtitle(path)
        assert caught.value.reason == reason


# What is said, and what only stands beside it


CUE = "00:00:0{}.000 --> 00:00:0{}.000\n{}\n\n"


@pytest.mark.parametrize(
    ("cues", "expected"),
    [
        (["Hello.", "NOTE Confidence: 0.93", "Bye.", "NOTE\nreviewed by nobody\ntwice", "STYLE\n::cue { color: red }"], "Hello.\nBye."),
        (["REGION\nid:fred\nwidth:40%", "Hello.", "STYLE\n::cue(b) {\n}\n"], "Hello."),
        (["Hello.", "STYLE\n::cue {\n\ncolor: red;\n\n}", "Bye."], "Hello.\nBye."),
        (["Hello.", "WEBVTT\nX-TIMESTAMP-MAP=LOCAL:00:00:00.000,MPEGTS:9000", "Bye."], "Hello.\nBye."),
        (["Hello.\nNOTE well: this is said\nNOTE"], "Hello.\nNOTE well: this is said\nNOTE"),
        (["NOTEBOOK in hand,\nSTYLED hair"], "NOTEBOOK in hand,\nSTYLED hair"),
        (["<v Ann>It is mine.", "<v Bob>No."], "Ann: It is mine.\nBob: No."),
        (["<v.loud.first Ann Lee>It is <i>mine</i>.</v> <v Bob>No.</v>\nYes."], "Ann Lee: It is mine.\nBob: No.\nYes."),
        (["<v O&apos;Neil>Two\nlines", "<v Ann>Ann: once", "<v Eve></v>"], "O'Neil: Two\nlines\nAnn: once"),
        (["<c.yellow.bg_blue>A</c> <lang en><u>b</u></lang> <ruby>c<rt>d</rt></ruby> <00:00:01.500>e"], "A b cd e"),
        (["{laughs} C:\\New\\hello {\\an8}{\\i1}there"], "{laughs} C:\\New\\hello there"),
    ],
    ids=["notes", "region", "sheet", "joined", "note-said", "words", "voices", "two-voices", "names", "spans", "braces"],
)  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_webvtt_is_what_is_said(cues, expected, end):
    asides = ("NOTE ", "NOTE\n", "STYLE\n", "REGION\n", "WEBVTT\n")
    text = "WEBVTT - title\nKind: captions\n\n"
    for i, cue in enumerate(cues):
        text += cue + "\n\n" if cue.startswith(asides) else CUE.format(i, i + 1, cue)
    assert subtitle_text(text.replace("\n", end).encode(), "a.vtt") == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("{laughs} C:\\New\\hello", "{laughs} C:\\New\\hello"),
        ("{\\an8}up {\\i1}there{\\i0}", "up there"),
        ("a <b and c> d, I <3 you > me", "a <b and c> d, I <3 you > me"),
        ("<b>bold</b> <font color='red'>red</font><br/><i>new</i>", "bold red\nnew"),
        ("<LAUGHS> NOTE\n\nStill said", "<LAUGHS> NOTE\nStill said"),
        ("How many?\n42", "How many?\n42"),
        ("At 10:30, 11:45 and 12:00", "At 10:30, 11:45 and 12:00"),
        ("10:30, 11:45", "10:30, 11:45"),
    ],
)
def test_subrip_is_what_is_said(said, expected):
    """Between two others, so that neither numbers nor blank lines of a neighbour are taken for it."""
    texts = ["before", said, "after"]
    data = "".join(f"{i}\n00:00:0{i},000 --> 00:00:0{i},900\n{text}\n\n" for i, text in enumerate(texts, 1))
    assert subtitle_text(data.encode(), "a.srt") == f"before\n{expected}\nafter"
    last = f"7\n00:00:01,000 --> 00:00:02,000\n{said}"
    assert subtitle_text(last.replace("\n", "\r").encode(), "mac.srt") == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("1\n-00:00:02,000 --> -00:00:01,000\nA\n\n2\n-00:00:03,000 --> 00:00:01,000\nB\n", "B\nA"),
        ("1\n00: 00: 05, 000 --> 00: 00: 06, 000\nA\n\n2\n00:00:01,0000 -> 00:00:02,0000\nB\n", "B\nA"),
        ("1\n\n00:00:01,000 --> 00:00:02,000\n\n1984\n\n2\n\n00:00:03,000 --> 00:00:04,000\n\nB", "1984\nB"),
        ("1\r\r\n00:00:01,000 --> 00:00:02,000\r\r\nA\r\r\n\r\r\n2\r\r\n00:00:03,000 --> 00:00:04,000\r\r\nB", "A\nB"),
        ("1\n00:00:01,000 --> 00:00:02,000\n{y:i}{C:$0000ff}A {sighs}\n", "A {sighs}"),
        ("{0}{25}42\n{30}{60}B\n", "42\nB"),
    ],
    ids=["negative", "spaces", "blank lines", "converted twice", "MicroDVD's tags", "a number said first"],
)
def test_what_sloppy_writers_leave(data, expected):
    assert subtitle_text(data.encode(), "a") == expected


def test_ass_keeps_neither_comments_nor_drawings():
    events = [
        ("Comment", "0:00:00.50", "hidden"),
        ("Dialogue", "0:00:03.00", r"{\i1}later{\i0}, yes\Nnext\hline {a remark}"),
        ("Dialogue", "0:00:01.00", "first"),
        ("Dialogue", "0:00:01.00", r"{\p1}m 0 0 l 1 1{\p0}"),
    ]
    for before in ("", "; made by hand\n!: twice\n\n"):
        assert subtitle_text((before + ass(events)).encode(), "a.ass") == "first\nlater, yes\nnext line"


def test_windows_1252_is_read_and_counted(tmp_path):
    data = SRT.replace("first", "Größe \u201cneu\u201d").encode("cp1252")
    found = read_subtitle(data, "x")
    assert found.text().startswith("Größe \u201cneu\u201d line\n") and found.notes == (NOT_UTF8,)
    for name in ("a.srt", "b.srt"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "c.SRT").write_text(SRT)
    loader = MediaLoader(tmp_path)
    for name in ("a.srt", "b.srt", "c.SRT", "a.srt"):
        loader.subtitle(name)
    assert loader.notes == {"subtitle-cp1252": 2}


@pytest.mark.parametrize(
    ("said", "page"),
    [
        ("İyi günler, nasılsın / teşekkür ederim", "cp1254"),
        ("Nasılsın?", "cp1254"),
        ("Ağ bağlantısı kesildi, ne yapıyorsun şimdi?", "cp1254"),  # `ağ` becomes the Icelandic for `that`
        ("Bună ziua, ce mai faceţi? Mulţumesc, şi dumneavoastră?", "cp1250"),
        ("Nu ştiu ce să fac şi nici unde să mă duc.", "cp1250"),
        ("Dobrý den, jak se máš? Děkuji, přátelé, všechno je v pořádku.", "cp1250"),
        ("Jó napot kívánok! Köszönöm, jól vagyok, és ön? Örülök, hogy eljött a nővérével.", "cp1250"),
        ("Gdje si bio? Čekao sam te cijeli dan, što se dogodilo? Dođi ovamo.", "cp1250"),
        ("Labas, kaip sekasi? Ačiū, šiandien viskas gerai.", "cp1257"),
        ("Labdien, kā jums klājas? Paldies, šodien viss ir labi.", "cp1257"),
    ],
)
def test_other_code_pages_are_not_taken_for_windows_1252(said, page):
    with pytest.raises(MediaError, match="convert the file to UTF-8"):
        read_subtitle(f"1\n00:00:01,000 --> 00:00:02,000\n{said}\n".encode(page), "a.srt")


@pytest.mark.parametrize(
    "said",
    [
        "Ég veit það ekki. Hvað ertu að gera? Þú verður að koma, ýttu á þetta.",
        "Eg veit tað ikki, hvat ger tú í dag? Hann býr í Føroyum.",
        "Où êtes-vous allé ? Une œuvre naïve à Noël, ça suffit.",
        "¿Dónde está el niño? Mañana, señor Agüero, en el 1º piso. La 2ª vez.",
        "Não sei o que você está fazendo, então vamos à praia. nº 5",
        "Perché non è più così? Città, virtù, lunedì però.",
        "Hé, één moment, de coördinatie is geïnstalleerd.",
        "Hvor er du? Jeg håber, du får en god dag på øen, ærligt.",
        "Hyvää päivää, šakki on hyvä peli.",
        "Guðmundsdóttir was there with the others, and nobody in the whole wide room said a single word to her about it.",
    ],
)
def test_languages_of_windows_1252_are_read(said):
    found = read_subtitle(f"1\n00:00:01,000 --> 00:00:02,000\n{said}\n".encode("cp1252"), "a.srt")
    assert (found.text(), found.notes) == (said, (NOT_UTF8,))


def test_utf16_without_a_mark():
    for encoding in ("utf-16-le", "utf-16-be"):
        assert subtitle_text(SRT.encode(encoding), "x").startswith("first line\n")


# Random cues, written by another hand than reads them


LINE = st.text(st.sampled_from("abcXYZ 019.,!?'\"-éЖ世{}\\/:&<>#;="), max_size=12)
LINE = LINE.filter(lambda text: "{\\" not in text)  # which is markup: see the examples above
CUES = st.lists(st.lists(LINE, min_size=1, max_size=3), min_size=1, max_size=5)


def clock(seconds, comma="."):
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{comma}000"


def write_vtt(cues, asides):
    text = "WEBVTT\n\n"
    for i, (begin, lines) in enumerate(cues):
        text += asides[i % len(asides)] + (f"cue {i}\n" if i % 2 else "")
        text += f"{clock(begin)} --> {clock(begin + 1)} align:start\n" + "\n".join(map(html.escape, lines)) + "\n\n"
    return text + asides[-1]


def write_srt(cues, asides):
    numbers = iter(range(1, len(cues) + 1))
    blocks = [
        [str(next(numbers)), f"{clock(b, ',')} --> {clock(b + 1, ',')}", *map(html.escape, ls)] for b, ls in cues
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def write_sbv(cues, asides):
    return "\n\n".join("\n".join([f"{clock(b)},{clock(b + 1)}", *map(html.escape, ls)]) for b, ls in cues)


def write_ttml(cues, asides):
    lines = [f'<p begin="{b}s" end="{b + 1}s">{"<br/>".join(map(html.escape, ls))}</p><!-- no -->' for b, ls in cues]
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<tt xmlns="http://www.w3.org/ns/ttml"><head><metadata>no</metadata></head>'
    return f"{head}<body><div>{''.join(lines)}</div></body></tt>"


def write_json(cues, asides):
    return json.dumps({"segments": [{"start": b, "end": b + 1, "text": "\n".join(lines)} for b, lines in cues]})


def ass(events):
    head = (
        "[Script Info]\nScriptType: v4.00+\n\n[V4+ Styles]\nFormat: Name, Fontname\nStyle: Default,Arial\n\n[Events]\n"
    )
    head += "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
    lines = (
        f"{kind}: 0,{at},{''.join(end) or '9:00:00.00'},Default,Ann,0,0,0,,{text}\n" for kind, at, text, *end in events
    )
    return head + "".join(lines)


def write_ass(cues, asides):
    at = [(f"0:{b // 60:02d}:{b % 60:02d}.00", f"0:{(b + 1) // 60:02d}:{(b + 1) % 60:02d}.00") for b, _ in cues]
    texts = [r"\N".join(lines) for _, lines in cues]
    return ass([("Dialogue", begin, text, end) for (begin, end), text in zip(at, texts, strict=True)])


def write_microdvd(cues, asides):
    return "{1}{1}25.000\n" + "".join(f"{{{b * 25 + 2}}}{{{b * 25 + 27}}}{{y:i}}{'|'.join(ls)}\n" for b, ls in cues)


ASIDES = [
    "",
    "NOTE Confidence: 0.9\n\n",
    "NOTE\nof many\nlines\n\n",
    "STYLE\n::cue { color: red }\n\n",
    "REGION\nid:a\n\n",
]
WRITERS = {"vtt": write_vtt, "srt": write_srt, "sbv": write_sbv, "ttml": write_ttml, "json": write_json}
WRITERS |= {"ass": write_ass, "sub": write_microdvd}


def expected_text(cues):
    said = [" ".join(line.split()) for _, lines in sorted(cues, key=lambda cue: cue[0]) for line in lines]
    said = [line for line in said if line]
    return "\n".join(line for i, line in enumerate(said) if i == 0 or said[i - 1] != line)


@pytest.mark.parametrize("format_", WRITERS)
@given(
    texts=CUES,
    begins=st.lists(st.integers(0, 3000), min_size=5, max_size=5, unique=True),
    asides=st.lists(st.sampled_from(ASIDES), min_size=1, max_size=3),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    part=st.tuples(st.integers(0, 3000), st.integers(1, 1000)),
)
@pytest.mark.matrix(cases=2)
def test_cues_come_back(format_, texts, begins, asides, end, encoding, part):
    if format_ in ("ass", "sub"):  # here braces, backslashes and bars are markup
        texts = [[line.translate(dict.fromkeys(map(ord, "{}\\/"))) for line in lines] for lines in texts]
    if format_ in ("vtt", "sbv"):  # a blank line ends the cue, and a line of times in a cue begins another
        texts = [[line if line.strip() else "x" for line in lines] for lines in texts]
    cues = list(zip(begins, texts, strict=False))
    if format_ == "sbv":
        cues = sorted(cues)
    data = WRITERS[format_](cues, asides).replace("\n", end).encode(encoding)
    expected = expected_text(cues)
    if expected:
        found = read_subtitle(data, f"a.{format_}")
        assert found.text() == expected
        first, last = (
            part[0] + 0.5,
            sum(part) + 0.5,
        )  # cues last a second, from whole ones on, but for MicroDVD's 0.08 s
        assert found.text([(first, last)]) == expected_text([cue for cue in cues if first - 1 < cue[0] < last])
    else:
        with pytest.raises(MediaError, match="no cue"):
            subtitle_text(data, f"a.{format_}")


# Names of files


@pytest.mark.parametrize(
    "suffix", [".srt", ".SRT", ".vtt", ".Vtt", ".json", ".ass", ".ssa", ".ttml", ".dfxp", ".sbv", ".sub"]
)
def test_files_that_are_read(suffix):
    assert is_subtitle_file(f"my subs/clip one{suffix}") and not is_subtitle_file(f"two\nlines{suffix}")


WORDS = st.text(st.sampled_from("abcdeé 01-_()"), min_size=1, max_size=8).map(str.strip).filter(bool)
ENDINGS = [
    "srt.bak",
    "html",
    "mkv",
    "mp4",
    "SRT.gz",
    "stl",
    "sup",
    "idx",
    "lrc",
    "smi",
    "txt",
    "wav",
    "xml",
    "ass.zip",
    "webm",
    "m2ts",
]


@given(
    st.lists(WORDS, min_size=1, max_size=3),
    st.sampled_from(ENDINGS),
    st.booleans(),
    st.sampled_from(["", "sub dir/", "a/b/"]),
)
def test_names_of_files_are_no_text(words, ending, upper, folder):
    name = f"{folder}{' '.join(words)}.{ending.upper() if upper else ending}"
    assert unread_file(name, "/nowhere") == "looks like a file"
    assert unread_file(f"{name}.\nIt is a name.", "/nowhere") is None


@pytest.mark.parametrize(
    "name", ["./movie", "~/movie.srv3", "C:/movie", "https://host/captions?id=3", "file:///subs/a"]
)
def test_paths_and_addresses_are_no_text(name):
    assert unread_file(name, "/nowhere") == "looks like a file"
    assert unread_file(f"See {name} for more", "/nowhere") is None


def test_a_text_that_names_a_file_below_the_root_is_no_text(tmp_path):
    (tmp_path / "subs").mkdir()
    for name in ("subs/movie one", "speech", "subs/notes.xyz"):
        (tmp_path / name).touch()
        assert unread_file(name, str(tmp_path)) == "names a file below the media root"
    for text in ("subs", "Speech.", "No speech", "a" * 5000, "x\0y"):
        assert unread_file(text, str(tmp_path)) is None
