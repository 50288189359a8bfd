"""The options of `maple-trl eval` from defaults, config files and the command line."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any


# Nothing heavier than the standard library up here: the help of every command passes through this module.

_REQUIRED = ("model", "data", "output")
_NOT_IN_FILES = ("help", "config")


def take_settings_apart(parser: argparse.ArgumentParser) -> None:
    """
    Leaves in a parsed namespace what was given alone, so that a config file can stand between it and the defaults.

    The parser itself is in the namespace as `settings`, with the defaults as its `settled`.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    parser.settled = {name: action.default for name, action in actions.items()}
    for action in actions.values():
        action.default = argparse.SUPPRESS
    parser.set_defaults(settings=parser)


def settle(given: argparse.Namespace) -> argparse.Namespace:
    """
    All options: what was given, else what a config file says, else the defaults.

    Files are read as those of a training job: they may build on others with `extends`, set variables with `env`, and a
    key that no option has is refused, with the closest one that exists.

    Raises:
        SetupError: for what is wrong in a file, and when a required option is missing.
    """
    from maple_trl.jobs.errors import SetupError

    words = dict(vars(given))
    parser = words.pop("settings")
    settled = {**parser.settled, **_from_files(parser, words.get("config")), **words}
    missing = [name for name in _REQUIRED if not settled[name]]
    if missing:
        file = f", and {settled['config']} does not hold {missing[0]} either" if settled["config"] else ""
        raise SetupError(f"--{missing[0]} is missing{file}")
    return argparse.Namespace(**settled)


def _from_files(parser: argparse.ArgumentParser, path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    from maple_trl.jobs.errors import SetupError, did_you_mean
    from maple_trl.jobs.options import config_files, take_env

    actions = {action.dest: action for action in parser._actions if action.dest not in _NOT_IN_FILES}
    found: dict[str, Any] = {}
    for file, config in config_files(path):
        os.environ.update(take_env(config, file))
        for key, value in config.items():
            if key not in actions:
                advice = did_you_mean(str(key), actions, "`maple-trl eval --help` lists all options")
                raise SetupError(f"{file}: unknown key {key!r}{advice}")
            found[key] = parser.settled[key] if value is None else _read(actions[key], key, value, file)
    return found


def _read(action: argparse.Action, key: str, value: Any, file: str) -> Any:
    """
    A value of a file as the command line would give it.

    Lists stand for what is joined by commas there, mappings for JSON.
    """
    from maple_trl.jobs.errors import SetupError

    def refuse(wanted: str) -> SetupError:
        return SetupError(f"{file}: {key} must be {wanted}, got {value!r}")

    if action.nargs == "?" and isinstance(value, bool):
        return action.const if value else None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if isinstance(value, list):
        if key != "access":
            raise refuse("a single value")
        text = ",".join(map(str, value))
    elif isinstance(value, dict):
        text = json.dumps(value)
    elif isinstance(value, bool):
        raise refuse("text" if action.type in (None, str) else "a number")
    else:
        text = str(value)
    try:
        read = text if action.type is None else action.type(text)
    except argparse.ArgumentTypeError as error:
        raise SetupError(f"{file}: {key}: {error}") from error
    except ValueError:
        raise refuse(
            {"int": "a whole number", "float": "a number"}.get(action.type.__name__, "another value")
        ) from None
    if action.choices is not None and read not in action.choices:
        raise refuse(f"one of {', '.join(action.choices)}")
    return read
