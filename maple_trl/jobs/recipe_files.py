"""The recipes that come with the package: where they are, what they are called, what they are for."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from maple_trl.messages import did_you_mean


# Nothing heavier than the standard library up here: the help of commands passes through this module.

_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Return the folder of the recipes: in the installed package, or beside it in a checkout."""
    packed = _PACKAGE / "recipes"
    return packed if packed.is_dir() else _PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of all recipes, as `demo` and `tiny/full_recipe`, those at the top first."""
    folder = recipes_folder()
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(names, key=lambda name: (name.count("/"), name))


def recipe_file(name: str) -> Path | None:
    """Return the file of a recipe, which may be called `demo`, `demo.yaml` or `recipes/demo.yaml`; `None` of no recipe."""
    plain = name.replace("\\", "/").removeprefix("./").removeprefix("recipes/").removesuffix(".yaml")
    return recipes_folder() / f"{plain}.yaml" if plain in recipe_names() else None


def find_config(path: str) -> str:
    """Return the path of a config file: the file that is there, else the recipe of that name, else the path as given."""
    recipe = None if Path(path).is_file() else recipe_file(path)
    return path if recipe is None else str(recipe)


def no_config(path: str) -> str:
    """Return the end of an error about a config file that is not there: the recipe that is called nearly so."""
    plain = path.removeprefix("recipes/").removesuffix(".yaml")
    return did_you_mean(plain, recipe_names(), "`maple-trl recipes` lists the recipes", "the recipe ")


def recipe_title(path: Path) -> str:
    """Return what a recipe says of itself: the first sentence of its first comment."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
    words = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"\.(?=\s|$)", words, maxsplit=1)[0]
