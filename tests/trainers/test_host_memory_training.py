"""The budget of host memory in runs: what it changes (nothing of the result), what it tells, what it refuses."""

import json
import tracemalloc

import pytest
import torch
import yaml
from datasets import Dataset
from omni_runs import QUIET_ON_CPU, build_config, build_trainer
from tiny_models import build_tiny

from maple_trl import AvatarConfig, AvatarTrainer, OmniGRPOTrainer, OmniSFTConfig, cli
from maple_trl.jobs.eval_job import EvalMedia
from maple_trl.omni import host_memory as host_memory_module
from maple_trl.omni.families import family_for
from maple_trl.omni.host_memory import host_memory
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.records import metrics_log
from maple_trl.records.metrics_log import whole_log
from maple_trl.records.options import not_deciding
from maple_trl.trainers.common.quarantine import RowRegistry


MODEL = "builtin:tiny-omni"
AVATAR = QUIET_ON_CPU | {
    "num_frames": 4,
    "max_pixels": 3136,
    "max_prompt_length": 128,
    "max_completion_length": 8,
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "replayed_generations": 2,
    "replay_capacity": 40,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
}


def letters(completions, **columns):
    return [sum(map(ord, completion[0]["content"])) % 7 / 7 for completion in completions]


@pytest.fixture(autouse=True)
def own_budget(monkeypatch):
    """A budget of each test's own, against which trainers that other tests keep do not count."""
    monkeypatch.setattr(host_memory_module, "_memory", host_memory_module.HostMemory())


def avatar(seven_tags, output, **options):
    folder, rows = seven_tags
    options = {"output_dir": str(output), "media_root": str(folder), **AVATAR, **options}
    model = load_model(MODEL, dtype="float32")
    for name, weight in model.named_parameters():  # what towers make is kept
        weight.requires_grad_("visual" not in name and "audio_tower" not in name)
    given = {"model": model, "processing_class": load_processor(MODEL)}
    # Pictures in all: text would need no memory.
    rows = rows.filter(lambda row: "V" in row["tag"]).select(range(12))
    return AvatarTrainer(reward_funcs=letters, args=AvatarConfig(**options), train_dataset=rows, **given)


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_the_budget_changes_nothing_of_the_result(seven_tags, tmp_path, caplog):
    weights, logs, losses, told = {}, {}, {}, {}
    for budget in ("1GiB", "3MB", "200KB"):
        evicted = host_memory().evictions
        trainer = avatar(seven_tags, tmp_path / budget, max_steps=6, host_memory_bytes=budget)
        trainer.train()
        logs[budget] = logged(trainer)
        weights[budget] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        losses[budget] = [(entry["loss"], entry["grad_norm"], entry["reward"]) for entry in logs[budget]]
        for entry in logs[budget]:
            entry["memory/host_evictions"] -= evicted
        trainer.loader.close()
        del trainer
        told[budget] = [record.getMessage() for record in caplog.records if "Host memory" in record.getMessage()]
        caplog.clear()
    for budget in ("3MB", "200KB"):
        assert losses[budget] == losses["1GiB"]
        assert all(torch.equal(value, weights["1GiB"][name]) for name, value in weights[budget].items())
    start = load_model(MODEL, dtype="float32").state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in weights["3MB"].items())
    large, middle, tiny = logs.values()
    assert not told["1GiB"] and not told["3MB"]
    assert any("more than the 195.3 KiB that this process may keep" in text for text in told["200KB"])
    # All is kept; some goes; none is kept.
    assert large[-1]["memory/host_evictions"] == 0 and middle[-1]["memory/host_evictions"] > 3
    assert large[-1]["memory/host_bytes/media"] > 5 * 37_000 and large[-1]["memory/host_bytes/encoder"] > 0
    assert all(entry["memory/host_bytes"] <= entry["memory/host_budget"] == 3_000_000 for entry in middle)
    assert all(entry["memory/host_bytes/media"] < large[-1]["memory/host_bytes/media"] for entry in tiny)
    for entry in large:
        parts = {name: value for name, value in entry.items() if name.startswith("memory/host_bytes/")}
        assert {f"memory/host_bytes/{part}" for part in ("media", "encoder", "specs", "prompts", "rows")} <= set(parts)
        assert entry["memory/host_bytes"] == sum(parts.values()) < entry["memory/host_rss"]
    assert large[-1]["memory/host_bytes/replay"] > 8 * 3 << 10 and large[-1]["memory/host_bytes/log"] > 1000
    assert large[-1]["memory/host_rss_children"] > 10 << 20  # the decoders
    lines = (tmp_path / "3MB" / "metrics.jsonl").read_text().splitlines()
    assert "memory/host_bytes" in json.loads(lines[0])


