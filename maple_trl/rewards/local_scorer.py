"""A judge's model in this process instead of behind an endpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from maple_trl.chat import ChatOptions, ChatRequest, ChatResult, ChatUsage
from maple_trl.chat.messages import request_body, request_key
from maple_trl.chat.structured import NoObjectError
from maple_trl.omni.host_memory import host_memory


_ANSWER_BYTES = 64 << 20


class LocalScorer:
    r"""
    Answers a judge's requests with a `transformers` model, greedily. The prompts are those that a server would get.

    The model is loaded with the first request, and answers are kept in memory, so that the same request is not computed
    twice by one process. Every rank loads a model of its own: small ones, or one process.

    Args:
        model (`str`):
            Folder or name of a chat model.
        pictures (`bool`, *optional*, defaults to `False`):
            The model takes pictures.
        device (`str` or `torch.device`, *optional*):
            Where it runs; default is where the trainer runs.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of its weights.
        batch_size (`int`, *optional*, defaults to 8):
            Requests at once.
        max_new_tokens (`int`, *optional*, defaults to 256):
            Longest answer, thoughts included; a model that thinks needs a few thousand.
        model_kwargs (`dict`, *optional*):
            Further arguments of `from_pretrained`.

    Attributes:
        usage (`ChatUsage`): counters; `sent` counts requests that were computed.

    Raises:
        ValueError: for a `batch_size` or `max_new_tokens` below 1.
    """

    def __init__(
        self,
        model: str,
        *,
        pictures: bool = False,
        device: Any = None,
        dtype: str = "auto",
        batch_size: int = 8,
        max_new_tokens: int = 256,
        model_kwargs: dict[str, Any] | None = None,
    ):
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.model, self.pictures, self.device, self.dtype = model, pictures, device, dtype
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.model_kwargs = model_kwargs or {}
        self._options = ChatOptions(model=model)  # for the form of requests alone
        self._usage = ChatUsage()
        self._kept = host_memory().cache("judges", _ANSWER_BYTES)
        self._pipeline: Any = None

    @property
    def usage(self) -> ChatUsage:
        """Counters as of now; a copy."""
        return self._usage.copy()

    def complete_many(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """
        Answer a batch of `requests`, as [`~maple_trl.chat.ChatClient.complete_many`] does.

        A request that the model cannot take has `internal` as its reason, one whose answer was cut before it held what
        was asked for `truncated`.

        Raises:
            OSError, ValueError: when the model cannot be loaded.
        """
        keys = [request_key(request, self._options) for request in requests]
        kept = {key: self._kept.get(key) for key in keys}
        new = {key: request for key, request in zip(keys, requests, strict=True) if kept[key] is None}
        answers = {key: answer for key, answer in kept.items() if answer is not None}
        pending = list(new.items())
        for start in range(0, len(pending), self.batch_size):
            chunk = dict(pending[start : start + self.batch_size])
            computed = dict(zip(chunk, self._compute(list(chunk.values())), strict=True))
            answers |= computed
            self._kept.update({key: answer for key, answer in computed.items() if answer.ok})
        results, seen = [], set()
        for key, request in zip(keys, requests, strict=True):
            source = "cache" if key not in new else "shared" if key in seen else "server"
            seen.add(key)
            results.append(_read(dataclasses.replace(answers[key], source=source), request))
        self._usage.requests += len(results)
        self._usage.cached += sum(result.source == "cache" for result in results)
        self._usage.shared += sum(result.source == "shared" for result in results)
        self._usage.succeeded += sum(result.ok for result in results)
        self._usage.failed.update(result.reason for result in results if not result.ok)
        return results

    def _compute(self, requests: list[ChatRequest]) -> list[ChatResult]:
        import torch

        # Loading draws weights and the pipeline a seed; the run's own random numbers must not depend on that.
        with torch.random.fork_rng(devices=[]):
            return self._generate(self._load(), requests)

    def _generate(self, pipeline: Any, requests: list[ChatRequest]) -> list[ChatResult]:
        chats = [request_body(request, self._options, structured=False)["messages"] for request in requests]
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        self._usage.sent += len(requests)
        try:
            if self.pictures:
                chats = [_with_pictures(chat) for chat in chats]
                outputs = pipeline(text=chats, return_full_text=False, generate_kwargs=options)
            else:
                outputs = pipeline(chats, return_full_text=False, batch_size=self.batch_size, **options)
        except Exception as error:  # a model can fail on its input in any way; that costs these requests, not the run
            return [ChatResult(reason="internal", detail=f"{type(error).__name__}: {error}"[:500])] * len(requests)
        outputs = [output[0] if isinstance(output, list) else output for output in outputs]
        return [
            ChatResult(
                text=output["generated_text"], attempts=1, finish_reason="stop" if output["ended"] else "length"
            )
            for output in outputs
        ]

    def _load(self) -> Any:
        if self._pipeline is None:
            from accelerate import PartialState
            from transformers import GenerationConfig, pipeline

            task = "image-text-to-text" if self.pictures else "text-generation"
            self._pipeline = pipeline(
                task,
                pipeline_class=_pipeline_class(task),
                model=self.model,
                device=PartialState().device if self.device is None else self.device,
                dtype=self.dtype,
                trust_remote_code=False,  # else it is asked at the terminal
                model_kwargs=self.model_kwargs,
            )
            model = self._pipeline.model
            tokenizer = self._pipeline.tokenizer
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            tokenizer.padding_side = "left"
            # Without the model's own sampling settings, which would make greedy answers warn about each of them.
            self._pipeline.generation_config = model.generation_config = GenerationConfig(
                eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        return self._pipeline

    def close(self) -> None:
        """Let the model go; a later request loads it again."""
        self._pipeline = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pipeline": None}

    def __repr__(self) -> str:
        return f"LocalScorer(model={self.model!r})"


def _with_pictures(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write messages as multimodal chat templates take them: blocks everywhere, pictures by their data URL."""
    messages = []
    for message in chat:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        blocks = [
            {"type": "image", "url": block["image_url"]["url"]} if block["type"] == "image_url" else block
            for block in blocks
        ]
        messages.append({**message, "content": blocks})
    return messages


def _read(answer: ChatResult, request: ChatRequest) -> ChatResult:
    if not answer.ok:
        return answer
    try:
        return dataclasses.replace(answer, data=request.read(answer.text, answer.finish_reason))
    except NoObjectError as error:
        reason = "truncated" if answer.finish_reason == "length" else "invalid-json"
        return dataclasses.replace(answer, reason=reason, detail=str(error))


class _EndTelling:
    """A part of a pipeline that also says of each text whether it `ended` by itself or was cut."""

    generation_config: Any

    def postprocess(self, model_outputs: dict[str, Any], *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        records = super().postprocess(model_outputs, *args, **kwargs)
        sequences = model_outputs["generated_sequence"].reshape(len(records), -1)
        written = sequences[:, model_outputs["input_ids"].shape[-1] :].tolist()
        ends = self.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        return [{**record, "ended": not ends.isdisjoint(ids)} for record, ids in zip(records, written, strict=True)]


def _pipeline_class(task: str) -> type:
    import transformers

    names = {"text-generation": "TextGenerationPipeline", "image-text-to-text": "ImageTextToTextPipeline"}
    return type("EndTellingPipeline", (_EndTelling, getattr(transformers, names[task])), {})
