"""From rows to prompts: what a row is fed, budgets, and errors that say what would be right."""

import numpy as np
import pytest
from media_files import tone, write_audio, write_video
from tiny_models import build_tiny

from maple_trl.modalities import Modality, ModalityTag
from maple_trl.omni.encoded import MediaMismatchError
from maple_trl.omni.errors import MediaError
from maple_trl.omni.families import family_for, register_family
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder, RowError


SRT = "1\n00:00:00,000 --> 00:00:01,000\n{}\n"
QUESTION = [{"role": "user", "content": "what color"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    write_video(root / "clip.mp4", frames=24, audio=tone(1.0, 16000))
    write_video(root / "other.mp4", frames=24, size=(64, 48), audio=tone(0.5, 16000))
    write_video(root / "silent.mp4", frames=24)
    write_audio(root / "sound.wav", tone(0.7, 16000))
    (root / "words.srt").write_text(SRT.format("red green blue yellow " * 10))
    (root / "word.srt").write_text(SRT.format("red"))
    return root


def builder(folder, name="qwen2_5_omni", limits=None, **kwargs):
    limits = MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096, **(limits or {}))
    return PromptBuilder(family_for(*build_tiny(name)), MediaLoader(folder, limits), **kwargs)


def text_of(build, prompt):
    return build.family.tokenizer.decode(prompt.input_ids)


# What is fed


@pytest.mark.parametrize("tag", list(ModalityTag))
@pytest.mark.parametrize("own_audio", [True, False])
@pytest.mark.matrix(cases=9)
def test_a_tagged_row_is_fed_exactly_its_tag(folder, tag, own_audio):
    row = {"prompt": QUESTION, "video": "clip.mp4", "subtitle": "word.srt", "tag": tag.value.lower()}
    row |= {"audio": "sound.wav"} if own_audio else {}
    build = builder(folder)
    prompt = build.encode(row)
    letters = {"video": "V", "audio": "A", "subtitle": "S"}
    assert {letters[kind] for kind in prompt.media_tokens} == set(tag) and prompt.tag is tag
    assert ("red" in text_of(build, prompt)) == ("S" in tag)
    if "A" in tag:
        seconds = 0.7 if own_audio else 1.0
        assert prompt.media["audio"]["feature_attention_mask"].sum() == round(seconds * 100)
    everything = builder(folder, modality_access="all").encode(row)
    assert set(everything.media_tokens) == set(letters)


def test_a_row_without_a_tag_is_fed_what_it_names(folder):
    build = builder(folder)
    assert set(build.encode({"prompt": QUESTION, "video": "clip.mp4"}).media_tokens) == {"video"}
    assert set(build.encode({"prompt": QUESTION, "audio": "sound.wav"}).media_tokens) == {"audio"}
    both = build.encode({"prompt": QUESTION, "video": "clip.mp4", "audio_in_video": True})
    assert set(both.media_tokens) == {"video", "audio"}
    assert build.encode({"prompt": QUESTION}).media_tokens == {}


def test_content_blocks_keep_their_place(folder):
    build = builder(folder)
    content = [
        {"type": "text", "text": "red", "video": None, "audio": None},
        {"type": "video", "video": "clip.mp4", "text": None},
        {"type": "text", "text": "green"},
        {"type": "audio", "audio": "sound.wav"},
        {"type": "text", "text": "blue"},
        {"type": "video", "path": "other.mp4"},
    ]
    prompt = build.encode({"prompt": [{"role": "user", "content": content}]})
    assert len(prompt.media["video"]["video_grid_thw"]) == 2
    text = text_of(build, prompt)
    order = [text.index(part) for part in ("red", "<|VIDEO|>", "green", "<|AUDIO|>", "blue")]
    assert order == sorted(order) and text.rindex("<|VIDEO|>") > order[-1]
    # A tag that does not want a block leaves it out.
    only_audio = build.encode({"prompt": [{"role": "user", "content": content}], "tag": "A"})
    assert "<|VIDEO|>" not in text_of(build, only_audio) and set(only_audio.media_tokens) == {"audio"}


def test_subtitle_is_a_file_or_the_text_itself(folder):
    build = builder(folder, subtitle_template="[{subtitle}]")
    assert "[red]" in text_of(build, build.encode({"prompt": QUESTION, "subtitle": "word.srt"}))
    assert "[two\nlines.srt]" in text_of(build, build.encode({"prompt": QUESTION, "subtitle": "two\nlines.srt"}))


@pytest.mark.parametrize(
    "text", ["Hello.", "wait...what", "U.S.A", "3.14", "example.com", "see a.b/c", "No/yes.", "red"]
)
def test_short_text_is_no_file(folder, text):
    spec = builder(folder).spec({"prompt": QUESTION, "subtitle": text})
    assert spec.subtitle == text and not spec.subtitle_file


def test_media_lead_the_last_user_message(folder):
    build = builder(folder)
    conversation = [
        {"role": "system", "content": "green"},
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "yellow"},
    ]
    text = text_of(build, build.encode({"prompt": conversation, "video": "clip.mp4"}))
    assert text.index("blue") < text.index("<|VIDEO|>") < text.index("yellow")


