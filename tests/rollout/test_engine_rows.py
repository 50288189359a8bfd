"""What engines are handed: rows over the wire, names and sums of weights, sampling options."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media_files import picture
from PIL import Image
from test_mixed_images import SHAPES
from tiny_models import FAMILIES, build_tiny
from vllm_runs import OPTIONS

from maple_trl import OmniGRPOConfig
from maple_trl.algorithms import raw_ratios, summarise_ratios
from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids
from maple_trl.omni.families import OmniFamily, family_for
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.rollout.engine_models import (
    ENGINE_MODELS,
    POSITIONS,
    TrainerPositions,
    engine_config,
    engine_model,
    engine_weights,
)
from maple_trl.rollout.engine_rows import EngineItem, EngineRow, pack_rows, unpack_rows
from maple_trl.rollout.merged_weights import tied_name
from maple_trl.rollout.sampling_options import vllm_options
from maple_trl.rollout.weight_sums import compare_sums, sum_weights
from maple_trl.trainers.common.sampling_checks import ratio_metrics


class Placeholders:
    """A family of which a row needs to know its placeholders and how many each clip has."""

    placeholder_ids = {"image": 3, "video": 1, "audio": 2}

    def feature_counts(self, kind, media):
        return media["counts"].tolist()


def prompt(ids, video=(), audio=(), image=()):
    counts = {"image": list(image), "video": list(video), "audio": list(audio)}
    media = {
        "image": {
            "counts": torch.tensor(counts["image"]),
            "pixel_values": torch.ones(sum(image), 2),
            "image_grid_thw": torch.ones(len(image), 3, dtype=torch.long),
        },
        "video": {
            "counts": torch.tensor(counts["video"]),
            "pixel_values_videos": torch.ones(sum(video), 2),
            "video_grid_thw": torch.ones(len(video), 3, dtype=torch.long),
        },
        "audio": {
            "counts": torch.tensor(counts["audio"]),
            "input_features": torch.ones(len(audio), 2, 3),
            "feature_attention_mask": torch.ones(len(audio), 3),
        },
    }
    positions = torch.arange(len(ids)).expand(3, -1)
    tokens = {kind: sum(of_kind) for kind, of_kind in counts.items() if of_kind}
    return EncodedPrompt("key", torch.tensor(ids), positions, media, tokens)


_CLIPS = st.lists(st.integers(1, 4), max_size=3)


@given(_CLIPS, _CLIPS, _CLIPS, st.booleans(), st.data())
def test_every_placeholder_belongs_to_one_clip(images, videos, audios, mixed, data):
    """Pictures and clips one after the other, or all tokens in any order."""
    clips = [[3] * n for n in images] + [[1] * n for n in videos] + [[2] * n for n in audios]
    ids = sum(([9, *clip, 8] for clip in data.draw(st.permutations(clips))), [5])
    if mixed:
        ids = data.draw(st.permutations(ids))
    row = EngineRow.of(prompt(ids, videos, audios, images), Placeholders())
    taken = []
    for kind, token in Placeholders.placeholder_ids.items():
        counts = {"image": images, "video": videos, "audio": audios}[kind]
        items = row.items.get(kind, [])
        assert len(items) == len(counts)
        for item, count in zip(items, counts, strict=True):
            own = torch.arange(item.offset, item.offset + item.length)
            own = own if item.mask is None else own[item.mask]
            assert len(own) == count and all(ids[i] == token for i in own)
            taken += own.tolist()
    assert sorted(taken) == [i for i, token in enumerate(ids) if token in (1, 2, 3)]


def test_other_positions_make_another_clip():
    """Tokens and clip are the same, so that a cache of prefixes could not tell them apart."""
    one = prompt([5, 1, 1, 6], video=[2])
    later = prompt([5, 1, 1, 6], video=[2])
    later.position_ids = later.position_ids.clone()
    later.position_ids[0, 2] += 3
    shifted = prompt([5, 5, 1, 1, 6], video=[2])
    digests = [EngineRow.of(p, Placeholders()).items["video"][0].digest for p in (one, later, shifted)]
    assert digests[0] == digests[2] != digests[1]


def test_completions_go_on_where_those_of_training_do():
    """The last frames of a long clip lie beyond the text that follows it."""
    row = prompt([5, 1, 1, 6, 7], video=[2])
    row.position_ids = torch.tensor([[0, 1, 52, 2, 3]] * 3)
    feature = SimpleNamespace(data={POSITIONS: SimpleNamespace(data=row.position_ids)})
    for begun in (0, 2):  # tokens of a completion that was interrupted
        tokens = row.input_ids.tolist() + [8] * begun
        positions, lag = TrainerPositions().get_mrope_input_positions(tokens, [feature])
        trained = batch_position_ids([row], len(row), begun + 1)[:, 0]
        assert positions.tolist() == trained[:, :-1].tolist()
        assert len(tokens) + lag == trained[0, -1] == 4 + begun


@pytest.mark.parametrize("kinds", [(), ("image",), ("video",), ("audio",), ("image", "video", "audio")])
def test_rows_pass_the_wire(kinds):
    items = {
        kind: [EngineItem(1, 3, torch.tensor([True, False, True]) if kind == "audio" else None, "d")] for kind in kinds
    }
    media = {
        kind: {
            name: torch.rand(1, 2).to(dtype)
            for name, dtype in zip(OmniFamily.media_names[kind], (torch.float32, torch.bfloat16), strict=True)
        }
        for kind in kinds
    }
    row = EngineRow([3, 4, 5, 6], torch.rand(3, 4), media, items)
    (back, empty), fields = unpack_rows(
        pack_rows([row, EngineRow([1], torch.zeros(1, 1))], {"count": 4, "sampling": {"seed": 1}})
    )
    assert fields == {"count": 4, "sampling": {"seed": 1}} and empty.token_ids == [1] and not empty.items
    assert back.token_ids == row.token_ids and torch.equal(back.position_ids, row.position_ids)
    assert list(back.media) == list(media)
    for kind, tensors in media.items():
        assert list(back.media[kind]) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(back.media[kind][name], tensor) and back.media[kind][name].dtype == tensor.dtype
    for kind in kinds:
        (one,), (other,) = back.items[kind], items[kind]
        assert (one.offset, one.length, one.digest) == (other.offset, other.length, other.digest)
        assert (one.mask is None) == (other.mask is None) and (one.mask is None or torch.equal(one.mask, other.mask))


@pytest.mark.parametrize("data", [b"", b"no", bytes(64), pack_rows([], {})[:-1] + b"x", b"\xff" * 100])
def test_anything_else_is_no_row(data):
    with pytest.raises(ValueError, match="these are no rows of maple_trl"):
        unpack_rows(data)


def test_weights_have_the_names_of_published_checkpoints():
    model, _ = build_tiny("qwen2_5_omni")
    known = engine_model(model.config.model_type)
    names = [name for name, _ in engine_weights(model.named_parameters(), known, tied_name(model))]
    roots = {tuple(name.split(".")[:2]) for name in names}
    assert roots == {("thinker", "audio_tower"), ("thinker", "visual"), ("thinker", "model"), ("thinker", "lm_head")}
    tied = list(
        engine_weights(
            [("model.language_model.embed_tokens.weight", torch.ones(2))],
            known,
            "model.language_model.embed_tokens.weight",
        )
    )
    assert [name for name, _ in tied] == ["thinker.model.embed_tokens.weight", "thinker.lm_head.weight"]


def test_experts_are_named_one_by_one():
    model, _ = build_tiny("qwen3_omni")
    known = ENGINE_MODELS[model.config.model_type]
    found = dict(engine_weights(model.named_parameters(), known, None))
    layer = model.model.language_model.layers[0].mlp.experts
    for i in range(4):
        name = f"thinker.model.layers.0.mlp.experts.{i}"
        together = torch.cat([found[f"{name}.gate_proj.weight"], found[f"{name}.up_proj.weight"]])
        assert torch.equal(together, layer.gate_up_proj[i]) and torch.equal(
            found[f"{name}.down_proj.weight"], layer.down_proj[i]
        )
    with pytest.raises(
        ValueError, match="on a CPU vLLM goes on computing with the first weights of a qwen3_omni_moe_thinker"
    ):
        engine_model(model.config.model_type, "cpu")


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni", "qwen2_5_vl"])
def test_the_config_of_an_engine(family):
    model, _ = build_tiny(family)
    config = engine_config(json.loads(model.config.to_json_string(use_diff=False)))
    part = config.get("thinker_config", config)
    assert config["architectures"][0].startswith("Maple") and "tie_word_embeddings" in part["text_config"]
    assert part["text_config"]["hidden_size"] == model.config.get_text_config().hidden_size


@given(st.integers(0, 40), st.sampled_from([1e-3, 1e-6]))
def test_sums_survive_fusing_and_show_any_step(which, step):
    """Split, joined and reordered they are the same; one changed weight in a thousand is seen."""
    stream = torch.Generator().manual_seed(which)
    q, k = (torch.randn(20, 30, generator=stream) for _ in range(2))
    trained = sum_weights([("model.visual.q.weight", q), ("model.visual.k.weight", k), ("lm_head.weight", q)])
    fused = torch.cat([k, q])[torch.randperm(40, generator=stream)]
    assert compare_sums(trained, sum_weights([("visual.qk.weight", fused), ("lm_head.weight", q.clone())])) == []
    fused[which % 40, 3] += step
    assert compare_sums(trained, sum_weights([("visual.qk.weight", fused), ("lm_head.weight", q)])) == [
        "video tower, matrices"
    ]
    packed = sum_weights([("visual.qk.weight", torch.empty(0)), ("lm_head.weight", q)])
    assert compare_sums(trained, packed) == []
    assert compare_sums(trained, {}) == ["video tower, matrices", "head, matrices"]


def test_sampling_options_of_both_names():
    given_ = {
        "stop_strings": ["</a>"],
        "min_new_tokens": 2,
        "suppress_tokens": [7],
        "logit_bias": {3: 1.0},
        "bad_words": None,
    }
    assert vllm_options(given_, [8], [1, 0]) == {
        "stop": ["</a>"],
        "min_tokens": 2,
        "logit_bias": {3: 1.0, 7: -100.0, 8: -100.0},
        "stop_token_ids": [0, 1],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_kwargs": {"typical_p": 0.5}}, "vLLM rollouts do not know 'typical_p'"),
        ({"generation_kwargs": {"max_tokens": 5}}, "vLLM rollouts do not know 'max_tokens'"),
        ({"vllm_mode": "elsewhere"}, "vllm_mode"),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode does not support prompts with media"),
        ({"vllm_tensor_parallel_size": 2}, "vllm_mode='server' takes an engine over several"),
        ({"vllm_structured_outputs_regex": "a"}, "vllm_structured_outputs_regex does not support"),
        ({"vllm_engine_options": {"dtype": "auto"}}, "vllm_engine_options: dtype is set by the trainer"),
        (
            {"vllm_mode": "server", "vllm_engine_options": {"block_size": 32}},
            "a server is given them where it is started",
        ),
        ({"vllm_request_timeout": 0}, "vllm_request_timeout must be above 0"),
        ({"vllm_server_timeout": float("nan")}, "vllm_server_timeout must be above 0"),
        # The same numbers on every rank and in every rollout.
        ({"generation_kwargs": {"seed": 5}}, "vLLM rollouts do not know 'seed'"),
        ({"generation_kwargs": {"presence_penalty": 5}}, "presence_penalty must be a number from -2 to 2, got 5"),
        ({"generation_kwargs": {"stop_strings": ""}}, "stop_strings must be a text or a list of texts, got ''"),
        ({"generation_kwargs": {"stop": "a", "stop_strings": "b"}}, "stop_strings and stop are one option"),
        ({"generation_kwargs": {"min_tokens": 9}}, "min_new_tokens=9 is above max_completion_length=8"),
        ({"generation_kwargs": {"stop": "a"}, "mask_truncated_completions": True}, "use one of the two"),
        ({"vllm_importance_sampling_mode": "tokens"}, "vllm_importance_sampling_mode must be one of 'token_truncate'"),
        ({"vllm_gpu_memory_utilization": 60}, "vllm_gpu_memory_utilization must be a share"),
        (
            {"max_prompt_length": 1020},
            r"vllm_max_model_length=1024 does not hold .*max_prompt_length=1020 \+ max_comp",
        ),
        ({"vllm_max_model_length": 8}, "vllm_max_model_length=8 does not hold a prompt"),
        ({"vllm_engine_options": {"pipeline_parallel_size": 2}}, "vllm_engine_options: pipeline_parallel_size is set"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        OmniGRPOConfig(output_dir=str(tmp_path), **OPTIONS | options)


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.booleans()), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_ratios_against_plain_arithmetic(rows, sequences):
    logps, sampled, mask = (
        torch.tensor([[token[i] for token in row] for row in rows], dtype=torch.float64) for i in range(3)
    )
    found = summarise_ratios(raw_ratios(logps, sampled, mask, sequences), 0.5, 1.5)
    for summary, row in zip(found.tolist(), rows, strict=True):
        counted = [a - b for a, b, counts in row if counts]
        values = (
            [torch.tensor(sum(counted)).exp().item()] * bool(counted)
            if sequences
            else [torch.tensor(d, dtype=torch.float64).exp().item() for d in counted]
        )
        assert summary[0] == len(values) and summary[1] == pytest.approx(sum(values))
        assert summary[4] == sum(not 0.5 <= value <= 1.5 for value in values)
        if values:
            assert summary[2:4] == pytest.approx([min(values), max(values)])


def test_ratios_are_named_by_tag():
    summaries = torch.tensor(
        [[2.0, 3.0, 1.0, 2.0, 1.0], [1.0, 0.5, 0.5, 0.5, 0.0], [0.0, 0.0, torch.inf, -torch.inf, 0.0]]
    )
    metrics = ratio_metrics(summaries, torch.tensor([0, 2, 2]))
    assert (
        metrics["tag/all/importance_ratio/mean"] == pytest.approx(3.5 / 3)
        and metrics["tag/V/importance_ratio/clipped"] == 0.5
    )
    assert metrics["tag/S/importance_ratio/min"] == metrics["tag/S/importance_ratio/max"] == 0.5
    assert not any("/A/" in name for name in metrics)


@pytest.mark.parametrize("family_name", ["qwen2_5_omni", "qwen3_omni", "qwen2_5_vl"])
def test_rows_with_pictures_are_those_of_the_trainer(family_name, tmp_path):
    """Encoded from files: each picture has its range of tokens, its pixels, and a digest that another picture has not."""
    for name in SHAPES:
        multiple = FAMILIES[family_name].frame_multiple
        height, width = (multiple * side for side in SHAPES[name])
        Image.fromarray(picture(len(name), height, width)).save(tmp_path / f"{name}.png")
    family = family_for(*build_tiny(family_name))
    builder = PromptBuilder(family, MediaLoader(tmp_path, MediaLimits(min_pixels=1024, max_pixels=8192), workers=0))
    ask = [{"role": "user", "content": "See <image> and <image>."}]
    rows = []
    for names in (["square", "wide"], ["wide", "square"], ["square", "other"]):
        encoded = builder.encode({"prompt": ask, "images": [f"{name}.png" for name in names]})
        (row,), _ = unpack_rows(pack_rows([EngineRow.of(encoded, family)], {}))
        rows.append(row)
        assert row.token_ids == encoded.input_ids.tolist() and torch.equal(row.position_ids, encoded.position_ids)
        for name in ("pixel_values", "image_grid_thw"):
            assert torch.equal(row.media["image"][name], encoded.media["image"][name])
        lengths = [SHAPES[name][0] * SHAPES[name][1] for name in names]
        assert [item.length for item in row.items["image"]] == lengths and list(row.items) == ["image"]
        for item in row.items["image"]:
            own = row.token_ids[item.offset : item.offset + item.length]
            assert set(own) == {family.placeholder_ids["image"]} and item.mask is None
    assert len({item.digest for row in rows for item in row.items["image"]}) == 6
