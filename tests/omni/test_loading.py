"""Loading models: the part that can be trained, whole, or an error that says what is missing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny, build_tiny_text, save_tiny, save_tiny_full

from maple_trl.omni.loading import load_model, load_processor, resolve_checkpoint


def test_embedded_model_by_name():
    model = load_model("builtin:tiny-omni")
    assert model.config.model_type == "qwen2_5_omni_thinker"
    assert sum(p.numel() for p in model.parameters()) < 400_000
    assert load_processor("builtin:tiny-omni").tokenizer.padding_side == "left"
    with pytest.raises(ValueError, match="no embedded model 'builtin:huge'; embedded: builtin:tiny-omni"):
        resolve_checkpoint("builtin:huge")
    assert resolve_checkpoint("org/name") == "org/name"


def test_precision_is_that_asked_for(tmp_path):
    folder = str(save_tiny("qwen2_5_vl", tmp_path))
    assert load_model(folder).dtype is torch.float32
    assert load_model(folder, dtype="bfloat16").dtype is torch.bfloat16
    assert load_model(folder, torch_dtype="bfloat16").dtype is torch.bfloat16
    with pytest.raises(ValueError, match="dtype 'bf16' is unknown; e.g. 'float32'"):
        load_model(folder, dtype="bf16")


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni"])
def test_a_full_checkpoint_gives_its_thinker_and_nothing_else(family, tmp_path):
    folder = save_tiny_full(family, tmp_path)
    thinker, _ = build_tiny(family)
    model = load_model(str(folder))
    assert type(model) is type(thinker) and not hasattr(model, "talker")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in thinker.state_dict().items())


def test_missing_weights_are_named_not_drawn_at_random(tmp_path):
    folder = save_tiny("qwen2_5_omni", tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "audio_tower" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of Qwen2_5OmniThinkerForConditionalGeneration are not in the"):
        load_model(str(folder))


def test_an_unknown_architecture_is_named(tmp_path):
    folder = save_tiny("qwen2_5_vl", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match="no architecture 'NoSuchModel'"):
        load_model(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    with pytest.raises(ValueError, match='names no class of transformers: it needs "architectures"'):
        load_model(str(folder))


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a LoRA adapter, not a model: merge it"):
        load_model(str(tmp_path))


def test_the_processor_of_a_text_model_is_its_tokenizer(tmp_path):
    model, tokenizer = build_tiny_text()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_processor(str(tmp_path)).padding_side == "left"
