"""The command line `maple-trl`: its commands, and which of them is meant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

from maple_trl import Registry
from maple_trl.cli import (
    completion,
    critical_steps,
    data_convert,
    data_curate,
    data_difficulty,
    data_hints,
    data_push,
    data_qa_plus,
    data_review,
    data_validate,
    env,
    export,
    parity,
    plan,
    push,
    recipes,
    report,
    train,
    vllm_serve,
)
from maple_trl.cli import eval as evaluation
from maple_trl.cli.base import Command, add_help, statuses_text
from maple_trl.cli.failures import CLOSED, DONE, INTERRUPTED, asks_for_help, fail, refuse
from maple_trl.jobs.help_format import HelpFormatter
from maple_trl.messages import did_you_mean


# Nothing heavier than the standard library is imported up here: `maple-trl --help` answers at once.

GROUPS: dict[str, tuple[Command, ...]] = {
    "begin": (recipes.COMMAND, env.COMMAND, plan.COMMAND),
    "prepare data": (
        data_curate.COMMAND,
        data_convert.COMMAND,
        data_validate.COMMAND,
        data_review.COMMAND,
        data_hints.COMMAND,
        data_qa_plus.COMMAND,
        data_difficulty.COMMAND,
        data_push.COMMAND,
    ),
    "train and measure": (train.COMMAND, evaluation.COMMAND, report.COMMAND, critical_steps.COMMAND),
    "hand on a model": (export.COMMAND, push.COMMAND),
    "sample with vLLM": (vllm_serve.COMMAND, parity.COMMAND),
    "shell": (completion.make_command(lambda: build_parser(everything=True)),),
}
"""All commands by what they are for, in the order in which one meets them."""

_OWN = {command.name: command for group in GROUPS.values() for command in group}
_FAMILIES = {name.split()[0] for name in _OWN if " " in name}  # `data`, whose commands have two words

COMMANDS: Registry[Callable[[list[str]], int | None]] = Registry("command", "maple_trl.commands")
"""
Commands of other packages by name: functions of the words behind it, which return the exit status. The names that there are
stay ours.
"""

_DESCRIPTION = "Reinforcement learning for models that watch, listen and read: GRPO on video, audio and subtitles."
_EXAMPLES = """\
examples:
  maple-trl train --config demo
  maple-trl eval --model_name_or_path runs/demo --dataset_name builtin:seven-tags --num_frames 4 --output_dir runs/eval
  maple-trl report runs/demo

`maple-trl COMMAND --help` shows the options of one. Options are written with underscores or dashes, as --output_dir or
--output-dir; BOOL is true or false, and the option alone means true; --config FILE reads options from a YAML file.

