"""What a run may do with weights of 4 or 8 bits, checked before anything is loaded."""

from __future__ import annotations

from typing import Any

from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from maple_trl.omni.quantization import as_config, is_quantized


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
    spread = {
        "FSDP": args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"),
        "DeepSpeed": args.deepspeed_plugin is not None,
    }
    for name in (name for name, used in spread.items() if used):
        raise ValueError(
            f"{name} does not go with weights of 4 or 8 bits in this version: train with DDP (each process holds them all), "
            "or load the model without quantization"
        )


def model_options(
    model: str | nn.Module, options: dict[str, Any], given: Any, adapter: Any, args: TrainingArguments
) -> dict[str, Any]:
    """
    Return the options with which a trainer loads its model, of few bits where that is asked for.

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
        return options
    if given is not None and own is not None:
        raise ValueError("quantization_config is given as an argument and in model_init_kwargs: keep one")
    config = own if given is None else given
    if config is None:
        return options
    config = as_config(config)
    check_run(args, adapter is not None)
    return {"device_map": {"": str(args.device)}} | options | {"quantization_config": config}
