"""Asking models: one conversation for one answer, its repair, where it came from, and what it cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from maple_trl.chat import ChatClient, ChatOptions, ChatRequest, ChatResult
from maple_trl.chat.messages import estimate_prompt_tokens, longest_answer, request_body, request_key, text_block
from maple_trl.chat.structured import NoObjectError
from maple_trl.data.curation.config import CurationConfig
from maple_trl.data.curation.logs import GrowingLog
from maple_trl.data.curation.prompts import REPAIR, TASKS, Prompt
from maple_trl.files import digest


CONTENT_REASONS = ("refused", "content-filter", "truncated", "empty")
"""Reasons of the client that say something of what was asked, and would do so again: the row is dropped by them."""

SPENT = "spent"
"""Name of the log of calls and tokens."""


class DroppedError(Exception):
    """What was asked for cannot be had; the row goes, by this reason."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class ServerError(Exception):
    """A server did not answer; the row stays open, and a later run asks again."""

    def __init__(self, endpoint: str, reason: str, detail: str):
        super().__init__(f"{endpoint}: {reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Ask:
    """
    What is asked of a model.

    Args:
        prompt: the system message.
        content: blocks of the user message: the material.
        form: JSON schema of the answer.
        example: what a dry run takes for the answer.
        fields: of the prompt.
        task: what stands behind the material.
        check: what else must be right with an answer that has the form: `None`, or what is wrong.
    """

    prompt: Prompt
    content: Sequence[Mapping[str, Any]]
    form: Mapping[str, Any]
    example: Any
    fields: Mapping[str, str] = field(default_factory=dict)
    task: str = ""
    check: Callable[[Any], str | None] = lambda data: None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages, without the form of the answer; only text as one string, which every server takes."""
        content = [*self.content, text_block(self.task or TASKS[self.prompt.name.split("-")[0]])]
        texts = [block["text"] for block in content if block["type"] == "text"]
        joined: Any = "\n\n".join(texts) if len(texts) == len(content) else content
        return [{"role": "system", "content": self.prompt.render(**self.fields)}, {"role": "user", "content": joined}]


@dataclass(frozen=True)
class Told:
    """
    An answer.

    Attributes:
        data: the object.
        model, prompt_hash: where it came from; the first 12 digits of the hash are the prompt's, the others the request's.
        problem: what is still wrong with it after its repair; `None` for a good one.
        repaired: whether it was asked for twice.
    """

    data: Any
    model: str
    prompt_hash: str
    problem: str | None = None
    repaired: bool = False

    def provenance(self, *fields: str) -> list[dict[str, Any]]:
        """Return an entry of a row's `provenance` for each field."""
        about = {"model": self.model, "prompt_hash": self.prompt_hash, "reviewer": None}
        return [{"field": name, **about} for name in fields]


class Asker:
    """
    Asks the servers of a curation; belongs to one process.

    Whatever a server answers is kept in files `answers-….sqlite` first, also what cannot be used, so that no answer is
    paid for twice; what was spent is noted in the log `spent`.

    Args:
        config (`CurationConfig`): servers and folder.
        part (`str`): of the logs.
        sharers (`int`): processes that share the servers' rates.
        host (`str`): of the files with answers, where several machines write: one such file is for one machine.
    """

    def __init__(self, config: CurationConfig, part: str = "", sharers: int = 1, host: str = ""):
        self._config, self._sharers, self._host = config, sharers, host and f"-{host}"
        self._options = dict(config.endpoints())
        self._clients: list[tuple[ChatOptions, ChatClient]] = []
        self._spent = GrowingLog(config.work, SPENT, part)

    async def ask(self, stage: str, endpoint: str, ask: Ask) -> Told:
        """
        Ask once, and once more where the answer is malformed, saying what is wrong with it.

        Raises:
            DroppedError: `malformed`, where the second answer has not the form either, or a reason of `CONTENT_REASONS`,
                `truncated` also where the second answer ended at the token limit before it had the form.
            ServerError: for any other reason of the client.
        """
        first = ChatRequest(ask.messages, ask.form, reader=_as_it_is)
        model, key = self._options[endpoint].model, request_key(first, self._options[endpoint])
        answer = await self._send(stage, endpoint, first)
        data, problem = read_answer(answer, ask)
        if problem is not None:
            said = [
                {"role": "assistant", "content": answer.text},
                {"role": "user", "content": REPAIR.format(problem=problem)},
            ]
            answer = await self._send(stage, endpoint, dataclasses.replace(first, messages=[*ask.messages, *said]))
            again, still = read_answer(answer, ask)
            if again is None and data is None:
                raise DroppedError("truncated" if answer.finish_reason == "length" else "malformed", still or "")
            told = (data, problem) if again is None else (again, still)
            return Told(told[0], model, ask.prompt.digest + key[:16], told[1], repaired=True)
        return Told(data, model, ask.prompt.digest + key[:16])

    async def _send(self, stage: str, endpoint: str, request: ChatRequest) -> ChatResult:
        (result,) = await self._client(endpoint).acomplete_many([request])
        if result.attempts:
            spent = {"prompt_tokens": result.prompt_tokens, "completion_tokens": result.completion_tokens}
            self._spent.add({"stage": stage, "endpoint": endpoint, "calls": result.attempts, **spent}, flush=False)
        if result.ok:
            return result
        if result.reason in CONTENT_REASONS:
            raise DroppedError(result.reason, result.detail)
        raise ServerError(endpoint, result.reason, result.detail)

    def _client(self, endpoint: str) -> ChatClient:
        """Return the client of a server; roles that share one share its limits."""
        options = self._options[endpoint]
        for known, client in self._clients:
            if known == options:
                return client
        rates = {name: getattr(options, name) for name in ("requests_per_minute", "tokens_per_minute")}
        client = ChatClient(
            dataclasses.replace(
                options,
                **{name: rate and rate / self._sharers for name, rate in rates.items()},
                concurrency=max(1, options.concurrency // self._sharers),
                cache_file=self._config.work / f"answers-{digest(options.model)[:8]}{self._host}.sqlite",
                cache_bytes=1 << 40,
                invalid_attempts=1,
            )
        )
        self._clients.append((options, client))
        return client

    def close(self) -> None:
        """Close connections and caches."""
        for _, client in self._clients:
            client.close()
        self._clients = []


class Planner:
    """
    Stands in for an [`Asker`] in a dry run: counts, and takes each question's example for its answer.

    Attributes:
        calls: (stage, endpoint) -> calls.
        prompt_tokens, answer_tokens: (stage, endpoint) -> estimates; of answers the most.
    """

    def __init__(self, config: CurationConfig):
        self._options = dict(config.endpoints())
        self.calls: Counter = Counter()
        self.prompt_tokens: Counter = Counter()
        self.answer_tokens: Counter = Counter()

    async def ask(self, stage: str, endpoint: str, ask: Ask) -> Told:
        """Count a call."""
        options, place = self._options[endpoint], (stage, endpoint)
        body = request_body(ChatRequest(ask.messages, ask.form), options, structured=False)
        self.calls[place] += 1
        self.prompt_tokens[place] += estimate_prompt_tokens(body)
        self.answer_tokens[place] += longest_answer(body)
        return Told(ask.example, options.model, ask.prompt.digest)

    def close(self) -> None:
        """Do nothing: nothing is open."""


def read_answer(answer: ChatResult, ask: Ask) -> tuple[Any, str | None]:
    """Return the object of an answer, `None` where there is none of its form, and what is wrong with it, if anything."""
    try:
        data = ChatRequest((), ask.form).read(answer.text, answer.finish_reason)
    except NoObjectError as error:
        return None, str(error)
    data = _clean(data)
    return data, ask.check(data)


def _as_it_is(text: str, cut: bool) -> str:
    """Take any text for an answer: a malformed one is kept, too, and asked about."""
    return text


def _clean(value: Any) -> Any:
    """Make texts one line each, of characters that can be written."""
    if isinstance(value, str):
        return " ".join(value.encode("utf-8", "replace").decode().split())
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {name: _clean(item) for name, item in value.items()}
    return value