def test_a_budget_decides_no_result():
    assert not_deciding(AvatarConfig)["host_memory_bytes"] == "speed" == not_deciding(EvalMedia)["host_memory_bytes"]


@pytest.mark.parametrize("config", [AvatarConfig, OmniSFTConfig])
def test_contradictions_are_refused_with_both_numbers(tmp_path, config, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def make(**options):
        return config(output_dir=str(tmp_path), bf16=False, use_cpu=True, **options)

    with pytest.raises(ValueError, match=r"host_memory_bytes=\d+ \(900.0 TiB\) is more than this machine.* has: \d+ "):
        make(host_memory_bytes="900TiB")
    with pytest.raises(ValueError, match=r"media_cache_bytes=\d+ \(3.0 GiB\) is more than the \d+ \(1.0 GiB\)"):
        make(host_memory_bytes="1GiB", media_cache_bytes=3 << 30)
    with pytest.raises(
        ValueError,
        match=r"encoder_cache_bytes=300000 \(293.0 KiB\) is more than the 200000 \(195.3 KiB\) that each of",
    ):
        make(host_memory_bytes=200_000, encoder_cache_bytes=300_000)
    with pytest.raises(ValueError, match=r"host_memory_bytes=8 is 8 bytes, too few for anything: a unit is missing"):
        make(host_memory_bytes=8)
    with pytest.raises(ValueError, match="host_memory_bytes must be a size such as 8GiB"):
        make(host_memory_bytes="much")
    assert make(host_memory_bytes="1GiB").host_share() == 1 << 30  # their defaults are bounds from above
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert make(host_memory_bytes="1GiB").host_share() == 1 << 28
    with pytest.raises(ValueError, match=r"than the 268435456 \(256.0 MiB\) that each of 4 processes has"):
        make(host_memory_bytes="1GiB", media_cache_bytes=1 << 29)


def test_replay_that_cannot_fit_is_refused_before_training(tmp_path, caplog, monkeypatch):
    def make(**options):
        return AvatarConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **options)

    # 10 000 completions of 3 KiB and 8 bytes for each of 2048 tokens.
    numbers = r"replay_capacity=10000 .*max_completion_length=2048 tokens may take 194560000 bytes \(185.5 MiB\)"
    with pytest.raises(ValueError, match=numbers + r".* which has 104857600 \(100.0 MiB\)"):
        make(host_memory_bytes="100MiB", max_completion_length=2048)
    make(host_memory_bytes="200MiB", max_completion_length=2048)
    make(host_memory_bytes="100MiB", max_completion_length=2048, replayed_generations=0)
    assert not caplog.records
    monkeypatch.setattr("maple_trl.trainers.common.media_config.machine_memory", lambda: 100 << 20)
    make(max_completion_length=2048)  # half of what there is: nobody has asked for it
    assert "185.5 MiB" in caplog.text and "50.0 MiB" in caplog.text


