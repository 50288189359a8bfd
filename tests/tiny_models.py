"""Tiny random models and processors of every supported family, built in code without any download.

The tokenizers carry the real names of each family's special tokens, the chat templates render the same blocks as the
published ones, and the models have the published layer layout at toy widths. Weights are drawn with a large standard
deviation so that the logits depend visibly on every input.

Layout shared by all families: hidden width 64, 2 decoder layers (Gemma 4: 4, of two kinds), towers 32 wide with 1 or 2 layers, float32, eager
generation settings (no sampling defaults), left padding.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedImageProcessor,
    Gemma4UnifiedProcessor,
    Gemma4UnifiedVideoProcessor,
    Gemma4VideoProcessor,
    GenerationConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3ImageProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniThinkerConfig,
)
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeThinkerConfig,
)
from trl.chat_template_utils import gemma4_v5_chat_template


@dataclass(frozen=True)
class FamilySpec:
    """What a test must know about one family.

    `frame_multiple` is patch_size * merge_size (of Gemma 4 patch_size * pooling_kernel_size): the side lengths of frames given to the processor without resizing
    must be multiples of it (0 for a family without vision). `sampling_rate` is in Hz (0 without audio).
    `max_audio_seconds` is the longest clip that the feature extractor keeps whole (None: any length).
    `tokens` maps the attribute name on the tokenizer to the token string.
    """

    model_class: type
    processor_class: type
    frame_multiple: int
    temporal_patch_size: int
    sampling_rate: int
    max_audio_seconds: int | None
    tokens: dict[str, str]
    end: str = "<|im_end|>"
    pad: str = "<|endoftext|>"

    @property
    def has_vision(self) -> bool:
        return self.frame_multiple > 0

    @property
    def has_audio(self) -> bool:
        return self.sampling_rate > 0


_OMNI_2_5_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_OMNI_3_TOKENS = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
_VL_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_BARE_VISION_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_PHI4_TOKENS = {"image_token": "<|image|>", "audio_token": "<|audio|>"}
_AUDIO_TOKENS = {
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_GEMMA_TOKENS = {
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def _gemma(sampling_rate: int = 16000, unified: bool = False) -> FamilySpec:
    classes = (Gemma4ForConditionalGeneration, Gemma4Processor)
    if unified:
        classes = (Gemma4UnifiedForConditionalGeneration, Gemma4UnifiedProcessor)
    return FamilySpec(*classes, 18, 1, sampling_rate, 30, _GEMMA_TOKENS, "<turn|>", "<pad>")


FAMILIES: dict[str, FamilySpec] = {
    "qwen2_5_omni": FamilySpec(
        Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniProcessor, 28, 2, 16000, 30, _OMNI_2_5_TOKENS
    ),
    "qwen3_omni": FamilySpec(
        Qwen3OmniMoeThinkerForConditionalGeneration, Qwen3OmniMoeProcessor, 32, 2, 16000, None, _OMNI_3_TOKENS
    ),
    "qwen2_5_vl": FamilySpec(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, 28, 2, 0, None, _VL_TOKENS),
    "qwen3_vl": FamilySpec(Qwen3VLForConditionalGeneration, Qwen3VLProcessor, 32, 2, 0, None, _VL_TOKENS),
    "qwen2_audio": FamilySpec(Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, 0, 2, 16000, 1, _AUDIO_TOKENS),
    # As E2B and E4B: per-layer embeddings, layers without keys of their own, pictures are read like text.
    "gemma4": _gemma(),
    # As the dense ones of tens of billions: tokens of a picture see each other both ways, within a layer's window.
    "gemma4_both_ways": _gemma(),
    # As those, with experts, and without an audio tower.
    "gemma4_moe": _gemma(sampling_rate=0),
    # Without towers; both ways in every layer, past its window as well.
    "gemma4_unified": _gemma(unified=True),
    "video_llama_3": FamilySpec(
        VideoLlama3ForConditionalGeneration,
        VideoLlama3Processor,
        28,
        1,
        0,
        None,
        _BARE_VISION_TOKENS,
    ),
    "phi4_multimodal": FamilySpec(
        Phi4MultimodalForCausalLM,
        Phi4MultimodalProcessor,
        0,
        1,
        16000,
        None,
        _PHI4_TOKENS,
    ),
}
GEMMA = tuple(name for name in FAMILIES if name.startswith("gemma4"))
QWEN = tuple(name for name in FAMILIES if name.startswith("qwen"))
FRAME_MULTIPLE: dict[str, int] = {name: spec.frame_multiple for name, spec in FAMILIES.items()}
SAMPLING_RATE: dict[str, int] = {name: spec.sampling_rate for name, spec in FAMILIES.items()}

HIDDEN = 64
LAYERS = 2
HEADS = 4
TOWER = 32
MEL_BINS = 32
INIT_STD = 0.1
QWEN2_AUDIO_SOURCE_POSITIONS = 50  # 100 mel frames = 1 s: the encoder accepts this length and no other

# Head width is 16, so a rotation has 8 frequencies to share between time, height and width.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}

_CORPUS = (
    # The roles stand at the beginning of a line, as after the opening token of a turn, so each becomes one token.
    "system\nYou are a helpful assistant.",
    "system\nuser\nassistant\nsystem\nuser\nassistant\nsystem\nuser\nassistant\n",
    "Watch the video, listen to the audio and read the subtitles, then answer the question.",
    "Which colour is the square in the video? Which tone is heard in the audio? Which word is in the subtitles?",
    "Answer with the letter of the correct option. A. red B. green C. blue D. yellow",
    "The answer is A. The answer is B. The answer is C. The answer is D.",
    "A low tone, a high tone, a rising tone or a falling tone is played for one second.",
    "<0.5 seconds> <1.0 seconds> <1.5 seconds> <2.0 seconds>",
    "one two three four five six seven eight nine ten",
)


def _block_template(image: str, video: str, audio: str | None, *, default_system: bool, audio_label: bool) -> str:
    """Jinja chat template in the ChatML form all these families share.

    Args:
        image, video, audio: Text that one block of that type renders to; None where the family has no such block.
        default_system: Insert the stock system turn when the conversation does not begin with one.
        audio_label: Put "Audio N: " before and a line break after each audio block (the Qwen2-Audio habit).
    """
    system = (
        "{%- if loop.first and message['role'] != 'system' -%}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
        "{%- endif -%}"
        if default_system
        else ""
    )
    branches = []
    for kind, rendered in (("image", image), ("audio", audio), ("video", video)):
        if rendered is None:
            continue
        test = f"part['type'] == '{kind}' or '{kind}' in part or '{kind}_url' in part"
        body = f"{{{{ '{rendered}' }}}}"
        if kind == "audio" and audio_label:
            body = f"{{%- set count.audio = count.audio + 1 -%}}{{{{ 'Audio ' ~ count.audio ~ ': {rendered}\\n' }}}}"
        branches.append(f"{{%- {'elif' if branches else 'if'} {test} -%}}{body}")
    blocks = "".join(branches) + "{%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}"
    return (
        "{%- set count = namespace(audio=0) -%}"
        "{%- for message in messages -%}" + system + "{{ '<|im_start|>' ~ message['role'] ~ '\\n' }}"
        "{%- if message['content'] is string -%}{{ message['content'] }}"
        "{%- else -%}{%- for part in message['content'] -%}" + blocks + "{%- endfor -%}{%- endif -%}"
        "{{ '<|im_end|>\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )


def chat_template(family: str) -> str:
    """Chat template of `family` (a key of `FAMILIES`); of Gemma 4 the published one, which TRL brings along."""
    if family in GEMMA:
        return gemma4_v5_chat_template
    tokens = FAMILIES[family].tokens
    opening = tokens.get("vision_bos_token", tokens.get("vision_start_token"))
    closing = tokens.get("vision_eos_token", tokens.get("vision_end_token"))
    around = (tokens.get("audio_bos_token", ""), tokens.get("audio_eos_token", ""))
    edges = {"image": (opening or "", closing or ""), "video": (opening or "", closing or ""), "audio": around}
    image, video, audio = (
        f"{before}{tokens[f'{kind}_token']}{after}" if f"{kind}_token" in tokens else None
        for kind, (before, after) in edges.items()
    )
    return _block_template(
        image,
        video,
        audio,
        # The third generation leaves the system turn to the caller.
        default_system=family not in ("qwen3_omni", "qwen3_vl"),
        audio_label=family == "qwen2_audio",
    )


@functools.lru_cache(maxsize=1)
def _train_bpe() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Vocabulary and merges of a byte-level BPE with the Qwen2 pre-tokenizer (every byte is in the alphabet)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=512, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
        ),
    )
    state = json.loads(tokenizer.to_str())["model"]
    return state["vocab"], tuple(tuple(pair) for pair in state["merges"])


def build_tokenizer(family: str = "qwen2_5_omni") -> Qwen2Tokenizer:
    """Tokenizer with the special tokens of `family`, its end of a turn as end of text, left padding.

    `<think>`, `</think>`, `<answer>`, `</answer>` are single tokens but not special: decoding keeps them.
    """
    vocab, merges = _train_bpe()
    spec = FAMILIES[family]
    tokenizer = Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=list(merges),
        bos_token="<bos>" if family in GEMMA else None,
        eos_token=spec.end,
        pad_token=spec.pad,
        unk_token=spec.pad,
        padding_side="left",
        model_max_length=32768,
        extra_special_tokens=dict(spec.tokens),
        chat_template=chat_template(family),
    )
    if family in GEMMA:
        special = ("<|turn>", "<|think|>", "<|channel>", "<channel|>", "<|video|>")
    else:
        special = ("<|im_start|>",)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])
    return tokenizer


def build_processor(family: str) -> ProcessorMixin:
    """Processor of `family` with its image, video and audio parts.

    Images and videos default to small sizes (at least 4, at most 64 merged patches per frame or image). Beware: the
    Omni processors override the size of their video processor by a class attribute; pass
    `videos_kwargs={"do_resize": False}` with frames whose sides are multiples of `FRAME_MULTIPLE[family]`.
    """
    spec = FAMILIES[family]
    tokenizer = build_tokenizer(family)
    if family in GEMMA:
        return spec.processor_class(
            tokenizer=tokenizer, chat_template=chat_template(family), **_gemma_parts(family, spec.frame_multiple // 3)
        )
    if family == "phi4_multimodal":
        return Phi4MultimodalProcessor(
            image_processor=Phi4MultimodalImageProcessor(dynamic_hd=4),
            audio_processor=Phi4MultimodalFeatureExtractor(),
            tokenizer=tokenizer,
            chat_template=chat_template(family),
        )
    if family == "video_llama_3":
        area = spec.frame_multiple**2
        clip = {"shortest_edge": 4 * area, "longest_edge": 64 * 64 * area}  # of a whole clip
        return VideoLlama3Processor(
            image_processor=VideoLlama3ImageProcessor(size={"shortest_edge": area, "longest_edge": 64 * area}),
            video_processor=VideoLlama3VideoProcessor(size=clip),
            tokenizer=tokenizer,
            chat_template=chat_template(family),
        )
    parts = {}
    if spec.has_vision:
        patch = spec.frame_multiple // 2
        area = spec.frame_multiple**2
        common = {"patch_size": patch, "temporal_patch_size": spec.temporal_patch_size, "merge_size": 2}
        size = {"shortest_edge": 4 * area, "longest_edge": 64 * area}
        parts["image_processor"] = Qwen2VLImageProcessor(size=size, **common)
        if family == "qwen3_vl":
            # This processor counts the pixels of the whole clip, not of one frame.
            parts["video_processor"] = Qwen3VLVideoProcessor(
                size={"shortest_edge": 4 * area, "longest_edge": 64 * 64 * area}, cap_pixels_per_frame=False, **common
            )
        else:
            parts["video_processor"] = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False, **common)
    if spec.has_audio:
        parts["feature_extractor"] = WhisperFeatureExtractor(
            feature_size=MEL_BINS,
            sampling_rate=spec.sampling_rate,
            chunk_length=spec.max_audio_seconds or 30,
            return_attention_mask=True,
        )
    return spec.processor_class(tokenizer=tokenizer, chat_template=chat_template(family), **parts)


def _gemma_parts(family: str, patch: int) -> dict:
    unified = family == "gemma4_unified"
    images = Gemma4UnifiedImageProcessor if unified else Gemma4ImageProcessor
    videos = Gemma4UnifiedVideoProcessor if unified else Gemma4VideoProcessor
    common = {"patch_size": patch, "pooling_kernel_size": 3, "max_soft_tokens": 70}
    extractor = Gemma4UnifiedAudioFeatureExtractor() if unified else Gemma4AudioFeatureExtractor(feature_size=MEL_BINS)
    return {
        "image_processor": images(**common),
        "video_processor": videos(do_sample_frames=False, **common),
        "feature_extractor": extractor,
    }


def _text_config(tokenizer: Qwen2Tokenizer, **extra) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": 8192,
        "rope_parameters": dict(_MROPE),
        "initializer_range": INIT_STD,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **extra,
    }


def _vision_config_2_5(patch: int) -> dict:
    """Windowed vision tower: one windowed block, one block with full attention."""
    return {
        "depth": 2,
        "hidden_size": TOWER,
        "intermediate_size": 2 * TOWER,
        "num_heads": 2,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": HIDDEN,
        "window_size": 8 * patch,
        "fullatt_block_indexes": [1],
        "initializer_range": INIT_STD,
    }


def _vision_config_3(patch: int) -> dict:
    """Vision tower with learned positions on an 8x8 grid (interpolated) and one deepstack tap."""
    return {
        "depth": 2,
        "hidden_size": TOWER,
        "intermediate_size": 2 * TOWER,
        "num_heads": 2,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": INIT_STD,
    }


def _audio_config(**extra) -> dict:
    return {
        "num_mel_bins": MEL_BINS,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * TOWER,
        "d_model": TOWER,
        "initializer_range": INIT_STD,
        **extra,
    }


def _user_token_id(tokenizer: Qwen2Tokenizer) -> int:
    return tokenizer.encode("user", add_special_tokens=False)[0]


def _config_qwen2_5_omni(tokenizer: Qwen2Tokenizer) -> Qwen2_5OmniThinkerConfig:
    return Qwen2_5OmniThinkerConfig(
        text_config=_text_config(tokenizer),
        vision_config=_vision_config_2_5(14),
        audio_config=_audio_config(n_window=100, max_source_positions=1500, output_dim=HIDDEN),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        audio_token_index=tokenizer.audio_token_id,
        audio_start_token_id=tokenizer.audio_bos_token_id,
        audio_end_token_id=tokenizer.audio_eos_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
        user_token_id=_user_token_id(tokenizer),
        initializer_range=INIT_STD,
    )


def _config_qwen3_omni(tokenizer: Qwen2Tokenizer) -> Qwen3OmniMoeThinkerConfig:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    rope = {**_MROPE, "mrope_interleaved": True, "interleaved": True}
    return Qwen3OmniMoeThinkerConfig(
        text_config=_text_config(tokenizer, **moe, rope_parameters=rope),
        vision_config=_vision_config_3(16),
        audio_config=_audio_config(
            n_window=50, n_window_infer=200, conv_chunksize=500, downsample_hidden_size=8, output_dim=HIDDEN
        ),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        audio_token_id=tokenizer.audio_token_id,
        audio_start_token_id=tokenizer.audio_bos_token_id,
        audio_end_token_id=tokenizer.audio_eos_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
        user_token_id=_user_token_id(tokenizer),
        position_id_per_seconds=13,
        initializer_range=INIT_STD,
    )


def _vl_ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.vision_start_token_id,
        "vision_end_token_id": tokenizer.vision_end_token_id,
    }


def _config_qwen2_5_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer),
        vision_config={**_vision_config_2_5(14), "tokens_per_second": 2},
        **_vl_ids(tokenizer),
    )


def _config_qwen3_vl(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config=_text_config(
            tokenizer, head_dim=HIDDEN // HEADS, rope_parameters={**_MROPE, "mrope_interleaved": True}
        ),
        vision_config=_vision_config_3(16),
        **_vl_ids(tokenizer),
    )


def _config_qwen2_audio(tokenizer: Qwen2Tokenizer) -> Qwen2AudioConfig:
    return Qwen2AudioConfig(
        text_config={
            "model_type": "qwen2",
            **_text_config(tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        },
        audio_config={
            "model_type": "qwen2_audio_encoder",
            **_audio_config(max_source_positions=QWEN2_AUDIO_SOURCE_POSITIONS),
        },
        audio_token_index=tokenizer.audio_token_id,
        initializer_range=INIT_STD,
    )


def _gemma_text_config(tokenizer: Qwen2Tokenizer, **extra) -> dict:
    """Four layers, of which every other one has a window that is shorter than prompts; wider heads in the rest."""
    return _text_config(
        tokenizer,
        bos_token_id=tokenizer.bos_token_id,
        intermediate_size=HIDDEN,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=12,
        head_dim=16,
        global_head_dim=32,
        final_logit_softcapping=30.0,
        rope_parameters=None,
        **extra,
    )


def _gemma_config(tokenizer: Qwen2Tokenizer, audio: dict | None = None, vision: dict | None = None, **text) -> dict:
    towers = {"hidden_size": TOWER, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": INIT_STD}
    pictures = {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 2 * TOWER,
        "position_embedding_size": 64,
    }
    return Gemma4Config(
        text_config=_gemma_text_config(tokenizer, **text),
        vision_config={**towers, **pictures, "patch_size": 6, **(vision or {})},
        audio_config=None if audio is None else {**towers, "output_proj_dims": 48, **audio},
        **_gemma_ids(tokenizer),
    )


def _gemma_ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    return {
        "boi_token_id": tokenizer.boi_token_id,
        "eoi_token_id": tokenizer.eoi_token_id,
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video|>"),
        "boa_token_id": tokenizer.boa_token_id,
        "eoa_token_index": tokenizer.eoa_token_id,
        "audio_token_id": tokenizer.audio_token_id,
    }


def _config_gemma4(tokenizer: Qwen2Tokenizer) -> Gemma4Config:
    return _gemma_config(
        tokenizer,
        audio={"subsampling_conv_channels": [MEL_BINS, 4]},
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=len(tokenizer),
    )


def _gemma_both_ways(**extra) -> dict:
    return {
        "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        **extra,
    }


def _config_gemma4_both_ways(tokenizer: Qwen2Tokenizer) -> Gemma4Config:
    return _gemma_config(
        tokenizer,
        audio={"subsampling_conv_channels": [MEL_BINS, 4]},
        vision={"standardize": True, "use_clipped_linears": True},
        **_gemma_both_ways(),
    )


def _config_gemma4_moe(tokenizer: Qwen2Tokenizer) -> Gemma4Config:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    return _gemma_config(tokenizer, **_gemma_both_ways(**experts))


def _config_gemma4_unified(tokenizer: Qwen2Tokenizer) -> Gemma4UnifiedConfig:
    return Gemma4UnifiedConfig(
        text_config=_gemma_text_config(tokenizer),
        vision_config={"patch_size": 6, "mm_embed_dim": TOWER, "output_proj_dims": TOWER, "mm_posemb_size": 64},
        audio_config={},
        **_gemma_ids(tokenizer),
    )


def _config_video_llama_3(tokenizer: Qwen2Tokenizer) -> VideoLlama3Config:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return VideoLlama3Config(
        text_config={"model_type": "qwen2", **_text_config(tokenizer, rope_parameters=rope)},
        vision_config={
            "hidden_size": TOWER,
            "intermediate_size": 2 * TOWER,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 14,
            "initializer_range": INIT_STD,
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        initializer_range=INIT_STD,
    )


def _config_phi4_multimodal(tokenizer: Qwen2Tokenizer) -> Phi4MultimodalConfig:
    """Positions and the window are those of the published model, which are of its longest context."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 1.2, 2.0, 5.0, 20.0, 40.0],
    }
    return Phi4MultimodalConfig(
        **_text_config(tokenizer, rope_parameters=rope, max_position_embeddings=131072),
        original_max_position_embeddings=4096,
        sliding_window=262144,
        vision_config={
            "hidden_size": TOWER,
            "intermediate_size": 2 * TOWER,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_token_id": tokenizer.image_token_id,
        },
        audio_config={
            "hidden_size": TOWER,
            "intermediate_size": 2 * TOWER,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": TOWER,
            "depthwise_separable_out_channel": TOWER,
            "nemo_conv_channels": TOWER,
            "initializer_range": INIT_STD,
            "audio_token_id": tokenizer.audio_token_id,
        },
    )


