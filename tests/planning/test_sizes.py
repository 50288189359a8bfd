"""Sizes read from a configuration, against the models that transformers builds of it without memory."""

import pytest
import tiny_models

from maple_trl.omni.families import family_for
from maple_trl.omni.lora import linear_modules
from maple_trl.planning.sizes import read_sizes


def counted(model, family) -> dict[str, int]:
    """Parameters of each part; a head that is the embedding is counted where the embedding is."""
    parts = dict.fromkeys(("llm", "head", "vision", "audio", "projectors"), 0)
    for name, parameter in model.named_parameters():
        parts[family.scope_of(name) or "head"] += parameter.numel()
    return parts


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_parameters_by_part(name):
    model, processor = tiny_models.build_tiny(name)
    sizes = read_sizes(model.config.to_dict())
    assert {part: found.parameters for part, found in sizes.parts.items()} == counted(
        model, family_for(model, processor)
    )


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_lora_adapts_the_linear_layers_of_each_scope(name):
    model, processor = tiny_models.build_tiny(name)
    modules = dict(model.named_modules())
    sizes = read_sizes(model.config.to_dict())
    for scope, names in linear_modules(model, family_for(model, processor)).items():
        adapters = sum(4 * (modules[n].in_features + modules[n].out_features) for n in names)
        assert sizes.parts[scope].lora(4) == adapters
