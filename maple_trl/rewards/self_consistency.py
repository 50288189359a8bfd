"""Self-consistency reward (AVATAR, arXiv 2508.03100: the group's consensus stands in for the solution)."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from maple_trl.modalities import INPUT_COLUMNS

from .accuracy import answer_reader
from .answers import answer_key, completion_text, row_options


def self_consistency_reward(
    prompts: list | None = None,
    completions: list[str] | list[list[dict[str, Any]]] = None,
    completion_ids: list[list[int]] | None = None,
    *,
    group_ids: list[Hashable] | None = None,
    completion_logprobs: list[Sequence[float] | None] | None = None,
    options: list | None = None,
    choices: list | None = None,
    answer_format: str | list = "tags",
    **kwargs: Any,
) -> list[float]:
    r"""
    Score 1.0 for a completion that gives the most common answer of its group, 0.0 for any other.

    This is the self-rewarding of AVATAR (arXiv 2508.03100), eq. 9 and 10.

    Answers are compared as they are graded: `B`, `(b)` and `B. text` are one answer, `12` and `12.0` too, and text is
    compared up to case and white space. A completion without an answer, with several, or with one that says nothing
    (`:`) scores 0 and has no vote.

    Of several equally common answers the one of the completion with the highest mean token log-probability is taken;
    where no log-probability is known, or the highest is shared, the one that came first. So in a group without any
    agreement one completion scores 1, and a group of one completion agrees with itself.

    Args:
        prompts (`list`, *optional*):
            N prompts, which tell the groups when there are no `group_ids`.
        completions (`list[str]` or `list[list[dict]]`):
            N completions, plain or conversational.
        completion_ids (`list[list[int]]`, *optional*):
            Not used; TRL passes it.
        group_ids (`list[Hashable]`, *optional*):
            N group names, one per completion; without them the completions of equal prompts are a group, wherever
            they stand. Prompts are equal when their content is, and so are the row's `video`, `audio`, `subtitle`,
            `image` and `images`.
        completion_logprobs (`list[Sequence[float] | None]`, *optional*):
            N times the log-probabilities of the completion's tokens (natural logarithm); `None` where not known. A
            mean that is no number does not count.
        options, choices (`list`, *optional*):
            N times the row's options (see [`~maple_trl.rewards.answers.option_texts`]); in a row that has them only
            the choice of one of them, by letter or text, is an answer. `choices` is read if there are no `options`.
        answer_format (`str`, *optional*, defaults to `"tags"`):
            How a completion marks its answer, as in [`accuracy_reward`]; a dataset column of that name says it row by row.
        **kwargs:
            The other dataset columns.

    Returns:
        `list[float]`: N rewards, each 0.0 or 1.0.

    Raises:
        ValueError: when the groups can't be told: neither `group_ids` nor `prompts`, or prompts with objects that can't
            be compared by content; when a column is not as long as `completions`; or for another format.

    Example:
    ```python
    >>> from maple_trl.rewards import self_consistency_reward

    >>> completions = ["<answer>B</answer>", "<answer>(b)</answer>", "<answer>C</answer>", "B"]
    >>> self_consistency_reward(prompts=["Which?"] * 4, completions=completions)
    [1.0, 1.0, 0.0, 0.0]
    ```
    """
    if group_ids is None:
        group_ids = _groups_of_equal_prompts(prompts, kwargs)
    logprobs = [None] * len(completions) if completion_logprobs is None else completion_logprobs
    options = row_options(options, choices, len(completions))
    for name, column in (("group_ids or prompts", group_ids), ("completion_logprobs", logprobs), ("options", options)):
        if len(column) != len(completions):
            raise ValueError(
                f"self_consistency_reward: {name} must have one entry per completion ({len(completions)}), got "
                f"{len(column)}"
            )
    formats = [answer_format] * len(completions) if isinstance(answer_format, str) else answer_format
    keys = [
        answer_key(answer_reader(form or "tags")(completion_text(completion)), texts)
        for completion, texts, form in zip(completions, options, formats, strict=True)
    ]
    members = defaultdict(list)
    for index, group in enumerate(group_ids):
        members[group].append(index)
    rewards = [0.0] * len(completions)
    for indices in members.values():
        consensus = _consensus([keys[i] for i in indices], [logprobs[i] for i in indices])
        for i in indices:
            rewards[i] = float(keys[i] is not None and keys[i] == consensus)
    return rewards


class SelfConsistencyReward:
    """
    [`self_consistency_reward`] for completions that mark their answer in one form.

    Args:
        answer_format (`str`, *optional*, defaults to `"tags"`):
            As in [`accuracy_reward`].

    Raises:
        ValueError: for another format.

    Example:
    ```python
    >>> from maple_trl.rewards import SelfConsistencyReward

    >>> reward = SelfConsistencyReward("brackets")
    >>> reward(prompts=["Which?"] * 3, completions=["It is [B]", "[b]", "[C]"])
    [1.0, 1.0, 0.0]
    ```
    """

    __name__ = "self_consistency_reward"  # what TRL logs it by

    def __init__(self, answer_format: str = "tags"):
        self.extract = answer_reader(answer_format)
        self.answer_format = answer_format

    def __call__(
        self,
        prompts: list | None = None,
        completions: list[str] | list[list[dict[str, Any]]] = None,
        completion_ids: list[list[int]] | None = None,
        *,
        group_ids: list[Hashable] | None = None,
        completion_logprobs: list[Sequence[float] | None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Score completions as [`self_consistency_reward`] does; its arguments, of which the trainer sees what is asked for."""
        columns = {**kwargs, "group_ids": group_ids, "completion_logprobs": completion_logprobs}
        columns["answer_format"] = self.answer_format
        return self_consistency_reward(prompts, completions, completion_ids, **columns)


