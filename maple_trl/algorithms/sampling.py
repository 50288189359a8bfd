"""Dynamic sampling: groups that teach nothing leave the batch, and some prompts later epochs (MAPLE, section 5.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from maple_trl.algorithms.replay_draws import SAME_REWARD
from maple_trl.modalities import ModalityTag


DYNAMIC_SAMPLING = ("none", "early", "mid")
REVISITS = ("all", "unsolved", "informative")


def informative_groups(rewards_NG: Tensor, tolerance: float = SAME_REWARD) -> Tensor:
    """
    Mark the prompts that give a gradient: their scorable completions were not all rewarded alike (MAPLE 5.2).

    Args:
        rewards_NG (`Tensor` of shape (N, G)):
            A row per prompt; NaN where no reward function could score a completion.
        tolerance (`float`, *optional*, defaults to `1e-6`):
            Rewards that differ by no more count as alike.

    Returns:
        `Tensor` of shape (N,), bool.
    """
    highest = rewards_NG.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest = rewards_NG.nan_to_num(nan=torch.inf).amin(dim=1)
    return highest - lowest > tolerance  # -inf - inf, of a group without any score, is below it


def compared_groups(rewards_NG: Tensor) -> Tensor:
    """
    Mark the prompts with two scorable completions or more: of the others it is not known whether they are informative.

    Of no paper, as papers have a reward for every completion.

    Args:
        rewards_NG (`Tensor` of shape (N, G)): as for [`informative_groups`].

    Returns:
        `Tensor` of shape (N,), bool.
    """
    return (~rewards_NG.isnan()).sum(dim=1) >= 2


def solved_groups(task_rewards_NG: Tensor) -> Tensor:
    """
    Mark the solved prompts: all their scorable completions have a task reward of 1.

    Of no paper: MAPLE leaves out prompts solved and failed alike, [`DynamicSampling`] can tell them apart.

    Args:
        task_rewards_NG (`Tensor` of shape (N, G)): a row per prompt; NaN where a completion is unscorable.

    Returns:
        `Tensor` of shape (N,), bool.
    """
    return (task_rewards_NG.isnan() | (task_rewards_NG == 1)).all(dim=1) & (task_rewards_NG == 1).any(dim=1)


class DynamicSampling:
    """
    Decides which groups leave the batch, and which prompts later epochs leave out, by how their last visit went.

    The modes are the filters of MAPLE 5.2; drawing further prompts is from DAPO (arXiv 2503.14476, section 3.2); `revisit`
    is of no paper.

    Args:
        mode (`str`, *optional*, defaults to `"none"`):
            `"early"`: from the first step on; `"mid"`: from the second epoch on; `"none"`: nothing is left out.
        refill_rounds (`int`, *optional*, defaults to `0`):
            How many times further prompts may be drawn to fill a batch from which groups were dropped.
        revisit (`str`, *optional*, defaults to `"all"`):
            Which prompts the epochs in which groups are dropped visit: `"all"`, `"unsolved"` (those whose completions were
            all right rest for `revisit_after` epochs) or `"informative"` (those that were uninformative do not come back).
        revisit_after (`int`, *optional*, defaults to `1`):
            How many epochs a solved prompt rests.

    Raises:
        ValueError: for an unknown mode, and for refilling or choosing prompts where nothing is ever dropped.
    """

    def __init__(self, mode: str = "none", refill_rounds: int = 0, revisit: str = "all", revisit_after: int = 1):
        if mode not in DYNAMIC_SAMPLING:
            raise ValueError(f"dynamic sampling must be one of {', '.join(DYNAMIC_SAMPLING)}, got {mode!r}")
        if refill_rounds < 0 or (refill_rounds and mode == "none"):
            raise ValueError(f"refill_rounds is {refill_rounds}, but with dynamic sampling {mode!r} it must be 0")
        if revisit not in REVISITS:
            raise ValueError(f"revisit must be one of {', '.join(REVISITS)}, got {revisit!r}")
        if mode == "none" and revisit != "all":
            raise ValueError(
                f"revisit is {revisit!r}, but with dynamic sampling 'none' every epoch visits all prompts"
            )
        if revisit_after < 1:
            raise ValueError(f"revisit_after must be at least 1 epoch, got {revisit_after}")
        self.mode = mode
        self.refill_rounds = refill_rounds
        self.revisit = revisit
        self.revisit_after = revisit_after
        self._uninformative: set[int] = set()
        self._solved: dict[int, int] = {}
        self._kept: Counter[ModalityTag] = Counter()
        self._dropped: Counter[ModalityTag] = Counter()

    def drops(self, epoch: int) -> bool:
        """Return whether uninformative groups leave the batches of this epoch (counted from 0)."""
        return self.mode == "early" or (self.mode == "mid" and epoch > 0)

    def skipped(self, epoch: int) -> list[int]:
        """Return the rows that this epoch does not visit."""
        if not self.drops(epoch) or self.revisit == "all":
            return []
        if self.revisit == "informative":
            return sorted(self._uninformative)
        return sorted(row for row, solved in self._solved.items() if epoch <= solved + self.revisit_after)

    def observe(
        self,
        rows_N: Sequence[int],
        tags_N: Iterable[str],
        informative_N: Sequence[bool | None],
        kept_N: Sequence[bool],
        solved_N: Sequence[bool | None] | None = None,
        epoch: int = 0,
    ) -> None:
        """
        Note one rollout, a value per prompt.

        Args:
            rows_N (`Sequence[int]`):
                The prompt's row in the data set.
            tags_N (`Iterable[str]`):
                Its tag.
            informative_N (`Sequence[bool]`):
                Whether its group was informative; `None` where too few completions could be scored to tell, which leaves
                what is known of the prompt as it was.
            kept_N (`Sequence[bool]`):
                Whether its group is trained on.
            solved_N (`Sequence[bool]`, *optional*):
                Whether its completions were all right; `None` as above.
            epoch (`int`, *optional*, defaults to `0`):
                The epoch of the rollout.
        """
        for row, varied in _by_row(rows_N, informative_N, any).items():
            (self._uninformative.discard if varied else self._uninformative.add)(row)
        for row, solved in _by_row(rows_N, solved_N or [None] * len(rows_N), all).items():
            self._solved.pop(row, None)
            if solved:
                self._solved[row] = epoch
        self._kept.clear()
        self._dropped.clear()
        for tag, kept in zip(tags_N, kept_N, strict=True):
            (self._kept if kept else self._dropped)[ModalityTag.parse(tag)] += 1

    def metrics(self) -> dict[str, float]:
        """Count kept and dropped groups of the last rollout, per tag and in all, and prompts known to rest."""
        metrics = {"tag/all/kept": float(self._kept.total()), "tag/all/dropped": float(self._dropped.total())}
        for tag in ModalityTag:
            if tag in self._kept or tag in self._dropped:
                metrics[f"tag/{tag}/kept"] = float(self._kept[tag])
                metrics[f"tag/{tag}/dropped"] = float(self._dropped[tag])
        metrics["sampling/uninformative_prompts"] = float(len(self._uninformative))
        return metrics | ({"sampling/solved_prompts": float(len(self._solved))} if self._solved else {})

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the prompts, ready for JSON."""
        return {"uninformative": sorted(self._uninformative), "solved": sorted(self._solved.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state` that [`state_dict`] gave."""
        self._uninformative = set(state["uninformative"])
        self._solved = dict(state.get("solved", ()))


def _by_row(rows_N: Sequence[int], values_N: Sequence[bool | None], combine: Callable[..., bool]) -> dict[int, bool]:
    """Combine the values of each row that has any: a row can stand in a rollout several times."""
    values: dict[int, list[bool]] = {}
    for row, value in zip(rows_N, values_N, strict=True):
        if value is not None:
            values.setdefault(row, []).append(value)
    return {row: combine(known) for row, known in values.items()}
