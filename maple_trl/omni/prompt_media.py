"""The decoded media of a prompt: of its files, within a number of tokens, or of noise."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from maple_trl.omni.errors import MediaError
from maple_trl.omni.families import PromptEncoder
from maple_trl.omni.media.clips import AudioClip, ClipRequest, Picture, PromptMedia, VideoClip
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.prompt_spec import PromptSpec


_NOISE_FRAMES, _NOISE_SECONDS = 4, 1.0


class MediaReader:
    """
    Decodes what prompts are fed, as their model reads it.

    Args:
        family ([`~maple_trl.omni.families.PromptEncoder`]): the model's.
        loader ([`~maple_trl.omni.media.loader.MediaLoader`]): decodes and caches.
    """

    def __init__(self, family: PromptEncoder, loader: MediaLoader):
        self.family = family
        self.loader = loader

    def read(
        self, spec: PromptSpec, max_tokens: int | None = None
    ) -> tuple[list[Picture], list[VideoClip], list[AudioClip | None]]:
        """
        Decode the pictures, videos and sounds of a prompt, each in its order; `None` for a file without sound.

        Args:
            max_tokens: of all of them together. Pictures and frames are made smaller until they fit.

        Raises:
            MediaError: when a file cannot be used, or the media do not fit at their smallest.
        """
        audios = [self._audio(*clip) for clip in spec.clips[len(spec.videos) :]]
        if max_tokens is None:
            return *self._seen(spec), audios
        audio_tokens = sum(self.family.audio_tokens_of(clip) for clip in audios if clip is not None)
        budget = max_tokens - audio_tokens
        images, videos = self._seen_within(budget, spec)
        needed = self._seen_tokens(images, videos)
        if needed > budget:
            raise MediaError(
                "media-tokens",
                spec.files[0],
                f"{needed + audio_tokens} media tokens at the smallest frame size, but max_media_tokens is "
                f"{max_tokens}: feed fewer pictures or frames, or less audio",
            )
        return images, videos, audios

    def _seen(self, spec: PromptSpec, max_pixels: int | None = None) -> tuple[list[Picture], list[VideoClip]]:
        images = [self._image(*picture, max_pixels) for picture in spec.pictures]
        return images, [self._video(*clip, max_pixels) for clip in spec.clips[: len(spec.videos)]]

    def _seen_within(self, budget: int, spec: PromptSpec) -> tuple[list[Picture], list[VideoClip]]:
        """Return a prompt's pictures and videos, all so small that they fit, if they can be that small."""
        # Sized before decoding, by the number of frames that will be sampled, so that a clip is decoded once.
        clips = spec.clips[: len(spec.videos)]
        frames = [self.loader.frame_count(path, request=request) for path, request in clips]
        steps = sum(-(-count // self.family.frames_per_token) for count in frames) + len(spec.images)
        if not steps:
            return [], []
        least = self.family.frame_multiple**2
        seen: tuple[list[Picture], list[VideoClip]] | None = None
        area = max(budget // steps, 1) * least
        while True:
            try:
                seen = self._seen(spec, area)
            except MediaError as error:
                if error.reason != "bad-aspect-ratio":
                    raise
                return seen or self._seen(spec)  # nothing smaller of this shape
            needed = self._seen_tokens(*seen)
            if needed <= budget or area <= least:
                return seen
            area = max(area * max(budget, 1) // needed, least)  # where a token covers less than a patch of a frame

    def _image(self, path: str, request: ClipRequest, max_pixels: int | None = None) -> Picture:
        return self.loader.image(path, multiple=self.family.frame_multiple, max_pixels=max_pixels, request=request)

    def _video(self, path: str, request: ClipRequest, max_pixels: int | None = None) -> VideoClip:
        return self.loader.video(path, multiple=self.family.frame_multiple, max_pixels=max_pixels, request=request)

    def _audio(self, path: str, request: ClipRequest) -> AudioClip | None:
        clip = self.loader.audio(path, sampling_rate=self.family.sampling_rate, request=request)
        window = self.family.max_audio_seconds
        if clip is not None and window is not None and len(clip.waveform) > window * clip.sampling_rate:
            raise MediaError(
                "too-long", path, f"{clip.duration:.1f} s of audio; {type(self.family).__name__} reads {window:g} s"
            )
        return clip

    def _seen_tokens(self, images: Sequence[Picture], videos: Sequence[VideoClip]) -> int:
        tokens = sum(self.family.image_token_count(*picture.pixels.shape[:2]) for picture in images)
        return tokens + sum(self.family.video_token_count(*clip.frames.shape[:3]) for clip in videos)


def noise_media(family: PromptEncoder, kinds: Collection[str]) -> PromptMedia:
    """Return a moment of noise of each of some kinds of media (`image`, `video`, `audio`), as small as the family reads."""
    return PromptMedia(
        [Picture(_noise_frames(family.frame_multiple)[0], "noise")] if "image" in kinds else [],
        [_noise_video(family.frame_multiple)] if "video" in kinds else [],
        [_noise_audio(family.sampling_rate)] if "audio" in kinds else [],
    )


def _noise_frames(multiple: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (_NOISE_FRAMES, 2 * multiple, 2 * multiple, 3), dtype=np.uint8)


def _noise_video(multiple: int) -> VideoClip:
    rate = _NOISE_FRAMES / _NOISE_SECONDS
    return VideoClip(_noise_frames(multiple), np.arange(_NOISE_FRAMES) / rate, rate, _NOISE_SECONDS, "noise")


def _noise_audio(rate: int) -> AudioClip:
    waveform = np.random.default_rng(0).normal(scale=0.1, size=int(rate * _NOISE_SECONDS)).astype(np.float32)
    return AudioClip(waveform, rate, _NOISE_SECONDS, "noise")
