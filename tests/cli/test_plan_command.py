"""`maple-trl plan`: known and own models, verdicts and advice, and what is refused."""

import json

import pytest
import tiny_models

from maple_trl import cli
from maple_trl.omni.loading import load_model
from maple_trl.planning.catalogue import GPUS, MODELS, RATES


OMNI = "Qwen/Qwen2.5-Omni-3B"


def plan(capsys, *words, model=OMNI):
    status = cli.main(["plan", "--model", model, *map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_table_of_real_sizes(capsys):
    """TFLOP of a training and a log-probability pass, as they were computed for these sizes before."""
    frozen = ["--freeze_vision", "--freeze_audio", "--freeze_projectors", "--gpu", "H200"]
    lengths = {(4096, 256): (884, 179, 162), (8192, 256): (1877, 327, 292), (4096, 1024): (1070, 365, 348)}
    for (prompt, completion), (rows, shared, cached) in lengths.items():
        sizes = ["--prompt", prompt, "--completion", completion, *frozen]
        found = [
            plan(capsys, *sizes, *more)[1]["operations"]["train"] / 1e12
            for more in (
                ["--shared_prefix", "off", "--encoder_cache_bytes", 0],
                ["--encoder_cache_bytes", 0],
                [],
            )
        ]
        assert found == pytest.approx([rows, shared, cached], rel=0.02)
    found = plan(capsys, "--prompt", 4096, "--completion", 256, *frozen, "--encoder_cache_bytes", 0)[1]
    assert found["operations"]["log_probs"] / 1e12 == pytest.approx(58, rel=0.02)


def test_a_model_in_a_folder_and_the_embedded_one(capsys, tmp_path):
    folder = tiny_models.save_tiny_full("qwen2_5_omni", tmp_path)
    thinker, _ = tiny_models.build_tiny("qwen2_5_omni")
    _, found = plan(capsys, model=str(folder))
    assert found["model"]["parameters"] == thinker.num_parameters()
    _, found = plan(capsys, model="builtin:tiny-omni")
    assert found["model"]["parameters"] == load_model("builtin:tiny-omni").num_parameters()


def test_what_does_not_fit_says_what_would(capsys):
    status, found = plan(capsys, "--gpu", "RTX-4090", "--beta", 0.04)
    assert status == 1 and found["verdict"] == "does not fit"
    # What is advised is true: the same words with the change.
    assert found["changes"] and "use_peft true" in found["changes"][0]["change"]
    status, found = plan(capsys, "--gpu", "RTX-4090", "--use_peft", "true", "--beta", 0.04, "--optim", "adamw_8bit")
    assert status == 0
    status, found = plan(capsys, "--gpu", "H200")
    assert status == 0 and found["verdict"] == "fits" and found["changes"] == []


def test_the_page_for_a_reader(capsys):
    words = ["--gpus", "2", "--use_vllm", "true", "--judge_calls", "1", "--compute_share", "0.5", "--gpu_memory", "60"]
    assert cli.main(["plan", "--model", OMNI, *words]) in (0, 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "4.70 B parameters" in shown and "rollout engine" in shown and "judge" in shown
    assert "old log-probabilities" in shown and "weights to the engine" in shown
    assert "--compute_share 0.5 of the peak" in shown and "(given)" in shown and "given: gpu_memory" in shown
    for name, rate in RATES.items():
        assert f"--{name}" in shown and rate.origin in shown


def test_a_server_has_cards_of_its_own(capsys):
    words = ["--gpus", 8, "--use_vllm", "true", "--vllm_mode", "server", "--rollout_gpus", 4, "--sharding", "zero3"]
    status, found = plan(capsys, *words, "--video_tokens", 0, "--audio_tokens", 0)
    assert found["memory"]["server"]["rollout engine"] == pytest.approx(0.9 * 80 * 2**30)
    assert "rollout engine" not in found["memory"]["rollout"] or not found["memory"]["rollout"]["rollout engine"]
    assert any("wait" in note for note in found["notes"])


def test_options_of_a_file(capsys, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("gpu: H200\nprompt: 1024\ncompletion: 64\n", encoding="utf-8")
    _, found = plan(capsys, "--config", file, "--completion", 32)
    assert (found["gpu"]["name"], found["options"]["prompt"], found["options"]["completion"]) == ("H200", 1024, 32)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "H300"], "gpu 'H300' is not known; did you mean H800?"),
        (["--gpus", "0"], "gpus must be at least 1, got 0"),
        (["--num_generations", "3"], "cannot be divided into groups of num_generations 3: make it a multiple"),
        (["--prompt", "100", "--video_tokens", "200"], "cannot hold 200 of video"),
        (["--vllm_mode", "remote"], "vllm_mode must be colocate or server, got 'remote'"),
        (["--shared_prefix", "maybe"], "shared_prefix must be auto, on or off"),
        (["--use_peft", "true", "--lora_r", "0"], "lora_r must be at least 1 with use_peft, got 0"),
        (["--gpu_memory", "0"], "gpu_memory must be positive, got 0"),
        (["--prompts", "3"], "unknown argument --prompts; did you mean --prompt?"),
        (["--gpus", "many"], "invalid int value: 'many'"),
        (["--model", "Qwen/Qwen3-8B", "--audio_tokens", "8"], "has no tower for audio"),
        (["--model", "nowhere/to-be-found"], "there is no folder nowhere/to-be-found"),
        (["--model", "builtin:huge"], "There is no embedded model 'builtin:huge'; embedded: builtin:tiny-omni"),
    ],
)
def test_a_wrong_description_says_what_is_wrong(capsys, words, told):
    assert cli.main(["plan", "--model", OMNI, *words]) == 2
    shown = capsys.readouterr().err
    assert told in shown and shown.count("\n") == 1


def test_a_model_whose_sizes_are_unknown(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert cli.main(["plan", "--model", str(tmp_path)]) == 2
    assert "sizes of the model type 'gpt2' are not known" in capsys.readouterr().err
    assert cli.main(["plan", "--gpus", "2"]) == 2
    assert "--model_name_or_path is missing" in capsys.readouterr().err


def test_every_known_model_and_card_has_a_plan(capsys):
    for model in MODELS:
        for gpu in ("H100", "RTX-4090"):
            _, found = plan(capsys, "--gpu", gpu, "--prompt", 512, model=model)
            assert found["memory"]["peak"] > 2 * found["model"]["parameters"]
    for gpu in GPUS:
        assert plan(capsys, "--gpu", gpu.lower())[1]["gpu"]["name"] == gpu
