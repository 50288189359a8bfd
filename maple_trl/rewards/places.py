"""Reward for answers that say which object and where, in words (AVATAR, arXiv 2508.03100, stage 3)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from maple_trl.metrics.answers import set_f1, words

from .answers import completion_text, extract_answer, grade_answer, option_letter, solution_text


# Each axis of a picture, with where a word stands on it.
_AXES: tuple[dict[str, float], ...] = (
    dict.fromkeys(("left", "leftmost", "lefthand"), -1.0) | dict.fromkeys(("right", "rightmost", "righthand"), 1.0),
    dict.fromkeys(("top", "upper", "above", "uppermost"), -1.0)
    | dict.fromkeys(("bottom", "lower", "below", "lowermost"), 1.0),
    dict.fromkeys(("foreground", "front"), -1.0) | dict.fromkeys(("background", "behind", "back", "rear"), 1.0),
)
_CENTRE = frozenset(("center", "centre", "middle", "central"))
_PLACES = _CENTRE.union(*_AXES)
_SMALL = frozenset("a an the is are in on at of to from with by near and it its there this that".split())
_FRAME = frozenset(
    "side part half corner area region edge hand image picture frame scene screen video clip object".split()
)


# What comes behind these is beside the object; what stands between those is another one.
_BESIDE = re.compile(r"\b(?:near|by|beside|next|with)\b.*", re.DOTALL)
_ANOTHER = re.compile(r"[,;/|\n]|\b(?:and|or)\b")


@dataclass(frozen=True)
class ObjectPlace:
    """
    Which object, and where.

    Attributes:
        object (`tuple[str, ...]`): the words that name it, in order and without plural.
        count (`int`): how many objects are named, one behind the other.
        place (`tuple[frozenset, ...]`): for each of the axes left-right, top-bottom, front-back the places named on it, from
            -1 to 1.
    """

    object: tuple[str, ...]
    count: int
    place: tuple[frozenset[float], ...]


def parse_object_place(text: str) -> ObjectPlace:
    """
    Parse a text that says which object and where.

    Such as `dog, bottom left`, or `The barking dog is in the middle of the picture.`

    Words for places count wherever they stand; articles, prepositions and words such as `side` and `picture` for nothing; all
    others name the object, as far as no `near`, `by`, `beside`, `next` or `with` stands before them. `centre` is that of left and
    right, or, beside one of these, of top and bottom.
    """
    found = words(text)
    places: list[set[float]] = [{axis[word] for word in found if word in axis} for axis in _AXES]
    if _CENTRE.intersection(found):
        places[1 if places[0] and not places[1] else 0].add(0.0)
    parts = [words(_BESIDE.sub("", part)) for part in _ANOTHER.split(text.casefold())]
    # A word for the frame may be the object.
    named = _without(parts, _PLACES | _SMALL | _FRAME) or _without(parts, _PLACES | _SMALL)
    objects = tuple(_singular(word) for part in named for word in part)
    return ObjectPlace(objects, len(named), tuple(map(frozenset, places)))


def _without(parts: list[list[str]], left_out: frozenset[str]) -> list[list[str]]:
    """Return the parts without some words, as far as a word is left."""
    kept = [[word for word in part if word not in left_out] for part in parts]
    return [part for part in kept if part]


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def object_overlap(said: ObjectPlace, truth: ObjectPlace) -> float:
    """Return the F-measure of the words that name the objects; 0 for a list of more of them."""
    if said.count > truth.count:
        return 0.0
    return set_f1(set(said.object), set(truth.object))


def place_overlap(said: ObjectPlace, truth: ObjectPlace) -> float | None:
    """
    Return how near two places are, as a mean over the axes that the right one names: 1 the same, 0.5 beside it, 0 else.

    `None` where the right one names no place. An axis on which several places are said scores 0.
    """
    scores = []
    for mine, theirs in zip(said.place, truth.place, strict=True):
        if mine == theirs:
            scores += [1.0] if theirs else []
        elif theirs:
            apart = abs(next(iter(mine)) - next(iter(theirs))) if len(mine) == len(theirs) == 1 else 2.0
            scores.append(1.0 - apart / 2.0)
    return fmean(scores) if scores else None


class ObjectPlaceReward:
    r"""
    Grade answers that say which object and where, in words: `<answer>dog, bottom left</answer>`.

    The reward is `o (w + (1 - w) p)`: o how far the object's words are the right ones (their F-measure, or a synonym), p how
    near the place is to the right one, w `object_weight`. So a place earns nothing for another object, opposite places earn
    nothing, and neither do more objects than the solution has. Where the solution says no place the reward is o.

    Without an answer, with several, or one in the think block it is 0. A solution that is an option's letter is graded as by
    [`accuracy_reward`].

    Args:
        object_weight (`float`, *optional*, defaults to 0.5):
            The share of the right object alone.
        synonyms (`Mapping[str, Sequence[str]]`, *optional*):
            Other names by that of the solution, e.g. `{dog: [puppy, hound]}`.

    Raises:
        ValueError: for a weight outside `[0, 1]`, or synonyms of another form; when called: for a data set without a
            `solution` column, or a solution that names no object.

    Example:
    ```python
    >>> from maple_trl.rewards import object_place_reward

    >>> completions = ["<answer>The dog on the left.</answer>", "<answer>dog, right</answer>", "<answer>cat, left</answer>"]
    >>> object_place_reward(completions=completions, solution=["dog, left"] * 3)
    [1.0, 0.5, 0.0]
    ```
    """

    __name__ = "object_place_reward"  # what TRL logs it by
    required_columns = ("solution",)

    def __init__(self, object_weight: float = 0.5, synonyms: Mapping[str, Any] | None = None):
        if (
            isinstance(object_weight, bool)
            or not isinstance(object_weight, int | float)
            or not 0 <= object_weight <= 1
        ):
            raise ValueError(f"object_weight must be a number in [0, 1], got {object_weight!r}")
        synonyms = {} if synonyms is None else synonyms
        if not isinstance(synonyms, Mapping) or not all(
            isinstance(names, list | tuple) for names in synonyms.values()
        ):
            raise ValueError(f"synonyms must map a name to a list of others, e.g. {{dog: [puppy]}}, got {synonyms!r}")
        self.object_weight, self.synonyms = float(object_weight), dict(synonyms)
        self._names = {
            parse_object_place(str(other)).object: parse_object_place(str(name)).object
            for name, others in synonyms.items()
            for other in others
        }

    def __call__(
        self,
        prompts: list | None = None,
        completions: list[str] | list[list[dict[str, Any]]] = None,
        completion_ids: list[list[int]] | None = None,
        *,
        solution: list | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        Grade completions.

        Args:
            prompts, completion_ids (*optional*): not used; TRL passes them.
            completions (`list[str]` or `list[list[dict]]`): N completions, plain or conversational.
            solution (`list`): N right answers in the same form; empty ones are skipped.
            **kwargs: the other dataset columns; an `id` is named in errors.

        Returns:
            `list[float | None]`: N rewards in `[0, 1]`; `None` for a row without a solution.
        """
        if solution is None:
            raise ValueError(
                "object_place_reward needs a `solution` column in the dataset, such as 'dog, bottom left'; columns that came "
                f"with this batch: {sorted(kwargs) or 'none'}"
            )
        ids = kwargs.get("id") or range(len(solution))
        return [
            self._grade(completion_text(completion), right, row)
            for completion, right, row in zip(completions, solution, ids, strict=True)
        ]

    def _grade(self, completion: str, solution: Any, row: Any) -> float | None:
        right = solution_text(solution)
        if right is None:
            return None
        answer = extract_answer(completion)
        if option_letter(right) is not None:
            return grade_answer(answer, right)
        truth = parse_object_place(right)
        if not truth.object:
            raise ValueError(
                f"object_place_reward: the solution of row {row!r} must name an object, such as 'dog, bottom left', got "
                f"{right!r:.60}"
            )
        if answer is None:
            return 0.0
        said = self._renamed(parse_object_place(answer), truth)
        near, place = object_overlap(said, truth), place_overlap(said, truth)
        return near if place is None else near * (self.object_weight + (1.0 - self.object_weight) * place)

    def _renamed(self, said: ObjectPlace, truth: ObjectPlace) -> ObjectPlace:
        """Put the solution's name in the place of a synonym of it."""
        name = self._names.get(said.object)
        return (
            ObjectPlace(name, said.count, said.place) if name is not None and set(name) <= set(truth.object) else said
        )


object_place_reward = ObjectPlaceReward()
"""[`ObjectPlaceReward`] with its defaults."""
