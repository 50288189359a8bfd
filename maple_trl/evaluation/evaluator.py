"""Asks a model every question of a data set several times, under one or several choices of the signals it is fed."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from maple_trl.evaluation.eval_options import ALL, REQUIRED, EvalOptions, EvaluationError, ScoringError
from maple_trl.evaluation.eval_sampling import StreamSampler, sample_stream
from maple_trl.modalities import ModalityTag
from maple_trl.omni.encoded import EncodedPrompt, generation_position_ids, tensor_bytes
from maple_trl.omni.errors import MediaError
from maple_trl.omni.prompt import PromptBuilder, RowError
from maple_trl.omni.serving import serve_media
from maple_trl.omni.shared_prefill import share_prefill
from maple_trl.omni.sharing import prefill_difference


# Mean difference of log-probabilities that rounding explains, of half-precision and of other models.
_ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.1}

Row = Mapping[str, Any]
Line = dict[str, Any]
"""One line of the table of results: a sample, or a question that was not asked and why."""


@dataclass(frozen=True)
class Batch:
    """Questions that pass the model together: rows by number, under one access."""

    number: int
    access: str
    rows: tuple[int, ...]


class Evaluator:
    """
    Asks and scores batch by batch; what is kept of it is the caller's business.

    Args:
        model: of a registered family, with or without adapters, in the place and precision to evaluate in.
        builder ([`~maple_trl.omni.prompt.PromptBuilder`]):
            How rows become prompts; its own `modality_access` is not used.
        rows: with `prompt`, where they apply `video`, `audio`, `subtitle` and `tag`, and what `score` reads. A column
            `id`, where it names every row differently, decides the samples; else the row's number does.
        score: a reward function with TRL's signature, whose scores lie in [0, 1]; `None` for what it cannot score.
        extract: the answer in a completion's text, or `None`.
        options: how questions are asked.

    Attributes:
        batches (`list[Batch]`): all work, in order; the same in every process.
        skipped (`list[Line]`): questions that are not asked under an access, for the row lacks a signal or is no prompt.

    Raises:
        EvaluationError: without a row, for a tag that is none, and when no row can be asked.
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
        self.family = builder.family
        self.core = self.family.core(model)
        self.loader = builder.loader
        self.rows = rows
        self.score, self.extract = score, extract
        self.options = options
        self._builders = {name: _with_access(builder, name) for name in (REQUIRED, ALL)}
        if not len(rows):
            raise EvaluationError("the data set holds no row")
        self.tags = [_tag(row, number) for number, row in enumerate(rows)]
        self.names = _names(rows)
        self.generation_config = _generation_config(model, self.family, options)
        self.batches, self.skipped = self._plan()
        if not self.batches:
            first = self.skipped[0]
            raise EvaluationError(
                f"no row can be asked under access {', '.join(options.access)}: row {first['row']}: {first['detail']}"
            )

    @property
    def device(self) -> torch.device:
        return self.core.get_input_embeddings().weight.device

    # What is asked

    def _plan(self) -> tuple[list[Batch], list[Line]]:
        skipped: list[Line] = []
        chunks = []
        for place, access in enumerate(self.options.access):
            usable = []
            for number in range(len(self.rows)):
                try:
                    self._spec(number, access)
                    usable.append(number)
                except RowError as error:
                    lacking = access in list(ModalityTag) and self._is_prompt(number)
                    status, reason = ("lacking", "no-such-signal") if lacking else ("error", "invalid-row")
                    skipped.append(self._line(number, access, status, reason=reason, detail=str(error)))
            size = self.options.batch_size
            chunks += [(usable[i], place, access, tuple(usable[i : i + size])) for i in range(0, len(usable), size)]
        # By rows, then access: the clips of some rows are decoded once for all accesses.
        return [Batch(i, access, rows) for i, (_, _, access, rows) in enumerate(sorted(chunks))], skipped

    def _fed(self, number: int, access: str) -> tuple[PromptBuilder, Row]:
        """The builder and the row that feed a row what an access says."""
        if access in (REQUIRED, ALL):
            return self._builders[access], self.rows[number]
        return self._builders[REQUIRED], {**self.rows[number], "tag": access}

    def _spec(self, number: int, access: str):
        builder, row = self._fed(number, access)
        return builder.spec(row)

    def _is_prompt(self, number: int) -> bool:
        """Whether a row can be asked under any choice of signals."""
        row = self.rows[number]
        for tag in (None, "V", "A", "S"):
            try:
                self._builders[REQUIRED].spec({**row, "tag": tag})
                return True
            except RowError:
                continue
        return False

    def prefetch(self, batch: Batch) -> None:
        """Begins to decode a batch's media in the background."""
        calls = [self._fed(number, batch.access) for number in batch.rows]
        self.loader.prefetch([partial(builder.decode, row) for builder, row in calls])

    # Asking

    @torch.no_grad()
    def run(self, batch: Batch) -> list[Line]:
        """
        Asks and scores one batch.

        Returns:
            a line per sample, and one for each row whose media cannot be used, in the order of rows and samples.

        Raises:
            EvaluationError: when a score is no number in [0, 1].
            ScoringError: when the scoring function fails.
        """
        found = {number: self._encode(number, batch.access) for number in batch.rows}
        prompts = {number: prompt for number, prompt in found.items() if isinstance(prompt, EncodedPrompt)}
        completions = self._generate(list(prompts.values()), [self.names[number] for number in prompts])
        asked = [number for number in prompts for _ in range(self.options.samples)]
        # Of no completion at all it would make one.
        texts = self.family.processor.batch_decode(completions, skip_special_tokens=True) if completions else []
        scores = self._scores(asked, texts, completions, [prompts[number].key for number in asked])
        lines = {number: [found[number]] if number not in prompts else [] for number in batch.rows}
        ends = set(self.generation_config.eos_token_id)
        digests = {number: _input_digest(prompt) for number, prompt in prompts.items()}
        for number, text, ids, score in zip(asked, texts, completions, scores, strict=True):
            prompt = prompts[number]
            lines[number].append(
                self._line(
                    number,
                    batch.access,
                    "unscored" if score is None else "scored",
                    sample=len(lines[number]),
                    completion=text,
                    answer=self.extract(text),
                    score=score,
                    reason="no-score" if score is None else None,
                    finish="end" if ids and ids[-1] in ends else "length",
                    completion_tokens=len(ids),
                    prompt_tokens=len(prompt),
                    notes=list(prompt.notes),
                    inputs=digests[number],
                    **{f"{kind}_tokens": prompt.media_tokens.get(kind, 0) for kind in ("video", "audio", "subtitle")},
                )
            )
        return [line for number in batch.rows for line in lines[number]]

    def _encode(self, number: int, access: str) -> EncodedPrompt | Line:
        """A row's prompt, or the line that says why there is none."""
        builder, row = self._fed(number, access)
        chosen = access not in (REQUIRED, ALL)
        try:
            prompt = builder.encode(row)
        except MediaError as error:
            # The file is whole and has no sound: it lacks the signal as a row without the field does.
            status = "lacking" if chosen and error.reason == "no-signal" else "error"
            return self._line(number, access, status, reason=error.reason, detail=error.detail, path=error.path)
        if chosen and "no-audio-track" in prompt.notes:
            return self._line(number, access, "lacking", reason="no-signal", detail="the file has no audio track")
        return prompt

    def _line(self, number: int, access: str, status: str, **values: Any) -> Line:
        row = self.rows[number]
        texts = {name: _text(row.get(name)) for name in ("solution", "category")}
        return {"id": self.names[number], "row": number, "tag": self.tags[number], **texts} | {
            "access": access,
            "status": status,
            **values,
        }

    def _generate(self, prompts: list[EncodedPrompt], names: list[str]) -> list[list[int]]:
        """Token ids of the samples of each prompt in turn, up to and with the end token."""
        if not prompts:
            return []
        options = self.options
        rows = [prompt for prompt in prompts for _ in range(options.samples)]
        inputs = self._inputs(rows)
        width = inputs["input_ids"].size(1)
        streams = [
            sample_stream(options.seed, name, sample, options.max_new_tokens)
            for name in names
            for sample in range(options.samples)
        ]
        shared = options.shared_prompt and options.samples > 1
        with (
            share_prefill(self.core, rows) if shared else nullcontext(),
            serve_media(self.family, self.model, prompts if shared else rows),
        ):
            output = self.model.generate(
                **inputs,
                generation_config=self.generation_config,
                logits_processor=_processors(options, torch.from_numpy(np.stack(streams)), width),
            )
        return [self._until_end(ids) for ids in output[:, width:].tolist()]

    def _inputs(self, rows: list[EncodedPrompt]) -> dict[str, torch.Tensor]:
        """Padded on the left, with positions as `generate()` takes them."""
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

    def _scores(
        self, asked: list[int], texts: list[str], completions: list[list[int]], groups: list[str]
    ) -> list[float | None]:
        if not asked:
            return []
        rows = [self.rows[number] for number in asked]
        columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
        messages = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        columns |= {"completion_ids": completions, "group_ids": groups}
        try:
            scores = self.score(prompts=[row["prompt"] for row in rows], completions=messages, **columns)
        except Exception as error:  # it is the user's, or asks a server: it can fail in any way
            raise ScoringError(f"the scoring function failed: {type(error).__name__}: {error}") from error
        if len(scores) != len(asked):
            raise EvaluationError(f"the scoring function gave {len(scores)} scores for {len(asked)} completions")
        return [_checked_score(score, number) for score, number in zip(scores, asked, strict=True)]

    @torch.no_grad()
    def check_shared_prompt(self) -> None:
        """
        Compares the next token's probabilities of a text prompt that is read once for two rows, and once for each.

        Raises:
            EvaluationError: when they differ by more than rounding explains.
        """
        prompt = self._builders[ALL].encode({"prompt": [{"role": "user", "content": "."}]})
        error = prefill_difference(self.model, self.core, prompt, partial(serve_media, self.family))
        if not error <= _ROUNDING.get(self.core.get_input_embeddings().weight.dtype, 1e-4):
            raise EvaluationError(
                f"samples of this model cannot share their prompt: log-probabilities differ by {error:.2g}. "
                "Set --no-shared-prompt"
            )


