"""What tells a reward function from others, in any process: its name, its source, and the options that it was made with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Set
from enum import Enum
from pathlib import Path
from typing import Any

from maple_trl.records.options import not_deciding


_DEPTH = 4  # a weighting of a judge behind a client with options


def reward_identity(reward: Any) -> Any:
    """
    Describe a reward function by names and plain values, for JSON.

    A function is told by its name and its source ([`source_digest`]), an object by its class with its source
    and by its options: attributes that are called as a parameter of its constructor, and numbers and texts under any name.
    Lists and mappings of other names are taken for what it has seen so far.
    """
    return _told(reward, _DEPTH)


def source_digest(owner: Any) -> str | None:
    """
    Return the SHA-256 of the file in which a function or a class stands; `None` where there is none.

    The whole file counts, for a function rests on what stands beside it.
    """
    try:
        return hashlib.sha256(Path(inspect.getfile(owner)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def _told(value: Any, depth: int) -> Any:
    if isinstance(value, Enum):
        return _told(value.value, depth)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, Mapping):
        return _sorted([_told(name, depth), _told(item, depth)] for name, item in value.items())
    if isinstance(value, list | tuple):
        return [_told(item, depth) for item in value]
    if isinstance(value, Set):
        return _sorted(_told(item, depth) for item in value)
    if isinstance(value, functools.partial):
        return ["partial", *(_told(part, depth) for part in (value.func, value.args, value.keywords))]
    names = [getattr(value, name, None) for name in ("__module__", "__qualname__", "__name__")]
    names = [name if isinstance(name, str) else None for name in names]
    if inspect.ismethod(value):
        return [*names, _told(value.__self__, depth)]
    if inspect.isroutine(value) or inspect.isclass(value):
        return [*names, source_digest(inspect.unwrap(value))]
    names += [type(value).__qualname__, source_digest(type(value))]
    if not depth or hasattr(value, "named_parameters"):  # a network has no options, and a mode that changes
        return names
    return [*names, {name: _told(option, depth - 1) for name, option in sorted(_options(value).items())}]


def _options(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        ignored = _not_deciding(type(value))
        names = [field.name for field in dataclasses.fields(value) if field.name not in ignored]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    known = _parameters(type(value))
    return {
        name: held
        for name, held in getattr(value, "__dict__", {}).items()
        if name.lstrip("_") in known or isinstance(held, bool | int | float | str)
    }


def _not_deciding(kind: type) -> Mapping[str, str]:
    try:
        return not_deciding(kind)
    except (NameError, TypeError):  # of a class whose hints name what is imported for type checkers alone
        return {}


def _parameters(kind: type) -> set[str]:
    found: set[str] = set()
    for one in kind.__mro__[:-1]:
        try:
            found.update(inspect.signature(vars(one)["__init__"]).parameters)
        except (KeyError, TypeError, ValueError):  # it has none of its own, or one that does not tell
            continue
    return found


def _sorted(items: Any) -> list[Any]:
    """Order by text: a set, and a mapping that was filled in another order, say the same."""
    return sorted(items, key=json.dumps)
