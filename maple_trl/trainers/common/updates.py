"""How the rows of a rollout become the micro-batches of its optimizer steps, when some were dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from maple_trl.trainers.common.checkpoint import Batch, concat_rows, count_rows, split_rows, take_rows


def even_parts(rows: int, parts: int) -> list[int]:
    """Sizes of `parts` parts of some rows that differ by one at most, the larger ones first."""
    size, rest = divmod(rows, parts)
    return [size + (i < rest) for i in range(parts)]


def owners(rows_per_rank: Sequence[int]) -> list[int]:
    """
    The rank that trains on each row, when rows are shared out again so that no rank has more than one more than another.

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
    exchange: Callable[[dict[int, Batch]], list[Batch | None]],
    pad_token_id: int,
) -> Batch:
    """
    Moves rows between ranks until none has more than one more than another; see [`owners`].

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
    rows_for = {to: take_rows(batch, [i for i, other in enumerate(own) if other == to]) for to in {rank, *own}}
    received = exchange({to: rows for to, rows in rows_for.items() if to != rank})
    pieces = [rows_for[rank] if source == rank else rows for source, rows in enumerate(received)]
    return concat_rows([rows for rows in pieces if rows is not None], pad_token_id)


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
    Splits a rank's rows over optimizer steps, and those of a step over as few micro-batches as every rank can.

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
    own = even_parts(count_rows(batch), steps)
    busiest = even_parts(max(rows_per_rank), steps)
    chunks = []
    for part, most in zip(split_rows(batch, own), busiest, strict=True):
        widths = _widths(most, largest, group)
        chunks += [take_rows(padding_row, [])] * (slots - len(widths))
        sizes = [*widths[:-1], widths[-1] - most + count_rows(part)] if widths else []
        for chunk, width in zip(split_rows(part, sizes), widths, strict=True):
            chunks.append(concat_rows([chunk] + [padding_row] * (width - count_rows(chunk)), pad_token_id=0))
    return chunks


def _widths(rows: int, largest: int, group: int) -> list[int]:
    """Rows of as few micro-batches as hold them, as equal as whole groups allow; the last one has what is left of a group."""
    if not rows:
        return []
    unit = 1 if largest % group else group
    groups = -(-rows // unit)
    widths = [unit * size for size in even_parts(groups, -(-rows // largest))]
    return [*widths[:-1], widths[-1] - groups * unit + rows]