"""


def build_parser(everything: bool = False) -> argparse.ArgumentParser:
    """
    Build the parser of the whole command line.

    Args:
        everything (`bool`, *optional*, defaults to `False`):
            With the options of all commands, read from their sources; else with their names alone.
    """
    parser = _parser("maple-trl", _DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"maple-trl {_version()}", help="show the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    families: dict[str, argparse._SubParsersAction] = {}
    for name, command in _OWN.items():
        family, _, rest = name.rpartition(" ")
        if family and family not in families:
            child = commands.add_parser(family, help=_family_help(family), add_help=False)
            add_help(child)
            families[family] = child.add_subparsers(dest=f"{family}_command", metavar="COMMAND")
        place = families.get(family, commands)
        place.add_parser(rest, help=command.help, add_help=False)
        if everything:
            place._name_parser_map[rest] = _whole(command)
    for name in _further():
        commands.add_parser(name, help="added by an installed package", add_help=False)
    return parser


def _whole(command: Command) -> argparse.ArgumentParser:
    if not isinstance(command, train.TrainCommand):
        return command.parser(declared=True)
    from maple_trl.jobs.options import TRAINERS

    return command.parser(declared=True, trainers=list(TRAINERS))


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=HelpFormatter, add_help=False, allow_abbrev=False
    )
    add_help(parser)
    return parser


def _family_help(family: str) -> str:
    return f"{next(title for title, group in GROUPS.items() if group[0].name.startswith(family))}: {family} COMMAND"


def _further() -> list[str]:
    """Return the names of commands of other packages."""
    return [name for name in COMMANDS if name not in _OWN and name not in _FAMILIES]


def _version() -> str:
    try:
        return metadata.version("maple-trl")
    except metadata.PackageNotFoundError:
        return "(not installed as a package)"


def overview(family: str | None = None) -> str:
    """Return the help of the whole command line, or of the commands of two words that begin alike, as `data`."""
    groups = {title: [(c.name, c.help) for c in group] for title, group in GROUPS.items()}
    if family is not None:
        groups = {
            title: [line for line in lines if line[0].startswith(f"{family} ")] for title, lines in groups.items()
        }
    elif further := _further():
        groups["added by installed packages"] = [(name, "") for name in further]
    name = "maple-trl" if family is None else f"maple-trl {family}"
    formatter = HelpFormatter(name)
    formatter._max_help_position = 20  # names of commands are short
    formatter.add_usage(f"{name} COMMAND [OPTION ...]", [], [])
    formatter.add_text(_DESCRIPTION if family is None else None)
    for title, lines in groups.items():
        if lines:
            formatter.start_section(title)
            formatter.add_arguments([argparse._StoreAction([], name, help=told) for name, told in lines])
            formatter.end_section()
    parser = _parser(name, "")
    if family is None:
        parser.add_argument("--version", action="version", version="", help="show the version")
    formatter.start_section("options")
    formatter.add_arguments(parser._optionals._group_actions)
    formatter.end_section()
    formatter.add_text(_EXAMPLES + statuses_text({}) if family is None else None)
    return formatter.format_help()


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Command line without the program's name; default `sys.argv[1:]`.

    Returns:
        `int`: the exit status, of which [`~maple_trl.cli.base.STATUSES`] says what each means.
    """
    # Libraries tell the Hub about runs unless the environment says otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Nor has transformers the Hub convert the weights of models that are only read.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    if not sys.stderr.isatty():  # a log, in which bars are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    words = list(sys.argv[1:] if argv is None else argv)
    name, rest = _named(words)
    try:
        status = _run(name, rest)
        sys.stdout.flush()  # while it can still be said that nobody reads
        return status
    except BrokenPipeError:
        _close_output()
        return CLOSED
    except KeyboardInterrupt:
        return refuse(name, "stopped", INTERRUPTED)
    except Exception as error:
        status = fail(name, error)
        try:
            sys.stdout.flush()
        except OSError:  # it was the output that could not be written
            _close_output()
        return status


def _named(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the command that is meant, of one word or two, and the words behind it."""
    length = 2 if len(words) > 1 and words[0] in _FAMILIES and not words[1].startswith("-") else 1
    return " ".join(words[:length]), list(words[length:])


def _run(name: str, rest: list[str]) -> int:
    if name in ("", "-h", "--help"):
        print(overview(), end="")
        return DONE
    if name == "--version":
        print(f"maple-trl {_version()}")
        return DONE
    if name in _FAMILIES:
        if rest and not asks_for_help(rest):
            return refuse(name, f"unknown argument {rest[0]}{did_you_mean(rest[0], ['--help'])}")
        print(overview(name), end="")
        return DONE
    if name in _OWN:
        return _OWN[name](rest)
    if name in _further():
        return COMMANDS[name](rest) or DONE
    if name.startswith("-"):
        return refuse("", f"unknown argument {name}{did_you_mean(name, ('--help', '--version'))}")
    family, _, wrong = name.rpartition(" ")
    known = [*(c.rpartition(" ")[2] for c in _OWN if c.rpartition(" ")[0] == family), *([] if family else _more())]
    advice = did_you_mean(wrong, known, f"`{' '.join(['maple-trl', *family.split()])} --help` lists them")
    return refuse(family, f"there is no command {wrong}{advice}")


def _more() -> list[str]:
    return [*_FAMILIES, *_further()]


def _close_output() -> None:
    """Let what is still to be written go nowhere: the interpreter writes out its buffers when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
