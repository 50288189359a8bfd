"""Completions packed behind one copy of their prompt have the log-probabilities and gradients that they have apart."""

import dataclasses
import random
import re

import pytest
import torch
import torch.nn.functional as F
from test_mixed_batches import rows_of
from tiny_models import FAMILIES, build_tiny, decoder, towers_of
from trl.trainer.utils import add_fused_lm_head

from maple_trl.omni.encoded import batch_position_ids
from maple_trl.omni.families import family_for
from maple_trl.omni.lora import build_lora_config, freeze
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prefix import packed_attention
from maple_trl.omni.prefix.packed_attention import install
from maple_trl.omni.prefix.shared_prefix import pack, packed_forward
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media


LIMITS = MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096)
OMNI = ("qwen2_5_omni", "qwen3_omni")
WIDTH = 7
BOUND = 1e-5
UNROTATED = re.compile(r"audio_tower|audio_embed|img_processor")
CHECKPOINTING = {"none": None, "reentrant": True, "not reentrant": False}


def build(family_name, prepare=None):
    """A model in training mode with TRL's fused head, as the trainer makes it."""
    model, processor = build_tiny(family_name)
    family = family_for(model, processor)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if prepare is not None:
        model = prepare(model, family)
    return model.train(), processor, family


def encode(family, folder, rows):
    builder = PromptBuilder(family, MediaLoader(folder, LIMITS))
    return [builder.encode(row) for row in rows]


@dataclasses.dataclass
class Batch:
    """Rows as TRL pads them."""

    rows: list
    completions: torch.Tensor
    lengths: list[int]
    advantages: torch.Tensor

    @property
    def mask(self):
        return (torch.arange(self.completions.size(1)) < torch.tensor(self.lengths)[:, None]).long()


def mixed_batch(prompts, seed=0):
    """Groups of one, two and four rows, no two of a group next to each other; lengths from none to all."""
    copies = [4 if i < 2 else 2 if i % 2 else 1 for i in range(len(prompts))]
    rows = [p for turn in range(4) for p, count in zip(prompts, copies, strict=True) if turn < count]
    assert all(a is not b for a, b in zip(rows, rows[1:], strict=False)) or len(prompts) == 1
    draw = random.Random(seed)
    lengths = [draw.randint(0, WIDTH) for _ in rows]
    lengths[:4] = 0, 1, WIDTH, 1
    lengths[-1] = 0
    generator = torch.Generator().manual_seed(seed)
    completions = torch.randint(10, 200, (len(rows), WIDTH), generator=generator)
    return Batch(rows, completions, lengths, torch.randn(len(rows), WIDTH, generator=generator))


