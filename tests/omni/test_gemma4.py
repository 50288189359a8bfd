"""Gemma 4: what no other family has, against the processors' and the models' own handling of a prompt."""

import dataclasses

import numpy as np
import pytest
import torch
from omni_runs import build_trainer
from PIL import Image
from test_mixed_batches import alone_by_transformers, batched
from test_shared_prefix import LIMITS, build, encode, mixed_batch
from tiny_models import GEMMA, build_tiny, build_tokenizer, save_tiny, towers_of
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    Gemma4AudioFeatureExtractor,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4VideoProcessor,
)
from trl import chat_template_utils

from maple_trl.evaluation import EvalOptions
from maple_trl.evaluation.evaluator import Evaluator
from maple_trl.omni.encoded import Blocks, generation_position_ids
from maple_trl.omni.errors import MediaError, RowError
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.lora import build_lora_config, freeze, linear_modules
from maple_trl.omni.media.clips import AudioClip, Picture, PromptMedia, VideoClip
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.prefix.sharing import Comparison
from maple_trl.omni.prompt import PromptBuilder, check_template
from maple_trl.omni.serving import serve_media
from maple_trl.planning.sizes import read_sizes
from maple_trl.rollout.engine_models import engine_model


HEARING = [name for name in GEMMA if name != "gemma4_moe"]
BOTH_WAYS = [name for name in GEMMA if name != "gemma4"]
QUESTION = "Which colour is the square?"


def picture(rng, height, width):
    return Picture(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), "a.png")


def clip(rng, frames, height, width, start=0.0):
    pixels = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return VideoClip(pixels, start + 0.75 * np.arange(frames), 4 / 3, frames * 0.75, "a.mp4")


def sound(rng, samples):
    return AudioClip(rng.normal(scale=0.1, size=samples).astype(np.float32), 16000, samples / 16000, "a.wav")


def all_kinds(audio):
    """Prompts with several of each kind, of different sizes, and in every mixture."""
    rng = np.random.default_rng(0)
    pictures, videos = [picture(rng, 54, 36), picture(rng, 18, 90)], [clip(rng, 2, 36, 36), clip(rng, 3, 18, 54, 61.0)]
    sounds = [sound(rng, 11_200), sound(rng, 4_961)] if audio else []
    made = [
        PromptMedia(pictures, videos, sounds),
        PromptMedia(pictures[:1]),
        PromptMedia(videos=videos[1:]),
        PromptMedia(pictures[1:], audios=sounds[1:]),
        PromptMedia(videos=videos[:1], audios=sounds[:1]),
        PromptMedia(),
    ]
    return list({(len(m.images), len(m.videos), len(m.audios)): m for m in made}.values())


def text_of(family, media):
    kinds = ["image"] * len(media.images) + ["video"] * len(media.videos) + ["audio"] * len(media.audios)
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": QUESTION}]
    return family.render([{"role": "user", "content": content}])


def native_inputs(processor, family, media):
    """What the processor makes, called as its documentation has it."""
    kwargs = {"text": [text_of(family, media)], "return_tensors": "pt"}
    if media.images:
        kwargs |= {"images": [p.pixels for p in media.images], "images_kwargs": {"do_resize": False}}
    if media.videos:
        metadata = [
            {"fps": 1.0, "total_num_frames": len(c.frames), "frames_indices": c.timestamps.tolist()}
            for c in media.videos
        ]
        options = {"do_resize": False, "do_sample_frames": False, "video_metadata": metadata}
        kwargs |= {"videos": [c.frames for c in media.videos], "videos_kwargs": options}
    if media.audios:
        kwargs |= {"audio": [c.waveform for c in media.audios], "audio_kwargs": {"sampling_rate": 16000}}
    return dict(processor(**kwargs))


def natively(model, processor, family, media, completion=()):
    """Logits by the processor and the model alone."""
    inputs = native_inputs(processor, family, media)
    more = torch.tensor([completion], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], dim=1)
    with torch.no_grad():
        return model(**inputs).logits[0], inputs["input_ids"][0]


# Media


