"""Reading the JSON object that was asked for out of whatever the model wrote around it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


# Only the end of a long answer is looked at, and so many places at which an object may begin: each may cost a look at
# all that follows.
MAX_CHARACTERS = 100_000
MAX_STARTS = 2000

_THINKING = re.compile(r"^.*</think>", re.DOTALL)


class NoObjectError(ValueError):
    """The text holds no object that matches; the message says what is wrong with the last one that was found."""


def read_object(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the last JSON object in a text that matches a schema.

    Models that were not held to a schema write thoughts, fences and explanations around their answer; thoughts come
    before it, so the last object counts. What stands before `</think>` does not count.

    Args:
        text (`str`):
            What the model wrote.
        schema (`Mapping`):
            JSON schema of an object.

    Raises:
        NoObjectError: when there is none.
    """
    return matching_objects(text, schema)[-1]


def matching_objects(text: str, schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    Return all objects that [`read_object`] chooses from, in order; at least one.

    Raises:
        NoObjectError: when there is none.
    """
    import jsonschema

    text = _THINKING.sub("", text[-MAX_CHARACTERS:])
    validator = jsonschema.validators.validator_for(schema)(schema)
    found, problem = [], "no JSON object in it"
    for candidate in _objects(text):
        try:
            error = next(iter(validator.iter_errors(candidate)), None)
            if error is None:
                found.append(candidate)
            else:
                problem = f"{error.json_path}: {error.message}"[:300]
        except RecursionError:
            problem = "an object nested too deeply"
    if not found:
        raise NoObjectError(problem)
    return found


def _objects(text: str) -> list[dict[str, Any]]:
    """
    Return the outermost objects of a text, in order.

    Numbers that JSON does not know (NaN, Infinity) and names that are given twice spoil theirs.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    objects, position = [], 0
    for _ in range(MAX_STARTS):
        position = text.find("{", position)
        if position < 0:
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        objects.append(value)
    return objects


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)
