"""Where the tokens of pictures stand in time: at the times of their pictures, and as the models' own code puts them."""

import re
from fractions import Fraction
from functools import cache

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_tiny

from maple_trl.omni.families import family_for
from maple_trl.omni.families.qwen2_5_omni import Qwen2_5OmniFamily
from maple_trl.omni.media.clips import AudioClip, PromptMedia, VideoClip
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder


OMNI = ("qwen2_5_omni", "qwen3_omni")
SIDE = {"qwen2_5_omni": 28, "qwen3_omni": 32}


@cache
def world(name: str):
    model, processor = build_tiny(name)
    family = family_for(model, processor)
    return model, processor, family


def clip_at(family, times, width: int = 1) -> VideoClip:
    side = family.frame_multiple
    frames = np.zeros((len(times), side, side * width, 3), dtype=np.uint8)
    rate = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else 1.0
    return VideoClip(frames, np.array(times, dtype=float), rate, times[-1] + 0.1, "clip")


def sound_of(seconds: float) -> AudioClip:
    return AudioClip(np.zeros(round(16000 * seconds), dtype=np.float32), 16000, seconds, "clip")


def text(processor, *kinds: str) -> str:
    blocks = [{"type": kind} for kind in kinds] + [{"type": "text", "text": "what is it"}]
    return processor.apply_chat_template([{"role": "user", "content": blocks}], tokenize=False)


