import math
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from maple_trl.algorithms.gradients import GradientMoments, GradientSample
from maple_trl.modalities import ModalityTag


tags = st.sampled_from([None, ModalityTag.V, ModalityTag.VAS])
observations = st.lists(st.tuples(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), tags), max_size=12)


def naive_variance(vectors, window):
    """Weighted squared distances from the weighted mean, with the correction for its use."""
    weights = [(1 - 1 / window) ** (len(vectors) - 1 - i) for i in range(len(vectors))]
    total = sum(weights)
    mean = [sum(w * v[k] for w, v in zip(weights, vectors, strict=True)) / total for k in range(len(vectors[0]))]
    distances = [sum((x - m) ** 2 for x, m in zip(v, mean, strict=True)) for v in vectors]
    spread = sum(w * d for w, d in zip(weights, distances, strict=True)) / total
    return spread / (1 - sum(w**2 for w in weights) / total**2), math.sqrt(sum(m**2 for m in mean))


def observed(observations, window):
    moments = GradientMoments(window)
    for vector, tag in observations:
        moments.observe(torch.tensor(vector), tag)
    return moments


@given(observations=observations, window=st.sampled_from([1.5, 4, 100, math.inf]))
def test_moments_equal_the_formula(observations, window):
    expected = {}
    for name in ("all", "V", "VAS"):
        chosen = [vector for vector, tag in observations if name in ("all", tag)]
        if len(chosen) >= 2:
            variance, norm = naive_variance(chosen, window)
            expected |= {f"tag/{name}/grad_variance": variance, f"tag/{name}/grad_mean_norm": norm}
    metrics = observed(observations, window).metrics()
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert all(value >= 0 for value in metrics.values())


def test_an_endless_window_gives_the_sample_variance():
    torch.manual_seed(0)
    vectors = torch.randn(9, 5, dtype=torch.float64)
    metrics = observed([(v.tolist(), "AS") for v in vectors.float()], math.inf).metrics()
    assert metrics["tag/AS/grad_variance"] == pytest.approx(vectors.var(0).sum().item(), rel=1e-6)
    assert metrics["tag/AS/grad_variance"] != pytest.approx(vectors.var(0, unbiased=False).sum().item(), rel=1e-2)
    assert metrics["tag/all/grad_mean_norm"] == pytest.approx(vectors.mean(0).norm().item(), rel=1e-6)


def test_the_estimate_is_unbiased_for_short_windows():
    """Vectors of variance 5 (five coordinates of variance 1): the mean estimate over many runs is 5."""
    torch.manual_seed(0)
    corrected, plain = [], []
    for _ in range(800):
        moments = GradientMoments(window=3)
        for vector in torch.randn(8, 5):
            moments.observe(vector)
        corrected.append(moments.metrics()["tag/all/grad_variance"])
        weight, squared_weight, _ = moments.state_dict()["all.scalars"].tolist()
        plain.append(corrected[-1] * (1 - squared_weight / weight**2))
    assert sum(corrected) / 800 == pytest.approx(5, rel=0.05)
    assert sum(plain) / 800 < 4.5


@given(vector=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=4), count=st.integers(2, 20))
def test_equal_vectors_have_no_variance(vector, count):
    metrics = observed([(vector, None)] * count, 7).metrics()
    assert 0 <= metrics["tag/all/grad_variance"] <= 1e-7 * (1 + sum(x**2 for x in vector))


def test_one_observation_says_nothing():
    moments = observed([([1.0, 2.0], "V")], 10)
    assert moments.metrics() == {}
    moments.observe(torch.ones(2), "A")
    assert set(moments.metrics()) == {"tag/all/grad_variance", "tag/all/grad_mean_norm"}


def test_vectors_that_are_not_finite_are_passed_over():
    moments = observed([([1.0], None), ([math.nan], None), ([math.inf], None), ([3.0], None)], math.inf)
    assert moments.metrics()["tag/all/grad_variance"] == pytest.approx(2.0)


@given(before=observations, after=observations)
def test_saved_moments_go_on_alike(before, after):
    original, restored = observed(before, 5), GradientMoments(5)
    restored.load_state_dict(load(save(original.state_dict())))
    assert restored.metrics() == original.metrics()
    for vector, tag in after:
        original.observe(torch.tensor(vector), tag)
        restored.observe(torch.tensor(vector), tag)
        assert restored.metrics() == original.metrics()


def test_forgetting_the_state_is_noticed():
    before, after = [([1.0, 0.0], "V"), ([2.0, 5.0], "V")], [([4.0, 0.0], "V"), ([0.0, 1.0], "V")]
    assert observed(before + after, 5).metrics() != observed(after, 5).metrics()


def test_moments_keep_their_own_copy():
    vector, moments = torch.ones(2), GradientMoments(5)
    moments.observe(vector)
    state = moments.state_dict()
    restored = GradientMoments(5)
    restored.load_state_dict(state)
    vector.fill_(9)
    for tensor in state.values():
        tensor.fill_(9)
    for kept in (moments, restored):
        kept.observe(torch.ones(2))
        assert kept.metrics()["tag/all/grad_mean_norm"] == pytest.approx(math.sqrt(2))