_CONFIGS = {
    "qwen2_5_omni": _config_qwen2_5_omni,
    "qwen3_omni": _config_qwen3_omni,
    "qwen2_5_vl": _config_qwen2_5_vl,
    "qwen3_vl": _config_qwen3_vl,
    "qwen2_audio": _config_qwen2_audio,
    "gemma4": _config_gemma4,
    "gemma4_both_ways": _config_gemma4_both_ways,
    "gemma4_moe": _config_gemma4_moe,
    "gemma4_unified": _config_gemma4_unified,
    "video_llama_3": _config_video_llama_3,
    "phi4_multimodal": _config_phi4_multimodal,
}


def _strengthen_audio_tower(model: PreTrainedModel) -> None:
    """Redraw the layers between spectrogram and transformer of every audio tower so that they keep the signal's scale.

    With the plain standard deviation the sound is lost beside the position embeddings that are added after these
    layers, and logits would hardly depend on it.
    """
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        convolves = leaf in ("conv1", "conv2", "conv2d1", "conv2d2", "conv2d3", "conv_out")
        if (parent.endswith("audio_tower") and convolves) or (
            "audio_embed" in parent and leaf.isdigit() and _convolution(module)
        ):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def _balance_gemma(model: PreTrainedModel) -> None:
    """Scale queries, whose scores are so sharp else that every rounding shows, and features to the size of words."""
    for name, module in model.named_modules():
        if type(module).__name__.startswith("Gemma4") and hasattr(module, "q_norm"):
            torch.nn.init.constant_(module.q_norm.weight, 1.5 * module.head_dim**-0.5)
        if name.endswith("embedding_projection"):
            torch.nn.init.normal_(module.weight, std=4 * INIT_STD)


