"""Hands a batch's media to the model: encoded once per unique prompt, proven to have arrived."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maple_trl.omni.encoded import EncodedPrompt, Features, MediaMismatchError
from maple_trl.omni.families.base import OmniFamily
from maple_trl.omni.towers import TowerCache, run_tower


@contextmanager
def serve_media(
    family: OmniFamily,
    model: nn.Module,
    rows: Sequence[EncodedPrompt],
    touch: Collection[str] = (),
    packed: bool = False,
    cache: TowerCache | None = None,
) -> Iterator[None]:
    """
    Let a forward of `model` over `rows` inside this context merge the rows' media into its embeddings.

    The towers run inside the model's own forward, so that DDP, FSDP and ZeRO see them, and each unique prompt passes
    them once however many rows share it. After the first forward, those of one token per row pass through unread, for the
    host would wait at each: they are decoding steps of `generate()`, which samples no placeholders (`suppressed_ids`).

    Args:
        rows: one prompt per row of the forward, in order.
        touch:
            Kinds of media whose tower runs on a dummy, weighted by zero, where no row has any. Sharded parameters (FSDP,
            ZeRO-3) are gathered by collective calls, so all ranks must run the same towers.
        packed (`bool`):
            The forward has a single row, in which the prompts stand one after the other.
        cache ([`TowerCache`], *optional*):
            What frozen towers have made of clips before.

    Raises:
        MediaMismatchError: when a row's placeholders and features differ in number, or no forward took the media.
    """
    rows = list(rows)
    passed = served = False

    def merge(module: nn.Module, args: tuple, kwargs: dict):
        nonlocal passed, served
        input_ids = kwargs.get("input_ids")
        if input_ids is None or passed and input_ids.size(1) == 1:  # a decoding step
            return None
        first, passed = not passed, True
        found = _count_placeholders(family, input_ids)
        if not (first and touch or any(map(any, found.values()))):
            return None
        served = True
        (_check_packed_placeholders if packed else _check_placeholders)(rows, found)
        return args, kwargs | _merged_inputs(family, module, rows, input_ids, touch, cache)

    with family.core(model).register_forward_pre_hook(merge, with_kwargs=True):
        yield
    unread = [row for row in rows if row.kinds]
    if unread and not served:
        raise MediaMismatchError(
            f"The media of {len(unread)} row(s) never reached the model (first: prompt {unread[0].key}, tag "
            f"{unread[0].tag}): no forward with their placeholder tokens ran."
        )


def _count_placeholders(family: OmniFamily, input_ids: Tensor) -> dict[str, list[int]]:
    """Count the placeholders of each kind in each row; the host waits once."""
    kinds = family.placeholder_ids
    counts = torch.stack([(input_ids == token_id).sum(1) for token_id in kinds.values()])
    return dict(zip(kinds, counts.tolist(), strict=True))


def _merged_inputs(
    family: OmniFamily,
    core: nn.Module,
    rows: list[EncodedPrompt],
    input_ids: Tensor,
    touch: Collection[str],
    cache: TowerCache | None,
) -> dict[str, Any]:
    """Return arguments for the core's forward, with the rows' media in place."""
    found: dict[str, list[Features]] = {}
    unneeded: list[Tensor] = []
    for kind in family.placeholder_ids:
        holders = [row for row in rows if kind in row.kinds]
        if holders:
            clips = {row.media_digest(kind): row for row in holders}  # prompts about one clip read it once
            prompts = list(clips.values())
            run = run_tower if cache is None else cache.features
            known = dict(zip(clips, run(family, core, kind, prompts), strict=True))
            found[kind] = [known[row.media_digest(kind)] for row in holders]
        elif kind in touch:
            unneeded.append(0.0 * family.dummy_output(core, kind))
    return family.core_inputs(core, input_ids, found, unneeded)


def _check_placeholders(rows: list[EncodedPrompt], found: dict[str, list[int]]) -> None:
    for kind, counts in found.items():
        if len(rows) != len(counts):
            raise MediaMismatchError(f"{len(rows)} prompts were given for a forward of {len(counts)} rows")
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if count != row.media_tokens.get(kind, 0):
                raise MediaMismatchError(
                    f"row {i} (prompt {row.key}, tag {row.tag}) has {count} {kind} placeholder(s) in its tokens but "
                    f"{row.media_tokens.get(kind, 0)} {kind} feature(s)"
                )


def _check_packed_placeholders(prompts: list[EncodedPrompt], found: dict[str, list[int]]) -> None:
    for kind, counts in found.items():
        wanted = sum(prompt.media_tokens.get(kind, 0) for prompt in prompts)
        if sum(counts) != wanted:
            raise MediaMismatchError(
                f"a packed row has {sum(counts)} {kind} placeholder(s) in its tokens, but its {len(prompts)} prompt(s) have "
                f"{wanted} {kind} feature(s)"
            )
