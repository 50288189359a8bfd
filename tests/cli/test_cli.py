"""The command line, run as a person runs it: in a process of its own."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import programs
import pytest
from rich.console import Console
from run_checkpoints import write_checkpoint

from maple_trl import cli, train
from maple_trl.cli.env import print_report
from maple_trl.files import _umask, write_atomically
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.model_config import OmniModelConfig
from maple_trl.jobs.options import OmniScriptArguments, parse_args
from maple_trl.records.metrics_log import write_metrics
from maple_trl.records.summary import print_summary
from maple_trl.train import load_datasets, load_rewards


ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "demo.yaml"


def maple(*words, timeout=300, cwd=None, env=None):
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "119", "NO_COLOR": "1"} | (env or {})
    return programs.run(["-m", "maple_trl.cli", *words], environment, cwd, timeout)


def yaml_file(folder, text):
    path = folder / "job.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


# Help


def test_help_names_the_commands_that_exist():
    shown = maple("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("train", "env", "parity", "vllm-serve", "export", "push"))
    assert maple().stdout == shown.stdout
    # Commands of later versions are no stubs here.
    for absent in ("deploy",):
        assert absent not in shown.stdout
        assert maple(absent).returncode == 2


LIGHT = {
    "--help": ("usage: maple-trl", {"av"}),
    "train --help": ("usage: maple-trl", {"av"}),
    "env --help": ("usage: maple-trl", {"av"}),
    "env": ("maple-trl env --imports", set()),
    "env --json": ('"imports": false', set()),
    "data qa-plus --help": ("usage: maple-trl data qa-plus", {"av"}),
    "data difficulty --help": ("usage: maple-trl data difficulty", {"av"}),
    "plan --help": ("usage: maple-trl plan", {"av"}),
    "plan --model Qwen/Qwen2.5-Omni-3B --json": ('"verdict"', {"av"}),
    "plan --model Qwen/Qwen2.5-Omni-3B --gpu H300": ("gpu 'H300' is not known; did you mean H800?", {"av"}),
    "train --max_stepz 3": ("did you mean --max_steps?", {"av"}),
    f"train --config {RECIPE} --max_steps many": ("invalid int value: 'many'", {"av"}),
    f"train --config {RECIPE} --tag_weight adaptive": ("did you mean", {"av"}),
    "train --trainer omni_grpo --tag_weights adaptive": ("option of MAPOConfig: set trainer: mapo", {"av"}),
    "train --config nowhere.yaml": ("cannot read the config file nowhere.yaml", {"av"}),
}


# Each line in turn, in one new interpreter: what any of them imports is there from then on.
LIGHTLY = """
import contextlib, io, json, sys
from maple_trl.cli import main
for line, heavy in json.loads(sys.argv[1]).items():
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), contextlib.suppress(SystemExit):
        main(line.split())
    print(json.dumps([line, told.getvalue(), sorted({*heavy} & {*sys.modules})]))
"""


@pytest.fixture(scope="module")
def light_lines():
    """Of each line what it says, and which heavy modules are imported after it; those that may not import any come first."""
    heavy = {line: sorted({"torch", "transformers", "datasets"} | more) for line, (_, more) in LIGHT.items()}
    heavy = dict(sorted(heavy.items(), key=lambda entry: -len(entry[1])))
    command = [sys.executable, "-c", LIGHTLY, json.dumps(heavy)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert shown.returncode == 0, shown.stderr
    return {line: (told, imported) for line, told, imported in map(json.loads, shown.stdout.splitlines())}


@pytest.mark.parametrize("line", LIGHT)
def test_help_and_mistakes_import_nothing_heavy(line, light_lines):
    told, imported = light_lines[line]
    assert imported == [] and LIGHT[line][0] in told
    assert "loading torch" not in told


@pytest.mark.parametrize(
    "line, rank, told",
    [
        (f"train --config {RECIPE} --use_cpu true", "0", ["maple-trl: loading torch and TRL …"]),
        (f"train --config {RECIPE} --use_cpu true", "1", []),
        ("eval --model m --data d --output o", "0", ["maple-trl: loading torch and TRL …"]),
    ],
)
@pytest.mark.matrix(cases=1)
def test_a_word_before_torch_loads(line, rank, told, tmp_path):
    """Of the first process, and at once: this torch ends the process where it begins to load."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch begins')\n")
    script = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom maple_trl.cli import main\nmain({line.split()!r})"
    )
    environment = os.environ | {"RANK": rank}
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment
    )
    assert shown.stderr.splitlines() == [*told, "torch begins"] and not shown.stdout