def test_equal_content_has_an_equal_key(folder):
    build = builder(folder)
    row = {"prompt": QUESTION, "video": "clip.mp4", "tag": "V", "solution": "A"}
    key = build.spec(row).key
    assert key == build.spec({**row, "solution": "B"}).key
    changes = [{"video": "other.mp4"}, {"prompt": [{"role": "user", "content": "low"}]}]
    assert all(key != build.spec({**row, **change}).key for change in changes)
    assert build.spec(row | {"tag": "VA"}).key != build.spec(row | {"tag": "VA", "audio_in_video": True}).key


# Media that are not as asked


def test_no_audio_track_is_a_normal_case(folder):
    build = builder(folder)
    for row in ({"tag": "VA"}, {"tag": "VA", "audio_in_video": True}):
        prompt = build.encode({"prompt": QUESTION, "video": "silent.mp4"} | row)
        assert set(prompt.media_tokens) == {"video"} and prompt.notes == ("no-audio-track",)
    with pytest.raises(MediaError) as caught:
        build.encode({"prompt": QUESTION, "video": "silent.mp4", "tag": "A"})
    assert caught.value.reason == "no-signal" and caught.value.path == "silent.mp4"


def test_missing_track_of_one_of_two_videos_keeps_the_other_in_place(folder):
    build = builder(folder)
    content = [
        {"type": "video", "video": "silent.mp4"},
        {"type": "audio", "audio": "silent.mp4"},
        {"type": "text", "text": "red"},
        {"type": "audio", "audio": "sound.wav"},
    ]
    text = text_of(build, build.encode({"prompt": [{"role": "user", "content": content}]}))
    assert text.count("<|audio_bos|>") == 1 and text.index("red") < text.index("<|audio_bos|>")


def test_frames_shrink_into_the_token_budget(folder):
    row = {"prompt": QUESTION, "video": "clip.mp4", "tag": "VA"}
    free = builder(folder).encode(row).media_tokens
    budget = free["audio"] + free["video"] // 2
    fitted = builder(folder, max_media_tokens=budget).encode(row).media_tokens
    assert fitted["audio"] == free["audio"] and 0 < fitted["video"] <= free["video"] // 2
    with pytest.raises(MediaError, match="max_media_tokens is 3") as caught:
        builder(folder, max_media_tokens=3).encode(row)
    assert caught.value.reason == "media-tokens"


@pytest.mark.parametrize("text", ["日本語の字幕です。" * 8, "café déjà vu " * 8, "😀🎉" * 12])
@pytest.mark.matrix(cases=2)
def test_a_shortened_subtitle_ends_between_characters(folder, text):
    row = {"prompt": QUESTION, "subtitle": text, "tag": "S"}
    free = builder(folder).encode(row)
    for limit in range(len(free) - 40, len(free), 3):
        prompt = builder(folder, max_prompt_length=limit).encode(row)
        assert len(prompt) <= limit and "\ufffd" not in text_of(builder(folder), prompt)


