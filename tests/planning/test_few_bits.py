"""Memory of weights of 4 and 8 bits: what is counted against what bitsandbytes and TRL really keep."""

import json

import pytest
import tiny_models
import torch
import transformers
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from omni_runs import build_trainer, one_row_per_tag
from peft import LoraConfig

from maple_trl import cli
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.lora import build_lora_config
from maple_trl.omni.quantization import named_scales
from maple_trl.planning.catalogue import GPUS, MODELS
from maple_trl.planning.memory import packed_bytes, unpacked_bytes, weight_bytes
from maple_trl.planning.plan import advise, make_plan
from maple_trl.planning.setup import PlanError, Setup
from maple_trl.planning.sizes import Linear, Media, read_sizes


KINDS = {
    "4": {"load_in_4bit": True},
    "nested": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "8": {"load_in_8bit": True},
}
BNB = {
    "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8": {"load_in_8bit": True},
}
TINY = {"dtype": "float32", "compute": "float32", "lora_r": 4, "trained": ("llm",)}


def setup_of(sizes, **more):
    return Setup(sizes, GPUS["RTX-4090"], **TINY | more)


def held(model) -> int:
    """Bytes of all tensors of a model, each once."""
    tensors = (*model.parameters(), *(tensor for _, tensor in named_scales(model)))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@pytest.mark.slow
