"""From the kept rows of a rollout to micro-batches: every row once, the same work on all ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer

from maple_trl.trainers.common.batch import PROMPTS_KEY, Batch
from maple_trl.trainers.common.updates import even_parts, micro_batches, owners


BALLAST = -1


def rows_of(numbers):
    """A batch that is nothing but numbered rows, with a list and a value of the whole batch beside them."""
    numbers = list(numbers)
    return Batch(
        row=torch.tensor(numbers, dtype=torch.long),
        wide=torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1).repeat(1, 3),
        name=[f"row {number}" for number in numbers],
        tokens=torch.tensor(7),
    )


def numbers(chunk):
    found = chunk["row"].tolist()
    assert chunk["name"] == [f"row {number}" for number in found]
    assert chunk["wide"].tolist() == [[number] * 3 for number in found] and chunk["tokens"] == 7
    return found


# Shares


@given(st.integers(0, 200), st.integers(1, 20))
def test_even_parts_differ_by_one_at_most_and_the_larger_come_first(rows, parts):
    sizes = even_parts(rows, parts)
    assert len(sizes) == parts and sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_owners_share_rows_out_evenly_and_in_order(rows_per_rank):
    owner = owners(rows_per_rank)
    world, total = len(rows_per_rank), sum(rows_per_rank)
    assert owner == sorted(owner) and len(owner) == total
    assert [owner.count(rank) for rank in range(world)] == [
        total // world + (rank < total % world) for rank in range(world)
    ]
    even = [total // world + (rank < total % world) for rank in range(world)]
    if rows_per_rank == even:  # nothing moves where nothing has to
        assert owner == [rank for rank, count in enumerate(rows_per_rank) for _ in range(count)]


def test_owners_of_a_worked_case():
    assert owners([6, 0, 1]) == [0, 0, 0, 1, 1, 2, 2]


# Prompts


@st.composite
def mixtures(draw):
    """Groups of fresh completions and single replayed ones, shuffled; and how many optimizer steps they make."""
    steps, size, groups = draw(st.integers(1, 4)), draw(st.integers(2, 4)), draw(st.integers(1, 4))
    singles = draw(st.integers(0, 3)) * steps
    names = [g for g in range(groups * steps) for _ in range(size)] + [-1 - i for i in range(singles)]
    return steps, size, draw(st.permutations(names))


def of_prompts(names):
    prompts = {name: object() for name in names}
    batch = rows_of(range(len(names)))
    batch[PROMPTS_KEY] = [prompts[name] for name in names]
    return batch, {id(prompt): name for name, prompt in prompts.items()}


@given(mixtures())
def test_each_step_has_its_share_of_the_groups_and_of_the_single_rows(mixture):
    steps, size, names = mixture
    batch, known = of_prompts(names)
    own = len(names) // steps
    for parts, whole in ((batch.regroup([own] * steps), True), (batch.regroup(), False)):
        assert sorted(parts["row"].tolist()) == list(range(len(names))), "every row once"
        order = [known[id(prompt)] for prompt in parts.prompts]
        assert [names[i] for i in parts["row"].tolist()] == order
        singles = [sum(name < 0 for name in order[i : i + own]) for i in range(0, len(order), own)]
        if whole:
            assert len(set(singles)) == 1
            for i in range(0, len(order), own):
                fresh = [name for name in order[i : i + own] if name >= 0]
                assert fresh == [name for name in dict.fromkeys(fresh) for _ in range(size)], "groups are whole"
        elif singles[0] or any(singles):  # the control: single rows are the last
            assert order == sorted(order, key=lambda name: name < 0)


# Micro-batches


@st.composite
def splits(draw):
    world, steps, slots = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    largest = draw(st.integers(1, 5))
    total = draw(st.integers(0, world * steps * slots * largest))
    return even_parts(total, world), steps, slots, largest, draw(st.integers(1, 4))


@given(splits())
def test_micro_batches_of_all_ranks(split):
    rows_per_rank, steps, slots, largest, group = split
    ranks, start = [], 0
    for count in rows_per_rank:
        batch = rows_of(range(start, start + count))
        chunks = micro_batches(batch, rows_per_rank, steps, slots, largest, rows_of([BALLAST]), group)
        assert len(chunks) == steps * slots
        ranks.append([numbers(chunk) for chunk in chunks])
        start += count
    for count, chunks in zip(rows_per_rank, ranks, strict=True):
        real = [row for chunk in chunks for row in chunk if row != BALLAST]
        first = real[0] if real else 0
        assert real == list(range(first, first + count)), "every row once, in order"
        assert all(len(chunk) <= largest for chunk in chunks)
        per_step = [[c for c in chunks[i : i + slots] if c] for i in range(0, steps * slots, slots)]
        sizes = [sum(row != BALLAST for chunk in step for row in chunk) for step in per_step]
        assert sizes == even_parts(count, steps)
    assert sorted(row for chunks in ranks for chunk in chunks for row in chunk if row != BALLAST) == list(range(start))
    for slot in range(steps * slots):
        assert len({len(chunks[slot]) for chunks in ranks}) == 1, "all ranks run the same micro-batches"
        full = [BALLAST not in chunks[slot] for chunks in ranks]
        assert any(full), "ballast stands only beside rows of another rank"
    for step in range(0, steps * slots, slots):
        for chunks in ranks:
            used = [bool(chunk) for chunk in chunks[step : step + slots]]
            assert used == sorted(used), "empty ones come first"
        most = max(sum(row != BALLAST for chunk in chunks[step : step + slots] for row in chunk) for chunks in ranks)
        assert sum(bool(chunk) for chunk in ranks[0][step : step + slots]) == -(-most // largest), "as few as can be"


@given(st.integers(1, 4), st.integers(0, 40), st.integers(1, 4), st.integers(1, 3))
def test_groups_are_not_cut(group, rows, most_groups, world):
    largest = group * most_groups
    chunks = micro_batches(rows_of(range(rows)), [rows] * world, 1, 40, largest, rows_of([BALLAST]), group)
    sizes = [chunk.rows for chunk in chunks if chunk.rows]
    assert len(sizes) == -(-rows // largest) and sum(sizes) == rows and max(sizes, default=0) <= largest
    assert not any(size % group for size in sizes[:-1]), "only the last may have a part of a group"
    groups = [-(-size // group) for size in sizes]
    assert max(groups, default=0) - min(groups, default=0) <= 1


def test_without_the_size_of_groups_they_are_cut():
    """The control: rows as even as they can be."""
    cuts = [micro_batches(rows_of(range(12)), [12], 1, 2, 8, rows_of([BALLAST]), group) for group in (1, 4, 8)]
    assert [[chunk.rows for chunk in chunks] for chunks in cuts] == [[6, 6], [8, 4], [8, 4]]


def test_a_full_batch_needs_no_ballast():
    chunks = micro_batches(rows_of(range(8)), [8, 8], 2, 2, 2, rows_of([BALLAST]))
    assert [numbers(chunk) for chunk in chunks] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_rank_without_a_row_gets_ballast_where_others_have_one():
    first = micro_batches(rows_of([0]), [1, 0], 1, 3, 2, rows_of([BALLAST]))
    second = micro_batches(rows_of([]), [1, 0], 1, 3, 2, rows_of([BALLAST]))
    assert [numbers(chunk) for chunk in first] == [[], [], [0]]
    assert [numbers(chunk) for chunk in second] == [[], [], [BALLAST]]


def test_without_rows_all_micro_batches_are_empty():
    chunks = micro_batches(rows_of([]), [0, 0], 2, 2, 4, rows_of([BALLAST]))
    assert [chunk.rows for chunk in chunks] == [0] * 4
    assert chunks[0]["wide"].shape == (0, 3)


# Joining rounds of different widths


PAD = 99


def round_of(rows, prompt, completion, first):
    ids = torch.arange(first, first + rows * (prompt + completion)).reshape(rows, prompt + completion)
    return Batch(
        prompt_ids=ids[:, :prompt],
        prompt_mask=torch.ones(rows, prompt, dtype=torch.long),
        completion_ids=ids[:, prompt:],
        completion_mask=torch.ones(rows, completion, dtype=torch.long),
        old_per_token_logps=-ids[:, prompt:].float(),
        advantages=torch.arange(rows) + 0.5,
        omni_prompts=[f"prompt {first + i}" for i in range(rows)],
        num_items_in_batch=torch.tensor(first),
        absent=None,
    )


shapes = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


@given(shapes)
def test_rounds_are_padded_as_trl_pads(shapes):
    rounds = [round_of(*shape, first=1000 * (i + 1)) for i, shape in enumerate(shapes)]
    joined = Batch.concat(rounds, PAD)
    width = {"prompt": max(p for _, p, _ in shapes), "completion": max(c for _, _, c in shapes)}
    i = 0
    for part in rounds:
        for row in range(part.rows):
            for side in ("prompt", "completion"):
                own = part[f"{side}_ids"][row].tolist()
                missing = width[side] - len(own)
                left, right = (missing, 0) if side == "prompt" else (0, missing)
                assert joined[f"{side}_ids"][i].tolist() == [PAD] * left + own + [PAD] * right
                assert joined[f"{side}_mask"][i].tolist() == [0] * left + [1] * len(own) + [0] * right
            logps = part["old_per_token_logps"][row].tolist()
            assert joined["old_per_token_logps"][i].tolist() == logps + [0.0] * (width["completion"] - len(logps))
            assert joined["advantages"][i] == part["advantages"][row]
            assert joined["omni_prompts"][i] == part["omni_prompts"][row]
            i += 1
    assert joined.rows == i
    assert joined["num_items_in_batch"] == 1000 and joined["absent"] is None
    for name, value in rounds[0].items():
        if isinstance(value, torch.Tensor):
            assert joined[name].dtype == value.dtype


def test_a_row_weighs_the_same_in_a_sequence_loss_beside_a_wider_round():
    """TRL adds up logarithms of the ratios of all tokens, padding among them."""

    def phi(batch):
        ratios, mask = batch["importance_sampling_ratio"], batch["completion_mask"]
        return GRPOTrainer.get_gamma_weights(
            batch["advantages"][:, None], torch.zeros_like(ratios), mask, ratios
        ).flatten()

    rounds = [round_of(2, 3, width, 1000 * width) for width in (4, 6)]
    for part in rounds:
        part["importance_sampling_ratio"] = torch.rand(part["completion_ids"].shape) / 5 + 0.9
    before = torch.cat([phi(part) for part in rounds])
    assert torch.allclose(phi(Batch.concat(rounds, PAD)), before) and before.min() > 0.1
    of_rows = [Batch(part, importance_sampling_ratio=torch.full((2, 1), 0.9)) for part in rounds]
    assert Batch.concat(of_rows, PAD)["importance_sampling_ratio"].tolist() == [[pytest.approx(0.9)]] * 4


def test_one_round_stays_as_it_is():
    part = round_of(2, 3, 4, 10)
    joined = Batch.concat([part], PAD)
    assert all(
        torch.equal(joined[name], value) if isinstance(value, torch.Tensor) else joined[name] == value
        for name, value in part.items()
    )


@pytest.mark.parametrize("name", ["prompt_ids", "completion_ids"])
def test_padding_on_the_other_side_would_be_noticed(name):
    """The control: what the property above checks is not true of the other side."""
    joined = Batch.concat([round_of(1, 1, 1, 1), round_of(1, 3, 3, 100)], PAD)[name][0].tolist()
    assert joined != joined[::-1] and joined.count(PAD) == 2
