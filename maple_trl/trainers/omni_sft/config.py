"""Configuration of omni-modal supervised fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from maple_trl.omni.generation import check_generation_options
from maple_trl.trainers.common.media_config import MediaConfig


@dataclass
class OmniSFTConfig(MediaConfig, SFTConfig):
    r"""
    Configuration class for [`OmniSFTTrainer`].

    Adds to [`~trl.SFTConfig`] what rows are fed and how their media are read, and how
    [`~OmniSFTTrainer.generate_completions`] samples.

    Raises:
        ValueError: for options that contradict each other, naming the field.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs", "generation_kwargs"]

    # TRL's 1024 would cut media tokens off; a text-only model can have it back.
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens at which TRL cuts a text-only row. Null for rows with media, which max_prompt_length and "
            "max_media_tokens make shorter without losing any."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments for the chat template, e.g. enable_thinking."}
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Most tokens of a completion that is sampled to measure accuracy."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the completions that are sampled to measure accuracy."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the completions sampled to measure accuracy."})
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of `generate` for those completions."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {self.max_completion_length}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        settings = {"max_new_tokens": "max_completion_length", "max_length": "max_completion_length"}
        settings |= {"temperature": "temperature", "top_p": "top_p"}
        check_generation_options(self.generation_kwargs or {}, settings, "generation_kwargs")

    def check_for_media(self) -> None:
        """
        Check the options against rows with media.

        Raises:
            ValueError: for an option of [`~trl.SFTConfig`] that would lose media, or that has no effect on such rows.
        """
        reasons = {
            "packing": "a packed sequence has no place for each row's own positions and media",
            "eval_packing": "a packed sequence has no place for each row's own positions and media",
            "padding_free": "a flattened batch has no place for each row's own positions and media",
            "max_length": "it would cut media tokens off; use max_prompt_length and max_media_tokens",
            "assistant_only_loss": "the loss is that of the completion; put what is to be learnt there",
            "shuffle_dataset": "the sampler draws a new order in each epoch already",
            "use_liger_kernel": "its kernels replace forwards that media pass through",
            "label_smoothing_factor": "it needs a second forward, which the media do not reach on every rank",
            "chat_template_path": "the template must be the one of the model's processor",
            "dataset_kwargs": "rows with media are encoded when they are used",
        }
        for name, reason in reasons.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported for rows with media: {reason}")
        if self.completion_only_loss is False:
            raise ValueError(
                "completion_only_loss=False is not supported for rows with media: media tokens cannot be learnt. Leave "
                "it null."
            )
