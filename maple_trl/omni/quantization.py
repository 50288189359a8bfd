"""Weights of 4 and 8 bits by bitsandbytes: which layers have them, what they take, and what identifies them."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from maple_trl.omni.families import family_class, unwrap


logger = logging.getLogger(__name__)

_MIB = 2**20
_settled: WeakSet[nn.Module] = WeakSet()


def is_quantized(model: nn.Module) -> bool:
    """Return whether a model was loaded with weights of few bits."""
    return bool(getattr(unwrap(model), "is_quantized", False))


def check_installed() -> None:
    """Raise ImportError, naming the extra, without bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            "weights of 4 or 8 bits need bitsandbytes, which is not installed: pip install 'maple-trl[quantization]'"
        )


def as_config(value: Any) -> BitsAndBytesConfig:
    """
    Return a `quantization_config`, which may be given as a mapping.

    Raises:
        ImportError: without bitsandbytes.
        ValueError: for one that does not ask for 4 or 8 bits of bitsandbytes.
    """
    check_installed()
    made = _read_options(value) if isinstance(value, Mapping) else value
    if not isinstance(made, BitsAndBytesConfig) or not made.is_quantizable():
        raise ValueError(
            "quantization_config must be a BitsAndBytesConfig, or a mapping of its options, with load_in_4bit or "
            f"load_in_8bit, got {value if isinstance(value, Mapping) else type(value).__name__}"
        )
    if made.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise ValueError(
            f"quantization_config: bnb_4bit_quant_type must be nf4 or fp4, got {made.bnb_4bit_quant_type!r}"
        )
    if made.llm_int8_has_fp16_weight:
        raise ValueError("llm_int8_has_fp16_weight keeps weights in 16 bits, so that nothing is gained: leave it out")
    return made


def _read_options(options: Mapping[str, Any]) -> BitsAndBytesConfig:
    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    unknown = sorted(name for name in set(options) - known - {"quant_method"} if not name.startswith("_"))
    if unknown:
        raise ValueError(f"quantization_config: BitsAndBytesConfig has no option {', '.join(map(repr, unknown))}")
    try:
        return BitsAndBytesConfig(**{name: option for name, option in options.items() if name in known})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"quantization_config: {error}") from error


def chosen_layers(model: PreTrainedModel, towers: bool) -> list[str]:
    """Name the linear layers of an omni model that get few bits: the language model's, and with `towers` all but the head."""
    family = family_class(model.config.model_type)
    assert family is not None
    scope_of, head = family.__new__(family).scope_of, model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and (scope_of(name) == "llm" or (towers and scope_of(name) is not None))
    ]


def _kept_parts(model: PreTrainedModel, chosen: list[str]) -> list[str]:
    """Name the uppermost parts of a model without a chosen layer that have a linear one."""
    used = {".".join(name.split(".")[:n]) for name in chosen for n in range(1, name.count(".") + 2)}
    kept = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in used:
            parts = name.split(".")
            kept.add(next(part for n in range(len(parts)) if (part := ".".join(parts[: n + 1])) not in used))
    return sorted(kept)


