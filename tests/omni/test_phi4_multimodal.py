"""Phi-4 multimodal: pictures in crops, sounds that pass alone, and two ways to project them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from media_files import tone, write_audio
from PIL import Image
from test_mixed_batches import COMPLETION, alone_by_transformers, batched, setup
from test_shared_prefill import GREEDY, SAMPLED, TOKENS, generate, repeated
from test_shared_prefix import Batch, assert_equal, build, compare, together
from test_tower_cache import World
from tiny_models import build_tiny, save_tiny
from transformers import AutoProcessor

from maple_trl.omni.encoded import EncodedPrompt, MediaMismatchError, batch_position_ids
from maple_trl.omni.errors import MediaError
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_processor
from maple_trl.omni.lora import build_lora_config, linear_modules
from maple_trl.omni.media.clips import AudioClip, Picture, PromptMedia
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prefix.packed_attention import install
from maple_trl.omni.prompt import PromptBuilder, RowError
from maple_trl.omni.serving import serve_media
from maple_trl.omni.towers import TowerCache
from maple_trl.trainers.common import media_trainer


NAME = "phi4_multimodal"
IMAGE, AUDIO = "<|image|>", "<|audio|>"
SHAPES = {"wide": (28, 56), "high": (56, 28), "square": (56, 56)}


def drawn(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sound(seconds, seed=0):
    wave = np.random.default_rng(seed).normal(scale=0.1, size=round(16000 * seconds)).astype(np.float32)
    return AudioClip(wave, 16000, seconds, "sound.wav")


@pytest.fixture(scope="module")
def folder(seven_tags):
    for number, (name, shape) in enumerate(SHAPES.items()):
        Image.fromarray(drawn(*shape, seed=number)).save(seven_tags[0] / f"{name}.png")
    return seven_tags[0]


@pytest.fixture(scope="module")
def rows(folder, seven_tags):
    """Each tag, its pictures stills; V and VA once with two."""
    found, first = [], {}
    for row in seven_tags[1]:
        still = {"video": None, "audio": row["video"], "images": ["wide.png"], "audio_in_video": False}
        first.setdefault(row["tag"], row | still)
    for tag, row in first.items():
        found.append(row)
        if tag in ("V", "VA"):
            found.append(row | {"images": ["square.png", "high.png"]})
    return found


@pytest.fixture
def tiny():
    model, processor = build_tiny(NAME)
    return model, processor, family_for(model, processor)


def served(model, family, prompts):
    inputs, _ = batched(prompts, torch.empty(len(prompts), 0, dtype=torch.long), family.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(family, model, prompts):
        return model(**inputs).logits


def native(model, processor, text, media):
    """What transformers computes, the vision tower's attention in the way that sees all of a picture, padded or not."""
    model.config.vision_config._attn_implementation = "eager"
    options = {"text": [text], "return_tensors": "pt"}
    if media.images:
        options["images"] = [picture.pixels.copy() for picture in media.images]
    if media.audios:
        options |= {"audio": [c.waveform for c in media.audios], "audio_kwargs": {"sampling_rate": 16000}}
    with torch.no_grad():
        found = model(**processor(**options)).logits[0]
    model.config.vision_config._attn_implementation = "sdpa"
    return found


# Rows


