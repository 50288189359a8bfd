"""`maple-trl train` and `eval` with weights of 4 and 8 bits: on the embedded model, from a file and the command line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from eval_runs import MODEL, evaluate, result_of
from safetensors.torch import load_file

from maple_trl import cli
from maple_trl.omni import quantization


pytestmark = pytest.mark.slow


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
JOB = """
trainer: {trainer}
model_name_or_path: builtin:tiny-omni
dataset_name: builtin:seven-tags
use_peft: true
lora_r: 4
dtype: float32
bf16: false
num_frames: 4
max_pixels: 3136
max_prompt_length: 128
max_completion_length: 8
per_device_train_batch_size: 8
num_generations: 4
gradient_accumulation_steps: 1
gradient_checkpointing: false
dataloader_pin_memory: false
max_steps: 2
learning_rate: 1.0e-3
report_to: none
save_strategy: "no"
"""
NF4 = ["--load_in_4bit", "true", "--use_bnb_nested_quant", "true"]


def train(folder, *words, trainer="mapo", more=""):
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(JOB.format(trainer=trainer) + more)
    return cli.main(
        ["train", "--config", str(folder / "job.yaml"), "--output_dir", str(folder / "run"), *map(str, words)]
    )


def adapter(folder):
    return load_file(folder / "run" / "adapter_model.safetensors")


@pytest.mark.parametrize("trainer", ["mapo", "avatar", "omni_grpo"])
@pytest.mark.matrix(cases=1)
def test_a_job_trains_beside_4_bits(tmp_path, capsys, trainer):
    own = {"avatar": "replayed_generations: 1\nlora_dropout: 0.0\n"}.get(trainer, "")
    assert train(tmp_path, trainer=trainer, more="load_in_4bit: true\nuse_bnb_nested_quant: true\n" + own) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "weights in 21 linear layers are nf4" in told
    found = adapter(tmp_path)
    assert any(value.abs().max() > 0 for name, value in found.items() if "lora_B" in name)
    options = json.loads((tmp_path / "run" / "args.json").read_text())
    assert options["load_in_4bit"] and options["use_bnb_nested_quant"]


SUPERVISED = """
trainer: omni_sft
model_name_or_path: builtin:tiny-omni
dataset_name: builtin:seven-tags
completion_template: "<answer>{solution}</answer>"
use_peft: true
load_in_8bit: true
dtype: float32
bf16: false
num_frames: 4
max_pixels: 3136
gradient_checkpointing: false
max_steps: 2
report_to: none
save_strategy: "no"
"""


@pytest.mark.long
def test_a_supervised_job_trains_beside_8_bits(tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(SUPERVISED)
    assert cli.main(["train", "--config", str(tmp_path / "job.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    assert "weights in 21 linear layers are int8" in " ".join(capsys.readouterr().out.split())
    assert any(value.abs().max() > 0 for name, value in adapter(tmp_path).items() if "lora_B" in name)


@pytest.mark.long
def test_an_adapter_is_evaluated_beside_few_bits_and_whole_weights(tmp_path, capsys):
    assert train(tmp_path, "--load_in_8bit", "true", "--quantize_towers", "true") == 0
    asked = ["--data", "builtin:seven-tags", "--limit", "8", "--samples", "2", "--quiet"]  # which share their prompts
    run = tmp_path / "run"
    model = [*MODEL[2:], "--model", run]
    digests = set()
    for name, words in (
        ("few", ["--load-in-8bit", "true", "--quantize-towers", "true"]),
        ("four", NF4),
        ("whole", []),
    ):
        assert evaluate(*model, *asked, *words, "--output", tmp_path / name) == 0
        found = result_of(tmp_path / name)["model"]
        assert found["adapter"]["name"] == str(run)
        kind = found.get("quantization")
        expected = {"few": "int8, threshold 6, ", "four": "nf4, blocks of 64, nested 256"}.get(name)
        assert kind is None if expected is None else kind.startswith(expected)
        digests.add(found["sha256"])
    assert len(digests) == 3


@pytest.mark.long
def test_a_quantization_config_of_ones_own(tmp_path, capsys):
    own = {"quantization_config": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "model.visual"]}}
    assert train(tmp_path, "--model_init_kwargs", json.dumps(own)) == 0
    assert "weights in 28 linear layers are int8" in " ".join(capsys.readouterr().out.split())  # sound's among them


def test_the_recipe_of_a_small_card_runs_tiny(tmp_path):
    words = [
        "--config",
        RECIPES / "small_gpu_tiny.yaml",
        "--output_dir",
        tmp_path,
        "--max_steps",
        2,
        "--use_cpu",
        "true",
    ]
    words += ["--evaluate_before_after", "false", "--logging_steps", 1, "--per_device_train_batch_size", 8]
    words += ["--num_generations", 4, "--save_strategy", "no"]
    assert cli.main(["train", *map(str, words)]) == 0
    options = json.loads((tmp_path / "args.json").read_text())
    real = yaml.safe_load((RECIPES / "small_gpu.yaml").read_text())
    few = ("load_in_4bit", "use_bnb_nested_quant", "quantize_towers", "use_peft", "lora_vision", "lora_audio")
    assert {name: options[name] for name in few} == {name: real[name] for name in few}


@pytest.mark.long
def test_an_adapter_is_trained_on_beside_few_bits(tmp_path):
    assert train(tmp_path, *NF4) == 0
    first = adapter(tmp_path)
    assert train(tmp_path / "more", *NF4, "--model_name_or_path", tmp_path / "run", "--beta", "0.1") == 0
    second = adapter(tmp_path / "more")
    assert first.keys() == second.keys() and any(not torch.equal(v, second[n]) for n, v in first.items())


@pytest.mark.long
def test_a_killed_run_goes_on_only_with_its_own_bits(tmp_path, capsys):
    assert train(tmp_path, *NF4, "--save_strategy", "steps", "--save_steps", "1") == 0
    capsys.readouterr()
    again = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3", "--resume_from_checkpoint", "true"]
    assert train(tmp_path, *again) == 2
    assert "quantization nf4, blocks of 64" in " ".join(capsys.readouterr().err.split())
    assert train(tmp_path, *NF4, *again) == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--use_peft", "false", *NF4], "need use_peft: true"),
        ([*NF4, "--use_vllm", "true", "--vllm_mode", "server"], "use_vllm does not go with weights of 4 or 8 bits"),
        ([*NF4, "--model_init_kwargs", '{"quantization_config": {"load_in_8bit": true}}'], "keep one of them"),
        (["--model_init_kwargs", '{"quantization_config": {"load_in_8bits": true}}'], "no option 'load_in_8bits'"),
        (
            ["--use_peft", "false", "--model_init_kwargs", '{"quantization_config": {"load_in_8bit": true}}'],
            "weights of 4 or 8 bits cannot be trained",
        ),
    ],
)
def test_refusals(tmp_path, capsys, words, message):
    assert train(tmp_path, *words, "--model_name_or_path", "/no/model") == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_bitsandbytes_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    assert train(tmp_path, *NF4, "--model_name_or_path", "/no/model") == 2
    assert "pip install 'maple-trl[quantization]'" in " ".join(capsys.readouterr().err.split())
    asked = ["--data", "builtin:seven-tags", "--limit", "8", "--quiet", "--load-in-4bit", "true"]
    assert evaluate(*MODEL, *asked, "--output", tmp_path / "eval") == 2
    assert "pip install 'maple-trl[quantization]'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--load-in-4bit", "true", "--load-in-8bit", "true"], "both true"),
        (["--use-bnb-nested-quant", "true"], "has no effect without load_in_4bit"),
        (["--load-in-4bit", "true", "--bnb-4bit-quant-type", "nf5"], "must be nf4 or fp4, got 'nf5'"),
    ],
)
def test_an_evaluation_refuses_what_has_no_effect(tmp_path, capsys, words, message):
    assert evaluate(*MODEL, "--data", "builtin:seven-tags", "--limit", "8", *words, "--output", tmp_path / "eval") == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_few_bits_are_no_option_of_a_server(tmp_path, capsys):
    words = [
        "--server",
        "http://127.0.0.1:9/v1",
        "--model",
        "m",
        "--data",
        "builtin:seven-tags",
        "--load-in-4bit",
        "true",
    ]
    assert evaluate(*words, "--output", tmp_path / "eval") == 2
    assert "--load-in-4bit: no effect on a model behind --server" in " ".join(capsys.readouterr().err.split())
