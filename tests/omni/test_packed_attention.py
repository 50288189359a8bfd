"""Attention over packed rows is that of an explicit mask, with each of the kernels that can compute it."""

import logging
import random
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_mixed_batches import rows_of
from test_shared_prefix import (
    BOUND,
    LIMITS,
    apart,
    assert_equal,
    backward,
    build,
    encode,
    gradient_error,
    mixed_batch,
    together,
)
from test_shared_training import from_disk, one_row_per_tag, trained
from tiny_models import FAMILIES, QWEN, build_tiny, save_tiny
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from maple_trl.omni.encoded import Blocks
from maple_trl.omni.loading import load_model
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.prefix import packed_attention
from maple_trl.omni.prefix.packed_attention import (
    PackedAttention,
    PackedLayout,
    install,
    packed_flash,
    packed_flex,
    packed_sdpa,
)
from maple_trl.omni.prefix.sharing import Comparison
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media
from maple_trl.trainers.omni_grpo import prompt_sharing


pytestmark = pytest.mark.slow

BOTH_WAYS = ("gemma4_both_ways", "gemma4_moe", "gemma4_unified")

LAYOUTS = {
    "one of each": ((5, (3,)),),
    "equal lengths": ((6, (4, 4, 4)),),
    "ragged": ((6, (1, 5, 2)),),
    "no prefix": ((0, (2, 3)),),
    "no prefix, one": ((0, (4,)),),
    "single tokens": ((1, (1, 1, 1, 1)),),
    "several groups": ((3, (2, 1)), (0, (1,)), (7, (5,)), (2, (4, 4)), (5, (1, 6, 3))),
}


# What FlashAttention says that its functions compute, for the machines that cannot run them


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    from_end=True,
):
    """
    Sequences one after the other, (total, heads, D). "If causal, the causal mask is aligned to the bottom right corner of
    the attention matrix"; query heads come in groups, one for each key head. With a window "query at position i will only
    attend to keys between [i + seqlen_k - seqlen_q - window_size[0], i + seqlen_k - seqlen_q + window_size[1]] inclusive".
    """
    assert int(cu_seqlens_q[-1]) == len(q) and int(cu_seqlens_k[-1]) == len(k) == len(v)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(cu_seqlens_k.diff().max()) == max_seqlen_k
    outputs = []
    for query, key, value in zip(
        q.split(cu_seqlens_q.diff().tolist()),
        k.split(cu_seqlens_k.diff().tolist()),
        v.split(cu_seqlens_k.diff().tolist()),
        strict=True,
    ):
        seen = torch.ones(len(query), len(key), dtype=torch.bool)
        offset = len(key) - len(query) if from_end else 0
        if causal:
            seen = seen.tril(offset)
        if window_size[0] >= 0:
            seen = seen.triu(offset - window_size[0])
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, seen, scale=softmax_scale, enable_gqa=True)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """The same for a batch of equal lengths, (B, length, heads, D)."""
    ends = [torch.arange(0, len(x) * x.size(1) + 1, x.size(1), dtype=torch.int32) for x in (q, k)]
    rows = [states.flatten(0, 1) for states in (q, k, v)]
    found = flash_attn_varlen_func(*rows, *ends, q.size(1), k.size(1), softmax_scale, causal, window_size)
    return found.unflatten(0, q.shape[:2])


def windows_from_the_first_key(q, k, *args, window_size=(-1, -1), **kwargs):
    """Of the causal mask alone this is right."""
    if window_size[0] < 0:
        return flash_attn_varlen_func(q, k, *args, **kwargs)
    return flash_attn_varlen_func(q, k, *args, window_size=window_size, from_end=len(q) == len(k), **kwargs)


@pytest.fixture
def flash(monkeypatch):
    """Puts functions where transformers finds FlashAttention's."""

    def put(varlen=flash_attn_varlen_func):
        functions = (flash_attn_func, varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
        process = flash_utils._lazy_define_process_function(flash_attn_varlen_func)
        monkeypatch.setattr(
            flash_utils, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, (process, None))
        )

    put()
    return put