def _with_access(builder: PromptBuilder, access: str) -> PromptBuilder:
    builder = copy.copy(builder)
    builder.modality_access = access
    return builder


def _tag(row: Row, number: int) -> str | None:
    try:
        return ModalityTag.parse(row["tag"]).value if row.get("tag") else None
    except ValueError as error:
        raise EvaluationError(f"row {number}, field 'tag': {error}") from None


def _names(rows: Sequence[Row]) -> list[str]:
    """The rows' ids where they tell all rows apart, else their numbers."""
    ids = [row.get("id") for row in rows]
    usable = all(isinstance(name, str | int) and name != "" for name in ids) and len(set(map(str, ids))) == len(ids)
    return [str(name) for name in (ids if usable else range(len(ids)))]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _checked_score(score: Any, number: int) -> float | None:
    if score is None:
        return None
    try:
        value = float(score)
    except (TypeError, ValueError):
        raise EvaluationError(f"row {number}: the scoring function gave {score!r}; a score is a number") from None
    if math.isnan(value):
        return None
    if not 0 <= value <= 1:
        raise EvaluationError(f"row {number}: the scoring function gave {value}; scores must lie in [0, 1]")
    return value


def _input_digest(prompt: EncodedPrompt) -> str:
    """Of all that the model reads of a prompt: tokens, positions, frames and sound."""
    whole = hashlib.blake2b(digest_size=16)
    for values in (prompt.input_ids, prompt.position_ids):
        whole.update(tensor_bytes(values))
    for kind in prompt.kinds:
        whole.update(prompt.media_digest(kind).encode())
    return whole.hexdigest()


