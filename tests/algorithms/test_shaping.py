import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.algorithms.shaping import SHAPES, tas_weights


masks = st.integers(0, 9).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=5)
)
lambdas = st.floats(0, 3)


def naive_weights(mask, lam, shape):
    """Token by token, in Python's floats."""
    result = []
    for row in mask:
        length = sum(row)
        t, weights = 0, []
        for counts in row:
            if not counts:
                weights.append(0.0)
                continue
            if length == 1:
                weights.append(1.0)
            else:
                x = t / (length - 1)
                weights.append(
                    {
                        "parabolic": 1 + lam * (2 * x - 1) ** 2,
                        "uniform": 1.0,
                        "linear_decay": 1 + lam * (1 - x),
                        "linear_incline": 1 + lam * x,
                        "inverse_parabolic": 1 + lam * (1 - (2 * x - 1) ** 2),
                    }[shape]
                )
            t += 1
        result.append(weights)
    return result


def tensor_of(mask, dtype=torch.bool):
    return torch.tensor(mask, dtype=dtype).reshape(len(mask), len(mask[0]))


@pytest.mark.parametrize("shape", SHAPES)
@given(mask=masks, lam=lambdas)
def test_equals_the_formula(shape, mask, lam):
    weights = tas_weights(tensor_of(mask), lam, shape)
    assert weights.dtype == torch.float32 and weights.shape == (len(mask), len(mask[0]))
    expected = torch.tensor(naive_weights(mask, lam, shape), dtype=torch.float32).reshape(weights.shape)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("parabolic", [1.5, 1.125, 1.0, 1.125, 1.5]),
        ("uniform", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear_decay", [1.5, 1.375, 1.25, 1.125, 1.0]),
        ("linear_incline", [1.0, 1.125, 1.25, 1.375, 1.5]),
        ("inverse_parabolic", [1.0, 1.375, 1.5, 1.375, 1.0]),
    ],
)
def test_worked_numbers(shape, expected):
    assert tas_weights(torch.ones(1, 5), 0.5, shape).tolist() == [expected]


def test_two_tokens_are_the_first_and_the_last():
    assert tas_weights(torch.ones(1, 2), 0.5).tolist() == [[1.5, 1.5]]
    assert tas_weights(torch.ones(1, 2), 0.5, "linear_decay").tolist() == [[1.5, 1.0]]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_token_weighs_one(shape):
    mask = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert tas_weights(mask, 100.0, shape).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("shape", SHAPES)
@given(mask=masks)
def test_lambda_zero_is_the_mask(shape, mask):
    assert torch.equal(tas_weights(tensor_of(mask), 0.0, shape), tensor_of(mask).float())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_any_kind(dtype):
    mask = [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert torch.equal(tas_weights(tensor_of(mask, dtype), 0.5), tas_weights(tensor_of(mask), 0.5))


@pytest.mark.parametrize("shape", SHAPES)
@given(mask=masks, lam=lambdas)
def test_a_row_knows_nothing_of_the_others_nor_of_its_padding(shape, mask, lam):
    together = tas_weights(tensor_of(mask), lam, shape)
    for row, weights in zip(mask, together, strict=True):
        kept = [place for place, counts in enumerate(row) if counts]
        alone = tas_weights(torch.ones(1, len(kept)), lam, shape)[0]
        assert torch.equal(weights[kept], alone)


@given(length=st.integers(2, 40), lam=lambdas)
def test_shapes_mirror_each_other(length, lam):
    weights = {shape: tas_weights(torch.ones(1, length), lam, shape)[0] for shape in SHAPES}
    torch.testing.assert_close(weights["parabolic"], weights["parabolic"].flip(0))
    torch.testing.assert_close(weights["linear_decay"], weights["linear_incline"].flip(0))
    flat = torch.full((length,), 2 + lam)
    torch.testing.assert_close(weights["parabolic"] + weights["inverse_parabolic"], flat)
    torch.testing.assert_close(weights["linear_decay"] + weights["linear_incline"], flat)
    for shape, values in weights.items():
        assert values.min() >= 1 - 1e-6 and values.max() <= 1 + lam + 1e-5, shape


def test_masked_tokens_between_others_take_no_place():
    """Places counted over all tokens would weigh these differently."""
    mask = torch.tensor([[1, 0, 0, 1, 1, 0]])
    assert tas_weights(mask, 0.5).tolist() == [[1.5, 0, 0, 1.0, 1.5, 0]]
    assert tas_weights(torch.ones(1, 6), 0.5)[0, 3] != 1.0


def test_long_rows_keep_their_precision():
    length = 20_001
    weights = tas_weights(torch.ones(1, length), 0.5)[0]
    assert weights[0] == weights[-1] == 1.5 and weights[length // 2] == 1.0


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="Unknown shape 'round'; choose one of parabolic, uniform, linear_decay"):
        tas_weights(torch.ones(1, 3), 0.5, "round")
    with pytest.raises(ValueError, match=r"shape \(rows, tokens\), got shape \(3,\)"):
        tas_weights(torch.ones(3), 0.5)
    for lam in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"lambda must be a finite number of at least 0, got {lam}"):
            tas_weights(torch.ones(1, 3), lam)
