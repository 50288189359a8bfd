"""What all commands have in common: how they are described, read, refused and ended."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from maple_trl.cli.failures import CLOSED, DONE, FAILED, INTERRUPTED, WRONG, asks_for_help, fail, refuse
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.help_format import HelpFormatter
from maple_trl.messages import did_you_mean


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.jobs.option_parser import OptionParser

STATUSES = {
    DONE: "done",
    FAILED: "described rightly, and ended by an error",
    WRONG: "described wrongly; nothing was begun",
    INTERRUPTED: "interrupted by Ctrl+C",
    CLOSED: "whoever read the output closed it, as head does",
}
"""What the exit status of every command means."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """
    One command of the command line.

    Args:
        name: as it is called, e.g. `"data convert"`.
        help: one line for the list of commands: what it does, beginning with a verb.
        run: takes what the options are read into (a dataclass each, in the order of `options`), and a namespace of the
            arguments where there are any; returns the exit status, `None` for 0.
        description: what it does, in a paragraph.
        examples: whole command lines.
        notes: paragraphs behind them.
        statuses: what an exit status means here, where that is more than `STATUSES` says.
        options: dataclasses by the title of their group. Those that are heavy to import are named, as `module:class`:
            their help is read from the source.
        arguments: what stands before the options, by metavar, as arguments of `add_argument`.
        required: options that must be given.
        further: as of [`~maple_trl.jobs.options.read_options`].
        config: what `--config` names, where that is no file of options, but something that the command itself reads: `run`
            finds it in the namespace.
        errors: the exit status of errors by their class, as `module:class`; of others it is 1.
        writes: returns the folder that the command writes into, given what `run` is.
        stopped: what an interruption leaves.
        again: how to go on after an error, where `begun` says that there is something to go on from.
        begun: is told the folder.
        several: whether it may be started in several processes.
    """

    name: str
    help: str
    run: Callable[..., int | None]
    description: str
    examples: Sequence[str]
    notes: str = ""
    statuses: Mapping[int, str] = field(default_factory=dict)
    options: Mapping[str, type | str] = field(default_factory=dict)
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    required: Sequence[str] = ()
    further: Callable[..., Mapping[str, Any]] | None = None
    config: str = ""
    errors: Mapping[str, int] = field(default_factory=dict)
    writes: Callable[..., str | None] = lambda *_: None
    stopped: str = ""
    again: str = ""
    begun: Callable[[str], bool] = os.path.isdir
    several: bool = False

    def parser(self, declared: bool = False) -> OptionParser:
        """
        Build the parser.

        Args:
            declared (`bool`, *optional*, defaults to `False`):
                Read dataclasses that are heavy to import from their sources: for the help and for completions.
        """
        from maple_trl.jobs.option_parser import OptionParser

        kinds = []
        for title, place in self.options.items():
            kind = _class_of(place, declared)
            kind._argument_group_name = title
            kinds.append(kind)
        parser = OptionParser(
            kinds,
            prog=f"maple-trl {self.name}",
            description=self.description,
            epilog=self.epilog(),
            usage=self.usage(),
        )
        self._add_arguments(parser)
        add_general(
            parser, "" if self.config else "YAML file with these options as keys; what stands on the command line wins"
        )
        if self.config:
            parser._optionals.add_argument("--config", metavar="FILE", required=True, help=self.config)
        return parser

    def _add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser._positionals.title = "arguments"
        for metavar, given in self.arguments.items():
            more = {key: value for key, value in given.items() if key != "dest"}
            parser.add_argument(given.get("dest", metavar.lower()), metavar=metavar, **more)

    def read(self, words: Sequence[str]) -> tuple[Any, ...]:
        """
        Read a command line, and the config file that it names.

        Raises:
            SetupError: for what is unknown, missing or wrong.
        """
        from maple_trl.jobs.options import read_options

        return read_options(self.parser(), words, self.required, self.further, not self.config)

    def __call__(self, words: Sequence[str]) -> int:
        """Run the command with the words behind its name; return the exit status."""
        if asks_for_help(words):
            print(self.parser(declared=True).format_help(), end="")  # print_help hides a closed pipe
            return DONE
        folder = None
        try:
            given = self.read(words)
            folder = self.writes(*given)
            return self.run(*given) or DONE
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            return refuse(self.name, "; ".join(filter(None, ("stopped", self.stopped))), INTERRUPTED)
        except Exception as error:
            if self._status(error) == WRONG:
                return refuse(self.name, error, WRONG, folder)
            return fail(self.name, error, folder, self.again if folder and self.begun(folder) else "")

    def _status(self, error: Exception) -> int:
        errors = {"maple_trl.jobs.errors:SetupError": WRONG, **self.errors}
        names = (f"{kind.__module__}:{kind.__qualname__}" for kind in type(error).__mro__)
        return next((errors[name] for name in names if name in errors), FAILED)

    def usage(self) -> str:
        """Return the usage in one line, without options by name."""
        forms = {"+": "{0} [{0} ...]", "?": "[{0}]"}
        arguments = [forms.get(more.get("nargs"), "{0}").format(name) for name, more in self.arguments.items()]
        return " ".join(["maple-trl", self.name, *arguments, "[OPTION ...]"])

    def epilog(self) -> str:
        """Return what stands below the options: examples, notes and exit statuses."""
        parts = ["\n".join(["examples:", *(f"  {line}" for line in self.examples)])]
        if self.several:
            launched = f"accelerate launch --num_processes N -m maple_trl.cli {self.name} [OPTION ...]"
            parts.append(f"several processes:\n  {launched}")
        return "\n\n".join([*parts, *filter(None, [self.notes.strip()]), statuses_text(self.statuses)])


def statuses_text(own: Mapping[int, str]) -> str:
    """Return a command's exit statuses as its help shows them."""
    return "\n".join(["exit status:", *(f"  {status:<4} {told}" for status, told in sorted((STATUSES | own).items()))])


