"""
Readers and parsers get damaged and hostile data: each gives a value or an error of this project by name, soon.

The examples are the same every time; `make test-fuzz` takes other ones, and more of them.
"""

import json
import signal
import struct
import time
from contextlib import contextmanager
from itertools import count

import media_files as files
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maple_trl.chat.structured import NoObjectError, read_object
from maple_trl.data.record_files import TableError, read_records
from maple_trl.data.validation import validate_tables
from maple_trl.jobs.config_files import read_config
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.options import parse_args
from maple_trl.jobs.tables import read_tables
from maple_trl.metrics.answers import rouge_f1, word_error_rate, words
from maple_trl.modalities import ModalityTag
from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.media.subtitles import read_subtitle
from maple_trl.rewards import accuracy_reward, format_reward
from maple_trl.rewards.answers import chosen_option, extract_answer, extract_bracketed, grade_answer
from maple_trl.rewards.judge_texts import caption_text, echoes, harmless, read_verdict, think_block
from maple_trl.rewards.localisation import parse_box, parse_intervals
from maple_trl.rewards.measures import measure, told_letters, told_number
from maple_trl.rewards.places import parse_object_place


LONG = settings.get_current_profile_name() == "long"
CPU_SECONDS = 3.0
"""For one example; texts have up to 40 000 characters, which take milliseconds where nothing is quadratic."""


def bounded(examples):
    """As many examples; of the profile `long` its own. Whether they are the same each time is the profile's."""
    calm = {"suppress_health_check": list(HealthCheck), "database": None}
    return settings(**calm) if LONG else settings(max_examples=examples, **calm)


@contextmanager
def within(seconds=CPU_SECONDS):
    """Ends what computes for longer; waiting does not count, so that a busy machine fails no test."""

    def end(*_):
        raise AssertionError(f"more than {seconds} s of CPU")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_what_computes_too_long_is_ended():
    """The control."""
    with pytest.raises(AssertionError, match=r"more than 0\.05 s of CPU"), within(0.05):
        while True:
            time.monotonic()


def texts(*pieces):
    """Texts of pieces that mean something to a parser and others, where a part may stand thousands of times."""
    piece = (
        st.sampled_from(pieces)
        | st.text(max_size=6)
        | st.sampled_from([" ", "\n", "\0", "\ud800", "𝟙", "９", "\u2028"])
    )
    part = st.builds(
        lambda found, times: "".join(found) * times, st.lists(piece, max_size=5), st.sampled_from([1, 1, 2, 4000])
    )
    return st.lists(part, max_size=4).map(lambda parts: "".join(parts)[:40_000])


# Answers, places, grades


ANSWERS = texts(
    *("<answer>", "</answer>", "<think>", "</think>", "A", "(B)", "C.", "[D]", "\\boxed{", "}", "{", "$", "**", "__", "`", "\\(", "\\)"),
    *("the answer is ", "The final answer:", "答案是", "option ", "i choose ", " is the correct answer", "\\text{", "12.5", "-3", "1e308", "9" * 400),
    *("1/2", "%", ",", "and", "or", "yes", "\\frac{1}{2}", "(", "[", "<", '"', "'"),
)  # fmt: skip
OPTIONS = st.none() | st.lists(st.sampled_from(["red", "A. blue", "", "B", "None of the above", "12"]), max_size=6)


@bounded(150)
@given(ANSWERS, ANSWERS, OPTIONS)
def test_answers(text, solution, options):
    with within():
        answer = extract_answer(text)
        for found in (answer, text, extract_bracketed(text)):
            try:
                grade = grade_answer(found, solution, options)
                assert grade is None or 0.0 <= grade <= 1.0
                told_number(found), told_letters(found)
            except ValueError as error:  # of options that are wrong, which the row's author is told
                assert "option" in str(error)
        chosen_option(text)
        completion = [[{"role": "assistant", "content": text}]]
        assert format_reward(completions=completion)[0] in (0.0, 1.0)
        score = accuracy_reward(completions=completion, solution=[solution])[0]
        assert score is None or 0.0 <= score <= 1.0


