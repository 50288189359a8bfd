"""Published checkpoints through the commands: evaluated by one, and trained from, with the numbers of the plain Thinker."""

import json

import checkpoint_layouts as layouts
import pytest
import torch
from eval_runs import SMALL, evaluate, lines_of, result_of
from local_hub import taken_for_the_hub
from media_files import tone, write_video
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from maple_trl import cli


OMNI = "qwen2_5_omni"
ASKED = [*SMALL, "--data", "builtin:seven-tags", "--limit", "4", "--samples", "1", "--device", "cpu", "--quiet"]
SAID = ("row", "sample", "completion", "score")


def answers(folder):
    return [{name: line[name] for name in SAID} for line in lines_of(folder)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def plain(folder):
    """The evaluation of the Thinker as this library saves it."""
    assert evaluate("--model", save_tiny(OMNI, folder / "plain"), *ASKED, "--output", folder / "plain-eval") == 0
    return folder / "plain-eval"


@pytest.fixture(scope="module")
def bare(folder):
    """Weights without a processor, as some are published."""
    config = layouts.full_config(OMNI, enable_audio_output=False)
    tensors = layouts.prefixed(layouts.thinker_tensors(OMNI))
    return layouts.write_checkpoint(folder / "bare", OMNI, config, tensors, processor=False)


def test_a_full_model_is_evaluated(plain, folder):
    model = layouts.published(folder / "full", OMNI)
    assert evaluate("--model", model, *ASKED, "--output", folder / "full-eval") == 0
    assert answers(folder / "full-eval") == answers(plain)
    assert result_of(folder / "full-eval")["model"]["sha256"] == result_of(plain)["model"]["sha256"]


@pytest.mark.slow
def test_a_mixture_of_experts_is_evaluated(folder):
    """Without a config of a talker, as Qwen3-Omni's Thinking model is published."""
    for name, model in (
        ("moe", save_tiny("qwen3_omni", folder / "moe")),
        ("moe-published", layouts.without_talker_config(folder / "moe-published", "qwen3_omni")),
    ):
        words = ["--model", model, *ASKED, "--max-pixels", "4096", "--output", folder / f"{name}-eval"]
        assert evaluate(*words) == 0
    assert answers(folder / "moe-published-eval") == answers(folder / "moe-eval")


def test_a_benchmark_as_published_by_one_command(folder):
    clip = folder / "daily/Videos/abc"
    clip.mkdir(parents=True)
    write_video(clip / "abc_video.mp4", audio=tone(1.0, 16000))
    choices = ["A. A bell", "B. Rain", "C. Laughter", "D. Nothing"]
    record = {"Question": "What is heard?", "Choice": choices, "Answer": "C", "video_id": "abc", "Type": "AV Event"}
    record |= {"content_parent_category": "None", "content_fine_category": "None", "video_category": "Pets"}
    (folder / "daily/qa.json").write_text(json.dumps([record | {"video_duration": "30s"}]))
    model = layouts.full_export(folder / "export", OMNI)
    words = [
        "--model_name_or_path",
        model,
        "--benchmark",
        "daily-omni",
        "--data",
        folder / "daily",
        "--preset",
        "avatar",
    ]
    assert evaluate(*words, *SMALL, "--device", "cpu", "--quiet", "--output", folder / "daily-eval") == 0
    (line,) = lines_of(folder / "daily-eval")
    assert line["completion"] and line["tag"] == "VA" and line["score"] in (0.0, 1.0)


def test_a_processor_is_taken_from_the_base_model(bare, plain, folder, capsys):
    words = ["--model", bare, *ASKED, "--output", folder / "bare-eval"]
    assert evaluate(*words) == 2
    assert "holds a model without its tokenizer: there is no tokenizer.json; take that of" in capsys.readouterr().err
    base = folder / "plain"
    assert evaluate(*words, "--processor", base) == 0
    assert answers(folder / "bare-eval") == answers(plain)
    assert result_of(folder / "bare-eval")["model"]["processor"] == str(base)


def test_a_processor_of_another_family_is_refused(bare, folder, capsys):
    layouts.write_processor(folder / "other", "qwen3_omni")
    config = json.loads((bare / "config.json").read_text())
    config["thinker_config"]["audio_token_index"] += 1
    wrong = layouts.copy(bare, folder / "wrong")
    (wrong / "config.json").write_text(json.dumps(config))
    words = ["--model", wrong, *ASKED, "--output", folder / "wrong-eval", "--processor", folder / "other"]
    assert evaluate(*words) == 2
    assert "is of another model: its token '<|audio_pad|>' is" in capsys.readouterr().err


def linear_modules():
    """All linear layers but the head, by their names in files."""
    for name, tensor in layouts.thinker_tensors(OMNI).items():
        if name.endswith(".weight") and tensor.dim() == 2 and "embed" not in name and "token" not in name:
            if name != "lm_head.weight":
                yield name.removesuffix(".weight"), tensor.shape


@pytest.fixture(scope="module")
def adapter(folder):
    """As ms-swift saves one over all linear layers of the full model; and the model with it merged."""
    random = torch.Generator().manual_seed(5)
    tensors, merged = {}, layouts.thinker_tensors(OMNI)
    for module, (rows, columns) in linear_modules():
        low, high = torch.randn(2, columns, generator=random) / 8, torch.randn(rows, 2, generator=random)
        start = f"base_model.model.thinker.{module}"
        tensors |= {f"{start}.lora_A.weight": low, f"{start}.lora_B.weight": high}
        merged[f"{module}.weight"] = merged[f"{module}.weight"] + 2 * high @ low
    place = folder / "adapter"
    place.mkdir()
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    pattern = r"^(thinker\.(model|visual|audio_tower)(?=\.).*\.\w+)$"
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.05}
    config |= {"target_modules": pattern, "base_model_name_or_path": str(folder / "base/thinker")}
    (place / "adapter_config.json").write_text(json.dumps(config))
    layouts.published(folder / "base", OMNI)
    layouts.write_checkpoint(folder / "merged", OMNI, layouts.thinker_config(OMNI), merged)
    return place


