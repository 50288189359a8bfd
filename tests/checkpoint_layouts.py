"""Layouts in which weights of Omni models are published, written by hand: names, configs and processors of tiny models.

Names and configs are those of files that transformers before 5 wrote, as the published ones are.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import build_tiny, build_tiny_full


THINKERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
FULL = {"qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration", "qwen3_omni": "Qwen3OmniMoeForConditionalGeneration"}
VOCODERS = {"qwen2_5_omni": "token2wav", "qwen3_omni": "code2wav"}

Tensors = dict[str, torch.Tensor]


def thinker_tensors(family: str, fused: bool = False) -> Tensors:
    """The weights of `build_tiny(family)` by the names of published files, without a prefix: `model.layers.0...`."""
    tensors: Tensors = {}
    for name, tensor in build_tiny(family)[0].state_dict().items():
        name = re.sub(r"^model\.language_model\.", "model.", name)
        name = re.sub(r"^model\.(visual|audio_tower)\.", r"\1.", name)
        if ".mlp.experts." not in name or fused:
            tensors[name] = tensor.clone()
            continue
        start, _, part = name.rpartition(".")
        for expert, matrix in enumerate(tensor):
            pieces = {"down_proj": matrix}
            if part == "gate_up_proj":
                pieces = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            tensors |= {f"{start}.{expert}.{piece}.weight": value.clone() for piece, value in pieces.items()}
    return tensors


def prefixed(tensors: Tensors, prefix: str = "thinker.") -> Tensors:
    """The same weights below a prefix."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def speech_tensors(family: str) -> Tensors:
    """Weights of the parts that speak, as they stand beside the Thinker's."""
    names = ("talker.model.layers.0.self_attn.q_proj.weight", "talker.thinker_to_talker_proj.weight")
    names += (f"{VOCODERS[family]}.layers.0.weight",)
    return {name: torch.full((4, 4), float(place)) for place, name in enumerate(names)}


def _older(config: dict) -> dict:
    """The fields of a config as transformers before 5 wrote them."""
    older = {}
    for name, value in config.items():
        if name == "rope_parameters":
            if "mrope_section" in value:  # the towers' is no field of older configs
                rope = {key: value[key] for key in value if key not in ("rope_theta", "mrope_interleaved")}
                older |= {"rope_theta": value["rope_theta"], "rope_scaling": {**rope, "type": "default"}}
        elif name == "dtype":
            older["torch_dtype"] = value and str(value).removeprefix("torch.")
        else:
            older[name] = _older(value) if isinstance(value, dict) else value
    return older


# Fields that published configs have and no class of today.
LEFT_OVER = {
    "thinker_config": {"_attn_implementation_autoset": True, "init_std": 0.02, "bad_words_ids": None, "num_beams": 1},
    "audio_config": {"_name_or_path": "", "architectures": None, "encoder_layerdrop": 0.0, "num_hidden_layers": 1},
    "text_config": {"_name_or_path": "", "init_std": 0.02, "torchscript": False, "max_window_layers": 28},
    "vision_config": {"in_chans": 3, "tokens_per_second": 25, "spatial_patch_size": 14, "image_size": 768},
}


def thinker_config(family: str, **changed) -> dict:
    """The config of a Thinker's own checkpoint."""
    config = _older(build_tiny(family)[0].config.to_dict()) | LEFT_OVER["thinker_config"]
    for part in ("audio_config", "text_config", "vision_config"):
        config[part] |= LEFT_OVER[part]
    config["text_config"]["tie_word_embeddings"] = False
    config |= {"architectures": [THINKERS[family]], "transformers_version": "4.52.4", "torch_dtype": "float32"}
    return config | changed


def full_config(family: str, **changed) -> dict:
    """The config of a full checkpoint; the Thinker's has the names that the published one has."""
    config = _older(build_tiny_full(family)[0].config.to_dict())
    config["thinker_config"] = thinker_config(
        family,
        architectures=["Qwen2OmniNaViTThinkerForConditionalGeneration"],
        _name_or_path="Qwen2.5-Omni-7B/thinker",
    )
    config |= {"architectures": [FULL[family]], "enable_audio_output": True, "enable_talker": True}
    if family == "qwen3_omni":
        config["talker_config"]["model_type"] = ""
    return config | {"transformers_version": "4.50.0.dev0", "torch_dtype": "float32"} | changed


