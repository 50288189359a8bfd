"""Weights of few bits: which layers have them, what identifies them, and what they do on a CPU."""

import logging
import weakref

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from tiny_models import FAMILIES, build_tiny, save_tiny
from trl.trainer.utils import add_fused_lm_head

from maple_trl.omni import towers
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prefix.packed_attention import install
from maple_trl.omni.prefix.sharing import Comparison
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.quantization import Held, describe, named_scales
from maple_trl.omni.serving import serve_media
from maple_trl.omni.towers import TowerCache


pytestmark = pytest.mark.slow


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NESTED = {**NF4, "bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
INT8 = {"load_in_8bit": True}
FEW = (Linear4bit, Linear8bitLt)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: str(save_tiny(name, tmp_path_factory.mktemp(name))) for name in FAMILIES}


def few(model):
    return {name for name, module in model.named_modules() if isinstance(module, FEW)}


@pytest.mark.parametrize("towers_too", [False, True])
@pytest.mark.parametrize("options", [NESTED, INT8], ids=["nested", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.matrix(cases=4)
def test_the_language_model_alone_has_few_bits(folders, name, options, towers_too):
    plain, processor = build_tiny(name)
    family = family_for(plain, processor)
    linear = {n for n, module in plain.named_modules() if type(module) is torch.nn.Linear}
    model = load_model(folders[name], quantization_config=options, quantize_towers=towers_too)
    expected = {n for n in linear if family.scope_of(n) == "llm" or (towers_too and family.scope_of(n))}
    assert few(model) == expected and "lm_head" not in expected and expected
    if not towers_too:
        inputs = torch.randn(7, model.get_submodule("lm_head").in_features)
        assert torch.equal(model.lm_head(inputs), plain.lm_head(inputs))
    packed = [model.get_submodule(n).weight for n in expected]
    assert {weight.dtype for weight in packed} == {torch.int8 if options is INT8 else torch.uint8}
    held = Held.of(model)
    weights = {n: plain.get_submodule(n).weight.numel() for n in expected}
    assert (held.layers, held.few) == (len(expected), sum(weights.values()))
    assert held.few + held.whole == plain.num_parameters()
    # Every tensor that is there, once.
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *(t for _, t in named_scales(model)))}
    assert held.few_bytes + held.whole_bytes == sum(tensors.values())


