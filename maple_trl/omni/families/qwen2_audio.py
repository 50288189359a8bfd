"""Qwen2-Audio: audio only."""

from __future__ import annotations

import torch
from transformers.masking_utils import create_bidirectional_mask

from maple_trl.omni.families.base import OmniFamily, pooled_audio_tokens, register_family


@register_family
class Qwen2AudioFamily(OmniFamily):
    """Audio up to the tower's fixed window (30 s in the published models)."""

    model_types = ("qwen2_audio",)
    placeholders = {"audio": "<|AUDIO|>"}
    media_tokens = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    scopes = {
        "projectors": r"(^|\.)multi_modal_projector(\.|$)",
        "audio": r"(^|\.)audio_tower\.",
        "llm": r"(^|\.)language_model\.",
    }

    def audio_token_count(self, mel_frames):
        return pooled_audio_tokens(mel_frames)

    @property
    def max_audio_seconds(self) -> float:
        """The tower has one position per mel frame of a fixed window; longer audio cannot be fed."""
        extractor = self.extractor
        return self.config.audio_config.max_source_positions * 2 * extractor.hop_length / extractor.sampling_rate

    def audio_pad_length(self, audios):
        return round(self.max_audio_seconds * self.sampling_rate)

    @property
    def dummy_mel_frames(self):
        return self.config.audio_config.max_source_positions * 2

    def trim_audio(self, inputs):
        return inputs

    def audio_embeddings(self, core, prompts):
        media = self.collate_media(prompts, "audio", core.get_input_embeddings().weight.device)
        lengths = media["feature_attention_mask"].sum(-1)
        conv_lengths, token_counts = core.audio_tower._get_feat_extract_output_lengths(lengths)
        width = (media["input_features"].size(-1) - 2) // 2 + 1
        steps = torch.arange(width, device=lengths.device)
        mask = create_bidirectional_mask(
            config=core.audio_tower.config,
            inputs_embeds=media["input_features"].new_zeros(len(lengths), width, 1),
            attention_mask=(steps < conv_lengths[:, None]).long(),
        )
        states = core.audio_tower(media["input_features"], attention_mask=mask).last_hidden_state
        features = core.multi_modal_projector(states)
        return features[torch.arange(features.size(1), device=lengths.device) < token_counts[:, None]]
