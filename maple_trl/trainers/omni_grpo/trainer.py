"""GRPO for prompts with video, audio and subtitles."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
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

from maple_trl.modalities import IMAGE_COLUMNS, INPUT_COLUMNS
from maple_trl.omni.completions import completion_texts
from maple_trl.omni.encoded import (
    EncodedPrompt,
    batch_position_ids,
    forward_position_ids,
)
from maple_trl.omni.errors import MediaError
from maple_trl.omni.families import unwrap
from maple_trl.omni.prefix.shared_prefix import PackedOutput, pack, packed_forward
from maple_trl.rewards import judge_callbacks
from maple_trl.rewards.calls import check_rewards, find_rewards
from maple_trl.rewards.judge_callback import JudgeCallback
from maple_trl.rollout.engine import Completions, EngineError
from maple_trl.trainers.common.arguments import (
    check_compared_set,
    check_text_only,
    each_dataset,
    load_parts,
    own_config,
)
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
from maple_trl.trainers.common.media_trainer import MediaTrainer
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
from maple_trl.trainers.common.rollout_log import RolloutLog
from maple_trl.trainers.common.run_errors import EngineLostError
from maple_trl.trainers.common.run_summary import Note, make_note
from maple_trl.trainers.common.samplers import LookaheadSampler
from maple_trl.trainers.common.sharding import held_back
from maple_trl.trainers.common.tag_metrics import RunningMeans
from maple_trl.trainers.common.trl_compat import lent, replace_latest, trl_expectations
from maple_trl.trainers.common.updates import exchange_rows, update_batches
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
from maple_trl.trainers.omni_grpo.engines import EngineMixin, check_engine_is_there
from maple_trl.trainers.omni_grpo.evaluation_logs import EvaluationLogMixin
from maple_trl.trainers.omni_grpo.failed_rewards import FailedRewardMixin
from maple_trl.trainers.omni_grpo.prompt_sharing import SharingMixin
from maple_trl.trainers.omni_grpo.rewards import RewardMixin
from maple_trl.trainers.omni_grpo.trl_state import EntropyState, ReferenceState


logger = logging.getLogger(__name__)


class OmniGRPOTrainer(
    EngineMixin, RewardMixin, FailedRewardMixin, SharingMixin, EvaluationLogMixin, MediaTrainer, GRPOTrainer
):
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
    _read_columns: tuple[str, ...] = INPUT_COLUMNS

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
        check_compared_set(args, eval_dataset)
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

        self._flight = InFlight()  # of no row
        self._order: Sampler | None = None
        self._lookahead: LookaheadSampler | None = None
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._begin_counts(args)
        if isinstance(processing_class, PreTrainedTokenizerBase):
            check_text_only(model, {"train_dataset": train_dataset, "eval_dataset": eval_dataset}, args)
        else:
            self._prepare_media(model, processing_class, args)
            self._sharing = None if args.shared_prefix != "off" else False
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
        if args.sync_ref_model and self._spread:
            raise ValueError(
                "sync_ref_model: FSDP and ZeRO-3 spread the reference model over the processes, and no checkpoint would keep what "
                "it has become: use DDP or ZeRO-2, or set it to false"
            )
        if not any(isinstance(callback, JudgeCallback) for callback in self.callback_handler.callbacks):
            for callback in judge_callbacks(reward_funcs):
                self.add_callback(callback)
        self._finish_construction()
        self.rollout_log = RolloutLog(
            self.args.output_dir,
            self.args.rollout_log_size,
            self.args.generation_batch_size,
            writes=self.accelerator.is_main_process,
            media_root=self.args.media_root,
        )
        self.engine = self._make_engine()
        self._warn_of_dropout()
        if self.towers is not None and self.ref_model is not None:
            # TRL leaves it as it is loaded, and what towers make that ask for a gradient is not kept.
            self.ref_model.requires_grad_(False)
        self._check_rollout_size()

    def _check_rollout_size(self) -> None:
        """
        Check that there are rows for one rollout.

        Of fewer, TRL's sampler would make no step, and a schedule would repeat them.
        """
        needed = self.args.prompts_per_rollout
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
        Say which rows of the `dataset` the rollouts take: the hook that is called on every rank when a run begins.

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
            self._note_rewards(flight.rollout)
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

    @property
    def _ends_at_strings(self) -> bool:
        options = self.args.generation_kwargs or {}
        return bool(options.get("stop_strings") or options.get("stop"))

    def _correct_cut_share(self, completions: list[list[int]]) -> None:
        """Log completions as cut where they are as long as may be: TRL takes all that end at a string for cut."""
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        most = self.args.max_completion_length
        told = [[len(ids), len(ids) >= most and ids[-1] not in ends] for ids in completions]
        lengths, cut = self.accelerator.gather(torch.tensor(told, device=self.accelerator.device)).T
        whole = lengths[cut == 0].float() if (cut == 0).any() else torch.zeros(1)
        values = {"clipped_ratio": cut.float().mean()} | {
            f"{name}_terminated_length": of(whole)
            for name, of in (("mean", torch.mean), ("min", torch.min), ("max", torch.max))
        }
        for name, value in values.items():
            self._metrics[self._mode][f"completions/{name}"][-1] = float(value)

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

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        if self._ends_at_strings:
            self._correct_cut_share(generated[1])
        if self.family is None:
            return generated
        # TRL runs thoughts and answer of some models together, and of others drops the thoughts.
        prompt_ids, completion_ids, mask, _, *rest = generated
        texts = completion_texts(self.family, completion_ids, prompt_ids)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return prompt_ids, completion_ids, mask, completions, *rest

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
        texts = completion_texts(self.family, ids, prompt_ids)
        return [None if row in failed else text for row, text in enumerate(texts)]

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
        """
        Train as [`~transformers.Trainer.train`] does, anew or from a checkpoint.

        `resume_from_checkpoint=True` goes on from the last complete checkpoint in `output_dir`, and begins anew where
        there is none, with a warning: the same script starts a job and restarts it.

        Raises:
            EngineLostError: when the engine that samples has gone; the message says where the run can go on from.
            ResumeError: when this run cannot go on from the checkpoint: there is none, or it lacks weights, optimizer,
                schedule or random numbers (`save_only_model`), a reference model that has moved or the entropy's coefficient,
                or is of other data, batch sizes or processes.
            TooManyQuarantinedError: when more rows than `max_quarantined_share` cannot be used.
            NoStepError: when the run ends without an optimizer step.
            ValueError: when `output_dir` holds an evaluation.
        """
        self._distrust_engine()  # another run's steps have the same numbers
        # A run before this one may have stopped within a rollout.
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._begin_counts(self.args)
        self._step, self._buffered_inputs, self._before_rollout = 0, None, []
        # Nor is there to be anything of the micro-batches of a step that was not made.
        self._entropy_window_stats = None
        self._metrics["train"].clear()
        self.rollout_log.begin()
        try:
            return super().train(*args, **kwargs)
        except EngineError as error:
            raise EngineLostError(f"{error}. {self._save_where_it_stopped()}") from error

    def _check_checkpoint(self, checkpoint: str) -> None:
        if self.family is None:
            check_resume_signature(checkpoint, self.accelerator.process_index, self._resume_signature())
        super()._check_checkpoint(checkpoint)
        for part in self._trl_parts():
            part.check(checkpoint)

    def _save_checkpoint(self, model, trial):
        # Before the parent's: a checkpoint counts as complete once the parent has written trainer_state.json.
        folder = self._begin_checkpoint(trial)
        if self.family is not None and self.args.should_save:
            save_rows(folder, self.row_encoder.state_dict())
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
        with lent(self, use_adaptive_entropy=False):  # whose state TRL would write over ours, after trainer_state.json
            super()._save_checkpoint(model, trial)

    def state_parts(self) -> list[StatePart]:
        """
        Name what a checkpoint keeps beside weights, optimizer and rows: a hook.

        It is called on every rank before a run goes on from a checkpoint, and on the one that writes when one is written.
        What overrides it adds to the list.
        """
        return [self._missing, *self._trl_parts()]

    def _trl_parts(self) -> list[ReferenceState | EntropyState]:
        """Name what TRL's trainer changes itself beside policy and optimizer, as far as its options have it do so."""
        parts: list[ReferenceState | EntropyState] = []
        if self.args.sync_ref_model:
            parts.append(ReferenceState(self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)))
        if self.use_adaptive_entropy:
            parts.append(
                EntropyState(
                    lambda: {"entropy_coef": self.entropy_coef, "last_world_entropy": self._last_world_entropy}
                )
            )
        return parts

    def _resume_signature(self) -> dict[str, Any]:
        names = ("generation_batch_size", "steps_per_generation", "num_generations", "num_iterations")
        # By which Trainer tells from the number of steps how many micro-batches were drawn, and in which order rows come.
        names = (*names, "gradient_accumulation_steps", "sync_ref_model", "seed", "shuffle_dataset")
        return super()._resume_signature() | {name: getattr(self.args, name) for name in names}

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