def test_train_help_lists_the_options_of_a_job(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--dataset_name", "--rewards", "--evaluate_before_after", "--lora_vision", "--freeze_audio"):
        assert option in shown
    assert cli.main(["train", "--help-all"]) == 0
    everything = capsys.readouterr().out
    for option in ("--modality_access", "--media_root", "--num_generations", "--learning_rate", "--lora_vision"):
        assert option in everything


def test_env_takes_no_unknown_argument():
    shown = maple("env", "--jsno")
    assert shown.returncode == 2 and "--jsno" in shown.stderr


# Arguments


def test_the_recipe_parses_and_overrides_win():
    script_args, training_args, model_args = parse_args(["--config", str(RECIPE)])
    assert script_args.dataset_name == "builtin:seven-tags"
    assert script_args.eval_questions_per_tag >= 64
    assert model_args.model_name_or_path == "builtin:tiny-omni"
    steps = training_args.max_steps
    again = parse_args([f"--config={RECIPE}", "--max_steps", str(steps + 1), "--rewards", "accuracy_reward"])
    assert again[1].max_steps == steps + 1
    assert again[0].rewards == ["accuracy_reward"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("num_generation: 4", "unknown key 'num_generation'; did you mean num_generations?"),
        ("modality_acces: all", "did you mean modality_access?"),
        ("lora_visoin: true", "did you mean lora_vision?"),
        ("zzzzqqq: 1", "unknown key 'zzzzqqq'; `maple-trl train --help-all` lists all options"),
        ("max_steps: 2.5", "max_steps must be a whole number, got 2.5"),
        ("max_steps: many", "max_steps must be a whole number, got 'many'"),
        ("learning_rate: true", "learning_rate must be a number, got True"),
        ("use_peft: 3", "use_peft must be true or false, got 3"),
        ("dtype: float63", "dtype must be one of 'auto', 'bfloat16'"),
        ("modality_access: some", "modality_access must be one of 'required', 'all', got 'some'"),
        ("max_steps: 1\nmax_steps: 2", "line 2: 'max_steps' is given twice"),
        ("- max_steps", "must hold a mapping"),
        ("a: [", "is not a YAML file"),
        ("env: 3", "env must be a mapping"),
        (
            "env: {CUDA_VISIBLE_DEVICES: }",
            "env: CUDA_VISIBLE_DEVICES must be a text or a number, got null; an empty text is",
        ),
        ("env: {A_VARIABLE: [1]}", "env: A_VARIABLE must be a text or a number, got [1]"),
        ("rewards: []", "reward_funcs must name at least one"),
        ("eval_questions_per_tag: 0", "eval_questions_per_tag must be positive, got 0"),
        ("freeze_vision: true\nuse_peft: true", "freeze_vision has no effect with use_peft"),
        ("lora_llm: false", "lora_llm: false has no effect without use_peft"),
        (
            "use_peft: true\nlora_vision: false\nlora_audio: false\nlora_projectors: false\nlora_llm: false",
            "use_peft needs at least one of lora_vision",
        ),
        ("use_peft: true\nlora_target_modules: [q_proj]", "replaced by lora_vision"),
        ("lora_task_type: SEQ_CLS", "must be 'CAUSAL_LM'"),
        ("load_in_4bit: true", "load_in_4bit and load_in_8bit need use_peft: true"),
        ("load_in_8bit: true\nload_in_4bit: true\nuse_peft: true", "are both true: choose one"),
        ("use_bnb_nested_quant: true", "use_bnb_nested_quant has no effect without load_in_4bit: true"),
        ("load_in_8bit: true\nuse_peft: true\nbnb_4bit_quant_type: fp4", "bnb_4bit_quant_type has no effect without"),
        ("load_in_4bit: true\nuse_peft: true\nbnb_4bit_quant_storage: int4", "bnb_4bit_quant_storage must be one of"),
        ("quantize_towers: true", "quantize_towers has no effect without load_in_4bit or load_in_8bit"),
    ],
)
def test_a_wrong_config_file_is_refused(tmp_path, text, message):
    with pytest.raises(SetupError) as caught:
        parse_args(["--config", str(yaml_file(tmp_path, text)), "--output_dir", str(tmp_path), "--bf16", "false"])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num_generation", "4"], "unknown option --num_generation; did you mean --num_generations?"),
        (["--learning-rat=1e-3"], "unknown option --learning-rat; did you mean --learning_rate?"),
        (["loose"], "unexpected value 'loose'"),
        (["--max_steps", "x"], "invalid int value"),
        (["--config"], "--config needs a value"),
        (["--config", "no/such.yaml"], "cannot read the config file no/such.yaml"),
    ],
)
def test_a_wrong_option_is_refused(words, message):
    with pytest.raises(SetupError) as caught:
        parse_args(words)
    assert message in str(caught.value)