@pytest.mark.parametrize("name", GEMMA)
def test_pictures_videos_and_sounds_in_every_mixture(name):
    """Several of each, of different sizes: each row of a batch has what the model gives it alone, by its own arguments."""
    model, processor = build_tiny(name)
    family = family_for(model, processor)
    media = all_kinds(name in HEARING)
    prompts = [family.encode(str(i), text_of(family, m), m) for i, m in enumerate(media)]
    completions = torch.randint(10, 200, (len(media), 5), generator=torch.Generator().manual_seed(0))
    inputs, _ = batched(prompts, completions, processor.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(family, model, prompts):
        logits = model(**inputs).logits
    for i, m in enumerate(media):
        alone, ids = natively(model, processor, family, m, completions[i].tolist())
        assert torch.equal(ids[:-5], prompts[i].input_ids)
        torch.testing.assert_close(logits[i, -len(alone) :], alone, atol=1e-4, rtol=0)
    assert prompts[0].media_tokens["image"] == 3 * 2 + 1 * 5 and prompts[0].media_tokens["video"] == 2 * 4 + 3 * 3
    shifted = dataclasses.replace(media[0], images=media[0].images[::-1])  # pictures change places
    other, _ = natively(model, processor, family, shifted, completions[0].tolist())
    assert (logits[0, -5:] - other[-5:]).abs().max() > 1e-3


def test_a_frame_that_the_loader_repeats_is_fed_once():
    family = family_for(*build_tiny("gemma4"))
    three = clip(np.random.default_rng(0), 3, 36, 36)
    padded = dataclasses.replace(three, frames=three.frames[[0, 1, 2, 2]], timestamps=three.timestamps[[0, 1, 2, 2]])
    once, twice = (
        family.encode("k", text_of(family, m), m) for m in (PromptMedia(videos=[c]) for c in (three, padded))
    )
    assert torch.equal(once.input_ids, twice.input_ids) and once.media_tokens == twice.media_tokens
    assert all(torch.equal(values, twice.media["video"][name]) for name, values in once.media["video"].items())


@pytest.mark.parametrize("name", GEMMA)
def test_padding_is_not_kept(name):
    """The processors make room for 70 tokens of each picture, and pad sounds to the longest."""
    model, processor = build_tiny(name)
    family = family_for(model, processor)
    [media, *_] = all_kinds(name in HEARING)
    prompt = family.encode("p", text_of(family, media), media)
    per_token = 1 if name == "gemma4_unified" else 9
    assert prompt.media["image"]["pixel_values"].shape[:2] == (2, 6 * per_token)
    assert prompt.media["video"]["pixel_values_videos"].shape[:2] == (5, 4 * per_token)
    for kind, inputs in prompt.media.items():
        assert sum(family.feature_counts(kind, inputs)) == prompt.media_tokens[kind]


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified"])
def test_room_for_tokens_follows_the_frames(name):
    """Of `max_soft_tokens` the processors know five; the sizes are decided by the loader."""
    model, processor = build_tiny(name)
    family, rng = family_for(model, processor), np.random.default_rng(0)
    for side, room in ((8, 70), (9, 140)):
        media = PromptMedia([picture(rng, 18 * side, 18 * side)], [clip(rng, 1, 18 * side, 18 * side)])
        kwargs = family.processor_kwargs(media, interleaved=False)
        assert [kwargs[f"{kind}s_kwargs"]["max_soft_tokens"] for kind in ("image", "video")] == [room, room]
        prompt = family.encode("p", text_of(family, media), media)
        assert prompt.media_tokens == {"image": side**2, "video": side**2}
        assert family.image_token_count(18 * side, 18 * side) == family.video_token_count(1, 18 * side, 18 * side)
        assert family.image_token_count(18 * side, 18 * side) == side**2
    huge = PromptMedia([picture(rng, 18 * 33, 18 * 34)])
    with pytest.raises(
        MediaError, match=r"a\.png: a picture of 1122 tokens; this model reads 1120 at most: set max_pi"
    ):
        family.encode("p", text_of(family, huge), huge)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified"])
def test_frames_become_smaller_until_a_prompt_fits(name, seven_tags):
    folder, dataset = seven_tags
    model, processor = build_tiny(name)
    row = next(row for row in dataset if row["tag"] == "VA")
    found = {}
    for most in (None, 30, 12):
        builder = PromptBuilder(family_for(model, processor), MediaLoader(folder, LIMITS), max_media_tokens=most)
        found[most] = builder.encode(row).media_tokens
    assert found == {None: {"video": 36, "audio": 8}, 30: {"video": 16, "audio": 8}, 12: {"video": 4, "audio": 8}}
    builder = PromptBuilder(family_for(model, processor), MediaLoader(folder, LIMITS), max_media_tokens=11)
    with pytest.raises(
        MediaError, match="media-tokens: .*12 media tokens at the smallest frame size, but max_media_tok"
    ):
        builder.encode(row)


def test_the_published_processors_make_tokens_of_48_pixels():
    model, _ = build_tiny("gemma4")
    parts = {"image_processor": Gemma4ImageProcessor(), "video_processor": Gemma4VideoProcessor()}
    processor = Gemma4Processor(
        tokenizer=build_tokenizer("gemma4"), feature_extractor=Gemma4AudioFeatureExtractor(), **parts
    )
    family = family_for(model, processor)
    assert (family.frame_multiple, family.frames_per_token, family.sampling_rate) == (48, 1, 16000)
    assert family.max_audio_seconds == 30.0
    with pytest.raises(ValueError, match="less than one patch of this model, 48x48 pixels"):
        family.check_pixels(48 * 48 - 1)


@pytest.mark.parametrize("name", HEARING)
def test_the_tokens_of_a_sound_are_known_before_it_is_encoded(name):
    model, processor = build_tiny(name)
    family, rng = family_for(model, processor), np.random.default_rng(0)
    for samples in (400, 1_000, 1_599, 1_600, 1_601, 9_001, 30 * 16000):
        media = PromptMedia(audios=[sound(rng, samples)])
        prompt = family.encode("p", text_of(family, media), media)
        assert prompt.media_tokens["audio"] == family.audio_tokens_of(media.audios[0])


@pytest.mark.parametrize("name", HEARING)
def test_a_sound_that_would_be_cut_is_refused(name, tmp_path):
    from media_files import tone, write_audio

    model, processor = build_tiny(name)
    builder = PromptBuilder(family_for(model, processor), MediaLoader(tmp_path, LIMITS))
    for seconds in (30, 31):
        write_audio(tmp_path / f"{seconds}.wav", tone(seconds, 16000))
    row = {"prompt": [{"role": "user", "content": "What?"}], "audio": "30.wav"}
    assert builder.encode(row).media_tokens["audio"] == 750
    with pytest.raises(MediaError, match=r"too-long: 31\.wav: 31\.0 s of audio; Gemma4\w*Family reads 30 s"):
        builder.encode(row | {"audio": "31.wav"})


def test_a_model_without_an_audio_tower_hears_nothing(seven_tags):
    folder, dataset = seven_tags
    model, processor = build_tiny("gemma4_moe")
    family = family_for(model, processor)
    assert list(family.placeholders) == ["image", "video"] and "audio" not in family.scopes
    builder = PromptBuilder(family, MediaLoader(folder, LIMITS))
    row = next(row for row in dataset if row["tag"] == "VA")
    with pytest.raises(RowError, match="Gemma4Family reads no audio, which the row"):
        builder.encode(row)
    assert builder.encode(row | {"tag": "V"}).kinds == ("video",)
    assert builder.encode(row | {"tag": None}).kinds == ("video",)


# Text


def test_frames_are_told_by_their_true_times():
    model, processor = build_tiny("gemma4")
    family, rng = family_for(model, processor), np.random.default_rng(0)
    media = PromptMedia(videos=[clip(rng, 3, 18, 18, start=59.0)])
    prompt = family.encode("p", text_of(family, media), media)
    told = processor.tokenizer.decode(prompt.input_ids)
    frame = "<|image><|video|><image|>"
    assert f"00:59 {frame} 00:59 {frame} 01:00 {frame}{QUESTION}" in told


def test_a_prompt_begins_once(seven_tags):
    """The chat template says `<bos>`, and some tokenizers set one themselves."""
    folder, dataset = seven_tags
    found = []
    for sets in (False, True):
        model, processor = build_tiny("gemma4")
        bos = processor.tokenizer.bos_token
        if sets:
            processor.tokenizer._tokenizer.post_processor = TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, processor.tokenizer.bos_token_id)]
            )
        assert (processor.tokenizer("a")["input_ids"][0] == processor.tokenizer.bos_token_id) == sets
        builder = PromptBuilder(family_for(model, processor), MediaLoader(folder, LIMITS))
        found += [builder.encode(dataset[0]).input_ids]
    assert torch.equal(*found) and int((found[0] == build_tokenizer("gemma4").bos_token_id).sum()) == 1


