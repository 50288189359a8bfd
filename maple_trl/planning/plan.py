"""
Memory and time of a GRPO step on given cards, by arithmetic alone.

Memory is counted tensor by tensor: weights, gradients, optimizer, what the backward pass needs, the LM head's tiles, and the
key-value cache. Time is the operations and bytes of each phase, divided by what a card reaches of its data sheet
([`RATES`][maple_trl.planning.catalogue.RATES]), and what a layer costs whatever it computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from maple_trl.planning.catalogue import RATES, Gpu
from maple_trl.planning.sizes import (
    PARTS,
    AudioSizes,
    Media,
    ModelSizes,
    TextSizes,
    VisionSizes,
    Work,
    generation_work,
    plain_work,
    shared_work,
)


HEAD_TOKENS, HEAD_WIDTH = 4096, 32_768
"""A tile of logits of TRL's head (`trl.kernels.chunked_logprob`): tokens, and entries of the vocabulary."""

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHARDINGS = ("none", "zero2", "zero3", "fsdp")
ROLLOUTS = ("transformers", "vllm_colocate", "vllm_server")
OPTIMIZERS = {"adamw": 2.0, "adamw_8bit": 0.5, "sgd": 0.0}
"""Numbers of float32 that an optimizer keeps of a parameter; `adamw` in the parameter's own precision."""

