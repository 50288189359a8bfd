"""Sampled accuracy per tag: what a policy answers at the temperature it trains with."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from maple_trl.metrics.clip_intervals import standard_error
from maple_trl.metrics.clips import clips_of
from maple_trl.modalities import ModalityTag


Row = Mapping[str, Any]


@dataclass(frozen=True)
class SampledAccuracy:
    """
    Accuracies as fractions.

    Attributes:
        accuracy: per tag, and over all questions as `all`, each in [0, 1].
        questions: how many questions stand behind each.
        unusable: questions left out because their media could not be used.
        unscorable: questions left out because their answer was given no score, per tag.
        errors: standard error of each accuracy over clips (see [`clip_of`]), over questions where no clip is named; NaN
            where one clip stands behind it.
    """

    accuracy: dict[str, float]
    questions: dict[str, int]
    unusable: int = 0
    unscorable: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def choose_questions(rows: Sequence[Row], per_tag: int, seed: int = 0) -> list[Row]:
    """
    Draw some rows of each tag, in canonical tag order; rows without a tag are one group.

    Args:
        rows: to choose from.
        per_tag: most rows of a tag.
        seed: what the choice is drawn by.
    """
    by_tag: dict[str, list[int]] = defaultdict(list)
    for number, tag in enumerate(_tags(rows)):
        by_tag[tag].append(number)
    order = [*map(str, ModalityTag), ""]
    draw = random.Random(seed)
    drawn = [draw.sample(by_tag[tag], min(per_tag, len(by_tag[tag]))) for tag in order if tag in by_tag]
    return [rows[number] for numbers in drawn for number in numbers]


def _tags(rows: Sequence[Row]) -> list[str]:
    """Read the tags; of a table that column alone, as its pictures would be decoded and its rows be kept."""
    columns = getattr(rows, "column_names", None)
    if isinstance(columns, list) and "tag" in columns:
        return [_tag({"tag": tag}) for tag in rows["tag"]]
    return [_tag(row) for row in rows]


def sampled_accuracy(
    generate: Callable[[Sequence[Row]], Sequence[str | None]],
    rows: Sequence[Row],
    score: Callable[..., Sequence[float | None]],
    questions_per_tag: int = 64,
    seed: int = 0,
    samples: int = 1,
) -> SampledAccuracy:
    """
    Ask each question once or several times and score the sampled answers; a question's score is their mean.

    The random stream of the run is left as it was, so that evaluating does not change training.

    Args:
        generate: one completion per row, `None` for a row whose media cannot be used, e.g.
            [`~maple_trl.OmniGRPOTrainer.generate_completions`].
        rows: questions with a `tag` and what `score` reads.
        score: a reward function with TRL's signature; its mean is the accuracy, `None` or NaN leaves a sample out.
        questions_per_tag, seed: as in [`choose_questions`].
        samples: completions per question.

    Raises:
        ValueError: when no question could be scored.
    """
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    chosen = choose_questions(rows, questions_per_tag, seed)
    asked = [number for number in range(len(chosen)) for _ in range(samples)]
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        completions = generate([chosen[number] for number in asked])
    answered = [(number, text) for number, text in zip(asked, completions, strict=True) if text is not None]
    found: dict[int, list[float]] = defaultdict(list)
    scored = _scores(score, [(chosen[number], text) for number, text in answered])
    for (number, _), value in zip(answered, scored, strict=True):
        if value is not None and not math.isnan(value):
            found[number].append(value)
    unscorable = Counter(_tag(chosen[number]) for number in {number for number, _ in answered} - found.keys())
    if not found:
        raise ValueError(f"None of {len(chosen)} questions could be scored; do the rows have a solution?")
    clips = clips_of([chosen[number] for number in found])
    means: dict[str, list[float]] = defaultdict(list)
    within: dict[str, list[str | None]] = defaultdict(list)
    for (number, values), clip in zip(found.items(), clips, strict=True):
        for group in dict.fromkeys(("all", _tag(chosen[number]))):
            means[group].append(sum(values) / len(values))
            within[group].append(clip)
    groups = [group for group in ("all", *ModalityTag) if group in means]
    return SampledAccuracy(
        accuracy={str(group): sum(means[group]) / len(means[group]) for group in groups},
        questions={str(group): len(means[group]) for group in groups},
        unusable=len(chosen) - len({number for number, _ in answered}),
        errors={str(group): standard_error(means[group], within[group]) for group in groups},
        unscorable=dict(unscorable),
    )


def _scores(score: Callable, answered: list[tuple[Row, str]]) -> Sequence[float | None]:
    if not answered:
        return []
    rows = [row for row, _ in answered]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
    columns = {name: [row.get(name) for row in rows] for name in names}
    completions = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}] for row, text in answered
    ]
    return score(prompts=[row["prompt"] for row in rows], completions=completions, **columns)


def _tag(row: Row) -> str:
    return str(ModalityTag.parse(row["tag"])) if row.get("tag") else ""
