"""LoRA adapters by the names that other trainers give: on the Thinker they compute what they computed, or are refused."""

import json
import logging
import re
from pathlib import Path

import checkpoint_layouts as layouts
import pytest
import torch
from local_hub import taken_for_the_hub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny, encode_sample, sample_media

from maple_trl.omni.adapters import adapted_model, fetch_adapter, load_adapter, processor_beside
from maple_trl.omni.checkpoints import CheckpointError
from maple_trl.omni.layouts import name_in_files
from maple_trl.omni.loading import load_model


OMNI = "qwen2_5_omni"
ALPHA_OVER_R = 2.0
# The last names of layers, as trainers of all linear layers write them.
LINEAR = {OMNI: ["q_proj", "up_proj", "proj", "fc1"], "qwen3_omni": ["q_proj", "linear_fc1", "proj", "fc1"]}


def lora_config(targets, **changed) -> dict:
    return {
        "base_model_name_or_path": "Qwen2.5-Omni-7B/thinker",
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    } | changed


def drawn(family: str, pattern: str) -> tuple[layouts.Tensors, layouts.Tensors]:
    """A LoRA pair for each matrix whose name in files matches, and the Thinker's weights with these merged by hand."""
    random = torch.Generator().manual_seed(5)
    adapter, merged = {}, layouts.thinker_tensors(family)
    for name in sorted(merged):
        module = name.removesuffix(".weight")
        if module == name or merged[name].dim() != 2 or not re.search(pattern, module):
            continue
        rows, columns = merged[name].shape
        low, high = torch.randn(2, columns, generator=random) / 8, torch.randn(rows, 2, generator=random)
        adapter |= {f"{module}.lora_A.weight": low, f"{module}.lora_B.weight": high}
        merged[name] = merged[name] + ALPHA_OVER_R * high @ low
    assert adapter
    return adapter, merged