def test_a_subtitle_keeps_braces_and_its_file_may_not_spell_media(folder):
    build = builder(folder, subtitle_template="{lang} {subtitle}")
    assert "{lang} {red}" in text_of(build, build.encode({"prompt": QUESTION, "subtitle": "{red}"}))
    (folder / "evil.srt").write_text(SRT.format("he said VIDEO").replace("VIDEO", "&lt;|VIDEO|&gt;"))
    with pytest.raises(MediaError, match="reads as media") as caught:
        build.encode({"prompt": QUESTION, "subtitle": "evil.srt"})
    assert caught.value.reason == "bad-subtitle" and caught.value.path == "evil.srt"
    assert build.spec({"prompt": QUESTION, "subtitle": "word.srt "}).subtitle_file


def test_a_model_that_cannot_hear_is_not_fed_the_track(folder):
    row = {"prompt": QUESTION, "video": "clip.mp4", "tag": "V"}
    assert set(builder(folder, "qwen2_5_vl", modality_access="all").encode(row).media_tokens) == {"video"}


def test_frames_by_rate_fit_a_budget_in_one_decode(folder):
    write_video(folder / "long.mp4", frames=72, size=(96, 96))
    limits = MediaLimits(num_frames=None, fps=4.0, min_pixels=784, max_pixels=96 * 96)
    loader = MediaLoader(folder, limits)
    build = PromptBuilder(family_for(*build_tiny("qwen2_5_omni")), loader, max_media_tokens=12)
    prompt = build.encode({"prompt": QUESTION, "video": "long.mp4", "tag": "V"})
    assert 0 < prompt.media_tokens["video"] <= 12 and set(loader.decodes.values()) == {1}
    # Sound that outlasts the pictures takes nothing from them: 1 s of pictures at 4 a second is two steps of 9 tokens.
    write_video(folder / "overlong.mp4", frames=24, size=(96, 96), audio=tone(6.0, 16000))
    build.max_media_tokens = 18
    assert build.encode({"prompt": QUESTION, "video": "overlong.mp4", "tag": "V"}).media_tokens == {"video": 18}


def test_other_keys_of_a_message_stay(folder):
    message = {"role": "assistant", "content": "ok", "name": "bob", "tool_calls": None}
    spec = builder(folder).spec({"prompt": [*QUESTION, message]})
    assert spec.messages[1] == {"role": "assistant", "name": "bob", "content": [{"type": "text", "text": "ok"}]}


