import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.algorithms.aggregation import AGGREGATIONS, row_coefficients, stratum_totals


MAX_LENGTH = 8
STRATA = 4
row = st.tuples(
    st.integers(0, STRATA - 1),
    st.lists(st.floats(-5, 5, width=32), max_size=MAX_LENGTH),
)
rows = st.lists(row, min_size=1, max_size=12)
weights = st.one_of(st.none(), st.dictionaries(st.integers(0, STRATA - 1), st.floats(0, 2)))


def naive_loss(rows, weights, aggregation):
    """The weighted sum of the strata's means, written out."""
    total = 0.0
    for stratum in {stratum for stratum, _ in rows}:
        losses = [tokens for s, tokens in rows if s == stratum]
        if aggregation == "token":
            mean = sum(sum(tokens) for tokens in losses) / max(sum(len(tokens) for tokens in losses), 1)
        elif aggregation == "sample":
            mean = sum(sum(tokens) / max(len(tokens), 1) for tokens in losses) / len(losses)
        else:
            mean = sum(sum(tokens) for tokens in losses) / (len(losses) * MAX_LENGTH)
        total += (weights or {}).get(stratum, 1.0) * mean
    return total


def columns(rows):
    lengths = torch.tensor([len(tokens) for _, tokens in rows], dtype=torch.long)
    return lengths, torch.tensor([stratum for stratum, _ in rows], dtype=torch.long)


def summed_loss(rows, coefficients):
    return sum(c * sum(tokens) for c, (_, tokens) in zip(coefficients.tolist(), rows, strict=True))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(rows=rows, weights=weights)
def test_coefficients_make_a_sum_the_loss(aggregation, rows, weights):
    coefficients = row_coefficients(*columns(rows), weights, aggregation, MAX_LENGTH)
    assert coefficients.dtype == torch.float32 and coefficients.isfinite().all()
    expected = naive_loss(rows, weights, aggregation)
    assert summed_loss(rows, coefficients) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(data=st.data(), rows=rows, weights=weights)
def test_any_split_adds_up_to_the_loss_of_the_whole(aggregation, data, rows, weights):
    parts = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    split = [[r for r, p in zip(rows, parts, strict=True) if p == part] for part in range(4)]
    totals = sum(stratum_totals(*columns(part), STRATA) for part in split)
    loss = 0.0
    for part in split:
        loss += summed_loss(part, row_coefficients(*columns(part), weights, aggregation, MAX_LENGTH, totals))
    assert loss == pytest.approx(naive_loss(rows, weights, aggregation), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_of_a_split_batch_are_those_of_the_whole(aggregation):
    torch.manual_seed(0)
    lengths, strata = torch.tensor([3, 0, 5, 1, 2, 8]), torch.tensor([0, 0, 0, 2, 2, 3])
    features, policy = torch.randn(6, MAX_LENGTH, 3), torch.randn(3, requires_grad=True)
    mask = torch.arange(MAX_LENGTH) < lengths[:, None]
    weights = {0: 0.25, 2: 2.0}

    def row_sums(rows):
        return ((features[rows] @ policy).tanh() * mask[rows]).sum(1)

    means = []
    for stratum in (0, 2, 3):
        rows = strata == stratum
        if aggregation == "token":
            mean = row_sums(rows).sum() / lengths[rows].sum()
        elif aggregation == "sample":
            mean = (row_sums(rows) / lengths[rows].clamp(min=1)).mean()
        else:
            mean = (row_sums(rows) / MAX_LENGTH).mean()
        means.append(weights.get(stratum, 1.0) * mean)
    (whole,) = torch.autograd.grad(sum(means), policy)

    def gradient(totals):
        result = torch.zeros(3)
        for rows in (torch.tensor([0, 3, 5]), torch.tensor([1]), torch.tensor([2, 4])):
            c = row_coefficients(lengths[rows], strata[rows], weights, aggregation, MAX_LENGTH, totals)
            result += torch.autograd.grad((c * row_sums(rows)).sum(), policy)[0]
        return result

    torch.testing.assert_close(gradient(stratum_totals(lengths, strata, 4)), whole)
    # Without the totals of the batch, each share is averaged on its own: another gradient.
    assert not torch.allclose(gradient(None), whole, rtol=1e-2)


def test_worked_numbers():
    lengths, strata = torch.tensor([2, 4, 0, 5]), torch.tensor([1, 1, 1, 0])

    def coefficients(aggregation):
        return row_coefficients(lengths, strata, {1: 0.5}, aggregation, 10).tolist()

    assert coefficients("token") == pytest.approx([0.5 / 6, 0.5 / 6, 0.5 / 6, 1 / 5])
    assert coefficients("sample") == pytest.approx([0.5 / 6, 0.5 / 12, 0.5 / 3, 1 / 5])
    assert coefficients("prompt") == pytest.approx([0.5 / 30, 0.5 / 30, 0.5 / 30, 1 / 10])


@given(rows=rows)
def test_totals_count_rows_and_tokens(rows):
    totals = stratum_totals(*columns(rows), STRATA)
    assert totals.dtype == torch.int64
    for stratum in range(STRATA):
        lengths = [len(tokens) for s, tokens in rows if s == stratum]
        assert totals[stratum].tolist() == [len(lengths), sum(lengths)]


def test_summed_floating_point_totals_and_small_integers_do():
    lengths, strata = torch.tensor([2, 3]), torch.tensor([0, 1])
    expected = row_coefficients(lengths, strata, None, "token", MAX_LENGTH)
    totals = stratum_totals(lengths, strata, 2).float()
    assert torch.equal(row_coefficients(lengths.int(), strata.int(), {}, "token", MAX_LENGTH, totals), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_rows(aggregation):
    none = torch.zeros(0, dtype=torch.long)
    assert row_coefficients(none, none, None, aggregation, MAX_LENGTH).shape == (0,)
    assert row_coefficients(none, none, None, aggregation, MAX_LENGTH, torch.ones(2, 2)).shape == (0,)
    assert stratum_totals(none, none, 2).tolist() == [[0, 0], [0, 0]]


def test_errors_name_what_is_wrong():
    lengths, strata = torch.tensor([2, 3]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="Unknown loss aggregation 'mean'; choose one of token, sample, prompt"):
        row_coefficients(lengths, strata, None, "mean", MAX_LENGTH)
    with pytest.raises(ValueError, match="max_length must be at least 1 token, got 0"):
        row_coefficients(lengths, strata, None, "prompt", 0)
    with pytest.raises(ValueError, match="weight of stratum 1 must not be negative, got -0.5"):
        row_coefficients(lengths, strata, {1: -0.5}, "token", MAX_LENGTH)
    with pytest.raises(ValueError, match="weight of stratum 0 must not be negative, got nan"):
        row_coefficients(lengths, strata, {0: float("nan")}, "token", MAX_LENGTH)
    with pytest.raises(ValueError, match="more than the totals"):
        row_coefficients(lengths, strata, None, "token", MAX_LENGTH, torch.tensor([[1, 2], [1, 2]]))
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\)"):
        row_coefficients(lengths, strata[:1], None, "token", MAX_LENGTH, torch.ones(2, 2))
    with pytest.raises(ValueError, match="Lengths must not be negative"):
        stratum_totals(torch.tensor([-1]), torch.tensor([0]), 1)
    with pytest.raises(ValueError, match=r"Strata must be from 0 to 0, got \[0, 1\]"):
        stratum_totals(lengths, strata, 1)
