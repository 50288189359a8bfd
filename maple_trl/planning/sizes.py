"""
Sizes of a model, read from its configuration: parameters by part, and the operations and bytes that a token costs.

Nothing is loaded and nothing is guessed: the counts are those of the classes of transformers, which
`tests/planning/test_sizes.py` builds without memory and compares, and the operations those that PyTorch counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


PARTS = ("llm", "head", "vision", "audio", "projectors")
"""The scopes of LoRA and freezing, and the LM head, which belongs to none."""

_TEXT_TYPES = ("qwen2", "qwen3", "qwen3_moe")
FAMILIES = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "qwen2_5_vl", "qwen3_vl", "qwen2_audio", *_TEXT_TYPES)
"""Values of `model_type` whose sizes can be read; of a full Omni model those of its Thinker."""


@dataclass(frozen=True)
class Linear:
    """
    Linear layers of one shape.

    Attributes:
        inputs, outputs: sizes.
        count: how many there are.
        bias: whether they have one.
    """

    inputs: int
    outputs: int
    count: int = 1
    bias: bool = True

    @property
    def weights(self) -> int:
        """Numbers that a token is multiplied with."""
        return self.inputs * self.outputs * self.count

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.weights + self.bias * self.outputs * self.count

    def lora(self, rank: int) -> int:
        """Return the parameters of LoRA adapters on them."""
        return rank * (self.inputs + self.outputs) * self.count


@dataclass(frozen=True)
class Part:
    """
    A part of a model.

    Attributes:
        linear: its linear layers.
        other: parameters of all else: embeddings, norms, convolutions, experts.
    """

    linear: tuple[Linear, ...] = ()
    other: int = 0

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(layer.parameters for layer in self.linear) + self.other

    def lora(self, rank: int) -> int:
        """Return the parameters of LoRA adapters on all of its linear layers."""
        return sum(layer.lora(rank) for layer in self.linear)


@dataclass(frozen=True)
class Work:
    """
    What a pass computes: additive.

    Attributes:
        tokens: that pass the language model.
        pairs: of tokens in its attention, of which only those that are looked at count.
        head: tokens that pass the LM head.
    """

    tokens: float = 0
    pairs: float = 0
    head: float = 0

    def __add__(self, other: Work) -> Work:
        """Return the work of both."""
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.head + other.head)

    def __mul__(self, times: float) -> Work:
        """Return the work of several such passes."""
        return Work(self.tokens * times, self.pairs * times, self.head * times)


def plain_work(prompt: float, completion: float, group: float) -> Work:
    """Return the work of a forward of each row by itself. Of a square of pairs half is looked at."""
    length = prompt + completion
    return Work(group * length, group * length**2 / 2, group * completion)


def shared_work(prompt: float, completion: float, group: float) -> Work:
    """Return the work of a forward that passes the prompt once, and each token of a completion once."""
    pairs = prompt**2 / 2 + group * (completion * prompt + completion**2 / 2)
    return Work(prompt + group * completion, pairs, group * completion)


def generation_work(prompt: float, completion: float, group: float, shared: bool) -> Work:
    """Return the work of the prompt, of whose logits the last are needed, then token by token."""
    times = 1 if shared else group
    decoded = completion - 1  # the prompt gives the first token
    pairs = times * prompt**2 / 2 + group * (decoded * prompt + decoded**2 / 2)
    return Work(times * prompt + group * decoded, pairs, group * completion)


@dataclass(frozen=True)
class TextSizes:
    """
    A language model.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, inner, vocab: as in its configuration; `inner` of a dense layer.
        tied: whether the head is the embedding.
        head_norms: whether queries and keys are normalised by head.
        qkv_bias: whether their projections have biases.
        experts, chosen, expert_inner, sparse: experts of a layer, those that a token passes, their inner size, and the
            layers that have experts.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool = False
    head_norms: bool = False
    qkv_bias: bool = True
    experts: int = 0
    chosen: int = 0
    expert_inner: int = 0
    sparse: int = 0

    @property
    def queries(self) -> int:
        """Width of a token's queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of a token's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.expert_inner

    @property
    def widest_inner(self) -> int:
        """Inner size that a token passes: of a dense layer where there is one, else of all experts that it passes."""
        return self.inner if self.sparse < self.layers else self.chosen * self.expert_inner

    @property
    def part(self) -> Part:
        """All but the head."""
        dense = self.layers - self.sparse
        linear = (
            Linear(self.hidden, self.queries, self.layers, self.qkv_bias),
            Linear(self.hidden, self.keys, 2 * self.layers, self.qkv_bias),
            Linear(self.queries, self.hidden, self.layers, False),
            Linear(self.hidden, self.inner, 2 * dense, False),
            Linear(self.inner, self.hidden, dense, False),
        )
        norms = 2 * self.hidden + 2 * self.head_dim * self.head_norms
        experts = self.experts * (self.expert_weights + self.hidden)  # and the router's row
        return Part(linear, self.vocab * self.hidden + self.layers * norms + self.hidden + self.sparse * experts)

    @property
    def head(self) -> Part:
        """The LM head; nothing where it is the embedding."""
        return Part(other=0 if self.tied else self.vocab * self.hidden)

    @property
    def active(self) -> int:
        """Weights that a token is multiplied with, without the head's."""
        experts = self.expert_weights * self.chosen + self.hidden * self.experts
        return sum(layer.weights for layer in self.part.linear) + self.sparse * experts

    @property
    def cache_values(self) -> int:
        """Numbers that the key-value cache holds of a token."""
        return 2 * self.layers * self.keys

    def operations(self, work: Work) -> float:
        """Count the multiplications and additions of a forward."""
        per_pair = 4 * self.queries * self.layers
        return 2 * self.active * work.tokens + per_pair * work.pairs + 2 * self.hidden * self.vocab * work.head