def test_moments_errors_name_what_is_wrong():
    for window in (1, 0.5, math.nan):
        with pytest.raises(ValueError, match=f"more than 1 step, got {window}"):
            GradientMoments(window)
    moments = observed([([1.0, 2.0], None)], 5)
    with pytest.raises(ValueError, match=r"shape \(2,\) as before, got \(3,\)"):
        moments.observe(torch.ones(3))
    with pytest.raises(ValueError, match="'X' is not a modality tag"):
        moments.observe(torch.ones(2), "X")


def parameters(*shapes, grad=True):
    """Parameters whose gradients number all coordinates from 1."""
    result, start = [], 1
    for i, shape in enumerate(shapes):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        numbers = torch.arange(start, start + parameter.numel(), dtype=torch.float32).reshape(shape)
        parameter.grad = numbers if grad else None
        start += parameter.numel()
        result.append((f"layer.{i}.weight", parameter))
    return result


shapes = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=5)


@given(shapes=shapes, count=st.integers(1, 40), seed=st.integers(0, 5))
def test_sample_reads_distinct_coordinates(shapes, count, seed):
    named = parameters(*shapes)
    total = sum(p.numel() for _, p in named)
    if not total:
        with pytest.raises(ValueError, match="no trainable parameter"):
            GradientSample(named, count, seed)
        return
    sample = GradientSample(named, count, seed)
    values = sample()
    assert sample.total == total and sample.count == len(values) == min(count, total)
    assert values.dtype == torch.float32 and not values.requires_grad
    numbers = (values / math.sqrt(total / len(values))).round().int().tolist()
    assert len(set(numbers)) == len(numbers) and set(numbers) <= set(range(1, total + 1))
    assert torch.equal(GradientSample(named, count, seed)(), values)


def test_every_coordinate_is_as_likely():
    named = parameters((2, 3), (1,), (5,))
    counts = [0] * 13
    for seed in range(1200):
        for value in (GradientSample(named, 3, seed)() / 2).round().int().tolist():
            counts[value] += 1
    assert counts[0] == 0 and all(230 < c < 370 for c in counts[1:])


def test_squared_norms_estimate_those_of_the_whole():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(400))
    parameter.grad = torch.randn(400)
    norms = [GradientSample([("w", parameter)], 40, seed)().square().sum().item() for seed in range(300)]
    whole = parameter.grad.square().sum().item()
    assert sum(norms) / 300 == pytest.approx(whole, rel=0.05)
    assert sum(norms) / 300 / 10 != pytest.approx(whole, rel=0.5)
    everything = GradientSample([("w", parameter)], 1000, 0)()
    assert torch.equal(everything, parameter.grad)


def test_reads_the_current_gradient():
    named = parameters((2, 2), (2,), grad=False)
    sample = GradientSample(named, 6, 0)
    assert sample().tolist() == [0.0] * 6
    (named[0][1].sum() * 3).backward()
    before = sample()
    assert before.tolist() == [3.0] * 4 + [0.0] * 2
    named[0][1].grad.zero_()
    assert before.sum() == 12 and sample().sum() == 0
    named[1][1].grad = torch.ones(2)
    assert sample().tolist() == [0.0] * 4 + [1.0] * 2


def test_other_layouts_and_types_of_gradients():
    parameter = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    parameter.grad = torch.arange(6).to(torch.bfloat16).reshape(2, 3).t()
    values = GradientSample([("w", parameter)], 6, 0)()
    assert values.dtype == torch.float32 and values.tolist() == [0, 3, 1, 4, 2, 5]


def test_pattern_and_frozen_parameters():
    named = parameters((4,), (4,), (4,))
    named[2][1].requires_grad_(False)
    assert GradientSample(named, 99, 0)().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert GradientSample(named, 99, 0, pattern=r"\.1\.")().tolist() == [5, 6, 7, 8]
    with pytest.raises(
        ValueError, match=r"'lora' matches none of the 2 trainable parameters, such as 'layer.0.weight'"
    ):
        GradientSample(named, 2, 0, pattern="lora")
    with pytest.raises(ValueError, match="matches none"):
        GradientSample(named, 2, 0, pattern=r"layer\.2")
    with pytest.raises(ValueError, match="no trainable parameter"):
        GradientSample(named[2:], 2, 0)
    with pytest.raises(ValueError, match="At least 1 coordinate must be read, got 0"):
        GradientSample(named, 0, 0)


def test_a_huge_model_costs_no_more_than_the_sample():
    """Two billion coordinates, on a device that stores none."""
    named = [(str(i), torch.nn.Parameter(torch.empty(500_000_000, device="meta"))) for i in range(4)]
    tracemalloc.start()
    sample = GradientSample(named, 1000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample.total == 2_000_000_000 and peak < 2_000_000