def _convolution(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Conv2d)


def _instantiate(model_class: type, config, tokenizer: Qwen2Tokenizer, seed: int) -> PreTrainedModel:
    """Random float32 model in evaluation mode; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        _strengthen_audio_tower(model)
        _balance_gemma(model)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.float().eval()


@functools.lru_cache(maxsize=16)
def _built(family: str, seed: int) -> PreTrainedModel:
    tokenizer = build_tokenizer(family)
    return _instantiate(FAMILIES[family].model_class, _CONFIGS[family](tokenizer), tokenizer, seed)


def build_tiny(family: str, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A tiny random model of `family` and its processor.

    Args:
        family: One of the keys of `FAMILIES`.
        seed: Seed of the weights; equal seeds give equal weights.

    Returns:
        The model (float32, evaluation mode; the Thinker for the Omni families) and the processor.

    Raises:
        KeyError: `family` is not a key of `FAMILIES`.
    """
    return copy.deepcopy(_built(family, seed)), build_processor(family)


def towers_of(core: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """What reads media, by its place in the core: a tower of vision and one of audio, or what stands in its place."""
    phi4 = "embed_tokens_extend"
    places = (
        ("visual", "vision_tower", "vision_model", "embed_vision", f"{phi4}.image_embed.img_processor"),
        ("audio_tower", "embed_audio", f"{phi4}.audio_embed.encoder"),
    )
    modules = dict(core.named_modules())
    found = [next((name for name in names if name in modules), None) for names in places]
    return {name: modules[name] for name in found if name is not None}


def save_tiny(family: str, folder: str | Path, seed: int = 0) -> Path:
    """Write the model and the processor of `build_tiny(family, seed)` to `folder`; returns the folder."""
    model, processor = build_tiny(family, seed)
    return _save(model, processor, folder)


def _save(model: PreTrainedModel, processor, folder: str | Path) -> Path:
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_tiny_text(seed: int = 0, family: str = "qwen2_5_omni") -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """A tiny text-only Qwen2 of the same sizes, and the tokenizer of `family`."""
    tokenizer = build_tokenizer(family)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = Qwen2Config(**_text_config(tokenizer, rope_parameters=rope))
    return _instantiate(Qwen2ForCausalLM, config, tokenizer, seed), tokenizer


def decoder(core: torch.nn.Module) -> torch.nn.Module:
    """The part of a core that holds its decoder layers, which may be the core itself."""
    return getattr(core, "language_model", core)


def sample_media(family: str, seed: int = 0, *, num_frames: int = 4, side: int = 2, seconds: float = 0.5) -> dict:
    """Random media of `family`: `{"video": uint8 (T, H, W, 3)}` and / or `{"audio": float32 (n,)}`.

    The frames are noise; the audio is one tone of random pitch with a little noise.

    Args:
        num_frames: T.
        side: H and W in units of `FRAME_MULTIPLE[family]`; one frame pair then makes side * side tokens.
        seconds: Length of the audio.
    """
    spec, rng = FAMILIES[family], np.random.default_rng(seed)
    media = {}
    if spec.has_vision:
        pixels = side * spec.frame_multiple
        media["video"] = rng.integers(0, 256, (num_frames, pixels, pixels, 3), dtype=np.uint8)
    if spec.has_audio:
        time = np.arange(round(seconds * spec.sampling_rate)) / spec.sampling_rate
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 4000) * time)
        media["audio"] = (tone + rng.normal(scale=0.05, size=time.size)).astype(np.float32)
    return media


