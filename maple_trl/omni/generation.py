"""Completions are sampled with the options of a run, and with nothing that a checkpoint brings along."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    GenerationConfig,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from maple_trl.messages import did_you_mean
from maple_trl.omni.families.base import unwrap
from maple_trl.omni.prefix.shared_prefill import last_position_alone


logger = logging.getLogger(__name__)

TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""What a checkpoint's generation config may decide."""


def _check_count(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number of tokens, got {value!r}")


def _check_tokens(value: Any, name: str) -> None:
    if isinstance(value, str) or not (isinstance(value, Sequence) and all(type(token) is int for token in value)):
        raise ValueError(f"{name} must be a list of ids of tokens, got {value!r}")


# What applies an option, and refuses a wrong value, with the values by which it is off.
_PROCESSORS = {
    "top_k": (TopKLogitsWarper, (0,)),
    "top_p": (TopPLogitsWarper, (1, 1.0)),
    "min_p": (MinPLogitsWarper, ()),
    "top_h": (TopHLogitsWarper, ()),
    "typical_p": (TypicalLogitsWarper, (1, 1.0)),
    "epsilon_cutoff": (EpsilonLogitsWarper, (0, 0.0)),
    "eta_cutoff": (EtaLogitsWarper, (0, 0.0)),
    "repetition_penalty": (RepetitionPenaltyLogitsProcessor, (1, 1.0)),
    "no_repeat_ngram_size": (NoRepeatNGramLogitsProcessor, (0,)),
    "sequence_bias": (SequenceBiasLogitsProcessor, ()),
    "bad_words_ids": (NoBadWordsLogitsProcessor, ()),
    "exponential_decay_length_penalty": (lambda value: ExponentialDecayLengthPenalty(value, 0, 0), ()),
    "min_length": (partial(_check_count, name="min_length"), ()),
    "min_new_tokens": (partial(_check_count, name="min_new_tokens"), ()),
    "suppress_tokens": (partial(_check_tokens, name="suppress_tokens"), ()),
    "begin_suppress_tokens": (partial(_check_tokens, name="begin_suppress_tokens"), ()),
}

# What `generate()` hands back is read as rows of tokens, of which one belongs to each prompt.
_SAMPLED = "completions are sampled from the model, token by token and each by itself"
_CLOSED = {
    "num_beams": _SAMPLED,
    "num_beam_groups": _SAMPLED,
    "diversity_penalty": _SAMPLED,
    "early_stopping": _SAMPLED,
    "length_penalty": _SAMPLED,
    "constraints": _SAMPLED,
    "force_words_ids": _SAMPLED,
    "penalty_alpha": _SAMPLED,
    "dola_layers": _SAMPLED,
    "guidance_scale": _SAMPLED,
    "use_mtp": _SAMPLED,
    "prompt_lookup_num_tokens": _SAMPLED,
    "assistant_early_exit": _SAMPLED,
    "token_healing": "it changes the prompt",
    "encoder_repetition_penalty": "the models here have no encoder of text",
    "encoder_no_repeat_ngram_size": "the models here have no encoder of text",
    "decoder_start_token_id": "the models here have no encoder of text",
    "num_return_sequences": "each row takes one completion",
    "return_dict_in_generate": "completions are read as tokens",
    "output_scores": "completions are read as tokens",
    "output_logits": "completions are read as tokens",
    "output_attentions": "completions are read as tokens",
    "output_hidden_states": "completions are read as tokens",
    "eos_token_id": "model and tokenizer say which tokens end a completion; stop_strings ends it at a text",
    "pad_token_id": "the tokenizer says which token pads",
    "bos_token_id": "the tokenizer says which token begins",
}
_NEUTRAL = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "length_penalty": (None, 1),
    "diversity_penalty": (None, 0),
    "guidance_scale": (None, 1),
    "encoder_repetition_penalty": (None, 1),
    "encoder_no_repeat_ngram_size": (None, 0),
}


def check_generation_options(options: Mapping[str, Any], settings: Mapping[str, str], place: str) -> None:
    """
    Check further options of `generate()` against what it knows, before a model is loaded.

    Args:
        options: as the user gave them.
        settings: names that have an option of their own, and how that is called.
        place: what errors begin with.

    Raises:
        ValueError: naming the option, and what would be right.
    """
    known = [name for name in GenerationConfig().to_dict() if name != "transformers_version"]
    for name, value in options.items():
        if name in settings:
            raise ValueError(f"{place}: {name} is set by {settings[name]}")
        if name in _CLOSED and value not in _NEUTRAL.get(name, (None, False)):
            raise ValueError(f"{place}: {name}={value!r} is not supported: {_CLOSED[name]}")
        if name not in known:
            raise ValueError(f"{place}: GenerationConfig has no option {name!r}{did_you_mean(name, known)}")
    strings = options.get("stop_strings")
    texts = [strings] if isinstance(strings, str) else strings
    if strings is not None and not (
        isinstance(texts, Sequence) and texts and all(isinstance(text, str) and text for text in texts)
    ):
        raise ValueError(f"{place}: stop_strings must be a text or a list of texts, got {strings!r}")
    try:
        GenerationConfig(**{"do_sample": True, **options})
        check_values(options)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{place}: {error}") from error


