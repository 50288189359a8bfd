"""Dataclasses read from their sources, where importing them would load torch, transformers and TRL first."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import typing
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


# Names that a package resolves only when they are asked for.
_RESOLVED_LATE = {("transformers", "TrainingArguments"): "transformers.training_args"}


def load_class(place: str) -> type:
    """Import the class that `module:class` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@cache
def declared_class(place: str) -> type:
    """
    Return a dataclass with the fields that a class and its bases declare.

    Names, types, defaults and help texts are the same; it has none of their methods, and checks nothing.

    Args:
        place (`str`): `module:class`.

    Returns:
        `type`: types that are not builtin or of `typing` become `str`, defaults that are no literals `None`.
    """
    module, _, name = place.partition(":")
    fields = dict(_fields(module, name))
    return dataclasses.make_dataclass(name, [(field, *rest) for field, rest in fields.items()])


def _fields(module: str, name: str) -> Iterator[tuple[str, tuple[Any, dataclasses.Field]]]:
    """Return a class's fields, those of its bases first: a later one of the same name wins."""
    found = next((n for n in _tree(module).body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if found is None:
        origin = _origin(module, name)
        if origin is not None:
            yield from _fields(*origin)
        return
    for base in found.bases:
        yield from _fields(module, ast.unparse(base))
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, (_type(node.annotation), _field(node.value))


def _path(module: str) -> Path:
    package, *rest = module.split(".")
    path = Path(find_spec(package).submodule_search_locations[0], *rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


def _origin(module: str, name: str) -> tuple[str, str] | None:
    """Find where a module imports a name from: the module and the name there."""
    for node in ast.walk(_tree(module)):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name:
                parts = module.split(".") + ["__init__"] * (_path(module).name == "__init__.py")
                above = parts[: -node.level] if node.level else []
                origin = ".".join([*above, *filter(None, [node.module])])
                return _RESOLVED_LATE.get((origin, alias.name), origin), alias.name
    return None


class _Names(dict):
    """What annotations may name; everything else is an enumeration or a class, given as text."""

    def __missing__(self, name: str) -> Any:
        return getattr(typing, name, getattr(builtins, name, str))


def _type(annotation: ast.expr) -> Any:
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    return eval(text, {"__builtins__": {}}, _Names())


def _literal(node: ast.expr) -> Any:
    """Evaluate what needs no name to be known, such as `4 * 28 * 28`."""
    try:
        return eval(ast.unparse(node), {"__builtins__": {}})
    except Exception:
        return None


def _field(value: ast.expr) -> dataclasses.Field:
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return dataclasses.field(default=_literal(value))
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    told = {"metadata": _literal(given["metadata"]) if "metadata" in given else None, "init": "init" not in given}
    factory = given.get("default_factory")
    if factory is not None:
        kind = {"list": list, "dict": dict}.get(ast.unparse(factory))
        return dataclasses.field(default_factory=kind, **told) if kind else dataclasses.field(default=None, **told)
    return dataclasses.field(**told, **({"default": _literal(given["default"])} if "default" in given else {}))
