"""Words of a command line that are read before its parser is made."""

from __future__ import annotations

from collections.abc import Sequence

from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.recipe_files import find_config


def take_option(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Return the value of one option (however it is spelt, the last one counts) and the other arguments."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        flag, given, text = word.partition("=")
        if flag.replace("-", "_") != name.replace("-", "_"):
            rest.append(word)
            continue
        value = text if given else next(words, None)
        if value is None:
            raise SetupError(f"{name} needs a value")
    return value, rest


def take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the path that `--config` names, a file or a recipe that came with the package, and the other arguments."""
    path, rest = take_option(argv, "--config")
    return None if path is None else find_config(path), rest


def take_switch(argv: Sequence[str], name: str) -> tuple[bool, list[str]]:
    """Return whether a switch is on, which may have true or false behind it, and the other arguments."""
    on, rest, words = False, [], list(argv)
    while words:
        word = words.pop(0)
        flag, given, text = word.partition("=")
        if flag.replace("-", "_") != name.replace("-", "_"):
            rest.append(word)
            continue
        if not given and words and words[0].lower() in _SWITCHES:
            text = words.pop(0)
        if (text or "true").lower() not in _SWITCHES:
            raise SetupError(f"{name} must be true or false, got {text!r}")
        on = _SWITCHES[(text or "true").lower()]
    return on, rest


_SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