GIB = 2**30
_DEEPSPEED_BUCKETS = 2 * 500_000_000  # elements of the two that ZeRO-2 keeps
_ATTENTION_COPIES = ("sdpa", "flash_attention_2")
"""Kinds of attention that copy a shared prompt's keys for each completion."""


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
        dtype: of the weights.
        compute: precision of the passes; `bfloat16` over weights in float32 is autocast.
        optim: one of `OPTIMIZERS`.
        sharding: one of `SHARDINGS`.
        rollout: one of `ROLLOUTS`.
        rollout_gpus: cards of a vLLM server.
        vllm_gpu_memory_utilization, vllm_tensor_parallel_size, vllm_enable_sleep_mode: TRL's.
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
    for name in ("gpus", "prompt", "completion", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(setup, name) < 1:
            raise PlanError(f"{name} must be at least 1, got {getattr(setup, name)}")
    for name in ("num_iterations", "vllm_tensor_parallel_size", "gpus_per_node", "judge_concurrency"):
        if getattr(setup, name) < 1:
            raise PlanError(f"{name} must be at least 1, got {getattr(setup, name)}")
    for name in ("steps_per_generation", "generation_batch", "lora_r", "beta", "rollout_gpus", "judge_calls"):
        if getattr(setup, name) < 0:
            raise PlanError(f"{name} must be at least 0, got {getattr(setup, name)}")
    if setup.num_generations < 2:
        raise PlanError(f"num_generations must be at least 2, got {setup.num_generations}: GRPO compares completions")
    for name, choices in (("dtype", DTYPES), ("compute", DTYPES), ("sharding", SHARDINGS), ("rollout", ROLLOUTS)):
        if getattr(setup, name) not in choices:
            raise PlanError(f"{name} must be one of {', '.join(choices)}, got {getattr(setup, name)!r}")
    if setup.optim not in OPTIMIZERS:
        raise PlanError(f"optim must be one of {', '.join(OPTIMIZERS)}, got {setup.optim!r}")
    _check_cards(setup)
    media, model = setup.media, setup.model
    for kind, tower in (("video", model.vision), ("audio", model.audio)):
        if getattr(media, kind) and tower is None:
            raise PlanError(f"{model.name} has no tower for {kind}: {kind}_tokens must be 0")
    if media.video + media.audio > setup.prompt:
        raise PlanError(
            f"a prompt of {setup.prompt} tokens cannot hold {media.video:.0f} of video and {media.audio:.0f} of audio: make "
            "prompt larger, or video_tokens and audio_tokens smaller"
        )
    if not setup.trainable:
        raise PlanError("nothing would be trained: leave one part of the model unfrozen")


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


# Memory


def weight_bytes(setup: Setup) -> float:
    """Return the bytes of the weights on a card."""
    size = 2 if setup.deepspeed else DTYPES[setup.dtype]
    base = setup.model.parameters * size + (setup.trainable * _adapter_size(setup) if setup.lora_r else 0)
    return base / setup.shards if setup.sharded_weights else base


def _adapter_size(setup: Setup) -> int:
    """Return the bytes of a parameter of LoRA, which PEFT keeps in float32."""
    return 2 if setup.deepspeed else 4


def _trained_size(setup: Setup) -> int:
    return _adapter_size(setup) if setup.lora_r else 2 if setup.deepspeed else DTYPES[setup.dtype]


def gradient_bytes(setup: Setup) -> float:
    """Return the bytes of the gradients on a card."""
    return setup.trainable * _trained_size(setup) / setup.shards


def optimizer_bytes(setup: Setup) -> float:
    """Return the bytes of the optimizer's state on a card, with DeepSpeed's weights in float32."""
    own = 4 if setup.deepspeed else _trained_size(setup) if setup.optim == "adamw" else 4
    return setup.trainable * (OPTIMIZERS[setup.optim] * own + 4 * setup.deepspeed) / setup.shards


def cache_bytes(text: TextSizes, tokens: float, size: int) -> float:
    """Return the bytes of a key-value cache of tokens, in numbers of `size` bytes."""
    return text.cache_values * tokens * size


def head_bytes(text: TextSizes, tokens: float, size: int, trained: bool) -> float:
    """
    Return the bytes that TRL's head adds in the backward pass.

    A tile of logits, and in float32 the gradients of hidden states and of the head's weight, which are then copied.
    """
    tile = min(tokens, HEAD_TOKENS) * HEAD_WIDTH * size
    weight = text.vocab * text.hidden * 4 if trained else 0
    return tile + tokens * text.hidden * (4 + size) + weight


def _norm_bytes(width: int, size: int, output: bool = True) -> int:
    """Return what a norm's backward needs of a token: its input in float32, and what was normalised and scaled."""
    return width * (4 + size * (1 + output))


def layer_bytes(text: TextSizes, size: int) -> float:
    """Return the bytes that the backward of a layer of the language model needs of a token."""
    attention = size * (2 * text.queries + 2 * text.keys) + 4 * text.heads
    norms = 2 * _norm_bytes(text.hidden, size)
    if text.head_norms:
        norms += _norm_bytes(text.queries + text.keys, size, output=False)
    dense = 4 * size * text.inner
    experts = text.chosen * size * (4 * text.expert_inner + 3 * text.hidden)
    share = text.sparse / text.layers
    return norms + attention + (1 - share) * dense + share * experts


def _gradients_within_layer(text: TextSizes, size: int) -> float:
    """Return the bytes of gradients that are held at once while a layer's backward runs, for a token."""
    inner = text.inner if text.sparse < text.layers else text.chosen * text.expert_inner
    return size * (2 * inner + 2 * text.hidden)


def _vision_layer_bytes(vision: VisionSizes, size: int) -> float:
    norms = 2 * (_norm_bytes(vision.hidden, size) if vision.gated else 2 * size * vision.hidden)
    return norms + size * (4 * vision.hidden + (4 if vision.gated else 2) * vision.inner)


def _audio_layer_bytes(audio: AudioSizes, size: int) -> float:
    return size * (4 * audio.hidden + 4 * audio.hidden + 2 * audio.inner)


@dataclass(frozen=True)
class Micro:
    """
    What a micro-batch holds.

    Attributes:
        rows, prompts: completions, and distinct prompts.
        tokens: that pass the language model.
        suffix: of completions among them.
        copied: tokens of keys that the attention of shared prompts copies.
        media: of all prompts.
    """

    rows: int
    prompts: float
    tokens: float
    suffix: float
    copied: float
    media: Media


def micro_batch(setup: Setup) -> Micro:
    """Return what the largest micro-batch holds."""
    rows, prompts = setup.per_device_train_batch_size, setup.micro_prompts
    length = setup.prompt + setup.completion
    shared = setup.shared_prefix and rows > prompts
    tokens = prompts * (setup.prompt - 1) + rows * setup.completion if shared else rows * length
    copied = rows * length if shared and setup.attn_implementation in _ATTENTION_COPIES else 0
    times = prompts  # a prompt's media pass the towers once, also where each row passes the language model
    media = replace(setup.media, video=setup.media.video * times, audio=setup.media.audio * times)
    return Micro(rows, prompts, tokens, rows * setup.completion, copied, media)


def saved_bytes(setup: Setup) -> float:
    """Return the bytes that the language model's forward keeps for the backward of a micro-batch, but for the head's."""
    text, size, micro = setup.model.text, DTYPES[setup.compute], micro_batch(setup)
    last = _norm_bytes(text.hidden, size, output=False) * micro.tokens
    if setup.gradient_checkpointing:
        return text.layers * micro.tokens * text.hidden * size + last
    return text.layers * _layer_saves(setup, micro) + last


def _layer_saves(setup: Setup, micro: Micro) -> float:
    text, size = setup.model.text, DTYPES[setup.compute]
    return layer_bytes(text, size) * micro.tokens + micro.copied * 2 * text.keys * size


def _layer_backward(setup: Setup, micro: Micro) -> float:
    """Return what a layer's backward holds beyond what was saved: what is computed again, and gradients within it."""
    text, size = setup.model.text, DTYPES[setup.compute]
    again = _layer_saves(setup, micro) - micro.tokens * text.hidden * size if setup.gradient_checkpointing else 0
    return again + _gradients_within_layer(text, size) * micro.tokens + micro.copied * 2 * text.keys * size


def _media_bytes(setup: Setup, micro: Micro) -> float:
    """Return the bytes of pixels, and of what the towers make of them and of sound."""
    vision, size = setup.model.vision, DTYPES[setup.compute]
    pixels = vision.patches(micro.media) * vision.patch_values * 4 if vision else 0
    return pixels + (micro.media.video + micro.media.audio) * setup.model.text.hidden * size


def _tower_bytes(setup: Setup, micro: Micro) -> tuple[float, float]:
    """Return the bytes that the towers keep for a backward, and the most that a layer of them holds while it runs."""
    size, saved, running = DTYPES[setup.compute], 0.0, 0.0
    for tower, states, layer in _towers(setup.model, micro.media, size):
        kept = tower.hidden * size if setup.gradient_checkpointing else layer
        saved += states * tower.layers * kept if setup.trains_towers else 0
        running = max(running, states * layer) if setup.trains_towers or not setup.encoder_cache else running
    return saved, running


def training_moments(setup: Setup) -> dict[str, dict[str, float]]:
    """
    Return the bytes that a micro-batch adds at the moments at which it can need most, by part.

    The towers' forward; the head's backward, when everything is kept; that of the uppermost layer; that of the lowest, when
    all gradients are there. Gradients of a former micro-batch are there from the beginning.
    """
    text, micro = setup.model.text, micro_batch(setup)
    trains_head = not setup.lora_r and "head" in setup.trained and bool(text.head.parameters)
    gradients, head_gradient = gradient_bytes(setup), 0.0
    if trains_head:
        head_gradient = text.head.parameters * _trained_size(setup) / setup.shards
    before = gradients if setup.gradient_accumulation_steps > 1 else 0
    head = head_bytes(text, micro.suffix, DTYPES[setup.compute], trains_head)
    kept, running = _tower_bytes(setup, micro)
    media = _media_bytes(setup, micro) + kept
    saved, layer = saved_bytes(setup) + media, _layer_backward(setup, micro)
    lowest = layer if setup.gradient_checkpointing else layer + _layer_saves(setup, micro)
    return {
        "towers": {"gradients": before, "activations": media + running, "LM head": 0},
        "head": {"gradients": before, "activations": saved, "LM head": head},
        "uppermost layer": {"gradients": max(before, head_gradient), "activations": saved + layer, "LM head": 0},
        "lowest layer": {"gradients": gradients, "activations": media + max(lowest, running), "LM head": 0},
    }


def _towers(model: ModelSizes, media: Media, size: int) -> Iterator[tuple[VisionSizes | AudioSizes, float, float]]:
    """Yield each tower with the positions in its layers, and what the backward of a layer needs of one."""
    if model.vision and media.video:
        yield model.vision, model.vision.patches(media), _vision_layer_bytes(model.vision, size)
    if model.audio and media.audio:
        yield model.audio, model.audio.states(media), _audio_layer_bytes(model.audio, size)


def working_bytes(setup: Setup) -> float:
    """Return the bytes of weights that are there a second time: cast for autocast, gathered from other cards, in buckets."""
    text = setup.model.text
    cast = 2 * setup.trainable if DTYPES[setup.dtype] > DTYPES[setup.compute] and not setup.deepspeed else 0
    if not setup.sharded_weights:
        return cast + (2 * _DEEPSPEED_BUCKETS if setup.sharding == "zero2" else 0)
    layer = text.part.parameters / text.layers
    return cast / setup.shards + 2 * (max(layer, text.vocab * text.hidden) + layer)


def forward_bytes(setup: Setup, tokens: float) -> float:
    """Return the bytes that a forward without gradients holds at once."""
    text, size = setup.model.text, DTYPES[setup.compute]
    inner = text.inner if text.sparse < text.layers else text.chosen * text.expert_inner
    return tokens * (size * (3 * text.hidden + 3 * inner + 2 * text.queries) + 4 * text.hidden)


@dataclass(frozen=True)
class Memory:
    """
    Bytes on a card, by part.

    Attributes:
        training: while a micro-batch's backward runs.
        rollout: while completions are sampled.
        server: on a card of a vLLM server; empty without one.
    """

    training: dict[str, float]
    rollout: dict[str, float]
    server: dict[str, float]

    @property
    def peak(self) -> float:
        """The most on a training card."""
        return max(sum(self.training.values()), sum(self.rollout.values()))


def plan_memory(setup: Setup) -> Memory:
    """Count what a card holds."""
    model, size = setup.model, DTYPES[setup.compute]
    reference = weight_bytes(replace(setup, lora_r=0)) if setup.beta and not setup.lora_r else 0
    always: dict[str, float] = {
        "weights": weight_bytes(setup),
        "reference model": reference,
        "optimizer": optimizer_bytes(setup),
    }
    if setup.sharding == "none" and setup.trainers > 1:
        always["buckets of DDP"] = gradient_bytes(setup)
    engine = setup.vllm_gpu_memory_utilization * setup.gpu.memory * GIB
    colocated = engine if setup.rollout == "vllm_colocate" else 0
    worst = max(training_moments(setup).values(), key=lambda moment: sum(moment.values()))
    held = 0 if setup.vllm_enable_sleep_mode else colocated
    training = always | {"weights cast or gathered": working_bytes(setup), "rollout engine": held} | worst
    rollout = always | {"rollout engine": colocated}
    if setup.rollout == "transformers":
        rows = min(setup.generation_batch or setup.rows, setup.rows)
        length = setup.prompt + setup.completion
        prompts = -(-rows // setup.num_generations) if setup.shared_prefix else rows
        whole = 2 * model.parameters if setup.sharded_weights else 0
        rollout |= {
            "weights cast or gathered": whole,
            "key-value cache": cache_bytes(model.text, rows * length, size),
            "activations": forward_bytes(setup, prompts * setup.prompt),
        }
    server = {"rollout engine": engine} if setup.rollout == "vllm_server" else {}
    return Memory(training, rollout, server)


# Time


@dataclass(frozen=True)
class Phase:
    """
    A phase of a step.

    Attributes:
        name: what it is.
        seconds: on each card, for the rollout and all that follows it.
        bound: what takes the time.
    """

    name: str
    seconds: float
    bound: str


def _longest(**seconds: float) -> tuple[float, str]:
    """Return the longest of several things that go on at once, and its name."""
    name = max(seconds, key=lambda key: seconds[key])
    return seconds[name], name.replace("_", " ")


def _pass_seconds(setup: Setup, operations: float, layers: int, passes: float) -> tuple[float, str]:
    """Return the time of a pass over many tokens; `passes` are the forwards that its layers cost."""
    compute = operations / (setup.gpu.teraflops * 1e12 * setup.rate("compute_share"))
    launches = layers * passes * setup.rate("launch_layer_ms") / 1e3
    if setup.sharded_weights and setup.trainers > 1:
        # Weights for each direction, and gradients on the way back.
        moved = setup.model.parameters * 2 if passes == 1 else (2 * setup.model.parameters + setup.trainable) * 2
        compute += layers * passes * setup.rate("sharded_layer_ms") / 1e3
        return _longest(operations=compute, kernel_launches=launches, communication=moved / _link(setup))
    return _longest(operations=compute, kernel_launches=launches)


def _link(setup: Setup) -> float:
    """Return the bytes per second between training cards."""
    slowest = setup.gpu.link if setup.trainers <= setup.gpus_per_node else min(setup.gpu.link, setup.gpu.network)
    return slowest * 1e9 * setup.rate("link_share")


def _layers(setup: Setup, towers: bool) -> int:
    model = setup.model
    own = sum(tower.layers for tower, *_ in _towers(model, setup.media, 2)) if towers else 0
    return model.text.layers + own


def _forward_work(setup: Setup) -> Work:
    """Return the work of a micro-batch's forward; prompts that several micro-batches hold pass in each."""
    rows = setup.per_device_train_batch_size
    if not setup.shared_prefix:
        return plain_work(setup.prompt, setup.completion, rows)
    prompts = setup.micro_prompts
    return shared_work(setup.prompt, setup.completion, rows / prompts) * prompts


def pass_operations(setup: Setup, train: bool) -> float:
    """Count the operations of a micro-batch: a log-probability pass, or forward and backward."""
    times = 3 + setup.gradient_checkpointing if train else 1
    language = setup.model.text.operations(_forward_work(setup)) * times
    if setup.encoder_cache and not setup.trains_towers:
        return language
    towers = setup.model.tower_operations(setup.media) * setup.micro_prompts
    return language + towers * (times if train and setup.trains_towers else 1)


def _train_phase(setup: Setup) -> Phase:
    times = 3 + setup.gradient_checkpointing
    layers = _layers(setup, towers=not setup.encoder_cache or setup.trains_towers)
    seconds, bound = _pass_seconds(setup, pass_operations(setup, train=True), layers, times)
    return Phase("train", seconds * setup.rounds * setup.num_iterations, bound)


def _score_phase(setup: Setup, name: str) -> Phase:
    layers = _layers(setup, towers=not setup.encoder_cache or setup.trains_towers)
    seconds, bound = _pass_seconds(setup, pass_operations(setup, train=False), layers, 1)
    return Phase(name, seconds * setup.rounds, bound)


def _needs_old(setup: Setup) -> bool:
    """Tell whether TRL computes log-probabilities of the policy before it is trained."""
    between = setup.rounds * setup.num_iterations
    return setup.gradient_accumulation_steps % between != 0 or setup.rollout != "transformers"


def _tower_phase(setup: Setup) -> Phase:
    """Encode the media of a rollout's new prompts."""
    operations = setup.model.tower_operations(setup.media) * setup.prompts
    layers = sum(tower.layers for tower, *_ in _towers(setup.model, setup.media, 2))
    cards = setup.rollout_gpus / setup.trainers if setup.rollout == "vllm_server" else 1
    compute = operations / (setup.gpu.teraflops * 1e12 * setup.rate("compute_share")) / cards
    launches = layers * setup.prompts * setup.rate("launch_layer_ms") / 1e3 / cards
    return Phase("towers", *_longest(operations=compute, kernel_launches=launches))


def _decode_reads(text: TextSizes, rows: float) -> float:
    """Return the weights that a decode step reads: of experts those that some row has chosen."""
    expert = 3 * text.hidden * text.expert_inner
    always = text.active - text.sparse * text.chosen * expert + text.vocab * text.hidden
    if not text.experts:
        return always
    read = text.experts * (1 - math.pow(1 - text.chosen / text.experts, rows))
    return always + text.sparse * read * expert


def decode_step(setup: Setup, rows: float, context: float) -> tuple[float, str]:
    """
    Return the seconds of a step that gives each of some rows a token, and what takes them.

    Args:
        rows: of an engine, or of a card's `generate()`.
        context: tokens that a row attends to.
    """
    text, size = setup.model.text, DTYPES[setup.compute]
    engine = setup.rollout != "transformers"
    cards = setup.vllm_tensor_parallel_size if engine else 1
    read = (_decode_reads(text, rows) * size + cache_bytes(text, rows * context, size)) / cards
    share = setup.rate("engine_share" if engine else "decode_share")
    reading = read / (setup.gpu.bandwidth * 1e9 * share)
    work = Work(rows, rows * context, rows)
    compute = text.operations(work) / cards / (setup.gpu.teraflops * 1e12 * setup.rate("compute_share"))
    if engine:
        reading += text.layers * setup.rate("engine_layer_ms") / 1e3
        return _longest(memory_bandwidth=reading, operations=compute)
    launches = text.layers * setup.rate("launch_layer_ms") / 1e3
    return _longest(memory_bandwidth=reading, operations=compute, kernel_launches=launches)


def engine_rows(setup: Setup) -> tuple[float, float]:
    """Return the completions of a rollout that an engine samples, and how many of them its cache holds at once."""
    if setup.rollout == "transformers":
        return setup.rows, min(setup.generation_batch or setup.rows, setup.rows)
    cards = setup.rollout_gpus if setup.rollout == "vllm_server" else setup.trainers
    rows = setup.rows * setup.trainers / (cards / setup.vllm_tensor_parallel_size)
    text, size = setup.model.text, DTYPES[setup.compute]
    room = setup.vllm_gpu_memory_utilization * setup.gpu.memory * GIB * setup.vllm_tensor_parallel_size
    room -= setup.model.parameters * size
    prompt = setup.prompt / setup.num_generations  # prefixes are cached
    fits = math.floor(room / cache_bytes(text, prompt + setup.completion, size))
    return rows, min(rows, fits)


def _rollout_phases(setup: Setup) -> Iterator[Phase]:
    text = setup.model.text
    rows, at_once = engine_rows(setup)
    shared = setup.shared_prefix or setup.rollout != "transformers"
    group = setup.num_generations
    operations = text.operations(generation_work(setup.prompt, 1, group, shared)) * rows / group
    cards = setup.vllm_tensor_parallel_size if setup.rollout != "transformers" else 1
    pieces = math.ceil(rows / at_once)
    compute = operations / cards / (setup.gpu.teraflops * 1e12 * setup.rate("compute_share"))
    launches = text.layers * pieces * setup.rate("launch_layer_ms") / 1e3
    yield Phase("prefill", *_longest(operations=compute, kernel_launches=launches))
    seconds, bound = decode_step(setup, rows / pieces, setup.prompt + setup.completion / 2)
    yield Phase("decode", seconds * (setup.completion - 1) * pieces, bound)


def _sync_phase(setup: Setup) -> Phase:
    """Renew the engine's weights: read and written, and gathered or sent where they lie elsewhere."""
    size = setup.model.parameters * DTYPES[setup.compute]
    copied = 2 * size / (setup.gpu.bandwidth * 1e9)
    gathered = setup.sharded_weights and setup.trainers > 1
    moved = size / _link(setup) if gathered else 0
    if setup.rollout == "vllm_server":
        network = setup.gpu.link if setup.gpus <= setup.gpus_per_node else min(setup.gpu.link, setup.gpu.network)
        moved += size / (network * 1e9 * setup.rate("link_share"))
    return Phase("weights to the engine", *_longest(memory_bandwidth=copied, communication=moved))


def _update_phase(setup: Setup) -> Phase:
    """Average gradients over all cards, and update what is trained."""
    touched = 2 * (optimizer_bytes(setup) + gradient_bytes(setup) + setup.trainable * 2 / setup.shards)
    local = touched / (setup.gpu.bandwidth * 1e9)
    moved = 0.0
    if setup.trainers > 1 and not setup.sharded_weights:
        moved = 2 * setup.trainable * _trained_size(setup) / _link(setup)
    seconds, bound = _longest(memory_bandwidth=local, communication=moved)
    return Phase("update", seconds * setup.steps, bound)


def plan_time(setup: Setup) -> list[Phase]:
    """Return the phases of a rollout and of all updates that follow it, in order."""
    phases = []
    if setup.media.video or setup.media.audio:
        phases.append(_tower_phase(setup))
    phases += _rollout_phases(setup)
    if setup.judge_calls:
        calls = setup.judge_calls * setup.rows * setup.trainers
        waits = math.ceil(calls / setup.judge_concurrency) * setup.judge_seconds
        phases.append(Phase("judge", waits, "latency and concurrency of the judge"))
    if _needs_old(setup):
        phases.append(_score_phase(setup, "old log-probabilities"))
    if setup.beta:
        phases.append(_score_phase(setup, "reference log-probabilities"))
    phases.append(_train_phase(setup))
    phases.append(_update_phase(setup))
    if setup.rollout != "transformers":
        phases.append(_sync_phase(setup))
    if setup.media.video or setup.media.audio:
        decoding = setup.prompts * setup.rate("decode_seconds") / max(setup.media_workers, 1)
        ahead = sum(phase.seconds for phase in phases) if setup.media_prefetch and setup.media_workers else 0
        phases.insert(0, Phase("decoding of media", max(decoding - ahead, 0), "decoder processes"))
    return phases


# The plan


@dataclass(frozen=True)
class Plan:
    """
    What a setup takes.

    Attributes:
        setup: what was asked.
        memory: bytes on a card.
        phases: seconds of a rollout and its updates.
        notes: what this arithmetic leaves out, where it matters.
    """

    setup: Setup
    memory: Memory
    phases: list[Phase]
    notes: list[str]

    @property
    def usable(self) -> float:
        """Bytes of a card that can be filled."""
        return self.setup.gpu.memory * GIB * self.setup.rate("usable_memory")

    @property
    def engine_fits(self) -> bool:
        """Whether the engine's share of a card holds the weights and a completion."""
        return engine_rows(self.setup)[1] >= 1

    @property
    def likely(self) -> float:
        """Bytes that such a job is likely to take, with what is not counted."""
        return self.memory.peak / self.setup.rate("counted_memory")

    @property
    def verdict(self) -> str:
        """`fits`, `tight` where only what is counted does, or `does not fit`."""
        if not self.engine_fits or self.memory.peak > self.usable:
            return "does not fit"
        return "fits" if self.likely <= self.usable else "tight"

    @property
    def seconds(self) -> float:
        """Time of an optimizer step, with its share of the rollout: what is counted of it."""
        return sum(phase.seconds for phase in self.phases) / self.setup.steps

    @property
    def likely_seconds(self) -> float:
        """Seconds that such a step is likely to take, with what is not counted."""
        return self.seconds / self.setup.rate("counted_time")

    @property
    def longest(self) -> Phase:
        """The phase that takes most of it."""
        return max(self.phases, key=lambda phase: phase.seconds)


def make_plan(setup: Setup) -> Plan:
    """Compute memory and time of a setup."""
    memory = plan_memory(setup)
    rows, at_once = engine_rows(setup)
    phases = plan_time(setup) if at_once >= 1 else []
    notes = []
    if setup.model.text.experts:
        notes.append(
            "Experts: times are what the chosen ones compute. transformers reaches far less: EasyR1 publishes 1.8 % of the "
            "peak for Qwen3-VL-30B-A3B on 8 H800 (assets/baselines.md)."
        )
    if 1 <= at_once < rows and setup.rollout != "transformers":
        notes.append(f"The engine's cache holds {at_once:.0f} of its {rows:.0f} completions at once.")
    if setup.rollout == "vllm_server":
        notes.append("Training cards wait while the server samples, and the server while they train.")
    return Plan(setup, memory, phases, notes)


def remedies(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield changes that lower memory, the cheapest first, each with what it is called."""
    if not setup.gradient_checkpointing:
        yield "gradient_checkpointing true", replace(setup, gradient_checkpointing=True)
    if not setup.shared_prefix:
        yield "shared_prefix on", replace(setup, shared_prefix=True)
    if setup.rollout == "vllm_colocate" and not setup.vllm_enable_sleep_mode:
        yield "vllm_enable_sleep_mode true", replace(setup, vllm_enable_sleep_mode=True)
    batch = setup.per_device_train_batch_size
    if batch % 2 == 0:
        halved = replace(
            setup,
            per_device_train_batch_size=batch // 2,
            gradient_accumulation_steps=2 * setup.gradient_accumulation_steps,
            steps_per_generation=2 * setup.steps_per_generation,
        )
        yield f"per_device_train_batch_size {batch // 2}, gradient_accumulation_steps doubled", halved
    piece = min(setup.generation_batch or setup.rows, setup.rows)
    if setup.rollout == "transformers" and piece > setup.num_generations:
        yield f"generation_batch {setup.num_generations}", replace(setup, generation_batch=setup.num_generations)
    if setup.trainers > 1:
        for sharding in SHARDINGS[SHARDINGS.index(setup.sharding) + 1 : 3]:
            yield f"sharding {sharding}", replace(setup, sharding=sharding)
    if setup.optim == "adamw":
        yield "optim adamw_8bit", replace(setup, optim="adamw_8bit")
    if not setup.lora_r:
        yield "use_peft true (lora_r 16)", replace(setup, lora_r=16)
    if setup.dtype == "float32" and setup.compute != "float32":
        yield "dtype bfloat16", replace(setup, dtype="bfloat16")
    if setup.sharding != "none" and setup.rollout != "vllm_server":
        yield f"gpus {2 * setup.gpus}", replace(setup, gpus=2 * setup.gpus)


def advise(plan: Plan) -> list[tuple[str, float]]:
    """
    Return what to change where a plan does not fit: each change that alone makes it fit, or else several together.

    Returns:
        `list[tuple[str, float]]`: what to change, and the peak on a card in bytes; empty where nothing is enough.
    """
    alone = [(name, make_plan(changed)) for name, changed in remedies(plan.setup)]
    fitting = [(name, found.memory.peak) for name, found in alone if found.verdict == "fits"]
    if fitting:
        return fitting
    names, current = [], plan
    for _ in range(12):
        better = [(name, make_plan(changed)) for name, changed in remedies(current.setup)]
        better = [(name, found) for name, found in better if found.memory.peak < current.memory.peak]
        if not better:
            return []
        name, current = min(better, key=lambda pair: pair[1].memory.peak)
        names.append(name)
        if current.verdict == "fits":
            return [(" + ".join(names), current.memory.peak)]
    return []
