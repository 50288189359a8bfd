"""Answers questions about clips with a model or an adapter: what a model card shows, and a notebook begins with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, ProcessorMixin

from maple_trl.data.prompt_templates import read_template, texts_of
from maple_trl.omni.adapters import load_whole
from maple_trl.omni.completions import completion_texts
from maple_trl.omni.encoded import EncodedPrompt, generation_position_ids
from maple_trl.omni.families import family_for
from maple_trl.omni.generation import end_tokens, own_options
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.media.sampling import MediaLimits
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media


class OmniPipeline:
    """
    Answers rows, read as a trainer reads them: the same pictures, sound, subtitles and positions.

    ```python
    ask = OmniPipeline.from_pretrained("builtin:tiny-omni", num_frames=4, max_pixels=3136)
    ask({"prompt": "What is shown?", "video": "clip.mp4", "tag": "V"})
    ```

    Args:
        model: of a registered family, with or without adapters.
        processor: the model's.
        media_root (`str`, *optional*, defaults to the current folder): the one folder that media may come from.
        prompt_template (`Mapping` or `str`, *optional*): what a row's prompt is made of. This and what follows are
            options of a training run by the same names ([`~maple_trl.OmniGRPOConfig`]), with the same defaults.
        system_prompt (`str`, *optional*): the system message of rows that have none.
        subtitle_template (`str`, *optional*): how a subtitle stands in the prompt; holds `{subtitle}`.
        audio_in_video (`bool`, *optional*): interleave a video with its own sound, as one medium.
        max_prompt_length (`int`, *optional*): most tokens of a prompt, for which its subtitle is shortened.
        max_media_tokens (`int`, *optional*): most tokens of a prompt's media, for which pictures are made smaller.
        num_frames (`int`, *optional*): frames of a video; 8 where no `video_fps` is given either.
        video_fps (`float`, *optional*): frames per second of a video, in the place of `num_frames`.
        max_frames (`int`, *optional*): most frames of a video.
        min_pixels (`int`, *optional*): area of a frame or picture that a smaller one is enlarged to, in pixels.
        max_pixels (`int`, *optional*): area of a frame or picture that a larger one is reduced to, in pixels.
        max_media_seconds (`float`, *optional*): longest video or sound.
        overlong_media (`str`, *optional*): `"quarantine"` refuses longer ones, `"trim"` reads their beginning, `"spread"`
            pictures and parts of the sound from their whole length.
        chat_template_kwargs (`Mapping`, *optional*): further variables of the model's chat template.

    Raises:
        ValueError: for a model of no registered family, or options that contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        media_root: str | os.PathLike[str] = ".",
        *,
        prompt_template: Mapping[str, Any] | str | None = None,
        system_prompt: str | None = None,
        subtitle_template: str = "Subtitles:\n{subtitle}\n",
        audio_in_video: bool = False,
        max_prompt_length: int | None = None,
        max_media_tokens: int | None = None,
        num_frames: int | None = None,
        video_fps: float | None = None,
        max_frames: int = MediaLimits.max_frames,
        min_pixels: int = MediaLimits.min_pixels,
        max_pixels: int = MediaLimits.max_pixels,
        max_media_seconds: float = MediaLimits.max_seconds,
        overlong_media: str = MediaLimits.overlong,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.model = model.eval()
        self.family = family_for(model, processor)
        if num_frames is None and video_fps is None:
            num_frames = MediaLimits.num_frames
        limits = MediaLimits(
            num_frames=num_frames,
            fps=video_fps,
            max_frames=max_frames,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_seconds=max_media_seconds,
            overlong=overlong_media,
        )
        self.builder = PromptBuilder(
            self.family,
            MediaLoader(media_root, limits, backend="pyav"),
            audio_in_video=audio_in_video,
            subtitle_template=subtitle_template,
            max_prompt_length=max_prompt_length,
            max_media_tokens=max_media_tokens,
            chat_template_kwargs=chat_template_kwargs,
            template=None if prompt_template is None else read_template(texts_of(prompt_template)),
            system_prompt=system_prompt,
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        media_root: str | os.PathLike[str] = ".",
        *,
        base_model: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        revision: str = "main",
        **reading: Any,
    ) -> OmniPipeline:
        """
        Load a model, or an adapter with the model that it was trained on.

        Args:
            name: a folder, a Hub id, or `builtin:NAME`; of a model, whole or its Thinker alone, or of a LoRA adapter.
            media_root (`str`, *optional*, defaults to the current folder): the one folder that media may come from.
            base_model (`str`, *optional*): what an adapter is put on, where it does not say that itself.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): type of the weights; by default the checkpoint's.
            device (`str`, *optional*): default: a GPU where there is one.
            revision (`str`, *optional*, defaults to `"main"`): branch, tag or commit of a Hub id.
            reading: options of [`OmniPipeline`].

        Raises:
            CheckpointError: when there is no such model, it is damaged, or what an adapter belongs to is not known.
        """
        model, processor = load_whole(name, base_model, revision, dtype=dtype)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, processor, media_root, **reading)

    @torch.no_grad()
    def __call__(
        self, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], max_new_tokens: int = 512, **generation: Any
    ) -> str | list[str]:
        """
        Answer one row, or several one by one.

        Args:
            rows: with a `prompt`, and `video`, `audio`, `image`, `subtitle` (below the media root; `subtitle` may be the text
                itself) and `tag` (which of them are fed) where they have them; audio without a file is the video's own.
            max_new_tokens: at most.
            generation: options of [`~transformers.GenerationConfig`]; greedy without any.

        Returns:
            `str` or `list[str]`: as many texts as rows.

        Raises:
            RowError, MediaError: for a row that cannot be asked, naming the file.
        """
        if not isinstance(rows, Mapping):
            return [self._answer(row, max_new_tokens, generation) for row in rows]
        return self._answer(rows, max_new_tokens, generation)

    def _answer(self, row: Mapping[str, Any], max_new_tokens: int, generation: Mapping[str, Any]) -> str:
        prompt = self.encode(row)
        tokenizer, device = self.family.tokenizer, self.family.core(self.model).get_input_embeddings().weight.device
        ids = prompt.input_ids[None].to(device)
        ends = end_tokens(self.model, tokenizer)
        settings = {
            "do_sample": False,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": ends,
            "pad_token_id": ends[0] if tokenizer.pad_token_id is None and ends else tokenizer.pad_token_id,
            "suppress_tokens": sorted(self.family.suppressed_ids),
        }
        config = GenerationConfig(**(settings | generation))
        with own_options(self.model, tokenizer, config) as sampling, serve_media(self.family, self.model, [prompt]):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=generation_position_ids([prompt], len(prompt)).to(device),
                generation_config=config,
            )
        (text,) = completion_texts(self.family, sampling.cut(output[:, len(prompt) :].tolist()), [prompt.input_ids])
        return text

    def encode(self, row: Mapping[str, Any]) -> EncodedPrompt:
        """Return a row as the model reads it; errors as of [`OmniPipeline.__call__`]."""
        if isinstance(row.get("prompt"), str):
            row = {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
        return self.builder.encode(self.builder.spec(self.builder.asked(row)))
