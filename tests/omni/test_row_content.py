"""What a row's messages say of media: parts of clips, and marks in texts that say where a clip stands."""

import json
import os
import re

import av
import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_files import tone, write_audio, write_video
from omni_runs import build_trainer
from tiny_models import build_tiny

from maple_trl.jobs.tables import read_tables
from maple_trl.omni.content import SEGMENT_KEYS, place_blocks, read_content
from maple_trl.omni.families import family_for
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder, RowError


SECONDS, RATE = 10, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    # Picture i is of brightness 5 i.
    with av.open(str(root / "ten.mp4"), "w") as out:
        pictures = out.add_stream("libx264", rate=RATE, options={"crf": "0"})
        pictures.width = pictures.height = 56
        pictures.pix_fmt = "yuv420p"
        sound = out.add_stream("aac", rate=16000, layout="mono")
        for i in range(SECONDS * RATE):
            frame = av.VideoFrame.from_ndarray(np.full((56, 56, 3), 5 * i, np.uint8), format="rgb24")
            frame.pts = i
            out.mux(pictures.encode(frame))
        out.mux(pictures.encode())
        wave = tone(SECONDS, 16000)
        for start in range(0, wave.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, start : start + 1024]), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, start
            out.mux(sound.encode(frame))
        out.mux(sound.encode())
    for i, size in enumerate([(56, 56), (28, 56), (56, 112)]):  # told apart by their number of tokens
        write_video(root / f"v{i}.mp4", frames=8, size=size, audio=tone(0.5, 16000))
        write_audio(root / f"a{i}.wav", tone(0.3 + 0.2 * i, 16000))
    return root


@pytest.fixture(scope="module")
def build(folder):
    return make_builder(folder)


def make_builder(folder, **options):
    limits = MediaLimits(num_frames=4, min_pixels=784, max_pixels=56 * 112)
    return PromptBuilder(family_for(*build_tiny("qwen2_5_omni")), MediaLoader(folder, limits), **options)


def row_of(*blocks, **columns):
    return {"prompt": [{"role": "user", "content": [*blocks, {"type": "text", "text": "?"}]}], **columns}


def segment(**keys):
    return row_of({"type": "video", "video": "ten.mp4", **keys})


def pictures_of(build, prompt):
    """Numbers of the pictures that reach the vision tower, one per pair of frames, from their brightness."""
    processor = build.family.processor.video_processor
    steps = int(prompt.media["video"]["video_grid_thw"][0, 0])
    values = prompt.media["video"]["pixel_values_videos"].reshape(
        steps, -1, 3, processor.temporal_patch_size, 28 // 2 * 28 // 2
    )
    mean, std = (np.array(numbers)[:, None] for numbers in (processor.image_mean, processor.image_std))
    gray = (values.mean(dim=(1, 4)).numpy() * std + mean).mean(axis=1) * 255
    return gray.reshape(-1) / 5


# Parts of clips


def test_the_segment_of_a_block_is_what_is_fed(folder, build):
    whole = pictures_of(build, build.encode(segment()))
    assert whole[0] < 5 and whole[-1] > 45
    part = pictures_of(build, build.encode(segment(video_start=6.0, video_end=8.0)))
    assert len(part) == 4 and part[0] == pytest.approx(30, abs=1) and 37 <= part[-1] <= 40.5
    assert list(part) == sorted(part)
    tail = pictures_of(build, build.encode(segment(video_start=9)))
    assert tail[0] == pytest.approx(45, abs=1) and tail[-1] > 47


def test_sampling_and_size_of_a_block_are_followed(build):
    tokens = {name: build.encode(segment(**keys)).media_tokens["video"] for name, keys in {
        "default": {}, "fps": {"fps": 2.0}, "nframes": {"nframes": 2}, "max_pixels": {"max_pixels": 784},
        "resized": {"resized_height": 28, "resized_width": 56}, "part": {"fps": 2.0, "video_start": 4, "video_end": 7},
    }.items()}  # fmt: skip
    # 2 x 2 tokens for each pair of frames: 4 frames; 2 a second for 10 s; 2; one token a pair; two.
    assert tokens == {"default": 8, "fps": 40, "nframes": 4, "max_pixels": 2, "resized": 4, "part": 12}
    small = build.encode(segment(min_pixels=56 * 56 + 1)).media_tokens["video"]
    assert small > 8


