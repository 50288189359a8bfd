"""Pictures in rows: columns, blocks and marks, beside clips, sound and subtitles; what a tag feeds; the budget of tokens."""

import re

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from media_files import picture, tone, write_audio, write_video
from PIL import Image
from tiny_models import build_tiny

from maple_trl.modalities import Modality
from maple_trl.omni.embedded import as_paths
from maple_trl.omni.errors import MediaError
from maple_trl.omni.families import family_for
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder, RowError
from maple_trl.trainers.common.rows import check_spelling


SIZES = {"i0": (2, 2), "i1": (2, 3), "i2": (3, 3)}  # in patches of 28 pixels, which are tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        Image.fromarray(picture(number, height * 28, width * 28)).save(root / f"{name}.png")
    write_video(root / "v0.mp4", size=(56, 56), frames=4, fps=2, audio=tone(2, 16000))
    write_audio(root / "a0.wav", tone(1, 16000))
    return root


@pytest.fixture(scope="module")
def loader(folder):
    with MediaLoader(folder, MediaLimits(num_frames=4, min_pixels=784, max_pixels=784 * 16), workers=0) as loader:
        yield loader


@pytest.fixture(scope="module")
def build(loader):
    return PromptBuilder(family_for(*build_tiny("qwen2_5_omni")), loader)


def ask(text, **columns):
    return {"prompt": [{"role": "user", "content": text}], **columns}


def blocks(*content, **columns):
    return {"prompt": [{"role": "user", "content": list(content)}], **columns}


def shown(build, row):
    """The prompt's text with a name for each picture by its tokens, and one for each clip and sound."""
    text = build.family.tokenizer.decode(build.encode(row).input_ids)
    text = text.partition("user\n")[2].partition("<|im_end|>")[0]
    names = {height * width: name for name, (height, width) in SIZES.items()}
    text = re.sub(
        r"<\|vision_bos\|>((<\|IMAGE\|>)+)<\|vision_eos\|>", lambda m: f"({names[m[0].count('IMAGE')]})", text
    )
    text = re.sub(r"<\|vision_bos\|>(<\|VIDEO\|>)+<\|vision_eos\|>", "(v)", text)
    return re.sub(r"<\|audio_bos\|>(<\|AUDIO\|>)+<\|audio_eos\|>", "(a)", text)


