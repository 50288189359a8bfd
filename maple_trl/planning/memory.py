"""
Bytes on a card, counted tensor by tensor.

Weights, gradients and optimizer, what the backward pass needs, the tiles of the LM head, and the key-value cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from maple_trl.planning.setup import DTYPES, GIB, OPTIMIZERS, Setup
from maple_trl.planning.sizes import AudioSizes, Linear, Media, ModelSizes, TextSizes, VisionSizes


HEAD_TOKENS, HEAD_WIDTH = 4096, 32_768
"""A tile of logits of TRL's head (`trl.kernels.chunked_logprob`): tokens, and entries of the vocabulary."""

_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights, and scales of them, that share a scale in bitsandbytes."""

_DEEPSPEED_BUCKETS = 2 * 500_000_000  # elements of the two that ZeRO-2 keeps
_ATTENTION_COPIES = ("flash_attention_2",)
"""Kinds of attention that copy a shared prompt's keys for each completion."""


def weight_bytes(setup: Setup) -> float:
    """Return the bytes of the weights on a card."""
    size = 2 if setup.deepspeed else DTYPES[setup.dtype]
    base = setup.model.parameters * size + (setup.trainable * _adapter_size(setup) if setup.lora_r else 0)
    base += sum(packed_bytes(layer, setup) - layer.weights * size for layer in setup.quantized)
    return base / setup.shards if setup.sharded_weights else base


def packed_bytes(layer: Linear, setup: Setup) -> int:
    """
    Return what bitsandbytes keeps of the weights of quantized layers.

    Of 8 bits the weights with a scale for each output; of 4 bits two in a byte, with a scale for each block of them, and in
    each layer the values that they stand for. Nested scales have 8 bits, and scales of their own.
    """
    weights = layer.inputs * layer.outputs
    if setup.load_in_8bit:
        return layer.count * (weights + 4 * layer.outputs)
    blocks = -(-weights // _BLOCK)
    scales = blocks + 4 * -(-blocks // _NESTED_BLOCK) + 4 * 256 + 4 if setup.use_bnb_nested_quant else 4 * blocks
    return layer.count * (-(-weights // 2) + scales + 4 * 16)


def unpacked_bytes(setup: Setup) -> float:
    """Return the bytes of the largest weight of few bits, which is there as a whole while it is used."""
    return max((layer.inputs * layer.outputs for layer in setup.quantized), default=0) * DTYPES[setup.compute]


def _adapter_size(setup: Setup) -> int:
    """Return the bytes of a parameter of LoRA, which PEFT keeps in float32, and TRL beside few bits in bfloat16."""
    return 2 if setup.deepspeed or setup.bits else 4


def trained_size(setup: Setup) -> int:
    """Return the bytes of a parameter that is trained."""
    return _adapter_size(setup) if setup.lora_r else 2 if setup.deepspeed else DTYPES[setup.dtype]


def gradient_bytes(setup: Setup) -> float:
    """Return the bytes of the gradients on a card."""
    return setup.trainable * trained_size(setup) / setup.shards


def optimizer_bytes(setup: Setup) -> float:
    """Return the bytes of the optimizer's state on a card, with DeepSpeed's weights in float32."""
    own = 4 if setup.deepspeed else trained_size(setup) if setup.optim == "adamw" else 4
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
    return size * (2 * text.widest_inner + 2 * text.hidden)


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
    for tower, states, layer in towers_of(setup.model, micro.media, size):
        kept = tower.hidden * size if setup.gradient_checkpointing else layer
        saved += states * tower.layers * kept if setup.trains_towers else 0
        running = max(running, states * layer) if setup.towers_in_passes else running
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
        head_gradient = text.head.parameters * trained_size(setup) / setup.shards
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


def towers_of(model: ModelSizes, media: Media, size: int) -> Iterator[tuple[VisionSizes | AudioSizes, float, float]]:
    """Yield each tower with the positions in its layers, and what the backward of a layer needs of one."""
    if model.vision and media.video:
        yield model.vision, model.vision.patches(media), _vision_layer_bytes(model.vision, size)
    if model.audio and media.audio:
        yield model.audio, model.audio.states(media), _audio_layer_bytes(model.audio, size)


def working_bytes(setup: Setup) -> float:
    """
    Return the bytes of weights that are there a second time.

    They are cast for autocast, unpacked of few bits, gathered from other cards, or in buckets.
    """
    text = setup.model.text
    casts = DTYPES[setup.dtype] > DTYPES[setup.compute] and not setup.deepspeed
    cast = unpacked_bytes(setup) + 2 * setup.trainable * casts
    if not setup.sharded_weights:
        return cast + (2 * _DEEPSPEED_BUCKETS if setup.sharding == "zero2" else 0)
    layer = text.part.parameters / text.layers
    return cast / setup.shards + 2 * (max(layer, text.vocab * text.hidden) + layer)


def forward_bytes(setup: Setup, tokens: float) -> float:
    """Return the bytes that a forward without gradients holds at once."""
    text, size = setup.model.text, DTYPES[setup.compute]
    return tokens * (size * (3 * text.hidden + 3 * text.widest_inner + 2 * text.queries) + 4 * text.hidden)


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
        rows = setup.generated_at_once
        length = setup.prompt + setup.completion
        prompts = -(-rows // setup.num_generations) if setup.shared_prefix else rows
        whole = 2 * model.parameters if setup.sharded_weights else unpacked_bytes(setup)
        rollout |= {
            "weights cast or gathered": whole,
            "key-value cache": cache_bytes(model.text, rows * length, size),
            "activations": forward_bytes(setup, prompts * setup.prompt),
        }
    server = {"rollout engine": engine} if setup.rollout == "vllm_server" else {}
    return Memory(training, rollout, server)