def test_the_sound_of_a_segment_is_the_segment_s(folder, build):
    def mel_frames(builder, **columns):
        prompt = builder.encode(segment(video_start=6, video_end=8) | columns)
        return int(prompt.media["audio"]["feature_attention_mask"].sum())

    assert mel_frames(build, tag="VA") == mel_frames(build, tag="A") == 200
    assert mel_frames(build, tag="VA", audio_in_video=True) == 200
    heard = build.encode(row_of({"type": "audio", "audio": "ten.mp4", "audio_start": 2.5, "audio_end": 3.5}))
    assert int(heard.media["audio"]["feature_attention_mask"].sum()) == 100


def test_a_budget_of_tokens_holds_for_what_a_block_asks(folder):
    free = make_builder(folder).encode(segment(fps=2.0)).media_tokens["video"]
    build = make_builder(folder, max_media_tokens=free // 2)
    fitted = build.encode(segment(fps=2.0))
    assert 0 < fitted.media_tokens["video"] <= free // 2 and len(pictures_of(build, fitted)) == 20
    assert build.encode(segment(nframes=2)).media_tokens["video"] == 4


def test_two_segments_are_two_prompts(build):
    keys = [build.spec(segment(**part)).key for part in ({}, {"video_start": 0}, {"video_start": 1}, {"video_end": 1})]
    assert len({*keys}) == 4
    assert build.spec(segment(video_start=1)).key == build.spec(segment(video_start=1.0, video_end=None)).key


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "video_start": st.sampled_from([0, 1, 2.0, 2.5]),
        "video_end": st.sampled_from([3, 4.0, 9.5]),
        "nframes": st.sampled_from([2, 4]),
        "max_pixels": st.sampled_from([784, 1568]),
        "min_pixels": st.just(784),
    },
)


@given(SETTINGS, SETTINGS)
def test_keys_differ_where_what_is_asked_differs(build, first, second):
    specs = [build.spec(segment(**asked)) for asked in (first, second)]
    assert (specs[0].key == specs[1].key) == (first == second)
    request = specs[0].video_requests[0]
    assert {name: getattr(request, SEGMENT_KEYS["video"][name]) for name in first} == first


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"type": "video", "video": "ten.mp4", "video_begin": 1},
            "key 'video_begin', which is not read; .*video_start",
        ),
        ({"type": "video", "video": "ten.mp4", "total_pixels": 9}, "key 'total_pixels', which is not read"),
        ({"type": "video", "video": "ten.mp4", "audio_start": 9}, "key 'audio_start', which is not read"),
        (
            {"type": "audio", "audio": "a0.wav", "fps": 2},
            "'audio' block .* key 'fps', .* its keys are type, audio, path",
        ),
        ({"type": "text", "text": "x", "cache_control": {}}, "'text' block .* key 'cache_control'.* type, text"),
        ({"type": "image", "image": "a.png", "fps": 1}, "'image' block .* key 'fps'.* its keys are type, image, path"),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
            """'image_url'.* known are text .*Name the file.*{"type": "image", "image": "path"}""",
        ),
        ({"type": "video_url", "video_url": {"url": "x"}}, "'video_url'.* known are text"),
        ({"type": "video", "video": "ten.mp4", "path": "v0.mp4"}, "holds no path|both"),
        ({"type": "video", "video": ["a.jpg", "b.jpg"]}, "'video' block of field 'prompt' holds no path"),
        ({"type": "video", "video": {"bytes": b"x", "path": None}}, "'video' block of field 'prompt' holds no path"),
        ({"type": "video", "video_start": 1}, "'video' block of field 'prompt' holds no path"),
        ({"type": "video", "video": "ten.mp4", "video_start": "six"}, "video_start='six'.* must be a finite number"),
        ({"type": "video", "video": "ten.mp4", "video_start": -1}, "video_start must be 0 or more"),
        (
            {"type": "video", "video": "ten.mp4", "video_start": 5, "video_end": 5},
            "video_end must be after video_start",
        ),
        ({"type": "video", "video": "ten.mp4", "fps": 1, "nframes": 4}, "nframes or fps, not both"),
        ({"type": "video", "video": "ten.mp4", "nframes": 100_000}, "nframes must be in .*100000"),
        ({"type": "video", "video": "ten.mp4", "max_pixels": 100}, "max_pixels=100 is less than one patch"),
        ({"type": "video", "video": "ten.mp4", "resized_height": 56}, "resized_height and resized_width"),
    ],
)
def test_what_cannot_be_followed_is_refused(build, block, message):
    with pytest.raises(RowError, match=message):
        build.spec(row_of(block))


