"""Reward functions are called the way TRL calls them; what they get wrong is said in a sentence."""

from __future__ import annotations

import inspect
import numbers
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

from maple_trl import rewards as known
from maple_trl.records.notes import FAILED

from .errors import RewardError
from .judge import inner_judge
from .judge_limits import JudgeUnavailableError


# What every call brings besides the columns of the data set.
_ALWAYS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_ON_DEMAND = ("group_ids", "completion_logprobs", "deficit_completions")
_NOT_HANDED_ON = ("prompt", "completion", "completion_ids")
_FORM = "a reward function is def NAME(completions, **columns) and returns a list with a number or None for each completion"


# Before a run


def find_rewards(rewards: Any) -> Any:
    """Put functions in place of the names by which we know them, alone or in a list; what else TRL takes stays as it is."""
    if isinstance(rewards, list | tuple):
        return [find_rewards(reward) for reward in rewards]
    found = known.REWARDS[rewards] if isinstance(rewards, str) and rewards in known.REWARDS else None
    return rewards if found is None or inspect.isclass(found) else found


def check_rewards(rewards: Iterable[Any], columns: Sequence[str], name: str) -> None:
    """
    Check reward functions against the columns of a data set, without calling them.

    Args:
        rewards: reward functions; models and their names, which TRL takes too, are passed over.
        columns: of the data set.
        name: how errors call the data set.

    Raises:
        RewardError: for a function that TRL's call does not fit, or that needs a column that is not there, or was told of one.
    """
    for reward in rewards:
        if isinstance(reward, str) and reward in known.__all__:
            raise RewardError(
                f"the reward {reward!r} is the name of a function: pass maple_trl.rewards.{reward} itself"
            )
        if reward is not None and not isinstance(reward, str) and not callable(reward):
            raise RewardError(f"the reward {reward!r:.60} is no function but {type(reward).__name__}: {_FORM}")
        if reward is None or isinstance(reward, str) or hasattr(reward, "named_parameters"):
            continue
        lacking = [column for column in required_columns(reward) if column not in columns]
        if lacking:
            raise RewardError(
                f"the reward {_name(reward)!r} needs a column {lacking[0]!r}, which {name} has not; its columns: "
                f"{', '.join(columns) or 'none'}"
            )
        judge = inner_judge(reward)
        if judge is not None:
            try:
                judge.check_columns(columns)
            except ValueError as error:
                raise RewardError(
                    f"the reward {_name(reward)!r}: {error}; columns of {name}: {', '.join(columns) or 'none'}"
                ) from error
        if inspect.isclass(reward):
            raise RewardError(f"the reward {_name(reward)!r} is a class, not a function: {_FORM}")
        _check_call(reward, columns)


def required_columns(reward: Any) -> list[str]:
    """Return the columns that a reward function cannot do without, as far as it says so, or the one that it wraps."""
    found: list[str] = []
    seen: set[int] = set()
    while reward is not None and id(reward) not in seen:
        seen.add(id(reward))
        found += getattr(reward, "required_columns", ())
        found += getattr(reward, "columns", ())  # of a judge
        column = getattr(reward, "column", None)  # by which rows are routed
        found += [column] if isinstance(column, str) else []
        if inspect.isfunction(reward) or inspect.ismethod(reward):
            found += [
                parameter.name
                for parameter in inspect.signature(reward).parameters.values()
                if parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
                and parameter.name not in (*_ALWAYS, *_ON_DEMAND)
            ]
        reward = getattr(reward, "reward", None)
    return list(dict.fromkeys(found))


def _check_call(reward: Callable, columns: Sequence[str]) -> None:
    handed_on = [column for column in columns if column not in _NOT_HANDED_ON]
    try:
        signature = inspect.signature(reward)
        asked_for = [name for name in _ON_DEMAND if name in signature.parameters]
        signature.bind(**dict.fromkeys([*_ALWAYS, *asked_for, *handed_on]))
    except TypeError as error:
        raise RewardError(f"the reward {_name(reward)!r} cannot be called as TRL does: {error}; {_FORM}") from error
    except ValueError:  # a callable that does not tell its parameters
        return


# During a run


def checked(reward: Callable, name: str) -> Callable:
    """Wrap a reward function: wrong results become [`RewardError`], and its own exceptions say where they are from."""
    # Here and not above: this loads all of TRL and torch.
    from trl.trainer.utils import is_async_callable

    if is_async_callable(reward):

        async def call(**arguments: Any) -> list[Any]:
            with _noting(name):
                values = await reward(**arguments)
            return checked_rewards(values, len(arguments["completions"]), name)

    else:

        def call(**arguments: Any) -> list[Any]:
            with _noting(name):
                values = reward(**arguments)
            return checked_rewards(values, len(arguments["completions"]), name)

    call.__name__ = name
    return call


def checked_rewards(values: Any, count: int, name: str) -> list[Any]:
    """
    Return what a reward function returned, as a list.

    Raises:
        RewardError: when it is not a number or `None` for each of `count` completions.
    """
    where = f"the reward {name!r} returned"
    if values is None or isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        what = repr(values) if isinstance(values, numbers.Number | str) else f"a {type(values).__name__}"
        raise RewardError(f"{where} {'nothing' if values is None else what} for {count} completions; {_FORM}")
    if getattr(values, "ndim", 1) == 0:
        raise RewardError(f"{where} a single number for {count} completions; {_FORM}")
    values = list(values)
    if len(values) != count:
        raise RewardError(f"{where} {len(values)} rewards for {count} completions; {_FORM}")
    for number, value in enumerate(values):
        if value is not None and not _is_number(value):
            raise RewardError(f"{where} {value!r:.60} for completion {number}; {_FORM}")
    return values


def _is_number(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return False
    if getattr(value, "ndim", 0) or isinstance(value, Sequence | Mapping):
        return False
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


@contextmanager
def _noting(name: str) -> Iterator[None]:
    """Note on what a reward function raises that it is from there; a try to end the process becomes an error."""
    try:
        yield
    except JudgeUnavailableError:  # says all itself
        raise
    except SystemExit as error:
        raise RewardError(_failure(name, error)) from error
    except Exception as error:
        error.add_note(_failure(name, error))
        raise


def _failure(name: str, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[2:]  # without the call itself
    place = f" in {os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}" if frames else ""
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{FAILED} {name!r} failed{place}: {told}"


def _name(reward: Any) -> str:
    return getattr(reward, "__name__", type(reward).__name__)
