"""Rewards for answers that say when or where: overlap of time intervals, overlap of boxes."""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .answers import completion_text, extract_answer, solution_text


Interval = tuple[float, float]
Box = tuple[float, float, float, float]

# Possessive quantifiers (++, ?+) keep a long answer from being tried in many ways.
_TIME = (
    r"([0-9]++(?::[0-5][0-9]){1,2}+(?:\.[0-9]++)?+"
    r"|[0-9]++(?:\.[0-9]++)?+(?: ?(?:seconds|second|secs|sec|s)(?![A-Za-z]))?+)"
)
_DASH = r"-|–|—|to"
_INTERVAL = re.compile(
    rf"{_TIME} ?(?:{_DASH}) ?{_TIME}"
    rf"|\[ ?{_TIME} ?(?:,|{_DASH}) ?{_TIME} ?\]"
    rf"|\( ?{_TIME} ?(?:,|{_DASH}) ?{_TIME} ?\)"
)
_BETWEEN_INTERVALS = re.compile(r" ?[,;&] ?(?:and )?| and | ")
_UNIT = re.compile(r"[ a-z]+")
_NUMBER = r"([+-]?[0-9]++(?:\.[0-9]++)?+)"
_NUMBERS = " ?(?:,| ) ?".join([_NUMBER] * 4)
_BOX = re.compile(rf"{_NUMBERS}|\[ ?{_NUMBERS} ?\]|\( ?{_NUMBERS} ?\)")


def parse_intervals(text: str) -> list[Interval] | None:
    """
    Parse the time intervals that a text consists of.

    Args:
        text (`str`):
            `12-15.5`, `12 s to 15.5 s`, `00:12-00:15`, `1:02:03 – 1:02:10`, `[12.0, 15.5]`, `(12, 15.5)`; several of
            them after each other with a comma, a semicolon, `and` or white space between, and brackets around all.

    Returns:
        `list[tuple[float, float]]` or `None`: (start, end) in seconds, with start < end, in the order of the text;
        `None` for anything else, also when only one of several intervals is malformed.
    """
    text = " ".join(text.split())
    inner = _read_intervals(text[1:-1].strip()) if text[:1] == "[" and text[-1:] == "]" else None
    return _read_intervals(text) if inner is None else inner


def _read_intervals(text: str) -> list[Interval] | None:
    intervals, position = [], 0
    while match := _INTERVAL.match(text, position):
        start, end = (_seconds(time) for time in match.groups() if time is not None)
        if not start < end < math.inf:
            return None
        intervals.append((start, end))
        position = match.end()
        if position == len(text):
            return intervals
        between = _BETWEEN_INTERVALS.match(text, position)
        if between is None:
            return None
        position = between.end()
    return None


def _seconds(time: str) -> float:
    seconds = 0.0
    for part in _UNIT.sub("", time).split(":"):
        seconds = seconds * 60.0 + float(part)
    return seconds


