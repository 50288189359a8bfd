"""A reward that another model gives: the part that all judges share."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from maple_trl.chat import ChatClient, ChatOptions, ChatRequest, ChatResult, ChatUsage, fence
from maple_trl.messages import did_you_mean
from maple_trl.rewards.answers import completion_text
from maple_trl.rewards.judge_limits import FailureWindow, JudgeUnavailableError
from maple_trl.rewards.judge_prompts import SCALE
from maple_trl.rewards.judge_texts import echoes, harmless, read_verdict, says_nothing, verdict_schema


if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerState

logger = logging.getLogger(__name__)

BATCH_TIMEOUT = 600.0  # seconds; below the 1800 s that ranks wait for each other by default (`ddp_timeout`)


class Scorer(Protocol):
    """What answers a judge's requests: a [`~maple_trl.chat.ChatClient`] or a [`LocalScorer`]."""

    usage: ChatUsage

    def complete_many(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer a batch of requests, in their order."""


@dataclasses.dataclass(frozen=True)
class Question:
    """
    What a judge asks about one completion.

    Attributes:
        messages (`Sequence[Mapping]`): messages as the API takes them; foreign text in them fenced.
        axes (`Sequence[str]`): names of the grades that the answer must hold.
    """

    messages: Sequence[Mapping[str, Any]]
    axes: Sequence[str]


class OpenAIJudge(ABC):
    r"""
    Base of rewards that a model gives over an OpenAI-compatible endpoint, or in this process ([`LocalScorer`]).

    Endpoints are those of `openai`, vLLM, `transformers serve` and the like.

    It has TRL's reward signature. A completion's reward is the mean of its grades; it is `None`, which TRL leaves out,
    for a row that cannot be scored and for a call that failed after its retries. Never is a failure a reward of 0.

    By rule, without a call, 0.0 is given to a completion with nothing to grade: no letter or digit, longer than
    `max_characters`, or mostly a copy of the judge's own guideline. Everything else is shown to the judge between the
    marks of a [`~maple_trl.chat.fence`], and the verdict is read out of the judge's message alone. A grade that is not on
    the scale, and a second verdict that differs (the judge may quote one that the completion holds), make an answer
    invalid: it is asked for again, and then the call has failed.

    When more than `max_failure_rate` of a batch fails, the run stops. With the judge's [`~OpenAIJudge.callback`] among
    the trainer's callbacks, the step is finished, a checkpoint written and [`JudgeUnavailableError`] raised by `train()`
    on all ranks; until then nothing more is sent. Without it, the error is raised at once, and the last checkpoint on
    disk is where the run goes on from; of several ranks only the one whose judge fails raises then, and the launcher
    (`torchrun`, `accelerate launch`) ends the others.

    Subclasses write [`~OpenAIJudge.question`], and [`~OpenAIJudge.judged_text`] where not all of the completion is graded.

    Args:
        scorer (`ChatOptions`, `ChatClient` or `LocalScorer`):
            Where answers come from. Options without a `batch_timeout` get one of 600 s, so that a server that hangs
            cannot hold up the other ranks for longer. Name a `cache_file` to pay for nothing twice, and give `sampling`
            such as `{"temperature": 0, "max_tokens": 200}`; a judge that thinks first needs a few thousand tokens, and an
            answer that is cut before its verdict has failed. Limits of concurrency and rates are those of one process.
        name (`str`, *optional*):
            What TRL logs it by; default is the class's.
        max_failure_rate (`float`, *optional*, defaults to 0.2):
            The share of failed requests above which the run stops; `None` for never.
        min_requests (`int`, *optional*, defaults to 16):
            Smaller batches are taken together until they have so many requests.
        max_characters (`int`, *optional*):
            Longest text that is graded; default is the class's.
        max_reference_characters (`int`, *optional*, defaults to 8000):
            Where each reference text is cut.

    Attributes:
        usage (`ChatUsage`): calls, tokens and cost of the scorer so far.
        counts (`Counter`): completions so far: `scored`, `by-rule` (0.0 without a call), `unscorable`, `failed`, and
            `failed/REASON`.
        tripped (`str` or `None`): why the run is being stopped.

    Raises:
        ValueError: naming the argument that is out of range.
        ChatSetupError: when the key cannot be read.
    """

    default_name = "judge"
    default_characters = 16_000
    columns: tuple[str, ...] = ()
    """Columns that the data set must have."""
    named_columns: Mapping[str, str] = {}
    """Columns that whoever made the judge has named, by the argument; a name that leads to none is a mistake."""
    guideline = ""
    """Text whose copies earn nothing."""
    scale: tuple[float, ...] | None = SCALE
    """The grades that there are; `None`: any number in [0, 1]."""

    def __init__(
        self,
        scorer: ChatOptions | Scorer,
        *,
        name: str | None = None,
        max_failure_rate: float | None = 0.2,
        min_requests: int = 16,
        max_characters: int | None = None,
        max_reference_characters: int = 8000,
    ):
        is_number = isinstance(max_failure_rate, (int, float)) and not isinstance(max_failure_rate, bool)
        if max_failure_rate is not None and not (is_number and 0 <= max_failure_rate < 1):
            raise ValueError(f"max_failure_rate must be in [0, 1) or None, got {max_failure_rate!r}")
        max_characters = self.default_characters if max_characters is None else max_characters
        limits = {
            "min_requests": min_requests,
            "max_characters": max_characters,
            "max_reference_characters": max_reference_characters,
        }
        for field, value in limits.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")
        self.__name__ = name or self.default_name
        self.max_failure_rate, self.min_requests = max_failure_rate, min_requests
        self.max_characters, self.max_reference_characters = max_characters, max_reference_characters
        self.scorer = _as_scorer(scorer)
        self.counts: Counter = Counter()
        self.guard(None)

    def check_columns(self, columns: Sequence[str]) -> None:
        """
        Check, before a run, that the judge finds in a data set what it was told to look for.

        Args:
            columns (`Sequence[str]`): of the data set.

        Raises:
            ValueError: naming the argument and the column that is not there.
        """
        for argument, column in self.named_columns.items():
            if column not in columns:
                advice = did_you_mean(str(column), list(columns))
                raise ValueError(f"{argument} names a column {column!r}, which there is not{advice}")

    # What subclasses say

    @abstractmethod
    def question(self, text: str, row: Mapping[str, Any]) -> Question | None:
        """
        Write what is asked about a text.

        Args:
            text (`str`): what [`~OpenAIJudge.judged_text`] gave.
            row (`Mapping`): the row's columns, and its `prompt`.

        Returns:
            `Question` or `None`: `None` for a row that cannot be scored.
        """

    def judged_text(self, text: str) -> str | None:
        """Return the part of a completion (`text`) that is graded; `None` for a completion without it, which earns 0.0."""
        return text

    def _fenced(self, name: str, text: str) -> str:
        return fence(name, harmless(text, self.max_reference_characters))

    # The reward

    def __call__(
        self,
        prompts: list | None = None,
        completions: list[str] | list[list[dict[str, Any]]] = None,
        completion_ids: list[list[int]] | None = None,
        *,
        trainer_state: TrainerState | None = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Grade completions.

        Args:
            prompts (`list`, *optional*):
                N prompts, plain or conversational.
            completions (`list[str]` or `list[list[dict]]`):
                N completions, plain or conversational.
            completion_ids (`list[list[int]]`, *optional*):
                Not used; TRL passes it.
            trainer_state, log_metric, log_extra (*optional*):
                TRL's. Logged are, per batch and under `judge/NAME/`: `failure_rate`, `calls`, `retries`, `cached`,
                `by_rule`, `unscorable`, `prompt_tokens`, `completion_tokens`, `cost`, `cost_total` (of this process)
                and the mean of each axis.
            **columns:
                The dataset columns, N values each.

        Returns:
            `list[float | None]`: N rewards in `[0, 1]`.

        Raises:
            ValueError: when the data set lacks a column.
            JudgeUnavailableError: see the class.
        """
        self._check_columns(columns)
        rows = _rows(prompts, len(completions), columns)
        asked = [self._ask(completion_text(text), row) for text, row in zip(completions, rows, strict=True)]
        places = [i for i, question in enumerate(asked) if isinstance(question, Question)]
        before = self.scorer.usage
        answers = [] if self.tripped else self._answers([asked[i] for i in places])
        results = dict(zip(places, answers, strict=bool(answers)))
        rewards = [None if isinstance(outcome, Question) else outcome for outcome in asked]
        for i, result in results.items():
            rewards[i] = fmean(result.data.values()) if result.ok else None
        sent = [result for result in results.values() if result.reason != "dry-run"]
        failures = [result for result in sent if not result.ok]
        tally = {
            "scored": len(sent) - len(failures),
            "by-rule": sum(isinstance(outcome, float) for outcome in asked),
            "unscorable": sum(outcome is None for outcome in asked),
            "failed": len(failures),
        }
        self.counts.update(tally)
        self.counts.update(f"failed/{result.reason}" for result in failures)
        if log_metric is not None:
            self._log(log_metric, tally, sent, before)
        if log_extra is not None:
            found = [results[i].data if i in results and results[i].ok else None for i in range(len(rows))]
            log_extra(f"{self.__name__}_grades", [None if grades is None else json.dumps(grades) for grades in found])
        self._watch(sent, failures, trainer_state)
        return rewards

    def _check_columns(self, columns: Mapping[str, Any]) -> None:
        """Raise ValueError when the data set lacks a column."""
        for column in self.columns:
            if columns.get(column) is None:
                raise ValueError(
                    f"{self.__name__} needs a column `{column}` in the dataset; columns that came with this batch: "
                    f"{sorted(columns) or 'none'}"
                )

    def _log(self, log_metric: Any, tally: Mapping[str, int], sent: list[ChatResult], before: ChatUsage) -> None:
        now = self.scorer.usage
        numbers = {"by_rule": tally["by-rule"], "unscorable": tally["unscorable"], "calls": now.sent - before.sent}
        for name in ("retries", "prompt_tokens", "completion_tokens", "cost"):
            numbers[name] = getattr(now, name) - getattr(before, name)
        numbers["cost_total"] = now.cost
        if sent:
            numbers["failure_rate"] = tally["failed"] / len(sent)
            numbers["cached"] = sum(result.source in ("cache", "shared") for result in sent)
        grades = [result.data for result in sent if result.ok]
        for axis in dict.fromkeys(axis for row in grades for axis in row):
            numbers[axis] = fmean(row[axis] for row in grades if axis in row)
        for name, value in numbers.items():
            log_metric(f"judge/{self.__name__}/{name}", float(value))

    def _ask(self, completion: str, row: Mapping[str, Any]) -> Question | float | None:
        """Return what to ask about a completion, or its reward without asking."""
        text = self.judged_text(completion)
        question = self.question(text or "", row)
        if question is None:
            return None
        if text is None or says_nothing(text) or len(text) > self.max_characters or echoes(text, self.guideline):
            return 0.0
        return question

    def _answers(self, questions: list[Question]) -> list[ChatResult]:
        """Return a result for each question; that of one that went well has the grades as `data`."""
        requests = [
            ChatRequest(
                question.messages,
                json_schema=verdict_schema(question.axes, self.scale),
                reader=functools.partial(read_verdict, axes=tuple(question.axes), scale=self.scale),
            )
            for question in questions
        ]
        return self.scorer.complete_many(requests) if requests else []

    @property
    def usage(self) -> ChatUsage:
        """Counters of calls, tokens and cost."""
        return self.scorer.usage

    # Stopping

    def callback(self) -> TrainerCallback:
        """Return the callback that ends a run in order; hand it to the trainer (`callbacks=[judge.callback()]`)."""
        from maple_trl.rewards.judge_callback import JudgeCallback

        return JudgeCallback([self])

    def guard(self, state: TrainerState | None) -> None:
        """Begin anew; calls with this `state` as `trainer_state` don't raise: the callback of that trainer ends the run."""
        self._guarded = state
        self.tripped: str | None = None
        self._window = FailureWindow(self.min_requests)

    def _watch(self, asked: list[ChatResult], failures: list[ChatResult], state: TrainerState | None) -> None:
        self._window.add(len(asked), len(failures))
        rate = self._window.rate
        if self.max_failure_rate is None or rate is None or rate <= self.max_failure_rate or not failures:
            return
        reasons = Counter(result.reason for result in failures).most_common()
        problem = (
            f"{self.__name__} failed for {self._window.failures} of the last {self._window.requests} completions, more than "
            f"max_failure_rate={self.max_failure_rate:g} allows ("
            + ", ".join(f"{reason}: {number}" for reason, number in reasons)
            + f"; the first: {failures[0].detail})"
        )
        if state is not None and state is self._guarded:
            logger.error("%s. The run stops after this step.", problem)
            self.tripped = problem
            return
        self._window = FailureWindow(self.min_requests)
        advice = "" if state is None else ". Go on from the last checkpoint once the judge answers"
        raise JudgeUnavailableError(problem + advice)

    # Copies

    def close(self) -> None:
        """Close connections and cache; a later call opens them again."""
        close = getattr(self.scorer, "close", None)
        if close is not None:
            close()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out connections and the key: another process reads its own."""
        scorer = self.scorer.options if isinstance(self.scorer, ChatClient) else self.scorer
        return {**self.__dict__, "scorer": scorer, "_guarded": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.scorer = _as_scorer(self.scorer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.scorer!r}, name={self.__name__!r})"


def judge_callbacks(reward_funcs: Any) -> list[TrainerCallback]:
    """
    Return the callbacks that a trainer with these reward functions needs: one for all judges, none without a judge.

    Judges that are routed to some rows ([`for_tags`]) are among them.

    Args:
        reward_funcs: one reward function, or a list of them.
    """
    rewards = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    judges = {id(judge): judge for judge in map(inner_judge, rewards) if judge is not None}
    if not judges:
        return []
    from maple_trl.rewards.judge_callback import JudgeCallback

    return [JudgeCallback(judges.values())]


def inner_judge(reward: Any) -> OpenAIJudge | None:
    """Return the judge that a reward function is, or that it is wrapped around; `None` where there is none."""
    seen = set()
    while reward is not None and not isinstance(reward, OpenAIJudge) and id(reward) not in seen:
        seen.add(id(reward))
        reward = getattr(reward, "reward", None)
    return reward if isinstance(reward, OpenAIJudge) else None


def _as_scorer(scorer: ChatOptions | Scorer) -> Scorer:
    if isinstance(scorer, ChatOptions):
        if scorer.batch_timeout is None:
            scorer = dataclasses.replace(scorer, batch_timeout=BATCH_TIMEOUT)
        return ChatClient(scorer)
    if not callable(getattr(scorer, "complete_many", None)):
        raise ValueError(f"a judge takes ChatOptions, a ChatClient or a LocalScorer, got {type(scorer).__name__}")
    return scorer


def _rows(prompts: list | None, count: int, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turn what TRL hands over column by column into rows; what is no column is left out."""
    lists = {name: values for name, values in columns.items() if isinstance(values, (list, tuple))}
    lists = {name: values for name, values in lists.items() if len(values) == count}
    if prompts is not None:
        lists["prompt"] = prompts
    return [{name: values[i] for name, values in lists.items()} for i in range(count)]
