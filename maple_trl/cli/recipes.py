"""The command `maple-trl recipes`: the recipes that came with the package."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap

from maple_trl.cli.base import PlainCommand
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.recipe_files import no_config, recipe_file, recipe_names, recipe_title


def run(arguments: argparse.Namespace) -> int:
    """List the recipes, or print one."""
    if arguments.name is not None:
        path = recipe_file(arguments.name)
        if path is None:
            raise SetupError(f"there is no recipe {arguments.name}{no_config(arguments.name)}")
        print(path if arguments.path else path.read_text(encoding="utf-8"), end="\n" if arguments.path else "")
        return 0
    if arguments.path:
        raise SetupError("--path: name a recipe")
    titles = {name: recipe_title(recipe_file(name)) for name in recipe_names()}
    if arguments.json:
        print(json.dumps(titles, indent=2, ensure_ascii=False))
        return 0
    width = max(map(len, titles))
    room = shutil.get_terminal_size().columns - width - 2 if sys.stdout.isatty() else sys.maxsize
    for name, title in titles.items():
        print(f"{name:<{width}}  {textwrap.shorten(title, max(room, 20), placeholder=' …')}")
    return 0


COMMAND = PlainCommand(
    name="recipes",
    help="list the recipes that come with the package, or print one",
    run=run,
    description="Lists the recipes that come with the package, each with what it is for, or prints the file of one.",
    examples=(
        "maple-trl recipes",
        "maple-trl recipes demo > job.yaml",
        "maple-trl train --config demo",
    ),
    notes="""\
Wherever a config file is asked for, the name of a recipe will do; a file of your own may build on one: extends: demo. A recipe
that is printed may itself build on others, which its key extends names.""",
    arguments={"NAME": {"nargs": "?", "help": "print this recipe"}},
    options={
        "path": {"action": "store_true", "help": "print where the recipe's file is instead"},
        "json": {"action": "store_true", "help": "print the list as JSON"},
    },
)
