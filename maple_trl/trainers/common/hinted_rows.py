"""Rows as AVATAR's memory knows them, and their prompts with a hint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.omni.prompt import RowError


HINT_COLUMN = "hint"
HINTED = "+hint"
"""Ends the key of a prompt that is shown with its hint."""


def is_plain(value: Any) -> bool:
    """Return whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def row_digest(row: Mapping[str, Any]) -> str:
    """
    Digest all that a row says: rows can show the same and want another answer, or have another hint.

    Columns that JSON does not know (decoded pictures and the like) have no lasting text, and are left out.
    """
    plain = {name: value for name, value in row.items() if is_plain(value)}
    text = json.dumps(plain, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_key(row: Mapping[str, Any], prompt: EncodedPrompt | None) -> str:
    """
    Return the key by which a row's completions and rewards are remembered.

    Args:
        prompt: the row's own, without a hint; `None` for a text-only model.
    """
    return row_digest(row) if prompt is None else f"{prompt.key}-{row_digest(row)}"


def prompt_key(key: str) -> str:
    """Return the prompt's own key, which is a part of the key of [`row_key`]."""
    return key.partition("-")[0]


def has_hint(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a hint that is not blank."""
    hint = row.get(HINT_COLUMN)
    return isinstance(hint, str) and bool(hint.strip())


def with_hint(row: Mapping[str, Any], template: str) -> dict[str, Any]:
    """
    Return the row with its hint at the end of its last user message, or of its text if the prompt is plain text.

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