PLACES = texts(
    "1",
    "12.5",
    "00:12",
    ":",
    "-",
    "–",
    " to ",
    "[",
    "]",
    "(",
    ")",
    ",",
    ";",
    " and ",
    "s",
    "seconds",
    "9" * 400,
    "nan",
    "+",
)


@bounded(150)
@given(PLACES, texts("dog", "left", "bottom", "near", "centre", ",", " and ", "of the picture"))
def test_places_and_times(text, place):
    with within():
        intervals, box = parse_intervals(text), parse_box(text)
        assert intervals is None or all(start < end for start, end in intervals)
        assert box is None or (box[0] < box[2] and box[1] < box[3])
        parse_object_place(place)


@bounded(20)
@given(ANSWERS.map(lambda text: text[:3000]), ANSWERS.map(lambda text: text[:3000]))
def test_measures(text, truth):
    with within(2 * CPU_SECONDS):
        for metric in ("counting", "letters_f1", "word_error_rate", "rouge"):
            try:
                measure(metric, text, truth)
            except ValueError as error:
                assert str(error)
        words(text), word_error_rate(text[:500], truth[:500] or "x"), rouge_f1(text[:500], truth[:500])


GRADES = texts(
    *('{"missing": 0.8', '"wrong": 1', "}", "{", "[", "]", ":", ",", "NaN", "Infinity", "1e999", '"', "\\u0000", "\\ud800", "```json"),
    *("missing: 0.5\n", "**wrong** = 1.0\n", "</think>", "<think>", "true", "null", "9" * 5000),
)  # fmt: skip


@bounded(150)
@given(GRADES)
def test_judges_answers(text):
    with within():
        schema = {"type": "object", "required": ["missing"], "properties": {"missing": {"type": "number"}}}
        for read in (
            lambda: read_verdict(text, ["missing", "wrong"], None),
            lambda: read_verdict(text, ["missing", "wrong"], [0.0, 0.5, 1.0]),
            lambda: read_object(text, schema),
            lambda: read_verdict(text, ["missing", "wrong"], None, cut=True),
            lambda: read_object(text, schema, cut=True),
        ):
            try:
                assert all(0 <= value <= 1 for value in read().values() if read.__code__.co_names[0] == "read_verdict")
            except NoObjectError:
                pass
        assert "<|" not in harmless(text) and len(harmless(text, 10)) < 60
        caption_text(text), think_block(text), echoes(text, text)


@bounded(100)
@given(texts("V", "A", "S", "VA", "V+A", "video", "AUDIO", ",", "+", "VAS", "v"))
def test_tags(text):
    with within():
        try:
            assert ModalityTag(text) in ModalityTag
        except ValueError:
            pass


# Subtitles


SUBTITLES = texts(
    *("WEBVTT\n\n", "1\n", "00:00:01,000 --> 00:00:02,000\n", "00:01.000 --> 00:02.000", "-->", "-00:00:01", "<v Ann>", "</v>", "NOTE\n"),
    *("[Script Info]\n", "[Events]\n", "Format: Layer, Start, End, Text\n", "Dialogue: 0,0:00:00.00,0:00:02.00,,,0,0,0,,", "{\\an8}", "{\\p1}"),
    *("{1}{25}", "[10][20]", "|", "{y:i}", '[{"start": 1, "end": 2, "text": "', '"}]', '{"segments": ', "[", "{", "NaN", "9" * 400),
    *("<?xml version='1.0'?>", "<tt xmlns='http://www.w3.org/ns/ttml'>", "<body>", "<div>", "<p begin='1s'>", "</p>", "</body></tt>", "&amp;", "&#0;"),
    *("<!DOCTYPE a [<!ENTITY b 'c'>]>", "&b;", "<b>", "<font color='red'>", "words", "0:00:00.000,0:00:01.000\n", "\r", "\r\n"),
)  # fmt: skip
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "utf-32"])


