"""A batch sampled piece by piece, with the tokens that it has when it is sampled at once."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from maple_trl.omni.encoded import tensor_bytes


def cut_into_pieces(prompts: Sequence[Hashable], most: int) -> list[slice]:
    """
    Cut rows into pieces of at most `most`, between rows of different prompts where that is possible.

    Args:
        prompts: which prompt each row has; rows of a prompt are shared where they stand next to each other.
    """
    pieces, start, end = [], 0, 0
    for _, rows in groupby(prompts):
        size = len(list(rows))
        if end > start and end + size - start > most:
            pieces.append(slice(start, end))
            start = end
        end += size
        while end - start > most:  # a prompt with more rows than a piece may have
            pieces.append(slice(start, start + most))
            start += most
    return [*pieces, slice(start, end)] if end > start else pieces


class BatchDraws:
    """
    Draws the tokens of a batch's pieces with the random numbers of the whole batch.

    `generate()` takes the numbers of a step for all rows at once, from the one stream of the device: how many rows there
    are decides what each of them draws. So here every piece begins where that stream stood before the batch, and at each
    step draws for as many rows as the batch has, of which it keeps its own. Afterwards the stream stands where it would
    after the batch. The price is memory and time of the numbers of all rows, at each step of a piece.

    Args:
        rows: of the whole batch.
    """

    def __init__(self, rows: int):
        self.rows = rows
        self._device: torch.device | None = None
        self._before: Tensor | None = None
        self._after: tuple[int, Tensor] | None = None

    @contextmanager
    def of_piece(self, model: nn.Module, first: int) -> Iterator[None]:
        """
        Let one `generate()` of a piece inside this context draw as the batch would.

        Args:
            model: without adapters around it.
            first: number of the piece's first row in the batch.

        Raises:
            RuntimeError: when nothing was drawn, as with a version of transformers that samples in another way.
        """
        draw = _PieceDraw(self, first)
        prepare = model._get_logits_processor

        # After all that changes the distribution; what `generate()` itself is handed would come before the temperature.
        def prepare_with_draw(*args, **kwargs) -> LogitsProcessorList:
            return LogitsProcessorList([*prepare(*args, **kwargs), draw])

        model._get_logits_processor = prepare_with_draw
        try:
            yield
        finally:
            del model._get_logits_processor
        if draw.generator is None:
            raise RuntimeError("generate() has sampled a piece of a batch without the random numbers of the batch")
        if self._after is None or draw.steps > self._after[0]:
            self._after = draw.steps, draw.generator.get_state()

    def begin(self, device: torch.device) -> torch.Generator:
        """Return a stream that stands where the device's own stood before the batch."""
        if self._before is None:
            random = _random_numbers(device)
            self._device, self._before = device, random.get_rng_state(*_index(device))
            # Dropout, which adapters can have, draws from the device's own: not the numbers that tokens are drawn with.
            seed = zlib.crc32(tensor_bytes(self._before))
            random.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), *_index(device))
        return torch.Generator(device).set_state(self._before)

    def end(self) -> None:
        """Put the device's own stream where it would stand after the batch, which takes as long as its longest row."""
        if self._device is not None and self._after is not None:
            _random_numbers(self._device).set_rng_state(self._after[1], *_index(self._device))


class _PieceDraw:
    """A logits processor that leaves each row the one token that it would draw in the whole batch."""

    def __init__(self, draws: BatchDraws, first: int):
        self.draws, self.first = draws, first
        self.generator: torch.Generator | None = None
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores_NV: Tensor) -> Tensor:
        if self.generator is None:
            self.generator = self.draws.begin(scores_NV.device)
        own = slice(self.first, self.first + len(scores_NV))
        # What the other rows' probabilities are does not change which numbers are drawn.
        batch_BV = scores_NV.new_ones(self.draws.rows, scores_NV.size(1))
        batch_BV[own] = scores_NV.softmax(-1)
        chosen_N1 = torch.multinomial(batch_BV, 1, generator=self.generator)[own]
        self.steps += 1
        return torch.full_like(scores_NV, -torch.inf).scatter_(1, chosen_N1, 0.0)


def _random_numbers(device: torch.device):
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """Return what names the stream of a device to its functions, where there can be several."""
    return () if device.type in ("cpu", "mps") else (device,)
