"""A batch that mixes modalities gives every row what it gets alone, by transformers' own code path."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES, GEMMA, build_tiny, towers_of

from maple_trl.data.synthetic import write_seven_tags
from maple_trl.modalities import ModalityTag
from maple_trl.omni import serving
from maple_trl.omni.encoded import (
    EncodedPrompt,
    MediaMismatchError,
    batch_position_ids,
    generation_position_ids,
    unique_prompts,
)
from maple_trl.omni.families import family_for
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media


COMPLETION = 5
OMNI = ("qwen2_5_omni", "qwen3_omni")
"""They place sound among the pictures of its video."""
TIMED = ("qwen3_vl", "video_llama_3", *GEMMA)
"""Families that read in the text when each picture is shown."""


@pytest.fixture(scope="module")
def seven_tags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seven-tags")
    return folder, write_seven_tags(folder, prompts_per_tag=2, seed=3)["train"]


def setup(name, folder, **kwargs):
    model, processor = build_tiny(name)
    family = family_for(model, processor)
    loader = MediaLoader(folder, MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096))
    return model.eval(), processor, PromptBuilder(family, loader, **kwargs)


def rows_of(name, dataset):
    """One row per tag that the family can read; on omni models two interleaved ones as well."""
    spec = FAMILIES[name]
    rows, seen = [], set()
    for row in dataset:
        tag = ModalityTag(row["tag"])
        if tag in seen or ("V" in tag and not spec.has_vision) or ("A" in tag and not spec.has_audio):
            continue
        seen.add(tag)
        rows.append(dict(row, audio_in_video=False))
        if name in OMNI and tag in ("VA", "VAS"):
            rows.append(dict(row, audio_in_video=True))
    return rows


def alone_by_transformers(name, model, processor, builder, row, completion):
    """Logits of prompt + completion from the processor's and the model's own handling of a single sample."""
    spec = builder.spec(row)
    content = [{"type": "image"}] * len(spec.images) + [{"type": "video"}] * len(spec.videos)
    content += [{"type": "audio"}] * (0 if spec.interleaved else len(spec.audios))
    if spec.subtitle:
        content.append({"type": "text", "text": f"Subtitles:\n{builder.loader.subtitle(spec.subtitle)}\n"})
    question = row["prompt"][-1]["content"]
    question = question if isinstance(question, list) else [{"type": "text", "text": question}]
    content = question if any(block["type"] != "text" for block in question) else content + question
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    kwargs = {"text": [text], "return_tensors": "pt"}
    if spec.images:
        kwargs["images"] = [Image.open(f"{builder.loader.root}/{path}").convert("RGB") for path in spec.images]
        kwargs["images_kwargs"] = {"do_resize": False}
    if spec.videos:
        clip = builder.loader.video(spec.videos[0], multiple=FAMILIES[name].frame_multiple)
        kwargs["videos"] = [clip.frames.copy()]
        kwargs["videos_kwargs"] = {"do_resize": False, "do_sample_frames": False}
        if name in ("qwen2_5_vl", *TIMED):
            spacing = {"fps": clip.fps, "frames_indices": list(range(len(clip.frames)))}
            if name in TIMED:
                spacing = {"fps": 1.0, "frames_indices": clip.timestamps.tolist()}
            kwargs["videos_kwargs"]["video_metadata"] = [{"total_num_frames": len(clip.frames), **spacing}]
        else:
            kwargs["videos_kwargs"]["fps"] = clip.fps
    if spec.audios:
        kwargs["audio"] = [builder.loader.audio(spec.audios[0]).waveform]
        kwargs["audio_kwargs"] = {"sampling_rate": 16000}
    flag = {}
    if spec.interleaved:
        kwargs |= {"load_audio_from_video": True, "audio_from_video_indices": [0]}
        flag = {"use_audio_in_video": True}
    inputs = dict(processor(**kwargs))
    inputs.pop("video_metadata", None)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completion[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, len(completion))], dim=1)
    with torch.no_grad():
        return model(**inputs, **flag).logits[0]


def batched(rows, completions, pad_id):
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row.input_ids
        mask[i, width - len(row) :] = 1
    ids = torch.cat([ids, completions], dim=1)
    mask = torch.cat([mask, torch.ones_like(completions)], dim=1)
    positions = batch_position_ids(rows, width, completions.size(1))
    positions = positions[0] if positions.size(0) == 1 else positions
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, width


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.matrix(cases=2)
def test_every_row_of_a_mixed_batch_has_the_logits_it_has_alone(name, seven_tags):
    folder, dataset = seven_tags
    model, processor, builder = setup(name, folder)
    rows = rows_of(name, dataset)
    prompts = [builder.encode(row) for row in rows]
    if name in ("qwen2_5_omni", "qwen3_omni"):
        assert {p.tag for p in prompts} == set(ModalityTag) and len(prompts) == 9
        assert len({len(p) for p in prompts}) > 3  # really padded
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(10, 200, (len(rows), COMPLETION), generator=generator)
    inputs, width = batched(prompts, completions, processor.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(builder.family, model, prompts):
        logits = model(**inputs).logits
    worst = 0.0
    for i, row in enumerate(rows):
        alone = alone_by_transformers(name, model, processor, builder, row, completions[i])
        worst = max(worst, (logits[i, -len(alone) :] - alone).abs().max().item())
    assert worst <= 1e-4, worst

    # Generation: the same rows, greedily, as one batch and one by one.
    generate = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": builder.family.suppressed_ids}

    def greedy(batch):
        no_completion = torch.empty(len(batch), 0, dtype=torch.long)
        inputs, width = batched(batch, no_completion, processor.tokenizer.pad_token_id)
        inputs["position_ids"] = generation_position_ids(batch, width)
        with torch.no_grad(), serve_media(builder.family, model, batch):
            out = model.generate(**inputs, **generate, return_dict_in_generate=True, output_logits=True)
        return out.sequences[:, width:], torch.stack(out.logits, dim=1)

    together, together_logits = greedy(prompts)
    for i, prompt in enumerate(prompts):
        single, single_logits = greedy([prompt])
        steps = single_logits.size(1)
        assert torch.equal(together[i, :steps], single[0])
        torch.testing.assert_close(together_logits[i, :steps], single_logits[0], atol=1e-4, rtol=0)


def test_one_flag_for_the_whole_batch_is_wrong(seven_tags):
    """The negative control: positions by the model itself, with one audio-in-video flag, move other rows' logits."""
    folder, dataset = seven_tags
    model, processor, builder = setup("qwen2_5_omni", folder)
    rows = [r for r in rows_of("qwen2_5_omni", dataset) if r["tag"] == "VA"]
    prompts = [builder.encode(row) for row in rows]
    assert {row["audio_in_video"] for row in rows} == {True, False}
    completions = torch.randint(10, 200, (2, COMPLETION), generator=torch.Generator().manual_seed(0))
    inputs, _ = batched(prompts, completions, processor.tokenizer.pad_token_id)
    core = builder.family.core(model)
    with torch.no_grad(), serve_media(builder.family, model, prompts):
        right = model(**inputs).logits
    wrong_positions, _ = core.get_rope_index(
        inputs["input_ids"],
        video_grid_thw=torch.cat([p.media["video"]["video_grid_thw"] for p in prompts]),
        attention_mask=inputs["attention_mask"],
        use_audio_in_video=False,
        audio_seqlens=torch.cat([p.media["audio"]["feature_attention_mask"].sum(-1) for p in prompts]),
        second_per_grids=torch.tensor([0.5, 0.5]),
    )
    with torch.no_grad(), serve_media(builder.family, model, prompts):
        wrong = model(**inputs | {"position_ids": wrong_positions}).logits
    assert (right - wrong)[:, -COMPLETION:].abs().max() > 0.1


