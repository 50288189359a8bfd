"""Stages: one command runs them all, goes on where it was stopped, and refuses what has changed."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from jobs.runner import once
from media_files import copy_small_set, cut
from programs import Ranks
from run_checkpoints import write_checkpoint
from safetensors.torch import load_file

from maple_trl import cli
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.options import parse_args
from maple_trl.jobs.stage_forecasts import forecast_stages
from maple_trl.jobs.stages import StageState, load_plan, run_stages
from maple_trl.omni.loading import resolve_checkpoint
from maple_trl.train import build_trainer


pytestmark = pytest.mark.slow


ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds; only ends a run that hangs

BASE = """
model_name_or_path: builtin:tiny-omni
dtype: float32
dataset_name: data
num_frames: 4
max_pixels: 3136
bf16: false
gradient_checkpointing: false
dataloader_pin_memory: false
disable_tqdm: true
learning_rate: 1.0e-3
per_device_train_batch_size: 4
gradient_accumulation_steps: 1
max_completion_length: 6
logging_steps: 1
save_strategy: steps
save_steps: 2
report_to: none
seed: 3
use_cpu: true
"""
FIRST = """
extends: base.yaml
trainer: omni_sft
completion_template: "<think></think><answer>{solution}</answer>"
dataset_filter: {tag: [V, VA, VAS]}
max_steps: 2
"""
SECOND = """
extends: base.yaml
num_generations: 2
temperature: 2.0          # two equal completions teach nothing
rewards: [held:spread]
dataset_filter: {tag: [V, VS, A]}
max_steps: 4
"""
THIRD = """
extends: second.yaml
dataset_filter: {tag: [A, AS, S]}
max_steps: 2
"""
# A reward that waits for its end in the call that HOLD_AT names, asks its own job to end in that of TERM_AT, and notes how many
# models the process holds.
HELD = """
import gc, os, signal, time, zlib
from pathlib import Path
from transformers import PreTrainedModel

calls = 0

def models():
    found = [o for o in gc.get_objects() if isinstance(o, PreTrainedModel)]
    return sum(type(o).__name__.endswith("ThinkerForConditionalGeneration") for o in found)

def spread(completion_ids, **_):
    global calls
    calls += 1
    if os.environ.get("COUNT_MODELS"):
        with open(os.environ["COUNT_MODELS"], "a") as file:
            file.write(f"{models()}\\n")
    if os.environ.get("HOLD_AT") == str(calls):
        Path("held").touch()
        time.sleep(600)
    if os.environ.get("TERM_AT") == str(calls):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3.5)  # that long is waited for what would follow
    return [zlib.crc32(str(list(ids)).encode()) % 101 / 101 for ids in completion_ids]
"""


def write_job(folder):
    dataset = copy_small_set(folder / "data", seed=2)
    dataset.to_parquet(folder / "data" / "train.parquet")
    dataset.filter(lambda row: row["tag"] == "V").to_parquet(folder / "data" / "test.parquet")
    texts = {"base": BASE, "first": FIRST, "second": SECOND, "third": THIRD}
    texts["stages"] = "stages: [first.yaml, second.yaml, third.yaml]\noutput_dir: out\n"
    texts["lora"] = texts["stages"] + "use_peft: true\nlora_r: 4\nlora_alpha: 8\n"
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "held.py").write_text(textwrap.dedent(HELD), encoding="utf-8")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The folder of a plan of three stages, which is the current one."""
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("held", None)


def start(folder, *words, processes=1, **variables):
    log = folder / "log.txt"
    log.write_text("")
    return Ranks(
        processes, ["-m", "maple_trl.cli", "train", *words], log, {"PYTHONPATH": str(ROOT)} | variables, folder
    ), log


def finish(process, log):
    status = process.wait()
    assert status == 0, log.read_text()[-6000:]
    return log.read_text()


def kill_when_held(folder, *words, at):
    process, log = start(folder, *words, HOLD_AT=str(at))
    end = time.monotonic() + LIMIT
    while not (folder / "held").exists():
        running = process.poll() is None
        if not running or time.monotonic() > end:
            raise AssertionError(log.read_text()[-6000:])
        time.sleep(0.05)
    assert process.kill() == -signal.SIGKILL
    (folder / "held").unlink()


