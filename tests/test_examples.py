"""The scripts of `examples/`, each in its tiny variant by the line of its docstring, and what they say of real models."""

import ast
import json
import re
import runpy
import shlex
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import programs
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from chat_server import ChatServer, say
from packaging.requirements import Requirement
from stand_in_server import StandIn
from trl import TrlParser

from maple_trl import cli
from maple_trl.jobs import evaluate, train
from maple_trl.omni.loading import load_model


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
TRAINED = [name for name in SCRIPTS if name != "evaluate.py"]


def commands(name):
    """The commands in a script's docstring, as words; the one for the embedded model is the last one."""
    text = ast.get_docstring(ast.parse((EXAMPLES / name).read_text())).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if re.match(r" {4}\S", line)]


def launched(words):
    """What a script is given by a command, as accelerate reads it."""
    assert words[:2] == ["accelerate", "launch"]
    args = launch_command_parser().parse_args(words[2:])
    return Path(args.training_script), args.training_script_args


def launches(name):
    *real, tiny = [words for words in commands(name) if words[0] == "accelerate"]
    return real, tiny


def run(name, words, monkeypatch):
    """The script in this process; what it has defined."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"examples/{name}", *words])
    return runpy.run_path(f"examples/{name}", run_name="__main__")


# What scripts say


def test_the_folder_lists_its_scripts():
    told = (EXAMPLES / "README.md").read_text()
    assert sorted(set(re.findall(r"\]\((\w+\.py)\)", told))) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_script_needs_stands_in_its_header(name):
    """As PEP 723 has it."""
    text = (EXAMPLES / name).read_text()
    (block,) = re.findall(r"(?m)^# /// script\n((?:^#(?: .*)?\n)+?)^# ///$", text)
    header = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
    declared = ConfigParser()
    declared.read(ROOT / "setup.cfg")
    (needed,) = map(Requirement, header["dependencies"])
    assert header["requires-python"] == declared["options"]["python_requires"]
    assert needed.name == declared["metadata"]["name"] and needed.extras <= set(declared["options.extras_require"])
    judges = "maple_trl.chat" in text
    assert ("judge" in needed.extras) == judges


class UnderstoodError(Exception):
    """Raised in the place of loading anything."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_said_of_real_models_is_understood(name, monkeypatch):
    """Options fit together, those that the script sets are options, and files that a line names are there."""
    unknown = []
    set_defaults = TrlParser.set_defaults_with_config

    def noting(self, **values):
        unknown.extend(set_defaults(self, **values))
        return []

    def understood(*args):
        raise UnderstoodError

    monkeypatch.setattr(TrlParser, "set_defaults_with_config", noting)
    monkeypatch.setattr("maple_trl.train.load_datasets", understood)
    monkeypatch.setattr(evaluate, "run_evaluation", understood)
    monkeypatch.chdir(ROOT)
    real, tiny = launches(name)
    assert real
    for command in (*real, tiny):
        script, words = launched(command)
        assert script == Path("examples", name)
        files = [words[1]] if command is tiny else []
        if "--config_file" in command:
            files.append(command[command.index("--config_file") + 1])
        assert all(Path(file).is_file() for file in files)
        on_cpu = ["--use_cpu", "true", "--bf16", "false"] if name in TRAINED else []
        with pytest.raises(UnderstoodError):
            run(name, [*words, *on_cpu], monkeypatch)
    assert unknown == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_other_commands_that_scripts_name_have_their_options(name, capsys):
    for program, *words in (words for words in commands(name) if words[0] == "maple-trl"):
        assert program == "maple-trl"
        group = words[: 2 if words[0] == "data" else 1]
        assert cli.main([*group, "--help"]) == 0
        told = capsys.readouterr().out
        assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--\w+", told)), words


# What scripts do

STEPS = 2
SHORT = f"--max_steps {STEPS} --logging_steps 1 --per_device_train_batch_size 16 --warmup_steps 0".split()
# Adaptive curricula ask questions before the first step.
QUICK = {"mapo_qa.py": ["--zero_shot_questions", "1"], "maple_avatar.py": ["--zero_shot_questions", "1"]}


