"""Values that cross from a process to another: JSON, with the arrays beside it. Nothing here can run code, as pickle does."""

import importlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


_HOME = "maple_trl.omni."


def pack(value: Any, arrays: list[np.ndarray]) -> Any:
    """
    Return what `json` can write of `value`; its arrays are appended to `arrays`.

    Raises:
        TypeError: for anything but numbers, text, arrays, lists, tuples, dicts with text keys, and dataclasses of
            `maple_trl.omni`.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        arrays.append(np.asarray(value, order="C"))
        return {"array": len(arrays) - 1}
    if isinstance(value, list):
        return [pack(item, arrays) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [pack(item, arrays) for item in value]}
    if isinstance(value, dict):
        return {"dict": {str(key): pack(item, arrays) for key, item in value.items()}}
    kind = type(value)
    if is_dataclass(kind) and kind.__module__.startswith(_HOME):
        packed = {field.name: pack(getattr(value, field.name), arrays) for field in fields(value) if field.init}
        return {"class": [kind.__module__, kind.__qualname__], "fields": packed}
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__} cannot be sent to another process")


def unpack(value: Any, arrays: Sequence[np.ndarray]) -> Any:
    """
    Return the value that [`pack`] was given.

    Raises:
        TypeError: for a class that is no dataclass of `maple_trl.omni`.
    """
    if isinstance(value, list):
        return [unpack(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "tuple" in value:
        return tuple(unpack(item, arrays) for item in value["tuple"])
    if "dict" in value:
        return {key: unpack(item, arrays) for key, item in value["dict"].items()}
    module, name = value["class"]
    kind = getattr(importlib.import_module(module), name, None) if module.startswith(_HOME) else None
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise TypeError(f"{module}.{name} is no dataclass of {_HOME[:-1]}")
    return kind(**{key: unpack(item, arrays) for key, item in value["fields"].items()})