def with_kept_parts(
    given: Any, model_class: type[PreTrainedModel], config: PreTrainedConfig, towers: bool = False
) -> BitsAndBytesConfig:
    """
    Return a `quantization_config` that leaves towers, projectors and the head of an omni model as they are.

    What it lists itself (`llm_int8_skip_modules`) stands; for models of text alone transformers chooses.

    Args:
        given: a `BitsAndBytesConfig`, or a mapping of its options.
        towers: give few bits to towers and projectors too.

    Raises:
        ImportError, ValueError: as of [`as_config`].
        ValueError: where the language model has no linear layer.
    """
    made = copy.deepcopy(as_config(given))
    if family_class(config.model_type) is None:
        return made
    if made.llm_int8_skip_modules is not None:
        if towers:
            raise ValueError("quantize_towers has no effect beside llm_int8_skip_modules, which lists what is left")
        return made
    with torch.device("meta"):  # no weights, but all names
        skeleton = model_class(copy.deepcopy(config))
    chosen = chosen_layers(skeleton, towers)
    if not chosen:
        raise ValueError(f"{model_class.__name__} has no linear layer to quantize")
    made.llm_int8_skip_modules = _kept_parts(skeleton, chosen)
    return made


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of bitsandbytes, by name."""
    if "bitsandbytes" not in sys.modules:  # which a model with such layers has imported
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            yield name, module


def _state(layer: nn.Module) -> Any:
    """Return the scales of 4 bits; `None` for 8."""
    return getattr(layer.weight, "quant_state", None)


def _has_8_bits(layer: nn.Module) -> bool:
    return layer.weight.dtype == torch.int8


def _scales(layer: nn.Module) -> dict[str, Tensor]:
    """Return what, beside its packed weight, says what a layer's weight is."""
    state = _state(layer)
    if state is None:  # of 8 bits, which move to the layer with its first pass
        found = getattr(layer.weight, "SCB", None)
        return {"SCB": layer.state.SCB if found is None else found}
    found = {"absmax": state.absmax, "code": state.code}
    if state.nested:
        found |= {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
    return found


def _read_as(layer: nn.Module) -> str:
    """Say how a layer reads its weight, as far as no tensor says it."""
    state = _state(layer)
    if state is None:
        return f"int8, threshold {layer.state.threshold:g}"
    nested = f", nested {state.state2.blocksize}" if state.nested else ""
    return f"{state.quant_type}, blocks of {state.blocksize}{nested}, {state.dtype}, {layer.compute_dtype}"


def named_scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what, beside their parameters, decides what layers of few bits compute; names say how it is read."""
    for name, layer in _layers(model):
        for key, tensor in _scales(layer).items():
            yield f"{name}.weight.{key} ({_read_as(layer)})", tensor


def computes_exactly(model: nn.Module) -> bool:
    """Return whether layers of few bits, if there are any, compute in float32, those of 8 bits [`with_whole_inputs`]."""
    return all(_state(layer) is None or layer.compute_dtype in (None, torch.float32) for _, layer in _layers(model))


@contextmanager
def with_whole_inputs(model: nn.Module) -> Iterator[None]:
    """
    Have layers of 8 bits compute with what their weights stand for, and with their inputs as they are.

    Otherwise they round each input to 8 bits as well, but for columns where any token of the batch is large: what a token
    gives depends on what passes with it, and rounding of other layers grows.
    """
    layers = [layer for _, layer in _layers(model) if _state(layer) is None]
    for layer in layers:
        layer.forward = partial(_product_of_8_bits, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _product_of_8_bits(layer: nn.Module, inputs: Tensor) -> Tensor:
    scale = _scales(layer)["SCB"].unsqueeze(1) / 127
    bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
    return F.linear(inputs, (layer.weight.data * scale).to(inputs.dtype), bias)


def weight_count(parameter: nn.Parameter) -> int:
    """Return how many weights a parameter holds, which are fewer numbers where they are packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def _keep_as_loaded(layer: nn.Module) -> None:
    """Switch off what bitsandbytes does to a layer, and to gradients and memory by that."""
    if _state(layer) is None:
        if _let_go not in layer._forward_hooks.values():
            layer.register_forward_hook(_let_go)
        return
    if getattr(_state(layer), "packing_format_for_cpu", False):
        layer.state_dict()  # which reverts it
    # On some CPUs a pass in evaluation mode would pack weights once more: they are rounded by that, and let no gradient pass in
    # training afterwards.
    layer.support_avx512bf16_for_cpu = False


def _let_go(layer: nn.Module, args: tuple, output: Tensor) -> None:
    """
    Have the graph not hold the input of a product of 8 bits.

    That would be for a gradient of the weight, which has none, and it is held beside what autograd saves: gradient
    checkpointing would free none of it.
    """
    node = output.grad_fn
    if hasattr(node, "tensors"):
        node.tensors = (None, None, None)
    elif hasattr(node, "A"):
        node.A = None


def settle(model: PreTrainedModel) -> None:
    """
    Check what was loaded with few bits, keep it as it was loaded, and say how much of the model it is.

    Raises:
        ValueError: when no layer has few bits, or the head has.
    """
    layers = dict(_layers(model))
    if not layers:
        raise ValueError(
            f"quantization_config: no linear layer of {type(model).__name__} was quantized. llm_int8_skip_modules must "
            "leave some; other kinds of quantization than bitsandbytes' are not supported"
        )
    head = model.get_output_embeddings()
    at = next((name for name, layer in layers.items() if layer is head), None)
    if at is not None:
        raise ValueError(f"the LM head must keep its 16 bits: add {at!r} to llm_int8_skip_modules")
    whole = next((name for name, layer in layers.items() if _state(layer) is None and not _has_8_bits(layer)), None)
    if whole is not None:
        raise ValueError(f"quantization_config: {whole} was left with weights of {layers[whole].weight.dtype}")
    for layer in layers.values():
        _keep_as_loaded(layer)
    # It says with each product of 8 bits that inputs are cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if model in _settled:
        return
    held = Held.of(model)
    share = held.few / held.linear_llm if held.linear_llm else 1.0
    _settled.add(model)
    logger.log(logging.INFO if share > _MOST else logging.WARNING, "%s", held.told())


_MOST = 0.5


@dataclass(frozen=True)
class Held:
    """
    What the weights of a model take.

    Attributes:
        kind: what those of few bits are.
        layers: that have them.
        few, whole: weights of few bits, and all others.
        few_bytes, whole_bytes: what they take, with their scales.
        linear_llm: weights of matrices in the language model, experts among them.
    """

    kind: str
    layers: int
    few: int
    whole: int
    few_bytes: int
    whole_bytes: int
    linear_llm: int

    @classmethod
    def of(cls, model: nn.Module) -> Held:
        """Count those of a model, without adapters."""
        model = unwrap(model)
        layers = dict(_layers(model))
        packed = {id(layer.weight) for layer in layers.values()}
        added = (".lora_", ".modules_to_save.")
        parameters = [(n, p) for n, p in model.named_parameters() if not any(part in n for part in added)]
        whole = [parameter for _, parameter in parameters if id(parameter) not in packed]
        scales = {tensor.data_ptr(): tensor.nbytes for _, tensor in named_scales(model)}
        first = next(iter(layers.values()), None)
        family = family_class(model.config.model_type)
        scope_of = (lambda name: "llm") if family is None else family.__new__(family).scope_of
        embedding = model.get_input_embeddings().weight
        return cls(
            kind="" if first is None else _read_as(first).partition(",")[0],
            layers=len(layers),
            few=sum(weight_count(layer.weight) for layer in layers.values()),
            whole=sum(parameter.numel() for parameter in whole),
            few_bytes=sum(layer.weight.nbytes for layer in layers.values()) + sum(scales.values()),
            whole_bytes=sum(parameter.nbytes for parameter in whole),
            linear_llm=sum(
                weight_count(parameter)
                for name, parameter in parameters
                if scope_of(name) == "llm"
                and (id(parameter) in packed or parameter.dim() > 1)
                and parameter is not embedding
            ),
        )

    def told(self) -> str:
        """Say it in a sentence."""
        text = (
            f"{self.few / 1e6:.4g} M weights in {self.layers} linear layers are {self.kind} "
            f"({self.few_bytes / _MIB:.4g} MiB); {self.whole / 1e6:.4g} M others are as they were loaded "
            f"({self.whole_bytes / _MIB:.4g} MiB)"
        )
        if self.few <= _MOST * self.linear_llm:
            text += (
                f". That is {self.few / self.linear_llm:.0%} of the language model's matrices: the others are no linear layers "
                "(experts), or llm_int8_skip_modules leaves them"
            )
        return text


def describe(model: nn.Module) -> str | None:
    """Say what decides the numbers of a model with few bits, for records of a run; `None` for others."""
    layers = dict(_layers(unwrap(model))) if is_quantized(model) else {}
    if not layers:
        return None
    return f"{_read_as(next(iter(layers.values())))}, {len(layers)} layers"
