"""Asks a model every question of a data set several times, under one or several choices of the signals it is fed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from maple_trl.evaluation.base import Answer, BaseEvaluator, Batch, Row
from maple_trl.evaluation.inputs import sound_columns
from maple_trl.evaluation.options import ALL, EvalOptions
from maple_trl.evaluation.sampling import StreamSampler, sample_stream
from maple_trl.omni.completions import completion_texts
from maple_trl.omni.encoded import KINDS, EncodedPrompt, generation_position_ids, tensor_bytes
from maple_trl.omni.errors import MediaError
from maple_trl.omni.generation import check_generation_options, end_tokens, own_options
from maple_trl.omni.prefix.shared_prefill import grows_cache, share_prefill
from maple_trl.omni.prefix.sharing import prefill_difference, probe_prompt
from maple_trl.omni.prompt import PromptBuilder, RowError
from maple_trl.omni.serving import serve_media
from maple_trl.records.evaluations import EvaluationError


# Mean difference of log-probabilities that rounding explains, of half-precision and of other models.
_ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.1}

_FIRST = 16  # questions among which one with media is looked for


class Evaluator(BaseEvaluator):
    """
    Asks a model in this process.

    Args:
        model: of a registered family, with or without adapters, in the place and precision to evaluate in.
        builder, rows, score, extract, options: as in [`~maple_trl.evaluation.base.BaseEvaluator`].
    """

    def __init__(
        self,
        model: nn.Module,
        builder: PromptBuilder,
        rows: Sequence[Row],
        score: Callable[..., Sequence[float | None]],
        extract: Callable[[str], str | None],
        options: EvalOptions,
    ):
        self.model = model
        self.core = builder.family.core(model)
        self.generation_config = _generation_config(model, builder.family, options)
        builder.family.check_generation(self.generation_config)
        self.generation = self.generation_config.to_diff_dict()
        super().__init__(builder, rows, score, extract, options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.core.get_input_embeddings().weight.device

    @torch.no_grad()
    def _answers(self, prompts: Mapping[int, EncodedPrompt], batch: Batch) -> dict[int, list[Answer]]:
        completions, stopped = self._generate(list(prompts.values()), [self.names[number] for number in prompts])
        asked = [number for number in prompts for _ in range(self.options.samples)]
        texts = completion_texts(self.family, completions, [prompts[number].input_ids for number in asked])
        ends = set(self.generation_config.eos_token_id)
        answers: dict[int, list[Answer]] = {number: [] for number in prompts}
        for number, text, ids, at_string in zip(asked, texts, completions, stopped, strict=True):
            finish = "end" if at_string or (ids and ids[-1] in ends) else "length"
            answers[number].append(Answer(text, finish, len(ids), len(prompts[number]), ids))
        return answers

    def _read(self, prompt: EncodedPrompt) -> dict[str, Any]:
        tokens = {f"{kind}_tokens": prompt.media_tokens.get(kind, 0) for kind in (*KINDS, "subtitle")}
        return {**tokens, **sound_columns(prompt), "notes": list(prompt.notes), "inputs": _input_digest(prompt)}

    def _generate(self, prompts: list[EncodedPrompt], names: list[str]) -> tuple[list[list[int]], list[bool]]:
        """
        Generate the samples of each prompt in turn, and tell which ended with a stop string.

        Token ids go up to and with the end token or stop string.
        """
        if not prompts:
            return [], []
        options = self.options
        rows = [prompt for prompt in prompts for _ in range(options.samples)]
        inputs = self._inputs(rows)
        width = inputs["input_ids"].size(1)
        streams = [
            sample_stream(options.seed, name, sample, options.max_new_tokens)
            for name in names
            for sample in range(options.samples)
        ]
        shared = options.shared_prompt and options.samples > 1 and grows_cache(self.generation_config)
        with (
            own_options(self.model, self.family.tokenizer, self.generation_config) as sampling,
            share_prefill(self.core, rows) if shared else nullcontext(),
            serve_media(self.family, self.model, prompts if shared else rows),
        ):
            try:
                output = self.model.generate(
                    **inputs,
                    generation_config=self.generation_config,
                    logits_processor=_processors(options, torch.from_numpy(np.stack(streams)), width),
                )
            except (TypeError, ValueError) as error:
                if not options.generation:
                    raise
                raise EvaluationError(f"generation {dict(options.generation)}: the model refuses: {error}") from error
        completions = sampling.cut([self._until_end(ids) for ids in output[:, width:].tolist()])
        return completions, sampling.stopped(completions)

    def _inputs(self, rows: list[EncodedPrompt]) -> dict[str, torch.Tensor]:
        """Pad prompts on the left, with positions as `generate()` takes them."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.generation_config.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = row.input_ids
            mask[i, width - len(row) :] = 1
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": generation_position_ids(rows, width),
        }
        return {name: values.to(self.device) for name, values in inputs.items()}

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = self.generation_config.eos_token_id
        return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]

    @torch.no_grad()
    def check_shared_prompt(self) -> None:
        """
        Compare the next token's probabilities of a prompt that is read once for two rows, and once for each.

        The prompt is one of the first questions with as many kinds of media as they have.

        Raises:
            EvaluationError: when they differ by more than rounding explains.
        """
        prompt = self._telling_prompt()
        error = prefill_difference(self.model, self.core, prompt, partial(serve_media, self.family))
        if not error <= _ROUNDING.get(self.core.get_input_embeddings().weight.dtype, 1e-4):
            raise EvaluationError(
                f"samples of this model cannot share their prompt: log-probabilities differ by {error:.2g}. "
                "Set --no-shared-prompt"
            )

    def _telling_prompt(self) -> EncodedPrompt:
        builder = self._builders[ALL]
        prompts = []
        for number in range(min(len(self.rows), _FIRST)):
            try:
                prompts.append(builder.encode(self._fed(number, ALL)[1]))
            except (MediaError, RowError):  # named when the row has its turn
                continue
            if len(prompts[-1].kinds) == len(self.family.placeholder_ids):
                break
        return probe_prompt([builder.stand_in(), *prompts])


