"""What a run may do with weights of 4 or 8 bits, checked before anything is loaded."""

from __future__ import annotations

import logging
import os
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.utils import strtobool

from maple_trl.omni.families import unwrap
from maple_trl.omni.quantization import as_config, is_quantized


logger = logging.getLogger(__name__)


def check_run(args: TrainingArguments, adapted: bool) -> None:
    """
    Check that a run can train beside weights of few bits.

    Raises:
        ValueError: naming what does not go with them.
    """
    if not adapted:
        raise ValueError(
            "weights of 4 or 8 bits cannot be trained, only LoRA adapters beside them: set use_peft: true (in Python pass "
            "peft_config), or load the model without quantization"
        )
    if getattr(args, "use_vllm", False):
        raise ValueError(
            "use_vllm does not go with weights of 4 or 8 bits: vLLM is sent whole weights after each update. Set use_vllm: "
            "false, or load the model without quantization"
        )
    spread = {"FSDP": args.fsdp or _is_on("ACCELERATE_USE_FSDP"), "DeepSpeed": args.deepspeed_plugin is not None}
    for name in (name for name, used in spread.items() if used):
        raise ValueError(
            f"{name} does not go with weights of 4 or 8 bits in this version: train with DDP (each process holds them all), "
            "or load the model without quantization"
        )


def _recompute_whole_layers(args: TrainingArguments) -> None:
    """
    Have gradient checkpointing keep nothing beside layers of 8 bits.

    They hold on to their inputs outside of what autograd saves. Only reentrant checkpointing has no graph to do so with.
    """
    options = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and options.get("use_reentrant") is False:
        logger.warning(
            "gradient_checkpointing with use_reentrant=False frees little beside weights of 8 bits: each of their layers keeps "
            "its input. Leave use_reentrant out, or use load_in_4bit"
        )
    elif args.gradient_checkpointing:
        args.gradient_checkpointing_kwargs = {**options, "use_reentrant": True}


def _is_on(variable: str) -> bool:
    return bool(strtobool(os.environ.get(variable, "false")))


def model_options(
    model: str | nn.Module, options: dict[str, Any], given: Any, adapter: Any, args: TrainingArguments
) -> dict[str, Any]:
    """
    Return the options with which a trainer loads its model, of few bits where that is asked for.

    Of 8 bits, `args` get the kind of gradient checkpointing that goes with them, unless they say one.

    Args:
        model: its name, or one that is loaded already.
        options: `model_init_kwargs`, among which `quantization_config` may be.
        given: the trainer's `quantization_config`.
        adapter: the trainer's `peft_config`.

    Raises:
        ImportError: without bitsandbytes.
        ValueError: for a contradiction, or what does not go with weights of few bits.
    """
    own = options.get("quantization_config")
    if not isinstance(model, str):
        if given is not None:
            raise ValueError(
                "quantization_config has no effect on a model that is loaded already: pass the model's name, or load it with "
                "quantization_config"
            )
        if is_quantized(model):
            check_run(args, adapter is not None or isinstance(model, PeftModel))
            if getattr(unwrap(model), "is_loaded_in_8bit", False):
                _recompute_whole_layers(args)
        return options
    if given is not None and own is not None:
        raise ValueError("quantization_config is given as an argument and in model_init_kwargs: keep one")
    config = own if given is None else given
    if config is None:
        return options
    config = as_config(config)
    check_run(args, adapter is not None)
    if config.load_in_8bit:
        _recompute_whole_layers(args)
    return {"device_map": {"": str(args.device)}} | options | {"quantization_config": config}
