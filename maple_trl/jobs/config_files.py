"""Config files of jobs: YAML that may build on other files and set variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maple_trl.files import YamlKeyError, parse_yaml
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.recipe_files import no_config, recipe_file


def config_files(path: str, above: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return a config file and those that it extends, in the order in which they count, each with its own keys."""
    try:
        config = read_config(path)
    except SetupError as error:
        raise SetupError(f"{above[-1]}: extends {path}: {error}" if above else str(error)) from error
    bases = config.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise SetupError(f"{path}: extends must be a file or a list of files, got {bases!r}")
    chain = (*above, path)
    files = {}
    for base in bases:
        beside = os.path.normpath(os.path.join(os.path.dirname(path), base))
        base = beside if os.path.isfile(beside) or recipe_file(base) is None else str(recipe_file(base))
        if os.path.realpath(base) in map(os.path.realpath, chain):
            raise SetupError(f"{path}: extends {base}, which is built on it: {' -> '.join((*chain, base))}")
        for file, keys in config_files(base, chain):
            files.setdefault(os.path.realpath(file), (file, keys))
    return [*files.values(), (path, config)]


def read_config(path: str) -> dict[str, Any]:
    """
    Read the keys of a config file, without those of the files that it extends.

    Raises:
        SetupError: when it cannot be read, is no mapping, or gives a key twice.
    """
    import yaml

    try:
        config = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except YamlKeyError as error:
        raise SetupError(f"{path}: {error}") from error
    except OSError as error:
        further = no_config(path) if isinstance(error, FileNotFoundError) else ""
        raise SetupError(f"cannot read the config file {path}: {error.strerror or error}{further}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        told = ", ".join(part for part in (error.context, error.problem) if part)
        hint = " (indent with spaces)" if "'\\t'" in told else ""
        raise SetupError(f"{path}{where}: is not a YAML file: {told}{hint}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SetupError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(config, dict):
        raise SetupError(f"{path} must hold a mapping of option names to values, as recipes/demo.yaml does")
    return config


def take_env(config: dict[str, Any], path: str) -> dict[str, str]:
    """
    Take `env`, the environment variables that a config file sets, out of its keys.

    Raises:
        SetupError: when it is no mapping, or a variable has no text.
    """
    variables = config.pop("env", None) or {}
    if not isinstance(variables, Mapping):
        raise SetupError(f"{path}: env must be a mapping of variable names to values")
    for name, value in variables.items():
        if value is None or isinstance(value, Mapping | list):
            raise SetupError(
                f"{path}: env: {name} must be a text or a number, got {'null' if value is None else value}; an empty text is "
                f'{name}: ""'
            )
    return {name: str(value) for name, value in variables.items()}
