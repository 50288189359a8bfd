"""What training over several processes asks of a model, beside what accelerate does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from maple_trl.trainers.common.run_errors import RunStoppedError


_NAMED = 3


def name_present_layers(model: PreTrainedModel) -> None:
    """Have a model name those layers for FSDP to wrap that it has: a Thinker names the Talker's too, which FSDP refuses."""
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = sorted(present.intersection(model._no_split_modules or ()))


def keep_head_whole(model: PreTrainedModel, core: nn.Module) -> None:
    """
    Gather the LM head with each forward of `core`, where FSDP 2 has sharded it by itself.

    TRL's fused head reads its weight without a forward of it, which would gather it and average its gradient; of a weight
    in parts, each rank would keep its own gradient instead.
    """
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        core.register_forward_pre_hook(lambda *_: head.unshard())


@contextmanager
def held_back(accelerator: Accelerator, passed: Callable[[], bool], counts: Callable[[], bool]) -> Iterator[None]:
    """
    Keep DeepSpeed from backward passes of a loss without a forward pass, and from updates without anything to train on.

    It fails on the former. The latter it makes with the last backward pass of a step, where momentum and decay would move
    weights all the same.

    Args:
        passed: tells, at a backward pass, whether the model had a forward pass for it.
        counts: tells then whether anything of the optimizer step counts.
    """
    engine = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if engine is None:
        yield
        return
    plain = engine.backward

    def backward(loss: Tensor, sync_gradients: bool = True, **kwargs: object) -> None:
        if passed():
            plain(loss, sync_gradients=sync_gradients and counts(), **kwargs)

    engine.backward = backward
    try:
        yield
    finally:
        engine.backward = plain


def check_awaited(model: nn.Module) -> None:
    """
    Check after a first backward pass that it gave each weight a gradient for which DDP waits.

    Raises:
        RunStoppedError: naming those without one, on which the next pass would fail.
    """
    waits = isinstance(model, DistributedDataParallel) and not (model.find_unused_parameters or model.static_graph)
    weights = [(name, w) for name, w in model.named_parameters() if w.requires_grad] if waits else []
    without = [name.removeprefix("module.") for name, weight in weights if weight.grad is None]
    if without and len(without) < len(weights):  # none has one where nothing was trained on
        more = f" and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
        raise RunStoppedError(
            f"ddp_find_unused_parameters is false, but no pass gives these weights a gradient: {', '.join(without[:_NAMED])}"
            f"{more}. DDP would wait for it in vain: freeze them, or leave ddp_find_unused_parameters out"
        )
