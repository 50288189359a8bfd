"""Which lines of a subtitle file are fed: those that are shown during the part of the clip that the row is fed."""

import json
import re

import pytest
from datasets import Dataset
from media_files import tone, write_audio, write_video
from tiny_models import build_tiny

from maple_trl.evaluation.served_prompts import MessageEncoder
from maple_trl.modalities import ModalityTag
from maple_trl.omni.errors import MediaError
from maple_trl.omni.families import family_for
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.media.subtitles import read_subtitle
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.trainers.common.quarantine import RowRegistry


WORDS = ("red", "green", "blue", "yellow")
SRT = "".join(
    f"{i}\n00:00:00,{i * 200:03} --> 00:00:00,{i * 200 + 200:03}\n{word}\n\n" for i, word in enumerate(WORDS)
)
"""Each word for 0.2 s of a clip of one second, whose last 0.2 s are without."""

QUESTION = {"type": "text", "text": "what"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    write_video(root / "clip.mp4", frames=24, audio=tone(1.0, 16000))
    write_video(root / "long.mp4", frames=60, fps=24, audio=tone(2.5, 16000))
    write_audio(root / "sound.wav", tone(1.0, 16000))
    (root / "words.srt").write_text(SRT)
    (root / "frames.sub").write_text("{0}{5}red\n{5}{10}green\n{10}{15}blue\n{15}{20}yellow\n")
    return root


def builder(folder, family=None, **options):
    limits = MediaLimits(num_frames=4, min_pixels=784, max_pixels=4096, **options.pop("limits", {}))
    return PromptBuilder(family or MessageEncoder(), MediaLoader(folder, limits, workers=0), **options)


def row(*blocks, tag="VS", subtitle="words.srt", **columns):
    return {"prompt": [{"role": "user", "content": [*blocks, QUESTION]}], "tag": tag, "subtitle": subtitle, **columns}


def video(start=None, end=None, name="clip.mp4"):
    return {"type": "video", "video": name, "video_start": start, "video_end": end}


def said(prompt):
    """The words of the subtitle that a served prompt holds, in their order."""
    return tuple(re.findall("|".join(WORDS), json.dumps([m["content"] for m in prompt.messages if m])))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (row(video(0.4, 0.6)), ("blue",)),  # what ends where it begins, and begins where it ends, is not in it
        (row(video(0.3, 0.5)), ("green", "blue")),
        (row(video(0.5)), ("blue", "yellow")),
        (row(video(end=0.1)), ("red",)),
        (row(video(0.0, 5.0)), WORDS),
        (row(video(0.4, 0.6), tag="VAS"), ("blue",)),
        (row(video(0.4, 0.6), tag="AS"), ("blue",)),  # the sound is of the same segment
        (row(video(0.4, 0.6), tag="S"), ("blue",)),  # the row is about the same part, whatever it is fed
        (row({"type": "audio", "audio": "sound.wav", "audio_start": 0.4, "audio_end": 0.6}, tag="AS"), ("blue",)),
        (row(video(0.0, 0.1), video(0.5, 0.7, "long.mp4")), ("red", "blue", "yellow")),
        (row(video(0.0, 0.1), video(name="long.mp4")), WORDS),
        (row(video(0.4, 0.6), tag="VS", subtitle="red\ngreen"), ("red", "green")),  # a text has no times
        (row(video()), WORDS),
        (row(tag="VS", video="clip.mp4"), WORDS),
        (row(tag="S"), WORDS),
    ],
)
def test_a_part_of_a_clip_is_fed_the_cues_that_are_shown_in_it(folder, asked, words):
    assert said(builder(folder).encode(asked)) == words


def test_a_model_here_reads_what_a_server_is_sent(folder):
    """And with it an engine, which is handed the tokens."""
    build = builder(folder, family_for(*build_tiny("qwen2_5_omni")))
    prompt = build.encode(row(video(0.4, 0.6)))
    read = re.findall("|".join(WORDS), build.family.tokenizer.decode(prompt.input_ids))
    assert read == ["blue"] and prompt.media_tokens["subtitle"] == len(build.family.tokens("blue"))


def test_a_clip_that_is_trimmed_is_fed_the_cues_of_what_is_left(folder):
    for asked in (row(video="clip.mp4"), row(video="clip.mp4", tag="AS"), row(video="clip.mp4", tag="VAS")):
        assert said(builder(folder, limits={"max_seconds": 0.5, "overlong": "trim"}).encode(asked)) == WORDS[:3]
        assert said(builder(folder, limits={"max_seconds": 1.1, "overlong": "trim"}).encode(asked)) == WORDS
        assert said(builder(folder, limits={"max_seconds": 0.5, "overlong": "spread"}).encode(asked)) == WORDS
    short = builder(folder, limits={"max_seconds": 0.3, "overlong": "trim"})
    assert said(short.encode(row(video(0.3, 0.9)))) == ("green", "blue")
    assert said(short.encode(row(video(0.0, 0.1), video(0.5, name="long.mp4")))) == ("red", "blue", "yellow")
    assert said(short.encode(row(video="clip.mp4", tag="S"))) == WORDS  # no clip is opened


def test_keys_tell_parts_apart_and_those_of_whole_clips_stay(folder):
    build = builder(folder)
    parts = [row(video(*part), tag=tag) for part in ((0.4, 0.6), (0.0, 0.2)) for tag in ("S", "VS", "AS")]
    assert len({build.spec(asked).key for asked in parts}) == len(parts)
    # Of rows that are fed what they were fed before, so that checkpoints and records of earlier runs still name them.
    assert build.spec(row(video())).key == "2ed6f0c9a237f199"
    assert build.spec(row(video(0.4, 0.6), tag="V")).key == "e43eca35a9635f02"
    assert build.spec(row(video(0.4, 0.6), subtitle="red.")).key == "3c81ccd725146777"