def interval_iou(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """
    Return the length of the time in both sets of intervals, over that of the time in either.

    Intervals of one set may overlap; each moment counts once. 0 when both have length 0.
    """
    first, second = _union(first), _union(second)
    both, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        both += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    either = sum(end - start for start, end in first) + sum(end - start for start, end in second) - both
    return min(1.0, both / either) if either > 0.0 else 0.0


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    """Merge intervals to the same time in order, where none touch."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def parse_box(text: str) -> Box | None:
    """
    Parse the one box that a text consists of.

    Args:
        text (`str`):
            `[x1, y1, x2, y2]`, with round brackets or none, with commas or white space between.

    Returns:
        `tuple[float, float, float, float]` or `None`: the box, with x1 < x2 and y1 < y2; `None` for anything else.
    """
    match = _BOX.fullmatch(" ".join(text.split()))
    return _valid_box([float(part) for part in match.groups() if part is not None]) if match else None


def _valid_box(numbers: Sequence[float]) -> Box | None:
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        return None
    x1, y1, x2, y2 = numbers
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def box_iou(first: Box, second: Box) -> float:
    """Return the area that is in both boxes `(x1, y1, x2, y2)`, over the area that is in either."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0.0 or height <= 0.0:
        return 0.0
    both = width * height
    either = _area(first) + _area(second) - both
    return min(1.0, both / either) if 0.0 < either < math.inf else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def temporal_iou_reward(
    prompts: list | None = None,
    completions: list[str] | list[list[dict[str, Any]]] = None,
    completion_ids: list[list[int]] | None = None,
    *,
    solution: list | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    Score how far the time that a completion names is the right one: intersection over union, in `[0, 1]`.

    The one `<answer>…</answer>` outside the think block must hold intervals and nothing else, in any form of
    [`~maple_trl.rewards.localisation.parse_intervals`]; of several intervals the union counts, so that naming more
    time than is right costs. Everything else scores 0.

    Args:
        prompts (`list`, *optional*):
            Not used; TRL passes it.
        completions (`list[str]` or `list[list[dict]]`):
            N completions, plain or conversational.
        completion_ids (`list[list[int]]`, *optional*):
            Not used; TRL passes it.
        solution (`list`):
            N solutions in seconds: text in the same forms, a pair `[start, end]`, or a list of pairs. Empty ones are
            skipped.
        **kwargs:
            The other dataset columns; an `id` is named in errors.

    Returns:
        `list[float | None]`: N rewards in `[0, 1]`; `None` for a row without a solution.

    Raises:
        ValueError: when the dataset has no `solution` column, or a solution is no set of intervals; the message names
            the row. (Route with [`for_rows`] in a set with other kinds of solutions.)

    Example:
    ```python
    >>> from maple_trl.rewards import temporal_iou_reward

    >>> completions = ["<answer>00:10-00:20</answer>", "<answer>[15, 20], [0, 5]</answer>", "<answer>soon</answer>"]
    >>> temporal_iou_reward(completions=completions, solution=["10-20", [[10, 20]], [10.0, 20.0]])
    [1.0, 0.3333333333333333, 0.0]
    ```
    """
    forms = "time intervals in seconds with start < end, such as '12.0-15.5', '00:12-00:15' or [[12.0, 15.5]]"
    return _overlaps(
        "temporal_iou_reward", completions, solution, kwargs, parse_intervals, _true_intervals, interval_iou, forms
    )


def box_iou_reward(
    prompts: list | None = None,
    completions: list[str] | list[list[dict[str, Any]]] = None,
    completion_ids: list[list[int]] | None = None,
    *,
    solution: list | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    Score how far the box that a completion names is the right one: intersection over union of areas, in `[0, 1]`.

    The one `<answer>…</answer>` outside the think block must hold one box `[x1, y1, x2, y2]` and nothing else (see
    [`~maple_trl.rewards.localisation.parse_box`]). Everything else scores 0, several boxes too.

    Args:
        prompts (`list`, *optional*):
            Not used; TRL passes it.
        completions (`list[str]` or `list[list[dict]]`):
            N completions, plain or conversational.
        completion_ids (`list[list[int]]`, *optional*):
            Not used; TRL passes it.
        solution (`list`):
            N boxes, as text in the same forms or as four numbers, in the unit in which the prompt asks for the answer
            (pixels or shares). Empty ones are skipped.
        **kwargs:
            The other dataset columns; an `id` is named in errors.

    Returns:
        `list[float | None]`: N rewards in `[0, 1]`; `None` for a row without a solution.

    Raises:
        ValueError: when the dataset has no `solution` column, or a solution is no box; the message names the row.

    Example:
    ```python
    >>> from maple_trl.rewards import box_iou_reward

    >>> completions = ["<answer>[0, 0, 10, 10]</answer>", "<answer>(5, 0, 15, 10)</answer>", "[0, 0, 10, 10]"]
    >>> box_iou_reward(completions=completions, solution=["[0, 0, 10, 10]", [0, 0, 10, 10], [0, 0, 10, 10]])
    [1.0, 0.3333333333333333, 0.0]
    ```
    """
    forms = "a box [x1, y1, x2, y2] with x1 < x2 and y1 < y2"
    return _overlaps("box_iou_reward", completions, solution, kwargs, parse_box, _true_box, box_iou, forms)


temporal_iou_reward.required_columns = box_iou_reward.required_columns = ("solution",)


def _overlaps(
    name: str,
    completions: list,
    solutions: list | None,
    columns: dict[str, Any],
    parse: Callable[[str], Any],
    read: Callable[[Any], Any],
    iou: Callable[[Any, Any], float],
    forms: str,
) -> list[float | None]:
    if solutions is None:
        raise ValueError(
            f"{name} needs a `solution` column in the dataset: {forms}; leave single rows empty to skip them. Columns "
            f"that came with this batch: {sorted(columns) or 'none'}."
        )
    ids = columns.get("id") or [None] * len(solutions)
    rewards: list[float | None] = []
    for index, (completion, solution, row_id) in enumerate(zip(completions, solutions, ids, strict=True)):
        if hasattr(solution, "tolist"):
            solution = solution.tolist()
        if not isinstance(solution, (list, tuple)):
            solution = solution_text(solution)
        if solution is None or len(solution) == 0:
            rewards.append(None)
            continue
        truth = parse(solution) if isinstance(solution, str) else read(solution)
        if truth is None:
            row = f"row {index} of the batch" + ("" if row_id is None else f" (id {row_id!r})")
            raise ValueError(f"{name}: the solution of {row} must be {forms}, got {reprlib.repr(solution)}")
        answer = extract_answer(completion_text(completion))
        said = None if answer is None else parse(answer)
        rewards.append(0.0 if said is None else iou(said, truth))
    return rewards


def _true_intervals(solution: Sequence) -> list[Interval] | None:
    pairs = solution if isinstance(solution[0], (list, tuple)) else [solution]
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_number, pair))):
            return None
        if not 0 <= pair[0] < pair[1] < math.inf:
            return None
    return [(float(start), float(end)) for start, end in pairs]


def _true_box(solution: Sequence) -> Box | None:
    return _valid_box([float(value) for value in solution]) if all(map(_is_number, solution)) else None


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can hold: not NaN, not infinite, no integer beyond them."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
