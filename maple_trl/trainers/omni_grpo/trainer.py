"""GRPO for prompts with video, audio and subtitles."""

from __future__ import annotations

import inspect
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer
from trl.trainer.utils import pad

from maple_trl.algorithms import left_alone, missing_scores, remaining_scale
from maple_trl.modalities import IMAGE_COLUMNS, ModalityTag
from maple_trl.omni.encoded import (
    KINDS,
    EncodedPrompt,
    batch_position_ids,
    forward_position_ids,
)
from maple_trl.omni.errors import MediaError
from maple_trl.omni.families import unwrap
from maple_trl.omni.prefix.packed_attention import install, why_not_trained
from maple_trl.omni.prefix.shared_prefix import PackedOutput, pack, packed_forward
from maple_trl.omni.prefix.sharing import Comparison
from maple_trl.omni.quantization import describe
from maple_trl.omni.serving import serve_media
from maple_trl.rewards import judge_callbacks
from maple_trl.rewards.calls import RewardError, check_rewards, checked, find_rewards
from maple_trl.rewards.judge_callback import JudgeCallback
from maple_trl.rollout.engine import Completions, EngineError
from maple_trl.trainers.common.batch import (
    PROMPTS_KEY,
    REPLAYED_KEY,
    SCALE_KEY,
    TAG_KEY,
    UNSCORABLE_KEY,
    Batch,
)
from maple_trl.trainers.common.checkpoint import (
    LostPromptsError,
    ResumeError,
    StatePart,
    check_resume_signature,
    load_rollout,
    save_rollout,
    save_rows,
)
from maple_trl.trainers.common.media_trainer import MediaTrainer, check_text_only, each_dataset, load_parts, own_config
from maple_trl.trainers.common.missing_rewards import MissingRewards
from maple_trl.trainers.common.quantized import model_options
from maple_trl.trainers.common.rollout import (
    Assignment,
    InFlight,
    PassInFlight,
    Rollout,
    RolloutInFlight,
    Round,
    UpdatesInFlight,
)
from maple_trl.trainers.common.rollout_log import LiveLog, RolloutLog
from maple_trl.trainers.common.run_errors import EngineLostError
from maple_trl.trainers.common.run_summary import Note, make_note
from maple_trl.trainers.common.samplers import LookaheadSampler
from maple_trl.trainers.common.sharding import held_back
from maple_trl.trainers.common.tag_metrics import UNTAGGED, RunningMeans, tag_number, totals_by_tag
from maple_trl.trainers.common.trl_compat import lent, replace_latest, trl_expectations
from maple_trl.trainers.common.updates import exchange_rows, update_batches
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
from maple_trl.trainers.omni_grpo.engines import EngineMixin, check_engine_is_there


logger = logging.getLogger(__name__)

_ROW_MEANS = ("grpo", "sapo", "dr_grpo", "luspo")
"""Losses that TRL averages over the rows of a micro-batch; `bnpo` is over its tokens, the others over a rollout's."""


