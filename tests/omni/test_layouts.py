"""Published checkpoints of Omni models: every layout gives the same Thinker, and what does not fit is refused by name."""

import json
import logging
import pickle
import re
from collections import Counter

import checkpoint_layouts as layouts
import pytest
import torch
from local_hub import taken_for_the_hub
from safetensors.torch import load_file
from tiny_models import build_tiny, build_tiny_full, encode_sample, sample_media
from transformers import (
    PreTrainedModel,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from maple_trl.omni.checkpoints import CheckpointError, check_checkpoint, reach
from maple_trl.omni.layouts import name_in_class, name_in_files
from maple_trl.omni.loading import check_tokens, load_model, load_processor


FAMILIES = ["qwen2_5_omni", "qwen3_omni"]
OMNI = "qwen2_5_omni"


@pytest.fixture(scope="module")
def expected():
    """Per family: inputs with video and sound, and the logits of transformers' full model for them."""
    found = {}
    for family in FAMILIES:
        model, processor = build_tiny_full(family)
        inputs = encode_sample(family, processor, [sample_media(family, seed=3)])
        with torch.no_grad():
            found[family] = inputs, model.thinker(**inputs).logits
    return found


def assert_same(model, family, expected):
    state = model.state_dict()
    thinker = build_tiny(family)[0].state_dict()
    assert state.keys() == thinker.keys()
    assert all(torch.equal(value, state[name]) for name, value in thinker.items())
    inputs, logits = expected[family]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.matrix(cases=3)
def test_every_layout_gives_the_same_thinker(layout, family, expected, tmp_path):
    folder = layouts.LAYOUTS[layout](tmp_path / "model", family)
    check_checkpoint(str(folder), {})
    model = load_model(str(folder))
    assert_same(model, family, expected)
    assert model.name_or_path == model.config.name_or_path == str(folder)
    processor = load_processor(str(folder))
    assert type(processor) is type(build_tiny(family)[1])
    again = encode_sample(family, processor, [sample_media(family, seed=3)])
    assert all(torch.equal(value, again[name]) for name, value in expected[family][0].items())
    model.save_pretrained(tmp_path / "again")
    assert_same(load_model(str(tmp_path / "again")), family, expected)


def test_the_full_class_of_transformers_reads_the_stand_in_alike(expected, tmp_path):
    folder = layouts.full_export(tmp_path, "qwen3_omni")
    full = Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder).eval()
    assert not full.has_talker
    assert_same(full.thinker, "qwen3_omni", expected)


def test_a_changed_weight_is_seen(expected, tmp_path):
    """What shows that the comparison above can fail."""
    tensors = layouts.thinker_tensors(OMNI)
    tensors["visual.blocks.0.attn.q.weight"][0, 0] += 1
    model = load_model(str(layouts.write_checkpoint(tmp_path, OMNI, layouts.thinker_config(OMNI), tensors)))
    with pytest.raises(AssertionError):
        assert_same(model, OMNI, expected)


def test_precision_is_that_of_the_thinker(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in layouts.thinker_tensors(OMNI).items()}
    for written in ("bfloat16", None):  # where it is not written, the weights have it
        config = layouts.full_config(OMNI, torch_dtype="bfloat16")
        config["thinker_config"]["torch_dtype"] = written
        folder = layouts.write_checkpoint(tmp_path / str(written), OMNI, config, layouts.prefixed(tensors))
        assert load_model(str(folder), dtype="auto").dtype is torch.bfloat16


def test_names_go_both_ways():
    for family in FAMILIES:
        for name in build_tiny(family)[0].state_dict():
            in_files = name_in_files(name)
            assert name_in_class(in_files) == name_in_class(f"thinker.{in_files}") == name
            assert name_in_class(name) == name_in_class(f"thinker.{name}") == name
            assert "language_model" not in in_files


# Models of full size, without their weights


def test_a_published_7b_model_has_these_weights():
    """As many weights and parameters, part by part, as the Hub counts in a model trained from Qwen2.5-Omni-7B."""
    audio = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    config = Qwen2_5OmniThinkerConfig(
        audio_config={**audio, "num_mel_bins": 128, "output_dim": 3584},
        vision_config=vision,
        text_config={**text, "num_key_value_heads": 4, "vocab_size": 152064},
    )
    with torch.device("meta"):
        state = Qwen2_5OmniThinkerForConditionalGeneration(config).state_dict()
    parts = Counter(name_in_files(name).partition(".")[0] for name in state)
    assert parts == {"visual": 518, "audio_tower": 489, "model": 338, "lm_head": 1}
    assert sum(value.numel() for value in state.values()) == 8_931_813_888


