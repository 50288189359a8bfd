"""Published sizes of models and cards, and the constants with which work becomes seconds; each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


# Models: what their configuration on the Hub says


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


def _vision_2_5(outputs: int) -> dict[str, Any]:
    return {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "spatial_merge_size": 2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
        "out_hidden_size": outputs,
    }


def _whisper(outputs: int, **more: int) -> dict[str, Any]:
    sizes = {"encoder_layers": 32, "d_model": 1280, "encoder_ffn_dim": 5120, "num_mel_bins": 128}
    return {**sizes, "output_dim": outputs, **more}


def _qwen3(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool, **experts: int
) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe" if experts else "qwen3",
        **_qwen2(hidden, inner, layers, heads, kv_heads, 151_936),
        "head_dim": 128,
        "tie_word_embeddings": tied,
        **experts,
    }


_TEXT_3B, _TEXT_7B = _qwen2(2048, 11_008, 36, 16, 2, 151_936), _qwen2(3584, 18_944, 28, 28, 4, 152_064)
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}

MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-Omni-3B": {
        "model_type": "qwen2_5_omni_thinker",
        "text_config": _TEXT_3B,
        "vision_config": _vision_2_5(2048),
        "audio_config": _whisper(2048, n_window=100),
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-Omni-7B": {
        "model_type": "qwen2_5_omni_thinker",
        "text_config": _TEXT_7B,
        "vision_config": _vision_2_5(3584),
        "audio_config": _whisper(3584, n_window=100),
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": {
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": {**_qwen2(2048, 768, 48, 32, 4, 152_064), "head_dim": 128, **_EXPERTS},
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "spatial_merge_size": 2,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": (8, 16, 24),
        },
        "audio_config": _whisper(2048, n_window=50, n_window_infer=800, downsample_hidden_size=480),
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": _TEXT_3B,
        "vision_config": _vision_2_5(2048),
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": _TEXT_7B,
        "vision_config": _vision_2_5(3584),
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2-Audio-7B-Instruct": {
        "model_type": "qwen2_audio",
        "text_config": _qwen2(4096, 11_008, 32, 32, 32, 156_032),
        "audio_config": _whisper(4096, max_source_positions=1500),
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12_288, 36, 32, 8, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17_408, 40, 40, 8, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25_600, 64, 64, 8, tied=False),
    "Qwen/Qwen3-30B-A3B": _qwen3(2048, 6144, 48, 32, 4, tied=False, **_EXPERTS),
}
"""Configurations by the name on the Hub, as far as sizes follow from them (huggingface.co/NAME/blob/main/config.json)."""


# Cards


@dataclass(frozen=True)
class Gpu:
    """
    A card, by its data sheet.

    Attributes:
        name: what it is called.
        memory: GiB.
        teraflops: of dense bfloat16 matrix products.
        bandwidth: of its memory, GB/s.
        link: to the other cards of a node, GB/s in each direction.
        network: to other nodes, GB/s for each card.
    """

    name: str
    memory: float
    teraflops: float
    bandwidth: float
    link: float
    network: float = 50


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", 40, 312, 1555, 300, 25),
        Gpu("A100-80GB", 80, 312, 2039, 300, 25),
        Gpu("A800-80GB", 80, 312, 2039, 200, 25),
        Gpu("H100", 80, 989, 3350, 450),
        Gpu("H800", 80, 989, 3350, 200),
        Gpu("H200", 141, 989, 4800, 450),
        Gpu("H20", 96, 148, 4000, 450),
        Gpu("B200", 180, 2250, 8000, 900),
        Gpu("L40S", 48, 362, 864, 32, 25),
        Gpu("L20", 48, 119.5, 864, 32, 25),
        Gpu("RTX-4090", 24, 165, 1008, 32, 12.5),
    )
}
"""
Cards by name. Peaks without sparsity, as github.com/volcengine/verl (verl/utils/flops_counter.py) lists them; memory,
bandwidth and links by NVIDIA's data sheets; the network is the 400 Gb/s for each card of a DGX H100, 200 Gb/s for older ones.
"""


# Constants


@dataclass(frozen=True)
class Rate:
    """
    A constant of the model of time, or of what memory a process cannot use.

    Attributes:
        value: a number.
        unit: what it counts.
        origin: `published` (fitted to figures that others measured), `measured` (here, on a CPU), or `assumed`.
        source: where it is from.
        means: what it is.
    """

    value: float
    unit: str
    origin: str
    source: str
    means: str


_EASYR1 = "github.com/hiyouga/EasyR1 assets/baselines.md: actor MFU of Qwen2.5-VL-7B on 8 H100, micro-batches 1 and 4"
_QWEN3 = "github.com/QwenLM/Qwen3 docs/source/getting_started/speed_benchmark.md, H20, one request"
_JOBS = "the median job of `benchmarks/plan_published.py` (EasyR1, ms-swift, Video-R1, VLM-R1, R1-AQA)"

RATES = {
    "compute_share": Rate(
        0.39, "of the peak", "published", _EASYR1, "operations per second that passes of many tokens reach"
    ),
    "sharded_layer_ms": Rate(
        2.1, "ms", "published", _EASYR1, "beyond that, for a layer and pass where its weights are sharded"
    ),
    "launch_layer_ms": Rate(
        0.61, "ms", "published", _QWEN3, "least time of a layer and pass run by transformers: kernel launches"
    ),
    "decode_share": Rate(
        0.42, "of the bandwidth", "published", _QWEN3, "weights and cache that transformers' decode reads per second"
    ),
    "engine_share": Rate(
        0.36, "of the bandwidth", "published", _QWEN3, "the same for an engine with CUDA graphs (SGLang 0.4.6)"
    ),
    "engine_layer_ms": Rate(
        0.054, "ms", "published", _QWEN3, "beyond that, for a layer and decode step of the engine"
    ),
    "link_share": Rate(0.70, "of the data sheet", "assumed", "", "speed of collective operations between cards"),
    "usable_memory": Rate(
        0.94, "of the card", "assumed", "", "what allocators can fill: the rest is CUDA, NCCL and fragments"
    ),
    "counted_memory": Rate(
        0.69, "of what jobs take", "published", _JOBS, "tensors that are counted here against published peaks"
    ),
    "counted_time": Rate(
        0.70, "of what jobs take", "published", _JOBS, "seconds that are counted here against published steps"
    ),
    "decode_seconds": Rate(
        0.4,
        "s",
        "measured",
        "`benchmarks/plan_points.py --parts clips`: clips of 30 s of Daily-Omni, 8 frames and sound, on one core",
        "of a processor to decode a clip",
    ),
}
"""Constants by name; each can be given as an option."""
