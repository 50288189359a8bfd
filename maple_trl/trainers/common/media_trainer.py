"""What trainers of prompts with video, audio and subtitles have in common, whatever their loss is."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled

from maple_trl.omni.encoded import KINDS, EncodedPrompt
from maple_trl.omni.families import OmniFamily, family_for, unwrap
from maple_trl.omni.generation import savable
from maple_trl.omni.host_memory import host_memory
from maple_trl.omni.loading import load_model
from maple_trl.omni.media.clips import NO_AUDIO
from maple_trl.omni.prompt import SUBTITLE_SHORTENED
from maple_trl.omni.quantization import describe
from maple_trl.omni.serving import serve_media
from maple_trl.omni.towers import TowerCache
from maple_trl.records.run_folder import ZERO_SHOT_FILE, holds_evaluation, named, run_results
from maple_trl.records.run_html import run_html
from maple_trl.trainers.common.arguments import each_dataset
from maple_trl.trainers.common.callback_state import check_callbacks, restore_callbacks
from maple_trl.trainers.common.checkpoint import (
    ResumeError,
    check_resume_signature,
    last_complete_checkpoint,
    load_rows,
    reopen,
)
from maple_trl.trainers.common.media_config import MediaConfig
from maple_trl.trainers.common.publishing import PublishingTrainer
from maple_trl.trainers.common.quarantine import QuarantineCallback, Ranks, write_quarantine
from maple_trl.trainers.common.resume_checks import check_optimizer, check_parts, find_checkpoint, options_of
from maple_trl.trainers.common.rollout_log import LiveLog
from maple_trl.trainers.common.rows import RowEncoder
from maple_trl.trainers.common.run_clock import RunClock
from maple_trl.trainers.common.run_errors import NoStepError, TooManyQuarantinedError
from maple_trl.trainers.common.run_summary import (
    Note,
    RunTally,
    changed_notes,
    make_note,
    quarantine_notes,
    unseen_note,
)
from maple_trl.trainers.common.sharding import check_awaited, keep_head_whole, name_present_layers
from maple_trl.trainers.common.stop_checkpoint import StopCheckpoint


logger = logging.getLogger(__name__)


class MediaTrainer(PublishingTrainer):
    """
    Mixed into a TRL trainer: reads rows with their media, samples completions, resumes with the same rows.

    Attributes:
        family (`OmniFamily`, *optional*): family of the model; `None` where it reads text alone.
        towers ([`~maple_trl.omni.towers.TowerCache`], *optional*): keeps what frozen towers make of clips.
        replaceable_state: files of a checkpoint without which a run may go on.
    """

    family: OmniFamily | None = None
    towers: TowerCache | None = None
    replaceable_state: tuple[str, ...] = ()
    _first_step = 0  # the step at which this call of `train` began

    def _prepare_media(self, model: nn.Module, processor: ProcessorMixin, args: MediaConfig) -> None:
        """Make what reads the rows' media, before the parent's constructor."""
        self.family = family_for(model, processor)
        self.family.check_pixels(args.max_pixels)
        if self.family.passed_alone and is_deepspeed_zero3_enabled():
            raise ValueError(
                f"{type(self.family).__name__} passes {' and '.join(self.family.passed_alone)} clip by clip, and DeepSpeed's ZeRO-3 "
                "gathers weights at each pass, of which all processes must make as many: use ZeRO-2, FSDP 2 or DDP"
            )
        self._leave_unread(model)
        name_present_layers(unwrap(model))
        reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if reentrant and args.ddp_find_unused_parameters is None:
            # Transformers has DDP look for unused parameters where the model has adapters, which fails with reentrant
            # checkpointing; all towers run instead.
            args.ddp_find_unused_parameters = False
        host_memory().set_limit(args.host_share())
        self.loader = args.media_loader()
        self.prompt_builder = args.prompt_builder(self.family, self.loader, args.chat_template_kwargs)
        ranks = Ranks(args.process_index, args.world_size, gather_object) if args.world_size > 1 else Ranks()
        shows = args.local_process_index == 0 and not args.disable_tqdm
        self.row_encoder = RowEncoder(
            self.prompt_builder,
            ranks,
            probe=args.media_check == "probe",
            progress=shows,
            most_lost=args.max_quarantined_share,
        )

    def _leave_unread(self, model: nn.Module) -> None:
        """Freeze weights that no pass reads: DDP would wait for their gradients, and ZeRO would let them decay."""
        for name, weight in unwrap(model).named_parameters():
            if weight.requires_grad and self.family.is_unread(name):
                logger.info("%s stays as it is: no pass of the model reads it", name)
                weight.requires_grad_(False)

    def _finish_construction(self) -> None:
        """Do what the trainers have in common after the parent's constructor."""
        self._live_log = LiveLog()
        self.add_callback(self._live_log)
        self._stop_checkpoint = StopCheckpoint.instead_of_transformers(self)
        self._check_checkpointing()
        self._keep_savable()
        self.towers = self._make_tower_cache()
        self._watch()
        self._write_quarantine()
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("Nothing is left to train: every parameter of the model is frozen")

    def _check_checkpointing(self) -> None:
        """Check what the parent's constructor has made of gradient checkpointing; under ZeRO-3 it changes that itself."""
        kwargs = self.args.gradient_checkpointing and self.args.gradient_checkpointing_kwargs
        if self.family is not None:
            self.family.check_training(reentrant=bool(kwargs and kwargs.get("use_reentrant")))

    def _keep_savable(self) -> None:
        """Make the model's generation config savable, in which the parent's constructor has set tokens."""
        model = unwrap(self.model)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config = savable(model.generation_config)

    def _make_tower_cache(self) -> TowerCache | None:
        args = self.args
        if self.family is None or not (args.encoder_cache_bytes or args.encoder_cache_dir):
            return None
        if self._spread:
            if args.encoder_cache_dir:
                logger.warning(
                    "encoder_cache_dir: nothing is kept there, since no process has the towers' whole weights"
                )
            return None
        return TowerCache(
            args.encoder_cache_bytes,
            args.encoder_cache_dir,
            args.encoder_cache_disk_bytes,
            clock=lambda: self.state.global_step,  # what writes to frozen weights does it between optimizer steps
        )

    def _send_telemetry(self) -> None:
        # The parent sends facts about every run to the Hub unless it is told not to; here it has to be told to.
        if telemetry_wanted():
            super()._send_telemetry()

    # Rows

    def _write_quarantine(self) -> None:
        if self.family is not None and self.accelerator.is_main_process:
            write_quarantine(os.path.join(self.args.output_dir, "quarantine.json"), self.row_encoder.quarantined)

    def encode_rows(self, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[EncodedPrompt]]:
        """Encode rows for a rollout, see [`~maple_trl.trainers.common.rows.RowEncoder.encode`]; a collective call."""
        known = len(self.row_encoder.quarantined)
        try:
            return self.row_encoder.encode(rows, evaluating=not self.model.training)
        finally:
            if len(self.row_encoder.quarantined) > known:
                self._write_quarantine()

    def _prefetch(self, rows: Sequence[dict[str, Any]], current: Sequence[EncodedPrompt]) -> None:
        """Begin to decode the media of rows to come, but for those of the current prompts."""
        done = {prompt.key for prompt in current}
        specs = {spec.key: spec for _, spec in map(self.row_encoder.usable, rows)}
        self.loader.prefetch([partial(self.prompt_builder.decode, specs[key]) for key in specs if key not in done])

    # What is left out

    def _watch(self) -> None:
        """Begin to count what the run leaves out, and to stop it for too much; after the parent's constructor."""
        self.tally, self.clock = RunTally(speaks=self.accelerator.is_main_process), RunClock()
        if self.family is not None:
            self.add_callback(QuarantineCallback(self.too_many_quarantined))

    def too_many_quarantined(self) -> str | None:
        """Return a complaint if a data set has lost more rows than `max_quarantined_share`, the same on all ranks."""
        return None if self.family is None else self.row_encoder.too_many(self.args.max_quarantined_share)

    def check_quarantine(self) -> None:
        """
        Check before training that few enough rows are in quarantine.

        Raises:
            TooManyQuarantinedError: when a data set has lost more rows than `max_quarantined_share`.
        """
        problem = self.too_many_quarantined()
        if problem is not None:
            raise TooManyQuarantinedError(
                f"{problem}. Nothing was trained. Mend the files (is media_root right?), or raise max_quarantined_share"
            )

    def left_out(self) -> list[Note]:
        """
        Return what the run left out, what failed in it and what never fired, each counted and named.

        Returns:
            `list[dict]`: `kind`, `count`, `text` and what else is known; `summary.json` holds the same. Empty where
                nothing was.
        """
        registries = list(self.row_encoder.registries.values()) if self.family is not None else []
        found = quarantine_notes(registries) + changed_notes(registries) + self.tally.notes()
        for registry in registries:
            if registry.name == "train_dataset":
                found += unseen_note(registry, self.state.epoch or 0)
        if self.steps_made == 0 and self.state.global_step:
            text = f"no step was left to make: the checkpoint is at step {self.state.global_step}"
            found.append(make_note("no_new_step", 0, text))
        return found

    def fired(self) -> list[Note]:
        """
        Return what the run did that it does only at times, each counted and named, as `left_out` does; empty where nothing.

        Returns:
            `list[dict]`: as of `left_out`.
        """
        return []

    def _repr_html_(self) -> str:
        """Show the run where a notebook shows a value: what it has learned, its latest completions, what it left out."""
        return run_html(type(self).__name__, self.state.log_history, self.args.output_dir, self.left_out())

    @property
    def steps_made(self) -> int:
        """Optimizer steps of the last call of `train`, without those before a checkpoint that it went on from."""
        return self.state.global_step - self._first_step

    def training_step(self, model, *args, **kwargs):
        """Make a step as [`~transformers.Trainer.training_step`] does, and check that DDP waits for no gradient in vain."""
        loss = super().training_step(model, *args, **kwargs)
        if not self.steps_made:
            check_awaited(model)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            value = norm.item() if isinstance(norm, torch.Tensor) else norm
            self.tally.checks.note_gradient(value, self.state.global_step + 1)
        return norm

    # Media and generation

    def _serve(self, model: nn.Module, prompts: Sequence[EncodedPrompt], packed: bool = False):
        return serve_media(self.family, model, prompts, touch=self._touched, packed=packed, cache=self.towers)

    @property
    def _mode(self) -> str:
        """The key of TRL's metrics under which the model's passes are logged."""
        return "train" if self.model.training else "eval"

    @property
    def _spread(self) -> bool:
        """Whether each rank keeps but a part of the weights."""
        zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return self.is_fsdp_enabled or zero3

    @property
    def _touched(self) -> tuple[str, ...]:
        """
        The kinds of media whose tower every pass runs.

        The vision tower reads two, and runs for those of them that rows are known to have: for a kind that none has, it would
        be gathered from all ranks for nothing.
        """
        if not self._same_towers:
            return ()
        kinds = list(self.family.placeholders)
        seen = [kind for kind in ("video", "image") if kind in kinds]
        held = [kind for kind in seen if kind in self.row_encoder.kinds] or seen[:1]
        return tuple(kind for kind in kinds if kind not in seen or kind in held)

    @property
    def _same_towers(self) -> bool:
        """Whether all ranks must run the same towers: weights or gradients are sharded, or DDP waits for each gradient."""
        # A launcher makes a single process distributed too.
        distributed = self.accelerator.distributed_type != DistributedType.NO
        waits = distributed and not self.args.ddp_find_unused_parameters
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or waits

    @torch.no_grad()
    def generate_completions(self, rows: Sequence[dict[str, Any]], batch_size: int | None = None) -> list[str | None]:
        """
        Sample one completion per row with the run's own generation settings and code path.

        The ranks share the work: every rank must call this with the same rows, and gets all completions.

        Args:
            batch_size: rows per rank at a time; default `per_device_eval_batch_size`.

        Returns:
            `list[str]`: texts in the rows' order, `None` for a row whose media cannot be used or that the engine fails on.

        Raises:
            ValueError: for a text-only model.
        """
        if self.family is None:
            raise ValueError("generate_completions needs an omni model with its processor")
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batch_size = batch_size or self.args.per_device_eval_batch_size
        share = list(rows)[rank::world]
        if self._same_towers:  # which must be the same on ranks whose share has no such media
            self.row_encoder.note_kinds(map(self.row_encoder.spec, map(self.prompt_builder.asked, rows)))
        chunks = -(-len(rows) // (world * batch_size))  # on every rank, for generating can be a collective call
        was_training = self.model.training
        self.model.eval()
        texts: list[str | None] = []
        try:
            for start in range(0, chunks * batch_size, batch_size):
                asked = map(self.prompt_builder.asked, share[start : start + batch_size])  # rows of any data set
                prompts = self.row_encoder.encode_each(list(asked))
                completions = iter(self._sample([prompt for prompt in prompts if prompt is not None]))
                texts += [None if prompt is None else next(completions) for prompt in prompts]
        finally:
            self.model.train(was_training)
        shares = gather_object([texts]) if world > 1 else [texts]
        return [shares[i % world][i // world] for i in range(len(rows))]

    def _log_media(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Log media tokens of the generation batch over all ranks, and rows that were fed less than they asked for."""
        kinds = (*KINDS, "subtitle")
        notes = {NO_AUDIO: "rows_without_audio_track", SUBTITLE_SHORTENED: "rows_with_shortened_subtitle"}
        local = [sum(prompt.media_tokens.get(kind, 0) for prompt in prompts) for kind in kinds]
        local += [sum(note in prompt.notes for prompt in prompts) for note in notes]
        total = self.accelerator.reduce(torch.tensor(local, device=self.accelerator.device), reduction="sum").tolist()
        metrics = self._metrics[self._mode]
        for name, value in zip(
            [f"media_tokens/{k}" for k in kinds] + [f"media/{n}" for n in notes.values()], total, strict=True
        ):
            metrics[name].append(float(value))
        for note, clips in self.loader.notes.items():
            metrics[f"media/clips_{note}"].append(float(clips))
        metrics["media/quarantined_prompts"].append(float(len(self.row_encoder.quarantined)))
        if self.model.training:
            self.tally.counts.update(dict(zip(notes.values(), total[len(kinds) :], strict=True)))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as [`~transformers.Trainer.log`] does, with what this process keeps in memory beside a step's numbers."""
        if self.family is not None and "loss" in logs:
            logs = logs | host_memory().metrics()
        super().log(logs, *args, **kwargs)

    # State

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train as [`~transformers.Trainer.train`] does.

        `resume_from_checkpoint=True` goes on from the last complete checkpoint in `output_dir`, and begins anew where
        there is none, with a warning: the same script starts a job and restarts it.

        Raises:
            ResumeError: when this run cannot go on from the checkpoint: there is none, or it lacks weights, optimizer,
                schedule or random numbers (`save_only_model`), or is of other data, batch sizes or processes.
            TooManyQuarantinedError: when more rows than `max_quarantined_share` cannot be used.
            NoStepError: when the run ends without an optimizer step.
            ValueError: when `output_dir` holds an evaluation.
        """
        if isinstance(resume_from_checkpoint, os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        elif resume_from_checkpoint is False:
            resume_from_checkpoint = None
        self._check_output_dir(fresh=resume_from_checkpoint is None)
        self._first_step, self.tally = 0, RunTally(speaks=self.accelerator.is_main_process)
        if resume_from_checkpoint is not None:
            resume_from_checkpoint = self._checked_checkpoint(resume_from_checkpoint)
            self.tally.load(resume_from_checkpoint)
        self._live_log.checkpoint = resume_from_checkpoint
        self.check_quarantine()
        self.clock = RunClock(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if not self.state.global_step:
            raise NoStepError(
                f"The run ended without an optimizer step: {self._amount_of_data()}, max_steps={self.args.max_steps}, "
                f"num_train_epochs={self.args.num_train_epochs:g}. The model is as it was; it needs at least one whole batch"
            )
        if not self.steps_made:
            logger.warning("%s: no step was left to make", resume_from_checkpoint)
        return output

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.family is not None:
            model = self.accelerator.unwrap_model(self.model)
            keep_head_whole(unwrap(model), self.family.core(model))
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = self.optimizer
        comparable = checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        made = options_of(optimizer.param_groups) if comparable else []
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (KeyError, ValueError) as error:
            raise ResumeError(
                f"{checkpoint} has the state of an optimizer for other parameters ({error}): resume with the optim, frozen "
                "parts and adapters with which the run began"
            ) from error
        if comparable:
            check_optimizer(checkpoint, made, options_of(optimizer.param_groups))

    def _amount_of_data(self) -> str:
        size = len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None
        return "train_dataset is a stream that gave too few rows" if size is None else f"train_dataset has {size} rows"

    def _check_output_dir(self, fresh: bool) -> None:
        """
        Refuse the folder of an evaluation, and warn of results of another run.

        Results of two runs in one folder are taken for those of one, by reports and when a run is resumed.
        """
        folder = self.args.output_dir
        if holds_evaluation(folder):
            raise ValueError(f"output_dir: {folder} holds an evaluation; name another folder for the training run")
        # The accuracies alone are of a run that came no further.
        results = [] if (found := run_results(folder)) == [ZERO_SHOT_FILE] else found
        if fresh and results and not self.state.global_step and self.accelerator.is_main_process:
            logger.warning(
                "output_dir: %s holds results of another run (%s), which this one replaces in part: "
                "resume_from_checkpoint=True may go on from a checkpoint of that run. Name another folder, or remove them.",
                folder,
                named(results),
            )

    def _last_checkpoint(self) -> str | None:
        """Find the last complete checkpoint in the run's folder; warn where there is none."""
        last = last_complete_checkpoint(self.args.output_dir)
        if last is None and self.accelerator.is_main_process:
            logger.warning(
                "resume_from_checkpoint: there is no complete checkpoint-N folder in %s; the run begins anew",
                self.args.output_dir,
            )
        return last

    @property
    def was_asked_to_end(self) -> bool:
        """Whether the last training ended before its last step because the job was sent SIGTERM (`enable_jit_checkpoint`)."""
        return self._stop_checkpoint is not None and self._stop_checkpoint.ended

    def check_checkpoint(self, wanted: str) -> str:
        """
        Find the checkpoint that is meant, and check that the run can go on from it; every rank must call this.

        Returns:
            `str`: its path.

        Raises:
            ResumeError: on all ranks, for what one of them finds wrong with it.
        """
        error, checkpoint = None, ""
        try:
            checkpoint = find_checkpoint(wanted, self.args.output_dir)
            self._check_checkpoint(checkpoint)
        except ResumeError as found:
            error = found
        problems = [text for text in gather_object([error and str(error)]) if text]
        if problems:
            raise error or ResumeError(problems[0])
        return checkpoint

    def _checked_checkpoint(self, wanted: str) -> str:
        """Find the checkpoint that is meant, check it, and take from it which rows the run has had."""
        checkpoint = self.check_checkpoint(wanted)
        if self.family is not None:
            self._restore_rows(checkpoint)
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            self._first_step = json.load(file)["global_step"]
        return checkpoint

    def _check_checkpoint(self, checkpoint: str) -> None:
        """Check that the run can go on from a checkpoint."""
        if self.family is not None:
            check_resume_signature(checkpoint, self.accelerator.process_index, self._resume_signature())
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        check_parts(checkpoint, rank, world, self.replaceable_state)
        check_callbacks(self.callback_handler.callbacks)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            restore_callbacks(self.callback_handler.callbacks, self.state.stateful_callbacks)
        return trained

    def _resume_signature(self) -> dict[str, Any]:
        """Return what a checkpoint and the run that resumes it must have in common to go on where it stopped."""
        return {"processes": self.accelerator.num_processes, "quantization": describe(self.model)}

    def _run_epoch(self, *args, **kwargs):
        # The parent makes a step before it asks whether one was left.
        if self.args.max_steps > 0 and self.state.global_step >= self.args.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _restore_rows(self, checkpoint: str) -> None:
        """Restore the rows that the run began with, even where files broke or were mended in between."""
        states = load_rows(checkpoint)
        for name, registry in self.row_encoder.registries.items():
            if name in states:
                registry.load_state_dict(states[name])
        self._write_quarantine()

        def restored(dataset: Any, name: str) -> Any:
            return (
                self.row_encoder.registries[name].usable_dataset() if name in self.row_encoder.registries else dataset
            )

        self.train_dataset = restored(self.train_dataset, "train_dataset")
        self.eval_dataset = each_dataset(self.eval_dataset, "eval_dataset", restored)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            folder = self._checkpoint_folder(trial)
            os.makedirs(folder, exist_ok=True)
            self.tally.save(folder)
            self.clock.save(folder)
        super()._save_checkpoint(model, trial)

    def _begin_checkpoint(self, trial: Any) -> str:
        """Return the folder that a checkpoint is to be written into, which counts as incomplete from now on; a collective call."""
        folder = self._checkpoint_folder(trial)
        if self.args.should_save:
            reopen(folder)
        self.accelerator.wait_for_everyone()
        return folder

    def _checkpoint_folder(self, trial: Any) -> str:
        return os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # The main process writes trainer_state.json next, which says that all files of all ranks are there.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        loaded = self.model if model is None else model
        if not self._load_weights(resume_from_checkpoint, loaded):
            with _types_kept(loaded):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_weights(self.state.best_model_checkpoint, self.model):
            with _types_kept(self.model):
                super()._load_best_model()

    def _load_weights(self, checkpoint: str, model: nn.Module) -> bool:
        """
        Load a whole model's weights by `from_pretrained`, which maps a checkpoint's names to the model's.

        They differ for omni and vision-language models, and the parent passes over names that it does not find.
        Returns False where the parent must do it: adapters, and weights that are sharded over processes.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel) or sharded:
            return False
        kinds = {parameter.dtype for parameter in model.parameters()}
        # One part may be kept in float32: reading it as the rest would round it.
        dtype = kinds.pop() if len(kinds) == 1 else torch.float32
        model.load_state_dict(load_model(checkpoint, dtype=dtype).state_dict())
        return True


@contextmanager
def _types_kept(model: nn.Module) -> Iterator[None]:
    """Keep the types of what is trained: PEFT reads adapters back in float32, which TRL keeps otherwise beside few bits."""
    types = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if weight.dtype != types.get(name, weight.dtype):
            weight.data = weight.data.to(types[name])


def telemetry_wanted() -> bool:
    """Return whether the environment asks for usage telemetry: `HF_HUB_DISABLE_TELEMETRY` is there, and says no."""
    return os.environ.get("HF_HUB_DISABLE_TELEMETRY", "").strip().lower() in ("0", "false", "no", "off")
