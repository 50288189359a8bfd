"""How the help of every command is laid out."""

from __future__ import annotations

import argparse
from typing import Any


# Nothing heavier than the standard library up here: the help of every command passes through this module.


class HelpFormatter(argparse.HelpFormatter):
    """
    Wraps paragraphs, leaves indented lines as they are written, and shows each option once with its default.

    An option that may be written with underscores or dashes is shown with underscores, as a YAML file spells it.
    """

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, **{"max_help_position": 28, **kwargs})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        kept: list[str] = []
        for paragraph in text.strip("\n").split("\n\n"):
            words: list[str] = []
            for line in [*paragraph.split("\n"), None]:
                as_is = line is not None and (line.startswith("  ") or line.endswith(":"))
                if words and (line is None or as_is):
                    kept.append(super()._fill_text(" ".join(words), width, indent))
                    words = []
                if as_is:
                    kept.append(indent + line)
                elif line is not None:
                    words.append(line)
            kept.append("")
        return "\n".join(kept).rstrip("\n")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(shown_names(action))
        return names if action.nargs == 0 else f"{names} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str:
        default = shown_default(action)
        return in_one_voice(action.help or "") + ("" if default is None else f" (default: {default})").replace(
            "%", "%%"
        )


def in_one_voice(text: str) -> str:
    """Return what an option is for as this package says it: a phrase, where TRL and transformers write sentences."""
    first, _, rest = text.partition(" ")
    if first[:1].isupper() and first[1:].rstrip(",:").islower() and first not in _NAMES:
        text = " ".join(filter(None, (first.lower(), rest)))
    return text if text.endswith(("..", "etc.")) else text.removesuffix(".")


_NAMES = {"Adam", "Hugging", "Qwen"}


def shown_names(action: argparse.Action) -> list[str]:
    """Return the names of an option that its help shows: those with dashes for underscores are left out."""
    names = [name for name in action.option_strings if not _is_twin(name, action)]
    return names + [negated for negated in [getattr(action, "negated", None)] if negated]


def _is_twin(name: str, action: argparse.Action) -> bool:
    others = {other for other in action.option_strings if other != name}
    return "-" in name[2:] and "--" + name[2:].replace("-", "_") in others


def shown_default(action: argparse.Action) -> str | None:
    """Return an option's default as a command line or a YAML file would give it; `None` where there is none to show."""
    value = action.default
    if value in (None, argparse.SUPPRESS, "") or value == [] or value == {}:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(getattr(value, "value", value)).replace("\n", "\\n")
