"""Length shaping: DAPO's soft penalty for overlong completions (arXiv 2503.14476, eq. 13), moved into [0, 1]."""

from __future__ import annotations

from typing import Any

from trl.rewards import get_soft_overlong_punishment

from .answers import completion_text


class LengthReward:
    r"""
    Reward for completions that are not too long (DAPO, arXiv 2503.14476, eq. 13).

    It is 1.0 up to `soft_limit` tokens, 0.0 from `hard_limit` tokens on, and in between falls along a straight line.

    It is [`~trl.rewards.get_soft_overlong_punishment`] plus 1, for what needs rewards in `[0, 1]` (MAPLE's difficulty
    measure); adding 1 to every reward changes no advantage. Below `soft_limit` shorter is not better, and a completion
    without any letter or digit scores 0.0, so that saying nothing does not pay.

    Args:
        soft_limit (`int`):
            Tokens from which on the reward falls; at least 0.
        hard_limit (`int`):
            Tokens at which it is 0; more than `soft_limit`. `max_completion_length` is a good choice: a completion of
            that length was cut off.

    Raises:
        ValueError: when the limits are not `0 <= soft_limit < hard_limit`.

    Example:
    ```python
    >>> from maple_trl.rewards import LengthReward

    >>> length_reward = LengthReward(soft_limit=80, hard_limit=100)
    >>> length_reward(completions=["red", "red", ""], completion_ids=[[7] * 20, [7] * 90, []])
    [1.0, 0.5, 0.0]
    ```
    """

    __name__ = "length_reward"  # what TRL logs it by

    def __init__(self, soft_limit: int, hard_limit: int):
        if not 0 <= soft_limit < hard_limit:
            raise ValueError(
                f"LengthReward needs 0 <= soft_limit < hard_limit (tokens), got soft_limit={soft_limit} and "
                f"hard_limit={hard_limit}"
            )
        self.soft_limit = soft_limit
        self.hard_limit = hard_limit
        self._punishment = get_soft_overlong_punishment(hard_limit, hard_limit - soft_limit)

    def __call__(
        self,
        prompts: list | None = None,
        completions: list[str] | list[list[dict[str, Any]]] = None,
        completion_ids: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """
        Reward completions by their lengths.

        Args:
            prompts (`list`, *optional*):
                Not used; TRL passes it.
            completions (`list[str]` or `list[list[dict]]`):
                N completions, plain or conversational.
            completion_ids (`list[list[int]]`):
                Their tokens.
            **kwargs:
                The dataset columns; not used.

        Returns:
            `list[float]`: N rewards in `[0, 1]`.

        Raises:
            ValueError: without `completion_ids`.
        """
        if completion_ids is None:
            raise ValueError("length_reward counts tokens: it needs `completion_ids`, which TRL's trainers pass")
        punishments = self._punishment(completion_ids)
        return [
            1.0 + punishment if any(map(str.isalnum, completion_text(completion))) else 0.0
            for completion, punishment in zip(completions, punishments, strict=True)
        ]
