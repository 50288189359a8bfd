"""A training job, as far as memory and time follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from maple_trl.planning.catalogue import RATES, Gpu
from maple_trl.planning.sizes import PARTS, Linear, Media, ModelSizes


DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""

SHARDINGS = ("none", "zero2", "zero3", "fsdp")
ROLLOUTS = ("transformers", "vllm_colocate", "vllm_server")
OPTIMIZERS = {"adamw": 2.0, "adamw_8bit": 0.5, "sgd": 0.0}
"""Numbers that an optimizer keeps of a parameter: of `adamw` in its own precision, otherwise of 4 bytes."""

GIB = 2**30

_LEAST = {
    1: (
        "gpus",
        "prompt",
        "completion",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_iterations",
        "vllm_tensor_parallel_size",
        "gpus_per_node",
        "judge_concurrency",
    ),
    0: ("steps_per_generation", "generation_batch", "lora_r", "beta", "rollout_gpus", "judge_calls"),
}


class PlanError(ValueError):
    """A plan that cannot be; the message says what is wrong and what would be right."""


@dataclass(frozen=True)
class Setup:
    """
    A training job, as far as memory and time follow from it. Names are those of its options.

    Attributes:
        model: its sizes.
        gpu: the kind of card.
        gpus: cards, those of a vLLM server among them.
        prompt, completion: tokens of a prompt with its media, and of a completion.
        media: what of the prompt is video and audio.
        num_generations, per_device_train_batch_size, gradient_accumulation_steps, num_iterations, beta: TRL's.
        steps_per_generation: TRL's; 0 stands for `gradient_accumulation_steps`.
        generation_batch: completions that `generate()` samples at a time; 0: all of a rank's rollout.
        shared_prefix: whether a prompt passes the model once for its completions.
        encoder_cache: whether features of frozen towers are kept.
        gradient_checkpointing: TRL's.
        lora_r: rank of LoRA adapters; 0: full fine-tuning.
        trained: parts that are trained, or adapted.
        load_in_4bit, load_in_8bit, use_bnb_nested_quant: TRL's; beside LoRA adapters.
        quantize_towers: whether towers and projectors have few bits too.
        dtype: of the weights.
        compute: precision of the passes; `bfloat16` over weights in float32 is autocast.
        optim: one of `OPTIMIZERS`.
        sharding: one of `SHARDINGS`.
        rollout: one of `ROLLOUTS`.
        rollout_gpus: cards of a vLLM server.
        vllm_gpu_memory_utilization, vllm_tensor_parallel_size: TRL's.
        vllm_enable_sleep_mode: TRL's, which trainers with media refuse; for plans of published runs by other systems.
        attn_implementation: transformers'.
        gpus_per_node: cards that are linked directly.
        judge_calls, judge_seconds, judge_concurrency: calls of a judge for each completion, the time of one, and how many
            are open at once.
        media_workers: processes that decode, for each card.
        media_prefetch: whether they decode ahead.
        rates: constants that differ from `RATES`.
    """

    model: ModelSizes
    gpu: Gpu
    gpus: int = 1
    prompt: int = 4096
    completion: int = 256
    media: Media = field(default_factory=Media)
    num_generations: int = 8
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    steps_per_generation: int = 0
    num_iterations: int = 1
    beta: float = 0.0
    generation_batch: int = 0
    shared_prefix: bool = True
    encoder_cache: bool = True
    gradient_checkpointing: bool = True
    lora_r: int = 0
    trained: tuple[str, ...] = PARTS
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    use_bnb_nested_quant: bool = False
    quantize_towers: bool = False
    dtype: str = "bfloat16"
    compute: str = "bfloat16"
    optim: str = "adamw"
    sharding: str = "none"
    rollout: str = "transformers"
    rollout_gpus: int = 0
    vllm_gpu_memory_utilization: float = 0.3
    vllm_tensor_parallel_size: int = 1
    vllm_enable_sleep_mode: bool = False
    attn_implementation: str = "sdpa"
    gpus_per_node: int = 8
    judge_calls: float = 0
    judge_seconds: float = 2.0
    judge_concurrency: int = 32
    media_workers: int = 2
    media_prefetch: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no trainer could run."""
        _check(self)

    def rate(self, name: str) -> float:
        """Return a constant."""
        return self.rates.get(name, RATES[name].value)

    @property
    def trainers(self) -> int:
        """Cards that train."""
        return self.gpus - self.rollout_gpus

    @property
    def rounds(self) -> int:
        """Micro-batches that a rollout is divided into, on each card."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def rows(self) -> int:
        """Completions of a rollout on each training card."""
        return self.per_device_train_batch_size * self.rounds

    @property
    def generated_at_once(self) -> int:
        """Completions that `generate()` samples at a time."""
        return min(self.generation_batch or self.rows, self.rows)

    @property
    def prompts(self) -> float:
        """Prompts of a rollout for each training card."""
        return self.rows / self.num_generations

    @property
    def steps(self) -> float:
        """Optimizer steps that follow a rollout."""
        return self.rounds * self.num_iterations / self.gradient_accumulation_steps

    @property
    def shards(self) -> int:
        """Cards that share weights, gradients and optimizer."""
        return self.trainers if self.sharding != "none" else 1

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed keeps weights of its own in float32."""
        return self.sharding in ("zero2", "zero3") and self.compute != "float32"

    @property
    def sharded_weights(self) -> bool:
        """Whether a card holds a part of the weights."""
        return self.sharding in ("zero3", "fsdp")

    @property
    def trains_towers(self) -> bool:
        """Whether features of a clip change from step to step."""
        return any(part in self.trained and self.model.parts[part].parameters for part in PARTS[2:])

    @property
    def towers_in_passes(self) -> bool:
        """Whether towers run in each pass, rather than once for a rollout."""
        return self.trains_towers or not self.encoder_cache

    @property
    def bits(self) -> int:
        """Bits of a weight in layers that are quantized; 0 where none is."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 0

    @property
    def quantized(self) -> tuple[Linear, ...]:
        """Layers of few bits: experts and the head are not among them."""
        parts = () if not self.bits else ("llm", *PARTS[2:]) if self.quantize_towers else ("llm",)
        return tuple(layer for part in parts for layer in self.model.parts[part].linear)

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""
        parts = [self.model.parts[part] for part in self.trained]
        return sum(part.lora(self.lora_r) if self.lora_r else part.parameters for part in parts)

    @property
    def micro_prompts(self) -> int:
        """Most distinct prompts that a micro-batch holds."""
        batch, group = self.per_device_train_batch_size, self.num_generations
        # It begins at any multiple of what divides both.
        return -(-(group - math.gcd(batch, group) + batch) // group)


def _check(setup: Setup) -> None:
    """
    Refuse what no trainer could run.

    Raises:
        PlanError: saying what is wrong and what would be right.
    """
    for least, names in _LEAST.items():
        for name in names:
            if getattr(setup, name) < least:
                raise PlanError(f"{name} must be at least {least}, got {getattr(setup, name)}")
    if setup.num_generations < 2:
        raise PlanError(f"num_generations must be at least 2, got {setup.num_generations}: GRPO compares completions")
    for name, choices in (("dtype", DTYPES), ("compute", DTYPES), ("sharding", SHARDINGS), ("rollout", ROLLOUTS)):
        if getattr(setup, name) not in choices:
            raise PlanError(f"{name} must be one of {', '.join(choices)}, got {getattr(setup, name)!r}")
    for name, value in setup.rates.items():
        if not (0 < value <= 1 if RATES[name].unit.startswith("of ") else 0 <= value < math.inf):
            allowed = "in (0, 1]" if RATES[name].unit.startswith("of ") else "0 or more"
            raise PlanError(f"{name} must be {allowed}, got {value}")
    if setup.optim not in OPTIMIZERS:
        raise PlanError(f"optim must be one of {', '.join(OPTIMIZERS)}, got {setup.optim!r}")
    _check_bits(setup)
    _check_cards(setup)
    _check_media(setup.media, setup.model, setup.prompt)
    if not setup.trainable:
        raise PlanError("nothing would be trained: leave one part of the model unfrozen")


def _check_media(media: Media, model: ModelSizes, prompt: int) -> None:
    for kind, tower in (("video", model.vision), ("audio", model.audio)):
        if getattr(media, kind) < 0:
            raise PlanError(f"{kind}_tokens must be at least 0, got {getattr(media, kind)}")
        if getattr(media, kind) and tower is None:
            raise PlanError(f"{model.name} has no tower for {kind}: {kind}_tokens must be 0")
    if media.video + media.audio > prompt:
        raise PlanError(
            f"a prompt of {prompt} tokens cannot hold {media.video:.0f} of video and {media.audio:.0f} of audio: make "
            "prompt larger, or video_tokens and audio_tokens smaller"
        )
    if min(media.height, media.width) < 1:
        raise PlanError(f"a frame must have pixels, got frame_height {media.height} and frame_width {media.width}")


def _check_bits(setup: Setup) -> None:
    if setup.load_in_4bit and setup.load_in_8bit:
        raise PlanError("load_in_4bit and load_in_8bit are both true: choose one")
    if setup.use_bnb_nested_quant and not setup.load_in_4bit:
        raise PlanError("use_bnb_nested_quant has no effect without load_in_4bit true")
    if not setup.bits:
        if setup.quantize_towers:
            raise PlanError("quantize_towers has no effect without load_in_4bit or load_in_8bit true")
        return
    if not setup.lora_r:
        raise PlanError("weights of 4 or 8 bits cannot be trained, only LoRA adapters beside them: use_peft true")
    if setup.sharding != "none":
        raise PlanError(f"sharding {setup.sharding} does not go with weights of 4 or 8 bits: each card holds them all")
    if setup.rollout != "transformers":
        raise PlanError(
            "use_vllm does not go with weights of 4 or 8 bits: vLLM is sent whole weights after each update"
        )


def _check_cards(setup: Setup) -> None:
    if (setup.rollout == "vllm_server") != (setup.rollout_gpus > 0):
        raise PlanError("rollout_gpus is how many of the cards a vLLM server has: it goes with vllm_mode server alone")
    if setup.trainers < 1:
        raise PlanError(f"{setup.rollout_gpus} of {setup.gpus} cards are the server's: leave at least one to train on")
    batch = setup.per_device_train_batch_size * setup.trainers * setup.rounds
    if batch % setup.num_generations:
        raise PlanError(
            f"a rollout of {batch} completions (per_device_train_batch_size {setup.per_device_train_batch_size} x "
            f"{setup.trainers} training cards x steps_per_generation {setup.rounds}) cannot be divided into groups of "
            f"num_generations {setup.num_generations}: make it a multiple"
        )
    engines = setup.rollout_gpus if setup.rollout == "vllm_server" else setup.trainers
    if setup.rollout != "transformers" and engines % setup.vllm_tensor_parallel_size:
        raise PlanError(
            f"{engines} cards cannot be divided into engines of vllm_tensor_parallel_size "
            f"{setup.vllm_tensor_parallel_size}"
        )
    if not 0 < setup.vllm_gpu_memory_utilization <= 1:
        raise PlanError(f"vllm_gpu_memory_utilization must be in (0, 1], got {setup.vllm_gpu_memory_utilization}")
