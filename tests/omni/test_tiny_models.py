"""Checks of the tiny models that the other tests stand on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_models import (
    FAMILIES,
    FRAME_MULTIPLE,
    GEMMA,
    QWEN,
    SAMPLING_RATE,
    build_tiny,
    build_tiny_full,
    build_tiny_text,
    build_tokenizer,
    encode_sample,
    sample_media,
    save_tiny,
    save_tiny_full,
)
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from maple_trl.omni.loading import load_processor


OMNI = ("qwen2_5_omni", "qwen3_omni")
VISION = tuple(name for name, spec in FAMILIES.items() if spec.has_vision)
AUDIO = tuple(name for name, spec in FAMILIES.items() if spec.has_audio and name != "phi4_multimodal")


NOT_READ = ("num_soft_tokens_per_image", "num_soft_tokens_per_video", "video_metadata")
"""What Gemma 4's processors say beside what the model reads."""


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def expected_audio_tokens(family: str, mel_frames: int) -> int:
    """Count the encoder's output positions by running strides over positions, without the closed formulas."""
    if family == "qwen3_omni":
        total = 0
        for start in range(0, mel_frames, 100):
            length = min(100, mel_frames - start)
            for _ in range(3):  # three convolutions of stride 2 on each chunk of 100 mel frames
                length = len(range(0, length, 2))
            total += length
        return total
    length = len(range(0, mel_frames, 2))  # one convolution of stride 2
    return len(range(0, length - 1, 2))  # one average pool of width 2 and stride 2, no padding


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_with_all_media_is_finite(family):
    model, processor = build_tiny(family)
    assert type(model) is FAMILIES[family].model_class
    assert type(processor) is FAMILIES[family].processor_class
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    inputs = encode_sample(family, processor, [sample_media(family)])
    logits = logits_of(model, inputs)
    assert logits.shape == (1, inputs["input_ids"].shape[1], len(processor.tokenizer))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("num_frames", [2, 6])
def test_video_placeholders_match_the_grid(family, num_frames):
    model, processor = build_tiny(family)
    media = sample_media(family, num_frames=num_frames, side=3)
    inputs = encode_sample(family, processor, [{"video": media["video"]}])
    count = int((inputs["input_ids"] == processor.video_token_id).sum())
    assert count == num_frames // FAMILIES[family].temporal_patch_size * 3 * 3
    names = (
        "pixel_values_videos",
        "video_grid_thw",
        "video_merge_sizes",
        "video_position_ids",
        "num_frames_per_video",
    )
    core = model.base_model
    features = core.get_video_features(**{name: inputs[name] for name in names if name in inputs}).pooler_output
    assert sum(len(part) for part in features) == count


@pytest.mark.parametrize("family", [name for name in AUDIO if name in QWEN])
@pytest.mark.parametrize("mel_frames", [7, 50, 99])
def test_audio_placeholders_match_the_encoder(family, mel_frames):
    model, processor = build_tiny(family)
    waveform = sample_media(family, seconds=mel_frames / 100)["audio"]
    inputs = encode_sample(family, processor, [{"audio": waveform}])
    assert int(inputs["feature_attention_mask"].sum()) == mel_frames
    count = int((inputs["input_ids"] == processor.audio_token_id).sum())
    assert count == expected_audio_tokens(family, mel_frames)
    if family in OMNI:
        features = model.get_audio_features(
            inputs["input_features"], feature_attention_mask=inputs["feature_attention_mask"]
        )
        assert len(features.last_hidden_state) == count
    assert torch.isfinite(logits_of(model, inputs)).all()