def apart(model, family, batch):
    """Log-probabilities and entropies (B, T) from the model's own logits, a prompt per row, padded on the left."""
    width = max(map(len, batch.rows))
    ids = torch.zeros(len(batch.rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(batch.rows):
        ids[i, width - len(row) :] = row.input_ids
        mask[i, width - len(row) :] = 1
    positions = batch_position_ids(batch.rows, width, batch.completions.size(1))
    with serve_media(family, model, batch.rows):
        logits = model(
            input_ids=torch.cat([ids, batch.completions], dim=1),
            attention_mask=torch.cat([mask, batch.mask], dim=1),
            position_ids=positions[0] if positions.size(0) == 1 else positions,
        ).logits[:, width - 1 : -1]
    log_probs = logits.float().log_softmax(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, batch.completions[..., None])[..., 0], entropies


def together(model, family, batch, change=None):
    packed = pack(batch.rows, batch.completions, batch.lengths)
    if change is not None:
        packed = change(packed)
    with serve_media(family, model, packed.prompts, packed=True):
        output = packed_forward(model, family.core(model), packed, tuple(batch.completions.shape))
    return output.log_probs, output.entropy


def backward(model, batch, log_probs):
    """Gradients of a clipped objective's surrogate, of every parameter that is trained."""
    model.zero_grad()
    ratios = torch.exp(log_probs - log_probs.detach()) * batch.advantages + 0.1 * log_probs**2
    (ratios * batch.mask).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(expected, found):
    """The largest relative difference (L2), and where."""
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    largest = max(value.norm() for value in expected.values())
    errors = []
    for name, value in expected.items():
        # Softmax does not see what is added to all keys alike; with rotary positions it is not alike.
        norm = largest if name.endswith("k_proj.bias") and UNROTATED.search(name) else value.norm()
        difference = (found[name] - value).norm()
        assert norm > 0 or difference == 0, name
        errors.append((float(difference / norm) if norm > 0 else 0.0, name))
    return max(errors)


def compare(family_name, folder, rows, prepare=None, checkpointing=None, change=None):
    """Largest error of log-probabilities and of entropies, that of gradients, and the gradients themselves."""
    plain, _, family = build(family_name, prepare)
    batch = mixed_batch(encode(family, folder, rows))
    expected = apart(plain, family, batch)
    expected_gradients = backward(plain, batch, expected[0])

    model, _, family = build(family_name, prepare)
    assert install(family_base(model))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    passes = []
    decoder(family.core(model)).layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    found = together(model, family, batch, change)
    gradients = backward(model, batch, found[0])
    assert len(passes) == (1 if checkpointing is None else 2)  # checkpointing really computes a layer again
    # Measures how far both are apart, where there is a token, and 0 elsewhere.
    errors = [float(((a - b).detach().abs() * batch.mask).max()) for a, b in zip(expected, found, strict=True)]
    assert not (found[0] * (1 - batch.mask)).any()
    return errors, gradient_error(expected_gradients, gradients), expected_gradients


def family_base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def assert_equal(errors, gradients):
    assert max(errors) <= BOUND, errors
    assert gradients[0] <= BOUND, gradients


# The whole batch


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.matrix(cases=3)
def test_log_probs_and_gradients_are_those_of_the_rows_apart(name, checkpointing, seven_tags):
    folder, dataset = seven_tags
    rows = rows_of(name, dataset)
    if name in OMNI:
        assert len({row["tag"] for row in rows}) == 7 and sum(row["audio_in_video"] for row in rows) == 2
    errors, gradients, expected = compare(name, folder, rows, checkpointing=CHECKPOINTING[checkpointing])
    if (name, checkpointing) == ("gemma4", "reentrant"):  # apart too, which is why the family refuses it
        assert max(errors) <= BOUND and gradients[0] > 0.1
        return
    assert_equal(errors, gradients)
    for tower in towers_of(build_tiny(name)[0].base_model):
        if "image_embed" in tower:  # of Phi-4, which reads no video
            continue
        assert any(f"{tower}." in key and value.norm() > 1e-3 for key, value in expected.items())


def one_row(name, dataset, tag, interleaved=False):
    rows = [r for r in rows_of(name, dataset) if r["tag"] == tag and r["audio_in_video"] == interleaved]
    return rows[:1]


@pytest.mark.parametrize("tag", ["S", "V", "A", "VA", "VS", "AS", "VAS", "VA interleaved"])
def test_a_group_alone(tag, seven_tags):
    """A batch of one prompt: towers that it does not read get no gradient either way."""
    folder, dataset = seven_tags
    tag, _, interleaved = tag.partition(" ")
    errors, gradients, _ = compare("qwen2_5_omni", folder, one_row("qwen2_5_omni", dataset, tag, bool(interleaved)))
    assert_equal(errors, gradients)


def adapted(model, family):
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, build_lora_config(model, family, r=4, alpha=8))
    with torch.no_grad():  # B begins at zero, which would leave A without a gradient
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.05)
    return model


def frozen(model, family):
    freeze(model, family, "vision", "audio", "projectors")
    return model


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("prepare", [adapted, frozen])
@pytest.mark.matrix(cases=3)
def test_with_adapters_and_with_frozen_towers(prepare, checkpointing, seven_tags):
    folder, dataset = seven_tags
    rows = rows_of("qwen2_5_omni", dataset)
    errors, gradients, expected = compare("qwen2_5_omni", folder, rows, prepare, CHECKPOINTING[checkpointing])
    assert_equal(errors, gradients)
    assert all("lora_" in name for name in expected) == (prepare is adapted)
    assert any("visual" in name for name in expected) == (prepare is adapted)


@pytest.mark.parametrize("name", OMNI)
def test_bfloat16_errs_no_more_than_apart(name, seven_tags):
    folder, dataset = seven_tags
    exact, _, family = build(name)
    batch = mixed_batch(encode(family, folder, rows_of(name, dataset)))
    with torch.no_grad():
        truth = apart(exact, family, batch)[0]
        plain, _, family = build(name, lambda model, _: model.bfloat16())
        model, _, _ = build(name, lambda model, _: model.bfloat16())
        install(model)
        errors = [
            ((values - truth).abs() * batch.mask).sum() / batch.mask.sum()
            for values in (apart(plain, family, batch)[0], together(model, family, batch)[0].float())
        ]
    assert 1e-4 < errors[1] <= 1.5 * errors[0], errors