def test_training_takes_two_segments_for_two_rows(folder, tmp_path, monkeypatch, caplog):
    """One lies behind the clip's end: it is quarantined, and the others of the same file are trained on."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        row_of({"type": "video", "video": "ten.mp4", "video_start": at, "video_end": at + 1}) for at in (1, 7.0, 30)
    ]
    # In one file with these: a text whose mark places the video of the column.
    rows.append(ask("What is it? <video>", video="ten.mp4"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"tag": "VA"}) + "\n" for row in rows))
    trainer = build_trainer(
        folder,
        read_tables([tmp_path / "rows.jsonl"]),
        shuffle_dataset=False,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
    )
    trainer.train()
    with open(os.path.join(trainer.args.output_dir, "quarantine.json")) as file:
        [entry] = json.load(file)
    assert entry["path"] == "ten.mp4" and entry["rows"] == [2] and entry["reason"] == "segment-outside"
    assert trainer.state.log_history[0]["media_tokens/video"] == 4 * (8 + 8 + 8 + 8)
    # Media near the end of a prompt do not keep completions from sharing it.
    assert "comparing both ways" not in caplog.text


# Marks


def shown(build, row):
    """The prompt's text with one letter and number per clip: v0 … v2 by tokens of the video, a0 … a2 of the sound."""
    prompt = build.encode(row)
    text = build.family.tokenizer.decode(prompt.input_ids)
    text = text.partition("user\n")[2].partition("<|im_end|>")[0]
    sizes = {8: "v0", 4: "v1", 16: "v2"}
    text = re.sub(
        r"<\|vision_bos\|>((<\|VIDEO\|>)+)<\|vision_eos\|>", lambda m: f"({sizes[m[0].count('VIDEO')]})", text
    )
    return re.sub(r"<\|audio_bos\|>(<\|AUDIO\|>)+<\|audio_eos\|>", "(a)", text)


def ask(text, **columns):
    return {"prompt": [{"role": "user", "content": text}], **columns}


def test_media_stand_at_their_marks(build):
    text = "First clip: <video> Second clip: <video> What changed?"
    row = ask(text, video=["v0.mp4", "v1.mp4"])
    assert shown(build, row) == "First clip: (v0) Second clip: (v1) What changed?"
    assert shown(build, {**row, "tag": "V"}) == "First clip: (v0) Second clip: (v1) What changed?"
    # The sound of a video follows it, and so does that of an unmarked one.
    assert shown(build, {**row, "tag": "VA"}) == "First clip: (v0)(a) Second clip: (v1)(a) What changed?"
    assert shown(build, ask("x", video=["v0.mp4"], tag="VA")) == "(v0)(a)x"
    # Fed without the signal, a row loses the mark alone.
    assert shown(build, {**row, "audio": "a0.wav", "tag": "A"}) == "(a)First clip:  Second clip:  What changed?"
    assert shown(build, ask("Hear <audio>. See <video>.", video="v2.mp4", audio="a0.wav")) == "Hear (a). See (v2)."
    # A mark for sound without a file of its own is the video's track.
    assert shown(build, ask("Hear <audio>. See <video>.", video="v2.mp4")) == "Hear (a). See (v2)."
    assert shown(build, ask("Hear <audio>. See <video>.", video="v2.mp4", tag="A")) == "Hear (a). See ."
    both = ask("Both <video> at <audio> once", video="v2.mp4", tag="VA", audio_in_video=True)
    assert "<|AUDIO|>" in shown(build, both) and "(a)" not in shown(build, both)


def test_marks_in_text_blocks_and_blocks_without_a_file_are_places(build):
    content = [{"type": "text", "text": "1 <video>"}, {"type": "video"}, {"type": "text", "text": " 3"}]
    row = {"prompt": [{"role": "user", "content": content}], "video": ["v0.mp4", "v1.mp4"]}
    assert shown(build, row) == "1 (v0)(v1) 3"
    # Marks of one kind do not meddle with blocks of another.
    content = [{"type": "video", "video": "v0.mp4"}, {"type": "text", "text": "then <audio> that"}]
    assert shown(build, {"prompt": [{"role": "user", "content": content}], "audio": "a1.wav"}) == "(v0)then (a) that"


@pytest.mark.parametrize(("tag", "first"), [("V", ["video"]), ("A", ["audio"]), ("VA", ["video", "audio"])])
def test_a_track_stands_at_its_video_also_where_it_alone_is_fed(build, tag, first):
    said = (("user", "<video>Who speaks?"), ("assistant", "A child."), ("user", "What does it say?"))
    prompt = [{"role": role, "content": text} for role, text in said]
    spec = build.spec({"prompt": prompt, "video": "v0.mp4", "tag": tag})
    placed = place_blocks(spec.messages, {"video": [True] * len(spec.videos), "audio": [True] * len(spec.audios)}, "")
    assert [[block["type"] for block in message["content"]] for message in placed] == [
        [*first, "text"],
        ["text"],
        ["text"],
    ]


