"""One vocabulary: every name of an option means the same, in files and on the command line, with dashes or underscores."""

import itertools

import pytest
import yaml

from maple_trl.cli.critical_steps import CriticalStepArguments
from maple_trl.cli.data_hints import HintArguments
from maple_trl.cli.data_qa_plus import QAPlusArguments
from maple_trl.cli.eval import read_job
from maple_trl.cli.report import ReportArguments
from maple_trl.evaluation.options import EvalOptions
from maple_trl.jobs.command_line import take_option
from maple_trl.jobs.difficulty import DifficultyArguments, DifficultyOptions
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.eval_job import EvalArguments, EvalMedia
from maple_trl.jobs.option_parser import OptionParser, option_keys
from maple_trl.jobs.options import OmniScriptArguments, read_options


COMMANDS = {
    "train": [OmniScriptArguments],
    "eval": [EvalArguments, EvalOptions, EvalMedia],
    "data hints": [HintArguments],
    "data qa-plus": [QAPlusArguments],
    "data difficulty": [DifficultyArguments, DifficultyOptions, EvalMedia],
    "report": [ReportArguments],
    "critical-steps": [CriticalStepArguments],
}
# What files and command lines said before there was one vocabulary.
FORMER = {
    "train": {"rewards": "reward_funcs"},
    "eval": {
        "model": "model_name_or_path",
        "revision": "model_revision",
        "data": "dataset_name",
        "split": "dataset_test_split",
        "filter": "dataset_filter",
        "output": "output_dir",
        "judge": "reward_funcs",
    },
    "data hints": {"input": "dataset_name"},
    "data qa-plus": {},
    "data difficulty": {},
    "report": {},
    "critical-steps": {},
}
# TRL's names of what is called otherwise here, in Python and in results.
TRLS = {
    "eval": {
        "num_generations": "samples",
        "per_device_eval_batch_size": "batch_size",
        "max_completion_length": "max_new_tokens",
        "generation_kwargs": "generation",
    },
    "data hints": {"model_name_or_path": "model"},
    "critical-steps": {"model_name_or_path": "model"},
}


def example(action):
    """A value, other than the default, as a file and as the command line give it."""
    kind = getattr(action.type, "__name__", "")
    if action.nargs == 0 or kind == "string_to_bool":
        return not action.default, str(not action.default)
    if action.choices:
        return action.choices[-1], action.choices[-1]
    special = {
        "prompt_template": "{question}",
        "access": "V",
        "reward_funcs": "format_reward",
        "overlong_media": "trim",
        "media_backend": "auto",
        "host_memory_bytes": "64MiB",
    }
    special |= {"subtitle_template": "<{subtitle}>", "completion_template": "<{solution}>", "trainer": "omni_sft"}
    if action.dest in special:
        return special[action.dest], special[action.dest]
    if kind in ("dict", "json_object") or action.dest == "dataset_filter":
        return {"tag": ["V"]}, '{"tag": ["V"]}'
    number = {"confidence": 0.5, "top_p": 0.5, "min_p": 0.5, "max_failures": 0.5, "temperature": 0.5}
    number |= {"keep_above": 0.5, "keep_at_most": 0.5}
    number |= {"max_pixels": 200704, "min_pixels": 784, "media_worker_bytes": 1 << 29}
    value = number.get(action.dest, 18) if kind in ("int", "float") else "x"
    return value, str(value)


