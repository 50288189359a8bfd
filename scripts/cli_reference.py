"""
Puts the reference of all commands into docs/cli.md, from their parsers.

    python scripts/cli_reference.py
"""

import argparse
from pathlib import Path

from maple_trl.cli.base import STATUSES, Command
from maple_trl.cli.command import GROUPS
from maple_trl.jobs.help_format import in_one_voice, shown_default, shown_names


ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "cli.md"
BEGIN, END = "<!-- reference, written by scripts/cli_reference.py -->", "<!-- end of reference -->"


def _cell(text: str) -> str:
    """Return a text as a cell: an angle or a bar in it is no markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _invocation(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    names = ", ".join(f"`{name}`" for name in shown_names(action))
    if action.nargs == 0:
        return names
    value = "/".join(map(str, action.choices)) if action.choices else action.metavar
    return f"{names} {_cell(str(value))}"


def _table(title: str, actions: list[argparse.Action]) -> list[str]:
    lines = [f"| {title} | default | |", "| --- | --- | --- |"]
    for action in actions:
        default = shown_default(action)
        shown = "" if default is None else f"`{_cell(default)}`"
        lines.append(f"| {_invocation(action)} | {shown} | {_cell(in_one_voice(action.help or ''))} |")
    return [*lines, ""]


def describe(command: Command) -> list[str]:
    """Return the reference of one command, line by line."""
    parser = command.parser(declared=True)
    lines = [f"### maple-trl {command.name}", "", " ".join(command.description.split()), ""]
    lines += ["```text", command.usage(), "", *command.examples, "```", ""]
    for group in parser._action_groups:
        actions = [
            action for action in group._group_actions if not {argparse.SUPPRESS, "show this help"} & {action.help}
        ]
        if actions:
            lines += _table(group.title, actions)
    if command.statuses:
        told = (f"{status}: {text}" for status, text in command.statuses.items())
        lines += [f"Exit status {'; '.join(told)}.", ""]
    return lines


def reference() -> str:
    """Return the reference of all commands."""
    lines = [BEGIN, "", "| status | what it means |", "| --- | --- |"]
    lines += [f"| {status} | {told} |" for status, told in STATUSES.items()]
    lines.append("")
    for title, group in GROUPS.items():
        lines += [f"## {title.capitalize()}", ""]
        lines += [line for command in group for line in describe(command)]
    return "\n".join([*lines, END])


def updated(text: str) -> str:
    """Return the page with the reference in its place."""
    head, _, rest = text.partition(BEGIN)
    return head + reference() + rest.partition(END)[2]


if __name__ == "__main__":
    DOC.write_text(updated(DOC.read_text(encoding="utf-8")), encoding="utf-8")