def test_marks_of_several_turns_are_counted_through(build):
    turns = [("user", "A: <video>"), ("assistant", "I see."), ("user", "B: <video>")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    text = build.family.tokenizer.decode(build.encode({"prompt": prompt, "video": ["v0.mp4", "v1.mp4"]}).input_ids)
    assert re.search(
        r"A: <\|vision_bos\|>(<\|VIDEO\|>){8}<\|vision_eos\|>.*B: <\|vision_bos\|>(<\|VIDEO\|>){4}<", text, re.S
    )


PIECES = st.lists(
    st.tuples(
        st.sampled_from(["", " ", "one ", "and:\n", "<vid", "> x", "video"]), st.sampled_from(["video", "audio", ""])
    ),
    max_size=5,
)


@given(PIECES, st.permutations(range(3)), st.sampled_from([None, "V", "A", "VA"]))
def test_random_marks(build, pieces, order, tag):
    count = {kind: sum(mark == kind for _, mark in pieces) for kind in ("video", "audio")}
    names = {"video": [f"v{i}.mp4" for i in order], "audio": [f"a{i}.wav" for i in order]}
    text = "".join(said + (f"<{mark}>" if mark else "") for said, mark in pieces) + "?"
    columns = {kind: [names[kind][i % 3] for i in range(count[kind])] for kind in count}
    needed = {"V": ["video"], "A": ["audio"], "VA": ["video", "audio"], None: []}[tag]
    if re.findall(r"<(video|audio)>", text) != [mark for _, mark in pieces if mark]:
        return  # the pieces made a mark of their own
    if any(not count[kind] for kind in needed) and not (count["video"] and needed != ["video"]):
        return  # the row lacks what its tag needs
    row = ask(text, **columns, tag=tag)
    if tag == "VA" and not count["audio"] or tag == "A" and not count["audio"]:
        return  # sound of the videos, which has a test of its own
    fed = {"video": tag in (None, "V", "VA"), "audio": tag in (None, "A", "VA")}
    clips = {kind: iter(columns[kind]) for kind in columns}
    expected = ""
    for said, mark in pieces:
        place = f"({next(clips[mark]).removesuffix('.mp4') if mark == 'video' else 'a'})" if mark else ""
        expected += said + (place if mark and fed[mark] else "")
    assert shown(build, row) == expected + "?"


@given(st.integers(0, 4), st.integers(0, 4), st.sampled_from(["video", "audio"]))
def test_marks_and_files_must_be_as_many(build, marks, files, kind):
    row = ask(f"<{kind}>" * marks + "?", **{kind: [{"video": "v0.mp4", "audio": "a0.wav"}[kind]] * files})
    if marks in (0, files):
        assert len(getattr(build.spec(row), f"{kind}s")) == files
    else:
        with pytest.raises(RowError, match=f"holds {marks} <{kind}> mark.* but field '{kind}' names {files} file"):
            build.spec(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ask("What does <video> do in HTML?"), "1 <video> mark.*names 0 file.*only quotes a mark writes it otherwise"),
        ({"prompt": "<video>What?"}, "1 <video> mark.*names 0 file"),
        ({"prompt": "<video>What?", "video": "v0.mp4"}, "needs a conversational 'prompt'"),
        (ask("<image>What?"), "1 <image> mark.* but field 'image' names 0 file"),
        (row_of({"type": "text", "text": "<image>"}), "1 <image> mark"),
        (
            row_of({"type": "video", "video": "v0.mp4"}, {"type": "text", "text": "<video>"}),
            "1 <video> mark.* and 1 'video' block.* with one: which belongs where",
        ),
        (ask("<audio> <audio>", video="v0.mp4", tag="VA"), "2 <audio> mark.*names 1 file"),
        (row_of({"type": "video"}), "without a file, but field 'video' names 0"),
    ],
)
def test_marks_that_place_nothing_are_refused(build, row, message):
    with pytest.raises(RowError, match=message):
        build.spec(row)


def test_what_a_table_fills_in_is_no_key(build):
    """Rows with blocks of several kinds: Arrow gives every block the keys of all, and some writers put empty texts."""
    video = {"type": "video", "video": "v0.mp4", "text": None, "video_start": None, "audio": ""}
    text = {"type": "text", "text": "", "video": None, "audio": "", "nframes": None}
    for blank in (video, video | {"text": ""}):
        assert build.spec(row_of(blank, text)).videos == ("v0.mp4",)


def test_other_marks_are_text(build):
    text = "<VIDEO> <Video> <video/> < video > <videos> &lt;video&gt;"
    assert read_content([{"role": "user", "content": text}]).messages[0]["content"] == [{"type": "text", "text": text}]
