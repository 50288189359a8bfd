"""How a rollout is rewarded: what reward functions are called with, and what is made of what they return."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import pad

from maple_trl.modalities import ModalityTag
from maple_trl.omni.encoded import KINDS
from maple_trl.rewards.calls import RewardError, checked
from maple_trl.trainers.common.rollout import Rollout
from maple_trl.trainers.common.tag_metrics import tag_number
from maple_trl.trainers.common.trl_compat import lent
from maple_trl.trainers.omni_grpo.whole_groups import WholeGroups


class RewardMixin:
    """Calls the reward functions of [`~maple_trl.OmniGRPOTrainer`] by TRL, and tells errors by their names."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """
        Return the scores of all ranks' completions, shape (N, reward functions), and note the rollout that they make.

        Besides the columns, rewards are handed `group_ids`, and `completion_logprobs` and `deficit_completions` where
        one of them names such an argument: these cost a pass and a generation. One that names `group_ids` compares
        completions: it is called with the whole of this rank's groups, the others with this rank's completions.
        """
        flight = self._flight
        if flight.scores is not None:
            return flight.scores
        inputs = flight.rows
        self.rollout_log.note(self, inputs, completion_ids_list)
        columns = {}
        if self._serving is not None:
            columns["group_ids"] = [prompt.key for prompt in self._serving]
        if self._rewards_want("completion_logprobs"):
            columns["completion_logprobs"] = self._completion_logprobs(prompts, completion_ids_list)
        if self._rewards_want("deficit_completions") and self._serving is not None:
            columns["deficit_completions"] = self._deficit_completions(inputs)
        inputs = [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(inputs)]
        groups = self._whole_groups(inputs, prompts, completions, completion_ids_list)
        with lent(self, reward_funcs=self._checked_rewards(groups)):
            scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for name, values in zip(self.reward_func_names, scores.T, strict=True):
            if values.isinf().any():
                raise RewardError(
                    f"The reward function {name!r} returned an infinite reward; use a finite one or None"
                )
        if self.model.training:
            self._tally_rewards(inputs, scores)
        tags, *tokens = self._facts(inputs, completion_ids_list)
        scores = self._set_apart(flight, scores, tags)
        rewards = self._total_rewards(scores)
        flight.rollout = flight.scored(scores, rewards, tags, *tokens)
        return scores

    def _facts(self, rows: Sequence[dict[str, Any]], completion_ids: Sequence) -> Sequence[torch.Tensor]:
        """
        Gather what is known of all ranks' completions; four tensors of shape (N,).

        They are the tag, as a number, and tokens of the completion, of its prompt's media and of its prompt.
        """
        if self._serving is None:
            prompts = [(0, tokens) for tokens in self._flight.prompt_tokens]
        else:
            prompts = [(sum(p.media_tokens.get(kind, 0) for kind in KINDS), len(p)) for p in self._serving]
        facts = [
            [tag_number(row.get("tag")), len(ids), *tokens]
            for row, ids, tokens in zip(rows, completion_ids, prompts, strict=True)
        ]
        return self.accelerator.gather(torch.tensor(facts, device=self.accelerator.device)).unbind(1)

    def _tally_rewards(self, rows: Sequence[dict[str, Any]], scores: torch.Tensor) -> None:
        """Count completions to which a reward function gave nothing, but for those that it is not meant for."""
        missing, asked = scores.isnan(), torch.ones_like(scores, dtype=torch.bool)
        if any(hasattr(reward, "is_for") for reward in self.reward_funcs):
            asked = [
                [not hasattr(reward, "is_for") or reward.is_for(row) for reward in self.reward_funcs] for row in rows
            ]
            asked = self.accelerator.gather(torch.tensor(asked, dtype=torch.long, device=scores.device)).bool()
        for i, name in enumerate(self.reward_func_names):
            self.tally.rewards[name] += int(asked[:, i].sum())
            self.tally.unrewarded[name] += int((asked & missing)[:, i].sum())

    def _note_rewards(self, rollout: Rollout) -> None:
        """Take down what rewards are compared with, which tells whether anything is learnt."""
        self.tally.checks.note_rewards(self._compared(rollout))

    def _compared(self, rollout: Rollout) -> torch.Tensor:
        """Return rewards in the groups in which they are compared, of shape (groups, completions)."""
        return rollout.rewards.view(-1, rollout.group_size if rollout.group_size > 1 else len(rollout.rewards))

    def _checked_rewards(self, groups: WholeGroups | None) -> list[Any]:
        """
        Wrap reward functions so that errors say by name what is wrong with them or with what they return.

        Args:
            groups: what those that compare completions are called with; `None`: this rank's completions.
        """
        found = []
        for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True):
            if not isinstance(function, nn.Module):
                compares, function = _names(function, "group_ids"), checked(function, name)
                function = groups.called_with(function) if groups is not None and compares else function
            found.append(function)
        return found

    def _whole_groups(
        self, rows: Sequence[dict[str, Any]], prompts: list, completions: list, completion_ids: list[list[int]]
    ) -> WholeGroups | None:
        """
        Gather the completions that rewards compare with this rank's; a collective call.

        `None` where no reward compares any, which is so on all ranks or on none, or this process has all of them.
        """
        if self.accelerator.num_processes == 1 or not self._rewards_want("group_ids"):
            return None
        told = [
            row | {"prompts": prompt, "completions": completion, "completion_ids": ids}
            for row, prompt, completion, ids in zip(rows, prompts, completions, completion_ids, strict=True)
        ]
        keys = None if self._serving is None else [prompt.key for prompt in self._serving]
        return WholeGroups.gathered(told, keys, self.accelerator.process_index)

    def _total_rewards(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Return the weighted sum of each completion's scores, shape (N,); NaN where all are, as for an unscorable one.

        Args:
            scores (`Tensor` of shape (N, reward functions)): NaN where a function gave no reward.
        """
        total = (scores * self.reward_weights.to(scores.device)).nansum(dim=1)
        return total.masked_fill(scores.isnan().all(dim=1), torch.nan)

    # What rewards ask for

    @torch.no_grad()
    def _completion_logprobs(self, prompts: list, completion_ids: list[list[int]]) -> list[list[float]]:
        """Compute the log-probability of each token of this rank's completions under the policy."""
        if self._serving is None:
            prompt_ids = [torch.tensor(ids) for ids in self._tokenize_prompts(prompts)[0]]
        else:
            prompt_ids = [prompt.input_ids for prompt in self._serving]
        completions = [torch.tensor(ids, dtype=torch.long) for ids in completion_ids]
        sides = []
        for rows, side in ((prompt_ids, "left"), (completions, "right")):
            mask = [torch.ones_like(row) for row in rows]
            sides.append((pad(rows, self._tokenizer.pad_token_id, side), pad(mask, 0, side)))
        ids, mask = (torch.cat(pair, dim=1).to(self.accelerator.device) for pair in zip(*sides, strict=True))
        training = self.model.training
        batch_size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        width = sides[1][0].size(1)
        logps, *_ = self._get_per_token_logps_and_entropies(self.model, ids, mask, width, batch_size=batch_size)
        return [row[: len(tokens)] for row, tokens in zip(logps.tolist(), completions, strict=True)]

    def _rewards_want(self, argument: str) -> bool:
        return any(_names(reward, argument) for reward in self.reward_funcs if not isinstance(reward, nn.Module))

    @torch.no_grad()
    def _deficit_completions(self, rows: Sequence[dict[str, Any]]) -> list[str | None]:
        """
        Sample an answer to each row without some of its tag's signals, once per prompt of this rank.

        `None` where nothing can be taken away: a row without a tag, of one signal, or fed all signals whatever its tag.
        """
        deficits: dict[str, dict[str, Any]] = {}
        for row, prompt in zip(rows, self._serving, strict=True):
            tag = ModalityTag.parse(row["tag"]) if row.get("tag") else None
            if prompt.key not in deficits and tag is not None and self.prompt_builder.modality_access == "required":
                smaller = [other for other in ModalityTag if other.modalities < tag.modalities]
                if smaller:
                    draw = random.Random(f"{self.args.seed} {self._step} {prompt.key}")  # the same on every rank
                    deficits[prompt.key] = {**row, "tag": draw.choice(smaller).value}
        encoded = self.row_encoder.encode_each(list(deficits.values()))
        completions = iter(self._sample([prompt for prompt in encoded if prompt is not None]))
        texts = {
            key: None if prompt is None else next(completions) for key, prompt in zip(deficits, encoded, strict=True)
        }
        return [texts.get(prompt.key) for prompt in self._serving]


def _names(reward: Any, argument: str) -> bool:
    return argument in inspect.signature(reward).parameters
