"""Recipes by their names: wherever a config file is asked for, and listed by `maple-trl recipes`."""

import json
import shutil
from pathlib import Path

import pytest

from maple_trl import cli
from maple_trl.jobs import recipe_files
from maple_trl.jobs.command_line import take_config
from maple_trl.jobs.config_files import config_files
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.recipe_files import find_config, recipe_file, recipe_names, recipe_title, recipes_folder


ROOT = Path(__file__).resolve().parents[2]


def test_names_are_those_of_the_files():
    files = {
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")
    }
    assert set(recipe_names()) == files and recipe_names()[0] == "demo"
    for spelling in ("demo", "demo.yaml", "recipes/demo.yaml", "./recipes/demo"):
        assert recipe_file(spelling) == recipes_folder() / "demo.yaml", spelling
    assert recipe_file("nothing") is None and recipe_file("../recipes/demo/../demo") is None


def test_every_recipe_says_what_it_is_for():
    untold = [name for name in recipe_names() if len(recipe_title(recipe_file(name)).split()) < 4]
    assert not untold


def test_a_file_that_is_there_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder is no file
    assert find_config("demo") == str(recipes_folder() / "demo.yaml")
    assert take_config(["--config", "demo", "--max_steps", "3"])[1] == ["--max_steps", "3"]
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text("max_steps: 3\n")
    assert find_config("demo") == "demo"


def test_a_file_may_build_on_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: demo\nmax_steps: 3\n")
    files = config_files(str(tmp_path / "mine.yaml"))
    assert [Path(file).name for file, _ in files] == ["demo.yaml", "mine.yaml"]
    (tmp_path / "demo").write_text("max_steps: 5\n")  # beside it, which wins
    assert config_files(str(tmp_path / "mine.yaml"))[0] == (str(tmp_path / "demo"), {"max_steps": 5})


def test_a_name_nearly_right_is_led_back(capsys):
    with pytest.raises(SetupError, match="cannot read the config file dmeo: .*; did you mean the recipe demo"):
        config_files("dmeo")
    with pytest.raises(SetupError, match="`maple-trl recipes` lists the recipes"):
        config_files("nowhere/zzz.yaml")
    assert cli.main(["recipes", "tiny/bset"]) == 2
    assert "there is no recipe tiny/bset; did you mean the recipe tiny/best?" in capsys.readouterr().err


def test_the_command_lists_and_prints(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipe_names()) and lines[0].startswith("demo ")
    assert cli.main(["recipes", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == recipe_names()
    assert cli.main(["recipes", "demo"]) == 0
    assert capsys.readouterr().out == (recipes_folder() / "demo.yaml").read_text()
    assert cli.main(["recipes", "demo", "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    """As in a wheel: the folder in the package is taken, and not one of the same name beside it."""
    package = tmp_path / "site-packages" / "maple_trl"
    shutil.copytree(ROOT / "recipes", package / "recipes")
    (tmp_path / "site-packages" / "recipes").mkdir()
    monkeypatch.setattr(recipe_files, "_PACKAGE", package)
    assert recipes_folder() == package / "recipes" and "demo" in recipe_names()
