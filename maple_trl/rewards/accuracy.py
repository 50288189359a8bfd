"""Accuracy reward (AVATAR, arXiv 2508.03100: option match and graded numbers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .answers import ANSWER_FORMATS, completion_text, grade_answer, row_options


def accuracy_reward(
    prompts: list | None = None,
    completions: list[str] | list[list[dict[str, Any]]] = None,
    completion_ids: list[list[int]] | None = None,
    *,
    solution: list | None = None,
    options: list | None = None,
    choices: list | None = None,
    answer_format: str | list = "tags",
    **kwargs: Any,
) -> list[float | None]:
    r"""
    Grade the one `<answer>…</answer>` of each completion against the row's `solution` column.

    An option must match exactly (case does not matter; `B`, `B.`, `(B)`, `[B]`, `**B**`, `\boxed{B}`, `The answer is B.`, `选B`
    and `B. text` name the same option, see [`~maple_trl.rewards.answers.option_letter`]), a number
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
        answer_format (`str`, *optional*, defaults to `"tags"`):
            How a completion marks its answer: `"tags"` for `<answer>B</answer>`, `"brackets"` for MAPLE's `[B]` outside
            the think block (see [`~maple_trl.rewards.answers.extract_bracketed`]). In a job's file:
            `{reward: accuracy_reward, answer_format: brackets}`. A dataset column of that name says it row by row.
        **kwargs:
            The other dataset columns; not used.

    Returns:
        `list[float | None]`: N rewards in `[0, 1]`; `None` for a row without a solution, which TRL leaves out of the
        mean.

    Raises:
        ValueError: when the dataset has no `solution` column, or for another format.

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
    formats = [answer_format] * len(completions) if isinstance(answer_format, str) else answer_format
    return [
        grade_answer(_reader(form or "tags")(completion_text(completion)), row_solution, texts)
        for completion, row_solution, texts, form in zip(completions, solution, options, formats, strict=True)
    ]


accuracy_reward.required_columns = ("solution",)


def _reader(answer_format: Any) -> Callable[[str], str | None]:
    if answer_format not in ANSWER_FORMATS:
        raise ValueError(f"answer_format must be one of {', '.join(ANSWER_FORMATS)}, got {answer_format!r}")
    return ANSWER_FORMATS[answer_format]


class AccuracyReward:
    """
    [`accuracy_reward`] for completions that mark their answer in one form.

    Args:
        answer_format (`str`): as in [`accuracy_reward`].

    Raises:
        ValueError: for another format.
    """

    __name__ = "accuracy_reward"  # what TRL logs it by
    required_columns = accuracy_reward.required_columns

    def __init__(self, answer_format: str = "tags"):
        self.extract = _reader(answer_format)
        self.answer_format = answer_format

    def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        """Grade completions as [`accuracy_reward`] does."""
        return accuracy_reward(*args, **{**kwargs, "answer_format": self.answer_format})
