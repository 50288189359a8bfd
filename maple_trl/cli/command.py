"""The command line `maple-trl`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from maple_trl import Registry
from maple_trl.cli.critical_steps import run_critical_steps
from maple_trl.cli.data_convert import run_convert
from maple_trl.cli.data_curate import run_curate
from maple_trl.cli.data_difficulty import run_difficulty
from maple_trl.cli.data_hints import run_hints
from maple_trl.cli.data_push import run_push
from maple_trl.cli.data_qa_plus import run_qa_plus
from maple_trl.cli.data_review import run_review
from maple_trl.cli.data_validate import run_validate
from maple_trl.cli.eval import run_eval
from maple_trl.cli.export import run_export
from maple_trl.cli.failures import fail, refuse
from maple_trl.cli.loading import tell_when_loading
from maple_trl.cli.parity import run_parity
from maple_trl.cli.plan import run_plan
from maple_trl.cli.push import run_push as run_push_model
from maple_trl.cli.report import run_report
from maple_trl.cli.vllm_serve import run_vllm_serve
from maple_trl.jobs.errors import did_you_mean


# Nothing heavier than the standard library is imported up here: `maple-trl --help` answers at once.

_TRAIN_EXAMPLES = """\
examples:
  maple-trl train --config recipes/demo.yaml
  maple-trl train --config recipes/demo.yaml --max_steps 20 --output_dir runs/short
  maple-trl train --config recipes/demo.yaml --resume_from_checkpoint true
  maple-trl train --config recipes/tiny/full_recipe.yaml
  maple-trl train --config recipes/avatar/tiny/stages.yaml

Several processes: accelerate launch --num_processes N -m maple_trl.cli train --config FILE
"""


_DATA: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "curate": ("make questions and captions with tags of clips", run_curate),
    "convert": ("make rows of a published set", run_convert),
    "validate": ("check tables of rows", run_validate),
    "review": ("open a page to review rows on, or write what was decided", run_review),
    "hints": ("let a teacher model write a hint for each row", run_hints),
    "qa-plus": ("ask questions with more signals too, and with fewer", run_qa_plus),
    "difficulty": ("keep the rows that a model solves sometimes", run_difficulty),
    "push": ("upload shards to the Hub, with a card", run_push),
}
_COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "eval": ("measure a model on a data set or benchmark, per tag and per choice of signals", run_eval),
    "report": ("write one HTML file on a run or an evaluation, or on two of them", run_report),
    "critical-steps": (
        "ask a judge where the critical steps of completions stand, for the report",
        run_critical_steps,
    ),
    "parity": ("compare what vLLM computes with what the trainer does", run_parity),
    "vllm-serve": ("start a vLLM server that samples completions for a training job", run_vllm_serve),
    "plan": ("compute memory and time of a training job on given cards", run_plan),
    "export": ("write a trained model for other programs: adapters merged, or the full Omni model again", run_export),
    "push": ("upload a trained model or adapter to the Hub, with a card", run_push_model),
}
COMMANDS: Registry[Callable[[list[str]], int | None]] = Registry("command", "maple_trl.commands")
"""
Commands of other packages by name: functions of the words behind it, which return the exit status. The names that there are
stay ours.
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the commands; [`~maple_trl.jobs.train.parse_args`] reads the options of a training job."""
    parser = argparse.ArgumentParser(
        prog="maple-trl",
        description="Reinforcement learning for models that watch, listen and read: GRPO on video, audio and subtitles.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"maple-trl {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    train = commands.add_parser(
        "train",
        help="run a training job described by a YAML file",
        description="Runs a training job. Every key of the YAML file is also an option, and options win.",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    train.add_argument("--config", metavar="FILE", help="YAML file with option names and values")
    train.add_argument("-h", "--help", action="store_true", help="show this help and the options of the job itself")
    train.add_argument("--help-all", action="store_true", help="show every option, those of TRL and transformers too")
    env = commands.add_parser(
        "env",
        help="show versions, devices and codecs, and what is missing",
        description="Shows versions against the tested ranges, devices, and codecs that really decode; says what is "
        "missing and what would bring it. Exits with 1 when something required is broken.",
        allow_abbrev=False,
    )
    env.add_argument(
        "--imports", action="store_true", help="import every required package too, and ask torch for devices"
    )
    env.add_argument("--json", action="store_true", help="print the report as JSON")
    data = commands.add_parser("data", help=f"prepare data: {', '.join(_DATA)}", allow_abbrev=False)
    group = data.add_subparsers(dest="data_command", metavar="COMMAND", title="commands")
    for parsers, known in ((group, _DATA), (commands, _COMMANDS)):
        for name, (does, _) in known.items():
            parsers.add_parser(name, help=does, add_help=False, allow_abbrev=False)
    for name in [name for name in COMMANDS if name not in {*commands.choices, *_DATA}]:
        commands.add_parser(name, help="added by an installed package", add_help=False, allow_abbrev=False)
    return parser


def _version() -> str:
    try:
        return metadata.version("maple-trl")
    except metadata.PackageNotFoundError:
        return "(not installed as a package)"


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Command line without the program's name; default `sys.argv[1:]`.

    Returns:
        `int`: 0; 1 when `env` found something broken, too many rows of `data`, `eval` or `train` failed, or a job that
        was described rightly was stopped, made no step or ended by an error; 2 when it is described wrongly; 130 when
        interrupted.
    """
    # Libraries tell the Hub about runs unless the environment says otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():  # a log, in which bars are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None:
        if rest:
            parser.error(f"unknown argument {rest[0]}")
        parser.print_help()
        return 0
    if arguments.command in ("train", "eval") and "--json" not in argv:
        tell_when_loading()
    if arguments.command == "train":
        return _train(parser, arguments, argv[argv.index("train") + 1 :])
    name = getattr(arguments, "data_command", arguments.command)
    if rest and name in ("env", None):
        known = _subparser(parser, arguments.command)._option_string_actions
        parser.error(f"unknown argument {rest[0]}{did_you_mean(rest[0].split('=')[0], known)}")
    if arguments.command == "data" and arguments.data_command is None:
        _subparser(parser, "data").print_help()
        return 0
    try:
        if name == "env":
            return _env(arguments)
        own = _DATA if arguments.command == "data" else _COMMANDS
        run = own[name][1] if name in own else COMMANDS[name]
        return run(argv[argv.index(name) + 1 :]) or 0
    except BrokenPipeError:  # who read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return refuse(arguments.command, "stopped", 130)
    except Exception as error:
        return fail(arguments.command, error)