def test_values_that_yaml_reads_in_its_own_way(tmp_path, monkeypatch):
    monkeypatch.delenv("A_VARIABLE", raising=False)
    path = yaml_file(
        tmp_path,
        f"""
        output_dir: {tmp_path}
        bf16: false
        save_strategy: no            # YAML reads a bare no as false, and a bare on as true
        shared_prefix: on
        learning_rate: 1e-5          # and this as text
        rewards: accuracy_reward
        num_frames: null
        video_fps: 2
        env: {{A_VARIABLE: 3}}
        """,
    )
    script_args, training_args, _ = parse_args(["--config", str(path)])
    assert str(training_args.save_strategy.value) == "no" and training_args.shared_prefix == "on"
    assert training_args.learning_rate == 1e-5
    assert script_args.rewards == ["accuracy_reward"]
    assert (training_args.num_frames, training_args.video_fps) == (None, 2)
    assert os.environ["A_VARIABLE"] == "3"


def test_wrong_jobs_end_with_code_2_and_one_line(tmp_path):
    shown = maple("train", "--config", yaml_file(tmp_path, "num_generation: 4"))
    assert shown.returncode == 2
    assert shown.stderr.strip().splitlines()[-1].startswith("maple-trl train: ")
    assert "did you mean num_generations?" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert maple("train").returncode == 2


# Parts


def test_load_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def short(completions, **_):\n    return [0.0]\nNUMBER = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    functions = load_rewards(["format_reward", "accuracy_reward", "my_rewards:short"])
    assert [function.__name__ for function in functions] == ["format_reward", "accuracy_reward", "short"]
    for name, message in {
        "acuracy_reward": "unknown reward 'acuracy_reward'; there are accuracy_reward, .*format_reward",
        "extract_answer": "unknown reward",  # a helper of that package is no reward
        "my_rewards:long": "cannot load the reward",
        "no_such_module:f": "cannot load the reward",
        "my_rewards:NUMBER": "is no function but int",
    }.items():
        with pytest.raises(SetupError, match=message):
            load_rewards([name])


ROWS = [{"prompt": "Which?", "solution": "B", "tag": "S", "subtitle": "cat"}] * 3


def write_rows(path):
    from datasets import Dataset

    table = Dataset.from_list(ROWS)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, lines=path.suffix == ".jsonl")
    return table


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_a_data_file(tmp_path, suffix):
    write_rows(tmp_path / f"rows{suffix}")
    splits, root = load_datasets(OmniScriptArguments(dataset_name=str(tmp_path / f"rows{suffix}")))
    assert list(splits) == ["train"]
    assert splits["train"].to_list() == ROWS
    assert root == str(tmp_path)


def test_a_data_folder(tmp_path):
    write_rows(tmp_path / "train-00000-of-00002.parquet")
    write_rows(tmp_path / "train-00001-of-00002.parquet")
    write_rows(tmp_path / "test.parquet")
    (tmp_path / "clip.mp4").write_bytes(b"media beside the tables are not rows")
    splits, root = load_datasets(OmniScriptArguments(dataset_name=str(tmp_path)), media_root="/elsewhere")
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "test": 3}
    assert root == "/elsewhere"
    with pytest.raises(SetupError, match=r"holds no dev\.parquet.*it has test\.parquet"):
        load_datasets(OmniScriptArguments(dataset_name=str(tmp_path), dataset_train_split="dev"))


