"""The model, the prompt and the count of operations of `shared_prefix.py`."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from maple_trl.data.tiny_omni import build_config, build_processor
from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.omni.families import family_for
from maple_trl.omni.families.base import OmniFamily
from maple_trl.omni.lora import freeze
from maple_trl.planning.sizes import Media, Work, read_sizes


PROMPT_UNIT = 128
"""Prompt tokens that a temporal patch comes with: 12 x 8 of video, 16 of audio, 16 of text."""

GRID = (24, 16)
"""Patches of a frame; 2 x 2 of them are a token."""

MEL_PER_TOKEN = 4
TEXT_BEFORE = 4
FIRST_TEXT_ID = 20  # the special tokens come first

REAL_TEXT = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "initializer_range": 0.02,
}
"""The language model of Qwen2.5-Omni-3B. Its towers are those of transformers' default configuration."""


def make_config(args: argparse.Namespace) -> Qwen2_5OmniThinkerConfig:
    """Qwen2.5-Omni's Thinker with the special tokens of the tiny model's tokenizer, in the sizes asked for."""
    small = build_config(
        build_processor().tokenizer,
        hidden_size=args.hidden,
        layers=args.layers,
        heads=args.heads,
        tower_size=args.tower,
        tower_layers=args.tower_layers,
        initializer_range=args.hidden**-0.5,
    ).to_dict()
    if args.real:
        tokens = {name: small["text_config"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        small["text_config"] = REAL_TEXT | tokens
        small["vision_config"] = {"out_hidden_size": REAL_TEXT["hidden_size"], "hidden_size": 1280}
        small["audio_config"] = {"output_dim": REAL_TEXT["hidden_size"]}
    else:
        small["text_config"] |= {"vocab_size": args.vocab, "num_key_value_heads": args.kv_heads}
        small["text_config"] |= {"max_position_embeddings": 32_768, "layer_types": None}
        small["vision_config"] |= {
            "intermediate_size": 3 * args.tower,
            "fullatt_block_indexes": [args.tower_layers - 1],
        }
        small["audio_config"] |= {"num_mel_bins": 128, "encoder_ffn_dim": 4 * args.tower}
    small |= {"tie_word_embeddings": False}
    return Qwen2_5OmniThinkerConfig(**small)


def make_model(args: argparse.Namespace) -> tuple[Qwen2_5OmniThinkerForConditionalGeneration, OmniFamily]:
    """A model with random weights, whose towers are frozen unless they are to be trained."""
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(
            make_config(args), attn_implementation="sdpa", dtype=torch.bfloat16 if args.real else torch.float32
        )
    # No generation ends before its time, nor is anything cut off its distribution.
    model.generation_config.update(eos_token_id=None, pad_token_id=model.config.get_text_config().pad_token_id)
    family = family_for(model, build_processor())
    if not args.train_towers:
        freeze(model, family, "vision", "audio", "projectors")
    return model.eval(), family


def make_prompt(core: nn.Module, family: OmniFamily, tokens: int, seed: int = 0) -> EncodedPrompt:
    """
    A prompt of random media and text, seven eighths of which are media tokens: text, video, audio, text.

    Args:
        tokens (`int`): a multiple of [`PROMPT_UNIT`].
    """
    generator = torch.Generator().manual_seed(seed)
    config, tokenizer = core.config, family.tokenizer
    units = tokens // PROMPT_UNIT
    height, width = GRID
    audio_tokens = PROMPT_UNIT // 8 * units
    counts = {"video": height * width // 4 * units, "audio": audio_tokens}
    text = torch.randint(FIRST_TEXT_ID, len(tokenizer), (tokens - sum(counts.values()) - 4,), generator=generator)

    def special(name: str, count: int = 1) -> Tensor:
        return torch.full((count,), getattr(tokenizer, f"{name}_token_id"))

    ids = torch.cat(
        [text[:TEXT_BEFORE], special("vision_bos"), special("video", counts["video"]), special("vision_eos")]
        + [special("audio_bos"), special("audio", audio_tokens), special("audio_eos"), text[TEXT_BEFORE:]]
    )
    vision, mel = config.vision_config, audio_tokens * MEL_PER_TOKEN
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    media = {
        "video": {
            "pixel_values_videos": torch.randn(units * height * width, patch, generator=generator),
            "video_grid_thw": torch.tensor([[units, height, width]]),
        },
        "audio": {
            "input_features": torch.randn(1, config.audio_config.num_mel_bins, mel, generator=generator),
            "feature_attention_mask": torch.ones(1, mel, dtype=torch.long),
        },
    }
    positions, _ = core.get_rope_index(
        ids[None],
        video_grid_thw=media["video"]["video_grid_thw"],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        use_audio_in_video=False,
        audio_seqlens=torch.tensor([mel]),
        second_per_grids=torch.ones(1),
    )
    return EncodedPrompt(f"prompt-{seed}", ids, positions[:, 0], media, counts)


# Operations


def language_operations(config: Qwen2_5OmniThinkerConfig, work: Work) -> float:
    return read_sizes(config.to_dict()).text.operations(work)


def tower_operations(config: Qwen2_5OmniThinkerConfig, prompt: EncodedPrompt) -> float:
    """Both towers over a prompt's media."""
    patch = config.vision_config.patch_size
    media = Media(prompt.media_tokens["video"], prompt.media_tokens["audio"], GRID[0] * patch, GRID[1] * patch)
    return read_sizes(config.to_dict()).tower_operations(media)