def test_pictures_of_columns_lead_the_last_user_message_before_clips(build):
    assert shown(build, ask("x", image="i0.png")) == "(i0)x"
    assert shown(build, ask("x", image=["i2.png", "i0.png"])) == "(i2)(i0)x"
    assert shown(build, ask("x", images=["i2.png", "i0.png"])) == "(i2)(i0)x"
    assert shown(build, ask("x", images="i1.png", image=None)) == "(i1)x"
    everything = ask("x", images=["i1.png"], video="v0.mp4", audio="a0.wav", subtitle="s", tag="VAS")
    assert shown(build, everything) == "(i1)(v)(a)Subtitles:\ns\nx"
    turns = [("user", "first"), ("assistant", "yes"), ("user", "second")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    assert shown(build, {"prompt": prompt, "image": "i0.png"}) == "first"  # not here
    text = build.family.tokenizer.decode(build.encode({"prompt": prompt, "image": "i0.png"}).input_ids)
    assert text.partition("yes")[2].partition("user\n")[2].startswith("<|vision_bos|><|IMAGE|>")


def test_pictures_stand_at_their_marks_and_blocks(build):
    row = ask("A: <image> B: <image> C: <video> D: <audio>?", images=["i0.png", "i2.png"], video="v0.mp4")
    assert shown(build, {**row, "audio": "a0.wav"}) == "A: (i0) B: (i2) C: (v) D: (a)?"
    assert shown(build, ask("<audio><video><image>", image="i1.png", video="v0.mp4")) == "(a)(v)(i1)"
    text = {"type": "text", "text": " then "}
    named = blocks({"type": "image", "image": "i2.png"}, text, {"type": "image", "path": "i0.png"})
    assert shown(build, named) == "(i2) then (i0)"
    bare = blocks({"type": "text", "text": "1 <image>"}, {"type": "image"}, {"type": "text", "text": " 3"})
    assert shown(build, {**bare, "images": ["i0.png", "i1.png"]}) == "1 (i0)(i1) 3"
    mixed = blocks({"type": "audio", "audio": "a0.wav"}, {"type": "image", "image": "i0.png"}, text)
    assert shown(build, {**mixed, "video": "v0.mp4", "tag": "VA"}) == "(v)(a)(i0) then "
    # Blanks that a table fills in are no keys.
    blank = {"type": "image", "image": "i0.png", "text": None, "video": None, "fps": None, "max_pixels": None}
    assert shown(build, blocks(blank)) == "(i0)"


@pytest.mark.parametrize(
    ("tag", "expected"),
    [("V", "(i0)(v)x"), ("A", "(a)x"), ("S", "sx"), ("VA", "(i0)(v)(a)x"), ("VS", "(i0)(v)sx"), ("AS", "(a)sx")],
)
def test_a_picture_counts_as_seen(build, tag, expected):
    row = ask("x", image="i0.png", video="v0.mp4", audio="a0.wav", subtitle="s", tag=tag)
    found = shown(build, row).replace("Subtitles:\ns\n", "s")
    assert found == expected
    assert (Modality.VIDEO in build.spec(row).fed) == ("V" in tag)
    marked = shown(build, row | ask("<image>-<video>-<audio>-<subtitle>"))
    kept = [name for name, letter in (("(i0)", "V"), ("(v)", "V"), ("(a)", "A"), ("s", "S")) if letter in tag]
    assert marked.replace("-", "") == "".join(kept) and marked.count("-") == 3
    # A row with pictures alone has what V asks for; with modality_access all it is fed whatever its tag.
    still = ask("x", image="i0.png", audio="a0.wav", subtitle="s", tag=tag)
    assert shown(build, still).replace("Subtitles:\ns\n", "s") == expected.replace("(v)", "")
    everything = PromptBuilder(build.family, build.loader, modality_access="all")
    assert shown(everything, still) == "(i0)(a)Subtitles:\ns\nx"


def test_sound_within_a_clip_beside_a_picture(build):
    row = ask("x", image="i2.png", video="v0.mp4", tag="VA", audio_in_video=True)
    spec, prompt = build.spec(row), build.encode(row)
    assert (
        spec.interleaved and prompt.media_tokens["image"] == 9 and shown(build, row).startswith("(i2)<|vision_bos|>")
    )
    ids, family = prompt.input_ids.tolist(), build.family
    video, audio = ([i for i, t in enumerate(ids) if t == family.placeholder_ids[k]] for k in ("video", "audio"))
    # The sound stands within the video's marks; what is around is as of the row without the picture.
    assert min(video) < min(audio) < ids.index(family.tokenizer.convert_tokens_to_ids("<|vision_eos|>"), min(video))
    without = build.encode({**row, "image": None})
    tail = len(without) - without.input_ids.tolist().index(family.placeholder_ids["video"])
    assert ids[-tail:] == without.input_ids.tolist()[-tail:]
    moved = prompt.position_ids[:, -tail:] - without.position_ids[:, -tail:]
    assert len(moved.unique()) == 1 and moved[0, 0] > 0
    # A picture has no sound, so that there is nothing to interleave.
    always = PromptBuilder(family, build.loader, audio_in_video=True)
    assert shown(always, ask("x", image="i0.png", audio="a0.wav", tag="VA")) == "(i0)(a)x"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ask("x", image="i0.png", images=["i0.png"]), "fields 'image' and 'images' both name files"),
        (blocks({"type": "image", "image": "i0.png"}, image="i0.png"), "field 'image' and a 'image' block"),
        (blocks({"type": "image", "image": "i0.png"}, images=["i0.png"]), "field 'images' and a 'image' block"),
        (ask("<image><image>", image="i0.png"), "2 <image> mark.* but field 'image' names 1 file"),
        (blocks({"type": "image", "image": "i0.png", "path": "i0.png"}), "'image' block .* holds no path"),
        (blocks({"type": "image", "max_pixels": 784}), "'image' block .* holds no path"),
        (blocks({"type": "image", "url": "i0.png"}), "key 'url', which is not read; its keys are type, image, path"),
        (blocks({"type": "image", "image": "i0.png", "max_pixels": 100}), "max_pixels=100 is less than one patch"),
        (blocks({"type": "image", "image": "i0.png", "resized_width": 9}), "set resized_height and resized_width"),
        (ask("x", images=["i0.png", None]), "field 'images' holds None; it must be a path"),
        (ask("x", image=Image.new("RGB", (4, 4))), "field 'image' is Image; it must be a path"),
        (ask("x", image={"bytes": b"1", "path": None}), "field 'image' is dict; it must be a path"),
        ({"prompt": "plain", "image": "i0.png"}, "needs a conversational 'prompt'"),
        (ask("x", audio="a0.wav", tag="V"), "tag V needs video or image"),
        (ask("x", image="i0.png", tag="VA"), "tag VA needs audio"),
        (ask("a <|IMAGE|> b"), "holds the text '<.IMAGE.>'"),
    ],
)
def test_what_cannot_be_meant_is_refused(build, row, message):
    with pytest.raises(RowError, match=message):
        build.spec(row)


def test_a_model_that_does_not_see_refuses_pictures(loader):
    build = PromptBuilder(family_for(*build_tiny("qwen2_audio")), loader)
    with pytest.raises(RowError, match="Qwen2AudioFamily reads no image, which the row .tag V. feeds"):
        build.spec(ask("x", image="i0.png", tag="V"))
    assert not build.spec(ask("x", image="i0.png", audio="a0.wav", tag="A")).images