def test_without_gradient_the_numbers_are_the_same(seven_tags):
    """As for the old and the reference log-probabilities."""
    folder, dataset = seven_tags
    model, _, family = build("qwen2_5_omni")
    install(model)
    batch = mixed_batch(encode(family, folder, rows_of("qwen2_5_omni", dataset)))
    with_gradient = together(model, family, batch)[0].detach()
    with torch.no_grad():
        assert torch.equal(together(model.eval(), family, batch)[0], with_gradient)


def test_the_order_of_rows_changes_nothing(seven_tags):
    folder, dataset = seven_tags
    model, _, family = build("qwen2_5_omni")
    install(model)
    batch = mixed_batch(encode(family, folder, rows_of("qwen2_5_omni", dataset)))
    order = torch.randperm(len(batch.rows), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = Batch(
        [batch.rows[i] for i in order],
        batch.completions[order],
        [batch.lengths[i] for i in order],
        batch.advantages[order],
    )
    with torch.no_grad():
        expected, found = together(model, family, batch)[0], together(model, family, shuffled)[0]
    torch.testing.assert_close(found, expected[order], atol=BOUND, rtol=0)


def test_the_plain_forward_stays_as_it_was(seven_tags):
    """Bit for bit: generation and evaluation run it after the attention was installed."""
    folder, dataset = seven_tags
    for name in FAMILIES:
        model, _, family = build(name)
        batch = mixed_batch(encode(family, folder, rows_of(name, dataset)))
        with torch.no_grad():
            before = apart(model, family, batch)
            assert install(model) and install(model)
            after = apart(model, family, batch)
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]), name


# Negative controls: what the comparison above must notice


def positions_run_on(packed):
    """Positions count through the packed row, as if completions followed each other."""
    start = int(packed.position_ids.max()) + 1
    positions = packed.position_ids.clone()
    positions[..., packed.suffix] = (start + torch.arange(len(packed.suffix))).to(positions.dtype)
    return dataclasses.replace(packed, position_ids=positions)


def positions_one_late(packed):
    positions = packed.position_ids.clone()
    positions[..., packed.suffix] += 1
    return dataclasses.replace(packed, position_ids=positions)


@pytest.mark.parametrize("change", [positions_run_on, positions_one_late])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.matrix(cases=4)
def test_wrong_positions_are_noticed(name, change, seven_tags):
    folder, dataset = seven_tags
    errors, gradients, _ = compare(name, folder, rows_of(name, dataset), change=change)
    assert min(errors) > 1e-3 and gradients[0] > 1e-3


def without_blocks(packed):
    return dataclasses.replace(packed, layout=dataclasses.replace(packed.layout, blocks=()))


@pytest.mark.parametrize("name", ["gemma4_both_ways", "gemma4_moe", "gemma4_unified"])
@pytest.mark.matrix(cases=2)
def test_pictures_that_are_read_like_text_are_noticed(name, seven_tags):
    folder, dataset = seven_tags
    errors, gradients, _ = compare(name, folder, rows_of(name, dataset), change=without_blocks)
    assert min(errors) > 1e-3 and gradients[0] > 1e-3


@pytest.mark.parametrize("place", ["_alone", "_masked"])
def test_a_window_that_is_left_out_is_noticed(place, seven_tags, monkeypatch):
    """In prompts, and in completions."""
    folder, dataset = seven_tags
    original = getattr(packed_attention, place)

    def unlimited(*args):
        return original(*[None if arg == 12 and isinstance(arg, int) else arg for arg in args])

    monkeypatch.setattr(packed_attention, place, unlimited)
    errors, gradients, _ = compare("gemma4", folder, rows_of("gemma4", dataset))
    assert min(errors) > 1e-3 and gradients[0] > 1e-3


def test_a_prompt_that_ends_with_a_picture_is_refused(seven_tags):
    folder, dataset = seven_tags
    _, _, family = build("gemma4_unified")
    [prompt] = encode(family, folder, [row for row in dataset if row["tag"] == "V"][:1])
    end = prompt.blocks.spans[-1][1]
    cut = dataclasses.replace(prompt, input_ids=prompt.input_ids[:end], position_ids=prompt.position_ids[:, :end])
    pack([prompt], torch.ones(1, 2).long(), [2])
    with pytest.raises(
        ValueError, match="ends with a picture whose tokens see each other both ways.*shared_prefix='off'"
    ):
        pack([cut], torch.ones(1, 2).long(), [2])