def _subparser(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return commands.choices[name]


def _train(parser: argparse.ArgumentParser, arguments: argparse.Namespace, words: list[str]) -> int:
    if arguments.help or arguments.help_all:
        return _print_train_help(parser, words, everything=arguments.help_all)
    if not words:
        return refuse("train", "name a job: --config FILE (maple-trl train --help)")
    from maple_trl.hub.errors import PublishError
    from maple_trl.jobs.errors import SetupError
    from maple_trl.jobs.options import parse_args
    from maple_trl.jobs.stages import load_plan, run_stages
    from maple_trl.rewards import JudgeUnavailableError
    from maple_trl.trainers.common.run_errors import RunStoppedError

    plan, folder = None, None
    try:
        plan = load_plan(words)
        if plan is not None:
            folder = plan.output_dir
            run_stages(plan)
            return 0
        job = parse_args(words)
        folder = job[1].output_dir
        from maple_trl.jobs.train import run

        run(*job)
    except SetupError as error:
        return refuse("train", error, 2, folder)
    except (JudgeUnavailableError, PublishError, RunStoppedError) as error:
        return refuse("train", error, 1, folder)
    except KeyboardInterrupt:
        return refuse("train", f"stopped; {_again(plan)} goes on from the last checkpoint", 130)
    except Exception as error:
        begun = plan is not None or (folder and any(Path(folder).glob("checkpoint-*/trainer_state.json")))
        return fail("train", error, folder, f"{_again(plan)} goes on from the last checkpoint" if begun else "")
    return 0


def _again(plan: Any) -> str:
    return "--resume_from_checkpoint true" if plan is None else "the same command"


def _print_train_help(parser: argparse.ArgumentParser, words: list[str], everything: bool) -> int:
    from maple_trl.jobs.errors import SetupError
    from maple_trl.jobs.options import (
        DEFAULT_TRAINER,
        TRAINERS,
        OmniModelConfig,
        OmniScriptArguments,
        OptionParser,
        make_parser,
        trainer_option,
    )

    try:
        trainer = trainer_option(words) or DEFAULT_TRAINER
        job = make_parser(trainer) if everything else OptionParser([OmniScriptArguments, OmniModelConfig])
    except SetupError as error:
        return refuse("train", error)
    print(_subparser(parser, "train").format_help())
    job.usage = argparse.SUPPRESS
    print("Options of a job (a YAML key has the same name, without the dashes):\n" + job.format_help())
    if everything:
        print(f"These are the options with --trainer {trainer}. Others have options of their own:")
    else:
        print("and the trainer's own (media_root, num_frames, modality_access, learning_rate, …):")
    for name in TRAINERS:
        if name != trainer or not everything:
            print(f"  maple-trl train --trainer {name} --help-all")
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from maple_trl.cli.env import collect, print_report

    report = collect(arguments.imports)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return 1 if report["problems"] else 0