@dataclass(frozen=True)
class Media:
    """
    What a prompt's media are, in tokens.

    Attributes:
        video, audio: tokens of each; a clip of the one and of the other. A picture is as many as a pair of frames.
        height, width: of a frame in pixels.
    """

    video: float = 0
    audio: float = 0
    height: int = 336
    width: int = 224


@dataclass(frozen=True)
class VisionSizes:
    """
    A vision tower.

    Attributes:
        layers, hidden, inner, merge: as in its configuration.
        gated: whether its feed-forward layers have a gate.
        fused: whether queries, keys and values are one projection.
        patch, frames: side of a patch in pixels, and frames that it spans.
        channels: of a pixel.
        outputs: hidden size of the language model.
        window: side of an attention window in patches; 0 where each frame attends as a whole.
        full_layers: layers without windows.
        positions: learned ones.
        taps: layers whose output goes into the language model too.
    """

    layers: int
    hidden: int
    inner: int
    merge: int
    gated: bool
    fused: bool
    patch: int
    frames: int
    channels: int
    outputs: int
    window: int = 0
    full_layers: int = 0
    positions: int = 0
    taps: int = 0

    @property
    def patch_values(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.frames * self.patch**2

    @property
    def part(self) -> Part:
        """The tower without its projector."""
        size, inner = self.hidden, self.inner
        attention = (
            (Linear(size, 3 * size, self.layers), Linear(size, size, self.layers))
            if self.fused
            else (Linear(size, size, 4 * self.layers),)
        )
        forward = (Linear(size, inner, (1 + self.gated) * self.layers), Linear(inner, size, self.layers))
        # Where the third generation normalises by mean and deviation, the second does by length.
        norms = self.layers * (2 if self.gated else 4) * size
        embedding = self.patch_values * size + (0 if self.gated else size) + self.positions * size
        return Part((*attention, *forward), norms + embedding)

    @property
    def projector(self) -> Part:
        """What makes tokens of patches, for the end and for each tap."""
        merged, mergers = self.hidden * self.merge**2, 1 + self.taps
        linear = (Linear(merged, merged, mergers), Linear(merged, self.outputs, mergers))
        norms = self.hidden if self.gated else 2 * self.hidden + self.taps * 2 * merged
        return Part(linear, norms)

    def grid(self, media: Media) -> tuple[int, int]:
        """Return the patches of a frame, its height and width being multiples of a token's."""
        unit = self.patch * self.merge
        return max(media.height // unit, 1) * self.merge, max(media.width // unit, 1) * self.merge

    def patches(self, media: Media) -> float:
        """Return the patches of all frames."""
        return media.video * self.merge**2

    def operations(self, media: Media) -> float:
        """Count those of a forward."""
        height, width = self.grid(media)
        patches = self.patches(media)
        frames = patches / (height * width)
        window = self.window or max(height, width)
        parts = [
            min(window, height - y) * min(window, width - x)
            for y in range(0, height, window)
            for x in range(0, width, window)
        ]
        full = self.full_layers if self.window else self.layers
        pairs = frames * (full * (height * width) ** 2 + (self.layers - full) * sum(part**2 for part in parts))
        weights = self.patch_values * self.hidden + sum(layer.weights for layer in self.part.linear)
        projected = sum(layer.weights for layer in self.projector.linear)
        return 2 * patches * weights + 4 * self.hidden * pairs + 2 * media.video * projected


@dataclass(frozen=True)
class AudioSizes:
    """
    An audio tower.

    Attributes:
        layers, hidden, inner, mel_bins: as in its configuration.
        outputs: hidden size of the language model.
        kind: `2.5` (Qwen2.5-Omni), `3` (Qwen3-Omni) or `2` (Qwen2-Audio).
        chunk: mel frames that the convolutions read at a time.
        window: mel frames that attend to each other.
        positions: learned ones.
        channels: of Qwen3-Omni's convolutions.
    """

    layers: int
    hidden: int
    inner: int
    mel_bins: int
    outputs: int
    kind: str
    chunk: int
    window: int
    positions: int = 0
    channels: int = 0

    @property
    def part(self) -> Part:
        """The tower without its projector."""
        size, inner = self.hidden, self.inner
        # Keys have no bias where Whisper's have none.
        attention = (
            (Linear(size, size, 4 * self.layers),)
            if self.kind == "3"
            else (Linear(size, size, 3 * self.layers), Linear(size, size, self.layers, False))
        )
        linear = (*attention, Linear(size, inner, self.layers), Linear(inner, size, self.layers))
        norms = 4 * size * self.layers + 2 * size
        if self.kind == "3":
            linear += (Linear(self.channels * _halved(self.mel_bins, 3), size, bias=False),)
            between = 9 * self.channels**2 + self.channels
            return Part(linear, norms + 9 * self.channels + self.channels + 2 * between)
        convolutions = 3 * self.mel_bins * size + size + 3 * size**2 + size
        marks = 2 * self.outputs if self.kind == "2.5" else 0
        return Part(linear, norms + convolutions + self.positions * size + marks)

    @property
    def projector(self) -> Part:
        """What makes tokens of states."""
        last = Linear(self.hidden, self.outputs)
        return Part((Linear(self.hidden, self.hidden), last) if self.kind == "3" else (last,))

    def states(self, media: Media) -> float:
        """Return the positions in the layers of a prompt's audio."""
        if self.kind == "3":
            return media.audio
        return 2 * (self.positions / 2 if self.kind == "2" and media.audio else media.audio)

    def operations(self, media: Media) -> float:
        """Count those of a forward."""
        if not media.audio:
            return 0
        if self.kind == "3":
            return self._operations_3(media)
        states = self.states(media)
        mel = 2 * states
        # The convolutions read every chunk padded to the longest, so a clip shorter than a chunk pads nothing.
        padded = -(-mel // self.chunk) * self.chunk if mel > self.chunk else mel
        convolutions = 2 * 3 * (padded * self.mel_bins * self.hidden + padded / 2 * self.hidden**2)
        return convolutions + self._layers(states, self.window / 2) + self._projected(media)

    def _operations_3(self, media: Media) -> float:
        chunks = media.audio / _halved(self.chunk, 3)
        convolutions, inputs = 0.0, 1
        for times in (1, 2, 3):
            read = _halved(self.mel_bins, times) * _halved(self.chunk, times)
            convolutions += 2 * 9 * inputs * self.channels * read
            inputs = self.channels
        window = self.window / self.chunk * _halved(self.chunk, 3)
        return chunks * convolutions + self._layers(media.audio, window) + self._projected(media)

    def _layers(self, states: float, window: float) -> float:
        whole, rest = divmod(states, window)
        weights = sum(layer.weights for layer in self.part.linear)
        return 2 * states * weights + 4 * self.hidden * self.layers * (whole * window**2 + rest**2)

    def _projected(self, media: Media) -> float:
        return 2 * media.audio * sum(layer.weights for layer in self.projector.linear)


def _halved(size: int, times: int) -> int:
    for _ in range(times):
        size = (size + 1) // 2
    return size


@dataclass(frozen=True)
class ModelSizes:
    """
    A model.

    Attributes:
        name: what it is called.
        text: its language model.
        vision, audio: its towers, where it has them.
    """

    name: str
    text: TextSizes
    vision: VisionSizes | None = None
    audio: AudioSizes | None = None
    parts: dict[str, Part] = field(init=False)

    def __post_init__(self) -> None:
        """Sum up its parts."""
        towers = [tower for tower in (self.vision, self.audio) if tower is not None]
        projectors = [tower.projector for tower in towers]
        parts = {
            "llm": self.text.part,
            "head": self.text.head,
            "vision": self.vision.part if self.vision else Part(),
            "audio": self.audio.part if self.audio else Part(),
            "projectors": Part(
                tuple(layer for part in projectors for layer in part.linear), sum(part.other for part in projectors)
            ),
        }
        object.__setattr__(self, "parts", parts)

    @property
    def parameters(self) -> int:
        """All of them; of a head that is the embedding once."""
        return sum(part.parameters for part in self.parts.values())

    def tower_operations(self, media: Media) -> float:
        """Count the operations of both towers and their projectors over a prompt's media."""
        return sum(tower.operations(media) for tower in (self.vision, self.audio) if tower is not None)


# Reading a configuration


def read_sizes(config: Mapping[str, Any], name: str = "") -> ModelSizes:
    """
    Read the sizes of a model from its configuration, as `config.to_dict()` or `config.json` has it.

    Raises:
        ValueError: for a model type whose sizes are not known, or a configuration without one of its sizes.
    """
    if "thinker_config" in config:
        return read_sizes(_with_type(config["thinker_config"], config), name)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"sizes of the model type {kind!r} are not known; those of {', '.join(FAMILIES)} are")
    try:
        text = config if kind in _TEXT_TYPES else config["text_config"]
        tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
        return ModelSizes(
            name or kind, _read_text(kind, text, tied), _read_vision(kind, config), _read_audio(kind, config)
        )
    except KeyError as error:
        raise ValueError(f"the configuration of {name or kind} does not say {error.args[0]}") from None


def _with_type(thinker: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a Thinker's configuration with its type, which published files may not name."""
    return {"model_type": f"{whole['model_type']}_thinker", **thinker}


def _read_text(kind: str, text: Mapping[str, Any], tied: bool) -> TextSizes:
    third = "qwen3" in kind
    layers, heads, hidden = text["num_hidden_layers"], text["num_attention_heads"], text["hidden_size"]
    experts = text.get("num_experts") or 0
    dense = set(text.get("mlp_only_layers") or ())
    step = text.get("decoder_sparse_step") or 1
    sparse = sum(i not in dense and (i + 1) % step == 0 for i in range(layers)) if experts else 0
    return TextSizes(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        inner=text["intermediate_size"],
        vocab=text["vocab_size"],
        tied=tied,
        head_norms=third,
        qkv_bias=bool(text.get("attention_bias", False)) if third else True,
        experts=experts,
        chosen=text["num_experts_per_tok"] if experts else 0,
        expert_inner=text["moe_intermediate_size"] if experts else 0,
        sparse=sparse,
    )


def _read_vision(kind: str, config: Mapping[str, Any]) -> VisionSizes | None:
    if kind in _TEXT_TYPES or kind == "qwen2_audio":
        return None
    vision, third = config["vision_config"], "qwen3" in kind
    patch = vision["patch_size"]
    full = [layer for layer in vision.get("fullatt_block_indexes") or () if layer < vision["depth"]]
    return VisionSizes(
        layers=vision["depth"],
        hidden=vision["hidden_size"],
        inner=vision["intermediate_size"],
        merge=vision["spatial_merge_size"],
        gated=not third,
        fused=kind != "qwen2_5_omni_thinker",
        patch=patch,
        frames=vision["temporal_patch_size"],
        channels=vision.get("in_channels", 3),
        outputs=vision["out_hidden_size"],
        window=0 if third else vision["window_size"] // patch,
        full_layers=len(full),
        positions=vision["num_position_embeddings"] if third else 0,
        taps=len(vision["deepstack_visual_indexes"]) if third else 0,
    )


def _read_audio(kind: str, config: Mapping[str, Any]) -> AudioSizes | None:
    if "omni" not in kind and kind != "qwen2_audio":
        return None
    audio = config["audio_config"]
    generation = {"qwen2_audio": "2", "qwen2_5_omni_thinker": "2.5"}.get(kind, "3")
    whole = 2 * audio["max_source_positions"] if generation == "2" else 0
    chunk = whole or 2 * audio["n_window"]
    return AudioSizes(
        layers=audio["encoder_layers"],
        hidden=audio["d_model"],
        inner=audio["encoder_ffn_dim"],
        mel_bins=audio["num_mel_bins"],
        outputs=config["text_config"]["hidden_size"] if generation == "2" else audio["output_dim"],
        kind=generation,
        chunk=chunk,
        window=audio["n_window_infer"] if generation == "3" else chunk,
        positions=audio["max_source_positions"] if generation == "2" else 0,
        channels=audio["downsample_hidden_size"] if generation == "3" else 0,
    )
