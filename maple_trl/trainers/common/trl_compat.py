"""Places of TRL that know vision-language or text models alone, and what they are lent."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from trl.trainer import grpo_trainer

from maple_trl.omni.loading import load_model


@contextmanager
def trl_expectations(model: nn.Module, init_kwargs: dict[str, Any]) -> Iterator[None]:
    """
    Bridge places of TRL's constructor that know vision-language or text models alone.

    It reads `config.image_token_id` of every model with a processor (ours replaces the tokens that it suppresses),
    loads the reference model by the class that the checkpoint names, which for an Omni checkpoint is not the Thinker,
    and to keep an LM head in float32 asks whether it is tied, and for the embedding, where text models have them.
    """
    borrowers: list[tuple[Any, str]] = []

    def lend(owner: Any, name: str, value: Any) -> None:
        if not hasattr(owner, name):
            vars(owner)[name] = value
            borrowers.append((owner, name))

    def lend_parts(model: nn.Module) -> None:
        lend(model.config, "image_token_id", None)
        tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        lend(model.config, "tie_word_embeddings", tied)
        for part in (model, getattr(model, "model", None)):  # TRL looks in a model with adapters, else in its core
            if part is not None:
                lend(part, "embed_tokens", model.get_input_embeddings())

    def load_reference(path: str, **kwargs: Any) -> PreTrainedModel:
        reference = load_model(path, **(kwargs | init_kwargs))
        lend_parts(reference)
        return reference

    lend_parts(model)
    load_as_trl = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = load_reference
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load_as_trl
        for owner, name in borrowers:
            del vars(owner)[name]


@contextmanager
def lent(trainer: Any, **settings: Any) -> Iterator[None]:
    """Give a trainer other settings while its parent's methods read them."""
    own = {name: getattr(trainer, name) for name in settings}
    vars(trainer).update(settings)
    try:
        yield
    finally:
        vars(trainer).update(own)


def replace_latest(logged: deque, values: Sequence[float]) -> None:
    """Replace the newest values of a column that TRL keeps for `log_completions`."""
    for _ in range(min(len(values), len(logged))):
        logged.pop()
    logged.extend(values)
