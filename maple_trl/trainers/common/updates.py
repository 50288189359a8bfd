"""How the rows of a rollout become the micro-batches of its optimizer steps, when some were dropped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from trl.trainer.utils import shuffle_sequence_dict

from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.trainers.common.batch import NUMBER_KEY, PROMPTS_KEY, REPLAYED_KEY, TAG_KEY, Batch
from maple_trl.trainers.common.checkpoint import LostPromptsError
from maple_trl.trainers.common.tag_metrics import UNTAGGED


if TYPE_CHECKING:
    from trl import GRPOConfig


logger = logging.getLogger(__name__)

Exchange = Callable[[dict[int, Batch]], list[Batch | None]]


def update_batches(
    batch: Batch,
    rows_per_rank: Sequence[int],
    rollout: Batch,
    args: GRPOConfig,
    rank: int,
    exchange: Exchange,
    pad_token_id: int,
) -> list[Batch]:
    """
    Make micro-batches of the rows that are trained on, shared out over the ranks and shuffled as TRL shuffles.

    Args:
        batch, rows_per_rank: this rank's rows, and how many each rank has.
        rollout: any batch with rows; a rank that has none left takes one of it as its padding row.
        exchange: see [`share_out`].

    Returns:
        `list[Batch]`: `steps_per_generation` of them; see [`micro_batches`].
    """
    batch = share_out(batch, rows_per_rank, rank, exchange, pad_token_id)
    spare = (batch if batch.rows else rollout).take([0])
    nothing = (
        "completion_mask",
        "advantages",
        "old_per_token_logps",
        "ref_per_token_logps",
        "importance_sampling_ratio",
    )
    spare |= {name: torch.zeros_like(spare[name]) for name in nothing if name in spare}  # 0 times NaN would be NaN
    spare[TAG_KEY] = torch.full_like(spare[TAG_KEY], UNTAGGED)
    if NUMBER_KEY in spare:
        spare[NUMBER_KEY] = torch.full_like(spare[NUMBER_KEY], -1)
    batch, padding_row = Batch.concat([batch, spare], pad_token_id).split([batch.rows, 1])
    batch = Batch(shuffle_sequence_dict(batch))
    steps = args.steps_per_generation // args.gradient_accumulation_steps
    if batch.prompts is not None:
        one = {prompt.key: prompt for prompt in batch.prompts}  # rows from other ranks may bring it again
        batch[PROMPTS_KEY] = [one[prompt.key] for prompt in batch.prompts]
        batch = batch.regroup(even_parts(batch.rows, steps) if REPLAYED_KEY in batch else None)
    return micro_batches(
        batch,
        even_parts(sum(rows_per_rank), len(rows_per_rank)),
        steps=steps,
        slots=args.gradient_accumulation_steps,
        largest=args.per_device_train_batch_size,
        padding_row=padding_row,
        group=args.num_generations,
    )


def exchange_rows(
    parcels: dict[int, Batch], accelerator: Accelerator, prompts_by_key: Callable[[list[str]], list[EncodedPrompt]]
) -> list[Batch | None]:
    """
    Send rows to other ranks; a collective call.

    Media are not sent but decoded again, by the prompts' keys. Only those that cannot be any more are sent after all, by the
    ranks that have them.

    Returns:
        the rows that each rank sent to this one, `None` where it sent none.
    """
    packed: dict[int, dict] = {}
    held: dict[str, EncodedPrompt] = {}
    for to, rows in parcels.items():
        packed[to] = {name: value.cpu() if torch.is_tensor(value) else value for name, value in rows.items()}
        if rows.prompts is not None:
            packed[to][PROMPTS_KEY] = [prompt.key for prompt in rows.prompts]
            held |= {prompt.key: prompt for prompt in rows.prompts}
    received = [sent.get(accelerator.process_index) for sent in gather_object([packed])]
    keys = [key for rows in received if rows is not None for key in rows.get(PROMPTS_KEY, ())]
    shown = _shown_again(keys, held, prompts_by_key)
    return [None if rows is None else _unpacked(rows, accelerator.device, shown) for rows in received]


def _shown_again(
    keys: list[str], held: dict[str, EncodedPrompt], prompts_by_key: Callable
) -> dict[str, EncodedPrompt]:
    """Return the prompts with these keys, by key; a collective call."""
    shown, lost = {}, []
    for key in dict.fromkeys(keys):
        try:
            (shown[key],) = prompts_by_key([key])
        except LostPromptsError as error:
            lost.append(key)
            logger.warning(
                "Another process hands over what it has read, for rows of it are trained on here: %s", error
            )
    return shown | _handed_over(lost, held)


def _handed_over(lost: list[str], held: dict[str, EncodedPrompt]) -> dict[str, EncodedPrompt]:
    """Return prompts that this rank cannot show any more, of those that other ranks hold; a collective call."""
    wanted = set(gather_object(lost))
    if not wanted:
        return {}
    sent = gather_object([{key: held[key] for key in wanted & held.keys()}])
    return {key: prompt for prompts in sent for key, prompt in prompts.items() if key in lost}


def _unpacked(rows: dict, device: torch.device, prompts: dict[str, EncodedPrompt]) -> Batch:
    batch = Batch({name: value.to(device) if torch.is_tensor(value) else value for name, value in rows.items()})
    if PROMPTS_KEY in batch:
        batch[PROMPTS_KEY] = [prompts[key] for key in batch[PROMPTS_KEY]]
    return batch


def even_parts(rows: int, parts: int) -> list[int]:
    """Return sizes of `parts` parts of some rows that differ by one at most, the larger ones first."""
    size, rest = divmod(rows, parts)
    return [size + (i < rest) for i in range(parts)]


def owners(rows_per_rank: Sequence[int]) -> list[int]:
    """
    Return the rank that trains on each row, when rows are shared out so that ranks differ by one row at most.

    Args:
        rows_per_rank: rows that each rank generated and kept. Rows are numbered over the ranks, rank by rank.

    Returns:
        `list[int]`: a rank per row, ascending, so that rows stay where they are as far as possible.
    """
    shares = even_parts(sum(rows_per_rank), len(rows_per_rank))
    return [rank for rank, share in enumerate(shares) for _ in range(share)]


def share_out(
    batch: Batch,
    rows_per_rank: Sequence[int],
    rank: int,
    exchange: Exchange,
    pad_token_id: int,
) -> Batch:
    """
    Move rows between ranks until these differ by one row at most; see [`owners`].

    Args:
        batch: this rank's rows.
        exchange: given the rows for each other rank, returns the rows that each rank sent to this one. A collective call,
            made on all ranks where any row moves.
    """
    owner = owners(rows_per_rank)
    if owner == [source for source, count in enumerate(rows_per_rank) for _ in range(count)]:
        return batch
    start = sum(rows_per_rank[:rank])
    own = owner[start : start + rows_per_rank[rank]]
    rows_for = {to: batch.take([i for i, other in enumerate(own) if other == to]) for to in {rank, *own}}
    received = exchange({to: rows for to, rows in rows_for.items() if to != rank})
    pieces = [rows_for[rank] if source == rank else rows for source, rows in enumerate(received)]
    return Batch.concat([rows for rows in pieces if rows is not None], pad_token_id)


def micro_batches(
    batch: Batch,
    rows_per_rank: Sequence[int],
    steps: int,
    slots: int,
    largest: int,
    padding_row: Batch,
    group: int = 1,
) -> list[Batch]:
    """
    Split a rank's rows over optimizer steps, and those of a step over as few micro-batches as all ranks can.

    All ranks run the same micro-batches of the same size, since their passes wait for each other and their metrics are
    gathered: where a rank is a row short, the padding row stands in. Micro-batches that no rank needs are empty and cost
    nothing. Empty ones come first: the gradients of the ranks are averaged in the last.

    Args:
        batch: this rank's rows, in the order in which to train on them.
        rows_per_rank: rows of each rank, which differ by one at most.
        steps: optimizer steps on the rollout.
        slots: micro-batches of an optimizer step.
        largest: most rows of a micro-batch.
        padding_row: one row that adds nothing to the loss, as wide as the batch.
        group: rows of a prompt, which stay in one micro-batch where a step begins with a whole group and `largest` is a
            multiple.

    Returns:
        `list[Batch]` of length `steps * slots`.
    """
    own = even_parts(batch.rows, steps)
    busiest = even_parts(max(rows_per_rank), steps)
    chunks = []
    for part, most in zip(batch.split(own), busiest, strict=True):
        widths = _widths(most, largest, group)
        chunks += [padding_row.take([])] * (slots - len(widths))
        sizes = [*widths[:-1], widths[-1] - most + part.rows] if widths else []
        for chunk, width in zip(part.split(sizes), widths, strict=True):
            chunks.append(Batch.concat([chunk] + [padding_row] * (width - chunk.rows), pad_token_id=0))
    return chunks


def _widths(rows: int, largest: int, group: int) -> list[int]:
    """
    Return the sizes of as few micro-batches as hold some rows, as equal as whole groups allow.

    The last one has what is left of a group.
    """
    if not rows:
        return []
    unit = 1 if largest % group else group
    groups = -(-rows // unit)
    widths = [unit * size for size in even_parts(groups, -(-rows // largest))]
    return [*widths[:-1], widths[-1] - groups * unit + rows]