def all_causal(groups, scale):
    outputs = []
    for group in groups:
        query, *own = group.states
        key, value = (torch.cat(pair, dim=2) for pair in zip(group.prompt, own, strict=True))
        visible = torch.ones(query.size(2), key.size(2), dtype=torch.bool).tril(key.size(2) - query.size(2))
        options = {"attn_mask": visible, "scale": scale, "enable_gqa": True}
        outputs.append(F.scaled_dot_product_attention(query, key, value, **options))
    return outputs


def blind_to_the_prompt(groups, scale):
    outputs = []
    for group in groups:
        parts = zip(*(states.split(group.sizes, dim=2) for states in group.states), strict=True)
        options = {"is_causal": True, "scale": scale, "enable_gqa": True}
        outputs.append(torch.cat([F.scaled_dot_product_attention(*part, **options) for part in parts], dim=2))
    return outputs


@pytest.mark.parametrize("attention", [all_causal, blind_to_the_prompt])
def test_a_wrong_mask_is_noticed(attention, seven_tags, monkeypatch):
    """A completion that sees the completions before it, and one that sees no prompt."""
    folder, dataset = seven_tags
    monkeypatch.setattr(packed_attention, "split_attention", attention)
    errors, gradients, _ = compare("qwen2_5_omni", folder, rows_of("qwen2_5_omni", dataset))
    assert min(errors) > 1e-2 and gradients[0] > 1e-2


def test_a_prompt_without_its_share_of_the_gradient_is_noticed(seven_tags, monkeypatch):
    """Log-probabilities are right, gradients are not: what a detached key-value cache would do."""
    folder, dataset = seven_tags
    original = packed_attention.split_attention

    def detached(groups, scale):
        cut = [dataclasses.replace(group, prompt=tuple(x.detach() for x in group.prompt)) for group in groups]
        return original(cut, scale)

    monkeypatch.setattr(packed_attention, "split_attention", detached)
    errors, gradients, _ = compare("qwen2_5_omni", folder, rows_of("qwen2_5_omni", dataset))
    assert max(errors) <= BOUND and gradients[0] > 1e-2


# What a packed row holds


def test_a_packed_row_holds_each_prompt_once(seven_tags):
    folder, dataset = seven_tags
    model, _, family = build("qwen2_5_omni")
    prompts = encode(family, folder, rows_of("qwen2_5_omni", dataset))
    batch = mixed_batch(prompts)
    packed = pack(batch.rows, batch.completions, batch.lengths)
    scored = sum(max(length, 1) for length in batch.lengths)
    assert packed.input_ids.numel() == len(packed.layout) == sum(len(p) - 1 for p in prompts) + scored
    assert packed.labels.numel() == scored and int((packed.labels != -100).sum()) == sum(batch.lengths)
    for token_id in family.placeholder_ids.values():
        held = sum(int((p.input_ids == token_id).sum()) for p in prompts)
        assert int((packed.input_ids == token_id).sum()) == held
    assert {kind for prompt in prompts for kind in prompt.kinds} >= {"video", "audio"}
    # And through the language model and its head.
    install(model)
    counts = {"layers": [], "media": []}
    core = family.core(model)
    core.language_model.layers[0].register_forward_pre_hook(lambda m, a: counts["layers"].append(a[0].shape[:2]))
    core.visual.register_forward_pre_hook(lambda m, a, k: counts["media"].append("video"), with_kwargs=True)
    core.audio_tower.register_forward_pre_hook(lambda m, a, k: counts["media"].append("audio"), with_kwargs=True)
    together(model, family, batch)
    assert counts["layers"] == [(1, len(packed.layout))] and sorted(counts["media"]) == ["audio", "video"]


def test_unpacked_values_stand_where_their_tokens_do(seven_tags):
    folder, dataset = seven_tags
    _, _, family = build("qwen2_5_omni")
    batch = mixed_batch(encode(family, folder, rows_of("qwen2_5_omni", dataset)))
    packed = pack(batch.rows, batch.completions, batch.lengths)
    tokens = packed.unpack(packed.labels.clamp(min=0), *batch.completions.shape)
    assert torch.equal(tokens, batch.completions * batch.mask)
