"""Gemma 4, with towers and without (unified): images, video with the time of each frame in the text, and audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedConfig

from maple_trl.omni.encoded import Blocks, EncodedPrompt
from maple_trl.omni.errors import MediaError
from maple_trl.omni.families.base import OmniFamily, register_family
from maple_trl.omni.media.clips import AudioClip, PromptMedia
from maple_trl.omni.prefix.shared_prefill import grows_cache


_SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""Tokens of a picture that the processors can make room for."""


@register_family
class Gemma4Family(OmniFamily):
    """Images, video and audio; the largest models have no audio tower."""

    model_types = ("gemma4",)
    placeholders = {"image": "<|image|>", "video": "<|video|>", "audio": "<|audio|>"}
    media_names = {
        "image": ("pixel_values", "image_position_ids"),
        "video": ("pixel_values_videos", "video_position_ids", "num_frames_per_video"),
        "audio": ("input_features", "input_features_mask"),
    }
    media_tokens = ("<|image|>", "<|video|>", "<|audio|>", "<|image>", "<image|>", "<|audio>", "<audio|>")
    scopes = {
        "projectors": r"(^|\.)(embed_vision|embed_audio)\.",
        "vision": r"(^|\.)vision_tower\.",
        "audio": r"(^|\.)audio_tower\.",
        "llm": r"(^|\.)language_model\.",
    }
    frames_per_token = 1
    times_in_text = True
    thought_tokens = ("<|channel>", "<channel|>")
    thought_heading = "thought"

    def __init__(self, model: nn.Module, processor: Any):
        self._leave_out(model.config)
        super().__init__(model, processor)

    @classmethod
    def stand_in(cls, config, processor):
        made = super().stand_in(config, processor)
        made._leave_out(config)
        return made

    def _leave_out(self, config: PreTrainedConfig) -> None:
        """Leave out what a model without an audio tower does not have."""
        if config.audio_config is None:
            self.placeholders = {kind: token for kind, token in self.placeholders.items() if kind != "audio"}
            self.scopes = {scope: pattern for scope, pattern in self.scopes.items() if scope != "audio"}

    @property
    def frame_multiple(self) -> int:
        """Sides of a frame, in pixels, are multiples of this."""
        video_processor = self.processor.video_processor
        return video_processor.patch_size * video_processor.pooling_kernel_size

    @property
    def patches_per_token(self) -> int:
        """Patches that the tower makes one feature of."""
        return self.processor.video_processor.pooling_kernel_size**2

    @property
    def max_audio_seconds(self) -> float:
        """The processor cuts longer audio off."""
        return self.processor.audio_seq_length * self.processor.audio_ms_per_token / 1000

    def check_training(self, reentrant):
        if reentrant and self.config.text_config.num_kv_shared_layers:
            raise ValueError(
                "gradient_checkpointing_kwargs: with use_reentrant=True the layers of this model that read keys of others "
                "send those no gradient; set {'use_reentrant': False} (of adapters under ZeRO-3 TRL turns it on by itself: "
                "train those without gradient_checkpointing)"
            )

    def check_generation(self, config):
        if self._both_ways and not (config.use_cache is False or grows_cache(config)):
            raise ValueError(
                f"cache_implementation={config.cache_implementation!r}: with it generate() lets the tokens of a picture see "
                "only what stands before, and this model reads them both ways; leave it out"
            )

    @property
    def _both_ways(self) -> bool:
        """Whether the tokens of a picture see each other both ways."""
        return self.config.text_config.use_bidirectional_attention == "vision"

    # Encoding one prompt

    def encode(self, key, text, media, interleaved=False):
        begin = self.tokenizer.bos_token
        if begin and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            text = text.removeprefix(begin)  # of the chat template's, where the tokenizer sets one itself
        return super().encode(key, text, media, interleaved)

    def processor_kwargs(self, media, interleaved):
        # Tokens are of one frame each, and none is needed twice.
        media = replace(media, videos=[clip.without_repeat for clip in media.videos])
        kwargs = super().processor_kwargs(media, interleaved)
        if media.images:
            kwargs["images_kwargs"]["max_soft_tokens"] = self._room(media, "image")
        if media.videos:
            kwargs["videos_kwargs"]["max_soft_tokens"] = self._room(media, "video")
        return kwargs

    def _room(self, media: PromptMedia, kind: str) -> int:
        """Return the least room for the tokens of each of a prompt's pictures, whose sizes are decided already."""
        if kind == "image":
            sizes = [(picture.pixels.shape[:2], picture.path) for picture in media.images]
        else:
            sizes = [(clip.frames.shape[1:3], clip.path) for clip in media.videos]
        most, path = max((self.image_token_count(*size), path) for size, path in sizes)
        room = next((room for room in _SOFT_TOKENS if room >= most), None)
        if room is None:
            side = self.frame_multiple
            raise MediaError(
                "media-tokens",
                path,
                f"a picture of {most} tokens; this model reads {_SOFT_TOKENS[-1]} at most: set max_pixels to "
                f"{_SOFT_TOKENS[-1] * side**2} or less",
            )
        return room

    def audio_pad_length(self, audios: Sequence[AudioClip]) -> int:
        """Return where the processor cuts audio, in samples; it pads to the longest."""
        return round(self.max_audio_seconds * self.sampling_rate)

    def tower_inputs(self, kind: str, batch: BatchFeature) -> dict[str, Tensor]:
        """Return what the tower of a kind reads, without patches or mel frames that are padding in every clip."""
        inputs = {name: batch[name] for name in self.media_names[kind]}
        length = int(_filled(inputs, kind).sum(-1).max())
        return {name: values[:, :length] if values.dim() > 1 else values for name, values in inputs.items()}

    def feature_counts(self, kind: str, inputs: Mapping[str, Tensor]) -> list[int]:
        """Count the features that the tower gives for each clip of a kind, given what it reads of them."""
        filled = _filled(inputs, kind)
        if kind == "audio":
            return self.audio_features_mask(filled).sum(-1).tolist()
        counts = filled.sum(-1) // self.patches_per_token
        if kind == "image":
            return counts.tolist()
        return [int(frames.sum()) for frames in counts.split(inputs["num_frames_per_video"].tolist())]

    def audio_features_mask(self, filled: Tensor) -> Tensor:
        """Return which features come of sound, of shape (audios, features): two convolutions halve the frames."""
        return filled[:, ::2][:, ::2]

    def audio_tokens_of(self, clip: AudioClip) -> int:
        """Count the tokens of an audio."""
        return self.processor._compute_audio_num_tokens(clip.waveform, clip.sampling_rate)

    blocks_everywhere = False

    def blocks(self, input_ids: Tensor) -> Blocks | None:
        """Return the tokens of each picture, where those see each other both ways."""
        if not self._both_ways:
            return None
        pictures = input_ids.new_tensor([self.placeholder_ids[kind] for kind in ("image", "video")])
        edges = F.pad(torch.isin(input_ids, pictures).int(), (1, 1)).diff().nonzero()[:, 0].tolist()
        spans = tuple((first, end) for first, end in zip(edges[::2], edges[1::2], strict=True) if end - first > 1)
        return Blocks(spans, self.blocks_everywhere) if spans else None

    # Running the towers

    def collate_media(self, prompts: Sequence[EncodedPrompt], kind: str, device: torch.device) -> dict[str, Tensor]:
        """Concatenate the media of several prompts; patches and mel frames are padded to the most."""
        collated = {}
        for name in self.media_names[kind]:
            parts = [prompt.media[kind][name] for prompt in prompts]
            if parts[0].dim() > 1:
                rows = [row for part in parts for row in part]
                padding = -1 if name.endswith("position_ids") else 0
                collated[name] = pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
            else:
                collated[name] = torch.cat(parts).to(device)
        return collated

    def audio_embeddings(self, core: nn.Module, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """Return the features of all prompts' audios, shape (sum of tokens, hidden)."""
        media = self.collate_media(prompts, "audio", core.get_input_embeddings().weight.device)
        outputs = core.get_audio_features(**media, return_dict=True)
        return outputs.pooler_output[outputs.attention_mask.bool()]

    def core_inputs(self, core, input_ids, features, unneeded=()):
        numbers = {kind: number for number, kind in enumerate(("image", "video", "audio"), 1)}
        types = sum(numbers[kind] * (input_ids == token).long() for kind, token in self.placeholder_ids.items())
        inputs = self.scattered_inputs(core, input_ids, features, unneeded) | {"mm_token_type_ids": types}
        if getattr(self.config.text_config, "hidden_size_per_layer_input", 0):
            words = input_ids.masked_fill(types > 0, self.config.text_config.pad_token_id)
            inputs["per_layer_inputs"] = core.language_model.get_per_layer_inputs(words)
        return inputs

    def dummy_inputs(self, kind: str) -> dict[str, Tensor]:
        """Return the smallest input that the tower of a kind takes."""
        if kind == "audio":
            features = torch.zeros(1, self.dummy_mel_frames, self.processor.feature_extractor.feature_size)
            return dict(zip(self.media_names[kind], (features, torch.ones(features.shape[:2]).bool()), strict=True))
        side = self.processor.video_processor.patch_size
        places = torch.cartesian_prod(*[torch.arange(round(self.patches_per_token**0.5))] * 2)
        values = (torch.zeros(1, len(places), 3 * side**2), places[None], torch.ones(1, dtype=torch.long))
        return dict(zip(self.media_names[kind], values, strict=False))


@register_family
class Gemma4UnifiedFamily(Gemma4Family):
    """Gemma 4 without towers: pixels and samples of sound are projected to the text model's width."""

    model_types = ("gemma4_unified",)
    scopes = {
        "projectors": r"(^|\.)(embed_vision\.multimodal_embedder|embed_audio)\.",
        "vision": r"(^|\.)embed_vision\.",
        "llm": r"(^|\.)language_model\.",
    }
    patches_per_token = 1
    blocks_everywhere = True
    dummy_mel_frames = 1

    def audio_pad_length(self, audios: Sequence[AudioClip]) -> int:
        """Return where the processor cuts audio, in tokens."""
        return self.processor.audio_seq_length

    def audio_features_mask(self, filled: Tensor) -> Tensor:
        """Return which features come of sound, of shape (audios, features)."""
        return filled

    def dummy_inputs(self, kind: str) -> dict[str, Tensor]:
        """Return the smallest input of a kind."""
        if kind == "audio":
            return super().dummy_inputs(kind)
        values = (torch.zeros(1, 1, 3 * self.frame_multiple**2), torch.zeros(1, 1, 2).long(), torch.ones(1).long())
        return dict(zip(self.media_names[kind], values, strict=False))


def _filled(inputs: Mapping[str, Tensor], kind: str) -> Tensor:
    """Return which patches or mel frames are no padding, of shape (pictures or audios, length)."""
    if kind == "audio":
        return inputs["input_features_mask"].bool()
    return (inputs[f"{kind}_position_ids"] != -1).all(-1)