@pytest.mark.parametrize("family", [name for name in AUDIO if name in GEMMA])
@pytest.mark.parametrize("seconds", [0.07, 0.5, 0.99])
def test_audio_placeholders_match_gemmas_encoder(family, seconds):
    model, processor = build_tiny(family)
    waveform = sample_media(family, seconds=seconds)["audio"]
    inputs = encode_sample(family, processor, [{"audio": waveform}])
    count = int((inputs["input_ids"] == processor.audio_token_id).sum())
    frames = len(range(0, len(waveform), 640))  # without towers a token is 40 ms
    if family != "gemma4_unified":  # frames of 20 ms from 10 ms before the sound on, then two convolutions of stride 2
        frames = len(range(0, len(range(0, len(waveform) - 160, 160)), 4))
    assert count == frames
    features = model.base_model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    assert int(features.attention_mask.sum()) == count
    assert torch.isfinite(logits_of(model, inputs)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_number_of_placeholders_is_noticed(family):
    """Negative control of the two tests above.

    The Omni models accept a missing audio placeholder without a word (the features are scattered in order and the last
    one is dropped), so for them only a surplus is an error: the counts must be compared before the call.
    """
    model, processor = build_tiny(family)
    filler = processor.tokenizer.encode("A")[0]
    for kind, value in sample_media(family).items():
        inputs = encode_sample(family, processor, [{kind: value}])
        token = processor.tokenizer.convert_tokens_to_ids(getattr(processor, f"{kind}_token"))
        fewer, more = inputs["input_ids"].clone(), inputs["input_ids"].clone()
        fewer[0, (fewer[0] == token).nonzero()[0, 0]] = filler
        more[0, -1] = token
        with pytest.raises((ValueError, RuntimeError)):
            logits_of(model, {**inputs, "input_ids": more})
        if kind == "audio" and family in OMNI:
            assert torch.isfinite(logits_of(model, {**inputs, "input_ids": fewer})).all()
        else:
            with pytest.raises((ValueError, RuntimeError)):
                logits_of(model, {**inputs, "input_ids": fewer})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_depend_on_every_medium(family):
    model, processor = build_tiny(family)
    media = sample_media(family, seed=1)
    base = logits_of(model, encode_sample(family, processor, [media]))
    assert torch.equal(base, logits_of(model, encode_sample(family, processor, [media])))
    for kind, value in sample_media(family, seed=2).items():
        changed = logits_of(model, encode_sample(family, processor, [{**media, kind: value}]))
        # Pooled noise is much alike, and norms hide how strong it is.
        least = 0.02 if family in GEMMA else 0.1
        assert (base[0, -1] - changed[0, -1]).abs().max() > least, kind


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.matrix(cases=8)
def test_left_padding_does_not_change_logits(family):
    model, processor = build_tiny(family)
    samples = [
        {**sample_media(family, seed=1), "question": "Which?"},
        {**sample_media(family, seed=2), "question": "Which tone is heard, and which word is in the subtitles?"},
    ]
    batch = encode_sample(family, processor, samples)
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][0, -1] == 1
    together = logits_of(model, batch)[:, -1]
    for row, sample in enumerate(samples):
        alone = logits_of(model, encode_sample(family, processor, [sample]))[0, -1]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_equals_repeated_forward(family):
    model, processor = build_tiny(family)
    inputs = encode_sample(family, processor, [sample_media(family)])
    start = inputs["input_ids"].shape[1]
    media = [processor.tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[family].tokens.values()]
    output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=media)
    full = dict(inputs)
    full["input_ids"] = output
    full["attention_mask"] = torch.ones_like(output)
    if "mm_token_type_ids" in full:
        full["mm_token_type_ids"] = torch.nn.functional.pad(full["mm_token_type_ids"], (0, output.shape[1] - start))
    logits = logits_of(model, full)[0, start - 1 : -1]
    logits[:, [model.generation_config.eos_token_id, *media]] = -torch.inf  # as those options do
    assert output[0, start:].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.matrix(cases=4)
def test_save_and_load_round_trip(family, tmp_path):
    model, processor = build_tiny(family, seed=3)
    save_tiny(family, tmp_path, seed=3)
    loaded_processor = load_processor(str(tmp_path))
    assert type(loaded_processor) is type(processor)
    loaded = FAMILIES[family].model_class.from_pretrained(tmp_path, dtype="float32").eval()
    samples = [sample_media(family, seed=1), sample_media(family, seed=2)]
    before = encode_sample(family, processor, samples)
    after = encode_sample(family, loaded_processor, samples)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(logits_of(model, before), logits_of(loaded, after))
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    # Negative control: other weights give other logits.
    assert not torch.equal(logits_of(build_tiny(family, seed=4)[0], before), logits_of(loaded, after))


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_decides_the_weights_and_spares_the_global_state(family):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = build_tiny(family, seed=5)[0].state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = build_tiny(family, seed=5)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_are_single_and_tags_survive_decoding(family):
    tokenizer = build_tokenizer(family)
    for name, token in FAMILIES[family].tokens.items():
        assert tokenizer.encode(token) == [getattr(tokenizer, f"{name}_id")]
        assert tokenizer.decode(tokenizer.encode(token), skip_special_tokens=True) == ""
    for role in ("system", "user", "assistant"):
        assert len(tokenizer.encode(role)) == 1
    text = "<think>é 漢字</think><answer>A</answer>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.padding_side == "left"
    assert (tokenizer.eos_token, tokenizer.pad_token) == (FAMILIES[family].end, FAMILIES[family].pad)
    assert (tokenizer.eos_token == "<|im_end|>") == (family not in GEMMA)


