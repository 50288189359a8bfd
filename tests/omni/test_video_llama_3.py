"""VideoLLaMA 3: what a clip shows decides how many tokens it has, and the times of its pictures stand in the text."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from media_files import tone, write_video
from test_mixed_batches import batched
from test_phi4_multimodal import sampled_and_trained
from tiny_models import build_tiny

from maple_trl.omni.encoded import MediaMismatchError
from maple_trl.omni.errors import MediaError
from maple_trl.omni.families import family_for, registered_types
from maple_trl.omni.lora import build_lora_config, linear_modules
from maple_trl.omni.media.clips import PromptMedia, VideoClip
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder, RowError
from maple_trl.omni.serving import serve_media
from maple_trl.rollout.engine_models import ENGINE_MODELS, engine_model


TEXT = "look <|video_pad|> here"


def clip(times, still=(), seed=0, height=56, width=84):
    """Noise; pictures of the numbers in `still` are those before them, but for their first patch of 28 pixels."""
    frames = np.random.default_rng(seed).integers(0, 256, (len(times), height, width, 3), dtype=np.uint8)
    for number in still:
        first = frames[number, :28, :28].copy()
        frames[number] = frames[number - 1]
        frames[number, :28, :28] = first
    return VideoClip(frames, np.array(times, dtype=float), 2.0, len(times) / 2, "clip.mp4")


@pytest.fixture
def tiny():
    model, processor = build_tiny("video_llama_3")
    return model, processor, family_for(model, processor)


def native(model, processor, text, clips):
    """What transformers computes, from the call of its processor on."""
    metadata = [
        {"fps": 1.0, "frames_indices": c.timestamps.tolist(), "total_num_frames": len(c.frames)} for c in clips
    ]
    options = {"do_resize": False, "do_sample_frames": False, "video_metadata": metadata}
    batch = processor(text=[text], videos=[c.frames.copy() for c in clips], videos_kwargs=options, return_tensors="pt")
    names = ("pixel_values_videos", "video_grid_thw", "video_merge_sizes", "video_compression_mask")
    ids = batch["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, **{name: batch[name] for name in names}).logits[0]


def served(model, family, prompts):
    inputs, _ = batched(prompts, torch.empty(len(prompts), 0, dtype=torch.long), family.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(family, model, prompts):
        return model(**inputs).logits


def test_clips_that_stand_still_have_fewer_tokens_and_the_same_logits(tiny):
    model, processor, family = tiny
    moving, still, two = clip([0, 0.5, 1]), clip([0, 0.5, 1], still=(1, 2)), clip([0, 1], still=(1,), seed=1)
    cases = [(TEXT, [moving]), (TEXT, [still]), (f"{TEXT} and <|video_pad|>", [two, moving])]
    prompts = [family.encode(str(i), text, PromptMedia(videos=clips)) for i, (text, clips) in enumerate(cases)]
    whole = family.video_token_count(3, 56, 84)
    assert [prompt.media_tokens["video"] for prompt in prompts] == [whole, whole - 2 * 5, whole + 7] and whole == 18
    together = served(model, family, prompts)
    for prompt, (text, clips), found in zip(prompts, cases, together, strict=True):
        torch.testing.assert_close(found[-len(prompt) :], native(model, processor, text, clips), atol=1e-4, rtol=0)


def test_features_that_are_left_out_are_missed(tiny):
    """The negative control: all that the tower gives is more than there are placeholders for."""
    model, _, family = tiny
    prompt = family.encode("still", TEXT, PromptMedia(videos=[clip([0, 0.5, 1], still=(1, 2))]))
    media = prompt.media["video"] | {"video_compression_mask": torch.ones(18, dtype=torch.bool)}
    with pytest.raises(MediaMismatchError, match=r"gave 18 features \(video\) for 8"):
        served(model, family, [replace(prompt, media={"video": media}, _digests={})])


def test_the_text_tells_true_times_and_a_repeated_picture_is_none(tiny):
    model, processor, family = tiny
    uneven = clip([0, 0.7, 0.9, 3.25])
    prompt = family.encode("uneven", TEXT, PromptMedia(videos=[uneven]))
    assert re.findall(r"Time (\S+)s:", family.tokenizer.decode(prompt.input_ids)) == ["0.0", "0.7", "0.9", "3.2"]
    # As the loader gives three pictures.
    padded = VideoClip(uneven.frames[[0, 1, 2, 2]], uneven.timestamps[[0, 1, 2, 2]], 2.0, 2.0, "clip.mp4")
    prompt = family.encode("odd", TEXT, PromptMedia(videos=[padded]))
    three = replace(uneven, frames=uneven.frames[:3], timestamps=uneven.timestamps[:3])
    assert prompt.media["video"]["video_grid_thw"].tolist() == [[3, 4, 6]]
    found, right = served(model, family, [prompt])[0], native(model, processor, TEXT, [three])
    torch.testing.assert_close(found, right, atol=1e-4, rtol=0)
    assert len(found) != len(native(model, processor, TEXT, [padded]))
    single = family.encode("one", TEXT, PromptMedia(videos=[clip([0.5, 0.5])]))
    assert single.media["video"]["video_grid_thw"].tolist() == [[1, 4, 6]]


def test_a_budget_of_tokens_is_kept_by_the_most_that_a_clip_can_have(tiny, tmp_path):
    write_video(tmp_path / "still.mp4", size=(112, 112), frames=8, fps=4, audio=tone(2, 16000))
    model, _, family = tiny
    row = {"prompt": [{"role": "user", "content": "x"}], "video": "still.mp4", "tag": "V"}
    with MediaLoader(tmp_path, MediaLimits(num_frames=4, min_pixels=784, max_pixels=784 * 16), workers=0) as loader:
        free = PromptBuilder(family, loader).encode(row)
        bound = PromptBuilder(family, loader, max_media_tokens=16).encode(row)
        assert free.media["video"]["video_grid_thw"].tolist() == [[4, 8, 8]]
        assert bound.media["video"]["video_grid_thw"].tolist() == [[4, 4, 4]] and bound.media_tokens["video"] <= 16
        with pytest.raises(MediaError, match="4 media tokens at the smallest frame size, but max_media_tokens is 3"):
            PromptBuilder(family, loader, max_media_tokens=3).encode(row)
        with pytest.raises(RowError, match="VideoLlama3Family reads no audio, which the row .tag VA. feeds"):
            PromptBuilder(family, loader).encode(row | {"tag": "VA"})


def test_what_is_sampled_is_what_is_trained():
    clips = (clip([0, 0.5, 1]), clip([0, 0.5, 1], still=(1, 2)), clip([0, 1], seed=2))

    def encode(family, number):
        return family.encode(str(number), TEXT, PromptMedia(videos=[clips[number]]))

    sampled, trained = sampled_and_trained("video_llama_3", encode)
    torch.testing.assert_close(trained, sampled, atol=1e-4, rtol=0)


def test_each_part_has_its_layers(tiny):
    model, _, family = tiny
    found = {scope: len(names) for scope, names in linear_modules(model, family).items()}
    assert found == {"vision": 2 * (4 + 2), "projectors": 2, "llm": 2 * (4 + 3)}
    config = build_lora_config(model, family, vision=False, llm=False)
    assert all(name.startswith("model.projector.readout.") for name in config.target_modules)


def test_vllm_is_refused_by_name():
    others = set(registered_types()) - set(ENGINE_MODELS)
    assert {"video_llama_3", "phi4_multimodal", "qwen3_vl"} <= others
    for name in others:
        with pytest.raises(ValueError, match=f"use_vllm=True: vLLM rollouts are known for .*, not for '{name}'"):
            engine_model(name)
