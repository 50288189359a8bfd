"""
The towers attend within windows and within clips, whatever computes their attention: with `sdpa` each is a call of its own,
with FlashAttention all are parts of one call.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from test_packed_attention import flash, flash_attn_varlen_func  # noqa: F401
from test_tower_cache import World
from transformers import PreTrainedModel, modeling_utils

from maple_trl import train
from maple_trl.omni.prefix import packed_attention
from maple_trl.omni.towers import run_tower


FAMILIES = ("qwen2_5_omni", "qwen3_omni", "qwen2_5_vl", "qwen3_vl")
LARGE = {"min_pixels": 180 * 180, "max_pixels": 240 * 240}  # four windows of 112 x 112 pixels at least


def without_splits(q, k, v, *args, **kwargs):
    """As if there were neither windows nor clips."""
    query, key, value = (states.transpose(0, 1)[None] for states in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)[0].transpose(0, 1)


def features(name, folder, rows, attention):
    world = World(name, folder, [])
    for config in (world.core.config, *(getattr(m, "config", None) for m in world.core.children())):
        for part in (config, getattr(config, "vision_config", None), getattr(config, "audio_config", None)):
            if part is not None:
                part._attn_implementation = attention
    prompts = world.encode(rows, **LARGE)
    with torch.no_grad():
        return {
            (kind, i): value
            for kind in ("video", "audio")
            if any(kind in p.kinds for p in prompts)
            for i, found in enumerate(
                run_tower(world.family, world.core, kind, [p for p in prompts if kind in p.kinds])
            )
            for value in [found["tokens"].float()]
        }


def error(found, right):
    """The largest difference of any clip's features, relative to their size."""
    return max(float((found[key] - value).norm() / value.norm()) for key, value in right.items())


def rows_for(name, dataset):
    tag = "VA" if "omni" in name else "V"
    return [row for row in dataset if row["tag"] == tag][:2]


@pytest.mark.parametrize("name", FAMILIES)
def test_sdpa_splits_as_flash_attention_does(name, seven_tags, flash):  # noqa: F811
    folder, dataset = seven_tags
    rows = rows_for(name, dataset)
    calls = []

    def counted(*states, cu_seqlens_q, **more):
        calls.append(len(cu_seqlens_q) - 1)
        return flash_attn_varlen_func(*states, cu_seqlens_q=cu_seqlens_q, **more)

    flash(counted)
    ours, theirs = features(name, folder, rows, "sdpa"), features(name, folder, rows, "flash_attention_2")
    assert max(calls) > 2 and ours.keys() == theirs.keys()
    assert error(theirs, ours) < 1e-5

    flash(without_splits)
    assert error(features(name, folder, rows, "flash_attention_2"), ours) > 1e-3


APART = {"vision_config": "flash_attention_2", "audio_config": "flash_attention_2"}
RUN = """
trainer: omni_grpo
model_name_or_path: builtin:tiny-omni
dataset_name: builtin:seven-tags
dataset_filter: {tag: [VA]}
reward_funcs: [accuracy_reward]
use_cpu: true
bf16: false
dtype: float32
num_generations: 2
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
max_completion_length: 3
num_frames: 4
max_pixels: 3136
max_steps: 1
evaluate_before_after: false
shared_prefix: "on"
beta: 0.1
report_to: none
"""


@pytest.mark.parametrize("chosen", [None, APART])
@pytest.mark.matrix(cases=1)
def test_towers_have_an_attention_of_their_own_where_a_run_says_so(chosen, tmp_path, flash, monkeypatch):  # noqa: F811
    """By `model_init_kwargs`, as transformers reads it; the language model keeps `sdpa`, also in passes of the reference."""
    calls, merged = [], []
    flash(lambda *states, **more: calls.append(1) or flash_attn_varlen_func(*states, **more))
    # The package is not here: what is there of it stands in.
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, **options: True)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *args, **options: None)
    original = packed_attention.split_attention
    monkeypatch.setattr(packed_attention, "split_attention", lambda *args: merged.append(1) or original(*args))
    more = "" if chosen is None else f"model_init_kwargs: {{attn_implementation: {json.dumps(chosen)}}}\n"
    (tmp_path / "run.yaml").write_text(f"{RUN}output_dir: {tmp_path / 'out'}\n{more}")
    trainer, _ = train.build_trainer(*train.parse_args(["--config", str(tmp_path / "run.yaml")]))
    trainer.train()
    for model in (trainer.model, trainer.ref_model):
        found = {name: getattr(model.config, name)._attn_implementation for name in model.config.sub_configs}
        assert found == {name: (chosen or {}).get(name, "sdpa") for name in found} and "text_config" in found
    assert bool(calls) == bool(chosen) and merged