def test_truncation_shortens_the_subtitle_and_never_cuts_media(folder):
    row = {"prompt": QUESTION, "video": "clip.mp4", "subtitle": "words.srt", "tag": "VAS"}
    free = builder(folder).encode(row)
    build = builder(folder, max_prompt_length=len(free) - 20)
    prompt = build.encode(row)
    assert len(prompt) <= len(free) - 20 and "subtitle-shortened" in prompt.notes
    for kind in ("video", "audio"):
        assert prompt.media_tokens[kind] == free.media_tokens[kind]
    assert text_of(build, prompt).endswith("what color<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(MediaError) as caught:
        builder(folder, max_prompt_length=len(free) - free.media_tokens["subtitle"] - 20).encode(row)
    assert caught.value.reason == "prompt-too-long"


def test_a_budget_of_media_tokens_counts_sound_alone_where_a_model_sees_nothing(folder):
    row = {"prompt": QUESTION, "audio": "sound.wav"}
    tokens = builder(folder, "qwen2_audio").encode(row).media_tokens
    assert builder(folder, "qwen2_audio", max_media_tokens=tokens["audio"]).encode(row).media_tokens == tokens
    with pytest.raises(MediaError, match="but max_media_tokens is"):
        builder(folder, "qwen2_audio", max_media_tokens=tokens["audio"] - 1).encode(row)


def test_audio_beyond_a_fixed_window_is_named(folder):
    build = builder(folder, name="qwen2_audio")
    assert set(build.encode({"prompt": QUESTION, "audio": "sound.wav"}).media_tokens) == {"audio"}
    write_audio(folder / "long.wav", tone(1.5, 16000))
    with pytest.raises(MediaError, match="1.5 s of audio; Qwen2AudioFamily reads 1 s"):
        build.encode({"prompt": QUESTION, "audio": "long.wav"})


# Rows that are wrong


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": QUESTION, "tag": "VX"}, "field 'tag': 'VX' is not a modality tag; the tags are V, A"),
        ({"prompt": QUESTION, "tag": "VS", "video": "clip.mp4"}, "tag VS needs subtitle, but the row has no such"),
        ({"prompt": QUESTION, "tag": "VA"}, "tag VA needs audio and video"),
        ({"prompt": "what", "video": "clip.mp4"}, "needs a conversational 'prompt'"),
        ({"prompt": []}, "field 'prompt' must be a text or a non-empty list"),
        ({"prompt": None}, "field 'prompt' must be"),
        ({"prompt": QUESTION, "video": 3}, "field 'video' is int; it must be a path"),
        ({"prompt": QUESTION, "audio": [[0.1, 0.2]]}, "field 'audio' holds list.*keep decoded arrays out"),
        ({"prompt": QUESTION, "subtitle": ["x"]}, "field 'subtitle' is list"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "picture"}]}]},
            "holds the content block .'type': 'picture'.; known are text",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
            "1 .*'video' block.* but field 'video' names 0",
        ),
        ({"prompt": ["color?"]}, "holds 'color.', which is not a message with 'role'"),
        ({"prompt": [{"content": "hi"}]}, "which is not a message with 'role'"),
        ({"prompt": [{"role": "user", "content": {"type": "text"}}]}, "whose content is"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "text \\(key 'text'\\)"),
        ({"prompt": [{"role": "system", "content": "x"}], "video": "clip.mp4"}, "no user message"),
        ({"prompt": [{"role": "user", "content": "what is <|AUDIO|>"}]}, "field 'prompt' holds the text '<.AUDIO.>'"),
        ({"prompt": QUESTION, "subtitle": "a <|VIDEO|> b"}, "field 'subtitle' holds the text '<.VIDEO.>'"),
        ({"prompt": QUESTION, "subtitle": "subs/clip.txt"}, "looks like a file; files that are read end in .srt"),
        ({"prompt": QUESTION, "subtitle": "my clip.stl"}, "looks like a file"),
        (
            {"prompt": QUESTION, "subtitle": "clip.mp4"},
            "names a file below the media root; files that are read end in",
        ),
        ({"prompt": QUESTION, "video": "clip.mp4", "audio_in_video": "false"}, "'audio_in_video' is 'false'; it must"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"}]}], "video": "other.mp4"},
            "field 'video' and a 'video' block of field 'prompt' both name a file",
        ),
        (
            {"prompt": QUESTION, "video": ["clip.mp4", "clip.mp4"], "audio": "sound.wav", "audio_in_video": True},
            "one video with one audio, but the row has 2 video",
        ),
    ],
)
def test_bad_rows_say_what_is_wrong_and_what_would_be_right(folder, row, message):
    with pytest.raises(RowError, match=message):
        builder(folder).spec(row)


@pytest.mark.parametrize(("name", "tag"), [("qwen2_5_vl", "VA"), ("qwen3_vl", "A"), ("qwen2_audio", "V")])
def test_a_family_says_what_it_does_not_read(folder, name, tag):
    row = {"prompt": QUESTION, "video": "clip.mp4", "audio": "sound.wav", "tag": tag}
    with pytest.raises(RowError, match=f"reads no (audio|video), which the row \\(tag {tag}\\) feeds"):
        builder(folder, name=name).spec(row)