@bounded(250)
@given(SUBTITLES, ENCODINGS, st.binary(max_size=4), st.booleans())
def test_subtitles(text, encoding, more, before):
    data = text.encode(encoding, "replace")
    with within():
        try:
            found = read_subtitle(more + data if before else data + more, "a.srt").text()
            assert found.strip() and "\0" not in found
        except MediaError as error:
            assert error.reason == "bad-subtitle"


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        b'{"segments": ' * 50_000,
        b"<tt>" + b"<div>" * 50_000,
        b"1\n00:00:01,000 --> 00:00:02,000\n" + b"<" * 200_000,
        b"1\n00:00:01,000 --> 00:00:02,000\n" + b"<v " * 60_000,
        b"1\n00:00:01,000 --> 00:00:02,000\n" + b"{\\an8" * 40_000,
        b"1\n00:00:01,000 --> 00:00:02,000\n" + b"<v a>" * 40_000,
        b"1\n00:00:01,000 --> 00:00:02,000\n" + b"<font " * 40_000,
        b"00:00:01,000 -->" * 10_000,
        b"1:" * 100_000,
        b" " * 200_000 + b"-->",
        b"-0:" * 60_000 + b"-->",
        b"&" * 200_000,
        b"[Events]\n" + b"Dialogue: 0,0:00:00.00,0:00:02.00,,,0,0,0,," + b"{\\" * 80_000,
        b"{1}{2}" + b"{y:" * 60_000,
        b";\n" * 100_000 + b"[events]",
        "é".encode("cp1252") * 200_000,
    ],
)
def test_long_subtitles_take_time_by_their_length(data):
    with within(2 * CPU_SECONDS):
        try:
            read_subtitle(data, "a.srt")
        except MediaError as error:
            assert error.reason == "bad-subtitle"


# Jobs and rows


YAML = texts(
    *("trainer: mapo\n", "max_steps: ", "1", "-1", "1e999", ".nan", "[", "]", "{", "}", "&a ", "*a", "<<: ", "? ", ": ", "- ", "\t", "|\n", "!!python/name:os.system"),
    *("!!binary ", "!!set ", "2026-01-01", "reward_funcs: ", "output_dir: x\n", "learning_rate: ", "true", "null", "'", '"', "%YAML 9\n", "---\n", "...\n"),
    *("extends: a.yaml\n", "env: {A: 1}\n", "0x", "1_000", "=", "&a [*a]"),
)  # fmt: skip


@bounded(150)
@given(YAML)
def test_job_files(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with within():
        try:
            assert isinstance(read_config(str(path)), dict)
        except SetupError as error:
            assert str(path) in str(error)


JOB = [
    "--dataset_name",
    "builtin:seven-tags",
    "--output_dir",
    "x",
    "--use_cpu",
    "true",
    "--bf16",
    "false",
    "--dtype",
    "float32",
]


@bounded(12)
@given(st.lists(st.sampled_from(["--max_steps", "--beta", "--trainer", "--reward_funcs", "--bf16", "--config", "1", "nan", "", "-1", "--", "=", "--max_steps=x", "no.yaml", "mapo", "{}", "\0"]), max_size=6))  # fmt: skip
def test_options(words):
    parse_args(JOB)  # what is imported at first counts for no example
    with within(2 * CPU_SECONDS):
        try:
            parse_args([*JOB, *words])
        except (SetupError, SystemExit, ValueError) as error:
            assert str(error)


CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["V", "a.mp4", "../x", "http://h/a.mp4", "[{", "\0"]),
    lambda cells: st.lists(cells, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "video", "start"]), cells, max_size=3),
    max_leaves=6,
)  # fmt: skip
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["prompt", "tag", "video", "audio", "image", "images", "subtitle", "solution", "options", "id", "video_start", "stratum"]), CELLS, max_size=6),
    max_size=3,
)  # fmt: skip