def test_a_list_of_ones_own_stands(folders):
    folder = folders["qwen2_5_omni"]
    own = load_model(
        folder, quantization_config={**NF4, "llm_int8_skip_modules": ["lm_head", "model.visual", "k_proj"]}
    )
    assert any("audio_tower" in n for n in few(own)) and not any("visual" in n or "k_proj" in n for n in few(own))
    for listed, message in (
        (["model", "lm_head"], "no linear layer of .* was quantized"),
        (["model.visual"], "add 'lm_head' to"),
        (["nothing"], "add 'lm_head' to"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(folder, quantization_config={**NF4, "llm_int8_skip_modules": listed})
    with pytest.raises(ValueError, match="bnb_4bit_quant_type must be nf4 or fp4, got 'nf5'"):
        load_model(folder, quantization_config={**NF4, "bnb_4bit_quant_type": "nf5"})
    with pytest.raises(ValueError, match="quantize_towers has no effect beside"):
        load_model(folder, quantization_config={**NF4, "llm_int8_skip_modules": ["lm_head"]}, quantize_towers=True)


@pytest.mark.parametrize("options", [NESTED, INT8], ids=["nested", "int8"])
def test_a_model_that_was_saved_with_few_bits(folders, tmp_path, options):
    model = load_model(folders["qwen2_5_omni"], quantization_config=options)
    model.save_pretrained(tmp_path)
    again, ids = load_model(str(tmp_path)), torch.arange(50, 70)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert describe(again) == describe(model) and Held.of(again) == Held.of(model)
    with pytest.raises(ValueError, match="was saved with weights of few bits, and is read as it was saved: leave"):
        load_model(str(tmp_path), quantization_config=INT8 if options is NESTED else NESTED)


def test_experts_that_keep_their_bits_are_told(folders, caplog):
    with caplog.at_level(logging.INFO, "maple_trl"):
        load_model(folders["qwen3_omni"], quantization_config=NF4)
        load_model(folders["qwen2_5_omni"], quantization_config=NF4)
    experts, dense = caplog.records
    assert experts.levelname == "WARNING" and "That is 33% of the language model's matrices" in experts.message
    assert dense.levelname == "INFO" and "weights in 14 linear layers are nf4" in dense.message
    assert "matrices" not in dense.message


@pytest.mark.parametrize("options", [NF4, NESTED, INT8], ids=["nf4", "nested", "int8"])
def test_a_pass_in_evaluation_mode_changes_nothing(folders, options):
    """bitsandbytes would pack weights of 4 bits anew on some CPUs, where no gradient passes them afterwards."""
    model = load_model(folders["qwen2_5_omni"], quantization_config=options)
    core, ids = model.model.language_model, torch.arange(50, 70)[None]

    def gradient():
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        (found,) = torch.autograd.grad(core.train()(inputs_embeds=inputs).last_hidden_state.pow(2).sum(), inputs)
        return found

    def held():
        return {n: t.clone() for n, t in (*model.named_parameters(), *named_scales(model))}

    before, kept = gradient(), held()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    now = held()
    assert kept.keys() == now.keys() and all(torch.equal(t, now[n]) for n, t in kept.items())
    assert torch.equal(gradient(), before) and before.abs().max() > 0
    layer = core.layers[0].mlp.down_proj
    if options is INT8 or not Linear4bit(64, 64).support_avx512bf16_for_cpu:
        return
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes has it, on such a CPU
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert not torch.equal(gradient(), before)


@pytest.mark.parametrize("training", [True, False])  # on a GPU both compute as evaluation does on a CPU
def test_layers_of_8_bits_let_go_of_their_inputs(folders, training):
    layer = load_model(folders["qwen2_5_omni"], quantization_config=INT8).model.language_model.layers[0].mlp.down_proj
    layer.train(training)

    def passed():
        inputs = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
        between = inputs * 2
        there = weakref.ref(between)
        output = layer(between)
        del between
        kept = there() is not None
        output.pow(2).sum().backward()
        return inputs.grad, kept

    gradient, kept = passed()
    layer._forward_hooks.clear()
    expected, plainly = passed()
    assert torch.equal(gradient, expected) and (kept, plainly) == (False, True)


def test_a_packed_model_is_put_back(folders):
    """A model of one's own, which has been used for something before."""
    from maple_trl.omni.quantization import settle

    model = load_model(folders["qwen2_5_omni"], quantization_config=NF4)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = Linear4bit(64, 64).support_avx512bf16_for_cpu
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(50, 60)[None])
    settle(model)
    assert not any(
        getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in map(model.get_submodule, few(model))
    )


# Sharing


def comparison(folders, seven_tags, name, dtype, options):
    model = load_model(folders[name], dtype=dtype, **({"quantization_config": options} if options else {}))
    processor = build_tiny(name)[1]
    family = family_for(model, processor)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    install(model)
    limits = MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096)
    prompt = PromptBuilder(family, MediaLoader(seven_tags[0], limits)).probe()

    def serve(model, prompts, packed=False):
        return serve_media(family, model, prompts, packed=packed)

    return Comparison(model, family.core(model), prompt, serve, family.suppressed_ids)


OUTLIERS = {**INT8, "llm_int8_threshold": 1.0}  # columns of which any token decides how all are rounded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [NF4, NESTED, INT8, OUTLIERS], ids=["nf4", "nested", "int8", "outliers"])
@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni", "qwen2_audio"])
@pytest.mark.matrix(cases=4)
def test_sharing_is_told_from_positions_one_too_far(folders, seven_tags, name, options, dtype):
    compute = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in options else {}
    found = comparison(folders, seven_tags, name, dtype, options | compute)
    difference = found.difference()
    allowed = max(found.least_tolerance, found.tolerance())
    with found._ready():
        wrong = float((found._apart - found._log_probs_packed(shift=1)).abs().mean())
    assert difference <= allowed < wrong
    assert found._exact == (dtype == "float32") and (not found._exact or difference < 1e-6)


