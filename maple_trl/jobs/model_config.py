"""Options of the model: which parts of it are trained, adapted, or have few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig

from maple_trl.modalities import SCOPES


@dataclass
class OmniModelConfig(ModelConfig):
    r"""
    [`~trl.ModelConfig`] with switches for the parts of an omni model.

    Args:
        processor_name_or_path (`str`, *optional*):
            Folder or Hub id of the processor, where the model has none beside it; that of the model it was trained from.
        lora_vision, lora_audio, lora_projectors, lora_llm (`bool`, *optional*, defaults to `True`):
            Parts that get LoRA adapters; with `use_peft` only.
        freeze_vision, freeze_audio, freeze_projectors, freeze_llm (`bool`, *optional*, defaults to `False`):
            Parts that full fine-tuning leaves as they are; without `use_peft` only.
        quantize_towers (`bool`, *optional*, defaults to `False`):
            Give few bits to towers and projectors too; with `load_in_4bit` or `load_in_8bit` only, which quantize the
            language model. The LM head keeps its bits always.

    Raises:
        ValueError: for a switch that would have no effect, and for options of `ModelConfig` that omni models do not
            support.
    """

    processor_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the processor (the model's own)."}
    )
    lora_vision: bool = field(default=True, metadata={"help": "LoRA on the vision encoder (with use_peft)."})
    lora_audio: bool = field(default=True, metadata={"help": "LoRA on the audio encoder (with use_peft)."})
    lora_projectors: bool = field(default=True, metadata={"help": "LoRA on the projectors (with use_peft)."})
    lora_llm: bool = field(default=True, metadata={"help": "LoRA on the language model (with use_peft)."})
    freeze_vision: bool = field(
        default=False, metadata={"help": "Do not train the vision encoder (full fine-tuning)."}
    )
    freeze_audio: bool = field(default=False, metadata={"help": "Do not train the audio encoder (full fine-tuning)."})
    freeze_projectors: bool = field(
        default=False, metadata={"help": "Do not train the projectors (full fine-tuning)."}
    )
    freeze_llm: bool = field(default=False, metadata={"help": "Do not train the language model (full fine-tuning)."})
    quantize_towers: bool = field(
        default=False,
        metadata={"help": "Few bits for towers and projectors too (with load_in_4bit or load_in_8bit)."},
    )

    def __post_init__(self):
        check_quantization(self)
        super().__post_init__()
        if self.use_peft and self.frozen:
            raise ValueError(
                f"{_listed('freeze', self.frozen)} has no effect with use_peft: LoRA freezes the whole base model. Choose "
                "what is adapted with lora_vision, lora_audio, lora_projectors, lora_llm."
            )
        not_adapted = [scope for scope in SCOPES if scope not in self.adapted]
        if not self.use_peft and not_adapted:
            raise ValueError(
                f"{_listed('lora', not_adapted)}: false has no effect without use_peft. Set use_peft: true, or freeze "
                f"parts of full fine-tuning with {_listed('freeze', not_adapted)}."
            )
        if self.use_peft and not self.adapted:
            raise ValueError(f"use_peft needs at least one of {_listed('lora', SCOPES)}")
        if self.use_peft and not (self.lora_r >= 1 and 0 <= self.lora_dropout < 1):
            raise ValueError(
                f"lora_r must be at least 1 and lora_dropout in [0, 1), got lora_r={self.lora_r}, "
                f"lora_dropout={self.lora_dropout}"
            )
        if self.lora_target_modules or self.lora_target_parameters:
            raise ValueError(f"lora_target_modules is replaced by {_listed('lora', SCOPES)}")
        if self.lora_task_type != "CAUSAL_LM":
            raise ValueError(f"lora_task_type must be 'CAUSAL_LM', got {self.lora_task_type!r}")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ValueError(
                "load_in_4bit and load_in_8bit need use_peft: true. Weights of few bits cannot be trained, only LoRA adapters "
                "beside them"
            )

    @property
    def adapted(self) -> list[str]:
        """Scopes with LoRA switched on."""
        return [scope for scope in SCOPES if getattr(self, f"lora_{scope}")]

    @property
    def frozen(self) -> list[str]:
        """Scopes that full fine-tuning leaves out."""
        return [scope for scope in SCOPES if getattr(self, f"freeze_{scope}")]


def check_quantization(options: Any) -> None:
    """
    Check options of quantization, as of [`~trl.ModelConfig`] with `quantize_towers`, against each other.

    Raises:
        ValueError: for one that would have no effect, or is not known.
    """
    if options.load_in_4bit and options.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both true: choose one")
    four = {
        "use_bnb_nested_quant": options.use_bnb_nested_quant,
        "bnb_4bit_quant_type": options.bnb_4bit_quant_type != "nf4",
    }
    four["bnb_4bit_quant_storage"] = options.bnb_4bit_quant_storage is not None
    for name in (name for name, given in four.items() if given and not options.load_in_4bit):
        raise ValueError(f"{name} has no effect without load_in_4bit: true")
    if options.quantize_towers and not (options.load_in_4bit or options.load_in_8bit):
        raise ValueError("quantize_towers has no effect without load_in_4bit or load_in_8bit: true")
    if options.bnb_4bit_quant_type not in _QUANT_TYPES:
        raise ValueError(f"bnb_4bit_quant_type must be nf4 or fp4, got {options.bnb_4bit_quant_type!r}")
    if options.bnb_4bit_quant_storage not in (None, *_STORAGES):
        raise ValueError(
            f"bnb_4bit_quant_storage must be one of {', '.join(_STORAGES)}, got {options.bnb_4bit_quant_storage!r}"
        )


_QUANT_TYPES = ("nf4", "fp4")
_STORAGES = ("uint8", "int8", "float16", "float32", "float64", "bfloat16")


def _listed(prefix: str, scopes: Sequence[str]) -> str:
    return ", ".join(f"{prefix}_{scope}" for scope in scopes)