@pytest.mark.slow
def test_an_adapter_of_the_full_model_is_evaluated(adapter, plain, folder):
    assert evaluate("--model", folder / "merged", *ASKED, "--output", folder / "merged-eval") == 0
    assert evaluate("--model", adapter, *ASKED, "--output", folder / "adapter-eval") == 0
    named = ["--model", folder / "base", "--adapter", adapter, *ASKED, "--output", folder / "named-eval"]
    assert evaluate(*named) == 0
    assert answers(folder / "merged-eval") != answers(plain)
    assert answers(folder / "adapter-eval") == answers(folder / "named-eval") == answers(folder / "merged-eval")


@pytest.mark.slow
def test_models_and_adapters_are_named_on_the_hub(adapter, folder, monkeypatch, capsys):
    def files(place):
        return {path.name: path.read_bytes() for path in place.iterdir()}

    with taken_for_the_hub(monkeypatch, folder / "cache") as hub:
        commit = hub.publish("org/adapter", files(adapter))
        model = hub.publish("org/omni", files(folder / "base"))
        hub.publish("org/adapter", files(adapter) | {"adapter_model.safetensors": b"a later one"})
        words = ["--model", "org/adapter", "--revision", commit, *ASKED]
        assert evaluate(*words, "--output", folder / "hub-eval") == 0
        assert evaluate("--model", "org/omni", *ASKED, "--output", folder / "hub-model-eval") == 0
        nothing = ["--model", "org/omni", "--adapter", "org/omni", *ASKED, "--output", folder / "hub-none"]
        assert evaluate(*nothing) == 2
    assert "adapter: org/omni holds no adapter_config.json" in capsys.readouterr().err
    assert evaluate("--model", folder / "merged", *ASKED, "--output", folder / "hub-wanted") == 0
    assert answers(folder / "hub-eval") == answers(folder / "hub-wanted")
    assert result_of(folder / "hub-model-eval")["model"]["revision"] == model


TRAINED = {
    "dataset_name": "builtin:seven-tags",
    "reward_funcs": "format_reward",
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "num_frames": 4,
    "max_pixels": 3136,
    "max_steps": 1,
    "use_cpu": "true",
    "bf16": "false",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": "true",
    "evaluate_before_after": "false",
}


def train(**options):
    return cli.main(
        ["train", *(word for name, value in (TRAINED | options).items() for word in (f"--{name}", str(value)))]
    )


@pytest.mark.slow
def test_training_begins_from_weights_without_a_processor(bare, folder):
    options = {
        "model_name_or_path": bare,
        "processor_name_or_path": folder / "plain",
        "output_dir": folder / "trained",
    }
    save_tiny(OMNI, folder / "plain")
    assert train(**options) == 0
    assert (folder / "trained/processor_config.json").is_file()
    saved = load_file(folder / "trained/model.safetensors")
    assert {name.removeprefix("thinker.") for name in saved} == layouts.thinker_tensors(OMNI).keys()


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_of_the_full_model(adapter, folder):
    options = {"model_name_or_path": adapter, "output_dir": folder / "adapted", "use_peft": "true"}
    assert train(**options, lora_r=2, lora_alpha=4, lora_dropout=0.05) == 0
    saved = load_file(folder / "adapted/adapter_model.safetensors")
    assert len(saved) == len(load_file(adapter / "adapter_model.safetensors"))
