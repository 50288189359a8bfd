"""The unit of omni data: one unique prompt, encoded alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maple_trl.modalities import ModalityTag


KINDS = ("image", "video", "audio")
"""The kinds of media."""

Features = dict[str, Tensor]
"""A prompt's features of one kind: `tokens` of shape (tokens, hidden), and `deepstack.0` and so on where there are."""


class MediaMismatchError(RuntimeError):
    """A prompt's placeholder tokens and its media features differ in number, or its media never reached the model."""


@dataclass(frozen=True)
class Blocks:
    """
    Tokens of a prompt that see each other both ways, as those of a picture do in some models.

    Attributes:
        spans: of each block the first token, and the one after its last.
        everywhere: in every layer, past its window as well; else only in layers with a window, and within it.
    """

    spans: tuple[tuple[int, int], ...]
    everywhere: bool = False


@dataclass(eq=False)
class EncodedPrompt:
    """
    One prompt with its media, ready for generation and for the training forward.

    A prompt is encoded alone, so its positions carry its own audio-in-video flag and the times of its pictures. Rows of a batch that
    share a prompt share the object; nothing in it is repeated per completion.

    Attributes:
        key (`str`):
            Names the prompt: equal content has an equal key.
        input_ids (`Tensor` of shape (P,)):
            Prompt tokens with one placeholder token per media feature.
        position_ids (`Tensor` of shape (R, P)):
            Rotary positions, R = 3 for models with multimodal rotary embeddings (time, height, width), else 1.
        media (`dict[str, dict[str, Tensor]]`):
            By kind of media what the tower reads, under the names of the family's `media_names`. Of the Qwen models:
            `pixel_values` (patches, patch_dim) with `image_grid_thw` (images, 3), `pixel_values_videos` with `video_grid_thw`,
            and `input_features` (audios, mel, frames) with `feature_attention_mask` (audios, frames).
        media_tokens (`dict[str, int]`):
            Tokens of the prompt per kind of media, and for `subtitle`.
        tag (`ModalityTag`, *optional*):
            The row's required modality tag.
        notes (`tuple[str, ...]`):
            What was unusual about the row's media, e.g. `no-audio-track`, or `sound-spread` where only parts of a long sound
            are fed.
        sound (`tuple[float, float]`, *optional*):
            Seconds of sound that are fed, and of the sound that they are taken from.
        blocks ([`Blocks`], *optional*):
            Tokens that see each other both ways, in models that have such.
    """

    key: str
    input_ids: Tensor
    position_ids: Tensor
    media: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    media_tokens: dict[str, int] = field(default_factory=dict)
    tag: ModalityTag | None = None
    notes: tuple[str, ...] = ()
    sound: tuple[float, float] | None = None
    blocks: Blocks | None = None
    _digests: dict[str, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.input_ids.numel()

    def media_digest(self, kind: str) -> str:
        """Return a digest of what the tower of a kind reads: clips that are sampled and resized alike share it."""
        if kind not in self._digests:
            digest = hashlib.blake2b(digest_size=16)
            for name, values in self.media[kind].items():
                digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
                digest.update(tensor_bytes(values))
            self._digests[kind] = digest.hexdigest()
        return self._digests[kind]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of media that this prompt has."""
        return tuple(kind for kind in KINDS if self.media_tokens.get(kind))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor, for digests."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def unique_prompts(rows: Sequence[EncodedPrompt]) -> tuple[list[EncodedPrompt], list[int]]:
    """Return the distinct prompts of a batch in order of first appearance, and each row's index among them."""
    prompts: list[EncodedPrompt] = []
    index: dict[int, int] = {}
    row_to_prompt = []
    for row in rows:
        if id(row) not in index:
            index[id(row)] = len(prompts)
            prompts.append(row)
        row_to_prompt.append(index[id(row)])
    return prompts, row_to_prompt


def batch_position_ids(rows: Sequence[EncodedPrompt], prompt_width: int, completion_length: int = 0) -> Tensor:
    """
    Return the positions of a left-padded batch of prompts, each followed by `completion_length` tokens of text.

    Text after a prompt, which ends in text, goes on counting from its last position in every rotary dimension. Padding has
    position 0; it is masked wherever it could matter.

    Returns:
        `Tensor` of shape (R, B, prompt_width + completion_length).
    """
    # Qwen3-Omni counts time in fractions, the other families in integers.
    first = rows[0].position_ids
    positions = torch.zeros(first.size(0), len(rows), prompt_width + completion_length, dtype=first.dtype)
    steps = torch.arange(1, completion_length + 1)
    for i, row in enumerate(rows):
        positions[:, i, prompt_width - len(row) : prompt_width] = row.position_ids
        positions[:, i, prompt_width:] = row.position_ids[:, -1:] + steps
    return positions


def forward_position_ids(positions: Tensor) -> Tensor:
    """Return positions of shape (R, B, T) as a model's forward takes them: of shape (B, T) where R is 1."""
    return positions[0] if positions.size(0) == 1 else positions


def generation_position_ids(rows: Sequence[EncodedPrompt], prompt_width: int) -> Tensor:
    """
    Return positions for `generate()`: row 0 counts text tokens, rows 1 to 3 are the rotary positions.

    Returns:
        `Tensor` of shape (4, B, prompt_width) for multimodal rotary embeddings, (B, prompt_width) otherwise.
    """
    rotary = batch_position_ids(rows, prompt_width)
    if rotary.size(0) == 1:
        return rotary[0]
    text = torch.zeros(len(rows), prompt_width, dtype=rotary.dtype)
    for i, row in enumerate(rows):
        text[i, prompt_width - len(row) :] = torch.arange(len(row))
    return torch.cat([text[None], rotary])