def write_adapter(folder, adapter, config, prefix="base_model.model.thinker."):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(layouts.prefixed(adapter, prefix), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def logits(model, family):
    processor = build_tiny(family)[1]
    with torch.no_grad():
        return model.eval()(**encode_sample(family, processor, [sample_media(family, seed=3)])).logits


def merged_logits(folder, family, merged):
    return logits(
        load_model(str(layouts.write_checkpoint(folder, family, layouts.thinker_config(family), merged))), family
    )


def targets(kind: str, family: str, adapter: layouts.Tensors):
    modules = sorted({name.partition(".lora_")[0] for name in adapter})
    if kind == "pattern":  # as ms-swift writes them, for the whole model
        leaves = "|".join(LINEAR[family])
        return rf"^(thinker\.(model|visual|audio_tower)(?=\.).*\.({leaves}))$"
    return {"last names": LINEAR[family], "whole": [f"thinker.{name}" for name in modules], "bare": modules}[kind]


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize("kind", ["pattern", "last names", "whole", "bare"])
@pytest.mark.parametrize("prefix", ["base_model.model.thinker.", "base_model.model."])
@pytest.mark.matrix(cases=3)
def test_an_adapter_computes_what_it_computed(prefix, kind, family, tmp_path):
    leaves = "|".join(LINEAR[family])
    adapter, merged = drawn(family, rf"(self_attn\.q_proj|mlp\.up_proj|\.({leaves}))$")
    folder = write_adapter(tmp_path / "adapter", adapter, lora_config(targets(kind, family, adapter)), prefix)
    wanted = merged_logits(tmp_path / "merged", family, merged)
    base = build_tiny(family)[0]
    plain = logits(base, family)
    found = logits(load_adapter(base, folder), family)
    assert (found - wanted).abs().max() < 1e-4 < 0.1 < (found - plain).abs().max()


def test_experts_adapted_one_by_one_are_fused_with_the_layers(tmp_path):
    family = "qwen3_omni"
    adapter, merged = drawn(family, r"(mlp\.experts\.\d+\.\w+|self_attn\.q_proj)$")
    pattern = r"^(thinker\.model(?=\.).*\.(q_proj|gate_proj|up_proj|down_proj))$"
    folder = write_adapter(tmp_path / "adapter", adapter, lora_config(pattern))
    wanted = merged_logits(tmp_path / "merged", family, merged)
    base = build_tiny(family)[0]
    plain = logits(base, family)
    found = logits(load_adapter(base, folder), family)
    assert (found - wanted).abs().max() < 1e-4 < 0.1 < (found - plain).abs().max()


def test_a_rank_of_its_own_has_its_own_scale(tmp_path):
    """By patterns, which name layers of the full model."""
    adapter, merged = drawn(OMNI, r"layers\.0\.self_attn\.q_proj$")
    other, more = drawn(OMNI, r"layers\.1\.self_attn\.q_proj$")
    original = layouts.thinker_tensors(OMNI)
    for name, tensor in more.items():  # twice the usual scale
        merged[name] = merged[name] + 2 * (tensor - original[name])
    config = lora_config(["q_proj"], alpha_pattern={"thinker.model.layers.1.self_attn.q_proj": 8})
    folder = write_adapter(tmp_path / "adapter", adapter | other, config)
    found = logits(load_adapter(build_tiny(OMNI)[0], folder), OMNI)
    assert (found - merged_logits(tmp_path / "merged", OMNI, merged)).abs().max() < 1e-4


def test_it_is_trained_on_and_saved_by_the_names_of_here(tmp_path):
    adapter, _ = drawn(OMNI, r"self_attn\.q_proj$")
    folder = write_adapter(tmp_path / "adapter", adapter, lora_config(["q_proj"]))
    model = load_adapter(build_tiny(OMNI)[0], folder, trainable=True)
    assert sum(p.requires_grad for p in model.parameters()) == len(adapter)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/adapter_model.safetensors")
    assert {name_in_files(name.removeprefix("base_model.model.")) for name in saved} == adapter.keys()
    again = load_adapter(build_tiny(OMNI)[0], str(tmp_path / "saved"))
    assert torch.equal(logits(again, OMNI), logits(model, OMNI))


def test_an_adapter_for_speech_is_counted_and_left_out(tmp_path, caplog):
    adapter, merged = drawn(OMNI, r"self_attn\.q_proj$")
    spoken = {"talker.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
    tensors = layouts.prefixed(adapter, "thinker.") | spoken
    folder = write_adapter(tmp_path / "adapter", tensors, lora_config(["q_proj"]), "base_model.model.")
    with caplog.at_level(logging.INFO, logger="maple_trl"):
        found = logits(load_adapter(build_tiny(OMNI)[0], folder), OMNI)
    assert "1 weights for parts that speak are not read" in caplog.text
    assert (found - merged_logits(tmp_path / "merged", OMNI, merged)).abs().max() < 1e-4


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    adapter, _ = drawn(OMNI, r"self_attn\.q_proj$")
    config = lora_config(["q_proj"])
    other = {"model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}
    deeper = write_adapter(tmp_path / "deeper", adapter | other, config)
    fits = (
        f"1 of the {len(adapter) + 1} weights of this adapter fit no layer of Qwen2_5OmniThinker.*layers.7.self_attn"
    )
    with pytest.raises(CheckpointError, match=fits):
        load_adapter(build_tiny(OMNI)[0], deeper)
    outside = write_adapter(tmp_path / "outside", adapter, config, "thinker.base_model.model.")
    with pytest.raises(CheckpointError, match=r"e.g. 'thinker.base_model.model.audio_tower"):
        load_adapter(build_tiny(OMNI)[0], outside)
    half = {name: value for name, value in adapter.items() if "lora_B" not in name}
    with pytest.raises(CheckpointError, match="missing adapter keys"):
        load_adapter(build_tiny(OMNI)[0], write_adapter(tmp_path / "half", half, config))
    pickled = write_adapter(tmp_path / "pickled", adapter, config)
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"Pickled ones \(adapter_model.bin\) are not read"):
        load_adapter(build_tiny(OMNI)[0], pickled)


def changed_config(**changes):
    return lambda folder: (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((folder / "adapter_config.json").read_text()) | changes)
    )


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            changed_config(r=3),
            r"size mismatch for .*\(\d more of the kind\): its adapter_config.json is of another adapter",
        ),
        (changed_config(r="four"), "its adapter_config.json is of another adapter than its weights"),
        (changed_config(peft_type="IA9"), "adapter_config.json cannot be read: KeyError: 'IA9'"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("[1]"),
            "adapter_config.json cannot be read: TypeE",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read: JSOND"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
            "adapter_model.safetensors is damaged",
        ),
    ],
)
def test_a_spoilt_adapter_is_refused_by_name(spoil, message, tmp_path):
    adapter, _ = drawn(OMNI, r"self_attn\.q_proj$")
    folder = write_adapter(tmp_path, adapter, lora_config(["q_proj"]))
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(build_tiny(OMNI)[0], folder)