def check_values(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that the first step would refuse; what stands for an option that is off passes."""
    for name, (processor, off) in _PROCESSORS.items():
        value = options.get(name)
        if value is not None and value not in off:
            processor(value)


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a completion, in order: those of the model's generation config, and the tokenizer's own."""
    told = model.generation_config.eos_token_id
    return sorted({*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id} - {None})


def savable(config: GenerationConfig) -> GenerationConfig:
    """
    Return the config, or what can be saved of it.

    The library refuses to write options that contradict each other once any of them was changed (a trainer sets the
    padding token), which would end a run at its first checkpoint.
    """
    try:
        config.validate(strict=True)
        return config
    except ValueError as error:
        changed = copy.deepcopy(config)
        changed.do_sample = True  # what options that only sampling knows were meant for
        try:
            changed.validate(strict=True)
            return changed
        except ValueError:
            logger.warning("Of the model's generation config only the tokens are saved: %s", error)
            return GenerationConfig(**{name: getattr(config, name) for name in TOKENS})


class StopStrings(StoppingCriteria):
    """
    Ends each row at its first stop string, and remembers where that was.

    A row that has ended is filled up with padding while others go on, which without this would count as sampled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: str | Sequence[str]):
        self._criteria = StopStringCriteria(tokenizer, strings)
        self._lengths_N: Tensor | None = None  # new tokens up to the stop string; 0: none so far
        self._prompt_width = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Mark the rows that have met a stop string."""
        found_N = self._criteria(input_ids, scores)
        if self._lengths_N is None:  # asked after each new token, so this is the first one
            self._prompt_width = input_ids.size(1) - 1
            self._lengths_N = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        self._lengths_N[found_N & (self._lengths_N == 0)] = input_ids.size(1) - self._prompt_width
        return found_N

    def lengths(self, rows: int) -> list[int]:
        """Count the new tokens of each row up to and with its stop string; 0 for a row without."""
        return [0] * rows if self._lengths_N is None else self._lengths_N.tolist()


class Sampling:
    """What one call of `generate()` inside [`own_options`] tells beyond its tokens."""

    def __init__(self, stops: StopStrings | None):
        self._stops = stops

    def cut(self, completions: Sequence[list[int]]) -> list[list[int]]:
        """Return the completions without what padding follows a stop string."""
        lengths = self._lengths(completions)
        return [ids[:length] if length else ids for ids, length in zip(completions, lengths, strict=True)]

    def stopped(self, completions: Sequence[list[int]]) -> list[bool]:
        """Mark the completions that, once cut, end with a stop string."""
        lengths = self._lengths(completions)
        return [0 < length <= len(ids) for ids, length in zip(completions, lengths, strict=True)]

    def _lengths(self, completions: Sequence[list[int]]) -> list[int]:
        return [0] * len(completions) if self._stops is None else self._stops.lengths(len(completions))


@contextmanager
def own_options(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> Iterator[Sampling]:
    """
    Let one `model.generate(generation_config=config)` inside this context use what `config` says and nothing else.

    `generate()` takes what `config` leaves open from `model.generation_config`, which a checkpoint's
    `generation_config.json` fills; and it ends completions at stop strings only where it is handed the tokenizer, which
    not every caller does. Logits are computed of the last position alone.

    Args:
        model: with or without adapters; outside of wrappers of accelerate.
        config: what `generate()` is given.
    """
    plain = unwrap(model)
    holders = [plain] if model is plain else [model, plain]  # PEFT hands its own on to the model below
    kept = [vars(holder).get("generation_config") for holder in holders]
    strings, config.stop_strings = config.stop_strings, None
    stops = None if strings is None else StopStrings(tokenizer, strings)
    for holder in holders:
        holder.generation_config = GenerationConfig()
    if stops is not None:
        plain.generate = partial(plain.generate, stopping_criteria=StoppingCriteriaList([stops]))
    try:
        with last_position_alone(plain.base_model):
            yield Sampling(stops)
    finally:
        config.stop_strings = strings
        if stops is not None:
            del plain.generate
        for holder, before in zip(holders, kept, strict=True):
            if before is None:
                vars(holder).pop("generation_config", None)
            else:
                holder.generation_config = before
