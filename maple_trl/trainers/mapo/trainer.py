"""Modality-aware policy optimization (MAPLE, arXiv 2602.11596)."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from trl.trainer.utils import shuffle_sequence_dict

from maple_trl.algorithms import (
    AdaptiveTagWeights,
    DynamicSampling,
    GradientMoments,
    GradientSample,
    PromptBatch,
    StratifiedSchedule,
    TagCurriculum,
    clipped_tokens,
    group_advantages,
    rank_share,
    remaining_scale,
    row_coefficients,
    stratum_totals,
    tag_difficulty,
)
from maple_trl.algorithms.schedule import MIXED
from maple_trl.files import write_atomically
from maple_trl.modalities import ModalityTag
from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.omni.prompt import RowError
from maple_trl.trainers.common.checkpoint import (
    Batch,
    ResumeError,
    concat_rows,
    count_rows,
    regroup_rows,
    split_rows,
    take_rows,
)
from maple_trl.trainers.common.run_summary import Note, make_note, plural
from maple_trl.trainers.common.samplers import StratifiedSampler
from maple_trl.trainers.common.tag_metrics import TAGS, UNTAGGED, TagSums, tag_number
from maple_trl.trainers.common.updates import even_parts, micro_batches, share_out
from maple_trl.trainers.mapo.config import MAPOConfig
from maple_trl.trainers.mapo.rollout import Rollout
from maple_trl.trainers.mapo.zero_shot import check_measurable, fingerprint, zero_shot_accuracy
from maple_trl.trainers.omni_grpo.trainer import PROMPTS_KEY, SCALE_KEY, UNSCORABLE_KEY, OmniGRPOTrainer


logger = logging.getLogger(__name__)

TAG_KEY = "tag_numbers"
STATE_FILE = "mapo.json"
PROBE_FILE = "gradient_probe.safetensors"


class MAPOTrainer(OmniGRPOTrainer):
    """
    MAPLE's modality-aware policy optimization: GRPO in which the required modality tag of a row decides what it is fed,
    which rows share a batch, how its advantage is scaled, what its loss weighs, and when it is trained on.

    With one tag, no weights and `advantage_scope="group"` it is TRL's GRPO. `MAPOConfig(method="mupo")` is the paper's
    modality-unaware baseline.

    Args:
        model, reward_funcs, eval_dataset, processing_class, kwargs: as in [`OmniGRPOTrainer`].
        args ([`MAPOConfig`], *optional*): configuration.
        train_dataset (`Dataset`): rows as for [`OmniGRPOTrainer`]; each needs a `tag`. Streamed sets are refused.

    Raises:
        RowError: for the first row without a tag or with an unknown one.
        ValueError: when options do not fit together.
    """

    _tag_names = ["trl", "grpo", "omni", "mapo", "maple-trl"]
    _name = "MAPO"
    _config_class = MAPOConfig
    _failed_is_zero = False
    _paper = {
        "title": "MAPLE: Modality-Aware Post-training and Learning Ecosystem",
        "id": "2602.11596",
        "citation": """\
