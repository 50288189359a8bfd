"""VideoLLaMA 3: images and video, of which patches that show nothing new are left out."""

from __future__ import annotations

from dataclasses import replace

import torch

from maple_trl.omni.families.base import OmniFamily, register_family


@register_family
class VideoLlama3Family(OmniFamily):
    """
    Images and video, with the time of each picture written in text; rows whose tag needs audio are rejected.

    How many tokens a video has depends on what it shows, for a patch like that of the picture before is left out.
    `video_token_count` is what it has at most.
    """

    model_types = ("video_llama_3",)
    placeholders = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    media_names = {
        "image": ("pixel_values", "image_grid_thw", "image_merge_sizes"),
        "video": ("pixel_values_videos", "video_grid_thw", "video_merge_sizes", "video_compression_mask"),
    }
    media_tokens = ("<|image_pad|>", "<|video_pad|>")
    scopes = {
        "projectors": r"(^|\.)projector\.",
        "vision": r"(^|\.)vision_model\.",
        "llm": r"(^|\.)language_model\.",
    }
    times_in_text = True

    def processor_kwargs(self, media, interleaved):
        # A token covers one picture, and none is needed twice.
        videos = [clip.without_repeat for clip in media.videos]
        return super().processor_kwargs(replace(media, videos=videos), interleaved)

    def image_token_count(self, height, width):
        images = self.processor.image_processor
        side = images.patch_size * images.merge_size
        return (height // side) * (width // side)

    def feature_counts(self, kind, inputs):
        counts = (inputs[f"{kind}_grid_thw"].prod(-1) // inputs[f"{kind}_merge_sizes"] ** 2).tolist()
        if kind == "image":
            return counts
        return [int(kept.sum()) for kept in inputs["video_compression_mask"].split(counts)]

    def tower_outputs(self, core, kind, prompts):
        media = self.collate_media(prompts, kind, core.get_input_embeddings().weight.device)
        kept = media.pop("video_compression_mask", slice(None))
        read = core.get_image_features if kind == "image" else core.get_video_features
        return {"tokens": torch.cat(read(**media, return_dict=True).pooler_output)[kept]}

    def core_inputs(self, core, input_ids, features, unneeded=()):
        return self.scattered_inputs(core, input_ids, features, unneeded)

    def dummy_inputs(self, kind):
        processor = self.processor.image_processor if kind == "image" else self.processor.video_processor
        patch, merge = 3 * processor.temporal_patch_size * processor.patch_size**2, processor.merge_size
        values = (torch.zeros(merge**2, patch), torch.tensor([[1, merge, merge]]), torch.tensor([merge]))
        return dict(zip(self.media_names[kind], (*values, torch.ones(1, dtype=torch.bool)), strict=False))