@pytest.mark.parametrize("template", ["gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"])
def test_every_published_chat_template_shows_media(template, seven_tags):
    folder, dataset = seven_tags
    model, processor = build_tiny("gemma4")
    processor.chat_template = getattr(chat_template_utils, f"{template}_chat_template")
    builder = PromptBuilder(family_for(model, processor), MediaLoader(folder, LIMITS))
    prompt = builder.encode(next(row for row in dataset if row["tag"] == "VAS"))
    assert (prompt.media_tokens["video"], prompt.media_tokens["audio"]) == (36, 8)
    assert builder.probe().kinds == ("image", "video", "audio")
    told = processor.tokenizer.decode(prompt.input_ids)
    assert told.startswith("<bos><|turn>user\n") and told.endswith("<turn|>\n<|turn>model\n")


def test_a_picture_that_the_template_leaves_out_is_refused(seven_tags):
    """Of a system message it shows texts alone."""
    folder, _ = seven_tags
    Image.new("RGB", (36, 36), "red").save(folder / "red.png")
    builder = PromptBuilder(family_for(*build_tiny("gemma4")), MediaLoader(folder, LIMITS))
    asked, shown = {"role": "user", "content": "What?"}, {"role": "user", "content": "<image> What?"}
    prompts = [
        [{"role": "system", "content": text}, user] for text, user in (("Look.", shown), ("<image> Look.", asked))
    ]
    rows = [{"prompt": prompt, "image": "red.png"} for prompt in prompts]
    check_template(builder, prompts[:1], rows[:1])
    with pytest.raises(
        RowError, match="row 1: the model's chat template leaves out the image in a message of the system"
    ):
        check_template(builder, prompts, rows)


