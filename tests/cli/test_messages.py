"""What a user gets wrong ends in one line that says so, without a traceback and, where it can be known, before a model loads."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tiny_models import save_tiny

from maple_trl import cli
from maple_trl.cli import failures
from maple_trl.omni import checkpoints, loading
from maple_trl.rewards.calls import RewardError, check_rewards, checked, checked_rewards, required_columns


pytestmark = pytest.mark.slow


TINY = Path(loading.__file__).resolve().parents[1] / "assets" / "tiny-omni"
ROW = {"prompt": [{"role": "user", "content": "what color"}], "subtitle": "red", "tag": "S", "solution": "A"}
JOB = {
    "model_name_or_path": "builtin:tiny-omni",
    "dataset_name": "rows.jsonl",
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "max_steps": 1,
    "use_cpu": "true",
    "bf16": "false",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": "true",
    "output_dir": "out",
}
ASK = {"model": "builtin:tiny-omni", "data": "rows.jsonl", "split": "train", "samples": 1, "output": "asked"}
ASK |= {"max-new-tokens": 4}
REWARDS = """
import sys
def scalar(completions, **_): return 0.5
def text(completions, **_): return "0.5"
def strings(completions, **_): return ["a" for _ in completions]
def few(completions, **_): return [0.1]
def many(completions, **_): return [0.1] * (len(completions) + 3)
def nothing(completions, **_): return None
def nested(completions, **_): return [[0.1] for _ in completions]
def mapping(completions, **_): return dict(enumerate([0.1] * len(completions)))
def raises(completions, **_): return {}["x"]
def leaves(completions, **_): sys.exit(3)
def without_columns(completions): return [0.1] * len(completions)
def of_a_column(completions, answer, **_): return [0.1] * len(completions)
async def later(completions, **_): return [0.1]
class Kind: pass
number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of a newcomer: rows, rewards, and what may pass for models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(failures.VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("mistaken_rewards.py").write_text(REWARDS)
    Path("broken_rewards.py").write_text("def f(:\n")
    write_rows("rows.jsonl", ROW)
    yield tmp_path
    import sys

    sys.modules.pop("mistaken_rewards", None)


def write_rows(name, row, count=8):
    Path(name).write_text("".join(json.dumps(row) + "\n" for _ in range(count)))


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def words(command, options):
    return [
        command,
        *(word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))),
    ]


def said(capsys, arguments):
    """The exit status and the last line."""
    capsys.readouterr()
    try:
        status = cli.main([str(word) for word in arguments])
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    last = shown.err.strip().splitlines()[-1]
    assert not last.rstrip().endswith(".py") and "(raised in" not in last and "site-packages" not in last
    return status, last


def forbid_loading(monkeypatch):
    """No weights may be read: neither by the library nor by transformers."""

    def load(*_, **__):
        raise AssertionError("a model is loaded")

    from maple_trl.jobs import models as eval_models
    from maple_trl.omni import loading

    for module in (loading, eval_models):
        monkeypatch.setattr(module, "load_model", load)


# Known before a model loads