def test_a_data_set_saved_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(dev=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "many")
    assert len(load_datasets(OmniScriptArguments(dataset_name=str(tmp_path / "one")))[0]["train"]) == 3
    with pytest.raises(SetupError, match="has no split 'train'; its splits: dev"):
        load_datasets(OmniScriptArguments(dataset_name=str(tmp_path / "many")))


@pytest.mark.parametrize(
    "name, message",
    [
        (None, "dataset_name is missing"),
        ("builtin:eight-tags", "embedded: builtin:seven-tags"),
        ("./nowhere", "no file or folder ./nowhere"),
        ("nowhere.jsonl", "no file or folder nowhere.jsonl"),
        ("somebody/no-such-data-set", "cannot load the data set 'somebody/no-such-data-set'"),
    ],
)
def test_a_data_set_that_is_not_there(name, message):
    with pytest.raises(SetupError) as caught:
        load_datasets(OmniScriptArguments(dataset_name=name))
    assert message in str(caught.value)


def test_other_files_are_not_data(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(
        SetupError, match=r"rows\.xlsx: a data file is one of \.parquet, \.jsonl, \.json, \.csv, \.tsv"
    ):
        load_datasets(OmniScriptArguments(dataset_name=str(tmp_path / "rows.xlsx")))
    with pytest.raises(SetupError, match=r"broken\.jsonl, line 1, column 2: not JSON"):
        load_datasets(OmniScriptArguments(dataset_name=str(tmp_path / "broken.jsonl")))


def test_checkpoint_to_resume(tmp_path):
    class Args:
        output_dir = str(tmp_path / "run")
        resume_from_checkpoint = None

    assert train.checkpoint_to_resume(Args) is None
    Args.resume_from_checkpoint = "true"
    with pytest.raises(SetupError, match="no complete checkpoint-N folder"):
        train.checkpoint_to_resume(Args)
    for step in (5, 10, 9, 11, 12):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if step < 12:  # the last file of a checkpoint: 12 was cut off before it, 11 within it
            (folder / "trainer_state.json").write_text("{}" if step < 11 else '{"epoch": ')
    assert train.checkpoint_to_resume(Args).endswith("checkpoint-10")
    Args.resume_from_checkpoint = str(tmp_path / "run" / "checkpoint-5")
    assert train.checkpoint_to_resume(Args).endswith("checkpoint-5")
    Args.resume_from_checkpoint = str(tmp_path / "missing")
    with pytest.raises(SetupError, match="no folder"):
        train.checkpoint_to_resume(Args)


def test_auto_goes_on_from_the_last_whole_checkpoint(tmp_path, caplog):
    class Args:
        output_dir = str(tmp_path / "run")
        resume_from_checkpoint = "auto"
        world_size = 2

    assert train.checkpoint_to_resume(Args) is None  # a first start
    unfinished = tmp_path / "run" / "checkpoint-2"
    unfinished.mkdir(parents=True)
    assert train.checkpoint_to_resume(Args) is None  # killed while it wrote its first one
    for step in (4, 6, 8, 10):
        write_checkpoint(tmp_path / "run" / f"checkpoint-{step}")
    assert train.checkpoint_to_resume(Args).endswith("checkpoint-10")
    (tmp_path / "run" / "checkpoint-10" / "trainer_state.json").write_text('{"epoch": ')
    assert train.checkpoint_to_resume(Args).endswith("checkpoint-8") and not caplog.records
    torn = tmp_path / "run" / "checkpoint-8" / "model.safetensors"
    os.truncate(torn, torn.stat().st_size - 4)
    (tmp_path / "run" / "checkpoint-6" / "rng_state_1.pth").unlink()
    assert train.checkpoint_to_resume(Args).endswith("checkpoint-4")
    assert f"{torn} is damaged" in caplog.text and "lacks the random numbers' (rng_state_1.pth)" in caplog.text
    os.truncate(tmp_path / "run" / "checkpoint-4" / "optimizer.pt", 100)
    with pytest.raises(
        SetupError, match=f"none of the 3 complete checkpoints in .* is whole. Leave it out .* The newest: {torn}"
    ):
        train.checkpoint_to_resume(Args)
    Args.resume_from_checkpoint = "true"
    assert train.checkpoint_to_resume(Args).endswith("checkpoint-8")  # the last one, which is refused later


def test_auto_removes_no_checkpoint_that_was_complete_once(tmp_path):
    class Args:
        output_dir = str(tmp_path)
        resume_from_checkpoint = "auto"
        world_size = 1

    write_checkpoint(tmp_path / "checkpoint-4", ranks=1)
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": ')
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 4}\n')
    assert train.checkpoint_to_resume(Args) is None  # killed while it wrote it
    log.write_text('{"step": 4}\n{"step": 5}\n{"step": 6')
    with pytest.raises(
        SetupError, match="checkpoint-4 has no whole trainer_state.json, though the run went on from it to step 5"
    ):
        train.checkpoint_to_resume(Args)