def test_keys_tell_pictures_apart_and_leave_other_rows_as_they_were(build):
    rows = [
        ask("x", video="v0.mp4"),
        ask("x", video="v0.mp4", image="i0.png"),
        ask("x", video="v0.mp4", image="i1.png"),
        ask("x", video="v0.mp4", image=["i0.png", "i1.png"]),
        blocks({"type": "image", "image": "i0.png"}),
        blocks({"type": "image", "image": "i0.png", "max_pixels": 784}),
    ]
    keys = [build.spec(row).key for row in rows]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "60789407cbfa30f3"  # as before there were pictures: runs go on from their checkpoints
    assert build.spec(rows[1] | {"image": ["i0.png"]}).key == build.spec(ask("x", video="v0.mp4", images="i0.png")).key


def test_a_row_says_how_large_its_pictures_are(build):
    sized = blocks({"type": "image", "image": "i0.png", "resized_height": 84, "resized_width": 84})
    assert shown(build, sized) == "(i2)"
    assert build.encode(blocks({"type": "image", "image": "i2.png", "max_pixels": 4 * 784})).media_tokens["image"] == 4
    assert build.encode(blocks({"type": "image", "image": "i0.png", "min_pixels": 9 * 784})).media_tokens["image"] >= 9


def test_pictures_and_frames_share_the_budget(build, loader):
    row = ask("x", images=["i1.png", "i2.png"], video="v0.mp4", tag="V")
    whole = build.encode(row).media_tokens
    assert whole == {"image": 15, "video": 8}

    def encode(budget, row=row):
        return PromptBuilder(build.family, loader, max_media_tokens=budget).encode(row).media_tokens

    assert encode(36) == whole
    tight = encode(15)
    assert sum(tight.values()) <= 15 and tight["image"] < 15 and tight["video"] <= 8
    assert sum(encode(4).values()) == 4  # one for each picture, and for each pair of frames
    with pytest.raises(
        MediaError, match="4 media tokens at the smallest frame size, but max_media_tokens is 3"
    ) as error:
        encode(3)
    assert error.value.path == "i1.png"
    heard = ask("x", image="i2.png", audio="a0.wav", tag="VA")
    sound = build.encode(heard).media_tokens["audio"]
    assert encode(sound + 4, heard) == {"image": 4, "audio": sound}


def test_cells_of_image_columns_are_read(build, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("maple_trl.omni.embedded.FOLDER", tmp_path)
    prompt = [{"role": "user", "content": "x"}]
    path, data = str(folder / "i0.png"), (folder / "i1.png").read_bytes()
    texts = List({"role": Value("string"), "content": Value("string")})
    typed = Dataset.from_dict(
        {"prompt": [prompt] * 3, "image": [path, {"bytes": data, "path": "b.png"}, None]},
        features=Features({"prompt": texts, "image": datasets.Image()}),
    )
    found = [shown(build, row) for row in as_paths(typed)]
    assert found == ["(i0)x", "(i1)x", "x"]
    streamed = [shown(build, row) for row in as_paths(typed.to_iterable_dataset())]
    assert streamed == found
    several = Dataset.from_dict(
        {"prompt": [prompt], "images": [[{"bytes": data, "path": None}, {"bytes": None, "path": path}]]},
        features=Features({"prompt": texts, "images": List(datasets.Image())}),
    )
    assert shown(build, next(iter(as_paths(several)))) == "(i1)(i0)x"
    in_blocks = blocks({"type": "image", "image": {"bytes": None, "path": path}}, {"type": "text", "text": "x"})
    assert shown(build, in_blocks) == "(i0)x"


@pytest.mark.parametrize("name", ["image_path", "Images_Path", "imagePaths", "img", "pictures", "picture_file"])
def test_a_misspelt_column_is_refused(name):
    with pytest.raises(ValueError, match=f"column '{name}', which is not read, and no column 'image': rename it"):
        check_spelling(["prompt", name], "rows")
    for columns in (["prompt", "images"], ["prompt", "image"], ["prompt", "images", name]):
        check_spelling(columns, "rows")


def test_the_pixels_reach_the_prompt(build):
    """What the tower reads is the processor's picture of the file, and another file's is another."""
    prompt = build.encode(ask("x", images=["i0.png", "i2.png"]))
    shapes = [(height * 2, width * 2) for height, width in (SIZES["i0"], SIZES["i2"])]
    assert prompt.media["image"]["image_grid_thw"].tolist() == [[1, *shape] for shape in shapes]
    processor = build.family.processor.image_processor
    files = [np.asarray(Image.open(f"{build.loader.root}/{name}.png").convert("RGB")) for name in ("i0", "i2")]
    reference = processor(images=files, do_resize=False, return_tensors="pt")["pixel_values"]
    assert (prompt.media["image"]["pixel_values"] == reference).all()
    assert prompt.media_digest("image") != build.encode(ask("x", images=["i2.png", "i0.png"])).media_digest("image")
