"""GRPO for prompts with video, audio and subtitles."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, set_seed
from trl import GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import pad

from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids, generation_position_ids
from maple_trl.omni.families import family_for, is_omni, unwrap
from maple_trl.omni.loading import hub_arguments, load_model, load_processor
from maple_trl.omni.media import MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media
from maple_trl.trainers.lookahead import LookaheadSampler
from maple_trl.trainers.omni_grpo_config import OmniGRPOConfig
from maple_trl.trainers.quarantine import Ranks, write_quarantine
from maple_trl.trainers.rollout_state import (
    Chunk,
    ResumeError,
    check_geometry,
    count_rows,
    last_complete_checkpoint,
    load_rollout,
    load_rows,
    merge_chunks,
    regroup_rows,
    save_rollout,
    save_rows,
    split_rows,
)
from maple_trl.trainers.rows import RowEncoder
from maple_trl.trainers.tag_metrics import RunningMeans


PROMPTS_KEY = "omni_prompts"


class OmniGRPOTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] whose prompts can hold video, audio and subtitles, each row its own, in one batch.

    Media reach generation, the old and reference log-probabilities and the training forward; a row whose media were
    not consumed raises. A text-only model (a tokenizer as `processing_class`) trains exactly as with TRL.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            A model of a registered family. From a full Omni checkpoint the Thinker alone is loaded.
        reward_funcs: as in [`~trl.GRPOTrainer`]; every column of a row reaches them.
        args ([`OmniGRPOConfig`], *optional*): configuration.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows with `prompt`, and where they apply `video`, `audio`, `subtitle`, `tag` and `audio_in_video` (see
            [`~maple_trl.omni.prompt.PromptBuilder`]).
        eval_dataset: as in [`~trl.GRPOTrainer`], with the same columns.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*): loaded with the model if absent.
        kwargs: the other arguments of [`~trl.GRPOTrainer`]; tools, environments and rollout functions are rejected.

    Raises:
        RowError: for the first row that cannot be a prompt, with its number and field.
        ValueError: when options do not fit together.
    """

    _tag_names = ["trl", "grpo", "omni", "maple-trl"]
    _name = "Omni GRPO"
    _config_class = OmniGRPOConfig

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
        for name in ("tools", "rollout_func", "environment_factory", "quantization_config"):
            if kwargs.get(name):
                raise ValueError(f"{type(self).__name__} does not support `{name}` in this version")
        name = model if isinstance(model, str) else unwrap(model).config._name_or_path
        if args is None:
            args = self._config_class(f"{name.rstrip('/').split('/')[-1]}-{self._name.replace(' ', '-')}")
        if not isinstance(args, self._config_class):
            raise TypeError(f"args must be of type {self._config_class.__name__}, got {type(args).__name__}")
        args = copy.copy(args)
        init_kwargs = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if not any(isinstance(reward, str) for reward in rewards):  # reward models are loaded with them too
            args.model_init_kwargs = None  # TRL would call them ignored, although the reference model gets them here
        if isinstance(model, str):
            set_seed(args.seed)
            model = load_model(model, **init_kwargs)
        if processing_class is None:
            if not name:
                raise ValueError("The model does not know where it was loaded from: pass its processing_class")
            processing_class = load_processor(name, **hub_arguments(init_kwargs))

        self.family = None
        self._serving: list[EncodedPrompt] | None = None
        self._order: Sampler | None = None
        self._lookahead: LookaheadSampler | None = None
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        if isinstance(processing_class, PreTrainedTokenizerBase):
            _check_text_only(model, {"train_dataset": train_dataset, "eval_dataset": eval_dataset})
        else:
            self._prepare_omni(model, processing_class, args)
            train_dataset = self.rows.register(train_dataset, "train_dataset")
            eval_dataset = _each_dataset(eval_dataset, "eval_dataset", self.rows.register)

        with _trl_expectations(unwrap(model), init_kwargs):
            super().__init__(
                model,
                reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        self._write_quarantine()
        self._check_rollout_size()
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("Nothing is left to train: every parameter of the model is frozen")

    def _prepare_omni(self, model: nn.Module, processor: ProcessorMixin, args: OmniGRPOConfig) -> None:
        self.family = family_for(model, processor)
        self.loader = MediaLoader(
            args.media_root,
            args.media_limits(),
            cache_bytes=args.media_cache_bytes,
            allow_network=args.media_allow_network,
            backend=args.media_backend,
        )
        self.prompt_builder = PromptBuilder(
            self.family,
            self.loader,
            modality_access=args.modality_access,
            audio_in_video=args.audio_in_video,
            subtitle_template=args.subtitle_template,
            max_prompt_length=args.max_prompt_length,
            max_media_tokens=args.max_media_tokens,
            chat_template_kwargs=args.chat_template_kwargs,
        )
        ranks = Ranks(args.process_index, args.world_size, gather_object) if args.world_size > 1 else Ranks()
        shows = args.local_process_index == 0 and not args.disable_tqdm
        self.rows = RowEncoder(self.prompt_builder, ranks, probe=args.media_check == "probe", progress=shows)
        # A sampled media token would be taken for media by the next forward.
        user_tokens = (args.generation_kwargs or {}).get("suppress_tokens") or []
        suppressed = sorted({*self.family.suppressed_ids, *user_tokens})
        args.generation_kwargs = {**(args.generation_kwargs or {}), "suppress_tokens": suppressed}

    def _check_rollout_size(self) -> None:
        """From fewer rows than a rollout takes, TRL's sampler would make no step, and a schedule would repeat them."""
        needed = self.args.generation_batch_size // self.num_generations
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) < needed:
            raise ValueError(
                f"train_dataset has {len(self.train_dataset)} usable rows, but one rollout takes {needed} prompts "
                "(generation_batch_size / num_generations): lower per_device_train_batch_size or "
                "gradient_accumulation_steps, or raise num_generations"
            )

    # Rows

    def _write_quarantine(self) -> None:
        if self.family is not None and self.accelerator.is_main_process:
            write_quarantine(os.path.join(self.args.output_dir, "quarantine.json"), self.rows.quarantined)

    def encode_rows(self, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[EncodedPrompt]]:
        """
        Encodes rows for a rollout; see [`~maple_trl.trainers.rows.RowEncoder.encode`]. Every rank must call this together.
        """
        known = len(self.rows.quarantined)
        encoded = self.rows.encode(rows, evaluating=not self.model.training)
        if len(self.rows.quarantined) > known:
            self._write_quarantine()
        return encoded

    def _get_train_sampler(self, dataset: Dataset | None = None):
        sampler = self._order = self._row_order(dataset)
        if self.family is None or not self.args.media_prefetch:
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

    def _row_order(self, dataset: Dataset | None) -> Sampler | None:
        """Yields the rows of the rollouts, each once per completion, micro-batch and iteration."""
        return super()._get_train_sampler(dataset)

    def _prefetch_next_batch(self, current: Sequence[EncodedPrompt]) -> None:
        if self._lookahead is not None:
            self._prefetch([self.train_dataset[i] for i in self._lookahead.upcoming()], current)

    def _prefetch(self, rows: Sequence[dict[str, Any]], current: Sequence[EncodedPrompt]) -> None:
        """Begins to decode the media of rows to come, but for those of the current prompts."""
        waiting = {}
        for row in map(self.rows.usable, rows):
            waiting.setdefault(self.prompt_builder.spec(row).key, partial(self.prompt_builder.decode, row))
        done = {prompt.key for prompt in current}
        self.loader.prefetch([decode for key, decode in waiting.items() if key not in done])

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, "video", "audio", "subtitle", "tag", "audio_in_video"]

    # Generation

    @contextmanager
    def _rows_in_use(self, prompts: list[EncodedPrompt] | None) -> Iterator[None]:
        """The prompts of the rows that TRL's methods work on, which do not pass them on themselves."""
        previous, self._serving = self._serving, prompts
        try:
            yield
        finally:
            self._serving = previous

    def _serve(self, model: nn.Module, prompts: Sequence[EncodedPrompt]):
        return serve_media(self.family, model, prompts, touch_all_towers=self._touch_all_towers)

    @property
    def _touch_all_towers(self) -> bool:
        """Whether all ranks must run the same towers: their parameters are sharded, or DDP waits for each gradient."""
        zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        waits = self.accelerator.num_processes > 1 and not self.args.ddp_find_unused_parameters
        return self.is_fsdp_enabled or zero3 or waits

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.family is None:
            return self._complete(inputs, None)
        inputs, prompts = self.encode_rows(inputs)
        if self.model.training:
            self._prefetch_next_batch(prompts)
        return self._complete(inputs, prompts)

    def _complete(self, rows: list[dict[str, Any]], prompts: list[EncodedPrompt] | None) -> Chunk:
        """A rollout of this rank's rows, whose prompts are encoded; `None` for a text-only model."""
        with self._rows_in_use(prompts):
            output = super()._generate_and_score_completions(rows)
        if prompts is None:
            return output
        self._log_media(prompts)
        return output | {PROMPTS_KEY: prompts}

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict[str, torch.Tensor]]:
        if self.family is None:
            return super()._tokenize_prompts(prompts)
        rows = self._serving
        width = max(map(len, rows))
        if self.pad_to_multiple_of is not None:
            width += -width % self.pad_to_multiple_of
        return [row.input_ids.tolist() for row in rows], None, {"position_ids": generation_position_ids(rows, width)}

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self.family is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with self._serve(self.model, self._serving):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    @torch.no_grad()
    def generate_completions(self, rows: Sequence[dict[str, Any]], batch_size: int | None = None) -> list[str | None]:
        """
        Samples one completion per row with the run's own generation settings and code path.

        The ranks share the work: every rank must call this with the same rows, and gets all completions.

        Args:
            batch_size: rows per rank at a time; default `per_device_eval_batch_size`.

        Returns:
            `list[str]`: texts in the rows' order, `None` for a row whose media cannot be used.

        Raises:
            ValueError: for a text-only model.
        """
        if self.family is None:
            raise ValueError("generate_completions needs an omni model with its processor")
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batch_size = batch_size or self.args.per_device_eval_batch_size
        share = list(rows)[rank::world]
        chunks = -(-len(rows) // (world * batch_size))  # on every rank, for generating can be a collective call
        was_training = self.model.training
        self.model.eval()
        texts: list[str | None] = []
        try:
            for start in range(0, chunks * batch_size, batch_size):
                prompts = self.rows.encode_each(share[start : start + batch_size])
                completions = iter(self._sample([prompt for prompt in prompts if prompt is not None]))
                texts += [None if prompt is None else next(completions) for prompt in prompts]
        finally:
            self.model.train(was_training)
        shares = gather_object([texts]) if world > 1 else [texts]
        return [shares[i % world][i // world] for i in range(len(rows))]

    def _sample(self, prompts: list[EncodedPrompt]) -> list[str]:
        idle = not prompts
        if idle and self.accelerator.num_processes == 1:
            return []
        if idle:  # the other ranks generate
            prompts = [self.prompt_builder.encode({"prompt": [{"role": "user", "content": "."}]})]
        with self._rows_in_use(prompts):
            prompt_ids, _, fields = self._tokenize_prompts([])
            ids, _ = self._generate_single_turn(prompt_ids, None, fields, 1)
        return [] if idle else self.processing_class.batch_decode(ids, skip_special_tokens=True)

    # Rewards

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Rewards are handed `group_ids` and, where one of them asks for it, `completion_logprobs` besides the columns."""
        columns = {}
        if self._serving is not None:
            columns["group_ids"] = [prompt.key for prompt in self._serving]
        if any(map(_wants_logprobs, self.reward_funcs)):
            columns["completion_logprobs"] = self._completion_logprobs(prompts, completion_ids_list)
        inputs = [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(inputs)]
        scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for name, values in zip(self.reward_func_names, scores.T, strict=True):
            if values.isinf().any():
                raise ValueError(f"The reward function {name!r} returned an infinite reward; use a finite one or None")
        return scores

    @torch.no_grad()
    def _completion_logprobs(self, prompts: list, completion_ids: list[list[int]]) -> list[list[float]]:
        """Log-probability of each token of this rank's completions under the policy."""
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
        return [row[: len(tokens)].tolist() for row, tokens in zip(logps, completions, strict=True)]

    def _total_rewards(self, scores: torch.Tensor) -> torch.Tensor:
        """
        The weighted sum of the reward functions; NaN for a completion that none could score.

        Args:
            scores (`Tensor` of shape (N, reward functions)): NaN where a function gave no reward.
        """
        total = (scores * self.reward_weights.to(scores.device)).nansum(dim=1)
        return total.masked_fill(scores.isnan().all(dim=1), torch.nan)

    # Ranks

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks; a collective call."""
        return self.accelerator.reduce(values, reduction="sum") if self.accelerator.num_processes > 1 else values

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's rows of values over all ranks."""
        return values.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    # Log-probabilities and loss

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._serving is not None:
            served = partial(self._forward_with_media, model, iter(self._serving), logits_to_keep)
        return super()._get_per_token_logps_and_entropies(
            model if self._serving is None else served, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _forward_with_media(self, model: nn.Module, rows: Iterator[EncodedPrompt], logits_to_keep: int, **inputs):
        """Stands in for `model` in TRL's log-probability loop, which takes its rows in order, chunk by chunk."""
        batch, length = inputs["input_ids"].shape
        prompts = [next(rows) for _ in range(batch)]
        positions = batch_position_ids(prompts, length - logits_to_keep, logits_to_keep)
        positions = positions.to(inputs["input_ids"].device)
        with self._serve(self.accelerator.unwrap_model(model), prompts):
            return model(**inputs, position_ids=positions[0] if positions.size(0) == 1 else positions)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        fresh = self._buffered_inputs is not before and PROMPTS_KEY in inputs
        if not fresh or not any(p.kinds for chunk in self._buffered_inputs for p in chunk[PROMPTS_KEY]):
            return inputs
        # TRL shuffles rows, which spreads a prompt's rows over micro-batches and encodes its media in each.
        sizes = [count_rows(chunk) for chunk in self._buffered_inputs]
        self._buffered_inputs = split_rows(regroup_rows(merge_chunks(self._buffered_inputs), PROMPTS_KEY), sizes)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model, inputs):
        with self._rows_in_use(inputs.get(PROMPTS_KEY)):
            return super()._compute_loss(model, inputs)

    # Metrics

    def _log_all(self, metrics: Mapping[str, float], mode: str = "train") -> None:
        for name, value in metrics.items():
            self._metrics[mode][name].append(float(value))

    def _replace_logged_advantages(self, advantages: torch.Tensor) -> None:
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._log_all(self._means[mode].take(), mode)
        super().log(logs, start_time)

    def _log_media(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Media tokens of the generation batch over all ranks, and rows that were fed less than they asked for."""
        mode = "train" if self.model.training else "eval"
        kinds = ("video", "audio", "subtitle")
        notes = {"no-audio-track": "rows_without_audio_track", "subtitle-shortened": "rows_with_shortened_subtitle"}
        local = [sum(prompt.media_tokens.get(kind, 0) for prompt in prompts) for kind in kinds]
        local += [sum(note in prompt.notes for prompt in prompts) for note in notes]
        total = self.accelerator.reduce(torch.tensor(local, device=self.accelerator.device), reduction="sum").tolist()
        metrics = self._metrics[mode]
        for name, value in zip(
            [f"media_tokens/{k}" for k in kinds] + [f"media/{n}" for n in notes.values()], total, strict=True
        ):
            metrics[name].append(float(value))
        for note, clips in self.loader.notes.items():
            metrics[f"media/clips_{note}"].append(float(clips))
        metrics["media/quarantined_prompts"].append(float(len(self.rows.quarantined)))

    # State

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As in [`~transformers.Trainer`]. `resume_from_checkpoint=True` goes on from the last complete checkpoint in
        `output_dir`, and begins anew where there is none.

        Raises:
            ResumeError: when this run cannot go on from the checkpoint: other data, batch sizes or number of processes.
        """
        if isinstance(resume_from_checkpoint, os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if isinstance(resume_from_checkpoint, str):
            check_geometry(resume_from_checkpoint, self.accelerator.process_index, self._geometry())
            if self.family is not None:
                self._restore_rows(resume_from_checkpoint)
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._step, self._buffered_inputs = 0, None  # a run before this one may have stopped within a rollout
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _restore_rows(self, checkpoint: str) -> None:
        """The run goes on with the rows that it began with, even where files broke or were mended in between."""
        states = load_rows(checkpoint)
        for name, registry in self.rows.registries.items():
            if name in states:
                registry.load_state_dict(states[name])
        self._write_quarantine()

        def restored(dataset: Any, name: str) -> Any:
            return self.rows.registries[name].usable_dataset() if name in self.rows.registries else dataset

        self.train_dataset = restored(self.train_dataset, "train_dataset")
        self.eval_dataset = _each_dataset(self.eval_dataset, "eval_dataset", restored)

    def _save_checkpoint(self, model, trial):
        # Before the parent's: a checkpoint counts as complete once the parent has written trainer_state.json.
        folder = self._checkpoint_folder(trial)
        if self.family is not None and self.args.should_save:
            save_rows(folder, {name: registry.state_dict() for name, registry in self.rows.registries.items()})
        save_rollout(
            folder, self.accelerator.process_index, self._step, self._pending_chunks(), PROMPTS_KEY, self._geometry()
        )
        super()._save_checkpoint(model, trial)

    def _checkpoint_folder(self, trial: Any) -> str:
        return os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")

    def _geometry(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must have in common to go on where it stopped."""
        names = ("generation_batch_size", "steps_per_generation", "num_generations", "num_iterations")
        return {"processes": self.accelerator.num_processes} | {name: getattr(self.args, name) for name in names}

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # The main process writes trainer_state.json next, which says that all files of all ranks are there.
        self.accelerator.wait_for_everyone()

    def _pending_chunks(self) -> list[dict[str, Any]] | None:
        """Chunks of the last rollout, while some of its updates are still to come."""
        return self._buffered_inputs if self._step % self._updates_per_rollout else None

    @property
    def _updates_per_rollout(self) -> int:
        """Micro-batches that are trained on before the next rollout."""
        return self.args.steps_per_generation * self.num_iterations

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._load_weights(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_weights(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()

    def _load_weights(self, checkpoint: str, model: nn.Module) -> bool:
        """
        Loads a whole model's weights by `from_pretrained`, which maps a checkpoint's names to the model's.

        They differ for omni and vision-language models, and the parent passes over names that it does not find.
        Returns False where the parent must do it: adapters, and weights that are sharded over processes.
        """
        if isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel) or self.is_fsdp_enabled:
            return False
        kinds = {parameter.dtype for parameter in model.parameters()}
        # One part may be kept in float32: reading it as the rest would round it.
        dtype = kinds.pop() if len(kinds) == 1 else torch.float32
        model.load_state_dict(load_model(checkpoint, dtype=dtype).state_dict())
        return True

    def _init_training_state(self, *args, **kwargs):
        epochs_trained, steps_trained = super()._init_training_state(*args, **kwargs)
        # TRL's sampler draws an order per epoch: draw those of the epochs that are done.
        for _ in range(epochs_trained if self._order is not None else 0):
            next(iter(self._order), None)
        return epochs_trained, steps_trained

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._step, self._buffered_inputs = load_rollout(
            checkpoint, self.accelerator.process_index, self._prompts_by_key, PROMPTS_KEY, self.accelerator.device
        )

    def _prompts_by_key(self, keys: list[str]) -> list[EncodedPrompt]:
        if not isinstance(self.train_dataset, Dataset):
            raise ResumeError(
                "The checkpoint lies in the middle of a rollout, whose prompts cannot be found again in a streamed data "
                "set. Resume from a checkpoint at the end of a rollout, or train on a map-style data set."
            )
        registry = self.rows.registries["train_dataset"]
        encoded = {key: self.prompt_builder.encode(registry.row_of(key)) for key in dict.fromkeys(keys)}
        return [encoded[key] for key in keys]


def _wants_logprobs(reward: Any) -> bool:
    """Whether a reward function names the argument `completion_logprobs`, which costs a pass over the completions."""
    if isinstance(reward, nn.Module) or not callable(reward):
        return False
    return "completion_logprobs" in inspect.signature(reward).parameters


def _each_dataset(dataset: Any, name: str, apply: Callable[[Any, str], Any]) -> Any:
    """Applies a function to a data set and its name, or to each of a dictionary of data sets."""
    if isinstance(dataset, dict):
        return {key: apply(part, f"{name}[{key!r}]") for key, part in dataset.items()}
    return apply(dataset, name)


def _check_text_only(model: nn.Module, datasets: dict[str, Any]) -> None:
    """A tokenizer reads no media: refuses to train on the text alone."""
    if is_omni(model):
        raise ValueError(
            f"processing_class is a tokenizer, but {type(unwrap(model)).__name__} reads media: pass the model's processor"
        )
    for name, dataset in datasets.items():
        parts = dataset if isinstance(dataset, dict) else {name: dataset}
        for part in parts.values():
            columns = {"video", "audio", "subtitle"} & set(getattr(part, "column_names", None) or [])
            if columns:
                raise ValueError(
                    f"{name} has the column {sorted(columns)[0]!r}, but processing_class is a tokenizer, which reads no "
                    "media: use an omni model with its processor, or drop the column"
                )


@contextmanager
def _trl_expectations(model: nn.Module, init_kwargs: dict[str, Any]) -> Iterator[None]:
    """
    Bridges places of TRL's constructor that know vision-language or text models alone.

    It reads `config.image_token_id` of every model with a processor (ours replaces the tokens that it suppresses),
    loads the reference model by the class that the checkpoint names, which for an Omni checkpoint is not the Thinker,
    and to keep an LM head in float32 asks whether it is tied, and for the embedding, where text models have them.
    """
    borrowers: list[tuple[Any, str]] = []

    def lend(owner: Any, name: str, value: Any) -> None:
        if not hasattr(owner, name):
            vars(owner)[name] = value
            borrowers.append((owner, name))

    def lend_parts(model: nn.Module) -> None:
        lend(model.config, "image_token_id", None)
        tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        lend(model.config, "tie_word_embeddings", tied)
        for part in (model, getattr(model, "model", None)):  # TRL looks in a model with adapters, else in its core
            if part is not None:
                lend(part, "embed_tokens", model.get_input_embeddings())

    def load_reference(path: str, **kwargs: Any) -> PreTrainedModel:
        reference = load_model(path, **(kwargs | init_kwargs))
        lend_parts(reference)
        return reference

    lend_parts(model)
    try:
        with mock.patch.object(grpo_trainer, "create_model_from_path", load_reference):
            yield
    finally:
        for owner, name in borrowers:
            del vars(owner)[name]