@pytest.mark.slow
def test_the_same_command_begins_a_run_and_goes_on_with_it(short_run, one_step, tmp_path, monkeypatch):
    """One that was stopped before its first checkpoint begins anew; results of a run that ended are not touched."""
    folder, _ = short_run
    begun, told = one_step
    assert "overwrite: removed checkpoint-1, metrics.jsonl of this run, which had no whole checkpoint, from" in told
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    assert run_here(tmp_path, monkeypatch, *AUTO)[1]["steps"] == 2
    through, pieces = weights(folder), weights(tmp_path)
    assert all((through[name] == pieces[name]).all() for name in through)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(SetupError, match=r"holds results of another run \(metrics.jsonl, model.safetensors, "):
        run_here(tmp_path, monkeypatch, *AUTO)


# Results


def test_files_are_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "summary.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, b"no text")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize("remade", [False, True])
def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch, remade):
    """After a power cut a file whose content was not waited for may be empty, under the name of the old one."""
    calls, path = [], tmp_path / "stages.json"
    synced, replaced = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(("on disk", os.fstat(file).st_size)), synced(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append(("named", path.exists())), replaced(*paths)))
    write_atomically(path, "whole", remade)
    assert calls == [("on disk", 5)] * (not remade) + [("named", False)] and path.read_text() == "whole"


def test_metrics_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics([{"step": 1, "reward": math.nan, "more": [math.inf, 2]}, {"step": 2}], path)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "reward": None, "more": [None, 2]}, {"step": 2}]


def test_summary_table(monkeypatch, capsys):
    monkeypatch.setattr("rich.console.Console", lambda: Console(width=100, file=sys.stdout))
    before, after = {"all": 0.5, "V": 0.25, "VAS": 0.75}, {"all": 0.75, "V": 0.5, "VAS": 1.0}
    summary = {"before": before, "after": after, "seconds": 12.4, "steps": 3}
    print_summary(summary, "runs/x")
    lines = capsys.readouterr().out.splitlines()
    body = [line.split("│")[1:-1] for line in lines if "│" in line]
    assert [[cell.strip() for cell in row] for row in body] == [
        ["V", "0.250", "0.500", "+0.250"],
        ["VAS", "0.750", "1.000", "+0.250"],
        ["all", "0.500", "0.750", "+0.250"],
    ]
    assert lines[-1] == "3 steps, 12 s in all; results in runs/x"


