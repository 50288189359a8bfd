"""What the help says: one tool, in one voice; the reference in the docs; completions that a shell really gives."""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maple_trl import cli
from maple_trl.cli.base import STATUSES, Command
from maple_trl.cli.command import GROUPS, build_parser, overview
from maple_trl.cli.completion import completion_script
from maple_trl.jobs.help_format import in_one_voice, shown_names
from maple_trl.jobs.options import TRAINERS
from maple_trl.jobs.recipe_files import find_config, recipe_names


ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [command for group in GROUPS.values() for command in group]


@pytest.fixture(scope="module")
def tree():
    """The parser of everything, by the names of commands."""
    parser = build_parser(everything=True)
    found = {}
    for name, child in subparsers(parser).items():
        below = subparsers(child)
        found |= {f"{name} {rest}": parser for rest, parser in below.items()} or {name: child}
    return found


def subparsers(parser):
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices if actions else {}


def test_the_tree_holds_every_command(tree):
    assert [command.name for command in COMMANDS] == list(tree) or set(tree) == {c.name for c in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_is_told_in_one_line_and_in_one_voice(command: Command):
    assert command.help[0].islower() and not command.help.endswith(".") and len(command.help) < 82
    assert command.description.rstrip().endswith(".") and command.description[0].isupper()
    assert f"  {command.name} " in overview() and command.help.split(",")[0] in " ".join(overview().split())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_is_explained_and_every_example_would_be_read(command: Command, tree):
    for action in command.parser(declared=True)._actions:
        if action.help != argparse.SUPPRESS:
            assert action.help, action.dest
            assert not in_one_voice(action.help).endswith(" ."), action.dest
            assert action.metavar or action.choices or action.nargs == 0, f"{action.dest}: what stands for its value?"
    assert command.examples
    own = [line for line in command.examples if f"maple-trl {command.name}" in line]
    assert own, "no example is of this command"
    for line in command.examples:
        words = shlex.split(line.replace("$(", "").replace(')"', "").replace('eval "', ""))
        words = words[1 : words.index(">") if ">" in words else None]
        other = next(
            c.name for c in sorted(COMMANDS, key=lambda c: -len(c.name)) if " ".join(words).startswith(c.name)
        )
        rest = words[len(other.split()) :]
        rest = rest[: rest.index("--")] if "--" in rest else rest
        values, unknown = tree[other].parse_known_args(rest)
        assert not unknown, line
        if "--config" in rest and (name := rest[rest.index("--config") + 1]).count(".") == 0:
            assert Path(find_config(name)).is_file(), line


def test_help_shows_statuses_defaults_and_one_spelling(capsys):
    assert cli.main(["data", "convert", "--help"]) == 0
    told = capsys.readouterr().out
    assert "usage: maple-trl data convert NAME SOURCE OUTPUT [OPTION ...]" in told
    assert "(default: 50000)" in told and "--shard_rows N" in told and "--shard-rows" not in told
    assert "--media_root FOLDER" in told and "examples:\n  maple-trl data convert" in told
    for status in STATUSES:
        assert f"\n  {status} " in told


def test_one_name_means_one_thing():
    """The same options of different commands take the same kind of value, and are said the same way in YAML."""
    kinds = {}
    for command in COMMANDS:
        for action in command.parser(declared=True)._actions:
            if action.option_strings and action.help != argparse.SUPPRESS:
                kind = "TEXT" if action.choices else str(action.metavar or action.nargs)
                kinds.setdefault(action.dest, {}).setdefault(kind, []).append(command.name)
    kinds.pop(argparse.SUPPRESS, None)
    # report and parity print for people, and write their JSON into a file beside it; eval's report may be named.
    allowed = {"json", "report"}
    differing = {name: found for name, found in kinds.items() if len(found) > 1 and name not in allowed}
    assert not differing


def test_a_switch_and_its_opposite_are_one_line():
    (action,) = [a for a in GROUPS["train and measure"][1].parser(declared=True)._actions if a.dest == "shared_prompt"
                 and a.help != argparse.SUPPRESS]  # fmt: skip
    assert shown_names(action) == ["--shared_prompt", "--no_shared_prompt"]


def test_one_voice():
    assert in_one_voice("Folder of the media.") == "folder of the media"
    assert in_one_voice("LoRA on the vision encoder.") == "LoRA on the vision encoder"
    assert in_one_voice("Data: a file, etc.") == "data: a file, etc."


def test_misspelt_commands_are_led_back(capsys):
    for words, told in {
        ("trian",): "maple-trl: there is no command trian; did you mean train?",
        ("data", "cruate"): "maple-trl data: there is no command cruate; did you mean curate?",
        ("zzz",): "maple-trl: there is no command zzz; `maple-trl --help` lists them",
        ("data", "zzz"): "maple-trl data: there is no command zzz; `maple-trl data --help` lists them",
        ("--halp",): "maple-trl: unknown argument --halp; did you mean --help?",
        ("data", "--halp"): "maple-trl data: unknown argument --halp; did you mean --help?",
    }.items():
        assert cli.main(list(words)) == 2
        assert capsys.readouterr().err == told + "\n"


def test_the_reference_in_the_docs_is_that_of_the_parsers():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import cli_reference
    finally:
        sys.path.pop(0)
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == cli_reference.updated(page), "run python scripts/cli_reference.py"
    assert all(f"### maple-trl {command.name}\n" in page for command in COMMANDS)


# Completion

ASKED = {
    "maple-trl ": {"train", "eval", "data", "recipes"},
    "maple-trl tra": {"train"},
    "maple-trl data ": {"curate", "convert", "validate", "review", "hints", "qa-plus", "difficulty", "push"},
    "maple-trl data cu": {"curate"},
    "maple-trl train --num_gen": {"--num_generations", "--num_generations_eval"},
    "maple-trl train --replay_buf": set(),  # no option of any trainer
    "maple-trl train --tag_w": {"--tag_weights"},
    "maple-trl train --dtype b": {"bfloat16"},
    "maple-trl train --config small_gpu_t": {"small_gpu_tiny"},
    "maple-trl train --config job": {"job.yaml"},
    "maple-trl eval --missing_media ": {"keep", "leave_out", "error"},
    "maple-trl report ru": {"runs"},
    "maple-trl completion ": {"bash", "zsh", "tcsh"},
}
_BASH = """
source "$1"
shift
function=$(complete -p maple-trl | sed 's/.*-F \\([^ ]*\\).*/\\1/')
while IFS= read -r line; do
    read -ra COMP_WORDS <<< "$line"
    case "$line" in *" ") COMP_WORDS+=("");; esac
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    COMPREPLY=()
    $function
    echo "${COMPREPLY[*]}"
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_bash_completes(tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(completion_script("bash", build_parser(everything=True)))
    (tmp_path / "job.yaml").write_text("")
    (tmp_path / "runs").mkdir()
    command = ["bash", "--norc", "-c", _BASH, "bash", script]
    lines = "".join(f"{line}\n" for line in ASKED)
    shown = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert shown.returncode == 0, shown.stderr
    found = dict(zip(ASKED, shown.stdout.splitlines(), strict=True))
    for line, wanted in ASKED.items():
        got = set(found[line].split())
        assert got >= wanted if line == "maple-trl " else got == wanted, (line, got)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_a_zsh_reads_the_script(tmp_path):
    script = tmp_path / "_maple-trl"
    script.write_text(completion_script("zsh", build_parser(everything=True)))
    subprocess.run(["zsh", "-n", script], check=True, timeout=60)


def test_scripts_name_all_recipes_and_the_options_of_all_trainers():
    script = completion_script("bash", build_parser(everything=True))
    assert all(name in script for name in recipe_names())
    assert len(TRAINERS) == 4 and all(
        option in script for option in ("--tag_weights", "--replay_alpha", "--completion_template")
    )
    assert completion_script("tcsh", build_parser(everything=True)).startswith("#")
