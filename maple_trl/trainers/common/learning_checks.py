"""Signs that a run goes on and learns nothing, each said once with the usual causes, or learns from noise."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maple_trl.algorithms import informative_groups
from maple_trl.algorithms.replay_draws import SAME_REWARD


logger = logging.getLogger(__name__)

EQUAL_ROLLOUTS = 20
"""Rollouts in a row without a difference between rewards after which a run is warned."""
ZERO_GRADIENTS = 5
"""Optimizer steps in a row with a gradient of exactly 0 after which a run is warned."""


@dataclass
class Streak:
    """
    Count of how often something happened, and how often in a row.

    Attributes:
        limit: times in a row of which a warning is due.
        seen: times that were looked at.
        count: times that it happened.
        current, longest: times in a row, now and at most.
        warned: whether it was said.
    """

    limit: int
    seen: int = 0
    count: int = 0
    current: int = 0
    longest: int = 0
    warned: bool = False

    def observe(self, happened: bool) -> bool:
        """Count one observation, and return whether a warning is due, which it is once."""
        self.seen += 1
        self.count += happened
        self.current = self.current + 1 if happened else 0
        self.longest = max(self.longest, self.current)
        due = self.current >= self.limit and not self.warned
        self.warned = self.warned or due
        return due


class LearningChecks:
    """
    Watches rewards and gradients of a run. Every rank sees the same values; the first one speaks.

    Args:
        speaks (`bool`, *optional*, defaults to `True`): whether this process is the one that warns.
    """

    def __init__(self, speaks: bool = True):
        self.speaks = speaks
        self.equal_rewards = Streak(EQUAL_ROLLOUTS)
        self.zero_gradients = Streak(ZERO_GRADIENTS)
        self._rewards: list[Tensor] = []

    def note_rewards(self, rewards_NG: Tensor) -> None:
        """
        Take the rewards of a part of a rollout.

        Args:
            rewards_NG (`Tensor` of shape (N, G)): a row per group in which rewards are compared, or of a reward and its
                baseline; NaN for no reward.
        """
        self._rewards.append(rewards_NG.detach().cpu())

    def end_rollout(self, step: int, facts: dict[str, Any]) -> None:
        """
        Judge the rollout whose rewards were taken; warn where too many in a row had equal ones.

        Args:
            step: the optimizer step that it is for.
            facts: `temperature`, `max_completion_length`, and `cut`, the share of completions that reached it.
        """
        if not self._rewards:
            return
        equal = not any(informative_groups(rewards).any() for rewards in self._rewards)
        values = torch.cat([rewards.flatten() for rewards in self._rewards])
        self._rewards = []
        if self.equal_rewards.observe(equal) and self.speaks:
            logger.warning(
                "Up to step %d, all rewards were equal in %d rollouts in a row (%s), so that nothing is learnt from them. "
                "Usually the reward function never matches the form of the answers (look at them in rollouts/ or with "
                "log_completions), every completion is cut before its answer (max_completion_length=%s, %s of the last "
                "ones were), sampling is greedy or almost (temperature=%s), the reward is a constant, or the task is too "
                "hard or solved.",
                step,
                self.equal_rewards.current,
                _range(values),
                facts["max_completion_length"],
                "an unknown share" if facts["cut"] is None else f"{facts['cut']:.0%}",
                facts["temperature"],
            )

    def note_gradient(self, norm: float, step: int) -> None:
        """Take the norm of the gradient of an optimizer step; warn where too many in a row were 0."""
        if self.zero_gradients.observe(norm == 0) and self.speaks:
            logger.warning(
                "Up to step %d, the gradient was exactly 0 in %d optimizer steps in a row: the weights do not move. Usually "
                "all advantages are 0 (each prompt's completions have one reward, or none), or what is trained has no part "
                "in the loss (frozen parameters, LoRA on a tower whose media no row has).",
                step,
                self.zero_gradients.current,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, ready for JSON."""
        return {"equal_rewards": asdict(self.equal_rewards), "zero_gradients": asdict(self.zero_gradients)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from [`state_dict`]."""
        self.equal_rewards = Streak(**state["equal_rewards"])
        self.zero_gradients = Streak(**state["zero_gradients"])


def dropout_layers(model: nn.Module) -> list[str]:
    """Return the names of a model's layers with dropout."""
    return [name for name, part in model.named_modules() if isinstance(part, nn.Dropout) and part.p > 0]


def _range(values: Tensor) -> str:
    values = values[~values.isnan()]
    if not len(values):
        return "no completion got a reward"
    low, high = float(values.min()), float(values.max())
    if high - low <= SAME_REWARD:
        return f"each is {low:.4g}"
    return f"in each prompt's group, from {low:.4g} to {high:.4g} over the last rollout"
