"""Places of TRL that know vision-language or text models alone, and what they are lent; and one of accelerate."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.utils import imports as accelerate_imports
from torch import nn
from transformers import PreTrainedModel
from trl.trainer import grpo_trainer

from maple_trl.omni.loading import load_model


# Each time that a model is unwrapped, and for each parameter that TRL's constructor looks at, accelerate reads the metadata
# of a package to see whether it is there: a millisecond that adds up over micro-batches.
if hasattr(accelerate_imports, "_is_package_available"):
    accelerate_imports._is_package_available = functools.cache(accelerate_imports._is_package_available)


@contextmanager
def trl_expectations(
    model: nn.Module, init_kwargs: dict[str, Any], generation: Callable[..., Any] | None = None
) -> Iterator[None]:
    """
    Bridge places of TRL's constructor that know vision-language or text models alone.

    It reads `config.image_token_id` of every model with a processor (ours replaces the tokens that it suppresses),
    loads the reference model by the class that the checkpoint names, which for an Omni checkpoint is not the Thinker,
    and to keep an LM head in float32 asks whether it is tied, and for the embedding, where text models have them.

    Args:
        generation: makes what TRL generates with where it uses vLLM; `None`: TRL's own.
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
    makers: dict[str, Any] = {"create_model_from_path": load_reference}
    if generation is not None:
        makers["VLLMGeneration"] = generation
    try:
        with lent(grpo_trainer, **makers):
            yield
    finally:
        for owner, name in borrowers:
            del vars(owner)[name]


@contextmanager
def lent(owner: Any, **settings: Any) -> Iterator[None]:
    """Give a trainer, or a module of TRL, other settings while TRL's methods read them."""
    own = {name: getattr(owner, name) for name in settings}
    vars(owner).update(settings)
    try:
        yield
    finally:
        vars(owner).update(own)


def fit_columns(logs: Mapping[str, Any]) -> None:
    """
    Make the columns that TRL keeps for `log_completions` as long as the prompts beside them.

    TRL makes a table of them, which takes columns of one length. One that a reward function began to log later lacks the
    oldest entries, until so many completions came that these are gone; one that two functions log has too many.
    """
    count = len(logs["prompt"])
    for columns, nothing in ((logs["rewards"], math.nan), (logs["extra"], None)):
        for column in columns.values():
            while len(column) > count:
                column.popleft()
            column.extendleft([nothing] * (count - len(column)))


def replace_latest(logged: deque, values: Sequence[float]) -> None:
    """Replace the newest values of a column that TRL keeps for `log_completions`."""
    for _ in range(min(len(values), len(logged))):
        logged.pop()
    logged.extend(values)
