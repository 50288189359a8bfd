"""Reading the JSON object that was asked for out of whatever the model wrote around it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any


# Only the end of a long answer is looked at, and so many places at which an object may begin: each may cost a look at
# all that follows.
MAX_CHARACTERS = 100_000
MAX_STARTS = 2000

# What may stand behind the last object of an answer that was cut at the token limit: the end of its fence.
_CLOSING = re.compile(r"\s*`{0,3}\s*")


class NoObjectError(ValueError):
    """The text holds no object that matches; the message says what is wrong with the last one that was found."""


def after_thoughts(text: str) -> str | None:
    """Return what stands behind a text's last `</think>`, all of it without one; `None` where thoughts have no end."""
    rest = text.rpartition("</think>")[2]
    return None if "<think>" in rest else rest


def read_object(text: str, schema: Mapping[str, Any], cut: bool = False) -> dict[str, Any]:
    """
    Return the last JSON object in a text that matches a schema.

    Models that were not held to a schema write thoughts, fences and explanations around their answer; thoughts come
    before it, so the last object counts. What stands before `</think>` does not count, nor does anything in thoughts that
    were begun and not ended. In a text that was cut an object may be a draft, whose thoughts went on: it counts only where
    nothing but white space or the end of a fence stands behind it.

    Args:
        text (`str`):
            What the model wrote.
        schema (`Mapping`):
            JSON schema of an object.
        cut (`bool`, *optional*, defaults to `False`):
            The text ends at the token limit.

    Raises:
        NoObjectError: when there is none.
    """
    return matching_objects(text, schema, cut)[-1]


def matching_objects(text: str, schema: Mapping[str, Any], cut: bool = False) -> list[dict[str, Any]]:
    """
    Return all objects that [`read_object`] chooses from, in order; at least one.

    Raises:
        NoObjectError: when there is none.
    """
    import jsonschema

    answer = after_thoughts(text)
    if answer is None:
        raise NoObjectError("thoughts that were begun and not ended")
    answer = answer[-MAX_CHARACTERS:]
    validator = jsonschema.validators.validator_for(schema)(schema)
    found, last, problem = [], 0, "no JSON object in it"
    for candidate, end in _objects(answer):
        try:
            error = next(iter(validator.iter_errors(candidate)), None)
            if error is None:
                found.append(candidate)
                last = end
            else:
                problem = f"{error.json_path}: {error.message}"[:300]
        except RecursionError:
            problem = "an object nested too deeply"
    if not found:
        raise NoObjectError(problem)
    if cut and not _CLOSING.fullmatch(answer, last):
        raise NoObjectError("more stands behind its last object, which may be a draft")
    return found


def _objects(text: str) -> Iterator[tuple[dict[str, Any], int]]:
    """
    Yield the outermost objects of a text, in order, each with where it ends.

    Numbers that JSON does not know (NaN, Infinity) and names that are given twice spoil theirs.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    position = 0
    for _ in range(MAX_STARTS):
        position = text.find("{", position)
        if position < 0:
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        yield value, position


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)
