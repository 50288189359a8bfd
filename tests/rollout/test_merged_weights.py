"""What an engine is given of a model with adapters: what TRL's merge gives it, without TRL's changes to the model."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from omni_runs import build_trainer
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import build_tiny, build_tiny_text
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from maple_trl.omni.loading import load_model
from maple_trl.rollout.engine import EngineError
from maple_trl.rollout.merged_weights import tied_name
from maple_trl.rollout.vllm_generation import MergingGeneration


OMNI = {"target_modules": r".*language_model.*(q_proj|down_proj)"}
EMBEDDING = "model.language_model.embed_tokens.weight"
FORMS = {
    "lora": ("qwen2_5_omni", OMNI),
    "rslora": ("qwen2_5_omni", OMNI | {"use_rslora": True}),
    "dora": ("qwen2_5_omni", OMNI | {"use_dora": True}),
    "biases": ("qwen2_5_omni", {"target_modules": r".*language_model.*q_proj", "lora_bias": True}),
    "embeddings and head": ("qwen2_5_omni", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embeddings, dora": ("qwen2_5_omni", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "towers": ("qwen2_5_omni", {"target_modules": r".*(visual.*\.proj|audio_tower\.conv1)"}),
    "whole modules": ("qwen2_5_omni", OMNI | {"modules_to_save": ["lm_head"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "transposed, dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "experts": (
        "qwen3_omni",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


def base(kind, dtype=torch.bfloat16):
    if kind == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
        return GPT2LMHeadModel(config).to(dtype)
    return load_model("builtin:tiny-omni", dtype=dtype) if kind == "tied" else build_tiny(kind)[0].to(dtype)


def adapted(kind, form, dtype=torch.bfloat16, adapters=("default",)):
    """A model whose adapters change all that they can, by no round numbers."""
    config = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **form)
    torch.manual_seed(1)
    model = get_peft_model(base(kind, dtype), config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
                value.add_(torch.randn_like(value) * 0.05)
    return model


UNSHARDED = DistributedBackend(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None)))
SHARDED = SimpleNamespace(is_fsdp=False, is_zero3=True, gather_params=lambda weights: nullcontext())


def walk(model, kind=MergingGeneration, backend=UNSHARDED):
    """The weights that a generation of this kind hands over, without the engine that it hands them to."""
    generation = object.__new__(kind)
    generation.model = model
    generation._dist = backend
    return generation._iter_named_params()


def values(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(model, before):
    return [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]


def merged_ones(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer) and module.merged]


def of_trl(model):
    return [(name, value.clone()) for name, value in walk(copy.deepcopy(model), VLLMGeneration)]


def same(found, wanted):
    """Names in order, types and bits."""
    return [(name, value.dtype) for name, value in found] == [(name, value.dtype) for name, value in wanted] and all(
        torch.equal(one, other) for (_, one), (_, other) in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_trl_sends_and_nothing_moves(form):
    """The control: TRL's own transfers move weights that no optimizer has."""
    model = adapted(*FORMS[form])
    before, wanted = values(model), of_trl(model)
    for _ in range(3):
        assert same(list(walk(model)), wanted)  # kept by whoever takes them: in memory of their own
    assert changed(model, before) == [] and merged_ones(model) == []
    plain = dict(model.get_base_model().named_parameters())
    assert any(name not in plain or not torch.equal(value, plain[name]) for name, value in wanted)
    for _ in walk(model, VLLMGeneration):
        pass
    moved = changed(model, before)
    assert moved and all(".base_layer." in name for name in moved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types(dtype):
    model = adapted(*FORMS["dora"], dtype)
    before, wanted = values(model), of_trl(model)
    assert same(list(walk(model)), wanted) and same(list(walk(model)), wanted)
    assert changed(model, before) == []


def test_several_adapters_at_once():
    kind, form = FORMS["lora"]
    model = adapted(kind, form, adapters=("default", "other", "idle"))
    before, alone = values(model), of_trl(model)
    model.base_model.set_adapter(["default", "other"])
    wanted = of_trl(model)
    assert same(list(walk(model)), wanted) and not same(wanted, alone) and changed(model, before) == []


def test_copies_of_one_module_at_a_time():
    model = adapted(*FORMS["experts"])
    own = {value.data_ptr(): name.rpartition(".")[0] for name, value in model.named_parameters()}
    most = 0
    for _ in walk(model):
        names = [name.rpartition(".")[0] for name, value in model.named_parameters() if value.data_ptr() not in own]
        assert len(set(names)) <= 1
        most = max(most, len(names))
    assert most == 2  # both matrices of a layer's experts
    assert all(value.data_ptr() in own for value in model.parameters())


def test_a_transfer_that_is_given_up():
    model = adapted(*FORMS["dora"])
    before, wanted = values(model), of_trl(model)
    weights = walk(model)
    while not merged_ones(model):
        next(weights)
    weights.close()
    assert changed(model, before) == [] and merged_ones(model) == []
    assert same(list(walk(model)), wanted)


def test_whole_modules_of_the_active_adapter_alone():
    """As those of the reference, which TRL adds to an adapter that is trained on."""
    kind, form = FORMS["whole modules"]
    model = adapted(kind, form, adapters=("default", "ref"))
    names = [name for name, _ in base(kind).named_parameters()]
    heads = model.get_output_embeddings().modules_to_save
    for active in ("default", "ref"):
        model.set_adapter(active)
        found = dict(walk(model))
        assert list(found) == names and torch.equal(found["lm_head.weight"], heads[active].weight)
    model.add_adapter("without", LoraConfig(r=4, **OMNI))
    model.set_adapter("without")
    assert torch.equal(dict(walk(model))["lm_head.weight"], model.get_output_embeddings().original_module.weight)
    model.set_adapter("default")
    assert [name for name, _ in walk(model, backend=SHARDED)] == names  # by TRL's merge
    assert [name for name, _ in walk(model, VLLMGeneration) if "modules_to_save" in name] == [
        "lm_head.modules_to_save.ref.weight"
    ]


def test_trained_tokens():
    """TRL would send them beside the embedding, under a name of their own, and the embedding not at all."""
    model = adapted("qwen2_5_omni", OMNI | {"trainable_token_indices": {"embed_tokens": [3, 5]}})
    with torch.no_grad():
        delta = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].fill_(2.0)
    before, plain = values(model), base("qwen2_5_omni")
    found = dict(walk(model))
    assert list(found) == [name for name, _ in plain.named_parameters()]
    wanted = plain.get_input_embeddings().weight.detach().clone()
    wanted[[3, 5]] = delta.to(wanted.dtype)
    assert torch.equal(found[EMBEDDING], wanted) and changed(model, before) == []


