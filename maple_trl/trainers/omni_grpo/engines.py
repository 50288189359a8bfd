"""Which engine samples for a trainer, and what is checked of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import gather_object

from maple_trl.algorithms import raw_ratios, summarise_ratios
from maple_trl.omni.errors import MediaError
from maple_trl.rollout import EngineError, RolloutEngine, TransformersEngine, VLLMEngine
from maple_trl.rollout.engine_models import engine_model
from maple_trl.rollout.sampling_options import vllm_options
from maple_trl.rollout.vllm_engine import generation_class
from maple_trl.rollout.vllm_generation import MergingGeneration, OmniVLLMGeneration
from maple_trl.trainers.common.batch import Batch
from maple_trl.trainers.common.checkpoint import is_complete
from maple_trl.trainers.common.hinted_rows import prompt_key
from maple_trl.trainers.common.learning_checks import dropout_layers
from maple_trl.trainers.common.rollout import RolloutInFlight
from maple_trl.trainers.common.sampling_checks import MOST_DIFFERENCE, ratio_metrics
from maple_trl.trainers.common.tag_metrics import tag_number
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig


logger = logging.getLogger(__name__)


def check_engine_is_there(args: OmniGRPOConfig) -> None:
    """
    Check that vLLM is, before a model is loaded for it.

    Raises:
        ImportError: where it is not.
    """
    if args.use_vllm and args.vllm_mode == "colocate" and find_spec("vllm") is None:
        raise ImportError(
            "use_vllm=True with vllm_mode='colocate' needs vLLM (pip install 'maple-trl[vllm]'); with vllm_mode='server' the "
            "server alone does, and with use_vllm=False the model generates by itself"
        )


class EngineMixin:
    """
    Chooses the engine of [`~maple_trl.OmniGRPOTrainer`], holds it to the policy, and ends a run that has lost it.

    Attributes:
        engine ([`~maple_trl.rollout.RolloutEngine`]): what completions are sampled with; another one may be put in its place.
    """

    def _prepare_generation(self, args: OmniGRPOConfig) -> None:
        """Adapt sampling options for TRL's constructor: media tokens are not sampled, which the next forward would read."""
        self._engine_is_known = False
        self._before_rollout: list[Callable[[], None]] = []  # what puts state back that a rollout under way has moved
        self._stream_after_step = torch.get_rng_state()
        options = dict(args.generation_kwargs or {})
        if self.family is not None:
            suppressed = sorted({*self.family.suppressed_ids, *(options.get("suppress_tokens") or [])})
            args.generation_kwargs = {**options, "suppress_tokens": suppressed}
        elif args.use_vllm:  # TRL hands them on as they are
            translated = vllm_options(options, (), ())
            args.generation_kwargs = {name: value for name, value in translated.items() if value}

    def _vllm_generation(self, args: OmniGRPOConfig) -> Callable[..., Any] | None:
        """Return what makes the access to vLLM; `None` without. That of a text-only model is TRL's but for adapters."""
        if not args.use_vllm:
            return None
        if self.family is None:
            if args.vllm_engine_options:
                raise ValueError(
                    "vllm_engine_options: TRL starts the engine of a text-only model, and takes none of them"
                )
            return MergingGeneration
        if args.vllm_model_impl not in ("auto", "vllm"):
            raise ValueError(
                f"vllm_model_impl={args.vllm_model_impl!r}: prompts with media take vLLM's own models ('auto')"
            )
        engine_model(self.family.config.model_type, args.device.type)
        own = {"engine_options": args.vllm_engine_options or {}} if args.vllm_mode == "colocate" else {}
        if args.vllm_mode == "server":
            own = {"request_timeout": args.vllm_request_timeout, "folder": args.output_dir}

        def make(*given: Any, **options: Any) -> OmniVLLMGeneration:
            kind = generation_class(args.vllm_mode)
            return kind(*given, family=self.family, ends=self.eos_token_ids, run_seed=args.seed, **own, **options)

        return make

    def _make_engine(self) -> RolloutEngine:
        """Choose what completions are sampled with, by TRL's own options."""
        if self.use_vllm:
            if self._cuts_sampling:
                logger.warning(
                    "top_p, top_k, min_p, repetition_penalty and generation_kwargs change what vLLM samples from, and not "
                    "what is trained: the importance ratios are of two different distributions, below 1 on average "
                    "(tag/all/importance_ratio)"
                )
            return VLLMEngine(self.vllm_generation)
        if self.family is not None:
            self.family.check_generation(self.generation_config)
        return TransformersEngine(
            self.accelerator.unwrap_model(self.model),
            self._tokenizer,
            self.generation_config,
            self.family,
            self._serve,
            lambda: bool(self._sharing),
            self.pad_to_multiple_of,
            self.args.generation_batch,
            lambda count: max(gather_object([count])),
        )

    def _warn_of_dropout(self) -> None:
        """Warn of dropout where log-probabilities are compared with others, as its noise is in what they differ by."""
        args, layers = self.args, dropout_layers(self.model)
        compared = {
            "use_vllm": self.use_vllm,
            "num_iterations above 1": args.num_iterations > 1,
            "steps_per_generation above gradient_accumulation_steps": args.steps_per_generation
            > args.gradient_accumulation_steps,
            "beta above 0": args.beta > 0,
        }
        reasons = [name for name, is_so in compared.items() if is_so]
        if layers and reasons and self.accelerator.is_main_process:
            logger.warning(
                "%d dropout layer(s) (first: %s) make log-probabilities random, which %s compare(s) with others: the noise is in "
                "the importance ratios and in the KL divergence. Set lora_dropout to 0, or disable_dropout=True",
                len(layers),
                layers[0],
                ", ".join(reasons),
            )

    def _log_ratios(self, batch: Batch, flight: RolloutInFlight) -> None:
        """Log, by tag, how far the engine is from the policy, before TRL cuts anything; a collective call."""
        if "importance_sampling_ratio" not in batch:
            return
        args = self.args
        sequences = args.vllm_importance_sampling_mode.startswith("sequence")
        logps, sampled = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
        ratios = raw_ratios(logps, sampled, batch["completion_mask"], sequences)
        summaries = summarise_ratios(
            ratios, args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        )
        tags = torch.tensor([tag_number(row.get("tag")) for row in flight.rows], device=summaries.device)
        metrics = ratio_metrics(self.accelerator.gather(summaries), self.accelerator.gather(tags))
        self._log_all(metrics, self._mode)
        if not self._engine_is_known:
            self._check_engine(logps, sampled, batch["completion_mask"])

    def _check_engine(self, logps: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> None:
        """
        Check a first rollout's log-probabilities against the trainer's, on all ranks; a collective call.

        A rollout without a token to compare, as all its groups have been dropped, leaves the check to the next one.

        Raises:
            EngineError: when they differ by more than rounding and sampling options explain.
        """
        counted = mask.bool() & ~(logps - sampled).isnan()
        difference = torch.where(counted, (logps - sampled).abs(), 0.0).double()
        total, tokens = self._all_reduce(torch.stack([difference.sum(), counted.sum().double()])).tolist()
        if not tokens:
            return
        mean = total / tokens
        if mean > MOST_DIFFERENCE and not self._cuts_sampling:
            raise EngineError(
                f"vLLM's log-probabilities differ from the trainer's by {mean:.2f} on average in the first rollout to "
                "compare: it samples from another model. `maple-trl parity` shows for which prompts"
            )
        self._engine_is_known = True

    @property
    def _cuts_sampling(self) -> bool:
        """Whether tokens are left out of what is sampled from, which makes those that are left more probable."""
        further = dict(self.args.generation_kwargs or {})
        if self.family is not None and set(further.get("suppress_tokens") or ()) <= set(self.family.suppressed_ids):
            further.pop("suppress_tokens", None)  # media tokens, which have next to no weight
        further = {name for name, value in further.items() if value and name not in ("stop", "stop_strings")}
        return bool(self.top_p < 1 or self.top_k or self.min_p or self.repetition_penalty != 1 or further)

    def _unanswered(self, flight: RolloutInFlight) -> torch.Tensor:
        """
        Mark the completions of all ranks that the engine did not give, shape (N,); a collective call.

        Their prompts go into quarantine, with or without a hint.
        """
        failed = torch.zeros(len(flight.rows), dtype=torch.bool, device=self.accelerator.device)
        failed[list(flight.failed)] = True
        failed = self.accelerator.gather(failed)
        registry = self.row_encoder.registries.get("train_dataset") if self.family is not None else None
        if registry is not None and failed.any():
            own = {prompt_key(flight.prompts[row].key): reason for row, reason in flight.failed.items()}
            for key, reason in [item for items in gather_object([own]) for item in items.items()]:
                if key in registry:
                    file = next(iter(self.row_encoder.spec(registry.row_of(key)).files), None)
                    registry.add(key, MediaError("engine-failed", file, reason))
            self._write_quarantine()
        return failed

    def _save_where_it_stopped(self) -> str:
        """Write a checkpoint of the last step where it is whole, and say how to go on; a collective call."""
        step = self.state.global_step
        again = "Once the engine is mended, go on with resume_from_checkpoint=True"
        if not step or self._step % self.args.gradient_accumulation_steps:
            return f"Stopped after step {step}. {again}"
        folder = self._checkpoint_folder(None)
        if not is_complete(folder):
            # Batches of the next step have been drawn since; a run that goes on draws them again.
            torch.set_rng_state(self._stream_after_step)
            for put_back in self._before_rollout:
                put_back()
            self._save_checkpoint(self.model, trial=None)
        return f"Stopped after step {step}; its checkpoint is in {folder}. {again}"