@bounded(80)
@given(ROWS, st.sampled_from([None, "[" * 100_000, '{"prompt": ' * 50_000, '{"a": ' + "9" * 5000 + "}", "{}", "\ufeff", '{"prompt": "\\ud800"}']))  # fmt: skip
def test_rows(tmp_path_factory, rows, line):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    lines = [json.dumps(row) for row in rows] + ([] if line is None else [line])
    path.write_text("\n".join(lines), encoding="utf-8")
    with within(2 * CPU_SECONDS):
        for read, errors in (
            (lambda: list(read_records(path)), TableError),
            (lambda: read_tables([path]), SetupError),
            (lambda: validate_tables([path], media_root=path.parent), (TableError, SetupError)),
        ):
            try:
                read()
            except errors as error:
                assert "fuzzed.jsonl" in str(error)


# Media, in the decoder processes that decode them in runs


KINDS = ("mp4", "mkv", "avi", "wav", "flac", "ogg", "png", "gif", "webp", "tiff", "jpg")
NUMBERS = st.sampled_from(
    [0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1_000_000_000]
)
NAMES = count()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Files of each kind, and what reads them with one process of 1 GiB and five seconds."""
    folder = tmp_path_factory.mktemp("fuzzed")
    for suffix, codec in (("mp4", "aac"), ("mkv", "aac"), ("avi", "pcm_s16le")):
        files.write_video(folder / f"a.{suffix}", audio=files.tone(0.5, 16000), audio_codec=codec)
    for suffix, codec, rate in (("wav", "pcm_s16le", 16000), ("flac", "flac", 16000), ("ogg", "libopus", 48000)):
        files.write_audio(folder / f"a.{suffix}", files.tone(0.5, rate), rate, codec)
    for suffix in ("png", "gif", "webp", "tiff", "jpg"):
        Image.fromarray(files.picture(1, 40, 60)).save(folder / f"a.{suffix}")
    return folder, MediaLoader(folder, MediaLimits(decode_timeout=5), backend="pyav", workers=1, worker_bytes=1 << 30)


def damaged(data, changes, end, copied):
    """A file with numbers written over its fields, a part of it again, and its end gone."""
    found = bytearray(data)
    for place, number, form in changes:
        field = struct.pack(form, number & (1 << 8 * struct.calcsize(form)) - 1)
        at = min(int(place * len(found)), len(found) - 1)
        found[at : at + len(field)] = field
    if copied:
        start, stop, to = sorted(int(share * len(found)) for share in copied)
        found[to:to] = found[start:stop]
    return bytes(found[: max(1, int(end * len(found)))])


# Headers stand at the start, and in mp4 at the end.
SHARE = st.floats(0, 1) | st.floats(0, 0.1) | st.floats(0.8, 1)


@bounded(30)
@pytest.mark.parametrize("kind", KINDS)
@given(
    changes=st.lists(
        st.tuples(SHARE, NUMBERS, st.sampled_from(["B", ">H", "<H", ">I", "<I", ">Q", "<Q"])), max_size=8
    ),
    end=st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.5, 0.1, 0.001]),
    copied=st.none() | st.tuples(SHARE, SHARE, SHARE),
)
@pytest.mark.matrix(cases=7)
def test_media(media, kind, changes, end, copied):
    folder, loader = media
    name = f"{next(NAMES)}.{kind}"
    (folder / name).write_bytes(damaged((folder / f"a.{kind}").read_bytes(), changes, end, copied))
    calls = (loader.image,) if kind in ("png", "webp", "tiff", "jpg") else (loader.video, loader.audio, loader.probe)
    try:
        with within():  # of this process, whose decoder has a limit of its own
            for call in calls:
                try:
                    found = call(name)
                    for part in ("frames", "waveform", "pixels"):
                        assert np.isfinite(getattr(found, part, 0)).all()
                except MediaError as error:  # which has no reasons but those that are documented
                    assert error.path == name
    finally:
        (folder / name).unlink()
