"""Asking a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maple_trl.chat import ChatClient, ChatOptions, ChatRequest, ChatResult, audio_block, image_block, text_block
from maple_trl.chat.options import check_sampling, read_key
from maple_trl.evaluation.base import Answer, BaseEvaluator, Batch, Line, Row
from maple_trl.evaluation.inputs import sound_columns
from maple_trl.evaluation.options import EvalOptions, ServerError
from maple_trl.evaluation.served_prompts import ServedPrompt, video_blocks
from maple_trl.omni.encoded import KINDS
from maple_trl.omni.prompt import PromptBuilder, RowError
from maple_trl.records.evaluations import EvaluationError


# What the server says of a request, and not of itself: the question is an error, the others are asked.
_OF_THE_ROW = ("bad-request", "content-filter", "refused")
# The model wrote nothing: an answer as good as any other wrong one.
_SILENT = ("empty", "truncated")
_OWN_FIELDS = {"max_tokens": "--max-new-tokens", "max_completion_tokens": "--max-new-tokens", "seed": "--seed"}
# Tokens of an answer that a medium is tried with. A model that thinks may need the second number to get to the end of an
# answer: of one that ends before, some servers count no tokens.
_TRIED_TOKENS = (1, 2048)
_MODEL_DEFAULT = "model-default-{}"
"""The note of a sample that was drawn without a field of the request, because the model does not take it."""
_SHOWN = 300  # characters of what a server said


@dataclass(frozen=True)
class ServerInfo:
    """
    Kind and model of a server, as far as it tells them.

    Attributes:
        kind: `"vllm"` or `"other"`.
        root: the model that stands behind the served name, where it is told.
        max_length: its longest sequence, where it is told.
    """

    kind: str = "other"
    root: str | None = None
    max_length: int | None = None


def inspect_server(options: ChatOptions) -> ServerInfo:
    """
    Ask a server which models it has.

    Servers are free to have no such list, or one that lacks the model (`transformers serve` loads what is asked for).

    Raises:
        ServerError: when nothing answers at the address, or the key is refused.
    """
    import openai

    with openai.OpenAI(
        api_key=read_key(options).reveal() or "none", base_url=options.base_url, timeout=options.timeout, max_retries=2
    ) as client:
        try:
            models = {model.id: model for model in client.models.list().data or []}
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ServerError(
                f"{options.base_url}: the key is missing or refused (HTTP {error.status_code})"
            ) from None
        except openai.APIConnectionError as error:
            raise ServerError(f"{options.base_url}: nothing answers ({error.__cause__ or error})") from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            return ServerInfo()
    found = models.get(options.model)
    if found is None:
        return ServerInfo()
    length = getattr(found, "max_model_len", None)
    return ServerInfo(
        kind="vllm" if getattr(found, "owned_by", None) == "vllm" else "other",
        root=getattr(found, "root", None) or None,
        max_length=length if isinstance(length, int) else None,
    )


def check_media(options: ChatOptions, kinds: Sequence[str], video_form: str) -> dict[str, bool]:
    """
    Send a text with and without a medium of each kind, to see whether the server takes and the model reads it.

    A server that leaves out what it does not know answers all the same; that shows in the number of prompt tokens.

    Args:
        kinds: of `image`, `video` and `audio`.
        video_form: as of [`~maple_trl.evaluation.served_prompts.MessageEncoder`].

    Returns:
        by kind whether it is certain that it is read: not where the server counts no tokens.

    Raises:
        ServerError: when the server does not answer a text, refuses a kind, or ignores it.
    """
    noise = np.random.default_rng(0).integers(256, size=(2, 56, 56, 3), dtype=np.uint8)
    probes = {
        "image": [image_block(noise[0])],
        "video": video_blocks(noise, video_form),
        "audio": [audio_block(np.sin(np.arange(8000) * 0.1).astype(np.float32), 16_000)],
    }
    contents = [[], *(probes[kind] for kind in kinds)]
    with ChatClient(dataclasses.replace(options, max_attempts=min(options.max_attempts, 2))) as client:
        for limit in _TRIED_TOKENS:
            plain, *answers = client.complete_many([_trial(blocks, limit) for blocks in contents])
            if plain.reason != "truncated" or plain.last_prompt_tokens:
                break
    if not _usable(plain):
        raise ServerError(f"{options.base_url} does not answer a text: {_told(plain)}")
    found = {}
    for kind, answer in zip(kinds, answers, strict=True):
        advice = f"Choose another server, or --access and rows without {kind}"
        if not _usable(answer):
            form = f" as {video_form}" if kind == "video" else ""
            raise ServerError(f"the server does not take {kind}{form}: {_told(answer)}. {advice}")
        counted = [result.last_prompt_tokens or 0 for result in (plain, answer)]
        if min(counted) > 0 and counted[1] <= counted[0]:
            raise ServerError(
                f"the server ignores {kind}: a prompt has {counted[1]} tokens with it and {counted[0]} without. {advice}"
            )
        found[kind] = min(counted) > 0
    return found


def _trial(blocks: Sequence[Mapping[str, Any]], max_tokens: int) -> ChatRequest:
    """Return the request that shows whether a server takes some media."""
    content = [*blocks, text_block("Answer with one letter.")]
    return ChatRequest([{"role": "user", "content": content}], sampling={"max_tokens": max_tokens})


def _usable(result: ChatResult) -> bool:
    return result.ok or result.reason in _SILENT


def _told(result: ChatResult) -> str:
    return f"{result.reason}: {result.detail[:_SHOWN]}"


class ServedEvaluator(BaseEvaluator):
    """
    Asks a server. Whether it gives the same completions twice is up to it: each sample has a seed of its own.

    Args:
        client: of the server.
        info: what the server told.
        builder: with a [`~maple_trl.evaluation.served_prompts.MessageEncoder`].
        rows, score, extract, options: as in [`~maple_trl.evaluation.base.BaseEvaluator`]; `options.generation` are further
            fields of a request.

    Raises:
        EvaluationError: for a field that is set in another way.
    """

    def __init__(
        self,
        client: ChatClient,
        info: ServerInfo,
        builder: PromptBuilder,
        rows: Sequence[Row],
        score: Callable[..., Sequence[float | None]],
        extract: Callable[[str], str | None],
        options: EvalOptions,
    ):
        for name, option in _OWN_FIELDS.items():
            if name in options.generation:
                raise EvaluationError(f"generation: {name} is set by {option}")
        if "stop_strings" in options.generation:
            raise EvaluationError("generation: a server calls stop_strings 'stop'")
        try:
            check_sampling(options.generation)
        except ValueError as error:
            raise EvaluationError(f"generation: {error}") from error
        self.client = client
        self.generation = _fields(info, options, builder.chat_template_kwargs)
        super().__init__(builder, rows, score, extract, options)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the media that questions are asked with."""
        specs = [self._spec(number, batch.access) for batch in self.batches for number in batch.rows]
        files = {kind: [file for spec in specs for file in getattr(spec, f"{kind}s")] for kind in KINDS}
        return tuple(kind for kind in KINDS if files[kind])

    def _spec(self, number: int, access: str):
        spec = super()._spec(number, access)
        if isinstance(spec.messages, str):
            raise RowError(
                "field 'prompt' is plain text; a server puts every prompt into its chat template: use messages"
            )
        return spec

    def _answers(self, prompts: Mapping[int, ServedPrompt], batch: Batch) -> dict[int, list[Answer] | Line]:
        count = self.options.samples
        requests = [
            ChatRequest(
                prompt.messages,
                sampling={**prompt.options, **self.generation, "seed": self._seed(number, sample)},
                sample=sample,
            )
            for number, prompt in prompts.items()
            for sample in range(count)
        ]
        results = self.client.complete_many(requests) if requests else []
        answers: dict[int, list[Answer] | Line] = {}
        for place, number in enumerate(prompts):
            found = results[place * count : (place + 1) * count]
            refused = next((result for result in found if result.reason in _OF_THE_ROW), None)
            if refused is not None:
                answers[number] = self._line(
                    number, batch.access, "error", reason=f"server-{refused.reason}", detail=refused.detail[:_SHOWN]
                )
                continue
            failed = next((result for result in found if not _usable(result)), None)
            if failed is not None:
                raise ServerError(f"row {number}, access {batch.access}: the server failed: {_told(failed)}")
            answers[number] = [_answer(result) for result in found]
        return answers

    def _seed(self, number: int, sample: int) -> int:
        """Derive a seed from the question's name, not its place, as for samples that are drawn here."""
        text = json.dumps([self.options.seed, self.names[number], sample])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1

    def _read(self, prompt: ServedPrompt) -> dict[str, Any]:
        return {**sound_columns(prompt), "notes": list(prompt.notes), "inputs": prompt.digest}


def _answer(result: ChatResult) -> Answer:
    counted = bool(result.last_prompt_tokens)
    return Answer(
        # JSON can hold halves of surrogate pairs, which no file of text can.
        text=(result.text or "").encode("utf-8", "replace").decode("utf-8"),
        finish="length" if result.finish_reason == "length" else "end",
        tokens=(result.last_completion_tokens or 0) if counted else None,
        prompt_tokens=result.last_prompt_tokens if counted else None,
        notes=tuple(map(_MODEL_DEFAULT.format, result.left_out)),
    )


def _fields(info: ServerInfo, options: EvalOptions, chat_template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request says of sampling; servers take the rest from the checkpoint or from themselves."""
    fields: dict[str, Any] = {
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    if options.top_k or info.kind == "vllm":
        fields["top_k"] = options.top_k
    if options.min_p or info.kind == "vllm":
        fields["min_p"] = options.min_p
    if info.kind == "vllm":
        fields["repetition_penalty"] = 1.0
    if chat_template_kwargs:
        fields["chat_template_kwargs"] = dict(chat_template_kwargs)
    return fields | dict(options.generation)