def _generation_config(model: nn.Module, family: Any, options: EvalOptions):
    """Every option by itself: what the checkpoint's generation_config.json says beyond its tokens is not used."""
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    unknown = [name for name in options.generation if name not in known]
    if unknown:
        raise EvaluationError(f"generation: GenerationConfig has no option {unknown[0]!r}")
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), family.tokenizer.eos_token_id} - {None}
    if not ends:
        raise EvaluationError("the model names no end token: neither its generation config nor its tokenizer does")
    pad = family.tokenizer.pad_token_id
    suppressed = {*family.suppressed_ids, *(options.generation.get("suppress_tokens") or [])}
    config = GenerationConfig(
        **{
            **options.generation,
            "do_sample": False,  # the sampler below draws, and leaves one token to choose from
            "max_new_tokens": options.max_new_tokens,
            "pad_token_id": min(ends) if pad is None else pad,
            "bos_token_id": family.tokenizer.bos_token_id,
            "eos_token_id": sorted(ends),
            # A sampled media token would be taken for media by the next forward.
            "suppress_tokens": sorted(suppressed),
        }
    )
    model.generation_config = config  # from which generate() takes what a config leaves open
    return config


def _processors(options: EvalOptions, streams_NT: torch.Tensor, width: int):
    """Temperature, then what cuts the distribution, then the draw; nothing for greedy answers."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList()
    if options.temperature == 0:
        return processors
    if options.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    processors.append(StreamSampler(streams_NT, width))
    return processors