def test_thinking_and_system_prompts(seven_tags):
    folder, dataset = seven_tags
    model, processor = build_tiny("gemma4")
    row = next(row for row in dataset if row["tag"] == "V")

    def told(**options):
        builder = PromptBuilder(family_for(model, processor), MediaLoader(folder, LIMITS), **options)
        return processor.tokenizer.decode(builder.encode(builder.asked(row)).input_ids)

    assert told().startswith("<bos><|turn>user\n")
    assert told(system_prompt="Be brief.").startswith("<bos><|turn>system\nBe brief. <turn|>\n<|turn>user\n")
    thinking = told(chat_template_kwargs={"enable_thinking": True})
    assert thinking.startswith("<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\n")
    assert told().endswith("<turn|>\n<|turn>model\n") and thinking.endswith("<turn|>\n<|turn>model\n")


def test_media_tokens_are_neither_sampled_nor_written(seven_tags):
    folder, _ = seven_tags
    for name in GEMMA:
        model, processor = build_tiny(name)
        family = family_for(model, processor)
        assert len(family.suppressed_ids) == 7 and {
            processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|video|>", "<image|>", "<|audio>")
        } <= set(family.suppressed_ids)
        builder = PromptBuilder(family, MediaLoader(folder, LIMITS))
        with pytest.raises(RowError, match=r"holds the text '<\|audio\|>', which the model reads as media"):
            builder.encode({"prompt": [{"role": "user", "content": "What is <|audio|>?"}]})


# Pictures whose tokens see each other both ways


@pytest.mark.parametrize("name", GEMMA)
def test_blocks_are_the_models_own(name):
    """Each frame and each picture by itself, as `get_block_sequence_ids_for_mask` has them."""
    from transformers.models.gemma4.modeling_gemma4 import get_block_sequence_ids_for_mask

    model, processor = build_tiny(name)
    family = family_for(model, processor)
    [media, *_, nothing] = all_kinds(name in HEARING)
    prompt = family.encode("p", text_of(family, media), media)
    if name == "gemma4":
        assert prompt.blocks is None
        return
    inputs = family.core_inputs(family.core(model), prompt.input_ids[None], {})
    [numbers] = get_block_sequence_ids_for_mask(inputs["mm_token_type_ids"], torch.device("cpu"))
    spans = [(numbers == n).nonzero()[:, 0].tolist() for n in range(int(numbers.max()) + 1)]
    assert prompt.blocks == Blocks(tuple((s[0], s[-1] + 1) for s in spans), name == "gemma4_unified")
    assert len(spans) == 2 + 2 + 3
    assert family.encode("p", text_of(family, nothing), nothing).blocks is None


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_the_comparison_notices_pictures_that_are_read_like_text(name, seven_tags):
    """So a model of whose blocks nothing is known is never shared wrongly."""
    folder, dataset = seven_tags
    model, _, family = build(name)
    builder = PromptBuilder(family, MediaLoader(folder, LIMITS))

    def difference(prompt):
        def serve(model, prompts, packed=False):
            return serve_media(family, model, prompts, packed=packed)

        comparison = Comparison(model, family.core(model), prompt, serve, family.suppressed_ids)
        return comparison.difference() / comparison.least_tolerance

    assert difference(builder.probe()) < 1
    assert difference(dataclasses.replace(builder.probe(), blocks=None)) > 10


