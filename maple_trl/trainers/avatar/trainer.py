"""AVATAR: GRPO with stratified replay and temporal advantage shaping (arXiv 2508.03100)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import ceil
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler

from maple_trl.algorithms import (
    Experience,
    HintTrigger,
    StratifiedSchedule,
    Vcrs,
    group_advantages,
    policy_divergence,
    remaining_scale,
    replay_advantages,
    tas_weights,
    term_scales,
)
from maple_trl.hub.papers import AVATAR
from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.omni.host_memory import host_memory
from maple_trl.trainers.avatar.accounts import AccountsMixin
from maple_trl.trainers.avatar.checks import (
    check_columns,
    check_dropout,
    check_hint_visits,
    check_hints,
    check_places,
    check_tags,
    check_visits,
)
from maple_trl.trainers.avatar.config import AvatarConfig
from maple_trl.trainers.avatar.gradient_terms import TermGradients
from maple_trl.trainers.avatar.metrics import PassSums, pass_metrics
from maple_trl.trainers.avatar.mixed_rollout import MixedRollout
from maple_trl.trainers.avatar.replay_memory import PassRecord, ReplayMemory, ReplayPlan
from maple_trl.trainers.avatar.replayed_batch import replayed_batch
from maple_trl.trainers.avatar.shown_rows import Shown, ShownRowsMixin
from maple_trl.trainers.avatar.state import STATE_FILE, MemoryState, provenance
from maple_trl.trainers.common.batch import (
    FRESH_SCALE_KEY,
    NUMBER_KEY,
    PROMPTS_KEY,
    REPLAYED_KEY,
    UNSCORABLE_KEY,
    Batch,
)
from maple_trl.trainers.common.checkpoint import StatePart
from maple_trl.trainers.common.hinted_rows import HINT_COLUMN
from maple_trl.trainers.common.rollout import Assignment, PassInFlight, Rollout, RolloutInFlight, Round
from maple_trl.trainers.common.samplers import StratifiedSampler
from maple_trl.trainers.common.tag_metrics import UNTAGGED
from maple_trl.trainers.common.trl_compat import lent
from maple_trl.trainers.mapo.trainer import MAPOTrainer


class AvatarTrainer(ShownRowsMixin, AccountsMixin, MAPOTrainer):
    """
    GRPO that replays completions, shapes advantages and gives hints to prompts that are stuck.

    The method is that of AVATAR (arXiv 2508.03100), section 4.

    Each group mixes fresh completions with replayed ones, drawn by tier of difficulty out of a buffer. Replayed ones
    are held against a moving baseline of their own prompt (VCRS). Advantages are shaped over token positions (TAS).

    With `replayed_generations=0` and `tas_lambda=0` it is TRL's GRPO. What [`MAPOTrainer`] does by tag (weights, curriculum,
    filtering, strata of the loss) can be switched on beside it: `AvatarConfig(method="mapo")`.

    Args:
        model, reward_funcs, eval_dataset, processing_class, kwargs: as in [`OmniGRPOTrainer`].
        args ([`AvatarConfig`], *optional*): configuration.
        train_dataset: as in [`OmniGRPOTrainer`]; with `hints=True` a column `hint`, where an option goes by tag a `tag`
            in each row.

    Raises:
        RowError: for the first row that cannot be a prompt, with or without its hint.
        ValueError: when options do not fit together.
    """

    _tag_names = ["trl", "grpo", "omni", "avatar", "maple-trl"]
    _name = "AVATAR"
    _config_class = AvatarConfig
    _read_columns = (*MAPOTrainer._read_columns, HINT_COLUMN)
    _failed_is_zero = False
    replaceable_state = (STATE_FILE,)  # see `replay_recovery`
    _paper = AVATAR

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: AvatarConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, **kwargs)
        args = self.args
        check_tags(args, self.train_dataset)
        check_hints(args, self.train_dataset, None if self.family is None else self.prompt_builder)
        check_hint_visits(args, self.train_dataset)
        self._set_signature_columns_if_needed()
        check_columns(args, self.train_dataset, self._signature_columns)
        check_places(args, self.accelerator.num_processes)
        check_dropout(args, self.model)
        check_visits(args, self.train_dataset)

    def _check_rows(self, args: AvatarConfig | None, dataset: Any) -> None:
        if getattr(args, "tag_aware", False):
            super()._check_rows(args, dataset)

    def _begin_run(self) -> None:
        super()._begin_run()
        self._forget_rows()
        self._digests: dict[str, str] | None = None
        self._empty_memory()
        self._begin_passes()

    def _empty_memory(self) -> None:
        args = self.args
        self.memory = ReplayMemory(
            args.new_buffer(),
            Vcrs(args.vcrs_window),
            args.replayed_generations,
            HintTrigger(args.hint_visits, args.hint_max_kl) if args.hints else None,
            args.hint_below,
            args.replay_retier,
            args.replay_scope,
            args.replay_draw,
            self._tag_of if args.batching == "stratified" else None,
            args.replay_min_size,
        )

    # Rows

    def row_order(self, dataset: Dataset | None) -> Sampler | None:
        if self.args.tag_aware or self.args.batching == "mixed":
            return super().row_order(dataset)
        schedule = StratifiedSchedule(
            (dataset or self.train_dataset)["tag"],
            self.args.prompts_per_rollout,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )
        return StratifiedSampler(schedule, self.num_generations, self._updates_per_rollout)

    # Rollout

    def _roll_out(self, rows: list[dict[str, Any]], prompts: list[EncodedPrompt] | None) -> Round:
        if not self.model.training or not self.args.replayed_generations:
            r = super()._roll_out(rows, prompts)
            if self.model.training:
                r.batch[REPLAYED_KEY] = torch.zeros_like(r.batch["advantages"], dtype=torch.long)
            return r
        slots = list(zip(rows, prompts or [None] * len(rows), strict=True))
        plan = self._plan(slots)
        first = self.accelerator.process_index * len(slots)
        own, fresh = range(first, first + len(slots)), plan.fresh
        generated = [place for place in own if fresh[place]]
        shown = [self._shown(*slots[place - first], plan.hinted[place // plan.group_size]) for place in generated]
        batch, rollout = self._complete_fresh(plan, shown)
        step = self.state.global_step
        rewards, scores = rollout.rewards[rollout.fresh], rollout.scores[rollout.fresh]
        experiences = self.memory.learn(plan, rewards, scores, self.reward_func_names, step)
        of_place = dict(zip(plan.places(replayed=True), experiences, strict=True))
        replayed = {place: (*slots[place - first], of_place[place]) for place in own if place in of_place}
        lost: set[int] = set()
        if self.memory.scope != "prompt":
            replayed, lost = self._with_own_prompts(replayed)
        batch.setdefault(
            "old_per_token_logps", torch.full_like(batch["completion_ids"], torch.nan, dtype=torch.float32)
        )
        batch[REPLAYED_KEY] = torch.zeros_like(batch["advantages"], dtype=torch.long)
        if replayed:
            parts = [batch, self._replayed_batch(list(replayed.values()), batch)]
            batch = Batch.concat(parts, self._tokenizer.pad_token_id)
        places = generated + list(replayed)
        batch[NUMBER_KEY] = torch.tensor(places, device=self.accelerator.device) + plan.first_number
        mixed = self._mixed(plan, rollout, of_place, lost)
        # TRL took each fresh completion for a group.
        self._metrics["train"]["frac_reward_zero_std"][-1] = float((~mixed.informative).float().mean())
        return Round(batch, mixed, places)

    def _plan(self, slots: Sequence[Shown]) -> ReplayPlan:
        """Plan which of all ranks' completions are generated and which are replayed; a refill replays nothing."""
        rounds, size = self._flight.rounds, self.num_generations
        if not rounds:
            self._hinted_prompts = {}
        places = gather_object([self._group_of(*slot) for slot in slots])
        groups = [
            replace(places[i], has_hint=all(place.has_hint for place in places[i : i + size]))
            for i in range(0, len(places), size)
        ]
        empty = None
        if rounds:  # groups as small as those that they stand in for
            first = rounds[0].rollout
            empty = ceil(int(first.replayed.sum()) / first.prompts)
        return self.memory.plan(groups, size, self.state.global_step, self.accelerator.num_processes, empty)

    def _complete_fresh(self, plan: ReplayPlan, shown: Sequence[Shown]) -> tuple[Batch, Rollout]:
        """Let TRL generate and score rows that are no whole groups; its advantages are replaced afterwards."""
        rows, prompts = (list(part) for part in zip(*shown, strict=True))
        device = self.accelerator.device
        fresh = torch.tensor(plan.fresh, device=device)
        tags = torch.tensor([group.tag for group in plan.groups], device=device).repeat_interleave(plan.group_size)
        applies = [self.memory.scored_by(group.key, self.reward_func_names) for group in plan.groups]
        applies = torch.tensor(applies, device=device).repeat_interleave(plan.group_size, dim=0)[fresh]
        flight = RolloutInFlight(
            None if self.family is None else prompts, rows, plan.group_size, fresh, place_tags=tags, applies=applies
        )
        with lent(self, num_generations=1):
            return self._complete(flight)

    def _mixed(
        self, plan: ReplayPlan, rollout: Rollout, experiences: dict[int, Experience], lost: set[int]
    ) -> MixedRollout:
        """
        Put what all ranks generated and replayed into the places of one rollout.

        Args:
            experiences: the replayed completions of all ranks, by place.
            lost: places of those whose media have gone.
        """
        device, count = rollout.rewards.device, len(plan.replayed)
        past = torch.full((2, count), torch.nan, dtype=torch.float64)
        tags, own = torch.full((count,), UNTAGGED), torch.zeros(count, dtype=torch.bool)
        for place, experience in experiences.items():
            group = plan.groups[place // plan.group_size]
            past[0, place], past[1, place] = experience.reward, self.memory.vcrs.baseline(experience.prompt)
            own[place] = experience.prompt == group.key
            if place not in lost:
                tags[place] = group.tag if own[place] else self._tag_of(experience)
        return MixedRollout(
            **{f.name: getattr(rollout, f.name) for f in fields(rollout)},
            replayed=torch.tensor(plan.replayed, device=device),
            past=past[0].to(device),
            baselines=past[1].to(device),
            past_tags=tags.to(rollout.tags),
            own=own.to(device),
            hinted=torch.tensor(plan.hinted, device=device),
        )

    def assign(self, rollout: Rollout) -> Assignment | None:
        """
        Scale rewards as [`MAPOTrainer.assign`] does, those of replayed completions against their prompts' baselines.

        Those baselines are VCRS (AVATAR, arXiv 2508.03100, eq. 11); replayed completions are trained on whatever is filtered.

        Args:
            rollout (`Rollout`): the completions of all ranks, scored; of replayed ones the rewards that they once had.

        Returns:
            `Assignment` or `None`: `None` where nothing is replayed and no tag counts, so that TRL's advantages stay.
        """
        if self.args.tag_aware:
            assigned = super().assign(rollout)
        elif self.args.replayed_generations:
            assigned = Assignment(self._advantages(rollout), torch.ones_like(rollout.fresh))
        else:
            return None
        if not self.args.replayed_generations:
            return assigned
        self._log_rollout(rollout, assigned.advantages)
        self._note_replayed_advantages(assigned.advantages)
        self._let_go(rollout, assigned.kept)
        kept = (assigned.kept & rollout.fresh) | rollout.replayed
        return Assignment(assigned.advantages, kept)

    def _advantages(self, rollout: Rollout) -> Tensor:
        if not self.args.replayed_generations:
            return super()._advantages(rollout)
        fresh, replayed, scope = rollout.fresh, rollout.replayed, self.args.advantage_scope
        rewards, groups, past = rollout.rewards[fresh], rollout.groups[fresh], rollout.past[replayed]
        off_policy = replay_advantages(past, rollout.baselines[replayed], self.args.replay_advantage_limit)
        if len(past):
            self._log_all({"replay/advantage_mean": float(off_policy.mean())})
        if self.args.advantage_group == "mixed":
            everyone = torch.cat([rewards.double(), past]), torch.cat([groups, rollout.replayed_groups])
            on_policy = group_advantages(*everyone, torch.zeros_like(everyone[1]), "group")[: len(rewards)]
        else:
            tags = torch.zeros_like(groups) if scope in ("group", "batch") else rollout.tags[fresh]
            on_policy = group_advantages(rewards, groups, tags, scope)
        advantages = torch.zeros(len(fresh), dtype=on_policy.dtype, device=on_policy.device)
        advantages[fresh], advantages[replayed] = on_policy, off_policy
        return advantages

    def _note_rewards(self, rollout: Rollout) -> None:
        super()._note_rewards(rollout)
        if self.args.replayed_generations and self.args.replay_alpha:
            replayed = rollout.replayed
            self.tally.checks.note_rewards(torch.stack([rollout.past, rollout.baselines], dim=1)[replayed])

    def _note_replayed_advantages(self, advantages: Tensor) -> None:
        """Take down the advantages of this rank's replayed completions, for the file of the rollout."""
        for r, own in self._flight.placed():
            told = r.batch[REPLAYED_KEY].bool() & r.batch["completion_mask"].any(
                dim=1
            )  # not of those whose media have gone
            places = torch.tensor(r.places, device=advantages.device)[told]
            self.rollout_log.note_replayed_advantages(self, advantages[own][places].tolist())

    def _kept_groups(self, rollout: Rollout) -> Tensor:
        kept = super()._kept_groups(rollout)
        if not self._dropping or not self.args.replayed_generations:
            return kept
        room = self.args.generation_batch_size - int(rollout.replayed.sum())
        sizes = rollout.fresh.view(-1, rollout.group_size).sum(dim=1)
        return kept & ((sizes * kept).cumsum(0) <= room)

    def _let_go(self, rollout: MixedRollout, kept: Tensor) -> None:
        """
        Forget fresh completions that are not trained on, so that they are not stored for replay.

        Those that hints wait for are stored all the same: how far the policy has moved on a stuck prompt can only be
        told from completions of it.
        """
        if not self._dropping:
            return
        left_out = (rollout.fresh & ~kept & ~rollout.rewards.isnan()).tolist()
        for r, own in self._flight.placed():
            number_of = int(r.batch[NUMBER_KEY][0]) - r.places[0]  # of the round's first place
            dropped = {number_of + place for place, left in enumerate(left_out[own]) if left}
            watched = {number for number in dropped if self.memory.watches(number)}
            self._store_unseen(r.batch, [i for i, n in enumerate(r.batch[NUMBER_KEY].tolist()) if n in watched])
            self.memory.drop(dropped - watched)

    @torch.no_grad()
    def _store_unseen(self, batch: Batch, rows: list[int]) -> None:
        """
        Compute log-probabilities of rows that no training pass will see, so that they can be stored; a collective call.

        Args:
            batch: this rank's completions of a round.
        """
        if not any(gather_object([len(rows)])):
            return
        batch = batch.take(self._as_many_on_all_ranks(rows))
        if not batch.rows:
            return
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width, size = batch["completion_ids"].size(1), self.args.per_device_train_batch_size
        with self._in_flight(PassInFlight(batch.prompts, inputs=batch)) as flight:
            self._get_per_token_logps_and_entropies(self.model, ids, mask, width, batch_size=size)
        columns = (batch["completion_ids"].cpu(), flight.logps.cpu(), batch["completion_mask"].bool().cpu())
        for completion in list(zip(batch[NUMBER_KEY].tolist(), *columns, strict=True))[: len(rows)]:
            self._written.add_completion(*completion)

    def _replayed_batch(
        self,
        replayed: list[tuple[dict[str, Any], EncodedPrompt | None, Experience | None]],
        like: Batch,
    ) -> Batch:
        """Make a batch of replayed completions under their own prompts, with the fields of the batch `like`."""
        shown = [self._shown(row, prompt, e is not None and e.hinted) for row, prompt, e in replayed]
        prompts = [prompt for _, prompt in shown]
        if self.family is None:
            prompt_ids = self._tokenize_prompts([row["prompt"] for row, _ in shown])[0]
        else:
            prompt_ids = [prompt.input_ids for prompt in prompts]
        experiences = [experience for *_, experience in replayed]
        self.rollout_log.note_replayed(self, shown, experiences)
        batch = replayed_batch(prompt_ids, experiences, like, self._tokenizer.pad_token_id)
        if self.family is not None:
            batch[PROMPTS_KEY] = prompts
        return batch

    # Updates

    def _weigh(self, chunks: list[Batch], rollout: Rollout) -> None:
        if self.args.replayed_generations and not self.args.tag_aware:
            self._balance(chunks, rollout)
        if self.args.tas_lambda:  # by a token's place in its completion (AVATAR eq. 6)
            for chunk in chunks:
                weights = tas_weights(chunk["completion_mask"], self.args.tas_lambda, self.args.tas_shape)
                chunk["advantages"] = chunk["advantages"][:, None] * weights
        super()._weigh(chunks, rollout)

    def _balance(self, chunks: list[Batch], rollout: MixedRollout) -> None:
        """
        Scale the advantages so that TRL's mean over all completions becomes J_on + alpha J_off (AVATAR eq. 3).

        The surrogates are linear in the size of the advantage, so a term's weight can stand in it.
        """
        totals = torch.stack([self._counts_of_terms(chunk) for chunk in chunks]).sum(dim=0)
        fresh, past, lost, tokens = self._all_reduce(totals).tolist()
        filled = rollout.filled(self.args.replayed_generations)
        fresh_scale, replayed_scale = term_scales(fresh, past, filled, self.args.replay_alpha, lost)
        for chunk in chunks:
            replayed = chunk[REPLAYED_KEY].bool()
            if past or lost:
                chunk["advantages"] = chunk["advantages"] * torch.where(replayed, replayed_scale, fresh_scale)
            chunk["num_items_in_batch"] = torch.full_like(chunk["num_items_in_batch"], int(tokens))
            chunk[FRESH_SCALE_KEY] = torch.full_like(chunk["advantages"], fresh_scale)

    def _counts_of_terms(self, chunk: Batch) -> Tensor:
        """Count fresh, replayed and unscorable completions (or tokens) in TRL's mean, and all tokens; shape (4,)."""
        replayed = chunk[REPLAYED_KEY].bool()
        lengths = chunk["completion_mask"].sum(dim=1)
        counted = lengths if self.loss_type in ("dapo", "cispo") else torch.ones_like(lengths)
        unscorable = chunk[UNSCORABLE_KEY].bool() if UNSCORABLE_KEY in chunk else torch.zeros_like(replayed)
        parts = [~replayed & ~unscorable, replayed, unscorable]
        return torch.stack([*(counted[part].sum() for part in parts), lengths.sum()]).double()

    def _fold_weights(self, chunks: list[Batch], rollout: Rollout) -> Tensor:
        totals = super()._fold_weights(chunks, rollout)
        if self.args.replayed_generations and self.beta:
            by_rows = self.args.loss_type == "sapo"  # TRL's mean is over a step's rows, else over a rollout's tokens
            counts = totals[..., 0] if by_rows else totals[..., 1].sum(dim=0, keepdim=True).expand(totals.shape[:2])
            fresh = counts[:, :UNTAGGED].sum(dim=1).tolist()
            everything = (counts.sum(dim=1) - counts[:, UNTAGGED]).tolist()
            slots = self.args.gradient_accumulation_steps
            for i, chunk in enumerate(chunks):
                scale = remaining_scale(fresh[i // slots], everything[i // slots])
                chunk[FRESH_SCALE_KEY] = torch.full((chunk.rows,), scale, device=totals.device)
        return totals

    def _strata(self, chunk: Batch, rollout: Rollout) -> Tensor:
        """Return each row's stratum of the loss, shape (N,): replayed rows have their own, numbered after fresh ones."""
        strata = super()._strata(chunk, rollout)
        replayed = chunk[REPLAYED_KEY].bool() & (strata != UNTAGGED)
        return torch.where(replayed, strata + UNTAGGED + 1, strata)

    def _stratum_weights(self, rollout: Rollout) -> dict[int, float]:
        own = super()._stratum_weights(rollout)
        if not self.args.replayed_generations:
            return own
        weight = self.args.replay_alpha * rollout.filled(self.args.replayed_generations)
        return own | dict.fromkeys(range(UNTAGGED + 1, 2 * UNTAGGED + 1), weight)

    def _counts_of_mean(self, chunks: list[Batch]) -> Tensor:
        counts = super()._counts_of_mean(chunks)
        if not self.args.replayed_generations or not self.model.training:
            return counts
        # `_balance` has scaled the terms; here it is said which optimizer steps have something to count.
        return (counts[:, :1] > 0).expand_as(counts).to(counts)

    # Loss

    def _compute_loss(self, model, inputs):
        if REPLAYED_KEY not in inputs:
            return super()._compute_loss(model, inputs)
        with lent(self, **self._objective_of(inputs)):
            return super()._compute_loss(model, inputs)

    def _end_pass(self, flight: PassInFlight, loss: Tensor) -> None:
        super()._end_pass(flight, loss)
        if REPLAYED_KEY in flight.inputs:
            self._record(flight)
            self._probe_terms(loss, flight)
            if self.beta:
                self._correct_divergence(flight.inputs)

    def _probe_terms(self, loss: Tensor, flight: PassInFlight) -> None:
        """Add up the gradients of J_on and of J_off, at the optimizer steps at which they are asked for."""
        if not self._steps_between_probes:
            return
        # Nothing is replayed at the first step.
        if self.state.global_step % self._steps_between_probes != 1 % self._steps_between_probes:
            return
        if self._terms is None:
            self._terms = TermGradients([p for p in self.model.parameters() if p.requires_grad])
        self._terms.add(loss, flight.logps, flight.inputs[REPLAYED_KEY].bool())

    @property
    def _steps_between_probes(self) -> int:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        reentrant = self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get(
            "use_reentrant"
        )
        if not self.args.replayed_generations or sharded or reentrant:
            return 0
        return self.args.replay_gradient_steps

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        flight = self._flight
        if isinstance(flight, PassInFlight) and REPLAYED_KEY in flight.inputs:
            # TRL reads them after this pass. Unknown ones are those of the pass itself.
            for name in ("old_per_token_logps", "ref_per_token_logps"):
                values = flight.inputs.get(name)
                if values is not None:
                    flight.inputs[name] = torch.where(values.isnan(), found[0].detach(), values)
        return found

    def _objective_of(self, inputs: Batch) -> dict[str, Any]:
        """Return settings of TRL's loss: the clip of each row, and the weight of a penalty over fresh rows alone."""
        settings: dict[str, Any] = {}
        replayed = inputs[REPLAYED_KEY].bool()[:, None]
        clips = {"epsilon_low": self.args.replay_epsilon, "epsilon_high": self.args.replay_epsilon_high}
        if any(value is not None and value != getattr(self, name) for name, value in clips.items()):
            for name, value in clips.items():
                settings[name] = torch.where(
                    replayed, getattr(self, name) if value is None else value, getattr(self, name)
                )
        if self.beta and len(replayed) and FRESH_SCALE_KEY in inputs:
            settings["beta"] = self.beta * float(inputs[FRESH_SCALE_KEY].flatten()[0])
        return settings

    def _record(self, flight: PassInFlight) -> None:
        """Take down, from a training pass, fresh completions' log-probabilities and replayed ones' ratios."""
        inputs, logps = flight.inputs, flight.logps.detach()
        mask, replayed = inputs["completion_mask"], inputs[REPLAYED_KEY].bool()
        old = inputs.get("old_per_token_logps")
        log_ratios = torch.zeros_like(logps) if old is None else (logps - old) * mask
        advantages = inputs["advantages"]
        signal = (log_ratios.exp() * (advantages if advantages.dim() == 2 else advantages[:, None])).abs()
        self._sums.add_signal(signal, mask)
        if NUMBER_KEY not in inputs:
            return
        divergences = (policy_divergence(log_ratios) * mask).sum(dim=1).tolist()
        numbers, flags, lengths = torch.stack([inputs[NUMBER_KEY], replayed.long(), mask.bool().sum(dim=1)]).tolist()
        # All rows at once: for each copy the host waits until the device has come so far.
        ids, tokens, old, log_ratios = (
            None if values is None else values.cpu()
            for values in (inputs["completion_ids"], mask.bool(), old, log_ratios)
        )
        for i, number in enumerate(numbers):
            if flags[i]:
                self._sums.add_log_ratios(log_ratios[i][tokens[i]])
            if not self.memory.waits_for(number):
                continue
            if flags[i]:
                self._written.divergences.append((number, divergences[i], float(lengths[i])))
            else:
                self._written.add_completion(number, ids[i], old[i], tokens[i])

    def _correct_divergence(self, inputs: Batch) -> None:
        """Replace the logged KL, which TRL averages over all tokens, by the mean over those of fresh completions."""
        lengths = inputs["completion_mask"].sum(dim=1)
        fresh = lengths[~inputs[REPLAYED_KEY].bool()].sum()
        fresh, everything = self._all_reduce(torch.stack([fresh, lengths.sum()]).double()).tolist()
        logged = self._metrics["train"]["kl"]
        logged[-1] = logged[-1] * everything / fresh if fresh else float("nan")

    def _begin_passes(self) -> None:
        """Reset what the passes of an optimizer step have shown."""
        self._written = PassRecord()
        self._sums = PassSums()
        self._terms: TermGradients | None = None

    def on_optimizer_step(self) -> None:
        super().on_optimizer_step()
        found = gather_object([(self._written, self._sums)])
        self._log_all(pass_metrics([sums for _, sums in found]))
        if self._terms is not None:
            self._log_all(self._terms.metrics(lambda tensor: self.accelerator.reduce(tensor, "mean")))
        if self.args.replayed_generations:
            self.memory.write([written for written, _ in found])
            # The engine fails within a rollout, of which completions are stored until now. A resumed run discards at once.
            self._discard_quarantined()
            host_memory().hold("replay", self.memory, self.memory.nbytes)
            for name, value in self.memory.metrics().items():
                self._metrics["train"][name] = [value]  # as things stand, not a mean since the last entry
        self._begin_passes()

    # State

    def _resume_signature(self) -> dict[str, Any]:
        names = ("replayed_generations", "advantage_group", "batching", "hints", "vcrs_window")
        return super()._resume_signature() | {name: getattr(self.args, name) for name in names}

    def state_parts(self) -> list[StatePart]:
        parts = super().state_parts()
        if self.args.replayed_generations:
            recovery = self.args.replay_recovery
            parts.append(MemoryState(self.memory, lambda: self._provenance, recovery, self._empty_memory))
        return parts

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and self.args.replayed_generations:
            self._discard_quarantined()
        return trained

    @property
    def _provenance(self) -> dict[str, str]:
        if self._digests is None:
            self._digests = provenance(
                self.args,
                self.train_dataset,
                self.reward_func_names,
                self.reward_weights,
                self._tokenizer,
                self.processing_class,
            )
        return self._digests