def write_weights(folder: Path, *shards: Tensors, index: bool | None = None) -> None:
    """Write one file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1 and not index:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_processor(folder: Path, family: str) -> None:
    """Write the processor in the files that transformers before 5 wrote."""
    processor = build_tiny(family)[1]
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    parts = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    older = parts["image_processor"] | parts["feature_extractor"] | {"processor_class": parts["processor_class"]}
    older |= {"min_pixels": older.pop("size")["shortest_edge"], "max_pixels": 50176}
    (folder / "preprocessor_config.json").write_text(json.dumps(older))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def write_checkpoint(folder: Path, family: str, config: dict, *shards: Tensors, processor: bool = True) -> Path:
    """Write config, weights and processor, and `generation_config.json` as a training run leaves it."""
    write_weights(folder, *shards)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"_from_model_config": true, "transformers_version": "4.52.4"}')
    if processor:
        write_processor(folder, family)
    return folder


def published(folder: Path, family: str) -> Path:
    """As Qwen publishes: the full model, the parts that speak in a shard of their own, and the voices as a pickle."""
    tensors = prefixed(thinker_tensors(family))
    names = sorted(tensors)
    shards = [{name: tensors[name] for name in names[start::2]} for start in (0, 1)]
    config = full_config(family)
    if family == "qwen2_5_omni":
        config["architectures"] = ["Qwen2_5OmniModel"]
    write_checkpoint(folder, family, config, *shards, speech_tensors(family))
    (folder / "spk_dict.pt").write_bytes(b"never to be read")
    return folder


def full_export(folder: Path, family: str) -> Path:
    """As ms-swift saves the merged model: the full config, of the weights the Thinker's alone, pickles beside."""
    config = full_config(family, enable_audio_output=False)
    text = config["thinker_config"]["text_config"]
    # What trainers look for at the top, and write there.
    config |= {name: text[name] for name in ("hidden_size", "eos_token_id", "pad_token_id")}
    write_checkpoint(folder, family, config, prefixed(thinker_tensors(family)))
    for name in ("spk_dict.pt", "training_args.bin"):
        (folder / name).write_bytes(b"never to be read")
    (folder / "args.json").write_text("{}")
    return folder


def thinker_only(folder: Path, family: str) -> Path:
    """As the Thinker's class saves itself, in trainers that train it alone."""
    return write_checkpoint(folder, family, thinker_config(family), thinker_tensors(family))


def thinker_under_full_config(folder: Path, family: str) -> Path:
    """The Thinker's weights without a prefix beside the config of the full model, copied from the base."""
    return write_checkpoint(folder, family, full_config(family), thinker_tensors(family))


def thinker_with_prefix(folder: Path, family: str) -> Path:
    """The Thinker's config beside names of the full model."""
    return write_checkpoint(folder, family, thinker_config(family), prefixed(thinker_tensors(family)))


def names_of_today(folder: Path, family: str) -> Path:
    """The names of the modules as they are, experts fused, below the prefix of the full model."""
    tensors = build_tiny(family)[0].state_dict()
    return write_checkpoint(folder, family, full_config(family), prefixed(dict(tensors)))


def fused_experts(folder: Path, family: str) -> Path:
    """Experts as one tensor a layer, under the older names of everything else."""
    return write_checkpoint(folder, family, full_config(family), prefixed(thinker_tensors(family, fused=True)))


def without_talker_config(folder: Path, family: str) -> Path:
    """As Qwen3-Omni's Thinking model is published: a full config that has no talker."""
    config = full_config(family, enable_audio_output=False)
    for name in ("talker_config", f"{VOCODERS[family]}_config"):
        del config[name]
    return write_checkpoint(folder, family, config, prefixed(thinker_tensors(family)))


LAYOUTS = {
    layout.__name__: layout
    for layout in (
        published,
        full_export,
        thinker_only,
        thinker_under_full_config,
        thinker_with_prefix,
        names_of_today,
        fused_experts,
        without_talker_config,
    )
}


def copy(folder: Path, target: Path, *left_out: str) -> Path:
    """Copy a checkpoint without some of its files."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*left_out))
    return target
