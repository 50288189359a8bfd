"""Accuracy reward (AVATAR, arXiv 2508.03100: option match and graded numbers)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .answers import ANSWER_FORMATS, completion_text, grade_answer, row_options, solution_text
from .text_scores import text_score


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

    For options and numbers this is the accuracy of AVATAR (arXiv 2508.03100), eq. 8.

    An option must match exactly (case does not matter; `B`, `B.`, `(B)`, `[B]`, `**B**`, `\boxed{B}`, `The answer is B.`, `选B`
    and `B. text` name the same option, see [`~maple_trl.rewards.answers.option_letter`]), a number
    `y` scores `max(0, 1 - |y' - y| / |y|)` (`y = 0` must be met exactly; `12`, `$12$`, `\boxed{12}` and `The answer is 12.` are
    the same, see [`~maple_trl.rewards.answers.read_number`]), other text must be equal up to case, white space and a final
    stop. No answer, several answers (in several tags, or `B or C` or `12 or 13` in one) and an answer inside the think block score
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
        grade_answer(answer_reader(form or "tags")(completion_text(completion)), row_solution, texts)
        for completion, row_solution, texts, form in zip(completions, solution, options, formats, strict=True)
    ]


accuracy_reward.required_columns = ("solution",)


def answer_reader(answer_format: Any) -> Callable[[str], str | None]:
    """Return what reads the answer of a completion in one form; ValueError for a form that is none."""
    if answer_format not in ANSWER_FORMATS:
        raise ValueError(f"answer_format must be one of {', '.join(ANSWER_FORMATS)}, got {answer_format!r}")
    return ANSWER_FORMATS[answer_format]


class AccuracyReward:
    """
    [`accuracy_reward`] for completions that mark their answer in one form, or for kinds of free-text answers.

    Args:
        answer_format (`str`, *optional*, defaults to `"tags"`):
            As in [`accuracy_reward`].
        text_scores (`Mapping[str, str]`, *optional*):
            How rows of a kind are graded that have a text for an answer, by the value of their `type_column`: `"wer"` for
            1 - word error rate (texts that are read off), `"rouge"` for the mean of ROUGE-1, -2 and -L (sentences); see
            [`~maple_trl.rewards.text_scores`]. Rows of other kinds are graded as by [`accuracy_reward`]. Needs the extra
            `texts`.
        type_column (`str`, *optional*, defaults to `"problem_type"`):
            The column that says a row's kind, as in Video-R1's data; read with `text_scores` alone.

    Raises:
        ValueError: for another format or score; when called: for a data set without the column.
        ImportError: when a score's package is not installed.

    Example:
    ```python
    >>> from maple_trl.rewards import AccuracyReward

    >>> reward = AccuracyReward(text_scores={"OCR": "wer"})
    >>> completions = ["<answer>no exit</answer>", "<answer>no exit</answer>"]
    >>> reward(completions=completions, solution=["No entry", "No entry"], problem_type=["OCR", "free-form"])
    [0.5, 0.0]
    ```
    """

    __name__ = "accuracy_reward"  # what TRL logs it by

    def __init__(
        self,
        answer_format: str = "tags",
        text_scores: Mapping[str, str] | None = None,
        type_column: str = "problem_type",
    ):
        self.extract = answer_reader(answer_format)
        self.answer_format = answer_format
        if text_scores is not None and (not isinstance(text_scores, Mapping) or not text_scores):
            raise ValueError(
                f"text_scores must map kinds of rows to scores, e.g. {{OCR: wer, free-form: rouge}}, got {text_scores!r}"
            )
        self._scores = {kind: text_score(name) for kind, name in (text_scores or {}).items()}
        self.text_scores, self.type_column = text_scores, type_column
        self.required_columns = (*accuracy_reward.required_columns, *([type_column] if self._scores else []))

    def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        """Grade completions as [`accuracy_reward`] does, and those of the kinds in `text_scores` by theirs."""
        rewards = accuracy_reward(*args, **{**kwargs, "answer_format": self.answer_format})
        if not self._scores:
            return rewards
        kinds = kwargs.get(self.type_column)
        if kinds is None:
            raise ValueError(
                f"accuracy_reward with text_scores needs a column `{self.type_column}` in the dataset; columns that came "
                f"with this batch: {sorted(kwargs) or 'none'}"
            )
        completions = args[1] if len(args) > 1 else kwargs["completions"]
        for i, (completion, solution, kind) in enumerate(zip(completions, kwargs["solution"], kinds, strict=True)):
            score = self._scores.get(kind)
            if score is not None and rewards[i] is not None:
                answer = self.extract(completion_text(completion))
                rewards[i] = 0.0 if answer is None else score(answer, solution_text(solution) or "")
        return rewards
