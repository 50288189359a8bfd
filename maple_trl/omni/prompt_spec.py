"""What a row feeds to the model, before anything is decoded, and which of its columns that depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from maple_trl.modalities import INPUT_COLUMNS, Modality, ModalityTag
from maple_trl.omni.media.clips import ClipRequest
from maple_trl.omni.media.subtitles import Part, is_subtitle_file


PROMPT_COLUMNS = ("prompt", *INPUT_COLUMNS)
"""The columns that a prompt depends on."""


@dataclass(frozen=True)
class PromptSpec:
    """
    What a row feeds to the model, before anything is decoded.

    Attributes:
        messages: the conversation; media blocks are `{"type": "image"}`, `{"type": "video"}` and `{"type": "audio"}`, in
            order. A plain text prompt is a string, to which no chat template applies.
        videos: the files of the blocks with video, in order.
        audios: those of the blocks with sound; with `interleaved` each belongs to the video of its place.
        video_requests: what is wanted of each video.
        audio_requests: what is wanted of each sound.
        interleaved: whether tokens of sound stand among those of its video.
        images: the files of the blocks with pictures, in order.
        image_requests: what is wanted of each picture.
        subtitle: a file, or the text itself.
        subtitle_parts: from when to when the parts of the row's clips are whose cues are fed of the file, in seconds; none:
            all that it says.
        tag: the row's tag, where it has one.
        fed: the signals that the row is fed.
    """

    messages: tuple[dict[str, Any], ...] | str
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    video_requests: tuple[ClipRequest, ...] = ()
    audio_requests: tuple[ClipRequest, ...] = ()
    subtitle: str | None = None
    interleaved: bool = False
    tag: ModalityTag | None = None
    fed: frozenset[Modality] = field(default_factory=frozenset)
    images: tuple[str, ...] = ()
    image_requests: tuple[ClipRequest, ...] = ()
    subtitle_parts: tuple[Part, ...] = ()

    @property
    def subtitle_file(self) -> bool:
        """Whether the subtitle is a file rather than the text itself."""
        return self.subtitle is not None and is_subtitle_file(self.subtitle)

    @property
    def needs_subtitle(self) -> bool:
        """Whether the row's tag asks for a subtitle, rather than that it is fed one that is there."""
        return self.tag is not None and Modality.SUBTITLE in self.tag.modalities

    @property
    def clips(self) -> tuple[tuple[str, ClipRequest], ...]:
        """Videos and audios, each with what is wanted of it."""
        files, requests = (*self.videos, *self.audios), (*self.video_requests, *self.audio_requests)
        return tuple(zip(files, requests, strict=True))

    @property
    def pictures(self) -> tuple[tuple[str, ClipRequest], ...]:
        """Images, each with what is wanted of it."""
        return tuple(zip(self.images, self.image_requests, strict=True))

    @property
    def files(self) -> tuple[str, ...]:
        """All files of media, those of sight first."""
        return (*self.images, *self.videos, *self.audios)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of media of which there are any, of `image`, `video` and `audio`."""
        files = {"image": self.images, "video": self.videos, "audio": self.audios}
        return frozenset(kind for kind, named in files.items() if named)

    @cached_property
    def key(self) -> str:
        """A digest of the content: equal prompts have an equal key."""
        content = [self.messages, self.videos, self.audios, self.subtitle, self.interleaved, self.tag]
        requests = [self.video_requests, self.audio_requests]
        # Keys of whole clips and subtitles, and of rows without pictures, stay as they were before there was anything else.
        if any(request != ClipRequest() for kind in requests for request in kind):
            content.append([[asdict(request) for request in kind] for kind in requests])
        if self.images:
            content.append({"images": [[file, asdict(request)] for file, request in self.pictures]})
        if self.subtitle_parts:
            content.append({"subtitle_parts": self.subtitle_parts})
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_columns(row: Mapping[str, Any]) -> Hashable:
    """Return what a row says of its prompt: equal for rows that say the same, if it is all of JSON's types."""
    return tuple(_typed(row.get(name)) for name in PROMPT_COLUMNS)


def _typed(value: Any) -> Hashable:
    """Return a value with its types, without which 1, 1.0 and True were equal; one of a foreign type equals nothing."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, *map(_typed, value)
    if kind is dict:
        return kind, *map(_typed, value.items())
    if kind is float:
        return kind, repr(value)  # 0.0 and -0.0 are equal too
    return kind, value if kind in (str, int, bool, type(None)) else object()
