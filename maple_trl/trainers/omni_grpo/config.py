"""Configuration of omni-modal GRPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from trl import GRPOConfig

from maple_trl.omni.generation import check_generation_options, check_values
from maple_trl.rollout.sampling_options import OWN_ENGINE_OPTIONS, vllm_options
from maple_trl.trainers.common.media_config import MediaConfig
from maple_trl.trainers.omni_grpo.unfit_options import check_inherited, rate_by_reward


@dataclass
class OmniGRPOConfig(MediaConfig, GRPOConfig):
    r"""
    Configuration class for [`OmniGRPOTrainer`].

    Adds to [`~trl.GRPOConfig`] what rows are fed and how their media are read. Limits come from here alone, never from
    environment variables.

    Raises:
        ValueError: for options that contradict each other or that omni prompts do not support, naming the field.
    """

    shared_prefix: Annotated[str, "speed"] = field(
        default="auto",
        metadata={
            "help": "Pass a prompt through the model once for all completions of its group that stand in a batch: 'auto' "
            "compares both ways on a short prompt and goes on without where they differ, 'on' raises there and also "
            "regroups rollouts without media, which keep TRL's order otherwise, 'off' passes it once per completion. "
            "Takes a model whose attention is sdpa, flex_attention or FlashAttention."
        },
    )
    generation_batch: Annotated[int | None, "speed"] = field(
        default=None,
        metadata={
            "help": "Completions that a rank generates at a time, whose key-value caches have to fit; of a prompt as many "
            "as possible together, so a multiple of num_generations is best. The tokens are those of a rollout in one "
            "piece, up to rounding. Null: all of a rollout's at once. (`generation_batch_size` is TRL's: the completions "
            "of a rollout over all ranks.)"
        },
    )
    packed_attention: Annotated[str, "speed"] = field(
        default="model",
        metadata={
            "help": "What computes attention in passes that share prompts: 'model', what the model computes all else with; "
            "'sdpa'; or 'flex_attention', also for models that transformers refuses to load with it, as it does all "
            "families here: one kernel for all groups, which is compiled at first and needs a GPU to train."
        },
    )
    rollout_log_size: Annotated[int, "place"] = field(
        default=20_000,
        metadata={
            "help": "Completions kept in OUTPUT_DIR/rollouts, with prompt, rewards, advantage, tag and the media that "
            "were fed, for the viewer of `maple-trl report`. When there are more, every second rollout is removed and "
            "left out from then on, then every other of these, so that the whole run stays visible. 0 keeps none. "
            "`log_completions` is TRL's own switch: it prints samples, and writes the last rollout before each log "
            "entry, without the row; those of evaluations lie in folders of `completions` by themselves."
        },
    )

    vllm_engine_options: Annotated[dict[str, Any] | None, "speed"] = field(
        default=None,
        metadata={
            "help": "Further arguments of vLLM's engine with vllm_mode='colocate', e.g. {max_num_batched_tokens: 12288, "
            "enable_chunked_prefill: true}."
        },
    )
    vllm_request_timeout: Annotated[float, "speed"] = field(
        default=600.0,
        metadata={
            "help": "Seconds that a vLLM server has for the completions of a prompt. A request that takes longer is made once "
            "more; then the prompt is put into quarantine."
        },
    )

    def __post_init__(self):
        rate_by_reward(self)
        super().__post_init__()
        check_inherited(self)
        most = self.generation_batch
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise ValueError(
                f"generation_batch must be a whole number from 1 on, or null for all at once, got {most!r}"
            )
        if self.rollout_log_size < 0:
            raise ValueError(f"rollout_log_size must be 0 or more, got {self.rollout_log_size}")
        self._check_loss_type()
        # TRL asks for these, too, in the first step alone.
        self._check_choice("importance_sampling_level", ("token", "sequence"))
        self._check_choice("scale_rewards", ("group", "batch", "none"))
        self._check_reward_weights()
        self._check_choice("shared_prefix", ("auto", "on", "off"))
        self._check_choice("packed_attention", ("model", "sdpa", "flex_attention"))
        self._check_sampling()
        self._check_vllm()
        if self.use_transformers_continuous_batching:
            raise ValueError("use_transformers_continuous_batching does not support media; leave it False")

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that a rollout shows, over all processes."""
        return self.generation_batch_size // self.num_generations

    @property
    def steps_per_rollout(self) -> float:
        """Optimizer steps that are made on a rollout."""
        return self.steps_per_generation * self.num_iterations / self.gradient_accumulation_steps

    def _check_vllm(self) -> None:
        if not self.use_vllm:
            return
        self._check_choice("vllm_mode", ("colocate", "server"))
        if self.vllm_enable_sleep_mode:
            raise ValueError(
                "vllm_enable_sleep_mode does not support prompts with media in this version; leave it False"
            )
        if self.vllm_mode == "colocate" and self.vllm_tensor_parallel_size > 1:
            raise ValueError(
                f"vllm_tensor_parallel_size={self.vllm_tensor_parallel_size}: an engine in the trainer's process is on one "
                "device here; vllm_mode='server' takes an engine over several"
            )
        if self.vllm_structured_outputs_regex is not None:
            raise ValueError("vllm_structured_outputs_regex does not support prompts with media in this version")
        if self.vllm_mode == "server" and self.vllm_engine_options:
            raise ValueError(
                "vllm_engine_options are for vllm_mode='colocate'; a server is given them where it is started"
            )
        taken = sorted(OWN_ENGINE_OPTIONS & set(self.vllm_engine_options or {}))
        if taken:
            raise ValueError(f"vllm_engine_options: {taken[0]} is set by the trainer or has an option of its own")
        for name in ("vllm_request_timeout", "vllm_server_timeout"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        # TRL asks for it in the first step.
        modes = tuple(f"{level}_{cut}" for level in ("token", "sequence") for cut in ("truncate", "mask"))
        self._check_choice("vllm_importance_sampling_mode", modes)
        if self.vllm_mode == "colocate":
            self._check_vllm_room()

    def _check_vllm_room(self) -> None:
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(
                f"vllm_gpu_memory_utilization must be a share of the memory, got {self.vllm_gpu_memory_utilization}"
            )
        length, needed = self.vllm_max_model_length, (self.max_prompt_length or 1) + self.max_completion_length
        if length is not None and needed > length:
            parts = " + ".join(
                f"{name}={getattr(self, name)}"
                for name in ("max_prompt_length", "max_completion_length")
                if getattr(self, name) is not None
            )
            raise ValueError(f"vllm_max_model_length={length} does not hold a prompt and its completion ({parts})")

    def _check_loss_type(self) -> None:
        # TRL asks for it in the first step.
        self._check_choice("loss_type", ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"))

    def _check_reward_weights(self) -> None:
        weights = self.reward_weights or []
        if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights):
            raise ValueError(f"reward_weights must be finite numbers, got {weights}")
        if weights and not any(weights):
            raise ValueError("reward_weights are all 0: no completion is better than another; give one a weight")

    def _check_sampling(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}: without sampling all completions of a prompt are the "
                "same, and there is nothing to compare"
            )
        for name, greedy in (("top_k", 1), ("top_p", 0)):
            if getattr(self, name) == greedy:
                raise ValueError(
                    f"{name}={greedy} leaves one token to sample, so that all completions of a prompt are the same, and "
                    "there is nothing to compare"
                )
        check_values({name: getattr(self, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")})
        further = self.generation_kwargs or {}
        if self.use_vllm:
            options = vllm_options(further, (), ())
            least, stops = options.get("min_tokens", 0), options.get("stop")
        else:
            settings = {"max_new_tokens": "max_completion_length", "max_length": "max_completion_length"}
            settings["temperature"] = "temperature, which the log-probabilities need as well"
            check_generation_options(further, settings, "generation_kwargs")
            least, stops = further.get("min_new_tokens") or 0, further.get("stop_strings")
        if least > self.max_completion_length:
            raise ValueError(
                f"generation_kwargs: min_new_tokens={least} is above max_completion_length={self.max_completion_length}: "
                "every completion would be cut"
            )
        if self.mask_truncated_completions and stops:
            raise ValueError(
                "mask_truncated_completions leaves out completions that do not end with an end token, and so all that end "
                "at one of generation_kwargs' stop_strings; use one of the two"
            )