@pytest.mark.parametrize("towers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", tiny_models.QWEN)
@pytest.mark.matrix(cases=7)
def test_weights_that_are_loaded(tmp_path, name, kind, towers):
    folder = str(tiny_models.save_tiny(name, tmp_path))
    model = load_model(folder, quantization_config=BNB[kind], quantize_towers=towers)
    setup = setup_of(read_sizes(model.config.to_dict()), quantize_towers=towers, **KINDS[kind])
    adapters = 2 * setup.trainable
    assert weight_bytes(setup) - adapters == held(model)
    plain = setup_of(read_sizes(model.config.to_dict()))
    assert weight_bytes(plain) - 4 * plain.trainable == held(load_model(folder)) != held(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_adapters_that_are_trained(seven_tags, tmp_path, kind):
    folder = str(tiny_models.save_tiny("qwen2_5_omni", tmp_path))
    model, processor = load_model(folder, quantization_config=BNB[kind]), load_processor(folder)
    parts = {"vision": False, "audio": False, "projectors": False}
    lora = build_lora_config(model, family_for(model, processor), r=4, **parts)
    assert isinstance(lora, LoraConfig)
    options = {"model": model, "processing_class": processor, "peft_config": lora}
    trainer = build_trainer(seven_tags[0], one_row_per_tag(seven_tags[1]), **options)
    setup = setup_of(read_sizes(model.config.to_dict()), **KINDS[kind])
    assert weight_bytes(setup) == held(trainer.model)


def real_bytes(inputs, outputs, kind) -> int:
    """What bitsandbytes makes of a matrix."""
    weight = torch.randn(outputs, inputs)
    if kind == "8":
        layer = Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    else:
        nested = kind == "nested"
        layer = Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compress_statistics=nested)
        layer.weight = Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=nested, module=layer
        ).to("cpu")
    return held(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_published_sizes(kind):
    """One of each shape of Qwen2.5-Omni-3B's language model, quantized for real."""
    sizes = read_sizes(MODELS["Qwen/Qwen2.5-Omni-3B"])
    shapes = {(layer.inputs, layer.outputs) for layer in sizes.parts["llm"].linear if layer.inputs <= 2048}
    setup = setup_of(sizes, **KINDS[kind])
    assert (2048, 256) in shapes
    for inputs, outputs in (shape for shape in shapes if shape[1] <= 2048):
        assert packed_bytes(Linear(inputs, outputs, bias=False), setup) == real_bytes(inputs, outputs, kind)
    for inputs, outputs in ((3, 5), (67, 31), (130, 64)):  # blocks that are not full
        if kind == "8" or inputs * outputs % 2 == 0:
            assert packed_bytes(Linear(inputs, outputs, bias=False), setup) == real_bytes(inputs, outputs, kind)


ARCHITECTURES = {
    "Qwen/Qwen2.5-Omni-3B": transformers.Qwen2_5OmniThinkerForConditionalGeneration,
    "Qwen/Qwen2.5-Omni-7B": transformers.Qwen2_5OmniThinkerForConditionalGeneration,
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": transformers.Qwen3OmniMoeThinkerForConditionalGeneration,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_models_by_the_layers_that_transformers_builds(name):
    """Of half a byte for each weight of a linear layer of the language model, and a scale in 4 bytes for 64 of them."""
    config, model_class = MODELS[name], ARCHITECTURES[name]
    with torch.device("meta"):
        model = model_class(model_class.config_class(**{k: v for k, v in config.items() if k != "model_type"}))
    linear = [m for n, m in model.named_modules() if type(m) is torch.nn.Linear and "language_model" in n]
    packed = sum(m.weight.numel() for m in linear)
    expected = 2 * (model.num_parameters() - packed) + packed // 2 + packed // 64 * 4 + 64 * len(linear)
    setup = setup_of(read_sizes(config), **{**KINDS["4"], "dtype": "bfloat16", "compute": "bfloat16"})
    assert weight_bytes(setup) - 2 * setup.trainable == expected


def plan_of(name="Qwen/Qwen2.5-Omni-7B", **more):
    options = {"dtype": "bfloat16", "compute": "bfloat16", "lora_r": 16, "trained": ("llm",), "prompt": 2048}
    options |= {"completion": 256, "media": Media(1024, 256), "per_device_train_batch_size": 4, "num_generations": 4}
    return make_plan(Setup(read_sizes(MODELS[name], name), GPUS["RTX-4090"], **options | more))


def test_few_bits_are_what_makes_it_fit():
    whole = plan_of()
    assert whole.verdict != "fits"
    assert any("load_in_4bit true" in name for name, _ in advise(whole))
    peaks = [plan_of(**more).memory.peak for more in ({}, KINDS["8"], KINDS["4"], KINDS["nested"])]
    assert peaks == sorted(peaks, reverse=True)
    four = plan_of(**KINDS["4"])
    assert four.verdict == "fits" and "have 4 bits" in " ".join(four.notes)
    towers = plan_of(**KINDS["4"], quantize_towers=True)
    assert towers.memory.peak < four.memory.peak
    assert unpacked_bytes(four.setup) == 2 * 3584 * 18_944
    # Experts keep their bits, so little is gained.
    name = "Qwen/Qwen3-Omni-30B-A3B-Instruct"
    assert plan_of(name, **KINDS["4"]).memory.peak > 0.95 * plan_of(name).memory.peak


@pytest.mark.parametrize(
    "options, message",
    [
        ({**KINDS["4"], "lora_r": 0, "trained": ("llm", "head")}, "use_peft true"),
        ({**KINDS["4"], **KINDS["8"]}, "choose one"),
        ({"use_bnb_nested_quant": True}, "no effect without load_in_4bit"),
        ({"quantize_towers": True}, "quantize_towers has no effect"),
        ({**KINDS["8"], "sharding": "zero2", "gpus": 2}, "sharding zero2 does not go with"),
        ({**KINDS["8"], "rollout": "vllm_colocate"}, "use_vllm does not go with"),
    ],
)
def test_what_no_trainer_does(options, message):
    with pytest.raises(PlanError, match=message):
        plan_of(**options)


def test_the_command_has_the_options_of_a_job(capsys):
    words = ["plan", "--model", "Qwen2.5-Omni-3B", "--gpu", "RTX-4090", "--use_peft", "true", "--json"]
    few = ["--load_in_4bit", "true", "--use_bnb_nested_quant", "true", "--quantize_towers", "true"]
    cli.main(words)
    whole = json.loads(capsys.readouterr().out)
    assert cli.main([*words, *few]) in (0, 1)
    plan = json.loads(capsys.readouterr().out)
    assert plan["options"]["load_in_4bit"] and plan["options"]["quantize_towers"]
    assert plan["memory"]["training"]["weights"] < 0.5 * whole["memory"]["training"]["weights"]
    assert cli.main(["plan", "--model", "Qwen2.5-Omni-3B", "--load_in_4bit", "true"]) == 2
    assert "use_peft true" in capsys.readouterr().err
