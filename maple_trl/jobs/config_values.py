"""Values of a config file, held to the types that the command line enforces."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.option_parser import OptionParser, json_object, option_keys, option_type


def checked_values(
    parser: OptionParser, config: Mapping[str, Any], path: str, advice: Callable[..., str], plain: bool = False
) -> dict[str, Any]:
    """
    Hold the values of a config file to the types that the command line enforces, by the options' own names.

    Args:
        advice: what to write instead of a name, among those that there are.
        plain: texts are texts, as the command line would give them, and never what a library reads otherwise.
    """
    actions = option_keys(parser)
    checked: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in config.items():
        if key not in actions:
            raise SetupError(f"{path}: unknown key {key!r}{advice(str(key), actions)}")
        action = actions[key]
        if names.setdefault(action.dest, key) != key:
            raise SetupError(f"{path}: {names[action.dest]} and {key} are one option; give one of them")
        if action.nargs == "+" and value is not None and not isinstance(value, list):
            value = [value]
        if isinstance(value, bool):
            value = _as_word(key, value)
        several = isinstance(value, list) and action.nargs in ("+", "*")
        if plain and option_type(action) == "str" and not several:
            value = _as_text(action, key, value, path)
        if several and action.type in (int, float):
            value = [_as_number(action, key, item, path) for item in value]
        for item in value if several else [value]:
            _check_value(action, key, item, path)
        if action.dest == "reward_funcs" and value is not None:
            from maple_trl.jobs.rewards import read_entries

            read_entries(value, f"{path}: {key}")
        if isinstance(action, argparse._StoreFalseAction) and isinstance(value, bool):
            value = not value
        checked[action.dest] = value
    return checked


def _as_word(key: str, value: bool) -> bool | str:
    """Return the word that was meant where YAML reads it as true or false: a bare no, on or off."""
    if key == "shared_prefix":
        return "on" if value else "off"
    return "no" if key.endswith("_strategy") and not value else value


def _as_number(action, key: str, value: Any, path: str) -> Any:
    """Convert an item of a list of numbers: YAML reads 1e-6 as a text, and of a list the parser converts nothing."""
    try:
        return action.type(value) if isinstance(value, str) else value
    except ValueError as error:
        raise SetupError(f"{path}: {key} must hold numbers, got {value!r}") from error


def _as_text(action, key: str, value: Any, path: str) -> str | None:
    """Return a value as the command line would give it; mappings stand for their JSON."""
    if action.nargs == "?" and isinstance(value, bool):
        return action.const if value else None
    if isinstance(value, bool | list):
        raise SetupError(f"{path}: {key} must be a text, got {value!r}")
    return json.dumps(value) if isinstance(value, dict) else value if value is None else str(value)


def _is_scalar(action) -> bool:
    """Return whether an option takes a number, a switch, or one of several names."""
    return option_type(action) in ("int", "float", "string_to_bool") or action.nargs == 0 or action.choices is not None


# Options that take a text and nothing else; of others the parser tells no such thing.
_TEXTS = {
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "completion_template"),
    *("summary_file", "metrics_file", "plot_file", "output_dir", "run_name", "media_root", "media_backend"),
    *("model_name_or_path", "model_revision", "attn_implementation", "modality_access", "subtitle_template"),
    "system_prompt",
    *("encoder_cache_dir", "hub_model_id", "lora_modules_to_save"),
}


def _check_value(action, key: str, value: Any, path: str) -> None:
    if key in _TEXTS and value is not None and not isinstance(value, str):
        raise SetupError(
            f"{path}: {key} must be a text, got {value!r} (a number that is meant as one stands in quotes)"
        )
    if key == "report_to" and value is not None and not isinstance(value, str | list):
        raise SetupError(f"{path}: report_to must be the name of a tracker or a list of names, got {value!r}")
    if action.type is json_object and value is not None and not isinstance(value, dict):
        try:
            if not isinstance(value, str):
                raise argparse.ArgumentTypeError(f"must be a mapping of names to values, got {value!r}")
            json_object(value)
        except argparse.ArgumentTypeError as error:
            raise SetupError(f"{path}: {key}: {error}") from error
    if value is None or (isinstance(value, dict | list) and not _is_scalar(action)):
        return
    if action.choices is not None and value not in action.choices:
        raise SetupError(f"{path}: {key} must be one of {', '.join(map(repr, action.choices))}, got {value!r}")
    kind = option_type(action)
    if action.nargs == 0 or kind == "string_to_bool":
        wanted, types = "true or false", bool
    elif kind in ("int", "float"):
        wanted, types = ("a whole number", int) if kind == "int" else ("a number", int | float)
    else:
        return
    wrong = not isinstance(value, types) or (types is not bool and isinstance(value, bool))
    if isinstance(value, str) and action.nargs != 0:  # YAML reads 1e-6 as a text
        try:
            action.type(value)
            wrong = False
        except (ValueError, argparse.ArgumentTypeError):
            pass
    if wrong:
        raise SetupError(f"{path}: {key} must be {wanted}, got {value!r}")