@pytest.mark.parametrize("name", GEMMA)
def test_a_static_cache_is_refused_where_it_would_read_pictures_like_text(name, seven_tags):
    folder, dataset = seven_tags
    rows = dataset.filter(lambda row: row["tag"] == "V")
    options = {"generation_kwargs": {"cache_implementation": "static"}}
    if name == "gemma4":
        build_trainer(folder, rows, name, **options)
        return
    with pytest.raises(
        ValueError, match="cache_implementation='static': with it generate.. lets the tokens of a pict"
    ):
        build_trainer(folder, rows, name, **options)


# Generation


@pytest.mark.parametrize("name", GEMMA)
def test_what_is_sampled_from_is_what_is_trained(name, seven_tags):
    """Log-probabilities of `generate()` with its growing and sliding caches, and those of a forward over the whole."""
    folder, dataset = seven_tags
    model, processor, family = build(name)
    model.eval()
    tags = ["VAS", "V", "S"] if name in HEARING else ["VS", "V", "S"]
    prompts = encode(family, folder, [next(row for row in dataset if row["tag"] == tag) for tag in tags])
    inputs, width = batched(prompts, torch.empty(3, 0, dtype=torch.long), processor.tokenizer.pad_token_id)
    inputs["position_ids"] = generation_position_ids(prompts, width)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "suppress_tokens": family.suppressed_ids}
    with torch.no_grad(), serve_media(family, model, prompts):
        out = model.generate(**inputs, **options, do_sample=True, return_dict_in_generate=True, output_logits=True)
    completions = out.sequences[:, width:]
    inputs, _ = batched(prompts, completions, processor.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(family, model, prompts):
        logits = model(**inputs).logits[:, width - 1 : -1]
    found, expected = torch.stack(out.logits, dim=1).log_softmax(-1), logits.log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GEMMA)
def test_served_generation_is_the_models_own(name):
    """Greedily, with pictures, videos and sounds: `generate()` is handed them as the model's documentation has it."""
    model, processor = build_tiny(name)
    family = family_for(model, processor)
    [media, *_] = all_kinds(name in HEARING)
    prompt = family.encode("p", text_of(family, media), media)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "output_logits": True}
    options |= {"suppress_tokens": family.suppressed_ids, "return_dict_in_generate": True}
    inputs, width = batched([prompt], torch.empty(1, 0, dtype=torch.long), processor.tokenizer.pad_token_id)
    inputs["position_ids"] = generation_position_ids([prompt], width)
    with torch.no_grad(), serve_media(family, model, [prompt]):
        served = model.generate(**inputs, **options)
    own = model.generate(**native_inputs(processor, family, media), **options)
    assert torch.equal(served.sequences, own.sequences)
    torch.testing.assert_close(torch.stack(served.logits), torch.stack(own.logits), atol=1e-4, rtol=0)


def test_an_evaluation_refuses_a_static_cache_as_well(seven_tags):
    folder, dataset = seven_tags
    model, processor = build_tiny("gemma4_unified")
    builder = PromptBuilder(family_for(model, processor), MediaLoader(folder, LIMITS))
    options = EvalOptions(max_new_tokens=2, generation={"cache_implementation": "static"})
    with pytest.raises(ValueError, match="cache_implementation='static': with it generate"):
        Evaluator(model, builder, list(dataset)[:2], lambda *a, **k: [], lambda text: text, options)


# Parts


@pytest.mark.parametrize("name", GEMMA)
def test_the_scopes_hold_every_linear_layer(name):
    model, processor = build_tiny(name)
    family = family_for(model, processor)
    layers = linear_modules(model, family)
    everything = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert {n for names in layers.values() for n in names} == everything and all(layers.values())
    assert all(family.scope_of(n) is not None for n, _ in model.named_parameters() if not n.startswith("lm_head"))
    scopes = {"vision", "audio", "projectors", "llm"} - (
        {"audio"} if name in ("gemma4_moe", "gemma4_unified") else set()
    )
    assert set(layers) == scopes
    if name != "gemma4_unified":
        assert all(n.endswith(".linear") for n in layers["vision"] if "input_proj" not in n)
    frozen = freeze(model, family, *scopes)
    assert set(frozen) == scopes and not any(
        p.requires_grad for n, p in model.named_parameters() if "lm_head" not in n
    )
    with pytest.raises(ValueError, match="has no subtitles"):
        freeze(model, family, "subtitles")


