"""What a trainer is given: its configuration, model and data sets, as they are or to be loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, set_seed
from transformers.trainer_utils import SaveStrategy, SchedulerType

from maple_trl.modalities import MEDIA_COLUMNS
from maple_trl.omni.families import is_omni, unwrap
from maple_trl.omni.loading import hub_arguments, load_model, load_processor
from maple_trl.omni.quantization import is_quantized, settle
from maple_trl.trainers.common.media_config import MediaConfig


def load_parts(
    model: str | nn.Module, processing_class: ProcessorMixin | PreTrainedTokenizerBase | None, seed: int, options: dict
) -> tuple[nn.Module, ProcessorMixin | PreTrainedTokenizerBase]:
    """
    Load the model and its processor where they are not given.

    Raises:
        TypeError: for something that is no model of transformers.
        ValueError: when there is no processor, and the model does not know where it came from.
    """
    if not isinstance(model, str) and not (isinstance(model, nn.Module) and hasattr(unwrap(model), "config")):
        raise TypeError(f"model must be a model of transformers, a folder or a Hub id, got {type(model).__name__}")
    name = model if isinstance(model, str) else unwrap(model).config._name_or_path
    if isinstance(model, str):
        set_seed(seed)
        model = load_model(model, **options)
    elif is_quantized(model):
        settle(unwrap(model))
    if processing_class is None:
        if not name:
            raise ValueError("The model does not know where it was loaded from: pass its processing_class")
        processing_class = load_processor(name, **hub_arguments(options))
    return model, processing_class


def own_config(args: Any, config_class: type, model: str | nn.Module, trainer: str) -> Any:
    """
    Copy a trainer's arguments, or make them where there are none.

    Raises:
        TypeError: for arguments of another class.
    """
    if args is None:
        name = model if isinstance(model, str) else unwrap(model).config._name_or_path
        args = config_class(f"{name.rstrip('/').split('/')[-1]}-{trainer.replace(' ', '-')}")
    if not isinstance(args, config_class):
        raise TypeError(f"args must be of type {config_class.__name__}, got {type(args).__name__}")
    if type(args) is not config_class and type(args).__module__.startswith("maple_trl.trainers."):
        raise TypeError(
            f"args is {type(args).__name__}, whose own options have no effect in the trainer of {config_class.__name__}"
        )
    return copy.copy(args)


def each_dataset(dataset: Any, name: str, apply: Callable[[Any, str], Any]) -> Any:
    """Apply a function to a data set and its name, or to each of a dictionary of data sets."""
    if isinstance(dataset, dict):
        return {key: apply(part, f"{name}[{key!r}]") for key, part in dataset.items()}
    return apply(dataset, name)


def check_compared_set(args: Any, eval_dataset: Any) -> None:
    """
    See that what compares models says which of several evaluation sets counts.

    Transformers looks for it after the first evaluation, which ends the run.

    Raises:
        ValueError: naming the field and what would do.
    """
    compares = (
        args.load_best_model_at_end
        or args.save_strategy == SaveStrategy.BEST
        or args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    )
    if not (compares and isinstance(eval_dataset, dict)):
        return
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if not any(metric.startswith(f"{name}_") for name in eval_dataset):
        choice = " or ".join(f"eval_{name}_{metric}" for name in eval_dataset)
        raise ValueError(
            f"metric_for_best_model is {metric!r}, and of several evaluation sets each has its own: set it to {choice}"
        )


def check_text_only(model: nn.Module, datasets: dict[str, Any], args: MediaConfig) -> None:
    """Refuse an omni model, media columns or prompts of our own with a tokenizer, which would train on the text alone."""
    for option in ("prompt_template", "system_prompt"):
        if getattr(args, option) is not None:
            raise ValueError(
                f"{option} is for omni models, and processing_class is a tokenizer: write the prompts into the data set"
            )
    if is_omni(model):
        raise ValueError(
            f"processing_class is a tokenizer, but {type(unwrap(model)).__name__} reads media: pass the model's processor"
        )
    for name, dataset in datasets.items():
        parts = dataset if isinstance(dataset, dict) else {name: dataset}
        for part in parts.values():
            columns = set(MEDIA_COLUMNS) & set(getattr(part, "column_names", None) or [])
            if columns:
                raise ValueError(
                    f"{name} has the column {sorted(columns)[0]!r}, but processing_class is a tokenizer, which reads no "
                    "media: use an omni model with its processor, or drop the column"
                )
