"""Rows whose prompt is shown with its hint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maple_trl.omni.prompt import RowError


HINT_COLUMN = "hint"


def has_hint(row: Mapping[str, Any]) -> bool:
    """Whether a row has a hint that is not blank."""
    hint = row.get(HINT_COLUMN)
    return isinstance(hint, str) and bool(hint.strip())


def with_hint(row: Mapping[str, Any], template: str) -> dict[str, Any]:
    """
    The row with its hint at the end of its last user message, or of its text if the prompt is plain text.

    Args:
        row: has a hint; see [`has_hint`].
        template: text with `{hint}`.

    Raises:
        RowError: when no message is the user's.
    """
    text = template.replace("{hint}", row[HINT_COLUMN].strip())
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {**row, "prompt": prompt + text}
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        raise RowError("field 'prompt' has no user message to put the hint into")
    content = prompt[last]["content"]
    content = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return {**row, "prompt": [*prompt[:last], {**prompt[last], "content": content}, *prompt[last + 1 :]]}
