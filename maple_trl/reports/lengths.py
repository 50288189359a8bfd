"""Accuracy by the length of the completion, of each run; and what a second evaluation gains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maple_trl.files import as_json
from maple_trl.metrics.intervals import bootstrap_mean
from maple_trl.metrics.significance import compare_runs
from maple_trl.reports.folders import RunData
from maple_trl.reports.questions import NOT_NAMED, question_means, share_names
from maple_trl.reports.rollouts import Rollouts, clip_names, question_names
from maple_trl.reports.sections import Section, lines_by_phase, missing, no_rollouts, task_rewards


BINS = 5
RESAMPLES = 2000


def length_sections(
    runs: Sequence[RunData], rollouts: Sequence[Rollouts | None], bounds: Sequence[int] = ()
) -> list[Section]:
    """
    Return, of each run, the task reward of its completions by their tokens, with 95 % intervals.

    Of a training run they are the fresh ones of the last fifth of its steps, of an evaluation those of its first access.
    Completions of one clip (where none is named, of one question) are one unit of the intervals.

    Args:
        bounds: where bins begin, in tokens; without any they hold about as many completions each, those of all runs
            counted together.
    """
    scored = [_scored(run, found) for run, found in zip(runs, rollouts, strict=True)]
    tokens = [count for part in scored if part for count in part["tokens"]]
    starts = bin_starts(tokens, bounds)
    return [_section(*parts, starts) for parts in zip(runs, rollouts, scored, strict=True)]


def bin_starts(tokens: Sequence[float], bounds: Sequence[int] = ()) -> list[int]:
    """Return where the bins of lengths begin: at the given bounds from 0 on, else so that they hold about as many each."""
    if bounds:
        return sorted({0, *bounds})
    if not tokens:
        return [0]
    return sorted({int(value) for value in np.quantile(tokens, np.linspace(0, 1, BINS + 1)[:-1], method="lower")})


def _scored(run: RunData, rollouts: Rollouts | None) -> dict[str, Any] | None:
    if rollouts is None or not len(rollouts):
        return None
    reward, values = task_rewards(rollouts)
    tokens, replayed = rollouts.get("tokens"), rollouts.get("replayed")
    lines = [i for i, v in enumerate(values) if v is not None and tokens[i] is not None and not replayed[i]]
    *_, lines = [[], *lines_by_phase(run, rollouts, lines).values()]
    if not lines:
        return None
    clips, questions = clip_names(rollouts), question_names(rollouts)
    return {
        "reward": reward,
        "values": [values[i] for i in lines],
        "tokens": [tokens[i] for i in lines],
        "units": [clips[i] or questions[i] for i in lines],
    }


def _section(run: RunData, rollouts: Rollouts | None, scored: dict[str, Any] | None, starts: list[int]) -> Section:
    if rollouts is None or not len(rollouts):
        return no_rollouts(run)
    if scored is None:
        return missing("No completion has both a reward and a number of tokens.")
    values, units = np.asarray(scored["values"], dtype=float), np.asarray(scored["units"], dtype=object)
    bins = []
    for label, own in _binned(scored["tokens"], starts):
        estimate = bootstrap_mean(values[own], resamples=RESAMPLES, clusters=units[own].tolist())
        bins.append(label | {name: getattr(estimate, name) for name in ("value", "low", "high", "count")})
    return as_json({"reward": scored["reward"], "bins": bins})


def _binned(tokens: Sequence[float], starts: list[int]) -> list[tuple[dict[str, Any], NDArray[np.bool_]]]:
    """Return the bins that hold something: their first and last number of tokens, and which values are in them."""
    places = np.searchsorted(starts, tokens, side="right") - 1
    longest = int(np.ceil(max(tokens)))
    found = []
    for i, start in enumerate(starts):
        own = places == i
        if own.any():
            end = starts[i + 1] - 1 if i + 1 < len(starts) else longest
            found.append(({"from": start, "to": max(end, start)}, own))
    return found


def length_gains(runs: Sequence[RunData], bounds: Sequence[int] = ()) -> list[Section]:
    """
    Return what each further evaluation gains over the first run, by how long the reasoning is (AVATAR, Fig. 5).

    The length of a question is the mean over the completions of both runs, so that neither's chooses the bin. Compared
    are questions that both have scored, under the first access that both have, in pairs and by clip, as
    [`~maple_trl.metrics.significance.compare_runs`] does. Training runs alone have no questions in common to speak of.
    """
    if not any(run.kind == "evaluation" for run in runs):
        return []
    return [{"run": i} | _gains(runs[0], run, bounds) for i, run in enumerate(runs[1:], 1)]


def _gains(first_run: RunData, second_run: RunData, bounds: Sequence[int]) -> Section:
    pair = (first_run, second_run)
    if not all(run.kind == "evaluation" and run.table is not None for run in pair):
        return missing("A gain by length needs two evaluations, of the same questions.")
    by_name = share_names(*pair)
    (first, clips), (second, more) = (question_means(run, "score", by_name) for run in pair)
    lengths = [question_means(run, "completion_tokens", by_name)[0] for run in pair]
    clips = more | clips
    access = next((access for access in first_run.accesses if access in first and access in second), None)
    if access is None:
        return missing("The evaluations have no access in common." if by_name else NOT_NAMED)
    both = [
        key for key in first[access] if key in second[access] and all(key in own.get(access, {}) for own in lengths)
    ]
    if not both:
        return missing("The runs have scored no question in common." if by_name else NOT_NAMED)
    tokens = [sum(own[access][key] for own in lengths) / 2 for key in both]
    bins = []
    for label, own in _binned(tokens, bin_starts(tokens, bounds)):
        keys = [both[i] for i in np.flatnonzero(own)]
        found = compare_runs(
            [first[access][key] for key in keys],
            [second[access][key] for key in keys],
            resamples=RESAMPLES,
            clusters=[clips.get(key) for key in keys],
        )
        names = ("difference", "low", "high", "p_value", "count", "clips")
        bins.append(label | {name: getattr(found, name) for name in names})
    return as_json({"access": access, "bins": bins})