def test_an_adapter_of_nan_is_refused(tmp_path):
    adapter, _ = drawn(OMNI, r"self_attn\.q_proj$")
    adapter[sorted(adapter)[0]] *= float("nan")
    with pytest.raises(CheckpointError, match="has numbers that are not finite"):
        load_adapter(build_tiny(OMNI)[0], write_adapter(tmp_path, adapter, lora_config(["q_proj"])))


@pytest.mark.parametrize("form", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}])
def test_forms_of_lora_come_back_as_they_were_saved(form, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **form)
    model = get_peft_model(build_tiny(OMNI)[0], config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "modules_to_save" in name:
                parameter += 0.5
    model.save_pretrained(tmp_path)
    wanted = logits(model, OMNI)
    assert torch.equal(logits(load_adapter(build_tiny(OMNI)[0], str(tmp_path)), OMNI), wanted)
    assert not torch.equal(wanted, logits(build_tiny(OMNI)[0], OMNI))


def test_an_adapter_of_another_family_is_as_before(tmp_path):
    """Its names are PEFT's business; that it is there whole is not."""
    model = get_peft_model(
        build_tiny("qwen2_5_vl")[0], LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    loaded = load_adapter(build_tiny("qwen2_5_vl")[0], str(tmp_path))
    assert torch.equal(logits(loaded, "qwen2_5_vl"), logits(model, "qwen2_5_vl"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    fewer = {"target_modules": ["model.language_model.layers.0.self_attn.q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | fewer))
    with pytest.raises(CheckpointError, match="4 weights of LoRA, e.g. .* of which the model took 2"):
        load_adapter(build_tiny("qwen2_5_vl")[0], str(tmp_path))


def test_an_adapter_of_parameters(tmp_path):
    """Of the fused experts as they are here."""
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(build_tiny("qwen3_omni")[0], config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    model.save_pretrained(tmp_path)
    loaded = load_adapter(build_tiny("qwen3_omni")[0], str(tmp_path))
    assert torch.equal(logits(loaded, "qwen3_omni"), logits(model, "qwen3_omni"))


def test_the_model_below_an_adapter(tmp_path):
    assert adapted_model("adapter", "Qwen/Qwen2.5-Omni-7B") == "Qwen/Qwen2.5-Omni-7B"
    assert adapted_model("adapter", "Qwen/Qwen2.5-Omni-7B/thinker") == "Qwen/Qwen2.5-Omni-7B"
    (tmp_path / "omni").mkdir()
    assert adapted_model("adapter", f"{tmp_path}/omni/thinker") == f"{tmp_path}/omni"
    (tmp_path / "omni/thinker").mkdir()
    assert adapted_model("adapter", f"{tmp_path}/omni/thinker") == f"{tmp_path}/omni/thinker"
    with pytest.raises(CheckpointError, match=r"--model Qwen/Qwen2.5-Omni-7B --adapter lora$"):
        adapted_model("lora", "Qwen2.5-Omni-7B/thinker")


def test_from_the_hub(monkeypatch, tmp_path):
    adapter, _ = drawn(OMNI, r"self_attn\.q_proj$")
    folder = write_adapter(tmp_path / "adapter", adapter, lora_config(["q_proj"]))
    layouts.write_processor(tmp_path / "adapter", OMNI)
    (tmp_path / "adapter/training_args.bin").write_bytes(b"never to be read")
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with taken_for_the_hub(monkeypatch, tmp_path / "cache") as hub:
        first = hub.publish("org/adapter", files)
        hub.publish("org/adapter", files | {"README.md": b"newer"})
        hub.publish("org/model", {"config.json": b"{}"})
        fetched = fetch_adapter("org/adapter", first)
        assert first in fetched and fetch_adapter("org/model") is None
        assert not any(".bin" in path for _, path, _ in hub.requests)
    names = {path.name for path in Path(fetched).iterdir()}
    assert names == files.keys() - {"training_args.bin"}
    wanted = logits(load_adapter(build_tiny(OMNI)[0], folder), OMNI)
    assert torch.equal(logits(load_adapter(build_tiny(OMNI)[0], fetched), OMNI), wanted)


def test_a_tokenizer_beside_an_adapter_is_no_processor(tmp_path):
    adapter, _ = drawn(OMNI, r"self_attn\.q_proj$")
    folder = write_adapter(tmp_path, adapter, lora_config(["q_proj"]))
    assert fetch_adapter(folder) == folder and fetch_adapter(str(tmp_path.parent)) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not processor_beside(folder)
    layouts.write_processor(tmp_path, OMNI)
    assert processor_beside(folder)
