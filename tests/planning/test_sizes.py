"""Sizes read from a configuration, against the models that transformers builds of it, and against what others publish."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny_models
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maple_trl.omni.families import family_for
from maple_trl.omni.lora import linear_modules
from maple_trl.planning.catalogue import MODELS
from maple_trl.planning.sizes import (
    PARTS,
    Media,
    Work,
    generation_work,
    plain_work,
    read_sizes,
    shared_work,
)


@pytest.mark.parametrize("name", sorted(set(tiny_models.FAMILIES) - set(tiny_models.QWEN)))
def test_families_without_sizes_are_refused_by_name(name):
    model, _ = tiny_models.build_tiny(name)
    with pytest.raises(
        ValueError,
        match=f"sizes of the model type '{model.config.model_type}' are not known; those of qwen2_5_omni_thinker",
    ):
        read_sizes(model.config.to_dict())


def counted(model, family) -> dict[str, int]:
    """Parameters of each part; a head that is the embedding is counted where the embedding is."""
    parts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        parts[family.scope_of(name) or "head"] += parameter.numel()
    return parts


def of(sizes) -> dict[str, int]:
    return {part: found.parameters for part, found in sizes.parts.items()}


@pytest.mark.parametrize("name", tiny_models.QWEN)
def test_parameters_and_adapters_by_part(name):
    model, processor = tiny_models.build_tiny(name)
    family, sizes = family_for(model, processor), read_sizes(model.config.to_dict())
    assert of(sizes) == counted(model, family)
    modules = dict(model.named_modules())
    for scope, names in linear_modules(model, family).items():
        adapters = sum(4 * (modules[n].in_features + modules[n].out_features) for n in names)
        assert sizes.parts[scope].lora(4) == adapters


ARCHITECTURES = {
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@pytest.mark.parametrize("name", [name for name in MODELS if "Qwen3-" not in name or "Omni" in name or "0.6B" in name])
def test_known_models_have_the_parameters_that_transformers_builds(name):
    """On the meta device: no memory and no weights."""
    config = MODELS[name]
    model_class = getattr(transformers, ARCHITECTURES[config["model_type"]])
    with torch.device("meta"):
        model = model_class(model_class.config_class(**{k: v for k, v in config.items() if k != "model_type"}))
    assert read_sizes(config).parameters == model.num_parameters()


# Parameters of the published files, as public code counts them; of an Omni model its Thinker's.
PUBLISHED = {
    "Qwen/Qwen2.5-Omni-3B": 4_703_464_448,
    "Qwen/Qwen2.5-Omni-7B": 8_931_813_888,
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": 31_719_205_488,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_the_parameters_that_are_published(name):
    assert read_sizes(MODELS[name]).parameters == PUBLISHED[name]


def test_a_full_omni_model_is_planned_by_its_thinker():
    config = MODELS["Qwen/Qwen2.5-Omni-3B"]
    thinker = {key: value for key, value in config.items() if key != "model_type"}
    whole = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "talker_config": {}}
    assert read_sizes(whole).parameters == read_sizes(config).parameters


@contextmanager
def counting():
    """Count operations of torch, which knows those of its attention kernels for CPUs from version 2.15 on alone."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@pytest.mark.parametrize("name", tiny_models.QWEN)
def test_operations_are_those_that_torch_counts(name):
    """Of a text, a forward with all logits; torch counts whole squares of attention, and not the products of experts."""
    model, _ = tiny_models.build_tiny(name)
    text, rows, length = replace(read_sizes(model.config.to_dict()).text, chosen=0), 2, 24
    ids = torch.randint(20, 60, (rows, length))
    with counting() as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    computed = text.operations(Work(rows * length, rows * length**2, rows * length))
    assert counter.get_total_flops() == pytest.approx(computed, rel=0.02)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni", "qwen3_vl"])
def test_operations_of_towers_are_those_that_torch_counts(name):
    model, processor = tiny_models.build_tiny(name)
    spec = tiny_models.FAMILIES[name]
    family, sizes = family_for(model, processor), read_sizes(model.config.to_dict())
    sample = tiny_models.sample_media(name, num_frames=4, side=4, seconds=4)
    batch = tiny_models.encode_sample(name, processor, [sample])
    core, pixels = family.core(model), 4 * spec.frame_multiple
    tokens = {kind: int((batch["input_ids"] == family.placeholder_ids[kind]).sum()) for kind in family.placeholder_ids}
    with counting() as counter, torch.no_grad():
        core.visual(batch["pixel_values_videos"], grid_thw=batch["video_grid_thw"])
    media = Media(tokens["video"], 0, pixels, pixels)
    assert counter.get_total_flops() == pytest.approx(sizes.vision.operations(media), rel=0.02)
    if "audio" in tokens:
        media = Media(0, tokens["audio"])
        mask = batch["feature_attention_mask"].bool()
        features = batch["input_features"].permute(0, 2, 1)[mask].T
        lengths = mask.sum(-1)
        more = {"aftercnn_lens": (lengths - 1) // 2 + 1} if name == "qwen2_5_omni" else {}
        with counting() as counter, torch.no_grad():
            core.audio_tower(features, feature_lens=lengths, **more)
        assert counter.get_total_flops() == pytest.approx(sizes.audio.operations(media), rel=0.1)


def test_the_table_of_Qwen2_5_Omni_3B():
    """TFLOP of a group of 8 on the real sizes: each row by itself, prompts shared, and features of frozen towers kept."""
    model = read_sizes(MODELS["Qwen/Qwen2.5-Omni-3B"])
    assert model.parameters == pytest.approx(4.70e9, rel=0.002)
    table = {
        # prompt, completion: train and log-probabilities of rows, shared, cached
        (4096, 256): ((884, 179, 162), (234, 58, 40)),
        (8192, 256): ((1877, 327, 292), None),
        (4096, 1024): ((1070, 365, 348), None),
    }
    for (prompt, completion), (train, log_probs) in table.items():
        towers = model.tower_operations(Media(prompt * 3 / 4, prompt / 8))
        rows = model.text.operations(plain_work(prompt, completion, 8))
        shared = model.text.operations(shared_work(prompt, completion, 8))
        computed = (4 * rows + towers, 4 * shared + towers, 4 * shared)
        assert [value / 1e12 for value in computed] == pytest.approx(train, rel=0.02)
        if log_probs:
            computed = (rows + towers, shared + towers, shared)
            assert [value / 1e12 for value in computed] == pytest.approx(log_probs, rel=0.02)


def test_work_adds_up():
    assert plain_work(8, 4, 1) == shared_work(8, 4, 1)
    # A prompt, then token by token: all but the last token of each completion passes, as in one forward.
    once = generation_work(8, 4, 2, shared=True)
    assert (once.tokens, once.head) == (8 + 2 * 3, 2 * 4)
    assert Work(1, 2, 3) + Work(1, 1, 1) * 2 == Work(3, 4, 5)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "llava"}, "model type 'llava' are not known"),
        ({}, "model type None are not known"),
        ({"model_type": "qwen3", "hidden_size": 8}, "does not say num_hidden_layers"),
    ],
)
def test_what_cannot_be_read_says_why(config, told):
    with pytest.raises(ValueError, match=told):
        read_sizes(config)