def test_half_of_the_machine_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr("maple_trl.trainers.common.media_config.machine_memory", lambda: 64 << 30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert build_config(tmp_path).host_share() == 4 << 30
    monkeypatch.setattr("maple_trl.trainers.common.media_config.machine_memory", lambda: None)
    assert build_config(tmp_path).host_share() is None


# Growth that is none of a cache's


def numbered(first, last):
    return [{"step": step, "loss": step / 10} for step in range(first, last + 1)]


def write(path, entries, tail=""):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    return path


def test_the_beginning_of_a_log_is_taken_from_its_file(tmp_path):
    path = write(tmp_path / "metrics.jsonl", numbered(1, 9), tail='{"step": 10, "lo')
    assert whole_log(numbered(4, 9), path, kept=6) == numbered(1, 9)
    assert whole_log(numbered(4, 7), path, kept=4) == numbered(1, 7)  # the file is of a run that went further
    assert whole_log(numbered(4, 9), path, kept=7) == numbered(4, 9)  # none was let go: the file is another run's
    assert whole_log([], path, kept=1) == [] == whole_log([], tmp_path / "none", kept=1)
    both = [*numbered(1, 3), {"step": 3, "eval_loss": 1.0}, *numbered(4, 5)]
    write(path, both)
    assert whole_log(both[3:], path, kept=3) == both  # cut between two entries of a step


@pytest.mark.slow
def test_a_run_keeps_the_end_of_its_log_in_memory_and_all_of_it_in_the_file(seven_tags, tmp_path, monkeypatch):
    folder, rows = seven_tags
    rows = rows.filter(lambda row: row["tag"] == "S")

    def run(name, **options):
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **options}
        options |= {"save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path / name)}
        return build_trainer(folder, rows, **options)

    def steps(path):
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    whole = run("whole", max_steps=7)
    whole.train()
    assert len(whole.state.log_history) == 8
    monkeypatch.setattr(metrics_log, "LOG_ENTRIES", 3)
    trainer = run("short", max_steps=7)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history] == [6, 7, 7]
    assert steps(tmp_path / "short" / "metrics.jsonl") == [1, 2, 3, 4, 5, 6, 7, 7]
    held = host_memory().parts()["log"]
    # As after a kill in step 6: the file has more than the checkpoint, which has but the end of its log.
    state = json.loads((tmp_path / "short" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [2, 3, 4]
    trainer = run("short", max_steps=7)
    trainer.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-4"))
    assert steps(tmp_path / "short" / "metrics.jsonl") == [1, 2, 3, 4, 5, 6, 7, 7]
    ours = [json.loads(line) for line in (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()]
    assert [entry.get("loss") for entry in ours] == [entry.get("loss") for entry in whole.state.log_history]
    assert 0 < held < 3 * 20_000


def test_texts_of_a_large_data_set_are_not_gathered(seven_tags):
    """They are read one row after another, where there are files to look at too."""
    folder, rows = seven_tags
    video = next(row["video"] for row in rows if row["video"])
    texts = [[{"role": "user", "content": f"{i} " + "word " * 4000}] for i in range(300)]
    data = Dataset.from_dict({"prompt": texts * 2, "video": [video] * 600, "tag": ["V"] * 600})
    config, (_, processor) = build_config(folder), build_tiny("qwen2_5_omni")
    model, _ = build_tiny("qwen2_5_omni")
    builder = config.prompt_builder(family_for(model, processor), config.media_loader())
    tracemalloc.start()
    try:
        registry = RowRegistry(data, builder, progress=False)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(registry._rows_of) == 300 and registry.row_number(builder.spec(data[299]).key) == 299
    assert registry.rows_of(registry._keys[5])[1]["prompt"] == texts[5]
    assert peak < 300 * 20_000 / 3 and held < 600 * 1000
    table = data.data.nbytes
    assert held / 4 < registry.nbytes - table < 4 * held


# Commands


@pytest.mark.long
@pytest.mark.slow
def test_a_job_and_an_evaluation_take_a_budget(seven_tags, tmp_path, capsys):
    folder, rows = seven_tags
    rows.select(range(8)).to_json(tmp_path / "rows.jsonl")
    job = {name: value for name, value in AVATAR.items() if name not in ("disable_tqdm", "report_to")}
    job |= {"model_name_or_path": MODEL, "dtype": "float32", "report_to": "none", "max_steps": 1, "trainer": "avatar"}
    job |= {"dataset_name": str(tmp_path / "rows.jsonl"), "media_root": str(folder), "rewards": ["accuracy_reward"]}
    job |= {"host_memory_bytes": "80MiB"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))

    def train(name, *words):
        return cli.main(
            ["train", "--config", str(tmp_path / "job.yaml"), "--output_dir", str(tmp_path / name), *words]
        )

    assert train("first") == 0
    first = json.loads((tmp_path / "first" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["memory/host_budget"] == 80 << 20
    assert json.loads((tmp_path / "first" / "args.json").read_text())["host_memory_bytes"] == 80 << 20
    assert train("second", "--host_memory_bytes", "90000000") == 0
    second = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    assert second["memory/host_budget"] == 90_000_000
    capsys.readouterr()
    assert train("third", "--host_memory_bytes", "much") == 2
    assert (
        "host_memory_bytes must be a size such as 8GiB or 500MB, or a number of bytes; got 'much'"
        in capsys.readouterr().err
    )
    words = [
        "--model",
        MODEL,
        "--dataset_name",
        str(tmp_path / "rows.jsonl"),
        "--media-root",
        str(folder),
        "--dtype",
        "float32",
    ]
    words += [
        "--output",
        str(tmp_path / "answers"),
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
        "--host-memory-bytes",
        "70MiB",
    ]
    assert cli.main(["eval", *words]) == 0
    assert host_memory().limit == 70 << 20


def test_a_run_says_what_memory_it_has(seven_tags):
    folder, rows = seven_tags
    build_trainer(folder, rows, trainer_class=OmniGRPOTrainer, host_memory_bytes=50_000_000)
    assert host_memory().limit == 50_000_000