def encode_sample(
    family: str,
    processor: ProcessorMixin,
    samples: list[dict],
    *,
    question: str = "Which colour is the square?",
    fps: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Batch of user turns, each with the media of one sample (see `sample_media`) and a question, as model inputs.

    The frames are taken as they are: no resizing and no sampling. `fps` is the rate of the given frames.
    """
    texts, videos, audio = [], [], []
    for sample in samples:
        content = [{"type": kind} for kind in ("video", "audio") if kind in sample]
        content.append({"type": "text", "text": sample.get("question", question)})
        texts.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        )
        if "video" in sample:
            videos.append(sample["video"])
        if "audio" in sample:
            audio.append(sample["audio"])
    kwargs = {}
    if videos:
        video_kwargs = {"do_resize": False, "do_sample_frames": False}
        if family in ("qwen2_5_vl", "qwen3_vl", "video_llama_3", *GEMMA):
            # These processors read the times from the metadata of the clip, the Omni ones from `fps` of the call.
            video_kwargs["video_metadata"] = [
                {"fps": fps, "total_num_frames": len(clip), "frames_indices": list(range(len(clip)))}
                for clip in videos
            ]
        else:
            video_kwargs["fps"] = fps
        kwargs.update(videos=videos, videos_kwargs=video_kwargs)
    if audio:
        kwargs.update(audio=audio, audio_kwargs={"sampling_rate": FAMILIES[family].sampling_rate})
    return dict(processor(text=texts, return_tensors="pt", padding=True, **kwargs))


def _full_config_qwen2_5_omni(thinker: Qwen2_5OmniThinkerConfig, tokenizer: Qwen2Tokenizer) -> Qwen2_5OmniConfig:
    """Thinker plus the smallest talker and vocoder that their classes can be built with."""
    talker = {
        "vocab_size": 64,
        "embedding_size": HIDDEN,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": dict(_MROPE),
        "initializer_range": INIT_STD,
        "audio_token_index": tokenizer.audio_token_id,
        "image_token_index": tokenizer.image_token_id,
        "video_token_index": tokenizer.video_token_id,
        "audio_start_token_id": tokenizer.audio_bos_token_id,
        "audio_end_token_id": tokenizer.audio_eos_token_id,
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "vision_end_token_id": tokenizer.vision_eos_token_id,
        "tts_text_pad_token_id": 57,
        "tts_text_start_token_id": 58,
        "tts_text_end_token_id": 59,
        "tts_codec_pad_token_id": 60,
        "tts_codec_start_token_id": 61,
        "tts_codec_end_token_id": 62,
        "tts_codec_mask_token_id": 63,
    }
    vocoder = {
        "dit_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "emb_dim": 16,
            "num_embeds": 65,
            "mel_dim": 8,
            "enc_emb_dim": 8,
            "enc_dim": 8,
            "enc_channels": [8, 8, 8, 8, 24],
            "enc_attention_channels": 8,
            "enc_se_channels": 8,
            "look_ahead_layers": [0],
            "look_backward_layers": [0],
        },
        "bigvgan_config": {
            "mel_dim": 8,
            "upsample_initial_channel": 16,
            "upsample_rates": [2, 2],
            "upsample_kernel_sizes": [4, 4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3, 5]],
        },
    }
    return Qwen2_5OmniConfig(thinker_config=thinker.to_dict(), talker_config=talker, token2wav_config=vocoder)


def _full_config_qwen3_omni(thinker: Qwen3OmniMoeThinkerConfig, tokenizer: Qwen2Tokenizer) -> Qwen3OmniMoeConfig:
    """Thinker plus the smallest talker and vocoder that their classes can be built with."""
    talker = {
        "text_config": {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "rope_parameters": {**_MROPE, "interleaved": True},
            "initializer_range": INIT_STD,
        },
        "code_predictor_config": {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_code_groups": 4,
            "initializer_range": INIT_STD,
        },
        "num_code_groups": 4,
        "thinker_hidden_size": HIDDEN,
        "accept_hidden_layer": 1,
        "spatial_merge_size": 2,
        "codec_eos_token_id": 60,
        "codec_pad_id": 61,
        "codec_bos_id": 62,
        "codec_nothink_id": 57,
        "codec_think_bos_id": 58,
        "codec_think_eos_id": 59,
        "audio_token_id": tokenizer.audio_token_id,
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "audio_start_token_id": tokenizer.audio_bos_token_id,
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "speaker_id": {"test": 0},
    }
    vocoder = {
        "codebook_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "num_quantizers": 4,
        "decoder_dim": 16,
        "upsample_rates": [2, 2],
        "upsampling_ratios": [2],
    }
    return Qwen3OmniMoeConfig(
        thinker_config=thinker.to_dict(),
        talker_config=talker,
        code2wav_config=vocoder,
        im_start_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        im_end_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        user_token_id=_user_token_id(tokenizer),
    )


_FULL = {
    "qwen2_5_omni": (Qwen2_5OmniForConditionalGeneration, _full_config_qwen2_5_omni),
    "qwen3_omni": (Qwen3OmniMoeForConditionalGeneration, _full_config_qwen3_omni),
}


def build_tiny_full(family: str, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The whole Omni model (thinker, talker, vocoder) of `family`, "qwen2_5_omni" or "qwen3_omni".

    The thinker has exactly the weights of `build_tiny(family, seed)`, so that logits of a thinker loaded from the
    full checkpoint can be compared with those of the thinker alone.
    """
    model_class, make_config = _FULL[family]
    thinker, processor = build_tiny(family, seed)
    config = make_config(thinker.config, processor.tokenizer)
    model = _instantiate(model_class, config, processor.tokenizer, seed + 1)
    model.thinker.load_state_dict(thinker.state_dict())
    return model, processor


def save_tiny_full(family: str, folder: str | Path, seed: int = 0) -> Path:
    """Write `build_tiny_full(family, seed)` to `folder`, laid out like a published Omni checkpoint.

    The weight names are those of the published files (`thinker.model.layers...`, `thinker.visual...`, one entry per
    expert). The speaker file of Qwen2.5-Omni is left out: the thinker can be loaded from the folder, the full class
    cannot.
    """
    model, processor = build_tiny_full(family, seed)
    return _save(model, processor, folder)
