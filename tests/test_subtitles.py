"""Subtitle files to plain text."""

import json

import pytest

from maple_trl.omni.media import MediaError, MediaLoader
from maple_trl.omni.subtitles import subtitle_text


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
        (VTT.encode(), "Hello there\n3 < 4"),
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
        (SRT.replace("first", "Grüße").encode("latin-1"), "UTF-8"),
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
    assert loader.subtitle("a.srt") == loader.subtitle(tmp_path / "a.srt") == "Hello there\n3 < 4"
    assert loader.decodes == {("subtitle", str(tmp_path / "a.srt")): 1}
    for path, reason in (
        ("empty.srt", "empty-file"),
        ("b.srt", "not-found"),
        ("http://h/a.srt", "network-not-allowed"),
    ):
        with pytest.raises(MediaError) as caught:
            loader.subtitle(path)
        assert caught.value.reason == reason
