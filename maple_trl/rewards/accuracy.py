"""Accuracy reward (AVATAR, arXiv 2508.03100: option match and graded numbers)."""

from __future__ import annotations

from typing import Any

from .answers import completion_text, extract_answer, grade_answer, row_options


def accuracy_reward(
    prompts: list | None = None,
    completions: list[str] | list[list[dict[str, Any]]] = None,
    completion_ids: list[list[int]] | None = None,
    *,
    solution: list | None = None,
    options: list | None = None,
    choices: list | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    Grades the one `<answer>…</answer>` of each completion against the row's `solution` column.

    An option must match exactly (case does not matter; `B`, `B.`, `(B)` and `B. text` name the same option), a number
    `y` scores `max(0, 1 - |y' - y| / |y|)` (`y = 0` must be met exactly), other text must be equal up to case and white
    space. No answer, several answers (in several tags, or `B or C` in one) and an answer inside the think block score
    0, and so do look-alikes of letters and digits.

    A row with options is graded by its options: the text of the right one counts as much as its letter, and a letter
    with the text of another option scores 0.

    Args:
        prompts (`list`, *optional*):
            Not used; TRL passes it.
        completions (`list[str]` or `list[list[dict]]`):
            N completions, plain or conversational.
        completion_ids (`list[list[int]]`, *optional*):
            Not used; TRL passes it.
        solution (`list`):
            N solutions: option, number or text.
        options, choices (`list`, *optional*):
            N times the row's options (see [`~maple_trl.rewards.answers.option_texts`]), `None` for a row without;
            `choices` is read if there are no `options`.
        **kwargs:
            The other dataset columns; not used.

    Returns:
        `list[float | None]`: N rewards in `[0, 1]`; `None` for a row without a solution, which TRL leaves out of the
        mean.

    Raises:
        ValueError: when the dataset has no `solution` column.

    Example:
    ```python
    >>> from maple_trl.rewards import accuracy_reward

    >>> completions = ["<think>red</think><answer>(b)</answer>", "<answer>9</answer>", "B"]
    >>> accuracy_reward(completions=completions, solution=["B", "10", "B"])
    [1.0, 0.9, 0.0]
    ```
    """
    if solution is None:
        raise ValueError(
            "accuracy_reward needs a `solution` column in the dataset (an option letter, a number or a text; leave "
            f"single rows empty to skip them). Columns that came with this batch: {sorted(kwargs) or 'none'}."
        )
    options = row_options(options, choices, len(completions))
    return [
        grade_answer(extract_answer(completion_text(completion)), row_solution, texts)
        for completion, row_solution, texts in zip(completions, solution, options, strict=True)
    ]


accuracy_reward.required_columns = ("solution",)
