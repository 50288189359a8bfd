"""
The weights of a model with adapters as an engine takes them: merged, one layer at a time, with the model left as it was.

PEFT merges into the weights themselves and takes the adapter out again afterwards. In half precision that does not bring
them back: what `W + Δ` rounds away is missing from `W + Δ - Δ`, and a run that merges before every rollout trains on a base
that moves with each. Here a layer is merged by PEFT, into a copy that lasts until the next layer's turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from maple_trl.rollout.engine import EngineError


@dataclass(frozen=True)
class Place:
    """
    Where a model with adapters has a weight.

    Attributes:
        name: of the weight in the model without adapters.
        weight: the base's, without adapters; of a module in `modules_to_save` the active adapter's copy.
        owner: the module that has it.
        layers: PEFT's around the owner, the outermost first.
    """

    name: str
    weight: nn.Parameter
    owner: nn.Module
    layers: tuple[Any, ...]


def places(model: nn.Module) -> Iterator[Place]:
    """
    Find the weights that a model computes with, in its order; a weight that it has twice is found in both places.

    Args:
        model: the one inside a `PeftModel`, or one without adapters.

    Raises:
        EngineError: where PEFT cannot merge a layer without replacing its weights.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, weight in model.named_parameters(remove_duplicate=False):
        kept: list[str] = []
        layers: list[Any] = []
        within = ""
        *parts, last = path.split(".")
        steps = iter(parts)
        for part in steps:
            module = modules[within]
            if isinstance(module, MultiheadAttention):
                raise EngineError(
                    f"vLLM cannot be given {within}: adapters of nn.MultiheadAttention replace its weights"
                )
            within = f"{within}.{part}" if within else part
            if isinstance(module, BaseTunerLayer):
                if part != "base_layer":  # the adapter's own
                    break
                layers.append(module)
            elif isinstance(module, ModulesToSaveWrapper):
                active = next((name for name in module.active_adapters if name in module.modules_to_save), None)
                if part == "modules_to_save":
                    adapter = next(steps)
                    if adapter != active:
                        break
                    within = f"{within}.{adapter}"
                elif active is not None:
                    break
            elif not isinstance(module, TrainableTokensWrapper):
                kept.append(part)
                layers = []  # those of a module further out leave the weights of its parts alone
        else:
            owner = modules[within]
            if not isinstance(owner, BaseTunerLayer):
                yield Place(".".join([*kept, last]), weight, owner, tuple(layers))


def _ends(model: Any) -> tuple[str, str] | None:
    """Return the names of a model's embedding and of its head; `None` where it has no head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return None
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return names[id(embedding)], names[id(head)]


def tied_name(model: nn.Module) -> str | None:
    """
    Return the name of the embedding that is a model's head as well; `None` where they are two.

    Args:
        model: with adapters or without them; the name is that in the model without.
    """
    ends = _ends(model)
    weights = {place.name: place.weight for place in places(model)}
    if ends is None or weights.get(ends[0]) is not weights.get(ends[1]):
        return None
    return ends[0] if ends[0] in weights else None  # FSDP may have flattened both


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """
    Yield the weights with the active adapters merged, by their names in the model without adapters.

    Merged values are those that `merge_adapter()` makes, to the bit, in memory of their own. Of one layer at a time there is
    a copy; its weights are back before the next one's turn, and when the iterator is closed.

    Args:
        model (`PeftModel`): not sharded.

    Raises:
        EngineError: where an adapter has no weights to merge, or leaves an embedding and the head that shares its weight
            with different ones, of which an engine has one.
    """
    if not isinstance(model.base_model, BaseTuner):
        kind = model.active_peft_config.peft_type.value
        raise EngineError(f"vLLM cannot be given an adapter of type {kind}: it has no weights to merge")
    core = model.get_base_model()
    found: dict[int, Place] = {}
    for place in places(core):
        other = found.setdefault(id(place.weight), place)
        if other is not place and _adapters(other) != _adapters(place):
            raise _apart(other.name, place.name)
    ends = _ends(core)
    if ends is not None and getattr(core.config, "tie_word_embeddings", False) and tied_name(core) is None:
        raise _apart(*ends)
    for _, group in groupby(found.values(), lambda place: (id(place.owner), place.layers)):
        together = list(group)
        with _merged(together[0].owner, together[0].layers):
            for place in together:
                yield place.name, place.weight.data


def _apart(one: str, other: str) -> EngineError:
    return EngineError(
        f"vLLM has one weight for {one} and {other}, which the adapter makes two: adapt neither, or train a model whose "
        "tie_word_embeddings is false"
    )


def _adapters(place: Place) -> set[int]:
    """Tell which adapters change a weight, by where their own are in memory."""
    own = [value for layer in place.layers for name, value in layer.named_parameters() if "base_layer." not in name]
    return {value.untyped_storage().data_ptr() for value in own}


@contextmanager
def _merged(owner: nn.Module, layers: Sequence[Any]) -> Iterator[None]:
    """Let a module's weights be merged copies."""
    if not layers:
        yield
        return
    weights = [(weight, weight.data) for weight in owner.parameters(recurse=False)]
    merged = [(layer, list(layer.merged_adapters)) for layer in layers]
    try:
        for weight, own in weights:
            weight.data = own.clone()
        with torch.no_grad():
            for layer in layers:
                layer.merge()
        yield
    finally:
        for weight, own in weights:
            weight.data = own
        for layer, before in merged:
            layer.merged_adapters = before
