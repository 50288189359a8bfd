"""One folder, one run: results of another run or an evaluation are never mixed with, nor replaced without a word."""

import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from datasets import Dataset
from filelock import FileLock
from omni_runs import build_trainer
from programs import Ranks

from maple_trl import cli
from maple_trl.hub.publish import commit_operations
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.folder_lock import hold_folder
from maple_trl.jobs.train import check_output_dir
from maple_trl.records.evaluations import EvalStore, EvaluationError
from maple_trl.records.run_folder import holds_evaluation, remove_results, run_results


pytestmark = pytest.mark.slow


COMMON = (
    "--model_name_or_path builtin:tiny-omni --use_cpu true --bf16 false --dtype float32 --report_to none "
    "--disable_tqdm true --gradient_checkpointing false --gradient_accumulation_steps 1 --per_device_train_batch_size 4 "
    "--logging_steps 1 --save_strategy steps --save_steps 1 --max_pixels 3136"
)
ONE = SimpleNamespace(process_index=0, world_size=1)
GRPO = f"{COMMON} --num_generations 2 --max_completion_length 4"


def question(i):
    prompt = [{"role": "user", "content": "which word"}]
    return {"prompt": prompt, "subtitle": f"word {i}", "tag": "S", "solution": "A", "completion": "A"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("train", "test"):
        Dataset.from_list([question(i) for i in range(12)]).to_json(folder / f"{name}.jsonl")
    return folder


def train(data, folder, *words, options=GRPO):
    words = ["--dataset_name", data, "--output_dir", folder, *words]
    return cli.main(["train", *options.split(), *map(str, words)])


def evaluate(data, folder, *words):
    words = ["--data", data, "--output", folder, "--limit", 2, "--samples", 1, "--max-new-tokens", 4, *words]
    return cli.main(["eval", "--model", "builtin:tiny-omni", "--device", "cpu", "--quiet", *map(str, words)])


def last_line(text):
    return text.strip().splitlines()[-1]


def test_a_link_to_weights_that_are_gone_is_a_result(tmp_path):
    """As of a cache that was cleaned: a new model would be saved through it, and a look at the folder must not fail."""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone" / "blob")
    (tmp_path / "notes.bin").symlink_to(tmp_path / "gone" / "notes")
    (tmp_path / "metrics.jsonl").touch()
    assert run_results(tmp_path) == ["model.safetensors"]
    assert remove_results(tmp_path) == ["model.safetensors"] and run_results(tmp_path) == []
    assert (tmp_path / "notes.bin").is_symlink()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train(data, folder, "--max_steps", 2) == 0
    return folder


def copy_of(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "run")


def test_another_runs_results_are_refused_and_stay(data, finished, capsys):
    before = contents(finished)
    assert train(data, finished, "--max_steps", 2) == 2
    error = last_line(capsys.readouterr().err)
    assert f"output_dir: {finished} holds results of another run (checkpoint-1, checkpoint-2, metrics.jsonl," in error
    assert "--resume_from_checkpoint true" in error and "--overwrite" in error
    assert contents(finished) == before


def test_overwrite_replaces_them_and_leaves_what_is_not_a_result(data, finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter_config.json").write_text("{}")  # of a run before, which would be loaded as an adapter
    assert train(data, folder, "--max_steps", 1, "--overwrite") == 0
    shown = capsys.readouterr().out
    assert "overwrite: removed adapter_config.json, checkpoint-1, checkpoint-2" in shown
    assert [name for name in run_results(folder) if "checkpoint" in name] == ["checkpoint-1"]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "adapter_config.json").exists()


def test_a_run_that_goes_on_needs_no_word_and_removes_nothing(data, finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    words = ["--max_steps", 3, "--resume_from_checkpoint", "true", "--overwrite"]
    assert train(data, folder, *words) == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3
    assert (folder / "checkpoint-1").is_dir() and "overwrite: removed" not in capsys.readouterr().out


def test_a_run_that_cannot_go_on_changes_nothing(data, finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    before = contents(folder)
    words = ["--max_steps", 3, "--resume_from_checkpoint", folder / "checkpoint-1", "--num_generations", 4]
    assert train(data, folder, *words) == 2
    assert "num_generations" in last_line(capsys.readouterr().err)
    assert contents(folder) == before and "args.json" in map(str, before)


def test_a_run_that_has_nothing_left_to_do_says_so(data, finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    assert train(data, folder, "--max_steps", 2, "--resume_from_checkpoint", "true") == 0
    assert "no step was left to make: the checkpoint is at step 2" in last_line(capsys.readouterr().out)
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (finished / weights).read_bytes()


def test_a_checkpoint_from_elsewhere_does_not_make_a_folder_free(data, finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    words = ["--max_steps", 3, "--resume_from_checkpoint", finished / "checkpoint-2"]
    assert train(data, folder, *words) == 2
    assert "holds results of another run" in last_line(capsys.readouterr().err)
    assert train(data, tmp_path / "free", *words) == 0


@pytest.mark.parametrize("model", ["run", "run/checkpoint-2"])
def test_overwrite_does_not_remove_what_the_job_reads(model, data, finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    before = contents(folder)
    assert train(data, folder, "--max_steps", 1, "--overwrite", "--model_name_or_path", tmp_path / model) == 2
    error = last_line(capsys.readouterr().err)
    assert f"overwrite would remove {tmp_path / model}, which is model_name_or_path" in error
    assert contents(folder) == before


def test_a_checkpoint_of_weights_alone_is_refused_before_the_model_loads(data, tmp_path, capsys):
    assert train(data, tmp_path / "run", "--max_steps", 1, "--save_only_model", "true") == 0
    words = ["--max_steps", 2, "--resume_from_checkpoint", "true"]
    assert train(data, tmp_path / "run", *words, "--model_name_or_path", "builtin:none") == 2
    assert "lacks the optimizer's state (optimizer.pt), the learning-rate" in last_line(capsys.readouterr().err)
    # The way to go on from them.
    model = tmp_path / "run" / "checkpoint-1"
    assert train(data, tmp_path / "next", "--max_steps", 1, "--model_name_or_path", model) == 0


def test_an_evaluation_that_fails_after_training_costs_no_model(data, tmp_path, capsys, monkeypatch):
    from maple_trl import evaluation

    asked = []

    def sampled(*_, **__):
        asked.append(sorted(run_results(tmp_path / "run")))
        if len(asked) == 2:
            raise RuntimeError("the clips have gone")
        return evaluation.SampledAccuracy({"all": 0.0}, {"all": 1}, 0)

    monkeypatch.setattr(evaluation, "sampled_accuracy", sampled)
    words = ["--max_steps", 1, "--save_strategy", "no", "--evaluate_before_after", "true", "--report", "false"]
    assert train(data, tmp_path / "run", *words) == 1
    assert "RuntimeError: the clips have gone" in last_line(capsys.readouterr().err)
    assert "model.safetensors" not in asked[0] and "model.safetensors" in asked[1]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert train(data, tmp_path / "next", "--max_steps", 1, "--model_name_or_path", tmp_path / "run") == 0


@pytest.mark.parametrize("words", [["--resume_from_checkpoint", "auto"], ["--overwrite"], []])
def test_two_jobs_do_not_write_into_one_folder(words, data, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    (folder / "rollouts" / "part.parquet").write_text("of the job that goes on")
    (folder / "metrics.jsonl").write_text("{}\n")
    with FileLock(folder / ".lock"):
        before = contents(folder)
        assert train(data, folder, "--max_steps", 1, *words) == 2
        assert f"output_dir: another job is writing into {folder}" in last_line(capsys.readouterr().err)
        assert contents(folder) == before
        # A dry run writes nothing, not even a lock.
        assert train(data, tmp_path / "other", "--max_steps", 1, "--dry_run") == 0
    assert not (tmp_path / "other").exists()


def test_all_processes_of_a_job_learn_that_its_folder_is_not_free(tmp_path):
    code = f"""
from transformers import TrainingArguments
from maple_trl.jobs.folder_lock import SetupError, hold_folder
args = TrainingArguments({str(tmp_path)!r}, use_cpu=True)
for _ in range(2):
    try:
        with hold_folder(args.output_dir, args):
            print("held")
    except SetupError as error:
        print("refused:", error)
"""
    for taken, said in ((True, f"refused: output_dir: another job is writing into {tmp_path}"), (False, "held")):
        with FileLock(tmp_path / ".lock") if taken else nullcontext():
            assert Ranks(2, ["-c", code], tmp_path / "log").wait() == 0
        assert (tmp_path / "log").read_text().count(said) == 4


def test_a_killed_job_leaves_its_folder_free(tmp_path):
    code = (
        "import os, sys; from types import SimpleNamespace as S; from maple_trl.jobs.folder_lock import hold_folder\n"
    )
    code += (
        "with hold_folder(sys.argv[1], S(process_index=0, world_size=1)): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SetupError, match="another job is writing"), hold_folder(tmp_path, ONE):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with hold_folder(tmp_path, ONE):
        assert run_results(tmp_path) == []
    (tmp_path / "config.json").write_text("{}")
    assert [operation.path_in_repo for operation in commit_operations(tmp_path)] == ["config.json"]
    assert [operation.path_in_repo for operation in commit_operations(tmp_path, "last")] == ["last/config.json"]


def test_evaluations_and_runs_do_not_share_a_folder(data, finished, tmp_path, capsys):
    before = contents(finished)
    for words in ([], ["--overwrite"]):
        assert evaluate(data, finished, *words) == 2
        error = last_line(capsys.readouterr().err)
        assert f"{finished} holds a training run or a model (checkpoint-1, checkpoint-2, " in error
    assert contents(finished) == before
    with pytest.raises(EvaluationError, match="holds a training run"):
        EvalStore(finished).begin({})

    folder = tmp_path / "eval"
    assert evaluate(data, folder) == 0
    assert holds_evaluation(folder) and run_results(folder) == []
    before = contents(folder)
    for words in ([], ["--overwrite"]):
        assert train(data, folder, "--max_steps", 1, *words) == 2
        assert f"output_dir: {folder} holds an evaluation" in last_line(capsys.readouterr().err)
    with pytest.raises(ValueError, match="holds an evaluation"):
        build_trainer(tmp_path, Dataset.from_list([question(i) for i in range(4)]), output_dir=str(folder)).train()
    assert {path: content for path, content in contents(folder).items() if path in before} == before
    assert evaluate(data, folder) == 0  # the same evaluation again


def test_in_python_a_folder_is_used_again_with_a_warning(tmp_path, caplog):
    rows = Dataset.from_list([question(i) for i in range(8)])
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}

    def said():
        return [record.message for record in caplog.records if "holds results of another run" in record.message]

    trainer = build_trainer(tmp_path, rows, **options)
    trainer.train()
    trainer.train()  # its own
    assert not said()
    build_trainer(tmp_path, rows, **options).train()
    [message] = said()
    assert "checkpoint-1, metrics.jsonl, rollouts" in message and "resume_from_checkpoint=True may go on" in message
    build_trainer(tmp_path, rows, **options).train(resume_from_checkpoint=True)
    assert len(said()) == 1


def test_accuracies_before_training_do_not_stand_in_the_way_alone(tmp_path):
    """A run that was stopped before its first log entry would have to measure them once more."""

    def replaces(resume=None, overwrite=False):
        script = SimpleNamespace(overwrite=overwrite, dataset_name="data")
        training = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=resume)
        return check_output_dir(script, training, SimpleNamespace(model_name_or_path="model"), None)

    (tmp_path / "zero_shot.json").write_text("x")
    assert not replaces() and not replaces(resume="auto") and replaces(overwrite=True)
    (tmp_path / "metrics.jsonl").write_text("x")
    assert replaces(resume="auto") and replaces(overwrite=True)
    with pytest.raises(SetupError, match=r"holds results of another run \(metrics.jsonl, zero_shot.json\)"):
        replaces()


def test_results_are_told_from_other_files(tmp_path):
    kept = ["quarantine.json", "config.json", "train.jsonl", "model.py", "checkpoint-x", "notes.txt"]
    names = ["checkpoint-10", "checkpoint-9", "rollouts"]
    for name in (*names, "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert run_results(tmp_path) == ["checkpoint-9", "checkpoint-10"]  # an empty folder of completions is none
    (tmp_path / "rollouts" / "0.parquet").write_text("x")
    files = ["summary.json", "metrics.jsonl", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    files += ["adapter_model.safetensors", "pytorch_model.bin", "critical_steps.json", "embeddings.parquet"]
    files += ["zero_shot.json"]
    for name in (*files, *kept):
        if not (tmp_path / name).is_dir():
            (tmp_path / name).write_text("x")
    assert set(run_results(tmp_path)) == {*names, *files}
    (tmp_path / "metrics.jsonl").write_text("")  # of a run that came to nothing
    assert "metrics.jsonl" not in run_results(tmp_path)
    remove_results(tmp_path, keep=("zero_shot.json",))
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "metrics.jsonl", "zero_shot.json"}
    assert remove_results(tmp_path) == ["zero_shot.json"]
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "metrics.jsonl"}
    assert run_results(tmp_path / "nowhere") == []


# Supervised runs that would make no step


@pytest.mark.parametrize(("rows", "status"), [(3, 2), (4, 0)])
def test_supervised_rows_that_fill_no_batch_are_refused(rows, status, tmp_path, capsys):
    Dataset.from_list([question(i) for i in range(rows)]).to_json(tmp_path / "train.jsonl")
    words = ["--trainer", "omni_sft", "--dataloader_drop_last", "true", "--max_steps", 1]
    assert train(tmp_path, tmp_path / "out", *words, options=COMMON) == status
    error = capsys.readouterr().err.strip()
    if status:
        assert "train_dataset has 3 usable rows, but one batch takes 4 and dataloader_drop_last drops" in last_line(
            error
        )
    assert (tmp_path / "out" / "model.safetensors").exists() == (status == 0)


def test_supervised_rows_that_fill_no_batch_train_where_none_is_dropped(tmp_path):
    Dataset.from_list([question(i) for i in range(3)]).to_json(tmp_path / "train.jsonl")
    assert train(tmp_path, tmp_path / "out", "--trainer", "omni_sft", "--max_steps", 1, options=COMMON) == 0