def test_a_published_30b_model_has_these_weights():
    audio = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048}
    text = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = Qwen3OmniMoeThinkerConfig(
        audio_config={**audio, "num_mel_bins": 128, "output_dim": 2048, "downsample_hidden_size": 480},
        vision_config={**vision, "deepstack_visual_indexes": [8, 16, 24], "num_position_embeddings": 2304},
        text_config={**text, "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768, "vocab_size": 152064},
    )
    with torch.device("meta"):
        model = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    assert sum(value.numel() for value in model.parameters()) == 31_719_205_488


# What is not read


class Told:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_no_pickle_is_read(expected, tmp_path):
    ran = tmp_path / "ran"
    poison = pickle.dumps(Told(ran))
    folder = layouts.thinker_only(tmp_path / "model", OMNI)
    for name in ("spk_dict.pt", "training_args.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(poison)
    assert_same(load_model(str(folder)), OMNI, expected)
    (folder / "model.safetensors").unlink()
    for read in (lambda: check_checkpoint(str(folder), {}), lambda: load_model(str(folder))):
        with pytest.raises(CheckpointError, match=r"pickled ones \(pytorch_model.bin\) are not read"):
            read()
    assert not ran.exists()
    pickle.loads(poison)
    assert ran.exists()


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    """Of a model that transformers has not, as Ola is published: it is refused by its type."""
    folder = layouts.thinker_only(tmp_path / "model", OMNI)
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    config = {
        "model_type": "ola_qwen",
        "architectures": ["OlaQwenForCausalLM"],
        "auto_map": {"AutoConfig": "own.Config"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for read in (lambda: check_checkpoint(str(folder), {}), lambda: load_model(str(folder))):
        with pytest.raises(
            CheckpointError, match="is of model type 'ola_qwen', which the installed transformers cannot"
        ):
            read()
    assert not ran.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_that_speak_are_counted_once(family, tmp_path, caplog):
    folder = str(layouts.published(tmp_path / "model", family))
    with caplog.at_level(logging.INFO, logger="maple_trl"):
        load_model(folder)
        load_model(folder)
    told = [record.message for record in caplog.records if "parts that speak" in record.message]
    vocoder = layouts.VOCODERS[family]
    parts = sorted([f"{vocoder} 1", "talker 2"])
    assert told == [f"{folder}: 3 weights of parts that speak are not read ({', '.join(parts)})"]


def test_files_of_parts_that_speak_are_not_needed(expected, tmp_path):
    folder = layouts.published(tmp_path / "model", OMNI)
    (folder / "model-00003-of-00003.safetensors").unlink()
    check_checkpoint(str(folder), {})
    assert_same(load_model(str(folder)), OMNI, expected)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = "lacks 1 of the 2 files of weights that model.safetensors.index.json lists, e.g. model-00002-of-00003"
    for read in (lambda: check_checkpoint(str(folder), {}), lambda: load_model(str(folder))):
        with pytest.raises(CheckpointError, match=message):
            read()


# What is refused


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


THINKER = layouts.thinker_tensors(OMNI)
REFUSED = {
    "a tower is missing": (
        {name: value for name, value in THINKER.items() if not name.startswith("audio_tower")},
        r"24 weights of Qwen2_5OmniThinkerForConditionalGeneration are not in the checkpoint, e.g. "
        r"'audio_tower.audio_bos_eos_token.weight'.*it holds 65, e.g. 'lm_head.weight'.*Read are the weights of a full",
    ),
    "no head": (without(THINKER, "lm_head.weight"), r"e.g. 'lm_head.weight'.*needs \"tie_word_embeddings\": true"),
    "speech alone": (layouts.speech_tensors(OMNI), "it holds 3 weights, all of parts that speak"),
    "a part is added": (THINKER | {"v_head.weight": torch.ones(1)}, "1 of its weights are none of .*'v_head.weight'"),
    "a layer too many": (
        THINKER | {"model.layers.2.mlp.up_proj.weight": torch.ones(1)},
        "none of Qwen2_5OmniThinker.* as its config.json describes it, e.g. 'model.layers.2.mlp.up_proj.weight'",
    ),
    "another shape": (
        THINKER | {"lm_head.weight": torch.ones(3, 64)},
        r"'lm_head.weight' has \(3, 64\), not \(454, 64\): config.json is of another model",
    ),
    "an adapter inside": (layouts.prefixed(THINKER, "base_model.model."), "base_model.model. are PEFT's: merge the"),
    "compiled": (layouts.prefixed(THINKER, "_orig_mod."), "those of a compiled model: save the model inside"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case, tmp_path):
    tensors, message = REFUSED[case]
    folder = layouts.write_checkpoint(tmp_path, OMNI, layouts.thinker_config(OMNI), tensors)
    with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL)):
        load_model(str(folder))


def test_a_weight_that_stands_twice_is_refused(tmp_path):
    """Whatever its values are: which one is taken is not for the order of files to say."""
    norm = {"thinker.model.norm.weight": THINKER["model.norm.weight"].clone()}
    mixed = layouts.write_checkpoint(tmp_path / "mixed", OMNI, layouts.thinker_config(OMNI), THINKER | norm)
    with pytest.raises(
        CheckpointError, match=r"twice, as '(thinker\.)?model.norm.weight' and as '(thinker\.)?model.norm"
    ):
        load_model(str(mixed))
    names = sorted(THINKER)
    shards = {name: THINKER[name] for name in names[:40]}, {name: THINKER[name] for name in names[39:]}
    overlapping = layouts.write_checkpoint(tmp_path / "two", OMNI, layouts.thinker_config(OMNI), *shards)
    message = f"has {names[39]!r} twice, in model-00001-of-00002.safetensors and in model-00002-of"
    for read in (lambda: check_checkpoint(str(overlapping), {}), lambda: load_model(str(overlapping))):
        with pytest.raises(CheckpointError, match=message):
            read()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{nope", "is damaged: it is no JSON"),
        ("[]", "is no index of weights: it must be"),
        ('{"metadata": {}, "weight_map": ["a"]}', "is no index of weights"),
        ('{"metadata": {}, "weight_map": {}}', "is no index of weights"),
        ('{"weight_map": {"a": "model.safetensors"}}', "is no index of weights"),
        ('{"metadata": {}, "weight_map": {"a": 3}}', "'a' must be in a .safetensors file beside it, not in 3"),
        ('{"metadata": {}, "weight_map": {"a": "../b.safetensors"}}', "not in '../b.safetensors'"),
        ('{"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}', "not in 'pytorch_model.bin'"),
        ('{"metadata": {}, "weight_map": {"a": "whole.safetensors"}}', "whole.safetensors lacks 'a', which its index"),
    ],
)
def test_an_index_that_is_none_is_refused(text, message, tmp_path):
    folder = layouts.write_checkpoint(tmp_path, OMNI, layouts.thinker_config(OMNI), THINKER)
    (folder / "model.safetensors").rename(folder / "whole.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    for read in (lambda: check_checkpoint(str(folder), {}), lambda: load_model(str(folder))):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            read()


@pytest.mark.parametrize("part", ["text_config", "vision_config", "audio_config", "thinker_config"])
def test_a_config_without_a_part_is_refused_before_a_model_is_made(part, tmp_path, monkeypatch):
    """Its class would be made at the size of the published one, of weights drawn at random."""
    config = layouts.full_config(OMNI)
    (config if part == "thinker_config" else config["thinker_config"])[part] = None
    folder = layouts.write_checkpoint(tmp_path, OMNI, config, layouts.prefixed(THINKER))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with pytest.raises(
        CheckpointError, match=f"config.json has no {'text_config' if part == 'thinker_config' else part}"
    ):
        load_model(str(folder))


# Heads that share the embedding


def test_a_head_of_its_own_stays_its_own(expected, tmp_path):
    """Also where the config says that it is tied, which older releases wrote of every Thinker."""
    config = layouts.thinker_config(OMNI, tie_word_embeddings=True)
    model = load_model(str(layouts.write_checkpoint(tmp_path, OMNI, config, THINKER)))
    model.tie_weights()  # as PEFT and accelerate do
    assert_same(model, OMNI, expected)


@pytest.mark.parametrize("where", ["thinker", "text"])
def test_a_tied_head_is_tied(where, tmp_path):
    config = layouts.thinker_config(OMNI, tie_word_embeddings=True)
    if where == "text":  # which older releases asked
        del config["tie_word_embeddings"]
        config["text_config"]["tie_word_embeddings"] = True
    folder = layouts.write_checkpoint(tmp_path, OMNI, config, without(THINKER, "lm_head.weight"))
    model = load_model(str(folder))
    assert torch.equal(model.lm_head.weight, THINKER["model.embed_tokens.weight"])
    assert model.lm_head.weight is model.get_input_embeddings().weight


# Processors


def test_a_processor_that_is_missing_is_named(tmp_path):
    folder = layouts.thinker_only(tmp_path / "whole", OMNI)
    said = "take that of the model that it was trained from"
    bare = layouts.copy(folder, tmp_path / "bare", "*token*", "*preprocessor*", "chat_template*")
    with pytest.raises(CheckpointError, match=f"without its tokenizer.*{said}"):
        check_checkpoint(str(bare), {})
    with pytest.raises(CheckpointError, match=said):
        load_processor(str(bare))
    nothing_of_media = layouts.copy(folder, tmp_path / "tokenizer", "*preprocessor*")
    with pytest.raises(CheckpointError, match=f"Can't load image processor.*{said}"):
        load_processor(str(nothing_of_media))
    unnamed = layouts.copy(folder, tmp_path / "unnamed")
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        written = json.loads((unnamed / name).read_text())
        (unnamed / name).write_text(json.dumps({key: written[key] for key in written if key != "processor_class"}))
    with pytest.raises(CheckpointError, match=f"holds a tokenizer, but not the processor of media.*{said}"):
        load_processor(str(unnamed))
    untold = layouts.copy(folder, tmp_path / "untold", "chat_template*")
    with pytest.raises(CheckpointError, match=f"has no chat template; {said}"):
        load_processor(str(untold))


def test_a_processor_of_another_model_is_refused():
    config = build_tiny(OMNI)[0].config
    other = build_tiny("qwen3_omni")[1]
    check_tokens(build_tiny(OMNI)[1], config, "fits")
    config.audio_token_index += 1
    with pytest.raises(
        CheckpointError, match=r"processor in other is of another model: its token '<\|audio_pad\|>' is"
    ):
        check_tokens(other, config, "other")


# From the Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with taken_for_the_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_from_the_hub_come_only_the_files_that_are_read(hub, expected, tmp_path):
    commit = hub.publish("org/omni", files_of(layouts.published(tmp_path / "model", OMNI)))
    options = {"cache_dir": str(tmp_path / "cache")}
    model = load_model("org/omni", **options)
    assert_same(model, OMNI, expected)
    assert model.name_or_path == "org/omni" and model.config._commit_hash == commit
    assert type(load_processor("org/omni", **options)) is type(build_tiny(OMNI)[1])
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET"}
    assert {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "tokenizer.json"} <= fetched
    asked = " ".join(path for _, path, _ in hub.requests)
    assert "model-00003" not in asked and "spk_dict" not in asked and ".bin" not in asked

    hub.requests.clear()
    offline = options | {"local_files_only": True}
    assert reach("org/omni", offline) == offline
    assert_same(load_model("org/omni", **offline), OMNI, expected)
    assert not hub.requests


def test_a_revision_is_that_asked_for(hub, expected, tmp_path):
    options = {"cache_dir": str(tmp_path / "cache")}
    first = hub.publish("org/omni", files_of(layouts.published(tmp_path / "first", OMNI)))
    tensors = layouts.thinker_tensors(OMNI)
    tensors["lm_head.weight"] += 1
    second = layouts.write_checkpoint(tmp_path / "second", OMNI, layouts.thinker_config(OMNI), tensors)
    hub.publish("org/omni", files_of(second))
    assert_same(load_model("org/omni", revision=first, **options), OMNI, expected)
    newest = load_model("org/omni", **options)
    assert torch.equal(newest.lm_head.weight, tensors["lm_head.weight"])


def test_pickles_on_the_hub_are_not_fetched(hub, tmp_path):
    files = files_of(layouts.thinker_only(tmp_path / "model", OMNI))
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.publish("org/pickled", files)
    with pytest.raises(CheckpointError, match="org/pickled has no weights as safetensors.*are not read"):
        load_model("org/pickled", cache_dir=str(tmp_path / "cache"))
    assert not any("pytorch_model" in path for _, path, _ in hub.requests)


def test_what_is_saved_has_the_names_of_files(tmp_path):
    """So that other programs read it."""
    model = load_model(str(layouts.thinker_only(tmp_path / "model", OMNI)))
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved/model.safetensors").keys() == THINKER.keys()
    assert json.loads((tmp_path / "saved/config.json").read_text())["architectures"] == [layouts.THINKERS[OMNI]]
