"""VideoLLaMA 3 and Phi-4 through every trainer by their saved folder: pictures beside other media, and a run that goes on."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from eval_runs import evaluate, lines_of
from PIL import Image
from programs import Ranks
from safetensors.torch import load_file
from tiny_models import save_tiny

from maple_trl import cli


pytestmark = pytest.mark.slow

TAGS = {"video_llama_3": ("V", "VS", "S"), "phi4_multimodal": ("V", "VA", "AS")}
OPTIONS = {
    "dtype": "float32",
    "num_frames": 3,
    "min_pixels": 784,
    "max_pixels": 3136,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "evaluate_before_after": False,
}
GRPO = {
    "num_generations": 8,
    "max_completion_length": 6,
    "shared_prefix": "on",
    "reward_funcs": ["omni_runs:spread_reward"],
}
TRAINERS = {
    "omni_sft": {"per_device_train_batch_size": 3, "completion_template": "<answer>{solution}</answer>"},
    "omni_grpo": GRPO,
    "mapo": GRPO,
    "avatar": GRPO,
}


@pytest.fixture(scope="module")
def data(seven_tags):
    """By family the rows of its tags, with a picture where they are seen; Phi-4's are stills with a sound."""
    folder, dataset = seven_tags
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "still.png")
    for name, tags in (TAGS | {"qwen2_5_vl": TAGS["video_llama_3"]}).items():
        rows = []
        for row in dataset.to_list():
            if row["tag"] in tags:
                only = {"video": None, "audio": row["video"]} if name == "phi4_multimodal" else {}
                keep = ("prompt", "solution", "tag", "video", "audio", "subtitle", "kind")
                rows.append({k: v for k, v in (row | only).items() if k in keep} | {"image": "still.png"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("family", TAGS)
@pytest.mark.matrix(cases=2)
def test_two_steps_and_a_resume(family, trainer, data, tmp_path, capsys):
    out = tmp_path / "out"
    options = OPTIONS | TRAINERS[trainer] | {"trainer": trainer, "output_dir": str(out), "media_root": str(data)}
    options |= {"model_name_or_path": str(save_tiny(family, tmp_path / "model"))}
    options["dataset_name"] = str(data / f"{family}.jsonl")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(options))
    assert cli.main(["train", "--config", str(tmp_path / "job.yaml")]) == 0, capsys.readouterr().err
    start, first, second = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "model", *sorted(out.glob("checkpoint-*")))
    )
    moved = {name for name, value in first.items() if not value.equal(start[name])}
    assert any("embed" in name for name in moved) and not all(second[name].equal(first[name]) for name in moved)
    fed = [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(fed) == 2 and sum(line.get("media_tokens/image", 0) for line in fed) > 0
    shutil.rmtree(out / "checkpoint-2")
    words = ["--config", str(tmp_path / "job.yaml"), "--resume_from_checkpoint", "true"]
    assert cli.main(["train", *words]) == 0, capsys.readouterr().err
    again = load_file(out / "checkpoint-2" / "model.safetensors")
    assert all(value.equal(again[name]) for name, value in second.items())


@pytest.mark.parametrize("family", TAGS)
def test_an_evaluation_answers_every_row(family, data, tmp_path):
    model = [
        "--model",
        save_tiny(family, tmp_path / "model"),
        "--num-frames",
        3,
        "--max-pixels",
        6272,
        "--max-new-tokens",
        4,
    ]
    rows = ["--dataset-name", data / f"{family}.jsonl", "--media-root", data, "--limit", 6, "--samples", 1]
    assert evaluate(*model, *rows, "--output", tmp_path / "out", "--device", "cpu", "--quiet") == 0
    lines = lines_of(tmp_path / "out")
    assert len(lines) == 6 and {line["tag"] for line in lines} <= set(TAGS[family])
    assert any(line["completion"] for line in lines)


FSDP = {
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# accelerate shards over processes of GPUs alone.
SPREAD = """
import sys
from accelerate.state import DistributedType, PartialState
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
from maple_trl import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "way"),
    [("phi4_multimodal", "ddp"), *((name, "fsdp2") for name in ("phi4_multimodal", "video_llama_3", "qwen2_5_vl"))],
)
@pytest.mark.matrix(cases=2)
def test_two_processes_train_as_one_does(family, way, data, tmp_path):
    """Each waits for every gradient or weight, while one has pictures and sounds that the other has not."""
    options = OPTIONS | TRAINERS["omni_sft"] | {"trainer": "omni_sft", "media_root": str(data), "save_steps": 2}
    options |= {"model_name_or_path": str(save_tiny(family, tmp_path / "model")), "ddp_find_unused_parameters": False}
    options |= {
        "dataset_name": str(data / f"{family}.jsonl"),
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    weights = {}
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        options |= {"output_dir": str(out), "per_device_train_batch_size": 2 // processes}
        spread = processes == 2 and way == "fsdp2"
        (tmp_path / f"{processes}.yaml").write_text(
            yaml.safe_dump(options | ({"use_cpu": False, "ddp_backend": "gloo"} if spread else {}))
        )
        words = [
            *(["-c", SPREAD] if spread else ["-m", "maple_trl.cli"]),
            "train",
            "--config",
            tmp_path / f"{processes}.yaml",
        ]
        log = tmp_path / f"{processes}.log"
        assert Ranks(processes, words, log, FSDP if spread else None).wait() == 0, log.read_text()[-3000:]
        weights[processes] = load_file(out / "checkpoint-2" / "model.safetensors")
    # As accelerate writes it where it is spread.
    assert (out / "checkpoint-2" / "optimizer.bin").exists() == (way == "fsdp2")
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(start[name], value) for name, value in weights[1].items())
    for name, value in weights[1].items():
        message = lambda told, name=name: f"{name}: {told}"  # noqa: E731
        torch.testing.assert_close(weights[2][name], value, rtol=1e-4, atol=1e-5, msg=message)
