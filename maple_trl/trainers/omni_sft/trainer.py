"""Supervised fine-tuning on prompts with video, audio and subtitles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTTrainer

from maple_trl.omni.completions import completion_texts
from maple_trl.omni.embedded import as_paths
from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids, forward_position_ids, generation_position_ids
from maple_trl.omni.generation import end_tokens, own_options
from maple_trl.omni.prompt import RowError
from maple_trl.omni.prompt_spec import PROMPT_COLUMNS
from maple_trl.trainers.common.arguments import (
    check_compared_set,
    check_text_only,
    each_dataset,
    load_parts,
    own_config,
)
from maple_trl.trainers.common.batch import PROMPTS_KEY
from maple_trl.trainers.common.checkpoint import save_rollout, save_rows
from maple_trl.trainers.common.media_trainer import MediaTrainer
from maple_trl.trainers.common.quantized import model_options
from maple_trl.trainers.omni_sft.config import OmniSFTConfig


_READ_COLUMNS = ("completion", *PROMPT_COLUMNS)


class OmniSFTTrainer(MediaTrainer, SFTTrainer):
    """
    [`~trl.SFTTrainer`] whose prompts can hold pictures, video, audio and subtitles, each row its own, in one batch.

    The loss is that of the completions' tokens; a row whose media were not consumed raises. A text-only model (a
    tokenizer as `processing_class`) trains exactly as with TRL.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            A model of a registered family. From a full Omni checkpoint the Thinker alone is loaded. The adapter of a
            `PeftModel` is trained on.
        args ([`OmniSFTConfig`], *optional*): configuration.
        data_collator (`Callable`, *optional*): for a text-only model; rows with media bring their own.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows with `prompt` and `completion` (a text, or messages after a conversational prompt), and where they
            apply `image` or `images`, `video`, `audio`, `subtitle`, `tag` and `audio_in_video` (see
            [`~maple_trl.omni.prompt.PromptBuilder`]).
        eval_dataset: as in [`~trl.SFTTrainer`], with the same columns.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*): loaded with the model if absent.
        kwargs: the other arguments of [`~trl.SFTTrainer`]. With media, a formatting function and functions of the
            loss or of logits are rejected, and so is `data_collator`.

    Raises:
        RowError: for the first row that cannot be trained on, with its number and field.
        ValueError: when options do not fit together.
    """

    _tag_names = ["trl", "sft", "omni", "maple-trl"]
    _name = "Omni SFT"

    def __init__(
        self,
        model: str | nn.Module,
        args: OmniSFTConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        args = own_config(args, OmniSFTConfig, model, self._name)
        check_compared_set(args, eval_dataset)
        init_kwargs = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
        quantization = kwargs.pop("quantization_config", None)
        init_kwargs = model_options(model, init_kwargs, quantization, kwargs.get("peft_config"), args)
        args.model_init_kwargs = None  # TRL would call them ignored
        model, processing_class = load_parts(model, processing_class, args.seed, init_kwargs)

        if isinstance(processing_class, PreTrainedTokenizerBase):
            check_text_only(model, {"train_dataset": train_dataset, "eval_dataset": eval_dataset}, args)
        else:
            names = ("formatting_func", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
            given = {"data_collator": data_collator} | {argument: kwargs.get(argument) for argument in names}
            for argument, value in given.items():
                if value is not None:
                    raise ValueError(f"OmniSFTTrainer does not support `{argument}` for rows with media")
            args.check_for_media()
            self._prepare_media(model, processing_class, args)
            train_dataset = self._register(train_dataset, "train_dataset")
            eval_dataset = each_dataset(eval_dataset, "eval_dataset", self._register)
            args.dataset_kwargs = {"skip_prepare_dataset": True}
            data_collator = self._collate

        super().__init__(
            model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.family is not None:
            # The loss is the parent's own, over the tokens of all micro-batches, whatever that of the model is over.
            self.model_accepts_loss_kwargs = True
        self._finish_construction()
        self._check_batch_size()

    def _check_batch_size(self) -> None:
        """
        Check that there are rows for one batch.

        Of fewer, dropping the last incomplete batch would leave none, and no step.
        """
        needed = self.args.train_batch_size * self.accelerator.num_processes
        dataset = self.train_dataset
        if self.args.dataloader_drop_last and isinstance(dataset, Dataset) and len(dataset) < needed:
            raise ValueError(
                f"train_dataset has {len(dataset)} usable rows, but one batch takes {needed} and dataloader_drop_last drops "
                "those that are not full: lower per_device_train_batch_size, or set dataloader_drop_last to False"
            )

    # Rows

    def _register(self, dataset: Any, name: str) -> Any:
        """Check prompts, media and completions before hours are spent on them, and return the usable rows."""
        if dataset is None:
            return None
        columns = getattr(dataset, "column_names", None)
        if columns and "completion" not in columns:
            raise ValueError(
                f"{name} has no column 'completion', which is what is learnt; its columns: {', '.join(columns)}"
            )
        dataset = as_paths(dataset)
        usable = self.row_encoder.register(dataset, name)
        if isinstance(dataset, Dataset):
            dataset = self.row_encoder.registries[name].dataset  # as it is asked
            read = dataset.select_columns([column for column in _READ_COLUMNS if column in dataset.column_names])
            for i, row in enumerate(read):
                try:
                    self.completion_ids(row)
                except RowError as error:
                    raise RowError(f"{name}, row {i}: {error}") from error
        return usable

    def completion_ids(self, row: Mapping[str, Any]) -> list[int]:
        """
        Return the tokens that a row teaches: what its completion adds to the rendered prompt, with the end token.

        They are encoded apart from the prompt, as sampled completions are.

        Raises:
            RowError: when the row has no completion, or its chat template writes the prompt in another way when a
                completion follows.
        """
        messages = self.row_encoder.spec(row).messages
        completion = row.get("completion")
        if isinstance(messages, str):
            if not isinstance(completion, str) or not completion:
                raise RowError("field 'completion' must be a non-empty text, as field 'prompt' is a text")
            eos = self.family.tokenizer.eos_token
            text = completion if completion.endswith(eos) else completion + eos
        else:
            text = self._rendered(messages, _completion_messages(completion))
        token = next((token for token in self.family.media_tokens if token in text), None)
        if token:
            raise RowError(f"field 'completion' holds the text {token!r}, which the model reads as media; remove it")
        return self.family.tokens(text)

    def _rendered(self, messages: Sequence[dict[str, Any]], completion: list[dict[str, Any]]) -> str:
        """Return the text that a completion adds to its prompt; media do not matter for that."""
        texts = [
            {**message, "content": [block for block in message["content"] if block["type"] == "text"]}
            for message in messages
        ]
        render, options = self.family.processor.apply_chat_template, self.prompt_builder.chat_template_kwargs
        prompt = render(texts, tokenize=False, add_generation_prompt=True, **options)
        whole = render([*texts, *completion], tokenize=False, **options)
        if not whole.startswith(prompt) or whole == prompt:
            raise RowError(
                "the chat template writes the prompt in another way when this completion follows: it ends with "
                f"{prompt[-40:]!r}, and with the completion goes on {whole[len(os.path.commonprefix([prompt, whole])) :]!r}. "
                "Change the completion, or set chat_template_kwargs"
            )
        return whole[len(prompt) :]

    def _collate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Called one batch ahead, in the order of the data set: decoding can begin, encoding waits for all ranks.
        if self.args.media_prefetch and get_worker_info() is None:
            self._prefetch(rows, ())
        return rows

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self.family is not None:
            self._signature_columns = [*_READ_COLUMNS]

    # Batches

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        # Before the parent counts completion tokens: a row that stands in for a broken one brings its own.
        if self.family is not None:
            self.model.train()  # as the training step does next; rows are encoded before it
            epoch_iterator = map(self._encode_batch, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _prepare_inputs(self, inputs):
        encoded = self._encode_batch(inputs) if isinstance(inputs, list) else inputs  # rows come from evaluation
        return super()._prepare_inputs(encoded)

    def _encode_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Encode a micro-batch for the model; a collective call."""
        rows, prompts = self.encode_rows(rows)
        self._log_media(prompts)
        completions = [self.completion_ids(row) for row in rows]
        return self._padded(prompts, completions) | {PROMPTS_KEY: prompts}

    def _padded(self, prompts: Sequence[EncodedPrompt], completions: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """
        Pad prompts on the left and completions on the right, as in a rollout.

        Returns:
            `dict`: `input_ids`, `attention_mask` and `labels` of shape (B, P + C), the labels -100 outside of
            completions, and `position_ids` of shape (B, P + C) or, with multimodal rotary embeddings, (3, B, P + C).
        """
        width, length = max(map(len, prompts)), max(map(len, completions))
        if self.args.pad_to_multiple_of is not None:
            length += -(width + length) % self.args.pad_to_multiple_of
        tokenizer = self.family.tokenizer
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        input_ids = torch.full((len(prompts), width + length), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, -100)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            start, end = width - len(prompt), width + len(completion)
            input_ids[i, start:width] = prompt.input_ids
            input_ids[i, width:end] = labels[i, width:end] = torch.tensor(completion, dtype=torch.long)
            attention_mask[i, start:end] = 1
        positions = batch_position_ids(prompts, width, length)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": forward_position_ids(positions),
            "labels": labels,
        }

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.family is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = {name: value for name, value in inputs.items() if name != PROMPTS_KEY}
        with self._serve(self.accelerator.unwrap_model(model), inputs[PROMPTS_KEY]):
            return super().compute_loss(model, batch, return_outputs, num_items_in_batch)

    # Generation

    def _sample(self, prompts: list[EncodedPrompt]) -> list[str]:
        if self._spread:
            raise ValueError("generate_completions cannot sample from a model that is spread over processes")
        if not prompts:
            return []
        batch = self._padded(prompts, [()] * len(prompts))
        batch["position_ids"] = generation_position_ids(prompts, batch["input_ids"].size(1))
        inputs = {name: value.to(self.accelerator.device) for name, value in batch.items() if name != "labels"}
        if self.aux_loss_enabled:  # TRL has switched the routers' outputs on, which decoding steps cannot add up
            inputs["output_router_logits"] = False
        model, tokenizer = self.accelerator.unwrap_model(self.model), self.family.tokenizer
        config = self._generation_config()
        with own_options(model, tokenizer, config) as sampling, self._serve(model, prompts):
            sampled = model.generate(**inputs, generation_config=config)
        completions = sampling.cut(sampled[:, inputs["input_ids"].size(1) :].tolist())
        return completion_texts(self.family, completions, [prompt.input_ids for prompt in prompts])

    def _generation_config(self) -> GenerationConfig:
        args, tokenizer = self.args, self.family.tokenizer
        options = dict(args.generation_kwargs or {})
        # A sampled media token would be taken for media, as in a rollout.
        suppressed = {*self.family.suppressed_ids, *(options.pop("suppress_tokens", None) or ())}
        settings = {
            "do_sample": True,
            "max_new_tokens": args.max_completion_length,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": 0,
            "eos_token_id": end_tokens(self.accelerator.unwrap_model(self.model), tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "suppress_tokens": sorted(suppressed),
        }
        config = GenerationConfig(**(settings | options))
        self.family.check_generation(config)
        return config

    # State

    def _save_checkpoint(self, model, trial):
        # Before the parent's: a checkpoint counts as complete once the parent has written trainer_state.json.
        folder = self._begin_checkpoint(trial)
        if self.family is not None:
            if self.args.should_save:
                save_rows(folder, self.row_encoder.state_dict())
            save_rollout(folder, self.accelerator.process_index, 0, None, self._resume_signature())
        super()._save_checkpoint(model, trial)

    def _resume_signature(self) -> dict[str, Any]:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed")
        return super()._resume_signature() | {name: getattr(self.args, name) for name in names}


def _completion_messages(completion: Any) -> list[dict[str, Any]]:
    """Return a completion after a conversational prompt, as messages of text blocks."""
    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not isinstance(messages, list) or not messages:
        raise RowError("field 'completion' must be a non-empty text or list of messages")
    blocks = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError(f"field 'completion' holds {message!r}, which is not a message with 'role' and 'content'")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
            raise RowError(f"field 'completion' holds the content {content!r}; a completion is text alone")
        if not any(part["text"] for part in parts):
            raise RowError("field 'completion' holds a message without text")
        rest = {name: value for name, value in message.items() if name != "content" and value is not None}
        blocks.append({**rest, "content": [{"type": "text", "text": part["text"]} for part in parts]})
    return blocks
