"""What the library needs to know about a model family."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, GenerationConfig, PreTrainedConfig, SequenceFeatureExtractor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
from transformers.video_utils import VideoMetadata

from maple_trl import Registry
from maple_trl.omni.encoded import Blocks, EncodedPrompt, Features, MediaMismatchError
from maple_trl.omni.media.clips import AudioClip, PromptMedia, VideoClip


_FAMILIES: Registry[type[OmniFamily]] = Registry("model family", "maple_trl.families")


def register_family(cls: type[OmniFamily]) -> type[OmniFamily]:
    """Register the class that it decorates under its `model_types`."""
    for model_type in cls.model_types:
        _FAMILIES.register(model_type, replace=True)(cls)
    return cls


def registered_types() -> list[str]:
    """Return every `config.model_type` that a registered family serves."""
    return sorted(_FAMILIES)


def family_class(model_type: str) -> type[OmniFamily] | None:
    """Return the registered family of a `config.model_type`; `None` where there is none."""
    return _FAMILIES.get(model_type)


def is_omni(model: nn.Module) -> bool:
    """Return whether a model belongs to a registered family."""
    return family_class(unwrap(model).config.model_type) is not None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_for(model: nn.Module, processor) -> OmniFamily:
    """
    Return the family of a model, made with the model's `processor`.

    Raises:
        ValueError: when the model type is not registered; the message lists those that are.
    """
    model = unwrap(model)
    model_type = model.config.model_type
    family = family_class(model_type)
    if family is None:
        hint = ""
        if family_class(f"{model_type}_thinker") is not None:
            hint = " Train the Thinker: load the checkpoint with `maple_trl.omni.loading.load_model`."
        raise ValueError(
            f"No omni family is registered for model type {model_type!r}; known: {', '.join(sorted(_FAMILIES))}.{hint}"
        )
    return family(model, processor)


class PromptEncoder(Protocol):
    """
    What a [`~maple_trl.omni.prompt.PromptBuilder`] needs of the reader of its prompts: a model's family, or a server.

    Attributes:
        placeholders: the token that stands for one feature, per kind of media that is read (`image`, `video`, `audio`).
        media_tokens: texts that would be read as media.
        interleaves_audio: whether audio tokens can be interleaved with the video's.
        frame_multiple: sides of a frame, in pixels, are multiples of this.
        sampling_rate: of sound.
        max_audio_seconds: the longest audio that is read whole, where there is such a limit.
        max_tokens: of a prompt and its completion together, where longer rows are not computed in a batch as they are alone.
    """

    placeholders: ClassVar[dict[str, str]]
    media_tokens: ClassVar[tuple[str, ...]]
    interleaves_audio: ClassVar[bool] = False
    frame_multiple: int
    sampling_rate: int
    max_audio_seconds: float | None = None
    max_tokens: int | None = None

    def render(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """Render messages with bare markers for media in the form that `encode` takes; `options` are the template's."""

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, none where they cannot be known."""

    def encode(self, key: str, text: Any, media: PromptMedia, interleaved: bool = False) -> Any:
        """
        Encode one rendered prompt with its decoded media.

        Args:
            key (`str`): name of the prompt.
            text: what `render` gave.
            media (`PromptMedia`): its decoded media.
            interleaved (`bool`): the i-th audio belongs to the i-th video and its tokens stand among the video's.
        """

    def check_pixels(self, max_pixels: int) -> None:
        """
        Check a limit on the size of pictures and frames.

        Args:
            max_pixels (`int`): most pixels of one.

        Raises:
            ValueError: where none is as small as that.
        """
        if not self.placeholders.keys() & {"image", "video"}:
            return
        least = self.frame_multiple**2
        if max_pixels < least:
            raise ValueError(
                f"max_pixels={max_pixels} is less than one patch of this model, {self.frame_multiple}x"
                f"{self.frame_multiple} pixels: raise it to {least} or more"
            )


class OmniFamily(PromptEncoder):
    """
    Encodes prompts and media of one model family.

    A new family is a subclass in a file of its own: it names its model types, its placeholder tokens, the parts that
    LoRA and freezing can address, and how the processor and `get_rope_index` want to be called.

    Class attributes:
        model_types: `config.model_type` values that the family serves.
        placeholders: the token that stands for one feature, per kind of media (`image`, `video`, `audio`).
        media_names: of each kind, the tensors of the processor that the tower reads.
        media_tokens: every special token that must not be sampled in a completion.
        scopes: regular expressions over module names for `vision`, `audio`, `projectors` and `llm`.
        unread: ends of the names of weights that no pass reads.
        passed_alone: kinds of media of which each clip passes its tower alone. Other kinds pass once for all clips of a batch.
        times_in_text: whether the processor writes the time of each picture of a video into the prompt.
        thought_tokens: special tokens around what the model thinks, where it has any of its own.
        thought_heading: the line that its thoughts begin with.

    Args:
        model (`nn.Module`): of one of the family's model types.
        processor: the model's.

    Raises:
        ValueError: when the processor's tokenizer lacks a placeholder token.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    placeholders: ClassVar[dict[str, str]] = {}
    media_names: ClassVar[dict[str, tuple[str, ...]]] = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
        "audio": ("input_features", "feature_attention_mask"),
    }
    media_tokens: ClassVar[tuple[str, ...]] = ()
    scopes: ClassVar[dict[str, str]] = {}
    unread: ClassVar[tuple[str, ...]] = ()
    passed_alone: ClassVar[tuple[str, ...]] = ()
    times_in_text: ClassVar[bool] = False
    thought_tokens: ClassVar[tuple[str, str] | None] = None
    thought_heading: ClassVar[str] = ""

    def __init__(self, model: nn.Module, processor):
        self.config = model.config
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._rope_index = getattr(self.core(model), "get_rope_index", None)
        ids = {token: self.tokenizer.convert_tokens_to_ids(token) for token in self.media_tokens}
        missing = [
            token for token in self.placeholders.values() if ids.get(token) in (None, self.tokenizer.unk_token_id)
        ]
        if missing:
            raise ValueError(
                f"The tokenizer lacks {', '.join(missing)}, which {type(self).__name__} needs; load the processor that "
                "belongs to the model."
            )
        # `from_pretrained(..., padding_side="left")`, meant for text, reaches the audio extractor too and puts the
        # silence before the sound.
        if "audio" in self.placeholders:
            self.extractor.padding_side = "right"
        self.placeholder_ids = {kind: ids[token] for kind, token in self.placeholders.items()}
        #: Token ids that a completion may never hold: the next forward would take them for media.
        self.suppressed_ids = sorted(i for i in ids.values() if i not in (None, self.tokenizer.unk_token_id))

    @classmethod
    def stand_in(cls, config: PreTrainedConfig, processor: Any) -> Self:
        """Return what decides what a row is fed, from a checkpoint's `config` and `processor`: no model is needed."""
        made = cls.__new__(cls)
        made.processor = processor
        return made

    @staticmethod
    def core(model: nn.Module) -> nn.Module:
        """Return the module of a `model` whose forward merges media into token embeddings."""
        return unwrap(model).base_model

    @property
    def frame_multiple(self) -> int:
        """Sides of a frame, in pixels, are multiples of this."""
        video_processor = self.processor.video_processor
        return video_processor.patch_size * video_processor.merge_size

    @property
    def frames_per_token(self) -> int:
        """Frames of a clip that a vision token covers."""
        return self.processor.video_processor.temporal_patch_size

    @property
    def extractor(self) -> SequenceFeatureExtractor:
        """The part of the processor that makes mel frames of sound."""
        return self.processor.feature_extractor

    @property
    def sampling_rate(self) -> int:
        """Samples of sound per second, as the audio tower takes them."""
        return self.extractor.sampling_rate

    def image_token_count(self, height: int, width: int) -> int:
        """Count the tokens of a picture of `height` x `width` pixels."""
        return (height // self.frame_multiple) * (width // self.frame_multiple)

    def video_token_count(self, frames: int, height: int, width: int) -> int:
        """
        Count the tokens of a clip.

        Args:
            frames (`int`): how many, as sampled.
            height (`int`): of a frame, in pixels.
            width (`int`): of a frame, in pixels.
        """
        return -(-frames // self.frames_per_token) * (height // self.frame_multiple) * (width // self.frame_multiple)

    # What a model cannot do as others do

    def check_training(self, reentrant: bool) -> None:
        """
        Raise ValueError where gradients would be wrong.

        Args:
            reentrant (`bool`): gradient checkpointing is on, and reentrant.
        """

    def check_generation(self, config: GenerationConfig) -> None:
        """Raise ValueError where `generate()` with this `config` would sample from something else than what is trained."""

    # Encoding one prompt

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Render messages by the model's chat template; `options` are its further variables."""
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones around it."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, key: str, text: str, media: PromptMedia, interleaved: bool = False) -> EncodedPrompt:
        """
        Encode one rendered prompt with its decoded media.

        Args:
            key (`str`): name of the prompt.
            text (`str`): the rendered chat template, with one placeholder token per clip.
            media (`PromptMedia`): its decoded media.
            interleaved (`bool`): the i-th audio belongs to the i-th video and its tokens stand among the video's.

        Raises:
            MediaMismatchError: when the processor's placeholders and features differ in number.
        """
        batch = self.processor(text=[text], return_tensors="pt", **self.processor_kwargs(media, interleaved))
        inputs = {kind: self.tower_inputs(kind, batch) for kind in self.placeholders if kind in media.kinds}
        input_ids = batch["input_ids"][0]
        tokens = {kind: int((input_ids == token_id).sum()) for kind, token_id in self.placeholder_ids.items()}
        features = {kind: sum(self.feature_counts(kind, inputs[kind])) if kind in inputs else 0 for kind in tokens}
        if tokens != features:
            raise MediaMismatchError(f"prompt {key}: placeholder tokens {tokens} but media features {features}")
        if media.kinds != {kind for kind, count in features.items() if count}:
            raise MediaMismatchError(
                f"prompt {key}: {len(media.images)} image(s), {len(media.videos)} video(s) and {len(media.audios)} audio(s) "
                f"became features {features}; does the chat template render their blocks?"
            )
        position_ids = self.position_ids(batch, media, interleaved)
        if interleaved:
            input_ids, position_ids = self.interleave(input_ids, position_ids, media.videos[0])
        counts = {kind: count for kind, count in tokens.items() if count}
        return EncodedPrompt(key, input_ids, position_ids, inputs, counts, blocks=self.blocks(input_ids))

    def tower_inputs(self, kind: str, batch: BatchFeature) -> dict[str, Tensor]:
        """
        Return what the tower of a kind reads of the processor's output (`batch`) for one prompt.

        Pictures and video are patches of shape (patches, values) and grids of shape (clips, 3); sound is mel frames of shape
        (audios, mel, frames) and their mask of shape (audios, frames).
        """
        inputs = {name: batch[name] for name in self.media_names[kind] if name in batch}
        return self.trim_audio(inputs) if kind == "audio" else inputs

    def processor_kwargs(self, media: PromptMedia, interleaved: bool) -> dict[str, Any]:
        """Return arguments of the processor for decoded, sampled and resized media, `interleaved` or one after the other."""
        kwargs: dict[str, Any] = {}
        # Copies: what is cached is read-only.
        if media.images:
            kwargs["images"] = [picture.pixels.copy() for picture in media.images]
            kwargs["images_kwargs"] = {"do_resize": False, "input_data_format": "channels_last"}
        if media.videos:
            kwargs["videos"] = [clip.frames.copy() for clip in media.videos]
            options = {"do_resize": False, "do_sample_frames": False, "input_data_format": "channels_last"}
            times = (
                {"video_metadata": _true_times(media.videos)} if self.times_in_text else {"fps": media.videos[0].fps}
            )
            kwargs["videos_kwargs"] = options | times
        if media.audios:
            kwargs["audio"] = [clip.waveform for clip in media.audios]
            kwargs["audio_kwargs"] = {
                "sampling_rate": self.sampling_rate,
                "max_length": self.audio_pad_length(media.audios),
            }
        return kwargs

    def audio_pad_length(self, audios: Sequence[AudioClip]) -> int:
        """
        Return the samples to pad waveforms (`audios`) to, so that no clip is cut and no 30 s of silence are transformed.

        A window's worth of silence beyond the end gives the last frames the values that long padding gives them.
        """
        extractor = self.extractor
        longest = max(len(clip.waveform) for clip in audios) + extractor.n_fft
        return -(-longest // extractor.hop_length) * extractor.hop_length

    def trim_audio(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop what is padding in every audio of `inputs`: mel frames (audios, mel, frames), their mask (audios, frames)."""
        length = int(inputs["feature_attention_mask"].sum(-1).max())
        return inputs | {
            "input_features": inputs["input_features"][..., :length],
            "feature_attention_mask": inputs["feature_attention_mask"][..., :length],
        }

    def patch_seconds(self, clip: VideoClip) -> Tensor:
        """Return the time of the first picture of each temporal patch of a `clip`, in seconds, shape (patches,)."""
        return torch.from_numpy(clip.timestamps[:: self.frames_per_token].copy())

    def second_per_grid(self, videos: Sequence[VideoClip]) -> list[Tensor]:
        """
        Return the seconds between patches of `videos`, as `get_rope_index` takes them: it places patch k at k times that.

        Each video has one value per patch, of shape (patches,), rather than one in all: so every patch comes to stand
        where its picture is, however unevenly pictures follow each other. Evenly, all values of a video are equal. The
        first picture of a video stands at its beginning.
        """
        return [mean_steps(seconds - seconds[0]) for seconds in map(self.patch_seconds, videos)]

    def interleave(self, input_ids: Tensor, position_ids: Tensor, clip: VideoClip) -> tuple[Tensor, Tensor]:
        """
        Place a prompt's video tokens among the sound's by their true times.

        Args:
            input_ids (`Tensor`): shape (P,).
            position_ids (`Tensor`): shape (R, P).
            clip (`VideoClip`): the prompt's video.

        Returns:
            `tuple[Tensor, Tensor]`: tokens of shape (P,) and positions of shape (R, P).
        """
        raise NotImplementedError

    def position_ids(self, batch: BatchFeature, media: PromptMedia, interleaved: bool) -> Tensor:
        """
        Return the rotary positions of one prompt, shape (R, P); unless a model says otherwise, tokens are counted.

        Args:
            batch (`BatchFeature`): what the processor made of the prompt.
            media (`PromptMedia`): its decoded media.
            interleaved (`bool`): tokens of sound stand among those of its video.
        """
        return torch.arange(batch["input_ids"].size(1))[None]

    def blocks(self, input_ids: Tensor) -> Blocks | None:
        """Return which of a prompt's tokens (`input_ids`, shape (P,)) see each other both ways; `None` where none do."""
        return None

    def feature_counts(self, kind: str, inputs: Mapping[str, Tensor]) -> list[int]:
        """
        Count the features that the tower gives for each clip of a kind.

        Args:
            kind (`str`): of media.
            inputs (`Mapping[str, Tensor]`): what the tower reads: of pictures and video a grid of shape (clips, 3), of sound a
                mask of shape (audios, frames).
        """
        if kind == "audio":
            return [self.audio_token_count(n) for n in inputs["feature_attention_mask"].sum(-1).tolist()]
        return (inputs[f"{kind}_grid_thw"].prod(-1) // self.processor.video_processor.merge_size**2).tolist()

    def audio_token_count(self, mel_frames: int) -> int:
        """Count the tokens of an audio of `mel_frames` mel frames."""
        raise NotImplementedError

    def audio_tokens_of(self, clip: AudioClip) -> int:
        """Count the tokens of a sound (`clip`), before it is encoded."""
        return self.audio_token_count(len(clip.waveform) // self.extractor.hop_length)

    # Running the towers

    def collate_media(self, prompts: Sequence[EncodedPrompt], kind: str, device: torch.device) -> dict[str, Tensor]:
        """
        Concatenate the media of several prompts; mel frames are padded to the longest.

        Args:
            prompts (`Sequence[EncodedPrompt]`): each with media of the kind.
            kind (`str`): of media.
            device (`torch.device`): where the tensors go.

        Returns:
            `dict[str, Tensor]`: what the tower reads, with the shapes of [`~OmniFamily.tower_inputs`], over all prompts.
        """
        if kind != "audio":
            names = self.media_names[kind]
            return {name: torch.cat([p.media[kind][name] for p in prompts]).to(device) for name in names}
        features = [audio.T for p in prompts for audio in p.media[kind]["input_features"]]
        masks = [mask for p in prompts for mask in p.media[kind]["feature_attention_mask"]]
        return {
            "input_features": pad_sequence(features, batch_first=True).transpose(1, 2).to(device),
            "feature_attention_mask": pad_sequence(masks, batch_first=True).to(device),
        }

    def tower_outputs(self, core: nn.Module, kind: str, prompts: Sequence[EncodedPrompt]) -> Features:
        """
        Return the features of all media of a kind in the prompts, one after the other.

        Args:
            core (`nn.Module`): what [`~OmniFamily.core`] gives.
            kind (`str`): of media.
            prompts (`Sequence[EncodedPrompt]`): each with media of the kind.
        """
        if kind == "audio":
            return {"tokens": self.audio_embeddings(core, prompts)}
        media = self.collate_media(prompts, kind, core.get_input_embeddings().weight.device)
        features = core.get_image_features if kind == "image" else core.get_video_features
        outputs = features(**media, return_dict=True)
        layers = {"tokens": outputs.pooler_output}
        deepstack = getattr(outputs, "deepstack_features", None) or []
        layers |= {f"deepstack.{i}": layer for i, layer in enumerate(deepstack)}
        return {name: torch.cat(tuple(layer)) for name, layer in layers.items()}

    def audio_embeddings(self, core: nn.Module, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """Return the features that the audio tower of a `core` gives for all audios of `prompts`, shape (tokens, hidden)."""
        device = core.get_input_embeddings().weight.device
        media = self.collate_media(prompts, "audio", device)
        return core.get_audio_features(**media, return_dict=True).last_hidden_state

    def core_inputs(
        self,
        core: nn.Module,
        input_ids: Tensor,
        features: Mapping[str, Sequence[Features]],
        unneeded: Sequence[Tensor] = (),
    ) -> dict[str, Any]:
        """
        Return arguments for the core's forward that put features in the place of their placeholders.

        Args:
            core: what [`~OmniFamily.core`] gives.
            input_ids: shape (B, T).
            features: by kind, those of each prompt that has any, in the order of the placeholders.
            unneeded: scalars, zeros that depend on towers which have nothing to read; they are added to what is read.
        """
        vision = {kind: list(features[kind]) for kind in ("image", "video") if kind in features}
        # Here or in the core, but once in every row: FSDP 2 gathers the embeddings by themselves each time.
        embeddings = core.get_input_embeddings()(input_ids) if "audio" in features or not vision else None
        if "audio" in features:
            embeddings = self.scattered(embeddings, input_ids, "audio", features["audio"])
        # Beside what is needed, and after all towers, so that the backward pass takes these in the same order everywhere.
        for zero in unneeded:
            if not vision:
                embeddings = embeddings + zero.to(embeddings.dtype)
                continue
            of_kind = next(iter(vision.values()))
            of_kind[0] = of_kind[0] | {"tokens": of_kind[0]["tokens"] + zero.to(of_kind[0]["tokens"].dtype)}
        inputs: dict[str, Any] = {}
        if vision:
            inputs["mm_encoder_outputs"] = {kind: _vision_outputs(of_kind) for kind, of_kind in vision.items()}
        if embeddings is not None:
            inputs["inputs_embeds"] = embeddings
            if not vision:
                inputs["input_ids"] = None  # the vision-language cores take one of the two
        return inputs

    def scattered_inputs(
        self,
        core: nn.Module,
        input_ids: Tensor,
        features: Mapping[str, Sequence[Features]],
        unneeded: Sequence[Tensor] = (),
    ) -> dict[str, Any]:
        """
        Return what `core_inputs` does, with everything in the embeddings: for any core that takes them in the place of tokens.

        Tokens are embedded once then, whatever a row holds, as FSDP wants it where it gathers embeddings by themselves.

        Args:
            core: what [`~OmniFamily.core`] gives.
            input_ids: shape (B, T).
            features: as in [`~OmniFamily.core_inputs`].
            unneeded: scalars, as in [`~OmniFamily.core_inputs`].
        """
        embeddings = core.get_input_embeddings()(input_ids)
        for kind, of_prompts in features.items():
            embeddings = self.scattered(embeddings, input_ids, kind, of_prompts)
        for zero in unneeded:
            embeddings = embeddings + zero.to(embeddings.dtype)
        return {"inputs_embeds": embeddings, "input_ids": None}

    def scattered(self, embeddings: Tensor, input_ids: Tensor, kind: str, features: Sequence[Features]) -> Tensor:
        """
        Return embeddings of shape (B, T, hidden) with the features of a kind in the place of its placeholders.

        Args:
            embeddings (`Tensor`): shape (B, T, hidden).
            input_ids (`Tensor`): shape (B, T).
            kind (`str`): of media.
            features (`Sequence[Features]`): of each prompt that has any, in the order of the placeholders.
        """
        tokens = torch.cat([prompt["tokens"] for prompt in features]).to(embeddings.dtype)
        return embeddings.masked_scatter((input_ids == self.placeholder_ids[kind]).unsqueeze(-1), tokens)

    def dummy_output(self, core: nn.Module, kind: str) -> Tensor:
        """Return a scalar that depends on every parameter of the tower of a `kind` in a `core`, from its smallest input."""
        empty = torch.empty(0, dtype=torch.long)
        prompt = EncodedPrompt("dummy", empty, empty[None], {kind: self.dummy_inputs(kind)})
        return sum(layer.sum() for layer in self.tower_outputs(core, kind, [prompt]).values())

    def dummy_inputs(self, kind: str) -> dict[str, Tensor]:
        """Return the smallest input that the tower of a kind takes, of the shapes of [`~OmniFamily.tower_inputs`]."""
        if kind == "audio":
            mel, frames = self.extractor.feature_size, self.dummy_mel_frames
            return {
                "input_features": torch.zeros(1, mel, frames),
                "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),
            }
        video = self.processor.video_processor
        merge, patch_dim = video.merge_size, 3 * video.temporal_patch_size * video.patch_size**2
        pixels, grid = self.media_names[kind]
        return {pixels: torch.zeros(merge**2, patch_dim), grid: torch.tensor([[1, merge, merge]])}

    dummy_mel_frames = 16

    def scope_of(self, module_name: str) -> str | None:
        """Return the part (`vision`, `audio`, `projectors`, `llm`) that the module called `module_name` belongs to."""
        return _scope_of(tuple(self.scopes.items()), module_name)

    def is_unread(self, weight_name: str) -> bool:
        """Return whether no pass reads the weight called `weight_name`, so that it has no gradient."""
        return weight_name.endswith(self.unread)


def _vision_outputs(features: Sequence[Features]) -> BaseModelOutputWithPooling:
    """Return prompts' features as a core reads the vision tower's output."""
    tokens = tuple(prompt["tokens"] for prompt in features)
    names = [name for name in features[0] if name.startswith("deepstack.")]
    if not names:
        return BaseModelOutputWithPooling(pooler_output=tokens)
    deepstack = [tuple(prompt[name] for prompt in features) for name in names]
    return BaseModelOutputWithDeepstackFeatures(pooler_output=tokens, deepstack_features=deepstack)


def pooled_audio_tokens(mel_frames: int) -> int:
    """Count the tokens of mel frames behind Whisper's encoder, which halves them, and a mean over pairs of its states."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1


def _true_times(videos: Sequence[VideoClip]) -> list[VideoMetadata]:
    """
    Return what processors read that write the time of pictures into the prompt.

    They write index / fps: an index of milliseconds gives the true times.
    """
    return [
        VideoMetadata(
            total_num_frames=len(clip.frames),
            fps=1000.0,
            duration=clip.duration,
            frames_indices=[round(1000 * t) for t in clip.timestamps],
        )
        for clip in videos
    ]


def mean_steps(seconds: Tensor) -> Tensor:
    """Divide each time by its number, float32, such that the product is the time; the first is taken as it is."""
    return (seconds / torch.arange(len(seconds)).clamp(min=1)).float()


@cache
def _scope_of(scopes: tuple[tuple[str, str], ...], module_name: str) -> str | None:
    return next((scope for scope, pattern in scopes if re.search(pattern, module_name)), None)