def read(command, *words):
    return read_options(OptionParser(COMMANDS[command], prog=f"maple-trl {command}"), [str(word) for word in words])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_name_of_an_option_means_the_same(command, tmp_path):
    parser = OptionParser(COMMANDS[command], prog=f"maple-trl {command}")
    keys, file, tried = option_keys(parser), tmp_path / "options.yaml", 0
    usual = read_options(parser, [])
    for dest in dict.fromkeys(action.dest for action in keys.values()):
        action = keys[dest]
        value, text = example(action)
        more = ["--trainer", "omni_sft"] if dest == "completion_template" else []
        wanted = read_options(parser, [f"--{dest}", text, *more])
        assert wanted != usual, dest
        names = [name for name in keys if keys[name].dest == dest and keys[name].nargs != 0]
        for name, dash in itertools.product(names, "_-"):
            assert read_options(parser, ["--" + name.replace("_", dash), text, *more]) == wanted, name
            tried += 1
        for name in names:
            file.write_text(yaml.safe_dump({name: value}))
            assert read(command, "--config", file, *more) == wanted, name
    assert tried >= 2 * len(usual[0].__dataclass_fields__)
    for former, name in (FORMER[command] | TRLS.get(command, {})).items():
        assert keys[former] is keys[name] and keys[name].dest == name


def test_a_switch_may_be_switched_off_by_its_no(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("no_shared_prompt: true\n")
    off = [["--no-shared-prompt"], ["--no_shared_prompt"], ["--shared_prompt", "false"], ["--config", file]]
    assert [read("eval", *words)[1].shared_prompt for words in off] == [False] * 4
    file.write_text("no_shared_prompt: false\n")
    assert read("eval", "--config", file)[1].shared_prompt


def test_one_option_under_two_names_is_refused(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("data: a.parquet\ndataset_name: b.parquet\n")
    with pytest.raises(SetupError, match="options.yaml: data and dataset_name are one option; give one of them"):
        read("eval", "--config", file)
    (tmp_path / "more.yaml").write_text("extends: options.yaml\ndataset_name: c.parquet\n")
    file.write_text("data: a.parquet\n")
    assert read("eval", "--config", tmp_path / "more.yaml")[0].dataset_name == "c.parquet"


def test_former_and_present_words_describe_one_evaluation(tmp_path):
    before = "--model m --data d --output o --split s --filter {} --judge format_reward --samples 2 --batch-size 4 "
    before += "--max-new-tokens 9 --num-frames 4"
    now = "--model_name_or_path m --dataset_name d --output_dir o --dataset_test_split s --dataset_filter {} "
    now += "--reward_funcs format_reward --num_generations 2 --per_device_eval_batch_size 4 --max_completion_length 9 "
    assert read_job(before.split()) == read_job((now + "--num_frames 4").split())


def test_a_scorer_is_one_reward():
    with pytest.raises(SetupError, match="one reward scores the completions, got 2"):
        read("eval", "--reward_funcs", "format_reward", "accuracy_reward")


def test_rewards_by_their_former_name_in_python():
    assert OmniScriptArguments(rewards=["format_reward"]) == OmniScriptArguments(reward_funcs=["format_reward"])
    assert OmniScriptArguments(rewards=["format_reward"]).reward_funcs == ["format_reward"]


def test_a_plan_of_stages_takes_dashes(tmp_path):
    """What is taken from a command line before any parser reads it."""
    assert take_option(["--output-dir=a", "--seed", "1", "--output_dir", "b"], "--output_dir") == (
        "b",
        ["--seed", "1"],
    )
    with pytest.raises(SetupError, match="--output_dir needs a value"):
        take_option(["--output-dir"], "--output_dir")


def test_files_of_the_other_commands_name_file_and_key(tmp_path):
    file = tmp_path / "options.yaml"
    for command, text, message in (
        ("report", "thumbnail: 3", "unknown key 'thumbnail'; did you mean thumbnails?"),
        ("report", "max_rollouts: many", "max_rollouts must be a whole number, got 'many'"),
        ("data hints", "sampling: [1]", "sampling: must be a mapping of names to values, got .1."),
        ("data hints", "dry_run: 3", "dry_run must be true or false, got 3"),
        ("data hints", "base_url: [a]", "base_url must be a text, got .'a'."),
    ):
        file.write_text(text)
        with pytest.raises(SetupError, match=f"options.yaml: {message}"):
            read(command, "--config", file)