class OmniGRPOTrainer(EngineMixin, MediaTrainer, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] whose prompts can hold pictures, video, audio and subtitles, each row its own, in one batch.

    Media reach generation, the old and reference log-probabilities and the training forward; a row whose media were
    not consumed raises. A text-only model (a tokenizer as `processing_class`) trains exactly as with TRL.

    Subclasses fill four hooks. They are called on every rank, with the same values:

    - `row_order(dataset)`, when a run begins: which rows the rollouts take.
    - `assign(rollout)`, once a training rollout is scored: advantages, and what is trained on.
    - `on_optimizer_step()`, after an optimizer step's last backward pass and before its update.
    - `state_parts()`, before a run goes on from a checkpoint, and where one is written on the rank that writes: what it
      keeps.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            A model of a registered family. From a full Omni checkpoint the Thinker alone is loaded.
        reward_funcs:
            As in [`~trl.GRPOTrainer`], or names of functions in `maple_trl.rewards`; every column of a row reaches them.
        args ([`OmniGRPOConfig`], *optional*): configuration.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows with `prompt`, and where they apply `image` or `images`, `video`, `audio`, `subtitle`, `tag` and
            `audio_in_video` (see [`~maple_trl.omni.prompt.PromptBuilder`]).
        eval_dataset: as in [`~trl.GRPOTrainer`], with the same columns.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*): loaded with the model if absent.
        kwargs: the other arguments of [`~trl.GRPOTrainer`]; tools, environments and rollout functions are rejected.

    Attributes:
        missing_rewards (`Counter`):
            Completions of training that a reward function with a weight could not score although it applies to their
            prompt, by `(name of the function, tag)`; the tag of a row without one is `""`.
        unscorable_completions (`Counter`): completions left out of training for that, by tag.

    Raises:
        RowError: for the first row that cannot be a prompt, with its number and field.
        ValueError: when options do not fit together.
    """

    _tag_names = ["trl", "grpo", "omni", "maple-trl"]
    _name = "Omni GRPO"
    _config_class = OmniGRPOConfig
    _read_columns: tuple[str, ...] = (*IMAGE_COLUMNS, "video", "audio", "subtitle", "tag", "audio_in_video")
    _failed_is_zero = True  # TRL's way with a reward that failed, where there are neither media nor tags

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: OmniGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"{type(self).__name__} does not support `{name}` in this version")
        args = own_config(args, self._config_class, model, self._name)
        check_engine_is_there(args)
        init_kwargs = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
        quantization = kwargs.pop("quantization_config", None)
        init_kwargs = model_options(model, init_kwargs, quantization, kwargs.get("peft_config"), args)
        reward_funcs = find_rewards(reward_funcs)
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if not any(isinstance(reward, str) for reward in rewards):  # reward models are loaded with them too
            args.model_init_kwargs = None  # TRL would call them ignored, although the reference model gets them here
        columns = getattr(train_dataset, "column_names", None)
        if columns:
            check_rewards(rewards, columns, "train_dataset")
        args.check_answer_form(rewards, columns or ())
        model, processing_class = load_parts(model, processing_class, args.seed, init_kwargs)

        self._sharing: bool | None = False
        self._unshared: str | None = None  # why prompts are not shared, where they were to be
        self._flight = InFlight()  # of no row
        self._order: Sampler | None = None
        self._lookahead: LookaheadSampler | None = None
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._begin_counts(args)
        if isinstance(processing_class, PreTrainedTokenizerBase):
            check_text_only(model, {"train_dataset": train_dataset, "eval_dataset": eval_dataset}, args)
        else:
            self._prepare_media(model, processing_class, args)
            self._sharing = None if args.shared_prefix != "off" else False  # None: to be found out
            train_dataset = self.row_encoder.register(train_dataset, "train_dataset")
            eval_dataset = each_dataset(eval_dataset, "eval_dataset", self.row_encoder.register)

        self._prepare_generation(args)
        with trl_expectations(unwrap(model), init_kwargs, self._vllm_generation(args)):
            super().__init__(
                model,
                reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        if not any(isinstance(callback, JudgeCallback) for callback in self.callback_handler.callbacks):
            for callback in judge_callbacks(reward_funcs):
                self.add_callback(callback)
        self.add_callback(LiveLog)
        self.rollout_log = RolloutLog(
            self.args.output_dir,
            self.args.rollout_log_size,
            self.args.generation_batch_size,
            writes=self.accelerator.is_main_process,
            media_root=self.args.media_root,
        )
        self._check_checkpointing()
        self._keep_savable()
        self.engine = self._make_engine()
        self.towers = self._make_tower_cache()
        if self.towers is not None and self.ref_model is not None:
            # TRL leaves it as it is loaded, and what towers make that ask for a gradient is not kept.
            self.ref_model.requires_grad_(False)
        self._watch()
        self._write_quarantine()
        self._check_rollout_size()
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("Nothing is left to train: every parameter of the model is frozen")

    def _check_rollout_size(self) -> None:
        """
        Check that there are rows for one rollout.

        Of fewer, TRL's sampler would make no step, and a schedule would repeat them.
        """
        needed = self.args.generation_batch_size // self.num_generations
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) < needed:
            raise ValueError(
                f"train_dataset has {len(self.train_dataset)} usable rows, but one rollout takes {needed} prompts "
                "(generation_batch_size / num_generations): lower per_device_train_batch_size or "
                "gradient_accumulation_steps, or raise num_generations"
            )

    # Rows

    def _get_train_sampler(self, dataset: Dataset | None = None):
        sampler = self._order = self.row_order(dataset)
        if self.family is None or not self.args.media_prefetch or not getattr(sampler, "ahead", True):
            return sampler
        batch = self.args.generation_batch_size
        self._lookahead = LookaheadSampler(
            sampler,
            chunk=batch // self.accelerator.num_processes,
            ahead=batch * self._updates_per_rollout,
            # Trainer draws the batches of an optimizer step at once, accelerate one more.
            behind=batch * (self.args.gradient_accumulation_steps + 1),
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        return self._lookahead

    def row_order(self, dataset: Dataset | None) -> Sampler | None:
        """
        Say which rows the rollouts take: the hook that is called on every rank when a run begins.

        Returns:
            `Sampler`: yields each row once per completion, micro-batch and iteration, as TRL's does.
        """
        return super()._get_train_sampler(dataset)

    def _prefetch_next_batch(self, current: Sequence[EncodedPrompt]) -> None:
        if self._lookahead is not None:
            self._prefetch([self.train_dataset[i] for i in self._lookahead.upcoming()], current)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, *self._read_columns]

    # Rollout

    @contextmanager
    def _in_flight(self, flight: InFlight) -> Iterator[InFlight]:
        """Keep at hand what TRL's methods work on and do not pass on themselves, until the context is left."""
        previous, self._flight = self._flight, flight
        try:
            yield flight
        finally:
            self._flight = previous

    @property
    def _serving(self) -> list[EncodedPrompt] | None:
        """Prompts of the rows that TRL's methods work on; `None` for a text-only model."""
        return self._flight.prompts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        flight: UpdatesInFlight = self._flight
        if self.use_vllm and self.model.training:
            self._before_rollout = [part.snapshot() for part in self.state_parts()]
        for r in self._rounds(inputs):
            flight.rounds.append(r)
        if self.model.training:
            flight.rollout = Rollout.joined([r.rollout for r in flight.rounds])
            assigned = self.assign(flight.rollout)
            if assigned is not None:
                self._take_over(flight, assigned)
        self._before_rollout = []
        return flight.rounds[0].batch

    def _rounds(self, inputs: list[dict[str, Any]]) -> Iterator[Round]:
        """Generate the rounds that make a rollout: one, of the data loader's rows."""
        rows, prompts = self._encoded(inputs)
        if prompts is not None and self.model.training:
            self._prefetch_next_batch(prompts)
        yield self._roll_out(rows, prompts)

    def _encoded(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[EncodedPrompt] | None]:
        """Return rows that can be shown, and their prompts, which are `None` for a text-only model."""
        if self.family is None:
            return rows, None
        rows, prompts = self.encode_rows(rows)
        self._agree_on_sharing()
        return rows, prompts

    def _roll_out(self, rows: list[dict[str, Any]], prompts: list[EncodedPrompt] | None) -> Round:
        """Let TRL generate and score this rank's rows, each in a place of its own."""
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        batch, rollout = self._complete(RolloutInFlight(prompts, rows, group_size))
        first = self.accelerator.process_index * len(rows)
        return Round(batch, rollout, list(range(first, first + len(rows))))

    def _complete(self, flight: RolloutInFlight) -> tuple[Batch, Rollout]:
        """Let TRL generate and score; return the batch of this rank, and the rollout of all."""
        with self._in_flight(flight):
            batch = Batch(super()._generate_and_score_completions(self._without_images(flight.rows)))
        self._log_ratios(batch, flight)
        self._mask_unscorable(batch, flight)
        if flight.prompts is not None:
            self._log_media(flight.prompts)
            batch[PROMPTS_KEY] = flight.prompts
        return batch, flight.rollout

    def _without_images(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return rows without the columns that TRL would open and feed itself; prompts hold these pictures already."""
        if self.family is None:
            return rows
        return [{name: value for name, value in row.items() if name not in IMAGE_COLUMNS} for row in rows]

    def assign(self, rollout: Rollout) -> Assignment | None:
        """
        Make advantages of rewards: the hook that is called on every rank once a training rollout is scored.

        Returns:
            [`Assignment`]: advantages, and what is trained on; `None` where TRL's own stand and everything is.
        """
        return None

    def _take_over(self, flight: UpdatesInFlight, assigned: Assignment) -> None:
        """
        Put what was assigned into the batches of the rounds.

        Micro-batches are cut anew unless a single round is trained on as a whole.
        """
        rollout, rounds, world = flight.rollout, flight.rounds, self.accelerator.num_processes
        kept = assigned.kept
        self._replace_logged_advantages(assigned.advantages[rollout.fresh])
        parts, counts = [], torch.zeros(world, dtype=torch.long)
        for r, own in flight.placed():
            places = torch.tensor(r.places, dtype=torch.long, device=kept.device) + own.start
            r.batch["advantages"] = assigned.advantages[places]
            r.batch[TAG_KEY] = rollout.counted_tags[places]
            counts += kept[own].view(world, -1).sum(dim=1).cpu()
            parts.append(r.batch.take(kept[places].nonzero().flatten().tolist()))
        if len(rounds) == 1 and int(kept.sum()) == self.args.generation_batch_size:
            return
        for part in parts:  # which some rounds have and others have not; the tags say it too
            part.pop(UNSCORABLE_KEY, None)
        flight.chunks = update_batches(
            Batch.concat(parts, self._tokenizer.pad_token_id),
            counts.tolist(),
            rounds[0].batch,
            self.args,
            self.accelerator.process_index,
            partial(exchange_rows, accelerator=self.accelerator, prompts_by_key=self._prompts_by_key),
            self._tokenizer.pad_token_id,
        )

    # Generation

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if self.family is None:
            found = super()._tokenize_prompts(prompts)
            if isinstance(self._flight, RolloutInFlight):
                self._flight.prompt_tokens = [len(ids) for ids in found[0]]
            return found
        return [row.input_ids.tolist() for row in self._serving], None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        if self.family is not None:
            self._agree_on_sharing()
        generate = super()._generate_single_turn

        def turn(ids: Sequence[Any], fields: dict[str, Any]) -> Completions:
            return generate(ids, images, multimodal_fields | fields, *args, **kwargs)

        completions = self.engine.sample(turn, prompt_ids, self._serving)
        if isinstance(self._flight, RolloutInFlight):
            self._flight.failed = dict(self.engine.failed)
        return completions

    def _sample(self, prompts: list[EncodedPrompt]) -> list[str | None]:
        idle = not prompts
        if idle and self.accelerator.num_processes == 1:
            return []
        if idle:  # the other ranks generate
            prompts = [self.prompt_builder.stand_in()]
        with self._in_flight(InFlight(prompts)):
            prompt_ids, _, fields = self._tokenize_prompts([])
            ids, _ = self._generate_single_turn(prompt_ids, None, fields, 1)
        if idle:
            return []
        failed = self.engine.failed
        for row, reason in failed.items():
            logger.warning("Prompt %s gets no answer: %s", prompts[row].key, reason)
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        return [None if row in failed else text for row, text in enumerate(texts)]

    # Rewards

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """
        Return the scores of all ranks' completions, shape (N, reward functions), and note the rollout that they make.

        Besides the columns, rewards are handed `group_ids`, and `completion_logprobs` and `deficit_completions` where
        one of them names such an argument: these cost a pass and a generation.
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
        with lent(self, reward_funcs=self._checked_rewards()):
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
        if self.model.training:
            self.tally.checks.note_rewards(self._compared(rewards))
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

    def _compared(self, rewards: torch.Tensor) -> torch.Tensor:
        """Return rewards in the groups in which they are compared, of shape (groups, completions)."""
        return rewards.view(-1, self.num_generations) if self.num_generations > 1 else rewards.view(1, -1)

    def _checked_rewards(self) -> list[Any]:
        """Wrap reward functions so that errors say by name what is wrong with them or with what they return."""
        return [
            function if isinstance(function, nn.Module) else checked(function, name)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]

    # Rewards that failed

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
        self._means["train" if self.model.training else "eval"].add(totals_by_tag("alone", alone.float(), tags))
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
        means = self._means["train" if training else "eval"]
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
        functions = [reward for reward in self.reward_funcs if not isinstance(reward, nn.Module)]
        return any(argument in inspect.signature(reward).parameters for reward in functions)

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

    def _total_rewards(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Return the weighted sum of each completion's scores, shape (N,); NaN where all are, as for an unscorable one.

        Args:
            scores (`Tensor` of shape (N, reward functions)): NaN where a function gave no reward.
        """
        total = (scores * self.reward_weights.to(scores.device)).nansum(dim=1)
        return total.masked_fill(scores.isnan().all(dim=1), torch.nan)

    # Ranks

    def _all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values over all ranks; a collective call."""
        return self.accelerator.reduce(values, reduction="sum") if self.accelerator.num_processes > 1 else values

    def _local(self, values: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of values over all ranks."""
        return values.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    # Log-probabilities and loss

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        flight = self._flight
        if flight.prompts is not None:
            model = partial(self._forward_with_media, model, iter(flight.prompts), logits_to_keep)
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if isinstance(flight, PassInFlight):
            flight.logps, flight.entropies = found[:2]
        return found

    def _forward_with_media(self, model: nn.Module, rows: Iterator[EncodedPrompt], logits_to_keep: int, **inputs):
        """
        Run the model on the next chunk of rows, with their media.

        Stands in for `model` in TRL's log-probability loop, which takes its rows in order, chunk by chunk.
        """
        batch, length = inputs["input_ids"].shape
        prompts = [next(rows) for _ in range(batch)]
        # The routers' balancing loss counts a prompt once per row.
        if self._sharing and not inputs.get("output_router_logits"):
            return self._forward_packed(model, prompts, logits_to_keep, **inputs)
        positions = batch_position_ids(prompts, length - logits_to_keep, logits_to_keep)
        positions = positions.to(inputs["input_ids"].device)
        with self._serve(self.accelerator.unwrap_model(model), prompts):
            return model(**inputs, position_ids=forward_position_ids(positions))

    def _forward_packed(self, model: nn.Module, prompts: list[EncodedPrompt], width: int, **inputs) -> PackedOutput:
        """Run the model on a chunk of rows with their media, each prompt once for all of its rows."""
        unwrapped = self.accelerator.unwrap_model(model)
        lengths = inputs["attention_mask"][:, -width:].sum(dim=1).tolist()
        batch = pack(prompts, inputs["input_ids"][:, -width:], lengths)
        with self._serve(unwrapped, batch.prompts, packed=True):
            core, size = self.family.core(unwrapped), (len(prompts), width)
            return packed_forward(model, core, batch, size, self._packed_attention)

    def _agree_on_sharing(self) -> None:
        """Find out whether completions share their prompts, unless that is known; a collective call."""
        if self._sharing is None:
            self._sharing = self._try_sharing(self._probe_prompt())

    def _probe_prompt(self) -> EncodedPrompt:
        """Return what to compare on: the same on all ranks, and short however long the run's prompts are."""
        return self.prompt_builder.probe()

    def _try_sharing(self, prompt: EncodedPrompt) -> bool:
        """
        Return whether completions can share their prompts, after all ranks have compared both ways on a prompt.

        Raises:
            ValueError: when they cannot and `shared_prefix` is `"on"`.
        """
        level = logging.INFO if self.accelerator.is_main_process else logging.DEBUG
        kinds = ", ".join((*prompt.kinds, "text"))
        told = f"a prompt of {len(prompt)} tokens ({kinds}) passed once for two completions, and once for each"
        logger.log(level, "shared_prefix=%r: comparing %s", self.args.shared_prefix, told)
        began = time.perf_counter()
        reason = self._why_apart(prompt)
        seconds = time.perf_counter() - began
        if reason is None:
            logger.log(level, "Both ways agree, which took %.1f s to find: completions share their prompt", seconds)
        elif self.args.shared_prefix == "on":
            raise ValueError(f"shared_prefix='on', but prompts cannot be shared: {reason}")
        else:
            logger.warning("Each completion passes its prompt on its own (shared_prefix='auto'): %s", reason)
            self._unshared = reason
            return False
        if self.aux_loss_enabled:
            logger.warning(
                "Training passes a prompt once per completion (shared_prefix): the loss that balances the experts counts it so. "
                "router_aux_loss_coef=0 lets completions share it."
            )
        if self.args.per_device_train_batch_size % self.args.num_generations:
            logger.warning(
                "per_device_train_batch_size (%d) is not a multiple of num_generations (%d): a prompt is passed once for each "
                "micro-batch that holds some of its completions",
                self.args.per_device_train_batch_size,
                self.args.num_generations,
            )
        return True

    def _why_apart(self, prompt: EncodedPrompt) -> str | None:
        """Return what keeps completions from sharing their prompt on any rank, `None` if nothing; a collective call."""
        models = [unwrap(self.accelerator.unwrap_model(m)) for m in (self.model, self.ref_model) if m is not None]
        reasons = gather_object([next(filter(None, map(self._why_not_packed, models)), None)])
        if any(reasons):
            return next(filter(None, reasons))
        comparison = Comparison(
            self.model,
            self.family.core(self.accelerator.unwrap_model(self.model)),
            prompt,
            # Nothing is kept of clips that no row has.
            partial(serve_media, self.family, touch=self._touched),
            self.family.suppressed_ids,
            self._packed_attention,
        )
        differences, failure = self._measure(comparison.difference)
        if failure or all(value <= comparison.least_tolerance for value in differences):
            return failure
        tolerances, failure = self._measure(comparison.tolerance)
        errors = [value / tolerance for value, tolerance in zip(differences, tolerances, strict=True)]
        if failure or all(error <= 1 for error in errors):
            return failure
        error = next((error for error in errors if math.isnan(error)), max(errors))
        return f"log-probabilities differ {error:.1f} times as much as rounding explains"

    def _why_not_packed(self, model: nn.Module) -> str | None:
        """Return why a model cannot be trained on packed rows, before it is tried."""
        if not install(model):
            return (
                "the language model's attention is not sdpa, flex_attention or FlashAttention over whole sequences or windows "
                "of them (FlashAttention: where tokens of a picture do not see each other both ways)"
            )
        attention = self._packed_attention or model.config.get_text_config()._attn_implementation
        return why_not_trained(attention, self.accelerator.device)

    @property
    def _packed_attention(self) -> str | None:
        """What computes attention in packed rows; `None` for what the model uses."""
        return None if self.args.packed_attention == "model" else self.args.packed_attention

    def _measure(self, measure: Callable[[], float]) -> tuple[list[float], str | None]:
        """Return what each rank measures, and how one failed, if any did; a collective call."""
        try:
            mine: float | str = measure()
        except RuntimeError as failure:  # a kernel does not take what it is given, or does not compile
            logger.debug("Comparing shared prompts failed", exc_info=True)
            first_line = str(failure).split("\n", 1)[0]
            mine = f"comparing both ways ended with {type(failure).__name__}: {first_line}"
        found = gather_object([mine])
        failure = next((value for value in found if isinstance(value, str)), None)
        return [math.nan if isinstance(value, str) else value for value in found], failure

    # Updates

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        with self._in_flight(UpdatesInFlight()) as flight:
            inputs = super()._prepare_inputs(generation_batch)
            if self._buffered_inputs is not before:
                self.rollout_log.write(self)
                self.tally.checks.end_rollout(self.state.global_step + 1, self._rollout_facts())
                self._buffered_inputs = flight.chunks or self._regrouped(list(map(Batch, self._buffered_inputs)))
                self._weigh(self._buffered_inputs, flight.rollout)
                return self._buffered_inputs[self._step % self.args.steps_per_generation]
        if not self.model.training and UNSCORABLE_KEY in inputs:
            self._leave_out([inputs])
        return inputs

    def _regrouped(self, chunks: list[Batch]) -> list[Batch]:
        """Put rows of one prompt together, which TRL has shuffled: a prompt is passed once in each micro-batch."""
        if PROMPTS_KEY not in chunks[0]:
            return chunks
        media = any(prompt.kinds for chunk in chunks for prompt in chunk.prompts)
        if not media and self.args.shared_prefix != "on":
            return chunks  # as TRL does
        sizes, slots = [chunk.rows for chunk in chunks], self._micro_batches_of_a_mean(len(chunks))
        steps = [sum(sizes[i : i + slots]) for i in range(0, len(sizes), slots)]
        return Batch.merge(chunks).regroup(steps if REPLAYED_KEY in chunks[0] else None).split(sizes)

    def _weigh(self, chunks: list[Batch], rollout: Rollout) -> None:
        """Fold what rows weigh in the loss of their optimizer step into their advantages; a collective call."""
        if UNSCORABLE_KEY in chunks[0]:
            self._leave_out(chunks)

    def _compute_loss(self, model, inputs):
        if not inputs["completion_ids"].size(0):  # a rank that is short of rows
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        self._pass_made = True
        inputs = Batch(inputs)
        scale = float(inputs[SCALE_KEY][0]) if SCALE_KEY in inputs else 1.0
        self._step_counts |= self.model.training and scale > 0
        beta = self.beta * scale if scale else self.beta  # the KL term is in the same mean, but not in the advantage
        with lent(self, beta=beta), self._in_flight(PassInFlight(inputs.prompts, inputs=inputs)) as flight:
            loss = super()._compute_loss(model, inputs)
            if self.model.training:
                self._end_pass(flight, loss)
        return loss

    def _end_pass(self, flight: PassInFlight, loss: torch.Tensor) -> None:
        """Take down what a training pass has shown, before its backward pass."""

    def training_step(self, model, inputs, num_items_in_batch):
        self._pass_made = False
        with held_back(self.accelerator, lambda: self._pass_made, lambda: self._step_counts):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.on_optimizer_step()
            self._step_counts = False
            self._stream_after_step = torch.get_rng_state()
        return loss

    def on_optimizer_step(self) -> None:
        """
        See the gradients of an optimizer step: the hook that is called on every rank before its update.

        The last backward pass of the step has been made, and with DeepSpeed its update too. What overrides it calls it as well.
        """
        if not self._step_counts:
            self._forget_gradients()
        if self.family is not None or not self._failed_is_zero:
            self._log_all({"sampling/steps_without_update": not self._step_counts})

    # Metrics

    def _rollout_facts(self) -> dict[str, Any]:
        """Return what can explain rewards that do not differ: sampling options, and the share of cut completions."""
        cut = self._metrics["train"]["completions/clipped_ratio"]
        names = ("temperature", "max_completion_length")
        return {name: getattr(self.args, name) for name in names} | {"cut": cut[-1] if cut else None}

    def left_out(self) -> list[Note]:
        found = super().left_out()
        if self._unshared is not None:
            found.append(
                make_note("prompts_not_shared", 1, f"prompts were not shared by their completions: {self._unshared}")
            )
        return found

    def _log_all(self, metrics: Mapping[str, float], mode: str = "train") -> None:
        for name, value in metrics.items():
            self._metrics[mode][name].append(float(value))

    def _replace_logged_advantages(self, advantages: torch.Tensor) -> None:
        replace_latest(self._logs["advantages"], advantages.tolist())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._log_all(self._means[mode].take(), mode)
        super().log(logs, start_time)

    # State

    def _load_from_checkpoint(self, *args, **kwargs):
        super()._load_from_checkpoint(*args, **kwargs)
        self._distrust_engine()

    def _load_best_model(self):
        super()._load_best_model()
        self._distrust_engine()

    def _distrust_engine(self) -> None:
        """Let an engine be given the weights before it samples again, though no step was made since it got some."""
        self._last_loaded_step = -1  # TRL's

    def train(self, *args, **kwargs):
        self._distrust_engine()  # another run's steps have the same numbers
        # A run before this one may have stopped within a rollout.
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._begin_counts(self.args)
        self._step, self._buffered_inputs, self._before_rollout = 0, None, []
        self.rollout_log.begin()
        try:
            return super().train(*args, **kwargs)
        except EngineError as error:
            raise EngineLostError(f"{error}. {self._save_where_it_stopped()}") from error

    def _check_checkpoint(self, checkpoint: str) -> None:
        if self.family is None:
            check_resume_signature(checkpoint, self.accelerator.process_index, self._resume_signature())
        super()._check_checkpoint(checkpoint)

    def _save_checkpoint(self, model, trial):
        # Before the parent's: a checkpoint counts as complete once the parent has written trainer_state.json.
        folder = self._checkpoint_folder(trial)
        if self.family is not None and self.args.should_save:
            save_rows(folder, {name: registry.state_dict() for name, registry in self.row_encoder.registries.items()})
        save_rollout(
            folder,
            self.accelerator.process_index,
            self._step,
            self._pending_chunks(),
            self._resume_signature(),
        )
        if self.args.should_save:
            for part in self.state_parts():
                part.save(folder)
        super()._save_checkpoint(model, trial)

    def state_parts(self) -> list[StatePart]:
        """
        Name what a checkpoint keeps beside weights, optimizer and rows: a hook.

        It is called on every rank before a run goes on from a checkpoint, and on the one that writes when one is written.
        What overrides it adds to the list.
        """
        return [self._missing]

    def _resume_signature(self) -> dict[str, Any]:
        """Return what a checkpoint and the run that resumes it must have in common to go on where it stopped."""
        names = ("generation_batch_size", "steps_per_generation", "num_generations", "num_iterations")
        facts = {"processes": self.accelerator.num_processes, "quantization": describe(self.model)}
        return facts | {name: getattr(self.args, name) for name in names}

    def _pending_chunks(self) -> list[Batch] | None:
        """Return the micro-batches of the last rollout while some updates on them are still to come, else `None`."""
        return self._buffered_inputs if self._step % self._updates_per_rollout else None

    @property
    def _updates_per_rollout(self) -> int:
        """Micro-batches that are trained on before the next rollout."""
        return self.args.steps_per_generation * self.num_iterations

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # TRL's sampler draws an order per epoch: draw those of the epochs that are done.
        for _ in range(epochs_trained if self._order is not None else 0):
            next(iter(self._order), None)
        if resume_from_checkpoint is not None:
            for part in self.state_parts():
                part.load(resume_from_checkpoint)
        return epochs_trained, steps_trained

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        rank, device = self.accelerator.process_index, self.accelerator.device
        lost: list[tuple[str, MediaError]] = []
        try:
            self._step, self._buffered_inputs = load_rollout(checkpoint, rank, self._prompts_by_key, device)
        except LostPromptsError as error:
            self._step, lost = error.step, error.failed
        self._drop_rollout(gather_object(lost))
        chunks = self._buffered_inputs
        if chunks is not None and self.family is not None:  # trained on before anything is generated
            self._agree_on_sharing()

    def _drop_rollout(self, lost: list[tuple[str, MediaError]]) -> None:
        """Drop the rollout that was under way if some rank cannot show its prompts, so that a new one is generated."""
        if not lost:
            return
        self._buffered_inputs = None
        for key, error in lost:
            logger.warning(
                "The rest of the rollout is generated anew: prompt %s cannot be shown any more: %s", key, error
            )
            self.row_encoder.registries["train_dataset"].add(key, error)
        self._write_quarantine()

    def _prompts_by_key(self, keys: list[str]) -> list[EncodedPrompt]:
        if not isinstance(self.train_dataset, Dataset):
            raise ResumeError(
                "The checkpoint lies in the middle of a rollout, whose prompts cannot be found again in a streamed data "
                "set. Resume from a checkpoint at the end of a rollout, or train on a map-style data set."
            )
        registry = self.row_encoder.registries["train_dataset"]
        encoded, failed = {}, []
        for key in dict.fromkeys(keys):
            try:
                encoded[key] = self.prompt_builder.encode(registry.row_of(key))
            except MediaError as error:
                failed.append((key, error))
        if failed:
            raise LostPromptsError(failed)
        return [encoded[key] for key in keys]
