"""Contrastive reward weighting (MAPLE, arXiv 2602.11596, appendix E.3)."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from maple_trl.modalities import ModalityTag

from .answers import completion_text
from .routing import is_reward_function, joint_signature


Similarity = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


class ContrastiveRewardWeighting:
    r"""
    A reward in `[0, 1]` that counts more for completions which the policy would not have given without some of the signals.

    For a prompt that needs two signals or three, the trainer lets the policy answer once more with one or two of them
    taken away. A completion whose similarity to that answer is below `tau` gets `min(1, (1 + alpha) r)` for the inner
    reward `r` (MAPLE, arXiv 2602.11596, eq. 10). Where nothing can be taken away the inner reward stays as it is: for
    a row of one signal, and for all rows with `modality_access="all"`.

    The deficit completions come as the column `deficit_completions`, which [`OmniGRPOTrainer`] and the trainers made
    from it provide. An `async` reward becomes an `async` one; the similarities are measured while it waits.

    Logged at every step, per tag and over all (`tag/VA/…`, `tag/all/…`), of the rows with a deficit completion:
    `NAME/similarity`, the mean, and `NAME/bonus_share`, the share of the scored completions that are below `tau`.

    Args:
        reward (`Callable`):
            A reward function with TRL's signature, plain or `async`. It sees all rows and all columns, and what its
            signature asks the trainer for (`completion_logprobs`) is asked for.
        alpha (`float`):
            The bonus, as a fraction of the reward; at least 0.
        tau (`float`):
            The similarity below which it is given, in `[0, 1]`.
        similarity (`Callable`, *optional*, defaults to [`BertScoreSimilarity()`][BertScoreSimilarity]):
            Takes N texts and N others, and gives N similarities in `[0, 1]`.
        name (`str`, *optional*, defaults to the inner reward's name with `_crw`):
            What TRL logs it by.

    Raises:
        ValueError: for `alpha` or `tau` out of range; when called: without deficit completions, for an inner reward
            outside `[0, 1]`, for a similarity outside of it, and where the number of either is not that of the
            completions.
        TypeError: when `reward` is no reward function.

    Example:
    ```python
    >>> from maple_trl.rewards import BertScoreSimilarity, ContrastiveRewardWeighting

    >>> similarity = BertScoreSimilarity("/models/all-MiniLM-L6-v2", num_layers=5)
    >>> reward = ContrastiveRewardWeighting(caption_reward, alpha=0.5, tau=0.7, similarity=similarity)
    >>> reward.__name__
    'caption_reward_crw'
    ```
    """

    def __new__(cls, reward: Callable | None = None, *args: Any, **kwargs: Any):
        """Choose the class with an `async` call, which TRL awaits, for an `async` reward."""
        if cls is ContrastiveRewardWeighting and reward is not None and _is_async(reward):
            cls = _AsyncContrastiveRewardWeighting
        return super().__new__(cls)

    def __init__(
        self,
        reward: Callable[..., Any],
        alpha: float,
        tau: float,
        similarity: Similarity | None = None,
        name: str | None = None,
    ):
        # Here and not above: this loads all of TRL, which those who only look for a reward can do without.
        from trl.trainer.utils import get_callable_name

        if not is_reward_function(reward):
            raise TypeError(f"ContrastiveRewardWeighting wraps a reward function, got {reward!r}")
        if not 0 <= alpha < math.inf:
            raise ValueError(f"ContrastiveRewardWeighting: alpha must be a number from 0 on, got {alpha}")
        if not 0 <= tau <= 1:
            raise ValueError(f"ContrastiveRewardWeighting: tau is a similarity in [0, 1], got {tau}")
        if similarity is None:
            from .similarity import BertScoreSimilarity

            similarity = BertScoreSimilarity()
        self.reward, self.alpha, self.tau, self.similarity = reward, alpha, tau, similarity
        self.inner_name = get_callable_name(reward)
        self.__name__ = name or f"{self.inner_name}_crw"
        # By this the trainer sees what the inner reward asks for.
        self.__signature__ = joint_signature(ContrastiveRewardWeighting.__call__, reward)

    def __call__(
        self, prompts=None, completions=None, completion_ids=None, *, deficit_completions=None, **columns: Any
    ) -> list[float | None]:
        """
        Compute the inner rewards, weighed by how far completions are from the deficit completions.

        Args:
            prompts (`list`, *optional*):
                Not used; handed on.
            completions (`list[str]` or `list[list[dict]]`):
                N completions, plain or conversational.
            completion_ids (`list[list[int]]`, *optional*):
                Not used; handed on.
            deficit_completions (`list[str | None]`):
                N texts that the policy gave to the rows' prompts with signals taken away; `None` where there is none.
            **columns:
                The other columns; handed on. `tag` and `log_metric` are used where they are there.

        Returns:
            `list[float | None]`: N rewards in `[0, 1]`, `None` where the inner reward is `None` (or NaN).
        """
        self._check_deficits(deficit_completions, completions)
        similarities = self._compare(completions, deficit_completions)
        rewards = self.reward(**_arguments(prompts, completions, completion_ids, deficit_completions, columns))
        return self._weigh(rewards, similarities, columns)

    def _check_deficits(self, deficits: Sequence[str | None] | None, completions: Sequence) -> None:
        if deficits is None:
            raise ValueError(
                f"{self.__name__} needs `deficit_completions`, what the policy says with signals taken away: train with "
                "OmniGRPOTrainer, MAPOTrainer or AvatarTrainer and an omni model, hand it over directly (not wrapped in "
                f"another reward, which would hide what it needs), or use {self.inner_name} without the weighting"
            )
        self._check_count("deficit_completions has", deficits, completions)

    def _check_count(self, what: str, values: Sequence, completions: Sequence) -> None:
        if len(values) != len(completions):
            raise ValueError(f"{self.__name__}: {what} {len(values)} values for {len(completions)} completions")

    def _compare(self, completions: Sequence, deficits: Sequence[str | None]) -> list[float | None]:
        """Return the similarity of each completion to its deficit completion, `None` where it has none."""
        rows = [i for i, deficit in enumerate(deficits) if deficit is not None]
        values: list[float | None] = [None] * len(completions)
        if not rows:
            return values
        found = self.similarity([completion_text(completions[i]) for i in rows], [deficits[i] for i in rows])
        self._check_count("the similarity returned", found, rows)
        for i, value in zip(rows, found, strict=True):
            if not 0 <= value <= 1:
                raise ValueError(f"{self.__name__}: the similarity of completion {i} is {value}; it must be in [0, 1]")
            values[i] = float(value)
        return values

    def _weigh(
        self, rewards: Sequence[float | None], similarities: list[float | None], columns: dict[str, Any]
    ) -> list[float | None]:
        import torch

        from maple_trl.algorithms.crw import contrastive_rewards

        self._check_count(f"{self.inner_name} returned", rewards, similarities)
        scored = [None if reward is None or math.isnan(reward) else float(reward) for reward in rewards]
        for i, reward in enumerate(scored):
            if reward is not None and not 0 <= reward <= 1:
                raise ValueError(
                    f"{self.__name__}: {self.inner_name} gave completion {i} the reward {reward}; contrastive weighting "
                    "needs rewards in [0, 1]"
                )
        self._log(scored, similarities, columns)
        rewards_N, similarities_N = (
            torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
            for values in (scored, similarities)
        )
        weighted = contrastive_rewards(rewards_N, similarities_N, self.alpha, self.tau).tolist()
        return [None if reward is None else value for reward, value in zip(scored, weighted, strict=True)]

    def _log(self, rewards: list[float | None], similarities: list[float | None], columns: dict[str, Any]) -> None:
        log_metric = columns.get("log_metric")
        if log_metric is None:
            return
        tags = columns.get("tag") or [None] * len(rewards)
        found: dict[str, list[float]] = defaultdict(list)
        for reward, similarity, tag in zip(rewards, similarities, tags, strict=True):
            if similarity is None:
                continue
            for whose in ("all", ModalityTag.parse(tag)) if tag else ("all",):
                found[f"tag/{whose}/{self.__name__}/similarity"].append(similarity)
                if reward is not None:
                    found[f"tag/{whose}/{self.__name__}/bonus_share"].append(float(similarity < self.tau))
        for name, values in found.items():
            log_metric(name, fmean(values))


class _AsyncContrastiveRewardWeighting(ContrastiveRewardWeighting):
    async def __call__(
        self, prompts=None, completions=None, completion_ids=None, *, deficit_completions=None, **columns: Any
    ) -> list[float | None]:
        self._check_deficits(deficit_completions, completions)
        rewards, similarities = await asyncio.gather(
            self.reward(**_arguments(prompts, completions, completion_ids, deficit_completions, columns)),
            # In a thread: the requests of this reward and others go on meanwhile.
            asyncio.to_thread(self._compare, completions, deficit_completions),
        )
        return self._weigh(rewards, similarities, columns)


def _is_async(reward: Callable) -> bool:
    from trl.trainer.utils import is_async_callable

    return callable(reward) and is_async_callable(reward)


def _arguments(prompts, completions, completion_ids, deficit_completions, columns: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        "deficit_completions": deficit_completions,
        **columns,
    }
