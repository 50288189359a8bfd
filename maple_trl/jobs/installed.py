"""What a job's options ask for is there: trackers, kernels, and an optimizer that can be made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maple_trl.jobs.errors import SetupError
from maple_trl.messages import did_you_mean


if TYPE_CHECKING:
    from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
    from maple_trl.trainers.omni_sft.config import OmniSFTConfig


def check_installed(training_args: OmniGRPOConfig | OmniSFTConfig) -> None:
    """Raise SetupError for a package that an option needs and that is not there."""
    from transformers.integrations import integration_utils
    from transformers.utils import is_liger_kernel_available

    for name in training_args.report_to or []:  # a list by now
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = integration_utils.INTEGRATION_TO_CALLBACK
            raise SetupError(
                f"report_to: unknown {name!r}{did_you_mean(name, known, 'there are ' + ', '.join(known))}"
            )
        is_there = getattr(integration_utils, f"is_{name.removesuffix('_ml')}_available", None)
        if is_there is not None and not is_there():
            raise SetupError(f"report_to: the package of {name} is not installed; install it, or set report_to: none")
    if getattr(training_args, "use_liger_kernel", False) and not is_liger_kernel_available():
        raise SetupError("use_liger_kernel: the package liger-kernel is not installed")
    _check_optimizer(training_args)


def _check_optimizer(training_args: OmniGRPOConfig | OmniSFTConfig) -> None:
    """Make the optimizer and its schedule for a parameter that stands for the model's, which come after the model."""
    import torch
    from transformers import Trainer, get_scheduler

    name = str(getattr(training_args.optim, "value", training_args.optim))
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(training_args, torch.nn.Module())
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        if made.__module__.startswith("torch.optim"):  # others may ask for a GPU or for layers of the model
            optimizer = made([torch.nn.Parameter(torch.zeros(1))], **options)
    except ImportError as error:
        raise SetupError(f"optim: {name} needs a package that is not installed: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        if not training_args.optim_target_modules:  # layers of the model, which is not there yet
            raise SetupError(
                f"optim: {name} cannot be made with the options given (adam_beta1, optim_args, …): {error}"
            ) from error
    try:
        get_scheduler(
            training_args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=training_args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError) as error:
        kind = getattr(training_args.lr_scheduler_type, "value", training_args.lr_scheduler_type)
        raise SetupError(f"lr_scheduler_type: {kind} cannot be made of lr_scheduler_kwargs: {error}") from error
