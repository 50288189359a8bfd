"""AVATAR: GRPO with stratified replay and temporal advantage shaping (arXiv 2508.03100)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler

from maple_trl.algorithms import (
    Experience,
    HintTrigger,
    ReplayStateError,
    StratifiedSchedule,
    Vcrs,
    group_advantages,
    informative_groups,
    policy_divergence,
    replay_advantages,
    tas_weights,
    term_scales,
)
from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.omni.errors import MediaError
from maple_trl.trainers.avatar.checks import check_dropout, check_hints, check_places, check_tags, check_visits
from maple_trl.trainers.avatar.config import AvatarConfig
from maple_trl.trainers.avatar.gradient_terms import TermGradients
from maple_trl.trainers.avatar.metrics import PassSums, pass_metrics
from maple_trl.trainers.avatar.replay_memory import Group, PassRecord, ReplayMemory, ReplayPlan
from maple_trl.trainers.avatar.state import STATE_FILE, load_memory, provenance, save_memory
from maple_trl.trainers.common.checkpoint import Batch, LostPromptsError, ResumeError, concat_rows
from maple_trl.trainers.common.hinted_rows import (
    HINT_COLUMN,
    HINTED,
    has_hint,
    prompt_key,
    row_digest,
    row_key,
    with_hint,
)
from maple_trl.trainers.common.run_summary import Note, make_note, plural
from maple_trl.trainers.common.samplers import StratifiedSampler
from maple_trl.trainers.common.tag_metrics import tag_number, totals_by_tag
from maple_trl.trainers.omni_grpo.trainer import PROMPTS_KEY, UNSCORABLE_KEY, OmniGRPOTrainer


logger = logging.getLogger(__name__)

REPLAYED_KEY = "replayed"
NUMBER_KEY = "completion_numbers"
FRESH_SCALE_KEY = "fresh_scale"


class AvatarTrainer(OmniGRPOTrainer):
    """
    AVATAR's off-policy GRPO: each group mixes fresh completions with replayed ones, drawn by tier of difficulty out of a
    buffer; replayed ones are held against a moving baseline of their own prompt (VCRS); advantages are shaped over token
    positions (TAS); prompts that are stuck are shown with a hint.

    With `replayed_generations=0` and `tas_lambda=0` it is TRL's GRPO.

    Args:
        model, reward_funcs, eval_dataset, processing_class, kwargs: as in [`OmniGRPOTrainer`].
        args ([`AvatarConfig`], *optional*): configuration.
        train_dataset: as in [`OmniGRPOTrainer`]; with `hints=True` a column `hint`, with scopes or batches by tag a `tag`
            in each row.

    Raises:
        RowError: for the first row that cannot be a prompt, with or without its hint.
        ValueError: when options do not fit together.
    """

    _tag_names = ["trl", "grpo", "omni", "avatar", "maple-trl"]
    _name = "AVATAR"
    _config_class = AvatarConfig
    _failed_is_zero = False
    replaceable_state = (STATE_FILE,)  # see `replay_recovery`
    _paper = {
        "title": "AVATAR: Reinforcement Learning to See, Hear, and Reason Over Video",
        "id": "2508.03100",
    }

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
        check_places(args, self.accelerator.num_processes)
        check_dropout(args, self.model)
        check_visits(args, self.train_dataset)
        self._begin_run()

    def _begin_run(self) -> None:
        """Nothing of a run before this one is left, wherever it stopped."""
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
        )
        self._scores: Tensor | None = None
        self._rollout: ReplayPlan | None = None
        self._hinted_prompts: dict[str, EncodedPrompt | None] = {}
        self._digests: dict[str, str] | None = None
        self._numbers: dict[str, int] | None = None
        self._tags: list[int] | None = None
        self._filling: Batch | None = None
        self._logps: Tensor | None = None
        self._graph_logps: Tensor | None = None
        self._begin_optimizer_step()

    def train(self, *args, **kwargs):
        self._begin_run()
        return super().train(*args, **kwargs)

    # Rows

    def _row_order(self, dataset: Dataset | None) -> Sampler | None:
        if self.args.batching == "mixed":
            return super()._row_order(dataset)
        schedule = StratifiedSchedule(
            (dataset or self.train_dataset)["tag"],
            self.args.generation_batch_size // self.num_generations,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )
        return StratifiedSampler(schedule, self.num_generations, self._updates_per_rollout)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, HINT_COLUMN]

    def encode_rows(self, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[EncodedPrompt]]:
        known = len(self.row_encoder.quarantined)
        encoded = super().encode_rows(rows)
        if len(self.row_encoder.quarantined) > known:
            self._discard_quarantined()
        return encoded

    def _discard_quarantined(self) -> None:
        """What cannot be shown any more cannot be replayed; quarantine.json names the reasons."""
        reasons = {} if self.family is None else {prompt.key: prompt.detail for prompt in self.row_encoder.quarantined}
        for key in self.memory.buffer.prompts() if reasons else ():
            reason = reasons.get(prompt_key(key))
            if reason is not None:
                count = self.memory.buffer.discard(key)
                logger.warning("%d completions of prompt %s are not replayed: %s", count, key, reason)

    def _group_of(self, row: dict[str, Any], prompt: EncodedPrompt | None) -> Group:
        key, number = row_key(row, prompt), -1
        if prompt is not None:
            registry = self.row_encoder.registries.get("train_dataset")
            number = registry.row_number(prompt.key) if registry is not None and prompt.key in registry else -1
        hintable = has_hint(row)
        if hintable and prompt is not None and self.memory.may_hint(key):
            hintable = self._hinted_prompt(row, prompt) is not None
        return Group(key, number, tag_number(row.get("tag")), hintable)

    def _hinted_prompt(self, row: dict[str, Any], prompt: EncodedPrompt) -> EncodedPrompt | None:
        """The row's prompt with its hint; `None` where that does not fit."""
        key = row_key(row, prompt)
        if key not in self._hinted_prompts:
            try:
                self._hinted_prompts[key] = self._encode_hinted(row, key)
            except MediaError as error:
                logger.warning("Prompt %s is shown without its hint: %s", key, error)
                self._hinted_prompts[key] = None
        return self._hinted_prompts[key]

    def _encode_hinted(self, row: dict[str, Any], key: str) -> EncodedPrompt:
        encoded = self.prompt_builder.encode(with_hint(row, self.args.hint_template))
        return replace(encoded, key=key + HINTED)

    def _prompts_by_key(self, keys: list[str]) -> list[EncodedPrompt]:
        plain = iter(super()._prompts_by_key([key for key in keys if not key.endswith(HINTED)]))
        encoded: dict[str, EncodedPrompt] = {}
        for key in dict.fromkeys(key for key in keys if key.endswith(HINTED)):
            plain_key = key.removesuffix(HINTED)
            try:
                encoded[key] = self._encode_hinted(self._row_of(plain_key), plain_key)
            except MediaError as error:
                raise LostPromptsError([(prompt_key(plain_key), error)]) from error
        return [encoded[key] if key.endswith(HINTED) else next(plain) for key in keys]

    def _row_of(self, key: str) -> dict[str, Any]:
        """The row behind a key of the memory."""
        if self.family is None:
            return self.train_dataset[self._text_row(key)]
        rows = self.row_encoder.registries["train_dataset"].rows_of(prompt_key(key))
        return next(row for row in rows if row_digest(row) == key.removeprefix(f"{prompt_key(key)}-"))

    def _text_row(self, key: str) -> int:
        if self._numbers is None:
            self._numbers = {row_digest(row): i for i, row in enumerate(self.train_dataset)}
        return self._numbers[key]

    def _tag_of(self, experience: Experience) -> int:
        """The tag of a replayed completion's row, as a number."""
        if self._tags is None:
            self._tags = [tag_number(tag) for tag in self.train_dataset["tag"]]
        return self._tags[experience.row if experience.row >= 0 else self._text_row(experience.prompt)]

    # Rollout

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._scores

    def _prompts_of_scores(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._rollout is None:
            return super()._prompts_of_scores(scores)
        groups = self._rollout.groups_of(self._rollout.places(replayed=False)).to(scores.device)
        applies = [self.memory.scored_by(group.key, self.reward_func_names) for group in self._rollout.groups]
        return groups, torch.tensor(applies, device=scores.device)[groups]

    def _complete(self, rows: list[dict[str, Any]], prompts: list[EncodedPrompt] | None) -> Batch:
        if not self.model.training:
            return super()._complete(rows, prompts)
        if not self.args.replayed_generations:
            output = super()._complete(rows, prompts)
            output[REPLAYED_KEY] = torch.zeros_like(output["advantages"], dtype=torch.long)
            return self._shaped(output)
        self._hinted_prompts = {}
        slots = list(zip(rows, prompts or [None] * len(rows), strict=True))
        places = gather_object([self._group_of(*slot) for slot in slots])
        groups = [
            replace(places[i], has_hint=all(place.has_hint for place in places[i : i + self.num_generations]))
            for i in range(0, len(places), self.num_generations)
        ]
        step, world = self.state.global_step, self.accelerator.num_processes
        rollout = self.memory.plan(groups, self.num_generations, step, world)
        first = self.accelerator.process_index * len(slots)
        own = range(first, first + len(slots))
        fresh = [self._shown(*slots[place - first], rollout.hinted[place // rollout.group_size]) for place in own]
        fresh = [shown for place, shown in zip(own, fresh, strict=True) if not rollout.replayed[place]]
        self._rollout = rollout
        try:
            output = self._complete_fresh(fresh)
        finally:
            self._rollout = None
        rewards = self._total_rewards(self._scores)
        experiences = self.memory.learn(rollout, rewards, self._scores, self.reward_func_names, step)
        of_place = dict(zip(rollout.places(replayed=True), experiences, strict=True))
        replayed = [(*slots[place - first], of_place[place]) for place in own if place in of_place]
        if self.memory.scope != "prompt":
            replayed = self._with_own_prompts(replayed)
        return self._mixed(rollout, output, rewards, replayed, experiences, own)

    def _with_own_prompts(
        self, replayed: list[tuple[dict[str, Any], EncodedPrompt | None, Experience]]
    ) -> list[tuple[dict[str, Any], EncodedPrompt | None, Experience]]:
        """
        Replayed completions with the rows and prompts that they were written under. Every rank must call this together.

        Where media have gone, the completion stays in the place of its group, without a token that counts.
        """
        shown: dict[tuple[str, bool], tuple[dict[str, Any], EncodedPrompt | None]] = {}
        failed: dict[tuple[str, bool], MediaError] = {}
        found = []
        for row, prompt, experience in replayed:
            form = experience.prompt, experience.hinted
            if form not in shown and form not in failed:
                try:
                    shown[form] = self._row_and_prompt(row, prompt, *form)
                except MediaError as error:
                    failed[form] = error
            found.append((*shown.get(form, (row, prompt)), None if form in failed else experience))
        lost = gather_object([(prompt_key(key), error) for (key, _), error in failed.items()])
        for key, error in lost:
            self.row_encoder.registries["train_dataset"].add(key, error)
        if lost:
            self._discard_quarantined()
        return found

    def _row_and_prompt(
        self, row: dict[str, Any], prompt: EncodedPrompt | None, key: str, hinted: bool
    ) -> tuple[dict[str, Any], EncodedPrompt | None]:
        if row_key(row, prompt) != key:
            row = self._row_of(key)
            prompt = None if self.family is None else self.prompt_builder.encode(row)
        if prompt is None:
            return row, None
        if hinted and self._hinted_prompt(row, prompt) is None:
            raise MediaError("prompt-too-long", row.get("video"), "the prompt cannot be shown with its hint")
        return row, prompt

    def _shown(
        self, row: dict[str, Any], prompt: EncodedPrompt | None, hinted: bool
    ) -> tuple[dict[str, Any], EncodedPrompt | None]:
        """A row and its prompt as they are shown to the model."""
        if not hinted:
            return row, prompt
        hinted_prompt = None if prompt is None else self._hinted_prompt(row, prompt)
        return with_hint(row, self.args.hint_template), hinted_prompt

    def _complete_fresh(self, shown: list[tuple[dict[str, Any], EncodedPrompt | None]]) -> Batch:
        """TRL's rollout of rows that are no whole groups; its advantages are replaced afterwards."""
        rows, prompts = (list(part) for part in zip(*shown, strict=True))
        group_size, self.num_generations = self.num_generations, 1
        try:
            return super()._complete(rows, None if self.family is None else prompts)
        finally:
            self.num_generations = group_size

    def _mixed(
        self,
        rollout: ReplayPlan,
        fresh: Batch,
        rewards: Tensor,
        replayed: list[tuple[dict[str, Any], EncodedPrompt | None, Experience]],
        experiences: list[Experience],
        own: range,
    ) -> Batch:
        """
        The rank's fresh and replayed completions as one batch.

        Args:
            rewards (`Tensor` of shape (fresh,)): of all ranks' fresh completions.
            replayed: this rank's replayed completions with the rows and prompts of their places.
            experiences: those of all ranks.
            own: this rank's places.
        """
        device = self.accelerator.device
        fresh_advantages, replayed_advantages = self._advantages(rollout, rewards, experiences)
        batch = dict(fresh)
        batch["advantages"] = self._local(fresh_advantages)
        batch[REPLAYED_KEY] = torch.zeros_like(batch["advantages"], dtype=torch.long)
        unknown = torch.full(fresh["completion_ids"].shape, torch.nan, device=device)
        batch.setdefault("old_per_token_logps", unknown)  # those of the pass that trains on them
        if replayed:
            parts = [batch, self._replayed_batch(replayed, self._local(replayed_advantages), batch)]
            batch = concat_rows(parts, self._tokenizer.pad_token_id)
        own_places = [place for flag in (False, True) for place in own if rollout.replayed[place] == flag]
        batch[NUMBER_KEY] = torch.tensor(own_places, device=device) + rollout.first_number
        self._log_rollout(rollout, rewards, experiences, fresh_advantages)
        return self._shaped(self._balanced(batch, rollout))

    def _advantages(
        self, rollout: ReplayPlan, rewards: Tensor, experiences: list[Experience]
    ) -> tuple[Tensor, Tensor]:
        """Of fresh and of replayed completions, over all ranks."""
        device = rewards.device
        past = torch.tensor([e.reward for e in experiences], dtype=torch.float64, device=device)
        baselines = [self.memory.vcrs.baseline(e.prompt) for e in experiences]
        baselines = torch.tensor(baselines, dtype=torch.float64, device=device)
        off_policy = replay_advantages(past, baselines, self.args.replay_advantage_limit)
        if experiences:
            self._log_all({"replay/advantage_mean": float(off_policy.mean())})
        groups = rollout.groups_of(rollout.places(replayed=False)).to(device)
        tags = torch.tensor([group.tag for group in rollout.groups], device=device)[groups]
        if self.args.advantage_group == "mixed":
            replayed_groups = self._groups_of_replayed(rollout, experiences).to(device)
            everyone = torch.cat([rewards.double(), past]), torch.cat([groups, replayed_groups])
            on_policy = group_advantages(*everyone, torch.zeros_like(everyone[1]), "group")[: len(rewards)]
        else:
            scope = self.args.advantage_scope
            by_tag = scope not in ("group", "batch")
            on_policy = group_advantages(rewards, groups, tags if by_tag else torch.zeros_like(tags), scope)
        self._replace_logged_advantages(on_policy)
        return on_policy, off_policy

    def _groups_of_replayed(self, rollout: ReplayPlan, experiences: list[Experience]) -> Tensor:
        """Number of the group of each replayed completion; those of other prompts are each a group of their own."""
        groups = rollout.groups_of(rollout.places(replayed=True))
        strange = [e.prompt != rollout.groups[i].key for e, i in zip(experiences, groups.tolist(), strict=True)]
        return torch.where(
            torch.tensor(strange, dtype=torch.bool), len(rollout.groups) + torch.arange(len(groups)), groups
        )

    def _replayed_batch(
        self,
        replayed: list[tuple[dict[str, Any], EncodedPrompt | None, Experience]],
        advantages: Tensor,
        like: Batch,
    ) -> Batch:
        """Replayed completions with the prompts that they were written under, as a batch with the fields of another."""
        shown = [self._shown(row, prompt, e is not None and e.hinted) for row, prompt, e in replayed]
        self.rollout_log.note_replayed(self, shown, [experience for *_, experience in replayed])
        prompts = [prompt for _, prompt in shown]
        if self.family is None:
            prompt_ids = self._tokenize_prompts([row["prompt"] for row, _ in shown])[0]
        else:
            prompt_ids = [prompt.input_ids for prompt in prompts]
        pad = self._tokenizer.pad_token_id
        rows = []
        for ids, (_, _, experience) in zip(prompt_ids, replayed, strict=True):
            prompt = torch.as_tensor(ids, dtype=like["prompt_ids"].dtype)[None]
            tokens = torch.tensor([pad]) if experience is None else experience.completion_ids
            completion = tokens.to(like["completion_ids"].dtype)[None]
            counts = torch.full_like(completion, experience is not None, dtype=like["completion_mask"].dtype)
            rows.append(
                {
                    "prompt_ids": prompt,
                    "prompt_mask": torch.ones_like(prompt, dtype=like["prompt_mask"].dtype),
                    "completion_ids": completion,
                    "completion_mask": counts,
                    "old_per_token_logps": torch.zeros(1, 1) if experience is None else experience.logps[None],
                }
            )
        chunk = {name: value.to(self.accelerator.device) for name, value in concat_rows(rows, pad).items()}
        chunk |= {"advantages": advantages, REPLAYED_KEY: torch.ones_like(advantages, dtype=torch.long)}
        if UNSCORABLE_KEY in like:
            chunk[UNSCORABLE_KEY] = torch.zeros_like(chunk[REPLAYED_KEY])
        if "ref_per_token_logps" in like:  # the penalty is on the fresh ones alone
            chunk["ref_per_token_logps"] = torch.full_like(chunk["old_per_token_logps"], torch.nan)
        if self.family is not None:
            chunk[PROMPTS_KEY] = prompts
        return chunk | {"num_items_in_batch": like["num_items_in_batch"]}

    def _balanced(self, batch: Batch, rollout: ReplayPlan) -> Batch:
        """
        Scales the advantages so that TRL's mean over all completions becomes J_on + alpha J_off (AVATAR eq. 3).

        The surrogates are linear in the size of the advantage, so a term's weight can stand in it.
        """
        replayed = batch[REPLAYED_KEY].bool()
        lengths = batch["completion_mask"].sum(dim=1)
        counted = lengths if self.loss_type in ("dapo", "cispo") else torch.ones_like(lengths)
        unscorable = batch[UNSCORABLE_KEY].bool() if UNSCORABLE_KEY in batch else torch.zeros_like(replayed)
        parts = [~replayed & ~unscorable, replayed, unscorable]
        totals = torch.stack([*(counted[part].sum() for part in parts), lengths.sum()])
        fresh, past, lost, tokens = self._all_reduce(totals.double()).tolist()
        filled = sum(rollout.replayed) / (len(rollout.groups) * self.args.replayed_generations)
        fresh_scale, replayed_scale = term_scales(fresh, past, filled, self.args.replay_alpha, lost)
        if past or lost:
            batch["advantages"] = batch["advantages"] * torch.where(replayed, replayed_scale, fresh_scale)
        batch["num_items_in_batch"] = torch.full_like(batch["num_items_in_batch"], int(tokens))
        batch[FRESH_SCALE_KEY] = torch.tensor(fresh_scale, device=self.accelerator.device)
        return batch

    def _shaped(self, batch: Batch) -> Batch:
        """Advantages per token, by their place in the completion (AVATAR eq. 6)."""
        if self.args.tas_lambda:
            weights = tas_weights(batch["completion_mask"], self.args.tas_lambda, self.args.tas_shape)
            batch["advantages"] = batch["advantages"][:, None] * weights
        return batch

    def _counts_of_mean(self, chunks: list[Batch]) -> Tensor:
        counts = super()._counts_of_mean(chunks)
        if not self.args.replayed_generations:
            return counts
        # `_balanced` has scaled the terms; here it is said which optimizer steps have something to count.
        return (counts[:, :1] > 0).expand_as(counts).to(counts)

    # Loss

    def _compute_loss(self, model, inputs):
        if REPLAYED_KEY not in inputs:
            return super()._compute_loss(model, inputs)
        inputs = dict(inputs)  # what is filled in here holds for this pass alone
        self._filling = inputs
        try:
            with self._objective_of(inputs):
                loss = super()._compute_loss(model, inputs)
            self._record(inputs)
            self._probe_terms(loss, inputs)
            if self.beta:
                self._correct_divergence(inputs)
        finally:
            self._filling = self._logps = self._graph_logps = None
        return loss

    def _probe_terms(self, loss: Tensor, inputs: Batch) -> None:
        """Takes the gradients of both terms, at the steps at which they are asked for."""
        if not self._steps_between_probes:
            return
        # Nothing is replayed at the first step.
        if self.state.global_step % self._steps_between_probes != 1 % self._steps_between_probes:
            return
        if self._terms is None:
            self._terms = TermGradients([p for p in self.model.parameters() if p.requires_grad])
        self._terms.add(loss, self._graph_logps, inputs[REPLAYED_KEY].bool())

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
        if self._filling is not None:
            self._graph_logps, self._logps = found[0], found[0].detach()
            # TRL reads them after this pass. Unknown ones are those of the pass itself.
            for name in ("old_per_token_logps", "ref_per_token_logps"):
                values = self._filling.get(name)
                if values is not None:
                    self._filling[name] = torch.where(values.isnan(), self._logps, values)
        return found

    @contextmanager
    def _objective_of(self, inputs: Batch) -> Iterator[None]:
        """The clip of each row, and a penalty that is a mean over the fresh ones, where TRL's loss reads them."""
        before = {name: getattr(self, name) for name in ("epsilon_low", "epsilon_high", "beta")}
        replayed = inputs[REPLAYED_KEY].bool()[:, None]
        own = {"epsilon_low": self.args.replay_epsilon, "epsilon_high": self.args.replay_epsilon_high}
        own = {name: before[name] if value is None else value for name, value in own.items()}
        if any(own[name] != before[name] for name in own):
            for name, value in own.items():
                setattr(self, name, torch.where(replayed, value, before[name]))
        if self.beta and FRESH_SCALE_KEY in inputs:
            self.beta = self.beta * float(inputs[FRESH_SCALE_KEY])
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def _record(self, inputs: Batch) -> None:
        """Takes what a training pass found out: log-probabilities of fresh completions, ratios of replayed ones."""
        mask, replayed = inputs["completion_mask"], inputs[REPLAYED_KEY].bool()
        old = inputs.get("old_per_token_logps")
        log_ratios = torch.zeros_like(self._logps) if old is None else (self._logps - old) * mask
        advantages = inputs["advantages"]
        signal = (log_ratios.exp() * (advantages if advantages.dim() == 2 else advantages[:, None])).abs()
        self._sums.add_signal(signal, mask)
        if NUMBER_KEY not in inputs:
            return
        divergences = (policy_divergence(log_ratios) * mask).sum(dim=1)
        numbers, flags = inputs[NUMBER_KEY].tolist(), replayed.tolist()
        for i, number in enumerate(numbers):
            tokens = mask[i].bool()
            if flags[i]:
                self._sums.add_log_ratios(log_ratios[i][tokens])
            if not self.memory.waits_for(number):
                continue
            if flags[i]:
                self._written.divergences.append((number, float(divergences[i]), float(tokens.sum())))
            else:
                ids, logps = inputs["completion_ids"][i][tokens], old[i][tokens]
                self._written.completions.append((number, ids.cpu(), logps.float().cpu()))

    def _correct_divergence(self, inputs: Batch) -> None:
        """TRL has logged the penalty's mean over all tokens; it is on the fresh ones alone."""
        lengths = inputs["completion_mask"].sum(dim=1)
        fresh = lengths[~inputs[REPLAYED_KEY].bool()].sum()
        fresh, everything = self._all_reduce(torch.stack([fresh, lengths.sum()]).double()).tolist()
        logged = self._metrics["train"]["kl"]
        logged[-1] = logged[-1] * everything / fresh if fresh else float("nan")

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._end_optimizer_step()
        return loss

    def _begin_optimizer_step(self) -> None:
        """Nothing of an optimizer step has been seen yet."""
        self._written = PassRecord()
        self._sums = PassSums()
        self._terms: TermGradients | None = None

    def _end_optimizer_step(self) -> None:
        found = gather_object([(self._written, self._sums)])
        self._log_all(pass_metrics([sums for _, sums in found]))
        if self._terms is not None:
            self._log_all(self._terms.metrics(lambda tensor: self.accelerator.reduce(tensor, "mean")))
        if self.args.replayed_generations:
            self.memory.write([written for written, _ in found])
            for name, value in self.memory.metrics().items():
                self._metrics["train"][name] = [value]  # as things stand, not a mean since the last entry
        self._begin_optimizer_step()

    # Metrics

    def left_out(self) -> list[Note]:
        found, counts, args = super().left_out(), self.tally.counts, self.args
        if args.replayed_generations and counts["rollouts"] and not counts["replayed"]:
            since = "a prompt's are replayed from its second visit on"
            if args.replay_scope != "prompt":
                of_tags = args.replay_scope == "tiers" and args.batching == "stratified"
                since = f"a rollout replays what earlier ones{' of its tags' if of_tags else ''} stored"
            text = (
                f"replay never fired: nothing was replayed in {plural(counts['rollouts'], 'rollout')}, with "
                f"{plural(len(self.memory.buffer), 'completion')} in the buffer ({since})"
            )
            found.append(make_note("replay_never_fired", 0, text, of=counts["rollouts"]))
        if args.hints and counts["rollouts"] and not counts["hinted"]:
            text = (
                f"hints never fired: no prompt was shown with its hint in {plural(counts['rollouts'], 'rollout')} (hint_visits="
                f"{args.hint_visits}, hint_below={args.hint_below:g})"
            )
            found.append(make_note("hints_never_fired", 0, text, of=counts["rollouts"]))
        if self.memory.unstorable:
            text = f"{plural(self.memory.unstorable, 'completion')} without a reward or a token could not be stored for replay"
            found.append(make_note("unstorable", self.memory.unstorable, text))
        return found

    def _log_rollout(
        self, rollout: ReplayPlan, rewards: Tensor, experiences: list[Experience], advantages: Tensor
    ) -> None:
        size = len(rollout.groups), rollout.group_size
        everyone = torch.full(size, torch.nan, dtype=torch.float64).flatten()
        everyone[rollout.places(replayed=False)] = rewards.double().cpu()
        fresh_only = ~informative_groups(everyone.view(size))
        past = torch.tensor([e.reward for e in experiences], dtype=torch.float64)
        strange = self._groups_of_replayed(rollout, experiences) >= len(rollout.groups)
        everyone[rollout.places(replayed=True)] = past.masked_fill(strange, torch.nan)
        mixed = ~informative_groups(everyone.view(size))
        # TRL took each fresh completion for a group.
        self._metrics["train"]["frac_reward_zero_std"][-1] = float(fresh_only.float().mean())
        names = self.reward_func_names
        task = self._scores[:, names.index("accuracy_reward")] if "accuracy_reward" in names else rewards
        groups = rollout.groups_of(rollout.places(replayed=False))
        tags = torch.tensor([group.tag for group in rollout.groups])
        self.tally.counts.update(
            rollouts=1, replayed=sum(rollout.replayed), hinted=sum(rollout.hinted), generated=len(rewards)
        )
        self._log_all(
            {
                "replay/zero_variance_fresh": float(fresh_only.float().mean()),
                "replay/zero_variance_mixed": float(mixed.float().mean()),
                "replay/hit_rate": sum(rollout.replayed) / (len(rollout.groups) * self.args.replayed_generations),
                "replay/of_other_prompts": float(strange.sum()) / len(rollout.replayed),
                "replay/share": sum(rollout.replayed) / len(rollout.replayed),
                "replay/generated": float(len(rewards)),
                "rewardless": float(not (task.nan_to_num(nan=0.0) > 0).any()),
            }
        )
        if self.memory.hints is not None:
            self._log_all({"hint/rate": sum(rollout.hinted) / len(rollout.hinted)})
        values = {"reward": rewards, "unscorable": rewards.isnan().float()}
        if task is not rewards:
            values["accuracy"] = task
        values |= {"advantage_mean": advantages, "advantage_square": advantages.square()}
        for name, value in values.items():
            self._means["train"].add(totals_by_tag(name, value.cpu(), tags[groups]))
        for name, value in (("zero_variance", fresh_only), ("zero_variance_mixed", mixed)):
            self._means["train"].add(totals_by_tag(name, value.float(), tags))

    # State

    def _resume_signature(self) -> dict[str, Any]:
        names = ("replayed_generations", "advantage_group", "batching", "hints", "vcrs_window")
        return super()._resume_signature() | {name: getattr(self.args, name) for name in names}

    def _save_checkpoint(self, model, trial):
        if self.args.should_save and self.args.replayed_generations:
            save_memory(self._checkpoint_folder(trial), self.memory, self._provenance)
        super()._save_checkpoint(model, trial)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and self.args.replayed_generations:
            self._restore(resume_from_checkpoint)
        return trained

    def _restore(self, checkpoint: str) -> None:
        errors: list[str] = []
        try:
            load_memory(checkpoint, self.memory, self._provenance)
        except ReplayStateError as error:
            errors = [str(error)]
        errors = gather_object(errors)  # all ranks go on with the same memory
        if errors and self.args.replay_recovery != "empty":
            raise ResumeError(f"{errors[0]}. Set replay_recovery='empty' to go on with an empty replay buffer.")
        if errors:
            logger.warning("The run goes on with an empty replay buffer: %s", errors[0])
            self._begin_run()
        self._discard_quarantined()

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
