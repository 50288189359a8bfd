"""The command `maple-trl completion`: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from maple_trl.cli.base import PlainCommand
from maple_trl.jobs.help_format import shown_names
from maple_trl.jobs.recipe_files import recipe_names


# Nothing heavier than the standard library up here: the help of every command passes through this module.

SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"FILE", "DATA", "MODEL", "RUN", "SOURCE", "TABLE", "DATASET"}
_FOLDERS = {"FOLDER", "OUTPUT"}
# A config file is a file, or a recipe by its name.
_CONFIG = {"bash": "_maple_trl_config", "zsh": "_maple_trl_config", "tcsh": "f"}
_FUNCTIONS = {
    "bash": """\
_maple_trl_config() {{
  compgen -W "{recipes}" -- "$1"
  compgen -f -- "$1"
}}""",
    "zsh": """\
_maple_trl_config() {{
  local -a recipes
  recipes=({recipes})
  _alternative "recipes:recipe:compadd -a recipes" "files:file:_files"
}}""",
}


def completion_script(shell: str, parser: argparse.ArgumentParser) -> str:
    """
    Return the script by which a shell completes `maple-trl`; no Python is started when it is asked.

    Args:
        parser: of the whole command line, which is changed.
    """
    import shtab

    _mark(parser)
    recipes = " ".join(recipe_names())
    preamble = {name: text.format(recipes=recipes) for name, text in _FUNCTIONS.items()}
    return shtab.complete(parser, shell=shell, root_prefix="maple_trl", preamble=preamble)


def _mark(parser: argparse.ArgumentParser) -> None:
    """Say of each option what its value is."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _mark(child)
            continue
        marked: Any = action
        marked.option_strings = shown_names(action)
        if action.option_strings == ["--config"]:
            marked.complete = _CONFIG
        elif action.metavar in _FILES:
            marked.complete = shtab.FILE
        elif action.metavar in _FOLDERS:
            marked.complete = shtab.DIRECTORY


def make_command(build: Callable[[], argparse.ArgumentParser]) -> PlainCommand:
    """Return the command, given what builds the parser of the whole command line."""
    return PlainCommand(
        name="completion",
        help="print the script by which a shell completes commands and options",
        run=lambda arguments: print(completion_script(arguments.shell, build())),
        description="Prints the script by which a shell completes commands, options and their values.",
        examples=(
            'eval "$(maple-trl completion bash)"',
            "maple-trl completion bash > ~/.local/share/bash-completion/completions/maple-trl",
            "maple-trl completion zsh > ~/.zfunc/_maple-trl",
            "maple-trl completion tcsh > ~/.maple-trl.tcsh",
        ),
        notes="""\
The first line is for the shell that is open, the others for those that come, where their folders are there (else: mkdir -p):
bash finds its file by itself, zsh where ~/.zfunc is in fpath before compinit, and tcsh when ~/.tcshrc sources it. The script
knows the options of all trainers; print it anew after an upgrade.""",
        arguments={"SHELL": {"choices": SHELLS, "help": "bash, zsh or tcsh"}},
    )