def add_help(parser: argparse.ArgumentParser) -> None:
    """Give a parser its `--help`, in the same words everywhere."""
    parser._optionals.add_argument("-h", "--help", action="help", default=argparse.SUPPRESS, help="show this help")


def add_general(parser: argparse.ArgumentParser, config: str) -> None:
    """
    Give a parser, below its own options, those that commands share and that are read before the others.

    Args:
        config: what `--config` is, where it is read so.
    """
    parser._optionals.title = "general options"
    parser._action_groups.append(parser._action_groups.pop(parser._action_groups.index(parser._optionals)))
    if config:
        nowhere: dict[str, Any] = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        parser._optionals.add_argument("--config", metavar="FILE", help=config, **nowhere)
    add_help(parser)


class PlainParser(argparse.ArgumentParser):
    """
    A parser of commands that must work where TRL does not, which the other parsers are built on.

    It raises SetupError instead of ending the process.
    """

    def __init__(self, name: str, **kwargs: Any):
        super().__init__(
            prog=f"maple-trl {name}", formatter_class=HelpFormatter, add_help=False, allow_abbrev=False, **kwargs
        )

    def error(self, message: str):
        """Raise SetupError instead of ending the process."""
        raise SetupError(message)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Read a command line; raise SetupError for what is unknown, naming the closest option."""
        values, unknown = self.parse_known_args(list(words))
        if unknown:
            kind = "argument" if unknown[0].startswith("-") else "value"
            known = self._option_string_actions
            raise SetupError(f"unknown {kind} {unknown[0]}{did_you_mean(unknown[0].split('=')[0], known)}")
        return values


class PlainCommand(Command):
    """A command whose options are those of a [`PlainParser`], which `options` names under any title."""

    def parser(self, declared: bool = False) -> PlainParser:
        """Build the parser."""
        parser = PlainParser(self.name, description=self.description, epilog=self.epilog(), usage=self.usage())
        self._add_arguments(parser)
        for name, given in self.options.items():
            parser.add_argument(f"--{name}", **given)
        add_help(parser)
        return parser

    def read(self, words: Sequence[str]) -> tuple[Any, ...]:
        """Read a command line into one namespace."""
        return (self.parser().read(words),)


def _class_of(place: type | str, declared: bool) -> type:
    if not isinstance(place, str):
        return place
    from maple_trl.jobs.declared import declared_class, load_class

    return declared_class(place) if declared else load_class(place)