def test_rows_have_the_logits_that_they_have_alone(rows, folder):
    model, processor, builder = setup(NAME, folder)
    prompts = [builder.encode(row) for row in rows]
    assert {p.kinds for p in prompts} == {("image",), ("audio",), ("image", "audio"), ()} and len(prompts) == 9
    completions = torch.randint(10, 200, (len(rows), COMPLETION), generator=torch.Generator().manual_seed(0))
    inputs, _ = batched(prompts, completions, processor.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(builder.family, model, prompts):
        logits = model(**inputs).logits
    for i, row in enumerate(rows):
        alone = alone_by_transformers(NAME, model, processor, builder, row, completions[i])
        worst = (logits[i, -len(alone) :] - alone).abs().max().item()
        assert worst <= 1e-4, (row["tag"], worst)


def test_a_sound_beside_a_picture_is_projected_otherwise(tiny):
    """Which is part of its digest, so that neither a batch nor a cache gives one for the other."""
    model, processor, family = tiny
    alone = family.encode("a", AUDIO, PromptMedia(audios=[sound(0.5)]))
    beside = family.encode("b", IMAGE + AUDIO, PromptMedia([Picture(drawn(28, 28), "p")], audios=[sound(0.5)]))
    assert torch.equal(*(p.media["audio"]["audio_input_features"] for p in (alone, beside)))
    assert alone.media_digest("audio") != beside.media_digest("audio")
    found = served(model, family, [alone, beside])
    right = native(model, processor, IMAGE + AUDIO, PromptMedia([Picture(drawn(28, 28), "p")], audios=[sound(0.5)]))
    torch.testing.assert_close(found[1], right, atol=1e-4, rtol=0)
    # The negative control.
    media = beside.media | {"audio": beside.media["audio"] | {"beside_picture": torch.tensor([False])}}
    wrong = served(model, family, [replace(beside, media=media, _digests={})])
    assert (wrong[0] - right).abs().max() > 1e-2


def test_sounds_of_a_prompt_do_not_depend_on_each_other(tiny):
    """In one batch, as the processor pads them, the shorter would hear the silence behind it."""
    model, processor, family = tiny
    clips = [sound(0.9), sound(0.4, seed=1)]
    prompt = family.encode("two", AUDIO * 2, PromptMedia(audios=clips))
    alone = [family.encode(str(i), AUDIO, PromptMedia(audios=[clip])) for i, clip in enumerate(clips)]
    core = family.core(model)
    with torch.no_grad():
        together = family.tower_outputs(core, "audio", [prompt])["tokens"]
        apart = family.tower_outputs(core, "audio", alone)["tokens"]
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    padded = native(model, processor, AUDIO * 2, PromptMedia(audios=clips))
    assert (served(model, family, [prompt])[0] - padded).abs().max() > 1e-2
    even = PromptMedia(audios=[sound(0.9), sound(0.9, seed=1)])
    right = native(model, processor, AUDIO * 2, even)
    torch.testing.assert_close(
        served(model, family, [family.encode("even", AUDIO * 2, even)])[0], right, atol=1e-4, rtol=0
    )
    for clip in (*clips, sound(0.025), sound(1.003)):
        count = family.encode("count", AUDIO, PromptMedia(audios=[clip])).media_tokens["audio"]
        assert family.audio_tokens_of(clip) == count


def test_a_sound_of_less_than_a_window_is_told_by_name(tiny):
    with pytest.raises(
        MediaError, match="audio-too-short: sound.wav: 352 samples at 16000 Hz, of which this model reads 400"
    ):
        tiny[2].encode("short", AUDIO, PromptMedia(audios=[sound(0.022)]))


@pytest.mark.parametrize("shape", [(28, 28), (300, 448), (700, 500), (448, 896), (1500, 1000), (40, 420)])
def test_tokens_of_a_picture_are_counted_before_it_is_cropped(tiny, shape):
    _, processor, family = tiny
    prompt = family.encode("p", IMAGE, PromptMedia([Picture(drawn(*shape), "p")]))
    [counted] = processor.image_processor([drawn(*shape)], return_tensors="pt")["num_img_tokens"]
    assert family.image_token_count(*shape) == prompt.media_tokens["image"] == counted


def test_a_batch_of_pictures_with_different_numbers_of_crops(tiny):
    model, processor, family = tiny
    media = [PromptMedia([Picture(drawn(*shape), "p")]) for shape in ((100, 100), (400, 700))]
    prompts = [family.encode(str(i), f"{IMAGE} what", m) for i, m in enumerate(media)]
    assert [p.media["image"]["image_pixel_values"].size(1) for p in prompts] == [2, 3]
    for prompt, found, own in zip(prompts, served(model, family, prompts), media, strict=True):
        right = native(model, processor, f"{IMAGE} what", own)
        torch.testing.assert_close(found[-len(prompt) :], right, atol=1e-4, rtol=0)


def test_a_whole_picture_is_seen_by_every_patch(tiny):
    """transformers marks the tower as causal, which sdpa takes it for where no picture has padding: the control."""
    model, processor, family = tiny
    media = PromptMedia([Picture(drawn(448, 448), "p")])
    prompt = family.encode("whole", IMAGE, media)
    assert prompt.media["image"]["image_attention_mask"].all()
    with torch.no_grad():
        marked = model(**processor(text=[IMAGE], images=[media.images[0].pixels], return_tensors="pt")).logits[0]
    right = native(model, processor, IMAGE, media)
    torch.testing.assert_close(served(model, family, [prompt])[0], right, atol=1e-4, rtol=0)
    assert (marked - right).abs().max() > 1e-2


def test_placeholders_equal_features_and_a_difference_raises(rows, folder):
    model, processor, builder = setup(NAME, folder)
    prompt = next(p for p in map(builder.encode, rows) if p.kinds == ("image", "audio"))
    for kind, token in builder.family.placeholder_ids.items():
        assert sum(builder.family.feature_counts(kind, prompt.media[kind])) == int((prompt.input_ids == token).sum())
        ids = prompt.input_ids.clone()
        ids[ids.tolist().index(token)] = processor.tokenizer.pad_token_id
        with pytest.raises(MediaMismatchError, match="placeholder"), serve_media(builder.family, model, [prompt]):
            model(input_ids=ids[None], attention_mask=torch.ones(1, len(ids)))
        assert token in builder.family.suppressed_ids


def test_rows_with_video_are_refused(rows, folder):
    _, _, builder = setup(NAME, folder)
    row = next(row for row in rows if row["tag"] == "V")
    with pytest.raises(RowError, match="Phi4MultimodalFamily reads no video, which the row .tag V. feeds"):
        builder.encode(row | {"video": row["audio"], "images": []})


# Sharing, frozen towers, gradients


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.matrix(cases=1)
def test_packed_rows_have_the_gradients_of_rows_apart(rows, folder, checkpointing):
    chosen = [row for row in rows if row["tag"] in ("V", "A", "VAS", "S")]
    errors, gradients, expected = compare(NAME, folder, chosen, checkpointing=checkpointing)
    assert_equal(errors, gradients)
    for part in (
        "img_processor",
        "img_projection",
        "audio_embed.encoder",
        "proj_for_speech",
        "proj_for_vision_speech",
    ):
        assert any(part in key and value.norm() > 1e-3 for key, value in expected.items()), part


@pytest.mark.slow
def test_rows_that_share_their_media_are_answered_as_rows_apart(rows, folder):
    model, processor, builder = setup(NAME, folder)
    prompts = [builder.encode(row) for row in rows if row["tag"] in ("V", "VA", "AS", "S")]
    made, batch = (model, processor, builder.family), repeated(prompts)
    for settings in (SAMPLED, GREEDY):
        assert torch.equal(generate(*made, batch, True, **settings), generate(*made, batch, False, **settings))


def sampled_and_trained(name, encode):
    """Log-probabilities of completions as they were sampled, prompts read once, and as packed rows have them."""
    model, processor, family = build(name)
    assert install(model)
    rows = repeated([encode(family, row) for row in (0, 1, 2)])
    settings = SAMPLED | {"min_new_tokens": TOKENS, "return_dict_in_generate": True, "output_logits": True}
    out = generate(model.eval(), processor, family, rows, True, **settings)
    completions = out.sequences[:, -TOKENS:]
    sampled = torch.stack(out.logits, dim=1).log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    with torch.no_grad():
        batch = Batch(rows, completions, [TOKENS] * len(rows), torch.zeros_like(sampled))
        return sampled, together(model, family, batch)[0]


def test_what_is_sampled_is_what_is_trained(rows, folder):
    chosen = [next(row for row in rows if row["tag"] == tag) for tag in ("V", "AS", "VA")]

    def encode(family, number):
        limits = MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096)
        return PromptBuilder(family, MediaLoader(folder, limits)).encode(chosen[number])

    sampled, trained = sampled_and_trained(NAME, encode)
    torch.testing.assert_close(trained, sampled, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.matrix(cases=1)
def test_frozen_towers_read_each_clip_once(rows, folder, tmp_path, place):
    world = World(NAME, folder, rows)
    cache = TowerCache(1 << 30) if place == "memory" else TowerCache(0, tmp_path)
    without = world.logits(None)
    world.passes.clear()
    filled = world.logits(cache)
    clips = {p.media_digest(kind) for p in world.prompts for kind in p.kinds}
    assert len(world.passes) == len(clips) == cache.misses
    torch.testing.assert_close(filled, without, rtol=1e-5, atol=1e-5)
    assert torch.equal(world.logits(cache), filled) and len(world.passes) == len(clips)


def test_touched_towers_have_the_gradients_of_those_that_are_read(rows, folder):
    """Whatever a process reads, so that none waits for another: both projections of sounds too."""
    model, processor, builder = setup(NAME, folder)
    prompts = {row["tag"]: builder.encode(row) for row in rows}
    family, reached, logits = builder.family, [], []
    for tag, touch in (("S", ()), ("S", family.placeholders), ("A", ("image",)), ("VA", ()), ("V", ("audio",))):
        model.zero_grad()
        inputs, _ = batched([prompts[tag]], torch.empty(1, 0, dtype=torch.long), processor.tokenizer.pad_token_id)
        with serve_media(family, model, [prompts[tag]], touch=touch):
            logits.append(model(**inputs).logits)
        logits[-1].sum().backward()
        reached.append({n for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    assert reached[1] == reached[2] == reached[3] == reached[4] > reached[0]
    lacking = {n for n, _ in model.named_parameters()} - reached[1]
    assert lacking == {n for n, _ in model.named_parameters() if family.is_unread(n)} and lacking


def test_adapters_are_for_what_a_pass_reads(tiny):
    model, _, family = tiny
    found = linear_modules(model, family)
    assert {scope: len(names) for scope, names in found.items()} == {
        "vision": 6, "audio": 2 * (4 + 4) + 1, "projectors": 6, "llm": 2 * 4,
    }  # fmt: skip
    config = build_lora_config(model, family, vision=False, audio=False, projectors=False)
    assert all(name.startswith("model.layers.") for name in config.target_modules)


def test_zero_3_is_refused(tiny, folder, seven_tags, monkeypatch):
    from omni_runs import build_trainer

    monkeypatch.setattr(media_trainer, "is_deepspeed_zero3_enabled", lambda: True)
    speech = seven_tags[1].filter(lambda row: row["tag"] == "S")
    with pytest.raises(ValueError, match="Phi4MultimodalFamily passes audio clip by clip, and DeepSpeed's ZeRO-3"):
        build_trainer(folder, speech, NAME)


# Long rows


def text_prompt(ids):
    return EncodedPrompt("text", ids, torch.arange(len(ids))[None])


@pytest.mark.long
@pytest.mark.slow
def test_beyond_4096_tokens_a_row_is_another_in_a_batch(tiny):
    """Why there is a limit: with a longer row beside it, a row has other logits; below it has not."""
    model, _, family = tiny
    short, generator = torch.arange(20, 60), torch.Generator().manual_seed(0)
    alone = served(model, family, [text_prompt(short)])[0, -1]
    for length, moved in ((4096, False), (4097, True)):
        ids = torch.randint(10, 200, (length,), generator=generator)
        rows = [text_prompt(short), text_prompt(ids)]
        inputs = {"position_ids": batch_position_ids(rows, length)[0]}
        padded = torch.zeros(2, length, dtype=torch.long)
        padded[0, -len(short) :], padded[1] = short, ids
        mask = torch.ones_like(padded)
        mask[0, : -len(short)] = 0
        with torch.no_grad():
            found = model(input_ids=padded, attention_mask=mask, logits_to_keep=1, **inputs).logits[0, -1]
        assert ((found - alone).abs().max() > 1e-3) == moved, length


def test_prompts_leave_room_for_their_completion_below_it(tiny, tmp_path):
    _, _, family = tiny
    write_audio(tmp_path / "a.wav", tone(1, 16000))
    Image.fromarray(drawn(60, 60)).save(tmp_path / "p.png")
    long = "so it is said. " * 900
    row = {"prompt": [{"role": "user", "content": "x"}], "image": "p.png", "subtitle": long, "tag": "VS"}
    with MediaLoader(tmp_path, MediaLimits(min_pixels=784, max_pixels=784 * 16), workers=0) as loader:
        prompt = PromptBuilder(family, loader, max_completion_length=96).encode(row)
        assert 3900 < len(prompt) <= 4000 and prompt.notes == ("subtitle-shortened",)
        bound = PromptBuilder(family, loader, max_prompt_length=600, max_completion_length=96)
        assert len(bound.encode(row)) <= 600
        asked = {**row, "subtitle": None, "tag": "V", "prompt": [{"role": "user", "content": long}]}
        with pytest.raises(MediaError, match="may have 4000, for Phi4MultimodalFamily takes 4096 with the completion"):
            PromptBuilder(family, loader, max_completion_length=96).encode(asked)
    family.config.rope_parameters["rope_type"] = "default"
    assert family.max_tokens is None


def test_a_processor_that_was_saved_has_its_chat_template(tmp_path):
    path = str(save_tiny(NAME, tmp_path / "model"))
    assert AutoProcessor.from_pretrained(path).chat_template is None  # of transformers alone
    assert IMAGE in load_processor(path).chat_template