@pytest.mark.slow
@pytest.mark.parametrize("name", GEMMA)
def test_adapters_reach_all_parts_and_can_be_saved_and_merged(name, seven_tags, tmp_path):
    from peft import PeftModel, get_peft_model

    folder, dataset = seven_tags
    model, processor, family = build(name)
    rows = [row for row in dataset if row["tag"] == ("VAS" if name in HEARING else "VS")][:1]
    prompts = encode(family, folder, rows)
    torch.manual_seed(0)
    adapted = get_peft_model(model, build_lora_config(model, family, r=4, alpha=8))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.05)
    inputs, _ = batched(prompts, mixed_batch(prompts).completions[:1], processor.tokenizer.pad_token_id)

    def logits(model):
        with serve_media(family, model, prompts):
            return model(**inputs).logits

    before = logits(adapted)
    before.pow(2).sum().backward()
    reached = {family.scope_of(n) for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(family.scopes)
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        again = PeftModel.from_pretrained(build_tiny(name)[0], tmp_path).eval()
        plain = logits(build_tiny(name)[0])
        assert torch.equal(logits(again), before) and (plain - before).abs().max() > 1e-2
        torch.testing.assert_close(logits(again.merge_and_unload()), before.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GEMMA)
def test_a_checkpoint_is_loaded_by_its_architecture(name, seven_tags, tmp_path):
    folder, dataset = seven_tags
    path = str(save_tiny(name, tmp_path / "model", seed=2))
    model, processor = load_model(path).eval(), load_processor(path)
    unified = name == "gemma4_unified"
    assert type(model) is (Gemma4UnifiedForConditionalGeneration if unified else Gemma4ForConditionalGeneration)
    family = family_for(model, processor)
    tags = ["VA" if name in HEARING else "V", "S"]
    rows = [next(row for row in dataset if row["tag"] == tag) for tag in tags]
    prompts = encode(family, folder, rows)
    completions = torch.arange(20, 30).reshape(2, 5)
    inputs, _ = batched(prompts, completions, processor.tokenizer.pad_token_id)
    builder = PromptBuilder(family, MediaLoader(folder, LIMITS))
    with torch.no_grad(), serve_media(family, model, prompts):
        logits = model(**inputs).logits
    original, original_processor = build_tiny(name, seed=2)
    for i, row in enumerate(rows):
        alone = alone_by_transformers(
            name, original, original_processor, builder, row | {"audio_in_video": False}, completions[i]
        )
        torch.testing.assert_close(logits[i, -len(alone) :], alone, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(path).eos_token == "<turn|>"


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_unified"])
def test_what_is_not_there_is_refused_by_name(kind, tmp_path, capsys):
    model, _ = build_tiny(kind)
    with pytest.raises(
        ValueError, match=f"vLLM rollouts are known for .*, not for '{kind}'; generate with transformers"
    ):
        engine_model(kind)
    with pytest.raises(
        ValueError, match=f"sizes of the model type '{kind}' are not known; those of qwen2_5_omni_think"
    ):
        read_sizes(model.config.to_dict())


def test_checkpointing_that_loses_gradients_of_shared_keys_is_refused(seven_tags):
    folder, dataset = seven_tags
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(
        ValueError, match="gradient_checkpointing_kwargs: with use_reentrant=True the layers of this mod"
    ):
        build_trainer(folder, dataset, "gemma4", **options)
    build_trainer(folder, dataset, "gemma4", gradient_checkpointing=True)
    build_trainer(folder, dataset, "gemma4_unified", **options)


def test_towers_are_there():
    assert {name: list(towers_of(build_tiny(name)[0].base_model)) for name in GEMMA} == {
        "gemma4": ["vision_tower", "audio_tower"],
        "gemma4_both_ways": ["vision_tower", "audio_tower"],
        "gemma4_moe": ["vision_tower"],
        "gemma4_unified": ["embed_vision", "embed_audio"],
    }