def with_attention(model, implementation):
    parts = [getattr(model.config, name, None) for name in ("vision_config", "audio_config")]
    own = [(part, part._attn_implementation) for part in parts if part is not None]
    model.config.get_text_config()._attn_implementation = implementation
    for part, before in own:  # which follow where that is the whole
        part._attn_implementation = before
    return model


# The attention by itself


def explicit_mask(layout, window=None):
    """Who sees whom, from the definition: token by token."""
    tokens = []  # (group, completion or None, place in the row alone, its block or None)
    for group, (prefix, suffixes) in enumerate(layout.groups):
        blocks = layout.blocks[group] if layout.blocks else None
        applied = blocks.spans if blocks is not None and (blocks.everywhere or window is not None) else ()
        for place in range(prefix):
            tokens.append((group, None, place, next((s for s in applied if s[0] <= place < s[1]), None)))
        for i, size in enumerate(suffixes):
            tokens += [(group, i, prefix + place, None) for place in range(size)]
    everywhere = any(blocks.everywhere for blocks in layout.blocks if blocks is not None)

    def sees(one, other):
        if other[0] != one[0] or other[1] not in (None, one[1]):
            return False
        same = one[3] is not None and one[3] == other[3]
        near = window is None or other[2] > one[2] - window
        if everywhere:
            return same or (other[2] <= one[2] and near)
        return (same or other[2] <= one[2]) and near

    return torch.tensor([[sees(one, other) for other in tokens] for one in tokens])


def drawn(layout, heads, key_heads, width=8, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, n, len(layout), width, generator=generator) for n in (heads, key_heads, key_heads)]
    weight = torch.randn(1, len(layout), heads, width, generator=generator)
    return [x.to(device, dtype).requires_grad_() for x in states], weight.to(device, dtype)


