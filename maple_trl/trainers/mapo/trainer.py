"""Modality-aware policy optimization (MAPLE, arXiv 2602.11596)."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler

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
from maple_trl.algorithms.advantages import lifts_equal_rewards
from maple_trl.algorithms.schedule import MIXED
from maple_trl.hub.papers import MAPLE
from maple_trl.modalities import ModalityTag
from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.trainers.common.batch import SCALE_KEY, TAG_KEY, Batch
from maple_trl.trainers.common.checkpoint import StatePart
from maple_trl.trainers.common.rollout import Assignment, PassInFlight, Rollout, RolloutInFlight, Round
from maple_trl.trainers.common.rows import check_row_tags
from maple_trl.trainers.common.run_summary import Note, make_note, plural
from maple_trl.trainers.common.samplers import StratifiedSampler
from maple_trl.trainers.common.tag_metrics import TAGS, UNTAGGED, TagSums
from maple_trl.trainers.mapo.config import MAPOConfig
from maple_trl.trainers.mapo.state import ProbeState, ScheduleState
from maple_trl.trainers.mapo.zero_shot import check_measurable, fingerprint, zero_shot_accuracy
from maple_trl.trainers.omni_grpo.trainer import OmniGRPOTrainer


logger = logging.getLogger(__name__)


@dataclass
class StepRecord:
    """
    Measurements of one optimizer step.

    Attributes:
        sums: of its tokens, per tag.
        began, seconds: when its latest micro-batch began, and what those before it took.
        tag: of all its rows, where they have one.
        counts: whether anything was trained on.
    """

    sums: TagSums
    began: float = 0.0
    seconds: float = 0.0
    tag: ModalityTag | None = None
    counts: bool = False


class MAPOTrainer(OmniGRPOTrainer):
    """
    GRPO in which the required modality tag of a row decides how it is trained on (MAPLE, arXiv 2602.11596, section 4).

    The tag decides what the row is fed, which rows share a batch, how its advantage is scaled, what its loss weighs,
    and when it is trained on.

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
    _paper = MAPLE

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: MAPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        self._check_rows(args, train_dataset)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, **kwargs)
        self._task_reward = self._find_task_reward()
        if self.args.curriculum == "adaptive":
            self._check_zero_shot()
        self._gradient_sample = self._choose_coordinates() if self.args.gradient_probe else None
        self._begin_run()

    def _check_rows(self, args: MAPOConfig | None, dataset: Any) -> None:
        """Check that every row has a tag, before the model is loaded."""
        _check_tags(dataset, type(self).__name__)

    def _begin_run(self) -> None:
        """Reset what an earlier run of this trainer has left, wherever it stopped."""
        self.schedule: StratifiedSchedule | None = None  # made of the rows that the run uses
        self.gradient_moments = GradientMoments(self.args.gradient_probe_window)
        self._optimizer_step = self._ended_step = self._new_step()

    def _new_step(self) -> StepRecord:
        """Return an empty record for the next optimizer step."""
        names = ["entropy"] if self.args.loss_type in ("sapo", "vespo") else ["entropy", "clip_fraction"]
        return StepRecord(TagSums(names, self.accelerator.device))

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

    def row_order(self, dataset: Dataset | None) -> Sampler | None:
        if not self.args.tag_aware:
            return super().row_order(dataset)
        if self.schedule is None:
            self._make_schedule()
        return StratifiedSampler(self.schedule, self.num_generations, self._updates_per_rollout, ahead=False)

    def _make_schedule(self) -> None:
        args = self.args
        self.curriculum = TagCurriculum(args.curriculum, args.curriculum_window, args.zero_shot_accuracy)
        self.sampling = DynamicSampling(args.dynamic_sampling, args.refill_rounds, args.revisit, args.revisit_after)
        self.schedule = StratifiedSchedule(
            self.train_dataset["tag"],
            args.prompts_per_rollout,
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
        components = {"schedule": self.schedule, "curriculum": self.curriculum, "sampling": self.sampling}
        self._progress = ScheduleState(components | {"tag_weights": self.tag_weights}, lambda: self._step)

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
        """Least number of prompts whose completions the ranks can share equally."""
        return self.accelerator.num_processes // gcd(self.accelerator.num_processes, self.num_generations)

    def set_initial_training_values(self, args, dataloader):
        epochs, *others = super().set_initial_training_values(args, dataloader)
        if args.max_steps > 0 and self.args.dynamic_sampling != "none":
            epochs = sys.maxsize  # they get shorter when prompts are left out; the number of steps counts
        return (epochs, *others)

    def _prefetch_next_batch(self, current: Sequence[EncodedPrompt]) -> None:
        if self.schedule is None:
            super()._prefetch_next_batch(current)
            return
        batch = self.schedule.peek() if self.args.media_prefetch else None
        if batch is not None:
            self._prefetch(self._own_rows(batch.rows), current)

    def _own_rows(self, rows: list[int]) -> list[dict[str, Any]]:
        """Load this rank's rows of a rollout, each prompt once per completion."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        share = rank_share(rows, self.num_generations, rank, world)
        numbers = list(dict.fromkeys(share))
        columns = self.train_dataset[numbers]
        loaded = {number: {name: columns[name][i] for name in columns} for i, number in enumerate(numbers)}
        return [loaded[number] for number in share]

    # Rollout

    @property
    def _dropping(self) -> bool:
        """Whether groups that teach nothing are left out of the rollout that is being generated."""
        return self.schedule is not None and self.model.training and self.sampling.drops(self.schedule.epoch)

    def _rounds(self, inputs: list[dict[str, Any]]) -> Iterator[Round]:
        """Generate rollouts of the schedule's next prompts; the data loader's rows are read in evaluation alone."""
        if not self.model.training or self.schedule is None:
            for r in super()._rounds(inputs):
                if not self.model.training:
                    self._means["eval"].add(r.rollout.totals(self._task_reward))
                yield r
            return
        epoch = self.schedule.epoch
        batch = self.schedule.next_batch()
        if self.schedule.epoch != epoch:
            self._progress.epoch_began = self._step
        rows = batch.rows
        while rows:
            r = next(super()._rounds(self._own_rows(rows)))
            r.rollout = replace(r.rollout, rows=rows, stratum=batch.stratum)
            yield r
            rows = self._refill(batch, self._flight.rounds) if self._dropping else []
        self._log_all({"schedule/filled_rows": batch.filled})

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        if self._dropping:
            # Before TRL's passes over the completions, which those of uninformative groups are spared.
            flight: RolloutInFlight = self._flight
            flight.scores = self._calculate_rewards(
                flight.rows, prompts, completions=generated[3], completion_ids_list=generated[1]
            )
            rollout = flight.rollout
            kept = rollout.informative.repeat_interleave(rollout.group_size) & ~rollout.rewards.isnan()
            flight.kept = self._local(kept)[self._local(rollout.fresh)].nonzero().flatten().tolist()
        return generated

    def _refill(self, batch: PromptBatch, rounds: list[Round]) -> list[int]:
        """Draw further prompts for groups that the rounds so far could not fill, as many as the ranks can share."""
        informative = sum(int(r.rollout.informative.sum()) for r in rounds)
        missing = len(batch.rows) - informative
        if missing <= 0 or len(rounds) > self.sampling.refill_rounds:
            return []
        step = self._prompts_that_ranks_share
        return self.schedule.draw(batch.stratum, missing + -missing % step, multiple_of=step)

    def assign(self, rollout: Rollout) -> Assignment | None:
        """
        Scale rewards within groups, tags or the rollout, and leave out groups that teach nothing.

        Scales are those of [`~maple_trl.algorithms.group_advantages`] (MAPLE 4.1), filters those of MAPLE 5.2.

        Args:
            rollout (`Rollout`): the completions of all ranks, scored.
        """
        advantages = self._advantages(rollout)
        kept = self._kept_groups(rollout)
        self._learn(rollout, kept)
        self.tally.counts["dropped_groups"] += int((~rollout.informative & ~kept).sum())
        self._log_all({"sampling/surplus_groups": int((rollout.informative & ~kept).sum())})
        trained = kept.repeat_interleave(rollout.group_size)
        if self._dropping:  # otherwise what cannot be scored stays where it is, masked
            trained = trained & ~rollout.rewards.isnan()
        assigned = Assignment(advantages, trained)
        self._means["train"].add(rollout.totals(self._task_reward, assigned))
        return assigned

    def _advantages(self, rollout: Rollout) -> Tensor:
        """Return the advantage of the completion in each place, shape (N,)."""
        return group_advantages(rollout.rewards, rollout.groups, rollout.tags, self.args.advantage_scope)

    def _kept_groups(self, rollout: Rollout) -> Tensor:
        """Return whether each prompt's fresh completions are trained on, shape (prompts,), bool."""
        if not self._dropping:
            return torch.ones_like(rollout.informative)
        informative = rollout.informative
        return informative & (informative.cumsum(0) <= rollout.wanted)  # a refill can bring more than was missing

    def _learn(self, scored: Rollout, kept: Tensor) -> None:
        """Tell tag weights, curriculum and sampling how hard tags are and which prompts taught nothing, and log it."""
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

    def _weigh(self, chunks: list[Batch], rollout: Rollout) -> None:
        if self.args.loss_strata is None:
            super()._weigh(chunks, rollout)
        else:
            self._fold_weights(chunks, rollout)

    def _fold_weights(self, chunks: list[Batch], rollout: Rollout) -> Tensor:
        """
        Scale the advantages so that TRL's loss of these micro-batches becomes the stratified loss (MAPLE eq. 2, 3).

        The surrogates are linear in the size of the advantage, so a row's weight in the loss can stand in it.

        Returns:
            `Tensor` of shape (optimizer steps, strata, 2): rows and tokens of each stratum.
        """
        args = self.args
        slots, world = args.gradient_accumulation_steps, self.accelerator.num_processes
        lengths = [chunk["completion_mask"].sum(dim=1) for chunk in chunks]
        strata = [self._strata(chunk, rollout) for chunk in chunks]
        sets = self._stratum_weights(rollout)
        totals = [stratum_totals(*rows, len(sets)) for rows in zip(lengths, strata, strict=True)]
        totals = torch.stack(totals).unflatten(0, (-1, slots)).sum(dim=1)
        totals = self._all_reduce(totals)
        tokens = totals[..., 1].sum()
        everything = totals[..., 0].sum(dim=1)
        counted = everything - totals[:, UNTAGGED, 0]
        weights = None
        if args.tag_weights == "adaptive":
            weights = torch.tensor([*map(self.tag_weights.weight, TAGS), 0.0], device=tokens.device)
        for i, chunk in enumerate(chunks):
            step = totals[i // slots]
            scale = row_coefficients(
                lengths[i], strata[i], sets, args.loss_aggregation, self.max_completion_length, step
            )
            if weights is not None:
                scale = scale * weights[chunk[TAG_KEY]]
            if args.loss_type == "sapo":  # TRL takes a mean over tokens, rows, micro-batches and ranks
                scale = scale * lengths[i].clamp(min=1) * chunk.rows * slots * world
                penalty = remaining_scale(float(counted[i // slots]), float(everything[i // slots]))
            else:  # TRL divides by the tokens of an average optimizer step
                scale = scale * tokens * slots / args.steps_per_generation
                penalty = float(counted[i // slots] > 0)
            chunk[SCALE_KEY] = torch.full_like(scale, penalty)
            advantages = chunk["advantages"]
            chunk["advantages"] = advantages * (scale if advantages.dim() == 1 else scale[:, None])
            chunk["num_items_in_batch"] = tokens
        return totals

    def _strata(self, chunk: Batch, rollout: Rollout) -> Tensor:
        """
        Return the number of each row's stratum of the loss, shape (N,).

        What does not count (padding rows, unscorable completions) has its own, `UNTAGGED`. The tags' left-over rows
        are one batch like any other, so they are one mean, in which each row has its tag's weight.
        """
        tags = chunk[TAG_KEY]
        of_all_tags = self.args.batching == "stratified" and rollout.stratum == MIXED
        by_tag = self.args.loss_strata == "tag" and not of_all_tags
        return tags if by_tag else torch.where(tags == UNTAGGED, tags, 0)

    def _stratum_weights(self, rollout: Rollout) -> dict[int, float]:
        """Return the weight of each stratum, by number, beside the weights of tags."""
        return dict.fromkeys(range(UNTAGGED + 1), 1.0)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        flight = self._flight
        rows = flight.kept if isinstance(flight, RolloutInFlight) else None
        if rows is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        logps = torch.full((len(input_ids), logits_to_keep), torch.nan, device=input_ids.device)  # unknown
        padded = self._as_many_on_all_ranks(rows)
        if padded:
            prompts = flight.prompts and [flight.prompts[i] for i in padded]
            with self._in_flight(replace(flight, prompts=prompts, kept=None)):
                found, *_ = super()._get_per_token_logps_and_entropies(
                    model, input_ids[padded], attention_mask[padded], logits_to_keep, *args, **kwargs
                )
            logps[padded] = found.to(logps.dtype)
        return logps, None, None

    def _as_many_on_all_ranks(self, rows: list[int]) -> list[int]:
        """Return this rank's rows, some of them again where the ranks wait for each other's passes."""
        if not self._same_towers:
            return rows
        most = int(self.accelerator.gather(torch.tensor([len(rows)], device=self.accelerator.device)).max())
        return rows + (rows[:1] or [0]) * (most - len(rows))

    def _end_pass(self, flight: PassInFlight, loss: Tensor) -> None:
        super()._end_pass(flight, loss)
        if TAG_KEY in flight.inputs:
            self._add_to_optimizer_step(flight)

    def training_step(self, model, inputs, num_items_in_batch):
        step = self._optimizer_step
        step.began = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        step.seconds += time.perf_counter() - step.began
        if self._step % self._updates_per_rollout == 0 and self.schedule is not None and self.schedule.exhausted:
            self._end_epoch()
        return loss

    def _end_epoch(self) -> None:
        """End the epoch where the schedule does, which may be before the data loader does."""
        self.control.should_epoch_stop = True
        if self.args.max_steps <= 0 and self.schedule.epoch + 1 >= self.state.num_train_epochs:
            self.state.max_steps = self.state.global_step + 1  # the step that saves and evaluates as the last one does

    # Metrics

    def _compared(self, rollout: Rollout) -> Tensor:
        # `tag` takes the deviation of other prompts too, but the mean of a prompt's own: alike is 0 there as well.
        if self.num_generations == 1 or not lifts_equal_rewards(self.args.advantage_scope):
            return super()._compared(rollout)
        return rollout.rewards.view(1, -1)  # also among the prompts of a rollout

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

    def _add_to_optimizer_step(self, flight: PassInFlight) -> None:
        logps, entropies, inputs = flight.logps.detach(), flight.entropies.detach(), flight.inputs
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
        self._optimizer_step.sums.add(inputs[TAG_KEY], sums, mask.sum(dim=1))

    def on_optimizer_step(self) -> None:
        super().on_optimizer_step()
        step, self._optimizer_step = self._optimizer_step, self._new_step()
        step.seconds += time.perf_counter() - step.began
        step.sums.reduce(self._all_reduce)
        tags = step.sums.tags()
        step.tag = tags[0] if len(tags) == 1 else None
        step.counts = self._step_counts
        self._ended_step = step
        self._means["train"].add(step.sums.totals())
        self._log_of_optimizer_step("seconds", step.seconds)
        if self._gradient_sample is not None and step.counts:
            self._probe_gradient(step.tag)

    def _log_of_optimizer_step(self, name: str, value: float) -> None:
        """Log a value of a whole optimizer step, and under its tag where all its rows have one."""
        for whose in ("all", self._ended_step.tag):
            if whose is not None:
                self._log_all({f"tag/{whose}/{name}": value})

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self._ended_step.counts:
            self._log_of_optimizer_step("grad_norm", norm)
        return norm

    def _probe_gradient(self, tag: ModalityTag | None) -> None:
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        self.gradient_moments.observe(self._gradient_sample() / scale, tag)
        self._log_all(self.gradient_moments.metrics())

    # State

    def _resume_signature(self) -> dict[str, Any]:
        if not self.args.tag_aware:
            return super()._resume_signature()
        names = ("batching", "leftover", "curriculum", "curriculum_granularity", "dynamic_sampling", "loss_strata")
        if self.args.dynamic_sampling != "none":
            names = (*names, "revisit", "revisit_after")
        return super()._resume_signature() | {name: getattr(self.args, name) for name in names}

    def state_parts(self) -> list[StatePart]:
        count = 0 if self._gradient_sample is None else self._gradient_sample.count
        parts = super().state_parts()
        if self.schedule is not None:
            parts.append(self._progress)
        if self.schedule is not None or count:
            parts.append(ProbeState(self.gradient_moments, count))
        return parts

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or self.schedule is None:
            return trained
        step = self._progress.loaded_step
        if self.schedule.exhausted and step % self._updates_per_rollout == 0:
            return self.schedule.epoch + 1, 0
        return max(self.schedule.epoch, 0), step - self._progress.epoch_began

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        measured = self.args.curriculum == "adaptive" and self.args.zero_shot_accuracy is None
        if measured and resume_from_checkpoint is None:
            accuracy = zero_shot_accuracy(self, self._task_reward, self.initial_weights)
            self.curriculum.load_state_dict({"histories": {}, "zero_shot": accuracy})
        return prepared


def _check_tags(dataset: Any, trainer: str) -> None:
    if dataset is None:
        return
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{trainer} batches rows by tag, so it needs a map-style Dataset, got {type(dataset).__name__}"
        )
    if "tag" not in dataset.column_names:
        raise ValueError(
            f"train_dataset has no column 'tag' (its columns: {', '.join(dataset.column_names)}): {trainer} needs each "
            f"row's required modality tag, one of {', '.join(ModalityTag)}"
        )
    check_row_tags(dataset["tag"])
