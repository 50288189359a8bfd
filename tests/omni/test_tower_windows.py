"""
The towers attend within windows and within clips, whatever computes their attention: with `sdpa` each is a call of its own,
with FlashAttention all are parts of one call.
"""

import pytest
import torch
import torch.nn.functional as F
from test_packed_attention import flash, flash_attn_varlen_func  # noqa: F401
from test_tower_cache import World

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
            for kind in world.family.placeholder_ids
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
