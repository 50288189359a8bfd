"""Trained models are exported merged, as a Thinker or as the full model again, whole or not at all."""

import copy
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import checkpoint_layouts as layouts
import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import FAMILIES, build_processor, build_tiny, build_tiny_full, encode_sample, sample_media
from transformers import Qwen2_5OmniForConditionalGeneration, Qwen3OmniMoeForConditionalGeneration

from maple_trl import cli
from maple_trl.omni import export as exports
from maple_trl.omni.adapters import load_whole
from maple_trl.omni.export import ExportError, export_model
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model
from maple_trl.omni.lora import build_lora_config


ROOT = Path(__file__).resolve().parents[2]
OMNI = ("qwen2_5_omni", "qwen3_omni")
CLASSES = {"qwen2_5_omni": Qwen2_5OmniForConditionalGeneration, "qwen3_omni": Qwen3OmniMoeForConditionalGeneration}


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def bits(tensor):
    """The content, of which no number need be one: the classes leave some weights as memory was."""
    return tensor.contiguous().numpy().tobytes()


def trained(folder, family):
    """A run that changed every weight of the Thinker."""
    model, processor = build_tiny(family)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def adapter(folder, base, family):
    """An adapter over all parts, with weights that change the model."""
    model = load_model(str(base))
    adapted = get_peft_model(
        model, build_lora_config(model, family_for(model, build_processor(family)), r=2, console=Console(quiet=True))
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By family: the original as it is published, and a full run from it."""
    folder = tmp_path_factory.mktemp("exports")
    return {
        family: (layouts.published(folder / f"{family}-full", family), trained(folder / f"{family}-run", family))
        for family in OMNI
    }


def logits(model, family):
    """Of transformers' own forward, on a clip and its sound."""
    inputs = encode_sample(family, build_processor(family), [sample_media(family)])
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", OMNI)
@pytest.mark.matrix(cases=1)
def test_the_full_model_is_rebuilt(family, runs, tmp_path):
    original, run = runs[family]
    words = ["export", str(run), str(tmp_path / "full"), "--parts", "full", "--original", str(original)]
    assert cli.main(words) == 0
    before, after = tensors_of(original), tensors_of(tmp_path / "full")
    # The names are those of the layout that was written by hand: what transformers and vLLM read.
    assert after.keys() == before.keys()
    spoken = {name for name in before if not name.startswith("thinker.")}
    assert spoken and all(torch.equal(before[name], after[name]) for name in spoken)
    assert all(not torch.equal(before[name], after[name]) for name in before.keys() - spoken)
    index = json.loads((tmp_path / "full/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    for name in (
        "config.json",
        "generation_config.json",
        "spk_dict.pt",
        "preprocessor_config.json",
        "chat_template.json",
    ):
        if (original / name).is_file():
            assert (tmp_path / "full" / name).read_bytes() == (original / name).read_bytes(), name
    mine = load_model(str(run))
    assert torch.equal(logits(load_model(str(tmp_path / "full")), family), logits(mine, family))
    card = ModelCard.load(tmp_path / "full/README.md")
    assert card.data.pipeline_tag == "any-to-any" and "its talker and vocoder are those of the original" in card.text


@pytest.mark.parametrize("family", OMNI)
@pytest.mark.matrix(cases=1)
def test_the_omni_classes_load_it_with_talker_and_voices(family, runs, tmp_path):
    """From an original with all weights of these parts, which transformers saved."""
    whole, processor = build_tiny_full(family, seed=3)
    whole.save_pretrained(tmp_path / "original")
    processor.save_pretrained(tmp_path / "original")
    torch.save({"Chelsie": {"bos_token": 1, "cond": torch.ones(2)}}, tmp_path / "original/spk_dict.pt")
    _, run = runs[family]
    export_model(str(run), tmp_path / "full", "full", str(tmp_path / "original"), max_shard_size="200KB")
    found = CLASSES[family].from_pretrained(tmp_path / "full", dtype=torch.float32)
    theirs = CLASSES[family].from_pretrained(tmp_path / "original", dtype=torch.float32)
    before, after = theirs.state_dict(), found.state_dict()
    assert before.keys() == after.keys()
    spoken = [name for name in before if not name.startswith("thinker.")]
    assert len(spoken) > 20 and all(bits(before[name]) == bits(after[name]) for name in spoken)
    mine = load_model(str(run))
    assert all(torch.equal(after[f"thinker.{name}"], tensor) for name, tensor in mine.state_dict().items())
    assert torch.equal(logits(found.thinker.eval(), family), logits(mine, family))
    # vLLM asks this part whether the head has weights of its own, and transformers wrote a default there.
    text = json.loads((tmp_path / "full/config.json").read_text())["thinker_config"]["text_config"]
    assert text["tie_word_embeddings"] is False and "thinker.lm_head.weight" in tensors_of(tmp_path / "full")
    if family == "qwen2_5_omni":
        assert found.speaker_map["Chelsie"]["bos_token"] == 1


def test_a_precision_is_written_where_it_is_read(runs, tmp_path):
    original, run = runs["qwen2_5_omni"]
    exported = export_model(str(run), tmp_path / "full", "full", str(original), dtype="bfloat16")
    after = tensors_of(tmp_path / "full")
    assert exported.dtype == "bfloat16" and after["thinker.lm_head.weight"].dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for name, tensor in after.items() if not name.startswith("thinker."))
    assert load_model(str(tmp_path / "full"), dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["qwen3_omni", "qwen2_5_vl", "gemma4", "phi4_multimodal"])
@pytest.mark.matrix(cases=2)
def test_adapters_are_merged(family, tmp_path):
    """Against a merge by hand; in families with and without parts that speak."""
    model, processor = build_tiny(family)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    adapter(tmp_path / "adapter", tmp_path / "base", family)
    exported = export_model(str(tmp_path / "adapter"), tmp_path / "merged", max_shard_size="100KB")
    assert exported.merged and 0 < exported.difference < 1e-3 and len(exported.files) > 1
    assert exported.parts == ("thinker" if family in OMNI else "model")
    adapted, _ = load_whole(str(tmp_path / "adapter"), dtype="float32")
    places = {name: layer for name, layer in adapted.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    assert places
    merged = load_model(str(tmp_path / "merged")).state_dict()
    plain = model.state_dict()
    for name, layer in places.items():
        if f"{name}.weight" not in merged:  # experts, which are fused
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = plain[f"{name}.weight"] + layer.scaling["default"] * b @ a
        assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-6), name
    untouched = [name for name in plain if name.removesuffix(".weight") not in places]
    assert all(torch.equal(plain[name], merged[name]) for name in untouched)


def test_a_merge_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    model, processor = build_tiny("qwen2_5_omni")
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    load = exports.load_model

    def spoilt(*args, **kwargs):
        model = load(*args, **kwargs)
        model.lm_head.weight.data[7] += 1
        return model

    monkeypatch.setattr(exports, "load_model", spoilt)
    with pytest.raises(ExportError, match="read again, what was written answers otherwise: .* Nothing was kept"):
        export_model(str(tmp_path / "run"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from maple_trl.omni import export
write = export._Donor.write

def killed(self, own, scratch, dtype):
    write(self, own, scratch, dtype)
    assert list(scratch.glob("*.safetensors"))
    os.kill(os.getpid(), signal.SIGKILL)

export._Donor.write = killed
export.export_model({run!r}, {out!r}, "full", {original!r})
"""


@pytest.mark.long
def test_what_is_killed_leaves_no_half_made_folder(runs, tmp_path):
    original, run = runs["qwen2_5_omni"]
    out = tmp_path / "out"
    program = KILLED.format(tests=str(ROOT / "tests"), run=str(run), out=str(out), original=str(original))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=env, capture_output=True, timeout=600)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert not out.exists() and [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.partial")]
    assert export_model(str(run), out, "full", str(original)).parts == "full"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def other_sizes(config):
    changed = copy.deepcopy(config)
    changed["thinker_config"]["text_config"]["intermediate_size"] = 64
    return changed


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("there", "is there already: name a folder that is not, or remove it"),
        ("absent", "there is no folder"),
        ("in a file", "cannot be made: .* is no folder that can be written into"),
        ("no original", "parts='full' needs the Omni model whose talker and vocoder are taken"),
        ("a thinker", "is a qwen2_5_omni_thinker, not a full Omni model: it has no talker"),
        ("without speech", r"has no weights of parts that speak \(talker\., token2wav\., code2wav\.\)"),
        (
            "another size",
            r"is another model than .*: model\.layers\.0\.mlp\.down_proj\.weight has the shape \(64, 64\) there",
        ),
        ("another family", "has a qwen3_omni_moe_thinker, and .* is a qwen2_5_omni_thinker"),
        ("no talker", "is a qwen2_5_vl, which has no talker: leave parts='full' out"),
        ("a lost file", "lacks model-00003-of-00003.safetensors, in which weights of parts that speak stand"),
        ("a lost weight", "lacks 'talker.thinker_to_talker_proj.weight', which its index says is there"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(case, message, runs, tmp_path, capsys):
    original, run = runs["qwen2_5_omni"]
    words = {"run": run, "output": tmp_path / "out", "--parts": "full", "--original": original}
    if case == "there":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine").write_text("mine")
    elif case == "absent":
        words["run"] = tmp_path / "absent"
    elif case == "in a file":
        (tmp_path / "file").write_text("")
        words["output"] = tmp_path / "file/out"
    elif case == "no original":
        del words["--original"]
    elif case == "a thinker":
        words["--original"] = run
    elif case == "without speech":
        words["--original"] = layouts.full_export(tmp_path / "full", "qwen2_5_omni")
    elif case == "another size":
        words["--original"] = layouts.copy(original, tmp_path / "full")
        path = tmp_path / "full/config.json"
        path.write_text(json.dumps(other_sizes(json.loads(path.read_text()))))
    elif case == "another family":
        words["--original"] = runs["qwen3_omni"][0]
    elif case == "no talker":
        model, processor = build_tiny("qwen2_5_vl")
        words["run"] = tmp_path / "run"
        model.save_pretrained(tmp_path / "run")
        processor.save_pretrained(tmp_path / "run")
    elif case == "a lost file":
        words["--original"] = layouts.copy(original, tmp_path / "full", "model-00003*")
    elif case == "a lost weight":
        words["--original"] = layouts.copy(original, tmp_path / "full")
        speech = layouts.speech_tensors("qwen2_5_omni")
        del speech["talker.thinker_to_talker_proj.weight"]
        layouts.save_file(speech, tmp_path / "full/model-00003-of-00003.safetensors", metadata={"format": "pt"})
    before = {path.name for path in tmp_path.iterdir()}
    flat = [str(words.pop("run")), str(words.pop("output"))]
    flat += [str(word) for pair in words.items() for word in pair]
    for dry in ([], ["--dry_run"]):
        assert cli.main(["export", *flat, *dry]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maple-trl export: ")]
        assert re.search(message, line), line
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.long
def test_the_original_is_taken_from_where_the_adapter_says(runs, tmp_path):
    original, _ = runs["qwen2_5_omni"]
    folder = adapter(tmp_path / "adapter", original, "qwen2_5_omni")
    assert cli.main(["export", str(folder), str(tmp_path / "full"), "--parts", "full"]) == 0
    adapted, _ = load_whole(str(folder), dtype="float32")
    difference = logits(load_model(str(tmp_path / "full")), "qwen2_5_omni") - logits(adapted, "qwen2_5_omni")
    assert 0 < difference.abs().max() < 1e-4
    assert str(tmp_path) not in (tmp_path / "full/README.md").read_text()
    # The Thinker that was read from a full model has its own names, not that one's.
    assert cli.main(["export", str(folder), str(tmp_path / "thinker"), "--max_shard_size", "300KB"]) == 0
    assert tensors_of(tmp_path / "thinker").keys() == layouts.thinker_tensors("qwen2_5_omni").keys()
    alone = FAMILIES["qwen2_5_omni"].model_class.from_pretrained(tmp_path / "thinker", dtype=torch.float32).eval()
    assert torch.equal(logits(alone, "qwen2_5_omni"), logits(load_model(str(tmp_path / "full")), "qwen2_5_omni"))


def test_every_family_has_its_task():
    from maple_trl.hub.model_card import CardFacts, snippet

    tasks = {}
    for family in FAMILIES:
        model = build_tiny(family)[0]
        facts = CardFacts("m", model_type=model.config.model_type, architecture=type(model).__name__)
        tasks[family] = facts.pipeline_tag
        compile(snippet(facts), family, "exec")
    assert tasks["qwen2_audio"] == "audio-text-to-text" and tasks["phi4_multimodal"] == "image-text-to-text"
    assert {task for family, task in tasks.items() if family not in ("qwen2_audio", "phi4_multimodal")} == {
        "video-text-to-text"
    }


# Dry runs


def forecast(capsys, *words):
    """What a dry run says, as JSON."""
    capsys.readouterr()
    assert cli.main(["export", *map(str, words), "--dry_run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", OMNI)
def test_a_dry_run_says_what_is_written(family, runs, tmp_path, capsys):
    original, run = runs[family]
    out = tmp_path / "out"
    words = [run, out, "--parts", "full", "--original", original, "--max_shard_size", "200KB"]
    found = forecast(capsys, *words)
    assert not out.exists() and found["dry_run"] and found["asks"] == []
    assert cli.main(["export", *map(str, words)]) == 0
    written = tensors_of(out)
    assert found["numbers"] == {
        "files": len(list(out.glob("*.safetensors"))),
        "bytes": sum(tensor.nbytes for tensor in written.values()),
    }
    (line,) = found["writes"]
    architecture = json.loads((out / "config.json").read_text())["architectures"][0]
    assert f"{out}: the full Omni model, {architecture}, float32: " in line and f"copied from {original}" in line


def test_a_dry_run_of_an_adapter_counts_the_merged_model(runs, tmp_path, capsys):
    original, _ = runs["qwen2_5_omni"]
    folder = adapter(tmp_path / "adapter", original, "qwen2_5_omni")
    found = forecast(capsys, folder, tmp_path / "out", "--dtype", "bfloat16")
    assert found["reads"] == [f"the adapter in {folder}", f"the model {original}"]
    exported = export_model(str(folder), tmp_path / "out", dtype="bfloat16")
    written = tensors_of(tmp_path / "out")
    assert found["numbers"] == {
        "files": len(exported.files),
        "bytes": sum(tensor.nbytes for tensor in written.values()),
    }
    assert "bfloat16" in found["writes"][0] and found["computes"][0] == "the adapter, merged into the model"
    # An adapter of another model, by the shapes in its header.
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors = {name: tensor.repeat(1, 2) for name, tensor in load_file(file).items()}
    layouts.save_file(tensors, file)
    assert config.is_file() and cli.main(["export", str(folder), str(tmp_path / "other"), "--dry_run"]) == 2
    assert "trained on another model" in capsys.readouterr().err


def test_a_dry_run_reads_no_weights(tmp_path, capsys):
    """Of a model of which the disk holds no more than the headers; by what the process has in memory afterwards."""
    model, processor = build_tiny("qwen2_5_omni")
    config = copy.deepcopy(model.config)
    config.text_config.intermediate_size = 3 << 20
    with torch.device("meta"):
        shapes = {exports.name_in_files(n): t.shape for n, t in type(model)(config).state_dict().items()}
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    places, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape.numel()
        places[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(places).encode()
    with open(tmp_path / "run/model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    assert end > 4 << 30
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = forecast(capsys, tmp_path / "run", tmp_path / "out")
    assert found["numbers"] == {"files": 1, "bytes": end}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB: a 16th of the weights


def test_a_dry_run_of_the_hub_asks_nobody(runs, tmp_path, capsys):
    _, run = runs["qwen2_5_omni"]
    found = forecast(capsys, run, tmp_path / "out", "--parts", "full", "--original", "Nobody/Omni-7B")
    assert found["asks"] == ["the Hub, for the model Nobody/Omni-7B"]
    assert found["numbers"] == {"files": None, "bytes": None} and "the full Omni model" in found["writes"][0]
