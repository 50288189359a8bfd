"""Format reward (AVATAR, arXiv 2508.03100)."""

from __future__ import annotations

import re
from typing import Any

from .answers import completion_text


_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SHAPE = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def has_answer_format(text: str) -> bool:
    """
    Return whether a text is `<think>…</think><answer>…</answer>` and nothing else.

    Each tag stands once, with something in both blocks, and only white space before, between and after them.
    """
    # Counted first: on a text with thousands of tags the pattern would take quadratic time.
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    match = _SHAPE.fullmatch(text)
    return bool(match and match[1].strip() and match[2].strip())


def format_reward(
    prompts: list | None = None,
    completions: list[str] | list[list[dict[str, Any]]] = None,
    completion_ids: list[list[int]] | None = None,
    **kwargs: Any,
) -> list[float]:
    r"""
    Score 1.0 for a completion that is `<think>…</think><answer>…</answer>` and nothing else, 0.0 for any other.

    This is the format reward of AVATAR (arXiv 2508.03100), eq. 7.

    Args:
        prompts (`list`, *optional*):
            Not used; TRL passes it.
        completions (`list[str]` or `list[list[dict]]`):
            N completions, plain or conversational.
        completion_ids (`list[list[int]]`, *optional*):
            Not used; TRL passes it.
        **kwargs:
            The dataset columns; not used.

    Returns:
        `list[float]`: N rewards, each 0.0 or 1.0.

    Example:
    ```python
    >>> from maple_trl.rewards import format_reward

    >>> format_reward(completions=["<think>It is red.</think> <answer>B</answer>", "<answer>B</answer>"])
    [1.0, 0.0]
    ```
    """
    return [float(has_answer_format(completion_text(completion))) for completion in completions]
