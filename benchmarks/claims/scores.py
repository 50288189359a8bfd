"""Small results: numbers to a few digits, and the scores of questions as a string of digits."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any


DIGITS = 5
"""Significant digits of numbers in results."""
FINE = 999
"""What a whole score counts where scores have fractions: three digits then stand for a question's mean."""
NO_SCORE = "-"


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """Return numbers to some significant digits, in whatever holds them; what is not finite becomes `None`."""
    if isinstance(value, Mapping):
        return {name: rounded(one, digits) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def encoded_scores(sums: Sequence[float | None], samples: int) -> dict[str, Any]:
    """
    Write the scores of questions as one string of digits.

    Args:
        sums: of each question, the sum of the scores of its answers, each between 0 and 1; `None` where it has no score.

    Returns:
        `digits`: as many characters for each question, a number, or dashes where it has no score; `of`: what that number
        is out of.
    """
    known = [one for one in sums if one is not None]
    if any(not 0 <= one <= samples for one in known):
        raise ValueError(f"scores lie between 0 and 1; {samples} of them add up to {min(known)} to {max(known)}")
    whole = samples <= 9 and all(float(one).is_integer() for one in known)
    of, width = (samples, 1) if whole else (FINE, len(str(FINE)))
    told = [NO_SCORE * width if one is None else f"{round(one / samples * of):0{width}d}" for one in sums]
    return {"digits": "".join(told), "of": of}


def decoded_scores(told: Mapping[str, Any]) -> Sequence[float | None]:
    """Return the mean score of each question; `None` where it has none."""
    return _decoded(told["digits"], told["of"])


@functools.lru_cache(16)
def _decoded(digits: str, of: int) -> tuple[float | None, ...]:
    width = len(str(FINE)) if of == FINE else 1
    parts = (digits[start : start + width] for start in range(0, len(digits), width))
    return tuple(None if part.startswith(NO_SCORE) else int(part) / of for part in parts)


def whole(result: Mapping[str, Any], questions: Mapping[str, Any], without: Collection[int] = ()) -> dict[str, Any]:
    """
    Return a result as metrics read it: with accuracies by tag and the questions behind them.

    Args:
        result: as it is kept.
        questions: ids, tags and clips of the questions of its task's version, in their order.
        without: clips whose questions are left out.

    Returns:
        The result with, for each access in `after`: `accuracy` by tag and as `all`, `counts` of questions behind each, and
        `questions`: id, tag and the sum of the scores of its answers, of each that has one.
    """
    return left_out(result, questions, [without])[0]


def left_out(
    result: Mapping[str, Any], questions: Mapping[str, Any], groups: Sequence[Collection[int]]
) -> list[dict[str, Any]]:
    """Return a result as [`whole`] does, without each group of clips in turn."""
    scored = {access: _scored(one, questions) for access, one in result["after"].items()}
    stages = [left_out(stage, questions, groups) for stage in result.get("stages", ())]
    found = []
    for number, clips in enumerate(groups):
        after = {access: one | _summed(scored[access], clips) for access, one in result["after"].items()}
        of_stages = {"stages": [stage[number] for stage in stages]} if stages else {}
        found.append(dict(result) | {"after": after} | of_stages)
    return found


Scored = list[tuple[int, str, float, list[Any]]]


def _scored(told: Mapping[str, Any], questions: Mapping[str, Any]) -> Scored:
    """Return clip, tag, mean score, and what metrics read, of each question that has a score."""
    each = zip(questions["ids"], questions["tags"], questions["clips"], decoded_scores(told), strict=True)
    return [
        (clip, tag, score, [name, tag, score * told["samples"]])
        for name, tag, clip, score in each
        if score is not None
    ]


def _summed(scored: Scored, without: Collection[int]) -> dict[str, Any]:
    kept = [row for row in scored if row[0] not in without]
    sums: dict[str, list[float]] = {"all": [row[2] for row in kept]}
    for _, tag, score, _ in kept:
        sums.setdefault(tag, []).append(score)
    known = {group: own for group, own in sums.items() if own}
    return {
        "accuracy": {group: sum(own) / len(own) for group, own in known.items()},
        "counts": {group: len(own) for group, own in known.items()},
        "questions": [row[3] for row in kept],
    }
