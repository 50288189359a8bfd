"""Pictures beside clips, sound and subtitles, one or several in a prompt, as other media in every family that has them."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_mixed_batches import COMPLETION, alone_by_transformers, batched, setup
from test_shared_prefill import GREEDY, SAMPLED, generate, repeated
from test_shared_prefix import assert_equal, compare
from test_tower_cache import World
from tiny_models import FAMILIES, build_tiny, towers_of

from maple_trl.modalities import ModalityTag
from maple_trl.omni.encoded import MediaMismatchError
from maple_trl.omni.families import family_for
from maple_trl.omni.media.loader import MediaError, MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media
from maple_trl.omni.towers import TowerCache


SEEING = [name for name in FAMILIES if FAMILIES[name].has_vision]
OMNI = [name for name in SEEING if FAMILIES[name].has_audio]
INTERLEAVING = [name for name in OMNI if name.startswith("qwen")]
SHAPES = {"wide": (1, 2), "high": (2, 1), "square": (2, 2), "other": (2, 2)}  # in patches


def write_pictures(folder):
    """Pictures of which each family takes one size as it is."""
    for multiple in {spec.frame_multiple for spec in FAMILIES.values() if spec.has_vision}:
        for number, (name, (height, width)) in enumerate(SHAPES.items()):
            more = multiple < 28  # else there were fewer than `min_pixels`
            shape = (height + more) * multiple, (width + more) * multiple, 3
            pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{multiple}.png")


@pytest.fixture(scope="module")
def folder(seven_tags):
    write_pictures(seven_tags[0])
    return seven_tags[0]


def picture_rows(name, dataset):
    """Each tag with pictures, which those without V are not fed; V and VA without a clip too, and with several pictures."""
    multiple, hears = FAMILIES[name].frame_multiple, FAMILIES[name].has_audio
    one, two = [f"wide{multiple}.png"], [f"square{multiple}.png", f"high{multiple}.png"]
    rows, first = [], {}
    for row in dataset:
        first.setdefault(row["tag"], {**row, "audio_in_video": False, "images": one})
    for tag, row in first.items():
        if "A" in tag and not hears:
            continue
        rows.append(row | {"images": two if tag in ("VS", "VA") else one})
        if tag == "V":
            rows += [row | {"video": None}, row | {"video": None, "images": two}, row | {"images": []}]
        if tag == "VA":
            rows += [row | {"video": None, "audio": row["video"]}, row | {"audio_in_video": True}]
        if tag == "VAS":
            rows.append(row | {"images": two, "audio_in_video": True})
    return rows


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.matrix(cases=4)
def test_rows_with_pictures_have_the_logits_that_they_have_alone(name, folder, seven_tags):
    model, processor, builder = setup(name, folder)
    rows = picture_rows(name, seven_tags[1])
    prompts = [builder.encode(row) for row in rows]
    kinds = {prompt.kinds for prompt in prompts}
    assert {("image",), ("image", "video"), ("video",), ()} <= kinds
    assert name not in OMNI or (
        {prompt.tag for prompt in prompts} == set(ModalityTag)
        and {("image", "audio"), ("image", "video", "audio"), ("audio",)} <= kinds
        and sum(builder.spec(row).interleaved for row in rows) == 2 * (name in INTERLEAVING)
    )
    completions = torch.randint(10, 200, (len(rows), COMPLETION), generator=torch.Generator().manual_seed(0))
    inputs, width = batched(prompts, completions, processor.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(builder.family, model, prompts):
        logits = model(**inputs).logits
    for i, row in enumerate(rows):
        alone = alone_by_transformers(name, model, processor, builder, row, completions[i])
        worst = (logits[i, -len(alone) :] - alone).abs().max().item()
        assert worst <= 1e-4, (row["tag"], row["images"], worst)
    # Another picture moves the rows that are fed it, and no others.
    changed = [row | {"images": [f"other{FAMILIES[name].frame_multiple}.png"] * len(row["images"])} for row in rows]
    others = [builder.encode(row) for row in changed]
    inputs, other_width = batched(others, completions, processor.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(builder.family, model, others):
        moved = (model(**inputs).logits[:, -COMPLETION:] - logits[:, -COMPLETION:]).abs().amax((1, 2))
    for prompt, by in zip(prompts, moved.tolist(), strict=True):
        assert by > 1e-3 if "image" in prompt.kinds else by < 1e-4, (prompt.tag, prompt.kinds, by)


@pytest.mark.parametrize("name", SEEING)
def test_pixels_alone_move_the_log_probs(name, folder, seven_tags):
    """Of pictures of one size: nothing but what is in them differs."""
    model, processor, builder = setup(name, folder)
    multiple = FAMILIES[name].frame_multiple
    row = next(row for row in seven_tags[1] if row["tag"] == "V")
    prompts = [builder.encode({**row, "image": f"{kind}{multiple}.png"}) for kind in ("square", "other")]
    assert torch.equal(prompts[0].input_ids, prompts[1].input_ids)
    inputs, _ = batched(prompts, torch.full((2, COMPLETION), 20), processor.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(builder.family, model, prompts):
        logps = model(**inputs).logits[:, -COMPLETION - 1 : -1].log_softmax(-1)[..., 20]
    assert (logps[0] - logps[1]).abs().max() > 1e-3


@pytest.mark.matrix(cases=4)
@pytest.mark.parametrize("name", SEEING)
def test_media_stand_in_any_order(name, folder, seven_tags):
    model, processor, builder = setup(name, folder)
    multiple = FAMILIES[name].frame_multiple
    files = {"images": [f"square{multiple}.png", f"wide{multiple}.png"], "video": seven_tags[1][0]["video"]}
    files |= {"audio": files["video"]} if name in OMNI else {}
    heard = ["audio"] if name in OMNI else []
    orders = [
        ["image", "video", *heard, "image"],
        ["video", "image", "image", *heard],
        [*heard, "image", "image", "video"],
    ]
    text = {"type": "text", "text": " then "}
    rows = [
        {"prompt": [{"role": "user", "content": [part for kind in order for part in ({"type": kind}, text)]}], **files}
        for order in orders
    ]
    prompts = [builder.encode(row) for row in rows]
    completions = torch.full((len(rows), COMPLETION), 20)
    inputs, _ = batched(prompts, completions, processor.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(builder.family, model, prompts):
        together = model(**inputs).logits
    for row, found, completion in zip(rows, together, completions, strict=True):
        alone = alone_by_transformers(name, model, processor, builder, row, completion)
        torch.testing.assert_close(found[-len(alone) :], alone, atol=1e-4, rtol=0)
    assert (together[0, -1] - together[1, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", SEEING)
def test_placeholders_of_pictures_equal_features_and_a_difference_raises(name, folder, seven_tags):
    model, processor, builder = setup(name, folder)
    prompts = [builder.encode(row) for row in picture_rows(name, seven_tags[1])]
    token = builder.family.placeholder_ids["image"]
    for prompt in prompts:
        count = int((prompt.input_ids == token).sum())
        features = sum(builder.family.feature_counts("image", prompt.media["image"])) if "image" in prompt.media else 0
        assert count == prompt.media_tokens.get("image", 0) == features
    prompt = next(p for p in prompts if "image" in p.kinds)
    ids = prompt.input_ids.clone()
    ids[ids.tolist().index(token)] = processor.tokenizer.pad_token_id
    with pytest.raises(MediaMismatchError, match="image placeholder"), serve_media(builder.family, model, [prompt]):
        model(input_ids=ids[None], attention_mask=torch.ones(1, len(ids)))
    with pytest.raises(MediaMismatchError, match="never reached the model"):
        with serve_media(builder.family, model, [prompt]):
            pass
    assert token in builder.family.suppressed_ids


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEING)
@pytest.mark.matrix(cases=2)
def test_packed_rows_with_pictures_have_the_gradients_of_rows_apart(name, folder, seven_tags):
    rows = picture_rows(name, seven_tags[1])
    errors, gradients, expected = compare(name, folder, rows)
    assert_equal(errors, gradients)
    stills = [row for row in rows if row["video"] is None and not row.get("audio")]
    errors, gradients, expected = compare(name, folder, stills)
    assert_equal(errors, gradients)
    tower = next(iter(towers_of(build_tiny(name)[0].base_model)))
    assert any(f"{tower}." in key and value.norm() > 1e-3 for key, value in expected.items())  # of pictures alone


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.matrix(cases=2)
def test_rows_that_share_their_pictures_are_answered_as_rows_apart(name, folder, seven_tags):
    model, processor, builder = setup(name, folder)
    prompts = [builder.encode(row) for row in picture_rows(name, seven_tags[1])]
    rows = repeated([prompt for prompt in prompts if "image" in prompt.kinds])
    made = (model, processor, builder.family)
    for settings in (SAMPLED, GREEDY):
        assert torch.equal(generate(*made, rows, True, **settings), generate(*made, rows, False, **settings))
    # One by one as in the batch.
    together = generate(*made, rows, True, min_new_tokens=4, **GREEDY)
    for i in range(0, len(rows), 4):
        single = generate(*made, rows[i : i + 1], False, min_new_tokens=4, **GREEDY)[0, len(rows[i]) :]
        assert torch.equal(together[i, -10:][: len(single)], single)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("name", SEEING)
@pytest.mark.matrix(cases=3)
def test_frozen_towers_read_each_picture_once(name, place, folder, seven_tags, tmp_path):
    world = World(name, folder, picture_rows(name, seven_tags[1]))
    without = world.logits(None)
    cache = TowerCache(1 << 30) if place == "memory" else TowerCache(0, tmp_path)
    world.passes.clear()
    filled = world.logits(cache)
    clips = [{p.media_digest(kind) for p in world.prompts if kind in p.kinds} for kind in ("image", "video", "audio")]
    assert len(clips[0]) == 2 and len(world.passes) == sum(map(len, clips)) == cache.misses
    torch.testing.assert_close(filled, without, rtol=1e-5, atol=2e-5)
    assert torch.equal(world.logits(cache), filled) and len(world.passes) == cache.misses


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.matrix(cases=5)
def test_a_touched_tower_of_pictures_moves_nothing(name, folder, seven_tags):
    model, processor, builder = setup(name, folder)
    core = builder.family.core(model)
    rows = picture_rows(name, seven_tags[1])
    prompts = {prompt.kinds: prompt for prompt in map(builder.encode, rows)}
    passes = []
    next(iter(towers_of(core).values())).register_forward_pre_hook(lambda *a: passes.append(1), with_kwargs=True)
    for kinds in ((), ("video",), ("image",), ("image", "video")):
        found = []
        for touch in ((), ("image",), ("image", "video")):
            passes.clear()
            inputs, _ = batched(
                [prompts[kinds]], torch.empty(1, 0, dtype=torch.long), processor.tokenizer.pad_token_id
            )
            with torch.no_grad(), serve_media(builder.family, model, [prompts[kinds]], touch=touch):
                found.append(model(**inputs).logits)
            assert len(passes) == len({*kinds, *touch})
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*SEEING, "phi4_multimodal"])
@pytest.mark.matrix(cases=2)
def test_large_pictures_are_made_smaller_until_they_fit(name, tmp_path):
    """Also where a picture's tokens cover less than a patch of a frame, or a count that is no multiple of it."""
    noise = np.random.default_rng(0).integers(0, 256, (800, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    family = family_for(*build_tiny(name))
    row = {"prompt": [{"role": "user", "content": "x"}], "images": ["large.png"]}
    with MediaLoader(tmp_path, MediaLimits(min_pixels=1, max_pixels=10**6), workers=0) as loader:
        count = PromptBuilder(family, loader, max_media_tokens=600).encode(row).media_tokens["image"]
        assert 300 < count <= 600
        if name.startswith("gemma4"):
            with pytest.raises(MediaError, match="this model reads 1120 at most") as error:
                PromptBuilder(family, loader).encode(row)
            assert error.value.path == "large.png"  # as the row names it
        with pytest.raises(MediaError, match="media tokens at the smallest frame size, but max_media_tokens is 1"):
            PromptBuilder(family, loader, max_media_tokens=1).encode(row | {"images": ["large.png"] * 2})
