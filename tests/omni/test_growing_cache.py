"""A growing layer holds what transformers' own would, whatever is done to it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from maple_trl.omni.prefix.growing_cache import RESERVE, GrowingLayer


HEADS, WIDTH, PROMPTS = 2, 3, 3


def states(generator, rows, tokens):
    return [torch.randn(rows, HEADS, tokens, WIDTH, generator=generator) for _ in range(2)]


def filled(generator, tokens):
    layer = DynamicLayer()
    layer.update(*states(generator, PROMPTS, tokens))
    return layer


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.sampled_from([1, 2, RESERVE - 1, RESERVE, RESERVE + 1, 2 * RESERVE])),
        st.tuples(st.just("crop"), st.integers(-4, 0)),
        st.tuples(st.just("reorder_cache"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("batch_select_indices"), st.lists(st.integers(0, 1), min_size=2, max_size=4)),
    ),
    max_size=6,
)


@given(
    tokens=st.integers(5, 40),
    rows=st.lists(st.integers(0, PROMPTS - 1), min_size=2, max_size=6),
    operations=OPERATIONS,
)
def test_it_holds_what_transformers_layer_holds(tokens, rows, operations):
    generator = torch.Generator().manual_seed(0)
    layer = filled(generator, tokens)
    rows = torch.tensor(rows)
    growing = GrowingLayer(layer, rows)
    layer.batch_select_indices(rows)
    for name, value in operations:
        if name == "update":
            new = states(generator, len(layer.keys), value)
            for one, other in zip(layer.update(*new), growing.update(*new), strict=True):
                assert torch.equal(one, other)
        else:
            value = value if name == "crop" else torch.tensor(value)
            getattr(layer, name)(value)
            getattr(growing, name)(value)
        assert torch.equal(layer.keys, growing.keys) and torch.equal(layer.values, growing.values)
        assert layer.get_seq_length() == growing.get_seq_length()
        assert layer.get_mask_sizes(1) == growing.get_mask_sizes(1)


@pytest.mark.parametrize("kind", ["growing", "transformers"])
def test_what_is_held_stays_where_it_is(kind):
    generator = torch.Generator().manual_seed(0)
    layer = filled(generator, 7)
    if kind == "growing":
        layer = GrowingLayer(layer, torch.arange(PROMPTS))
    moved = 0
    for _ in range(2 * RESERVE):
        before = layer.keys.data_ptr()
        layer.update(*states(generator, PROMPTS, 1))
        moved += layer.keys.data_ptr() != before
    assert moved == 1 if kind == "growing" else moved > RESERVE
