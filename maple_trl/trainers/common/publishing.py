"""What a trainer tells others of its model: the card beside its weights, and uploads while it trains and at the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers.trainer
from huggingface_hub import ModelCard
from peft import PeftModel
from trl.trainer import base_trainer

from maple_trl.hub.errors import hub_errors
from maple_trl.hub.model_card import READING, CardFacts, render_model_card, versions
from maple_trl.hub.names import located
from maple_trl.hub.publish import Publisher
from maple_trl.omni.families import OmniFamily, unwrap
from maple_trl.records.options import chosen
from maple_trl.trainers.common.trl_compat import lent


logger = logging.getLogger(__name__)


class PublishingTrainer:
    """
    Mixed into a TRL trainer: cards of its own, and uploads of what is meant for others.

    Attributes:
        dataset_name (`str`, *optional*): the training set, as the job names it; a path is not published.
        job_options (`Mapping`): options beside the trainer's own that decide the result, for the card's recipe.
    """

    family: OmniFamily | None
    dataset_name: str | None = None
    job_options: Mapping[str, Any] = {}

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write `README.md` into `output_dir`, as TRL does: what the model is, was made of, and is asked with.

        Args:
            model_name (`str`, *optional*): default: that of the folder or the repository.
            dataset_name (`str`, *optional*): default: the attribute `dataset_name`.
            tags (`str` or `list[str]`, *optional*): for the Hub, beside the trainer's own.
        """
        with lent(base_trainer, generate_model_card=self._make_card):
            super().create_model_card(model_name or self._model_name, dataset_name or self.dataset_name, tags)

    @property
    def _model_name(self) -> str:
        return (self.args.hub_model_id or Path(self.args.output_dir).absolute().name).rpartition("/")[2]

    def _make_card(
        self,
        model_name: str,
        hub_model_id: str | None,
        dataset_name: str | None,
        tags: list[str],
        wandb_url: str | None = None,
        trackio_url: str | None = None,
        comet_url: str | None = None,
        **_: Any,
    ) -> ModelCard:
        """Stand in for TRL's function of a card: what it has collected comes in, and a card goes out, which it saves."""
        model = self.accelerator.unwrap_model(self.model)
        links = {"Weights & Biases": wandb_url, "Trackio": trackio_url, "Comet": comet_url}
        options = self._chosen_options()
        facts = CardFacts(
            name=model_name,
            repository=hub_model_id,
            trained_from=located(unwrap(model).config._name_or_path or None),
            adapter=isinstance(model, PeftModel),
            architecture=type(unwrap(model)).__name__,
            model_type=unwrap(model).config.model_type,
            trainer=self._name,
            papers=[self._paper] if self._paper else [],
            tags=sorted(tags),
            dataset=located(dataset_name),
            steps=self.state.global_step,
            recipe=located({**self.job_options, **options}),
            rewards=self._reward_weights(),
            reading=located({name: options[name] for name in READING if name in options}),
            versions=versions(),
            links={name: url for name, url in links.items() if url},
        )
        card = render_model_card(facts, self.args.output_dir)
        facts.write(self.args.output_dir, card)
        return card

    def _chosen_options(self) -> dict[str, Any]:
        options = chosen(self.args)
        generation = dict(options.pop("generation_kwargs", None) or {})
        if self.family is not None and generation.get("suppress_tokens") == sorted(self.family.suppressed_ids):
            del generation["suppress_tokens"]  # the trainer's own
        return options | ({"generation_kwargs": generation} if generation else {})

    def _reward_weights(self) -> dict[str, float]:
        names = getattr(self, "reward_func_names", [])
        weights = getattr(self.args, "reward_weights", None) or [1.0] * len(names)
        return dict(zip(names, weights, strict=True))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model as the parent does, but for the key in its pickled options; and a card beside it, in place of PEFT's."""
        with lent(self.args, hub_token=None):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            try:
                with lent(self.args, output_dir=folder):
                    self.create_model_card(self._model_name_of(output_dir))
            except Exception as error:  # the weights are there; a run does not end for want of a page about them
                logger.warning("%s: the model is saved, its card is not: %s", folder, error or type(error).__name__)

    def _model_name_of(self, folder: str | None) -> str:
        own = folder is None or os.path.basename(os.path.normpath(folder)).startswith("checkpoint-")
        return self._model_name if own else (self.args.hub_model_id or Path(folder).absolute().name).rpartition("/")[2]

    # The Hub

    @cached_property
    def publisher(self) -> Publisher:
        """The client that uploads, and keeps what failed meanwhile."""
        return Publisher(token=self.args.hub_token)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """
        Make the repository where there is none, before the first step.

        Raises:
            PublishError: when the Hub refuses or cannot be reached.
        """
        with self._publishing("push_to_hub: cannot make the repository"):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """
        Upload the model and its card; arguments as of [`~transformers.Trainer.push_to_hub`].

        Raises:
            PublishError: when the Hub refuses or cannot be reached. The model has been saved then.
        """
        with self._publishing("push_to_hub"):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_always_push:
            # The parent copies the checkpoint's weights over those that are being uploaded.
            self._finish_current_push()
        publisher = self.publisher  # which keeps the key; the parent pickles the options once more
        with lent(transformers.trainer, hf_api=lambda: publisher), lent(self.args, hub_token=None):
            super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _publishing(self, what: str) -> Iterator[None]:
        with hub_errors(what), lent(transformers.trainer, hf_api=lambda: self.publisher):
            yield
