"""
Every command of README and of the pages is one that a test runs.

A command in a block marked `bash`, `sh` or `console` is held against what it calls: a make target is run dry, extras that are
installed are those of setup.cfg, files of the repository exist, and every option is one that the command's own help shows. Which test
carries out the like of it (on tiny data) stands in `RUN_BY`; a command that no line there matches fails, until one says so.
"""

import ast
import configparser
import contextlib
import functools
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from maple_trl.cli import main


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_BY = {
    r"maple-trl train .*--dry_run": "tests/cli/test_dry_run.py::test_nothing_is_asked_and_nothing_is_written",
    r"maple-trl eval .*--dry_run.*": "tests/cli/test_dry_run.py::test_nothing_is_asked_and_nothing_is_written",
    r"(source <\()?maple-trl completion .*": "tests/cli/test_help.py::test_a_bash_completes",
    r"maple-trl train .*avatar/.*": "tests/jobs/test_avatar_recipes.py::test_the_tiny_stages_run",
    r"maple-trl train .*--resume_from_checkpoint auto": "tests/cli/test_cli.py::test_the_same_command_begins_a_run_and_goes_on_with_it",
    r"maple-trl train .*--resume_from_checkpoint true": "tests/cli/test_cli.py::test_train_goes_on_from_its_last_checkpoint",
    r"maple-trl train .*--use_peft.*": "tests/evaluation/test_published_models.py::test_training_goes_on_from_an_adapter_of_the_full_model",
    r"maple-trl train .*--processor_name_or_path.*": "tests/evaluation/test_published_models.py::test_training_begins_from_weights_without_a_processor",
    r"maple-trl train .*": "tests/cli/test_cli.py::test_train_writes_its_results",
    r"maple-trl eval .*--server.*": "tests/evaluation/test_eval_server.py::test_numbers_follow_from_the_answers_and_repeat",
    r"maple-trl eval .*--judge_model.*": "tests/evaluation/test_eval_judge.py::test_captions_are_graded_by_a_server",
    r"maple-trl eval .*--load-in-4bit.*": "tests/cli/test_quantized_commands.py::test_an_adapter_is_evaluated_beside_few_bits_and_whole_weights",
    r"maple-trl eval .*--model runs/small_gpu .*": "tests/cli/test_quantized_commands.py::test_an_adapter_is_evaluated_beside_few_bits_and_whole_weights",
    r"maple-trl eval .*--write_media.*": "tests/evaluation/test_eval_pictures.py::test_a_benchmark_s_pictures_are_fed_or_become_clips",
    r"maple-trl eval .*--benchmark.*": "tests/evaluation/test_published_models.py::test_a_benchmark_as_published_by_one_command",
    r"maple-trl eval .*--preset.*": "tests/evaluation/test_eval_presets.py::test_a_table_is_asked_as_published",
    r"maple-trl eval .*--processor.*": "tests/evaluation/test_published_models.py::test_a_processor_is_taken_from_the_base_model",
    r"maple-trl eval .*(--adapter|ADAPTER).*": "tests/evaluation/test_published_models.py::test_models_and_adapters_are_named_on_the_hub",
    r"maple-trl eval .*--config.*": "tests/evaluation/test_eval_config.py::test_a_file_gives_the_same_numbers_as_the_command_line",
    r"maple-trl eval .*": "tests/evaluation/test_eval_config.py::test_a_report_may_be_named_or_asked_for",
    r"maple-trl report .*--projection.*": "tests/reports/test_figures.py::test_a_t_sne_of_both_runs_keeps_clips_together",
    r"maple-trl report .*--length_bins.*": "tests/reports/test_figures.py::test_gain_by_length_of_two_evaluations",
    r"maple-trl report .*": "tests/reports/test_report.py::test_two_evaluations_are_compared_question_by_question",
    r"maple-trl critical-steps .*": "tests/reports/test_figures.py::test_a_judge_says_where_critical_steps_stand",
    r"maple-trl plan .*": "tests/cli/test_plan_command.py::test_the_table_of_real_sizes",
    r"maple-trl env.*": "tests/cli/test_cli.py::test_env_reports_this_machine",
    r"maple-trl vllm-serve .*": "tests/rollout/test_vllm_server.py::test_what_was_sampled_is_what_is_trained",
    r"maple-trl data convert .*": "tests/data/test_converters.py::test_the_command_says_what_became_of_the_records",
    r"maple-trl data validate .*": "tests/data/test_validation.py::test_the_command_counts_all_and_shows_the_first",
    r"maple-trl data curate .*--dry.run.*": "tests/data/curation/test_curation.py::test_a_dry_run_counts_what_a_run_then_does",
    r"maple-trl data curate .*": "tests/data/curation/test_curation.py::test_questions_and_captions_of_seven_tags",
    r"maple-trl data review .*": "tests/data/review/test_review_desk.py::test_the_command_writes_and_says_what_was_decided",
    r"maple-trl data hints .*": "tests/data/test_hints_builder.py::test_the_command_reports_and_judges",
    r"maple-trl data qa-plus .*": "tests/data/test_qa_plus.py::test_the_command",
    r"maple-trl data difficulty .*--server.*": "tests/jobs/test_difficulty_filter.py::test_rows_stay_or_leave_by_name",
    r"maple-trl data difficulty .*": "tests/jobs/test_difficulty_filter.py::test_a_model_in_this_process",
    r"maple-trl data push .*": "tests/data/test_publish.py::test_what_was_pushed_loads_back",
    r"maple-trl (push|export) .*": "tests/hub/test_hub.py::test_the_commands_of_the_docs_run",
    r"accelerate launch .*": "tests/test_launching.py::test_processes_are_told_what_the_file_says",
    r"torchrun .*": "tests/test_launching.py::test_torchrun_on_two_machines",
    r"(ACCELERATE_CONFIG=\S+ )?sbatch .*": "tests/test_launching.py::test_the_slurm_script_starts_a_launcher_on_each_machine",
    r"python benchmarks/soak.py .*": "tests/benchmarks/test_soak.py::test_a_real_run_survives_all_faults",
    r"make .*": "tests/test_docs_commands.py::test_a_command_is_one_that_there_is",
    r"pip install .*": "tests/test_docs_commands.py::test_a_command_is_one_that_there_is",
}


