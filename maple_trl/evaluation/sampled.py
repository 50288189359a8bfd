"""Sampled accuracy per tag: what a policy answers at the temperature it trains with."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from maple_trl.modalities import ModalityTag


Row = Mapping[str, Any]


@dataclass(frozen=True)
class SampledAccuracy:
    """
    Accuracies as fractions.

    Attributes:
        accuracy: per tag, and over all questions as `all`.
        questions: how many questions stand behind each.
        unusable: questions left out because their media could not be used.
        unscorable: questions left out because their answer was given no score, per tag.
    """

    accuracy: dict[str, float]
    questions: dict[str, int]
    unusable: int = 0
    unscorable: dict[str, int] = field(default_factory=dict)


def choose_questions(rows: Sequence[Row], per_tag: int, seed: int = 0) -> list[Row]:
    """
    At most `per_tag` rows of each tag, drawn by seed, in canonical tag order. Rows without a tag count as one group.
    """
    by_tag: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_tag[_tag(row)].append(row)
    order = [*map(str, ModalityTag), ""]
    draw = random.Random(seed)
    return [row for tag in order if tag in by_tag for row in draw.sample(by_tag[tag], min(per_tag, len(by_tag[tag])))]


def sampled_accuracy(
    generate: Callable[[Sequence[Row]], Sequence[str | None]],
    rows: Sequence[Row],
    score: Callable[..., Sequence[float | None]],
    questions_per_tag: int = 64,
    seed: int = 0,
) -> SampledAccuracy:
    """
    Asks each question once and scores the sampled answers.

    The random stream of the run is left as it was, so that evaluating does not change training.

    Args:
        generate: one completion per row, `None` for a row whose media cannot be used, e.g.
            [`~maple_trl.OmniGRPOTrainer.generate_completions`].
        rows: questions with a `tag` and what `score` reads.
        score: a reward function with TRL's signature; its mean is the accuracy, `None` or NaN leaves a question out.

    Raises:
        ValueError: when no question could be scored.
    """
    chosen = choose_questions(rows, questions_per_tag, seed)
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        completions = generate(chosen)
    answered = [(row, text) for row, text in zip(chosen, completions, strict=True) if text is not None]
    scores: dict[str, list[float]] = defaultdict(list)
    unscorable: Counter[str] = Counter()
    for (row, _), value in zip(answered, _scores(score, answered), strict=True):
        if value is not None and not math.isnan(value):
            for group in dict.fromkeys(("all", _tag(row))):
                scores[group].append(value)
        else:
            unscorable[_tag(row)] += 1
    if not scores:
        raise ValueError(f"None of {len(chosen)} questions could be scored; do the rows have a solution?")
    groups = [group for group in ("all", *ModalityTag) if group in scores]
    return SampledAccuracy(
        accuracy={str(group): sum(scores[group]) / len(scores[group]) for group in groups},
        questions={str(group): len(scores[group]) for group in groups},
        unusable=len(chosen) - len(answered),
        unscorable=dict(unscorable),
    )


def _scores(score: Callable, answered: list[tuple[Row, str]]) -> Sequence[float | None]:
    if not answered:
        return []
    rows = [row for row, _ in answered]
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    completions = [[{"role": "assistant", "content": text}] for _, text in answered]
    return score(prompts=[row["prompt"] for row in rows], completions=completions, **columns)


def _tag(row: Row) -> str:
    return str(ModalityTag.parse(row["tag"])) if row.get("tag") else ""
