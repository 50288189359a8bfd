"""A key-value cache that takes further tokens without copying what it holds."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import DynamicLayer


RESERVE = 128
"""Tokens that a layer has room for at a time."""


class GrowingLayer(DynamicLayer):
    """
    A layer of a key-value cache with room for tokens to come, which it fills in place.

    transformers' `DynamicLayer` copies all that it holds for each token; after a long prompt that takes longer than the
    attention.

    Args:
        layer (`DynamicLayer`): holds keys and values of shape (prompts, heads, tokens, D).
        rows (`Tensor` of shape (rows,)): the prompt that each row of this layer begins with.
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._key_room, self.keys = _with_room(layer.keys.index_select(0, rows))
        self._value_room, self.values = _with_room(layer.values.index_select(0, rows))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add new tokens, and return all keys and values."""
        self._key_room, self.keys = _appended(self._key_room, self.keys, key_states)
        self._value_room, self.values = _appended(self._value_room, self.values, value_states)
        return self.keys, self.values


def _with_room(held: Tensor, more: int = 0) -> tuple[Tensor, Tensor]:
    """Copy what is held, with room for `more` and `RESERVE` tokens; return all of it, and the part that is filled."""
    length = held.size(-2)
    room = held.new_empty(*held.shape[:-2], length + more + RESERVE, held.size(-1))
    room[..., :length, :] = held
    return room, room[..., :length, :]


def _appended(room: Tensor, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Put new tokens after those that are held; return the room, or a larger one, and its filled part."""
    length, end = held.size(-2), held.size(-2) + new.size(-2)
    # Rows that were reordered since, as beam search does, lie elsewhere.
    if end > room.size(-2) or held.data_ptr() != room.data_ptr() or len(held) != len(room):
        room, _ = _with_room(held, new.size(-2))
    room[..., length:end, :] = new
    return room, room[..., :end, :]