def commands(text):
    """The commands of a text's blocks: lines joined at a backslash, without comments, of a console those behind the prompt."""
    found = []
    for language, body in re.findall(r"^ *```(bash|sh|console)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        for line in re.sub(r" *\\\n\s*", " ", body).splitlines():
            line = line.strip()
            if language == "console":
                line = line.removeprefix("$ ") if line.startswith("$ ") else ""
            line = re.split(r"(?:^|\s)#\s", line)[0].strip()
            found += [part.strip() for part in line.split(" && ") if part.strip()]
    return found


ALL = [(page.name, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]


def run_by(command):
    """The test that runs the like of a command, or `None`."""
    return next((test for pattern, test in RUN_BY.items() if re.fullmatch(pattern, command)), None)


@functools.cache
def shown(*command):
    """What the help of a command of maple-trl shows."""
    told = io.StringIO()
    words = ["--help-all"] if command == ("train",) else ["--help"]
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        main([*command, *words])
    return told.getvalue()


def faults(command):
    """What a command names that there is not."""
    words = shlex.split(command.replace("...", ""))
    told = [
        f"no file {word}"
        for word in words
        if re.match(r"(recipes|examples|benchmarks|scripts)/", word) and not (ROOT / word).exists()
    ]
    if "maple_trl.cli" in words:  # behind a launcher
        words = ["maple-trl", *words[words.index("maple_trl.cli") + 1 :]]
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        told += [done.stderr] * (done.returncode != 0)
    elif words[:2] == ["pip", "install"]:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg", encoding="utf-8")
        named = {name.strip() for extras in re.findall(r"\[(.+?)\]", command) for name in extras.split(",")}
        told += [f"no extra {name}" for name in named - set(setup["options.extras_require"])]
    elif words[0] == "maple-trl":
        name = tuple(words[1:3] if words[1] == "data" else words[1:2])
        help_text = shown(*name).replace("-", "_")
        if f"maple_trl {' '.join(name).replace('-', '_')}" not in help_text:
            told.append(f"no command {' '.join(name)}")
        options = {word.partition("=")[0] for word in words if word.startswith("--") and word != "--"}
        told += [
            f"no option {one}" for one in options if not re.search(rf"(?<!\w){one.replace('-', '_')}(?!\w)", help_text)
        ]
    return told


@pytest.mark.parametrize("page", sorted({page for page, _ in ALL}))
def test_a_command_is_one_that_there_is(page):
    told = {command: faults(command) for name, command in ALL if name == page}
    assert {command: found for command, found in told.items() if found} == {}


def test_a_test_runs_each_command():
    assert len(ALL) > 80
    assert [(page, command) for page, command in ALL if run_by(command) is None] == []
    assert [pattern for pattern in RUN_BY if not any(re.fullmatch(pattern, command) for _, command in ALL)] == []


@pytest.mark.parametrize("test", sorted(set(RUN_BY.values())))
def test_the_tests_that_run_them_are_there(test):
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_is_new_or_wrong_is_found():
    text = "```bash\nmaple-trl sing --loud   # a song\nmaple-trl eval \\\n    --louder 1 && make nothing\npip install -e '.[none]'\n```\n```console\n$ maple-trl env\n3 rows\n```"
    found = commands(text)
    assert found == [
        "maple-trl sing --loud",
        "maple-trl eval --louder 1",
        "make nothing",
        "pip install -e '.[none]'",
        "maple-trl env",
    ]
    assert run_by(found[0]) is None and run_by(found[1]) is not None
    assert faults(found[0])[0] == "no command sing" and faults(found[1]) == ["no option --louder"]
    assert faults(found[2]) and faults(found[3]) == ["no extra none"] and faults(found[4]) == []
    assert faults("python benchmarks/nothing.py") == ["no file benchmarks/nothing.py"]
