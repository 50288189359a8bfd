"""
The tiny omni model: a Qwen2.5-Omni Thinker of about 0.3 M parameters with its processor, built without any download.

It is the real architecture (vision tower, audio tower, multimodal rotary positions) at the smallest size that learns
the seven-tag set. `scripts/make_tiny_omni.py` trains it; the trained checkpoint is `builtin:tiny-omni`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from maple_trl.data.synthetic import ATTRIBUTES, LETTERS, NOUNS
from maple_trl.modalities import ModalityTag


VOCAB_SIZE = 512
MEL_BINS = 32

MEDIA_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
"""The tokens that `Qwen2_5OmniProcessor` asks its tokenizer for, by the names it asks with."""

ANSWER_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
"""One token each, but not special: they must survive `skip_special_tokens` to reach reward functions."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] == 'image' -%}
<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif block['type'] == 'video' -%}
<|vision_bos|><|VIDEO|><|vision_eos|>
{%- elif block['type'] == 'audio' -%}
<|audio_bos|><|AUDIO|><|audio_eos|>
{%- elif block['type'] == 'text' -%}
{{ block['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """
    Build a byte-level BPE tokenizer that knows every byte and has one token for each word of the seven-tag set.

    It reads any text; text outside the set costs about one token a letter.
    """
    words = [word for values in ATTRIBUTES.values() for word in values] + list(NOUNS.values())
    words += ["user", "assistant", "system", "subtitle", "Subtitle", "subtitles", "Subtitles", "answer", "Answer"]
    # With and without a leading space: after a line break a word has none. The counts make whole words win the merges.
    corpus = [f"{word} {word}" for word in words] * 50
    corpus += ["Which of the options is right? What is the person in this clip doing when they say that and why?"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - len(ANSWER_TOKENS),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *MEDIA_TOKENS.values()],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=dict(MEDIA_TOKENS),
    )
    tokenizer.add_tokens(list(ANSWER_TOKENS))
    return tokenizer


def build_processor() -> Qwen2_5OmniProcessor:
    """
    Build the processor; all its settings survive `save_pretrained`.

    The library resizes frames itself, so the video processor does not: the sizes that `Qwen2_5OmniProcessor` has as
    class attributes start at 128 tokens a frame and cannot be overridden in a saved processor.
    """
    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, do_resize=False),
        video_processor=Qwen2VLVideoProcessor(
            **patches, do_resize=False, do_sample_frames=False, cap_pixels_per_frame=False
        ),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=MEL_BINS, sampling_rate=16_000, return_attention_mask=True
        ),
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int = 64,
    layers: int = 3,
    heads: int = 2,
    tower_size: int = 48,
    tower_layers: int = 1,
    initializer_range: float = 0.08,
) -> Qwen2_5OmniThinkerConfig:
    """
    Build the Thinker's configuration.

    Args:
        tokenizer: gives the vocabulary size and the ids of the media tokens.
        hidden_size, layers, heads (`int`): of the language model.
        tower_size, tower_layers (`int`): hidden size and depth of the vision tower and of the audio tower.
        initializer_range (`float`): standard deviation of the initial weights. The usual 0.02 is too small for such
            narrow layers: the model then does not learn.
    """
    half = hidden_size // heads // 2  # the sections of the rotary embedding share half a head
    space = half * 3 // 8
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 4 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [half - 2 * space, space, space],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": initializer_range,
        },
        vision_config={
            "depth": tower_layers,
            "hidden_size": tower_size,
            "intermediate_size": 2 * tower_size,
            "num_heads": 4,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": list(range(tower_layers)),
            "out_hidden_size": hidden_size,
            "initializer_range": initializer_range,
        },
        audio_config={
            "num_mel_bins": MEL_BINS,
            "encoder_layers": tower_layers,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 2 * tower_size,
            "d_model": tower_size,
            "n_window": 100,
            "max_source_positions": 1500,
            "output_dim": hidden_size,
            "initializer_range": initializer_range,
        },
        audio_token_index=tokenizer.audio_token_id,
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        audio_start_token_id=tokenizer.audio_bos_token_id,
        audio_end_token_id=tokenizer.audio_eos_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        initializer_range=initializer_range,
        tie_word_embeddings=True,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, **config: Any
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Build a model with random weights; `config` is passed to [`build_config`]."""
    torch.manual_seed(seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(build_config(tokenizer, **config))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def target_text(row: Mapping[str, Any]) -> str:
    """
    Return the ideal completion of a row of the seven-tag set: what is perceived, then the letter.

    For instance `"<think> red low</think><answer>B</answer>"`.
    """
    seen = "".join(f" {row[f'truth_{letter}']}" for letter in ModalityTag.parse(row["tag"]).value)
    if row["answer"] not in LETTERS:
        raise ValueError(f"row {row['id']}: answer must be one of {', '.join(LETTERS)}, got {row['answer']!r}")
    return f"<think>{seen}</think><answer>{row['answer']}</answer>"