def expected_of(layout, states, scaling, window=None):
    """By way of all scores."""
    query, key, value = states
    keys, values = (x.repeat_interleave(query.size(1) // key.size(1), dim=1) for x in (key, value))
    mask = explicit_mask(layout, window).to(query.device)
    scores = (query @ keys.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


class Layer(torch.nn.Linear):
    """What FlashAttention's interface asks a layer for."""

    is_causal = True

    def __init__(self, implementation):
        super().__init__(1, 1)
        self.config = type("Config", (), {"_attn_implementation": implementation})


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("name", ["sdpa", "masked sdpa", "flash_attention_2", "flex_attention"])
@pytest.mark.matrix(cases=12)
def test_the_attention_is_that_of_an_explicit_mask(name, groups, heads, key_heads, flash, monkeypatch):
    layout = PackedLayout(groups)
    states, weight = drawn(layout, heads, key_heads)
    expected = expected_of(layout, states, 0.3)
    if name == "masked sdpa":
        monkeypatch.setattr(packed_attention, "can_split", lambda *states: False)
    packed = {"flash_attention_2": packed_flash, "flex_attention": packed_flex}.get(name, packed_sdpa)
    attention = PackedAttention(flash_attention_forward if "flash" in name else None, packed)
    given = [x.detach() for x in states] if name == "flex_attention" else states  # which has no backward on CPUs
    found, none = attention(Layer(name), *given, None, scaling=0.3, shared_prefix=layout)
    assert none is None and found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    if name != "flex_attention":
        gradients = torch.autograd.grad((found * weight).sum(), states)
        for a, b in zip(gradients, torch.autograd.grad((expected * weight).sum(), states), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


PICTURES = {
    "none": ((None,) * 5, LAYOUTS["several groups"]),
    "in windows": (
        (Blocks(((0, 2),)), None, Blocks(((1, 4), (4, 7))), None, Blocks(((0, 4),))),
        LAYOUTS["several groups"],
    ),
    "everywhere": ((Blocks(((0, 5), (7, 9)), True), Blocks(((2, 8),), True)), ((9, (2, 5)), (11, (3,)))),
}


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("name", ["sdpa", "masked sdpa", "flash_attention_2", "flex_attention"])
@pytest.mark.matrix(cases=20)
def test_windows_and_pictures_are_those_of_an_explicit_mask(
    name, pictures, window, heads, key_heads, flash, monkeypatch
):
    """Windows that end in the completion, at its beginning, in the prompt, and beyond."""
    blocks, groups = PICTURES[pictures]
    layout = PackedLayout(groups, blocks)
    states, weight = drawn(layout, heads, key_heads)
    expected = expected_of(layout, states, 0.3, window)
    if name == "masked sdpa":
        monkeypatch.setattr(packed_attention, "can_split", lambda *states: False)
    packed = {"flash_attention_2": packed_flash, "flex_attention": packed_flex}.get(name, packed_sdpa)
    attention = PackedAttention(flash_attention_forward if "flash" in name else None, packed)
    given = [x.detach() for x in states] if name == "flex_attention" else states
    options = {"scaling": 0.3, "shared_prefix": layout, "sliding_window": window}
    if "flash" in name and any(layout.blocks_in(window)):
        with pytest.raises(ValueError, match="FlashAttention knows no tokens that see each other both ways"):
            attention(Layer(name), *given, None, **options)
        return
    found, _ = attention(Layer(name), *given, None, **options)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    if name != "flex_attention":
        gradients = torch.autograd.grad((found * weight).sum(), states)
        for a, b in zip(gradients, torch.autograd.grad((expected * weight).sum(), states), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    wider = expected_of(layout, states, 0.3, None if window is None else window + 1)  # and by one more it is not
    assert window in (None, 100) or (found - wider).abs().max() > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (28, 4)])
@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention"])
def test_the_kernels_of_gpus(name, heads, key_heads):
    if "flash" in name and not flash_utils.is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    for groups in (*LAYOUTS.values(), ((700, (130, 64, 1, 99)), (257, (33,)))):
        layout = PackedLayout(groups)
        states, weight = drawn(layout, heads, key_heads, 64, "cuda", torch.bfloat16)
        exact = [x.detach().double().requires_grad_() for x in states]
        expected = expected_of(layout, exact, 0.125)
        expected_gradients = torch.autograd.grad((expected * weight).sum(), exact)
        model = type("Model", (), {"config": Layer(name).config})
        model.config.get_text_config = lambda model=model: model.config
        assert install(model)
        attention = ALL_ATTENTION_FUNCTIONS[name]
        found, _ = attention(Layer(name).cuda().bfloat16(), *states, None, scaling=0.125, shared_prefix=layout)
        gradients = torch.autograd.grad((found * weight).sum(), states)
        for a, b in zip((found, *gradients), (expected, *expected_gradients), strict=True):
            assert (a - b).norm() <= 0.02 * b.norm(), (name, groups)


@pytest.mark.long
@pytest.mark.parametrize(
    "backend",
    [
        "eager",  # traced as for GPUs, and run without machine code, which takes a minute to make
        pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")),
    ],
)
def test_flex_attention_compiled(backend, monkeypatch):
    """As for GPUs; further layouts are not compiled anew."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = partial(packed_attention._compiled, device="another")
    monkeypatch.setattr(packed_attention, "_compiled", lambda function, device: compiled(function))
    graphs = []
    for seed in range(8):
        draw = random.Random(seed)
        groups = [(draw.randint(100, 200), [draw.randint(5, 40) for _ in range(draw.randint(1, 4))]) for _ in range(2)]
        layout = PackedLayout(tuple((prefix, tuple(suffixes)) for prefix, suffixes in groups))
        states = [x.detach() for x in drawn(layout, 4, 2, 16, dtype=torch.float32)[0]]
        with torch.no_grad():
            found, _ = packed_flex(None, None, *states, layout, scaling=0.3)
        torch.testing.assert_close(found, expected_of(layout, states, 0.3), atol=1e-5, rtol=0)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[-1], graphs


def flex_by_definition(query, key, value, block_mask, scale, enable_gqa):
    """What FlexAttention computes, with gradients, which PyTorch has none of on CPUs."""
    places = torch.arange(query.size(2))
    mask = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


@pytest.mark.long
def test_training_computes_packed_rows_with_flex_attention_where_asked(seven_tags, tmp_path, monkeypatch):
    """Of a model that transformers loads with sdpa alone."""
    folder, dataset = seven_tags
    rows, prepare = one_row_per_tag(dataset), from_disk(tmp_path)
    options = {"beta": 0.1, "packed_attention": "flex_attention"}
    with pytest.raises(
        ValueError, match="cannot be shared: FlexAttention has no backward pass on CPUs: train on a GPU"
    ):
        trained(folder, rows, tmp_path, "on", **options, **prepare())
    calls = []
    monkeypatch.setattr(
        packed_attention, "flex_attention", lambda *a, **k: calls.append(1) or flex_by_definition(*a, **k)
    )
    monkeypatch.setattr(prompt_sharing, "why_not_trained", lambda *args: None)
    shared, weights = trained(folder, rows, tmp_path / "flex", "on", **options, **prepare())
    assert shared.packed > 0 and shared.plain == 0
    # The comparison, the reference's passes and the loss: a call per layer, and of no other attention.
    layers = shared.model.config.get_text_config().num_hidden_layers
    assert len(calls) == layers * (1 + shared.packed)
    _, expected = trained(folder, rows, tmp_path / "sdpa", "off", beta=0.1, **prepare())
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", [*QWEN, "video_llama_3"])
def test_a_model_that_transformers_does_not_load_with_flex_attention(name, tmp_path):
    """All of Qwen's so far, and what is built on them; where that changes, the README has to as well."""
    path = str(save_tiny(name, tmp_path / "model"))
    with pytest.raises(
        ValueError, match="not with attn_implementation='flex_attention'.*packed_attention='flex_attent"
    ):
        load_model(path, attn_implementation="flex_attention")


def test_flex_attention_refuses_dropout():
    """As transformers does, instead of going on without it."""
    layout = PackedLayout(LAYOUTS["ragged"])
    with pytest.raises(ValueError, match=r"no attention dropout, which the model's configuration sets to 0\.1"):
        packed_flex(None, None, *drawn(layout, 4, 2)[0], layout, dropout=0.1)


def test_other_devices_mask_without_repeating_keys(monkeypatch):
    """Hardly a kernel of GPUs takes a mask together with fewer key heads; `meta` stands for a device without kernels."""
    calls = []
    original = F.scaled_dot_product_attention

    def attend(query, key, value, **options):
        masked = options.get("attn_mask") is not None
        calls.append((query.size(1), key.size(1), masked, options.get("enable_gqa", False)))
        return original(query, key, value, **options)

    monkeypatch.setattr(packed_attention.F, "scaled_dot_product_attention", attend)
    layout = PackedLayout(((6, (1, 5, 2)),))
    states = [torch.empty(1, heads, len(layout), 8, device="meta") for heads in (4, 2, 2)]
    found, _ = packed_sdpa(None, torch.nn.Module(), *states, layout)
    assert found.shape == (1, len(layout), 4, 8)
    assert sorted(calls) == [(2, 2, True, False), (4, 2, False, True)]


# Two calls, merged

RAGGED = PackedLayout(tuple((90 + n, (20 + n, 3, 33, 8 * n + 1)) for n in range(4)))


def drawn_in_order(layout, dtype=torch.float32):
    """As a model makes them: the heads of a token lie together."""
    states, weight = drawn(layout, 8, 2, 16, dtype=dtype)
    return [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in states], weight


def passed(layout, states, weight):
    found, _ = packed_sdpa(None, torch.nn.Module(), *states, layout)
    return found, *torch.autograd.grad((found * weight).sum(), states)


def largest_error(found, expected):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def test_merged_calls_give_what_one_with_a_mask_gives(monkeypatch):
    states, weight = drawn_in_order(RAGGED)
    split = passed(RAGGED, states, weight)
    monkeypatch.setattr(packed_attention, "can_split", lambda *states: False)
    assert 0 < largest_error(split, passed(RAGGED, states, weight)) < 1e-6  # two ways of computing, not one


@pytest.mark.parametrize("name, wrong", [("logaddexp", torch.maximum), ("sigmoid", torch.tanh)])
def test_a_wrong_merge_is_noticed(name, wrong, monkeypatch):
    """The first alone is what gradients depend on."""
    states, weight = drawn_in_order(RAGGED)
    right = passed(RAGGED, states, weight)
    monkeypatch.setattr(torch, name, wrong)
    found = passed(RAGGED, states, weight)
    assert largest_error(found[1:], right[1:]) > 1e-2
    assert (largest_error(found[:1], right[:1]) > 1e-2) == (name == "sigmoid")


@pytest.mark.parametrize("split", [True, False])
def test_dropout_and_autocast_are_those_of_pytorch(split, monkeypatch):
    if not split:
        monkeypatch.setattr(packed_attention, "can_split", lambda *states: False)
    states, weight = drawn_in_order(RAGGED)
    with torch.autocast("cpu", torch.bfloat16):
        found = passed(RAGGED, states, weight)
    assert found[0].dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in found[1:])
    assert largest_error([x.float() for x in found], passed(RAGGED, states, weight)) < 0.02
    torch.manual_seed(0)
    dropped, _ = packed_sdpa(None, torch.nn.Module(), *states, RAGGED, dropout=0.5)
    kept, _ = packed_sdpa(None, torch.nn.Module(), *states, RAGGED)
    assert largest_error([dropped], [kept]) > 0.1


class Operations(TorchDispatchMode):
    """Counts what is launched on a GPU, and notes the largest tensor that is made."""

    views = ("view", "slice", "transpose", "expand", "select", "unsqueeze", "squeeze", "split", "t", "alias", "detach")

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.overloadpacket.__name__.lstrip("_").startswith((*self.views, "empty", "reshape_alias")):
            self.count += 1
            made = result if isinstance(result, tuple | list) else [result]
            self.largest = max([self.largest, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return result


def operations(groups, split=True):
    layout = PackedLayout(groups)
    states, weight = drawn_in_order(layout)
    with pytest.MonkeyPatch.context() as patch:
        if not split:
            patch.setattr(packed_attention, "can_split", lambda *states: False)
        with Operations() as counted:
            passed(layout, states, weight)
    return counted.count, counted.largest / states[0].numel()


def test_completions_of_unequal_lengths_launch_no_kernels_of_their_own():
    def ragged(groups, completions, **options):
        return operations(((80, tuple(range(5, 5 + completions))),) * groups, **options)[0]

    assert ragged(2, 4) == ragged(2, 16)
    assert ragged(6, 4) - ragged(2, 4) <= 4 * 10  # per group, forwards and backwards
    assert ragged(6, 4) < ragged(6, 4, split=False) / 1.5


def test_nothing_grows_with_keys_times_completions():
    """Neither a prompt's keys nor a mask are repeated: nothing is larger than the queries."""
    groups = ((400, (4,) * 32),)
    assert operations(groups)[1] == 1
    assert operations(groups, split=False)[1] > 5


def test_the_calls_of_gpus_fit_their_kernels(monkeypatch):
    """By their signatures, for `meta` stands for a GPU: names, order, and shapes that come back."""
    monkeypatch.setattr(packed_attention, "can_split", lambda *states: True)
    layout = PackedLayout(LAYOUTS["several groups"])
    states = [torch.empty(1, n, len(layout), 64, device="meta", dtype=torch.bfloat16) for n in (8, 2, 2)]
    states = [x.requires_grad_() for x in states]
    found, *gradients = passed(layout, states, torch.empty(1, len(layout), 8, 64, device="meta"))
    assert found.shape == (1, len(layout), 8, 64) and found.dtype == torch.bfloat16
    assert [x.shape for x in gradients] == [x.shape for x in states]


# In a model


def compare(name, implementation, folder, rows, checkpointing=False, gradients=True):
    """Of packed rows with an implementation against rows apart with sdpa: errors of values, and of gradients."""
    plain, _, family = build(name)
    batch = mixed_batch(encode(family, folder, rows))
    model, _, family = build(name, lambda model, _: with_attention(model, implementation))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert install(model)
    with torch.set_grad_enabled(gradients):
        expected, found = apart(plain, family, batch), together(model, family, batch)
    errors = [float(((a - b).detach().abs() * batch.mask).max()) for a, b in zip(expected, found, strict=True)]
    if not gradients:
        return errors, None
    return errors, gradient_error(backward(plain, batch, expected[0]), backward(model, batch, found[0]))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in BOTH_WAYS])
@pytest.mark.matrix(cases=4)
def test_flash_attention_gives_the_numbers_of_the_rows_apart(name, checkpointing, seven_tags, flash):
    folder, dataset = seven_tags
    assert_equal(*compare(name, "flash_attention_2", folder, rows_of(name, dataset), checkpointing))


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_flash_attention_is_not_asked_for_what_it_does_not_know(name):
    model = with_attention(build_tiny(name)[0], "flash_attention_2")
    assert not install(model)
    assert install(with_attention(model, "sdpa")) and install(with_attention(model, "flex_attention"))


def test_a_window_that_begins_at_the_first_key_is_noticed(seven_tags, flash):
    folder, dataset = seven_tags
    flash(windows_from_the_first_key)
    errors, gradients = compare("gemma4", "flash_attention_2", folder, rows_of("gemma4", dataset))
    assert min(errors) > 1e-2 and gradients[0] > 1e-2


def test_a_mask_that_begins_at_the_first_key_is_noticed(seven_tags, flash):
    """As of versions of FlashAttention before 2.1."""
    folder, dataset = seven_tags
    flash(partial(flash_attn_varlen_func, from_end=False))
    errors, gradients = compare("qwen2_5_omni", "flash_attention_2", folder, rows_of("qwen2_5_omni", dataset))
    assert min(errors) > 1e-2 and gradients[0] > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.matrix(cases=2)
def test_flex_attention_gives_the_numbers_of_the_rows_apart(name, seven_tags):
    folder, dataset = seven_tags
    errors, _ = compare(name, "flex_attention", folder, rows_of(name, dataset), gradients=False)
    assert max(errors) <= BOUND


def test_a_kernel_that_was_loaded_again_is_adapted_again(seven_tags, flash):
    """As transformers loads those of the Hub, for each model that asks for one."""
    folder, dataset = seven_tags
    model, _, family = build("qwen2_5_omni", lambda model, _: with_attention(model, "flash_attention_2"))
    assert install(model)
    batch = mixed_batch(encode(family, folder, rows_of("qwen2_5_omni", dataset)))
    with torch.no_grad():
        before = together(model, family, batch)[0]
        ALL_ATTENTION_FUNCTIONS.register("flash_attention_2", flash_attention_forward)
        assert torch.equal(together(model, family, batch)[0], before)


def test_kernels_of_the_hub_are_loaded_before_they_are_adapted(seven_tags, flash, monkeypatch):
    """transformers puts its own function into the table as it loads one, which a model with another one makes it do again."""
    folder, dataset = seven_tags
    name, given = "some/flash-attn", flash_utils.lazy_import_flash_attention
    loaded = []

    def load(implementation, *args, **kwargs):
        if loaded != [implementation]:
            loaded[:] = [implementation]
            if "/" in implementation:
                ALL_ATTENTION_FUNCTIONS.register(implementation, flash_attention_forward)
        return given(implementation)

    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", load)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash_attention_forward)
    model, _, family = build("qwen2_5_omni", lambda model, _: with_attention(model, name))
    assert install(model) and loaded == [name]
    batch = mixed_batch(encode(family, folder, rows_of("qwen2_5_omni", dataset)))
    plain, _, family = build("qwen2_5_omni")
    with torch.no_grad():
        expected = apart(plain, family, batch)[0]
        for _ in range(2):
            found = together(model, family, batch)[0]
            assert float(((found - expected).abs() * batch.mask).max()) <= BOUND
            load("flash_attention_2")  # by another model


def test_attention_that_was_changed_since_is_refused(seven_tags):
    """Of other attentions most would ignore where the prompts are."""
    folder, dataset = seven_tags
    model, _, family = build("qwen2_5_omni")
    assert install(model)
    batch = mixed_batch(encode(family, folder, rows_of("qwen2_5_omni", dataset)))
    with_attention(model, "eager")
    with pytest.raises(
        RuntimeError, match="The attention 'eager', set since prompts began to be shared, cannot read packed"
    ):
        together(model, family, batch)


def test_attention_that_cannot_be_shared_is_left_alone():
    for name in FAMILIES:
        model, _ = build_tiny(name)
        text = model.config.get_text_config()
        text._attn_implementation = "eager"
        assert not install(model)
        text._attn_implementation = "sdpa"
        text.layer_types = ["chunked_attention", "full_attention"]
        assert not install(model)


# In training


def with_flash(prepare):
    parts = prepare()
    with_attention(parts["model"], "flash_attention_2")
    return parts


def test_training_with_flash_attention(seven_tags, tmp_path, flash):
    """Rollouts, comparison and updates; the weights are those of sdpa."""
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    prepare = from_disk(tmp_path)
    shared, weights = trained(folder, rows, tmp_path / "flash", "on", **with_flash(prepare))
    assert shared.packed > 0 and shared.plain == 0
    _, expected = trained(folder, rows, tmp_path / "sdpa", "off", **prepare())
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_training_falls_back_from_kernels_that_differ(seven_tags, tmp_path, flash, caplog):
    folder, dataset = seven_tags
    flash(partial(flash_attn_varlen_func, from_end=False))
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        auto, _ = trained(folder, one_row_per_tag(dataset), tmp_path, "auto", **with_flash(from_disk(tmp_path)))
    assert auto.packed == 0 and "times as much as rounding explains" in caplog.text


def test_training_goes_on_without_sharing_where_a_kernel_refuses(seven_tags, tmp_path, flash, caplog):
    folder, dataset = seven_tags
    rows, prepare = one_row_per_tag(dataset), from_disk(tmp_path)

    def refuses(q, k, *args, max_seqlen_q, **kwargs):
        if len(q) != len(k) and max_seqlen_q > 1:  # else it decodes
            raise RuntimeError("no kernel for these lengths\nand much more")
        return flash_attn_varlen_func(q, k, *args, max_seqlen_q=max_seqlen_q, **kwargs)

    flash(refuses)
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        auto, weights = trained(folder, rows, tmp_path, "auto", **with_flash(prepare))
    [warning] = [r.getMessage() for r in caplog.records if "shared_prefix" in r.getMessage()]
    assert auto.packed == 0 and warning.endswith("ended with RuntimeError: no kernel for these lengths")
    with pytest.raises(
        ValueError, match="shared_prefix='on', but prompts cannot be shared: comparing both ways ended"
    ):
        trained(folder, rows, tmp_path, "on", **with_flash(prepare))
    _, plain = trained(folder, rows, tmp_path, "off", **with_flash(prepare))
    assert all(torch.equal(value, weights[name]) for name, value in plain.items())


def test_windows_longer_than_the_compared_prompt_are_compared(seven_tags, flash):
    """As of published models: a kernel whose windows begin at the first key would not show otherwise."""
    folder, _ = seven_tags
    flash(windows_from_the_first_key)
    model, _, family = build("gemma4", lambda model, _: with_attention(model, "flash_attention_2"))
    assert install(model)
    windows = [one for one in (model.config.get_text_config(), *model.modules()) if hasattr(one, "sliding_window")]
    windows = [one for one in windows if one.sliding_window is not None]
    for one in windows:
        one.sliding_window = 512
    prompt = PromptBuilder(family, MediaLoader(folder, LIMITS)).probe()
    assert len(prompt) < 512 and len(windows) == 3
    comparison = Comparison(model, family.core(model), prompt, partial(serve_media, family), family.suppressed_ids)
    assert comparison.difference() > comparison.least_tolerance
    assert {one.sliding_window for one in windows} == {512}
    flash()
    assert comparison.difference() < comparison.least_tolerance