def test_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from maple_trl.records.metrics_log import reward_curves
    from maple_trl.reports.plots import plot_training

    log = [
        {"step": 1, "reward": 0.2, "rewards/accuracy_reward/mean": 0.1, "loss": 0.0},
        {"step": 2, "reward": math.nan, "rewards/accuracy_reward/mean": 0.4},
        {"train_runtime": 3.0},
    ]
    assert reward_curves(log) == {"reward": [(1, 0.2)], "accuracy_reward": [(1, 0.1), (2, 0.4)]}
    wide = plot_training(log, {"all": 0.5, "V": 0.5}, {"all": 0.9, "V": 0.9}, tmp_path / "new" / "wide.png")
    narrow = plot_training([], None, None, tmp_path / "narrow.png")
    with Image.open(wide) as a, Image.open(narrow) as b:
        assert a.width > b.width
    assert [path.name for path in wide.parent.iterdir()] == ["wide.png"]
    # Without matplotlib: a job goes on, and says what would bring the plot.
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"maple-trl\[plots\]"):
        plot_training([], None, None, tmp_path / "none.png")
    train._draw([], None, None, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_model_switches():
    args = OmniModelConfig(use_peft=True, lora_vision=False)
    assert args.adapted == ["audio", "projectors", "llm"] and args.frozen == []
    assert OmniModelConfig(freeze_vision=True, freeze_audio=True).frozen == ["vision", "audio"]


# The doctor


def test_env_reports_this_machine(capsys):
    shown = maple("env", "--imports", "--json")
    assert shown.returncode == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    versions = {package["name"]: package["version"] for package in report["packages"]}
    assert len(versions) == len(report["packages"])  # each once
    assert {"flash-attn", "bitsandbytes"} <= set(versions) and "mkdocs" not in versions  # of use, and for developers
    import torch
    import trl

    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert versions["trl"] == trl.__version__
    assert {codec["name"]: codec["usable"] for codec in report["codecs"] if codec["required"]} == {
        "h264": True,
        "aac": True,
    }
    assert report["devices"][-1]["device"] == "cpu" and report["devices"][-1]["memory"] > 0
    assert report["problems"] == []
    print_report(report, Console(width=200))
    text = capsys.readouterr().out
    assert "Nothing required is broken." in text and "transformers" in text


def test_env_finds_what_is_broken(tmp_path, capsys):
    """A package that cannot be imported, as after a broken installation, ends with code 1 and is named."""
    (tmp_path / "pysubs2.py").write_text("raise ImportError('half of it is missing')\n")
    broken = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    afresh = "import runpy, sys; sys.modules.pop('pysubs2', 0); runpy.run_module('maple_trl.cli', run_name='__main__')"
    shown = programs.run(["-c", afresh, "env", "--imports", "--json"], broken)
    assert shown.returncode == 1
    report = json.loads(shown.stdout)
    assert report["problems"] == ["pysubs2: import pysubs2 fails: ImportError: half of it is missing"]
    print_report(report, Console(width=200))
    assert "Something required is broken." in capsys.readouterr().out
    assert maple("env", env=broken).returncode == 0  # nothing was imported, which the report says


def test_env_finds_a_broken_decoder_without_imports(tmp_path):
    (tmp_path / "av.py").write_text("raise ImportError('libavcodec.so: cannot open shared object file')\n")
    command = [sys.executable, "-m", "maple_trl.cli", "env", "--json"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert shown.returncode == 1
    report = json.loads(shown.stdout)
    assert any("h264 (video) can't be decoded: ImportError: libavcodec.so" in text for text in report["problems"])
    assert report["ffmpeg"] is None


def test_env_names_the_devices_of_the_system(tmp_path):
    """A GPU is there before torch is: what the driver's own tool says."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, NVIDIA H200, 143771'\necho '1, NVIDIA H200, [N/A]'\n")
    tool.chmod(0o755)
    shown = maple("env", "--json", env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})
    first, second, _ = json.loads(shown.stdout)["devices"]
    assert first == {"device": "cuda:0", "name": "NVIDIA H200", "memory": 143771 << 20, "bf16": None}
    assert second["memory"] is None


# The job itself, on the embedded model and data


SHORT = [
    *("--config", str(RECIPE), "--max_steps", "2", "--per_device_train_batch_size", "8", "--num_generations", "4"),
    *(
        "--eval_questions_per_tag",
        "2",
        "--logging_steps",
        "1",
        "--save_steps",
        "1",
        "--use_cpu",
        "true",
        "--warmup_steps",
        "0",
    ),
]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Two steps of the demo recipe through the command line."""
    folder = tmp_path_factory.mktemp("short")
    shown = maple("train", *SHORT, "--output_dir", folder, timeout=600)
    assert shown.returncode == 0, shown.stderr
    return folder, shown


@pytest.mark.slow
def test_train_writes_its_results(short_run):
    folder, shown = short_run
    summary = read_json(folder / "summary.json")
    tags = {"all", "V", "A", "S", "VA", "VS", "AS", "VAS"}
    assert set(summary["before"]) == set(summary["after"]) == tags
    assert all(0 <= value <= 1 for part in ("before", "after") for value in summary[part].values())
    assert summary["questions"] == {tag: 14 if tag == "all" else 2 for tag in tags}
    assert summary["steps"] == 2
    assert summary["seconds"] > summary["train_seconds"] > 0
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics if "reward" in entry] == [1, 2]
    assert all(0 <= e["rewards/accuracy_reward/mean"] <= 1 for e in metrics if "reward" in e)
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert f"Report: {folder / 'report.html'}, to be opened" in shown.stdout
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "Sampled accuracy" in shown.stdout and "VAS" in shown.stdout
    assert re.search(r"^ *2/2 ", shown.stdout, re.MULTILINE)  # the row of the last step
    # It is no terminal. Bars of transformers are decided on when that is imported, which the server of programs has done.
    assert not [word for word in ("deprecated", "Checking rows", "Probing media") if word in shown.stderr]


@pytest.mark.slow
def test_train_leaves_a_model_that_loads_and_has_moved(short_run):
    from maple_trl.omni.loading import load_model, load_processor, resolve_checkpoint

    folder, _ = short_run
    model, processor = load_model(str(folder)), load_processor(str(folder))
    assert type(model).__name__ == "Qwen2_5OmniThinkerForConditionalGeneration"
    assert processor.tokenizer.padding_side == "left"
    before, after = weights(Path(resolve_checkpoint("builtin:tiny-omni"))), weights(folder)
    moved = {name for name in before if (before[name] != after[name]).any()}
    for part in ("visual", "audio_tower", "model.layers"):
        assert any(part in name for name in moved), f"{part} has not moved"


def test_a_job_goes_on_without_what_reports_are_made_with(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    monkeypatch.setitem(sys.modules, "jinja2", None)
    train._report(str(tmp_path))
    said = capsys.readouterr().out
    assert said.startswith("no report: ") and said.count("\n") == 1 and 'pip install "maple-trl[report]"' in said
    monkeypatch.delitem(sys.modules, "jinja2")  # the control
    train._report(str(tmp_path))
    assert capsys.readouterr().out == f"Report: {tmp_path / 'report.html'}, to be opened in a browser\n"


def run_here(tmp_path, monkeypatch, *words):
    """The same two steps in this process, for its parts to be looked at."""
    caught = {}
    build = train.build_trainer

    def keep(*args):
        caught["trainer"], test = build(*args)
        return caught["trainer"], test

    monkeypatch.setattr(train, "build_trainer", keep)
    words = [*SHORT, "--output_dir", str(tmp_path), "--evaluate_before_after", "false", "--report", "false", *words]
    summary = train.run(*parse_args(words))
    return caught["trainer"], summary


AUTO = ("--resume_from_checkpoint", "auto")


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The first of the two steps, where a run was stopped before its first checkpoint; and what that prints."""
    folder, told = tmp_path_factory.mktemp("one-step"), io.StringIO()
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        assert run_here(folder, patch, *AUTO, "--max_steps", "1")[1]["steps"] == 1
    return folder, told.getvalue()


@pytest.mark.slow
def test_train_goes_on_from_its_last_checkpoint(short_run, one_step, tmp_path, monkeypatch):
    """A job that ends after step 1 and is resumed, in another folder, gives the weights of one that ran through."""
    folder, _ = short_run
    shutil.copytree(one_step[0], tmp_path, dirs_exist_ok=True)
    assert read_json(tmp_path / "summary.json")["before"] is None
    assert run_here(tmp_path, monkeypatch, "--resume_from_checkpoint", "true")[1]["steps"] == 2
    through, pieces = weights(folder), weights(tmp_path)
    assert all((through[name] == pieces[name]).all() for name in through)


@pytest.mark.slow
def test_a_refused_resume_says_why_and_keeps_the_log(one_step, tmp_path, monkeypatch):
    shutil.copytree(one_step[0], tmp_path, dirs_exist_ok=True)
    logged = (tmp_path / "metrics.jsonl").read_text()
    assert logged
    for change, why in (
        ("--modality_access=all", "not the data set"),
        ("--num_iterations=2", "num_iterations 1 -> 2"),
    ):
        with pytest.raises(SetupError, match=why):
            run_here(tmp_path, monkeypatch, "--resume_from_checkpoint", "true", *change.split("="))
    assert (tmp_path / "metrics.jsonl").read_text() == logged


@pytest.mark.slow
def test_train_with_lora(tmp_path, monkeypatch):
    words = [
        "--use_peft",
        "true",
        "--lora_r",
        "2",
        "--lora_vision",
        "false",
        "--lora_audio",
        "false",
        "--use_rslora",
        "true",
    ]
    trainer, summary = run_here(tmp_path, monkeypatch, *words, "--no_lora_projectors")
    assert summary["before"] is None and summary["steps"] == 2
    adapted = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert adapted and all("lora_" in name for name in adapted)
    assert not any("visual" in name or "audio_tower" in name for name in adapted)
    adapter = read_json(tmp_path / "adapter_config.json")
    assert adapter["r"] == 2 and adapter["use_rslora"] is True
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "processor_config.json").is_file()


@pytest.mark.slow
def test_train_with_frozen_parts(short_run, tmp_path, monkeypatch):
    from maple_trl.omni.loading import resolve_checkpoint

    start, free = weights(Path(resolve_checkpoint("builtin:tiny-omni"))), weights(short_run[0])
    run_here(tmp_path, monkeypatch, "--freeze_vision", "true", "--freeze_audio", "true")
    frozen = weights(tmp_path)
    towers = ("visual.blocks.", "audio_tower.layers.")
    for tower in towers:  # the same steps move them when they are free
        assert any((start[name] != free[name]).any() for name in start if tower in name), tower
        assert not any((start[name] != frozen[name]).any() for name in start if tower in name), tower
    assert any((start[name] != frozen[name]).any() for name in start)


def test_train_without_a_test_split(tmp_path):
    write_rows(tmp_path / "train.parquet")
    words = ["--config", str(RECIPE), "--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SetupError, match="has no split 'test' to evaluate on"):
        train.run(*parse_args([*words, "--use_cpu", "true"]))


def test_train_names_the_row_that_is_no_prompt(tmp_path, capsys):
    from datasets import Dataset

    rows = [{**ROWS[0], "prompt": [{"role": "user", "content": "Which?"}], "tag": tag} for tag in ("S", "VX")]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    words = [*SHORT, "--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", *words, "--evaluate_before_after", "false"]) == 2
    assert re.search(r"maple-trl train: .*train_dataset, row 1: .*'VX'", capsys.readouterr().err)


def test_train_that_does_not_fit_says_so_before_it_begins(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.jsonl").write_text("")
    cases = {
        ("--output_dir", str(tmp_path / "file" / "below")): "output_dir: cannot write into",
        ("--media_root", str(tmp_path / "nowhere")): "media root .* is not a folder",
        ("--model_name_or_path", "builtin:huge"): "no embedded model 'builtin:huge'",
        ("--dataset_name", str(tmp_path / "empty")): "cannot read .*empty/train.jsonl: it holds no row",
        (
            "--per_device_train_batch_size",
            "8000",
        ): "14 usable rows, but one rollout takes|usable rows, but one rollout",
        ("--attn_implementation", "flash_attention_2"): "FlashAttention2|flash_attn|flash-attn",
    }
    for words, why in cases.items():
        options = [*SHORT, "--output_dir", str(tmp_path / "out"), "--evaluate_before_after", "false", *words]
        assert cli.main(["train", *options]) == 2, words
        assert re.search(f"maple-trl train: .*({why})", capsys.readouterr().err, re.DOTALL), words


def test_train_without_a_model(tmp_path):
    with pytest.raises(SetupError, match="model_name_or_path is missing"):
        train.load_model_and_processor(
            OmniModelConfig(), parse_args(["--output_dir", str(tmp_path), "--bf16", "false"])[1]
        )