def test_what_8_bits_round_depends_on_the_batch(folders, seven_tags):
    """Why their layers are compared as what their weights stand for: rounded, both ways differ by more than in float32."""
    found = comparison(folders, seven_tags, "qwen2_audio", "float32", OUTLIERS)
    exact = found.difference()
    layers = [m for m in found.model.modules() if isinstance(m, Linear8bitLt)]

    class Rounding(Linear8bitLt):
        """Its own product, whatever is set beside it."""

        def __setattr__(self, name, value):
            if name != "forward":
                super().__setattr__(name, value)

        def __delattr__(self, name):
            if name != "forward":
                super().__delattr__(name)

    for layer in layers:
        layer.__class__ = Rounding
    rounded = found.difference()
    assert exact < 1e-6 and rounded > 1e-4


# Features that are kept


def keys_of(folder, name, options, cache=None):
    model = load_model(folder, **options)
    family = family_for(model.requires_grad_(False), build_tiny(name)[1])
    cache = cache or TowerCache(1 << 20)
    return (
        model,
        family,
        {kind: cache._weights_digest(family, family.core(model), kind) for kind in ("video", "audio")},
    )


ALL = {"quantize_towers": True}


@pytest.mark.long
def test_towers_of_other_bits_share_no_features(folders, monkeypatch):
    folder = folders["qwen2_5_omni"]
    kinds = [{}, *({"quantization_config": q, **ALL} for q in (NF4, NESTED, FP4, INT8))]
    kinds += [{"quantization_config": {**NF4, "bnb_4bit_compute_dtype": "bfloat16"}, **ALL}]
    kinds += [{"quantization_config": {**INT8, "llm_int8_threshold": 1.0}, **ALL}]
    digests = [tuple(keys_of(folder, "qwen2_5_omni", options)[2].values()) for options in kinds]
    assert len(set(digests)) == len(kinds) and None not in {d for pair in digests for d in pair}
    # Few bits of the language model alone leave the towers, and their features, as they were.
    assert tuple(keys_of(folder, "qwen2_5_omni", {"quantization_config": NF4})[2].values()) == digests[0]
    assert tuple(keys_of(folder, "qwen2_5_omni", kinds[1])[2].values()) == digests[1]  # the same is the same
    monkeypatch.setattr(towers, "named_scales", lambda core: ())
    packed = [tuple(keys_of(folder, "qwen2_5_omni", kinds[i])[2].values()) for i in (1, 2, 5)]
    assert len(set(packed)) == 1  # by their packed bytes alone they could not be told apart


@pytest.mark.parametrize("options", [NF4, NESTED, INT8], ids=["nf4", "nested", "int8"])
def test_other_scales_are_other_towers(folders, options):
    cache = TowerCache(1 << 20)
    name = "qwen2_5_omni"
    model, family, first = keys_of(folders[name], name, {"quantization_config": options, **ALL}, cache)
    core = family.core(model)
    packed = {n: p.clone() for n, p in model.named_parameters()}
    scales = [
        (n, t) for n, t in named_scales(core) if family.scope_of(n) == "vision" and ("absmax" in n or "SCB" in n)
    ]
    values = scales[0][1].flatten()
    values[len(values) // 2] += 1
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters())
    assert cache._weights_digest(family, core, "video") != first["video"]
    assert cache._weights_digest(family, core, "audio") == first["audio"]


def test_features_of_towers_of_few_bits_are_kept(folders, seven_tags):
    folder, rows = seven_tags
    name = "qwen2_5_omni"
    cache = TowerCache(1 << 24)
    model, family, _ = keys_of(folders[name], name, {"quantization_config": NESTED, **ALL})
    builder = PromptBuilder(family, MediaLoader(folder, MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096)))
    prompt = builder.encode(next(row for row in rows if row["tag"] == "VAS"))
    core = family.core(model.eval())
    with torch.no_grad():
        for kind in ("video", "audio"):
            fresh = towers.run_tower(family, core, kind, [prompt])[0]["tokens"]
            kept = [cache.features(family, core, kind, [prompt])[0]["tokens"] for _ in range(2)]
            assert all(torch.equal(fresh, found) for found in kept)
    assert (cache.hits, cache.misses) == (2, 2)


def test_text_models_keep_the_choice_of_transformers(tmp_path):
    from tiny_models import build_tiny_text

    model, tokenizer = build_tiny_text()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert len(few(load_model(str(tmp_path), quantization_config=NF4))) == 14
    assert describe(load_model(str(tmp_path))) is None