def test_media_are_encoded_once_per_unique_prompt(seven_tags):
    folder, dataset = seven_tags
    model, processor, builder = setup("qwen2_5_omni", folder)
    row = next(row for row in dataset if row["tag"] == "VA")
    other = next(row for row in dataset if row["tag"] == "A")
    prompt, second = builder.encode(row), builder.encode(other)
    rows = [prompt, second, prompt, prompt, second]
    completions = torch.randint(10, 200, (5, COMPLETION), generator=torch.Generator().manual_seed(0))
    inputs, _ = batched(rows, completions, processor.tokenizer.pad_token_id)
    patches, audios = [], []
    core = builder.family.core(model)
    core.visual.register_forward_pre_hook(lambda m, args, kw: patches.append(args[0].size(0)), with_kwargs=True)
    core.audio_tower.register_forward_pre_hook(
        lambda m, a, kw: audios.append(len(kw["feature_lens"])), with_kwargs=True
    )
    with torch.no_grad(), serve_media(builder.family, model, rows):
        together = model(**inputs).logits
    assert patches == [prompt.media["video"]["pixel_values_videos"].size(0)]
    assert audios == [2]
    # and the rows still differ only by their completions
    assert torch.equal(together[0, : -COMPLETION - 1], together[2, : -COMPLETION - 1])


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni"])
def test_swapping_a_file_moves_only_rows_whose_tag_reads_it(name, seven_tags):
    folder, dataset = seven_tags
    model, processor, builder = setup(name, folder)
    videos = sorted({row["video"] for row in dataset})
    completion = torch.randint(10, 200, (1, COMPLETION), generator=torch.Generator().manual_seed(0))

    def logps(row):
        prompt = builder.encode(row)
        inputs, _ = batched([prompt], completion, processor.tokenizer.pad_token_id)
        with torch.no_grad(), serve_media(builder.family, model, [prompt]):
            logits = model(**inputs).logits[:, -COMPLETION - 1 : -1]
        return logits.log_softmax(-1).gather(-1, completion[..., None])

    for tag in ModalityTag:
        row = next(row for row in dataset if row["tag"] == tag)
        swapped = dict(row, video=next(v for v in videos if v != row["video"]))
        moved = (logps(row) - logps(swapped)).abs().max().item()
        if "V" in tag or "A" in tag:  # the sound is the video's track
            assert moved > 1e-3, (tag, moved)
        else:
            assert moved == 0.0, (tag, moved)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_placeholders_equal_features_and_a_difference_raises(name, seven_tags):
    folder, dataset = seven_tags
    model, processor, builder = setup(name, folder)
    prompts = [builder.encode(row) for row in rows_of(name, dataset)]
    for prompt in prompts:
        for kind, token_id in builder.family.placeholder_ids.items():
            count = int((prompt.input_ids == token_id).sum())
            features = sum(builder.family.feature_counts(kind, prompt.media[kind])) if kind in prompt.media else 0
            assert count == prompt.media_tokens.get(kind, 0) == features
    prompt = next(p for p in prompts if p.kinds)
    ids = prompt.input_ids.clone()
    place = next(i for i, t in enumerate(ids.tolist()) if t in builder.family.placeholder_ids.values())
    ids[place] = processor.tokenizer.pad_token_id
    with pytest.raises(MediaMismatchError, match="placeholder"), serve_media(builder.family, model, [prompt]):
        model(input_ids=ids[None], attention_mask=torch.ones(1, len(ids)))


