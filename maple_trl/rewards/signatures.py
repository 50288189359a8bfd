"""What a wrapper around a reward function asks the trainer for."""

from __future__ import annotations

import inspect
from collections.abc import Callable


def joint_signature(own: Callable, inner: Callable) -> inspect.Signature:
    """The signature of the wrapper, with what the inner reward names besides; without annotations, to be pickled."""
    _, *named, columns = inspect.signature(own).parameters.values()
    known = {parameter.name for parameter in named}
    more = [
        inspect.Parameter(parameter.name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for parameter in inspect.signature(inner).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and parameter.name not in known
    ]
    named = [parameter.replace(annotation=parameter.empty) for parameter in named]
    return inspect.Signature([*named, *more, columns.replace(annotation=columns.empty)])