# Families


def test_unknown_family_lists_the_known(folder):
    model, processor = build_tiny("qwen2_5_omni")
    model.config.model_type = "qwen2_5_omni"
    with pytest.raises(ValueError, match="known: .*qwen2_5_omni_thinker.*Train the Thinker"):
        family_for(model, processor)


def test_a_processor_of_another_model_is_refused():
    model, _ = build_tiny("qwen2_5_omni")
    _, processor = build_tiny("qwen3_vl")
    with pytest.raises(ValueError, match=r"The tokenizer lacks .*<\|VIDEO\|>"):
        family_for(model, processor)


def test_a_new_family_is_one_small_class(folder, monkeypatch):
    from maple_trl.omni.families import base
    from maple_trl.omni.families.qwen2_5_omni import Qwen2_5OmniFamily

    monkeypatch.setattr(base._FAMILIES, "_found", dict(base._FAMILIES._found))

    @register_family
    class ForkFamily(Qwen2_5OmniFamily):
        model_types = ("my_fork",)

    model, processor = build_tiny("qwen2_5_omni")
    model.config.model_type = "my_fork"
    assert isinstance(family_for(model, processor), ForkFamily)


def test_left_padding_meant_for_text_does_not_shift_the_sound(folder):
    """`from_pretrained(padding_side="left")` sets the audio extractor's side as well; the family sets it back."""
    model, processor = build_tiny("qwen2_5_omni")
    processor.feature_extractor.padding_side = "left"
    row = {"prompt": QUESTION, "audio": "sound.wav"}
    limits = MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096)
    shifted = PromptBuilder(family_for(model, processor), MediaLoader(folder, limits)).encode(row)
    straight = builder(folder).encode(row)
    np.testing.assert_array_equal(shifted.media["audio"]["input_features"], straight.media["audio"]["input_features"])


def test_a_template_that_drops_media_is_noticed(folder):
    build = builder(folder)
    build.family.processor.chat_template = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    with pytest.raises((MediaMismatchError, ValueError), match="chat template|placeholder|token"):
        build.encode({"prompt": QUESTION, "video": "clip.mp4"})


@pytest.mark.parametrize("change", [-1, 1])
def test_features_that_do_not_fill_the_placeholders_are_noticed(folder, change, monkeypatch):
    """Fewer or more features than placeholders: transformers accepts one of the two in silence."""
    build = builder(folder)
    count = type(build.family).audio_token_count
    monkeypatch.setattr(type(build.family), "audio_token_count", lambda self, frames: count(self, frames) + change)
    with pytest.raises(MediaMismatchError, match="placeholder tokens .* but media features"):
        build.encode({"prompt": QUESTION, "audio": "sound.wav"})


def test_each_video_keeps_its_own_rate(folder):
    """Two clips of different length: time positions of each follow the times of its own pictures."""
    write_video(folder / "slow.mp4", frames=48)
    build = builder(folder)
    content = [{"type": "video", "video": name} for name in ("clip.mp4", "slow.mp4")]
    both = build.encode({"prompt": [{"role": "user", "content": content}]})
    is_video = both.input_ids == build.family.placeholder_ids["video"]
    times = both.position_ids[0][is_video].split(build.family.feature_counts("video", both.media["video"]))
    steps = [int(t.unique().diff()[0]) for t in times]
    # The third of four frames is picture 15 of 24, and 31 of 48; 25 positions a second.
    assert steps == [int(25 * 15 / 24), int(25 * 31 / 24)]


def test_modalities_of_a_spec(folder):
    spec = builder(folder).spec({"prompt": QUESTION, "video": "clip.mp4", "subtitle": "x", "tag": "SV"})
    assert spec.fed == {Modality.VIDEO, Modality.SUBTITLE} and spec.videos == ("clip.mp4",) and not spec.audios