def test_media_that_no_forward_takes_raise(seven_tags):
    folder, dataset = seven_tags
    model, processor, builder = setup("qwen2_5_omni", folder)
    prompt = builder.encode(next(row for row in dataset if row["tag"] == "VAS"))
    with pytest.raises(MediaMismatchError, match="never reached the model.*tag VAS"):
        with serve_media(builder.family, model, [prompt]):
            pass
    # The usual silent failure: the tokens go in, the media do not.
    inputs = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones(1, len(prompt))}
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.matrix(cases=5)
def test_unused_towers_can_be_touched_without_moving_anything(name, seven_tags):
    folder, dataset = seven_tags
    model, processor, builder = setup(name, folder)
    prompt = builder.encode(next(row for row in dataset if row["tag"] == "S"))
    inputs, _ = batched([prompt], torch.empty(1, 0, dtype=torch.long), processor.tokenizer.pad_token_id)
    full = max((builder.encode(row) for row in rows_of(name, dataset)), key=lambda prompt: len(prompt.kinds))
    with serve_media(builder.family, model, [prompt], touch=full.kinds):
        touched = model(**inputs).logits
    torch.testing.assert_close(touched, model(**inputs).logits, atol=1e-5, rtol=0)
    touched.sum().backward()
    towers = {n: p for n, p in model.named_parameters() if builder.family.scope_of(n) not in ("llm", None)}
    assert not any(p.grad.any() for p in towers.values() if p.grad is not None)
    reached = {n for n, p in towers.items() if p.grad is not None}

    model.zero_grad()
    inputs, _ = batched([full], torch.empty(1, 0, dtype=torch.long), processor.tokenizer.pad_token_id)
    with serve_media(builder.family, model, [full]):
        model(**inputs).logits.sum().backward()
    assert reached and reached == {n for n, p in towers.items() if p.grad is not None}


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.matrix(cases=3)
def test_touched_towers_run_once_in_a_generation(name, seven_tags):
    """Sharded towers run in the prefill on every rank, whatever its rows hold, and in no decoding step."""
    folder, dataset = seven_tags
    model, processor, builder = setup(name, folder)
    prompts = [builder.encode(row) for row in rows_of(name, dataset)]
    text = [prompt for prompt in prompts if not prompt.kinds]
    calls = []
    core = builder.family.core(model)
    for tower in towers_of(core).values():
        tower.register_forward_pre_hook(lambda *a: calls.append(1), with_kwargs=True)

    def generate(batch, touch):
        inputs, width = batched(batch, torch.empty(len(batch), 0, dtype=torch.long), processor.tokenizer.pad_token_id)
        inputs["position_ids"] = generation_position_ids(batch, width)
        settings = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": builder.family.suppressed_ids}
        with (
            torch.no_grad(),
            serve_media(builder.family, model, batch, touch=builder.family.placeholders if touch else ()),
        ):
            return model.generate(**inputs, **settings)

    for batch in (prompts, text):
        calls.clear()
        assert torch.equal(generate(batch, touch=True), generate(batch, touch=False))
    # Of the text rows: the prefill with touch, a call for each kind of media, and nothing without.
    assert len(calls) == len(builder.family.placeholders)


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.matrix(cases=3)
def test_decoding_steps_ask_the_device_for_nothing(name, seven_tags, monkeypatch):
    """Placeholders are looked for in the prefill; without a cache every forward is one."""
    folder, dataset = seven_tags
    model, processor, builder = setup(name, folder)
    prompts = [builder.encode(row) for row in rows_of(name, dataset)]
    text = [prompt for prompt in prompts if not prompt.kinds]
    looks = []

    def look(family, input_ids):
        looks.append(input_ids.size(1))
        return count(family, input_ids)

    count = serving._count_placeholders
    monkeypatch.setattr(serving, "_count_placeholders", look)

    def generate(batch, **settings):
        looks.clear()
        inputs, width = batched(batch, torch.empty(len(batch), 0, dtype=torch.long), processor.tokenizer.pad_token_id)
        settings |= {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        settings["suppress_tokens"] = builder.family.suppressed_ids
        with torch.no_grad(), serve_media(builder.family, model, batch):
            inputs["position_ids"] = generation_position_ids(batch, width)
            return model.generate(**inputs, **settings), width

    for batch in (prompts, text):
        _, width = generate(batch)
        assert looks == [width]
    _, width = generate(prompts, use_cache=False)
    assert looks == [width + step for step in range(4)]


def test_placeholders_that_nobody_serves_raise_whatever_passed_before(seven_tags):
    folder, dataset = seven_tags
    model, processor, builder = setup("qwen2_5_omni", folder)
    full, bare = (builder.encode(next(row for row in dataset if row["tag"] == tag)) for tag in ("VAS", "S"))
    pad = processor.tokenizer.pad_token_id

    def forward(prompt):
        inputs, _ = batched([prompt], torch.empty(1, 0, dtype=torch.long), pad)
        with torch.no_grad():
            return model(**inputs)

    with pytest.raises(MediaMismatchError, match="placeholder"), serve_media(builder.family, model, [bare]):
        forward(bare)
        forward(full)
    token = torch.tensor([[builder.family.placeholder_ids["audio"]]])
    with pytest.raises(MediaMismatchError, match="placeholder"), serve_media(builder.family, model, [bare]):
        model(input_ids=token)  # of one token, but no decoding step
    with pytest.raises(MediaMismatchError, match="never reached the model"):
        with serve_media(builder.family, model, [full]):
            forward(bare)


def test_padding_silence_does_not_change_mel_frames():
    """Short padding gives the mel frames that the extractor's own long padding gives."""
    for name in ("qwen2_5_omni", "qwen3_omni"):
        model, processor = build_tiny(name)
        family = family_for(model, processor)
        waveform = np.random.default_rng(0).standard_normal(9_001).astype(np.float32) * 0.1
        clip = type("Clip", (), {"waveform": waveform})
        extractor = processor.feature_extractor
        short = extractor(
            waveform,
            sampling_rate=16000,
            padding="max_length",
            max_length=family.audio_pad_length([clip]),
            return_attention_mask=True,
            return_tensors="pt",
        )
        long = extractor(
            waveform,
            sampling_rate=16000,
            padding="max_length",
            max_length=30 * 16000,
            return_attention_mask=True,
            return_tensors="pt",
        )
        frames = int(long["attention_mask"].sum())
        assert int(short["attention_mask"].sum()) == frames
        torch.testing.assert_close(
            short["input_features"][..., :frames], long["input_features"][..., :frames], atol=1e-5, rtol=0
        )


def test_unique_prompts_keep_order_of_first_appearance():
    a, b = (EncodedPrompt(key, torch.arange(2), torch.arange(2)[None]) for key in "ab")
    prompts, order = unique_prompts([b, a, b, b])
    assert [p.key for p in prompts] == ["b", "a"] and order == [0, 1, 0, 0]
