"""Rows as messages of a chat endpoint: what the local families make of a row, in the form in which servers take it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maple_trl.chat import audio_block, image_block, text_block
from maple_trl.modalities import ModalityTag
from maple_trl.omni.encoded import KINDS
from maple_trl.omni.families import OmniFamily, PromptEncoder
from maple_trl.omni.media.clips import PromptMedia, VideoClip
from maple_trl.records.evaluations import EvaluationError


VIDEO_FORMS = ("timed_images", "images", "video_url")
"""How frames are sent: each as a picture (every server that takes pictures) behind its time or without, or as one video (vLLM)."""

TIMES_UNKNOWN = "video-times-unknown"
"""The note of a prompt whose videos differ in their rate, of which a request has room for one."""

_PREFIX = "data:image/jpeg;base64,"
_SAME_RATE = 0.01  # relative difference of rates that are one


@dataclass(frozen=True)
class ServedPrompt:
    """
    One prompt for a server.

    Attributes:
        key: equal for rows with the same content.
        messages: as the API takes them.
        kinds: of its media, `image`, `video` and `audio`.
        options: further fields of the request, which say how its media are to be read.
        media_tokens: empty; only the server knows.
        tag, notes, sound: as of [`~maple_trl.omni.encoded.EncodedPrompt`].
    """

    key: str
    messages: list[dict[str, Any]]
    kinds: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    media_tokens: dict[str, int] = field(default_factory=dict)
    tag: ModalityTag | None = None
    notes: tuple[str, ...] = ()
    sound: tuple[float, float] | None = None

    @property
    def digest(self) -> str:
        """Digest of all that is sent."""
        text = json.dumps([self.messages, self.options] if self.options else self.messages, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _media_tokens(family: type[OmniFamily] = OmniFamily) -> set[str]:
    """Return the media tokens of a family, and of those that are made of it."""
    return set(family.media_tokens).union(*map(_media_tokens, family.__subclasses__()))


class MessageEncoder(PromptEncoder):
    """
    Puts a server's rows into messages.

    With it, a [`~maple_trl.omni.prompt.PromptBuilder`] feeds a server the same signals, pictures, frames, sound and subtitles in
    the same order as a model here. Tokens are the server's business: the builder must not limit them.

    Args:
        video_form: one of `VIDEO_FORMS`.

    Raises:
        EvaluationError: for another form.
    """

    placeholders = dict.fromkeys(KINDS, "")
    # Whatever the model is: text that spells one would be read as media.
    media_tokens = tuple(sorted(_media_tokens()))
    frame_multiple = 28
    sampling_rate = 16_000

    def __init__(self, video_form: str = "timed_images"):
        if video_form not in VIDEO_FORMS:
            raise EvaluationError(f"the form of videos must be one of {', '.join(VIDEO_FORMS)}, got {video_form!r}")
        self.video_form = video_form

    def render(self, messages: list[dict[str, Any]], **_: Any) -> list[dict[str, Any]]:
        """Return messages as they are: the chat template is the server's."""
        return messages

    def tokens(self, text: str) -> list[int]:
        """Return `None`: nobody here can count them."""
        return []

    def encode(
        self,
        key: str,
        text: list[dict[str, Any]],
        media: PromptMedia,
        interleaved: bool = False,
    ) -> ServedPrompt:
        """
        Put media into messages.

        Args:
            text: messages with bare markers for media, in order.
            interleaved: has no effect: how a server places sound is its own business.
        """
        pictures, clips, sounds = iter(media.images), iter(media.videos), iter(media.audios)
        messages = []
        for message in text:
            content: list[dict[str, Any]] = []
            for block in message["content"]:
                if block["type"] == "image":
                    content.append(image_block(next(pictures).pixels))
                elif block["type"] == "video":
                    clip = next(clips)
                    clip = clip if self.video_form == "video_url" else clip.without_repeat
                    content += video_blocks(clip.frames, self.video_form, clip.timestamps)
                elif block["type"] == "audio":
                    sound = next(sounds)
                    content.append(audio_block(sound.waveform, sound.sampling_rate))
                else:
                    content.append(text_block(block["text"]))
            texts = [block["text"] for block in content if block["type"] == "text"]
            # Plain text where it is nothing else, which every server takes, in system messages too.
            messages.append({**message, "content": "".join(texts) if len(texts) == len(content) else content})
        kinds = tuple(kind for kind in KINDS if kind in media.kinds)
        if self.video_form != "video_url" or not media.videos:
            return ServedPrompt(key, messages, kinds)
        options, notes = _reading(media.videos)
        return ServedPrompt(key, messages, kinds, options, notes=notes)


def video_blocks(frames: np.ndarray, form: str, seconds: Sequence[float] | np.ndarray = ()) -> list[dict[str, Any]]:
    """
    Return the content blocks of sampled frames.

    Args:
        frames: uint8, shape (T, H, W, 3).
        form: `"images"`: T pictures (JPEG). `"timed_images"`: each behind its time, as Qwen3-VL's processor writes it of a
            video. `"video_url"`: one video, whose data URL holds them one after another,
            joined by commas, as vLLM reads `video/jpeg`.
        seconds: when each is shown; without them, no time is written.
    """
    blocks = [image_block(frame) for frame in frames]
    if form == "timed_images" and len(seconds):
        timed = zip(seconds, blocks, strict=True)
        return [part for second, block in timed for part in (text_block(f"<{second:.1f} seconds>"), block)]
    if form != "video_url":
        return blocks
    pictures = [block["image_url"]["url"].removeprefix(_PREFIX) for block in blocks]
    return [{"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(pictures)}}]


def _reading(videos: Sequence[VideoClip]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """
    Return what tells vLLM the times of a request's videos, and a note where it cannot.

    It takes frames for one a second, and leaves out those beyond the 32nd, unless `media_io_kwargs` say otherwise: once for
    all videos of a request.
    """
    rates = [float(clip.fps) for clip in videos]
    options: dict[str, Any] = {"num_frames": max(len(clip.frames) for clip in videos)}
    if max(rates) - min(rates) > _SAME_RATE * max(rates):
        return {"media_io_kwargs": {"video": options}}, (TIMES_UNKNOWN,)
    return {"media_io_kwargs": {"video": options | {"fps": rates[0]}}}, ()
