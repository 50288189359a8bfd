"""The parser of the options of all commands: TRL's, with errors and help of our own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

# trl and its dataclasses without a trainer take a tenth of a second; torch and transformers are imported where they are
# needed, so that the command line can show its help without them.
from trl import TrlParser

from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.help_format import HelpFormatter


# What stands for a value in the help, by the option's name, else by its type.
_NAMED_METAVARS = {
    "FILE": "api_key_file cache judge_file log metrics_file plot_file summary_file token_file video",
    "FOLDER": "adapter encoder_cache_dir logging_dir media_root output_dir",
    "MODEL": "embeddings judge_model model model_name_or_path processor_name_or_path",
    "DATA": "dataset_name",
    "JSON": "dataset_filter",
    "URL": "base_url judge_server server",
    "TAG": "tags",
    "REWARD": "reward_funcs",
}
_METAVARS = {"int": "N", "float": "X", "str": "TEXT", "string_to_bool": "BOOL", "json_object": "JSON"}
_METAVAR_OF = {name: metavar for metavar, names in _NAMED_METAVARS.items() for name in names.split()}


class OptionParser(TrlParser):
    """
    A [`~trl.TrlParser`] that reports errors as [`SetupError`] instead of ending the process.

    Every name of an option may be written with dashes for underscores. Mappings are JSON.

    Args:
        types (`Iterable[type]`): the dataclasses that it fills.
        kwargs: as of [`~argparse.ArgumentParser`].
    """

    def __init__(self, types: Iterable[type], **kwargs: Any):
        super().__init__(types, allow_abbrev=False, add_help=False, formatter_class=HelpFormatter, **kwargs)
        for action in self._actions:
            if option_type(action) in ("dict", "Mapping"):
                action.type = json_object
            if action.choices is None:
                action.metavar = action.metavar or _METAVAR_OF.get(action.dest) or _METAVARS.get(option_type(action))
            for option in action.option_strings:
                self._option_string_actions.setdefault("--" + option[2:].replace("_", "-"), action)
        switches = {a.dest: a for a in self._actions if not isinstance(a, argparse._StoreFalseAction)}
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction) and action.dest in switches:
                # One line in the help for both.
                switches[action.dest].negated, action.help = action.option_strings[0], argparse.SUPPRESS

    def error(self, message: str):
        """Raise SetupError instead of ending the process."""
        raise SetupError(message)


def option_type(action: argparse.Action) -> str:
    """Return the name of an option's type; an optional one's converter is called as that."""
    return getattr(action.type, "__name__", "")


def json_object(text: str) -> dict:
    """Return the JSON object that a text holds; raise ArgumentTypeError for another text."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def option_keys(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Map the names by which a config file gives a value to a parser's actions, the first of each being its own."""
    own = [action for action in parser._actions if action.dest != argparse.SUPPRESS]
    names = {action.dest: action for action in reversed(own)}
    aliases = {option[2:]: action for action in own for option in action.option_strings}
    return names | {name: action for name, action in aliases.items() if "-" not in name and name not in names}