TRAIN = [
    # Rewards
    ({"rewards": "accuracy_reward", "dataset_name": "no_solution.jsonl"}, "needs a column 'solution'"),
    ({"rewards": '{"reward": "accuracy_reward", "tags": ["S"]}', "dataset_name": "no_solution.jsonl"}, "'solution'"),
    (
        {"rewards": '{"reward": "accuracy_reward", "tags": ["S"]}', "dataset_name": "no_tag.jsonl"},
        "needs a column 'tag'",
    ),
    ({"rewards": "mistaken_rewards:of_a_column"}, "the reward 'of_a_column' needs a column 'answer'"),
    (
        {"rewards": "mistaken_rewards:without_columns"},
        "cannot be called as TRL does: got an unexpected keyword argument",
    ),
    ({"rewards": "mistaken_rewards:Kind"}, "is a class, not a function"),
    ({"rewards": "mistaken_rewards:number"}, "is no function but int"),
    ({"rewards": "mistaken_rewards:abesnt"}, "cannot load the reward"),
    ({"rewards": "broken_rewards:f"}, "SyntaxError: invalid syntax"),
    ({"rewards": "acuracy_reward"}, "did you mean accuracy_reward?"),
    # Rows
    ({"dataset_name": "question.jsonl"}, "has no column 'prompt'; its columns: question, solution; rename 'question'"),
    ({"dataset_name": "videos.jsonl"}, "has the column 'videos', which is not read"),
    ({"dataset_name": "bad_tag.jsonl"}, "row 0: field 'tag': 'X' is not a modality tag"),
    ({"dataset_name": "number.jsonl"}, "row 0: field 'prompt' must be a text"),
    (
        {"dataset_name": "one.jsonl", "per_device_train_batch_size": 8},
        "has 1 usable rows, but one rollout takes 2 prompts",
    ),
    ({"dataset_name": "nowhere.jsonl"}, "there is no file or folder nowhere.jsonl"),
    ({"dataset_name": None}, "dataset_name is missing"),
    ({"dataset_name": "org/rows"}, "cannot load the data set 'org/rows'"),
    ({"media_root": "nowhere"}, "media root 'nowhere' is not a folder"),
    ({"dataset_config": "x"}, "dataset_config is for data sets of the Hub"),
    ({"dataset_name": "no_content.jsonl"}, "row 0: field 'prompt' has a message of the user without 'content'"),
    ({"dataset_name": "video_path.jsonl"}, "has the column 'video_path', which is not read, and no column 'video'"),
    ({"dataset_name": "tag_case.jsonl"}, "has the column 'Tag', which is not read, and no column 'tag'"),
    (
        {"model_name_or_path": "builtin:tiny-omni", "dataset_name": "block.jsonl"},
        "row 0: a 'image' block of field 'prompt': max_pixels=100 is less than one patch of this model, 28x28 pixels",
    ),
    ({"dataset_name": "absent.jsonl"}, "8 rows quarantined (8 not-found; first gone.mp4); media are looked for below"),
    ({"dataset_name": "outside.jsonl"}, "(8 outside-media-root; first ../x.mp4)"),
    ({"trainer": "omni_sft", "num_generations": None}, "has no column 'completion'"),
    # Models
    ({"model_name_or_path": None}, "model_name_or_path is missing"),
    ({"model_name_or_path": "builtin:tiny"}, "embedded: builtin:tiny-omni"),
    (
        {"model_name_or_path": "no_weights"},
        "no_weights holds no weights: it has config.json, but neither model.safetensors",
    ),
    ({"model_name_or_path": "empty"}, "empty holds no model: there is no config.json in it; it has no file at all"),
    ({"model_name_or_path": "no_json"}, "config.json is damaged: it is no JSON"),
    ({"model_name_or_path": "no_type"}, "does not say which model it is of"),
    (
        {"model_name_or_path": "unknown"},
        "of model type 'fancy9', which the installed transformers cannot read; supported",
    ),
    ({"model_name_or_path": "llava"}, "is of the family 'llava', which is not supported; supported are"),
    ({"model_name_or_path": "bert"}, "is of the family 'bert', which is not supported"),
    ({"model_name_or_path": "damaged"}, "model.safetensors is damaged"),
    ({"model_name_or_path": "pointer"}, "is a pointer of Git LFS"),
    (
        {"model_name_or_path": "lacks_shard"},
        "lacks 1 of the 2 files of weights that model.safetensors.index.json lists",
    ),
    ({"model_name_or_path": "no_processor"}, "a model without its processor: there is no preprocessor_config.json"),
    ({"model_name_or_path": "no_tokenizer"}, "a model without its tokenizer"),
    ({"model_name_or_path": "bad_tokenizer"}, "bad_tokenizer/tokenizer.json is damaged: it is no JSON"),
    ({"model_name_or_path": "layers"}, "layers: Class validation error"),
    ({"model_name_or_path": "deaf"}, "row 0: the model's chat template leaves out 'what color' of field 'prompt'"),
    ({"model_name_or_path": "mute"}, "row 0: the model's chat template cannot show field 'prompt': TemplateError: no"),
    (
        {"model_name_or_path": "no_template"},
        "the processor in no_template has no chat template; take that of the model",
    ),
    ({"model_name_or_path": "run"}, "its checkpoints are models: checkpoint-4"),
    ({"model_name_or_path": "rows.jsonl"}, "rows.jsonl is a file; name the folder of a model"),
    ({"model_name_or_path": "./nowhere"}, "there is no folder ./nowhere"),
    ({"model_name_or_path": "~/nowhere"}, "~ is not replaced here"),
    ({"model_name_or_path": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
    ({"model_name_or_path": "a b"}, "is neither a folder that is there nor the Hub id of a model"),
    ({"model_name_or_path": "Qwen/Qwen2.5-Omni-3B"}, "cannot be fetched from the Hub: HF_HUB_OFFLINE is set"),
    ({"model_name_or_path": "text", "evaluate_before_after": "true", "dataset_test_split": "train"}, "of text alone"),
    # Options
    ({"bf16": None, "use_cpu": None}, "--use_cpu true --bf16 false --dtype float32"),
    ({"deepspeed": "ds.json"}, "deepspeed: the package is not installed"),
    ({"report_to": "wandb"}, "report_to: the package of wandb is not installed"),
    ({"report_to": "wandbb"}, "report_to: unknown 'wandbb'; did you mean wandb?"),
    ({"use_liger_kernel": "true"}, "use_liger_kernel: the package liger-kernel is not installed"),
    ({"optim": "galore_adamw"}, "optim: galore_adamw needs a package that is not installed"),
    ({"adam_beta1": 2}, "Invalid beta parameter"),
    ({"lr_scheduler_kwargs": '{"bogus": 1}'}, "lr_scheduler_type: linear cannot be made of lr_scheduler_kwargs"),
    ({"optim": "lomo"}, "optim: lomo needs a package that is not installed"),
    ({"learning_rte": 1}, "unknown option --learning_rte; did you mean --learning_rate?"),
    ({"save_steps": 0}, "save_steps must be above 0, got 0.0"),
    ({"max_steps": 0}, "max_steps must be at least 1, or -1"),
    ({"epsilon_high": -1}, "epsilon_high must be at least 0, got -1.0"),
    ({"steps_per_generation": 0}, "steps_per_generation must be at least 1, got 0"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, got -1"),
    ({"seed": 2**32}, "seed must be at most 4294967295"),
    ({"scale_rewards": "grp"}, "scale_rewards must be one of 'group', 'batch', 'none', got 'grp'"),
    ({"importance_sampling_level": "tok"}, "importance_sampling_level must be one of 'token', 'sequence'"),
    ({"generation_batch": 0}, "generation_batch must be a whole number from 1 on, or null for all at once, got 0"),
    ({"top_k": 1}, "top_k=1 leaves one token to sample"),
    ({"top_p": 0}, "top_p=0 leaves one token to sample"),
    ({"generation_kwargs": '{"penalty_alpha": 0.6}'}, "generation_kwargs: penalty_alpha=0.6 is not supported"),
    ({"generation_kwargs": '{"guidance_scale": 2}'}, "generation_kwargs: guidance_scale=2 is not supported"),
    ({"generation_kwargs": '{"bad_words_ids": [5]}'}, "generation_kwargs: `bad_words_ids` has to be a list of lists"),
    ({"generation_kwargs": '{"suppress_tokens": "a"}'}, "generation_kwargs: suppress_tokens must be a list of ids"),
    ({"generation_kwargs": '{"min_length": -1}'}, "generation_kwargs: min_length must be a whole number of tokens"),
    ({"generation_kwargs": '{"min_new_tokens": 50}'}, "min_new_tokens=50 is above max_completion_length=4"),
    ({"generation_kwargs": "[1]"}, "generation_kwargs must be a mapping of names to values"),
    ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs must be a mapping of names to values"),
    ({"chat_template_kwargs": '{"tokenize": true}'}, "chat_template_kwargs: tokenize cannot be set"),
    ({"encoder_cache_dir": "rows.jsonl"}, "encoder_cache_dir: rows.jsonl is a file"),
    ({"config": "weights_nan.yaml"}, "reward_weights must be finite numbers, got [1.0, nan]"),
    ({"config": "weights_0.yaml"}, "reward_weights are all 0"),
    ({"config": "weights_text.yaml"}, "weights_text.yaml: reward_weights must hold numbers, got 'a'"),
    ({"config": "texts.yaml"}, "texts.yaml: run_name must be a text, got 5"),
    ({"learning_rate": "nan"}, "learning_rate must be at least 0, got nan"),
    ({"learning_rate": -1}, "learning_rate must be at least 0, got -1.0"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"loss_type": "grpoo"}, "loss_type must be one of 'grpo'"),
    ({"temperature": 0}, "temperature must be above 0, got 0.0"),
    ({"generation_kwargs": '{"top_hh": 1}'}, "GenerationConfig has no option 'top_hh'; did you mean top_h?"),
    ({"generation_kwargs": '{"top_k": "ten"}'}, "generation_kwargs: `top_k` has to be a strictly positive integer"),
    ({"generation_kwargs": '{"top_h": 5}'}, "generation_kwargs: `top_h` must be in the range"),
    ({"top_p": 5}, "`top_p` has to be a float"),
    ({"reward_weights": 1}, "reward_weights has 1 weights for 2 rewards: format_reward, accuracy_reward"),
    ({"trainer": "mapo", "task_reward": "foo"}, "task_reward must name one of the rewards"),
    ({"trainer": "mapo", "dataset_name": "no_tag.jsonl"}, "has no column 'tag', which mapo batches by"),
    ({"use_peft": "true", "lora_r": 0}, "lora_r must be at least 1"),
    ({"generation_kwargs": "{bad"}, "generation_kwargs: '{bad' is no JSON"),
    ({"chat_template_kwargs": '{"a'}, "chat_template_kwargs: '{\"a' is no JSON"),
    ({"accelerator_config": "nofile.json"}, "nofile.json"),
    ({"min_pixels": 999999}, "min_pixels=999999 is above max_pixels=100352"),
    (
        {"model_name_or_path": "builtin:tiny-omni", "min_pixels": 1, "max_pixels": 500},
        "less than one patch of this model, 28x28",
    ),
    ({"min_pixels": 0}, "min_pixels must be positive"),
    ({"summary_file": "."}, "summary_file: . is a folder"),
    ({"metrics_file": "rows.jsonl"}, "metrics_file: rows.jsonl is the data set, which would be overwritten"),
    ({"metrics_file": "/proc/nowhere/metrics.jsonl"}, "metrics_file: cannot make the folder /proc/nowhere"),
    ({"output_dir": "rows.jsonl"}, "output_dir: cannot write into rows.jsonl"),
    ({"resume_from_checkpoint": "nowhere"}, "there is no folder nowhere"),
    ({"trainer": "grpo"}, "trainer must be one of 'omni_grpo'"),
    ({"config": "indented.yaml"}, "indented.yaml, line 2, column 1: is not a YAML file: "),
    ({"config": "open.yaml"}, "open.yaml, line 3, column 2: is not a YAML file: "),
    ({"config": "twice.yaml"}, "twice.yaml: line 2: 'max_steps' is given twice"),
    ({"config": "list.yaml"}, "list.yaml: max_steps must be a whole number, got [1, 2]"),
    ({"config": "map.yaml"}, "map.yaml: max_steps must be a whole number, got {'a': 1}"),
    ({"config": "key.yaml"}, "key.yaml: line 1: ['a'] cannot be the name of an option"),
    ({"config": "typo.yaml"}, "typo.yaml: unknown key 'num_generation'; did you mean num_generations?"),
    ({"config": "nowhere.yaml"}, "cannot read the config file nowhere.yaml"),
]
# Of a mistake in rewards, rows and options it is heard although there is no such model either.
LATER = ("model_name_or_path",)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders that pass for models and are none, made once."""
    root = tmp_path_factory.mktemp("models")
    config = json.loads((TINY / "config.json").read_text())

    def copy(name, *left_out):
        shutil.copytree(TINY, root / name, ignore=shutil.ignore_patterns(*left_out))
        return root / name

    def plain(name, **files):
        (root / name).mkdir()
        for file, content in files.items():
            (root / name / file.replace("__", ".")).write_text(content)

    copy("no_weights", "*.safetensors")
    plain("empty")
    plain("no_json", config__json="{")
    plain("no_type", config__json="{}")
    plain("unknown", config__json=json.dumps({"model_type": "fancy9", "architectures": ["Fancy"]}))
    plain(
        "llava", config__json=json.dumps({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]})
    )
    plain("bert", config__json=json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    plain("text", config__json=json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    with (copy("damaged") / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    (copy("pointer") / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    sharded = copy("lacks_shard", "*.safetensors")
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(TINY / "model.safetensors", sharded / "model-00001-of-00002.safetensors")
    copy("no_processor", "*processor_config.json")
    copy("no_tokenizer", "tokenizer*", "vocab*", "merges*")
    (copy("bad_tokenizer") / "tokenizer.json").write_text("{")
    (copy("deaf") / "chat_template.jinja").write_text("hello")
    (copy("mute") / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    copy("no_template", "chat_template.jinja")
    layers = json.loads(json.dumps(config))
    layers["text_config"]["num_hidden_layers"] += 1
    (copy("layers") / "config.json").write_text(json.dumps(layers))
    (root / "run").mkdir()
    copy("run/checkpoint-4")
    assert config["model_type"].startswith("qwen2_5_omni")
    return root


@pytest.fixture
def mistakes(here, models):
    for folder in models.iterdir():
        Path(folder.name).symlink_to(folder)
    write_rows("no_solution.jsonl", without(ROW, "solution"))
    write_rows("no_tag.jsonl", without(ROW, "tag"))
    write_rows("question.jsonl", {"question": "what", "solution": "A"})
    write_rows("unasked.jsonl", {"solution": "A"})
    write_rows("videos.jsonl", ROW | {"videos": "a.mp4"})
    write_rows("bad_tag.jsonl", ROW | {"tag": "X"})
    write_rows("number.jsonl", ROW | {"prompt": 5})
    write_rows("one.jsonl", ROW, count=1)
    write_rows("no_content.jsonl", ROW | {"prompt": [{"role": "user", "text": "what color"}]})
    write_rows("video_path.jsonl", ROW | {"video_path": "a.mp4"})
    write_rows("tag_case.jsonl", without(ROW, "tag") | {"Tag": "S"})
    block = {"type": "image", "image": "a.png", "max_pixels": 100}
    write_rows("block.jsonl", ROW | {"prompt": [{"role": "user", "content": [block]}], "tag": "V"})
    write_rows("absent.jsonl", ROW | {"video": "gone.mp4", "tag": "V"})
    write_rows("outside.jsonl", ROW | {"video": "../x.mp4", "tag": "V"})
    files = {
        "indented": "a:\n\t- 1\n",
        "open": "a: 1\nb: [1\nc: 2\n",
        "twice": "max_steps: 1\nmax_steps: 2\n",
        "list": "max_steps: [1, 2]\n",
        "map": "max_steps: {a: 1}\n",
        "key": "? [a]\n: 1\n",
        "typo": "num_generation: 4\n",
        "weights_nan": "reward_weights: [1e0, .nan]\n",
        "weights_0": "reward_weights: [0, 0.0]\n",
        "weights_text": "reward_weights: [1, a]\n",
        "texts": "run_name: 5\n",
    }
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)
    return here


@pytest.mark.parametrize("options, message", TRAIN, ids=[message[:50] for _, message in TRAIN])
def test_a_wrong_job(options, message, mistakes, monkeypatch, capsys):
    forbid_loading(monkeypatch)
    job = JOB | options
    if not any(name in options for name in LATER):
        job["model_name_or_path"] = "./there-is-no-model"
    status, last = said(capsys, words("train", job))
    assert (status, last.startswith("maple-trl train: ")) == (2, True), last
    assert message in last


EVAL = [
    *[
        (options, message)
        for options, message in TRAIN
        if [*options] == ["model_name_or_path"] and options["model_name_or_path"] not in (None, "deaf", "mute")
    ],
    ({"model_name_or_path": "text"}, "is a model of text alone (qwen2), which reads no media; supported are"),
    ({"judge": "mistaken_rewards:of_a_column"}, "--judge: the reward 'of_a_column' needs a column 'answer'"),
    ({"judge": "mistaken_rewards:without_columns"}, "cannot be called as TRL does"),
    ({"data": "no_solution.jsonl"}, "needs a column 'solution'"),
    (
        {"data": "question.jsonl"},
        "has no column 'prompt'; its columns: question, solution; rename 'question' to 'prompt'",
    ),
    ({"data": "nowhere.jsonl"}, "there is no file or folder nowhere.jsonl"),
    ({"output": "rows.jsonl"}, "--output: rows.jsonl cannot be made a folder"),
    ({"media-root": "nowhere"}, "media root 'nowhere' is not a folder"),
    ({"generation": '{"top_hh": 1}'}, "generation: GenerationConfig has no option 'top_hh'; did you mean top_h?"),
    ({"generation": '{"min_p": 0.5}'}, "generation: min_p is set by --min-p"),
    ({"temperature": 0, "samples": 3}, "temperature 0 gives 3 times the same sample"),
    ({"temperature": -1}, "temperature must be 0 or more"),
    ({"access": "Q"}, "access 'Q' is neither"),
    ({"min-pixels": 999999}, "min_pixels=999999 is above max_pixels=100352"),
    ({"config": "open.yaml"}, "open.yaml, line 3, column 2: is not a YAML file: "),
    ({"adapter": "empty"}, "empty holds no adapter_config.json"),
    ({"moddel": "x"}, "unknown argument --moddel; did you mean --model?"),
]


@pytest.mark.parametrize("options, message", EVAL, ids=[message[:50] for _, message in EVAL])
def test_a_wrong_evaluation(options, message, mistakes, monkeypatch, capsys):
    forbid_loading(monkeypatch)
    options = {("model" if name == "model_name_or_path" else name): value for name, value in options.items()}
    job = (
        ASK
        | {"model": "builtin:tiny-omni" if {"generation", "adapter"} & set(options) else "./there-is-none"}
        | options
    )
    status, last = said(capsys, words("eval", job))
    assert status == 2 and last.startswith("maple-trl"), last
    assert message in last


@pytest.mark.parametrize("model", ["deaf", "mute"])
def test_an_evaluation_of_a_model_whose_template_does_not_ask(model, mistakes, capsys):
    status, last = said(capsys, words("eval", ASK | {"model": model}))
    assert status == 2 and "rows.jsonl, row 0: the model's chat template" in last


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["report", "nowhere"], "nowhere"),
        (["report", "."], "holds no run"),
        (["report", "rows.jsonl"], "rows.jsonl"),
        (["report", ".", "--otput", "x"], "unknown argument --otput; did you mean --output?"),
        (["report", ".", "--output", "rows.jsonl"], "--output: rows.jsonl is there already and no report"),
        (["report", ".", "--thumbnails", "-1"], "--thumbnails must be 0 or more"),
        (["data", "hints", "--input", "nowhere.jsonl", "--output", "o.jsonl", "--model", "m"], "nowhere.jsonl"),
        (["data", "hints", "--input", "rows.jsonl", "--output", "o.txt", "--model", "m"], "o.txt"),
        (["data", "hints", "--input", "unasked.jsonl", "--output", "o.jsonl", "--model", "m"], "prompt"),
        (["data", "hints", "--input", "rows.jsonl", "--outptu", "x", "--output", "o.jsonl", "--model", "m"], "--output?"),
        (["data", "hints", "--input", "rows.jsonl", "--output", "o.jsonl", "--model", "m", "--sampling", "{"], "--sampling"),
        (["data", "hints", "--input", "rows.jsonl", "--output", "o.jsonl", "--model", "m", "--chunk", "0"], "chunk"),
        (["env", "--jsno"], "unknown argument --jsno; did you mean --json?"),
        (["trian"], "there is no command trian; did you mean train?"),
        (["train"], "name a job: --config FILE"),
    ],
    ids=str,
)  # fmt: skip
def test_other_commands(arguments, message, mistakes, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    status, last = said(capsys, arguments)
    assert status == 2 and message in last, last


# During a run

FAILING = [
    ("scalar", "the reward 'scalar' returned 0.5 for 4 completions"),
    ("text", "the reward 'text' returned '0.5' for 4 completions"),
    ("strings", "the reward 'strings' returned 'a' for completion 0"),
    ("few", "the reward 'few' returned 1 rewards for 4 completions"),
    ("many", "the reward 'many' returned 7 rewards for 4 completions"),
    ("nothing", "the reward 'nothing' returned nothing for 4 completions"),
    ("nested", "the reward 'nested' returned [0.1] for completion 0"),
    ("mapping", "the reward 'mapping' returned a dict for 4 completions"),
    ("raises", "the reward function 'raises' failed in mistaken_rewards.py, line 11: KeyError: 'x'"),
    ("leaves", "the reward function 'leaves' failed in mistaken_rewards.py, line 12: SystemExit: 3"),
]


@pytest.fixture(scope="module")
def step(seven_tags):
    """One rollout's scoring by a reward function, through the trainer's own path, on a trainer made once."""
    from omni_runs import build_trainer, one_row_per_tag

    folder, dataset = seven_tags
    return build_trainer(folder, one_row_per_tag(dataset).select(range(2)), gradient_accumulation_steps=1)


@pytest.mark.parametrize("name, message", FAILING)
def test_a_reward_function_that_is_wrong(name, message, step, here, monkeypatch):
    import importlib

    module = importlib.import_module("mistaken_rewards")
    monkeypatch.setattr(step, "reward_funcs", [getattr(module, name)])
    monkeypatch.setattr(step, "reward_func_names", [name])
    with pytest.raises(KeyError if name == "raises" else RewardError) as caught:  # its own exception stays what it is
        step.train()
    assert message in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert step.reward_funcs == [getattr(module, name)]


def test_an_asynchronous_reward_function_that_is_wrong(here):
    import asyncio
    import importlib

    call = checked(importlib.import_module("mistaken_rewards").later, "later")
    with pytest.raises(RewardError, match="the reward 'later' returned 1 rewards for 4 completions"):
        asyncio.run(call(completions=[""] * 4))


@pytest.mark.parametrize("name, message", [FAILING[0], FAILING[8]])
def test_a_reward_function_that_is_wrong_ends_a_job_with_one_line(name, message, here, capsys):
    status, last = said(capsys, words("train", JOB | {"rewards": f"mistaken_rewards:{name}"}))
    assert status == 1 and message in last


@pytest.mark.parametrize(
    "name, status, message",
    [
        ("scalar", 2, "gave 0.5 for"),
        ("nothing", 2, "gave None for"),
        ("strings", 2, "gave 'a'; a score is a number"),
        ("raises", 1, "the scoring function failed: KeyError: 'x'; the same command goes on"),
        ("leaves", 1, "the scoring function failed: SystemExit: 3"),
    ],
)
def test_a_judge_that_is_wrong_ends_an_evaluation_with_one_line(name, status, message, here, capsys):
    found, last = said(capsys, words("eval", ASK | {"judge": f"mistaken_rewards:{name}", "limit": 1}))
    assert found == status and message in last


def test_a_fault_of_the_program_keeps_its_traceback_in_a_file(here, monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("nobody thought of this\nin two lines")

    with monkeypatch.context() as patch:
        patch.setattr("maple_trl.train.build_trainer", broken)
        status, last = said(capsys, words("train", JOB | {"output_dir": "."}))
    assert status == 1 and "ended by an error (its traceback is in ./traceback.txt): KeyError" in last
    written = Path("traceback.txt").read_text()
    assert written.startswith("Traceback") and "nobody thought of this" in written
    monkeypatch.setenv(failures.VARIABLE, "1")
    with monkeypatch.context() as patch:
        patch.setattr("maple_trl.train.build_trainer", broken)
        assert cli.main(words("train", JOB)) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "ended by an error: KeyError" in shown.strip().splitlines()[-1]
    # So do the errors that say all themselves.
    assert cli.main(words("train", JOB | {"dataset_name": "nowhere.jsonl"})) == 2
    assert "Traceback" in capsys.readouterr().err


def test_no_usable_row_left_in_the_middle_of_a_run(here, seven_tags, capsys):
    """Every clip breaks when it is decoded: its header passes the look before training."""
    folder, dataset = seven_tags
    rows = dataset.filter(lambda row: row["tag"] == "V").select(range(2)).to_list()
    for row in rows:
        damaged = bytearray((folder / row["video"]).read_bytes())
        start = damaged.index(b"mdat") + 4
        damaged[start : start + 4000] = bytes(4000)
        Path(Path(row["video"]).name).write_bytes(damaged)
        row["video"] = Path(row["video"]).name
    Path("broken.jsonl").write_text("".join(json.dumps(without(row, "subtitle")) + "\n" for row in rows))
    job = {"dataset_name": "broken.jsonl", "num_frames": 2, "rewards": "format_reward"}
    status, last = said(capsys, words("train", JOB | job))
    assert status in (1, 2) and "usable row" in last and "2 rows quarantined" in last


# A disk that is full


@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB, which is told as a full disk is, in time to make room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_while_the_model_is_saved(here, small_files, capsys):
    status, last = said(capsys, words("train", JOB))
    assert status == 1 and last.startswith("maple-trl train: cannot write into out") and "File too large" in last


def test_a_full_disk_while_a_checkpoint_is_saved(here, small_files, capsys):
    status, last = said(capsys, words("train", JOB | {"save_strategy": "steps", "save_steps": 1}))
    assert status == 1 and "cannot write into" in last and "File too large" in last


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
@pytest.mark.parametrize("option", ["summary_file", "metrics_file"])
def test_a_full_disk_while_results_are_written(option, here, capsys):
    status, last = said(capsys, words("train", JOB | {option: "/dev/full"}))
    assert status == 1 and "cannot write into" in last and "No space left on device" in last
    assert Path("/dev/full").is_char_device()


def test_a_model_that_gives_no_numbers(here, models, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY, "nan")
    weights = {name: weight * float("nan") for name, weight in load_file(TINY / "model.safetensors").items()}
    save_file(weights, "nan/model.safetensors", metadata={"format": "pt"})
    status, last = said(capsys, words("train", JOB | {"model_name_or_path": "nan"}))
    assert status == 1 and "the model gives probabilities that are no numbers (inf or NaN): its weights" in last


def test_errors_of_a_full_disk_are_known_by_their_number_and_their_words():
    inner = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    outer = RuntimeError("while saving")
    outer.__cause__ = inner
    for error in (inner, outer, RuntimeError("I/O error: No space left on device (os error 28)")):
        assert "No space left on device" in failures._full(error, "runs")
    assert failures._full(OSError(errno.ENOENT, "No such file", "x"), "runs") is None
    assert failures._full(ValueError("anything"), "runs") is None


# Resuming


def test_an_adapter_and_a_whole_model_are_not_resumed_as_each_other(here, monkeypatch, capsys):
    lora = {"use_peft": "true", "lora_r": 4}
    for name, options in {"whole": {}, "adapter": lora}.items():
        job = JOB | options | {"output_dir": name, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        assert cli.main(words("train", job)) == 0
    forbid_loading(monkeypatch)
    again = {"resume_from_checkpoint": "true", "max_steps": 2}
    for name, options, message in (
        ("whole", lora, "use_peft is true, but whole/checkpoint-1 holds a whole model"),
        ("adapter", {}, "use_peft is false, but adapter/checkpoint-1 holds a LoRA adapter"),
        ("adapter", lora | {"lora_r": 8}, "lora_r is 8, but adapter/checkpoint-1 was trained with 4"),
        ("adapter", lora | {"lora_alpha": 3}, "lora_alpha is 3, but adapter/checkpoint-1 was trained with"),
    ):
        status, last = said(capsys, words("train", JOB | again | options | {"output_dir": name}))
        assert status == 2 and message in last, last


def test_a_run_is_not_resumed_with_another_optimizer_or_from_damaged_files(here, capsys, caplog):
    job = JOB | {"output_dir": "run", "save_strategy": "steps", "save_steps": 1}
    assert cli.main(words("train", job)) == 0
    # Checkpoints of former versions have these names too.
    assert set(json.loads(Path("run/checkpoint-1/rollout_0.json").read_text())) == {"step", "chunks", "geometry"}
    again = job | {"resume_from_checkpoint": "true", "max_steps": 2}
    for options, message in (
        ({"optim": "sgd"}, "checkpoint-1 has the state of another optimizer (optim)"),
        ({"freeze_vision": "true"}, "checkpoint-1 has the state of an optimizer for other parameters"),
    ):
        status, last = said(capsys, words("train", again | options))
        assert status == 2 and message in last, last
    for name in (
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rollout_0.json",
        "run_tally.json",
    ):
        file = Path("run/checkpoint-1", name)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        status, last = said(capsys, words("train", again | {"resume_from_checkpoint": "run/checkpoint-1"}))
        assert status == 2 and f"run/checkpoint-1/{name} is damaged" in last, last
        file.write_bytes(whole)
    assert cli.main(words("train", again | {"optim": "adamw_torch"})) == 0
    assert "has no effect" not in caplog.text
    # What the state of the optimizer overrules is told, and so is each other option that was changed.
    shutil.rmtree("run/checkpoint-2")
    clock = Path("run/checkpoint-1/run_clock.json")
    clock.write_text(json.dumps({"seconds": json.loads(clock.read_text())["seconds"] + 1000}))
    caplog.clear()
    assert cli.main(words("train", again | {"learning_rate": 0.5, "weight_decay": 0.25})) == 0
    assert "learning_rate is 0.5, which has no effect: run/checkpoint-1 was trained with 1e-06" in caplog.text
    assert "weight_decay is 0.25, which has no effect: run/checkpoint-1 was trained with 0.0" in caplog.text
    for option in ("learning_rate 1e-06 -> 0.5", "weight_decay 0.0 -> 0.25"):
        assert re.search(f"options differ from those with which .*checkpoint-1 was trained: .*{option}", caplog.text)
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["steps"] == 2 and summary["seconds"] > summary["train_seconds"] > 1000, "of the whole run"


# The Hub


@pytest.fixture
def online(monkeypatch):
    """As of a machine on which nobody has said that it is offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    return f"http://127.0.0.1:{port}"


def test_a_hub_that_cannot_be_reached_is_asked_once(online, here, capsys):
    """The library below tries five times, 23 seconds long, and names no reason."""
    started = time.monotonic()
    status, last = said(capsys, words("train", JOB | {"model_name_or_path": "org/absent"}))
    assert status == 2 and f"there is no folder org/absent, and it cannot be fetched from the Hub: {online}" in last
    assert (
        "hf download org/absent" in last and time.monotonic() - started < 20
    )  # that it waits at all, not how fast it is


def test_a_data_set_of_a_hub_that_cannot_be_reached_is_asked_for_once(online, here, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    status, last = said(capsys, words("train", JOB | {"dataset_name": "org/rows"}))
    assert (
        status == 2
        and f"cannot load the data set 'org/rows': there is no such local folder, and as a Hub id: {online}" in last
    )
    assert time.monotonic() - started < 20
    assert constants.HF_HUB_OFFLINE is False and datasets.config.HF_HUB_OFFLINE is False


def test_what_the_hub_gave_before_is_used_without_it(online, tmp_path, monkeypatch):
    """Laid out as the Hub's own cache is."""
    cache = tmp_path / "models--org--kept"
    shutil.copytree(TINY, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    options = checkpoints.reach("org/kept", {"cache_dir": str(tmp_path)})
    assert options["local_files_only"] is True
    model = loading.load_model("org/kept", cache_dir=str(tmp_path))
    assert model.config.model_type == "qwen2_5_omni_thinker"
    with pytest.raises(checkpoints.CheckpointError, match="cannot be fetched"):
        checkpoints.reach("org/other", {"cache_dir": str(tmp_path)})


# Parts


def test_what_counts_as_rewards():
    import numpy as np

    for values in ([1, 0.5, None], (True, 2, 3), np.ones(3), torch.ones(3), [torch.tensor(1.0), np.float32(2), None]):
        assert len(checked_rewards(values, 3, "r")) == 3
    assert len(checked_rewards((i for i in range(3)), 3, "r")) == 3
    for values in (
        np.ones(()),
        torch.tensor(1.0),
        np.ones((3, 1)),
        {1.0, 2.0, 3.0},
        [1, 2, "3"],
        [object()] * 3,
        b"abc",
    ):
        with pytest.raises(RewardError):
            checked_rewards(values, 3, "r")


def test_required_columns():
    from maple_trl.rewards import accuracy_reward, box_iou_reward, for_rows, for_tags, format_reward

    def mine(completions, answer, hint=None, *, weight, **columns):
        """Two columns, and one that may be missing."""

    assert required_columns(accuracy_reward) == required_columns(box_iou_reward) == ["solution"]
    assert required_columns(format_reward) == []
    assert required_columns(mine) == ["answer", "weight"]
    assert required_columns(for_tags(accuracy_reward, ["V"])) == ["tag", "solution"]
    assert required_columns(for_rows(mine, "kind", ["a"])) == ["kind", "answer", "weight"]

    def all_by_name(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, group_ids, answer):
        """Takes nothing else, and is given nothing else."""

    check_rewards([all_by_name], ["prompt", "answer"], "rows")
    with pytest.raises(RewardError, match="got an unexpected keyword argument 'hint'"):
        check_rewards([all_by_name], ["prompt", "answer", "hint"], "rows")
    check_rewards([mine, "a/reward-model", torch.nn.Linear(1, 1)], ["prompt", "answer", "weight"], "rows")


def test_a_supported_model_passes(tmp_path):
    """The control of all refusals above."""
    for family in ("qwen2_5_omni", "qwen3_omni", "qwen2_5_vl", "qwen3_vl", "qwen2_audio"):
        checkpoints.check_checkpoint(str(save_tiny(family, tmp_path / family)), {}, text=False)
    checkpoints.check_checkpoint(str(TINY), {}, text=False)


def test_a_device_keeps_its_place(tmp_path):
    from maple_trl.files import write_atomically

    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


# From Python


def test_what_is_no_argument_of_a_trainer(here):
    from datasets import Dataset, DatasetDict

    from maple_trl import MAPOConfig, OmniGRPOConfig, OmniGRPOTrainer

    options = {"output_dir": "out", "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
    options |= {"use_cpu": True, "bf16": False, "report_to": []}
    rows = Dataset.from_list([ROW] * 2)

    def reward(completions, **_):
        return [0.0] * len(completions)

    def make(model=str(TINY), rewards=reward, data=rows, kind=OmniGRPOConfig):
        return OmniGRPOTrainer(model, rewards, kind(**options), data)

    for wrong, message in (
        ({"model": torch.nn.Linear(1, 1)}, "model must be a model of transformers, a folder or a Hub id, got Linear"),
        ({"model": None}, "model must be a model of transformers"),
        ({"rewards": "CaptionJudge"}, "pass maple_trl.rewards.CaptionJudge itself"),
        ({"rewards": 5}, "the reward 5 is no function but int"),
        ({"data": DatasetDict(train=rows)}, "train_dataset holds several splits \\(train\\); pass one of them"),
        ({"data": rows.select([])}, "train_dataset holds no row"),
        ({"kind": MAPOConfig}, "args is MAPOConfig, whose own options have no effect"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            make(**wrong)


def test_a_trainer_finds_rewards_by_their_names(here):
    """Ours before the Hub is asked, alone and in a list; functions and names of other kinds stay what they are."""
    from datasets import Dataset

    from maple_trl.rewards import accuracy_reward, format_reward
    from maple_trl.rewards.calls import find_rewards
    from maple_trl.trainers import MAPOConfig, MAPOTrainer

    options = {"output_dir": "out", "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
    options |= {"use_cpu": True, "bf16": False, "report_to": []}
    rows = Dataset.from_list([ROW] * 2)
    for said, meant in (
        ("accuracy_reward", [accuracy_reward]),
        (["format_reward", accuracy_reward], [format_reward, accuracy_reward]),
    ):
        assert MAPOTrainer(str(TINY), said, MAPOConfig(**options), rows).reward_funcs == meant
    assert find_rewards(["org/reward-model", "CaptionJudge", len]) == ["org/reward-model", "CaptionJudge", len]
