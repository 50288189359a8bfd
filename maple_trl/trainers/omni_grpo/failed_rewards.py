"""Completions that reward functions failed on: they are counted, and left out of what is learnt."""

from __future__ import annotations

from collections import Counter

import torch

from maple_trl.algorithms import left_alone, missing_scores, remaining_scale
from maple_trl.trainers.common.batch import SCALE_KEY, UNSCORABLE_KEY, Batch
from maple_trl.trainers.common.missing_rewards import MissingRewards
from maple_trl.trainers.common.rollout import RolloutInFlight
from maple_trl.trainers.common.tag_metrics import UNTAGGED, totals_by_tag
from maple_trl.trainers.common.trl_compat import replace_latest
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig


_ROW_MEANS = ("grpo", "sapo", "dr_grpo", "luspo")
"""Losses that TRL averages over the rows of a micro-batch; `bnpo` is over its tokens, the others over a rollout's."""


class FailedRewardMixin:
    """Sets apart the completions of [`~maple_trl.OmniGRPOTrainer`] that cannot be scored, and keeps TRL's means right without them."""

    _failed_is_zero = True  # TRL's way with a reward that failed, where there are neither media nor tags

    def _begin_counts(self, args: OmniGRPOConfig) -> None:
        self._missing = MissingRewards(args.process_index == 0)
        self._step_counts = self._pass_made = False

    @property
    def missing_rewards(self) -> Counter[tuple[str, str]]:
        """Count, by reward function and tag, completions of this run that it failed on: those of prompts that it scored in part."""
        return self._missing.by_function

    @property
    def unscorable_completions(self) -> Counter[str]:
        """Count, by tag, completions of this run that were left out because a reward of theirs failed."""
        return self._missing.unscorable

    def _set_apart(self, flight: RolloutInFlight, scores: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        """
        Return the scores, all NaN for an unscorable completion, so that what follows leaves it out of every mean.

        Args:
            scores (`Tensor` of shape (N, reward functions)): over all ranks.
            tags (`Tensor` of shape (N,)): as numbers.
        """
        if self._failed_is_zero and self.family is None and not (tags != UNTAGGED).any():
            return scores
        prompts = flight.groups(scores)
        missing = missing_scores(scores, self.reward_weights, prompts, flight.applies)
        unscorable = missing.any(dim=1) | scores.isnan().all(dim=1) | self._unanswered(flight)
        flight.given, flight.unscorable = scores, unscorable
        scores = scores.masked_fill(unscorable[:, None], torch.nan)
        self._count_by_tag(scores, missing, unscorable, tags)
        alone = left_alone(unscorable, prompts)
        self._means[self._mode].add(totals_by_tag("alone", alone.float(), tags))
        self.rollout_log.note_rewards(self, self._total_rewards(scores).tolist())
        return scores

    def _count_by_tag(
        self, scores: torch.Tensor, missing: torch.Tensor, unscorable: torch.Tensor, tags: torch.Tensor
    ) -> None:
        """
        Add up, by tag, what reward functions gave and what they failed on.

        Logged are the means `tag/<TAG>/rewards/<name>`, for rows that have tags, and the shares of completions that a
        function failed on (`rewards/<name>/missing`) and that are left out for that (`tag/<TAG>/unscorable`).
        """
        training = self.model.training
        means = self._means[self._mode]
        means.add(totals_by_tag("unscorable", unscorable.float(), tags))
        for name, values, failed in zip(self.reward_func_names, scores.T, missing.T, strict=True):
            means.add({f"rewards/{name}/missing": (float(failed.sum()), len(failed))})
            if (tags != UNTAGGED).any():
                means.add(totals_by_tag(f"rewards/{name}", values, tags))
                means.add(totals_by_tag(f"rewards/{name}/missing", failed.float(), tags))
            if training:
                self._missing.observe(name, tags[failed].tolist(), self.state.global_step)
        if training:
            self._missing.leave_out(tags[unscorable].tolist())

    def _mask_unscorable(self, batch: Batch, flight: RolloutInFlight) -> None:
        """Mask the tokens of unscorable completions, which keep their places; a collective call if there are any."""
        if flight.unscorable is None or not flight.unscorable.any():
            return
        for name, values in zip(self.reward_func_names, flight.given.T, strict=True):
            replace_latest(self._logs["rewards"][name], values.tolist())
        own = self._local(flight.unscorable)
        batch[UNSCORABLE_KEY] = own.long()
        batch["completion_mask"] = batch["completion_mask"].masked_fill(own[:, None], 0)
        tokens = self._all_reduce(batch["completion_mask"].sum())
        batch["num_items_in_batch"] = tokens.to(batch["num_items_in_batch"])

    def _leave_out(self, chunks: list[Batch]) -> None:
        """
        Leave unscorable completions out of TRL's means over an optimizer step; a collective call.

        TRL's means are over rows or micro-batches, and the losses are linear in the size of the advantage, so that a
        factor in the advantages makes up for what does not count.
        """
        slots = self._micro_batches_of_a_mean(len(chunks))
        counts = self._counts_of_mean(chunks).unflatten(0, (-1, slots)).sum(dim=1)
        for i, (counted, everything) in enumerate(self._all_reduce(counts).tolist()):
            scale = remaining_scale(counted, everything)
            for chunk in chunks[i * slots : (i + 1) * slots]:
                rows = chunk["advantages"]
                chunk["advantages"] = rows * scale
                chunk[SCALE_KEY] = torch.full_like(rows if rows.dim() == 1 else rows[:, 0], scale)

    def _counts_of_mean(self, chunks: list[Batch]) -> torch.Tensor:
        """Count what TRL's mean is over in each micro-batch: what can be scored of it, and all; shape (chunks, 2)."""
        counts = []
        for chunk in chunks:
            scorable = int((chunk[UNSCORABLE_KEY] == 0).sum())
            if self.loss_type in _ROW_MEANS:
                counts.append([scorable, chunk.rows])
            elif self.loss_type == "bnpo":
                counts.append([int(scorable > 0), 1])
            else:  # over tokens, of which none is left that does not count
                counts.append([int(scorable > 0)] * 2)
        return torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device)

    def _micro_batches_of_a_mean(self, chunks: int) -> int:
        """
        Return the number of micro-batches that TRL's mean is over.

        They are those of an optimizer step, or of the whole rollout where steps and rollouts do not end together.
        """
        slots = self.args.gradient_accumulation_steps
        return chunks if not self.model.training or chunks % slots else slots

    def _forget_gradients(self) -> None:
        """
        Let the optimizer step to come change nothing, since nothing could be scored.

        A gradient of 0 would still move weights by momentum and decay. (A gradient scaler wants one all the same.)
        """
        if self.accelerator.scaler is None:
            self.model.zero_grad(set_to_none=True)
