import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.algorithms.difficulty import bernoulli_kl, beta_histogram_kl, tag_difficulty, values_by_tag
from maple_trl.modalities import ModalityTag


# Multiples of 1/1000 off the borders of the 50 bins, so that no reference has to decide on rounding.
off_border = st.integers(0, 999).filter(lambda i: i % 20).map(lambda i: i / 1000)


def naive_histogram_kl(rewards, bins=50, eps=1e-10):
    width = 1 / bins
    total = 0.0
    for b in range(bins):
        low, high = b * width, (b + 1) * width
        inside = [r for r in rewards if low <= r < high or (b == bins - 1 and r == 1)]
        p = len(inside) / len(rewards) / width
        q = 100 * ((low + high) / 2) ** 99
        total += p * math.log((p + eps) / (q + eps)) * width
    return total


@pytest.mark.parametrize(("p", "kl"), [(0.25, 2.9014928), (0.5, 1.6193882), (0.75, 0.5989077), (0.9, 0.1453844)])
def test_worked_numbers_of_binary_rewards(p, kl):
    assert bernoulli_kl(p) == pytest.approx(kl, abs=5e-8)
    rewards = [1.0] * round(p * 20) + [0.0] * round((1 - p) * 20)
    assert tag_difficulty(rewards, "binary") == pytest.approx(kl, abs=5e-8)


def test_the_target_has_no_divergence_from_itself():
    assert bernoulli_kl(100 / 101) == 0
    assert bernoulli_kl(0.5, target=0.5) == 0
    # The divergence has a direction: the other one is another number.
    reverse = 100 / 101 * math.log(100 / 101 / 0.5) + 1 / 101 * math.log(1 / 101 / 0.5)
    assert bernoulli_kl(0.5) != pytest.approx(reverse, rel=0.1)


def test_the_ends_are_finite():
    assert bernoulli_kl(0.0) == pytest.approx(math.log(101), abs=1e-4)
    assert bernoulli_kl(1.0) == pytest.approx(math.log(101 / 100), abs=1e-4)
    assert bernoulli_kl(0.0, eps=1e-3) == bernoulli_kl(1e-3)


@given(p=st.floats(0, 1), q=st.floats(0, 1))
def test_harder_tags_are_farther_from_the_target(p, q):
    low, high = sorted((p, q))
    if high <= 100 / 101:
        assert bernoulli_kl(low) >= bernoulli_kl(high) >= 0


@given(st.lists(st.one_of(off_border, st.just(1.0)), min_size=1, max_size=30))
def test_histogram_equals_the_formula(rewards):
    expected = naive_histogram_kl(rewards)
    assert beta_histogram_kl(rewards) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert tag_difficulty(torch.tensor(rewards), "continuous") == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_worked_numbers_of_continuous_rewards():
    # All mass in the last bin: density 50 against 100 * 0.99^99.
    assert beta_histogram_kl([1.0] * 4) == pytest.approx(math.log(50 / (100 * 0.99**99)), abs=1e-8)
    # At the low end the target underflows, and eps alone sets the value.
    assert beta_histogram_kl([0.0]) == pytest.approx(math.log(50 / 1e-10), abs=1e-8)
    assert beta_histogram_kl([0.0], eps=1e-4) == pytest.approx(math.log(50 / 1e-4), abs=1e-5)


def test_borders_count_to_the_upper_bin():
    for i in range(50):
        inside = (i + 0.5) / 50
        for dtype in (torch.float32, torch.float64):
            assert beta_histogram_kl(torch.tensor([i / 50], dtype=dtype)) == beta_histogram_kl([inside])
    assert beta_histogram_kl([1.0]) == beta_histogram_kl([0.99])
    assert beta_histogram_kl([0.96]) != beta_histogram_kl([0.95])


@given(rewards=st.lists(st.sampled_from([0.0, 1.0]), min_size=1), unscored=st.integers(0, 5), data=st.data())
def test_unscored_completions_are_left_out(rewards, unscored, data):
    mixed = data.draw(st.permutations(rewards + [math.nan] * unscored))
    for kind in ("binary", "continuous"):
        assert tag_difficulty(mixed, kind) == tag_difficulty(rewards, kind)


def test_binary_counts_only_rewards_of_one():
    assert tag_difficulty([1.0, 0.9, 0.5, 0.0], "binary") == bernoulli_kl(0.25)
    assert tag_difficulty([1.0, 0.9, 0.5, 0.0], "continuous") != tag_difficulty([1.0, 0.0, 0.0, 0.0], "continuous")


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_nothing_scored(kind):
    assert tag_difficulty([], kind) is None
    assert tag_difficulty([math.nan, math.nan], kind) is None


@pytest.mark.parametrize("kind", ["binary", "continuous"])
@pytest.mark.parametrize("value", [-0.5, 1.5, math.inf])
def test_rewards_out_of_range_are_named(kind, value):
    with pytest.raises(ValueError, match=rf"rewards in \[0, 1\], got {value}; let `task_reward` name"):
        tag_difficulty([0.0, value, math.nan], kind)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="Unknown difficulty 'beta'; choose one of binary, continuous"):
        tag_difficulty([1.0], "beta")
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got nan"):
        bernoulli_kl(math.nan)
    with pytest.raises(ValueError, match="histogram of no rewards"):
        beta_histogram_kl([])
    with pytest.raises(ValueError, match="got nan"):
        beta_histogram_kl([math.nan])


def test_values_by_tag_are_canonical():
    assert list(values_by_tag({"SAV": 1, "sv": 0.5, ModalityTag.A: 2.0}).items()) == [
        (ModalityTag.A, 2.0),
        (ModalityTag.VS, 0.5),
        (ModalityTag.VAS, 1.0),
    ]
    with pytest.raises(ValueError, match="Tag VS is given twice"):
        values_by_tag({"VS": 1.0, "sv": 1.0})
    with pytest.raises(ValueError, match="value of tag A must be finite, got nan"):
        values_by_tag({"A": math.nan})
    with pytest.raises(ValueError, match="'all' is not a modality tag"):
        values_by_tag({"all": 0.5})
