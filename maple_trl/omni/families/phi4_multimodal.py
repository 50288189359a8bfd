"""Phi-4 multimodal: images and audio."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from maple_trl.omni.errors import MediaError
from maple_trl.omni.families.base import OmniFamily, register_family


@register_family
class Phi4MultimodalFamily(OmniFamily):
    """
    Images, and audio of any length; rows whose tag needs video are rejected.

    A picture is read as a whole and in crops, to whose size the processor enlarges it. Sounds are projected otherwise in prompts
    that have a picture.
    """

    model_types = ("phi4_multimodal",)
    placeholders = {"image": "<|image|>", "audio": "<|audio|>"}
    media_names = {
        "image": ("image_pixel_values", "image_sizes", "image_attention_mask"),
        "audio": ("audio_input_features", "audio_attention_mask", "audio_embed_sizes", "beside_picture"),
    }
    media_tokens = ("<|image|>", "<|audio|>")
    scopes = {
        "projectors": r"(^|\.)(image_embed\.(img_projection|global_img|sub_img)|audio_embed\.(up|down)_proj_)",
        "vision": r"(^|\.)image_embed\.",
        "audio": r"(^|\.)audio_embed\.",
        "llm": r"(^|\.)(embed_tokens|layers|norm)(\.|$)",
    }
    passed_alone = ("audio",)
    frame_multiple = 28  # what one token covers of a crop

    def __init__(self, model, processor):
        self._name_tokens(processor)
        super().__init__(model, processor)

    @classmethod
    def stand_in(cls, config, processor):
        made = super().stand_in(config, processor)
        made._name_tokens(processor)
        return made

    def _name_tokens(self, processor):
        """Name tokens as the processor does: published tokenizers call them differently."""
        self.placeholders = {"image": processor.image_token, "audio": processor.audio_token}
        self.media_tokens = tuple(self.placeholders.values())

    @property
    def extractor(self):
        return self.processor.audio_processor

    def image_token_count(self, height, width):
        images = self.processor.image_processor
        side, picture = images.size["height"], torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, height, width)
        _, mask = images.dynamic_preprocess(
            picture, side, images.patch_size, side // images.patch_size, max_num=images.dynamic_hd
        )
        return _tokens_of(mask[::2, ::2])

    def processor_kwargs(self, media, interleaved):
        least = self.extractor.win_length if media.audios else 0
        short = next((clip for clip in media.audios if len(clip.waveform) < least), None)
        if short is not None:
            detail = (
                f"{len(short.waveform)} samples at {short.sampling_rate} Hz, of which this model reads {least} at once"
            )
            raise MediaError("audio-too-short", short.path, detail)
        kwargs = super().processor_kwargs(media, interleaved)
        if media.audios:
            del kwargs["audio_kwargs"]["max_length"]
        return kwargs

    @property
    def max_tokens(self):
        # Beyond them the model turns the positions of all rows of a batch otherwise.
        rope = self.config.rope_parameters
        if rope["rope_type"] != "longrope":
            return None
        return rope.get("original_max_position_embeddings") or self.config.original_max_position_embeddings

    def tower_inputs(self, kind, batch):
        if kind == "image":
            return super().tower_inputs(kind, batch)
        features = batch["audio_input_features"]
        values = (
            features,
            batch.get("audio_attention_mask", torch.ones(features.shape[:2], dtype=torch.bool)),
            batch["audio_embed_sizes"],
            torch.full((len(features),), "image_pixel_values" in batch),
        )
        return dict(zip(self.media_names["audio"], values, strict=True))

    def audio_tokens_of(self, clip):
        extractor = self.extractor
        frames = (len(clip.waveform) - extractor.win_length) // extractor.hop_length + 1
        return int(extractor._compute_audio_embed_size(torch.tensor(frames * extractor.audio_feat_stride)))

    def feature_counts(self, kind, inputs):
        if kind == "audio":
            return inputs["audio_embed_sizes"].tolist()
        side = self.config.vision_config.crop_size
        counts = []
        for (rows, columns), masks in zip(
            (inputs["image_sizes"] // side).tolist(), inputs["image_attention_mask"], strict=True
        ):
            crops = masks[1 : rows * columns + 1, ::2, ::2].unflatten(0, (rows, columns))
            counts.append(_tokens_of(crops.transpose(1, 2).flatten(2).flatten(0, 1)))
        return counts

    def collate_media(self, prompts, kind, device):
        fill = {"image_pixel_values": 0.0, "image_attention_mask": 1.0}  # of crops that a picture lacks
        media = {}
        for name in self.media_names[kind]:
            clips = [clip for prompt in prompts for clip in prompt.media[kind][name]]
            media[name] = pad_sequence(clips, batch_first=True, padding_value=fill.get(name, 0)).to(device)
        return media

    def tower_outputs(self, core, kind, prompts):
        read = self._picture_features if kind == "image" else self._sound_features
        return {"tokens": read(core, prompts)}

    def _picture_features(self, core, prompts):
        embedder = core.embed_tokens_extend.image_embed
        # They are marked as causal, and are so with sdpa and FlashAttention, unless a picture of the batch has padding.
        for layer in embedder.img_processor.encoder.layers:
            layer.self_attn.is_causal = False
        media = self.collate_media(prompts, "image", core.get_input_embeddings().weight.device)
        count = sum(sum(self.feature_counts("image", prompt.media["image"])) for prompt in prompts)
        return self._read(core, "image", embedder, count, **media)

    def _sound_features(self, core, prompts):
        """Return the features of sounds, which pass alone: the tower masks no padding."""
        embedder, tokens = core.embed_tokens_extend.audio_embed, []
        for prompt in prompts:
            sounds = (prompt.media["audio"][name] for name in self.media_names["audio"])
            for features, mask, count, beside in zip(*sounds, strict=True):
                sound = {"audio_input_features": features[mask][None], "audio_embed_sizes": [int(count)]}
                mode = "vision" if beside else "speech"
                tokens.append(self._read(core, "audio", embedder, int(count), **sound, audio_projection_mode=mode))
        return torch.cat(tokens) + _zero_of_projections(embedder)

    def _read(self, core, kind, embedder, count, **inputs):
        """Have media read into the place of placeholders alone: the model gives features in no other way."""
        weight = core.get_input_embeddings().weight
        ids = torch.full((1, count), self.placeholder_ids[kind], device=weight.device)
        # Not like the weight, which can be a part of one.
        places = torch.zeros(1, count, self.config.hidden_size, dtype=weight.dtype, device=weight.device)
        return embedder(ids, places, **inputs)[0]

    def core_inputs(self, core, input_ids, features, unneeded=()):
        return self.scattered_inputs(core, input_ids, features, unneeded)

    def dummy_inputs(self, kind):
        if kind == "audio":
            values = (
                torch.zeros(1, 8, self.extractor.feature_size),
                torch.ones(1, 8, dtype=torch.bool),
                torch.ones(1).int(),
            )
            return dict(zip(self.media_names[kind], (*values, torch.zeros(1, dtype=torch.bool)), strict=True))
        side, patch = self.config.vision_config.crop_size, self.config.vision_config.patch_size
        values = (
            torch.zeros(1, 2, 3, side, side),
            torch.tensor([[side, side]]),
            torch.ones(1, 2, side // patch, side // patch),
        )
        return dict(zip(self.media_names[kind], values, strict=True))

    def is_unread(self, weight_name):
        # Features are those of a layer before the last.
        tower = self.config.vision_config
        last = tower.feature_layer % (tower.num_hidden_layers + 1)
        found = re.search(r"img_processor\.(?:encoder\.layers\.(\d+)|post_layernorm|head)\.", weight_name)
        return found is not None and (found[1] is None or int(found[1]) >= last)


def _tokens_of(used):
    """Count a picture's tokens: the whole, a mark, and of its crops the rows of what is no padding, each with a mark."""
    rows, columns = int(used[:, 0].sum()), int(used[0].sum())
    return 16 * (16 + 1) + 1 + rows * (columns + 1)


def _zero_of_projections(embedder):
    """Return zero, by both ways to project sounds: each process has then the same gradients, whatever its prompts hold."""
    total = 0.0
    for mode in ("speech", "vision_speech"):
        up, down = getattr(embedder, f"up_proj_for_{mode}"), getattr(embedder, f"down_proj_for_{mode}")
        nothing = torch.zeros(1, up.in_features, dtype=up.weight.dtype, device=up.weight.device)
        total = total + down(F.gelu(up(nothing))).sum()
    return 0.0 * total
