"""The command `maple-trl train`: how a job is started, and what is said where it ends."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maple_trl.cli.base import Command, add_general
from maple_trl.cli.failures import DONE, FAILED, INTERRUPTED, WRONG, asks_for_help, fail, refuse
from maple_trl.cli.loading import tell_when_loading


# Nothing heavier than the standard library up here: the help of every command passes through this module.


class TrainCommand(Command):
    """Options are those of the job, which depend on its trainer; several jobs may follow each other as stages."""

    def parser(self, declared: bool = False, trainers: Sequence[str] = ()) -> Any:
        """
        Build the parser of a job.

        Args:
            trainers (`Sequence[str]`, *optional*): with the options of these trainers.
        """
        from maple_trl.jobs.declared import declared_class
        from maple_trl.jobs.model_config import OmniModelConfig
        from maple_trl.jobs.option_parser import OptionParser
        from maple_trl.jobs.options import TRAINERS, OmniScriptArguments, config_class

        kinds = {"job": OmniScriptArguments, "model": OmniModelConfig}
        for name in trainers:
            kind = declared_class(TRAINERS[name][0]) if declared else config_class(name)
            kinds[f"trainer {name}"] = kind
        for title, kind in kinds.items():
            kind._argument_group_name = title
        parser = OptionParser(
            kinds.values(),
            prog="maple-trl train",
            description=self.description,
            epilog=self.epilog(),
            usage=self.usage(),
            conflict_handler="resolve",  # options that several trainers share
        )
        general = parser._optionals
        told = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        add_general(parser, "YAML file with these options as keys, or the name of a recipe, as demo")
        about = "say what would be read, asked and written; train nothing, write nothing, ask no network"
        general.add_argument("--dry_run", nargs="?", const=True, metavar="BOOL", help=about, **told)
        about = "show the options of the trainer too (--trainer NAME), those of TRL and transformers among them"
        general.add_argument("--help_all", action="help", default=argparse.SUPPRESS, help=about)
        return parser

    def __call__(self, words: Sequence[str]) -> int:
        """Train; return the exit status."""
        words = list(words)
        if asks_for_help(words) or not {"--help-all", "--help_all"}.isdisjoint(words):
            return self._print_help(words)
        if not words:
            return refuse(self.name, "name a job: --config FILE (maple-trl train --help)")
        from maple_trl.hub.errors import PublishError
        from maple_trl.jobs.command_line import take_switch
        from maple_trl.jobs.errors import SetupError
        from maple_trl.jobs.options import parse_args
        from maple_trl.jobs.stages import load_plan, run_stages
        from maple_trl.rewards import JudgeUnavailableError
        from maple_trl.trainers.common.run_errors import RunStoppedError

        tell_when_loading()
        plan, folder, dry = None, None, False
        try:
            dry, words = take_switch(words, "--dry_run")
            plan = load_plan(words)
            folder = None if plan is None else plan.output_dir
            if dry:
                from maple_trl.cli.dry_run import tell_training

                return tell_training(plan, words)
            if plan is not None:
                run_stages(plan)
                return DONE
            job = parse_args(words)
            folder = job[1].output_dir
            from maple_trl.jobs.train import run

            run(*job)
        except SetupError as error:
            return refuse(self.name, error, WRONG, folder)
        except (JudgeUnavailableError, PublishError, RunStoppedError) as error:
            return refuse(self.name, error, FAILED, folder)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            left = "nothing was written" if dry else f"{_again(plan)} goes on from the last checkpoint"
            return refuse(self.name, f"stopped; {left}", INTERRUPTED)
        except Exception as error:
            begun = plan is not None or (folder and any(Path(folder).glob("checkpoint-*/trainer_state.json")))
            goes_on = f"{_again(plan)} goes on from the last checkpoint" if begun and not dry else ""
            return fail(self.name, error, folder, goes_on)
        return DONE

    def _print_help(self, words: Sequence[str]) -> int:
        from maple_trl.jobs.errors import SetupError
        from maple_trl.jobs.options import DEFAULT_TRAINER, TRAINERS, trainer_option

        everything = not {"--help-all", "--help_all"}.isdisjoint(words)
        try:
            trainer = trainer_option(words) or DEFAULT_TRAINER
            parser = self.parser(declared=not everything, trainers=[trainer] if everything else [])
        except SetupError as error:
            return refuse(self.name, error)
        others = [name for name in TRAINERS if name != trainer or not everything]
        told = [f"  maple-trl train --trainer {name} --help_all" for name in others]
        parser.epilog = "\n".join(
            ["options of a trainer (media_root, num_frames, learning_rate, …):", *told, "", self.epilog()]
        )
        print(parser.format_help(), end="")
        return DONE


def _again(plan: Any) -> str:
    return "--resume_from_checkpoint true" if plan is None else "the same command"


COMMAND = TrainCommand(
    name="train",
    help="run a training job that a YAML file describes",
    run=lambda: None,
    description="Runs a training job, or several as stages. Every key of the YAML file is also an option, and options win.",
    examples=(
        "maple-trl train --config demo",
        "maple-trl train --config demo --max_steps 20 --output_dir runs/short",
        "maple-trl train --config job.yaml --dry_run",
        "maple-trl train --config job.yaml --resume_from_checkpoint true",
        "maple-trl train --config avatar/tiny/stages",
    ),
    notes="""\
FILE is a YAML file, or the name of a recipe that came with the package: `maple-trl recipes` lists them.""",
    statuses={
        FAILED: "a job that was described rightly was stopped, made no step, or ended by an error",
        INTERRUPTED: "interrupted by Ctrl+C; the last checkpoint stays",
    },
    several=True,
)