def test_the_embedding_that_is_the_head():
    """It keeps its name, and is sent once, whatever of a model is adapted."""
    names = [name for name, _ in base("tied").named_parameters()]
    assert tied_name(base("tied")) == EMBEDDING and "lm_head.weight" not in names
    tokens = OMNI | {"trainable_token_indices": {"embed_tokens": [3]}}
    both = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    whole = OMNI | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    plain = base("tied", torch.float32).get_input_embeddings().weight
    for form in (OMNI, tokens, both, whole):
        model = adapted(
            "tied", form, torch.float32
        )  # PEFT makes two of adapters that were to be one, where it casts them
        assert tied_name(model.get_base_model()) == EMBEDDING
        found = dict(walk(model))
        assert list(found) == names
        assert torch.equal(found[EMBEDDING], plain) == (form is OMNI)
    assert tied_name(adapted(*FORMS["embeddings and head"]).get_base_model()) is None


@pytest.mark.parametrize(
    "form",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        OMNI | {"modules_to_save": ["embed_tokens"]},
        OMNI | {"modules_to_save": ["lm_head"]},
    ],
)
def test_one_weight_that_an_adapter_makes_two(form):
    """TRL sends one of them, or both their changes added up, which no forward of the policy computes with."""
    with pytest.raises(
        EngineError, match=rf"one weight for {EMBEDDING} and lm_head\.weight, which the adapter makes two"
    ):
        next(walk(adapted("tied", form)))


def test_what_cannot_be_merged():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.MultiheadAttention(8, 2)

    model = get_peft_model(Pooled(), LoraConfig(target_modules=["pool"]))
    with pytest.raises(EngineError, match=r"given pool: adapters of nn\.MultiheadAttention"):
        next(walk(model))
    model = get_peft_model(base("gpt2"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(EngineError, match="adapter of type PREFIX_TUNING: it has no weights to merge"):
        next(walk(model))


def test_a_model_without_adapters():
    model = base("qwen2_5_omni")
    assert same(list(walk(model)), list(model.named_parameters()))


def test_a_text_only_model_is_transferred_so_too(tmp_path):
    model, tokenizer = build_tiny_text()
    rows = Dataset.from_dict({"prompt": ["What?"] * 4})
    trainer = build_trainer(tmp_path, rows, model=model, processing_class=tokenizer)
    served = SimpleNamespace(use_vllm=True, vllm_engine_options=None)
    assert trainer._vllm_generation(served) is MergingGeneration
    assert trainer._vllm_generation(trainer.args) is None  # without vLLM there is none