def log_of(folder):
    """The entries of the steps in a run's log."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if "loss" in entry]


def check_trained(folder):
    """The run has made its steps, and what it saved is another model than the one it began with."""
    log = log_of(folder)
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    saved, first = (load_model(name, dtype="float32").state_dict() for name in (str(folder), "builtin:tiny-omni"))
    changed = sum(not torch.equal(value, first[key]) for key, value in saved.items())
    assert changed > len(first) / 2
    return log


def sees_all(log, _):
    return all(entry[f"media_tokens/{kind}"] > 0 for entry in log for kind in ("video", "audio", "subtitle"))


def weighs_tags(log, _):
    return all(any(re.fullmatch(r"tag/[VAS]+/weight", key) for key in entry) for entry in log)


DID = {
    "omni_grpo.py": lambda log, _: all("rewards/form_reward/mean" in entry for entry in log),
    "mupo.py": sees_all,
    "mapo_qa.py": weighs_tags,
    "mapo_captions.py": lambda log, judge: judge.calls and any(entry["reward"] > 0 for entry in log),
    "maple_avatar.py": lambda log, _: weighs_tags(log, _) and log[-1]["replay/size"] > 0,
    "vllm_server.py": lambda log, server: server.syncs == STEPS and server.asked == STEPS * 2,
    "sft_cold_start.py": lambda log, _: log[0]["loss"] > 0,
}


@pytest.fixture
def beside(request):
    """What a script needs beside itself: options, and the server that they name."""
    name = request.getfixturevalue("name")
    if name == "vllm_server.py":
        with StandIn() as server:
            yield ["--vllm_server_base_url", server.url], server
    elif name in ("mapo_captions.py", "avatar_stages.py"):
        grades = [json.dumps({"missing": value, "errors": value, "fusion": value}) for value in (0.2, 1.0)]
        if name == "avatar_stages.py":
            seen = ("visual_objects", "spatial_locations")  # what pictures alone say something of
            grades = [json.dumps(dict.fromkeys(seen, value)) for value in (0.2, 1.0)]
        with ChatServer(lambda number, body: say(grades[number % 2])) as server:
            yield ["--judge_model", "scripted", "--judge_url", server.url], server
    else:
        yield [], None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "avatar_stages.py"])
def test_a_script_trains_the_embedded_model(name, beside, tmp_path, monkeypatch):
    options, server = beside
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    _, words = launched(launches(name)[1])
    words = words[:2] + SHORT + QUICK.get(name, [])
    defined = run(name, [*words, *options, "--output_dir", str(tmp_path)], monkeypatch)
    assert DID[name](check_trained(tmp_path), server)
    # What a notebook shows of it.
    html = defined["trainer"]._repr_html_()
    assert f"{STEPS} steps" in html and ("<th>advantage</th>" in html) == (name != "sft_cold_start.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avatar_stages.py"])
def test_stages_follow_one_another(name, beside, tmp_path, monkeypatch):
    """Each begins with what the one before has saved, and the last one asks the judge."""
    options, judge = beside
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    begun, asked, load = [], [], train.load_for_training

    def noting(model_args, training_args):
        begun.append(model_args.model_name_or_path)
        asked.append(len(judge.calls))
        return load(model_args, training_args)

    monkeypatch.setattr(train, "load_for_training", noting)
    _, words = launched(launches(name)[1])
    run(name, [*words[:2], *SHORT, *options, "--output_dir", str(tmp_path)], monkeypatch)
    folders = [tmp_path / stage for stage in ("1_visual", "2_audio_visual", "3_localization")]
    assert begun == ["builtin:tiny-omni", *map(str, folders[:2])]
    assert asked == [0, 0, 0] and judge.calls
    logs = [check_trained(folder) for folder in folders]
    assert [sum(key.endswith("/mean") and key.startswith("rewards/") for key in log[0]) for log in logs] == [2, 3, 4]
    assert all(log[-1]["replay/size"] > 0 for log in logs)


@pytest.mark.slow
def test_an_evaluation_asks_with_every_set_of_signals(tmp_path, monkeypatch, capsys):
    _, words = launched(launches("evaluate.py")[1])
    run("evaluate.py", [*words, "--limit", "14", "--samples", "1", "--output_dir", str(tmp_path)], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-8:]] == ["required", "V", "A", "S", "VA", "VS", "AS", "VAS"]
    accesses = json.loads((tmp_path / "result.json").read_text())["accesses"]
    assert all(found["counts"]["scored"] == 14 for found in accesses.values())
    assert f"{accesses['VAS']['accuracy']['sample_mean']['value']:.3f}" == lines[-1].split()[1]


def launch(words, folder):
    """`accelerate` itself, whose processes need not import everything anew where it starts several."""
    programs.write_stand_in(folder)
    variables = {"PYTHON_EXEC": str(folder / "python")}
    done = programs.run(["-m", "accelerate.commands.accelerate_cli", *words], variables, ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.slow
def test_a_script_under_accelerate_launch(tmp_path):
    words = launches("omni_grpo.py")[1]
    launch([*words[1:], *SHORT, "--output_dir", str(tmp_path / "run")], tmp_path)
    check_trained(tmp_path / "run")


@pytest.mark.long
@pytest.mark.slow
def test_a_script_on_two_processes(tmp_path):
    """By the line of the folder's README."""
    (line,) = re.findall(r"ACCELERATE_USE_CPU=true (accelerate launch [^`]+)", (EXAMPLES / "README.md").read_text())
    words = shlex.split(line.replace("\\\n", " "))
    short = [*SHORT, *QUICK["mapo_qa.py"], "--save_strategy", "steps", "--save_steps", str(STEPS)]
    launch([*words[1:], *short, "--output_dir", str(tmp_path / "run")], tmp_path)
    log = check_trained(tmp_path / "run")
    assert weighs_tags(log, None)
    ranks = sorted(path.name for path in (tmp_path / "run" / f"checkpoint-{STEPS}").glob("rollout_*.json"))
    assert ranks == ["rollout_0.json", "rollout_1.json"]