def test_a_part_without_a_cue_is_no_subtitle(folder):
    """As a subtitle without a text is none: a row that needs one is left out, another one is fed the rest."""
    silent = video(0.85, 1.0)
    for tag in ("S", "VS", "AS", "VAS"):
        with pytest.raises(MediaError, match=r"no cue is shown from 0\.85 s to 1 s") as caught:
            builder(folder).encode(row(silent, tag=tag))
        assert (caught.value.reason, caught.value.path) == ("no-signal", "words.srt")
    for tag, access in ((None, "required"), ("V", "all")):
        build = builder(folder, modality_access=access)
        prompt = build.encode(row(silent, tag=tag))
        assert prompt.notes == ("no-cue-in-part",) and "Subtitles" not in json.dumps(prompt.messages)
        assert build.loader.notes["no-cue-in-part"] == 1


def test_the_rows_that_need_a_cue_and_have_none_are_found_before_training(folder):
    table = Dataset.from_list(
        [
            row(video(0.85, 1.0)),
            row(video(0.4, 0.6)),
            row(video(0.85, 1.0), tag="V"),
            row(video(0.4), subtitle="frames.sub"),
        ]
    )
    registry = RowRegistry(table, builder(folder), progress=False)
    assert {entry.rows[0]: entry.reason for entry in registry.quarantined.values()} == {
        0: "no-signal",
        3: "bad-subtitle",
    }


def test_frames_are_told_from_seconds(folder):
    whole = row(video(), subtitle="frames.sub")
    assert said(builder(folder).encode(whole)) == WORDS
    with pytest.raises(MediaError, match=r"numbers of frames.*from 0\.4 s to the end is not known.*\{1\}\{1\}25"):
        builder(folder).encode(row(video(0.4), subtitle="frames.sub"))
    cues = "{0}{5}red\n{5}{}green\n{10}{15}blue\n{15}{20}yellow\n"
    for head in ("{1}{1}25\n", "{1}{1}25,000\n", "{0}{0}25.0|x\n"):
        assert read_subtitle((head + cues).encode(), "a.sub").text([(0.3, 0.5)]) == "green\nblue"
    for head in ("{1}{1}0\n", "", "{1}{2}25\n"):
        with pytest.raises(ValueError, match="numbers of frames"):
            read_subtitle((head + cues).encode(), "a.sub").text([(0.3, 0.5)])
    tenths = cues.replace("{", "[").replace("}", "]")  # MPL2
    assert read_subtitle(tenths.encode(), "a.sub").text([(0.6, 1.2)]) == "green\nblue"


TTML = """<tt xmlns="http://www.w3.org/ns/ttml"><body begin="1s"><div begin="1s" end="8s">
<p begin="0s" dur="1s">red</p><p begin="2s">green</p><p><span begin="3s" end="4s">blue</span></p></div>
<p begin="9s" end="never">yellow</p></body></tt>"""


@pytest.mark.parametrize(
    ("data", "part", "expected"),
    [
        # Without an end, or with one before its start, a cue is shown until the next one begins.
        ('[{"start": 1, "text": "red"}, {"start": 3, "end": "?", "text": "green"}]', (2.0, 3.0), "red"),
        ('[{"start": 1, "end": 0, "text": "red"}, {"start": 3, "text": "green"}]', (9.0, 10.0), "green"),
        ('[{"start": 1, "text": ""}, {"start": 0, "text": "red"}, {"start": 0, "text": "blue"}]', (0.5, 1.0), "red\nblue"),
        ('[{"start": 1, "text": ""}, {"start": 0, "text": "red"}]', (1.5, 2.0), ""),
        # One that is shown for no time is at its start.
        ('[{"start": 1, "end": 1, "text": "red"}, {"start": 9, "end": 9, "text": "blue"}]', (1.0, 9.0), "red"),
        # Rolling captions: a line that is still there is read, once.
        ('[{"start": 0, "end": 2, "text": "red"}, {"start": 2, "end": 4, "text": "red\\nblue"}]', (1.0, 3.0), "red\nblue"),
        # Times stand within those of what holds them: red from 2 to 3, green 4 to 9, blue 5 to 6, yellow 10 to the end.
        (TTML, (2.5, 3.5), "red"),
        (TTML, (3.1, 3.9), ""),
        (TTML, (8.5, 9.5), "green"),
        (TTML, (5.5, 9.9), "green\nblue"),
        (TTML, (11.0, 12.0), "yellow"),
        ("-1\n-00:00:02,000 --> 00:00:01,000\nred\n", (0.0, 0.5), "red"),
    ],
)  # fmt: skip
def test_what_is_shown_when(data, part, expected):
    assert read_subtitle(data.encode(), "x").text([part]) == expected


def test_two_parts_of_a_file_read_it_once(folder):
    loader = MediaLoader(folder, workers=0)
    assert [loader.subtitle("words.srt", [part]) for part in ((0.0, 0.2), (0.2, 0.4))] == ["red", "green"]
    assert loader.subtitle("words.srt") == "\n".join(WORDS)
    assert sum(loader.decodes.values()) == 1


def test_a_row_reads_the_same_under_each_of_its_tags(folder):
    tags = [tag.value for tag in ModalityTag if "S" in tag.value]
    assert {said(builder(folder).encode(row(video(0.3, 0.5), tag=tag))) for tag in tags} == {("green", "blue")}