def _consensus(keys: list[tuple | None], logprobs: list[Sequence[float] | None]) -> tuple | None:
    """Return the key that most have; `None` when none has any."""
    votes = Counter(key for key in keys if key is not None)
    most = max(votes.values(), default=0)
    tied = [index for index, key in enumerate(keys) if key is not None and votes[key] == most]
    # max() takes the first of equals.
    return keys[max(tied, key=lambda index: _mean_logprob(logprobs[index]))] if tied else None


def _mean_logprob(logprobs: Sequence[float] | None) -> float:
    if logprobs is None or len(logprobs) == 0:
        return -math.inf
    mean = sum(float(value) for value in logprobs) / len(logprobs)
    return -math.inf if math.isnan(mean) else mean


def _groups_of_equal_prompts(prompts: list | None, columns: dict[str, Any]) -> list[Hashable]:
    if prompts is None:
        raise ValueError(
            "self_consistency_reward needs `group_ids` or `prompts` to tell which completions are a group"
        )
    # Rows may share a question: then what they are fed tells them apart.
    parts = [prompts, *(columns[name] for name in INPUT_COLUMNS if isinstance(columns.get(name), list))]
    return [_content(row) for row in zip(*parts, strict=True)]


def _content(value: Any) -> Hashable:
    """Return a hashable stand-in that is equal for equal content; pictures and arrays by their bytes."""
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return value
    if isinstance(value, dict):
        return ("dict", *sorted((str(key), _content(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return ("list", *map(_content, value))
    if hasattr(value, "tobytes"):
        shape = getattr(value, "shape", None) or getattr(value, "size", None)
        kind = getattr(value, "dtype", None) or getattr(value, "mode", None)
        return (type(value).__name__, str(shape), str(kind), hashlib.blake2b(value.tobytes()).digest())
    raise ValueError(
        f"self_consistency_reward can't tell which prompts are equal: they hold {type(value).__name__}, which it can't "
        "compare by content; hand over `group_ids`, one per completion"
    )
