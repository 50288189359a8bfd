"""Rows as messages of a chat endpoint: what the local families make of a row, in the form in which servers take it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maple_trl.chat import audio_block, image_block, text_block
from maple_trl.modalities import ModalityTag
from maple_trl.omni.encoded import KINDS
from maple_trl.omni.families import OmniFamily, PromptEncoder
from maple_trl.omni.media.clips import PromptMedia
from maple_trl.records.evaluations import EvaluationError


VIDEO_FORMS = ("images", "video_url")
"""How frames are sent: each as a picture (every server that takes pictures), or together as one video (vLLM)."""

_PREFIX = "data:image/jpeg;base64,"


@dataclass(frozen=True)
class ServedPrompt:
    """
    One prompt for a server.

    Attributes:
        key: equal for rows with the same content.
        messages: as the API takes them.
        kinds: of its media, `image`, `video` and `audio`.
        media_tokens: empty; only the server knows.
        tag, notes, sound: as of [`~maple_trl.omni.encoded.EncodedPrompt`].
    """

    key: str
    messages: list[dict[str, Any]]
    kinds: tuple[str, ...] = ()
    media_tokens: dict[str, int] = field(default_factory=dict)
    tag: ModalityTag | None = None
    notes: tuple[str, ...] = ()
    sound: tuple[float, float] | None = None

    @property
    def digest(self) -> str:
        """Digest of all that is sent."""
        text = json.dumps(self.messages, sort_keys=True)
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

    def __init__(self, video_form: str = "images"):
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
                    content += video_blocks(next(clips).frames, self.video_form)
                elif block["type"] == "audio":
                    clip = next(sounds)
                    content.append(audio_block(clip.waveform, clip.sampling_rate))
                else:
                    content.append(text_block(block["text"]))
            texts = [block["text"] for block in content if block["type"] == "text"]
            # Plain text where it is nothing else, which every server takes, in system messages too.
            messages.append({**message, "content": "".join(texts) if len(texts) == len(content) else content})
        return ServedPrompt(key, messages, tuple(kind for kind in KINDS if kind in media.kinds))


def video_blocks(frames: np.ndarray, form: str) -> list[dict[str, Any]]:
    """
    Return the content blocks of sampled frames.

    Args:
        frames: uint8, shape (T, H, W, 3).
        form: `"images"`: T pictures (JPEG). `"video_url"`: one video, whose data URL holds them one after another,
            joined by commas, as vLLM reads `video/jpeg`.
    """
    blocks = [image_block(frame) for frame in frames]
    if form == "images":
        return blocks
    pictures = [block["image_url"]["url"].removeprefix(_PREFIX) for block in blocks]
    return [{"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(pictures)}}]