def test_chat_templates_render_the_published_blocks():
    def render(family, *kinds):
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": "Q?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]
        processor = build_tiny(family)[1]
        turn_text = processor.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
        assert processor.apply_chat_template(turns, tokenize=False) == turn_text + "A<|im_end|>\n"
        assert processor.tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False) == (
            turn_text
        )
        return turn_text

    stock = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    end = "Q?<|im_end|>\n<|im_start|>assistant\n"
    user = "<|im_start|>user\n"
    assert render("qwen2_5_omni", "video", "audio", "image") == (
        f"{stock}{user}<|vision_bos|><|VIDEO|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
        f"<|vision_bos|><|IMAGE|><|vision_eos|>{end}"
    )
    assert render("qwen3_omni", "video", "audio", "image") == (
        f"{user}<|vision_start|><|video_pad|><|vision_end|><|audio_start|><|audio_pad|><|audio_end|>"
        f"<|vision_start|><|image_pad|><|vision_end|>{end}"
    )
    assert render("qwen2_5_vl", "video", "image") == (
        f"{stock}{user}<|vision_start|><|video_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>{end}"
    )
    assert render("qwen3_vl", "video") == f"{user}<|vision_start|><|video_pad|><|vision_end|>{end}"
    assert render("qwen2_audio", "audio", "audio") == (
        f"{stock}{user}Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
        f"Audio 2: <|audio_bos|><|AUDIO|><|audio_eos|>\n{end}"
    )


@pytest.mark.parametrize("family", VISION)
def test_image_block(family):
    model, processor = build_tiny(family)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    side = 3 * FRAME_MULTIPLE[family]
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    inputs = processor(
        text=[text], images=[image], images_kwargs={"do_resize": family not in GEMMA}, return_tensors="pt"
    )
    merge = getattr(processor.image_processor, "merge_size", 2)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == (6 // merge) ** 2
    assert torch.isfinite(logits_of(model, inputs)).all()


@pytest.mark.parametrize("family", OMNI)
def test_audio_track_inside_the_video_block(family):
    model, processor = build_tiny(family)
    media = sample_media(family, num_frames=4, seconds=4.0)
    turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which?"}]}]
    inputs = processor(
        text=[processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)],
        videos=[media["video"]],
        audio=[media["audio"]],
        videos_kwargs={"do_resize": False, "do_sample_frames": False, "fps": 1.0},
        audio_kwargs={"sampling_rate": SAMPLING_RATE[family]},
        load_audio_from_video=True,
        audio_from_video_indices=[0],
        return_tensors="pt",
    )
    ids = inputs["input_ids"][0].tolist()
    video_at = [i for i, token in enumerate(ids) if token == processor.video_token_id]
    audio_at = [i for i, token in enumerate(ids) if token == processor.audio_token_id]
    assert len(video_at) == 8 and len(audio_at) == expected_audio_tokens(family, 400)
    assert video_at[0] < audio_at[0] < video_at[-1] < audio_at[-1]  # interleaved by time
    assert torch.isfinite(logits_of(model, {**inputs, "use_audio_in_video": True})).all()


@pytest.mark.parametrize("family", OMNI)
def test_thinker_loads_alone_from_the_full_checkpoint(family, tmp_path):
    save_tiny_full(family, tmp_path, seed=6)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == {"qwen2_5_omni": "qwen2_5_omni", "qwen3_omni": "qwen3_omni_moe"}[family]
    assert AutoConfig.from_pretrained(tmp_path).thinker_config.text_config.hidden_size == 64
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        names = list(handle.keys())
    assert {name.split(".")[0] for name in names} == {
        "thinker",
        "talker",
        {"qwen2_5_omni": "token2wav", "qwen3_omni": "code2wav"}[family],
    }
    assert "thinker.model.layers.0.self_attn.q_proj.weight" in names

    thinker, processor = build_tiny(family, seed=6)
    loaded, info = FAMILIES[family].model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    inputs = encode_sample(family, AutoProcessor.from_pretrained(tmp_path), [sample_media(family)])
    assert torch.equal(logits_of(thinker, inputs), logits_of(loaded.eval(), inputs))
    assert build_tiny_full(family, seed=6)[0].talker is not None


def test_text_model_shares_the_tokenizer(tmp_path):
    model, tokenizer = build_tiny_text(seed=7)
    assert tokenizer.get_vocab() == build_tiny("qwen2_5_omni")[1].tokenizer.get_vocab()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path)(["Which colour?", "A"], padding=True, return_tensors="pt")
    assert inputs["attention_mask"][1].tolist()[0] == 0
    assert torch.equal(logits_of(model, inputs), logits_of(loaded, inputs))