def state(folder):
    return json.loads((folder / "out" / "stages.json").read_text(encoding="utf-8"))["stages"]


def weights(folder, stage, file="model.safetensors"):
    return load_file(folder / "out" / stage / file)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


# Stopped and resumed


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run with LoRA, and one that was killed in its second stage and started again."""

    def make(folder):
        for name in ("whole", "killed"):
            (folder / name).mkdir()
            write_job(folder / name)
        with chdir(folder / "whole"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", [*sys.path])
            assert cli.main(["train", "--config", "lora.yaml"]) == 0
            sys.modules.pop("held")
        first = folder / "killed/out/first/adapter_model.safetensors"
        kill_when_held(folder / "killed", "--config", "lora.yaml", at=3)
        told = {"done": [entry["done"] for entry in state(folder / "killed")], "times": [first.stat().st_mtime_ns]}
        told["log"] = finish(*start(folder / "killed", "--config", "lora.yaml"))
        told["times"].append(first.stat().st_mtime_ns)
        (folder / "told.json").write_text(json.dumps(told))

    folder = once(tmp_path_factory, "stages", make)
    return folder, json.loads((folder / "told.json").read_text())


def test_a_killed_run_ends_with_the_weights_of_a_whole_one(killed):
    folder, told = killed
    assert told["done"] == [True, False]
    assert told["times"][0] == told["times"][1]  # a finished stage is not run again
    assert "Stage 2 of 3: second, going on from checkpoint-2" in told["log"] and "Stage 1 of 3" not in told["log"]
    for stage in ("first", "second", "third"):
        ours = weights(folder / "killed", stage, "adapter_model.safetensors")
        assert equal(ours, weights(folder / "whole", stage, "adapter_model.safetensors"))
    metrics = [(folder / name / "out/second/metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    losses = [[entry["loss"] for entry in map(json.loads, lines) if "loss" in entry] for lines in metrics]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_stage_that_is_asked_to_end_is_not_done_and_goes_on(killed, job, capsys, monkeypatch):
    words = ["train", "--config", "lora.yaml", "--enable_jit_checkpoint", "true"]
    monkeypatch.setenv("TERM_AT", "3")
    assert cli.main(words) == 1
    told = capsys.readouterr()
    assert "stopped after step 3 of 4, as the job was asked to end" in told.err and "Stage 3 of 3" not in told.out
    assert [entry["done"] for entry in state(job)] == [True, False]
    second = job / "out" / "second"
    assert not (second / "adapter_model.safetensors").exists() and not (second / "summary.json").exists()
    seen = json.loads((second / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in seen if "loss" in entry] == [1, 2, 3]
    monkeypatch.delenv("TERM_AT")
    sys.modules.pop("held")
    assert cli.main(words) == 0
    assert "Stage 2 of 3: second, going on from checkpoint-3" in capsys.readouterr().out
    for stage in ("second", "third"):
        ours, whole = (weights(folder, stage, "adapter_model.safetensors") for folder in (job, killed[0] / "whole"))
        assert equal(ours, whole)


def test_an_adapter_goes_from_stage_to_stage(killed):
    folder = killed[0] / "whole"
    adapters = [weights(folder, stage, "adapter_model.safetensors") for stage in ("first", "second", "third")]
    assert adapters[0].keys() == adapters[1].keys() == adapters[2].keys()
    for older, newer in zip(adapters, adapters[1:], strict=False):
        assert not equal(older, newer)
        # Trained on rather than begun anew, which would draw A again: a few steps change it little.
        for name in (name for name in older if "lora_A" in name):
            assert (newer[name] - older[name]).norm() < 0.1 * older[name].norm()
    base = resolve_checkpoint("builtin:tiny-omni")
    for stage in ("first", "second", "third"):
        config = json.loads((folder / "out" / stage / "adapter_config.json").read_text())
        assert os.path.samefile(config["base_model_name_or_path"], base)


def test_running_again_runs_nothing(killed, capsys, monkeypatch):
    folder = killed[0] / "whole"
    monkeypatch.chdir(folder)
    before = (folder / "out/stages.json").stat().st_mtime_ns
    assert cli.main(["train", "--config", "lora.yaml"]) == 0
    assert "Stage 1" not in capsys.readouterr().out
    assert (folder / "out/stages.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lora_dropout", "0.1"], "lora_dropout is 0.1, but the adapter in .*third was made with 0.05: use that"),
        (["--lora_r", "8"], "lora_r is 8, but the adapter in .* was made with 4"),
        (["--lora_audio", "false"], "the adapter in .* is on other layers .*audio_tower.*choose the parts"),
        (["--use_peft", "false"], "holds a LoRA adapter: set use_peft: true"),
    ],
)
def test_an_adapter_is_not_mistaken_for_another(words, message, killed, monkeypatch, tmp_path):
    folder = killed[0] / "whole"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    base = ["--config", "third.yaml", "--model_name_or_path", "out/third", "--output_dir", str(tmp_path)]
    lora = ["--use_peft", "true", "--lora_r", "4", "--lora_alpha", "8"]
    with pytest.raises(SetupError, match=message):
        build_trainer(*parse_args([*base, *lora, *words]))


# In one process


def test_stages_hand_on_the_whole_model_and_release_it(job, monkeypatch, capsys):
    monkeypatch.setenv("COUNT_MODELS", str(job / "models.txt"))
    counting: dict = {}
    exec(textwrap.dedent(HELD), counting)
    gc.collect()
    others = counting["models"]()  # which other tests hold
    words = ["--max_steps", "1", "--save_strategy", "no", "--evaluate_before_after", "true"]
    assert cli.main(["train", "--config", "stages.yaml", *words, "--eval_questions_per_tag", "2"]) == 2
    assert "stage third: dataset_filter: no row of data, split 'test' is left" in capsys.readouterr().err
    shutil.copyfile("data/train.parquet", "data/test.parquet")
    assert cli.main(["train", "--config", "stages.yaml", *words, "--eval_questions_per_tag", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Stages" in shown and all(name in shown for name in ("first", "second", "third"))
    entries = state(job)
    assert [entry["done"] for entry in entries] == [True] * 3
    assert [entry["summary"]["steps"] for entry in entries] == [1, 1, 1]
    assert all(0 <= entry["summary"]["before"]["all"] <= 1 for entry in entries)
    assert entries[1]["summary"]["model"] == str(job / "out" / "first")
    assert set((job / "models.txt").read_text().split()) == {str(others + 1)}
    stages = [weights(job, stage) for stage in ("first", "second", "third")]
    for older, newer in zip(stages, stages[1:], strict=False):
        steps = [(newer[name] - older[name]).abs().max().item() for name in older]
        assert 0 < max(steps) < 3e-3  # one step of AdamW with 1e-3 from there


def test_options_reach_the_stages_that_know_them(job):
    (job / "more.yaml").write_text("stages: [first.yaml, second.yaml]\noutput_dir: out\nnum_generations: 4\nseed: 9\n")
    plan = load_plan(["--config", "more.yaml", "--temperature", "0.5", "--beta=0.1", "--model_name_or_path", "start"])
    first, second = plan.parse(0), plan.parse(1)
    assert (first[1].seed, second[1].seed) == (9, 9)
    assert (first[1].temperature, second[1].temperature) == (0.5, 0.5)
    assert (second[1].num_generations, second[1].beta) == (4, 0.1)
    assert first[2].model_name_or_path == "start"
    assert second[2].model_name_or_path == first[1].output_dir == str(job / "out" / "first")
    assert load_plan(["--config", "more.yaml", "--output_dir", "there"]).folder(1) == str(job / "there" / "second")
    assert load_plan(["--config", "first.yaml"]) is None and load_plan(["--max_steps", "1"]) is None


def test_a_plan_may_extend_another(job):
    """Stages are found beside the file that lists them, which need not be the one that is run."""
    (job / "plan.yaml").write_text("stages: [first.yaml, second.yaml]\noutput_dir: out\nseed: 9")
    (job / "rows").mkdir()
    (job / "rows" / "base.yaml").write_text("extends: ../plan.yaml\nseed: 11\noutput_dir: rows/base")
    (job / "rows" / "other.yaml").write_text("extends: base.yaml\nstages: [../first.yaml]\nmax_steps: 1")
    plan = load_plan(["--config", "rows/base.yaml"])
    assert [stage.name for stage in plan.stages] == ["first", "second"] and plan.output_dir == "rows/base"
    assert [plan.parse(i)[1].seed for i in (0, 1)] == [11, 11]
    plan = load_plan(["--config", "rows/other.yaml"])
    assert [stage.name for stage in plan.stages] == ["first"]
    assert (plan.parse(0)[1].seed, plan.parse(0)[1].max_steps) == (11, 1)


# What a scheduler's job hands to the launcher, a word a line, in the place of the launcher and of SLURM's commands.
SLURM = {"scontrol": "echo a", "srun": 'shift; exec "$@"', "accelerate": 'printf "%s\\n" "$@"'}


def test_a_requeued_job_goes_on_whether_it_has_stages_or_not(job):
    """What our script adds for every job that is started again, every job takes."""
    (job / "bin").mkdir()
    for name, body in SLURM.items():
        (job / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (job / "bin" / name).chmod(0o755)
    slurm = {"PATH": f"{job / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_NNODES": "1"}
    slurm |= {"SLURM_JOB_NODELIST": "a", "SLURM_NODEID": "0", "SLURM_RESTART_COUNT": "1"}
    for file in ("stages.yaml", "third.yaml"):
        line = ["bash", str(ROOT / "examples/slurm/train.sbatch"), file, "--seed", "9"]
        words = subprocess.run(line, env=slurm, capture_output=True, text=True, check=True).stdout.split()
        words = words[words.index("train") + 1 :]
        assert words[-2:] == ["--resume_from_checkpoint", "auto"]
        plan = load_plan(words)
        if file == "stages.yaml":
            assert [plan.parse(i)[1].seed for i in range(3)] == [9, 9, 9]
        else:
            assert plan is None and parse_args([*words, "--output_dir", "x"])[1].resume_from_checkpoint == "auto"


@pytest.mark.parametrize("word", [["--resume-from-checkpoint=auto"], ["--resume_from_checkpoint", "AUTO"], None])
def test_stages_may_be_told_to_do_what_they_do_by_themselves(word, job):
    (job / "plan.yaml").write_text(
        "stages: [first.yaml]\noutput_dir: out\n" + ("" if word else "resume_from_checkpoint: auto\n")
    )
    assert load_plan(["--config", "plan.yaml", *(word or [])]).parse(0)[1].resume_from_checkpoint is None


def test_a_file_of_stages_sets_variables(job, monkeypatch):
    """As a single job's does: those of the files that it extends too, and they win over a stage's own."""
    for name in ("STAGE_ONE", "STAGE_TWO", "STAGE_THREE", "STAGE_OWN"):
        monkeypatch.setenv(name, "before")
    (job / "first.yaml").write_text(FIRST + "env: {STAGE_ONE: of the stage, STAGE_OWN: 1}\n")
    (job / "above.yaml").write_text("env: {STAGE_TWO: above, STAGE_THREE: above}\n")
    (job / "plan.yaml").write_text(
        "extends: above.yaml\nstages: [first.yaml]\noutput_dir: out\nenv: {STAGE_ONE: of all, STAGE_TWO: 2}\n"
    )
    plan = load_plan(["--config", "plan.yaml"])
    assert os.environ["STAGE_ONE"] == "before"
    plan.parse(0)
    assert [os.environ[f"STAGE_{name}"] for name in ("ONE", "TWO", "THREE", "OWN")] == ["of all", "2", "above", "1"]
    (job / "plan.yaml").write_text("stages: [first.yaml]\noutput_dir: out\nenv: {STAGE_ONE: null}\n")
    with pytest.raises(SetupError, match=r"plan.yaml: env: STAGE_ONE must be a text or a number, got null"):
        load_plan(["--config", "plan.yaml"])


def test_libraries_are_loaded_after_variables_are_set(job):
    """`HF_HOME` and its like count when a library is imported."""
    script = "import sys; from maple_trl.jobs.stages import load_plan; load_plan(['--config', 'stages.yaml']);"
    script += (
        " print([name for name in ('torch', 'transformers', 'huggingface_hub.constants') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "text, words, message",
    [
        ("stages: first.yaml", [], r"stages must be a list of config files, got 'first\.yaml'"),
        ("stages: []", [], "stages must be a list of config files"),
        ("stages: [first.yaml]", [], "output_dir is missing"),
        ("stages: [first.yaml, gone.yaml]", None, r"plan\.yaml: cannot read the config file .*gone\.yaml"),
        ("stages: [first.yaml, ./first.yaml]", None, "two stages are called 'first'"),
        ("stages: [first.yaml]\nsead: 1", None, "plan.yaml: unknown key 'sead', .*did you mean seed"),
        ("stages: [first.yaml]\ntrainer: mapo", None, "plan.yaml: trainer cannot be set for all stages"),
        ("stages: [first.yaml]", ["--num_generations", "4"], "unknown option --num_generations, which no stage's"),
        ("stages: [first.yaml]", ["--resume_from_checkpoint", "true"], "stages go on by themselves"),
        ("stages: [first.yaml]", ["stray"], "unexpected value 'stray'"),
        ("stages: [first.yaml]\nmax_steps: 1.5", None, "stage first: plan.yaml: max_steps must be a whole number"),
    ],
)
def test_a_wrong_plan_is_refused(text, words, message, job):
    (job / "plan.yaml").write_text(text + ("" if words == [] else "\noutput_dir: out"))
    with pytest.raises(SetupError, match=message):
        run_stages(load_plan(["--config", "plan.yaml", *(words or [])]))
    assert not (job / "out").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("sead: 1", r"stage third: third\.yaml: unknown key 'sead'; did you mean seed"),
        ("temperature: -1\nmodality_access: some", "stage third: .*modality_access must be one of"),
        ("rewards: [no_such_reward]", "stage third: unknown reward 'no_such_reward'"),
        ("dataset_name: elsewhere/", "stage third: cannot load the data set|stage third: .*elsewhere"),
        (
            "dataset_filter: {tag: [V, VX]}",
            "stage third: dataset_filter: no row of data, split 'train' has 'VX' in column",
        ),
    ],
)
def test_the_last_stage_is_checked_before_the_first_starts(text, message, job, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lines = {line.split(":")[0] for line in text.splitlines()}
    kept = [line for line in THIRD.strip().splitlines() if line.split(":")[0] not in lines]
    (job / "third.yaml").write_text("\n".join([*kept, text]))
    with pytest.raises(SetupError, match=message):
        run_stages(load_plan(["--config", "stages.yaml"]))
    assert not (job / "out" / "first").exists()


def test_stages_that_another_process_runs_are_left_alone(job):
    (job / "out").mkdir()
    with FileLock(job / "out" / ".lock"), pytest.raises(SetupError, match="another job is writing into out"):
        run_stages(load_plan(["--config", "stages.yaml"]))
    assert [path.name for path in (job / "out").iterdir()] == [".lock"]


def test_a_whole_model_after_an_adapter_is_refused(job):
    (job / "second.yaml").write_text(SECOND + "use_peft: false\n")
    (job / "first.yaml").write_text(FIRST + "use_peft: true\n")
    with pytest.raises(SetupError, match="stage second: use_peft is false, but stage first before it writes a LoRA"):
        run_stages(load_plan(["--config", "stages.yaml"]))


def test_what_has_changed_is_refused(job):
    (job / "one.yaml").write_text("stages: [first.yaml]\noutput_dir: out\nmax_steps: 1\n")
    run_stages(load_plan(["--config", "one.yaml"]))
    both = "stages: [first.yaml, second.yaml]\noutput_dir: out\nmax_steps: 1\n"
    (job / "two.yaml").write_text(both + "learning_rate: 0.5\n")
    with pytest.raises(
        SetupError, match=r"stage first is done with other options: learning_rate 0\.001 -> 0\.5\. Put"
    ):
        run_stages(load_plan(["--config", "two.yaml"]))
    (job / "two.yaml").write_text(both.replace("first.yaml, second.yaml", "second.yaml, first.yaml"))
    with pytest.raises(SetupError, match="tells of the stages first, but two.yaml lists second, first"):
        run_stages(load_plan(["--config", "two.yaml"]))

    # Begun, with a checkpoint: its options hold; without one, it begins anew with others.
    entries = state(job)
    entries.append({"name": "second", "done": False, "options": entries[0]["options"] | {"seed": 99}})
    (job / "out" / "stages.json").write_text(json.dumps({"stages": entries}))
    checkpoint = write_checkpoint(job / "out" / "second" / "checkpoint-1", ranks=1)
    (job / "two.yaml").write_text(both)
    with pytest.raises(
        SetupError, match="stage second was begun with other options: .*seed 99 -> 3.*or delete .*second"
    ):
        run_stages(load_plan(["--config", "two.yaml"]))
    shutil.rmtree(checkpoint)
    assert len(run_stages(load_plan(["--config", "two.yaml"]))) == 2

    (job / "three.yaml").write_text("stages: [first.yaml, second.yaml, third.yaml]\noutput_dir: out\nmax_steps: 1\n")
    (job / "out" / "second" / "config.json").unlink()
    with pytest.raises(SetupError, match="stage second is done, but its model is no longer in .*second"):
        run_stages(load_plan(["--config", "three.yaml"]))
    (job / "out" / "stages.json").write_text("{")
    with pytest.raises(SetupError, match=r"stages\.json cannot be read"):
        run_stages(load_plan(["--config", "one.yaml"]))


def begun(job, *steps):
    """A plan of which the first stage has begun, and written checkpoints."""
    plan = load_plan(["--config", "stages.yaml"])
    StageState(plan, 1).begin(0, plan.parse(0), write=True)
    return plan, [write_checkpoint(job / "out" / "first" / f"checkpoint-{step}", ranks=1) for step in steps]


def test_a_stage_passes_over_a_torn_checkpoint(job, caplog):
    plan, (older, newer) = begun(job, 2, 4)
    state = StageState(plan, 1)
    state.check(0, plan.parse(0))
    assert state.checkpoint(0) == str(newer) and not caplog.records
    torn = newer / "model.safetensors"
    os.truncate(torn, torn.stat().st_size - 4)
    state = StageState(plan, 1)
    state.check(0, plan.parse(0))
    assert state.checkpoint(0) == str(older)
    assert [f"{newer} is passed over" in record.message for record in caplog.records] == [True]
    (older / "rng_state.pth").unlink()
    told = (
        f"stage first: .*none of the 2 complete checkpoints .* is whole. Delete {job / 'out' / 'first'} to begin anew"
    )
    with pytest.raises(SetupError, match=told):
        run_stages(plan)
    assert torn.is_file()


def test_a_dry_run_knows_what_is_done(job, capsys):
    """The begun stage goes on from its checkpoint; a finished one is told as such, and what has changed is refused."""
    plan, (checkpoint,) = begun(job, 2)
    forecasts = forecast_stages(plan)
    assert f"checkpoint {checkpoint}" in forecasts[0].reads and "the model of stage first" in forecasts[1].reads
    with pytest.raises(SetupError, match="stage first was begun with other options: seed 3 -> 9"):
        forecast_stages(load_plan(["--config", "stages.yaml", "--seed", "9"]))
    shutil.copytree(resolve_checkpoint("builtin:tiny-omni"), job / "out" / "first", dirs_exist_ok=True)
    StageState(plan, 1).finish(0, {}, write=True)
    assert cli.main(["train", "--config", "stages.yaml", "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "Stage 1 of 3: first, which is done\n" in told and f"model {job / 'out' / 'first'} (" in told
    (job / "third.yaml").write_text(THIRD + "rewards: [no_such_reward]\n")
    with pytest.raises(SetupError, match="stage third: unknown reward 'no_such_reward'"):
        forecast_stages(plan)


def test_checkpoints_of_another_run_are_not_gone_on_from(job):
    checkpoint = job / "out" / "second" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(SetupError, match="stage second: .*second holds results of another run .checkpoint-3."):
        run_stages(load_plan(["--config", "stages.yaml"]))


# Rows


def prepared(*words):
    job = parse_args(["--config", "first.yaml", "--output_dir", "out", *words])
    return build_trainer(*job)[0].train_dataset


def test_a_filter_leaves_the_rows_that_it_names(job):
    rows = prepared()
    assert set(rows["tag"]) == {"V", "VA", "VAS"} and len(rows) == 12
    assert rows[0]["completion"] == f"<think></think><answer>{rows[0]['solution']}</answer>"
    rows = prepared("--dataset_filter", '{"tag": "V", "solution": ["A", "B"]}')
    assert set(rows["tag"]) == {"V"} and set(rows["solution"]) <= {"A", "B"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--dataset_filter", '{"kind": ["V"]}'], "has no column 'kind'; its columns: id, prompt"),
        (
            ["--dataset_filter", '{"tag": ["VX"]}'],
            "no row of data, split 'train' has 'VX' in column 'tag'; it has '.*'VAS'",
        ),
        (["--dataset_filter", '{"tag": "S", "id": "train-0000"}'], "no row of data, split 'train' is left by"),
        (["--dataset_filter", "[1]"], "dataset_filter must be a mapping of columns to lists"),
        (["--dataset_filter", "tag=V"], "is no JSON"),
        (["--dataset_filter", '{"tag": []}'], "for 'tag' it has \\[\\]"),
        (["--completion_template", "{answr}"], "split 'train' has no column 'answr'; its columns: id"),
        (["--completion_template", "yes"], "names no column"),
        (["--completion_template", "{solution"], "completion_template '{solution'"),
        (["--completion_template", "{solution.x}"], "must be the name of a column"),
        (["--trainer", "omni_grpo"], "completion_template has no effect with trainer omni_grpo"),
    ],
)
def test_rows_that_are_not_there_are_refused(words, message, job):
    with pytest.raises(SetupError, match=message):
        prepared(*words)


def test_an_empty_cell_of_a_template_is_named(job):
    rows = Dataset.from_parquet("data/train.parquet").to_list()
    rows[5]["solution"] = None
    Dataset.from_list(rows).to_parquet("data/train.parquet")
    with pytest.raises(SetupError, match="data, split 'train', row 5: column 'solution' is empty"):
        prepared("--dataset_filter", json.dumps({"tag": sorted({row["tag"] for row in rows})}))
    Dataset.from_list([row | {"completion": "x"} for row in rows]).to_parquet("data/train.parquet")
    with pytest.raises(SetupError, match="has a column 'completion' already"):
        prepared()


# Two processes


@pytest.mark.long
def test_two_processes_run_the_stages_in_step(job):
    """They share the rows of a step, meet a broken clip together, and end with the weights of one process."""
    rows = Dataset.from_parquet("data/train.parquet")
    broken = next(row["video"] for row in rows if row["tag"] == "V")
    cut(job / "data" / broken, job / "data" / "short.mp4", 0.3)
    (job / "data" / "short.mp4").replace(job / "data" / broken)
    (job / "pair.yaml").write_text("stages: [first.yaml, second.yaml]\noutput_dir: out\nsave_strategy: 'no'\n")
    common = ["--config", "pair.yaml", "--media_check", "none", "--optim", "sgd", "--learning_rate", "0.5"]
    common += ["--max_grad_norm", "0", "--max_steps", "3"]
    launched = start(job, *common, "--per_device_train_batch_size", "2", processes=2)
    told = finish(*launched)
    assert told.count("Stage 1 of 2") == told.count("Stages") == 1
    assert told.count("Training: 3 steps") == told.count("\nresults  ") == 2  # once for each stage, by one process
    assert (job / "out/first/args.json").is_file() and (job / "out/second/args.json").is_file()
    assert [entry["done"] for entry in state(job)] == [True, True]
    quarantine = json.loads((job / "out/first/quarantine.json").read_text())
    assert {row["path"] for row in quarantine} == {broken}

    alone = ["--config", "first.yaml", *common[2:], "--output_dir", "alone", "--save_strategy", "no"]
    assert cli.main(["train", *alone]) == 0
    one, two = load_file("alone/model.safetensors"), weights(job, "first")
    start_weights = load_file(Path(resolve_checkpoint("builtin:tiny-omni")) / "model.safetensors")
    moved = max((one[name] - start_weights[name]).abs().max().item() for name in one)
    assert moved > 1e-3
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-3 * moved)
