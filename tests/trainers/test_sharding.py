"""What sharded training asks of a model and of accelerate, where no sharding is needed to see it."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from tiny_models import FAMILIES, build_tiny

from maple_trl.trainers.common.sharding import held_back, name_present_layers


class Engine:
    """DeepSpeed's part, as accelerate calls it."""

    def __init__(self):
        self.calls = []

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.calls.append(f"boundary {is_boundary}")

    def backward(self, loss, **kwargs):
        self.calls.append(f"backward {kwargs}")

    def step(self):
        self.calls.append("step")


@pytest.mark.parametrize(
    ("passed", "counts", "expected"),
    [
        (True, True, ["boundary True", "backward {'scale_wrt_gas': False}", "step"]),
        (True, False, ["boundary False", "backward {'scale_wrt_gas': False}"]),
        (False, False, []),
    ],
)
def test_deepspeed_makes_an_update_where_something_was_trained_on(passed, counts, expected):
    wrapper = DeepSpeedEngineWrapper(Engine())
    told = SimpleNamespace(deepspeed_engine_wrapped=wrapper)
    with held_back(told, lambda: passed, lambda: counts):
        wrapper.backward(torch.ones(()), sync_gradients=True, scale_wrt_gas=False)
    assert wrapper.engine.calls == expected
    wrapper.backward(torch.ones(()), sync_gradients=True)
    assert wrapper.engine.calls[-1] == "step"  # as before, outside


def test_accelerate_has_what_is_held_back():
    assert list(inspect.signature(DeepSpeedEngineWrapper.backward).parameters) == [
        "self", "loss", "sync_gradients", "kwargs",
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp_is_told_of_layers_that_the_model_has(family):
    model, _ = build_tiny(family)
    named = set(model._no_split_modules)
    name_present_layers(model)
    kept = set(model._no_split_modules)
    present = {type(module).__name__ for module in model.modules()}
    assert kept == named & present and any("DecoderLayer" in name for name in kept)
    # The one names the Talker's, the other those of a tower that it may have.
    assert (kept != named) == (family in ("qwen3_omni", "gemma4_moe"))