@article{verma2026maple,
    title  = {{MAPLE: Modality-Aware Post-training and Learning Ecosystem}},
    author = {Nikhil Verma and Minjung Kim and JooYoung Yoo and Kyung-Min Jin and Manasa Bharadwaj and Kevin Ferreira and
              Ko Keun Kim and Youngjoon Kim},
    year   = 2026,
    eprint = {arXiv:2602.11596},
}""",
    }

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: MAPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        _check_tags(train_dataset)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, **kwargs)
        self._task_reward = self._find_task_reward()
        if self.args.curriculum == "adaptive":
            self._check_zero_shot()
        self._gradient_sample = self._choose_coordinates() if self.args.gradient_probe else None
        self._begin_run()

    def _begin_run(self) -> None:
        """Nothing of a run before this one is left, wherever it stopped."""
        self.schedule: StratifiedSchedule | None = None  # made of the rows that the run uses
        self._epoch_began = 0  # the value of `_step` when the schedule's epoch began
        self._rows_in_round: list[dict[str, Any]] = []
        self._dropping = False
        self._round: Rollout | None = None
        self._rewards_in_advance: Tensor | None = None
        self._kept: list[int] | None = None
        self._update_chunks: list[Batch] | None = None
        self._of_all_tags = False
        self._last_pass: tuple[Tensor, Tensor] | None = None
        self._optimizer_step_tag: ModalityTag | None = None
        self._window_has_rows = False
        self._begin_optimizer_step()

    def _find_task_reward(self) -> int | None:
        names = self.reward_func_names
        wanted = self.args.task_reward or "accuracy_reward"
        needed = self._needs_difficulty or self.args.revisit == "unsolved"
        if self.args.task_reward is None and needed and len(names) == 1:
            wanted = names[0]
        if wanted in names:
            return names.index(wanted)
        if self.args.task_reward is not None or needed:
            raise ValueError(
                f"task_reward must name the reward function that says whether a task is solved ({', '.join(names)}), got "
                f"{self.args.task_reward!r}"
            )
        return None

    def _check_zero_shot(self) -> None:
        given = self.args.zero_shot_accuracy
        if given is None:
            check_measurable(self, self._task_reward)
            self.initial_weights = fingerprint(self.model)
            return
        missing = {ModalityTag.parse(tag) for tag in self.train_dataset["tag"]} - set(map(ModalityTag.parse, given))
        if missing:
            raise ValueError(
                f"zero_shot_accuracy has no accuracy for tag {min(missing)} of train_dataset; give one for each tag"
            )

    def _choose_coordinates(self) -> GradientSample:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("gradient_probe reads whole gradients, which FSDP and DeepSpeed do not keep: set it to 0")
        args = self.args
        parameters = self.accelerator.unwrap_model(self.model).named_parameters()
        try:
            return GradientSample(parameters, args.gradient_probe, args.seed, args.gradient_probe_pattern)
        except ValueError as error:
            raise ValueError(f"gradient_probe_pattern: {error}") from error

    @property
    def _needs_difficulty(self) -> bool:
        return self.args.tag_weights == "adaptive" or self.args.orders_by_difficulty

    # Schedule

    def train(self, *args, **kwargs):
        self._begin_run()
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        if self.schedule is None:
            self._make_schedule()
        return StratifiedSampler(self.schedule, self.num_generations, self._updates_per_rollout, ahead=False)

    def _make_schedule(self) -> None:
        args = self.args
        self.curriculum = TagCurriculum(args.curriculum, args.curriculum_window, args.zero_shot_accuracy)
        self.sampling = DynamicSampling(args.dynamic_sampling, args.refill_rounds, args.revisit, args.revisit_after)
        self.schedule = StratifiedSchedule(
            self.train_dataset["tag"],
            args.generation_batch_size // self.num_generations,
            self.curriculum,
            stratified=args.batching == "stratified",
            granularity=args.curriculum_granularity,
            leftover=args.leftover,
            shuffle=self.shuffle_dataset,
            seed=args.seed,
            skipped=self.sampling.skipped,
            multiple_of=self._prompts_that_ranks_share,
        )
        self._tell_of_rare_tags()
        rollouts = self.schedule.batches_per_epoch
        difficulties = rollouts * (1 if args.batching == "stratified" else len(set(self.schedule.tags)))
        self.tag_weights = AdaptiveTagWeights(args.kl_window or max(difficulties, 2), args.weight_history)
        self.gradient_moments = GradientMoments(args.gradient_probe_window)

    def _tell_of_rare_tags(self) -> None:
        if self.args.batching != "stratified" or self.args.leftover != "fill" or not self.accelerator.is_main_process:
            return
        for tag, rows in Counter(self.schedule.tags).items():
            if rows < self.schedule.batch_size:
                logger.warning(
                    "Tag %s has %d rows, fewer than the %d prompts of a rollout: they are taken again until it is full (in "
                    "epochs that leave out prompts it stays short). Lower the batch size, or set leftover to 'mixed'.",
                    tag,
                    rows,
                    self.schedule.batch_size,
                )

    @property
    def _prompts_that_ranks_share(self) -> int:
        """The completions of a multiple of this number of prompts can be shared by the ranks equally."""
        return self.accelerator.num_processes // gcd(self.accelerator.num_processes, self.num_generations)

    def set_initial_training_values(self, args, dataloader):
        epochs, *others = super().set_initial_training_values(args, dataloader)
        if args.max_steps > 0 and self.args.dynamic_sampling != "none":
            epochs = sys.maxsize  # they get shorter when prompts are left out; the number of steps counts
        return (epochs, *others)

    def _prefetch_next_batch(self, current: Sequence[EncodedPrompt]) -> None:
        batch = self.schedule.peek() if self.args.media_prefetch else None
        if batch is not None:
            self._prefetch(self._own_rows(batch.rows), current)

    def _own_rows(self, rows: list[int]) -> list[dict[str, Any]]:
        """This rank's rows of a rollout, each prompt once per completion."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        share = rank_share(rows, self.num_generations, rank, world)
        numbers = list(dict.fromkeys(share))
        columns = self.train_dataset[numbers]
        loaded = {number: {name: columns[name][i] for name in columns} for i, number in enumerate(numbers)}
        return [loaded[number] for number in share]

    # Rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A rollout of the schedule's next prompts; the data loader's rows are read in evaluation alone."""
        if not self.model.training:
            output, scored = self._roll_out(inputs, [])
            self._means["eval"].add(scored.totals(self._task_reward))
            return output
        epoch = self.schedule.epoch
        batch = self.schedule.next_batch()
        if self.schedule.epoch != epoch:
            self._epoch_began = self._step
        self._dropping = self.sampling.drops(self.schedule.epoch)
        outputs, rounds = [], []
        rows = batch.rows
        while rows:
            output, scored = self._roll_out(self._own_rows(rows), rows)
            outputs.append(output)
            rounds.append(scored)
            rows = self._refill(batch, rounds) if self._dropping else []
        return self._finish_rollout(batch, outputs, rounds)

    def _roll_out(self, inputs: list[dict[str, Any]], rows: list[int]) -> tuple[Batch, Rollout]:
        """TRL's rollout of some rows."""
        self._rows_in_round = inputs
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._kept = self._rewards_in_advance = None
        return output, replace(self._round, rows=rows)

    def encode_rows(self, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[EncodedPrompt]]:
        self._rows_in_round, prompts = super().encode_rows(rows)
        return self._rows_in_round, prompts

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        if self.model.training and self._dropping:
            # Before TRL's passes over the completions, which those of uninformative groups are spared.
            self._rewards_in_advance = self._calculate_rewards(
                self._rows_in_round, prompts, completions=generated[3], completion_ids_list=generated[1]
            )
            kept = self._round.informative.repeat_interleave(self.num_generations)
            kept = kept & ~self._round.rewards.isnan()
            self._kept = self._local(kept).nonzero().flatten().tolist()
        return generated

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards, self._rewards_in_advance = self._rewards_in_advance, None
        if rewards is not None:
            return rewards
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        media = [sum(p.media_tokens.get(kind, 0) for kind in ("video", "audio")) for p in self._serving or ()]
        facts = torch.tensor(
            [
                [tag_number(row.get("tag")), len(ids), tokens]
                for row, ids, tokens in zip(inputs, completion_ids_list, media or [0] * len(inputs), strict=True)
            ],
            device=self.accelerator.device,
        )
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        self._round = Rollout(
            [], group_size, rewards, self._total_rewards(rewards), *self.accelerator.gather(facts).unbind(1)
        )
        return rewards

    def _refill(self, batch: PromptBatch, rounds: list[Rollout]) -> list[int]:
        """Further prompts for the groups that the rounds so far could not fill, as far as the ranks can share them."""
        informative = sum(int(r.informative.sum()) for r in rounds)
        missing = len(batch.rows) - informative
        if missing <= 0 or len(rounds) > self.sampling.refill_rounds:
            return []
        step = self._prompts_that_ranks_share
        return self.schedule.draw(batch.stratum, missing + -missing % step, multiple_of=step)

    def _finish_rollout(self, batch: PromptBatch, outputs: list[Batch], rounds: list[Rollout]) -> Batch:
        """Advantages of all rounds; what is trained on, where that is not simply all."""
        scored = Rollout.joined(rounds)
        advantages = group_advantages(scored.rewards, scored.groups, scored.tags, self.args.advantage_scope)
        kept = scored.informative if self._dropping else torch.ones_like(scored.informative)
        kept = kept & (kept.cumsum(0) <= len(batch.rows))  # a refill can bring more than was missing
        self._learn(scored, kept)
        self._means["train"].add(scored.totals(self._task_reward, advantages))
        surplus = int((scored.informative & ~kept).sum())
        self.tally.counts["dropped_groups"] += int((~scored.informative & ~kept).sum())
        self._log_all({"schedule/filled_rows": batch.filled, "sampling/surplus_groups": surplus})
        self._replace_logged_advantages(advantages)
        self._of_all_tags = self.args.batching == "stratified" and batch.stratum == MIXED
        trained = kept.repeat_interleave(self.num_generations)
        if self._dropping:  # otherwise what cannot be scored stays where it is, masked
            trained = trained & ~scored.rewards.isnan()
        parts, counts, start = [], torch.zeros(self.accelerator.num_processes, dtype=torch.long), 0
        for output, r in zip(outputs, rounds, strict=True):
            rows = slice(start, start + len(r.tags))
            start = rows.stop
            output["advantages"] = self._local(advantages[rows])
            output[TAG_KEY] = self._local(r.tags.masked_fill(r.rewards.isnan(), UNTAGGED))
            output.pop(UNSCORABLE_KEY, None)
            mask = trained[rows]
            counts += mask.view(len(counts), -1).sum(dim=1).cpu()
            parts.append(take_rows(output, self._local(mask).nonzero().flatten().tolist()))
        whole = int(trained.sum()) == self.args.generation_batch_size
        if len(rounds) > 1 or not whole:
            self._update_chunks = self._split(concat_rows(parts, self._pad_token_id), counts.tolist(), outputs[0])
        return outputs[0]

    def _learn(self, scored: Rollout, kept: Tensor) -> None:
        """Difficulties of the tags, for their weights and order, and which prompts taught nothing."""
        difficulties = self._difficulties(scored)
        self.tag_weights.observe(difficulties)
        self.curriculum.observe(difficulties)
        solved = scored.told_solved(self._task_reward) if self.args.revisit == "unsolved" else None
        self.sampling.observe(
            scored.rows,
            scored.prompt_tags,
            scored.told_informative(),
            kept.tolist(),
            solved,
            self.schedule.epoch,
        )
        metrics = {f"tag/{tag}/kl": value for tag, value in difficulties.items()}
        if self.args.orders_by_difficulty:
            metrics |= self.curriculum.metrics()
        if self.args.tag_weights == "adaptive":
            metrics |= self.tag_weights.metrics()
        for name in ("kl", "priority", "weight"):
            values = [value for key, value in metrics.items() if key.endswith(f"/{name}")]
            if values:
                metrics[f"tag/all/{name}"] = fmean(values)
        self._log_all(metrics | self.sampling.metrics() | self.schedule.metrics())

    def _difficulties(self, scored: Rollout) -> dict[ModalityTag, float]:
        if self._task_reward is None:
            return {}
        scores = scored.scores[:, self._task_reward]
        found = {}
        for i in scored.tags.unique().tolist():
            tag = TAGS[i]
            try:
                value = tag_difficulty(scores[scored.tags == i], self.args.difficulty)
            except ValueError as error:
                if not self._needs_difficulty:
                    continue
                name = self.reward_func_names[self._task_reward]
                raise ValueError(f"reward function {name!r}, a row of tag {tag}: {error}") from error
            if value is not None:
                found[tag] = value
        return found

    # Updates

    def _split(self, batch: Batch, rows_per_rank: list[int], rollout: Batch) -> list[Batch]:
        """Micro-batches of the rows that are trained on, shared out over the ranks."""
        rank = self.accelerator.process_index
        batch = share_out(batch, rows_per_rank, rank, self._exchange, self._pad_token_id)
        spare = take_rows(batch if count_rows(batch) else rollout, [0])
        spare["completion_mask"] = torch.zeros_like(spare["completion_mask"])
        spare["advantages"] = torch.zeros_like(spare["advantages"])
        spare[TAG_KEY] = torch.full_like(spare[TAG_KEY], UNTAGGED)
        rows = count_rows(batch)
        batch, padding_row = split_rows(concat_rows([batch, spare], self._pad_token_id), [rows, 1])
        batch = shuffle_sequence_dict(batch)
        if PROMPTS_KEY in batch:
            one = {prompt.key: prompt for prompt in batch[PROMPTS_KEY]}  # rows from other ranks may bring it again
            batch[PROMPTS_KEY] = [one[prompt.key] for prompt in batch[PROMPTS_KEY]]
            batch = regroup_rows(batch, PROMPTS_KEY)
        return micro_batches(
            batch,
            even_parts(sum(rows_per_rank), len(rows_per_rank)),
            steps=self.args.steps_per_generation // self.args.gradient_accumulation_steps,
            slots=self.args.gradient_accumulation_steps,
            largest=self.args.per_device_train_batch_size,
            padding_row=padding_row,
            group=self.num_generations,
        )

    def _exchange(self, parcels: dict[int, Batch]) -> list[Batch | None]:
        """
        Sends rows to other ranks; a collective call.

        Returns:
            the rows that each rank sent to this one. Media are not sent but decoded again, by the prompts' keys.
        """
        packed = {}
        for to, rows in parcels.items():
            packed[to] = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in rows.items()}
            if PROMPTS_KEY in rows:
                packed[to][PROMPTS_KEY] = [prompt.key for prompt in rows[PROMPTS_KEY]]
        received = [sent.get(self.accelerator.process_index) for sent in gather_object([packed])]
        for rows in filter(None, received):
            for name, value in rows.items():
                if isinstance(value, Tensor):
                    rows[name] = value.to(self.accelerator.device)
            if PROMPTS_KEY in rows:
                rows[PROMPTS_KEY] = self._prompts_by_key(rows[PROMPTS_KEY])
        return received

    @property
    def _pad_token_id(self) -> int:
        return self._tokenizer.pad_token_id

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        if self._update_chunks is not None:
            self._buffered_inputs, self._update_chunks = self._update_chunks, None
        self._fold_weights(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _fold_weights(self, chunks: list[Batch]) -> None:
        """
        Scales the advantages so that TRL's loss of these micro-batches becomes the stratified loss (MAPLE eq. 2, 3).

        The surrogates are linear in the size of the advantage, so a row's weight in the loss can stand in it.
        """
        args = self.args
        slots, world = args.gradient_accumulation_steps, self.accelerator.num_processes
        lengths = [chunk["completion_mask"].sum(dim=1) for chunk in chunks]
        strata = [self._strata(chunk[TAG_KEY]) for chunk in chunks]
        totals = [stratum_totals(*rows, UNTAGGED + 1) for rows in zip(lengths, strata, strict=True)]
        totals = torch.stack(totals).unflatten(0, (-1, slots)).sum(dim=1)
        totals = self._all_reduce(totals)
        tokens = totals[..., 1].sum()
        weights = None
        if args.tag_weights == "adaptive":
            weights = torch.tensor([*map(self.tag_weights.weight, TAGS), 0.0], device=tokens.device)
        for i, chunk in enumerate(chunks):
            scale = row_coefficients(
                lengths[i], strata[i], None, args.loss_aggregation, self.max_completion_length, totals[i // slots]
            )
            if weights is not None:
                scale = scale * weights[chunk[TAG_KEY]]
            if args.loss_type == "sapo":  # TRL takes a mean over tokens, rows, micro-batches and ranks
                scale = scale * lengths[i].clamp(min=1) * count_rows(chunk) * slots * world
                *counted, others = totals[i // slots][:, 0].tolist()
                penalty_scale = remaining_scale(sum(counted), sum(counted) + others)
                chunk[SCALE_KEY] = torch.full_like(scale, penalty_scale)
            else:  # TRL divides by the tokens of an average optimizer step
                scale = scale * tokens * slots / args.steps_per_generation
            chunk["advantages"] = chunk["advantages"] * scale
            chunk["num_items_in_batch"] = tokens

    def _strata(self, tags: Tensor) -> Tensor:
        """
        Strata of the loss as numbers; what does not count (padding rows, unscorable completions) has its own, the last.

        The tags' left-over rows are one batch like any other, so they are one mean, in which each row has its tag's weight.
        """
        by_tag = self.args.loss_strata == "tag" and not self._of_all_tags
        return tags if by_tag else torch.where(tags == UNTAGGED, tags, 0)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._kept is None:
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
            self._last_pass = found[:2]
            return found
        rows = self._kept
        if self._touch_all_towers:  # the ranks wait for each other
            most = int(self.accelerator.gather(torch.tensor([len(rows)], device=input_ids.device)).max())
            rows = rows + (rows[:1] or [0]) * (most - len(rows))
        logps = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
        if rows:
            with self._rows_in_use(self._serving and [self._serving[i] for i in rows]):
                found, *_ = super()._get_per_token_logps_and_entropies(
                    model, input_ids[rows], attention_mask[rows], logits_to_keep, *args, **kwargs
                )
            logps[rows] = found.to(logps.dtype)
        return logps, None, None

    def _compute_loss(self, model, inputs):
        if not count_rows(inputs):
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        loss = super()._compute_loss(model, inputs)
        if self.model.training:
            self._add_to_optimizer_step(inputs)
        self._last_pass = None
        return loss

    def training_step(self, model, inputs, num_items_in_batch):
        began = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._optimizer_step_seconds += time.perf_counter() - began
        if self._step % self.args.gradient_accumulation_steps == 0:
            self._end_optimizer_step()
        if self._step % self._updates_per_rollout == 0 and self.schedule.exhausted:
            self._end_epoch()
        return loss

    def _end_epoch(self) -> None:
        """Ends the epoch where the schedule does, which may be before the data loader does."""
        self.control.should_epoch_stop = True
        if self.args.max_steps <= 0 and self.schedule.epoch + 1 >= self.state.num_train_epochs:
            self.state.max_steps = self.state.global_step + 1  # the step that saves and evaluates as the last one does

    # Metrics

    def _compared(self, rewards: Tensor) -> Tensor:
        if self.args.advantage_scope == "group" or self.num_generations == 1:
            return super()._compared(rewards)
        return rewards.view(1, -1)  # also among the prompts of a rollout

    def left_out(self) -> list[Note]:
        found = super().left_out()
        dropped, left = self.tally.counts["dropped_groups"], len(self.schedule.rows_left_out) if self.schedule else 0
        if dropped:
            text = f"{plural(dropped, 'group')} without a difference between rewards dropped (dynamic_sampling)"
            found.append(make_note("dropped_groups", dropped, text))
        if left:
            text = f"{plural(left, 'row')} left out of the last epoch as uninformative (dynamic_sampling)"
            found.append(make_note("uninformative_rows", left, text))
        return found

    def _begin_optimizer_step(self) -> None:
        """Nothing of an optimizer step has been seen yet."""
        names = ["entropy"] if self.args.loss_type in ("sapo", "vespo") else ["entropy", "clip_fraction"]
        self._step_sums = TagSums(names, self.accelerator.device)
        self._optimizer_step_seconds = 0.0

    def _end_step(self, counted: bool) -> None:
        """`_end_optimizer_step` does it, by the tags that were trained on."""

    def _add_to_optimizer_step(self, inputs: Batch) -> None:
        logps, entropies = (value.detach() for value in self._last_pass)
        mask = inputs["completion_mask"]
        old = inputs.get("old_per_token_logps")
        log_ratio = torch.zeros_like(logps) if old is None else (logps - old) * mask
        if self.importance_sampling_level == "sequence":
            log_ratio = (log_ratio.sum(dim=1) / mask.sum(dim=1).clamp(min=1))[:, None].expand_as(logps)
        sums = {"entropy": (entropies * mask).sum(dim=1)}
        clipped = clipped_tokens(
            log_ratio.exp(), inputs["advantages"], self.epsilon_low, self.epsilon_high, self.loss_type
        )
        if clipped is not None:
            sums["clip_fraction"] = (clipped * mask).sum(dim=1)
        self._step_sums.add(inputs[TAG_KEY], sums, mask.sum(dim=1))

    def _end_optimizer_step(self) -> None:
        self._step_sums.reduce(self._all_reduce)
        tags = self._step_sums.tags()
        self._optimizer_step_tag = tags[0] if len(tags) == 1 else None
        self._window_has_rows = bool(tags)
        if not tags:
            self._forget_gradients()
        self._means["train"].add(self._step_sums.totals())
        self._log_all({"sampling/steps_without_update": not tags})
        self._log_of_optimizer_step("seconds", self._optimizer_step_seconds)
        if self._gradient_sample is not None and tags:
            self._probe_gradient()
        self._begin_optimizer_step()

    def _log_of_optimizer_step(self, name: str, value: float) -> None:
        """A value of a whole optimizer step, which is its tag's as well where it has one."""
        for whose in ("all", self._optimizer_step_tag):
            if whose is not None:
                self._log_all({f"tag/{whose}/{name}": value})

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self._window_has_rows:
            self._log_of_optimizer_step("grad_norm", norm)
        return norm

    def _probe_gradient(self) -> None:
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        self.gradient_moments.observe(self._gradient_sample() / scale, self._optimizer_step_tag)
        self._log_all(self.gradient_moments.metrics())

    # State

    def _resume_signature(self) -> dict[str, Any]:
        names = ("batching", "leftover", "curriculum", "curriculum_granularity", "dynamic_sampling", "loss_strata")
        if self.args.dynamic_sampling != "none":
            names = (*names, "revisit", "revisit_after")
        return super()._resume_signature() | {name: getattr(self.args, name) for name in names}

    def _parts(self) -> dict[str, Any]:
        """The components that a checkpoint keeps."""
        return {
            "schedule": self.schedule,
            "curriculum": self.curriculum,
            "sampling": self.sampling,
            "tag_weights": self.tag_weights,
        }

    def _save_checkpoint(self, model, trial):
        folder = self._checkpoint_folder(trial)
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            state = {"step": self._step, "epoch_began": self._epoch_began}
            state |= {name: part.state_dict() for name, part in self._parts().items()}
            write_atomically(os.path.join(folder, STATE_FILE), json.dumps(state))
            save_file(self.gradient_moments.state_dict(), os.path.join(folder, PROBE_FILE))
        super()._save_checkpoint(model, trial)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        return trained if resume_from_checkpoint is None else self._restore(resume_from_checkpoint)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        measured = self.args.curriculum == "adaptive" and self.args.zero_shot_accuracy is None
        if measured and resume_from_checkpoint is None:
            accuracy = zero_shot_accuracy(self, self._task_reward, self.initial_weights)
            self.curriculum.load_state_dict({"histories": {}, "zero_shot": accuracy})
        return prepared

    def _restore(self, checkpoint: str) -> tuple[int, int]:
        """Epochs that are done, and micro-batches of the one that has begun."""
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.exists(path):
            raise ResumeError(f"{path} is missing: {checkpoint} is not a checkpoint of {type(self).__name__}")
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        for name, part in self._parts().items():
            try:
                part.load_state_dict(state[name])
            except ValueError as error:
                raise ResumeError(f"{path}, {name}: {error}") from error
        self._restore_probe(load_file(os.path.join(checkpoint, PROBE_FILE)))
        self._epoch_began = state["epoch_began"]
        if self.schedule.exhausted and state["step"] % self._updates_per_rollout == 0:
            return self.schedule.epoch + 1, 0
        return max(self.schedule.epoch, 0), state["step"] - self._epoch_began

    def _restore_probe(self, state: dict[str, Tensor]) -> None:
        if self._gradient_sample is None or not state:
            return
        if len(state["all.vector"]) != self._gradient_sample.count:
            raise ResumeError(
                f"gradient_probe: the checkpoint's has {len(state['all.vector'])} coordinates, this run's "
                f"{self._gradient_sample.count}; resume with the same or with 0"
            )
        self.gradient_moments.load_state_dict(state)


def _check_tags(dataset: Any) -> None:
    """Before a model is loaded: has every row a tag?"""
    if dataset is None:
        return
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"MAPOTrainer batches rows by tag, so it needs a map-style Dataset, got {type(dataset).__name__}"
        )
    if "tag" not in dataset.column_names:
        raise ValueError(
            f"train_dataset has no column 'tag' (its columns: {', '.join(dataset.column_names)}): MAPOTrainer needs each "
            f"row's required modality tag, one of {', '.join(ModalityTag)}"
        )
    for i, tag in enumerate(dataset["tag"]):
        try:
            ModalityTag.parse(tag)
        except ValueError as error:
            raise RowError(f"train_dataset, row {i}: field 'tag': {error}") from error