def _input_digest(prompt: EncodedPrompt) -> str:
    """Digest all that the model reads of a prompt: tokens, positions, pictures, frames and sound."""
    whole = hashlib.blake2b(digest_size=16)
    for values in (prompt.input_ids, prompt.position_ids):
        whole.update(tensor_bytes(values))
    for kind in prompt.kinds:
        whole.update(prompt.media_digest(kind).encode())
    return whole.hexdigest()


def _generation_config(model: nn.Module, family: Any, options: EvalOptions):
    """Set every option; what the checkpoint's generation_config.json says beyond its tokens is not used."""
    from transformers import GenerationConfig

    try:
        check_generation_options(options.generation, {}, "generation")
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    ends = end_tokens(model, family.tokenizer)
    if not ends:
        raise EvaluationError("the model names no end token: neither its generation config nor its tokenizer does")
    pad = family.tokenizer.pad_token_id
    suppressed = {*family.suppressed_ids, *(options.generation.get("suppress_tokens") or [])}
    return GenerationConfig(
        **{
            **options.generation,
            "do_sample": False,  # the sampler below draws, and leaves one token to choose from
            "max_new_tokens": options.max_new_tokens,
            "pad_token_id": ends[0] if pad is None else pad,
            "bos_token_id": family.tokenizer.bos_token_id,
            "eos_token_id": ends,
            # A sampled media token would be taken for media by the next forward.
            "suppress_tokens": sorted(suppressed),
        }
    )


def _processors(options: EvalOptions, streams_NT: torch.Tensor, width: int):
    """Return temperature, then what cuts the distribution, then the draw; nothing for greedy answers."""
    from transformers import (
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopHLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    processors = LogitsProcessorList()
    if options.temperature == 0:
        return processors
    if options.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(options.temperature)))
    further = options.generation  # of which `generate()` without its own sampling takes no notice
    if further.get("top_h") is not None:
        processors.append(TopHLogitsWarper(further["top_h"]))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    if (further.get("typical_p") or 1) < 1:
        processors.append(TypicalLogitsWarper(further["typical_p"]))
    if 0 < (further.get("epsilon_cutoff") or 0) < 1:
        processors.append(EpsilonLogitsWarper(further["epsilon_cutoff"]))
    if 0 < (further.get("eta_cutoff") or 0) < 1:
        processors.append(EtaLogitsWarper(further["eta_cutoff"]))
    processors.append(StreamSampler(streams_NT, width))
    return processors
