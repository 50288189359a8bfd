"""Prompts in the form that an engine of another process or library takes: tokens, positions, media, and where they stand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from maple_trl.omni.encoded import EncodedPrompt, tensor_bytes
from maple_trl.omni.families.base import OmniFamily


_ONE_PER_CLIP = {"image": "image_grid_thw", "video": "video_grid_thw", "audio": "feature_attention_mask"}
"""Of each kind of media, the tensor that has one row per clip."""


@dataclass(frozen=True)
class EngineItem:
    """
    One clip of a prompt.

    Attributes:
        offset, length (`int`): the range of the prompt's tokens that it stands in.
        mask (`Tensor` of shape (length,), *optional*): bool, which of them are its own; `None`: all.
        digest (`str`):
            Names what the engine keeps of it: the clip as the tower reads it, and its positions, which an engine's cache of
            prefixes does not compare.
    """

    offset: int
    length: int
    mask: Tensor | None
    digest: str


@dataclass(frozen=True)
class EngineRow:
    """
    One prompt.

    Attributes:
        token_ids (`list[int]`): with one placeholder per media feature.
        position_ids (`Tensor` of shape (R, P)): rotary positions.
        media (`dict[str, dict[str, Tensor]]`): what the towers read, as in [`~maple_trl.omni.encoded.EncodedPrompt`].
        items (`dict[str, list[EngineItem]]`): its clips, by kind.
    """

    token_ids: list[int]
    position_ids: Tensor
    media: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    items: dict[str, list[EngineItem]] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: EncodedPrompt, family: OmniFamily) -> EngineRow:
        """Describe an encoded prompt."""
        own = {(kind, i): places for kind in prompt.kinds for i, places in enumerate(_places(prompt, family, kind))}
        spans = _joined([(int(places[0]), int(places[-1]) + 1) for places in own.values()])
        items: dict[str, list[EngineItem]] = {kind: [] for kind in prompt.kinds}
        for ((kind, i), places), (start, end) in zip(own.items(), spans, strict=True):
            mask = torch.zeros(end - start, dtype=torch.bool)
            mask[places - start] = True
            positions = prompt.position_ids[:, start:end]
            digest = hashlib.blake2b(tensor_bytes(positions - positions[:, :1]), digest_size=8).hexdigest()
            digest = f"{prompt.media_digest(kind)}-{i}-{digest}"
            items[kind].append(EngineItem(start, end - start, None if bool(mask.all()) else mask, digest))
        return cls(prompt.input_ids.tolist(), prompt.position_ids, prompt.media, items)


def _places(prompt: EncodedPrompt, family: OmniFamily, kind: str) -> Sequence[Tensor]:
    """Return the places of the tokens of each clip of a kind."""
    places = (prompt.input_ids == family.placeholder_ids[kind]).nonzero().flatten()
    return places.split(family.feature_counts(kind, prompt.media[kind]))


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Widen spans that overlap to what they cover together, as clips whose tokens stand among each other's do."""
    wide = []
    for span in spans:
        start, end = span
        for other in sorted(spans):
            if other[0] < end and start < other[1]:
                start, end = min(start, other[0]), max(end, other[1])
        wide.append((start, end))
    return wide


def _check(row: EngineRow) -> None:
    """
    Check that the parts of a row fit together, as an engine that is handed another one can end.

    Raises:
        ValueError: saying what does not.
    """
    if not row.token_ids or not all(type(token) is int and token >= 0 for token in row.token_ids):
        raise ValueError("token_ids are not ids of tokens")
    shape = row.position_ids.shape  # an engine reads those of a row with clips alone, in time, height and width
    if len(shape) != 2 or shape[1] != len(row.token_ids) or (row.items and shape[0] != 3):
        raise ValueError(f"{len(row.token_ids)} tokens have positions of shape {tuple(shape)}")
    for kind, items in row.items.items():
        clips = len(row.media[kind][_ONE_PER_CLIP[kind]])
        if len(items) != clips:
            raise ValueError(f"{len(items)} clips ({kind}) have features of {clips}")
        for item in items:
            if not (0 <= item.offset and 0 < item.length <= len(row.token_ids) - item.offset):
                raise ValueError(f"a clip ({kind}) stands at {item.offset} for {item.length} tokens")
            if item.mask is not None and item.mask.shape != (item.length,):
                raise ValueError(f"a clip ({kind}) of {item.length} places has a mask of {tuple(item.mask.shape)}")


def pack_rows(rows: Sequence[EngineRow], fields: dict[str, Any]) -> bytes:
    """Write rows, and further fields that JSON can hold, as one safetensors file."""
    tensors, described = {}, []
    for i, row in enumerate(rows):
        tensors[f"{i}.positions"] = row.position_ids.contiguous()
        for kind, media in row.media.items():
            tensors |= {f"{i}.media.{kind}.{name}": value.contiguous() for name, value in media.items()}
        items = {
            kind: [
                [item.offset, item.length, None if item.mask is None else item.mask.int().tolist(), item.digest]
                for item in of_kind
            ]
            for kind, of_kind in row.items.items()
        }
        described.append(
            {
                "token_ids": row.token_ids,
                "media": {kind: list(media) for kind, media in row.media.items()},
                "items": items,
            }
        )
    return save(tensors, {"maple_trl": json.dumps({**fields, "rows": described})})


def unpack_rows(data: bytes) -> tuple[list[EngineRow], dict[str, Any]]:
    """
    Read what [`pack_rows`] has written.

    Raises:
        ValueError: for anything else.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        fields = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["maple_trl"])
        tensors = load(data)
        rows = []
        for i, described in enumerate(fields.pop("rows")):
            items = {
                kind: [
                    EngineItem(offset, length, None if mask is None else torch.tensor(mask, dtype=torch.bool), digest)
                    for offset, length, mask, digest in of_kind
                ]
                for kind, of_kind in described["items"].items()
            }
            media = {
                kind: {name: tensors[f"{i}.media.{kind}.{name}"] for name in names}
                for kind, names in described["media"].items()
            }
            rows.append(EngineRow(described["token_ids"], tensors[f"{i}.positions"], media, items))
            _check(rows[-1])
        return rows, fields
    except Exception as error:
        raise ValueError(f"these are no rows of maple_trl: {type(error).__name__}: {error}") from error
