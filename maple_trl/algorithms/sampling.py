"""Dynamic sampling: groups that teach nothing leave the batch, and their prompts later epochs (MAPLE, section 5.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from maple_trl.modalities import ModalityTag


DYNAMIC_SAMPLING = ("none", "early", "mid")


def informative_groups(rewards_NG: Tensor, tolerance: float = 1e-6) -> Tensor:
    """
    Which prompts give a gradient: those whose scorable completions were not all rewarded alike.

    Args:
        rewards_NG (`Tensor` of shape (N, G)):
            A row per prompt; NaN where no reward function could score a completion.

    Returns:
        `Tensor` of shape (N,), bool.
    """
    highest = rewards_NG.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest = rewards_NG.nan_to_num(nan=torch.inf).amin(dim=1)
    return highest - lowest > tolerance  # -inf - inf, of a group without any score, is below it


class DynamicSampling:
    """
    Decides which groups leave the batch, and remembers prompts that were uninformative when they were last visited.

    Args:
        mode (`str`, *optional*, defaults to `"none"`):
            `"early"`: from the first step on; `"mid"`: from the second epoch on; `"none"`: nothing is left out.
        refill_rounds (`int`, *optional*, defaults to `0`):
            How many times further prompts may be drawn to fill a batch from which groups were dropped.

    Raises:
        ValueError: for an unknown mode, and for refilling where nothing is ever dropped.
    """

    def __init__(self, mode: str = "none", refill_rounds: int = 0):
        if mode not in DYNAMIC_SAMPLING:
            raise ValueError(f"dynamic sampling must be one of {', '.join(DYNAMIC_SAMPLING)}, got {mode!r}")
        if refill_rounds < 0 or (refill_rounds and mode == "none"):
            raise ValueError(f"refill_rounds is {refill_rounds}, but with dynamic sampling {mode!r} it must be 0")
        self.mode = mode
        self.refill_rounds = refill_rounds
        self._uninformative: set[int] = set()
        self._kept: Counter[ModalityTag] = Counter()
        self._dropped: Counter[ModalityTag] = Counter()

    def drops(self, epoch: int) -> bool:
        """Whether uninformative groups leave the batches of this epoch (counted from 0)."""
        return self.mode == "early" or (self.mode == "mid" and epoch > 0)

    def skipped(self, epoch: int) -> list[int]:
        """Rows that this epoch does not visit."""
        return sorted(self._uninformative) if self.drops(epoch) else []

    def observe(
        self, rows_N: Sequence[int], tags_N: Iterable[str], informative_N: Sequence[bool], kept_N: Sequence[bool]
    ) -> None:
        """
        One rollout: the row and tag of each prompt, whether its group was informative, and whether it is trained on.
        """
        informative: dict[int, bool] = {}
        for row, varied in zip(rows_N, informative_N, strict=True):
            informative[row] = varied or informative.get(row, False)
        self._uninformative -= {row for row, varied in informative.items() if varied}
        self._uninformative |= {row for row, varied in informative.items() if not varied}
        self._kept.clear()
        self._dropped.clear()
        for tag, kept in zip(tags_N, kept_N, strict=True):
            (self._kept if kept else self._dropped)[ModalityTag.parse(tag)] += 1

    def metrics(self) -> dict[str, float]:
        """Groups of the last rollout that were kept and dropped, per tag and over all; prompts left out from now on."""
        metrics = {"tag/all/kept": float(self._kept.total()), "tag/all/dropped": float(self._dropped.total())}
        for tag in ModalityTag:
            if tag in self._kept or tag in self._dropped:
                metrics[f"tag/{tag}/kept"] = float(self._kept[tag])
                metrics[f"tag/{tag}/dropped"] = float(self._dropped[tag])
        return metrics | {"sampling/uninformative_prompts": float(len(self._uninformative))}

    def state_dict(self) -> dict[str, Any]:
        return {"uninformative": sorted(self._uninformative)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._uninformative = set(state["uninformative"])