def by_kind(family, prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Time positions of the video's and the sound's tokens, in seconds since the sound's first."""
    rows = [prompt.position_ids[0, prompt.input_ids == family.placeholder_ids[kind]] for kind in ("video", "audio")]
    return tuple((row - rows[1][0]) / family.config.position_id_per_seconds for row in rows)


WAYS = ((True, ("video",)), (False, ("video", "audio")), (False, ("audio", "video")))


@given(
    st.sampled_from(OMNI),
    st.sampled_from(WAYS),
    st.integers(1, 6),
    st.one_of(st.sampled_from([0.02, 0.1, 0.4, 0.5, 1.0, 2.0, 2.5, 7.5]), st.floats(0.02, 9.0)),
    st.floats(0.1, 9.0),
    st.integers(1, 3),
)
def test_even_pictures_from_the_start_stand_where_the_model_puts_them(name, way, pairs, step, seconds, width):
    """Tokens are the processor's and positions `get_rope_index`'s, in all the ways that a prompt can have media."""
    model, processor, family = world(name)
    interleaved, kinds = way
    clip, sound = clip_at(family, [step * i for i in range(2 * pairs)], width), sound_of(seconds)
    prompt = family.encode("key", text(processor, *kinds), PromptMedia((), [clip], [sound]), interleaved)
    batch = processor(
        text=[text(processor, *kinds)],
        return_tensors="pt",
        **family.processor_kwargs(PromptMedia((), [clip], [sound]), interleaved),
        position_id_per_seconds=family.config.position_id_per_seconds,
    )
    expected, _ = family.core(model).get_rope_index(
        batch["input_ids"],
        video_grid_thw=batch["video_grid_thw"],
        attention_mask=torch.ones_like(batch["input_ids"]),
        use_audio_in_video=interleaved,
        audio_seqlens=batch["feature_attention_mask"].sum(-1),
        second_per_grids=torch.tensor([2 * step]),
    )
    assert torch.equal(prompt.input_ids, batch["input_ids"][0])
    assert torch.equal(prompt.position_ids, expected[:, 0])


steps_between = st.lists(st.floats(0.02, 4.0), min_size=2, max_size=10).filter(lambda steps: len(steps) % 2 == 0)


@given(st.sampled_from(OMNI), steps_between, st.floats(0, 12), st.floats(0.1, 9.0), st.integers(1, 3))
def test_pictures_beside_sound_stand_at_their_own_times(name, steps, late, seconds, width):
    _, processor, family = world(name)
    times = late + np.cumsum([0.0, *steps[1:]])
    prompt = family.encode(
        "key", text(processor, "video"), PromptMedia((), [clip_at(family, times, width)], [sound_of(seconds)]), True
    )
    seen, heard = by_kind(family, prompt)
    one = 1 / family.config.position_id_per_seconds
    torch.testing.assert_close(heard, torch.arange(len(heard)) * one)
    shown = torch.from_numpy(times[::2]).repeat_interleave(width)
    assert (seen - shown).abs().max() <= one + 1e-4  # integer positions are rounded down
    # The media stand together, and the text after them counts on from the last of their tokens.
    media = torch.isin(prompt.input_ids, torch.tensor(list(family.placeholder_ids.values()))).nonzero()[:, 0]
    first, last = int(media[0]), int(media[-1])
    assert len(media) == last - first + 1
    assert (prompt.position_ids[:, last + 1] == prompt.position_ids[:, last].max() + 1).all()
    assert (prompt.position_ids[:, last + 1 :] == prompt.position_ids[:1, last + 1 :]).all()
    if name == "qwen3_omni":  # in order of time; Qwen2.5-Omni orders by chunks
        assert (prompt.position_ids[0, media].diff() >= 0).all()


def test_a_late_picture_stands_in_the_chunk_of_its_time():
    """Qwen2.5-Omni: chunks of 2 s, in each the pictures first. A picture of 10.5 s comes after 10 s of sound."""
    _, processor, family = world("qwen2_5_omni")
    media = PromptMedia((), [clip_at(family, [10.5, 11.0, 12.5, 13.0], 2)], [sound_of(14)])
    prompt = family.encode("key", text(processor, "video"), media, True)
    kinds = [
        {family.placeholder_ids["video"]: "v", family.placeholder_ids["audio"]: "a"}.get(int(token), "")
        for token in prompt.input_ids
    ]
    per_chunk = int(family.config.position_id_per_seconds * family.config.seconds_per_chunk)
    sounds = len(by_kind(family, prompt)[1])
    assert "".join(kinds) == "a" * 5 * per_chunk + "vv" + "a" * per_chunk + "vv" + "a" * (sounds - 6 * per_chunk)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni", "qwen2_5_vl"])
def test_pictures_without_interleaved_sound_keep_their_distances(name):
    """The first picture stands at the video's beginning; the others as far from it as they were shown later."""
    _, processor, family = world(name)
    times = np.array([3.0, 3.2, 3.6, 3.7, 9.5, 9.6])
    prompt = family.encode("key", text(processor, "video"), PromptMedia(videos=[clip_at(family, times)]))
    placed = prompt.position_ids[0, prompt.input_ids == family.placeholder_ids["video"]]
    per_second = (
        getattr(family.config, "position_id_per_seconds", None) or family.config.vision_config.tokens_per_second
    )
    np.testing.assert_allclose((placed - placed[0]).numpy(), np.array([0, 0.6, 6.5]) * per_second, atol=1)


def counted(family, prompt, grids: list[tuple[int, int, int]], times: list[list[int]]) -> torch.Tensor:
    """Positions by the rule that the Qwen models were trained by: whatever follows begins after the latest before it."""
    ids, pads, begin, columns, i = prompt.input_ids.tolist(), set(family.placeholder_ids.values()), 0, [], 0
    grids, times = iter(grids), iter(times)
    while i < len(ids):
        if ids[i] in pads:
            (frames, height, width), at = next(grids), next(times)
            block = [(at[t], y, x) for t in range(frames) for y in range(height) for x in range(width)]
        else:
            block = [(0, 0, 0)]
        columns += [tuple(begin + part for part in place) for place in block]
        begin, i = max(max(place) for place in columns) + 1, i + len(block)
    return torch.tensor(columns).T


clips_of_pairs = st.tuples(st.integers(1, 6), st.sampled_from([0.2, 0.5, 1.0, 3.0, 8.0]), st.integers(1, 3))


@given(st.lists(clips_of_pairs, min_size=1, max_size=2))
def test_what_follows_a_video_of_qwen2_5_vl_stands_after_its_last_picture(clips):
    model, processor, family = world("qwen2_5_vl")
    videos = [clip_at(family, [step * i for i in range(2 * pairs)], width) for pairs, step, width in clips]
    prompt = family.encode("key", text(processor, *["video"] * len(clips)), PromptMedia(videos=videos))
    per_second = family.config.vision_config.tokens_per_second
    expected = counted(
        family,
        prompt,
        [(pairs, 1, width) for pairs, _, width in clips],
        [[int(2 * step * per_second * t) for t in range(pairs)] for pairs, step, _ in clips],
    )
    assert torch.equal(prompt.position_ids, expected)
    # The control: transformers' own text after a video that lasts longer than it is wide stands among its pictures.
    ids = prompt.input_ids[None]
    theirs, _ = family.core(model).get_rope_index(
        ids,
        mm_token_type_ids=2 * (ids == family.placeholder_ids["video"]).int(),
        video_grid_thw=torch.tensor([[pairs, 2, 2 * width] for pairs, _, width in clips]),
        second_per_grid_ts=torch.tensor([2 * step for _, step, _ in clips]),
    )
    is_short = all(int(2 * step * per_second * (pairs - 1)) < width for pairs, step, width in clips)
    assert torch.equal(theirs[:, 0], expected) is is_short


def test_qwen3_vl_reads_the_times_of_the_file():
    """Its prompt names the middle of each pair of pictures, counted from the start of the file."""
    _, processor, family = world("qwen3_vl")
    prompt = family.encode(
        "key", text(processor, "video"), PromptMedia(videos=[clip_at(family, [3.0, 3.4, 5.0, 6.0])])
    )
    words = processor.tokenizer.decode(prompt.input_ids)
    assert re.findall(r"<([\d.]+) seconds>", words) == ["3.2", "5.5"]


# Case: the sound begins 2 s before the pictures


def write_late(path, late: int) -> None:
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("libx264", rate=5, options={"bf": "0"}), None
        video.width = video.height = 56
        video.pix_fmt = "yuv420p"
        audio = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        for k in range(5 * (8 + late)):
            frame = av.AudioFrame.from_ndarray(np.full((1, 3200), 1000, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 3200 * k, Fraction(1, 16000)
            out.mux(audio.encode(frame))
            if k >= 5 * late:
                picture = av.VideoFrame.from_ndarray(np.full((56, 56, 3), 4 * k, np.uint8), format="rgb24")
                picture.pts = k
                out.mux(video.encode(picture))
        out.mux(video.encode())
        out.mux(audio.encode())


def placed_seconds(folder, name: str, family_name: str, limits: MediaLimits) -> tuple[list[float], np.ndarray]:
    _, _, family = world(family_name)
    with MediaLoader(folder, limits, backend="pyav") as loader:
        row = {"prompt": [{"role": "user", "content": "?"}], "video": name, "audio_in_video": True}
        seen, _ = by_kind(family, PromptBuilder(family, loader).encode(row))
        times = loader.video(name, multiple=family.frame_multiple).timestamps
    return sorted(set(seen.tolist())), times


SAMPLINGS = [
    MediaLimits(num_frames=4),
    MediaLimits(num_frames=7),
    MediaLimits(num_frames=None, fps=0.5),
    MediaLimits(num_frames=None, fps=2.0),
]


@pytest.mark.parametrize("limits", SAMPLINGS, ids=["4", "7", "0.5/s", "2/s"])
@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("family_name", OMNI)
def test_sound_before_the_first_picture(tmp_path, family_name, late, limits):
    write_late(tmp_path / "clip.mkv", late)
    placed, times = placed_seconds(tmp_path, "clip.mkv", family_name, limits)
    assert times[0] == late and times[-1] == pytest.approx(late + 7.8)
    one = 1 / world(family_name)[2].config.position_id_per_seconds
    np.testing.assert_allclose(placed, times[::2], atol=one + 1e-4)


def test_positions_that_ignore_the_first_picture_are_noticed(tmp_path, monkeypatch):
    """Planted fault: pictures placed from 0 on. The check above finds them 2 s early."""
    write_late(tmp_path / "clip.mkv", 2)
    right = Qwen2_5OmniFamily.patch_seconds
    monkeypatch.setattr(Qwen2_5OmniFamily, "patch_seconds", lambda self, clip: right(self, clip) - clip.timestamps[0])
    placed, times = placed_seconds(tmp_path, "clip.mkv", "qwen2_5_omni", SAMPLINGS[0])
    assert np.abs(np.array(placed) - times[::2]).min() > 1.9
