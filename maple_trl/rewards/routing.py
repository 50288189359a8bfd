"""Rewards for some of the rows: `None`, which TRL leaves out, for the others."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from maple_trl.modalities import ModalityTag


def for_tags(
    reward: Callable[..., list[float | None]], tags: Iterable[str | ModalityTag], name: str | None = None
) -> Callable[..., list[float | None] | Awaitable[list[float | None]]]:
    r"""
    Give a reward to rows of some modality tags only.

    The rows of other tags, and rows without a tag, get `None`, all completions of a prompt alike: they are left out of
    this reward's mean, and the weighted sum of the other rewards is theirs (weigh rewards against each other with TRL's
    `reward_weights`). `None` from the inner reward is a failure, which leaves the completion out. The inner reward sees
    the rows of these tags only, and is not called when there are none.

    Args:
        reward (`Callable`):
            A reward function with TRL's signature, plain or `async`; the result is of the same kind.
        tags (`Iterable[str]`):
            The tags, in any order and case.
        name (`str`, *optional*, defaults to the inner reward's name with `_for_` and the tags):
            What TRL logs it by. (MAPO looks for its task reward by name: name that in `task_reward`.)

    Returns:
        `Callable`: a reward function that reads the column `tag`.

    Raises:
        ValueError: for an unknown tag, or for none; when called: for a data set without a `tag` column.
        TypeError: when `reward` is no reward function.

    Example:
    ```python
    >>> from maple_trl.rewards import accuracy_reward, for_tags

    >>> seen_and_heard = for_tags(accuracy_reward, ["VA", "VAS"])
    >>> seen_and_heard.__name__
    'accuracy_reward_for_VA_VAS'
    >>> completions = ["<answer>B</answer>"] * 2
    >>> seen_and_heard(prompts=["", ""], completions=completions, tag=["AV", "S"], solution=["B", "B"])
    [1.0, None]
    ```
    """
    if isinstance(tags, str):
        raise ValueError(f"for_tags takes a list of tags, got {tags!r}; write [{tags!r}]")
    wanted = {ModalityTag.parse(tag) for tag in tags}
    ordered = [tag.value for tag in ModalityTag if tag in wanted]
    return _routed(reward, "tag", wanted, _read_tag, name, ordered)


def for_rows(
    reward: Callable[..., list[float | None]], column: str, values: Iterable[Any], name: str | None = None
) -> Callable[..., list[float | None] | Awaitable[list[float | None]]]:
    r"""
    Give a reward only to rows with certain values in a column, e.g. to one kind of question of a mixed set.

    As [`for_tags`], for a column of your own.

    Args:
        reward (`Callable`):
            A reward function with TRL's signature, plain or `async`; the result is of the same kind.
        column (`str`):
            The column that decides.
        values (`Iterable`):
            The values (hashable) of the rows that the reward is for; compared exactly.
        name (`str`, *optional*, defaults to the inner reward's name with `_for_` and the values):
            What TRL logs it by.

    Raises:
        ValueError: for no value; when called: for a data set without the column.
        TypeError: when `reward` is no reward function.

    Example:
    ```python
    >>> from maple_trl.rewards import accuracy_reward, for_rows, temporal_iou_reward

    >>> rewards = [for_rows(temporal_iou_reward, "kind", ["when"]), for_rows(accuracy_reward, "kind", ["what", "who"])]
    ```
    """
    if isinstance(values, str):
        raise ValueError(f"for_rows takes a list of values, got {values!r}; write [{values!r}]")
    wanted = list(dict.fromkeys(values))
    return _routed(reward, column, set(wanted), _read_value, name, wanted)


def _read_tag(value: Any) -> ModalityTag | None:
    return ModalityTag.parse(value) if value else None


def _read_value(value: Any) -> Hashable:
    """Replace a list or a mapping, which is none of the values."""
    return value if isinstance(value, Hashable) else _OTHER


def _routed(
    reward: Callable, column: str, wanted: set, read: Callable, name: str | None, ordered: Sequence
) -> _RoutedReward:
    # Here and not above: this loads all of TRL, which those who only look for a reward can do without.
    from trl.trainer.utils import get_callable_name, is_async_callable

    if not is_reward_function(reward):
        raise TypeError(f"only a reward function can be routed to some rows, got {reward!r}")
    if not wanted:
        raise ValueError("a reward for no row at all: name the tags or values that it is for")
    kind = _AsyncRoutedReward if is_async_callable(reward) else _RoutedReward
    return kind(reward, column, wanted, read, name or "_".join((get_callable_name(reward), "for", *map(str, ordered))))


_OTHER = object()


class _RoutedReward:
    """A reward for some rows: a class, not a closure, as TRL's workers send reward functions to other processes."""

    def __init__(self, reward: Callable, column: str, wanted: set, read: Callable, name: str):
        self.reward, self.column, self.wanted, self.read = reward, column, wanted, read
        self.__name__ = name
        # By this the trainer sees what the inner reward asks for.
        self.__signature__ = joint_signature(_RoutedReward.__call__, reward)
        self._logged: dict[str, None] = {}  # columns of the completions table, in the order of their coming

    def __call__(self, prompts=None, completions=None, completion_ids=None, **columns: Any) -> list[float | None]:
        chosen, arguments = self._choose(prompts, completions, completion_ids, columns)
        return self._spread(self.reward(**arguments) if chosen else [], chosen, len(completions))

    def is_for(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is one of those that the reward is for."""
        return self.read(row.get(self.column)) in self.wanted

    def _choose(self, prompts, completions, completion_ids, columns: dict[str, Any]) -> tuple[list[int], dict]:
        """Choose the rows that the inner reward is for, and what it is called with."""
        if columns.get(self.column) is None:
            raise ValueError(
                f"{self.__name__} needs a column `{self.column}` in the dataset; columns that came with this batch: "
                f"{sorted(columns) or 'none'}"
            )
        count = len(completions)
        chosen = [i for i, value in enumerate(columns[self.column]) if self.read(value) in self.wanted]
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        for name, value in arguments.items():
            if isinstance(value, (list, tuple)) and len(value) == count:
                arguments[name] = [value[i] for i in chosen]
        log_extra = columns.get("log_extra")
        if log_extra is not None:

            def log_chosen(column: str, values: list) -> None:
                self._logged[column] = None
                log_extra(column, self._spread(values, chosen, count))

            arguments["log_extra"] = log_chosen
            if not chosen:
                # TRL's table shows the latest values of a column: without these, those of an earlier rollout.
                for column in self._logged:
                    log_extra(column, [None] * count)
        return chosen, arguments

    def _spread(self, values: Sequence, chosen: list[int], count: int) -> list:
        if len(values) != len(chosen):
            raise ValueError(
                f"{self.__name__}: the inner reward returned {len(values)} values for {len(chosen)} completions"
            )
        spread = [None] * count
        for index, value in zip(chosen, values, strict=True):
            spread[index] = value
        return spread


class _AsyncRoutedReward(_RoutedReward):
    async def __call__(
        self, prompts=None, completions=None, completion_ids=None, **columns: Any
    ) -> list[float | None]:
        chosen, arguments = self._choose(prompts, completions, completion_ids, columns)
        return self._spread(await self.reward(**arguments) if chosen else [], chosen, len(completions))


def innermost(reward: Any) -> Any:
    """Return the reward function that others are wrapped around."""
    while getattr(reward, "reward", None) is not None:
        reward = reward.reward
    return reward


def is_reward_function(reward: Any) -> bool:
    """Return whether something is called as a reward function: a model and a class, which TRL takes or calls too, are not."""
    from torch import nn

    return callable(reward) and not isinstance(reward, nn.Module) and not inspect.isclass(reward)


def joint_signature(own: Callable, inner: Callable) -> inspect.Signature:
    """Return the signature of the wrapper, with what the inner reward names; without annotations, to be pickled."""
    _, *named, columns = inspect.signature(own).parameters.values()
    known = {parameter.name for parameter in named}
    more = [
        inspect.Parameter(parameter.name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for parameter in inspect.signature(inner).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and parameter.name not in known
    ]
    named = [parameter.replace(annotation=parameter.empty) for parameter in named]
    return inspect.Signature([*named, *more, columns.replace(annotation=columns.empty)])
