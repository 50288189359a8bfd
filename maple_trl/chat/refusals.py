"""Fields of a request that a model does not take: models that reason refuse a limit by its older name, and sampling."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Set
from typing import Any


# Sent under the other name instead; the value means the same.
NEWER_NAMES = {"max_tokens": "max_completion_tokens"}
# How tokens are drawn, and what is told of it. Without such a field a model does as it does by default. What changes where an
# answer ends (`stop`) is not among them: without it the answer would be another one.
SAMPLING = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "seed",
)

_CODES = ("unsupported_parameter", "unsupported_value")
_REFUSAL = re.compile(r"unsupported (?:parameter|value)|(?:not|n't) support|deprecated", re.IGNORECASE)
_FIELD = re.compile(rf"(?<!\w)(?:{'|'.join((*NEWER_NAMES, *SAMPLING))})(?!\w)")


def refused_field(message: str, code: str | None, param: str | None) -> str | None:
    """
    Return the field that a server does not take; `None` where it says something else.

    OpenAI names it as `param`, with a `code`; servers in between pass on the message alone.

    Args:
        message (`str`): of the error.
        code, param (`str`, *optional*): of the error.
    """
    known = (*NEWER_NAMES, *SAMPLING)
    if code in _CODES and param:
        return param if param in known else None
    if not _REFUSAL.search(message):
        return None
    if param in known:
        return param
    named = _FIELD.search(message)
    return None if named is None else named[0]


def without_refused(body: Mapping[str, Any], refused: Collection[str]) -> dict[str, Any]:
    """Return a body without the fields that are refused; one with a newer name is sent under that, unless it is there."""
    fitting = {name: value for name, value in body.items() if name not in refused}
    for name, newer in NEWER_NAMES.items():
        if name in refused and name in body:
            fitting.setdefault(newer, body[name])
    return fitting


def left_out(body: Mapping[str, Any], refused: Set[str]) -> tuple[str, ...]:
    """Return the fields of a body that are refused and have no other name."""
    return tuple(sorted(refused & body.keys() - NEWER_NAMES.keys()))


def describe_refusal(field: str, value: Any) -> str:
    """Say what becomes of a field that is refused; `value` is what was asked for."""
    if field in NEWER_NAMES:
        return f"the model takes no {field}; {NEWER_NAMES[field]} is sent instead, which counts its thoughts, too"
    return f"the model takes no {field}; {field}={value!r} is left out, and its own default holds"
